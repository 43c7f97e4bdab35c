"""Files appear complete or not at all, and what is read is data that fits or is refused."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from tiny import tiny_teacher

from ard.checkpoints import (
    load_student,
    load_teacher,
    load_weights,
    read_json,
    read_tensors,
    replacing,
    save_teacher,
    write_json,
    write_tensors,
)
from ard.diffusion import Diffusion


def test_weights_that_do_not_fit_are_listed_and_nothing_is_loaded() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 1))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    tensors = {name: torch.full_like(value, 7) for name, value in before.items()}
    tensors["0.weight"] = torch.zeros(3, 5)
    tensors["extra"] = torch.zeros(1)
    del tensors["1.bias"]
    with pytest.raises(ValueError, match=r"^file: does not fit the model: ") as caught:
        load_weights(model, tensors, "file")
    for complaint in (
        "missing 1.bias",
        "unexpected extra",
        "0.weight has shape (3, 5), the model wants (3, 2)",
    ):
        assert complaint in str(caught.value)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_list_of_what_does_not_fit_is_complete_and_short() -> None:
    """Layers are counted together; a file of a thousand names does not make a message of a thousand."""
    model = torch.nn.Sequential(*[torch.nn.Linear(2, 2) for _ in range(5)])
    own = model.state_dict()
    tensors = {name: own[name] for name in ("0.weight", "3.bias", "4.weight", "4.bias")}
    tensors |= {"1.weight": torch.zeros(3), "2.weight": torch.zeros(3)}
    extra = {"7.a": torch.zeros(1), "9.a": torch.zeros(1), "b": torch.zeros(1)}
    with pytest.raises(ValueError, match="does not fit") as caught:
        load_weights(model, {**tensors, **extra}, "file")
    assert str(caught.value) == (
        "file: does not fit the model: missing {0..2}.bias, 3.weight; unexpected {7,9}.a, b; "
        "{1,2}.weight have shape (3,), the model wants (2, 2)"
    )
    with pytest.raises(ValueError, match=r"x99 and 900 more$"):
        load_weights(model, {**own, **{f"x{i}": torch.zeros(1) for i in range(1000)}}, "file")


@pytest.mark.parametrize("folder", [False, True])
def test_a_failed_write_leaves_what_was_there(tmp_path: Path, folder: bool) -> None:
    path = tmp_path / "deep" / "thing"

    def write(content: str, fail: bool) -> None:
        with replacing(path) as temporary:
            if folder:
                temporary.mkdir()
            (temporary / "file" if folder else temporary).write_text(content)
            assert not path.exists() or (path / "file" if folder else path).read_text() == "first"
            if fail:
                raise RuntimeError("disk")

    for kept in (None, "first"):
        with pytest.raises(RuntimeError, match="disk"):
            write("broken", fail=True)
        assert path.exists() == (kept is not None)
        assert {p.name for p in (tmp_path / "deep").iterdir()} == ({"thing"} if kept else set())
        if kept is None:
            write("first", fail=False)
    write("second", fail=False)
    assert (path / "file" if folder else path).read_text() == "second"
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["thing"]


def test_tensors_that_share_memory_or_are_strided_are_written(tmp_path: Path) -> None:
    base = torch.arange(6.0).view(2, 3)
    write_tensors(tmp_path / "x.safetensors", {"a": base, "b": base, "c": base.T})
    got = read_tensors(tmp_path / "x.safetensors")
    assert torch.equal(got["a"], base)
    assert torch.equal(got["b"], base)
    assert torch.equal(got["c"], base.T)


def test_files_have_the_permissions_of_any_other(tmp_path: Path) -> None:
    """A recording is read by other people's jobs."""
    write_tensors(tmp_path / "x.safetensors", {"a": torch.zeros(1)})
    (tmp_path / "plain").write_text("")
    assert os.stat(tmp_path / "x.safetensors").st_mode == os.stat(tmp_path / "plain").st_mode


def test_a_teacher_comes_back_as_it_was(tmp_path: Path) -> None:
    model = tiny_teacher(3, learn_sigma=True)
    save_teacher(tmp_path, model, Diffusion("cosine", "x0", 500))
    loaded, diffusion = load_teacher(tmp_path)
    assert diffusion.config == {"schedule": "cosine", "prediction": "x0", "timesteps": 500}
    assert loaded.config == model.config
    assert not loaded.training
    assert not any(p.requires_grad for p in loaded.parameters())
    x, t, labels = torch.randn(2, 1, 28, 28), torch.tensor([1, 400]), torch.tensor([0, 10])
    assert torch.equal(loaded(x, t, labels), model.eval()(x, t, labels))


def test_a_folder_of_something_else_is_refused(tmp_path: Path, teacher: Path, student: Path) -> None:
    with pytest.raises(ValueError, match="holds a DiT, wanted is an ARDTransformer"):
        load_student(teacher)
    with pytest.raises(ValueError, match="holds an ARDTransformer, wanted is a DiT"):
        load_teacher(student)
    with pytest.raises(FileNotFoundError, match=r"no config\.json there"):
        load_teacher(tmp_path)
    for description in (
        {"class": "DiT"},
        {"class": "DiT", "config": {"x": 1}},
        {"class": "DiT", "config": 3},
    ):
        write_json(tmp_path / "config.json", description)
        with pytest.raises(ValueError, match=r"config\.json: does not describe a DiT"):
            load_teacher(tmp_path)
    for nothing in ([1], {}, {"class": ["DiT"]}, {"class": ""}):
        write_json(tmp_path / "config.json", nothing)
        with pytest.raises(ValueError, match="holds no model, wanted is a DiT"):
            load_teacher(tmp_path)
    write_json(tmp_path / "config.json", {**read_json(student / "config.json"), "trajectories": ["x0"]})
    with pytest.raises(ValueError, match=r"config\.json: does not describe an ARDTransformer"):
        load_student(tmp_path)

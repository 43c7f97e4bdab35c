"""What is not finite is refused where it is written and where it is read."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import tiny_teacher
from torch import Tensor

from ard.checkpoints import (
    WEIGHTS,
    load_student,
    load_teacher,
    save_student,
    save_teacher,
    sha256,
    write_checkpoint,
    write_json,
    write_tensors,
)
from ard.diffusion import Diffusion
from ard.features import load_classifier
from ard.finite import check_finite
from ard.models import ARDTransformer
from ard.models.classifier import Classifier
from ard.runs import Run, newest_checkpoint, read_log
from ard.training import Optimisation

_DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
]


@pytest.mark.parametrize("dtype", _DTYPES, ids=str)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("at", [0, 500, 1000])
def test_one_value_is_enough(dtype: torch.dtype, value: float, at: int) -> None:
    """Anywhere in a tensor of any dtype that has it; the largest values of a dtype are finite."""
    x = torch.randn(1001).to(dtype)
    x[0], x[-1] = torch.finfo(dtype).max, torch.finfo(dtype).min
    check_finite("file", {"a": x, "empty": x[:0], "n": torch.tensor([2**62]), "yes": torch.tensor(True)}, "")
    if dtype == torch.float8_e4m3fn and value != torch.nan:
        return  # has no infinity
    x[at] = value
    counted = "1 NaN and 0 infinite" if math.isnan(value) else "0 NaN and 1 infinite"
    with pytest.raises(ValueError, match=rf"^file: b is not finite \({counted} of 1001 values\); nothing$"):
        check_finite("file", {"a": torch.ones(3), "b": x}, "nothing")
    with pytest.raises(ValueError, match=r"b is not finite .*, nor are 1 more tensors; nothing$"):
        check_finite("file", {"b": x, "c": x}, "nothing")


def _spoilt(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    name = [*tensors][3]
    value = tensors[name].clone()
    value.view(-1)[-1] = torch.nan
    return {**tensors, name: value}


def _teacher(out: Path) -> None:
    model = tiny_teacher()
    save_teacher(out, model, Diffusion("linear", "v"), _spoilt(model.state_dict()))


def _student(out: Path) -> None:
    model = ARDTransformer.from_teacher(tiny_teacher(), 2, 1)
    save_student(out, model, {}, _spoilt(model.state_dict()))


def _run(out: Path) -> None:
    groups = {"model": {"a": torch.ones(2)}, "ema": {"a": torch.tensor([1.0, torch.inf])}}
    Run(out, "distill", Optimisation()).save_checkpoint(3, groups, 2)


@pytest.mark.parametrize(
    "write",
    [_teacher, _student, _run,
     lambda out: write_tensors(out / "x.safetensors", {"a": torch.tensor([1.0, -torch.inf])}),
     lambda out: write_checkpoint(out / "x.pt", {"a": torch.tensor([1.0, torch.nan])}),
     lambda out: write_checkpoint(out / "x.pt", {"ema": {"a": torch.tensor([1.0, torch.nan])}})],
    ids=["teacher", "student", "checkpoint", "safetensors", "pt", "nested pt"],
)  # fmt: skip
def test_nothing_is_written(write: Callable[[Path], None], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r" is not finite \(.*\); nothing was written"):
        write(tmp_path / "out")
    assert not [path for path in tmp_path.rglob("*") if path.suffix in (".safetensors", ".pt", ".tmp")]
    assert not (tmp_path / "out" / "checkpoints" / "step-00000003").exists()


@pytest.mark.parametrize("kind", ["teacher", "student"])
def test_weights_that_are_not_finite_are_not_loaded(
    kind: str, teacher: Path, student: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree({"teacher": teacher, "student": student}[kind], tmp_path / "folder")
    save_file(_spoilt(load_file(folder / WEIGHTS)), folder / WEIGHTS)
    with pytest.raises(
        ValueError, match=r"model\.safetensors: .* is not finite \(1 NaN .*; accepted are finite"
    ):
        load_teacher(folder) if kind == "teacher" else load_student(folder)


def test_a_classifier_that_is_not_finite_is_not_loaded(tmp_path: Path) -> None:
    write_json(tmp_path / "config.json", {"class": "Classifier", "config": {}})
    save_file(_spoilt(Classifier().state_dict()), tmp_path / WEIGHTS)
    with pytest.raises(ValueError, match=r"model\.safetensors: .* is not finite \(1 NaN"):
        load_classifier(tmp_path)


def test_a_checkpoint_that_is_not_finite_names_the_way_out(tmp_path: Path) -> None:
    """Earlier versions wrote some: their runs go on from the checkpoint before."""
    run = Run(tmp_path, "distill", Optimisation())
    for step in (3, 6):
        run.save_checkpoint(step, {"model": {"a": torch.ones(2)}}, 9)
    file = tmp_path / "checkpoints" / "step-00000006" / "model.safetensors"
    save_file({"a": torch.tensor([1.0, torch.nan])}, file)
    write_json(file.with_name("state.json"), {"step": 6, "sha256": {"model": sha256(file)}})
    with pytest.raises(
        ValueError, match=r"model\.safetensors: a is not finite .*; remove .*/step-00000006 to go"
    ):
        newest_checkpoint(tmp_path)
    shutil.rmtree(file.parent)
    found = newest_checkpoint(tmp_path)
    assert found is not None
    assert found[0] == 3


def test_a_log_is_json(tmp_path: Path) -> None:
    """null in place of what JSON has no word for."""
    run = Run(tmp_path, "distill", Optimisation())
    run.open_log(0)
    run.log(1, {"loss": torch.nan, "terms": [1.5, torch.inf, -torch.inf], "norm": 2.0, "skipped": 1})
    run.close()
    text = '{"step": 1, "loss": null, "terms": [1.5, null, null], "norm": 2.0, "skipped": 1}\n'
    assert (tmp_path / "log.jsonl").read_text() == text
    assert len(read_log(tmp_path)) == 1

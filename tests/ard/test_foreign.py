"""Checkpoint files as people have them: each converts to the bits of the plain file, or is refused by a line
that names the way in."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from strangers import (
    ALONE,
    CONTAINERS,
    PREFIXES,
    bits,
    converted,
    furniture,
    half,
    lit_ema,
    make_place,
    plain,
    same,
    under,
    zeros,
)
from tiny import tiny_teacher

from ard.checkpoints import load_teacher, save_teacher
from ard.cli import main
from ard.convert import ConvertConfig, convert
from ard.diffusion import Diffusion
from ard.foreign import read_checkpoint
from ard.models import PRESETS, DiT


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_place(tmp_path_factory.mktemp("strangers"))


# The table: every container with every prefix, alone and with furniture, in both formats of torch.save


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("key", ["bare", *ALONE])
def test_one_set_of_weights(place: Path, tmp_path: Path, key: str, prefix: str) -> None:
    names = PREFIXES[prefix](plain())
    alone = names if key == "bare" else {key: names}
    for i, content in enumerate(
        (alone, {**alone, "epoch": 3} if key == "bare" else {**furniture(), **alone})
    ):
        torch.save(content, tmp_path / "w.pt", _use_new_zipfile_serialization=i == 0)
        assert bits(tmp_path / "w.pt", plain())
        assert not read_checkpoint(tmp_path / "w.pt").notes
    if prefix in ("plain", "model._orig_mod."):
        assert same(place, converted(place, content, tmp_path))


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("container", CONTAINERS)
def test_an_average_is_taken_before_raw_weights(
    place: Path, tmp_path: Path, container: str, prefix: str, capsys: pytest.CaptureFixture[str]
) -> None:
    change = PREFIXES[prefix]
    bare = CONTAINERS[container](change(plain()), change(zeros()))
    rest = {"epoch": 3} if container == "flat, at the root" else furniture()
    for i, content in enumerate((bare, {**rest, **bare})):
        torch.save(content, tmp_path / "w.pt", _use_new_zipfile_serialization=i == 0)
        assert bits(tmp_path / "w.pt", plain())
    if prefix in ("plain", "model._orig_mod."):
        assert same(place, converted(place, content, tmp_path))
        lines = capsys.readouterr().out.splitlines()
        assert re.fullmatch(r"weights: \S.* \(averaged; also in the file: \S+\)", lines[0])


@pytest.mark.parametrize("above", ["", "diffusion_model."])
@pytest.mark.parametrize("furnished", [False, True])
def test_an_average_whose_names_have_lost_their_dots(
    place: Path, tmp_path: Path, above: str, furnished: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    """LitEma counts names from its model on; what is never trained comes from the raw weights."""
    raw = {**zeros(), "pos_embed": plain()["pos_embed"]}
    names = {**under(f"model.{above}", raw), **under("model_ema.", lit_ema(plain(), above))}
    content = {"state_dict": names, **(furniture() if furnished else {})}
    assert same(place, converted(place, content, tmp_path))
    model = f"state_dict.model{above and '.'}{above[:-1]}"
    assert capsys.readouterr().out.splitlines()[:2] == [
        f"weights: state_dict.model_ema (averaged; also in the file: {model})",
        f"weights: pos_embed, which is never trained, from {model}",
    ]


@pytest.mark.parametrize("kind", ["plain", "module.", "model.module."])
def test_safetensors_with_prefixes(place: Path, tmp_path: Path, kind: str) -> None:
    prefix = PREFIXES[kind]
    assert same(place, converted(place, prefix(plain()), tmp_path, ".safetensors"))
    both = {**under("ema.", prefix(plain())), **under("model.", prefix(zeros()))}
    assert same(place, converted(place, both, tmp_path, ".safetensors"))


# What leaves a choice


@pytest.mark.parametrize(
    ("content", "keys"),
    [(lambda: {"model": zeros(), "model_ema1": plain(), "model_ema2": half()},
      ["model_ema1", "model_ema2"]),
     (lambda: {"ema_0.999": plain(), "ema_0.9999": half()}, ["ema_0.999", "ema_0.9999"]),
     (lambda: {"student": half(), "teacher": plain()}, ["student", "teacher"]),
     (lambda: {"model": half(), "teacher": plain()}, ["model", "teacher"]),
     (lambda: {"model": half(), "state_dict": plain()}, ["model", "state_dict"]),
     (lambda: {"model": half(), "slow": under("module.", plain())}, ["model", "slow.module"]),
     (lambda: {"state_dict": {**under("net.", half()), **under("teacher.", plain())}},
      ["state_dict.net", "state_dict.teacher"]),
     (lambda: {"state_dict": {**under("ema.a.", half()), **under("model.", plain())},
               "callbacks": {"x": {"ema_weights": half()}}},
      ["callbacks.x.ema_weights", "state_dict.ema"])],
    ids=["averages", "rates", "teacher", "model, teacher", "two raw", "unknown", "Lightning", "hidden"],
)  # fmt: skip
def test_a_choice_is_the_users(place: Path, tmp_path: Path, content: Any, keys: list[str]) -> None:
    for rest in ({}, furniture()):
        torch.save({**rest, **content()}, tmp_path / "w.pt")
        with pytest.raises(ValueError, match="say which: ") as caught:
            convert(ConvertConfig(tmp_path / "w.pt", tmp_path / "out", teacher=place / "teacher"))
        assert sorted(re.findall(r"--weights-key (\S+)", str(caught.value))) == keys
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("prefix", ["plain", "model._orig_mod."])
def test_the_key_decides(place: Path, tmp_path: Path, prefix: str) -> None:
    """Every key that a refusal names, and raw weights for who asks for them."""
    change = PREFIXES[prefix]
    content = {"model_ema1": change(plain()), "model_ema2": change(half()), "model": change(zeros()),
               "extra": {"deep": change(half())}, **furniture()}  # fmt: skip
    torch.save(content, tmp_path / "w.pt")
    for key, names in (("model_ema1", plain()), ("model_ema2", half()), ("model", zeros()),
                       ("extra.deep", half())):  # fmt: skip
        read = read_checkpoint(tmp_path / "w.pt", key).tensors
        assert all(torch.equal(read[name], names[name]) for name in names), key
    assert same(place, converted(place, content, tmp_path, weights_key="model_ema1"))
    with pytest.raises(ValueError, match=r"--weights-key is 'ema', the file has .*model_ema1"):
        read_checkpoint(tmp_path / "w.pt", "ema")


def test_what_an_optimiser_keeps_by_name_is_no_average(place: Path, tmp_path: Path) -> None:
    moments = {"exp_avg": half(), "exp_avg_sq": half(), "momentum_buffer": half()}
    by_name = {name: {"exp_avg": tensor, "exp_avg_sq": tensor} for name, tensor in half().items()}
    for optimiser in (moments, {"state": by_name}, half()):
        assert same(place, converted(place, {"optimizer": optimiser, "model": plain()}, tmp_path))
    assert same(place, converted(place, {**moments, "model": plain()}, tmp_path))


def test_what_lies_beside_a_prefix_is_not_left_out_silently(place: Path, tmp_path: Path) -> None:
    names = {**under("model.", plain()), "betas": torch.ones(3), "first_stage_model.x": torch.ones(3)}
    content = {"state_dict": names}
    message = (r"others are not \(betas, first_stage_model\.\*\): --weights-key state_dict\.model takes what "
               r"is there, --ignore 'betas' 'first_stage_model\.\*' leaves")  # fmt: skip
    with pytest.raises(ValueError, match=message):
        converted(place, content, tmp_path)
    assert same(place, converted(place, content, tmp_path, weights_key="state_dict.model"))
    assert same(place, converted(place, content, tmp_path, ignore=("betas", "first_stage_model.*")))
    with pytest.raises(ValueError, match="others are not"):  # a raw model with its average below it
        converted(place, {**zeros(), **under("ema.", plain())}, tmp_path)
    assert same(place, converted(place, {**plain(), **under("ema.", half())}, tmp_path, ignore=("ema.*",)))
    content = {"state_dict": {**plain(), **under("ema.", half())}}
    assert same(place, converted(place, content, tmp_path, weights_key="state_dict"))


def test_keys_that_nobody_knows_are_listed(place: Path, tmp_path: Path) -> None:
    content = {"denoising_thing": plain(), "vae": {"x": torch.ones(1)}}
    with pytest.raises(ValueError, match="under denoising_thing, vae; say with --weights-key KEY which"):
        converted(place, content, tmp_path)
    assert same(place, converted(place, content, tmp_path, weights_key="denoising_thing"))
    names = under("lit_module.", plain())
    with pytest.raises(ValueError, match=r"--weights-key lit_module takes what is under lit_module$"):
        converted(place, names, tmp_path)
    assert same(place, converted(place, names, tmp_path, weights_key="lit_module"))


def test_an_average_without_names_is_refused(place: Path, tmp_path: Path) -> None:
    """diffusers' EMAModel and torch_ema keep a list in the order of the parameters."""
    average = {"decay": 0.999, "optimization_step": 3, "shadow_params": list(plain().values())}
    for content in (average, {"ema": average}, {"model": half(), "ema": average}):
        with pytest.raises(
            ValueError, match=r"shadow_params, are a list without names; .*save\(model\.state_d"
        ):
            converted(place, content, tmp_path)
    with pytest.raises(ValueError, match=r"--weights-key model takes what was not averaged$"):
        converted(place, {"model": plain(), "ema": average}, tmp_path)
    content = {"model": plain(), "ema": average}
    assert same(place, converted(place, content, tmp_path, weights_key="model"))


def test_two_names_that_are_one_without_prefixes_are_named(place: Path, tmp_path: Path) -> None:
    names = {**plain(), "blocks.0._orig_mod.attn.qkv.bias": torch.ones(96)}
    name = "blocks.0.attn.qkv.bias"
    both = re.escape(f"{name} and blocks.0._orig_mod.attn.qkv.bias are both {name}")
    with pytest.raises(ValueError, match=both):
        converted(place, names, tmp_path)
    raw = {"a.bc": torch.ones(2), "ab.c": torch.ones(2), "d": torch.ones(2)}
    names = {**under("model.", raw), "model_ema.abc": torch.ones(2), "model_ema.d": torch.ones(2)}
    with pytest.raises(
        ValueError, match=r"state_dict\.model_ema names abc, which is a\.bc or ab\.c without dots"
    ):
        converted(place, {"state_dict": names}, tmp_path)


# Names that the model does not have, and other shapes


@pytest.mark.parametrize("prefix", PREFIXES)
def test_heads_of_training_alone_are_ignored_by_request(place: Path, tmp_path: Path, prefix: str) -> None:
    extra = {
        "projectors.0.weight": torch.ones(3),
        "projectors.1.weight": torch.ones(3),
        "scale": torch.ones(()),
    }
    names = PREFIXES[prefix]({**plain(), **extra})
    content = {"model": zeros(), "ema": names}
    advice = "unexpected projectors.{0,1}.weight, scale; --ignore 'projectors.*' 'scale' leaves out what"
    with pytest.raises(ValueError, match=re.escape(advice)):
        converted(place, content, tmp_path)
    assert same(place, converted(place, content, tmp_path, ignore=("projectors.*", "scale")))
    message = r"--ignore 'blocks\.1\.\*' leaves out blocks\.1\..*, which the model needs"
    with pytest.raises(ValueError, match=message):
        converted(place, content, tmp_path, ignore=("projectors.*", "scale", "blocks.1.*"))
    if prefix == "module.":  # by the name in the file
        with pytest.raises(ValueError, match=r"--ignore 'module\.blocks\.1\.\*' leaves out blocks\.1\."):
            converted(place, content, tmp_path, ignore=("projectors.*", "scale", "module.blocks.1.*"))
    with pytest.raises(ValueError, match=r"--ignore 'decoder\.\*' fits no name"):
        converted(place, content, tmp_path, ignore=("projectors.*", "scale", "decoder.*"))


def test_a_deeper_network_is_not_cut_by_advice(place: Path, tmp_path: Path) -> None:
    names = {**plain(), "blocks.2.attn.qkv.bias": torch.ones(96)}
    with pytest.raises(ValueError, match=r"unexpected blocks\.2\.attn\.qkv\.bias$"):
        converted(place, names, tmp_path)


@pytest.mark.parametrize("extra", [False, True])
def test_a_class_table_without_null_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, extra: bool, teacher: Path
) -> None:
    """It is either table; which one, only its owner knows."""
    monkeypatch.setitem(PRESETS, "DiT-S/2", {"depth": 1, "width": 32, "heads": 2, "patch_size": 2})
    dit = DiT(8, width=32, depth=1, heads=2, num_classes=10, null_class=False)
    names = {**dit.state_dict(), **({"projectors.x": torch.ones(1)} if extra else {})}
    torch.save({"ema": names}, tmp_path / "w.pt")
    options: dict[str, Any] = {"preset": "DiT-S/2", "input_size": 8, "num_classes": 10}
    message = (r"its class table has 10 rows: --num-classes 9 if the last one is the null class, "
               r"--num-classes 10 --no-null-class if there is none")  # fmt: skip
    with pytest.raises(ValueError, match=message) as caught:
        convert(ConvertConfig(tmp_path / "w.pt", tmp_path / "t", **options))
    assert ("--ignore 'projectors.*'" in str(caught.value)) == extra
    options["ignore"] = ("projectors.*",) if extra else ()
    convert(ConvertConfig(tmp_path / "w.pt", tmp_path / "t", **options, null_class=False))
    loaded, _ = load_teacher(tmp_path / "t")
    assert (loaded.num_classes, loaded.null_class) == (10, False)
    assert all(torch.equal(value, names[name]) for name, value in loaded.state_dict().items())
    convert(ConvertConfig(tmp_path / "w.pt", tmp_path / "t", **{**options, "num_classes": 9}))
    assert load_teacher(tmp_path / "t")[0].null_class
    table = {"y_embedder.embedding_table.weight": torch.ones(7, 32)}
    torch.save({**tiny_teacher().state_dict(), **table}, tmp_path / "w.pt")
    with pytest.raises(ValueError, match="its class table has 7 rows: another teacher than"):
        convert(ConvertConfig(tmp_path / "w.pt", tmp_path / "t", teacher=teacher))


# The command line, and what other code assumes


def test_the_command_says_what_it_took(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = {**plain(), "projectors.x": torch.ones(1), "decoder.x": torch.ones(1)}
    torch.save({"model": zeros(), "model_ema1": names, "model_ema2": half()}, tmp_path / "w.pt")
    command = f"convert --weights {tmp_path}/w.pt --out {tmp_path}/t --teacher {place}/teacher"
    with pytest.raises(SystemExit):
        main(command.split())
    assert "say which: --weights-key model_ema1 or --weights-key model_ema2" in capsys.readouterr().err
    command += " --weights-key model_ema1"
    with pytest.raises(SystemExit):
        main(command.split())
    (advice,) = re.findall(r"--ignore .*'", capsys.readouterr().err)
    main(shlex.split(f"{command} {advice}"))
    assert capsys.readouterr().out.splitlines() == [
        "weights: model_ema1 (averaged; also in the file: model, model_ema2)", f"teacher: {tmp_path}/t"
    ]  # fmt: skip
    assert same(place, tmp_path / "t")


@pytest.mark.parametrize("classes", [10, 1000, 1001])
def test_another_null_class_than_diffusers_pipeline_assumes_is_said(
    tmp_path: Path, classes: int, capsys: pytest.CaptureFixture[str]
) -> None:
    save_teacher(tmp_path / "t", tiny_teacher(num_classes=classes), Diffusion())
    convert(ConvertConfig(tmp_path / "t", tmp_path / "d", to="diffusers"))
    line = f"warning: diffusers' DiTPipeline takes class 1000 for the null class, this teacher's is {classes}"
    assert (line in capsys.readouterr().out) == (classes != 1000)

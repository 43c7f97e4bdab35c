"""Checkpoint files as people have them: each converts to the bits of the plain file, or is refused by a line
that names the way in; nothing in them is executed."""

from __future__ import annotations

import argparse
import collections
import dataclasses
import datetime
import enum
import fractions
import functools
import os
import pickle
import re
import shlex
import zipfile
from collections.abc import Callable
from pathlib import Path, PurePath, PureWindowsPath
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import tiny_teacher
from torch import Tensor

from ard.checkpoints import load_teacher, read_json, save_teacher, sha256, write_json
from ard.cli import main
from ard.convert import ConvertConfig, convert
from ard.diffusion import Diffusion
from ard.foreign import read_checkpoint
from ard.unpickling import Opaque, read_pickle

Names = dict[str, Tensor]


def _plain() -> Names:
    return dict(tiny_teacher().state_dict())


def _zeros() -> Names:
    return {name: torch.zeros_like(tensor) for name, tensor in _plain().items()}


def _half() -> Names:
    return {name: tensor / 2 for name, tensor in _plain().items()}


def _under(prefix: str, names: Names) -> Names:
    return {f"{prefix}{name}": tensor for name, tensor in names.items()}


def _compiled_blocks(names: Names) -> Names:
    """As torch.compile of every block names them."""
    return {re.sub(r"^(.*blocks\.\d+\.)", r"\1_orig_mod.", name): tensor for name, tensor in names.items()}


def _lit_ema(names: Names, above: str = "") -> Names:
    """Stable Diffusion's average: parameters that are trained, without dots in their names."""
    trained = {f"{above}{name}".replace(".", ""): t for name, t in names.items() if name != "pos_embed"}
    return {**trained, "decay": torch.tensor(0.9999), "num_updates": torch.tensor(3, dtype=torch.int32)}


_PREFIXES: dict[str, Callable[[Names], Names]] = {
    "plain": lambda w: w,
    **{prefix: functools.partial(_under, prefix) for prefix in (
        "module.", "_orig_mod.", "model.", "net.", "module._orig_mod.", "_orig_mod.module.", "model.module.",
        "model._orig_mod.", "model.diffusion_model.", "module.model._orig_mod.")},
    "blocks.0._orig_mod.": _compiled_blocks,
    "model. blocks.0._orig_mod.": lambda w: _compiled_blocks(_under("model.", w)),
    "fsdp": lambda w: {n.replace("attn.", "_fsdp_wrapped_module.attn."): t for n, t in w.items()},
}  # fmt: skip

# Keys of a file with one set of weights.
_ALONE = ("model", "state_dict", "model_state_dict", "net", "network", "params", "module", "student",
          "teacher", "ema")  # fmt: skip
# Keys of averaged weights and of raw ones.
_PAIRS = (
    ("ema", "model"), ("model_ema", "model"), ("ema_model", "model"), ("model_ema1", "model"),
    ("state_dict_ema", "state_dict"), ("ema_state_dict", "state_dict"), ("params_ema", "params"),
    ("params-ema", "params"), ("ema_0.9999", "model"), ("EMAModel", "model"), ("net_ema", "net"),
    ("swa_model", "model"), ("G_ema", "G"), ("ema", "student"),
)  # fmt: skip
# Content of a file from averaged weights, and from raw ones that must never come out.
_CONTAINERS: dict[str, Callable[[Names, Names], dict[str, Any]]] = {
    **{f"{average} beside {key}": (lambda a, k: lambda w, raw: {k: raw, a: w})(average, key)
       for average, key in _PAIRS},
    "the average first": lambda w, raw: {"ema": w, "model": raw},
    "fairseq": lambda w, raw: {"model": raw, "extra_state": {"ema": w, "epoch": 3}},
    "a callback's": lambda w, raw: {
        "state_dict": raw, "callbacks": {"EMA{'decay': 0.999}": {"ema_weights": w}}},
    "AveragedModel": lambda w, raw: {
        "model": raw, "ema": {"n_averaged": torch.tensor(7), **_under("module.", w)}},
    "an average in an average": lambda w, raw: {"model": raw, "ema": {"decay": 0.999, "shadow": w}},
    "ema_pytorch": lambda w, raw: {
        "ema": {"initted": torch.tensor(True), "step": torch.tensor(3), **_under("ema_model.", w),
                **_under("online_model.", raw)}},
    "Lightning": lambda w, raw: {"state_dict": {**_under("model.", raw), **_under("model_ema.", w)}},
    "Lightning, ema": lambda w, raw: {"state_dict": {**_under("ema.", w), **_under("model.", raw)}},
    "Lightning, ema_model.module": lambda w, raw: {
        "state_dict": {**_under("ema_model.module.", w), **_under("model.", raw)}},
    "Lightning, WeightAveraging": lambda w, raw: {
        "state_dict": w, "current_model_state": raw, "averaging_state": {"n_averaged": torch.tensor(7)}},
    "flat, at the root": lambda w, raw: {**_under("model.", raw), **_under("ema.", w)},
}  # fmt: skip


@dataclasses.dataclass
class _Settings:
    width: int = 32


class _Colour(enum.Enum):
    RED = 1


def _furniture() -> dict[str, Any]:
    """What lies beside weights, as far as it is data."""
    model = torch.nn.Linear(2, 2)
    optimiser = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 2)).sum().backward()
    optimiser.step()
    counts: Any = collections.defaultdict(list, {"fid": [np.float64(3.5)]})
    return {
        "args": argparse.Namespace(
            lr=np.float64(1e-4), epochs=np.int64(80), flag=np.bool_(True), half=np.float16(0.5),
            big=np.array(3, dtype=">i4")[()], dtype=np.dtype("float32"), kind=np.float32, name=np.str_("x"),
            out=Path("runs/1"), windows=PureWindowsPath("C:/runs"), nested=argparse.Namespace(stack=3),
            parse=int,
        ),
        "opt": optimiser.state_dict(), "optimizer": optimiser.state_dict(), "epoch": np.int64(3),
        "lr_scheduler": torch.optim.lr_scheduler.StepLR(optimiser, 3).state_dict(),
        "scaler": {"scale": 65536.0, "growth": torch.ones(1)}, "rng_state": torch.get_rng_state(),
        "numpy_rng": np.random.RandomState(0).get_state(), "best": counts,
        "counter": collections.Counter("aab"),
        "queue": collections.deque([1, 2], maxlen=4), "when": datetime.datetime(2025, 1, 2, 3),
        "took": datetime.timedelta(seconds=3), "zone": datetime.UTC, "device": torch.device("cuda"),
        "dtype": torch.bfloat16, "size": torch.Size([2, 3]), "version": torch.__version__,
        "pytorch-lightning_version": "2.5.0", "global_step": 10, "ema_decay": 0.9999,
        "loss_ema": {"train": torch.tensor(0.1)}, "hyper_parameters": {"paths": [Path("a"), Path("b")]},
    }  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a teacher, which says what is in the files, and the conversion of the plain file."""
    folder = tmp_path_factory.mktemp("strangers")
    save_teacher(folder / "teacher", tiny_teacher(7), Diffusion())
    torch.save(_plain(), folder / "plain.pt")
    convert(ConvertConfig(folder / "plain.pt", folder / "plain", teacher=folder / "teacher"))
    return folder


def _converted(place: Path, content: Any, tmp_path: Path, suffix: str = ".pt", **options: Any) -> Path:
    file = tmp_path / f"w{suffix}"
    if suffix == ".safetensors":
        save_file({name: tensor.clone() for name, tensor in content.items()}, file)
    elif isinstance(content, dict):
        torch.save(content, file, _use_new_zipfile_serialization=suffix != ".pth")
    convert(ConvertConfig(file, tmp_path / "out", teacher=place / "teacher", **options))
    return tmp_path / "out"


def _same(place: Path, folder: Path) -> bool:
    files = ("config.json", "model.safetensors")
    return [sha256(folder / name) for name in files] == [sha256(place / "plain" / name) for name in files]


# The table: every container with every prefix, alone and with furniture, in both formats of torch.save


def _bits(file: Path, weights: Names) -> bool:
    read = read_checkpoint(file).tensors
    return read.keys() == weights.keys() and all(torch.equal(read[name], weights[name]) for name in weights)


@pytest.mark.parametrize("prefix", _PREFIXES)
@pytest.mark.parametrize("key", ["bare", *_ALONE])
def test_one_set_of_weights(place: Path, tmp_path: Path, key: str, prefix: str) -> None:
    names = _PREFIXES[prefix](_plain())
    alone = names if key == "bare" else {key: names}
    for i, content in enumerate(
        (alone, {**alone, "epoch": 3} if key == "bare" else {**_furniture(), **alone})
    ):
        torch.save(content, tmp_path / "w.pt", _use_new_zipfile_serialization=i == 0)
        assert _bits(tmp_path / "w.pt", _plain())
        assert not read_checkpoint(tmp_path / "w.pt").notes
    if prefix in ("plain", "model._orig_mod."):
        assert _same(place, _converted(place, content, tmp_path))


@pytest.mark.parametrize("prefix", _PREFIXES)
@pytest.mark.parametrize("container", _CONTAINERS)
def test_an_average_is_taken_before_raw_weights(
    place: Path, tmp_path: Path, container: str, prefix: str, capsys: pytest.CaptureFixture[str]
) -> None:
    change = _PREFIXES[prefix]
    bare = _CONTAINERS[container](change(_plain()), change(_zeros()))
    rest = {"epoch": 3} if container == "flat, at the root" else _furniture()
    for i, content in enumerate((bare, {**rest, **bare})):
        torch.save(content, tmp_path / "w.pt", _use_new_zipfile_serialization=i == 0)
        assert _bits(tmp_path / "w.pt", _plain())
    if prefix in ("plain", "model._orig_mod."):
        assert _same(place, _converted(place, content, tmp_path))
        lines = capsys.readouterr().out.splitlines()
        assert re.fullmatch(r"weights: \S.* \(averaged; also in the file: \S+\)", lines[0])


@pytest.mark.parametrize("above", ["", "diffusion_model."])
@pytest.mark.parametrize("furniture", [False, True])
def test_an_average_whose_names_have_lost_their_dots(
    place: Path, tmp_path: Path, above: str, furniture: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    """LitEma counts names from its model on; what is never trained comes from the raw weights."""
    raw = {**_zeros(), "pos_embed": _plain()["pos_embed"]}
    names = {**_under(f"model.{above}", raw), **_under("model_ema.", _lit_ema(_plain(), above))}
    content = {"state_dict": names, **(_furniture() if furniture else {})}
    assert _same(place, _converted(place, content, tmp_path))
    model = f"state_dict.model{above and '.'}{above[:-1]}"
    assert capsys.readouterr().out.splitlines()[:2] == [
        f"weights: state_dict.model_ema (averaged; also in the file: {model})",
        f"weights: pos_embed, which is never trained, from {model}",
    ]


@pytest.mark.parametrize("kind", ["plain", "module.", "model.module."])
def test_safetensors_with_prefixes(place: Path, tmp_path: Path, kind: str) -> None:
    prefix = _PREFIXES[kind]
    assert _same(place, _converted(place, prefix(_plain()), tmp_path, ".safetensors"))
    both = {**_under("ema.", prefix(_plain())), **_under("model.", prefix(_zeros()))}
    assert _same(place, _converted(place, both, tmp_path, ".safetensors"))


# What leaves a choice


@pytest.mark.parametrize(
    ("content", "keys"),
    [(lambda: {"model": _zeros(), "model_ema1": _plain(), "model_ema2": _half()},
      ["model_ema1", "model_ema2"]),
     (lambda: {"ema_0.999": _plain(), "ema_0.9999": _half()}, ["ema_0.999", "ema_0.9999"]),
     (lambda: {"student": _half(), "teacher": _plain()}, ["student", "teacher"]),
     (lambda: {"model": _half(), "teacher": _plain()}, ["model", "teacher"]),
     (lambda: {"model": _half(), "state_dict": _plain()}, ["model", "state_dict"]),
     (lambda: {"model": _half(), "slow": _under("module.", _plain())}, ["model", "slow.module"]),
     (lambda: {"state_dict": {**_under("net.", _half()), **_under("teacher.", _plain())}},
      ["state_dict.net", "state_dict.teacher"]),
     (lambda: {"state_dict": {**_under("ema.a.", _half()), **_under("model.", _plain())},
               "callbacks": {"x": {"ema_weights": _half()}}},
      ["callbacks.x.ema_weights", "state_dict.ema"])],
    ids=["averages", "rates", "teacher", "model, teacher", "two raw", "unknown", "Lightning", "hidden"],
)  # fmt: skip
def test_a_choice_is_the_users(place: Path, tmp_path: Path, content: Any, keys: list[str]) -> None:
    for rest in ({}, _furniture()):
        torch.save({**rest, **content()}, tmp_path / "w.pt")
        with pytest.raises(ValueError, match="say which: ") as caught:
            convert(ConvertConfig(tmp_path / "w.pt", tmp_path / "out", teacher=place / "teacher"))
        assert sorted(re.findall(r"--weights-key (\S+)", str(caught.value))) == keys
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("prefix", ["plain", "model._orig_mod."])
def test_the_key_decides(place: Path, tmp_path: Path, prefix: str) -> None:
    """Every key that a refusal names, and raw weights for who asks for them."""
    change = _PREFIXES[prefix]
    content = {"model_ema1": change(_plain()), "model_ema2": change(_half()), "model": change(_zeros()),
               "extra": {"deep": change(_half())}, **_furniture()}  # fmt: skip
    torch.save(content, tmp_path / "w.pt")
    for key, names in (("model_ema1", _plain()), ("model_ema2", _half()), ("model", _zeros()),
                       ("extra.deep", _half())):  # fmt: skip
        read = read_checkpoint(tmp_path / "w.pt", key).tensors
        assert all(torch.equal(read[name], names[name]) for name in names), key
    assert _same(place, _converted(place, content, tmp_path, weights_key="model_ema1"))
    with pytest.raises(ValueError, match=r"--weights-key is 'ema', the file has .*model_ema1"):
        read_checkpoint(tmp_path / "w.pt", "ema")


def test_what_an_optimiser_keeps_by_name_is_no_average(place: Path, tmp_path: Path) -> None:
    moments = {"exp_avg": _half(), "exp_avg_sq": _half(), "momentum_buffer": _half()}
    by_name = {name: {"exp_avg": tensor, "exp_avg_sq": tensor} for name, tensor in _half().items()}
    for optimiser in (moments, {"state": by_name}, _half()):
        assert _same(place, _converted(place, {"optimizer": optimiser, "model": _plain()}, tmp_path))
    assert _same(place, _converted(place, {**moments, "model": _plain()}, tmp_path))


def test_what_lies_beside_a_prefix_is_not_left_out_silently(place: Path, tmp_path: Path) -> None:
    names = {**_under("model.", _plain()), "betas": torch.ones(3), "first_stage_model.x": torch.ones(3)}
    content = {"state_dict": names}
    message = (r"others are not \(betas, first_stage_model\.\*\): --weights-key state_dict\.model takes what "
               r"is there, --ignore 'betas' 'first_stage_model\.\*' leaves")  # fmt: skip
    with pytest.raises(ValueError, match=message):
        _converted(place, content, tmp_path)
    assert _same(place, _converted(place, content, tmp_path, weights_key="state_dict.model"))
    assert _same(place, _converted(place, content, tmp_path, ignore=("betas", "first_stage_model.*")))
    with pytest.raises(ValueError, match="others are not"):  # a raw model with its average below it
        _converted(place, {**_zeros(), **_under("ema.", _plain())}, tmp_path)
    assert _same(
        place, _converted(place, {**_plain(), **_under("ema.", _half())}, tmp_path, ignore=("ema.*",))
    )


def test_keys_that_nobody_knows_are_listed(place: Path, tmp_path: Path) -> None:
    content = {"denoising_thing": _plain(), "vae": {"x": torch.ones(1)}}
    with pytest.raises(ValueError, match="under denoising_thing, vae; say with --weights-key KEY which"):
        _converted(place, content, tmp_path)
    assert _same(place, _converted(place, content, tmp_path, weights_key="denoising_thing"))
    names = _under("lit_module.", _plain())
    with pytest.raises(ValueError, match=r"--weights-key lit_module takes what is under lit_module$"):
        _converted(place, names, tmp_path)
    assert _same(place, _converted(place, names, tmp_path, weights_key="lit_module"))


def test_an_average_without_names_is_refused(place: Path, tmp_path: Path) -> None:
    """diffusers' EMAModel and torch_ema keep a list in the order of the parameters."""
    average = {"decay": 0.999, "optimization_step": 3, "shadow_params": list(_plain().values())}
    for content in (average, {"ema": average}, {"model": _half(), "ema": average}):
        with pytest.raises(
            ValueError, match=r"shadow_params, are a list without names; .*save\(model\.state_d"
        ):
            _converted(place, content, tmp_path)
    with pytest.raises(ValueError, match=r"--weights-key model takes what was not averaged$"):
        _converted(place, {"model": _plain(), "ema": average}, tmp_path)
    content = {"model": _plain(), "ema": average}
    assert _same(place, _converted(place, content, tmp_path, weights_key="model"))


def test_two_names_that_are_one_without_prefixes_are_named(place: Path, tmp_path: Path) -> None:
    names = {**_plain(), "blocks.0._orig_mod.attn.qkv.bias": torch.ones(96)}
    name = "blocks.0.attn.qkv.bias"
    both = re.escape(f"{name} and blocks.0._orig_mod.attn.qkv.bias are both {name}")
    with pytest.raises(ValueError, match=both):
        _converted(place, names, tmp_path)
    raw = {"a.bc": torch.ones(2), "ab.c": torch.ones(2), "d": torch.ones(2)}
    names = {**_under("model.", raw), "model_ema.abc": torch.ones(2), "model_ema.d": torch.ones(2)}
    with pytest.raises(
        ValueError, match=r"state_dict\.model_ema names abc, which is a\.bc or ab\.c without dots"
    ):
        _converted(place, {"state_dict": names}, tmp_path)


# Names that the model does not have, and other shapes


@pytest.mark.parametrize("prefix", _PREFIXES)
def test_heads_of_training_alone_are_ignored_by_request(place: Path, tmp_path: Path, prefix: str) -> None:
    extra = {
        "projectors.0.weight": torch.ones(3),
        "projectors.1.weight": torch.ones(3),
        "scale": torch.ones(()),
    }
    names = _PREFIXES[prefix]({**_plain(), **extra})
    content = {"model": _zeros(), "ema": names}
    advice = "unexpected projectors.{0,1}.weight, scale; --ignore 'projectors.*' 'scale' leaves out what"
    with pytest.raises(ValueError, match=re.escape(advice)):
        _converted(place, content, tmp_path)
    assert _same(place, _converted(place, content, tmp_path, ignore=("projectors.*", "scale")))
    message = r"--ignore 'blocks\.1\.\*' leaves out blocks\.1\..*, which the model needs"
    with pytest.raises(ValueError, match=message):
        _converted(place, content, tmp_path, ignore=("projectors.*", "scale", "blocks.1.*"))
    with pytest.raises(ValueError, match=r"--ignore 'decoder\.\*' fits no name"):
        _converted(place, content, tmp_path, ignore=("projectors.*", "scale", "decoder.*"))


def test_a_deeper_network_is_not_cut_by_advice(place: Path, tmp_path: Path) -> None:
    names = {**_plain(), "blocks.2.attn.qkv.bias": torch.ones(96)}
    with pytest.raises(ValueError, match=r"unexpected blocks\.2\.attn\.qkv\.bias$"):
        _converted(place, names, tmp_path)


@pytest.mark.parametrize("extra", [False, True])
def test_a_class_table_without_null_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, extra: bool, teacher: Path
) -> None:
    """It is either table; which one, only its owner knows."""
    from ard.models.dit import PRESETS, DiT

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


# Tensors


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64, torch.float8_e4m3fn])
def test_other_precisions_keep_every_bit(place: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    names = {name: tensor.to(dtype) for name, tensor in _plain().items()}
    torch.save({"ema": names}, tmp_path / "w.pt")
    assert _bits(tmp_path / "w.pt", {name: tensor.float() for name, tensor in names.items()})
    assert not read_checkpoint(tmp_path / "w.pt").notes


def test_rounding_is_said(tmp_path: Path) -> None:
    torch.save(
        {"a": torch.tensor([1 / 3], dtype=torch.float64), "b": torch.ones(1).double()}, tmp_path / "w.pt"
    )
    assert read_checkpoint(tmp_path / "w.pt").notes == ("note: rounded from float64 to float32: a",)


def test_how_tensors_lie_does_not_matter(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Parameters, views, transposed and shared storages, and a GPU that is not here."""
    names: dict[str, Any] = {name: torch.nn.Parameter(tensor) for name, tensor in _plain().items()}
    names["blocks.0.attn.qkv.weight"] = names["blocks.0.attn.qkv.weight"].data.t().contiguous().t()
    both = torch.stack([names["blocks.0.attn.qkv.bias"].data, names["blocks.1.attn.qkv.bias"].data])
    names["blocks.0.attn.qkv.bias"], names["blocks.1.attn.qkv.bias"] = both
    monkeypatch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:3")
    for new in (True, False):
        torch.save({"ema": names, "model": names}, tmp_path / "w.pt", _use_new_zipfile_serialization=new)
        assert b"cuda:3" in (tmp_path / "w.pt").read_bytes()
        assert _bits(tmp_path / "w.pt", _plain())
        assert not any(t.requires_grad for t in read_checkpoint(tmp_path / "w.pt").tensors.values())


@pytest.mark.parametrize(
    ("tensor", "message"),
    [(torch.ones(2, dtype=torch.int64), r"a \(torch\.int64"),
     (torch.ones(2).to_sparse(), r"torch\.sparse_coo"),
     (torch.ones(2, device="meta"), "meta"), (torch.ones(2, dtype=torch.complex64), r"torch\.complex64"),
     (torch.tensor([1.0, torch.nan]), r"a: not finite"), (torch.tensor([1.0, -torch.inf]), "a: not finite"),
     (torch.tensor([1e300], dtype=torch.float64), "a: not finite")],
)  # fmt: skip
def test_values_that_are_no_weights_are_refused(tmp_path: Path, tensor: Tensor, message: str) -> None:
    torch.save({"ema": {"a": tensor, "b": torch.ones(2)}}, tmp_path / "w.pt")
    with pytest.raises(ValueError, match=message):
        read_checkpoint(tmp_path / "w.pt")
    assert read_checkpoint(tmp_path / "w.pt", ignore=("a",)).tensors.keys() == {"b"}


# Nothing is executed


class _Evil:
    """Unpickled, it leaves a file at `mark`."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[[str], object], tuple[str]]:
        return eval, (f"open({str(self.mark)!r}, 'w')",)


class _System(_Evil):
    def __reduce__(self) -> Any:
        return os.system, (f"touch {shlex.quote(str(self.mark))}",)


class _Path(type(Path())):  # type: ignore[misc]
    """A path of another class, whose constructor does something."""

    def __reduce__(self) -> Any:
        return _touched, (str(self),)


def _touched(path: str) -> str:
    Path(path).touch()
    return path


class _Touch(_Evil):
    """A method of an allowed class."""

    def __reduce__(self) -> Any:
        return Path.touch, (self.mark,)


class _Chained(_Evil):
    """Code as the arguments of the stand-ins."""

    def __reduce__(self) -> Any:
        return type(Path()), (_Evil(self.mark),)


@pytest.mark.parametrize("name", ["evil.pt", "evil.safetensors"])
@pytest.mark.parametrize("form", ["archive", "legacy", "pickle", "pickle 2"])
@pytest.mark.parametrize("evil", [_Evil, _System, _Path, _Touch, _Chained])
def test_a_pickle_with_code_is_refused_and_not_executed(
    tmp_path: Path, form: str, name: str, evil: Any
) -> None:
    path, mark = tmp_path / name, tmp_path / "executed"
    content = {**_furniture(), "ema": {"weight": torch.zeros(2)}, "x": evil(mark)}
    if form.startswith("pickle"):
        path.write_bytes(pickle.dumps(content, 2 if form.endswith("2") else None))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form == "archive")
    with pytest.raises(
        ValueError, match=rf"{name}: (refused, it is not a file of plain|not a complete safe)"
    ):
        read_checkpoint(path)
    assert not mark.exists()
    path = path.rename(tmp_path / "evil.pt")  # by its other name torch would not unpickle it at all
    try:
        torch.load(path, weights_only=False) if "pickle" not in form else pickle.loads(path.read_bytes())
    except TypeError:
        assert evil is _Chained  # an open file is no part of a path, but it has been opened
    assert mark.exists(), "the file would not have done anything"


@pytest.mark.parametrize(
    "thing",
    [_Settings(), _Colour.RED, fractions.Fraction(1, 3), functools.partial(int, "3"), print, np.ones,
     re.compile("x"), torch.nn.Linear(2, 2)],
    ids=lambda thing: str(type(thing)),
)  # fmt: skip
def test_objects_with_code_are_refused_by_a_line_that_says_how_to_write_the_file(
    tmp_path: Path, thing: Any
) -> None:
    torch.save({"ema": _plain(), "config": thing}, tmp_path / "w.pt")
    message = r"w\.pt: refused, .*\(.*\); accepted is a file of the weights alone: .*torch\.save\(model\."
    with pytest.raises(ValueError, match=message):
        read_checkpoint(tmp_path / "w.pt")


def test_furniture_is_data(tmp_path: Path) -> None:
    """Numbers come out as Python's, paths without their methods for the disk, all else as nothing."""
    torch.save({"model": _plain(), **_furniture()}, tmp_path / "w.pt")
    arguments = read_checkpoint(tmp_path / "w.pt").arguments
    numbers = {name: arguments[name] for name in ("lr", "epochs", "flag", "half", "big")}
    assert numbers == {"lr": 1e-4, "epochs": 80, "flag": True, "half": 0.5, "big": 3}
    assert {type(number) for number in numbers.values()} == {float, int, bool}
    assert type(arguments["out"]) is type(PurePath())
    assert arguments["out"] == PurePath("runs/1")
    read = read_pickle(tmp_path / "w.pt")
    assert {type(read[key]) for key in ("when", "took", "zone")} == {Opaque}
    assert (read["queue"], type(read["best"]), read["best"]) == ([1, 2], dict, {"fid": [3.5]})
    assert not any(type(value).__module__.startswith("numpy") for value in arguments.values())


def test_a_forged_dtype_reads_no_memory(tmp_path: Path) -> None:
    """NumPy's own scalar() would take eight bytes of an object dtype for the address of an object."""
    forged = (b"\x80\x02cnumpy.core.multiarray\nscalar\ncnumpy\ndtype\nX\x02\x00\x00\x00O8\x89\x88\x87R(K\x03"
              b"X\x01\x00\x00\x00|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tbc_codecs\nencode\n"
              b"X\x08\x00\x00\x00AAAAAAAAX\x06\x00\x00\x00latin1\x86R\x86R.")  # fmt: skip
    torch.save({}, tmp_path / "empty.pt")
    with zipfile.ZipFile(tmp_path / "empty.pt") as empty, zipfile.ZipFile(tmp_path / "w.pt", "w") as file:
        for name in empty.namelist():
            file.writestr(name, forged if name.endswith("/data.pkl") else empty.read(name))
    assert type(read_pickle(tmp_path / "w.pt")) is Opaque


@pytest.mark.parametrize("content", [b"", b"abc", bytes(range(256)), b"PK\x03\x04" + bytes(100)])
@pytest.mark.parametrize("name", ["x.pt", "x.safetensors"])
def test_bytes_that_are_nothing_are_refused_by_name(tmp_path: Path, content: bytes, name: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{name}: "):
        read_checkpoint(tmp_path / name)


def test_what_holds_no_weights_is_refused(tmp_path: Path) -> None:
    loop: dict[str, Any] = {}
    loop["ema"] = [loop, loop]
    for content in ({"a": 1}, [1, 2], {"ema": {"a": "b"}}, {"ema_loss": {"train": torch.ones(())}}):
        torch.save(content, tmp_path / "x.pt")
        with pytest.raises(ValueError, match="accepted is a mapping of names to tensors"):
            read_checkpoint(tmp_path / "x.pt")
    torch.save({"loop": loop, "model": _plain()}, tmp_path / "x.pt")  # it ends
    assert _bits(tmp_path / "x.pt", _plain())


# Folders


def _diffusers_folder(place: Path, folder: Path, sharded: bool) -> Names:
    convert(ConvertConfig(place / "plain", folder, to="diffusers"))
    file = folder / "diffusion_pytorch_model.safetensors"
    names = load_file(file)
    if sharded:
        files = {name: f"part-{i % 2}.safetensors" for i, name in enumerate(names)}
        for part in set(files.values()):
            save_file({name: names[name] for name in names if files[name] == part}, folder / part)
        write_json(folder / f"{file.name}.index.json", {"weight_map": files})
        file.unlink()
    return names


def test_shards_with_an_index(place: Path, tmp_path: Path) -> None:
    """As the Hugging Face libraries split what is large."""
    folder = tmp_path / "transformer"
    _diffusers_folder(place, folder, sharded=True)
    convert(ConvertConfig(folder, tmp_path / "t", time_frequencies="dit"))
    assert _same(place, tmp_path / "t")
    with pytest.raises(
        FileNotFoundError, match=f"accepted is {re.escape(str(folder))}, the model of this pip"
    ):
        convert(ConvertConfig(tmp_path, tmp_path / "t2"))
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    with pytest.raises(ValueError, match=f"accepted is its folder, {re.escape(str(folder))}$"):
        convert(ConvertConfig(index, tmp_path / "t2"))
    files = read_json(index)["weight_map"]
    write_json(index, {"weight_map": {**files, "more": "part-0.safetensors"}})
    with pytest.raises(ValueError, match="names more, which its files do not hold"):
        convert(ConvertConfig(folder, tmp_path / "t2"))
    for elsewhere in ({"x": "../plain/model.safetensors"}, {"x": 3}, [1]):
        write_json(index, {"weight_map": elsewhere})
        with pytest.raises(ValueError, match="accepted is a weight_map of names to files beside it"):
            convert(ConvertConfig(folder, tmp_path / "t2"))
    (folder / "part-1.safetensors").unlink()
    write_json(index, {"weight_map": files})
    with pytest.raises(FileNotFoundError, match=r"part-1\.safetensors: no such file"):
        convert(ConvertConfig(folder, tmp_path / "t2"))


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod."])
def test_a_diffusers_folder_is_read_like_a_file(place: Path, tmp_path: Path, prefix: str) -> None:
    names = _diffusers_folder(place, tmp_path / "d", sharded=False)
    (tmp_path / "d" / "diffusion_pytorch_model.safetensors").unlink()
    content = {
        "ema": _under(prefix, {**names, "projectors.x": torch.ones(1)}),
        "model": names,
        **_furniture(),
    }
    torch.save(content, tmp_path / "d" / "diffusion_pytorch_model.bin")
    options: dict[str, Any] = {"time_frequencies": "dit"}
    with pytest.raises(ValueError, match=r"unexpected projectors\.x; --ignore 'projectors\.\*'"):
        convert(ConvertConfig(tmp_path / "d", tmp_path / "t", **options))
    convert(ConvertConfig(tmp_path / "d", tmp_path / "t", **options, ignore=("projectors.*",)))
    assert _same(place, tmp_path / "t")


def test_folders_of_sharded_training_say_what_makes_a_file(tmp_path: Path) -> None:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    dcp.save({"model": _plain()}, checkpoint_id=tmp_path / "dcp", no_dist=True)
    message = r"a file: python -m torch\.distributed\.checkpoint\.format_utils dcp_to_torch \S+/dcp FILE"
    with pytest.raises(FileNotFoundError, match=message):
        convert(ConvertConfig(tmp_path / "dcp", tmp_path / "t"))
    dcp_to_torch_save(tmp_path / "dcp", tmp_path / "w.pt")  # what that command calls
    assert _bits(tmp_path / "w.pt", _plain())


# The command line, and what other code assumes


def test_the_command_says_what_it_took(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = {**_plain(), "projectors.x": torch.ones(1), "decoder.x": torch.ones(1)}
    torch.save({"model": _zeros(), "model_ema1": names, "model_ema2": _half()}, tmp_path / "w.pt")
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
    assert _same(place, tmp_path / "t")


@pytest.mark.parametrize("classes", [10, 1000, 1001])
def test_another_null_class_than_diffusers_pipeline_assumes_is_said(
    tmp_path: Path, classes: int, capsys: pytest.CaptureFixture[str]
) -> None:
    save_teacher(tmp_path / "t", tiny_teacher(num_classes=classes), Diffusion())
    convert(ConvertConfig(tmp_path / "t", tmp_path / "d", to="diffusers"))
    line = f"warning: diffusers' DiTPipeline takes class 1000 for the null class, this teacher's is {classes}"
    assert (line in capsys.readouterr().out) == (classes != 1000)

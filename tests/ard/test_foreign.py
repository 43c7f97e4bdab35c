"""Checkpoint files as people have them: each converts to the bits of the plain file, or is refused by a line
that names the way in; nothing in them is executed."""

from __future__ import annotations

import argparse
import collections
import copyreg
import dataclasses
import datetime
import enum
import fractions
import functools
import os
import pickle
import re
import shlex
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
_ALONE = ("model", "state_dict", "model_state_dict", "net", "network", "params", "module", "student", "teacher",
          "ema")  # fmt: skip
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
    "a callback's": lambda w, raw: {"state_dict": raw, "callbacks": {"EMA{'decay': 0.999}": {"ema_weights": w}}},
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
        "numpy_rng": np.random.RandomState(0).get_state(), "best": counts, "counter": collections.Counter("aab"),
        "queue": collections.deque([1, 2], maxlen=4), "when": datetime.datetime(2025, 1, 2, 3),
        "took": datetime.timedelta(seconds=3), "zone": datetime.timezone.utc, "device": torch.device("cuda"),
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
    for i, content in enumerate((alone, {**alone, "epoch": 3} if key == "bare" else {**_furniture(), **alone})):
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

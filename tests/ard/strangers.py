"""What lies in the checkpoint files of training scripts: names, containers, and furniture beside them."""

from __future__ import annotations

import argparse
import collections
import datetime
import functools
import re
from collections.abc import Callable
from pathlib import Path, PureWindowsPath
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from tiny import tiny_teacher
from torch import Tensor

from ard.checkpoints import save_teacher, sha256
from ard.convert import ConvertConfig, convert
from ard.diffusion import Diffusion
from ard.foreign import read_checkpoint

Names = dict[str, Tensor]


def plain() -> Names:
    return dict(tiny_teacher().state_dict())


def zeros() -> Names:
    return {name: torch.zeros_like(tensor) for name, tensor in plain().items()}


def half() -> Names:
    return {name: tensor / 2 for name, tensor in plain().items()}


def under(prefix: str, names: Names) -> Names:
    return {f"{prefix}{name}": tensor for name, tensor in names.items()}


def compiled_blocks(names: Names) -> Names:
    """As torch.compile of every block names them."""
    return {re.sub(r"^(.*blocks\.\d+\.)", r"\1_orig_mod.", name): tensor for name, tensor in names.items()}


def lit_ema(names: Names, above: str = "") -> Names:
    """Stable Diffusion's average: parameters that are trained, without dots in their names."""
    trained = {f"{above}{name}".replace(".", ""): t for name, t in names.items() if name != "pos_embed"}
    return {**trained, "decay": torch.tensor(0.9999), "num_updates": torch.tensor(3, dtype=torch.int32)}


PREFIXES: dict[str, Callable[[Names], Names]] = {
    "plain": lambda w: w,
    **{prefix: functools.partial(under, prefix) for prefix in (
        "module.", "_orig_mod.", "model.", "net.", "module._orig_mod.", "_orig_mod.module.", "model.module.",
        "model._orig_mod.", "model.diffusion_model.", "module.model._orig_mod.")},
    "blocks.0._orig_mod.": compiled_blocks,
    "model. blocks.0._orig_mod.": lambda w: compiled_blocks(under("model.", w)),
    "fsdp": lambda w: {n.replace("attn.", "_fsdp_wrapped_module.attn."): t for n, t in w.items()},
}  # fmt: skip

# Keys of a file with one set of weights.
ALONE = ("model", "state_dict", "model_state_dict", "net", "network", "params", "module", "student",
          "teacher", "ema")  # fmt: skip
# Keys of averaged weights and of raw ones.
PAIRS = (
    ("ema", "model"), ("model_ema", "model"), ("ema_model", "model"), ("model_ema1", "model"),
    ("state_dict_ema", "state_dict"), ("ema_state_dict", "state_dict"), ("params_ema", "params"),
    ("params-ema", "params"), ("ema_0.9999", "model"), ("EMAModel", "model"), ("net_ema", "net"),
    ("swa_model", "model"), ("G_ema", "G"), ("ema", "student"),
)  # fmt: skip
# Content of a file from averaged weights, and from raw ones that must never come out.
CONTAINERS: dict[str, Callable[[Names, Names], dict[str, Any]]] = {
    **{f"{average} beside {key}": (lambda a, k: lambda w, raw: {k: raw, a: w})(average, key)
       for average, key in PAIRS},
    "the average first": lambda w, raw: {"ema": w, "model": raw},
    "fairseq": lambda w, raw: {"model": raw, "extra_state": {"ema": w, "epoch": 3}},
    "a callback's": lambda w, raw: {
        "state_dict": raw, "callbacks": {"EMA{'decay': 0.999}": {"ema_weights": w}}},
    "AveragedModel": lambda w, raw: {
        "model": raw, "ema": {"n_averaged": torch.tensor(7), **under("module.", w)}},
    "an average in an average": lambda w, raw: {"model": raw, "ema": {"decay": 0.999, "shadow": w}},
    "ema_pytorch": lambda w, raw: {
        "ema": {"initted": torch.tensor(True), "step": torch.tensor(3), **under("ema_model.", w),
                **under("online_model.", raw)}},
    "Lightning": lambda w, raw: {"state_dict": {**under("model.", raw), **under("model_ema.", w)}},
    "Lightning, ema": lambda w, raw: {"state_dict": {**under("ema.", w), **under("model.", raw)}},
    "Lightning, ema_model.module": lambda w, raw: {
        "state_dict": {**under("ema_model.module.", w), **under("model.", raw)}},
    "Lightning, WeightAveraging": lambda w, raw: {
        "state_dict": w, "current_model_state": raw, "averaging_state": {"n_averaged": torch.tensor(7)}},
    "flat, at the root": lambda w, raw: {**under("model.", raw), **under("ema.", w)},
}  # fmt: skip


def furniture() -> dict[str, Any]:
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


def make_place(folder: Path) -> Path:
    """A folder with a teacher, which says what is in the files, and the conversion of the plain file."""
    save_teacher(folder / "teacher", tiny_teacher(7), Diffusion())
    torch.save(plain(), folder / "plain.pt")
    convert(ConvertConfig(folder / "plain.pt", folder / "plain", teacher=folder / "teacher"))
    return folder


def converted(place: Path, content: Any, tmp_path: Path, suffix: str = ".pt", **options: Any) -> Path:
    file = tmp_path / f"w{suffix}"
    if suffix == ".safetensors":
        save_file({name: tensor.clone() for name, tensor in content.items()}, file)
    elif isinstance(content, dict):
        torch.save(content, file, _use_new_zipfile_serialization=suffix != ".pth")
    convert(ConvertConfig(file, tmp_path / "out", teacher=place / "teacher", **options))
    return tmp_path / "out"


def same(place: Path, folder: Path) -> bool:
    files = ("config.json", "model.safetensors")
    return [sha256(folder / name) for name in files] == [sha256(place / "plain" / name) for name in files]


def bits(file: Path, weights: Names) -> bool:
    read = read_checkpoint(file).tensors
    return read.keys() == weights.keys() and all(torch.equal(read[name], weights[name]) for name in weights)

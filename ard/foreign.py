"""Weights of strangers' training scripts: read without executing anything, by the names of the model.

Every command that takes such a file reads it here. Which weights of a file are meant is decided in
`ard.weight_sets`; what a pickle may hold, in `ard.unpickling`.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ard.checkpoints import MisfitError, read_json, read_tensors, together
from ard.unpickling import read_pickle
from ard.weight_sets import WeightSet, choose, items, weight_sets, without


@dataclass(frozen=True)
class Checkpoint:
    """Tensors by the model's names, float32 on the host, all finite; and what was decided on the way."""

    tensors: dict[str, Tensor]
    arguments: dict[str, Any] = field(default_factory=dict)
    """Of the training script, as far as they are in the file under "args"."""
    notes: tuple[str, ...] = ()
    """Lines about choices that were made for the user."""
    ignored: dict[str, str] = field(default_factory=dict)
    """Names that were left out, and the pattern that each fits."""


def _as_float32(weights: WeightSet, source: Path) -> tuple[dict[str, Tensor], list[str]]:
    """Dense float32 on the host, and lines about what that changed; an error for what is no finite number."""
    tensors, rounded, refused = {}, [], []
    for name, tensor in weights.tensors.items():
        if tensor.is_meta or tensor.layout != torch.strided or not tensor.is_floating_point():
            refused.append(f"{name} ({tensor.dtype}, {tensor.layout}, {tensor.device})")
            continue
        tensors[name] = tensor.detach().float()
        if tensor.dtype == torch.float64 and not torch.equal(tensors[name].double(), tensor):
            rounded.append(name)
    if refused:
        raise ValueError(f"{source}: {', '.join(refused[:8])}; accepted are dense floating-point tensors "
                         "with values (--ignore PATTERN leaves others out)")  # fmt: skip
    if lost := [name for name, tensor in tensors.items() if not bool(tensor.isfinite().all())]:
        raise ValueError(f"{source}: {together(lost)}: not finite (NaN or Inf); accepted are finite weights")
    return tensors, [f"note: rounded from float64 to float32: {together(rounded)}"] if rounded else []


def _arguments(content: object) -> dict[str, Any]:
    arguments = dict(items(content)).get("args") if isinstance(content, dict) else None
    if isinstance(arguments, argparse.Namespace):
        arguments = vars(arguments)
    return arguments if isinstance(arguments, dict) else {}


def _select(content: object, key: str | None, ignore: Sequence[str], source: Path) -> Checkpoint:
    chosen, notes = choose(weight_sets(content, ignore, source), key, source)
    chosen = without(chosen, ignore)
    if unused := [pattern for pattern in ignore if pattern not in chosen.ignored.values()]:
        raise ValueError(f"{source}: --ignore {unused[0]!r} fits no name; there are "
                         f"{together(chosen.tensors)}")  # fmt: skip
    tensors, changed = _as_float32(chosen, source)
    return Checkpoint(tensors, _arguments(content), (*notes, *changed), chosen.ignored)


def read_checkpoint(path: Path, key: str | None = None, ignore: Sequence[str] = ()) -> Checkpoint:
    """Read the weights of a .safetensors file, or of a .pt, .pth, .ckpt or .bin file of plain data.

    Prefixes of wrappers (`module.`, `_orig_mod.`, Lightning's `model.`) are taken off. Of raw weights and one
    average, the average is taken and a note says so.

    Args:
        path: the file; nothing in it is executed.
        key: of the weights in the file, with dots (`state_dict.model`), where it holds several.
        ignore: patterns (fnmatch) of names to leave out.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: anything but data, a choice that is the user's, two names that are one without prefixes, a
            pattern that fits nothing, or values that are not finite floating-point numbers.
    """
    content = read_tensors(path) if path.suffix == ".safetensors" or not path.is_file() else read_pickle(path)
    return _select(content, key, ignore, path)


def read_sharded(index: Path, key: str | None = None, ignore: Sequence[str] = ()) -> Checkpoint:
    """Like `read_checkpoint`, of the files that a Hugging Face index (.index.json) names, in its folder."""
    description = read_json(index)
    files = description.get("weight_map") if isinstance(description, dict) else None
    if not isinstance(files, dict) or not all(
        isinstance(f, str) and Path(f).name == f for f in files.values()
    ):
        raise ValueError(f"{index}: accepted is a weight_map of names to files beside it")
    content: dict[str, Any] = {}
    for name in sorted(set(files.values())):
        path = index.with_name(name)
        content |= read_tensors(path) if path.suffix == ".safetensors" else read_pickle(path)
    if missing := [name for name in files if name not in content]:
        raise ValueError(f"{index}: names {together(missing)}, which its files do not hold")
    return _select({name: content[name] for name in files}, key, ignore, index)


@contextlib.contextmanager
def explained(checkpoint: Checkpoint) -> Iterator[None]:
    """Add to the error about weights that do not fit which option lets them in, if one does."""
    try:
        yield
    except MisfitError as error:
        needed = {name: p for name, p in checkpoint.ignored.items() if name in error.own}
        if needed:
            pattern = next(iter(needed.values()))
            names = together(name for name, p in needed.items() if p == pattern)
            raise ValueError(f"--ignore {pattern!r} leaves out {names}, which the model needs") from None
        raise MisfitError(f"{error}{_ways_in(error.own, error.found)}", error.own, error.found) from None


def _ways_in(own: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> str:
    modules = {name.partition(".")[0] for name in own}
    heads: dict[str, set[str]] = {}
    for name in found:
        first, dot, short = name.partition(".")
        if first not in modules:
            heads.setdefault(first + dot, set()).add(short)
    for head, names in heads.items():
        if head.endswith(".") and names & own.keys() and set(own) - names <= set(found):
            return f"; --weights-key {head[:-1]} takes what is under {head[:-1]}"
    if own.keys() - found.keys():
        return ""  # leaving names out would not help
    patterns = [repr(f"{head}*" if head.endswith(".") else head) for head in heads]
    return f"; --ignore {' '.join(patterns[:8])} leaves out what the model does not know" if heads else ""

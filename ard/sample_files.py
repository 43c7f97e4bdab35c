"""The files of `ard sample`: parts that processes make side by side, and samples.npz, which holds them all.

A part is a shard of `Shards`: one pass of the student, a function of the options only. Which process makes
it makes no difference, and a killed command goes on with what is missing. The process that finds all parts
there puts them together, one part at a time.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import secrets
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ard.checkpoints import read_tensors, remove, replacing
from ard.locks import acquire, release
from ard.shards import Shards

FORMAT = "samples 1"
_PARTS = ".parts-"
# A member of a zip file has a date; this one makes the same samples the same bytes. numpy's has it, too.
_DATE = (1980, 1, 1, 0, 0, 0)
# Of processes that end together, one puts the parts together. No rank of a job has this number.
_ASSEMBLING = -1


def parts_folder(out: Path, manifest: Mapping[str, Any]) -> Path:
    """Where the parts of these samples lie until they are put together: other samples have another folder."""
    return out / f"{_PARTS}{hashlib.sha256(json.dumps(manifest).encode()).hexdigest()[:16]}"


def missing(parts: Shards) -> int:
    """How many parts are not there yet."""
    return sum(not parts.path(i).with_suffix(".sha256").is_file() for i in range(len(parts)))


def discard_empty(out: Path, parts: Path) -> None:
    """Remove the folder of parts, and `out` with it, where an error left nothing in them to go on with."""
    if not [*parts.glob("*.sha256")]:
        remove(parts)
        if out.is_dir() and not any(out.iterdir()):
            out.rmdir()


def read_parts(parts: Shards) -> Iterator[Tensor]:
    """The tensors "samples" of all parts in order, one in memory at a time; a damaged one is an error."""
    for i in range(len(parts)):
        if problem := parts.problem(i):
            raise ValueError(f"{parts.path(i)}: {problem}; run the same `ard sample` again to replace it")
        yield read_tensors(parts.path(i))["samples"]


def write_npz(path: Path, samples: Iterator[Tensor], count: int, labels: Tensor) -> None:
    """Write arr_0 and labels as numpy.savez does, from samples that come in parts.

    Args:
        path: of the .npz file, which appears whole or not at all.
        samples: parts (n, ...) of one shape and dtype but for n.
        count: the sum of all n.
        labels: (count,).
    """
    first = next(samples)
    header = {"shape": (count, *first.shape[1:]), "fortran_order": False,
              "descr": first.numpy().dtype.str}  # fmt: skip
    with replacing(path) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        with archive.open(zipfile.ZipInfo("arr_0.npy", _DATE), "w", force_zip64=True) as member:
            np.lib.format.write_array_header_1_0(member, header)  # type: ignore[no-untyped-call]
            for part in tqdm(_with(first, samples), desc=path.name, unit="part", mininterval=1.0):
                member.write(part.contiguous().numpy().data)
        with archive.open(zipfile.ZipInfo("labels.npy", _DATE), "w") as member:
            np.lib.format.write_array(member, labels.numpy())  # type: ignore[no-untyped-call]


def _with(first: Tensor, rest: Iterator[Tensor]) -> Iterator[Tensor]:
    yield first
    yield from rest


@contextlib.contextmanager
def assembling(out: Path, parts: Shards) -> Iterator[bool]:
    """Whether this process shall put the parts together in the block; afterwards they are removed."""
    if not parts.folder.is_dir() or missing(parts):
        yield False
        return
    try:
        acquire(out, _ASSEMBLING)
    except ValueError:  # another process does it
        yield False
        return
    try:
        yield parts.folder.is_dir()
        for folder in out.glob(f"{_PARTS}*"):  # those of other options, too, which were never finished
            # First out of the way at once: no process takes what is left for parts that are missing.
            gone = out / f".{secrets.token_hex(8)}.tmp"
            folder.rename(gone)
            remove(gone)
    finally:
        release(out, _ASSEMBLING)


def first_samples(parts: Shards, count: int) -> Tensor:
    """The first `count` samples, or all if there are fewer."""
    found: list[Tensor] = []
    for part in read_parts(parts):
        found.append(part[: count - sum(map(len, found))])
        if sum(map(len, found)) == count:
            break
    return torch.cat(found)

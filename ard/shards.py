"""Stores of samples on disk: a folder with manifest.json and numbered safetensors files, the shards.

The manifest says what is stored and how; "samples" and "shard_size" are part of it. A shard appears complete
or not at all, says which manifest and which place it belongs to, and has its sha256 beside it.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm import tqdm

from ard.checkpoints import describing, read_json, remove, sha256, write_json, write_tensors, write_text
from ard.checks import check_local
from ard.locks import acquire, release

MANIFEST = "manifest.json"
StoredDtype = Literal["float16", "bfloat16", "float32"]
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
_LABEL = "recording"
# Far below the usual limit of 1024 open files of a process.
_OPEN_SHARDS = 64


def worker() -> tuple[int, int]:
    """Rank of this process and number of processes, from RANK and WORLD_SIZE as torchrun sets them."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def worker_device() -> torch.device:
    """The GPU of this process among those of its machine, from LOCAL_RANK; the CPU where there is none."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def began_with(folder: Path, key: str) -> Any:
    """What the manifest of a store has under a key; None where there is no store."""
    path = folder / MANIFEST
    manifest = read_json(path) if path.is_file() else None
    return manifest.get(key) if isinstance(manifest, dict) else None


class Shards:
    """The shards of a store, read and written by number.

    Args:
        folder: of the store.
        command: of `ard` that writes such stores; errors name it.
        format: what the manifest must have under "format".
        keys: what else must be in it.
    """

    def __init__(self, folder: Path, command: str, format: int | str, keys: Iterable[str] = ()) -> None:
        self.folder, self.command = folder, command
        check_local(command, "folder", folder)
        path = folder / MANIFEST
        if not path.is_file():
            raise FileNotFoundError(
                f"{folder}: no {MANIFEST} there; accepted is a folder written by `ard {command}`"
            )
        self.manifest: dict[str, Any] = read_json(path)
        found = self.manifest.get("format") if isinstance(self.manifest, dict) else None
        if found != format:
            raise ValueError(f"{path}: format is {found!r}, accepted is {format!r}")
        self.samples: int
        self.size: int
        with describing(path, f"folder of `ard {command}`"):
            self.samples, self.size, *_ = (self.manifest[k] for k in ("samples", "shard_size", *keys))
        for name, value in (("samples", self.samples), ("shard_size", self.size)):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{path}: {name} is {value!r}, accepted is an integer >= 1")
        self._identity = sha256(path)
        self._open: OrderedDict[int, dict[str, Any]] = OrderedDict()
        self._checked: set[int] = set()

    @classmethod
    def begin(cls, folder: Path, command: str, manifest: Mapping[str, Any]) -> Shards:
        """The store of this manifest (of JSON values), made or continued; another one there is an error.

        No other process of this rank can begin there until `fill` is done.
        """
        check_local(command, "out", folder)
        acquire(folder, worker()[0])
        try:
            return cls._begin(folder, command, manifest)
        except BaseException:
            release(folder, worker()[0])
            raise

    @classmethod
    def _begin(cls, folder: Path, command: str, manifest: Mapping[str, Any]) -> Shards:
        path = folder / MANIFEST
        if not path.exists():
            write_json(path, manifest)
        shards = cls(folder, command, manifest["format"])
        there = shards.manifest
        if changed := [
            f"{k} is {there.get(k)!r} there, {v!r} here" for k, v in manifest.items() if there.get(k) != v
        ]:
            raise ValueError(
                f"{path}: another recording ({'; '.join(changed[:4])}); name another folder with --out"
            )
        return shards

    def __len__(self) -> int:
        return -(-self.samples // self.size)

    def range(self, shard: int) -> range:
        """The samples that a shard holds."""
        return range(shard * self.size, min((shard + 1) * self.size, self.samples))

    def path(self, shard: int) -> Path:
        return self.folder / f"shard-{shard:06d}.safetensors"

    def write(self, shard: int, tensors: Mapping[str, Tensor]) -> None:
        """Tensors whose rows are the samples of `range(shard)`."""
        path = self.path(shard)
        for remains in self.folder.glob(f".{path.stem}.*.tmp"):  # of a killed process, see `replacing`
            remove(remains)
        write_tensors(path, tensors, {_LABEL: self._label(shard)})
        write_text(path.with_suffix(".sha256"), sha256(path) + "\n")

    def fill(self, make: Callable[[Tensor], Mapping[str, Tensor]], batch: int, unit: str) -> None:
        """Write this process's share of the shards, but for those that are there whole. Progress bar.

        Args:
            make: (n,) indices of samples, n at most `batch` -> their tensors.
            unit: what a sample is called.
        """
        try:
            self._fill(make, batch, unit)
        finally:
            release(self.folder, worker()[0])

    def _fill(self, make: Callable[[Tensor], Mapping[str, Tensor]], batch: int, unit: str) -> None:
        rank, world = worker()
        own = range(rank, len(self), world)
        total = sum(len(self.range(shard)) for shard in own)
        bar = tqdm(total=total, desc=self.command, unit=unit, disable=rank > 0, mininterval=1.0)
        with bar:
            for shard in own:
                if self.problem(shard) is None:
                    bar.update(len(self.range(shard)))
                    continue
                parts = []
                for indices in torch.tensor(self.range(shard)).split(batch):
                    parts.append(make(indices))
                    bar.update(len(indices))
                self.write(shard, {name: torch.cat([part[name] for part in parts]) for name in parts[0]})

    def problem(self, shard: int) -> str | None:
        """What is wrong with a shard, if anything. All its bytes are read."""
        path, label = self.path(shard), self._label(shard)
        try:
            with safe_open(path, framework="pt") as file:
                found = (file.metadata() or {}).get(_LABEL)
        except (SafetensorError, OSError) as error:
            return f"truncated or not safetensors ({error})"
        if found != label:
            return f"belongs to another recording or place: it holds {found}, wanted are {label}"
        checksum = path.with_suffix(".sha256")
        if not checksum.is_file():
            return f"{checksum.name} is missing, so its bytes cannot be checked"
        if sha256(path) != checksum.read_text().strip():
            return f"corrupt, its bytes do not match {checksum.name}"
        return None

    def check_complete(self) -> None:
        """An error if a shard is not there."""
        if missing := [shard for shard in range(len(self)) if not self.path(shard).is_file()]:
            raise ValueError(
                f"{self.folder}: {len(missing)} shards are missing, first {self.path(missing[0]).name}; "
                f"run the same `ard {self.command}` again to complete it"
            )

    def at(self, index: int) -> tuple[dict[str, Any], int]:
        """The tensors of the shard that holds a sample, to be read in slices, and its row there.

        A shard is checked when it is first used, and mapped into memory; the last used ones stay open.
        """
        shard, row = divmod(index, self.size)
        if shard not in self._checked:
            if problem := self.problem(shard):
                raise ValueError(
                    f"{self.path(shard)}: {problem}; run the same `ard {self.command}` again to replace it"
                )
            self._checked.add(shard)
        if shard not in self._open:
            file = safe_open(self.path(shard), framework="pt").__enter__()  # type: ignore[no-untyped-call]
            self._open[shard] = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118  not a dict
            if len(self._open) > _OPEN_SHARDS:
                self._open.popitem(last=False)
        self._open.move_to_end(shard)
        return self._open[shard], row

    def _label(self, shard: int) -> str:
        # Under one key: safetensors writes several in an order that changes.
        return f"samples from {shard * self.size} on of manifest {self._identity}"

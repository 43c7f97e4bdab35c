"""Recording a teacher's trajectories, and reading them for training.

A store is a folder: manifest.json says what was recorded and how; shard-000000.safetensors and on hold
`shard_size` samples each, with a sha256 beside them. Solver positions count down from `solver_steps` (the
noise) to 0 (the result); at position i between them stand x_t and the prediction of the clean image at the
solver's i-th time.

    noise, final (n, C, h, w)   xt, x0 (n, K, C, h, w), at the K kept positions, descending   labels (n,)
"""

from __future__ import annotations

import os
from collections import OrderedDict
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm import tqdm

from ard.checkpoints import WEIGHTS, load_teacher, read_json, sha256, write_json, write_tensors, write_text
from ard.data import index_noise
from ard.diffusion import guided

State = Literal["x0", "xt"]
_FORMAT = 1
_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
# The grids of the released recipe, of 25 solver steps (research: S = 1, 2, 4, 5).
_RELEASED = {1: (25, 0), 2: (25, 10, 0), 4: (25, 15, 10, 5, 0), 5: (25, 20, 15, 10, 5, 0)}
_OPEN_SHARDS = 64
_LABEL = "recording"


@dataclass(frozen=True)
class RecordConfig:
    """Record a teacher's trajectories. A store that is there is continued; processes may share the work."""

    teacher: Path
    """Folder of the teacher."""
    out: Path
    """Folder of the store."""
    samples: int = 6000
    """How many trajectories. Sample i has class i mod num_classes, its noise depends on (seed, i) alone."""
    solver_steps: int = 25
    """Steps of deterministic DDIM."""
    guidance: float = 1.5
    """Scale of classifier-free guidance; 1: none."""
    guided_channels: int | None = None
    """Guide the first so many channels only (3 for the public DiT); default: all."""
    keep: Literal["fifth", "all"] | tuple[int, ...] = "fifth"
    """Solver positions kept besides the noise and the result."""
    dtype: Literal["float16", "bfloat16", "float32"] = "float16"
    """How tensors are stored."""
    shard_size: int = 1000
    """Samples per file."""
    batch_size: int = 100
    """Samples per pass of the solver."""
    precision: Literal["no", "bf16"] = "no"
    """Autocast dtype of the teacher ("no": float32); the solver itself is float32."""
    seed: int = 0
    """Seed of the noise."""


def _kept(config: RecordConfig) -> tuple[int, ...]:
    if config.keep == "fifth":
        chosen = {i for i in range(1, config.solver_steps) if i % 5 == 0}
    elif config.keep == "all":
        chosen = set(range(1, config.solver_steps))
    else:
        chosen = set(config.keep)
        if not chosen <= set(range(1, config.solver_steps)):
            raise ValueError(
                f"record: keep is {config.keep}, accepted are positions 1..{config.solver_steps - 1}"
            )
    return tuple(sorted(chosen, reverse=True))


def _shard(folder: Path, index: int) -> Path:
    return folder / f"shard-{index:06d}.safetensors"


def _label(identity: str, first: int) -> str:
    """What a shard says of itself, under one key: safetensors writes several in an order that changes."""
    return f"samples from {first} on of manifest {identity}"


def _problem(path: Path, identity: str, first: int) -> str | None:
    """What is wrong, if anything, with the shard that starts at sample `first` of this manifest's
    recording."""
    try:
        with safe_open(path, framework="pt") as file:
            label = (file.metadata() or {}).get(_LABEL)
    except (SafetensorError, OSError) as error:
        return f"truncated or not safetensors ({error})"
    if label != _label(identity, first):
        return (
            f"belongs to another recording or place: it holds {label}, wanted are {_label(identity, first)}"
        )
    checksum = path.with_suffix(".sha256")
    if not checksum.is_file():
        return f"{checksum.name} is missing, so its bytes cannot be checked"
    return (
        None
        if sha256(path) == checksum.read_text().strip()
        else f"corrupt, its bytes do not match {checksum.name}"
    )


@torch.no_grad()
def record(config: RecordConfig) -> None:
    for name in ("samples", "shard_size", "batch_size"):
        if getattr(config, name) < 1:
            raise ValueError(f"record: {name} is {getattr(config, name)}, accepted is an integer >= 1")
    model, diffusion = load_teacher(config.teacher)
    if config.guidance != 1 and not model.null_class:
        raise ValueError(
            f"record: guidance is {config.guidance}, but the teacher has no null class; accepted is 1"
        )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device)
    kept, times = _kept(config), diffusion.solver_times(config.solver_steps)
    shape = (model.channels, *model.input_size)
    manifest = {
        "format": _FORMAT, "teacher": sha256(config.teacher / WEIGHTS), "diffusion": diffusion.config,
        "solver": "ddim", "solver_steps": config.solver_steps, "times": times, "guidance": config.guidance,
        "guided_channels": config.guided_channels, "kept": list(kept), "dtype": config.dtype,
        "shape": list(shape), "num_classes": model.num_classes,
        "samples": config.samples, "shard_size": config.shard_size, "batch_size": config.batch_size,
        "precision": config.precision, "seed": config.seed,
    }  # fmt: skip
    path = config.out / "manifest.json"
    if path.exists():
        found = read_json(path)
        changed = [
            f"{k} is {found.get(k)!r} there, {v!r} here" for k, v in manifest.items() if found.get(k) != v
        ]
        if changed:
            raise ValueError(
                f"{path}: another recording ({'; '.join(changed[:4])}); name another folder with --out"
            )
    else:
        write_json(path, manifest)
    identity = sha256(path)
    dtype = _DTYPES[config.dtype]
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16")
    denoise = autocast(guided(model, model.num_classes, config.guidance, config.guided_channels))
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    shards = range(rank, -(-config.samples // config.shard_size), world)
    with tqdm(total=config.samples, desc="record", unit="sample", disable=rank > 0, mininterval=1.0) as bar:
        for shard in shards:
            first = shard * config.shard_size
            indices = torch.arange(first, min(first + config.shard_size, config.samples))
            if _problem(_shard(config.out, shard), identity, first) is not None:
                parts = []
                for some in indices.split(config.batch_size):
                    # The teacher starts from the noise as it is stored.
                    noise = index_noise(some, shape, config.seed).to(dtype)
                    labels = some % model.num_classes
                    states = {
                        state.index: state
                        for state in diffusion.ddim(
                            denoise, noise.float().to(device), labels.to(device), times
                        )
                        if state.index in (*kept, -1)
                    }
                    xt = (
                        torch.stack([states[i].x for i in kept], 1) if kept else noise.new_empty(len(some), 0)
                    )
                    x0 = torch.stack([states[i].x0 for i in kept], 1) if kept else xt  # type: ignore[misc]
                    tensors = {"noise": noise, "xt": xt, "x0": x0, "final": states[-1].x}
                    parts.append({"labels": labels, **{k: v.to(dtype).cpu() for k, v in tensors.items()}})
                    bar.update(len(some) * min(world, len(shards)))
                joined = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
                target = _shard(config.out, shard)
                write_tensors(target, joined, {_LABEL: _label(identity, first)})
                write_text(target.with_suffix(".sha256"), sha256(target) + "\n")
            else:
                bar.update(len(indices))
    if rank == 0:
        print(f"trajectories: {config.out} ({config.samples} samples)")


class TrajectoryStore:
    """Recorded trajectories, read by sample index.

    Every shard is checked when it is first used: that it is whole, that it is of this store, that its bytes
    are those that were written. Shards are mapped into memory, the most recently used ones stay open.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        path = folder / "manifest.json"
        if not path.is_file():
            raise FileNotFoundError(
                f"{folder}: no manifest.json there; accepted is a folder written by `ard record`"
            )
        self.manifest: dict[str, Any] = read_json(path)
        found = self.manifest.get("format") if isinstance(self.manifest, dict) else None
        if found != _FORMAT:
            raise ValueError(f"{path}: format is {found!r}, accepted is {_FORMAT}")
        self._identity = sha256(path)
        self._open: OrderedDict[int, Any] = OrderedDict()
        self._checked: set[int] = set()
        size = self.manifest["shard_size"]
        missing = [i for i in range(-(-len(self) // size)) if not _shard(folder, i).is_file()]
        if missing:
            raise ValueError(f"{folder}: {len(missing)} shards are missing, first "
                             f"{_shard(folder, missing[0]).name}; "
                             "run the same `ard record` again to complete it")  # fmt: skip

    def __len__(self) -> int:
        return int(self.manifest["samples"])

    def check_teacher(self, folder: Path) -> None:
        """An error if another teacher recorded this store."""
        if sha256(folder / WEIGHTS) != self.manifest["teacher"]:
            raise ValueError(f"{self.folder}: was recorded from another teacher than {folder}")

    def summary(self) -> dict[str, Any]:
        """What a student trained on this store should remember of it."""
        names = (
            "teacher",
            "diffusion",
            "solver",
            "solver_steps",
            "guidance",
            "guided_channels",
            "seed",
            "samples",
        )
        return {name: self.manifest[name] for name in names}

    def grid(self, steps: int, asked: tuple[int, ...] | None = None) -> tuple[int, ...]:
        """The S+1 solver positions of the student's states, from the noise down to 0.

        Default: the released recipe's where it has one, else the kept positions nearest to an even spacing.
        """
        if steps < 1:
            raise ValueError(f"grid: steps is {steps}, accepted is an integer >= 1")
        top = self.manifest["solver_steps"]
        available = [top, *self.manifest["kept"], 0]
        if asked is None and top == 25 and set(_RELEASED.get(steps, (-1,))) <= set(available):
            return _RELEASED[steps]
        if asked is None:
            even = [top * (steps - s) / steps for s in range(steps + 1)]
            asked = tuple(min(available, key=lambda i: abs(i - e)) for e in even)
        descending = all(a > b for a, b in pairwise(asked))
        if len(asked) != steps + 1 or asked[0] != top or asked[-1] != 0 or not descending:
            raise ValueError(f"grid is {asked}, accepted are {steps + 1} (steps + 1) descending positions "
                             f"from {top} to 0; {self.folder} kept {available}")  # fmt: skip
        if absent := sorted(set(asked) - set(available)):
            raise ValueError(f"grid: positions {absent} were not kept in {self.folder}; it has {available}")
        return asked

    def _load(self, shard: int) -> Any:
        if shard in self._open:
            self._open.move_to_end(shard)
            return self._open[shard]
        path = _shard(self.folder, shard)
        if shard not in self._checked:
            if problem := _problem(path, self._identity, shard * self.manifest["shard_size"]):
                raise ValueError(f"{path}: {problem}; run the same `ard record` again to replace it")
            self._checked.add(shard)
        file = safe_open(path, framework="pt").__enter__()  # type: ignore[no-untyped-call]
        self._open[shard] = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118  not a dict
        if len(self._open) > _OPEN_SHARDS:
            self._open.popitem(last=False)
        return self._open[shard]

    def states(self, indices: Tensor, grid: tuple[int, ...], state: State) -> tuple[Tensor, Tensor]:
        """(n, S+1, C, h, w) float32, the states of `indices` at the positions of `grid`; and (n,) labels."""
        kept, size = self.manifest["kept"], self.manifest["shard_size"]
        paths, labels = [], []
        for index in indices.tolist():
            shard, row = divmod(index, size)
            tensors = self._load(shard)
            inner = tensors[state][row]
            middle = [inner[kept.index(i)] for i in grid[1:-1]]
            paths.append(torch.stack([tensors["noise"][row], *middle, tensors["final"][row]]))
            labels.append(tensors["labels"][row])
        return torch.stack(paths).float(), torch.stack(labels)

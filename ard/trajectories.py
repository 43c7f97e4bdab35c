"""A teacher's trajectories for training: recorded once and read, or made as they are asked for.

A store is a folder: manifest.json says what was recorded and how; shard-000000.safetensors and on hold
`shard_size` samples each, with a sha256 beside them. Solver positions count down from `solver_steps` (the
noise) to 0 (the result); at position i between them stand x_t and the prediction of the clean image at the
solver's i-th time.

    noise, final (n, C, h, w)   xt, x0 (n, K, C, h, w), at the K kept positions, descending   labels (n,)
"""

from __future__ import annotations

import hashlib
import json
import math
import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from os import PathLike
from pathlib import Path
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor

from ard.checkpoints import WEIGHTS, describing, load_teacher, sha256
from ard.data import check_counts, check_seed, index_noise, shuffled
from ard.diffusion import Solver, check_solver, guided
from ard.models import ARDTransformer
from ard.precision import PrecisionConfig, computing, settled
from ard.shards import DTYPES, MANIFEST, Shards, StoredDtype, worker_device

State = Literal["x0", "xt"]
_FORMAT = 1
# What two stores must share to be samples of the same thing.
_SAME = ("teacher", "diffusion", "solver", "solver_steps", "guidance", "guided_channels")
# The grids of the released recipe, of 25 solver steps (research: S = 1, 2, 4, 5).
_RELEASED = {1: (25, 0), 2: (25, 10, 0), 4: (25, 15, 10, 5, 0), 5: (25, 20, 15, 10, 5, 0)}


@dataclass(frozen=True, kw_only=True)
class SolverConfig(PrecisionConfig):
    """How a teacher makes trajectories. The solver itself is float32 in every precision."""

    solver_steps: int = 25
    """Steps of the solver."""
    solver: Solver = "ddim"
    """Deterministic DDIM (Euler's method, if the teacher is a flow); of second order are "dpm-solver++" and
    "heun", which evaluates the teacher twice a step."""
    guidance: float = 1.5
    """Scale of classifier-free guidance; 1: none."""
    guided_channels: int | None = None
    """Guide the first so many channels only (3 for the public DiT); default: all."""
    dtype: StoredDtype = "float16"
    """How tensors are stored."""
    batch_size: int = 100
    """Samples per pass of the solver."""
    seed: int = 0
    """Seed of the noise."""


class Maker:
    """A teacher with its solver: sample indices -> trajectories. `where` is who reports errors."""

    def __init__(self, teacher: Path, config: SolverConfig, where: str) -> None:
        check_counts(where, batch_size=config.batch_size)
        check_seed(config.seed, where)
        check_solver(config.solver, where)
        if not 0 <= config.guidance < math.inf:
            raise ValueError(f"{where}: guidance is {config.guidance}, accepted is a finite number >= 0")
        model, self.diffusion = load_teacher(teacher)
        if config.guided_channels is not None and not 1 <= config.guided_channels <= model.channels:
            raise ValueError(f"{where}: guided_channels is {config.guided_channels}, accepted are "
                             f"1..{model.channels}, the teacher's channels")  # fmt: skip
        if config.guidance != 1 and not model.null_class:
            raise ValueError(
                f"{where}: guidance is {config.guidance}, but the teacher has no null class; accepted is 1"
            )
        self.where, self.device = where, worker_device()
        config = replace(config, precision=settled(config.precision, self.device)[0])
        self.config, self.identity, self.num_classes = config, sha256(teacher / WEIGHTS), model.num_classes
        self.times, self.dtype = self.diffusion.solver_times(config.solver_steps), DTYPES[config.dtype]
        self.shape = (model.channels, *model.input_size)
        guide = guided(model.to(self.device), model.num_classes, config.guidance, config.guided_channels)
        self.denoise = computing(config.precision, self.device)(guide)

    def manifest(self, kept: Sequence[int], **extent: int | None) -> dict[str, Any]:
        """What makes the trajectories what they are; `extent`: how many there are, and in which shards."""
        config = self.config
        return {
            "format": _FORMAT, "teacher": self.identity, "diffusion": self.diffusion.config,
            "solver": config.solver, "solver_steps": config.solver_steps, "times": self.times,
            "guidance": config.guidance, "guided_channels": config.guided_channels, "kept": list(kept),
            "dtype": config.dtype, "shape": list(self.shape), "num_classes": self.num_classes, **extent,
            "batch_size": config.batch_size, "precision": config.precision, "seed": config.seed,
        }  # fmt: skip

    @torch.no_grad()
    def make(self, indices: Tensor, kept: Sequence[int]) -> dict[str, Tensor]:
        """The trajectories of `indices` (n,), in one pass: tensors on the CPU as a shard holds them."""
        # The teacher starts from the noise as it is stored.
        noise = index_noise(indices, self.shape, self.config.seed).to(self.dtype)
        labels = indices % self.num_classes
        start, classes = noise.float().to(self.device), labels.to(self.device)
        solved = self.diffusion.solve(self.denoise, start, classes, self.times, self.config.solver)
        states = {state.index: state for state in solved if state.index in (*kept, -1)}
        xt = torch.stack([states[i].x for i in kept], 1) if kept else noise.new_empty(len(noise), 0)
        x0 = torch.stack([states[i].x0 for i in kept], 1) if kept else xt  # type: ignore[misc]
        tensors = {"noise": noise, "xt": xt, "x0": x0, "final": states[-1].x}
        stored = {name: value.to(self.dtype).cpu() for name, value in tensors.items()}
        if not all(value.isfinite().all() for value in stored.values()):
            raise ValueError(
                f"{self.where}: trajectories of samples {indices[0]}..{indices[-1]} are not finite; dtype is "
                f"{self.config.dtype!r}, precision {self.config.precision!r}; try --dtype float32"
            )
        return {"labels": labels, **stored}


def _checked(where: str, state: str) -> State:
    if state not in get_args(State):
        accepted = ", ".join(map(repr, get_args(State)))
        raise ValueError(f"{where}: state is {state!r}, accepted are {accepted}")
    return cast(State, state)


class Trajectories(ABC):
    """Trajectories by sample index, for training.

    Attributes:
        folder: where they come from.
        manifest: what makes them what they are; its "samples" is how many there are (None: endless).
    """

    folder: Path
    manifest: dict[str, Any]

    def states(self, indices: Tensor, grid: tuple[int, ...], state: State) -> tuple[Tensor, Tensor]:
        """(n, S+1, C, h, w) float32, the states of `indices` at the positions of `grid`; (n,) int64 labels.

        Raises:
            ValueError: no index or one that is not there, a grid that `grid` does not accept, another state.
        """
        if not len(indices) or not 0 <= int(indices.min()) <= int(indices.max()) < len(self):
            raise ValueError(f"states: indices are {indices.tolist()}, accepted are one or more of "
                             f"0..{len(self) - 1}, what {self.folder} holds")  # fmt: skip
        return self._states(indices, self.grid(len(grid) - 1, grid), _checked("states", state))

    @abstractmethod
    def _states(self, indices: Tensor, grid: tuple[int, ...], state: State) -> tuple[Tensor, Tensor]:
        """`states` of what was checked."""

    def __len__(self) -> int:
        samples = self.manifest["samples"]
        return sys.maxsize if samples is None else int(samples)

    def order(self, positions: range, seed: int) -> Tensor:
        """(n,) sample indices at positions in the stream of samples: shuffled epochs; of endless ones, every
        one once."""
        if self.manifest["samples"] is None:
            return torch.arange(positions.start, positions.stop)
        return shuffled(positions.start, len(positions), len(self), seed)

    def check_teacher(self, folder: Path) -> None:
        """An error if another teacher made these trajectories."""
        if sha256(folder / WEIGHTS) != self.manifest["teacher"]:
            raise ValueError(f"{self.folder}: was recorded from another teacher than {folder}")

    def summary(self, grid: tuple[int, ...], state: State) -> dict[str, Any]:
        """What a student trained on these states should remember of them: `ARDTransformer.trajectories`.

        Raises:
            ValueError: a grid that `grid` does not accept, or another state.
        """
        kept = {name: self.manifest[name] for name in (*_SAME, "seed", "samples")}
        return {**kept, "grid": [*self.grid(len(grid) - 1, grid)], "state": _checked("summary", state)}

    def of_student(
        self, folder: Path, student: ARDTransformer, trained: Mapping[str, Any]
    ) -> tuple[tuple[int, ...], State]:
        """The grid and the kind of the states that a student was trained on.

        Args:
            folder: of the student.
            student: what is there.
            trained: what it says of its training, see `summary`.

        Raises:
            ValueError: it does not say, or not of as many states as it has steps, or these trajectories are
                made otherwise or lack a position.
        """
        grid, state = trained.get("grid"), trained.get("state")
        if trained.get("teacher") is None or grid is None or state not in get_args(State):
            raise ValueError(
                f"{folder}: does not say which states of which teacher it was trained on; accepted is what "
                "`ard distill` writes, `ard convert --teacher`, or in training of your own "
                "student.trajectories = TrajectoryStore(folder).summary(grid, state)"
            )
        if trained["teacher"] != self.manifest["teacher"]:
            raise ValueError(f"{self.folder}: was recorded from another teacher than that of {folder}")
        if changed := [
            f"{name} is {self.manifest[name]!r}, the student's is {trained[name]!r}"
            for name in _SAME
            if name in trained and trained[name] != self.manifest[name]
        ]:
            raise ValueError(
                f"{self.folder}: was not recorded as what {folder} was trained on ({'; '.join(changed)})"
            )
        if len(grid) != student.steps + 1:
            raise ValueError(
                f"{folder}: says that it was trained on the states at positions {grid}, accepted are "
                f"{student.steps + 1} of them, one more than its steps"
            )
        return self.grid(student.steps, tuple(grid)), cast(State, state)

    def has_noise_of(self, trained: Mapping[str, Any]) -> bool:
        """Whether a student was trained from the same noise, as far as it says."""
        return "seed" in trained and trained["seed"] == self.manifest["seed"]

    def identity(self) -> str:
        """The same for the same trajectories, wherever they lie."""
        return hashlib.sha256(json.dumps(self.manifest, sort_keys=True).encode()).hexdigest()

    def levels(self, grid: tuple[int, ...]) -> list[int]:
        """The teacher's times at which the xt states at all positions of `grid` but the last stand."""
        times: list[int] = self.manifest["times"]
        return [times[min(position, len(times) - 1)] for position in grid[:-1]]

    def grid(self, steps: int, asked: tuple[int, ...] | None = None) -> tuple[int, ...]:
        """The S+1 solver positions of the student's states, from the noise down to 0.

        Default: the released recipe's where it has one, else the kept positions nearest to an even spacing.
        """
        top = self.manifest["solver_steps"]
        available = [top, *self.manifest["kept"], 0]
        if not 1 <= steps < len(available):
            raise ValueError(f"grid: steps is {steps}, accepted are 1..{len(available) - 1}, between the "
                             f"positions that {self.folder} has: {available}")  # fmt: skip
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


class TrajectoryStore(Trajectories):
    """Recorded trajectories, read by sample index. `Shards` checks each shard when it is first used."""

    def __init__(self, folder: str | PathLike[str]) -> None:
        folder = Path(folder)
        self._shards = Shards(folder, "record", _FORMAT, (*_SAME, "seed", "kept"))
        self.folder, self.manifest = folder, self._shards.manifest
        with describing(folder / MANIFEST, "recording"):
            inner = range(1, self.manifest["solver_steps"])
            if not all(position in inner for position in self.manifest["kept"]):
                raise TypeError(f"kept is {self.manifest['kept']}, accepted are positions 1..{len(inner)}")
        self._shards.check_complete()

    def _states(self, indices: Tensor, grid: tuple[int, ...], state: State) -> tuple[Tensor, Tensor]:
        kept = self.manifest["kept"]
        paths, labels = [], []
        for index in indices.tolist():
            tensors, row = self._shards.at(index)
            inner = tensors[state][row]
            middle = [inner[kept.index(i)] for i in grid[1:-1]]
            paths.append(torch.stack([tensors["noise"][row], *middle, tensors["final"][row]]))
            labels.append(tensors["labels"][row])
        return torch.stack(paths).float(), torch.stack(labels)


class LiveTrajectories(Trajectories):
    """Trajectories that the teacher makes when they are asked for; nothing is stored.

    Sample i is what `record` with the same options stores as sample i: to the bit where the same samples
    share a pass of the solver, else up to what another pass rounds differently. All solver positions exist.

    Args:
        teacher: the teacher's folder.
        config: how it makes them.
        samples: how many there are; None: endless, so that no sample need come twice.
    """

    def __init__(self, teacher: Path, config: SolverConfig, samples: int | None = None) -> None:
        if samples is not None:
            check_counts("LiveTrajectories", samples=samples)
        self.folder = teacher
        self._maker = Maker(teacher, config, "LiveTrajectories")
        self.manifest = self._maker.manifest(range(config.solver_steps - 1, 0, -1), samples=samples)

    def _states(self, indices: Tensor, grid: tuple[int, ...], state: State) -> tuple[Tensor, Tensor]:
        paths, labels = [], []
        for some in indices.split(self._maker.config.batch_size):
            made = self._maker.make(some, grid[1:-1])
            paths.append(torch.stack([made["noise"], *made[state].unbind(1), made["final"]], 1))
            labels.append(made["labels"])
        return torch.cat(paths).float(), torch.cat(labels)

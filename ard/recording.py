"""Making trajectories that are kept."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Literal

from ard.checkpoints import load_teacher
from ard.data import check_counts
from ard.grids import chosen_grid
from ard.precision import settled
from ard.shards import Shards, began_with, worker, worker_device
from ard.trajectories import LiveTrajectories, Maker, SolverConfig


@dataclass(frozen=True)
class RecordConfig(SolverConfig):
    """Record a teacher's trajectories. A store with the same options is continued; processes may share the
    work."""

    teacher: Path
    """Folder of the teacher."""
    out: Path
    """Folder of the store."""
    samples: int = 6000
    """How many trajectories. Sample i has class i mod num_classes, its noise depends on (seed, i) alone."""
    keep: Literal["fifth", "all"] | tuple[int, ...] = "fifth"
    """Solver positions kept besides the noise and the result."""
    steps: int | None = None
    """Keep as well the states over which `ard distill --steps` so many would step if it could choose among
    all. 64 trajectories tell which."""
    shard_size: int = 1000
    """Samples per file."""


def _kept(config: RecordConfig, before: tuple[int, ...] | None) -> tuple[int, ...]:
    """The positions; `before`, those of the store that goes on."""
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
    if config.steps is not None and before is not None:
        chosen |= set(before)
    elif config.steps is not None:
        solver = {f.name: getattr(config, f.name) for f in fields(SolverConfig)}
        live = LiveTrajectories(config.teacher, SolverConfig(**{**solver, "dtype": "float32"}))
        teacher = load_teacher(config.teacher)[0].to(worker_device())
        grid, _ = chosen_grid(teacher, live, config.steps, precision=config.precision)
        chosen |= set(grid[1:-1])
    return tuple(sorted(chosen, reverse=True))


def record(config: RecordConfig) -> None:
    check_counts("record", samples=config.samples, shard_size=config.shard_size)
    began = began_with(config.out, "precision")
    precision, _ = settled(config.precision, worker_device(), config.out, began)
    config = replace(config, precision=precision)
    maker = Maker(config.teacher, config, "record")
    before = began_with(config.out, "kept")
    if before is not None and began_with(config.out, "steps") != config.steps:
        before = None  # another recording, which the manifest will say
    kept = _kept(config, None if before is None else tuple(before))
    chosen = {} if config.steps is None else {"steps": config.steps}
    manifest = maker.manifest(kept, samples=config.samples, shard_size=config.shard_size, **chosen)
    shards = Shards.begin(config.out, "record", manifest)
    shards.fill(lambda indices: maker.make(indices, kept), config.batch_size, "sample")
    if worker()[0] == 0:
        print(f"trajectories: {config.out} ({config.samples} samples)")

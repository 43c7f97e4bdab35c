"""Which of a teacher's states a student steps over: those between which the teacher's own first-order solver
errs least, measured before anything is trained."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ard.diffusion import Diffusion
from ard.models import DiT
from ard.precision import Precision, computing
from ard.trajectories import Trajectories

_SAMPLES = 64  # errors of this many trajectories have a standard error of a few percent


@torch.no_grad()
def step_errors(
    teacher: DiT, diffusion: Diffusion, states: Tensor, labels: Tensor, levels: list[int], entries: list[int]
) -> tuple[Tensor, list[int]]:
    """The teacher's first-order step, unguided, from every state to every later one.

    Args:
        teacher, diffusion: the teacher; states and labels are on its device.
        states: (B, K, C, h, w), the noise, K - 2 xt states, the result.
        labels: (B,).
        levels: K - 1 times, descending, at which all but the result stand.
        entries: times that the noise may be taken for.

    Returns:
        (K, K) float64, the mean squared error of the step from state i to state j, infinite unless i < j; and
        of each j the entry that the first row has it from.
    """
    count = len(levels)
    following = [*levels[1:], None]
    errors = torch.full((count + 1, count + 1), math.inf, dtype=torch.float64)
    chosen = [levels[0]] * (count + 1)
    for i in range(count):
        for t in entries if i == 0 else [levels[i]]:
            at = torch.full((len(states),), t, device=states.device)
            prediction = teacher(states[:, i], diffusion.network_time(at), labels)[:, : states.shape[2]]
            for j, later in enumerate(following[i:], i + 1):
                if later is not None and later >= t:
                    continue
                a, b = diffusion.transition(t, later)
                error = float((a * states[:, i] + b * prediction - states[:, j]).double().square().mean())
                if error < errors[i, j]:
                    errors[i, j] = error
                    if i == 0:
                        chosen[j] = t
    return errors, chosen


def best_path(errors: Tensor, steps: int) -> list[int]:
    """The S + 1 ascending indices, first and last included, with the least sum of errors (K, K) over their
    steps."""
    table = errors.tolist()
    paths = {0: (0.0, [0])}  # by where they end
    for _ in range(steps):
        longer: dict[int, tuple[float, list[int]]] = {}
        for i, (before, path) in paths.items():
            for j in range(i + 1, len(table)):
                found = (before + table[i][j], [*path, j])
                longer[j] = min(longer.get(j, found), found)
        paths = longer
    return paths[len(table) - 1][1]


def chosen_grid(
    teacher: DiT, store: Trajectories, steps: int, grid: tuple[int, ...] | None = None,
    entry: int | None = None, precision: Precision = "no",
) -> tuple[tuple[int, ...], int]:  # fmt: skip
    """The grid over which the teacher's first-order solver, unguided, has the smallest `trajectory_loss` on
    the teacher's own states: that of a student before it is trained.

    Args:
        teacher: the teacher, on the device where it shall compute.
        store: its trajectories; the grid is made of the positions that they have.
        steps: S.
        grid: given, so that the entry alone is to be found.
        entry: the time that the noise is taken for. None: its own; of a teacher that predicts eps, which is
            multiplied by a hundred and more there, the one that errs least.
        precision: in which the teacher computes.

    Returns:
        The grid (`Trajectories.grid`), and the entry.

    Raises:
        ValueError: more steps than the positions allow, a grid that `Trajectories.grid` does not accept, or
            an entry that is no time before the grid's second state.
    """
    manifest = store.manifest
    top = manifest["solver_steps"]
    positions = [top, *manifest["kept"], 0] if grid is None else [*store.grid(steps, grid)]
    positions = [i for i in positions if i != top - 1]  # where the noise stands, too
    if not 1 <= steps < len(positions):
        raise ValueError(
            f"grid: steps is {steps}, accepted are 1..{len(positions) - 1}, between the xt states that "
            f"{store.folder} has, at positions {positions}"
        )
    diffusion = Diffusion(**manifest["diffusion"])
    levels = store.levels(tuple(positions))
    entries = [levels[0] if entry is None else entry]
    if entry is None and diffusion.prediction == "eps":
        entries = manifest["times"]
    device = teacher.pos_embed.device
    states, labels = store.states(torch.arange(min(_SAMPLES, len(store))), tuple(positions), "xt")
    with computing(precision, device):
        errors, chosen = step_errors(
            teacher, diffusion, states.to(device), labels.to(device), levels, entries
        )
    path = best_path(errors, steps)
    if errors[0, path[1]].isinf():
        raise ValueError(f"entry is {entry}, accepted are times later than that of the next state, "
                         f"{levels[path[1]]}")  # fmt: skip
    return tuple(positions[i] for i in path), chosen[path[1]]

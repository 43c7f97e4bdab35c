"""Heads whose output is what the teacher predicts: the student starts as the teacher's first-order solver."""

from __future__ import annotations

from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import randomise, tiny_teacher
from torch import Tensor

import ard
from ard.checkpoints import save_teacher
from ard.diffusion import Diffusion
from ard.grids import best_path, chosen_grid, step_errors
from ard.models import ARDTransformer, DiT
from ard.trajectories import LiveTrajectories, SolverConfig, TrajectoryStore

_PROCESSES: tuple[tuple[Any, ...], ...] = (
    ("linear", "eps"), ("linear", "x0"), ("linear", "v"), ("cosine", "eps"), ("cosine", "v"),
    ("flow-to-noise", "velocity", 1000, 1000.0), ("flow-to-noise", "x0", 1000, 1000.0),
    ("flow-to-data", "velocity", 1000, 1.0), ("flow-to-data", "x0", 1000, 1.0),
)  # fmt: skip
_LEVELS = [900, 624, 416, 208]


@pytest.mark.parametrize("process", _PROCESSES)
@pytest.mark.parametrize("following", [300, 0, None])
def test_a_transition_is_ddims_step(process: tuple[Any, ...], following: int | None) -> None:
    diffusion = Diffusion(*process)
    generator = torch.Generator().manual_seed(0)
    x, prediction = torch.randn(2, 5, 1, 4, 4, dtype=torch.float64, generator=generator)
    t = torch.full((5,), 700)
    x0, eps = diffusion.split(prediction, x, t)
    stepped = x0 if following is None else diffusion.add_noise(x0, eps, torch.full((5,), following))
    a, b = diffusion.transition(700, following)
    torch.testing.assert_close(a * x + b * prediction, stepped, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("times", [(700, 700), (700, 800), (1000, 3), (-1, None), (3, -1)])
def test_a_step_that_is_none_is_refused(times: tuple[int, int | None]) -> None:
    with pytest.raises(ValueError, match=r"accepted are times in 0\.\.999"):
        Diffusion().transition(*times)


def _student(process: tuple[Any, ...], history: int = 0, **options: Any) -> tuple[DiT, ARDTransformer]:
    teacher = tiny_teacher(**options).double()
    teacher.diffusion = Diffusion(*process)
    gated = history > 0
    student = ARDTransformer.from_teacher(teacher, 4, history, levels=_LEVELS, gated_history=gated)
    return teacher, student


def _solver(teacher: DiT, noise: Tensor, labels: Tensor, levels: list[int]) -> Tensor:
    """(B, S, C, h, w), by the solver that recordings are made with."""
    assert teacher.diffusion is not None
    with torch.no_grad():
        states = [*teacher.diffusion.solve(teacher, noise, labels, levels[::-1])]
    return torch.stack([state.x for state in states[1:]], 1)


@pytest.mark.parametrize("process", _PROCESSES)
@pytest.mark.parametrize("history", [0, 2])
def test_an_untrained_student_is_the_teachers_solver(process: tuple[Any, ...], history: int) -> None:
    teacher, student = _student(process, history, learn_sigma=True)
    noise, labels = torch.randn(3, 1, 28, 28, dtype=torch.float64), torch.tensor([0, 4, 9])
    expected = _solver(teacher, noise, labels, _LEVELS)
    path = ard.sample(student, noise, labels)
    # The solver's weights of a state are products of those that a transition has as one number: with a cosine
    # schedule and eps they reach 1e2 and cancel.
    torch.testing.assert_close(path, expected, rtol=1e-9, atol=1e-9)
    forced = student(torch.cat([noise.unsqueeze(1), path[:, :-1]], 1), labels)
    torch.testing.assert_close(forced, path, rtol=1e-9, atol=1e-9)
    told = teacher.diffusion.network_time(torch.tensor(_LEVELS)).float()  # type: ignore[union-attr]
    torch.testing.assert_close(student.times, told, rtol=0, atol=0)


@pytest.mark.parametrize("guidance", [1.0, 1.5])
def test_with_recordings_of_either_guidance(teacher: Path, guidance: float) -> None:
    """A recording of 5 steps without guidance is what an untrained student of 4 makes, but for its last step
    to the image, where the recording has two. Guided ones are as far off as guidance moves them."""
    config = SolverConfig(precision="no", guidance=guidance, dtype="float32", solver_steps=5)
    store, grid = LiveTrajectories(teacher, config, 8), (5, 3, 2, 1, 0)
    dit = DiT.from_pretrained(teacher)
    states, labels = store.states(torch.arange(8), grid, "xt")
    levels = store.levels(grid)
    student = ARDTransformer.from_teacher(dit, 4, 0, levels=levels)
    path = ard.sample(student, states[:, 0], labels)
    torch.testing.assert_close(path, _solver(dit, states[:, 0], labels, levels), rtol=1e-5, atol=1e-5)
    off = (path - states[:, 1:]).abs()
    assert off[:, -1].max() < 0.2
    assert off[:, :-1].max() < 1e-5 if guidance == 1 else 1e-4 < off[:, :-1].max() < 0.2


def test_a_head_trains_through_its_step() -> None:
    _, student = _student(_PROCESSES[2], 2)
    states = torch.randn(2, 4, 1, 28, 28, dtype=torch.float64)
    student(states, torch.tensor([1, 2])).square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in student.parameters() if p.requires_grad)


def test_levels_that_cannot_be_are_refused() -> None:
    teacher = tiny_teacher()
    with pytest.raises(ValueError, match="diffusion is not known"):
        ARDTransformer.from_teacher(teacher, 4, 0, levels=_LEVELS)
    teacher.diffusion = Diffusion()
    with pytest.raises(ValueError, match="accepted are 3"):
        ARDTransformer.from_teacher(teacher, 3, 0, levels=_LEVELS)
    with pytest.raises(ValueError, match="times is given, too"):
        ARDTransformer.from_teacher(teacher, 4, 0, levels=_LEVELS, times=[4, 3, 2, 1])
    with pytest.raises(ValueError, match="the second one earlier"):
        ARDTransformer.from_teacher(teacher, 4, 0, levels=[624, 999, 416, 208])
    for wrong in ([(1.0, 2.0)], [(1.0,)] * 4, [(1.0, float("nan"))] * 4, 3):
        with pytest.raises(ValueError, match="accepted are 4"):
            ARDTransformer(teacher.config, 4, 0, transitions=wrong)  # type: ignore[arg-type]


def test_bfloat16_does_not_round_the_output_of_a_head() -> None:
    """Of eps, the first transition multiplies it by 20: rounded to bfloat16 it is off by 0.05."""
    teacher = tiny_teacher()
    teacher.diffusion = Diffusion("linear", "eps")
    student = ARDTransformer.from_teacher(teacher, 4, 0, levels=[999, 624, 416, 208])
    y, state = torch.randn(8, 16, 32), torch.randn(8, 1, 28, 28)
    exact = student._predict(y, state, 0)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(student._predict(y, state, 0), exact, rtol=0, atol=0)


def test_the_path_of_least_error_is_found() -> None:
    generator = torch.Generator().manual_seed(0)
    errors = torch.rand(9, 9, dtype=torch.float64, generator=generator)
    for steps in (1, 2, 4, 8):
        found = best_path(errors, steps)
        every = [[0, *inner, 8] for inner in combinations(range(1, 8), steps - 1)]
        sums = [sum(float(errors[i, j]) for i, j in pairwise(path)) for path in every]
        assert found == every[sums.index(min(sums))]


def test_errors_of_steps_are_those_of_an_untrained_student(teacher: Path, store: TrajectoryStore) -> None:
    dit = DiT.from_pretrained(teacher)
    assert dit.diffusion is not None
    grid = (25, 15, 5, 0)
    states, labels = store.states(torch.arange(8), grid, "xt")
    levels = store.levels(grid)
    errors, _ = step_errors(dit, dit.diffusion, states, labels, levels, levels[:1])
    student = ARDTransformer.from_teacher(dit, 3, 0, levels=levels)
    with torch.no_grad():
        forced = student(states[:, :-1], labels)
    own = (forced - states[:, 1:]).square().mean((0, 2, 3, 4)).double()
    torch.testing.assert_close(errors.diagonal(1), own, rtol=1e-4, atol=1e-7)
    assert errors.isinf().equal(torch.ones(4, 4).tril().bool())


def test_the_grid_has_the_least_loss_of_all(teacher: Path, store: TrajectoryStore) -> None:
    dit = DiT.from_pretrained(teacher)
    found, entry = chosen_grid(dit, store, 3)
    assert entry == store.manifest["times"][-1]

    def loss(grid: tuple[int, ...]) -> float:
        states, labels = store.states(torch.arange(44), grid, "xt")
        student = ARDTransformer.from_teacher(dit, 3, 0, levels=store.levels(grid))
        with torch.no_grad():
            return float((student(states[:, :-1], labels) - states[:, 1:]).square().mean())

    others = [(25, *inner, 0) for inner in combinations((20, 15, 10, 5), 2)]
    assert loss(found) == min(loss(grid) for grid in others)
    assert chosen_grid(dit, store, 3, (25, 20, 15, 0))[0] == (25, 20, 15, 0)
    with pytest.raises(ValueError, match=r"accepted are 1\.\.5"):
        chosen_grid(dit, store, 6)


def test_an_eps_teacher_is_entered_where_it_errs_less(tmp_path: Path) -> None:
    """A random network is off everywhere: the noise is taken for an earlier time, where that weighs less."""
    teacher = tiny_teacher()
    randomise(teacher, 3)
    diffusion = Diffusion("linear", "eps")
    save_teacher(tmp_path, teacher, diffusion)
    live = LiveTrajectories(tmp_path, SolverConfig(precision="no", guidance=1.0), 16)
    grid, entry = chosen_grid(teacher, live, 4)
    states, labels = live.states(torch.arange(16), grid, "xt")
    following = live.levels(grid)[1]

    def error(t: int) -> float:
        a, b = diffusion.transition(t, following)
        with torch.no_grad():
            prediction = teacher(states[:, 0], torch.full((16,), t), labels)
        return float((a * states[:, 0] + b * prediction - states[:, 1]).square().mean())

    candidates = [t for t in live.manifest["times"] if t > following]
    assert entry == min(candidates, key=error)
    assert chosen_grid(teacher, live, 4, grid, 999)[1] == 999


def test_it_is_one_graph_for_torch_compile() -> None:
    torch._dynamo.reset()
    teacher = tiny_teacher()
    teacher.diffusion = Diffusion()
    student = ARDTransformer.from_teacher(teacher, 4, 2, levels=_LEVELS, gated_history=True)
    states, labels = torch.randn(2, 4, 1, 28, 28), torch.tensor([1, 2])
    compiled = torch.compile(student, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(states, labels), student(states, labels))

"""Flow teachers: which way their time runs, on which scale, and what their velocity is, their names say.

The oracle is a network that knows its own convention alone: the optimal velocity for data N(m, s^2).
"""

from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_teacher
from torch import Tensor

from ard import sample
from ard.checkpoints import load_student, load_teacher, save_student, save_teacher
from ard.diffusion import Denoiser, Diffusion, Prediction, Schedule, Solver, guided
from ard.models import ARDTransformer
from ard.recording import RecordConfig, record
from ard.trajectories import TrajectoryStore

_FLOWS: tuple[Schedule, ...] = ("flow-to-noise", "flow-to-data")
_M, _S = 0.7, 0.5


def _randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _velocity(schedule: Schedule, scale: float) -> Denoiser:
    """E[dx/dt | x_t] of N(m, s^2), in closed form from the time that the network is told."""

    def network(x: Tensor, t: Tensor, _: Tensor) -> Tensor:
        time = (t.double() / scale).view(-1, 1, 1, 1)
        if schedule == "flow-to-noise":  # x_t = (1 - t) x_0 + t eps
            return (time - (1 - time) * _S**2) / ((1 - time) ** 2 * _S**2 + time**2) * (
                x - (1 - time) * _M
            ) - _M
        # x_t = t x_0 + (1 - t) eps
        return _M + (time * _S**2 - (1 - time)) / (time**2 * _S**2 + (1 - time) ** 2) * (x - time * _M)

    return network


def _smooth(x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
    return torch.sin(1.3 * x.flip(-1) + (3 * t.double() + labels.double()).view(-1, 1, 1, 1))


@pytest.mark.parametrize(("solver", "order"), [("ddim", 1), ("heun", 2), ("dpm-solver++", 2)])
@pytest.mark.parametrize("scale", [1.0, 1000.0])
@pytest.mark.parametrize("schedule", _FLOWS)
def test_solvers_turn_noise_into_data_with_their_order(
    schedule: Schedule, scale: float, solver: Solver, order: int
) -> None:
    """The exact flow of N(m, s^2) is noise -> m + s noise. 2M counts time in log(alpha / sigma), which is
    infinite at both ends: its error is as log(n) / n^2."""
    diffusion, x = Diffusion(schedule, "velocity", 960, scale), _randn(64, 1, 2, 2)

    def error(steps: int) -> float:
        times = diffusion.solver_times(steps)
        *_, last = diffusion.solve(_velocity(schedule, scale), x, torch.zeros(64), times, solver)
        return float((last.x - (_M + _S * x)).abs().max())

    counts = (120, 240, 480)
    errors = [error(steps) for steps in counts]
    assert errors[-1] < 0.01
    for n, (coarse, fine) in zip(counts, pairwise(errors), strict=False):
        wanted = 2.0**order * (math.log(n) / math.log(2 * n) if solver == "dpm-solver++" else 1)
        assert 0.95 * wanted < coarse / fine < 1.05 * wanted


@pytest.mark.parametrize("mistake", ["direction", "scale"])
def test_a_mixed_up_convention_is_far_off(mistake: str) -> None:
    """That the test above can tell: the same network under another name or scale ends elsewhere."""
    network, x = _velocity("flow-to-data", 1.0), _randn(64, 1, 2, 2)
    diffusion = (
        Diffusion("flow-to-noise", "velocity", 960, 1.0)
        if mistake == "direction"
        else Diffusion("flow-to-data", "velocity", 960, 1000.0)
    )
    *_, last = diffusion.solve(network, x, torch.zeros(64), diffusion.solver_times(120))
    assert (last.x - (_M + _S * x)).abs().mean() > 0.5


@pytest.mark.parametrize("scale", [1.0, 1000.0])
@pytest.mark.parametrize("schedule", _FLOWS)
def test_the_training_target_is_what_the_optimal_network_predicts(schedule: Schedule, scale: float) -> None:
    """Noising, target and network time go together: the error of the optimal network is the variance of the
    velocity given x_t, s^2 / ((1 - sigma)^2 s^2 + sigma^2), at every time, and it has no bias."""
    diffusion, n = Diffusion(schedule, "velocity", 1000, scale), 100_000
    for t in (0, 250, 700, 998):
        times = torch.full((n,), t)
        x0, noise = _M + _S * _randn(n, 1, 1, 1, seed=t), _randn(n, 1, 1, 1, seed=t + 1)
        told = diffusion.network_time(times)
        prediction = _velocity(schedule, scale)(diffusion.add_noise(x0, noise, times), told, times)
        errors = diffusion.target(x0, noise, times) - prediction
        sigma = (t + 1) / 1000
        variance = _S**2 / ((1 - sigma) ** 2 * _S**2 + sigma**2)
        # Five standard errors of a mean and of a variance.
        assert abs(errors.mean()) < 5 * math.sqrt(variance / n)
        assert abs(errors.square().mean() / variance - 1) < 5 * math.sqrt(2 / n)


@pytest.mark.parametrize("prediction", ["velocity", "x0"])
@pytest.mark.parametrize("schedule", _FLOWS)
def test_split_inverts_noising_and_target(schedule: Schedule, prediction: Prediction) -> None:
    diffusion = Diffusion(schedule, prediction, time_scale=1)
    x0, noise, t = _randn(4, 3, 4, 4), _randn(4, 3, 4, 4, seed=1), torch.tensor([0, 10, 700, 999])
    x = diffusion.add_noise(x0, noise, t)
    torch.testing.assert_close(x[-1], noise[-1])  # the last time is pure noise
    raw = torch.cat([diffusion.target(x0, noise, t), torch.full_like(x0, torch.nan)], 1)
    for got, wanted in zip(diffusion.split(raw, x, t), (x0, noise), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)


def test_times_are_on_the_networks_scale_and_in_its_direction() -> None:
    ends = torch.tensor([0, 249, 999])  # a thousandth of noise, a quarter, all
    for scale in (1.0, 1000.0):
        to_noise, to_data = (Diffusion(schedule, "velocity", time_scale=scale) for schedule in _FLOWS)
        told = torch.tensor([0.001, 0.25, 1.0]) * scale
        torch.testing.assert_close(to_noise.network_time(ends), told)
        torch.testing.assert_close(to_data.network_time(ends), scale - told)
        assert to_noise.student_times(4) == [scale * part for part in (1, 0.75, 0.5, 0.25)]
        assert to_data.student_times(4) == [scale * part for part in (0, 0.25, 0.5, 0.75)]
    assert to_noise.solver_times(4) == [249, 499, 749, 999]
    assert to_noise.solver_times(1) == [999]
    assert to_noise.solver_times(1000) == list(range(1000))
    assert torch.equal(Diffusion().network_time(ends), ends)
    assert Diffusion().student_times(4) == [999, 749.25, 499.5, 249.75]


def _flow_scheduler(solver: Solver, levels: list[float]) -> Any:
    """diffusers' scheduler of a flow, at these noise levels, descending; the image's 0 comes after them."""
    import diffusers

    with_end = torch.tensor([*levels, 0.0])
    if solver == "ddim":
        scheduler: Any = diffusers.FlowMatchEulerDiscreteScheduler()
        scheduler.set_timesteps(sigmas=levels)
    elif solver == "heun":
        scheduler = diffusers.FlowMatchHeunDiscreteScheduler()
        scheduler.set_timesteps(len(levels))
        scheduler.sigmas = torch.cat([with_end[:1], with_end[1:-1].repeat_interleave(2), with_end[-1:]])
    else:
        scheduler = diffusers.DPMSolverMultistepScheduler(
            algorithm_type="dpmsolver++", use_flow_sigmas=True, prediction_type="flow_prediction",
            lower_order_final=False,
        )  # fmt: skip
        scheduler.set_timesteps(len(levels))
        scheduler.sigmas = with_end
    scheduler.set_begin_index(0)
    return scheduler


@pytest.mark.parametrize("solver", ["ddim", "heun", "dpm-solver++"])
def test_flow_solvers_are_those_of_diffusers(solver: Solver) -> None:
    """Every state of 20 steps, at the same noise levels, up to diffusers' float32."""
    diffusion = Diffusion("flow-to-noise", "velocity", time_scale=1)
    x, labels, times = _randn(3, 2, 4, 4), torch.arange(3), diffusion.solver_times(20)
    levels = [(t + 1) / 1000 for t in reversed(times)]
    theirs = _flow_scheduler(solver, levels)

    def step(x: Tensor, level: float) -> Tensor:
        velocity = _smooth(x, torch.full((3,), level), labels)
        stepped: Tensor = theirs.step(velocity, theirs.timesteps[0], x).prev_sample.double()
        return stepped

    states = diffusion.solve(_smooth, x, labels, times, solver)
    for level, following, state in zip(levels, [*levels[1:], 0.0], states, strict=False):
        torch.testing.assert_close(state.x, x, rtol=1e-5, atol=1e-5)
        x = step(x, level)
        if solver == "heun" and following:
            x = step(x, following)
    torch.testing.assert_close(next(states).x, x, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_heun_of_a_diffusion_is_that_of_its_flow(schedule: Schedule) -> None:
    """x / (alpha + sigma) at noise level sigma / (alpha + sigma), through diffusers' Heun for flows."""
    diffusion, labels = Diffusion(schedule, "x0"), torch.arange(3)
    times = diffusion.solver_times(20)
    total = diffusion.alpha + diffusion.sigma
    level = diffusion.sigma / total
    theirs = _flow_scheduler("heun", [float(level[t]) for t in reversed(times)])

    def step(y: Tensor, t: int) -> Tensor:
        x0 = _smooth(total[t] * y, torch.full((3,), t), labels)
        stepped: Tensor = theirs.step((y - x0) / level[t], theirs.timesteps[0], y).prev_sample.double()
        return stepped

    x = _randn(3, 2, 4, 4)
    states, y = diffusion.solve(_smooth, x, labels, times, "heun"), x / total[times[-1]]
    for i, state in zip(reversed(range(20)), states, strict=False):
        torch.testing.assert_close(state.x, total[times[i]] * y, rtol=1e-4, atol=1e-4)
        y = step(y, times[i])
        if i:
            y = step(y, times[i - 1])


def test_mix_ups_are_refused() -> None:
    to_data, to_noise = ({"schedule": schedule, "prediction": "velocity"} for schedule in reversed(_FLOWS))
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"schedule": "flow"}, "schedule is 'flow', accepted are .*'flow-to-noise', 'flow-to-data'$"),
        (
            {**to_data, "prediction": "v", "time_scale": 1},
            "prediction is 'v', accepted are 'velocity', 'x0'$",
        ),
        ({**to_data, "prediction": "eps", "time_scale": 1}, "accepted are 'velocity', 'x0'$"),
        ({"prediction": "velocity"}, "prediction is 'velocity', accepted are 'eps', 'x0', 'v'$"),
        (to_noise, "time_scale is None, accepted is a number > 0"),
        ({**to_noise, "time_scale": -1}, "time_scale is -1, accepted is a number > 0"),
        ({**to_noise, "time_scale": math.nan}, "time_scale is nan, accepted is a number > 0"),
        ({"time_scale": 1000}, r"time_scale is 1000, accepted is None: the network is told t in 0\.\.999"),
    ]
    for options, message in wrong:
        with pytest.raises(ValueError, match=message):
            Diffusion(**options)


def test_a_folder_says_which_flow_it_is(tmp_path: Path) -> None:
    diffusion = Diffusion("flow-to-data", "velocity", 500, 1.0)
    save_teacher(tmp_path, tiny_teacher(), diffusion)
    assert load_teacher(tmp_path)[1].config == diffusion.config
    description = json.loads((tmp_path / "config.json").read_text())
    assert description["diffusion"] == {
        "schedule": "flow-to-data", "prediction": "velocity", "timesteps": 500, "time_scale": 1.0,
    }  # fmt: skip
    description["diffusion"]["direction"] = "data"
    (tmp_path / "config.json").write_text(json.dumps(description))
    with pytest.raises(ValueError, match=r"does not describe a DiT .*'direction'"):
        load_teacher(tmp_path)


def test_older_folders_are_as_they_were() -> None:
    """The embedded teacher's description has no word of flows, and none is added to it."""
    folder = Path(__file__).parents[2] / "ard/assets/teacher"
    _, diffusion = load_teacher(folder)
    stored = json.loads((folder / "config.json").read_text())["diffusion"]
    assert diffusion.config == stored == {"schedule": "linear", "prediction": "v", "timesteps": 1000}
    student = ARDTransformer.from_teacher(tiny_teacher(), 4, 1)
    assert student.times.tolist() == [999, 749.25, 499.5, 249.75]
    assert "times" not in student.config


@pytest.mark.parametrize("scale", [1.0, 1000.0])
@pytest.mark.parametrize("schedule", _FLOWS)
def test_a_students_first_time_is_its_teachers_noise(
    tmp_path: Path, schedule: Schedule, scale: float
) -> None:
    """An untrained student of one step predicts what its teacher does of noise; times survive a folder."""
    diffusion, teacher = Diffusion(schedule, "x0", time_scale=scale), tiny_teacher()
    student = ARDTransformer.from_teacher(teacher, 1, 0, times=diffusion.student_times(1))
    noise, labels = _randn(3, 1, 28, 28).float(), torch.arange(3)
    told = diffusion.network_time(torch.full((3,), 999))
    with torch.no_grad():
        prediction = student(noise.unsqueeze(1), labels)[:, 0]
        torch.testing.assert_close(prediction, teacher(noise, told, labels))
        assert not torch.allclose(prediction, teacher(noise, scale - told, labels), atol=1e-3)
    three = ARDTransformer.from_teacher(teacher, 3, 1, times=diffusion.student_times(3))
    save_student(tmp_path, three, {})
    loaded, _ = load_student(tmp_path)
    assert torch.equal(loaded.times, three.times)
    assert loaded.config == three.config
    with torch.no_grad():
        assert torch.equal(sample(loaded, noise, labels), sample(three.eval(), noise, labels))


def test_times_that_do_not_fit_are_refused() -> None:
    for times in ([1.0, 0.5], [1.0, math.inf, 0.0]):
        with pytest.raises(
            ValueError, match=r"times is \[1\.0, .*\], accepted are 3 \(steps\) finite numbers"
        ):
            ARDTransformer.from_teacher(tiny_teacher(), 3, 1, times=times)


@pytest.mark.parametrize("solver", ["ddim", "heun", "dpm-solver++"])
def test_a_flow_teacher_is_recorded(tmp_path: Path, solver: Solver) -> None:
    """Every position of the store is the solver's state, from a teacher that is told its own time."""
    save_teacher(tmp_path / "teacher", tiny_teacher(), Diffusion("flow-to-data", "velocity", time_scale=1.0))
    config = RecordConfig(
        tmp_path / "teacher",
        tmp_path / "store",
        samples=4,
        solver_steps=8,
        solver=solver,
        keep="all",
        dtype="float32",
        precision="no",
    )
    record(config)
    store = TrajectoryStore(config.out)
    assert store.manifest["times"] == [124, 249, 374, 499, 624, 749, 874, 999]
    path, labels = store.states(torch.arange(4), tuple(range(8, -1, -1)), "xt")
    denoise = guided(load_teacher(config.teacher)[0], 10, 1.5)
    # dx/dt = velocity from t = 0 (noise, also at position 7) to 1/8: a step of Euler's or of Heun's method.
    start = path[:, 0]
    with torch.no_grad():
        slope = denoise(start, torch.zeros(4), labels)
        ahead = denoise(start + slope / 8, torch.full((4,), 1 / 8), labels)
    assert torch.equal(path[:, 1], start)
    mean = (slope + ahead) / 2 if solver == "heun" else slope
    torch.testing.assert_close(path[:, 2], start + mean / 8, rtol=1e-5, atol=1e-5)

"""The teacher's process is diffusers' DDIM, the public DiT's guidance, and a solver of the probability-flow
ODE."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from ard.diffusion import Denoiser, Diffusion, Prediction, Schedule, Solver, guided

# Flows are in test_flow.py.
_SCHEDULES: tuple[Schedule, ...] = ("linear", "cosine")
_PREDICTIONS: tuple[Prediction, ...] = ("eps", "x0", "v")
_DIFFUSERS = {
    "linear": "linear", "cosine": "squaredcos_cap_v2", "eps": "epsilon", "x0": "sample", "v": "v_prediction",
}  # fmt: skip


def _randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _network(x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
    """Something smooth and bounded that depends on everything."""
    phase = (t.double() / 300 + labels.double()).view(-1, 1, 1, 1)
    return torch.sin(1.3 * x.flip(-1) + phase)


def _scheduler(schedule: str, prediction: str, spacing: str, steps: int) -> Any:
    import diffusers

    scheduler = diffusers.DDIMScheduler(
        beta_start=1e-4, beta_end=0.02, beta_schedule=_DIFFUSERS[schedule], clip_sample=False,
        set_alpha_to_one=True, prediction_type=_DIFFUSERS[prediction], timestep_spacing=spacing,
    )  # fmt: skip
    scheduler.set_timesteps(steps)
    return scheduler


@pytest.mark.parametrize("schedule", _SCHEDULES)
def test_schedule_is_that_of_diffusers(schedule: Schedule) -> None:
    """diffusers rounds every beta to float32 (half an epsilon), takes 1 - beta and a product of up to 1000 of
    them in float32: 1000 roundings of half an epsilon relative to a factor, twice."""
    theirs = _scheduler(schedule, "eps", "leading", 10).alphas_cumprod.double()
    bound = 1000 * torch.finfo(torch.float32).eps
    torch.testing.assert_close(Diffusion(schedule).alpha.square(), theirs, rtol=bound, atol=bound * 1e-2)


@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("prediction", _PREDICTIONS)
@pytest.mark.parametrize("schedule", _SCHEDULES)
def test_ddim_is_that_of_diffusers(schedule: Schedule, prediction: Prediction, spacing: str) -> None:
    """Every state and x0-prediction of 20 steps, in float64, given the same alphas.

    "linspace" is left out: diffusers then takes t - 1000 // steps as the time that follows t, which is not
    the next of its own list; the DiT release takes the next one of the list, as we do.
    """
    ours, theirs = Diffusion(schedule, prediction), _scheduler(schedule, prediction, spacing, 20)
    theirs.alphas_cumprod = ours.alpha.square()
    theirs.final_alpha_cumprod = torch.ones((), dtype=torch.float64)
    x, labels = _randn(3, 2, 4, 4), torch.arange(3)
    states = ours.ddim(_network, x, labels, sorted(theirs.timesteps.tolist()))
    for t, state in zip(theirs.timesteps.tolist(), states, strict=False):
        torch.testing.assert_close(state.x, x, rtol=1e-9, atol=1e-9)
        step = theirs.step(_network(x, torch.full((3,), t), labels), t, x, eta=0.0)
        torch.testing.assert_close(state.x0, step.pred_original_sample, rtol=1e-9, atol=1e-9)
        x = step.prev_sample
    last = next(states)
    assert (last.index, last.x0) == (-1, None)
    torch.testing.assert_close(last.x, x, rtol=1e-9, atol=1e-9)


def test_solver_times_are_those_of_the_release() -> None:
    published = (
        "0 42 83 125 166 208 250 291 333 375 416 458 500 541 583 624 666 708 749 791 832 874 916 957 999"
    )
    diffusion = Diffusion()
    assert diffusion.solver_times(25) == [int(t) for t in published.split()]
    assert diffusion.solver_times(1000) == list(range(1000))
    assert diffusion.solver_times(1) == [999]
    for steps in (0, 1001):
        with pytest.raises(ValueError, match=rf"solver steps is {steps}, accepted are 1\.\.1000"):
            diffusion.solver_times(steps)


@pytest.mark.parametrize("prediction", _PREDICTIONS)
def test_split_inverts_noising_and_target(prediction: Prediction) -> None:
    """What a perfect network says at x_t gives back the image and the noise x_t was made of, variance
    dropped."""
    diffusion = Diffusion("linear", prediction)
    x0, noise, t = _randn(5, 3, 4, 4), _randn(5, 3, 4, 4, seed=1), torch.tensor([0, 10, 300, 700, 999])
    x = diffusion.add_noise(x0, noise, t)
    raw = torch.cat([diffusion.target(x0, noise, t), torch.full_like(x0, torch.nan)], 1)  # learned sigma
    for got, wanted in zip(diffusion.split(raw, x, t), (x0, noise), strict=True):
        # 1 / sqrt(a_999) = 158 times the rounding of x.
        torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)
    a = diffusion.alpha[t].square().view(-1, 1, 1, 1)
    torch.testing.assert_close(x, a.sqrt() * x0 + (1 - a).sqrt() * noise)


def _gaussian(diffusion: Diffusion) -> tuple[Denoiser, float, float]:
    """The optimal x0-prediction for data N(m, s^2), m and s."""
    m, s = 0.7, 0.5

    def posterior_mean(x: Tensor, t: Tensor, _: Tensor) -> Tensor:
        alpha, sigma = diffusion.alpha[t].view(-1, 1, 1, 1), diffusion.sigma[t].view(-1, 1, 1, 1)
        return m + alpha * s * s / (alpha**2 * s * s + sigma**2) * (x - alpha * m)

    return posterior_mean, m, s


@pytest.mark.parametrize(("solver", "order"), [("ddim", 1), ("heun", 2), ("dpm-solver++", 2)])
@pytest.mark.parametrize("schedule", _SCHEDULES)
def test_solvers_converge_to_the_ode_with_their_order(schedule: Schedule, solver: Solver, order: int) -> None:
    """For data N(m, s^2) the ODE keeps (x_t - alpha m) / sqrt(alpha^2 s^2 + sigma^2) constant. Steps a third
    as long, between the same two times, leave a third or a ninth of the error."""
    diffusion = Diffusion(schedule, "x0")
    denoise, m, s = _gaussian(diffusion)
    (first, last), x = (
        zip(diffusion.alpha[[-1, 0]], diffusion.sigma[[-1, 0]], strict=True),
        _randn(64, 1, 2, 2),
    )
    spread = [(alpha**2 * s * s + sigma**2).sqrt() for alpha, sigma in (first, last)]
    exact = last[0] * m + spread[1] / spread[0] * (x - first[0] * m)

    def error(steps: int) -> float:
        times = diffusion.solver_times(steps)
        *_, at_zero, _ = diffusion.solve(denoise, x, torch.zeros(64), times, solver)
        assert at_zero.index == 0
        return float((at_zero.x - exact).abs().max())

    # 999 = 27 * 37: every grid is a part of the next.
    errors = [error(steps) for steps in (112, 334, 1000)]
    for coarse, fine in pairwise(errors):
        assert 0.9 * 3**order < coarse / fine < 1.1 * 3**order


@pytest.mark.parametrize("schedule", _SCHEDULES)
def test_ddim_ends_at_the_image(schedule: Schedule) -> None:
    """The last step, from time 0 to the image, included: a thousand steps of it are near the exact one."""
    diffusion = Diffusion(schedule, "x0")
    denoise, m, s = _gaussian(diffusion)
    x, alpha, sigma = _randn(64, 1, 2, 2), diffusion.alpha[-1], diffusion.sigma[-1]
    *_, last = diffusion.ddim(denoise, x, torch.zeros(64), diffusion.solver_times(1000))
    exact = m + s * (x - alpha * m) / (alpha**2 * s * s + sigma**2).sqrt()
    assert (last.x - exact).abs().max() < 0.01


@pytest.mark.parametrize("schedule", _SCHEDULES)
def test_dpm_solver_is_that_of_diffusers(schedule: Schedule) -> None:
    """Every state of 20 steps, at the same sigmas. diffusers takes them, and its steps, in float32, where a
    logarithm of up to 10 has a millionth of absolute error."""
    import diffusers

    ours = Diffusion(schedule, "x0")
    theirs = diffusers.DPMSolverMultistepScheduler(
        algorithm_type="dpmsolver++", solver_order=2, prediction_type="sample", lower_order_final=False
    )
    times = ours.solver_times(20)
    theirs.set_timesteps(timesteps=times[::-1])
    theirs.sigmas = torch.tensor([*(ours.sigma / ours.alpha)[times[::-1]], 0.0], dtype=torch.float32)
    x, labels = _randn(3, 2, 4, 4), torch.arange(3)
    for t, state in zip(times[::-1], ours.solve(_network, x, labels, times, "dpm-solver++"), strict=False):
        torch.testing.assert_close(state.x, x, rtol=1e-5, atol=1e-5)
        x = theirs.step(_network(x, torch.full((3,), t), labels), t, x).prev_sample.double()


def test_ddim_is_bitwise_what_it_was() -> None:
    """Stored trajectories are continued: in float32, the default solver's every operation is this one."""
    diffusion, x, labels = Diffusion("linear", "v"), _randn(3, 2, 4, 4).float(), torch.arange(3)
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    a = diffusion.alpha.square()
    torch.testing.assert_close(a, (1 - betas).cumprod(0), rtol=1e-12, atol=0)
    times = diffusion.solver_times(25)
    states = diffusion.solve(lambda *args: _network(*args).float(), x, labels, times)
    for i, state in zip(reversed(range(25)), states, strict=False):
        signal, sigma = diffusion.alpha[times[i]].float(), diffusion.sigma[times[i]].float()
        v = _network(x, torch.full((3,), times[i]), labels).float()
        x0, eps = signal * x - sigma * v, sigma * x + signal * v
        assert torch.equal(state.x, x)
        assert state.x0 is not None
        assert torch.equal(state.x0, x0)
        x = diffusion.alpha[times[i - 1]].float() * x0 + diffusion.sigma[times[i - 1]].float() * eps


def test_guidance_is_that_of_the_dit_release() -> None:
    """`DiT.forward_with_cfg`: 3 of 4 channels guided; the fourth and the variance are the conditional
    prediction."""
    null, scale = 9, 1.5

    def model(x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        return torch.cat([_network(x, t, labels), 100 + _network(x, t, labels)], 1)

    x, t, labels = _randn(2, 4, 3, 3), torch.tensor([500, 500]), torch.tensor([1, 2])
    conditional, without = model(x, t, labels), model(x, t, torch.full_like(labels, null))
    mixed = without + scale * (conditional - without)
    torch.testing.assert_close(
        guided(model, null, scale, 3)(x, t, labels), torch.cat([mixed[:, :3], conditional[:, 3:]], 1)
    )
    torch.testing.assert_close(
        guided(model, null, scale)(x, t, labels), torch.cat([mixed[:, :4], conditional[:, 4:]], 1)
    )
    assert guided(model, null, 1) is model

    diffusion = Diffusion()
    *_, last = diffusion.ddim(guided(model, null, scale, 3), x, labels, diffusion.solver_times(5))
    bare = guided(lambda *a: model(*a)[:, :4], null, scale, 3)
    *_, wanted = diffusion.ddim(bare, x, labels, diffusion.solver_times(5))
    assert last.x.shape == x.shape
    assert torch.equal(last.x, wanted.x)


def test_unknown_names_are_refused() -> None:
    with pytest.raises(
        ValueError, match="schedule is 'sigmoid', accepted are 'linear', 'cosine', 'flow-to-noise'"
    ):
        Diffusion("sigmoid")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"prediction is 'noise', accepted are 'eps', 'x0', 'v'$"):
        Diffusion("linear", "noise")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"solver is 'euler', accepted are 'ddim', 'heun', 'dpm-solver\+\+'"):
        Diffusion().solve(_network, _randn(1, 1, 2, 2), torch.zeros(1), [999], "euler")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="times is empty"):
        Diffusion().solve(_network, _randn(1, 1, 2, 2), torch.zeros(1), [])


def test_a_linear_schedule_has_times_for_its_betas() -> None:
    assert Diffusion(timesteps=21).alpha.min() > 0
    with pytest.raises(ValueError, match="timesteps is 20, accepted is an integer > 20"):
        Diffusion(timesteps=20)
    assert Diffusion("cosine", timesteps=2).alpha.min() > 0

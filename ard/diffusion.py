"""The teacher's process: from image to noise, what the network predicts, deterministic solvers, guidance.

Every process here is x_t = alpha_t x_0 + sigma_t eps at integer times t in 0..timesteps-1, the noisiest last;
the schedule names the weights. A flow's continuous time, which people count in both directions, is only what
its network is told (`Diffusion.network_time`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

Schedule = Literal["linear", "cosine", "flow-to-noise", "flow-to-data"]
Prediction = Literal["eps", "x0", "v", "velocity"]
Solver = Literal["ddim", "heun", "dpm-solver++"]
Denoiser = Callable[
    [Tensor, Tensor, Tensor], Tensor
]  # (x (B, C, h, w), network time (B,), labels (B,)) -> raw prediction

_FLOWS = ("flow-to-noise", "flow-to-data")
_DIFFUSION_PREDICTIONS = ("eps", "x0", "v")
_FLOW_PREDICTIONS = ("velocity", "x0")  # no eps: of pure noise it says nothing about the image


def _check(where: str, name: str, given: object, accepted: Sequence[str]) -> None:
    if given not in accepted:
        raise ValueError(f"{where}: {name} is {given!r}, accepted are {', '.join(map(repr, accepted))}")


def check_solver(solver: str, where: str) -> None:
    """An error in the name of `where` if there is no such solver."""
    _check(where, "solver", solver, get_args(Solver))


_FEWEST_LINEAR = 20  # betas up to 0.02 at 1000 steps are as much larger as steps are fewer


def _alphas_cumprod(schedule: str, timesteps: int) -> np.ndarray:
    if schedule == "linear":
        scale = 1000 / timesteps
        return np.cumprod(1.0 - np.linspace(1e-4 * scale, 0.02 * scale, timesteps, dtype=np.float64))
    # "cosine": Nichol and Dhariwal, arXiv 2102.09672, equation 17, betas capped at 0.999
    edges = (
        np.cos((np.arange(timesteps + 1, dtype=np.float64) / timesteps + 0.008) / 1.008 * math.pi / 2) ** 2
    )
    return np.cumprod(1.0 - np.minimum(1.0 - edges[1:] / edges[:-1], 0.999))


@dataclass(frozen=True)
class SolverState:
    """Where a solver stands: `x` at `index`, and the prediction of the clean image made there (None for the
    result, index -1)."""

    index: int
    x: Tensor
    x0: Tensor | None


class Diffusion:
    """A path between images and noise, and what a network that follows it predicts.

    Args:
        schedule: the weights of image and noise.
            "linear" (betas 1e-4..0.02 at 1000 steps) and "cosine": sqrt(a_t) and sqrt(1 - a_t), a_t the
            cumulative product of 1 - beta.
            "flow-to-noise" and "flow-to-data": 1 - sigma_t and sigma_t = (t+1)/timesteps, a straight line.
            They differ in what the network knows. "flow-to-noise": its time runs from 0 (image) to 1 (noise),
            its velocity is dx/dt = eps - x_0, as in the papers of SiT (arXiv 2401.08740) and SD3 and in REPA.
            "flow-to-data": its time runs from 0 (noise) to 1 (image), its velocity is x_0 - eps, as in the
            code and weights that SiT released.
        prediction: what the network's first C output channels are: "eps", "x0", or
            "v" = sqrt(a) eps - sqrt(1-a) x_0; of a flow "velocity" or "x0".
        timesteps: the number of training times.
        time_scale: of a flow, and there required: what the network calls the end of its time, e.g. 1 (SiT) or
            1000 (SD3). Other networks are told t itself.

    Attributes:
        alpha, sigma: (timesteps,) float64, the weights of image and noise.
        config: the arguments, as a teacher's folder stores them.
    """

    def __init__(
        self, schedule: Schedule = "linear", prediction: Prediction = "eps", timesteps: int = 1000,
        time_scale: float | None = None,
    ) -> None:  # fmt: skip
        _check("Diffusion", "schedule", schedule, get_args(Schedule))
        if timesteps < 1:
            raise ValueError(f"Diffusion: timesteps is {timesteps}, accepted is an integer >= 1")
        if schedule == "linear" and timesteps <= _FEWEST_LINEAR:
            raise ValueError(f"Diffusion('linear'): timesteps is {timesteps}, accepted is an integer > "
                             f"{_FEWEST_LINEAR}; with fewer, betas reach 1")  # fmt: skip
        flow = schedule in _FLOWS
        _check(f"Diffusion({schedule!r})", "prediction", prediction,
               _FLOW_PREDICTIONS if flow else _DIFFUSION_PREDICTIONS)  # fmt: skip
        if flow and not (time_scale is not None and 0 < time_scale < math.inf):
            raise ValueError(f"Diffusion({schedule!r}): time_scale is {time_scale}, accepted is a number "
                             "> 0, the end of time for the network, mostly 1 or 1000")  # fmt: skip
        if not flow and time_scale is not None:
            raise ValueError(f"Diffusion({schedule!r}): time_scale is {time_scale}, accepted is None: the "
                             f"network is told t in 0..{timesteps - 1}")  # fmt: skip
        self.config: dict[str, Any] = {"schedule": schedule, "prediction": prediction, "timesteps": timesteps}
        self.schedule, self.prediction, self.timesteps = schedule, prediction, timesteps
        self.time_scale = time_scale
        if flow:
            self.config["time_scale"] = time_scale
            self.sigma = torch.arange(1, timesteps + 1, dtype=torch.float64) / timesteps
            self.alpha = 1 - self.sigma
        else:
            a = torch.from_numpy(_alphas_cumprod(schedule, timesteps))
            self.alpha, self.sigma = a.sqrt(), (1 - a).sqrt()

    def _weights(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """alpha_t and sigma_t, (B, 1, ..), rounded to the dtype of `like`."""
        shape = (-1, *[1] * (like.dim() - 1))
        alpha, sigma = (table.to(t.device)[t].view(shape) for table in (self.alpha, self.sigma))
        return alpha.to(like.dtype), sigma.to(like.dtype)

    def add_noise(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_t for t (B,) int64."""
        alpha, sigma = self._weights(t, x0)
        return alpha * x0 + sigma * noise

    def target(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """What the network should predict at x_t."""
        if self.prediction == "eps":
            return noise
        if self.prediction == "x0":
            return x0
        if self.prediction == "velocity":
            return noise - x0 if self.schedule == "flow-to-noise" else x0 - noise
        alpha, sigma = self._weights(t, x0)
        return alpha * noise - sigma * x0

    def split(self, prediction: Tensor, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """(x0, eps) that a prediction stands for; channels beyond those of x (a learned variance) are
        dropped."""
        prediction = prediction[:, : x.shape[1]].to(x.dtype)
        alpha, sigma = self._weights(t, x)
        if self.prediction == "eps":
            return (x - sigma * prediction) / alpha, prediction
        if self.prediction == "x0":
            return prediction, (x - alpha * prediction) / sigma
        if self.prediction == "velocity":
            upward = prediction if self.schedule == "flow-to-noise" else -prediction
            return x - sigma * upward, x + alpha * upward
        return alpha * x - sigma * prediction, sigma * x + alpha * prediction

    def transition(self, t: int, following: int | None) -> tuple[float, float]:
        """DDIM's step from time t to an earlier one: (a, b), with which a x_t + b prediction stands there.

        Args:
            t: the time of x, in 0..timesteps-1.
            following: the time of the result, in 0..t-1; None: the image.

        Raises:
            ValueError: a time that is none of these.
        """
        if not 0 <= t < self.timesteps or not (following is None or 0 <= following < t):
            raise ValueError(
                f"Diffusion: transition from time {t} to {following}, accepted are times in "
                f"0..{self.timesteps - 1}, the second one earlier, or None for the image"
            )
        alpha, sigma = float(self.alpha[t]), float(self.sigma[t])
        signal, noise = 1.0, 0.0
        if following is not None:
            signal, noise = float(self.alpha[following]), float(self.sigma[following])
        if self.prediction == "eps":
            return signal / alpha, noise - signal * sigma / alpha
        if self.prediction == "x0":
            return noise / sigma, signal - noise * alpha / sigma
        if self.prediction == "velocity":  # alpha + sigma is 1
            upward = noise * alpha - signal * sigma
            return signal + noise, upward if self.schedule == "flow-to-noise" else -upward
        return signal * alpha + noise * sigma, noise * alpha - signal * sigma

    def student_steps(self, levels: Sequence[int]) -> tuple[list[float], list[tuple[float, float]]]:
        """What a student does whose input states stand at these times, descending: what the network is told
        at each (`network_time`), and the `transition` from each to the next one, from the last to the image.
        """
        told = self.network_time(torch.tensor(list(levels))).tolist()
        pairs = zip(levels, [*levels[1:], None], strict=True)
        return [float(t) for t in told], [self.transition(t, following) for t, following in pairs]

    def _flow_time(self, sigma: Tensor) -> Tensor:
        """What a flow's network calls the time of noise level `sigma`."""
        assert self.time_scale is not None
        return self.time_scale * (sigma if self.schedule == "flow-to-noise" else 1 - sigma)

    def network_time(self, t: Tensor) -> Tensor:
        """What the network is told at times t (B,) int64: t itself, or (B,) float32 on a flow's own scale and
        in its direction."""
        return t if self.time_scale is None else self._flow_time(self.sigma).float().to(t.device)[t]

    def student_times(self, steps: int) -> list[float]:
        """The S times that a student's input states are conditioned on, evenly spaced from the noise on.

        999 (S-s)/S as in the released recipe; on a flow, its times of the noise levels (S-s)/S.
        """
        left = steps - torch.arange(steps, dtype=torch.float32)
        if self.time_scale is None:
            times = (self.timesteps - 1.0) * left / steps
        else:
            times = self._flow_time(left / steps)
        return [float(t) for t in times]

    def solver_times(self, steps: int) -> list[int]:
        """`steps` times, ascending; solver index i stands at [i].

        From 0 to timesteps-1, evenly spaced and rounded half to even; on a flow at the noise levels
        (i+1)/steps, so that the last step, to the image, is as long as the others.
        """
        if not 1 <= steps <= self.timesteps:
            raise ValueError(f"Diffusion: solver steps is {steps}, accepted are 1..{self.timesteps}")
        if self.time_scale is not None:
            return [int(t) - 1 for t in np.linspace(0, self.timesteps, steps + 1).round()[1:]]
        if steps == 1:
            return [self.timesteps - 1]
        return [int(t) for t in np.linspace(0, self.timesteps - 1, steps).round()]

    def ddim(
        self, denoise: Denoiser, noise: Tensor, labels: Tensor, times: list[int]
    ) -> Iterator[SolverState]:
        """`solve` with its default solver."""
        return self.solve(denoise, noise, labels, times)

    def solve(
        self, denoise: Denoiser, noise: Tensor, labels: Tensor, times: list[int], solver: Solver = "ddim"
    ) -> Iterator[SolverState]:
        """From noise to image along the probability-flow ODE, deterministically.

        Every solver takes DDIM's step and may add a correction to it; the last step, to the image, is the
        x0-prediction in all of them.

        Args:
            denoise: the network, guidance included.
            noise: (B, C, h, w), x at the largest time.
            times: ascending, see `solver_times`.
            solver:
                "ddim": arXiv 2010.02502, equation 12, eta 0. Order 1, an evaluation a step. On a flow it is
                Euler's method.
                "heun": order 2, two evaluations a step but for the last. It integrates x / (alpha + sigma)
                over sigma / (alpha + sigma), where every schedule is a flow. (Over sigma / alpha, as in
                diffusers, the first of 25 steps of "cosine" multiplies a change of eps by 663, here by 0.03.)
                "dpm-solver++": the multistep solver 2M, arXiv 2211.01095, algorithm 2. Order 2, an evaluation
                a step.

        Yields:
            before each step, x at times[i] and the x0-prediction made there, for i = len(times)-1 .. 0; last
            the result, as index -1 without a prediction.
        """
        check_solver(solver, "Diffusion.solve")
        if not times:
            raise ValueError("Diffusion.solve: times is empty, accepted are one or more, see solver_times")
        return self._solve(denoise, noise, labels, times, solver)

    def _solve(
        self, denoise: Denoiser, noise: Tensor, labels: Tensor, times: list[int], solver: Solver
    ) -> Iterator[SolverState]:
        def at(i: int) -> Tensor:
            return torch.full((len(noise),), times[i], device=noise.device)

        def predict(x: Tensor, i: int) -> tuple[Tensor, Tensor]:
            return self.split(denoise(x, self.network_time(at(i)), labels), x, at(i))

        x, before = noise, None
        for i in reversed(range(len(times))):
            x0, eps = predict(x, i)
            yield SolverState(i, x, x0)
            if i == 0:
                break
            x = self.add_noise(x0, eps, at(i - 1))
            if solver == "heun":
                x0_ahead, eps_ahead = predict(x, i - 1)
                slope, slope_ahead = eps - x0, eps_ahead - x0_ahead
                x = x + self._heun_weight(times[i], times[i - 1]) * (slope_ahead - slope)
            elif solver == "dpm-solver++" and before is not None:
                x = x + self._multistep_weight(times[i + 1], times[i], times[i - 1]) * (x0 - before)
            before = x0
        yield SolverState(-1, x0, None)

    def _heun_weight(self, t: int, following: int) -> float:
        """Half a step's length in sigma / (alpha + sigma), times the alpha + sigma that x is divided by."""
        alpha, sigma = self.alpha[following], self.sigma[following]
        level = self.sigma[t] / (self.alpha[t] + self.sigma[t])
        return float(sigma - level * (alpha + sigma)) / 2

    def _multistep_weight(self, before: int, t: int, following: int) -> float:
        """-alpha (e^-h - 1) / 2r with r = h_before / h, steps h in log(alpha / sigma)."""
        log_ratio = (
            self.alpha / self.sigma
        ).log()  # -inf at a flow's pure noise; its r is then infinite, too
        h, h_before = log_ratio[following] - log_ratio[t], log_ratio[t] - log_ratio[before]
        step = self.alpha[following] - self.alpha[t] * self.sigma[following] / self.sigma[t]
        return float(step * h / (2 * h_before))


def guided(model: Denoiser, null_label: int, scale: float, channels: int | None = None) -> Denoiser:
    """Classifier-free guidance: null + scale * (conditional - null) on the first `channels` channels.

    The public DiT guides 3 of its 4 latent channels; None guides all. The other channels of the result (the
    rest of the latent, a learned variance) are the conditional prediction. Scale 1 calls the model once,
    without the null class.
    """
    if scale == 1:
        return model

    def denoise(x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        both = model(
            torch.cat([x, x]), torch.cat([t, t]), torch.cat([labels, torch.full_like(labels, null_label)])
        )
        conditional, null = both.chunk(2)
        count = x.shape[1] if channels is None else channels
        head = null[:, :count] + scale * (conditional[:, :count] - null[:, :count])
        return torch.cat([head, conditional[:, count:]], 1)

    return denoise

"""The teacher's process: noise schedule, what the network predicts, deterministic DDIM, guidance."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

Schedule = Literal["linear", "cosine"]
Prediction = Literal["eps", "x0", "v"]
Denoiser = Callable[
    [Tensor, Tensor, Tensor], Tensor
]  # (x (B, C, h, w), t (B,), labels (B,)) -> raw prediction


def _alphas_cumprod(schedule: Schedule, timesteps: int) -> np.ndarray:
    if schedule == "linear":
        scale = 1000 / timesteps
        return np.cumprod(1.0 - np.linspace(1e-4 * scale, 0.02 * scale, timesteps, dtype=np.float64))
    if schedule == "cosine":  # Nichol and Dhariwal, arXiv 2102.09672, equation 17, betas capped at 0.999
        edges = (
            np.cos((np.arange(timesteps + 1, dtype=np.float64) / timesteps + 0.008) / 1.008 * math.pi / 2)
            ** 2
        )
        return np.cumprod(1.0 - np.minimum(1.0 - edges[1:] / edges[:-1], 0.999))
    raise ValueError(f"Diffusion: schedule is {schedule!r}, accepted are 'linear', 'cosine'")


@dataclass(frozen=True)
class SolverState:
    """Where a solver stands: `x` at `index`, and the prediction of the clean image made there (None at index
    0)."""

    index: int
    x: Tensor
    x0: Tensor | None


class Diffusion:
    """x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) eps for t in 0..timesteps-1, a_t the cumulative product of 1 -
    beta.

    Args:
        schedule: "linear" (betas 1e-4..0.02 at 1000 steps) or "cosine".
        prediction: what the network's first C output channels are: "eps", "x0", or
            "v" = sqrt(a) eps - sqrt(1-a) x_0.
        timesteps: the number of training times.
    """

    def __init__(
        self, schedule: Schedule = "linear", prediction: Prediction = "eps", timesteps: int = 1000
    ) -> None:
        if prediction not in ("eps", "x0", "v"):
            raise ValueError(f"Diffusion: prediction is {prediction!r}, accepted are 'eps', 'x0', 'v'")
        self.config: dict[str, Any] = {"schedule": schedule, "prediction": prediction, "timesteps": timesteps}
        self.prediction, self.timesteps = prediction, timesteps
        self.alphas_cumprod = torch.from_numpy(_alphas_cumprod(schedule, timesteps))  # float64

    def _weights(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """sqrt(a_t) and sqrt(1 - a_t), (B, 1, ..), rounded to the dtype of `like`."""
        a = self.alphas_cumprod.to(t.device)[t].view(-1, *[1] * (like.dim() - 1))
        return a.sqrt().to(like.dtype), (1 - a).sqrt().to(like.dtype)

    def add_noise(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_t for t (B,) int64."""
        signal, sigma = self._weights(t, x0)
        return signal * x0 + sigma * noise

    def target(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """What the network should predict at x_t."""
        signal, sigma = self._weights(t, x0)
        return {"eps": noise, "x0": x0, "v": signal * noise - sigma * x0}[self.prediction]

    def split(self, prediction: Tensor, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """(x0, eps) that a prediction stands for; channels beyond those of x (a learned variance) are
        dropped."""
        prediction = prediction[:, : x.shape[1]].to(x.dtype)
        signal, sigma = self._weights(t, x)
        if self.prediction == "eps":
            return (x - sigma * prediction) / signal, prediction
        if self.prediction == "x0":
            return prediction, (x - signal * prediction) / sigma
        return signal * x - sigma * prediction, sigma * x + signal * prediction

    def solver_times(self, steps: int) -> list[int]:
        """`steps` times from 0 to timesteps-1, evenly spaced and rounded half to even; solver index i stands
        at [i]."""
        if not 1 <= steps <= self.timesteps:
            raise ValueError(f"Diffusion: solver steps is {steps}, accepted are 1..{self.timesteps}")
        if steps == 1:
            return [self.timesteps - 1]
        return [int(t) for t in np.linspace(0, self.timesteps - 1, steps).round()]

    def ddim(
        self, denoise: Denoiser, noise: Tensor, labels: Tensor, times: list[int]
    ) -> Iterator[SolverState]:
        """Deterministic DDIM (arXiv 2010.02502, equation 12, eta 0), from index len(times) - 1 down to 0.

        Args:
            denoise: the network, guidance included.
            noise: (B, C, h, w), x at the largest time.
            times: ascending, see `solver_times`.

        Yields:
            before each step, x at times[i] and the x0-prediction made there, for i = len(times)-1 .. 0; last
            the result, as index -1 without a prediction.
        """
        x = noise
        for i in reversed(range(len(times))):
            t = torch.full((len(x),), times[i], device=x.device)
            x0, eps = self.split(denoise(x, t, labels), x, t)
            yield SolverState(i, x, x0)
            x = self.add_noise(x0, eps, torch.full_like(t, times[i - 1])) if i else x0
        yield SolverState(-1, x, None)


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

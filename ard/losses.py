"""What is minimised."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ard.diffusion import Diffusion


def denoising_loss(model: nn.Module, diffusion: Diffusion, x0: Tensor, labels: Tensor) -> Tensor:
    """Mean squared error of the network's prediction at uniformly drawn times. x0 (B, C, h, w), labels
    (B,)."""
    noise = torch.randn_like(x0)
    t = torch.randint(diffusion.timesteps, (len(x0),), device=x0.device)
    prediction = model(diffusion.add_noise(x0, noise, t), t, labels)[:, : x0.shape[1]]
    loss: Tensor = (prediction.float() - diffusion.target(x0, noise, t)).square().mean()
    return loss


def trajectory_loss(model: nn.Module, states: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """ARD's regression loss (arXiv 2504.11295, equation 6): all steps weigh the same.

    Args:
        states: (B, S+1, C, h, w), the noise and the teacher's states 1..S.
        labels: (B,).

    Returns:
        The mean over steps of the mean squared error, and the (S,) errors of the steps.
    """
    errors = (model(states[:, :-1], labels).float() - states[:, 1:]).square().mean((0, 2, 3, 4))
    return errors.mean(), errors

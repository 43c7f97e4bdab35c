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
    raw = model(diffusion.add_noise(x0, noise, t), diffusion.network_time(t), labels)
    prediction = raw[:, : x0.shape[1]]
    loss: Tensor = (prediction.float() - diffusion.target(x0, noise, t)).square().mean()
    return loss


def trajectory_loss(prediction: Tensor, states: Tensor) -> tuple[Tensor, Tensor]:
    """ARD's regression loss (arXiv 2504.11295, equation 6): all steps weigh the same.

    Args:
        prediction: (B, S, C, h, w), of states 1..S.
        states: (B, S+1, C, h, w), the noise and the teacher's states 1..S.

    Returns:
        The mean over steps of the mean squared error, and the (S,) errors of the steps.
    """
    errors = (prediction.float() - states[:, 1:]).square().mean((0, 2, 3, 4))
    return errors.mean(), errors


def discriminator_loss(real: Tensor, fake: Tensor) -> Tensor:
    """Hinge loss of logits of any shape (arXiv 1705.02894, section 3): real ones belong above 1, fake ones
    below -1."""
    loss: Tensor = (1 - real).relu().mean() + (1 + fake).relu().mean()
    return loss


def adversarial_loss(fake: Tensor) -> Tensor:
    """What the generator minimises against `discriminator_loss`."""
    return -fake.mean()


def adaptive_weight(regression: Tensor, adversarial: Tensor) -> Tensor:
    """(): how much the adversarial loss is scaled to pull at the same weights as hard as the regression does.

    Args:
        regression, adversarial: gradients of the two losses with respect to the same weights, over the whole
            batch. The ratio of their norms, at most 1e4 (arXiv 2012.09841, equation 7, and ARD's recipe).
    """
    weight: Tensor = (regression.norm() / (adversarial.norm() + 1e-4)).clamp(max=1e4)
    return weight

"""The training losses against loops over samples and steps."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from ard.diffusion import Diffusion
from ard.losses import denoising_loss, trajectory_loss


def test_the_trajectory_loss_is_the_mean_over_steps() -> None:
    torch.manual_seed(0)
    prediction, states = torch.randn(3, 4, 2, 5, 6), torch.randn(3, 5, 2, 5, 6)
    steps = [((prediction[:, s] - states[:, s + 1]) ** 2).mean() for s in range(4)]
    loss, terms = trajectory_loss(prediction, states)
    torch.testing.assert_close(terms, torch.stack(steps))
    torch.testing.assert_close(loss, sum(steps) / 4)


class _Spy(nn.Module):
    """Predicts zero, with a variance that nobody asked for, and keeps what it was given."""

    def forward(self, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        self.given = x, t, labels
        return torch.cat([torch.zeros_like(x), torch.full_like(x, torch.nan)], 1)


@pytest.mark.parametrize(
    ("diffusion", "wanted"),
    [
        (Diffusion("linear", "eps"), lambda x0, noise: noise),
        (Diffusion("cosine", "x0"), lambda x0, noise: x0),
        (Diffusion("flow-to-noise", "velocity", time_scale=1.0), lambda x0, noise: noise - x0),
        (Diffusion("flow-to-noise", "velocity", time_scale=1000.0), lambda x0, noise: noise - x0),
        (Diffusion("flow-to-data", "velocity", time_scale=1.0), lambda x0, noise: x0 - noise),
    ],
    ids=["eps", "x0", "to noise", "to noise, 1000", "to data"],
)
def test_the_denoising_loss_is_that_of_the_prediction(diffusion: Diffusion, wanted: object) -> None:
    assert callable(wanted)
    x0, labels, model = torch.randn(64, 1, 2, 2), torch.arange(64), _Spy()
    torch.manual_seed(3)
    loss = denoising_loss(model, diffusion, x0, labels)
    torch.manual_seed(3)
    noise, t = torch.randn_like(x0), torch.randint(diffusion.timesteps, (64,))
    torch.testing.assert_close(loss, (wanted(x0, noise) ** 2).mean())
    x, times, classes = model.given
    torch.testing.assert_close(x, diffusion.add_noise(x0, noise, t))
    assert torch.equal(classes, labels)
    if diffusion.schedule.startswith("flow"):  # what the network saw has the share of noise of its time
        assert diffusion.time_scale is not None
        time = times / diffusion.time_scale
        share = time if diffusion.schedule == "flow-to-noise" else 1 - time
        share = share.view(-1, 1, 1, 1)
        torch.testing.assert_close(x, (1 - share) * x0 + share * noise, rtol=1e-4, atol=1e-4)
    else:
        assert torch.equal(times, t)

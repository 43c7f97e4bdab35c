"""Discriminator heads: what a sample becomes depends on its virtual batch, its tokens and its condition."""

from __future__ import annotations

import pytest
import torch
from torch.nn.utils import parametrize

from ard.losses import adaptive_weight, adversarial_loss, discriminator_loss
from ard.models.discriminator import Discriminator, DiscriminatorHead, VirtualBatchNorm


def _normalised(run: torch.Tensor, eps: float) -> torch.Tensor:
    mean = run.mean((0, 2), keepdim=True)
    return (run - mean) / (run.var((0, 2), unbiased=False, keepdim=True) + eps).sqrt()


@pytest.mark.parametrize("batch", [1, 2, 7, 8, 9, 15, 16, 17, 25])
def test_virtual_batches_are_of_even_size_at_any_batch_size(batch: int) -> None:
    torch.manual_seed(batch)
    norm = VirtualBatchNorm(3, size=8)
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    x = 100 + torch.randn(batch, 3, 5)
    parts = -(-batch // 8)
    runs = [[i for i in range(batch) if i * parts // batch == r] for r in range(parts)]
    assert max(map(len, runs)) - min(map(len, runs)) <= 1
    assert max(map(len, runs)) <= 8
    wanted = torch.cat([_normalised(x[run].double(), norm.eps) for run in runs])
    torch.testing.assert_close(norm(x).double(), wanted * norm.weight + norm.bias, rtol=1e-4, atol=1e-4)


def test_two_shares_of_whole_virtual_batches_are_one_batch() -> None:
    norm, x = VirtualBatchNorm(3), torch.randn(16, 3, 5)
    torch.testing.assert_close(norm(x), torch.cat([norm(x[:8]), norm(x[8:])]))


def test_a_head_of_dit_xl_has_13_million_weights() -> None:
    with torch.device("meta"):
        head = DiscriminatorHead(1152)
    assert sum(p.numel() for p in head.parameters()) == pytest.approx(13.4e6, rel=0.003)


def test_heads_are_circular_in_the_tokens() -> None:
    """Tokens moved around the circle move the logits with them; any other change of order does not."""
    head = DiscriminatorHead(8).eval()
    tokens, condition = torch.randn(4, 16, 8), torch.randn(4, 8)
    logits = head(tokens, condition)
    torch.testing.assert_close(head(tokens.roll(3, 1), condition), logits.roll(3, 1))
    order = torch.randperm(16)
    assert (head(tokens[:, order], condition) - logits[:, order]).abs().max() > 1e-3


def test_logits_are_a_projection_on_the_condition() -> None:
    """Linear in what the condition's layer makes, so that its negative turns the logits around."""
    head = DiscriminatorHead(8).eval()
    tokens, condition = torch.randn(4, 16, 8), torch.randn(4, 8)
    logits = head(tokens, condition)
    with torch.no_grad():
        for parameter in head.condition.parameters():
            parameter.mul_(-2)
    torch.testing.assert_close(head(tokens, condition), -2 * logits)
    with torch.no_grad():
        head.condition.weight.zero_()
        head.condition.bias.fill_(1)
    x = head.first(tokens.transpose(1, 2))
    x = head.classifier((x + head.second(x)) / 2**0.5)
    torch.testing.assert_close(head(tokens, condition), x.sum(1) / 8)


def test_convolutions_have_spectral_norm_one() -> None:
    discriminator = Discriminator(8, 2).train()
    features, condition = [torch.randn(3, 16, 8)] * 2, torch.randn(3, 8)
    with torch.no_grad():
        for parameter in discriminator.parameters():
            parameter.copy_(3 * torch.randn_like(parameter))
        for _ in range(200):  # steps of the power iteration
            discriminator(features, condition)
    convolutions = [m for m in discriminator.modules() if parametrize.is_parametrized(m)]
    assert len(convolutions) == 6
    for convolution in convolutions:
        norm = torch.linalg.matrix_norm(convolution.weight.flatten(1), 2)
        assert float(norm) == pytest.approx(1, rel=1e-3)


def test_every_layer_has_a_head_of_its_own() -> None:
    discriminator = Discriminator(8, 3).eval()
    features = [torch.randn(2, 16, 8) for _ in range(3)]
    logits = discriminator(features, torch.ones(2, 8))
    assert logits.shape == (2, 3, 16)
    for layer in range(3):
        changed = list(features)
        changed[layer] = torch.randn(2, 16, 8)
        same = (discriminator(changed, torch.ones(2, 8)) == logits).all(2).all(0)
        assert same.tolist() == [i != layer for i in range(3)]
    with pytest.raises(ValueError, match=r"zip\(\)"):
        discriminator(features[:2], torch.ones(2, 8))


def test_losses() -> None:
    real, made = torch.tensor([0.5, 2.0]), torch.tensor([-3.0, 0.0])
    assert float(discriminator_loss(real, made)) == pytest.approx((0.5 + 0) / 2 + (0 + 1) / 2)
    assert float(adversarial_loss(made)) == 1.5
    assert float(adaptive_weight(torch.full((4,), 3.0), torch.full((4,), 0.5))) == pytest.approx(6 / 1.0001)
    assert float(adaptive_weight(torch.full((4,), 3.0), torch.zeros(4))) == 1e4

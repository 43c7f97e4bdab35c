"""Discriminator heads on the features of a frozen teacher, one after each of its layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm

# Channels in which a head's output meets the condition; the projection divides by the root of it.
_PROJECTED = 64
_SLOPE = 0.2


class VirtualBatchNorm(nn.Module):
    """Batch norm over parts of the batch of about `size` samples, the same in training and evaluation.

    The batch falls into ceil(B / size) runs of consecutive samples whose lengths differ by one at most, so
    that any B works. What a sample becomes depends on its run alone: it is the same on one process and on
    many, as long as the shares of the processes are multiples of `size`.
    """

    def __init__(self, channels: int, size: int = 8, eps: float = 1e-5) -> None:
        super().__init__()
        self.size, self.eps = size, eps
        self.weight = nn.Parameter(torch.ones(channels, 1))
        self.bias = nn.Parameter(torch.zeros(channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, L) -> the same, normalised per channel over each run's samples and positions, in float32."""
        parts = -(-len(x) // self.size)
        run = torch.arange(len(x), device=x.device) * parts // len(x)  # (B,)
        same = (run.unsqueeze(1) == run).float()
        average = same / same.sum(1, keepdim=True)  # (B, B): a sample's row averages over its run
        with torch.autocast(x.device.type, enabled=False):
            wide = x.float()
            centred = wide - (average @ wide.mean(2)).unsqueeze(2)
            variance = (average @ centred.square().mean(2)).unsqueeze(2)
            return centred * (variance + self.eps).rsqrt() * self.weight + self.bias


class _Layer(nn.Module):
    def __init__(self, width: int, kernel: int) -> None:
        super().__init__()
        self.convolution = spectral_norm(
            # Without bias: the norm takes it out, which leaves it a gradient of rounding errors.
            nn.Conv1d(width, width, kernel, padding=kernel // 2, padding_mode="circular", bias=False)
        )
        self.norm = VirtualBatchNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        return F.leaky_relu(self.norm(self.convolution(x)), _SLOPE)


class DiscriminatorHead(nn.Module):
    """Tokens of one layer -> one logit a token, conditioned by projection (arXiv 1802.05637, section 3).

    Two spectrally normalised convolutions over the tokens in reading order, the second (9 wide, circular)
    around a residual; then 64 channels, in an inner product with 64 channels of the condition.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = _Layer(width, 1)
        self.second = _Layer(width, 9)
        self.classifier = spectral_norm(nn.Conv1d(width, _PROJECTED, 1))
        self.condition = nn.Linear(width, _PROJECTED)

    def forward(self, tokens: Tensor, condition: Tensor) -> Tensor:
        """tokens (B, L, D), condition (B, D) -> logits (B, L), float32."""
        x = self.first(tokens.transpose(1, 2))
        x = (x + self.second(x)) * 2**-0.5
        x = self.classifier(x).float()  # (B, 64, L)
        direction = self.condition(condition).float().unsqueeze(2)
        logits: Tensor = (x * direction).sum(1) * _PROJECTED**-0.5
        return logits


class Discriminator(nn.Module):
    """One head for each layer of a teacher.

    Args:
        width: D, the teacher's.
        depth: the number of its layers.

    The teacher itself is no part of it: its features come in, and its weights get no gradient.
    """

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.config: dict[str, Any] = {"width": width, "depth": depth}
        self.heads = nn.ModuleList(DiscriminatorHead(width) for _ in range(depth))

    def forward(self, features: Sequence[Tensor], condition: Tensor) -> Tensor:
        """features: (B, L, D) after every layer; condition (B, D) -> logits (B, depth, L), float32."""
        logits = [head(x, condition) for head, x in zip(self.heads, features, strict=True)]
        return torch.stack(logits, 1)

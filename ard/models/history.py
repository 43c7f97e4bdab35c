"""Attention over the history of a trajectory: all that an ARD student does unlike its backbone.

A backbone's layer makes q, k and v and hands them to a history, which alone knows the blocks. Both histories
give a layer below `depth` the mask and every layer above it the diagonal.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ard_kernels import BlockLayout, block_attention, cached_block_attention
from ard_kernels.layout import Mask


class History(Protocol):
    """What a backbone's layers need to know about the sequence."""

    @property
    def layout(self) -> BlockLayout:
        """Of the tokens in this pass."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q, k, v (B, tokens in this pass, H, Dh) -> the same shape."""


@dataclass(frozen=True)
class TeacherForced:
    """All states in one pass."""

    layout: BlockLayout
    depth: int = 0
    mask: Mask = "causal"

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return block_attention(q, k, v, self.layout, self.mask if layer < self.depth else "diagonal")


class KVCache:
    """One state a pass, in order; the `depth` lowest layers alone keep keys and values of the earlier ones.

    Memory: 2 * depth * (B, T, H, Dh), allocated at once.
    """

    def __init__(
        self, trajectory: BlockLayout, depth: int, mask: Mask, batch: int, heads: int, head_dim: int,
        dtype: torch.dtype, device: torch.device,
    ) -> None:  # fmt: skip
        self.trajectory, self.depth, self.mask = trajectory, depth, mask
        shape = (depth, batch, trajectory.total, heads, head_dim)
        self.keys = torch.empty(shape, dtype=dtype, device=device)
        self.values = torch.empty_like(self.keys)
        self.start(0)

    def start(self, block: int) -> None:
        """The next pass is that of `block`."""
        self.block = block
        self.layout = BlockLayout((self.trajectory.lengths[block],))

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if layer >= self.depth:
            return block_attention(q, k, v, self.layout, "diagonal")
        keys, values = self.keys[layer], self.values[layer]
        rows = self.trajectory.slice(self.block)
        keys[:, rows], values[:, rows] = k, v
        return cached_block_attention(q.to(keys.dtype), keys, values, self.trajectory, self.block, self.mask)

"""Attention over the history of a trajectory: all that an ARD student does unlike its backbone.

A backbone's layer makes q, k and v and hands them to a history, which alone knows the blocks. Both histories
give a layer below `depth` the mask and every layer above it the diagonal.

Where a student has gates (`HistoryGates`), a key of an earlier block weighs `gate` times what it would
without: log(gate) is added to its scores. That goes through the operators as further columns of q and k, one
for every block but the last, which cost nothing where the kernels pad the head dim anyway (72 to 80).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from ard_kernels import BlockLayout, block_attention, cached_block_attention
from ard_kernels.layout import Mask


class History(Protocol):
    """What a backbone's layers need to know about the sequence."""

    @property
    def layout(self) -> BlockLayout:
        """Of the tokens in this pass."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q, k, v (B, tokens in this pass, H, Dh) -> the same shape."""


# What a closed gate weighs: a thousand such keys are a hundredth of float32's epsilon beside an open one.
_CLOSED = 1e-12


class HistoryGates(nn.Module):
    """How much a key of an earlier block weighs against one of the own, by layer, head and pair of blocks.

    Attributes:
        gates: (N, H, P) for the P = S(S-1)/2 pairs of a block and an earlier one: (1, 0), (2, 0), (2, 1), ...
            1: as without gates; 0 and less: not at all, which is the start.
    """

    def __init__(self, layers: int, heads: int, steps: int) -> None:
        super().__init__()
        self.steps = steps
        self.gates = nn.Parameter(torch.zeros(layers, heads, steps * (steps - 1) // 2))

    @torch.no_grad()
    def constrain(self) -> None:
        """What an optimiser's step has made less than 0 becomes 0, from where it can open at any time. `fit`
        does this after every step; a loop of one's own should."""
        self.gates.clamp_(min=0)

    def forward(self) -> Tensor:
        """(N, S, H, S-1) float32: what is added to the scores of queries of block i and keys of block j; 0
        where j is not before i. A gate of 0 and less has the gradient by which it would open."""
        gates = self.gates.float()
        value = gates.detach().clamp(min=_CLOSED)
        added = value.log() + (gates - gates.detach()) / value  # the second is 0, its derivative 1 / value
        bias = added.new_zeros(*added.shape[:2], self.steps, self.steps - 1)
        rows, columns = torch.tril_indices(self.steps, self.steps - 1, -1, device=bias.device)
        bias[..., rows, columns] = added
        return bias.transpose(1, 2)

    def columns(self, layout: BlockLayout, head_dim: int) -> GateColumns:
        """The columns that add this to the scores of a trajectory of this layout."""
        bias, count = self(), gate_columns(head_dim, layout.blocks)
        queries = nn.functional.pad(bias * head_dim**0.5, (0, count - bias.shape[-1]))
        ones = torch.eye(layout.blocks, count, device=bias.device)
        keys = [row.expand(n, 1, -1) for row, n in zip(ones, layout.lengths, strict=True)]
        return GateColumns(queries, torch.cat(keys))


@dataclass(frozen=True)
class GateColumns:
    """What gates add to q and k, once for all layers of a pass. The scores that they make are scaled like the
    others."""

    queries: Tensor
    """(N, S, H, E), of every layer and block."""
    keys: Tensor
    """(T, 1, E): of every token a one in the column of its block."""


def gate_columns(head_dim: int, blocks: int) -> int:
    """How many columns q, k and v get: one for every block but the last, and up to a multiple of 8."""
    return blocks - 1 + -(head_dim + blocks - 1) % 8


def _widened(x: Tensor, columns: Tensor) -> Tensor:
    """(B, T, H, Dh), and (T, H or 1, E) for all samples -> (B, T, H, Dh + E)."""
    return torch.cat([x, columns.to(x.dtype).expand(*x.shape[:3], -1)], -1)


@dataclass(frozen=True)
class TeacherForced:
    """All states in one pass."""

    layout: BlockLayout
    depth: int = 0
    mask: Mask = "causal"
    columns: GateColumns | None = None

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if layer >= self.depth:
            return block_attention(q, k, v, self.layout, "diagonal")
        if self.columns is None:
            return block_attention(q, k, v, self.layout, self.mask)
        head_dim, rows = q.shape[-1], self.columns.queries[layer]  # (S, H, E)
        added = torch.cat([row.expand(n, -1, -1) for row, n in zip(rows, self.layout.lengths, strict=True)])
        out = block_attention(
            _widened(q, added), _widened(k, self.columns.keys), nn.functional.pad(v, (0, rows.shape[-1])),
            self.layout, self.mask, scale=head_dim**-0.5,
        )  # fmt: skip
        return out[..., :head_dim]


class KVCache:
    """One state a pass, in order; the `depth` lowest layers alone keep keys and values of the earlier ones.

    Memory: 2 * depth * (B, T, H, Dh), allocated at once; with gates Dh is wider by their columns.
    """

    def __init__(
        self, trajectory: BlockLayout, depth: int, mask: Mask, batch: int, heads: int, head_dim: int,
        dtype: torch.dtype, device: torch.device, columns: GateColumns | None = None,
    ) -> None:  # fmt: skip
        self.trajectory, self.depth, self.mask, self.head_dim = trajectory, depth, mask, head_dim
        extra = 0 if columns is None else columns.keys.shape[-1]
        shape = (depth, batch, trajectory.total, heads, head_dim + extra)
        self.keys = torch.empty(shape, dtype=dtype, device=device)
        self.values = torch.empty_like(self.keys)
        self.columns = columns
        if columns is not None:
            self.keys[..., head_dim:], self.values[..., head_dim:] = columns.keys, 0
        self.start(0)

    def start(self, block: int) -> None:
        """The next pass is that of `block`."""
        self.block = block
        self.layout = BlockLayout((self.trajectory.lengths[block],))

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if layer >= self.depth:
            return block_attention(q, k, v, self.layout, "diagonal")
        keys, values = self.keys[layer], self.values[layer]
        tokens = self.trajectory.slice(self.block)
        keys[:, tokens, :, : self.head_dim], values[:, tokens, :, : self.head_dim] = k, v
        q = q.to(keys.dtype)
        if self.columns is not None:
            q = _widened(q, self.columns.queries[layer, self.block])
        out = cached_block_attention(
            q, keys, values, self.trajectory, self.block, self.mask, scale=self.head_dim**-0.5
        )
        return out[..., : self.head_dim]

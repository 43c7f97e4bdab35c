"""Attention by the compiled CPU kernels: tiles within one block of queries and one of keys."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ard_kernels.backends.native import given, kernels, rows, supports
from ard_kernels.layout import MASKS, BlockLayout, Mask

__all__ = ["attention_backward", "attention_forward", "attention_keeps_lse", "supports"]


def attention_keeps_lse(q: Tensor, runs: Sequence[int], mask: Mask, block: int) -> bool:
    return True


def _run(
    backward: bool, tensors: tuple[Tensor, ...], lse: Tensor, layout: BlockLayout, mask: Mask, scale: float,
    block: int,
) -> None:  # fmt: skip
    batch, _, heads, dim = tensors[0].shape
    kernels(*tensors).attention(
        backward, batch, heads, dim, layout.runs, MASKS.index(mask), scale, block,
        [given(x) for x in tensors], lse.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip


def attention_forward(
    q: Tensor, k: Tensor, v: Tensor, layout: BlockLayout, mask: Mask, scale: float, block: int
) -> tuple[Tensor, Tensor]:
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = q.new_empty((q.shape[0], q.shape[2], q.shape[1]), dtype=torch.float32)
    _run(False, (rows(q), rows(k), rows(v), out), lse, layout, mask, scale, block)
    return out, lse


def attention_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, layout: BlockLayout, mask: Mask,
    scale: float, block: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    tensors = (rows(q), rows(k), rows(v), out, rows(dout), dq, dk, dv)
    _run(True, tensors, lse, layout, mask, scale, block)
    return dq, dk, dv

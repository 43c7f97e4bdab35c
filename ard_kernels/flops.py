"""FLOPs of the operators, counted over visible pairs only, and known to torch.utils.flop_counter.

A multiply-accumulate is 2 FLOPs. The adaLN family counts as none, as every elementwise operator does there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch.utils.flop_counter import register_flop_formula

from ard_kernels import attention as _attention  # noqa: F401  the operators must exist
from ard_kernels.layout import BlockLayout, Mask


def attention_macs(layout: BlockLayout, mask: Mask, width: int, block: int | None = None) -> int:
    """Multiply-accumulates per sample of q k^T and p v over `width` = H * Dh, of one block or of all."""
    return 2 * width * layout.area(mask, block)


def _forward_macs(q: Sequence[int], runs: Sequence[int], mask: str, block: int) -> int:
    layout = BlockLayout.of_runs(runs)
    one = None if block < 0 else block
    return int(q[0]) * attention_macs(layout, cast(Mask, mask), int(q[2] * q[3]), one)


@register_flop_formula(torch.ops.ard_kernels.block_attention)
def _forward(
    q: Any, k: Any, v: Any, runs: Any, mask: str, scale: float, block: int, backend: str, **_: Any
) -> int:
    return 2 * _forward_macs(q, runs, mask, block)


@register_flop_formula(torch.ops.ard_kernels.block_attention_backward)
def _backward(
    dout: Any, q: Any, k: Any, v: Any, out: Any, lse: Any, runs: Any, mask: str, scale: float, block: int,
    backend: str, **_: Any,
) -> int:  # fmt: skip
    """Five products for the forward's two: q k^T again, dout v^T, p^T dout, ds k and ds^T q."""
    return 5 * _forward_macs(q, runs, mask, block)

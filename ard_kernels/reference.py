"""What the operators mean: plain PyTorch, dense and slow, differentiable by autograd.

Every backend is held to these functions evaluated in float64, for values and for all gradients.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ard_kernels.layout import BlockLayout, Mask


def block_attention(
    q: Tensor, k: Tensor, v: Tensor, layout: BlockLayout, mask: Mask = "causal", scale: float | None = None
) -> Tensor:
    """softmax(q k^T scale + M) v with M = 0 on visible pairs and -inf elsewhere. All (B, T, H, Dh)."""
    return _attend(q, k, v, layout.mask(mask, q.device), scale)


def cached_block_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    layout: BlockLayout,
    block: int,
    mask: Mask = "causal",
    scale: float | None = None,
) -> Tensor:
    """The rows of `block_attention` that belong to `block`. q (B, L_block, H, Dh), caches (B, T, H, Dh)."""
    visible = layout.mask(mask, q.device)[layout.slice(block)]
    # Rows of the cache that nothing has written yet may hold anything, NaN included.
    keep = visible.any(0)
    return _attend(q, k_cache[:, keep], v_cache[:, keep], visible[:, keep], scale)


def _attend(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, scale: float | None) -> Tensor:
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    weights = scores.masked_fill(~visible, float("-inf")).softmax(-1)
    return torch.einsum("bhqk,bkhd->bqhd", weights, v)


def expand(table: Tensor, layout: BlockLayout) -> Tensor:
    """(B, S, D) -> (B, T, D): row s repeated for every token of block s."""
    return table[:, layout.block_ids(table.device)]


def adaln(x: Tensor, shift: Tensor, scale: Tensor, layout: BlockLayout, eps: float = 1e-6) -> Tensor:
    """LN(x) * (1 + scale) + shift, LN over the last dimension without affine parameters (DiT's modulate)."""
    mean = x.mean(-1, keepdim=True)
    rstd = ((x - mean).square().mean(-1, keepdim=True) + eps).rsqrt()
    return (x - mean) * rstd * (1 + expand(scale, layout)) + expand(shift, layout)


def gated_residual(x: Tensor, branch: Tensor, gate: Tensor, layout: BlockLayout) -> Tensor:
    """x + gate * branch."""
    return x + expand(gate, layout) * branch


def gated_residual_adaln(
    x: Tensor,
    branch: Tensor,
    gate: Tensor,
    shift: Tensor,
    scale: Tensor,
    layout: BlockLayout,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """`gated_residual`, then `adaln` of its result; both are returned."""
    x = gated_residual(x, branch, gate, layout)
    return x, adaln(x, shift, scale, layout, eps)


def gelu(x: Tensor) -> Tensor:
    """x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) / 2."""
    return F.gelu(x, approximate="tanh")

"""The adaLN family composed of PyTorch's own operators, on any device."""

from __future__ import annotations

import torch
from torch import Tensor

from ard_kernels.layout import BlockLayout


def supports(*tensors: Tensor) -> str | None:
    """Everything."""
    return None


def _rows(table: Tensor, layout: BlockLayout) -> Tensor:
    """A table that broadcasts against `_blocks(x)`: (B, S, 1, D), or (B, T, D) for unequal blocks."""
    if layout.is_uniform:
        return table.unsqueeze(2)
    return torch.repeat_interleave(
        table, torch.tensor(layout.lengths, device=table.device), 1, output_size=layout.total
    )


def _blocks(x: Tensor, layout: BlockLayout) -> Tensor:
    """(B, T, D) as (B, S, L, D), or as it is for unequal blocks."""
    return x.unflatten(1, (layout.blocks, layout.lengths[0])) if layout.is_uniform else x


def _sums(x: Tensor, layout: BlockLayout, dtype: torch.dtype) -> Tensor:
    """Sum over the tokens of each block, at least in float32: what `_blocks` made -> (B, S, D)."""
    wide = torch.promote_types(x.dtype, torch.float32)
    if layout.is_uniform:
        return x.sum(2, dtype=wide).to(dtype)
    return torch.stack([part.sum(1, dtype=wide) for part in x.split(layout.lengths, 1)], 1).to(dtype)


def adaln_forward(
    x: Tensor, shift: Tensor, scale: Tensor, layout: BlockLayout, eps: float, out_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    wide = _wide(x)
    # Widened first: PyTorch's half-precision layer norm on CPU rounds mean and rstd to half precision.
    normed, mean, rstd = torch.native_layer_norm(x.to(wide).contiguous(), x.shape[-1:], None, None, eps)
    # The table is S rows, the activations T: the table takes their dtype, never the other way round.
    shift, scale = shift.to(wide).contiguous(), scale.to(wide).contiguous()
    y = torch.addcmul(_rows(shift, layout), _blocks(normed, layout), _rows(1 + scale, layout))
    return y.to(out_dtype).contiguous().view(x.shape), mean.flatten(1), rstd.flatten(1)


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def adaln_backward(
    dy: Tensor,
    dx_residual: Tensor | None,
    x: Tensor,
    scale: Tensor,
    mean: Tensor,
    rstd: Tensor,
    layout: BlockLayout,
) -> tuple[Tensor, Tensor, Tensor]:
    wide = _wide(x)
    dy = dy.to(wide).contiguous()
    normed = _blocks((x - mean.unsqueeze(-1)).mul_(rstd.unsqueeze(-1)), layout)
    blocks = _blocks(dy, layout)
    dshift, dscale = _sums(blocks, layout, scale.dtype), _sums(blocks * normed, layout, scale.dtype)
    dnormed = (blocks * _rows(1 + scale.to(wide), layout)).view(x.shape)
    dx, _, _ = torch.ops.aten.native_layer_norm_backward(
        dnormed,
        x.to(wide),
        x.shape[-1:],
        mean.unsqueeze(-1),
        rstd.unsqueeze(-1),
        None,
        None,
        [True, False, False],
    )
    return (dx if dx_residual is None else dx.add_(dx_residual)).to(x.dtype), dshift, dscale


def gated_residual_forward(x: Tensor, branch: Tensor, gate: Tensor, layout: BlockLayout) -> Tensor:
    wide = _wide(x)
    out = torch.addcmul(
        _blocks(x.to(wide).contiguous(), layout),
        _rows(gate.to(wide), layout),
        _blocks(branch.to(wide), layout),
    )
    return out.to(x.dtype).view(x.shape)


def gated_residual_backward(
    dx: Tensor, branch: Tensor, gate: Tensor, layout: BlockLayout
) -> tuple[Tensor, Tensor]:
    blocks = _blocks(dx.to(_wide(dx)).contiguous(), layout)
    dgate = _sums(blocks * _blocks(branch, layout), layout, gate.dtype)
    return (blocks * _rows(gate, layout)).to(branch.dtype).view(branch.shape), dgate


def gated_residual_adaln_forward(
    x: Tensor, branch: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, layout: BlockLayout, eps: float,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    x = gated_residual_forward(x, branch, gate, layout)
    return x, *adaln_forward(x, shift, scale, layout, eps, out_dtype)


def gated_residual_adaln_backward(
    dx: Tensor, dy: Tensor, x: Tensor, branch: Tensor, gate: Tensor, scale: Tensor, mean: Tensor,
    rstd: Tensor, layout: BlockLayout,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    dx, dshift, dscale = adaln_backward(dy, dx, x, scale, mean, rstd, layout)
    return dx, *gated_residual_backward(dx, branch, gate, layout), dshift, dscale

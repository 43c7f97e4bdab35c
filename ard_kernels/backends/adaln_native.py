"""The adaLN family by the compiled CPU kernels: one pass over memory forward, one backward."""

from __future__ import annotations

import torch
from torch import Tensor

from ard_kernels.backends.native import C, activations, given, rows, supports
from ard_kernels.layout import BlockLayout

__all__ = [
    "adaln_backward",
    "adaln_forward",
    "gated_residual_adaln_backward",
    "gated_residual_adaln_forward",
    "gated_residual_backward",
    "gated_residual_forward",
    "supports",
]
# What the kernels take, in their order.
_SLOTS = ("x", "branch", "gate", "shift", "scale", "residual", "y",
          "dy", "dx_in", "dx", "dbranch", "dgate", "dshift", "dscale")  # fmt: skip


def _run(
    backward: bool, layout: BlockLayout, eps: float, mean: Tensor | None, rstd: Tensor | None,
    **tensors: Tensor | None,
) -> None:  # fmt: skip
    assert C is not None
    batch, _, width = next(x for x in tensors.values() if x is not None).shape
    C.adaln(
        backward, batch, width, layout.lengths, eps, [given(tensors.get(name)) for name in _SLOTS],
        0 if mean is None else mean.data_ptr(), 0 if rstd is None else rstd.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip


def _new(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    return torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)


def _statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    mean, rstd = (torch.empty(x.shape[:2], dtype=torch.float32, device=x.device) for _ in range(2))
    return mean, rstd


def adaln_forward(
    x: Tensor, shift: Tensor, scale: Tensor, layout: BlockLayout, eps: float, out_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    y, (mean, rstd) = activations(_new(x, out_dtype)), _statistics(x)
    _run(False, layout, eps, mean, rstd, x=x.contiguous(), shift=rows(shift), scale=rows(scale), y=y)
    return y.to(out_dtype), mean, rstd


def adaln_backward(
    dy: Tensor, dx_residual: Tensor | None, x: Tensor, scale: Tensor, mean: Tensor, rstd: Tensor,
    layout: BlockLayout,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    dx, dshift, dscale = _new(x), _new(scale), _new(scale)
    residual = None if dx_residual is None else dx_residual.to(x.dtype).contiguous()
    _run(True, layout, 0.0, mean, rstd, x=x.contiguous(), scale=rows(scale), dy=activations(dy),
         dx_in=residual, dx=dx, dshift=dshift, dscale=dscale)  # fmt: skip
    return dx, dshift, dscale


def gated_residual_forward(x: Tensor, branch: Tensor, gate: Tensor, layout: BlockLayout) -> Tensor:
    out = _new(x)
    _run(False, layout, 0.0, None, None, x=x.contiguous(), branch=branch.contiguous(), gate=rows(gate),
         residual=out)  # fmt: skip
    return out


def gated_residual_backward(
    dx: Tensor, branch: Tensor, gate: Tensor, layout: BlockLayout
) -> tuple[Tensor, Tensor]:
    dbranch, dgate = _new(branch), _new(gate)
    _run(True, layout, 0.0, None, None, branch=branch.contiguous(), gate=rows(gate), dx_in=dx.contiguous(),
         dbranch=dbranch, dgate=dgate)  # fmt: skip
    return dbranch, dgate


def gated_residual_adaln_forward(
    x: Tensor, branch: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, layout: BlockLayout, eps: float,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    residual, y, (mean, rstd) = _new(x), activations(_new(x, out_dtype)), _statistics(x)
    _run(False, layout, eps, mean, rstd, x=x.contiguous(), branch=branch.contiguous(), gate=rows(gate),
         shift=rows(shift), scale=rows(scale), residual=residual, y=y)  # fmt: skip
    return residual, y.to(out_dtype), mean, rstd


def gated_residual_adaln_backward(
    dx: Tensor, dy: Tensor, x: Tensor, branch: Tensor, gate: Tensor, scale: Tensor, mean: Tensor,
    rstd: Tensor, layout: BlockLayout,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    out, dbranch, dgate = _new(x), _new(branch), _new(gate)
    dshift, dscale = _new(scale), _new(scale)
    _run(True, layout, 0.0, mean, rstd, x=x.contiguous(), branch=branch.contiguous(), gate=rows(gate),
         scale=rows(scale), dy=activations(dy), dx_in=dx.to(x.dtype).contiguous(), dx=out, dbranch=dbranch,
         dgate=dgate, dshift=dshift, dscale=dscale)  # fmt: skip
    return out, dbranch, dgate, dshift, dscale

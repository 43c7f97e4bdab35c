"""Time-conditioned adaLN: argument checks, operator registration, autograd and backend choice.

Modulation tables have one row per block, (B, S, D): S == T is per-token conditioning, S == 1 per-sample. Each
sample's row s serves every token of block s, so a table is S/T of the size of what it modulates.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from ard_kernels.backends import autocast_dtype, check_number, choose, differentiable_once, implementations
from ard_kernels.layout import BlockLayout, described

_BACKENDS = implementations("adaln")
_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def adaln(x: Tensor, shift: Tensor, scale: Tensor, layout: BlockLayout, eps: float = 1e-6) -> Tensor:
    """LN(x) * (1 + scale) + shift: layer norm without affine parameters, then one modulation row per block.

    Args:
        x: (B, T, D), T = layout.total.
        shift, scale: (B, S, D), any floating dtype, strided views of a packed (B, S, 6, D) table included.
        layout: the S blocks.
        eps: added to the variance; finite and >= 0.

    Returns:
        (B, T, D) in the dtype of x, under autocast in its dtype (what the next linear layer wants).
        Differentiable in x, shift and scale, once and in reverse mode. Arithmetic is at least float32. The
        definition is `ard_kernels.reference.adaln`; DiT, arXiv 2212.09748, section 3.2 (adaLN-Zero).

    Raises:
        ValueError: a shape, dtype, device, layout or eps that does not fit; the message names it.
        NotImplementedError: forward-mode differentiation (jvp).
    """
    _check("adaln", layout, {"x": x}, shift=shift, scale=scale)
    eps = check_number("adaln", "eps", eps, least=0)
    backend = choose("adaln", _BACKENDS, x, shift, scale)
    y, _, _ = _adaln(x, shift, scale, layout.runs, eps, _branch_dtype(x), backend)
    return cast(Tensor, y)


def gated_residual(x: Tensor, branch: Tensor, gate: Tensor, layout: BlockLayout) -> Tensor:
    """x + gate * branch, one gate row per block.

    Args:
        x, branch: (B, T, D), T = layout.total; the branch may have another floating dtype than x.
        gate: (B, S, D), any floating dtype and strides.
        layout: the S blocks.

    Returns:
        (B, T, D) in the dtype of x, differentiable in x, branch and gate. The definition is
        `ard_kernels.reference.gated_residual`.

    Raises:
        ValueError: a shape, dtype, device or layout that does not fit; the message names it.
    """
    _check("gated_residual", layout, {"x": x, "branch": branch}, gate=gate)
    backend = choose("gated_residual", _BACKENDS, x, branch, gate)
    return cast(Tensor, _gated_residual(x, branch, gate, layout.runs, backend))


def gated_residual_adaln(
    x: Tensor,
    branch: Tensor,
    gate: Tensor,
    shift: Tensor,
    scale: Tensor,
    layout: BlockLayout,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """`gated_residual` and `adaln` of its result in one pass: (x + gate * branch, adaLN of that).

    Arguments, errors and dtypes are those of the two functions. The statistics are those of the residual as
    it is stored, after rounding. The definition is `ard_kernels.reference.gated_residual_adaln`.
    """
    _check("gated_residual_adaln", layout, {"x": x, "branch": branch}, gate=gate, shift=shift, scale=scale)
    eps = check_number("gated_residual_adaln", "eps", eps, least=0)
    backend = choose("gated_residual_adaln", _BACKENDS, x, branch, gate, shift, scale)
    x, y, _, _ = _gated_residual_adaln(
        x, branch, gate, shift, scale, layout.runs, eps, _branch_dtype(x), backend
    )
    return x, y


def _branch_dtype(x: Tensor) -> torch.dtype:
    return autocast_dtype(x.device, x.dtype) or x.dtype


def _check(name: str, layout: BlockLayout, streams: dict[str, Tensor], **tables: Tensor) -> None:
    """`streams`: x, and what has its shape."""
    if not isinstance(layout, BlockLayout):
        raise ValueError(f"{name}: layout is {type(layout).__name__}, accepted is BlockLayout")
    given = {**streams, **tables}
    for label, tensor in given.items():
        if not isinstance(tensor, Tensor):
            raise ValueError(f"{name}: {label} is {type(tensor).__name__}, accepted is a Tensor")
        if tensor.is_nested:
            raise ValueError(f"{name}: {label} is a nested tensor, accepted is one length for all samples")
    x = streams["x"]
    if x.dim() != 3 or x.shape[1] != layout.total:
        raise ValueError(f"{name}: x has shape {tuple(x.shape)}, accepted is (B, {layout.total}, D) "
                         f"({described(layout)})")  # fmt: skip
    for label, stream in streams.items():
        if stream.shape != x.shape:
            raise ValueError(f"{name}: {label} has shape {tuple(stream.shape)}, x has {tuple(x.shape)}")
    wanted = (x.shape[0], layout.blocks, x.shape[2])
    for label, table in tables.items():
        if table.shape != wanted:
            others = "; for a row per token or sample give BlockLayout.uniform(T, 1) or BlockLayout((T,))"
            hint = others if table.dim() == 3 and table.shape[1] in (1, layout.total) else ""
            raise ValueError(
                f"{name}: {label} has shape {tuple(table.shape)}, accepted is {wanted}, a row per block{hint}"
            )
    for label, tensor in given.items():
        if tensor.dtype not in _FLOATS:
            raise ValueError(
                f"{name}: {label} is {tensor.dtype}, accepted are {', '.join(map(str, _FLOATS))}"
            )
        if tensor.device != x.device:
            raise ValueError(f"{name}: {label} is on {tensor.device}, x is on {x.device}")


def _statistics(x: Tensor) -> Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    return torch.empty(x.shape[:2], dtype=wide, device=x.device)


def _like(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    return torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)


@torch.library.custom_op("ard_kernels::adaln", mutates_args=())
def _adaln(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    runs: Sequence[int],
    eps: float,
    out_dtype: torch.dtype,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns y and, for the backward, mean and reciprocal standard deviation, float32 (B, T)."""
    results: tuple[Tensor, Tensor, Tensor] = _BACKENDS[backend].adaln_forward(
        x, shift, scale, BlockLayout.of_runs(runs), eps, out_dtype
    )
    return results


@_adaln.register_fake
def _(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    runs: Sequence[int],
    eps: float,
    out_dtype: torch.dtype,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return _like(x, out_dtype), _statistics(x), _statistics(x)


@torch.library.custom_op("ard_kernels::adaln_backward", mutates_args=())
def _adaln_backward(
    dy: Tensor, dx_residual: Tensor | None, x: Tensor, scale: Tensor, mean: Tensor, rstd: Tensor,
    runs: Sequence[int], backend: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x, shift and scale; `dx_residual` is x's gradient from elsewhere, added on the way."""
    results: tuple[Tensor, Tensor, Tensor] = _BACKENDS[backend].adaln_backward(
        dy, dx_residual, x, scale, mean, rstd, BlockLayout.of_runs(runs)
    )
    return results


@_adaln_backward.register_fake
def _(
    dy: Tensor, dx_residual: Tensor | None, x: Tensor, scale: Tensor, mean: Tensor, rstd: Tensor,
    runs: Sequence[int], backend: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return _like(x), _like(scale), _like(scale)


differentiable_once(_adaln_backward, "adaln")


def _adaln_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, shift, scale, ctx.runs, _, _, ctx.backend = inputs
    ctx.set_materialize_grads(False)  # or every backward would fill zero gradients of the statistics
    ctx.save_for_backward(x, scale, *output[1:])
    ctx.shift_dtype = shift.dtype


def _wide(scale: Tensor, shift: torch.dtype) -> Tensor:
    """In a dtype that holds the gradients of both tables, which come in that of scale."""
    return scale if scale.dtype == shift else scale.to(torch.promote_types(scale.dtype, shift))


def _adaln_grad(ctx: Any, dy: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if dy is None:
        return (None,) * 7
    x, scale, mean, rstd = ctx.saved_tensors
    mean, rstd = mean.contiguous(), rstd.contiguous()  # hooks on saved tensors may give others back
    wide = _wide(scale, ctx.shift_dtype)
    dx, dshift, dscale = _adaln_backward(dy, None, x, wide, mean, rstd, ctx.runs, ctx.backend)
    return dx, dshift.to(ctx.shift_dtype), dscale.to(scale.dtype), None, None, None, None


_adaln.register_autograd(_adaln_grad, setup_context=_adaln_setup)


@torch.library.custom_op("ard_kernels::gated_residual", mutates_args=())
def _gated_residual(x: Tensor, branch: Tensor, gate: Tensor, runs: Sequence[int], backend: str) -> Tensor:
    results: Tensor = _BACKENDS[backend].gated_residual_forward(x, branch, gate, BlockLayout.of_runs(runs))
    return results


@_gated_residual.register_fake
def _(x: Tensor, branch: Tensor, gate: Tensor, runs: Sequence[int], backend: str) -> Tensor:
    return _like(x)


@torch.library.custom_op("ard_kernels::gated_residual_backward", mutates_args=())
def _gated_residual_backward(
    dx: Tensor, branch: Tensor, gate: Tensor, runs: Sequence[int], backend: str
) -> tuple[Tensor, Tensor]:
    """Gradients of branch and gate; that of x is `dx` itself."""
    results: tuple[Tensor, Tensor] = _BACKENDS[backend].gated_residual_backward(
        dx, branch, gate, BlockLayout.of_runs(runs)
    )
    return results


@_gated_residual_backward.register_fake
def _(dx: Tensor, branch: Tensor, gate: Tensor, runs: Sequence[int], backend: str) -> tuple[Tensor, Tensor]:
    return _like(branch), _like(gate)


differentiable_once(_gated_residual_backward, "gated_residual")


def _gated_residual_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, branch, gate, ctx.runs, ctx.backend = inputs
    ctx.save_for_backward(branch, gate)


def _gated_residual_grad(ctx: Any, dx: Tensor) -> tuple[Tensor | None, ...]:
    return dx, *_gated_residual_backward(dx, *ctx.saved_tensors, ctx.runs, ctx.backend), None, None


_gated_residual.register_autograd(_gated_residual_grad, setup_context=_gated_residual_setup)


@torch.library.custom_op("ard_kernels::gated_residual_adaln", mutates_args=())
def _gated_residual_adaln(
    x: Tensor, branch: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, runs: Sequence[int], eps: float,
    out_dtype: torch.dtype, backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    layout = BlockLayout.of_runs(runs)
    results: tuple[Tensor, Tensor, Tensor, Tensor] = _BACKENDS[backend].gated_residual_adaln_forward(
        x, branch, gate, shift, scale, layout, eps, out_dtype
    )
    return results


@_gated_residual_adaln.register_fake
def _(
    x: Tensor, branch: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, runs: Sequence[int], eps: float,
    out_dtype: torch.dtype, backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return _like(x), _like(x, out_dtype), _statistics(x), _statistics(x)


@torch.library.custom_op("ard_kernels::gated_residual_adaln_backward", mutates_args=())
def _gated_residual_adaln_backward(
    dx: Tensor, dy: Tensor, x: Tensor, branch: Tensor, gate: Tensor, scale: Tensor, mean: Tensor,
    rstd: Tensor, runs: Sequence[int], backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """x is the forward's residual output. Gradients of the forward's x, branch, gate, shift and scale."""
    layout = BlockLayout.of_runs(runs)
    results: tuple[Tensor, Tensor, Tensor, Tensor, Tensor] = _BACKENDS[backend].gated_residual_adaln_backward(
        dx, dy, x, branch, gate, scale, mean, rstd, layout
    )
    return results


@_gated_residual_adaln_backward.register_fake
def _(
    dx: Tensor, dy: Tensor, x: Tensor, branch: Tensor, gate: Tensor, scale: Tensor, mean: Tensor,
    rstd: Tensor, runs: Sequence[int], backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return _like(x), _like(branch), _like(gate), _like(scale), _like(scale)


differentiable_once(_gated_residual_adaln_backward, "gated_residual_adaln")


def _gated_residual_adaln_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, branch, gate, shift, scale, ctx.runs, _, _, ctx.backend = inputs
    x, y, mean, rstd = output
    ctx.set_materialize_grads(False)  # as above
    ctx.save_for_backward(x, branch, gate, scale, mean, rstd)
    ctx.shift_dtype, ctx.y_dtype = shift.dtype, y.dtype


def _gated_residual_adaln_grad(
    ctx: Any, dx: Tensor | None, dy: Tensor | None, *_: None
) -> tuple[Tensor | None, ...]:
    if dx is None and dy is None:
        return (None,) * 9
    # Once: activation checkpointing recomputes them for it.
    x, branch, gate, scale, mean, rstd = ctx.saved_tensors
    mean, rstd = mean.contiguous(), rstd.contiguous()  # as in _adaln_grad
    dx = torch.zeros_like(x) if dx is None else dx
    dy = torch.zeros_like(x, dtype=ctx.y_dtype) if dy is None else dy
    wide = _wide(scale, ctx.shift_dtype)
    grads = _gated_residual_adaln_backward(dx, dy, x, branch, gate, wide, mean, rstd, ctx.runs, ctx.backend)
    dx, dbranch, dgate, dshift, dscale = grads
    tables = dgate, dshift.to(ctx.shift_dtype), dscale.to(scale.dtype)
    return dx, dbranch, *tables, None, None, None, None


_gated_residual_adaln.register_autograd(_gated_residual_adaln_grad, setup_context=_gated_residual_adaln_setup)

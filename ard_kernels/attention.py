"""Attention between blocks of tokens: argument checks, operator registration, autograd and backend choice.

There is one operator, `ard_kernels::block_attention`, for the one-pass form (``block = -1``: q holds every
block) and for one step of sampling with a KV cache (``block = s``: q holds block s, k and v are caches of the
whole sequence).
"""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral
from typing import Any, cast

import torch
from torch import Tensor

from ard_kernels.backends import autocast_dtype, check_number, choose, differentiable_once, implementations
from ard_kernels.layout import BlockLayout, Mask, check_mask, described

_BACKENDS = implementations("attention")
_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def block_attention(
    q: Tensor, k: Tensor, v: Tensor, layout: BlockLayout, mask: Mask = "causal", scale: float | None = None
) -> Tensor:
    """Attention in which the tokens of one block see all tokens of the blocks that `mask` names.

    Args:
        q, k, v: (B, T, H, Dh), T = layout.total, one floating dtype (under autocast any); any strides
            (slices of a packed qkv included).
        layout: the blocks.
        mask: "causal" (blocks 0..i), "diagonal" (block i), "window" (i-1 and i) or "anchor" (0 and i).
        scale: factor on q k^T, finite; None is Dh ** -0.5.

    Returns:
        (B, T, H, Dh) in the dtype of q; under autocast inputs are cast to the autocast dtype (q in float64:
        none is).
        Differentiable in q, k and v, once and in reverse mode. The definition is
        `ard_kernels.reference.block_attention`; masks M1-M4 of ARD (arXiv 2504.11295).

    Raises:
        ValueError: a shape, dtype, device, layout, mask or scale that does not fit; the message names it.
        NotImplementedError: forward-mode differentiation (jvp).
    """
    _check("block_attention", layout, mask, None, q=q, k=k, v=v)
    return _call(q, k, v, layout, mask, scale, -1)


def cached_block_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    layout: BlockLayout,
    block: int,
    mask: Mask = "causal",
    scale: float | None = None,
) -> Tensor:
    """One block's rows of `block_attention`, keys and values read from caches of the whole sequence.

    Args:
        q: (B, L_block, H, Dh), the queries of `block`.
        k_cache, v_cache: (B, T, H, Dh). Rows of blocks that `mask` hides, later blocks above all, are never
            read; the caller has written the rows of `block` itself.
        block: 0..S-1. layout, mask, scale: as in `block_attention`.

    Returns:
        (B, L_block, H, Dh) in the dtype of q; differentiable in q and in both caches (zero in hidden rows).

    Raises:
        ValueError: as in `block_attention`, or a block that the layout does not have; the message names it.
        NotImplementedError: forward-mode differentiation (jvp).
    """
    _check("cached_block_attention", layout, mask, block, q=q, k_cache=k_cache, v_cache=v_cache)
    return _call(q, k_cache, v_cache, layout, mask, scale, int(block))


def _call(
    q: Tensor, k: Tensor, v: Tensor, layout: BlockLayout, mask: Mask, scale: float | None, block: int
) -> Tensor:
    name = "block_attention" if block < 0 else "cached_block_attention"
    scale = q.shape[-1] ** -0.5 if scale is None else check_number(name, "scale", scale)
    dtype = autocast_dtype(q.device, q.dtype)
    if dtype is not None:
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    backend = choose(name, _BACKENDS, q, k, v)
    out, _ = _block_attention(q, k, v, layout.runs, mask, scale, block, backend)
    return cast(Tensor, out)


def _check(name: str, layout: BlockLayout, mask: str, block: int | None, **tensors: Tensor) -> None:
    if not isinstance(layout, BlockLayout):
        raise ValueError(f"{name}: layout is {type(layout).__name__}, accepted is BlockLayout")
    check_mask(mask, name)
    if block is not None and not (isinstance(block, Integral) and 0 <= block < layout.blocks):
        raise ValueError(f"{name}: block is {block!r}, layout has blocks 0..{layout.blocks - 1} (an int)")
    for label, x in tensors.items():
        if not isinstance(x, Tensor):
            raise ValueError(f"{name}: {label} is {type(x).__name__}, accepted is a Tensor")
    queries = layout.total if block is None else layout.lengths[block]
    q = tensors["q"]
    for label, x in tensors.items():
        tokens = queries if label == "q" else layout.total
        if x.is_nested:
            raise ValueError(f"{name}: {label} is a nested tensor, accepted is one length for all samples")
        if x.dim() != 4 or x.shape[2] < 1 or x.shape[3] < 1:
            raise ValueError(
                f"{name}: {label} has shape {tuple(x.shape)}, accepted is (B, T, H, Dh), H and Dh >= 1"
            )
        if x.shape[1] != tokens:
            wanted = (
                f"layout has {layout.total} ({described(layout)})"
                if tokens == layout.total
                else f"the block has {tokens}"
            )
            raise ValueError(f"{name}: {label} has {x.shape[1]} tokens, {wanted}")
        if (x.shape[0], *x.shape[2:]) != (q.shape[0], *q.shape[2:]):
            raise ValueError(f"{name}: {label} has shape {tuple(x.shape)}, q has {tuple(q.shape)}; "
                             "B, H and Dh must be the same")  # fmt: skip
        if x.dtype not in _FLOATS:
            raise ValueError(f"{name}: {label} is {x.dtype}, accepted are {', '.join(map(str, _FLOATS))}")
        if x.device != q.device or (x.dtype != q.dtype and autocast_dtype(q.device, q.dtype) is None):
            raise ValueError(f"{name}: {label} is {x.dtype} on {x.device}, q is {q.dtype} on {q.device}; "
                             "accepted is one dtype (but under autocast) and one device")  # fmt: skip


@torch.library.custom_op("ard_kernels::block_attention", mutates_args=())
def _block_attention(
    q: Tensor, k: Tensor, v: Tensor, runs: Sequence[int], mask: str, scale: float, block: int, backend: str
) -> tuple[Tensor, Tensor]:
    """Returns out like q, and what the backend's backward wants besides: the log-sum-exp (B, H, queries) in
    at least float32 where it has one, else an empty tensor."""
    results: tuple[Tensor, Tensor] = _BACKENDS[backend].attention_forward(
        q, k, v, BlockLayout.of_runs(runs), cast(Mask, mask), scale, block
    )
    return results


@_block_attention.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, runs: Sequence[int], mask: str, scale: float, block: int, backend: str
) -> tuple[Tensor, Tensor]:
    # Not the layout: made of variables it would be a constant of the graph.
    keeps = _BACKENDS[backend].attention_keeps_lse(q, runs, cast(Mask, mask), block)
    wide = torch.promote_types(q.dtype, torch.float32)
    lse = q.new_empty((q.shape[0], q.shape[2], q.shape[1]) if keeps else (0,), dtype=wide)
    return torch.empty_like(q, memory_format=torch.contiguous_format), lse


@torch.library.custom_op("ard_kernels::block_attention_backward", mutates_args=())
def _block_attention_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, runs: Sequence[int],
    mask: str, scale: float, block: int, backend: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    layout = BlockLayout.of_runs(runs)
    results: tuple[Tensor, Tensor, Tensor] = _BACKENDS[backend].attention_backward(
        dout, q, k, v, out, lse, layout, cast(Mask, mask), scale, block
    )
    return results


@_block_attention_backward.register_fake
def _(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, runs: Sequence[int],
    mask: str, scale: float, block: int, backend: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    return dq, dk, dv


differentiable_once(_block_attention_backward, "block_attention")


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, *ctx.options = inputs
    ctx.set_materialize_grads(False)  # or every backward would fill a zero gradient of the log-sum-exp
    ctx.save_for_backward(q, k, v, *output)


def _backward(ctx: Any, dout: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if dout is None:
        return (None,) * 8
    q, k, v, out, lse = ctx.saved_tensors
    # Contiguous, as the forward made them: hooks on saved tensors may give others back.
    grads = _block_attention_backward(dout, q, k, v, out.contiguous(), lse.contiguous(), *ctx.options)
    return *grads, None, None, None, None, None


_block_attention.register_autograd(_backward, setup_context=_setup_context)

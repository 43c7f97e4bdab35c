"""The adaLN family by the compiled kernels, on CPU and CUDA: one pass over memory forward, one backward."""

from __future__ import annotations

import re

import torch
from torch import Tensor

from ard_kernels.backends import autocast_dtype, constant, native
from ard_kernels.backends.native import activations, given, rows
from ard_kernels.layout import BlockLayout

# What the kernels take, in their order.
_SLOTS = ("x", "branch", "gate", "shift", "scale", "residual", "y",
          "dy", "dx_in", "dx", "dbranch", "dgate", "dshift", "dscale")  # fmt: skip
# csrc/cuda: where there is a kernel, the most blocks, slices of a block, bytes that a thread reads at once.
_CUDA_WIDTHS = (384, 768, 1024, 1152)
_CUDA_BLOCKS, _CUDA_SLICES, _CUDA_BYTES = 255, 8, 16


def supports(*tensors: Tensor) -> str | None:
    """None, or why the compiled kernels cannot take these tensors: x, then branch and tables."""
    x, *rest = tensors
    if x.device.type != "cuda":
        return native.supports(*tensors)
    reason: str | None = native.CUDA_REASON or _device_reason()
    if reason is not None:
        return reason
    out = autocast_dtype(x.device, x.dtype) or x.dtype
    if (x.dtype, out) not in ((torch.float32,) * 2, (torch.bfloat16,) * 2, (torch.float32, torch.bfloat16)):
        return f"x is {x.dtype} and y would be {out}, accepted are float32 and bfloat16, x not the narrower"
    for tensor in rest:
        if tensor.dtype not in (out, torch.bfloat16) or (tensor.shape == x.shape and tensor.dtype != out):
            return f"the branch or a table is {tensor.dtype}, accepted is {out}, for tables also bfloat16"
    if x.shape[-1] not in _CUDA_WIDTHS:
        return f"D is {x.shape[-1]}, accepted on cuda are {', '.join(map(str, _CUDA_WIDTHS))}"
    blocks = min(tensor.shape[1] for tensor in rest)
    if blocks > _CUDA_BLOCKS:
        return f"there are {blocks} blocks, accepted on cuda are {_CUDA_BLOCKS}"
    return None


def _on_cuda(x: Tensor) -> bool:
    return x.is_cuda


def _run(
    backward: bool, layout: BlockLayout, eps: float, mean: Tensor | None, rstd: Tensor | None,
    **tensors: Tensor | None,
) -> None:  # fmt: skip
    first = next(x for x in tensors.values() if x is not None)
    batch, _, width = first.shape
    if batch == 0:
        return
    shape = batch, width, layout.runs, eps, [given(tensors.get(name)) for name in _SLOTS]
    statistics = [0 if x is None else x.data_ptr() for x in (mean, rstd)]
    if not _on_cuda(first):
        native.kernels(*tensors.values()).adaln(backward, *shape, *statistics, torch.get_num_threads())
        return
    assert native.C is not None
    clusters, stream = _device(first)
    # Where thread blocks form no clusters, the sums of a block's slices go through memory.
    slices = batch * layout.blocks * _CUDA_SLICES if backward and not clusters else 0
    partial = torch.empty(slices * 3 * width, dtype=torch.float32, device=first.device)
    with torch.cuda.device_of(first):
        native.C.adaln_cuda(backward, clusters, *shape, *statistics, partial.data_ptr(), stream)


def runs_as(architectures: str, capability: tuple[int, int]) -> tuple[int, int] | None:
    """For which of the architectures ("80 90a") the code was made that a device runs: the newest that is not
    newer. One with an "a" is for itself alone, one with an "f" for its major version."""
    found = []
    for name in architectures.split():
        number, kind = re.fullmatch("([0-9]+)([af]?)", name).groups()  # type: ignore[union-attr]
        made = divmod(int(number), 10)
        if kind == "a":
            fits = made == capability
        else:
            fits = made <= capability and (kind == "" or made[0] == capability[0])
        found += [made] if fits else []
    return max(found, default=None)


@constant
def _device_reason() -> str | None:
    """Why the compiled kernels do not run on the device at hand, or None."""
    assert native.C is not None
    made: str = native.C.cuda_architectures
    if not torch.cuda.is_available():
        return None
    if why := native.C.why_no_driver():
        return str(why)
    if runs_as(made, torch.cuda.get_device_capability()):
        return None
    return f"compiled for compute capabilities {made}, the device's is {torch.cuda.get_device_capability()}"


def _device(x: Tensor) -> tuple[bool, int]:
    """Whether thread blocks form clusters there, and the stream. Not the device alone decides: code made for
    one without clusters has none on a newer one."""
    assert native.C is not None
    made = runs_as(native.C.cuda_architectures, torch.cuda.get_device_capability(x.device))
    return made is not None and made >= (9, 0), torch.cuda.current_stream(x.device).cuda_stream


def _new(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    return torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)


def _statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    mean, rstd = (torch.empty(x.shape[:2], dtype=torch.float32, device=x.device) for _ in range(2))
    return mean, rstd


def _full(x: Tensor) -> Tensor:
    """An activation, contiguous, and on CUDA where vectors begin."""
    x = x.contiguous()
    return x.clone() if _on_cuda(x) and x.data_ptr() % _CUDA_BYTES else x


def _tables(dtype: torch.dtype, *tables: Tensor) -> list[Tensor]:
    """With contiguous rows; on CUDA in the one dtype of the branch and of y, which is not the narrower."""
    if not _on_cuda(tables[0]):
        return [rows(table) for table in tables]
    found = [rows(table.to(dtype)) for table in tables]
    for i, table in enumerate(found):
        offsets = [table.data_ptr(), *(stride * table.element_size() for stride in table.stride()[:-1])]
        if any(offset % _CUDA_BYTES for offset in offsets):
            found[i] = table.clone(memory_format=torch.contiguous_format)
    return found


def _table_gradients(dtype: torch.dtype, *tables: Tensor) -> list[Tensor]:
    return [_new(table, dtype if _on_cuda(table) else None) for table in tables]


def adaln_forward(
    x: Tensor, shift: Tensor, scale: Tensor, layout: BlockLayout, eps: float, out_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    y, (mean, rstd) = activations(_new(x, out_dtype)), _statistics(x)
    shift, scale = _tables(y.dtype, shift, scale)
    _run(False, layout, eps, mean, rstd, x=_full(x), shift=shift, scale=scale, y=y)
    return y.to(out_dtype), mean, rstd


def adaln_backward(
    dy: Tensor, dx_residual: Tensor | None, x: Tensor, scale: Tensor, mean: Tensor, rstd: Tensor,
    layout: BlockLayout,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    dy, dx = activations(_full(dy)), _new(x)
    dshift, dscale = _table_gradients(dy.dtype, scale, scale)
    residual = None if dx_residual is None else _full(dx_residual.to(x.dtype))
    _run(True, layout, 0.0, mean, rstd, x=_full(x), scale=_tables(dy.dtype, scale)[0], dy=dy,
         dx_in=residual, dx=dx, dshift=dshift, dscale=dscale)  # fmt: skip
    return dx, dshift.to(scale.dtype), dscale.to(scale.dtype)


def gated_residual_forward(x: Tensor, branch: Tensor, gate: Tensor, layout: BlockLayout) -> Tensor:
    out, (gate,) = _new(x), _tables(branch.dtype, gate)
    _run(False, layout, 0.0, None, None, x=_full(x), branch=_full(branch), gate=gate, residual=out)
    return out


def gated_residual_backward(
    dx: Tensor, branch: Tensor, gate: Tensor, layout: BlockLayout
) -> tuple[Tensor, Tensor]:
    dbranch, (dgate,) = _new(branch), _table_gradients(branch.dtype, gate)
    _run(True, layout, 0.0, None, None, branch=_full(branch), gate=_tables(branch.dtype, gate)[0],
         dx_in=_full(dx), dbranch=dbranch, dgate=dgate)  # fmt: skip
    return dbranch, dgate.to(gate.dtype)


def gated_residual_adaln_forward(
    x: Tensor, branch: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, layout: BlockLayout, eps: float,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    residual, y, (mean, rstd) = _new(x), activations(_new(x, out_dtype)), _statistics(x)
    gate, shift, scale = _tables(y.dtype, gate, shift, scale)
    _run(False, layout, eps, mean, rstd, x=_full(x), branch=_full(branch), gate=gate, shift=shift,
         scale=scale, residual=residual, y=y)  # fmt: skip
    return residual, y.to(out_dtype), mean, rstd


def gated_residual_adaln_backward(
    dx: Tensor, dy: Tensor, x: Tensor, branch: Tensor, gate: Tensor, scale: Tensor, mean: Tensor,
    rstd: Tensor, layout: BlockLayout,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    dy, out, dbranch = activations(_full(dy)), _new(x), _new(branch)
    dgate, dshift, dscale = _table_gradients(dy.dtype, gate, scale, scale)
    kinds = gate.dtype, scale.dtype
    gate, scale = _tables(dy.dtype, gate, scale)
    _run(True, layout, 0.0, mean, rstd, x=_full(x), branch=_full(branch), gate=gate, scale=scale, dy=dy,
         dx_in=_full(dx.to(x.dtype)), dx=out, dbranch=dbranch, dgate=dgate, dshift=dshift,
         dscale=dscale)  # fmt: skip
    return out, dbranch, dgate.to(kinds[0]), dshift.to(kinds[1]), dscale.to(kinds[1])

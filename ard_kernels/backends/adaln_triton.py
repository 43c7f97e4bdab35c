# Kernels have no Python types: Triton gives them theirs at launch.
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-decorators=False
"""The adaLN family as three Triton kernels: forward, backward, and the sum over the backward's slices.

Forward moves 4 activations (reads x and branch, writes the residual and y), backward 6 (reads dy, the
residual's gradient, the residual and branch, writes dx and dbranch): the least there is. Tables are S/T and
row statistics 1/D of the size of an activation.

A row is one tile of next_power_of_2(D) columns, with D a compile-time constant: where the mask hides whole
vectors of a thread, no instruction is left of them (1152 columns cost a warp 1280, not 2048).

Table gradients are sums over the tokens of a block. A program sums a slice of one block's rows in registers,
a second kernel the slices, in fixed order. There are no atomics, and the number of slices depends on the
shape alone: two runs agree bitwise.

Where blocks are equal, arithmetic tells which rows a program has. Where they are not, a list does (`_cut`).
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ard_kernels.backends import kept, triton_device_reason
from ard_kernels.compile_report import Production
from ard_kernels.layout import BlockLayout

if triton.knobs.runtime.interpret:
    from ard_kernels.backends import triton_interpreter

    triton_interpreter.install()

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# A tile of 8192 columns would need 32 warps in the backward, all that a program can have.
_WIDEST = 4096


def supports(*tensors: Tensor) -> str | None:
    """The reason why these tensors (x first) cannot be taken, or None."""
    for tensor in tensors:
        if tensor.dtype not in _DTYPES:
            return f"a tensor is {tensor.dtype}, accepted are {', '.join(map(str, _DTYPES))}"
    width = tensors[0].shape[-1]
    if not 1 <= width <= _WIDEST:
        return f"D is {width}, accepted are 1 to {_WIDEST}"
    reason: str | None = triton_device_reason(tensors[0].device.type)
    return reason


# Kernels. Strides are in elements: x_b and x_t of x's samples and tokens, gate_b and gate_s of the gate's
# samples and blocks. Outputs, statistics and sums are contiguous. `chunks` and `slices` are the programs of a
# block, or of a sample where blocks are unequal (not UNIFORM) and p_parts says which rows each has.


@triton.jit(do_not_specialize=["blocks", "tokens", "length", "chunks", "rows"])
def _forward_kernel(
    p_x, p_branch, p_gate, p_shift, p_scale, p_residual, p_y, p_mean, p_rstd, p_parts,
    x_b, x_t, branch_b, branch_t, gate_b, gate_s, shift_b, shift_s, scale_b, scale_s,
    blocks, tokens, length, chunks, rows, eps,
    GATE: tl.constexpr, NORM: tl.constexpr, UNIFORM: tl.constexpr, D: tl.constexpr, COLUMNS: tl.constexpr,
    VECTOR: tl.constexpr,
):  # fmt: skip
    """Some rows of a block: residual = x + gate * branch (GATE; else x) and y = adaLN(residual) (NORM)."""
    pid = tl.program_id(0)
    if UNIFORM:
        block, sample = pid // chunks % blocks, pid // chunks // blocks
    else:
        p_part = p_parts + pid % chunks * 4
        block, sample = tl.load(p_part), pid // chunks
    o_b, o_s = sample.to(tl.int64), block.to(tl.int64)
    o_d = tl.max_contiguous(tl.arange(0, COLUMNS), VECTOR)
    m_d = o_d < D
    p_x += o_b * x_b
    if GATE:
        p_branch += o_b * branch_b
        p_gate += o_b * gate_b + o_s * gate_s
    if NORM:
        p_shift += o_b * shift_b + o_s * shift_s
        p_scale += o_b * scale_b + o_s * scale_s
    if UNIFORM:
        start = block * length + pid % chunks * rows
        stop, step = tl.minimum(start + rows, (block + 1) * length), 1
    else:
        start, stop, step = tl.load(p_part + 1), tl.load(p_part + 2), tl.load(p_part + 3)
    for row in range(start, stop, step):
        o_t = tl.cast(row, tl.int64)
        o_row = o_b * tokens + o_t
        b_x = tl.load(p_x + o_t * x_t + o_d, m_d, 0.0).to(tl.float32)
        # Tables are read for every row: after the first they come from L1, and held in registers they would
        # leave room for half as many programs (D = 1152: 234 registers a thread instead of 96).
        if GATE:
            b_branch = tl.load(p_branch + o_t * branch_t + o_d, m_d, 0.0).to(tl.float32)
            b_gate = tl.load(p_gate + o_d, m_d, 0.0).to(tl.float32)
            b_residual = tl.fma(b_gate, b_branch, b_x).to(p_residual.dtype.element_ty)
            tl.store(p_residual + o_row * D + o_d, b_residual, m_d)
            b_x = b_residual.to(tl.float32)
        if NORM:
            # Rounded division: rows of one value in half precision have exactly that mean.
            mean = tl.div_rn(tl.sum(b_x, 0), D * 1.0)
            b_centred = tl.where(m_d, b_x - mean, 0.0)
            rstd = tl.rsqrt(tl.sum(b_centred * b_centred, 0) * (1.0 / D) + eps)
            # Loads cannot pass these stores: tables read sooner than needed would take registers.
            tl.store(p_mean + o_row, mean)
            tl.store(p_rstd + o_row, rstd)
            b_scale = tl.load(p_scale + o_d, m_d, 0.0).to(tl.float32)
            b_shift = tl.load(p_shift + o_d, m_d, 0.0).to(tl.float32)
            b_y = b_centred * rstd * (1.0 + b_scale) + b_shift
            tl.store(p_y + o_row * D + o_d, b_y.to(p_y.dtype.element_ty), m_d)


@triton.jit(do_not_specialize=["blocks", "tokens", "length", "slices"])
def _backward_kernel(
    p_dy, p_dresidual, p_x, p_branch, p_gate, p_scale, p_mean, p_rstd,
    p_dx, p_dbranch, p_dgate, p_dshift, p_dscale, p_parts,
    dy_b, dy_t, dresidual_b, dresidual_t, x_b, x_t, branch_b, branch_t, gate_b, gate_s, scale_b, scale_s,
    blocks, tokens, length, slices,
    GATE: tl.constexpr, NORM: tl.constexpr, RESIDUAL: tl.constexpr, UNIFORM: tl.constexpr,
    D: tl.constexpr, COLUMNS: tl.constexpr, VECTOR: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One slice of a block's rows: dx, the gradient through adaLN (NORM) plus dresidual (RESIDUAL), and
    dbranch = gate * dx (GATE); their sums dgate, dshift and dscale, each (programs, D)."""
    pid = tl.program_id(0)
    if UNIFORM:
        block, sample = pid // slices % blocks, pid // slices // blocks
    else:
        p_part = p_parts + pid % slices * 4
        block, sample = tl.load(p_part), pid // slices
    o_b, o_s = sample.to(tl.int64), block.to(tl.int64)
    o_d = tl.max_contiguous(tl.arange(0, COLUMNS), VECTOR)
    m_d = o_d < D
    b_dgate = tl.zeros([COLUMNS], tl.float32)
    b_dshift = tl.zeros([COLUMNS], tl.float32)
    b_dscale = tl.zeros([COLUMNS], tl.float32)
    if GATE:
        b_gate = tl.load(p_gate + o_b * gate_b + o_s * gate_s + o_d, m_d, 0.0).to(tl.float32)
        p_branch += o_b * branch_b
    if NORM:
        b_factor = 1.0 + tl.load(p_scale + o_b * scale_b + o_s * scale_s + o_d, m_d, 0.0).to(tl.float32)
        p_dy += o_b * dy_b
        p_x += o_b * x_b
    if RESIDUAL:
        p_dresidual += o_b * dresidual_b
    if UNIFORM:
        start, stop, step = block * length, (block + 1) * length, slices
        start += pid % slices
    else:
        start, stop, step = tl.load(p_part + 1), tl.load(p_part + 2), tl.load(p_part + 3)
    # Neighbouring programs read neighbouring rows. The next rows are fetched into shared memory meanwhile.
    for row in tl.range(start, stop, step, num_stages=STAGES):
        o_t = tl.cast(row, tl.int64)
        o_row = o_b * tokens + o_t
        if NORM:
            b_dy = tl.load(p_dy + o_t * dy_t + o_d, m_d, 0.0).to(tl.float32)
            b_x = tl.load(p_x + o_t * x_t + o_d, m_d, 0.0).to(tl.float32)
            rstd = tl.load(p_rstd + o_row)
            b_normed = (b_x - tl.load(p_mean + o_row)) * rstd
            b_dshift += b_dy
            b_dscale += b_dy * b_normed
            b_dnormed = b_dy * b_factor
            # Both sums in one reduction: 4 barriers a row instead of 7.
            sums = tl.sum(tl.join(b_dnormed, b_dnormed * b_normed), 0)
            sum_dnormed, sum_product = tl.split(sums)
            b_dx = (b_dnormed - sum_dnormed * (1.0 / D) - b_normed * (sum_product * (1.0 / D))) * rstd
        if RESIDUAL:
            b_dresidual = tl.load(p_dresidual + o_t * dresidual_t + o_d, m_d, 0.0).to(tl.float32)
            b_dx = b_dx + b_dresidual if NORM else b_dresidual
        if NORM:
            tl.store(p_dx + o_row * D + o_d, b_dx.to(p_dx.dtype.element_ty), m_d)
        if GATE:
            b_branch = tl.load(p_branch + o_t * branch_t + o_d, m_d, 0.0).to(tl.float32)
            b_dgate += b_dx * b_branch
            tl.store(p_dbranch + o_row * D + o_d, (b_dx * b_gate).to(p_dbranch.dtype.element_ty), m_d)
    o_sum = pid.to(tl.int64) * D + o_d
    if GATE:
        tl.store(p_dgate + o_sum, b_dgate.to(p_dgate.dtype.element_ty), m_d)
    if NORM:
        tl.store(p_dshift + o_sum, b_dshift.to(p_dshift.dtype.element_ty), m_d)
        tl.store(p_dscale + o_sum, b_dscale.to(p_dscale.dtype.element_ty), m_d)


@triton.jit
def _sum_slices(
    table, p_slices, p_table, p_firsts, blocks, slices,
    UNIFORM: tl.constexpr, D: tl.constexpr, SLICES: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    if tl.program_id(1) == table:
        TILES: tl.constexpr = (D + COLUMNS - 1) // COLUMNS
        pid = tl.program_id(0)
        segment = (pid // TILES).to(tl.int64)
        o_d = pid % TILES * COLUMNS + tl.arange(0, COLUMNS)
        m_d = o_d < D
        if UNIFORM:
            o_slices, count = segment * slices, slices
        else:
            p_first = p_firsts + pid // TILES % blocks
            o_slices = (pid // TILES // blocks).to(tl.int64) * slices + tl.load(p_first)
            count = tl.load(p_first + 1) - tl.load(p_first)
        b_sum = tl.zeros([SLICES, COLUMNS], tl.float32)
        for first in range(0, count, SLICES):
            o_i = first + tl.arange(0, SLICES)
            p_tile = p_slices + (o_slices + o_i)[:, None] * D + o_d[None, :]
            b_sum += tl.load(p_tile, (o_i < count)[:, None] & m_d[None, :], 0.0)
        tl.store(p_table + segment * D + o_d, tl.sum(b_sum, 0).to(p_table.dtype.element_ty), m_d)


@triton.jit(do_not_specialize=["blocks", "slices"])
def _finalize_kernel(
    p_gate_slices, p_shift_slices, p_scale_slices, p_dgate, p_dshift, p_dscale, p_firsts, blocks, slices,
    GATE: tl.constexpr, NORM: tl.constexpr, UNIFORM: tl.constexpr,
    D: tl.constexpr, SLICES: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """One table's gradient (B * S, D) from the backward's float32 (programs, D), COLUMNS columns a row."""
    if GATE:
        _sum_slices(0, p_gate_slices, p_dgate, p_firsts, blocks, slices, UNIFORM, D, SLICES, COLUMNS)
    if NORM:
        _sum_slices(1, p_shift_slices, p_dshift, p_firsts, blocks, slices, UNIFORM, D, SLICES, COLUMNS)
        _sum_slices(2, p_scale_slices, p_dscale, p_firsts, blocks, slices, UNIFORM, D, SLICES, COLUMNS)


# Launches

# 4 loads of 16 bytes in flight for each thread of 4 warps.
_FINALIZE_SLICES = 16
_FINALIZE_COLUMNS = 128
_FINALIZE_WARPS = 4


@dataclass(frozen=True)
class _Launch:
    """How the kernels are launched for rows of one width and dtype. Registers are counted for sm_90."""

    columns: int
    """Of a tile, a power of two."""
    vector: int
    """Neighbouring columns that a thread holds: 16 bytes of the widest activation. With 8 columns and float32
    to store, every row would pass through shared memory once more (D = 1152, float32 residual, bfloat16
    branch: the backward takes 224 registers instead of 126)."""
    forward_warps: int
    """One as far as registers allow (D = 2048: 135): sums over a row then need no barrier. Wider rows spill
    with 4 on sm_80."""
    backward_warps: int
    """16 columns a thread of each of the three sums: 128 registers, and with 32 columns it spills. A tile of
    4096 has 8 columns a thread: 16 warps of 102 registers, where 8 warps would take 182."""
    backward_stages: int
    """3: two rows are fetched ahead, at D = 1152 in bfloat16 74 KB on each SM; an H200 needs about 23 KB
    (4.3 TB/s for 0.7 us, over 132 SMs). 2 where 3 would pass the 99 KB of shared memory of sm_86 and 89."""


def _launch(width: int, itemsize: int) -> _Launch:
    """`itemsize` is that of the widest activation, in bytes."""
    columns = triton.next_power_of_2(width)
    return _Launch(
        columns=columns,
        vector=16 // itemsize,
        forward_warps=1 if columns <= 2048 else 8,
        backward_warps=max(columns // 512, 1) if columns <= 2048 else 16,
        backward_stages=3 if 2 * 4 * columns * itemsize <= 96 << 10 else 2,
    )


def _rows(samples: int, tokens: int) -> int:
    """Rows that one program of the forward takes, one after the other.

    Up to 4: the tables are then 3 rows of the 19 that a program moves between L2 and L1, with one row 3 of 7.
    Fewer where rows are few: an H200 holds 2,800 programs at once, and with more rows each it would idle.
    """
    return min(max(samples * tokens // 4096, 1), 4)


def _slices(segments: int, length: int) -> int:
    """Slices of each of `segments` equal blocks in the backward: from the shape alone, not the GPU.

    About 1,024 programs, twice what an H200 holds at once (D = 1152: 4 on an SM). No slice is shorter than 8
    rows, to bound what writing and reading the sums adds (D = 1152, bfloat16, 8 rows: 28 KB to 110 KB), or
    longer than 256, to bound the rounding errors of float32 numbers added one after the other.
    """
    wanted = min(-(-1024 // segments), -(-length // 8))
    return max(wanted, -(-length // 256))


def _slice_rows(samples: int, tokens: int) -> int:
    """The most rows of a slice of unequal blocks: as `_slices`, about 1,024 programs of 8 to 256 rows each.

    A power of two: all batch sizes together need six lists of a layout, which are kept for good.
    """
    return 1 << (min(max(samples * tokens // 1024, 8), 256).bit_length() - 1)


@dataclass(frozen=True)
class _Cut:
    """The rows of unequal blocks, dealt out so that every program has some. With as many programs for every
    block as the longest needs, most have none: 73 % for VAR's blocks of 1 to 256 tokens, at 4 rows each."""

    parts: Tensor
    """int32 (programs of a sample, 4): block, first row, the block's last + 1 row, and the step between rows:
    a block's programs take turns. With a run of rows each, they would take more registers (D = 1152,
    bfloat16, backward: 168 instead of 128)."""
    firsts: Tensor
    """int32 (S + 1,): the first program of every block, and their number."""
    count: int
    """Programs of a sample."""


# Kept for good: a CUDA graph may read a list long after its last lookup here.
@functools.cache
def _cut(layout: BlockLayout, rows: int, device: torch.device) -> _Cut:
    """As few programs as there can be with at most `rows` rows each."""
    parts, firsts = [], [0]
    for block, (start, stop) in enumerate(pairwise(layout.bounds)):
        step = -(-(stop - start) // rows)
        parts += [(block, start + i, stop, step) for i in range(step)]
        firsts.append(len(parts))
    return _Cut(kept(parts, device), kept(firsts, device), len(parts))


def _contiguous_rows(*tensors: Tensor | None) -> list[Tensor | None]:
    return [t if t is None or t.stride(-1) == 1 else t.contiguous() for t in tensors]


def _strides(tensors: Iterable[Tensor | None]) -> list[int]:
    return [stride for t in tensors for stride in ((0, 0) if t is None else t.stride()[:2])]


def _itemsize(*activations: Tensor | None) -> int:
    return max(t.element_size() for t in activations if t is not None)


def _like(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    return torch.empty_like(tensor, dtype=dtype, memory_format=torch.contiguous_format)


def _statistics(x: Tensor) -> Tensor:
    return torch.empty(x.shape[:2], dtype=torch.float32, device=x.device)


def _forward(
    layout: BlockLayout, eps: float, x: Tensor, *,
    branch: Tensor | None = None, gate: Tensor | None = None, residual: Tensor | None = None,
    shift: Tensor | None = None, scale: Tensor | None = None, y: Tensor | None = None,
    mean: Tensor | None = None, rstd: Tensor | None = None,
) -> None:  # fmt: skip
    """Fills residual (where there is a gate) and y, mean and rstd (where there is a scale)."""
    samples, tokens, width = x.shape
    if samples == 0:
        return
    inputs = _contiguous_rows(x, branch, gate, shift, scale)
    launch = _launch(width, _itemsize(x, branch, y))
    rows = _rows(samples, tokens)
    if layout.is_uniform:
        parts, chunks = None, -(-layout.longest // rows)
        programs = samples * layout.blocks * chunks
    else:
        cut = _cut(layout, rows, x.device)
        parts, chunks, programs = cut.parts, cut.count, samples * cut.count
    with torch.cuda.device_of(x):
        _forward_kernel[(programs,)](
            *inputs, residual, y, mean, rstd, parts, *_strides(inputs),
            layout.blocks, tokens, layout.lengths[0], chunks, rows, eps,
            GATE=gate is not None, NORM=scale is not None, UNIFORM=layout.is_uniform,
            D=width, COLUMNS=launch.columns, VECTOR=launch.vector, num_warps=launch.forward_warps,
        )  # fmt: skip


def _backward(
    layout: BlockLayout, like: Tensor, *,
    dy: Tensor | None = None, dresidual: Tensor | None = None, x: Tensor | None = None,
    scale: Tensor | None = None, mean: Tensor | None = None, rstd: Tensor | None = None,
    branch: Tensor | None = None, gate: Tensor | None = None, dx: Tensor | None = None,
    dbranch: Tensor | None = None, dgate: Tensor | None = None, dshift: Tensor | None = None,
    dscale: Tensor | None = None,
) -> None:  # fmt: skip
    """Fills dx, dshift and dscale (where there is a scale) and dbranch and dgate (where there is a gate).
    `like` is any activation."""
    samples, tokens, width = like.shape
    if samples == 0:
        return
    inputs = _contiguous_rows(dy, dresidual, x, branch, gate, scale)
    launch = _launch(width, _itemsize(dy, dresidual, x, branch))
    segments = samples * layout.blocks
    if layout.is_uniform:
        parts, firsts, slices = None, None, _slices(segments, layout.longest)
        programs = segments * slices
    else:
        cut = _cut(layout, _slice_rows(samples, tokens), like.device)
        parts, firsts, slices, programs = cut.parts, cut.firsts, cut.count, samples * cut.count
    tables = sums = [dgate, dshift, dscale]
    if programs > segments:
        size = (programs, width)
        sums = [None if t is None else t.new_empty(size, dtype=torch.float32) for t in tables]
    flags = {"GATE": gate is not None, "NORM": scale is not None, "UNIFORM": layout.is_uniform, "D": width}
    with torch.cuda.device_of(like):
        _backward_kernel[(programs,)](
            *inputs, mean, rstd, dx, dbranch, *sums, parts, *_strides(inputs),
            layout.blocks, tokens, layout.lengths[0], slices,
            **flags, RESIDUAL=dresidual is not None,
            COLUMNS=launch.columns, VECTOR=launch.vector, STAGES=launch.backward_stages,
            num_warps=launch.backward_warps,
        )  # fmt: skip
        if programs > segments:
            _finalize_kernel[(segments * -(-width // _FINALIZE_COLUMNS), len(tables))](
                *sums, *tables, firsts, layout.blocks, slices, **flags,
                SLICES=_FINALIZE_SLICES, COLUMNS=_FINALIZE_COLUMNS, num_warps=_FINALIZE_WARPS,
            )  # fmt: skip


def adaln_forward(
    x: Tensor, shift: Tensor, scale: Tensor, layout: BlockLayout, eps: float, out_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    y, mean, rstd = _like(x, out_dtype), _statistics(x), _statistics(x)
    _forward(layout, eps, x, shift=shift, scale=scale, y=y, mean=mean, rstd=rstd)
    return y, mean, rstd


def gated_residual_forward(x: Tensor, branch: Tensor, gate: Tensor, layout: BlockLayout) -> Tensor:
    residual = _like(x)
    _forward(layout, 0.0, x, branch=branch, gate=gate, residual=residual)
    return residual


def gated_residual_adaln_forward(
    x: Tensor, branch: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, layout: BlockLayout, eps: float,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    residual, y, mean, rstd = _like(x), _like(x, out_dtype), _statistics(x), _statistics(x)
    _forward(
        layout, eps, x, branch=branch, gate=gate, residual=residual,
        shift=shift, scale=scale, y=y, mean=mean, rstd=rstd,
    )  # fmt: skip
    return residual, y, mean, rstd


def adaln_backward(
    dy: Tensor, dx_residual: Tensor | None, x: Tensor, scale: Tensor, mean: Tensor, rstd: Tensor,
    layout: BlockLayout,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    dx, dshift, dscale = _like(x), _like(scale), _like(scale)
    _backward(
        layout, x, dy=dy, dresidual=dx_residual, x=x, scale=scale, mean=mean, rstd=rstd,
        dx=dx, dshift=dshift, dscale=dscale,
    )  # fmt: skip
    return dx, dshift, dscale


def gated_residual_backward(
    dx: Tensor, branch: Tensor, gate: Tensor, layout: BlockLayout
) -> tuple[Tensor, Tensor]:
    dbranch, dgate = _like(branch), _like(gate)
    _backward(layout, dx, dresidual=dx, branch=branch, gate=gate, dbranch=dbranch, dgate=dgate)
    return dbranch, dgate


def gated_residual_adaln_backward(
    dx: Tensor, dy: Tensor, x: Tensor, branch: Tensor, gate: Tensor, scale: Tensor, mean: Tensor,
    rstd: Tensor, layout: BlockLayout,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    dx_out, dbranch, dgate, dshift, dscale = _like(x), _like(branch), _like(gate), _like(scale), _like(scale)
    _backward(
        layout, x, dy=dy, dresidual=dx, x=x, scale=scale, mean=mean, rstd=rstd, branch=branch, gate=gate,
        dx=dx_out, dbranch=dbranch, dgate=dgate, dshift=dshift, dscale=dscale,
    )  # fmt: skip
    return dx_out, dbranch, dgate, dshift, dscale


# What is compiled ahead of time

# DiT-S, -B, -L, -XL, and the widest row.
_PRODUCTION_WIDTHS = (384, 768, 1024, 1152, 4096)
_XL = 1152


def production_kernels(arch: int) -> Iterator[Production]:
    """The kernels as training launches them, with equal blocks, in bfloat16 and with the residual in float32
    as under autocast: the operator that does most at every width, at DiT-XL's also the others, float32
    throughout, and unequal blocks, which the widest has in float16. They are the same for every `arch`."""
    for width in _PRODUCTION_WIDTHS:
        yield from _productions(width, "bf16", "bf16", uniform=True)
        yield from _productions(width, "fp32", "bf16", uniform=True)
    yield from _productions(_XL, "fp32", "fp32", uniform=True)
    yield from _productions(_XL, "bf16", "bf16", uniform=False)
    yield from _productions(_WIDEST, "fp16", "fp16", uniform=False)


def _productions(width: int, residual: str, other: str, uniform: bool) -> Iterator[Production]:
    """`residual` is the dtype of x, the residual and their gradients, `other` that of the rest."""
    types = f"{residual} {other}" if residual != other else residual
    suffix = f"D={width} {types}{'' if uniform else ' ragged'}"
    wide, narrow = f"*{residual}", f"*{other}"
    launch = _launch(width, 4 if "fp32" in (residual, other) else 2)
    for operator, gate, norm in (
        ("adaln", False, True), ("gated_residual", True, False), ("gated_residual_adaln", True, True),
    ):  # fmt: skip
        if width != _XL and not (gate and norm):
            continue
        flags = {"GATE": gate, "NORM": norm, "UNIFORM": uniform, "D": width}
        columns = {"COLUMNS": launch.columns, "VECTOR": launch.vector}
        yield _production(
            f"{operator} forward {suffix}", _forward_kernel, launch.forward_warps, {**flags, **columns},
            {
                "p_x": wide,
                **({"p_branch": narrow, "p_gate": narrow, "p_residual": wide} if gate else {}),
                **({"p_shift": narrow, "p_scale": narrow, "p_y": narrow} if norm else {}),
                **({"p_mean": "*fp32", "p_rstd": "*fp32", "eps": "fp32"} if norm else {"eps": "fp32"}),
                **({} if uniform else {"p_parts": "*i32"}),
            },
        )  # fmt: skip
        yield _production(
            f"{operator} backward {suffix}", _backward_kernel, launch.backward_warps,
            {**flags, **columns, "RESIDUAL": gate, "STAGES": launch.backward_stages},
            {
                **({"p_dy": narrow, "p_x": wide, "p_scale": narrow, "p_dx": wide} if norm else {}),
                **({"p_mean": "*fp32", "p_rstd": "*fp32"} if norm else {}),
                **({"p_dshift": "*fp32", "p_dscale": "*fp32"} if norm else {}),
                **({"p_dresidual": wide, "p_branch": narrow, "p_gate": narrow} if gate else {}),
                **({"p_dbranch": narrow, "p_dgate": "*fp32"} if gate else {}),
                **({} if uniform else {"p_parts": "*i32"}),
            },
        )  # fmt: skip
        if residual == other:
            yield _production(
                f"{operator} finalize {suffix}", _finalize_kernel, _FINALIZE_WARPS,
                {**flags, "SLICES": _FINALIZE_SLICES, "COLUMNS": _FINALIZE_COLUMNS},
                {
                    **({"p_gate_slices": "*fp32", "p_dgate": narrow} if gate else {}),
                    **({"p_shift_slices": "*fp32", "p_dshift": narrow} if norm else {}),
                    **({"p_scale_slices": "*fp32", "p_dscale": narrow} if norm else {}),
                    **({} if uniform else {"p_firsts": "*i32"}),
                },
            )  # fmt: skip


def _production(
    name: str, kernel: Any, warps: int, constexprs: dict[str, Any], signature: dict[str, str]
) -> Production:
    """Tensors that are not in the signature are None, and what is left are integers. Strides are multiples of
    D, counts are whatever they are: the launch does not look (do_not_specialize)."""
    others = [n for n in kernel.arg_names if n not in signature and n not in constexprs]
    absent: dict[str, Any] = {n: None for n in others if n.startswith("p_")}
    integers = {n: "i32" for n in others if n not in absent}
    return Production(
        name=name,
        kernel=kernel,
        signature={**signature, **integers},
        constexprs={**constexprs, **absent},
        options={"num_warps": warps},
        divisible=tuple(n for n in integers if n[-2:] in ("_b", "_t", "_s")),
    )

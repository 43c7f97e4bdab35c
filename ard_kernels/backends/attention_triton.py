# Kernels have no Python types: Triton gives them theirs at launch.
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-decorators=False
"""Attention between blocks as Triton kernels: forward, backward, and one step with a KV cache.

A mask is a list of tiles. The host cuts every block into tiles of query rows and gives each its one or two
ranges of keys (`_query_tiles`); the kernels walk those ranges and know nothing of masks. Hidden pairs cost
nothing, and only a tile or range that ends in the middle compares positions at all.

The head dimension is split into a power of two and a tail of at least 16 columns, the narrowest that the
tensor cores take on Hopper: 72 costs 64 + 16 = 80 columns, not 128.

The backward is two kernels, one that owns tiles of queries (dq, and on the way delta = rowsum(out * dout))
and one that owns tiles of keys (dk, dv). Each output element is summed by one program in a fixed order: two
runs agree bitwise. Where `tune` found it faster, and torch.use_deterministic_algorithms does not forbid it,
the second kernel does it all: 5 matrix products in place of 7, but dq is summed in the order of arrival.
Derivation: FlashAttention-2, arXiv 2307.08691, algorithms 1 and 2.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ard_kernels.backends import constant, kept, triton_device_reason
from ard_kernels.compile_report import Production
from ard_kernels.layout import BlockLayout, Mask
from ard_kernels.tune import Launch, key, tuned

if triton.knobs.runtime.interpret:
    from ard_kernels.backends import triton_interpreter

    triton_interpreter.install()

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_LOG2E = math.log2(math.e)


@constant
def _demands_float32() -> bool:
    # Not torch.get_float32_matmul_precision(), which raises where this has been set.
    return bool(torch.backends.cuda.matmul.fp32_precision != "tf32")


def supports(*tensors: Tensor) -> str | None:
    """The reason why these q, k and v cannot be taken, or None."""
    q = tensors[0]
    if q.dtype not in _DTYPES:
        return f"q is {q.dtype}, accepted are {', '.join(map(str, _DTYPES))}"
    if q.dtype == torch.float32 and _demands_float32():
        return (
            "q is float32, whose products tensor cores form in TF32; "
            'torch.set_float32_matmul_precision("high") allows it'
        )
    dim = q.shape[-1]
    if not (16 <= dim <= 128 and dim % 8 == 0):
        return f"head dim is {dim}, accepted are 16 to 128 in steps of 8"
    reason: str | None = triton_device_reason(q.device.type)
    return reason


def attention_keeps_lse(q: Tensor, runs: Sequence[int], mask: Mask, block: int) -> bool:
    """The backward always wants the log-sum-exp."""
    return True


# Tiles


@dataclass(frozen=True)
class _Tiles:
    """Work for the programs of one (sample, head)."""

    table: Tensor
    """int32 (tiles, 7), the most work first: first and last + 1 row; two key ranges; part of a split."""
    count: int
    ranges: int
    """1, or 2 if any tile has two ranges."""
    whole_rows: bool
    """Every tile has all its rows."""
    whole_ranges: bool
    """Every range is a multiple of the step."""


def _make_tiles(entries: Sequence[tuple[int, ...]], rows: int, step: int, device: torch.device) -> _Tiles:
    entries = sorted(entries, key=lambda e: e[2] - e[3] + e[4] - e[5])
    return _Tiles(
        table=kept(entries, device),
        count=len(entries),
        ranges=1 + any(e[5] > e[4] for e in entries),
        whole_rows=all((e[1] - e[0]) % rows == 0 for e in entries),
        whole_ranges=all((e[i + 1] - e[i]) % step == 0 for e in entries for i in (2, 4)),
    )


# Kept for good: a CUDA graph may read a table long after its last lookup here.
@functools.cache
def _query_tiles(
    layout: BlockLayout, mask: Mask, block: int, rows: int, step: int, splits: int, device: torch.device
) -> _Tiles:
    """Tiles of `rows` queries. A cached step (block >= 0) counts its queries from zero."""
    entries = []
    for s in range(layout.blocks) if block < 0 else (block,):
        first = layout.bounds[s] if block < 0 else 0
        for start in range(first, first + layout.lengths[s], rows):
            stop = min(start + rows, first + layout.lengths[s])
            for part in range(splits):
                cut = _part(layout.key_ranges(s, mask), step, part, splits)
                entries.append((start, stop, *cut, part))
    return _make_tiles(entries, rows, step, device)


def _part(ranges: tuple[tuple[int, int], ...], step: int, part: int, parts: int) -> tuple[int, int, int, int]:
    """One of `parts` equal shares of the steps through `ranges`, as two ranges."""
    total = sum(-(-(b - a) // step) for a, b in ranges)
    low, high = total * part // parts, total * (part + 1) // parts
    shares = []
    for a, b in ranges:
        count = -(-(b - a) // step)
        first, last = max(low, 0), min(high, count)
        if first < last:
            shares += [a + first * step, min(a + last * step, b)]
        low, high = low - count, high - count
    return (*shares, *([0] * (4 - len(shares))))  # type: ignore[return-value]


def _seen_by(layout: BlockLayout, mask: Mask, queries: Sequence[int]) -> list[tuple[int, int]]:
    """For every block the first of the blocks `queries` that see it, and the last + 1 (0 and 0 where none
    does): with all four masks those between see it, too."""
    place = {start: j for j, start in enumerate(layout.bounds)}
    seen = [(s, place[a], place[b]) for s in queries for a, b in layout.key_ranges(s, mask)]
    firsts, ends = [0] * layout.blocks, [0] * layout.blocks
    for s, a, b in seen:
        ends[a:b] = [s + 1] * (b - a)
    for s, a, b in reversed(seen):
        firsts[a:b] = [s] * (b - a)
    return list(zip(firsts, ends, strict=True))


@functools.cache
def _key_tiles(
    layout: BlockLayout, mask: Mask, block: int, rows: int, step: int, device: torch.device
) -> _Tiles:
    """Tiles of `rows` keys, each with the one range of queries that see it (empty for a hidden block)."""
    entries = []
    for j, (first, end) in enumerate(_seen_by(layout, mask, range(layout.blocks) if block < 0 else (block,))):
        low, high = layout.bounds[first], layout.bounds[end]
        if block >= 0:  # whose queries count from zero
            low, high = 0, high and layout.lengths[block]
        for start in range(layout.bounds[j], layout.bounds[j + 1], rows):
            entries.append((start, min(start + rows, layout.bounds[j + 1]), low, high, 0, 0, 0))
    return _make_tiles(entries, rows, step, device)


# Kernels. Strides of samples, tokens and heads arrive divided by 8: multiplied out again here, the compiler
# knows that a row starts at a multiple of 8 elements and loads 16 bytes at a time. The base of a tile is a
# 64-bit scalar, offsets inside it are 32-bit.


# A last batch of another size, or of one sample, is not compiled anew for what its code gains nothing from.
_SIZES = ["batch", "heads", "queries", "keys", "tiles"]


@triton.jit
def _dot(b_a, b_b, b_acc, UPCAST: tl.constexpr, PRECISION: tl.constexpr):
    if UPCAST:  # Triton's interpreter multiplies the bit patterns of bfloat16 (3.6 to 3.9)
        b_a, b_b = b_a.to(tl.float32), b_b.to(tl.float32)
    return tl.dot(b_a, b_b, b_acc, input_precision=PRECISION)


@triton.jit
def _row(p_x, o_b, o_h, o_row, s_b, s_h, s_row):
    """Pointer to one row."""
    return p_x + (o_b * s_b + o_h * s_h + o_row.to(tl.int64) * s_row) * 8


@triton.jit
def _load(
    p_x, stride, m_row, MASKED: tl.constexpr,
    ROWS: tl.constexpr, START: tl.constexpr, COLS: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Columns START.. of ROWS rows, zero in columns from D on and, if MASKED, in rows outside m_row."""
    o_d = START + tl.arange(0, COLS)
    p_tile = p_x + (tl.arange(0, ROWS)[:, None] * (stride * 8) + o_d[None, :])
    if MASKED:
        if START + COLS > D:
            b_tile = tl.load(p_tile, mask=m_row[:, None] & (o_d < D)[None, :], other=0.0)
        else:
            b_tile = tl.load(p_tile, mask=m_row[:, None], other=0.0)
    elif START + COLS > D:
        b_tile = tl.load(p_tile, mask=(o_d < D)[None, :], other=0.0)
    else:
        b_tile = tl.load(p_tile)
    return b_tile


@triton.jit
def _store(
    p_x, stride, b_tile, m_row, MASKED: tl.constexpr,
    ROWS: tl.constexpr, START: tl.constexpr, COLS: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    o_d = START + tl.arange(0, COLS)
    p_tile = p_x + (tl.arange(0, ROWS)[:, None] * (stride * 8) + o_d[None, :])
    b_tile = b_tile.to(p_x.dtype.element_ty)
    if MASKED:
        tl.store(p_tile, b_tile, mask=m_row[:, None] & (o_d < D)[None, :])
    elif START + COLS > D:
        tl.store(p_tile, b_tile, mask=(o_d < D)[None, :])
    else:
        tl.store(p_tile, b_tile)


@triton.jit
def _add(
    p_x, stride, b_tile, m_row, ROWS: tl.constexpr, START: tl.constexpr, COLS: tl.constexpr, D: tl.constexpr
):
    """Atomically, in an order that differs from run to run."""
    o_d = START + tl.arange(0, COLS)
    p_tile = p_x + (tl.arange(0, ROWS)[:, None] * (stride * 8) + o_d[None, :])
    tl.atomic_add(p_tile, b_tile, mask=m_row[:, None] & (o_d < D)[None, :], sem="relaxed")


@triton.jit
def _attend(
    b_acc0, b_acc1, b_max, b_sum, b_q0, b_q1, p_k, p_v, k_t, v_t, left, factor, MASKED: tl.constexpr,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, BN: tl.constexpr,
    UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """BN keys from p_k on, `left` of them there if MASKED: the online softmax in base 2."""
    m_n = tl.arange(0, BN) < left
    b_k0 = _load(p_k, k_t, m_n, MASKED, BN, 0, D0, D)
    b_s = _dot(b_q0, tl.trans(b_k0), None, UPCAST, PRECISION)
    if D1 > 0:
        b_k1 = _load(p_k, k_t, m_n, MASKED, BN, D0, D1, D)
        b_s = _dot(b_q1, tl.trans(b_k1), b_s, UPCAST, PRECISION)
    if MASKED:
        b_s = tl.where(m_n[None, :], b_s, float("-inf"))
    b_new = tl.maximum(b_max, tl.max(b_s, 1) * factor)
    # A row whose scores so far are all -inf subtracts 0: exp2(-inf) is 0, -inf - -inf would be NaN.
    b_shift = tl.where(b_new == float("-inf"), 0.0, b_new)
    b_p = tl.math.exp2(b_s * factor - b_shift[:, None])
    b_scale = tl.math.exp2(b_max - b_shift)
    b_sum = b_sum * b_scale + tl.sum(b_p, 1)
    b_v0 = _load(p_v, v_t, m_n, MASKED, BN, 0, D0, D)
    b_acc0 = _dot(b_p.to(b_v0.dtype), b_v0, b_acc0 * b_scale[:, None], UPCAST, PRECISION)
    if D1 > 0:
        b_v1 = _load(p_v, v_t, m_n, MASKED, BN, D0, D1, D)
        b_acc1 = _dot(b_p.to(b_v1.dtype), b_v1, b_acc1 * b_scale[:, None], UPCAST, PRECISION)
    return b_acc0, b_acc1, b_new, b_sum


@triton.jit(do_not_specialize=_SIZES)
def _forward_kernel(
    p_q, p_k, p_v, p_out, p_lse, p_tiles,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h,
    batch, heads, queries, tiles, factor,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    RANGES: tl.constexpr, WHOLE_ROWS: tl.constexpr, WHOLE_RANGES: tl.constexpr,
    UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out (parts, B, queries, H, D) and the natural log-sum-exp (parts, B, H, queries) of one tile. With more
    than one part, each is the result over its share of the keys."""
    pid = tl.program_id(0)
    p_tile = p_tiles + (pid % tiles) * 7
    o_b, o_h = (pid // tiles // heads).to(tl.int64), (pid // tiles % heads).to(tl.int64)
    first, last, part = tl.load(p_tile), tl.load(p_tile + 1), tl.load(p_tile + 6)
    m_m = tl.arange(0, BM) < last - first
    MASKED: tl.constexpr = not WHOLE_ROWS
    p_q = _row(p_q, o_b, o_h, first, q_b, q_h, q_t)
    b_q0 = _load(p_q, q_t, m_m, MASKED, BM, 0, D0, D)
    b_q1 = b_q0
    if D1 > 0:
        b_q1 = _load(p_q, q_t, m_m, MASKED, BM, D0, D1, D)
    b_acc0 = tl.zeros([BM, D0], tl.float32)
    b_acc1 = tl.zeros([BM, D1 if D1 > 0 else 16], tl.float32)
    b_max = tl.full([BM], float("-inf"), tl.float32)
    b_sum = tl.zeros([BM], tl.float32)
    for r in tl.static_range(RANGES):
        low, high = tl.load(p_tile + 2 + 2 * r), tl.load(p_tile + 3 + 2 * r)
        p_kr, p_vr = _row(p_k, o_b, o_h, low, k_b, k_h, k_t), _row(p_v, o_b, o_h, low, v_b, v_h, v_t)
        for _ in range((high - low) // BN):
            b_acc0, b_acc1, b_max, b_sum = _attend(
                b_acc0, b_acc1, b_max, b_sum, b_q0, b_q1, p_kr, p_vr, k_t, v_t, BN, factor,
                False, D, D0, D1, BN, UPCAST, PRECISION,
            )  # fmt: skip
            p_kr += k_t * (8 * BN)
            p_vr += v_t * (8 * BN)
        if not WHOLE_RANGES:
            left = (high - low) % BN
            if left > 0:
                b_acc0, b_acc1, b_max, b_sum = _attend(
                    b_acc0, b_acc1, b_max, b_sum, b_q0, b_q1, p_kr, p_vr, k_t, v_t, left, factor,
                    True, D, D0, D1, BN, UPCAST, PRECISION,
                )  # fmt: skip
    o_b += part * batch
    b_shift = tl.where(b_max == float("-inf"), 0.0, b_max)
    b_lse = (b_shift + tl.math.log2(b_sum)) * 0.6931471805599453
    tl.store(p_lse + (o_b * heads + o_h) * queries + first + tl.arange(0, BM), b_lse, mask=m_m)
    out_t = heads * (D // 8)
    p_out = _row(p_out, o_b, o_h, first, queries * out_t, D // 8, out_t)
    _store(p_out, out_t, b_acc0 / b_sum[:, None], m_m, MASKED, BM, 0, D0, D)
    if D1 > 0:
        _store(p_out, out_t, b_acc1 / b_sum[:, None], m_m, MASKED, BM, D0, D1, D)


@triton.jit(do_not_specialize=_SIZES)
def _combine_kernel(
    p_part, p_part_lse, p_out, p_lse, batch, heads, queries,
    D: tl.constexpr, COLS: tl.constexpr, BM: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """One result of the results over shares of the keys: their mean weighted by exp(log-sum-exp)."""
    pid = tl.program_id(0)
    tiles = tl.cdiv(queries, BM)
    o_b, o_h = (pid // tiles // heads).to(tl.int64), (pid // tiles % heads).to(tl.int64)
    first = (pid % tiles) * BM
    o_m = first + tl.arange(0, BM)
    m_m = o_m < queries
    b_max = tl.full([BM], float("-inf"), tl.float32)
    for part in tl.static_range(PARTS):
        p_row = p_part_lse + ((o_b + part * batch) * heads + o_h) * queries + o_m
        b_max = tl.maximum(b_max, tl.load(p_row, mask=m_m, other=0.0))
    b_max = tl.where(b_max == float("-inf"), 0.0, b_max)
    b_acc = tl.zeros([BM, COLS], tl.float32)
    b_sum = tl.zeros([BM], tl.float32)
    out_t = heads * (D // 8)
    for part in tl.static_range(PARTS):
        p_row = p_part_lse + ((o_b + part * batch) * heads + o_h) * queries + o_m
        b_weight = tl.math.exp(tl.load(p_row, mask=m_m, other=0.0) - b_max)
        p_tile = _row(p_part, o_b + part * batch, o_h, first, queries * out_t, D // 8, out_t)
        b_part = _load(p_tile, out_t, m_m, True, BM, 0, COLS, D)
        # A share whose scores are all -inf has weight 0 and no result (0/0).
        b_acc += tl.where((b_weight == 0.0)[:, None], 0.0, b_part * b_weight[:, None])
        b_sum += b_weight
    tl.store(p_lse + (o_b * heads + o_h) * queries + o_m, b_max + tl.math.log(b_sum), mask=m_m)
    p_tile = _row(p_out, o_b, o_h, first, queries * out_t, D // 8, out_t)
    _store(p_tile, out_t, b_acc / b_sum[:, None], m_m, True, BM, 0, COLS, D)


@triton.jit
def _dq_step(
    b_dq0, b_dq1, b_q0, b_q1, b_do0, b_do1, b_lse, b_delta, p_k, p_v, k_t, v_t, left, factor,
    MASKED: tl.constexpr, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, BN: tl.constexpr,
    UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """BN keys from p_k on, `left` of them there if MASKED."""
    m_n = tl.arange(0, BN) < left
    b_k0, b_v0 = _load(p_k, k_t, m_n, MASKED, BN, 0, D0, D), _load(p_v, v_t, m_n, MASKED, BN, 0, D0, D)
    b_s = _dot(b_q0, tl.trans(b_k0), None, UPCAST, PRECISION)
    b_dp = _dot(b_do0, tl.trans(b_v0), None, UPCAST, PRECISION)
    b_k1 = b_k0
    if D1 > 0:
        b_k1, b_v1 = _load(p_k, k_t, m_n, MASKED, BN, D0, D1, D), _load(p_v, v_t, m_n, MASKED, BN, D0, D1, D)
        b_s = _dot(b_q1, tl.trans(b_k1), b_s, UPCAST, PRECISION)
        b_dp = _dot(b_do1, tl.trans(b_v1), b_dp, UPCAST, PRECISION)
    b_ds = tl.math.exp2(b_s * factor - b_lse[:, None]) * (b_dp - b_delta[:, None])
    if MASKED:  # a missing key's row of zeros times infinity is NaN
        b_ds = tl.where(m_n[None, :], b_ds, 0.0)
    b_ds = b_ds.to(b_k0.dtype)
    b_dq0 = _dot(b_ds, b_k0, b_dq0, UPCAST, PRECISION)
    if D1 > 0:
        b_dq1 = _dot(b_ds, b_k1, b_dq1, UPCAST, PRECISION)
    return b_dq0, b_dq1


@triton.jit(do_not_specialize=_SIZES)
def _dq_kernel(
    p_q, p_k, p_v, p_out, p_do, p_lse, p_dq, p_lse2, p_delta, p_tiles,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, do_b, do_t, do_h,
    heads, queries, tiles, factor, scale,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    RANGES: tl.constexpr, WHOLE_ROWS: tl.constexpr, WHOLE_RANGES: tl.constexpr,
    UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq (B, queries, H, D) of one tile, and what `_dkv_kernel` takes of its queries: the log-sum-exp in base
    2, and delta = rowsum(out * dout), float32 (B, H, queries)."""
    pid = tl.program_id(0)
    p_tile = p_tiles + (pid % tiles) * 7
    o_b, o_h = (pid // tiles // heads).to(tl.int64), (pid // tiles % heads).to(tl.int64)
    first, last = tl.load(p_tile), tl.load(p_tile + 1)
    m_m = tl.arange(0, BM) < last - first
    MASKED: tl.constexpr = not WHOLE_ROWS
    out_t = heads * (D // 8)
    p_q = _row(p_q, o_b, o_h, first, q_b, q_h, q_t)
    p_out = _row(p_out, o_b, o_h, first, queries * out_t, D // 8, out_t)
    p_do = _row(p_do, o_b, o_h, first, do_b, do_h, do_t)
    b_q0 = _load(p_q, q_t, m_m, MASKED, BM, 0, D0, D)
    b_do0 = _load(p_do, do_t, m_m, MASKED, BM, 0, D0, D)
    b_out0 = _load(p_out, out_t, m_m, MASKED, BM, 0, D0, D)
    b_delta = tl.sum(b_out0.to(tl.float32) * b_do0.to(tl.float32), 1)
    b_q1, b_do1 = b_q0, b_do0
    if D1 > 0:
        b_q1 = _load(p_q, q_t, m_m, MASKED, BM, D0, D1, D)
        b_do1 = _load(p_do, do_t, m_m, MASKED, BM, D0, D1, D)
        b_out1 = _load(p_out, out_t, m_m, MASKED, BM, D0, D1, D)
        b_delta += tl.sum(b_out1.to(tl.float32) * b_do1.to(tl.float32), 1)
    o_m = (o_b * heads + o_h) * queries + first + tl.arange(0, BM)
    tl.store(p_delta + o_m, b_delta, mask=m_m)
    b_lse = tl.load(p_lse + o_m, mask=m_m, other=float("inf")) * 1.4426950408889634
    tl.store(p_lse2 + o_m, b_lse, mask=m_m)
    b_dq0 = tl.zeros([BM, D0], tl.float32)
    b_dq1 = tl.zeros([BM, D1 if D1 > 0 else 16], tl.float32)
    for r in tl.static_range(RANGES):
        low, high = tl.load(p_tile + 2 + 2 * r), tl.load(p_tile + 3 + 2 * r)
        p_kr, p_vr = _row(p_k, o_b, o_h, low, k_b, k_h, k_t), _row(p_v, o_b, o_h, low, v_b, v_h, v_t)
        for _ in range((high - low) // BN):
            b_dq0, b_dq1 = _dq_step(
                b_dq0, b_dq1, b_q0, b_q1, b_do0, b_do1, b_lse, b_delta, p_kr, p_vr, k_t, v_t, BN, factor,
                False, D, D0, D1, BN, UPCAST, PRECISION,
            )  # fmt: skip
            p_kr += k_t * (8 * BN)
            p_vr += v_t * (8 * BN)
        if not WHOLE_RANGES:
            left = (high - low) % BN
            if left > 0:
                b_dq0, b_dq1 = _dq_step(
                    b_dq0, b_dq1, b_q0, b_q1, b_do0, b_do1, b_lse, b_delta, p_kr, p_vr, k_t, v_t, left,
                    factor, True, D, D0, D1, BN, UPCAST, PRECISION,
                )  # fmt: skip
    p_dq = _row(p_dq, o_b, o_h, first, queries * out_t, D // 8, out_t)
    _store(p_dq, out_t, b_dq0 * scale, m_m, MASKED, BM, 0, D0, D)
    if D1 > 0:
        _store(p_dq, out_t, b_dq1 * scale, m_m, MASKED, BM, D0, D1, D)


@triton.jit(do_not_specialize=_SIZES)
def _delta_kernel(
    p_out, p_do, p_lse, p_lse2, p_delta, do_b, do_t, do_h, heads, queries,
    D: tl.constexpr, COLS: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """What `_dq_kernel` tells `_dkv_kernel` of BM queries."""
    pid = tl.program_id(0)
    tiles = tl.cdiv(queries, BM)
    o_b, o_h = (pid // tiles // heads).to(tl.int64), (pid // tiles % heads).to(tl.int64)
    first = (pid % tiles) * BM
    o_m = first + tl.arange(0, BM)
    m_m = o_m < queries
    out_t = heads * (D // 8)
    p_out = _row(p_out, o_b, o_h, first, queries * out_t, D // 8, out_t)
    b_out = _load(p_out, out_t, m_m, True, BM, 0, COLS, D).to(tl.float32)
    p_do = _row(p_do, o_b, o_h, first, do_b, do_h, do_t)
    b_do = _load(p_do, do_t, m_m, True, BM, 0, COLS, D).to(tl.float32)
    o_m += (o_b * heads + o_h) * queries
    tl.store(p_delta + o_m, tl.sum(b_out * b_do, 1), mask=m_m)
    tl.store(p_lse2 + o_m, tl.load(p_lse + o_m, mask=m_m, other=0.0) * 1.4426950408889634, mask=m_m)


@triton.jit
def _dkv_step(
    b_dk0, b_dk1, b_dv0, b_dv1, b_k0, b_k1, b_v0, b_v1, p_q, p_do, p_lse2, p_delta, p_dq, q_t, do_t, dq_t,
    left, m_n, factor, scale, MASKED: tl.constexpr, MASKED_KEYS: tl.constexpr, FUSED: tl.constexpr,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, BM: tl.constexpr, UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """BM queries from p_q on, `left` of them there if MASKED; FUSED adds to their dq. Scores are transposed:
    (keys, queries)."""
    o_m = tl.arange(0, BM)
    m_m = o_m < left
    b_q0, b_do0 = _load(p_q, q_t, m_m, MASKED, BM, 0, D0, D), _load(p_do, do_t, m_m, MASKED, BM, 0, D0, D)
    p_lse2, p_delta = p_lse2 + o_m, p_delta + o_m
    if not MASKED_KEYS:  # blocks are multiples of a tile, and so are their first queries
        p_lse2, p_delta = tl.multiple_of(p_lse2, 16), tl.multiple_of(p_delta, 16)
    if MASKED:
        b_lse2, b_delta = tl.load(p_lse2, mask=m_m, other=0.0), tl.load(p_delta, mask=m_m, other=0.0)
    else:
        b_lse2, b_delta = tl.load(p_lse2), tl.load(p_delta)
    b_s = _dot(b_k0, tl.trans(b_q0), None, UPCAST, PRECISION)
    b_dp = _dot(b_v0, tl.trans(b_do0), None, UPCAST, PRECISION)
    b_q1, b_do1 = b_q0, b_do0
    if D1 > 0:
        b_q1 = _load(p_q, q_t, m_m, MASKED, BM, D0, D1, D)
        b_do1 = _load(p_do, do_t, m_m, MASKED, BM, D0, D1, D)
        b_s = _dot(b_k1, tl.trans(b_q1), b_s, UPCAST, PRECISION)
        b_dp = _dot(b_v1, tl.trans(b_do1), b_dp, UPCAST, PRECISION)
    if MASKED:  # a missing query's row of zeros times infinity is NaN
        b_s, b_dp = tl.where(m_m[None, :], b_s, float("-inf")), tl.where(m_m[None, :], b_dp, 0.0)
    b_p = tl.math.exp2(b_s * factor - b_lse2[None, :])
    b_dv0 = _dot(b_p.to(b_do0.dtype), b_do0, b_dv0, UPCAST, PRECISION)
    b_ds = b_p * (b_dp - b_delta[None, :])
    if FUSED and MASKED_KEYS:  # infinity times a missing key's row of zeros is NaN
        b_ds = tl.where(m_n[:, None], b_ds, 0.0)
    b_ds = b_ds.to(b_q0.dtype)
    b_dk0 = _dot(b_ds, b_q0, b_dk0, UPCAST, PRECISION)
    if D1 > 0:
        b_dv1 = _dot(b_p.to(b_do1.dtype), b_do1, b_dv1, UPCAST, PRECISION)
        b_dk1 = _dot(b_ds, b_q1, b_dk1, UPCAST, PRECISION)
    if FUSED:
        b_dq0 = _dot(tl.trans(b_ds), b_k0, None, UPCAST, PRECISION)
        _add(p_dq, dq_t, b_dq0 * scale, m_m, BM, 0, D0, D)
        if D1 > 0:
            b_dq1 = _dot(tl.trans(b_ds), b_k1, None, UPCAST, PRECISION)
            _add(p_dq, dq_t, b_dq1 * scale, m_m, BM, D0, D1, D)
    return b_dk0, b_dk1, b_dv0, b_dv1


@triton.jit(do_not_specialize=_SIZES)
def _dkv_kernel(
    p_q, p_k, p_v, p_do, p_lse2, p_delta, p_dq, p_dk, p_dv, p_tiles,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, do_b, do_t, do_h,
    heads, queries, keys, tiles, factor, scale, FUSED: tl.constexpr,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    WHOLE_ROWS: tl.constexpr, WHOLE_RANGES: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk and dv (B, keys, H, D) of one tile of BN keys, over the queries that see it, BM at a time. FUSED
    adds its share of their dq to p_dq, float32."""
    pid = tl.program_id(0)
    p_tile = p_tiles + (pid % tiles) * 7
    o_b, o_h = (pid // tiles // heads).to(tl.int64), (pid // tiles % heads).to(tl.int64)
    first, last = tl.load(p_tile), tl.load(p_tile + 1)
    low, high = tl.load(p_tile + 2), tl.load(p_tile + 3)
    m_n = tl.arange(0, BN) < last - first
    MASKED: tl.constexpr = not WHOLE_ROWS
    p_k = _row(p_k, o_b, o_h, first, k_b, k_h, k_t)
    p_v = _row(p_v, o_b, o_h, first, v_b, v_h, v_t)
    b_k0, b_v0 = _load(p_k, k_t, m_n, MASKED, BN, 0, D0, D), _load(p_v, v_t, m_n, MASKED, BN, 0, D0, D)
    b_k1, b_v1 = b_k0, b_v0
    if D1 > 0:
        b_k1, b_v1 = _load(p_k, k_t, m_n, MASKED, BN, D0, D1, D), _load(p_v, v_t, m_n, MASKED, BN, D0, D1, D)
    b_dk0 = tl.zeros([BN, D0], tl.float32)
    b_dv0 = tl.zeros([BN, D0], tl.float32)
    b_dk1 = tl.zeros([BN, D1 if D1 > 0 else 16], tl.float32)
    b_dv1 = tl.zeros([BN, D1 if D1 > 0 else 16], tl.float32)
    p_q = _row(p_q, o_b, o_h, low, q_b, q_h, q_t)
    p_do = _row(p_do, o_b, o_h, low, do_b, do_h, do_t)
    p_lse2 += (o_b * heads + o_h) * queries + low
    p_delta += (o_b * heads + o_h) * queries + low
    out_t = heads * (D // 8)
    p_dq = _row(p_dq, o_b, o_h, low, queries * out_t, D // 8, out_t)
    for _ in range((high - low) // BM):
        b_dk0, b_dk1, b_dv0, b_dv1 = _dkv_step(
            b_dk0, b_dk1, b_dv0, b_dv1, b_k0, b_k1, b_v0, b_v1, p_q, p_do, p_lse2, p_delta, p_dq, q_t, do_t,
            out_t, BM, m_n, factor, scale, False, MASKED, FUSED, D, D0, D1, BM, UPCAST, PRECISION,
        )  # fmt: skip
        p_q += q_t * (8 * BM)
        p_do += do_t * (8 * BM)
        p_dq += out_t * (8 * BM)
        p_lse2 += BM
        p_delta += BM
    if not WHOLE_RANGES:
        left = (high - low) % BM
        if left > 0:
            b_dk0, b_dk1, b_dv0, b_dv1 = _dkv_step(
                b_dk0, b_dk1, b_dv0, b_dv1, b_k0, b_k1, b_v0, b_v1, p_q, p_do, p_lse2, p_delta, p_dq, q_t,
                do_t, out_t, left, m_n, factor, scale, True, MASKED, FUSED, D, D0, D1, BM, UPCAST, PRECISION,
            )  # fmt: skip
    p_dk = _row(p_dk, o_b, o_h, first, keys * out_t, D // 8, out_t)
    p_dv = _row(p_dv, o_b, o_h, first, keys * out_t, D // 8, out_t)
    _store(p_dk, out_t, b_dk0 * scale, m_n, MASKED, BN, 0, D0, D)
    _store(p_dv, out_t, b_dv0, m_n, MASKED, BN, 0, D0, D)
    if D1 > 0:
        _store(p_dk, out_t, b_dk1 * scale, m_n, MASKED, BN, D0, D1, D)
        _store(p_dv, out_t, b_dv1, m_n, MASKED, BN, D0, D1, D)


# Launches


def _split(dim: int) -> tuple[int, int]:
    """The head dim as a power of two and a tail; one padded power of two where that is as short."""
    first = 1 << (dim.bit_length() - 1)
    rest = dim - first
    if rest == 0:
        return first, 0
    tail = max(16, triton.next_power_of_2(rest))
    return (first, tail) if tail < first else (2 * first, 0)


def launch(
    kernel: str, dim: int, wide: bool, whole: bool, major: int, ranges: int = 1, few: bool = False
) -> Launch:
    """The launch of "forward", "dq", "dkv" or "fused" at a head dim, for float32 inputs (`wide`) or 16-bit
    ones, for blocks that are multiples of the tiles (`whole`), on compute capability `major`, where tiles
    have so many ranges of keys, and for `few` tiles. "fused" runs as `tune` says; this is its launch in tests
    and in the compile report.

    The largest tiles that compile without spills (`python -m ard_kernels compile-report`), the forward's of
    `few` half as large; not yet measured. At head dim 72 in bfloat16 on sm_90: forward 127 registers, dq 150,
    dkv 246.
    """
    columns = sum(_split(dim))
    crowded = ranges == 2 and not whole  # four copies of the step: more registers
    if wide:  # TF32 operands fill the registers: at 128 columns 32 x 16 spills 640 bytes in dkv, 608 in dq
        return Launch(32, 16, 4, 1) if kernel == "forward" else Launch(16, 16, 8, 1)
    if kernel == "forward" and few and (major > 8 or whole):
        return Launch(64, 64, 4, 2)
    if kernel == "forward" and crowded and major == 8:
        return Launch(128, 32, 8, 2)
    if kernel == "forward" and columns <= 80:  # 147 registers if it may, 127 without spills; crowded 180
        return Launch(128, 64, 8, 3, registers=128 if major == 9 and not crowded else None)
    if kernel == "forward":
        return Launch(128, 64, 8, 2)
    if kernel == "fused" and major == 8:  # ragged it spills, whatever the tile
        return Launch(128, 32 if columns <= 80 else 16, 8, 2)
    if kernel == "fused" and columns > 64 and not (major == 9 and columns <= 80 and whole):
        return Launch(128, 32, 8, 2) if major > 9 and whole else Launch(64, 64, 8, 2 if whole else 3)
    if kernel == "fused":  # head dim 72: 8 bytes of stack on sm_90 if ragged, and a trap on sm_100
        return Launch(128, 64, 8, 2)
    if major == 8 and kernel == "dkv" and columns > 96 and not whole:  # larger tiles have 8 bytes of stack
        return Launch(32, 16, 4, 2)
    if major == 8 and (columns > 80 or not whole):  # mma.sync: step 32 spills 16 bytes in dq, 272 in dkv
        return Launch(128, 16, 8, 2 if crowded else 3)
    if kernel == "dq" and crowded and columns > 96:  # step 64 has 8 bytes of stack on sm_100
        return Launch(128, 32, 8, 2)
    if kernel == "dkv" and (
        columns > 96 or not whole
    ):  # step 64 spills 40 bytes at 128 columns, 16 with tails
        return Launch(128, 32, 8, 2)
    return Launch(128, 64, 8, 2)


# Tiles and steps of 16-bit inputs divide this, here and in `tune.candidates`.
_WHOLE = 128


def is_whole(layout: BlockLayout) -> bool:
    """Whether blocks are multiples of every tile."""
    return all(length % _WHOLE == 0 for length in layout.runs[1::2])


def has_few_tiles(q: Tensor) -> bool:
    """A batch of one has 32 tiles of 128 rows at 16 heads of 256 tokens, an H200 132 multiprocessors."""
    return 2 * q.shape[0] * q.shape[2] * -(-q.shape[1] // 128) <= _FILL


def _launch(kernel: str, q: Tensor, layout: BlockLayout, mask: Mask) -> Launch:
    dim, wide, whole = q.shape[-1], q.dtype == torch.float32, is_whole(layout)
    ranges = 2 if mask == "anchor" and layout.blocks > 2 else 1
    few = has_few_tiles(q)
    one = functools.partial(launch, kernel, dim, wide, whole, ranges=ranges, few=few)
    if q.device.type != "cuda":
        return one(major=9)
    alike = not (few and kernel == "forward") and (whole or ranges == 1)  # to what `tune` measures
    major, _ = torch.cuda.get_device_capability(q.device)
    return (_measured(kernel, q, layout) if alike else None) or one(major=major)


def _measured(kernel: str, q: Tensor, layout: BlockLayout) -> Launch | None:
    """What `tune` found to be the fastest on this GPU."""
    if q.device.type != "cuda" or q.dtype == torch.float32:
        return None
    return tuned(torch.cuda.get_device_name(q.device), key(kernel, q.shape[-1], is_whole(layout)))


def _fused(q: Tensor, layout: BlockLayout) -> Launch | None:
    """The launch of a backward in one kernel, where it was measured to be faster and may be taken."""
    return None if torch.are_deterministic_algorithms_enabled() else _measured("fused", q, layout)


def _common(q: Tensor) -> dict[str, Any]:
    """Compile-time constants that all kernels take."""
    d0, d1 = _split(q.shape[-1])
    upcast = q.device.type == "cpu" and q.dtype == torch.bfloat16
    return {"D": q.shape[-1], "D0": d0, "D1": d1, "UPCAST": upcast, "PRECISION": "tf32"}


def _strides(x: Tensor) -> tuple[int, int, int]:
    return x.stride(0) // 8, x.stride(1) // 8, x.stride(2) // 8


def _loadable(x: Tensor) -> Tensor:
    """x, or a copy if its rows cannot be loaded 16 bytes at a time, or lie so far apart that 32-bit offsets
    within a tile (128 rows at most) do not reach."""
    steps = [x.stride(i) for i in range(3) if x.shape[i] > 1]
    fits = x.stride(3) == 1 and all(step % 8 == 0 for step in steps) and x.data_ptr() % 16 == 0
    fits = fits and (x.shape[1] == 1 or x.stride(1) < 2**24)
    return x if fits else x.contiguous().clone() if x.is_contiguous() else x.contiguous()


def _positive(q: Tensor, scale: float) -> tuple[Tensor, float]:
    """Queries and a factor > 0 with the same products: the online softmax scales a maximum."""
    return (q, scale) if scale > 0 else (q * (-1.0 if scale < 0 else 0.0), abs(scale) or 1.0)


def attention_forward(
    q: Tensor, k: Tensor, v: Tensor, layout: BlockLayout, mask: Mask, scale: float, block: int
) -> tuple[Tensor, Tensor]:
    batch, queries, heads, dim = q.shape
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = torch.empty(batch, heads, queries, dtype=torch.float32, device=q.device)
    if q.numel() == 0:
        return out, lse
    q, scale = _positive(q, scale)
    q, k, v = _loadable(q), _loadable(k), _loadable(v)
    at = _launch("forward", q, layout, mask)
    parts = _parts(layout, mask, block, batch * heads * -(-queries // at.rows), at.step)
    tiles = _query_tiles(layout, mask, block, at.rows, at.step, parts, q.device)
    part_out, part_lse = out, lse
    if parts > 1:
        part_out = torch.empty(parts, *out.shape, dtype=torch.float32, device=q.device)
        part_lse = torch.empty(parts, *lse.shape, dtype=torch.float32, device=q.device)
    with torch.cuda.device_of(q):
        _forward_kernel[(tiles.count * batch * heads,)](
            q, k, v, part_out, part_lse, tiles.table, *_strides(q), *_strides(k), *_strides(v),
            batch, heads, queries, tiles.count, scale * _LOG2E,
            **_common(q), BM=at.rows, BN=at.step, RANGES=tiles.ranges,
            WHOLE_ROWS=tiles.whole_rows, WHOLE_RANGES=tiles.whole_ranges,
            **at.options,
        )  # fmt: skip
        if parts > 1:
            _combine_kernel[(batch * heads * -(-queries // _ROWS),)](
                part_out, part_lse, out, lse, batch, heads, queries,
                D=dim, COLS=triton.next_power_of_2(dim), BM=_ROWS, PARTS=parts, num_warps=4,
            )  # fmt: skip
    return out, lse


# A step of sampling at batch 1 has few tiles: 16 heads of 256 queries are 32. Its keys are shared out until
# there are two programs for each of an H200's 132 multiprocessors. A constant, so that results do not depend
# on the device; at least two steps a share, and eight shares, bound the partial results.
_FILL = 264
_MOST_PARTS = 8
_ROWS = 16  # of a program of the kernels without matrix products


def _parts(layout: BlockLayout, mask: Mask, block: int, programs: int, step: int) -> int:
    if block < 0:
        return 1
    steps = sum(-(-(b - a) // step) for a, b in layout.key_ranges(block, mask))
    return max(1, min(_FILL // programs, steps // 2, _MOST_PARTS))


def attention_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, layout: BlockLayout, mask: Mask,
    scale: float, block: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    batch, queries, heads, dim = q.shape
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    if q.numel() == 0:
        return dq, dk.zero_(), dv.zero_()
    sign = math.copysign(1.0, scale) if scale else 0.0
    q, scale = _positive(q, scale)
    q, k, v, dout = (_loadable(x) for x in (q, k, v, dout))
    lse2, delta = lse.new_empty(2, *lse.shape)
    fused = _fused(q, layout)
    sums = dq if fused is None else torch.zeros_like(dq, dtype=torch.float32)
    with torch.cuda.device_of(q):
        if fused is not None:
            _delta_kernel[(batch * heads * -(-queries // _ROWS),)](
                out, dout, lse, lse2, delta, *_strides(dout), heads, queries,
                D=dim, COLS=triton.next_power_of_2(dim), BM=_ROWS, num_warps=4,
            )  # fmt: skip
        else:
            at = _launch("dq", q, layout, mask)
            tiles = _query_tiles(layout, mask, block, at.rows, at.step, 1, q.device)
            _dq_kernel[(tiles.count * batch * heads,)](
                q, k, v, out, dout, lse, dq, lse2, delta, tiles.table,
                *_strides(q), *_strides(k), *_strides(v), *_strides(dout),
                heads, queries, tiles.count, scale * _LOG2E, scale,
                **_common(q), BM=at.rows, BN=at.step, RANGES=tiles.ranges,
                WHOLE_ROWS=tiles.whole_rows, WHOLE_RANGES=tiles.whole_ranges,
                **at.options,
            )  # fmt: skip
        at = fused or _launch("dkv", q, layout, mask)
        tiles = _key_tiles(layout, mask, block, at.rows, at.step, q.device)
        _dkv_kernel[(tiles.count * batch * heads,)](
            q, k, v, dout, lse2, delta, sums, dk, dv, tiles.table,
            *_strides(q), *_strides(k), *_strides(v), *_strides(dout),
            heads, queries, k.shape[1], tiles.count, scale * _LOG2E, scale, FUSED=fused is not None,
            **_common(q), BM=at.step, BN=at.rows,
            WHOLE_ROWS=tiles.whole_rows, WHOLE_RANGES=tiles.whole_ranges,
            **at.options,
        )  # fmt: skip
    if fused is not None:
        dq.copy_(sums)
    return (dq if sign == 1.0 else dq * sign), dk, dv


# Ahead of time


_KERNELS = {"forward": _forward_kernel, "dq": _dq_kernel, "dkv": _dkv_kernel, "fused": _dkv_kernel}
_TRITON_TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
_FLOAT_ARGUMENTS = ("p_lse", "p_lse2", "p_delta", "p_part", "p_part_lse")


def production(
    kernel: str, dim: int, dtype: torch.dtype, at: Launch, whole: bool = True, ranges: int = 1
) -> Production:
    """A kernel as it is launched for these inputs: `whole`, with tiles and ranges that fit."""
    d0, d1 = _split(dim)
    constexprs = {
        "D": dim, "D0": d0, "D1": d1, "UPCAST": False, "PRECISION": "tf32",
        "BM": at.rows, "BN": at.step, "FUSED": kernel == "fused",
        "RANGES": ranges, "WHOLE_ROWS": whole, "WHOLE_RANGES": whole,
    }  # fmt: skip
    if kernel in ("dkv", "fused"):
        constexprs |= {"BM": at.step, "BN": at.rows}
    names = _KERNELS[kernel].arg_names
    constexprs = {name: value for name, value in constexprs.items() if name in names}
    signature = {name: _type(name, dtype) for name in names if name not in constexprs}
    if kernel == "fused":
        signature["p_dq"] = "*fp32"
    label = f"{_TRITON_TYPES[dtype]}{'' if whole else ' ragged'}{' 2 ranges' if ranges == 2 else ''}"
    return Production(
        name=f"attention {kernel} {label} d={dim} {at.rows}x{at.step}",
        kernel=_KERNELS[kernel],
        signature=signature,
        constexprs=constexprs,
        options=at.options,
    )


def _small_productions() -> Iterator[Production]:
    """Those without matrix products."""
    for name, kernel in (("combine", _combine_kernel), ("delta", _delta_kernel)):
        constexprs = {"D": 72, "COLS": 128, "BM": _ROWS, "PARTS": _MOST_PARTS}
        constexprs = {name: value for name, value in constexprs.items() if name in kernel.arg_names}
        signature = {name: _type(name, torch.bfloat16) for name in kernel.arg_names if name not in constexprs}
        yield Production(f"attention {name} bf16 d=72", kernel, signature, constexprs, {"num_warps": 4})


def _type(name: str, dtype: torch.dtype) -> str:
    if name in ("factor", "scale"):
        return "fp32"
    if name == "p_tiles":
        return "*i32"
    if name.startswith("p_"):
        return "*fp32" if name in _FLOAT_ARGUMENTS else f"*{_TRITON_TYPES[dtype]}"
    return "i32"


def production_kernels(arch: int) -> Iterator[Production]:
    """What `attention_forward` and `attention_backward` launch at the usual head dims on sm_`arch`."""
    yield from _small_productions()
    for kernel in _KERNELS:
        one = functools.partial(launch, kernel, major=arch // 10)
        for dim in (32, 64, 72, 96, 128):
            yield production(kernel, dim, torch.bfloat16, one(dim, wide=False, whole=True))
        for dim, whole in itertools.product((64, 72, 128), (True, False)):
            make = functools.partial(production, kernel, dim, torch.bfloat16, whole=whole)
            if not whole and not (kernel == "fused" and arch == 80):
                yield make(one(dim, wide=False, whole=whole))
            if kernel in ("forward", "dq"):  # a key is seen by one range of queries
                yield make(one(dim, wide=False, whole=whole, ranges=2), ranges=2)
            if kernel == "forward":
                yield make(one(dim, wide=False, whole=whole, few=True))
        yield production(kernel, 72, torch.float16, one(72, wide=False, whole=True))
        for dim in (64, 72, 128) if kernel != "fused" else ():  # which takes no float32
            yield production(kernel, dim, torch.float32, one(dim, wide=True, whole=False), whole=False)

"""Every operator composed of PyTorch's own, on any device, without work on hidden pairs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ard_kernels.layout import BlockLayout, Mask

_flash_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward

# Keys per query up to which plain matmuls beat PyTorch's fused CPU attention in half precision, forward +
# backward on 2 AMD EPYC cores: 1.0 against 9.5 ms at 16 keys, 16 against 29 at 64, 16 against 32 at 256
# (head dim
# 64), 100 against 91 at 1024. In float32 the fused kernel won at every length (11 against 18 ms at 64 keys,
# 124 against 279 at 1024).
_MATMUL_KEYS = 512

# Elements of a score matrix worked on at once. Forward + backward in bf16, head dim 64, on 2 AMD EPYC
# cores with 1 MiB of L2 each: 16 samples of 256 tokens, 6 heads took 26 ms with 2^18, 20 with 2^19, 19
# with 2^20,
# 24 with 2^21, 29 with 2^22, 42 unbounded. Blocks of 64 and of 16 tokens: within 6 % from 2^19 on.
_SCORES = {"cpu": 1 << 20, "cuda": 1 << 28}


def supports(*tensors: Tensor) -> str | None:
    """Everything."""
    return None


def attention_keeps_lse(q: Tensor, runs: Sequence[int], mask: Mask, block: int) -> bool:
    """True: the fused CPU kernel is used, whose backward wants the log-sum-exp. False: plain matmuls."""
    if q.device.type != "cpu":
        return False
    # Batches of products in float16 are slow: a step of sampling (256 queries, 1024 keys, 2 samples, 6 heads
    # of 64, one thread) took 189 ms by matmuls, 27 fused; forward + backward of 4 x 128 tokens 469 and 216.
    if q.dtype in (torch.float16, torch.float32, torch.float64):
        return True
    # A step of sampling is a forward alone, where matmuls won in bfloat16: 2.9 against 5.3 ms at 256 keys, 11
    # against 21 at 1024, 101 against 112 at 4096 (4 samples, 256 queries, 6 heads of 64, one thread of a busy
    # machine). With one sample the two are closer: 1.0 against 1.6 at 256, 2.9 against 2.7 at 512, 18 against
    # 22 at 4096.
    layout = BlockLayout.of_runs(runs)
    most = max(sum(b - a for a, b in layout.key_ranges(s, mask)) for s in range(layout.blocks))
    return block < 0 and most > _MATMUL_KEYS


def _pieces(
    layout: BlockLayout, mask: Mask, block: int
) -> Iterator[tuple[slice, tuple[tuple[int, int], ...]]]:
    """(rows of q, ranges of keys) of the dense calls that a mask decomposes into."""
    if block >= 0:
        yield slice(0, layout.lengths[block]), layout.key_ranges(block, mask)
        return
    for s in range(layout.blocks):
        yield layout.slice(s), layout.key_ranges(s, mask)


def _gather(x: Tensor, ranges: tuple[tuple[int, int], ...]) -> Tensor:
    """(B, T, H, Dh) -> (B, H, keys, Dh)."""
    parts = [x[:, a:b] for a, b in ranges]
    return (parts[0] if len(parts) == 1 else torch.cat(parts, 1)).transpose(1, 2)


def _rows_contiguous(*tensors: Tensor) -> list[Tensor]:
    """PyTorch's fused CPU kernels take the last dimension for contiguous whatever its stride, and
    `out.sum().backward()` sends a dout of stride 0."""
    return [x if x.stride(-1) == 1 else x.contiguous() for x in tensors]


def _fold(x: Tensor, layout: BlockLayout) -> Tensor:
    """(B, S*L, H, Dh) -> (B*S, L, H, Dh)."""
    return x.reshape(x.shape[0] * layout.blocks, layout.lengths[0], *x.shape[2:])


def _folds(layout: BlockLayout, mask: Mask, block: int) -> bool:
    return mask == "diagonal" and layout.is_uniform and layout.blocks > 1 and block < 0


def attention_forward(
    q: Tensor, k: Tensor, v: Tensor, layout: BlockLayout, mask: Mask, scale: float, block: int
) -> tuple[Tensor, Tensor]:
    fused = attention_keeps_lse(q, layout.runs, mask, block)
    if _folds(layout, mask, block):
        single = BlockLayout(layout.lengths[:1])
        out, lse = attention_forward(
            _fold(q, layout), _fold(k, layout), _fold(v, layout), single, mask, scale, -1
        )
        if fused:  # (B*S, H, L) -> (B, H, S*L)
            lse = lse.unflatten(0, (-1, layout.blocks)).transpose(1, 2).flatten(2)
        return out.view(q.shape), lse
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    wide = torch.promote_types(q.dtype, torch.float32)
    lse = q.new_empty((q.shape[0], q.shape[2], q.shape[1]) if fused else (0,), dtype=wide)
    for rows, ranges in _pieces(layout, mask, block):
        qs, ks, vs = q[:, rows].transpose(1, 2), _gather(k, ranges), _gather(v, ranges)
        if fused:
            o, lse[:, :, rows] = _flash_forward(*_rows_contiguous(qs, ks, vs), 0.0, False, scale=scale)
            out[:, rows] = o.transpose(1, 2)
        else:
            _matmul_forward(out[:, rows].transpose(1, 2), qs, ks, vs, scale)
    return out, lse


def attention_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, layout: BlockLayout, mask: Mask,
    scale: float, block: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    fused = attention_keeps_lse(q, layout.runs, mask, block)
    if _folds(layout, mask, block):
        single = BlockLayout(layout.lengths[:1])
        if fused:
            lse = lse.unflatten(2, (layout.blocks, -1)).transpose(1, 2).flatten(0, 1)
        d, fq, fk, fv, o = (_fold(x, layout) for x in (dout, q, k, v, out))
        dq, dk, dv = attention_backward(d, fq, fk, fv, o, lse, single, mask, scale, -1)
        return dq.view(q.shape), dk.view(k.shape), dv.view(v.shape)
    dq = torch.empty_like(q, memory_format=torch.contiguous_format)
    # A key's gradient is a sum over the blocks that see it. One term needs no wider accumulator.
    one_term = (mask == "diagonal" or layout.blocks == 1) and block < 0
    wide = q.dtype if one_term or block >= 0 else torch.promote_types(q.dtype, torch.float32)
    dk, dv = (torch.zeros(x.shape, dtype=wide, device=x.device) for x in (k, v))
    for rows, ranges in _pieces(layout, mask, block):
        qs, ks, vs = q[:, rows].transpose(1, 2), _gather(k, ranges), _gather(v, ranges)
        dos, os = dout[:, rows].transpose(1, 2), out[:, rows].transpose(1, 2)
        if fused:
            dqs, dks, dvs = _flash_backward(
                *_rows_contiguous(dos, qs, ks, vs, os), lse[:, :, rows].contiguous(), 0.0, False, scale=scale
            )
        else:
            dqs, dks, dvs = _matmul_backward(dos, qs, ks, vs, os, scale)
        dq[:, rows] = dqs.transpose(1, 2)
        done = 0
        for a, b in ranges:
            dk[:, a:b] += dks[:, :, done : done + b - a].transpose(1, 2)
            dv[:, a:b] += dvs[:, :, done : done + b - a].transpose(1, 2)
            done += b - a
    return dq, dk.to(k.dtype), dv.to(v.dtype)


def _chunks(q: Tensor, k: Tensor) -> Iterator[tuple[slice, slice]]:
    """(samples, query rows) such that the scores of one chunk stay small; keys are never cut."""
    limit = _SCORES.get(q.device.type, _SCORES["cuda"])
    per_row = q.shape[1] * k.shape[2]
    rows = min(q.shape[2], max(1, limit // per_row))
    samples = max(1, limit // (per_row * rows))
    for b in range(0, q.shape[0], samples):
        for r in range(0, q.shape[2], rows):
            yield slice(b, b + samples), slice(r, r + rows)


def _matmul_forward(out: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float) -> None:
    """out, q (B, H, queries, Dh); k, v (B, H, keys, Dh). Writes out."""
    for b, r in _chunks(q, k):
        weights = torch.matmul(q[b, :, r] * scale, k[b].transpose(-1, -2)).softmax(-1)
        out[b, :, r] = weights @ v[b]


def _matmul_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    dk, dv = (torch.zeros(x.shape, dtype=x.dtype, device=x.device) for x in (k, v))
    for b, r in _chunks(q, k):
        qs, dos = q[b, :, r] * scale, dout[b, :, r]
        weights = torch.matmul(qs, k[b].transpose(-1, -2)).softmax(-1)
        dv[b] += weights.transpose(-1, -2) @ dos
        wide = torch.promote_types(q.dtype, torch.float32)
        delta = (dos.to(wide) * out[b, :, r].to(wide)).sum(-1, keepdim=True)
        dscores = torch.matmul(dos, v[b].transpose(-1, -2)).sub_(delta).mul_(weights)
        dq[b, :, r] = (dscores @ k[b]) * scale
        dk[b] += dscores.transpose(-1, -2) @ qs
    return dq, dk, dv

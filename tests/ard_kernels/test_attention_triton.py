"""What is particular to the Triton kernels of attention: keys in shares, what they do not take."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from variants import gradients, packed_qkv

import ard_kernels
from ard_kernels import BlockLayout, block_attention, cached_block_attention, reference
from ard_kernels.backends import attention_triton
from ard_kernels.layout import MASKS, Mask
from ard_kernels.tune import in_any_order

pytestmark = pytest.mark.usefixtures("triton")


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("layout", [BlockLayout((3, 1, 6, 4)), BlockLayout((7,))], ids=str)
def test_the_queries_that_see_a_block_are_one_range(layout: BlockLayout, mask: Mask) -> None:
    """As the tiles of keys suppose."""
    visible = layout.mask(mask)
    every = range(layout.blocks)
    for queries in (every, *((s,) for s in every)):
        for j, (first, end) in enumerate(attention_triton._seen_by(layout, mask, queries)):
            seen_by = [s for s in queries if visible[layout.bounds[s], layout.bounds[j]]]
            assert seen_by == list(range(first, end))


@pytest.mark.parametrize("mask", MASKS)
def test_keys_in_shares(monkeypatch: pytest.MonkeyPatch, mask: str) -> None:
    """A cached step whose keys are shared out gives what it gives in one go."""
    layout = BlockLayout((200, 136, 140))
    q, k, v = packed_qkv(layout.total, 72, torch.float16).unbind(2)
    exact = reference.block_attention(q.double(), k.double(), v.double(), layout, mask)
    for block in range(layout.blocks):
        rows = layout.slice(block)
        steps = sum(-(-(b - a) // 64) for a, b in layout.key_ranges(block, mask))
        assert attention_triton._parts(layout, mask, block, 2, 64) == max(1, min(8, steps // 2))
        leaves = [x.clone().requires_grad_() for x in (q[:, rows], k, v)]
        shared = gradients(cached_block_attention(*leaves, layout, block, mask), *leaves)
        monkeypatch.setattr(attention_triton, "_FILL", 0)
        whole = gradients(cached_block_attention(*leaves, layout, block, mask), *leaves)
        monkeypatch.undo()
        eps = torch.finfo(torch.float16).eps
        assert (shared[0].double() - exact[:, rows]).abs().max() <= eps * exact.abs().max()
        for a, b in zip(shared, whole, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=2 * eps * max(1.0, float(b.abs().max())))


@pytest.mark.parametrize(
    ("mask", "lengths"), [("causal", (128, 128)), ("causal", (64, 129, 63)), ("anchor", (70, 1, 130))]
)
def test_the_larger_tiles_of_a_full_batch(
    monkeypatch: pytest.MonkeyPatch, assert_accurate: Callable[..., None], mask: str, lengths: tuple[int, ...]
) -> None:
    """The forward takes tiles of 64 queries where there are few, as in all other tests."""
    monkeypatch.setattr(attention_triton, "_FILL", 0)
    layout = BlockLayout(lengths)
    x = packed_qkv(layout.total, 72, torch.bfloat16)
    results = []
    for attend, kind in (
        (block_attention, torch.bfloat16),
        (reference.block_attention, torch.float64),
        (reference.block_attention, torch.bfloat16),
    ):
        leaves = [part.to(kind).requires_grad_() for part in x.unbind(2)]
        results.append(gradients(attend(*leaves, layout, mask), *leaves))
    assert_accurate(*results, 3.0)


@pytest.mark.parametrize(
    ("mask", "lengths", "dim"),
    [
        ("causal", (128, 128), 72),
        ("causal", (64, 129, 63), 72),
        ("diagonal", (70, 1, 130), 64),
        ("window", (70, 1, 130), 24),
        ("anchor", (70, 1, 130), 128),
    ],
)
def test_a_backward_in_one_kernel(
    monkeypatch: pytest.MonkeyPatch,
    assert_accurate: Callable[..., None],
    mask: str,
    lengths: tuple[int, ...],
    dim: int,
) -> None:
    """Of which `tune` finds out whether it is faster, and which determinism rules out."""
    layout = BlockLayout(lengths)
    major = torch.cuda.get_device_capability()[0] if torch.cuda.is_available() else 9
    whole = attention_triton.is_whole(layout)
    at = attention_triton.launch("fused", dim, wide=False, whole=whole, major=major)
    monkeypatch.setattr(attention_triton, "_measured", lambda kernel, *_: at if kernel == "fused" else None)
    x = packed_qkv(layout.total, dim, torch.bfloat16)
    x[:, :, 0] += 5  # scores far below those of a missing key, which are zero
    x[:, :, 1] -= 5
    assert attention_triton._fused(x, layout) is None
    for block in (None, layout.blocks - 1):
        results = []
        for kernels, dtype in (
            (ard_kernels, x.dtype),
            (reference, torch.float64),
            (reference, x.dtype),
        ):
            q, k, v = (part.to(dtype).requires_grad_() for part in x.unbind(2))
            with in_any_order():
                assert attention_triton._fused(x, layout) == at
                if block is None:
                    out = kernels.block_attention(q, k, v, layout, mask)
                else:
                    out = kernels.cached_block_attention(q[:, layout.slice(block)], k, v, layout, block, mask)
                results.append(gradients(out, q, k, v))
        assert_accurate(*results, 3.0)


@pytest.mark.parametrize("tokens", [64, 70])
def test_a_key_that_nobody_sees_has_no_gradient(tokens: int) -> None:
    """Scores of minus infinity, whether or not a tile ends in the middle: there a row of zeros stands for the
    queries that are missing, and zero times infinity is NaN."""
    layout = BlockLayout((tokens,))
    q, k, v = packed_qkv(tokens, 16).clone().unbind(2)
    q, k = q.abs() + 0.1, k.clone()
    k[:, 5] = float("-inf")
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    exact = [x.double().requires_grad_() for x in (q, k, v)]
    got = gradients(block_attention(*leaves, layout), *leaves)
    wanted = gradients(reference.block_attention(*exact, layout), *exact)
    for name, a, b in zip(("dk", "dv"), got[2:], wanted[2:], strict=True):
        assert a.isfinite().all(), name
        torch.testing.assert_close(a.double(), b, rtol=1e-2, atol=1e-2)


def test_what_it_does_not_take_is_named() -> None:
    layout = BlockLayout((4,))
    with pytest.raises(
        ValueError, match=r"^block_attention: backend 'triton' cannot be used: q is torch.float64"
    ):
        block_attention(*packed_qkv(4, 16).double().unbind(2), layout)
    torch.set_float32_matmul_precision("highest")
    with pytest.raises(ValueError, match=r"q is float32, whose products tensor cores form in TF32"):
        block_attention(*packed_qkv(4, 16).unbind(2), layout)
    torch.set_float32_matmul_precision("high")
    with pytest.raises(
        ValueError, match=r"cannot be used: head dim is 12, accepted are 16 to 128 in steps of 8"
    ):
        block_attention(*packed_qkv(4, 12).unbind(2), layout)


def test_rows_too_far_apart_for_offsets_of_32_bits_are_copied() -> None:
    storage = torch.empty(2**31 + 2**10, dtype=torch.float16, device="meta")
    near, far = (storage.as_strided((1, 128, 1, 16), (2**31, step, 16, 1)) for step in (2**24 - 8, 2**24))
    assert attention_triton._loadable(near) is near
    assert attention_triton._loadable(far).stride(1) == 16


@pytest.mark.gpu
def test_a_first_call_in_a_cuda_graph_of_torch_compile() -> None:
    """The table of a new layout is made while the graph's pool is in force, and outlives it."""
    layout = BlockLayout((130, 70, 33))
    q, k, v = packed_qkv(layout.total, 72, torch.bfloat16).cuda().unbind(2)
    attend = torch.compile(lambda *x: block_attention(*x, layout), mode="reduce-overhead")
    for _ in range(4):
        torch.compiler.cudagraph_mark_step_begin()
        got = attend(q, k, v).clone()
    torch.testing.assert_close(got, block_attention(q, k, v, layout), rtol=0, atol=0)

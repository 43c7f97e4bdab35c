"""block_attention and cached_block_attention against the float64 reference, and against what they promise."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch.utils.flop_counter import FlopCounterMode
from variants import interpreted, normal, products, takes

from ard_kernels import BlockLayout, block_attention, cached_block_attention, reference, use_backend
from ard_kernels.layout import MASKS

RAGGED = BlockLayout((3, 1, 6, 4))
UNIFORM = BlockLayout.uniform(blocks=3, length=5)

# Largest error in epsilons of the dtype. Measured over this file's inputs: 16.3, 16.8, 1.8, 2.4.
_UNITS = {torch.float64: 24.0, torch.float32: 24.0, torch.bfloat16: 3.0, torch.float16: 4.0}
DTYPES = tuple(_UNITS)
Attention = Callable[..., Tensor]


pytestmark = pytest.mark.usefixtures("backend")


def _batch(backend: str) -> tuple[int, int]:
    """Samples and heads: Triton's interpreter pays for every one."""
    return (1, 1) if interpreted(backend) else (2, 2)


def _refused(backend: str, dtype: torch.dtype) -> bool:
    """Whether the backend does not take the dtype: then it says so, and has no result to test."""
    if takes(backend, dtype):
        return False
    x = torch.zeros(1, 1, 1, 16, dtype=dtype)
    with pytest.raises(ValueError, match=f"backend '{backend}' cannot be used: .* is {dtype}"):
        block_attention(x, x, x, BlockLayout((1,)))
    return True


def _qkv(layout: BlockLayout, batch: int, heads: int, dim: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return normal(batch, layout.total, 3, heads, dim, dtype=dtype, seed=seed)  # (B, T, 3, H, Dh)


def _run(
    attend: Attention, inputs: tuple[Tensor, ...], dout: Tensor, *args: Any, **kwargs: Any
) -> list[Tensor]:
    """The output and the gradients of q, k and v."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = attend(*leaves, *args, **kwargs)
    return [out.detach(), *torch.autograd.grad(out, leaves, dout.to(out.dtype))]


def _check(
    assert_accurate: Callable[..., None], ours: Attention, meaning: Attention, inputs: tuple[Tensor, ...],
    *args: Any, terms: float = 1.0,
) -> None:  # fmt: skip
    """With a few keys, unit normals cancel."""
    dout = normal(*inputs[0].shape, dtype=inputs[0].dtype, seed=1)
    got = _run(ours, inputs, dout, *args)
    exact = _run(meaning, tuple(x.double() for x in inputs), dout, *args)
    plain = _run(meaning, inputs, dout, *args)
    assert_accurate(got, exact, plain, _UNITS[products(inputs[0].dtype)], products(inputs[0].dtype), terms)


def _packed(x: Tensor) -> tuple[Tensor, ...]:
    return x.unbind(2)


def _heads_first(x: Tensor) -> tuple[Tensor, ...]:
    return tuple(part.transpose(1, 2).contiguous().transpose(1, 2) for part in x.unbind(2))


def _stride_two(x: Tensor) -> tuple[Tensor, ...]:
    return tuple(part.repeat_interleave(2, -1)[..., ::2] for part in x.unbind(2))


_VIEWS = (_packed, _heads_first, _stride_two)


def _examples(backend: str) -> settings:
    """Triton's interpreter takes some 30 ms for every program."""
    return settings(max_examples=4 if backend == "triton" else 30)


@pytest.mark.parametrize("mask", MASKS)
def test_values_and_gradients(backend: str, assert_accurate: Callable[..., None], mask: str) -> None:
    @_examples(backend)
    @given(
        lengths=st.lists(st.integers(1, 24), min_size=1, max_size=5),
        batch=st.integers(1, 2),
        heads=st.integers(1, 3),
        dim=st.sampled_from(range(16, 129, 8)),
        dtype=st.sampled_from([dtype for dtype in DTYPES if takes(backend, dtype)]),
        scale=st.sampled_from((None, 0.3)),
        view=st.sampled_from(_VIEWS),
        seed=st.integers(0, 9),
    )
    def check(
        lengths: list[int],
        batch: int,
        heads: int,
        dim: int,
        dtype: torch.dtype,
        scale: float | None,
        view: Callable[[Tensor], tuple[Tensor, ...]],
        seed: int,
    ) -> None:
        layout = BlockLayout(lengths)
        inputs = view(_qkv(layout, batch, heads, dim, dtype, seed))
        _check(assert_accurate, block_attention, reference.block_attention, inputs, layout, mask, scale)

    check()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", range(16, 129, 8))
def test_every_head_dim(
    backend: str, assert_accurate: Callable[..., None], dim: int, dtype: torch.dtype
) -> None:
    if _refused(backend, dtype):
        return
    if interpreted(backend) and dtype != torch.bfloat16 and dim % 24:
        return  # how columns are split does not depend on the dtype; 24 to 120 have one part and two
    for layout in (RAGGED,) if interpreted(backend) else (RAGGED, UNIFORM):
        inputs = _qkv(layout, *_batch(backend), dim, dtype).unbind(2)
        _check(assert_accurate, block_attention, reference.block_attention, inputs, layout, "causal")


@pytest.mark.parametrize(
    ("dtype", "mask"), [*((torch.bfloat16, mask) for mask in MASKS), (torch.float16, "causal")]
)
def test_long_sequences(
    backend: str, assert_accurate: Callable[..., None], dtype: torch.dtype, mask: str
) -> None:
    """Lengths at which implementations change method or work in pieces: 520 keys, 2 million scores."""
    layout = BlockLayout((270, 250))
    if _refused(backend, dtype):
        return
    inputs = _qkv(layout, 1, 1 if interpreted(backend) else 16, 16, dtype).unbind(2)
    _check(assert_accurate, block_attention, reference.block_attention, inputs, layout, mask, terms=0.0)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_token_blocks_are_exact(backend: str, dtype: torch.dtype, mask: str) -> None:
    """With one visible key the output is its value, bit for bit, as products hold it."""
    if _refused(backend, dtype):
        return
    q, k, v = _qkv(BlockLayout((1,)), 2, 2, 24, dtype).unbind(2)
    out = block_attention(q, k, v, BlockLayout((1,)), mask)
    if products(dtype) == dtype:
        assert torch.equal(out, v)
    else:  # the value is truncated, and the weight, if it comes out an epsilon of float32 below 1
        torch.testing.assert_close(out, v, rtol=2 * torch.finfo(products(dtype)).eps, atol=0)


def _another_pair(backend: str, dtype: torch.dtype, layout: BlockLayout) -> bool:
    """Whether the interpreter leaves this pair out: it takes ragged layouts in float32, uniform ones in half
    precision. Offsets of rows do not depend on the dtype, and conversions not on the layout."""
    return interpreted(backend) and (dtype == torch.float32) != (layout is RAGGED)


@functools.cache
def _of_contiguous_tensors(
    backend: str, dtype: torch.dtype, layout: BlockLayout, mask: str
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Packed q, k and v, a broadcast dout, and the results of their contiguous copies with this backend."""
    x = _qkv(layout, 2, 2, 24, dtype)
    dout = normal(1, layout.total, 2, 24, dtype=dtype, seed=1).expand(2, -1, -1, -1)
    inputs = tuple(part.contiguous() for part in x.unbind(2))
    return x, dout, _run(block_attention, inputs, dout.contiguous(), layout, mask)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("layout", [RAGGED, UNIFORM], ids=["ragged", "uniform"])
@pytest.mark.parametrize("view", _VIEWS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_strides_do_not_matter(
    backend: str,
    dtype: torch.dtype,
    view: Callable[[Tensor], tuple[Tensor, ...]],
    layout: BlockLayout,
    mask: str,
) -> None:
    """Views of packed or transposed memory and a broadcast dout give the bits of contiguous tensors."""
    if _another_pair(backend, dtype, layout):
        return
    x, dout, (expected_out, *expected_grads) = _of_contiguous_tensors(backend, dtype, layout, mask)
    leaf = x.detach().requires_grad_()
    out = block_attention(*view(leaf), layout, mask)
    (grad,) = torch.autograd.grad(out, leaf, dout)
    assert not any(part.is_contiguous() for part in view(leaf))
    assert torch.equal(out, expected_out)
    assert out.is_contiguous()
    assert torch.equal(grad, torch.stack(expected_grads, 2))


@pytest.mark.parametrize("mask", MASKS)
def test_cached_values_and_gradients(backend: str, assert_accurate: Callable[..., None], mask: str) -> None:
    @_examples(backend)
    @given(
        lengths=st.lists(st.integers(1, 12), min_size=1, max_size=5),
        dim=st.sampled_from(range(16, 129, 8)),
        dtype=st.sampled_from([dtype for dtype in DTYPES if takes(backend, dtype)]),
        data=st.data(),
    )
    def check(lengths: list[int], dim: int, dtype: torch.dtype, data: st.DataObject) -> None:
        layout = BlockLayout(lengths)
        block = data.draw(st.integers(0, layout.blocks - 1))
        q, k, v = _qkv(layout, *_batch(backend), dim, dtype).unbind(2)
        inputs = q[:, layout.slice(block)], k, v
        meaning = reference.cached_block_attention
        _check(assert_accurate, cached_block_attention, meaning, inputs, layout, block, mask)

    check()


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("layout", [RAGGED, UNIFORM], ids=["ragged", "uniform"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cached_is_the_rows_and_never_reads_hidden_ones(
    backend: str, dtype: torch.dtype, layout: BlockLayout, mask: str
) -> None:
    if _another_pair(backend, dtype, layout) or _refused(backend, dtype):
        return
    q, k, v = _qkv(layout, *_batch(backend), 72, dtype).unbind(2)
    whole = block_attention(q, k, v, layout, mask)
    eps = torch.finfo(products(dtype)).eps
    for s in range(layout.blocks):
        hidden = ~layout.mask(mask)[layout.slice(s)].any(0)
        caches = [x.clone() for x in (k, v)]
        for cache in caches:
            cache[:, hidden] = float("nan")
        inputs = (q[:, layout.slice(s)], *caches)
        dout = normal(*inputs[0].shape, dtype=dtype, seed=1)
        out, dq, *dcaches = _run(cached_block_attention, inputs, dout, layout, s, mask)
        # Two orders of the same sum: each is within an epsilon of it.
        torch.testing.assert_close(
            out, whole[:, layout.slice(s)], rtol=0, atol=2 * eps * float(whole.abs().max())
        )
        assert dq.isfinite().all()
        for grad in dcaches:
            assert grad[:, hidden].eq(0).all()
            assert grad[:, ~hidden].isfinite().all()


@pytest.mark.parametrize("mask", MASKS)
def test_hidden_tokens_have_no_influence(mask: str) -> None:
    """A NaN in one block reaches exactly the blocks that see it: nothing is multiplied by a zero weight."""
    q, k, v = _qkv(RAGGED, 1, 1, 16, torch.float32).unbind(2)
    visible = RAGGED.mask(mask)
    for s in range(RAGGED.blocks):
        poisoned = v.clone()
        poisoned[:, RAGGED.slice(s)] = float("nan")
        touched = block_attention(q, k, poisoned, RAGGED, mask).isnan().any(-1).flatten()
        assert torch.equal(touched, visible[:, RAGGED.slice(s)].any(1))


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_large_scores_do_not_overflow(dtype: torch.dtype, mask: str) -> None:
    """A softmax that subtracts its maximum: with scores near 10^4 the largest key takes everything."""
    layout = BlockLayout((2, 3))
    q, k, v = (100 * x for x in _qkv(layout, 1, 1, 64, dtype).unbind(2))
    for tensor in _run(block_attention, (q, k, v), torch.ones_like(q), layout, mask):
        assert tensor.isfinite().all()
    exact = reference.block_attention(q.double(), k.double(), v.double(), layout, mask)
    error = (block_attention(q, k, v, layout, mask).double() - exact).abs().max() / exact.abs().max()
    assert error <= 2 * torch.finfo(products(dtype)).eps


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_two_runs_are_bitwise_equal(backend: str, dtype: torch.dtype, mask: str) -> None:
    if _refused(backend, dtype):
        return
    layout = BlockLayout((20, 9) if interpreted(backend) else (40, 64, 24))
    inputs = _qkv(layout, *_batch(backend), 72, dtype).unbind(2)
    dout = normal(*inputs[0].shape, dtype=dtype, seed=1)
    first = _run(block_attention, inputs, dout, layout, mask)
    second = _run(block_attention, inputs, dout, layout, mask)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize(
    ("layout", "block"),
    [(RAGGED, -1), (RAGGED, 1), (UNIFORM, -1)],
    ids=["ragged", "ragged, cached", "uniform"],
)
@pytest.mark.parametrize(
    ("dtype", "mask"), [(torch.float32, "anchor"), (torch.bfloat16, "diagonal")], ids=["float32", "bfloat16"]
)
def test_opcheck(backend: str, dtype: torch.dtype, mask: str, layout: BlockLayout, block: int) -> None:
    q, k, v = _qkv(layout, *_batch(backend), 16, dtype).unbind(2)
    if block >= 0:
        q = q[:, layout.slice(block)]
    options = (layout.runs, mask, 0.25, block, backend)
    leaves = tuple(x.detach().requires_grad_() for x in (q, k, v))
    torch.library.opcheck(torch.ops.ard_kernels.block_attention.default, (*leaves, *options))
    out, lse = torch.ops.ard_kernels.block_attention(q, k, v, *options)
    backward = torch.ops.ard_kernels.block_attention_backward.default
    torch.library.opcheck(backward, (torch.ones_like(out), q, k, v, out, lse, *options))


@pytest.mark.parametrize("layout", [RAGGED, UNIFORM], ids=["ragged", "uniform"])
@pytest.mark.parametrize("mask", ["causal", "diagonal"])
def test_compiles_without_graph_breaks(mask: str, layout: BlockLayout) -> None:
    def both(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        one = cached_block_attention(q[:, layout.slice(1)], k, v, layout, 1, mask)
        return torch.cat([block_attention(q, k, v, layout, mask), one], 1)

    torch._dynamo.reset()
    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    inputs = _qkv(layout, 2, 2, 24, torch.float32).unbind(2)
    dout = normal(2, layout.total + layout.lengths[1], 2, 24, seed=1)
    for a, b in zip(_run(compiled, inputs, dout), _run(both, inputs, dout), strict=True):
        assert torch.equal(a, b)


def test_autocast_casts_inputs() -> None:
    x = _qkv(RAGGED, 2, 2, 24, torch.float32)
    inputs = x.unbind(2)
    dout = normal(*inputs[0].shape, dtype=torch.bfloat16, seed=1)
    cached = inputs[0][:, RAGGED.slice(2)], *inputs[1:]
    with torch.autocast(torch.get_default_device().type, torch.bfloat16):
        got = _run(block_attention, inputs, dout, RAGGED, "causal")
        one = cached_block_attention(*cached, RAGGED, 2)
    expected = _run(block_attention, tuple(part.bfloat16() for part in inputs), dout, RAGGED, "causal")
    assert [x.dtype for x in got] == [torch.bfloat16, *[torch.float32] * 3]
    assert all(torch.equal(a, b.to(a.dtype)) for a, b in zip(got, expected, strict=True))
    assert torch.equal(one, cached_block_attention(*(part.bfloat16() for part in cached), RAGGED, 2))


def test_autocast_takes_inputs_of_several_dtypes() -> None:
    """As SDPA does: queries and keys that were rotated or normalised in float32."""
    q, k, v = _qkv(RAGGED, 2, 2, 24, torch.float32).unbind(2)
    mixed = q, k, v.bfloat16()
    dout = normal(*q.shape, dtype=torch.bfloat16, seed=1)
    with torch.autocast(torch.get_default_device().type, torch.bfloat16):
        got = _run(block_attention, mixed, dout, RAGGED)
        one = cached_block_attention(q[:, RAGGED.slice(2)].bfloat16(), k, v, RAGGED, 2)
    expected = _run(block_attention, tuple(x.bfloat16() for x in mixed), dout, RAGGED)
    assert [x.dtype for x in got] == [torch.bfloat16, torch.float32, torch.float32, torch.bfloat16]
    assert all(torch.equal(a, b.to(a.dtype)) for a, b in zip(got, expected, strict=True))
    assert torch.equal(one, got[0][:, RAGGED.slice(2)])


def test_autocast_leaves_float64_alone() -> None:
    """As it does PyTorch's operators: a check in float64 stays one."""
    q, k, v = _qkv(RAGGED, 1, 1, 16, torch.float64).unbind(2)
    with torch.autocast(torch.get_default_device().type, torch.bfloat16), use_backend("eager"):
        assert block_attention(q, k, v, RAGGED).dtype == torch.float64


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype")
def test_a_nested_tensor_is_refused_by_name() -> None:
    for kind in (torch.strided, torch.jagged):
        nested = torch.nested.nested_tensor([torch.zeros(RAGGED.total, 1, 16)], layout=kind)
        with pytest.raises(ValueError, match=r"^block_attention: k is a nested tensor, accepted is"):
            block_attention(torch.zeros(1, RAGGED.total, 1, 16), nested, nested, RAGGED)


def test_numbers_of_numpy_are_numbers() -> None:
    layout = BlockLayout(np.arange(1, 4) ** 2)
    assert layout == BlockLayout((1, 4, 9))
    assert all(type(n) is int for n in layout.lengths)
    assert BlockLayout.uniform(np.int64(2), np.int32(3)) == BlockLayout((3, 3))  # type: ignore[arg-type]
    q, k, v = _qkv(layout, 1, 1, 16, torch.float32).unbind(2)
    rows = q[:, layout.slice(2)]
    got = cached_block_attention(rows, k, v, layout, np.int64(2), scale=np.float32(0.5))  # type: ignore[arg-type]
    assert torch.equal(got, cached_block_attention(rows, k, v, layout, 2, scale=0.5))


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_flops(backend: str, dtype: torch.dtype, mask: str) -> None:
    (batch, heads), dim, block = (1, 1) if interpreted(backend) else (3, 2), 24, 2
    q, k, v = (x.detach().requires_grad_() for x in _qkv(RAGGED, batch, heads, dim, dtype).unbind(2))
    rows = RAGGED.slice(block)
    visible = RAGGED.mask(mask)
    for attend, area in (
        (lambda: block_attention(q, k, v, RAGGED, mask), int(visible.sum())),
        (lambda: cached_block_attention(q[:, rows], k, v, RAGGED, block, mask), int(visible[rows].sum())),
    ):
        with FlopCounterMode(display=False) as forward:
            out = attend()
        with FlopCounterMode(display=False) as backward:
            out.sum().backward()
        assert forward.get_total_flops() == batch * 2 * 2 * heads * dim * area
        assert 2 * backward.get_total_flops() == 5 * forward.get_total_flops()


def test_shapes_are_known_without_data() -> None:
    q, k, v = _qkv(RAGGED, 2, 2, 24, torch.bfloat16).to("meta").unbind(2)
    out = block_attention(q, k, v, RAGGED)
    assert (out.shape, out.dtype, out.device) == (q.shape, q.dtype, q.device)


_GOOD = dict(zip("qkv", _qkv(RAGGED, 2, 2, 16, torch.float32).unbind(2), strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": _GOOD["q"][0]}, r"q has shape \(14, 2, 16\), accepted is \(B, T, H, Dh\)"),
        ({"q": _GOOD["q"][:, 1:]}, r"q has 13 tokens, layout has 14 \(4 blocks of \(3, 1, 6, 4\)\)"),
        ({"k": _GOOD["k"][:, 1:]}, r"k has 13 tokens, layout has 14"),
        ({"v": _GOOD["v"][:, 1:]}, r"v has 13 tokens, layout has 14"),
        ({"k": _GOOD["k"][:1]}, r"k has shape \(1, 14, 2, 16\), q has \(2, 14, 2, 16\)"),
        ({"k": _GOOD["k"][:, :, :1]}, r"k has shape \(2, 14, 1, 16\), q has"),
        ({"v": _GOOD["v"][..., :8]}, r"v has shape \(2, 14, 2, 8\), q has"),
        ({"q": _GOOD["q"].int()}, r"q is torch.int32, accepted are torch.float64"),
        ({"k": _GOOD["k"].half()}, r"k is torch.float16 on cpu, q is torch.float32 on cpu; accepted is one"),
        ({"scale": torch.ones(())}, r"scale is Tensor, accepted is an int or a float"),
        ({"mask": torch.ones(2)}, r"mask is a Tensor, accepted are 'causal'"),
        ({"scale": torch.nan}, r"scale is nan, accepted is a finite number$"),
        ({"scale": -torch.inf}, r"scale is -inf, accepted is a finite number$"),
        ({"v": _GOOD["v"].to("meta")}, r"v is torch.float32 on meta, q is torch.float32 on cpu"),
        ({"layout": (3, 1, 6, 4)}, r"layout is tuple, accepted is BlockLayout"),
        ({"layout": BlockLayout((7, 6))}, r"q has 14 tokens, layout has 13 \(2 blocks of \(7, 6\)\)"),
        ({"mask": "full"}, r"mask is 'full', accepted are 'causal', 'diagonal', 'window', 'anchor'"),
        ({"mask": None}, r"mask is None, accepted are"),
    ],
)
def test_bad_arguments_are_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match="^block_attention: " + message):
        block_attention(**{**_GOOD, "layout": RAGGED, **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"block": 4}, r"block is 4, layout has blocks 0\.\.3"),
        ({"block": -1}, r"block is -1, layout has blocks 0\.\.3"),
        ({"block": 1.0}, r"block is 1\.0, layout has blocks 0\.\.3"),
        ({"block": 1}, r"q has 6 tokens, the block has 1"),
        ({"k_cache": _GOOD["k"][:, :13]}, r"k_cache has 13 tokens, layout has 14"),
        ({"v_cache": _GOOD["v"].half()}, r"v_cache is torch.float16 on cpu, q is torch.float32"),
        ({"layout": [3, 1, 6, 4]}, r"layout is list, accepted is BlockLayout"),
        ({"mask": "full"}, r"mask is 'full'"),
        ({"scale": torch.inf}, r"scale is inf, accepted is a finite number$"),
    ],
)
def test_bad_cached_arguments_are_named(change: dict[str, Any], message: str) -> None:
    good = {"q": _GOOD["q"][:, RAGGED.slice(2)], "k_cache": _GOOD["k"], "v_cache": _GOOD["v"], "block": 2}
    with pytest.raises(ValueError, match="^cached_block_attention: " + message):
        cached_block_attention(**{**good, "layout": RAGGED, **change})


@pytest.mark.parametrize("dynamic", [None, True])
def test_compiled_attention_follows_the_layout(dynamic: bool | None) -> None:
    """A second layout, or dynamic shapes: its lengths are then no constants of the graph."""
    torch.compiler.reset()

    def twice(x: Tensor, layout: BlockLayout) -> Tensor:
        return block_attention(x, x * 2, x + 1, layout, "window")

    compiled = torch.compile(twice, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for layout in (BlockLayout.uniform(2, 8), BlockLayout.uniform(2, 12), BlockLayout((3, 5, 4))):
        x = torch.randn(2, layout.total, 2, 16)
        leaves = [x.clone().requires_grad_() for _ in range(2)]
        got, wanted = compiled(leaves[0], layout), twice(leaves[1], layout)
        torch.testing.assert_close(got, wanted)
        for out in (got, wanted):
            out.square().sum().backward()  # type: ignore[no-untyped-call]
        torch.testing.assert_close(leaves[0].grad, leaves[1].grad)


def test_compiled_attention_is_not_compiled_for_every_layout() -> None:
    """A training on images of many sizes: one graph for the first layout, one for all others."""
    torch.compiler.reset()
    counter = CompileCounter()

    def own(x: Tensor, layout: BlockLayout) -> Tensor:
        return block_attention(x, x, x, layout) * 2

    compiled = torch.compile(own, fullgraph=True, backend=counter)
    for length in range(4, 16):
        layout = BlockLayout.uniform(3, length)
        x = normal(2, layout.total, 2, 16)
        assert torch.equal(compiled(x, layout), own(x, layout))
    assert counter.frame_count == 2
    for length in range(4, 16):
        compiled(normal(2, length + 4, 2, 16), BlockLayout((1, length, 3)))
    assert counter.frame_count <= 4


def _restrided(x: Tensor) -> Tensor:
    """The same values, with the last dimension but one moving fastest."""
    return x.transpose(-1, -2).contiguous().transpose(-1, -2)


def test_hooks_may_give_saved_tensors_other_strides(backend: str) -> None:
    """As one that keeps them elsewhere, and does not care, may."""
    batch, heads = _batch(backend)
    inputs = _qkv(RAGGED, batch, heads + 1, 16, torch.float32).unbind(2)
    dout = normal(*inputs[0].shape, seed=1)
    expected = _run(block_attention, inputs, dout, RAGGED)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x, _restrided):
        got = _run(block_attention, inputs, dout, RAGGED)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)  # PyTorch's own sums have another order


def test_a_second_derivative_is_refused_by_name() -> None:
    q, k, v = (x.requires_grad_() for x in _qkv(RAGGED, 1, 1, 16, torch.float32).unbind(2))
    (dq,) = torch.autograd.grad(block_attention(q, k, v, RAGGED).square().sum(), q, create_graph=True)
    message = r"block_attention: is differentiated twice, accepted is once; ard_kernels\.reference\.block_at"
    with pytest.raises(NotImplementedError, match=message):
        dq.sum().backward()  # type: ignore[no-untyped-call]

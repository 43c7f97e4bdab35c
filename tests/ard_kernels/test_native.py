"""What is particular to the compiled kernels: instruction sets, threads, forks, strides, alignment."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from variants import gradients, normal, packed_qkv

from ard_kernels import (
    BlockLayout,
    block_attention,
    cached_block_attention,
    gated_residual_adaln,
    gelu,
    reference,
)
from ard_kernels.backends import native
from ard_kernels.layout import MASKS

pytestmark = pytest.mark.usefixtures("compiled")

_RAGGED = BlockLayout((70, 3, 130))
_DTYPES = (torch.float32, torch.bfloat16)


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def _attention(layout: BlockLayout, mask: str, dtype: torch.dtype, dim: int = 40) -> list[Tensor]:
    leaves = [x.requires_grad_() for x in normal(3, 2, layout.total, 3, dim, dtype=dtype).unbind(0)]
    return gradients(block_attention(*leaves, layout, mask), *leaves)


def _adaln(operator: Callable[..., tuple[Tensor, ...]], inputs: tuple[Tensor, ...]) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = operator(*leaves, _RAGGED)
    douts = [normal(*x.shape, dtype=torch.bfloat16, seed=9).to(x.dtype) for x in out]
    return [*(x.detach() for x in out), *torch.autograd.grad(out, leaves, douts)]


def _adaln_inputs(dtype: torch.dtype, table_dtype: torch.dtype, width: int) -> tuple[Tensor, ...]:
    x, branch = normal(2, 2, _RAGGED.total, width, dtype=dtype)
    return x, branch, *normal(2, _RAGGED.blocks, 3, width, dtype=table_dtype, seed=1).unbind(2)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("dtype", _DTYPES, ids=str)
def test_attention_of_every_instruction_set(
    assert_accurate: Callable[..., None], dtype: torch.dtype, mask: str
) -> None:
    inputs = normal(3, 2, _RAGGED.total, 3, 40, dtype=dtype).unbind(0)
    results = []
    for attend, kind in (
        (block_attention, dtype),
        (reference.block_attention, torch.float64),
        (reference.block_attention, dtype),
    ):
        leaves = [x.to(kind).requires_grad_() for x in inputs]
        results.append(gradients(attend(*leaves, _RAGGED, mask), *leaves))
    assert_accurate(*results, 24.0 if dtype == torch.float32 else 3.0)


@pytest.mark.parametrize("width", [5, 24, 100, 1152])
@pytest.mark.parametrize("table_dtype", _DTYPES, ids=str)
@pytest.mark.parametrize("dtype", _DTYPES, ids=str)
def test_adaln_of_every_instruction_set(
    assert_accurate: Callable[..., None], dtype: torch.dtype, table_dtype: torch.dtype, width: int
) -> None:
    """Widths below a vector, with a remainder, and of DiT-XL."""
    inputs = _adaln_inputs(dtype, table_dtype, width)
    got = _adaln(gated_residual_adaln, inputs)
    exact = _adaln(reference.gated_residual_adaln, tuple(x.double() for x in inputs))
    plain = _adaln(reference.gated_residual_adaln, inputs)
    plain = [x.to(y.dtype) for x, y in zip(plain, got, strict=True)]
    assert_accurate(got, exact, plain, 6.0, stored=dtype)


def _gelu(operator: Callable[[Tensor], Tensor], x: Tensor) -> list[Tensor]:
    leaf = x.detach().requires_grad_()
    return gradients(operator(leaf), leaf)


@pytest.mark.parametrize("dtype", _DTYPES, ids=str)
def test_gelu_of_every_instruction_set(assert_accurate: Callable[..., None], dtype: torch.dtype) -> None:
    """More than a thread's unit, with a remainder of a vector."""
    x = 3 * normal(40_003, dtype=dtype)
    got, exact, plain = _gelu(gelu, x), _gelu(reference.gelu, x.double()), _gelu(reference.gelu, x)
    assert_accurate(got, exact, plain, 3.0)


@settings(max_examples=20)
@given(offset=st.integers(0, 9), count=st.integers(1, 70), dtype=st.sampled_from(_DTYPES))
def test_gelu_at_any_alignment(offset: int, count: int, dtype: torch.dtype) -> None:
    memory = normal(offset + count + 9, dtype=dtype)
    before, view = memory.clone(), memory[offset : offset + count]
    assert all(torch.equal(a, b) for a, b in zip(_gelu(gelu, view), _gelu(gelu, view.clone()), strict=True))
    assert torch.equal(memory, before)


@pytest.mark.parametrize("dtype", _DTYPES, ids=str)
def test_results_do_not_depend_on_the_number_of_threads(
    threads: Callable[[int], None], dtype: torch.dtype
) -> None:
    results = []
    for count in (1, 2, 5):
        threads(count)
        modulated = _adaln(gated_residual_adaln, _adaln_inputs(dtype, dtype, 72))
        activated = _gelu(gelu, normal(40_003, dtype=dtype))
        results.append([*_attention(_RAGGED, "causal", dtype), *modulated, *activated])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("dtype", _DTYPES, ids=str)
def test_many_samples_are_each_one_of_them(threads: Callable[[int], None], dtype: torch.dtype) -> None:
    """From 16 samples a thread on, a thread takes all heads of a sample: bits are those of a sample alone."""
    threads(2)
    layout = BlockLayout((20, 3))
    inputs = normal(4, 33, layout.total, 3, 24, dtype=dtype).unbind(0)

    def run(*tensors: Tensor) -> list[Tensor]:
        *leaves, dout = (x.detach().requires_grad_() for x in tensors)
        out = block_attention(*leaves, layout)
        return [out.detach(), *torch.autograd.grad(out, leaves, dout)]

    alone = [run(*(x[b : b + 1] for x in inputs)) for b in range(33)]
    for whole, parts in zip(run(*inputs), zip(*alone, strict=True), strict=True):
        assert torch.equal(whole, torch.cat(parts))


def test_a_forked_process_computes_the_same(threads: Callable[[int], None]) -> None:
    """Threads do not survive a fork: waiting for them would hang a data loader's worker."""
    threads(2)
    inputs = packed_qkv(_RAGGED.total, 24).unbind(2)
    expected = block_attention(*inputs, _RAGGED)
    child = os.fork()
    if child == 0:
        os._exit(0 if torch.equal(block_attention(*inputs, _RAGGED), expected) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@settings(max_examples=20)
@given(
    offset=st.integers(0, 9), gap=st.integers(0, 5), dim=st.integers(1, 150), dtype=st.sampled_from(_DTYPES),
    mask=st.sampled_from(MASKS), lengths=st.lists(st.integers(1, 70), min_size=1, max_size=3),
)  # fmt: skip
def test_any_stride_alignment_and_head_dim(
    offset: int, gap: int, dim: int, dtype: torch.dtype, mask: str, lengths: list[int]
) -> None:
    """Views at odd addresses give the bits of contiguous copies, and nothing around them is touched."""
    layout = BlockLayout(lengths)
    memory = normal(layout.total * 3 * 2 * (dim + gap) + offset + gap, dtype=dtype)
    before = memory.clone()
    rows = memory[offset : offset + layout.total * 3 * 2 * (dim + gap)]
    q, k, v = rows.view(1, layout.total, 3, 2, dim + gap)[..., :dim].unbind(2)
    results = []
    for inputs in ((q, k, v), tuple(x.contiguous() for x in (q, k, v))):
        leaves = [x.detach().requires_grad_() for x in inputs]
        results.append(gradients(block_attention(*leaves, layout, mask), *leaves))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert torch.equal(memory, before)


def _placed(x: Tensor, offset: int, gap: int) -> Tensor:
    """The same numbers from an odd address on, rows `gap` numbers apart; NaN around them."""
    memory = x.new_full((offset + x[..., 0].numel() * (x.shape[-1] + gap),), float("nan"))
    placed = memory[offset:].view(*x.shape[:-1], -1)[..., : x.shape[-1]]
    placed.copy_(x)
    return placed


@settings(max_examples=20)
@given(
    offset=st.integers(0, 9), gap=st.integers(0, 5), width=st.integers(1, 150),
    dtype=st.sampled_from(_DTYPES), table_dtype=st.sampled_from(_DTYPES),
    lengths=st.lists(st.integers(1, 70), min_size=1, max_size=3),
)  # fmt: skip
def test_adaln_at_any_stride_alignment_and_width(
    offset: int, gap: int, width: int, dtype: torch.dtype, table_dtype: torch.dtype, lengths: list[int]
) -> None:
    """Views at odd addresses give the bits of contiguous tensors."""
    layout, results = BlockLayout(lengths), []
    plain = [*normal(2, 2, layout.total, width, dtype=dtype).unbind(0),
             *normal(3, 2, layout.blocks, width, dtype=table_dtype, seed=1).unbind(0)]  # fmt: skip
    douts = normal(2, 2, layout.total, width, dtype=dtype, seed=2).unbind(0)
    for place in (lambda x: x, lambda x: _placed(x, offset, gap)):
        leaves = [place(x.clone()).detach().requires_grad_() for x in plain]
        out = gated_residual_adaln(*leaves, layout)
        found = torch.autograd.grad(out, leaves, [place(d.clone()) for d in douts])
        results.append([*(x.detach() for x in out), *found])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_a_cached_step_is_the_rows_of_the_whole() -> None:
    q, k, v = packed_qkv(_RAGGED.total, 72, torch.bfloat16, heads=2).unbind(2)
    whole = block_attention(q, k, v, _RAGGED)
    for block in range(_RAGGED.blocks):
        rows = _RAGGED.slice(block)
        assert torch.equal(cached_block_attention(q[:, rows], k, v, _RAGGED, block), whole[:, rows])


def test_threads_are_those_of_pytorch() -> None:
    assert native.C is not None
    assert native.C.threaded()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_activations_are_those_of_their_samples(dtype: torch.dtype) -> None:
    """Results of 32 MiB and more are stored past the caches, those of one sample are not: the same bits."""
    layout, width = BlockLayout((512, 511)), 1152
    batch = 8 if dtype == torch.bfloat16 else 4
    x, branch, dx, dy = torch.randn(4, batch, layout.total, width).to(dtype)
    tables = torch.randn(3, batch, 2, width).to(dtype)

    def run(some: slice) -> list[Tensor]:
        leaves = [t[some].clone().requires_grad_() for t in (x, branch, *tables)]
        out = gated_residual_adaln(*leaves, layout)
        return [*out, *torch.autograd.grad(out, leaves, (dx[some], dy[some]))]

    whole = run(slice(None))
    assert whole[0].numel() * whole[0].element_size() * 2 >= 32 << 20
    for sample in (0, batch - 1):
        for all_, one in zip(whole, run(slice(sample, sample + 1)), strict=True):
            assert torch.equal(all_[sample : sample + 1], one)

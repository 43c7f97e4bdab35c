"""Where fused attention kernels go wrong: edges of tiles, extreme values, memory that is not aligned."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor
from variants import gradients, packed_qkv, products

from ard_kernels import BlockLayout, block_attention, reference

_UNITS = {torch.float32: 24.0, torch.bfloat16: 3.0}  # as in test_attention.py

pytestmark = pytest.mark.usefixtures("fused")


def _assert_close(a: Tensor, b: Tensor, equal_nan: bool = False) -> None:
    """Elements, in float32."""
    rtol, atol = (1e-4, 1e-5) if products(a.dtype) == a.dtype else (4e-3, 4e-3)
    torch.testing.assert_close(a, b, rtol=rtol, atol=atol, equal_nan=equal_nan)


def _compare(
    assert_accurate: Callable[..., None],
    x: Tensor,
    layout: BlockLayout,
    mask: str,
    scale: float | None = None,
    terms: float | Sequence[float] = 0.0,
) -> None:
    results = []
    meaning = reference.block_attention
    for attend, dtype in ((block_attention, x.dtype), (meaning, torch.float64), (meaning, x.dtype)):
        leaves = [part.detach().to(dtype).requires_grad_() for part in x.unbind(2)]
        results.append(gradients(attend(*leaves, layout, mask, scale), *leaves))
    assert_accurate(*results, _UNITS[x.dtype], products(x.dtype), terms)


@pytest.mark.parametrize(
    ("mask", "lengths"),
    [
        ("causal", (128, 128)),  # whole tiles
        ("causal", (64, 129, 63)),  # rows and keys one over and one under
        ("diagonal", (128, 64)),
        ("window", (65, 128, 127)),
        ("anchor", (128, 64, 64)),
        ("anchor", (70, 1, 130)),
    ],
)
def test_tile_edges(assert_accurate: Callable[..., None], mask: str, lengths: tuple[int, ...]) -> None:
    layout = BlockLayout(lengths)
    _compare(assert_accurate, packed_qkv(layout.total, 72, torch.bfloat16), layout, mask)


@pytest.mark.parametrize("scale", [-0.2, 0.0])
def test_scales_that_are_not_positive(assert_accurate: Callable[..., None], scale: float) -> None:
    _compare(assert_accurate, packed_qkv(9, 24), BlockLayout((3, 6)), "causal", scale)


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("where", ["q", "k", "v"])
def test_infinities_and_nan_propagate(where: str, value: float) -> None:
    """Outputs are finite, infinite and NaN exactly where the reference's are, and equal there."""
    layout = BlockLayout((70, 3))
    tensors = dict(zip("qkv", packed_qkv(layout.total, 24).clone().unbind(2), strict=True))
    tensors[where] = tensors[where].clone()
    tensors[where][0, 5, 0, 7] = value
    got = block_attention(**tensors, layout=layout)
    wanted = reference.block_attention(**tensors, layout=layout)
    _assert_close(got, wanted, equal_nan=True)


def test_rows_with_nothing_but_minus_infinity_so_far() -> None:
    """A first tile of scores -inf leaves no trace once a later tile has a finite one."""
    layout = BlockLayout((140,))
    q, k, v = packed_qkv(layout.total, 16).clone().unbind(2)
    q, k = torch.ones_like(q), k.clone()
    k[:, :128] = float("-inf")
    _assert_close(block_attention(q, k, v, layout), reference.block_attention(q, k, v, layout))


def test_keys_that_are_not_there_weigh_nothing_under_very_low_scores(
    assert_accurate: Callable[..., None],
) -> None:
    """All scores near -100: a missing key's score of 0 would weigh exp(100). dq cancels: keys are alike.

    dq is the sum over 70 keys of weight * (dp - delta) * k / 4, where k is near -5 and dp - delta near 0.028:
    the 0.01 of v times the norm of 16 cosines. It cancels as far as the forward (in delta) and the backward
    have the same weights. Their tiles differ in shape, and the order of a product's sum may follow the shape:
    under OpenBLAS's Haswell kernels a quarter of the scores differ, by 0.7 ulp. An ulp of 400 (q times k) is
    256 epsilons, a quarter of that in the score, and so 64 epsilons of each weight of 1/70.
    """
    x = packed_qkv(70, 16) * 0.01
    x[:, :, 0] += 5
    x[:, :, 1] -= 5
    terms = 0.02
    dq_terms = 64 * (0.028 / 70) * 5 / 4 * 70**0.5  # 70 errors, each of its own sign
    _compare(assert_accurate, x, BlockLayout((70,)), "causal", terms=(terms, dq_terms, terms, terms))


def test_memory_that_cannot_be_loaded_in_vectors() -> None:
    """An odd offset and odd strides are copied first; the bits are those of contiguous tensors."""
    layout = BlockLayout((5, 4))
    packed = packed_qkv(layout.total, 17, torch.bfloat16, heads=2)
    q, k, v = (part[..., 1:] for part in packed.unbind(2))
    assert q.stride(1) % 8
    assert q.data_ptr() % 16
    expected = block_attention(q.contiguous(), k.contiguous(), v.contiguous(), layout)
    assert torch.equal(block_attention(q, k, v, layout), expected)


def test_no_samples() -> None:
    layout = BlockLayout((4,))
    q, k, v = (x[:0].requires_grad_() for x in packed_qkv(4, 16).unbind(2))
    out = block_attention(q, k, v, layout)
    out.sum().backward()
    assert out.shape == q.grad.shape == (0, 4, 1, 16)  # type: ignore[union-attr]

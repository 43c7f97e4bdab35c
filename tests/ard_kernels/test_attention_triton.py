"""What is particular to the Triton kernels: tiles, shares of the keys, extreme values, strides."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from ard_kernels import BlockLayout, block_attention, cached_block_attention, reference
from ard_kernels.backends import attention_triton
from ard_kernels.layout import MASKS

_UNITS = {torch.float32: 24.0, torch.bfloat16: 3.0, torch.float16: 4.0}  # as in test_attention.py


pytestmark = pytest.mark.usefixtures("triton")


def _qkv(tokens: int, dim: int, dtype: torch.dtype = torch.float32, heads: int = 1, seed: int = 0) -> Tensor:
    x = torch.randn(
        1, tokens, 3, heads, dim, generator=torch.Generator("cpu").manual_seed(seed), device="cpu"
    )
    return x.to(torch.get_default_device(), dtype)


def _gradients(out: Tensor, *leaves: Tensor) -> list[Tensor]:
    dout = torch.cos(torch.arange(out.numel(), device=out.device)).view(out.shape).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, leaves, dout)]


def _compare(
    assert_accurate: Callable[..., None],
    x: Tensor,
    layout: BlockLayout,
    mask: str,
    scale: float | None = None,
) -> None:
    results = []
    meaning = reference.block_attention
    for attend, dtype in ((block_attention, x.dtype), (meaning, torch.float64), (meaning, x.dtype)):
        leaves = [part.detach().to(dtype).requires_grad_() for part in x.unbind(2)]
        results.append(_gradients(attend(*leaves, layout, mask, scale), *leaves))
    assert_accurate(*results, _UNITS[x.dtype])


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
    _compare(assert_accurate, _qkv(layout.total, 72, torch.bfloat16), layout, mask)


@pytest.mark.parametrize("scale", [-0.2, 0.0])
def test_scales_that_are_not_positive(assert_accurate: Callable[..., None], scale: float) -> None:
    _compare(assert_accurate, _qkv(9, 24), BlockLayout((3, 6)), "causal", scale)


@pytest.mark.parametrize("mask", MASKS)
def test_keys_in_shares(monkeypatch: pytest.MonkeyPatch, mask: str) -> None:
    """A cached step whose keys are shared out gives what it gives in one go."""
    layout = BlockLayout((200, 136, 140))
    q, k, v = _qkv(layout.total, 72, torch.float16).unbind(2)
    exact = reference.block_attention(q.double(), k.double(), v.double(), layout, mask)
    for block in range(layout.blocks):
        rows = layout.slice(block)
        steps = sum(-(-(b - a) // 64) for a, b in layout.key_ranges(block, mask))
        assert attention_triton._parts(layout, mask, block, 2, 64) == max(1, min(8, steps // 2))
        leaves = [x.clone().requires_grad_() for x in (q[:, rows], k, v)]
        shared = _gradients(cached_block_attention(*leaves, layout, block, mask), *leaves)
        monkeypatch.setattr(attention_triton, "_FILL", 0)
        whole = _gradients(cached_block_attention(*leaves, layout, block, mask), *leaves)
        monkeypatch.undo()
        eps = torch.finfo(torch.float16).eps
        assert (shared[0].double() - exact[:, rows]).abs().max() <= eps * exact.abs().max()
        for a, b in zip(shared, whole, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=2 * eps * max(1.0, float(b.abs().max())))


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("where", ["q", "k", "v"])
def test_infinities_and_nan_propagate(where: str, value: float) -> None:
    """Outputs are finite, infinite and NaN exactly where the reference's are, and equal there."""
    layout = BlockLayout((70, 3))
    tensors = dict(zip("qkv", _qkv(layout.total, 24).clone().unbind(2), strict=True))
    tensors[where] = tensors[where].clone()
    tensors[where][0, 5, 0, 7] = value
    got = block_attention(**tensors, layout=layout)
    wanted = reference.block_attention(**tensors, layout=layout)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5, equal_nan=True)


def test_rows_with_nothing_but_minus_infinity_so_far() -> None:
    """A first tile of scores -inf leaves no trace once a later tile has a finite one."""
    layout = BlockLayout((140,))
    q, k, v = _qkv(layout.total, 16).clone().unbind(2)
    q, k = torch.ones_like(q), k.clone()
    k[:, :128] = float("-inf")
    torch.testing.assert_close(
        block_attention(q, k, v, layout), reference.block_attention(q, k, v, layout), rtol=1e-4, atol=1e-5
    )


def test_keys_that_are_not_there_weigh_nothing_under_very_low_scores(
    assert_accurate: Callable[..., None],
) -> None:
    """All scores near -100: a missing key's score of 0 would weigh exp(100)."""
    x = _qkv(70, 16) * 0.01
    x[:, :, 0] += 5
    x[:, :, 1] -= 5
    _compare(assert_accurate, x, BlockLayout((70,)), "causal")


def test_memory_that_cannot_be_loaded_in_vectors() -> None:
    """An odd offset and odd strides are copied first; the bits are those of contiguous tensors."""
    layout = BlockLayout((5, 4))
    packed = _qkv(layout.total, 17, torch.bfloat16, heads=2)
    q, k, v = (part[..., 1:] for part in packed.unbind(2))
    assert q.stride(1) % 8
    assert q.data_ptr() % 16
    expected = block_attention(q.contiguous(), k.contiguous(), v.contiguous(), layout)
    assert torch.equal(block_attention(q, k, v, layout), expected)


def test_what_it_does_not_take_is_named() -> None:
    layout = BlockLayout((4,))
    with pytest.raises(
        ValueError, match=r"^block_attention: backend 'triton' cannot be used: q is torch.float64"
    ):
        block_attention(*_qkv(4, 16).double().unbind(2), layout)
    torch.set_float32_matmul_precision("highest")
    with pytest.raises(ValueError, match=r"q is float32, whose products tensor cores form in TF32"):
        block_attention(*_qkv(4, 16).unbind(2), layout)
    torch.set_float32_matmul_precision("high")
    with pytest.raises(
        ValueError, match=r"cannot be used: head dim is 12, accepted are 16 to 128 in steps of 8"
    ):
        block_attention(*_qkv(4, 12).unbind(2), layout)


def test_no_samples() -> None:
    layout = BlockLayout((4,))
    q, k, v = (x[:0].requires_grad_() for x in _qkv(4, 16).unbind(2))
    out = block_attention(q, k, v, layout)
    out.sum().backward()
    assert out.shape == q.grad.shape == (0, 4, 1, 16)  # type: ignore[union-attr]

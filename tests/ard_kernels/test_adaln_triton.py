"""What is particular to the Triton kernels of the adaLN family: launches, and what they refuse."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from test_adaln import _OURS, LAYOUTS, NAMES, RAGGED, _check, _inputs, _run

from ard_kernels import BlockLayout, use_backend
from ard_kernels.backends import adaln_triton

pytestmark = pytest.mark.usefixtures("triton")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_rows_a_program_takes_do_not_matter(
    monkeypatch: pytest.MonkeyPatch, layout: BlockLayout, name: str
) -> None:
    """Programs take several rows from 8,192 on, too many for the interpreter."""
    inputs = _inputs(name, layout, 2, 24, torch.bfloat16, torch.bfloat16)
    one = _run(_OURS[name], inputs, layout)
    monkeypatch.setattr(adaln_triton, "_rows", lambda samples, tokens: 4)
    four = _run(_OURS[name], inputs, layout)
    assert all(torch.equal(a, b) for a, b in zip(one, four, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("blocks", [4, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_training_size(
    assert_accurate: Callable[..., None], backend: str, dtype: torch.dtype, blocks: int, name: str
) -> None:
    """DiT-XL at 1024 tokens and more, a GPU's size; two runs agree bitwise."""
    layout = BlockLayout.uniform(blocks=blocks, length=256)
    inputs = _inputs(name, layout, 4, 1152, dtype, dtype)  # drawn on the CPU
    with use_backend(backend):
        _check(assert_accurate, name, inputs, layout)
        first, second = _run(_OURS[name], inputs, layout), _run(_OURS[name], inputs, layout)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize(
    ("dtype", "width", "message"),
    [
        (torch.float64, 16, "a tensor is torch.float64"),
        (torch.float32, 4097, "D is 4097, accepted are 1 to 4096"),
    ],
    ids=["float64", "wide"],
)
def test_what_it_does_not_take_is_named(dtype: torch.dtype, width: int, message: str) -> None:
    for name in NAMES:
        inputs = _inputs(name, RAGGED, 1, width, torch.float32, dtype)
        with pytest.raises(ValueError, match=f"^{name}: backend 'triton' cannot be used: {message}"):
            _OURS[name](*inputs, RAGGED)

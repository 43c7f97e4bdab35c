"""What is particular to the Triton kernels of the adaLN family: launches, and what they refuse."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_adaln import _OURS, LAYOUTS, NAMES, RAGGED, _check, _inputs, _run

from ard_kernels import BlockLayout, use_backend
from ard_kernels.backends import adaln_triton

pytestmark = pytest.mark.usefixtures("triton")

VAR = BlockLayout(side * side for side in (1, 2, 3, 4, 5, 6, 8, 10, 13, 16))
ONE_LONG = BlockLayout((*[1] * 4096, 4096))


class _Counted:
    """A kernel that notes how many programs it is launched with, and launches them if it `works`."""

    def __init__(self, kernel: Any, works: bool) -> None:
        self.kernel, self.works, self.programs = kernel, works, 0

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        self.programs += grid[0]
        return self.kernel[grid] if self.works else lambda *arguments, **options: None


def _count(monkeypatch: pytest.MonkeyPatch, works: bool) -> tuple[_Counted, _Counted]:
    """The forward and the backward, counted from here on."""
    kernels = {name: getattr(adaln_triton, f"_{name}_kernel") for name in ("forward", "backward", "finalize")}
    counted = {name: _Counted(kernel, works) for name, kernel in kernels.items()}
    for name, kernel in counted.items():
        monkeypatch.setattr(adaln_triton, f"_{name}_kernel", kernel)
    return counted["forward"], counted["backward"]


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


@pytest.mark.parametrize("name", NAMES)
def test_unequal_blocks_have_no_empty_programs(
    monkeypatch: pytest.MonkeyPatch, assert_accurate: Callable[..., None], name: str
) -> None:
    """And all that they need: blocks of one program and of many, in two samples."""
    layout = BlockLayout((1, 4, 9, 36))
    monkeypatch.setattr(adaln_triton, "_rows", lambda samples, tokens: 4)
    forward, backward = _count(monkeypatch, works=True)
    inputs = _inputs(name, layout, 2, 16, torch.float32, torch.float32)
    _check(assert_accurate, name, inputs, layout)
    assert forward.programs == 2 * sum(-(-length // 4) for length in layout.lengths)
    assert backward.programs == 2 * sum(-(-length // 8) for length in layout.lengths)


@pytest.mark.parametrize(
    ("layout", "in_forward", "in_backward"),
    [(VAR, 32 * 173, 32 * 47), (ONE_LONG, 32 * (4096 + 1024), 32 * (4096 + 16))],
    ids=["VAR", "one long"],
)
def test_programs_of_a_training_batch(
    monkeypatch: pytest.MonkeyPatch, layout: BlockLayout, in_forward: int, in_backward: int
) -> None:
    """Of 4 rows in the forward, and of 16 and 256 in the backward, which has memory for the sums of each."""
    forward, backward = _count(monkeypatch, works=False)
    _run(_OURS["adaln"], _inputs("adaln", layout, 32, 1, torch.float32, torch.float32), layout)
    assert (forward.programs, backward.programs) == (in_forward, in_backward)


@given(lengths=st.lists(st.integers(1, 300), min_size=2, max_size=5), rows=st.sampled_from([1, 3, 4, 8, 256]))
def test_unequal_blocks_are_dealt_out_once(lengths: list[int], rows: int) -> None:
    """Every row to one program, of its block, and to no program more than it may have or none."""
    layout = BlockLayout(lengths)
    cut = adaln_triton._cut(layout, rows, torch.device("cpu"))
    seen = []
    for i, (block, *part) in enumerate(cut.parts.tolist()):
        assert cut.firsts[block] <= i < cut.firsts[block + 1]
        assert 1 <= len(range(*part)) <= rows
        seen += [(block, row) for row in range(*part)]
    assert cut.count == len(cut.parts) == cut.firsts[-1]
    assert sorted(seen) == list(zip(layout.block_ids("cpu").tolist(), range(layout.total), strict=True))


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

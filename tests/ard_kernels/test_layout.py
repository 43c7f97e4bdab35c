"""BlockLayout against definitions that share no code with it."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ard_kernels import BlockLayout
from ard_kernels.layout import MASKS

_SEES = {
    "causal": lambda i, j: j <= i,
    "diagonal": lambda i, j: j == i,
    "window": lambda i, j: j in (i - 1, i),
    "anchor": lambda i, j: j in (0, i),
}

_lengths = st.lists(st.integers(1, 6), min_size=1, max_size=6)


def _blocks_of_tokens(lengths: list[int]) -> list[int]:
    return [s for s, n in enumerate(lengths) for _ in range(n)]


def test_masks_are_the_four_that_are_defined() -> None:
    assert set(MASKS) == set(_SEES)


@pytest.mark.parametrize("mask", MASKS)
@given(lengths=_lengths)
def test_mask_is_its_definition(mask: str, lengths: list[int]) -> None:
    owner = _blocks_of_tokens(lengths)
    expected = [[_SEES[mask](i, j) for j in owner] for i in owner]
    assert BlockLayout(lengths).mask(mask).tolist() == expected


@pytest.mark.parametrize("mask", MASKS)
@given(lengths=_lengths)
def test_key_ranges_and_area_describe_the_mask(mask: str, lengths: list[int]) -> None:
    layout = BlockLayout(lengths)
    owner = _blocks_of_tokens(lengths)
    areas = []
    for s, length in enumerate(lengths):
        ranges = layout.key_ranges(s, mask)
        keys = [t for start, stop in ranges for t in range(start, stop)]
        assert keys == [t for t, block in enumerate(owner) if _SEES[mask](s, block)]  # ascending and disjoint
        assert len(ranges) <= 2
        assert all(start < stop for start, stop in ranges)
        areas.append(length * len(keys))
        assert layout.area(mask, s) == areas[-1]
    assert layout.area(mask) == sum(areas) == int(layout.mask(mask).sum())


@given(lengths=_lengths)
def test_positions(lengths: list[int]) -> None:
    layout = BlockLayout(lengths)
    owner = _blocks_of_tokens(lengths)
    assert (layout.blocks, layout.total) == (len(lengths), len(owner))
    assert layout.block_ids().tolist() == owner
    assert layout.is_uniform == all(n == lengths[0] for n in lengths)
    for s in range(layout.blocks):
        assert set(owner[layout.slice(s)]) == {s}
        assert len(owner[layout.slice(s)]) == lengths[s]
        assert (layout.bounds[s], layout.bounds[s + 1]) == (layout.slice(s).start, layout.slice(s).stop)


@given(lengths=_lengths)
def test_runs_say_the_same_in_short(lengths: list[int]) -> None:
    layout = BlockLayout(lengths)
    pairs = [*zip(layout.runs[::2], layout.runs[1::2], strict=True)]
    assert [n for count, n in pairs for _ in range(count)] == lengths
    assert all(a != b for (_, a), (_, b) in itertools.pairwise(pairs))
    assert BlockLayout.of_runs(layout.runs) == layout
    assert BlockLayout.of_runs(layout.runs).lengths == tuple(lengths)
    assert layout.longest == max(lengths)


def test_a_block_per_token_is_two_numbers() -> None:
    """For the operators, which are given one by one what they get: 4096 of them took 2 ms a call."""
    assert BlockLayout.uniform(4096, 1).runs == (4096, 1)


def test_value_semantics() -> None:
    layout = BlockLayout.uniform(blocks=3, length=2)
    assert layout == BlockLayout(n for n in (2, 2, 2))
    assert hash(layout) == hash(BlockLayout([2, 2, 2]))
    assert layout != BlockLayout((2, 2))
    assert dataclasses.replace(layout, lengths=(1, 4)).bounds == (0, 1, 5)
    with pytest.raises(AttributeError):
        layout.lengths = (1,)  # type: ignore[misc]


@pytest.mark.parametrize("lengths", [(), (0,), (4, -1), (4, 2.0), (True,), ("4",)])
def test_bad_lengths_are_named(lengths: tuple[object, ...]) -> None:
    with pytest.raises(ValueError, match=r"BlockLayout: lengths is .*accepted"):
        BlockLayout(lengths)  # type: ignore[arg-type]


def test_bad_uniform_and_mask_are_named() -> None:
    with pytest.raises(ValueError, match=r"uniform: blocks is 0, accepted"):
        BlockLayout.uniform(blocks=0, length=4)
    with pytest.raises(ValueError, match=r"uniform: blocks is '4', accepted"):
        BlockLayout.uniform(blocks="4", length=4)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"BlockLayout: lengths is 8, accepted"):
        BlockLayout(8)  # type: ignore[arg-type]
    for method in (
        lambda: BlockLayout((2, 2)).area("full"),
        lambda: BlockLayout((2, 2)).key_ranges(1, "full"),
    ):
        with pytest.raises(ValueError, match="mask is 'full', accepted are"):
            method()  # type: ignore[no-untyped-call]
    with pytest.raises(ValueError, match=r"lengths is \(0, 0\), accepted"):
        BlockLayout.uniform(blocks=2, length=0)
    with pytest.raises(
        ValueError, match=r"mask is 'full', accepted are 'causal', 'diagonal', 'window', 'anchor'"
    ):
        BlockLayout((2, 2)).mask("full")  # type: ignore[arg-type]


@pytest.mark.parametrize("block", [-1, 2])
def test_a_block_that_is_not_there_is_named(block: int) -> None:
    """Negative ones are not counted from the end: the tokens of -1 would be none."""
    layout = BlockLayout((3, 4))
    for method in (
        lambda: layout.slice(block),
        lambda: layout.area("causal", block),
        lambda: layout.key_ranges(block, "window"),
    ):
        with pytest.raises(ValueError, match=rf"BlockLayout: block is {block}, accepted are 0\.\.1"):
            method()  # type: ignore[no-untyped-call]


def test_mask_lies_on_the_device_asked_for() -> None:
    assert BlockLayout((2, 3)).block_ids("meta").device == torch.device("meta")

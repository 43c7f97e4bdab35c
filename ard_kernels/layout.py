"""BlockLayout: how a sequence is cut into blocks, and which blocks see which."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import accumulate, chain, groupby, repeat
from numbers import Integral
from typing import Literal, get_args

import torch

Mask = Literal["causal", "diagonal", "window", "anchor"]
MASKS: tuple[Mask, ...] = get_args(Mask)


def check_mask(mask: str, where: str) -> None:
    if not isinstance(mask, str) or mask not in MASKS:
        given = "a Tensor" if isinstance(mask, torch.Tensor) else repr(mask)
        raise ValueError(f"{where}: mask is {given}, accepted are {', '.join(map(repr, MASKS))}")


def described(layout: BlockLayout) -> str:
    """For messages, short where a layout has a block per token."""
    return f"{layout.blocks} blocks of {layout.lengths[0] if layout.is_uniform else layout.lengths}"


def _is_count(n: object) -> bool:
    """An integer >= 1, NumPy's included; True is none."""
    return (type(n) is int or (isinstance(n, Integral) and not isinstance(n, bool))) and int(n) >= 1


@dataclass(frozen=True)
class BlockLayout:
    """A sequence of T = sum(lengths) tokens cut into S = len(lengths) consecutive blocks.

    Masks say which blocks the tokens of block i attend to (all tokens of a visible block are visible):
    ``causal`` blocks 0..i, ``diagonal`` block i, ``window`` blocks i-1 and i, ``anchor`` blocks 0 and i
    (ARD, arXiv 2504.11295, figure 5: M4, M1, M2, M3).
    """

    lengths: tuple[int, ...] = field(compare=False)
    bounds: tuple[int, ...] = field(init=False, repr=False, compare=False)
    """Block s holds the tokens bounds[s]..bounds[s+1]-1."""
    runs: tuple[int, ...] = field(init=False, repr=False)
    """The lengths with equal neighbours counted: (how many, of which length, how many, ...). What operators
    get: two numbers for equal blocks, were it a block per token."""

    def __init__(self, lengths: Iterable[int]) -> None:
        if not isinstance(lengths, Iterable):
            raise ValueError(f"BlockLayout: lengths is {lengths!r}, accepted are integers >= 1, one a block")
        lengths = tuple(lengths)
        if not lengths or not all(_is_count(n) for n in lengths):
            raise ValueError(f"BlockLayout: lengths is {lengths!r}, accepted is one or more int >= 1")
        object.__setattr__(self, "lengths", tuple(int(n) for n in lengths))
        # At once: torch.compile cannot trace the lock in functools.cached_property (Python < 3.12).
        object.__setattr__(self, "bounds", (0, *accumulate(self.lengths)))
        runs = ((len([*run]), n) for n, run in groupby(self.lengths))
        object.__setattr__(self, "runs", tuple(chain.from_iterable(runs)))

    @classmethod
    def of_runs(cls, runs: Iterable[int]) -> BlockLayout:
        """The layout that has these `runs`; made once."""
        return _of_runs(tuple(int(n) for n in runs))  # torch.compile may take them for variables

    @classmethod
    def uniform(cls, blocks: int, length: int) -> BlockLayout:
        """`blocks` blocks of `length` tokens each."""
        if not _is_count(blocks):
            raise ValueError(f"BlockLayout.uniform: blocks is {blocks!r}, accepted is an integer >= 1")
        return cls((length,) * blocks)

    @property
    def blocks(self) -> int:
        return len(self.lengths)

    @property
    def total(self) -> int:
        return self.bounds[-1]

    @property
    def is_uniform(self) -> bool:
        return len(self.runs) == 2

    @property
    def longest(self) -> int:
        return max(self.runs[1::2])

    def _check(self, block: int) -> None:
        if not 0 <= block < self.blocks:
            raise ValueError(f"BlockLayout: block is {block}, accepted are 0..{self.blocks - 1}")

    def slice(self, block: int) -> slice:
        """The tokens of one block."""
        self._check(block)
        return slice(self.bounds[block], self.bounds[block + 1])

    def key_ranges(self, block: int, mask: Mask) -> tuple[tuple[int, int], ...]:
        """The (start, stop) ranges of keys that `block` attends to: ascending, disjoint, at most two."""
        check_mask(mask, "BlockLayout")
        self._check(block)
        start, stop = self.bounds[block], self.bounds[block + 1]
        if mask == "causal":
            return ((0, stop),)
        if mask == "window":
            return ((self.bounds[max(block - 1, 0)], stop),)
        if mask == "anchor" and block > 1:
            return ((0, self.bounds[1]), (start, stop))
        return ((0, stop),) if mask == "anchor" else ((start, stop),)

    def area(self, mask: Mask, block: int | None = None) -> int:
        """Number of visible (query, key) pairs, of one block or of all."""
        chosen = range(self.blocks) if block is None else (block,)
        return sum(sum(b - a for a, b in self.key_ranges(s, mask)) * self.lengths[s] for s in chosen)

    def block_ids(self, device: torch.device | str | None = None) -> torch.Tensor:
        """(T,) int64: the block of every token."""
        lengths = torch.tensor(self.lengths, device=device)
        return torch.repeat_interleave(
            torch.arange(self.blocks, device=device), lengths, output_size=self.total
        )

    def mask(self, mask: Mask, device: torch.device | str | None = None) -> torch.Tensor:
        """Dense bool (T, T), True where the row's token may attend to the column's. To test and to read."""
        visible = torch.zeros(self.total, self.total, dtype=torch.bool, device=device)
        for s in range(self.blocks):
            for start, stop in self.key_ranges(s, mask):
                visible[self.slice(s), start:stop] = True
        return visible


@lru_cache(maxsize=1024)
def _of_runs(runs: tuple[int, ...]) -> BlockLayout:
    counts, lengths = runs[::2], runs[1::2]
    return BlockLayout(chain.from_iterable(map(repeat, lengths, counts)))

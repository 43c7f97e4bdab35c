"""What the kernels are meant to reach on an H200, and what a run of the suite says of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.suite import adaln, attention
from benchmarks.suite.record import best_of

Rows = Sequence[dict[str, Any]]


@dataclass(frozen=True)
class Demand:
    what: str
    wanted: float
    measured: float | None
    """None: not measured."""
    unit: str
    least: bool = True
    """`wanted` is the least, else the most."""
    note: str = ""

    @property
    def answer(self) -> str:
        if self.measured is None:
            return "not measured"
        met = self.measured >= self.wanted if self.least else self.measured <= self.wanted
        return "yes" if met else "NO"


def demands(families: dict[str, Rows], sections: dict[str, Any]) -> list[Demand]:
    """Of rows by family of sections, "attention" and so on, and of the sections themselves."""
    rows = {name: families.get(name, ()) for name in ("attention", "adaln", "training", "sampling")}
    return [
        *_correctness(sections.get("correctness")),
        *_attention(rows["attention"]),
        *_adaln(rows["adaln"]),
        *_training(rows["training"]),
        *_sampling(rows["sampling"]),
    ]


def _correctness(section: dict[str, Any] | None) -> Iterator[Demand]:
    right = None
    if section is not None and section["total"]:
        right = 100 * (section["done"] - len(section["failures"])) / section["total"]
    yield Demand("checks that passed, of all", 100, right, " %")


def _attention(rows: Rows) -> Iterator[Demand]:
    for shape in attention.shapes(quick=False):
        length = shape.layout.lengths[0]
        what = f"causal attention, head dim {shape.dim}, L = {length}"
        mine = [row for row in rows if (row["label"], row["mask"]) == (str(shape), "causal")]
        found = next((r for r in best_of(mine) if r["phase"] == "forward + backward"), None)
        yield Demand(
            f"{what}, forward + backward, to the best peer",
            1.2 if length == 4096 else 1.5,
            found["ratio"] if found else None,
            "x",
            note=_untimed(found),
        )
        for phase, goal in (("forward", 400), ("backward", 320)) if length >= 1024 else ():
            rates = [r["times"][r["ours"]]["tflops"] for r in mine if r["phase"] == phase and r["ours"]]
            yield Demand(f"{what}, {phase} (goal)", goal, max(rates, default=None), " TFLOP/s")


def _untimed(row: dict[str, Any] | None) -> str:
    return f"not timed: {', '.join(row['untimed'])}" if row and row["untimed"] else ""


def _adaln(rows: Rows) -> Iterator[Demand]:
    shape = adaln.shapes(quick=False)[0]
    mine = [row for row in rows if row["label"] == str(shape) and row["ours"]]
    for phase, wanted in (("forward", 90), ("backward", 85)):
        shares = [row["times"][row["ours"]]["percent"] for row in mine if row["phase"] == phase]
        best = max((share for share in shares if share is not None), default=None)
        yield Demand(f"adaLN {shape}, {phase}, of a copy", wanted, best, " %")
    ratios = {
        name: row["times"][name]["ms"] / row["times"][row["ours"]]["ms"]
        for row in mine for name in row["times"]
        if row["phase"] == "backward" and name.startswith("torch.compile")
    }  # fmt: skip
    untimed = [name for name in adaln.PEERS if name.startswith("torch.compile") and name not in ratios]
    note = f"not timed: {', '.join(untimed)}" if ratios and untimed else ""
    yield Demand("adaLN backward, to torch.compile", 1.4, min(ratios.values(), default=None), "x", note=note)


def _training(rows: Rows) -> Iterator[Demand]:
    for compiled in (False, True):
        speed = {(row["side"], row["batch"]): row for row in rows if row["compiled"] == compiled}
        ratios = [row["samples_per_second"] / speed["baseline", batch]["samples_per_second"]
                  for (side, batch), row in speed.items()
                  if side == "ours" and ("baseline", batch) in speed]  # fmt: skip
        shares = [row["utilisation"] for (side, _), row in speed.items() if side == "ours"]
        used = max((share for share in shares if share is not None), default=None)
        what = f"training step{', torch.compile' if compiled else ''}"
        yield Demand(f"{what}, to the straightforward one", 2.5, max(ratios, default=None), "x")
        yield Demand(f"{what}, of the matmul ceiling", 50, used, " %")


def _sampling(rows: Rows) -> Iterator[Demand]:
    for row in rows:
        what = f"sampling, batch {row['batch']}, {row['kind']}: what history costs"
        yield Demand(what, 1.5, max(row["overhead_percent"]), " %", least=False)
    if not rows:
        yield Demand("sampling: what history costs", 1.5, None, " %", least=False)

"""What a section of the suite finds, on disk after every row, and the time that it has left."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

import ard_kernels
from ard_kernels.backends import PREFERRED, implementations
from benchmarks.common import write_json
from benchmarks.suite.timing import Prepare, measure

T = TypeVar("T")


@dataclass(frozen=True)
class Settings:
    """What every section is told."""

    device: str
    """"cuda" or "cpu"."""
    quick: bool
    """Tiny shapes: to see that everything runs."""
    ceilings: dict[str, float] = field(default_factory=dict)
    """"copy" in GB/s, read and written; "matmul" in TFLOP/s. Empty until measured."""
    share: tuple[int, int] = (0, 1)
    """Which part of how many, where several processes divide a section."""

    def percent(self, ceiling: str, value: float) -> float | None:
        top = self.ceilings.get(ceiling)
        return 100 * value / top if top else None


class DeviceLostError(RuntimeError):
    """Nothing more can run in this process."""


def device_works(device: str) -> bool:
    try:
        return float(torch.ones(1, device=device).sum()) == 1
    except torch.OutOfMemoryError:
        return True
    except RuntimeError:
        return False


class Recorder:
    """Rows, errors, failures and omissions of one section."""

    def __init__(self, section: str, settings: Settings, path: Path, seconds: float) -> None:
        self.section, self.settings = section, settings
        self.device, self.quick = settings.device, settings.quick
        self._path, self._start, self._end = path, time.monotonic(), time.monotonic() + seconds
        self.rows: list[dict[str, Any]] = []
        self.errors: dict[str, str] = {}
        self.failures: dict[str, str] = {}
        self.omitted: list[str] = []
        self.done, self.total = 0, 0
        """Of the checks that this process has to make."""
        self.doing = ""
        """For the note of a process that had to be stopped, or died."""

    def left(self) -> float:
        """Seconds."""
        return self._end - time.monotonic()

    def say(self, text: str) -> None:
        print(f"[{self.section} {time.monotonic() - self._start:6.1f} s] {text}", flush=True)

    def row(self, line: str, **values: Any) -> None:
        self.rows.append(values)
        self.save()
        self.say(line)

    def error(self, what: str, error: BaseException | str) -> None:
        """Something could not be done, and the rest goes on."""
        self.errors[what] = reason(error)
        self.save()
        self.say(f"{what}: {self.errors[what]}")

    def fail(self, what: str, why: BaseException | str) -> None:
        """A correctness check says no: the run ends with an exit code that is not zero."""
        self.failures[what] = reason(why)
        self.save()
        self.say(f"FAILED {what}: {self.failures[what]}")

    def omit(self, what: str) -> None:
        self.omitted.append(what)
        self.save()
        self.say(f"{what}: no time left")

    def attempt(self, what: str, run: Callable[[], T], needs: float = 0.0, ours: bool = False) -> T | None:
        """The result of `run`; None where fewer than `needs` seconds are left or it raised, which for our own
        kernels is a failure."""
        if self.left() < needs:
            self.omit(what)
            return None
        around, self.doing = self.doing, what
        self.save()
        try:
            return run()
        except DeviceLostError:
            raise
        except Exception as error:  # peers fail in any way they like
            (self.fail if ours else self.error)(what, error)
            if not device_works(self.device):  # else all that follows would count as failures of its own
                raise DeviceLostError(f"the device was lost in {what}") from error
            return None
        finally:
            self.doing = around

    def measure(self, what: str, candidates: Mapping[str, Prepare]) -> dict[str, dict[str, Any]]:
        """The times of all by name, in turn; one that cannot be timed alone is left out."""
        able = {
            name: prepare for name, prepare in candidates.items()
            if self.attempt(f"{what} {name}, timed", partial(measure, {name: prepare}, self.device, 1),
                            ours=name.startswith("ours")) is not None
        }  # fmt: skip
        times = self.attempt(what, partial(measure, able, self.device)) or {}
        return {name: asdict(time) for name, time in times.items()}

    def save(self) -> None:
        write_json(self._path, {"rows": self.rows, "errors": self.errors, "failures": self.failures,
                                "omitted": self.omitted, "done": self.done, "total": self.total,
                                "doing": self.doing})  # fmt: skip


def compared(
    rec: Recorder, where: str, times: dict[str, dict[str, Any]], peers: Iterable[str], phases: Iterable[str]
) -> dict[str, Any]:
    """What a row says of times by method: the one of ours that is chosen by default, the best peer and its
    ratio; and which of all `peers` it has no time of, because they `failed` in one of the phases or are
    `missing`: not tried here, or without time."""
    ours = next((name for name in times if name.startswith("ours")), None)
    others = [name for name in times if not name.startswith("ours")]
    best = min(others, key=lambda name: times[name]["ms"], default=None)
    untimed = [name for name in peers if name not in times]
    keys = ("{0} {1}", "{0} {1} {2}", "{0} {2} {1}, timed")
    tried = {name: [key.format(where, name, phase) for key in keys for phase in phases] for name in untimed}
    failed = [name for name in untimed if any(what in rec.errors for what in tried[name])]
    return {
        "times": times,
        "ours": ours,
        "best_peer": best,
        "ratio": times[best]["ms"] / times[ours]["ms"] if best and ours else None,
        "failed": failed,
        "missing": [name for name in untimed if name not in failed],
    }


def best_of(rows: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Of rows about the same shape, mask and phase, the one whose peer comes closest: a row's ratio compares
    times that were taken in alternation. Besides, how many peers were `timed` in these rows, and which are
    `untimed` that are not known to fail: one of these might come closer."""
    alike: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        alike.setdefault((row["label"], row.get("mask"), row["phase"]), []).append(row)
    for same in alike.values():
        rated = [row for row in same if row["ratio"] is not None]
        if rated:
            timed = {name for row in same for name in row["times"] if not name.startswith("ours")}
            untimed = {name for row in same for name in row["missing"]} - timed
            untimed -= {name for row in same for name in row["failed"]}
            closest: dict[str, Any] = min(rated, key=lambda row: float(row["ratio"]))
            yield {**closest, "timed": len(timed), "untimed": sorted(untimed)}


def reason(error: BaseException | str) -> str:
    """One line."""
    if isinstance(error, str):
        return error
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]


def backends(family: str, *tensors: Tensor) -> list[str]:
    """Those that take these inputs of the family, "attention" or "adaln", the one that is chosen first."""
    available = {name for name, status in ard_kernels.backends().items() if status.available}
    found = [name for name, module in implementations(family).items()
             if name in available and module.supports(*tensors) is None]  # fmt: skip
    preferred = PREFERRED[tensors[0].device.type]
    return sorted(found, key=lambda name: (name == "eager", name not in preferred))


@contextlib.contextmanager
def tf32_allowed() -> Iterator[None]:
    """The Triton backend's condition for float32 attention; also a decorator."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def compiled(function: Callable[..., Any], device: str, **options: Any) -> Callable[..., Any]:
    """`torch.compile`, on a CPU without generating code: what the reduced run shows is that it traces."""
    if device == "cpu":
        options = {**options, "mode": None, "backend": "eager"}
    return torch.compile(function, **options)  # type: ignore[no-any-return]

"""Times of GPU work, taken with events while the host runs ahead.

A candidate is a function of i that does what is not timed (with the i-th of its sets of inputs) and returns
what is. Candidates alternate, as in `benchmarks.common.medians`. Before each round of calls the GPU is held
by a sleeping kernel until the host has launched the whole round: what is measured is the kernels' time,
without the gaps between launches. The time of the launches is given beside it.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

Prepare = Callable[[int], Callable[[], object]]

# Cycles of torch.cuda._sleep per second: the highest clock of an H200. At a lower one it sleeps longer.
_CYCLES = 1.98e9

# Seconds. A round has no more calls than the host launches meanwhile; one call that takes the host longer
# counts with the gaps it has.
_LONGEST_SLEEP = 0.05


@dataclass(frozen=True)
class Time:
    """Of one call, medians over the rounds."""

    ms: float
    host_ms: float
    """What the host needs to launch it (on a CPU: the same as `ms`)."""
    spread: float
    """Largest minus smallest round, relative to the median: smaller differences are noise."""


def measure(
    candidates: Mapping[str, Prepare], device: str, rounds: int = 7, seconds: float = 0.02
) -> dict[str, Time]:
    """By name. A round is as many calls as fit in `seconds`, 1 to 50."""
    if not candidates:
        return {}
    measure_round = _cuda_round if device == "cuda" else _cpu_round
    rounds = rounds if device == "cuda" else 3  # a CPU only shows that it runs, perhaps in an interpreter
    plans = {name: _plan(prepare, seconds, device) for name, prepare in candidates.items()}
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in candidates}
    names = list(candidates)
    for i in range(rounds):
        for name in names if i % 2 == 0 else reversed(names):
            taken[name].append(measure_round(candidates[name], *plans[name]))
    return {name: _summary(times) for name, times in taken.items()}


def _summary(rounds: list[tuple[float, float]]) -> Time:
    device, host = (sorted(times) for times in zip(*rounds, strict=True))
    median = statistics.median(device)
    return Time(median, statistics.median(host), (device[-1] - device[0]) / median)


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _plan(prepare: Prepare, seconds: float, device: str) -> tuple[int, float]:
    """The number of calls of a round, and the seconds that the host takes for one."""
    for i in range(2 if device == "cuda" else 0):
        prepare(i)()
    run = prepare(0)
    _wait(device)
    start = time.perf_counter()
    run()
    launched = time.perf_counter() - start
    _wait(device)
    done = time.perf_counter() - start
    calls = min(50, round(seconds / done), int(_LONGEST_SLEEP / (1.5 * launched)))
    return max(1, calls), launched


def _cuda_round(prepare: Prepare, calls: int, launch_seconds: float) -> tuple[float, float]:
    """Milliseconds a call, on the device and on the host."""
    ready = [prepare(i) for i in range(calls)]
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    # Half as long again as the launches took last time.
    torch.cuda._sleep(int(min(1.5 * calls * launch_seconds + 1e-4, _LONGEST_SLEEP) * _CYCLES))
    start.record()
    begin = time.perf_counter()
    for run in ready:
        run()
    host = time.perf_counter() - begin
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / calls, 1e3 * host / calls


def _cpu_round(prepare: Prepare, calls: int, launch_seconds: float) -> tuple[float, float]:
    ready = [prepare(i) for i in range(calls)]
    begin = time.perf_counter()
    for run in ready:
        run()
    each = 1e3 * (time.perf_counter() - begin) / calls
    return each, each


def sets_beyond_cache(device: str, bytes_each: int) -> int:
    """How many sets of inputs, 2 to 32, to rotate among so that none is in the cache when its turn comes."""
    return max(2, min(32, -(-5 * cache_bytes(device) // (2 * bytes_each))))


def cache_bytes(device: str) -> int:
    """Of the GPU's L2; 0 on the CPU, whose share of a cache is not ours to know."""
    return 0 if device == "cpu" else torch.cuda.get_device_properties().L2_cache_size

"""What every benchmark needs: alternating medians, a record of where it ran, and files that are never
half written."""

from __future__ import annotations

import ctypes
import datetime
import json
import os
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from ard_kernels.machine import ROOT, cpu_name, git

RESULTS = ROOT / "benchmarks" / "results"


def synchronize() -> None:
    """Waits for the GPU, if there is one in use."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()


def medians(candidates: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median seconds of one call of each candidate, by name.

    Every candidate runs once unmeasured. Then candidates alternate, one call each per round, the order
    reversed every other round: a slow moment of a shared machine falls on all of them, and none always
    follows the same one.
    """
    for run in candidates.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    names = list(candidates)
    for i in range(repeats):
        for name in names if i % 2 == 0 else reversed(names):
            synchronize()
            start = time.perf_counter()
            candidates[name]()
            synchronize()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(times) for name, times in seconds.items()}


def keep_freed_memory() -> bool:
    """From now on memory that is freed stays with the process; False where the C library is not glibc.

    Otherwise it hangs on what ran before who pays for fresh pages, which can cost more than what is measured:
    attention of matrix products took 16 ms or 35.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    trim_threshold, mmap_max = -1, -4  # glibc's M_TRIM_THRESHOLD and M_MMAP_MAX
    return mallopt is not None and bool(mallopt(trim_threshold, 2**31 - 1)) and bool(mallopt(mmap_max, 0))


def _program() -> list[str]:
    spec = sys.modules["__main__"].__spec__
    return [os.path.relpath(sys.argv[0])] if spec is None else ["-m", spec.name]


def environment() -> dict[str, Any]:
    """The command, the commit (None without git), the machine, the versions and the date: what makes a number
    repeatable."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    # Not of what benchmarks write themselves, one after the other.
    code = (":/", ":!benchmarks/results", ":!docs")
    changes = git("status", "--porcelain", "--untracked-files=no", "--", *code)
    return {
        "command": shlex.join(["python", *_program(), *sys.argv[1:]]),
        "commit": git("rev-parse", "HEAD"),
        "modified": None if changes is None else bool(changes),
        "cpu": cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": gpu,
        "cuda": torch.version.cuda if gpu else None,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def write_json(path: str | Path, payload: Any) -> None:
    """Writes indented JSON under a temporary name beside `path`, then renames. Missing folders are made."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(json.dumps(payload, indent=1) + "\n")
    temporary.replace(path)

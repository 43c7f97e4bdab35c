"""The sections by name, and running one in a process of its own: a kernel that loses the device, a peer that
hangs or a compiler that takes forever ends one section and not the suite."""

from __future__ import annotations

import importlib
import json
import multiprocessing
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.suite.record import Recorder, Settings

# In the order in which they run: where the function is, and the share of the time in seconds of about 520.
SECTIONS = {
    "correctness": ("benchmarks.suite.correctness", 100),
    "ceilings": ("benchmarks.suite.ceilings", 8),
    "attention": ("benchmarks.suite.attention", 160),
    "adaln": ("benchmarks.suite.adaln", 50),
    "training": ("benchmarks.suite.model", 140),
    "sampling": ("benchmarks.suite.model", 62),
}
_MODULES = {**{name: module for name, (module, _) in SECTIONS.items()},
            "sanitizer": "benchmarks.suite.correctness"}  # fmt: skip
_MUST_END = ("correctness", "sanitizer")

# Seconds between the end of a section's time, which it sees itself, and the end of its process.
_GRACE = 20.0

_STOPPED = "was stopped at its time limit"

# Processes that divide the correctness checks: compilation of kernels is what they wait for. With the
# sanitizer's they leave one core of 16.
_PROCESSES = 14


def work(name: str, settings: Settings, path: Path, seconds: float) -> None:
    """One section, or one share of it, in this process."""
    rec = Recorder(name, settings, path, seconds)
    rec.save()
    try:
        getattr(importlib.import_module(_MODULES[name]), name)(rec)
    except Exception as error:
        (rec.fail if name in _MUST_END else rec.error)(name, error)
    rec.save()


def run(
    name: str, settings: Settings, folder: Path, seconds: float, last: float, isolated: bool
) -> dict[str, Any]:
    """Runs a section within `seconds` and returns what it found.

    `isolated`: in a process of its own, which is ended at `last` (time.monotonic) whatever it does.
    """
    start = time.monotonic()
    if not isolated:
        path = folder / f"{name}.json"
        work(name, settings, path, seconds)
        return {**_merged({name: path}, {}), "seconds": time.monotonic() - start}
    # Forked from a process that has imported PyTorch and never touched the GPU.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "triton"])
    jobs = {name: (name, settings)}
    if name == "correctness":
        shares = range(_PROCESSES)
        jobs = {f"{name}-{i}": (name, replace(settings, share=(i, _PROCESSES))) for i in shares}
        jobs["sanitizer"] = ("sanitizer", settings)
    paths = {job: folder / f"{job}.json" for job in jobs}
    processes = {
        job: context.Process(target=work, args=(*arguments, paths[job], seconds), name=job)
        for job, arguments in jobs.items()
    }
    for process in processes.values():
        process.start()
    deadline = min(start + seconds + _GRACE, last)
    ends: dict[str, str] = {}
    for job, process in processes.items():
        process.join(max(deadline - time.monotonic(), 0))
        if process.is_alive():
            process.kill()
            process.join()
            ends[job] = _STOPPED
        elif process.exitcode:
            ends[job] = f"ended with exit code {process.exitcode}"
    return {**_merged(paths, ends), "seconds": time.monotonic() - start}


def _merged(paths: dict[str, Path], ends: dict[str, str]) -> dict[str, Any]:
    """What all processes of a section found."""
    found: dict[str, Any] = {"rows": [], "errors": {}, "failures": {}, "omitted": []}
    doing = {}
    for job, path in paths.items():
        part = json.loads(path.read_text()) if path.exists() else {}
        doing[job] = part.get("doing")
        for key, collected in found.items():
            if isinstance(collected, dict):
                collected.update(part.get(key, {}))
            else:
                collected.extend(part.get(key, []))
        path.unlink(missing_ok=True)
    for job, end in ends.items():
        # What had no time is named, and not wrong; what died may be.
        wrong = job.startswith("correctness") and end != _STOPPED
        found["failures" if wrong else "errors"][f"process {job}"] = (
            f"{end}, in {doing[job]}" if doing[job] else end
        )
    return found

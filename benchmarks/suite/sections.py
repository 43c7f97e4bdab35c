"""The sections by name, and running one in a process of its own: a kernel that loses the device, a peer that
hangs or a compiler that takes forever ends one section and not the suite."""

from __future__ import annotations

import importlib
import json
import multiprocessing
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.suite.record import Recorder, Settings


@dataclass(frozen=True)
class Section:
    module: str
    """That has a function of the section's name."""
    seconds: float
    """Its share of a run's time. Of what is not essential also what it is thought to take: the sum of what
    `Recorder.attempt` is told, and of cuDNN's plans; not measured yet."""
    essential: bool = True
    """Part of a run that names no sections."""


# In the order in which they run.
SECTIONS = {
    "correctness": Section("benchmarks.suite.correctness", 120),
    "ceilings": Section("benchmarks.suite.ceilings", 8),
    "attention": Section("benchmarks.suite.attention", 180),
    "adaln": Section("benchmarks.suite.adaln", 50),
    "training": Section("benchmarks.suite.model", 100),
    "sampling": Section("benchmarks.suite.sampling", 50),
    "training_compiled": Section("benchmarks.suite.model", 160, essential=False),
    "sampling_compiled": Section("benchmarks.suite.sampling", 140, essential=False),
    "adaln_more": Section("benchmarks.suite.adaln", 340, essential=False),
    "attention_tuned": Section("benchmarks.suite.attention", 530, essential=False),
    "attention_sizes": Section("benchmarks.suite.attention", 340, essential=False),
    "attention_masks": Section("benchmarks.suite.attention", 420, essential=False),
    "attention_single": Section("benchmarks.suite.attention", 460, essential=False),
}
_MODULES = {**{name: section.module for name, section in SECTIONS.items()},
            "sanitizer": "benchmarks.suite.correctness"}  # fmt: skip
_MUST_END = ("correctness", "sanitizer")

# Seconds between the end of a section's time, which it sees itself, and the end of its process.
_GRACE = 20.0

# Seconds of the correctness section that are the sanitizer's, or a quarter. It waits until the checks have
# compiled the kernels that it runs.
_SANITIZER = 60.0

_STOPPED = "was stopped at its time limit"

# Processes that divide the correctness checks: compilation of kernels is what they wait for. They leave two
# cores of 16.
_PROCESSES = 14

Job = tuple[str, Settings]
"""The name of a section, and what it is told."""


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

    `isolated`: in processes of its own, which are ended at `last` (time.monotonic) whatever they do.
    """
    start = time.monotonic()
    paths: dict[str, Path] = {}
    ends: dict[str, str] = {}
    for jobs, end in stages(name, settings, seconds):
        paths |= {job: folder / f"{job}.json" for job in jobs}
        left = max(start + end - time.monotonic(), 0)
        if isolated:
            ends |= _side_by_side(jobs, paths, left, last)
        else:
            for job, (section, told) in jobs.items():
                work(section, told, paths[job], left)
    return {**_merged(paths, ends), "seconds": time.monotonic() - start}


def stages(name: str, settings: Settings, seconds: float) -> list[tuple[dict[str, Job], float]]:
    """Jobs that run side by side, one set after the other, and when each set must have ended."""
    if name != "correctness" or settings.device != "cuda":
        return [({name: (name, settings)}, seconds)]
    shares = {
        f"{name}-{i}": (name, replace(settings, share=(i, _PROCESSES))) for i in range(_PROCESSES)
    }  # fmt: skip
    checked = seconds - min(_SANITIZER, seconds / 4)
    return [(shares, checked), ({"sanitizer": ("sanitizer", settings)}, seconds)]


def _side_by_side(
    jobs: dict[str, Job], paths: dict[str, Path], seconds: float, last: float
) -> dict[str, str]:
    """How those ended that did not end well."""
    # Forked from a process that has imported PyTorch and never touched the GPU.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "triton"])
    deadline = min(time.monotonic() + seconds + _GRACE, last)
    processes = {
        job: context.Process(target=work, args=(*arguments, paths[job], seconds), name=job)
        for job, arguments in jobs.items()
    }
    for process in processes.values():
        process.start()
    ends: dict[str, str] = {}
    for job, process in processes.items():
        process.join(max(deadline - time.monotonic(), 0))
        if process.is_alive():
            process.kill()
            process.join()
            ends[job] = _STOPPED
        elif process.exitcode:
            ends[job] = f"ended with exit code {process.exitcode}"
    return ends


def _merged(paths: dict[str, Path], ends: dict[str, str]) -> dict[str, Any]:
    """What all processes of a section found."""
    found: dict[str, Any] = {"rows": [], "errors": {}, "failures": {}, "omitted": [], "done": 0, "total": 0}
    doing = {}
    for job, path in paths.items():
        part = json.loads(path.read_text()) if path.exists() else {}
        doing[job] = part.get("doing")
        for key in found:
            if isinstance(found[key], dict):
                found[key].update(part.get(key, {}))
            else:
                found[key] += part.get(key, type(found[key])())
        path.unlink(missing_ok=True)
    for job, end in ends.items():
        # What dies among the checks has failed, and so has what hangs in one.
        wrong = job.startswith("correctness") and (end != _STOPPED or doing[job])
        found["failures" if wrong else "errors"][f"process {job}"] = (
            f"{end}, in {doing[job]}" if doing[job] else end
        )
    return {**found, "stopped": [job for job, end in ends.items() if end == _STOPPED]}

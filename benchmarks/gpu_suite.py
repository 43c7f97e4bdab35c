"""Checks and times everything on one GPU, in one command that keeps its time.

    python -m benchmarks.gpu_suite --out DIR                    # all of it, within 520 s
    python -m benchmarks.gpu_suite --out DIR --only attention   # one section, with all of the time
    python -m benchmarks.gpu_suite --out DIR --quick            # tiny shapes; what a CPU gets in any case
    python -m benchmarks.gpu_suite --ncu                        # how to profile the kernels

Sections: environment; correctness of every operator on this device; the copy and matmul ceilings; attention
and adaLN against their peers; a DiT-XL/2 training step against the straightforward implementation; sampling
with and without history. DIR/gpu_suite.json and DIR/gpu_suite.md are written after every section. A section
runs in a process of its own, and what fails in it is recorded and does not end the run. What a section has no
time for (peers that are tuned for a minute, compiled samplers) is named, and measured when it runs alone. The
exit code is not zero if a correctness check fails.
"""

from __future__ import annotations

import argparse
import shlex
import shutil
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import ard_kernels
from ard_kernels import BlockLayout
from benchmarks.common import environment, write_json
from benchmarks.suite.record import Settings, backends
from benchmarks.suite.report import markdown, summary
from benchmarks.suite.sections import SECTIONS, run

# Between the end of the time that was asked for and the end of the run, whatever a section does.
_OVERTIME = 10.0

_NCU = (
    "ncu --clock-control none --set full --profile-from-start off --target-processes all --force-overwrite "
    "--export kernels {python} -m benchmarks.gpu_suite --once profile"
)


def main(arguments: list[str] | None = None) -> int:
    """The exit code."""
    started = time.monotonic()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/gpu_suite"), help="folder (%(default)s)")
    parser.add_argument("--seconds", type=float, default=520.0, help="for all of it (%(default)s)")
    parser.add_argument("--quick", action="store_true", help="tiny shapes")
    parser.add_argument("--only", nargs="+", choices=list(SECTIONS), metavar="SECTION",
                        help=f"some of {', '.join(SECTIONS)}")  # fmt: skip
    parser.add_argument("--commit", help="recorded where git cannot tell")
    parser.add_argument("--device", choices=("cuda", "cpu"), default=_best_device())
    parser.add_argument("--ncu", action="store_true", help="print the command that profiles the kernels")
    parser.add_argument("--once", choices=("small", "profile"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.ncu:
        print(_NCU.format(python=sys.executable))
        return 0
    if options.once:
        _once(options.once, options.device)
        return 0

    names = [name for name in SECTIONS if name in _chosen(options.only)]
    settings = Settings(options.device, options.quick or options.device == "cpu")
    results: dict[str, Any] = {
        "environment": _environment(options.commit),
        "options": {"seconds": options.seconds, "quick": settings.quick, "device": options.device},
        "sections": {},
    }
    _write(options.out, results)
    end = started + options.seconds
    for i, name in enumerate(names):
        rest = sum(SECTIONS[other][1] for other in names[i:])
        seconds = max(end - time.monotonic(), 0) * SECTIONS[name][1] / rest
        print(f"{name}: {seconds:.0f} s", flush=True)
        last, isolated = end + _OVERTIME, options.device == "cuda"
        found = run(name, settings, options.out / "parts", seconds, last, isolated)
        results["sections"][name] = found
        if name == "ceilings":
            ceilings = {row["name"]: row["value"] for row in found["rows"]}
            settings = Settings(settings.device, settings.quick, ceilings)
        _write(options.out, results)
    shutil.rmtree(options.out / "parts", ignore_errors=True)
    print(summary(results))
    print(f"{time.monotonic() - started:.0f} s; wrote {options.out / 'gpu_suite.json'} and gpu_suite.md")
    return 1 if any(section["failures"] for section in results["sections"].values()) else 0


def _best_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _chosen(only: list[str] | None) -> list[str]:
    """Percentages need the ceilings."""
    return [*only, "ceilings"] if only else list(SECTIONS)


def _write(out: Path, results: dict[str, Any]) -> None:
    write_json(out / "gpu_suite.json", results)
    temporary = out / ".gpu_suite.md.tmp"
    temporary.write_text(markdown(results))
    temporary.replace(out / "gpu_suite.md")


def _environment(commit: str | None) -> dict[str, Any]:
    found = environment()
    found["command"] = shlex.join(["python", "-m", "benchmarks.gpu_suite", *sys.argv[1:]])
    found["commit"] = commit or found["commit"]
    for package in ("triton", "numpy"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    found["backends"] = {name: status.reason for name, status in ard_kernels.backends().items()}
    if torch.cuda.is_available():
        card = torch.cuda.get_device_properties()
        found["capability"] = f"{card.major}.{card.minor}"
        found["multiprocessors"], found["l2_bytes"] = card.multi_processor_count, card.L2_cache_size
        found["memory_bytes"] = card.total_memory
    fields = "driver_version,clocks.sm,clocks.mem,power.limit"
    query = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
    if shutil.which(query[0]):
        answer = subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip()
        found[fields] = answer.splitlines()[0] if answer else None
    return found


def _once(what: str, device: str) -> None:
    """Runs the kernels, for a tool that looks at them."""
    if what == "small":
        from benchmarks.suite.correctness import touch_everything

        touch_everything(device)
        return
    from benchmarks.suite import adaln, attention

    runs = []
    for mask in ("causal", "diagonal"):
        shape = attention.shapes(quick=False)[1]
        method = attention.our_candidates(shape, mask, device)[0].build()
        inputs = [attention.make_inputs(shape, device, 0)]
        runs += [attention.prepared(method, inputs, phase) for phase in attention.PHASES]
    fused = adaln.shapes(quick=False)[0]
    layout = BlockLayout.uniform(fused.blocks, fused.tokens // fused.blocks)
    tensors = adaln.make_inputs(fused, device, 0)
    norm = adaln.ours(backends("adaln", *tensors[:5])[0], layout)
    runs += [adaln.prepared(norm, [tensors], phase) for phase in ("forward", "backward")]
    for prepare in runs:
        prepare(0)()  # compiles
        ready = prepare(0)
        torch.cuda.synchronize()
        torch.cuda.profiler.start()
        ready()
        torch.cuda.synchronize()
        torch.cuda.profiler.stop()


if __name__ == "__main__":
    sys.exit(main())

"""Checks our kernels and times them against their peers on one GPU, in one command that keeps its time.

    python -m benchmarks.gpu_suite --out DIR                    # the essential, within 520 s
    python -m benchmarks.gpu_suite --out DIR --only attention   # some sections, with all of the time
    python -m benchmarks.gpu_suite --out DIR --quick            # tiny shapes; what a CPU gets in any case
    python -m benchmarks.gpu_suite --ncu                        # how to profile the kernels

The essential is environment; correctness of every operator on this device; the copy and matmul ceilings;
block-causal attention at head dim 72, a step with a KV cache, and adaLN at (32, 1024, 1152), against the
peers that take no minute to build; a DiT-XL/2 training step against the straightforward implementation;
sampling with and without history. The rest takes five more runs of this length, each into a folder of its
own, by the suite's own estimate (`benchmarks.suite.sections.SECTIONS`):

    --only training_compiled adaln_more          # under torch.compile; adaLN's other forms, a whole DiT block
    --only attention_tuned                       # FlexAttention: max-autotune, blocks of 256, padded
    --only attention_sizes sampling_compiled     # head dims 64 and 128, one sample
    --only attention_masks                       # other masks, unequal blocks, float32
    --only attention_single                      # one sample at the other dims and masks

DIR/gpu_suite.json and DIR/gpu_suite.md are written after every section. A section runs in a process of its
own, and what fails in it is recorded and does not end the run. What had no time is named, and a ratio to the
best of some of the peers says of how many.

Exit code: 1 if a check failed, a checking process died, or one had to be stopped in a check; 3 if there was
no time for all checks, or a section had to be stopped; else 0.

Correctness, ceilings, attention and adaln import torch, triton, numpy and ard_kernels alone. The models bring
ard with its huggingface_hub and safetensors, sampling Pillow besides.
"""

from __future__ import annotations

import argparse
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import ard_kernels
from ard_kernels.tune import tuned_launches
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
        rest = sum(SECTIONS[other].seconds for other in names[i:])
        seconds = max(end - time.monotonic(), 0) * SECTIONS[name].seconds / rest
        print(f"{name}: {seconds:.0f} s", flush=True)
        last, isolated = end + _OVERTIME, options.device == "cuda"
        found = run(name, settings, options.out / "parts", seconds, last, isolated)
        results["sections"][name] = {**found, _CLOCKS: _asked(_CLOCKS)}
        if name == "ceilings":
            ceilings = {row["name"]: row["value"] for row in found["rows"]}
            settings = Settings(settings.device, settings.quick, ceilings)
        _write(options.out, results)
    shutil.rmtree(options.out / "parts", ignore_errors=True)
    print(summary(results))
    print(f"{time.monotonic() - started:.0f} s; wrote {options.out / 'gpu_suite.json'} and gpu_suite.md")
    return exit_code(results["sections"])


def exit_code(sections: dict[str, Any]) -> int:
    """As in the module's docstring."""
    if any(section["failures"] for section in sections.values()):
        return 1
    checks = sections.get("correctness")
    unchecked = checks is not None and not 0 < checks["done"] == checks["total"]
    return 3 if unchecked or any(section["stopped"] for section in sections.values()) else 0


def _best_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _chosen(only: list[str] | None) -> list[str]:
    """Percentages need the ceilings."""
    essential = [name for name, section in SECTIONS.items() if section.essential]
    return [*only, "ceilings"] if only else essential


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
        name = torch.cuda.get_device_name()
        found["launches"] = {entry: asdict(at) for entry, at in tuned_launches(name).items()}
    fields = "driver_version,clocks.sm,clocks.mem,power.limit"
    return {**found, fields: _asked(fields)}


# After each section: whether the card was slowed down.
_CLOCKS = "clocks.sm,power.draw,temperature.gpu,clocks_event_reasons.active"


def _asked(fields: str) -> str | None:
    """What nvidia-smi says, where it is there."""
    query = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
    if not shutil.which(query[0]):
        return None
    answer = subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip()
    return answer.splitlines()[0] if answer else None


def _once(what: str, device: str) -> None:
    """Runs the kernels, for a tool that looks at them."""
    if what == "small":
        from benchmarks.suite.correctness import touch_everything

        touch_everything(device)
        return
    from benchmarks.suite import adaln, attention

    runs = []
    for mask in ("causal", "diagonal"):
        shape = attention.shapes(quick=False)[0]
        method = attention.our_candidates(shape, mask, device)[0].build()
        inputs = [attention.make_inputs(shape, device, 0)]
        runs += [attention.prepared(method, inputs, phase) for phase in ("forward", "backward")]
    fused = adaln.shapes(quick=False)[0]
    tensors = adaln.make_inputs(fused, device, 0)
    norm = adaln.ours(backends("adaln", *tensors[0])[0], fused, device)
    runs += [adaln.prepared(norm, [tensors], phase) for phase in adaln.PHASES]
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

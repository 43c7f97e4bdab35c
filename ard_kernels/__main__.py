"""python -m ard_kernels: which backends exist here, which one is chosen and why; compile report, tuning."""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from pathlib import Path

import torch

from ard_kernels import backends, compile_report, tune
from ard_kernels.backends import forced
from ard_kernels.machine import prefers_bf16


def _info() -> int:
    print(f"torch {torch.__version__}")
    for name, status in backends().items():
        print(f"{name:8}{'available' if status.available else 'absent':10}  {status.reason}")
    demanded = forced()
    if demanded:
        print(f"chosen: {demanded}, demanded by the environment")
    else:
        triton = "triton (attention in float32 where TF32 is allowed)"
        on_gpu = triton if backends()["triton"].available and torch.cuda.is_available() else "eager"
        on_cpu = "native (float32, bfloat16)" if backends()["native"].available else "eager"
        print(f"chosen: {on_gpu} on cuda, {on_cpu} on cpu, eager elsewhere and for other dtypes")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    faster, reason = prefers_bf16(device)
    print(f"precision: {'bf16' if faster else 'float32'} on {device.type}, {reason}")
    return 0


def _report(architectures: list[int], only: str, path: Path | None) -> int:
    rows: list[compile_report.Compiled] = []
    built = (r for r in compile_report.built_for_cuda() if r.arch in architectures and only in r.name)
    for row in itertools.chain(compile_report.compile_all(architectures, only), built):
        text = compile_report.table([row]).splitlines()
        print(*(text if not rows else text[1:]), sep="\n", flush=True)
        rows.append(row)
    if not rows:
        print(f"compile-report: no kernel's name contains {only!r}", file=sys.stderr)
        return 2
    if path is not None:
        path.write_text(json.dumps(compile_report.as_json(rows), indent=1) + "\n")
    faults = [f"{row.name} sm_{row.arch}: {fault}" for row in rows for fault in compile_report.faults(row)]
    print(*faults, sep="\n", end="\n" if faults else "")
    return 1 if faults else 0


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m ard_kernels", description=__doc__)
    commands = parser.add_subparsers(dest="command")
    report = commands.add_parser(
        "compile-report", help="compile every Triton kernel ahead of time, without a GPU; what each uses"
    )
    report.add_argument("--arch", type=int, nargs="+", default=list(compile_report.ARCHITECTURES),
                        choices=compile_report.ARCHITECTURES, help="which sm_, default all")  # fmt: skip
    report.add_argument("--only", default="", help="only kernels whose name contains this")
    report.add_argument("--json", type=Path, help="write the numbers there")
    tuning = commands.add_parser("tune", help="measure launches on this GPU and write the fastest down")
    tuning.add_argument("--dims", type=int, nargs="+", default=[64, 72, 128], help="head dims")
    tuning.add_argument("--length", type=int, default=1024, help="tokens of each of the four blocks")
    tuning.add_argument("--batch", type=int, default=8, help="samples")
    given = parser.parse_args(arguments)
    if given.command is None:
        return _info()
    if given.command == "tune":
        if not torch.cuda.is_available():
            print("tune: no CUDA device", file=sys.stderr)
            return 2
        tune.tune(given.dims, given.length, given.batch)
        return 0
    status = compile_report.unavailable()
    if status is not None:
        print(f"compile-report: {status}", file=sys.stderr)
        return 2
    return _report(given.arch, given.only, given.json)


if __name__ == "__main__":
    sys.exit(main())

"""Sampling with the student against the same sampler written directly in PyTorch.

    python -m benchmarks.sampling                   # DiT-S/2, S = 4, N = 6, batch 1 and 8, bf16 and float32

The straightforward sampler conditions every token (adaLN's linear layers run on all of them), makes the
conditioning anew at each step, and keeps keys and values of the history layers by concatenation. Paths are
compared in float32 before anything is timed.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ard.models import PRESETS
from ard.sampling import sample
from benchmarks.common import RESULTS, environment, medians, write_json
from benchmarks.train_step import StraightforwardARD, assert_same, random_student

_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def _in(dtype: torch.dtype, device: torch.device, sampler: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """`sampler` under autocast to `dtype`, entered at each call: cast weights are kept for one call."""

    def run() -> Tensor:
        with torch.no_grad(), torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            return sampler()

    return run


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="DiT-S/2", choices=sorted(PRESETS))
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--dtypes", nargs="+", default=list(_DTYPES), choices=list(_DTYPES))
    parser.add_argument("--steps-s", type=int, default=4, help="S, the states of a trajectory")
    parser.add_argument("--history", type=int, default=6, help="N, the history layers (causal)")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/sampling-DEVICE.json")
    options = parser.parse_args()
    device = torch.device(options.device)

    student = random_student(options.model, options.steps_s, options.history, "causal", device).eval()
    plain = StraightforwardARD(student, torch.float32).eval()
    rows = []
    tokens = student.layout.lengths[0]
    print(f"{options.model}, {tokens} tokens a state, S={options.steps_s}, N={options.history}, {device}")
    for dtype in (_DTYPES[name] for name in options.dtypes):
        for batch in options.batches:
            noise = torch.randn(batch, student.channels, *student.input_size, device=device)
            labels = torch.randint(0, student.num_classes, (batch,), device=device)
            samplers = {
                "ard": partial(sample, student, noise, labels),
                "straightforward": partial(plain.sample, noise, labels),
            }
            with torch.no_grad():
                assert_same(samplers["ard"](), samplers["straightforward"](), "paths")
            seconds = medians({k: _in(dtype, device, f) for k, f in samplers.items()}, options.repeats)
            ratio = seconds["straightforward"] / seconds["ard"]
            name = str(dtype).removeprefix("torch.")
            rows.append({"dtype": name, "batch": batch, "seconds": seconds, "ratio": ratio})
            print(f"  {name:<8} batch {batch:<3} ard {1e3 * seconds['ard']:8.1f} ms   straightforward "
                  f"{1e3 * seconds['straightforward']:8.1f} ms   {ratio:.2f}x", flush=True)  # fmt: skip
    write_json(
        options.out or RESULTS / f"sampling-{device.type}.json",
        {
            "options": {k: v for k, v in vars(options).items() if k != "out"},
            "rows": rows,
            "environment": environment(),
        },
    )


if __name__ == "__main__":
    main()

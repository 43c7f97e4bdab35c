"""Costs beside the published ones, and what a straightforward implementation would need for training.

python -m benchmarks.flops                          # no GPU, no computation: everything is on the meta device
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path

import torch

from ard.costs import count, count_training_pass, format_table, published_table, student_macs
from ard.models import ARDTransformer, DiT
from benchmarks.common import RESULTS, environment, write_json
from benchmarks.train_step import StraightforwardARD


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=RESULTS / "flops.json")
    options = parser.parse_args()

    rows = published_table()
    print("10^9 multiply-accumulates a sample, DiT-XL/2 at 256 px\n")
    print(format_table(rows))

    with torch.device("meta"):
        student = ARDTransformer.from_teacher(DiT.from_preset("DiT-XL/2"), steps=4, history_layers=6)
        plain = StraightforwardARD(student, torch.float32)
        states, labels = torch.zeros(1, 4, 4, 32, 32), torch.zeros(1, dtype=torch.int64)
    ours, theirs = count_training_pass(student), count(lambda: plain(states, labels))
    formula = student_macs(student.config).total
    if ours != formula:
        raise AssertionError(f"the counter says {ours}, the formula {formula}")
    print("\nOne teacher-forced forward pass, S=4, N=6, causal, counted (with its backward: about 3 times)")
    print(f"  this implementation    {ours / 1e9:8.2f}   modulation per (sample, state), visible pairs only")
    print(f"  straightforward        {theirs / 1e9:8.2f}   modulation of every token, dense attention")
    print(f"  {theirs / ours:.2f}x less")
    write_json(
        options.out,
        {"published_table": [asdict(row) for row in rows],
         "training_forward_gmacs": {
             "ard": ours / 1e9, "straightforward": theirs / 1e9, "ratio": theirs / ours},
         "environment": environment()},
    )  # fmt: skip


if __name__ == "__main__":
    main()

"""What this device reaches at most: the copy bandwidth and the matrix rate that percentages refer to."""

from __future__ import annotations

import torch

from benchmarks.suite.record import Recorder
from benchmarks.suite.timing import Time, measure


def ceilings(rec: Recorder) -> None:
    size, elements = (8192, 1 << 30) if rec.device == "cuda" else (256, 1 << 20)
    copy = _copy(rec.device, elements)
    speed = 2 * 2 * elements / copy.ms / 1e6
    rec.row(f"copy of {2 * elements / 1e6:.0f} MB: {speed:.0f} GB/s, read and written",
            name="copy", value=speed, unit="GB/s", ms=copy.ms, spread=copy.spread)  # fmt: skip
    product = _product(rec.device, size)
    rate = 2 * size**3 / product.ms / 1e9
    rec.row(f"bf16 matrix product of {size}: {rate:.1f} TFLOP/s",
            name="matmul", value=rate, unit="TFLOP/s", ms=product.ms, spread=product.spread)  # fmt: skip


def _copy(device: str, elements: int) -> Time:
    source = torch.randn(elements, device=device, dtype=torch.bfloat16)
    target = torch.empty_like(source)
    return measure({"copy": lambda i: lambda: target.copy_(source)}, device, rounds=15)["copy"]


def _product(device: str, size: int) -> Time:
    """Of random numbers: zeros run faster than anything real."""
    a, b, out = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(3))
    return measure({"product": lambda i: lambda: torch.mm(a, b, out=out)}, device, rounds=15)["product"]

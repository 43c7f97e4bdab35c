"""In which precision networks compute: `--precision` of every command that runs one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch

Precision = Literal["no", "tf32", "bf16"]


@dataclass(frozen=True, kw_only=True)
class PrecisionConfig:
    """Of commands that run a network without training it."""

    precision: Precision = "no"
    """In which the network computes: float32, float32 with TF32 products on a GPU, or bf16 autocast. On a GPU
    attention in float32 without TF32 has no kernel and is slow."""


@contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Inside, GPUs may round the operands of float32 matrix products to TF32 (10 bits of mantissa). Where it
    is not allowed here, what the process has set stays."""
    if not allowed:
        yield
        return
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextmanager
def computing(precision: Precision, device: torch.device) -> Iterator[None]:
    """Inside, networks on the device compute in float32 ("no"), in float32 with `tf32`, or under bfloat16
    autocast."""
    with tf32(precision == "tf32"), torch.autocast(device.type, torch.bfloat16, precision == "bf16"):
        yield

"""In which precision networks compute: `--precision` of every command that runs one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar, cast

import torch

from ard.shards import worker
from ard_kernels.machine import prefers_bf16

Precision = Literal["auto", "no", "tf32", "bf16"]
_Precision = TypeVar("_Precision", bound=str)  # training has one more


@dataclass(frozen=True, kw_only=True)
class PrecisionConfig:
    """Of commands that run a network without training it."""

    precision: Precision = "auto"
    """In which the network computes: float32 ("no"), float32 with TF32 products on a GPU, or bf16 autocast.
    auto: bf16 where its products are faster than float32's (GPUs from compute capability 8.0, processors
    with AVX512-BF16 or AMX), else float32. On a GPU attention in float32 without TF32 has no kernel and is
    slow."""


def settled(
    precision: _Precision, device: torch.device, folder: Path | None = None, began: object = None
) -> tuple[_Precision, dict[str, str]]:
    """Return the precision that a command computes in, and a record of what was asked for and why it is that.

    Args:
        precision: as asked for; "auto" leaves it to the device.
        device: where the network computes.
        folder: of the run or store that the command writes.
        began: the precision that the folder began with, None for a new one. "auto" keeps it, and says so
            where it is another than a new folder would get.
    """
    resolved, reason = precision, "asked for"
    if precision == "auto":
        faster, reason = prefers_bf16(device)
        found = "bf16" if faster else "no"
        resolved = cast(_Precision, found if began is None else began)
        if resolved != found:
            reason = f"begun so; a new one would have {found!r} here: {reason}"
            if worker()[0] == 0:
                print(f"{folder}: precision stays {resolved!r}, {reason}")
    return resolved, {"asked": precision, "resolved": resolved, "reason": reason}


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
    autocast. "auto" is one of these, see `settled`."""
    precision, _ = settled(precision, device)
    with tf32(precision == "tf32"), torch.autocast(device.type, torch.bfloat16, precision == "bf16"):
        yield

"""What tests of every backend ask of one."""

from __future__ import annotations

import torch
from torch import Tensor


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Standard normal numbers, the same on every device and, but for rounding, in every dtype."""
    generator = torch.Generator("cpu").manual_seed(seed)
    x = torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")
    return x.to(torch.get_default_device(), dtype)


def takes(backend: str, dtype: torch.dtype) -> bool:
    return backend != "triton" or dtype != torch.float64


def interpreted(backend: str) -> bool:
    """Whether a backend runs in Triton's interpreter, which pays for every row."""
    return backend == "triton" and torch.get_default_device().type == "cpu"

"""What tests of every backend ask of one."""

from __future__ import annotations

import torch
from torch import Tensor

from ard_kernels.backends import forced


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Standard normal numbers, the same on every device and, but for rounding, in every dtype."""
    generator = torch.Generator("cpu").manual_seed(seed)
    x = torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")
    return x.to(torch.get_default_device(), dtype)


def takes(backend: str, dtype: torch.dtype) -> bool:
    return dtype not in {"triton": (torch.float64,), "native": (torch.float64, torch.float16)}.get(
        backend, ()
    )


def products(dtype: torch.dtype) -> torch.dtype:
    """The dtype whose epsilon products of `dtype` have: TF32 has float16's, and Triton's kernels truncate
    float32 to it on a GPU."""
    truncated = forced() == "triton" and torch.get_default_device().type == "cuda"
    return torch.float16 if truncated and dtype == torch.float32 else dtype


def interpreted(backend: str) -> bool:
    """Whether a backend runs in Triton's interpreter, which pays for every row."""
    return backend == "triton" and torch.get_default_device().type == "cpu"


def packed_qkv(
    tokens: int, dim: int, dtype: torch.dtype = torch.float32, heads: int = 1, seed: int = 0
) -> Tensor:
    """(1, tokens, 3, heads, dim)."""
    return normal(1, tokens, 3, heads, dim, dtype=dtype, seed=seed)


def gradients(out: Tensor, *leaves: Tensor) -> list[Tensor]:
    """The output, and the leaves' gradients for a fixed one of the output."""
    dout = torch.cos(torch.arange(out.numel(), device=out.device)).view(out.shape).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, leaves, dout)]

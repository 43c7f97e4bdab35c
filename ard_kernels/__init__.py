"""Kernels for training and sampling ARD students: attention between blocks of tokens, and adaLN with one
modulation row per block."""

from ard_kernels import flops as _flops  # noqa: F401  registers the FLOP formulas
from ard_kernels.adaln import adaln, gated_residual, gated_residual_adaln
from ard_kernels.attention import block_attention, cached_block_attention
from ard_kernels.backends import backends, use_backend
from ard_kernels.gelu import gelu
from ard_kernels.layout import BlockLayout

__all__ = [
    "BlockLayout",
    "adaln",
    "backends",
    "block_attention",
    "cached_block_attention",
    "gated_residual",
    "gated_residual_adaln",
    "gelu",
    "use_backend",
]

"""GELU as DiT uses it: argument checks, operator registration, autograd and backend choice.

PyTorch's own serves every device but the CPU, where it takes 2.5 to 3.4 times as long as the compiled kernel.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from ard_kernels.backends import check_tangents, forced, gelu_native, native


def gelu(x: Tensor) -> Tensor:
    """GELU in its tanh form, x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) / 2.

    Args:
        x: any shape and strides, any floating dtype.

    Returns:
        Shape and dtype of x, differentiable once, in reverse mode. Arithmetic is at least float32. On CPU a
        compiled kernel takes float32 and bfloat16; everything else is
        ``torch.nn.functional.gelu(x, approximate="tanh")``.
        The definition is `ard_kernels.reference.gelu`; arXiv 1606.08415, section 2.

    Raises:
        ValueError: x is not floating; or the compiled kernels are demanded on CPU and do not take its dtype.
        NotImplementedError: forward-mode differentiation (jvp) of the compiled kernel.
    """
    if not isinstance(x, Tensor):
        raise ValueError(f"gelu: x is {type(x).__name__}, accepted is a Tensor")
    if not x.is_floating_point():
        raise ValueError(f"gelu: x is {x.dtype}, accepted are floating dtypes")
    demanded = forced()
    if demanded in (None, "native") and x.device.type == "cpu":
        reason = native.supports(x)
        if reason is None:
            check_tangents("gelu", x)
            return cast(Tensor, _gelu(x))
        if demanded is not None:
            raise ValueError(f"gelu: backend {demanded!r} cannot be used: {reason}")
    return F.gelu(x, approximate="tanh")


@torch.library.custom_op("ard_kernels::gelu", mutates_args=())
def _gelu(x: Tensor) -> Tensor:
    return gelu_native.gelu(x)


@_gelu.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.custom_op("ard_kernels::gelu_backward", mutates_args=())
def _gelu_backward(dout: Tensor, x: Tensor) -> Tensor:
    return gelu_native.gelu(x, dout)


@_gelu_backward.register_fake
def _(dout: Tensor, x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _setup(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _grad(ctx: Any, dout: Tensor) -> Tensor:
    return cast(Tensor, _gelu_backward(dout, *ctx.saved_tensors))


_gelu.register_autograd(_grad, setup_context=_setup)

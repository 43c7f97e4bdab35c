"""GELU as DiT uses it: argument checks, operator registration, autograd and backend choice.

PyTorch's own serves every device but the CPU, where it takes 2.3 to 3.6 times as long as the compiled kernel.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ard_kernels.backends import check_transforms, differentiable_once, forced, gelu_native, native


def gelu(x: Tensor) -> Tensor:
    """GELU in its tanh form, x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) / 2.

    Args:
        x: any shape and strides, any floating dtype.

    Returns:
        Shape and dtype of x, differentiable once, in reverse mode. Arithmetic is at least float32. On CPU a
        compiled kernel takes float32 and bfloat16 tensors; everything else, nested tensors and subclasses
        that wrap others (DTensor) among it, is
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
        reason = _unusual(x) or native.supports(x)
        if reason is None:
            check_transforms("gelu", x)
            return cast(Tensor, _gelu(x))
        if demanded is not None:
            raise ValueError(f"gelu: backend {demanded!r} cannot be used: {reason}")
    return F.gelu(x, approximate="tanh")


def _unusual(x: Tensor) -> str | None:
    """Why x is no tensor of numbers at an address, or None."""
    if x.layout is not torch.strided or x.is_nested:
        return f"x is {'nested' if x.is_nested else x.layout}, accepted are strided tensors"
    if is_traceable_wrapper_subclass(x):
        return f"x is a {type(x).__name__}, accepted are plain tensors"
    return None


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


differentiable_once(_gelu_backward, "gelu")


def _setup(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _grad(ctx: Any, dout: Tensor) -> Tensor:
    return cast(Tensor, _gelu_backward(dout, *ctx.saved_tensors))


_gelu.register_autograd(_grad, setup_context=_setup)

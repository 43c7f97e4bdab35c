"""The compiled kernels, `ard_kernels._C`, and what their modules share."""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

_ENVIRONMENT = "ARD_KERNELS_ISA"
_DTYPES = (torch.float32, torch.bfloat16)
# Written by setup.py where the kernels could not be built.
_REASON = Path(__file__).parent.parent / "_C.absent"


def _load() -> tuple[ModuleType | None, str]:
    try:
        module = importlib.import_module("ard_kernels._C")
    except ModuleNotFoundError as error:
        without = f"the package was installed without ({error})"
        return None, f"no compiled kernels: {_REASON.read_text().strip() if _REASON.exists() else without}"
    except ImportError as error:
        return None, f"the compiled kernels cannot be loaded: {error}"
    name = os.environ.get(_ENVIRONMENT)
    if name:
        if name not in module.instruction_sets():
            raise ValueError(f"environment variable {_ENVIRONMENT} is {name!r}, accepted here are "
                             f"{', '.join(module.instruction_sets())}")  # fmt: skip
        module.use_instruction_set(name)
    absent = hasattr(module, "no_cuda")
    cuda = f"none: {module.no_cuda}" if absent else f"adaLN, compute capabilities {module.cuda_architectures}"
    return module, f"compiled kernels for CPU ({module.instruction_set()}) and for CUDA ({cuda})"


C, REASON = _load()
_AVAILABLE = C is not None


def _cuda_reason() -> str | None:
    """Why there are no compiled kernels for CUDA here, or None."""
    if C is None:
        return REASON
    reason: str | None = getattr(C, "no_cuda", None)
    return reason and f"compiled without kernels for CUDA: {reason}"


CUDA_REASON = _cuda_reason()


def supports(*tensors: Tensor) -> str | None:
    """None, or why the compiled kernels cannot take these tensors."""
    if not _AVAILABLE:
        return REASON
    for x in tensors:
        if x.device.type not in ("cpu", "meta"):
            return f"the tensors are on {x.device.type}, accepted is cpu"
        if x.dtype not in _DTYPES:
            return f"a tensor is {x.dtype}, accepted are {', '.join(map(str, _DTYPES))}"
    return None


def kernels(*tensors: Tensor | None) -> ModuleType:
    """The compiled module, for these tensors on CPU. A graph names its backend, and may run elsewhere than
    where it was traced."""
    reason = supports(*(x for x in tensors if x is not None))
    if reason is not None or C is None:
        raise ValueError(f"this graph was traced for the backend 'native': {reason}")
    return C


def rows(x: Tensor) -> Tensor:
    """The tensor, or a copy in which the last dimension is contiguous."""
    return x if x.stride(-1) == 1 else x.contiguous()


def activations(x: Tensor) -> Tensor:
    """The tensor, or a copy that is contiguous and of a dtype that the kernels take."""
    return x.contiguous() if x.dtype in _DTYPES else x.to(torch.float32).contiguous()


def given(x: Tensor | None) -> tuple[int, bool, int, int, int]:
    """As the compiled kernels take it: address, whether it is bfloat16, strides of batch, token and head."""
    if x is None:
        return 0, False, 0, 0, 0
    strides = (*x.stride()[:-1], 0)
    return x.data_ptr(), x.dtype == torch.bfloat16, strides[0], strides[1], strides[2]

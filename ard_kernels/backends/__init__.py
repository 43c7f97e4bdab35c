"""Which implementations exist here, and which one an operator uses.

A backend of an operator family is a module, `<family>_<backend>.py`, that offers the operators' forward and
backward and ``supports(*tensors)``: None, or the reason why it cannot take them. It never checks arguments:
the public operator did.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import math
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from numbers import Real
from types import ModuleType
from typing import TypeVar

import torch
from torch import Tensor
from torch._C._functorch import TransformType, get_interpreter_stack
from torch._library.custom_ops import CustomOpDef
from torch.autograd import forward_ad

_ENVIRONMENT = "ARD_KERNELS_BACKEND"
_OLDEST = (8, 0)  # compute capability: bf16 matrix instructions and asynchronous copies
PREFERRED = {"cpu": ("native", "eager"), "cuda": ("triton", "eager")}  # by device; eager elsewhere
_forced: list[str] = []
_Function = TypeVar("_Function", bound=Callable[..., object])


@dataclass(frozen=True)
class Status:
    """Whether a backend can be used here, and if not, why."""

    available: bool
    reason: str


def backends() -> dict[str, Status]:
    """Every backend by name, with whether it exists here and why the rest does not."""
    return {name: status() for name, status in _STATUS.items()}


def _eager_status() -> Status:
    return Status(True, "composed of PyTorch operators")


def _native_status() -> Status:
    from ard_kernels.backends import native

    return Status(native.C is not None, native.REASON)


@functools.cache
def _triton_status() -> Status:
    if importlib.util.find_spec("triton") is None:
        return Status(False, "Triton is not installed (on Linux it comes with PyTorch's CUDA builds)")
    import triton

    if triton.knobs.runtime.interpret:
        return Status(True, f"Triton {triton.__version__} in its interpreter: for tests, very slow")
    if not torch.cuda.is_available():
        return Status(False, "no CUDA device (TRITON_INTERPRET=1 interprets the kernels on CPU, for tests)")
    if torch.version.hip is not None:
        return Status(False, "the GPU is AMD's, accepted is NVIDIA's")
    capability = torch.cuda.get_device_capability()
    if capability < _OLDEST:
        return Status(False, f"compute capability {capability}, accepted is {_OLDEST} or newer")
    return Status(True, f"Triton {triton.__version__} on {torch.cuda.get_device_name()}")


_STATUS: dict[str, Callable[[], Status]] = {
    "eager": _eager_status, "native": _native_status, "triton": _triton_status
}  # fmt: skip


def implementations(family: str) -> dict[str, ModuleType]:
    """The modules of an operator family that can be imported here, the preferred ones first."""
    names = (
        ["native", "eager"] if importlib.util.find_spec("triton") is None else ["native", "triton", "eager"]
    )
    return {name: importlib.import_module(f"ard_kernels.backends.{family}_{name}") for name in names}


def constant(function: _Function) -> _Function:
    """torch.compile takes the function's answer as a constant.

    This is all that `torch.compiler.assume_constant_result` does, which imports torch._dynamo for it: two
    seconds for everyone who imports this package.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@constant  # it could not trace how Triton reads its settings
def triton_device_reason(device: str) -> str | None:
    """Why Triton cannot work on a kind of device, or None. Meta tensors only want to know shapes."""
    if device == "meta":
        return None
    if device == "cuda":
        status = _triton_status()
        return None if status.available else status.reason
    import triton

    return None if triton.knobs.runtime.interpret else f"the tensors are on {device}, accepted is cuda"


def _check(name: str, where: str) -> str:
    if name not in _STATUS:
        raise ValueError(f"{where}: backend is {name!r}, accepted are {', '.join(map(repr, _STATUS))}")
    status = _STATUS[name]()  # of no other: Triton's initialises CUDA, after which a process must not fork
    if not status.available:
        raise RuntimeError(f"{where}: backend {name!r} cannot be used here: {status.reason}")
    return name


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Force one backend inside a ``with`` block, for all threads. One that is unknown or absent here is an
    error at once, one that cannot take an operator's arguments an error when the operator is called. With
    activation checkpointing the backward belongs inside, too: it chooses anew."""
    _forced.append(_check(name, "use_backend"))
    try:
        yield
    finally:
        # The last of this name, not the last of all: another thread's may have been entered since.
        del _forced[len(_forced) - 1 - _forced[::-1].index(name)]


def _default() -> str | None:
    name = os.environ.get(_ENVIRONMENT)
    return _check(name, f"environment variable {_ENVIRONMENT}") if name else None


# Read once, at import: the choice must be a constant while torch.compile traces.
_DEFAULT = _default()


def forced() -> str | None:
    """The backend that `use_backend` or the environment variable demands, or None."""
    return _forced[-1] if _forced else _DEFAULT


def check_transforms(where: str, *tensors: Tensor) -> None:
    """An error under what an operator with a backward alone cannot do: forward-mode differentiation, which
    takes it for a constant, and torch.func's. torch.compile traces neither of the two."""
    if not torch.compiler.is_compiling() and any(
        level.key() == TransformType.Grad for level in get_interpreter_stack() or ()
    ):
        raise NotImplementedError(
            f"{where}: is differentiated by torch.func (grad, vjp, jacrev), accepted is torch.autograd; "
            f"ard_kernels.reference.{where} has both"
        )
    if forward_ad._current_level < 0:
        return
    if any(forward_ad.unpack_dual(x).tangent is not None for x in tensors):
        raise NotImplementedError(
            f"{where}: an argument has a tangent of forward-mode differentiation (jvp), accepted is reverse "
            f"mode; ard_kernels.reference.{where} has both"
        )


def differentiable_once(backward: CustomOpDef, where: str) -> None:
    """Of an operator's backward: what differentiates it again gets an error by name."""

    def refuse(ctx: object, *gradients: object) -> None:
        raise NotImplementedError(
            f"{where}: is differentiated twice, accepted is once; ard_kernels.reference.{where} has both"
        )

    backward.register_autograd(refuse)


def autocast_dtype(device: torch.device, dtype: torch.dtype | None = None) -> torch.dtype | None:
    """What autocast casts to there; None where it is off, and for float64, which it leaves alone. It does not
    know the meta device."""
    on = device.type != "meta" and dtype != torch.float64 and torch.is_autocast_enabled(device.type)
    return torch.get_autocast_dtype(device.type) if on else None


def check_number(where: str, name: str, value: object, least: float = -math.inf) -> float:
    """The number; an error for what is no finite one >= least, a tensor above all: it would get no
    gradient."""
    if not isinstance(value, int | float | torch.SymFloat | torch.SymInt):
        if not isinstance(value, Real):  # NumPy's are
            raise ValueError(
                f"{where}: {name} is {type(value).__name__}, accepted is an int or a float (it gets no "
                "gradient)"
            )
        value = float(value)
    if not (-math.inf < value < math.inf and value >= least):  # torch.compile cannot trace math.isfinite
        bound = "" if least == -math.inf else f" >= {least}"
        raise ValueError(f"{where}: {name} is {value}, accepted is a finite number{bound}")
    return value  # type: ignore[return-value]


def choose(where: str, modules: dict[str, ModuleType], *tensors: Tensor) -> str:
    """The backend for these tensors: the one demanded, else the device's first that takes them.

    A demanded one that cannot take them is a ValueError; one passed over on a GPU, or absent, is reported
    once, by name.
    """
    check_transforms(where, *tensors)
    demanded = forced()
    if demanded is not None:
        reason = modules[demanded].supports(*tensors)
        if reason is not None:
            raise ValueError(f"{where}: backend {demanded!r} cannot be used: {reason}")
        return demanded
    device = tensors[0].device.type
    for name in PREFERRED.get(device, ("eager",)):
        reason = modules[name].supports(*tensors) if name in modules else "it is not installed"
        if reason is None:
            return name
        if device == "cuda" or not _STATUS[name]().available:
            _report(f"{where}: backend {name!r} cannot be used, a slower one takes its place: {reason}")
    raise AssertionError("eager supports everything")


@constant  # torch.compile reports when it traces
def _report(message: str) -> None:
    _warn(message)


@functools.cache
def _warn(message: str) -> None:
    """In the name of the line that called the operator."""
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith("ard_kernels."):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level)


def kept(values: Sequence[object], device: torch.device) -> Tensor:
    """int32, of values that kernels read for as long as the process lives.

    Made on a thread of its own: memory that this one allocates may come from the pool of a CUDA graph that
    torch.compile is about to record, where nothing may stay.
    """
    if device.type != "cuda":
        return torch.tensor(values, dtype=torch.int32, device=device)
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(torch.tensor, values, dtype=torch.int32, device=device).result()

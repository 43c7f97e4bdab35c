"""Which implementations exist here, and which one an operator uses.

A backend is a module that offers, for an operator family, a function ``supports_<family>`` (None, or the
reason why not) and the operator's forward and backward. It never checks arguments: the public operator did.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass

_ENVIRONMENT = "ARD_KERNELS_BACKEND"
_ABSENT = {
    "native": "not part of this version: no compiled kernels (csrc)",
    "triton": "not part of this version: no Triton kernels",
}
_forced: list[str] = []


@dataclass(frozen=True)
class Status:
    """Whether a backend can be used here, and if not, why."""

    available: bool
    reason: str


def backends() -> dict[str, Status]:
    """Every backend by name, with whether it exists here and why the rest does not."""
    absent = {name: Status(False, reason) for name, reason in _ABSENT.items()}
    return {"eager": Status(True, "composed of PyTorch operators"), **absent}


def _check(name: str, where: str) -> str:
    status = backends().get(name)
    if status is None:
        raise ValueError(f"{where}: backend is {name!r}, accepted are {', '.join(map(repr, backends()))}")
    if not status.available:
        raise RuntimeError(f"{where}: backend {name!r} cannot be used here: {status.reason}")
    return name


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Force one backend inside a ``with`` block. One that is unknown or absent here is an error at once."""
    _forced.append(_check(name, "use_backend"))
    try:
        yield
    finally:
        _forced.pop()


def _default() -> str:
    name = os.environ.get(_ENVIRONMENT)
    return _check(name, f"environment variable {_ENVIRONMENT}") if name else "eager"


# Read once, at import: the choice must be a constant while torch.compile traces.
_DEFAULT = _default()


def chosen() -> str:
    """The backend in force: `use_backend`, else the environment variable, else the best one here."""
    return _forced[-1] if _forced else _DEFAULT

"""Reading a stranger's pickle as data: no code named in the file is imported or called.

torch's weights-only unpickler refuses everything but tensors and plain containers. Training scripts keep more
beside their weights: paths, dates, NumPy numbers. Stand-ins of this module take the place of those types, so
that not even a constructor of theirs runs. Every other type is refused.
"""

from __future__ import annotations

import argparse
import re
import struct
import warnings
from pathlib import Path, PurePath
from typing import Any

import torch


class Opaque:
    """Stand-in for an object that nothing reads; takes any arguments and any state, and drops them."""

    def __init__(self, *_: object) -> None: ...

    def __setstate__(self, _: object) -> None: ...


class _Dtype(Opaque):
    """Stand-in for numpy.dtype, whose state a file can forge so that NumPy takes bytes for pointers."""

    def __init__(self, code: object = None, *_: object) -> None:
        self.code, self.order = code, "<"

    def __setstate__(self, state: object) -> None:
        if isinstance(state, tuple) and len(state) > 1 and state[1] == ">":
            self.order = ">"


# NumPy's type codes of real numbers and their codes in `struct`.
_NUMBERS = {"b1": "?", "i1": "b", "u1": "B", "i2": "h", "u2": "H", "i4": "i", "u4": "I", "i8": "q", "u8": "Q",
            "f2": "e", "f4": "f", "f8": "d"}  # fmt: skip


def _scalar(dtype: object, data: object = b"") -> object:
    """The Python number that a NumPy scalar stands for; an Opaque for strings, dates and objects."""
    code = _NUMBERS.get(str(dtype.code)) if isinstance(dtype, _Dtype) else None
    if code is None or not isinstance(data, bytes) or len(data) != struct.calcsize(f"={code}"):
        return Opaque()
    assert isinstance(dtype, _Dtype)
    return struct.unpack(dtype.order + code, data)[0]


def _path(*parts: object) -> PurePath:
    """A path without methods that touch the disk."""
    return PurePath(*map(str, parts))


def _dict(*_: object) -> dict[Any, Any]:
    """A defaultdict without its factory; the items follow one by one."""
    return {}


def _list(items: object = (), *_: object) -> list[Any]:
    return list(items) if isinstance(items, (list, tuple)) else []


def _stand_ins() -> list[Any]:
    """(object, the name in the file that it answers to), as torch.serialization.safe_globals takes them."""
    named: dict[str, Any] = {
        "argparse.Namespace": argparse.Namespace,  # holds attributes and runs nothing
        "types.SimpleNamespace": argparse.Namespace,
        "numpy.dtype": _Dtype,
        "collections.defaultdict": _dict,
        "collections.deque": _list,
        "torch.torch_version.TorchVersion": str,
        "numpy.ndarray": Opaque,
    }
    for core in ("numpy.core", "numpy._core"):  # of NumPy 1 and 2
        named |= {f"{core}.multiarray.scalar": _scalar, f"{core}.multiarray._reconstruct": Opaque}
    for module in ("pathlib", "pathlib._local"):  # the second is what Python 3.13 writes
        for flavour in ("Path", "PosixPath", "WindowsPath", "PurePath", "PurePosixPath", "PureWindowsPath"):
            named[f"{module}.{flavour}"] = _path
    for kind in ("datetime", "date", "time", "timedelta", "timezone"):
        named[f"datetime.{kind}"] = Opaque
    for kind in (
        "bool",
        "bool_",
        "int8",
        "int16",
        "int32",
        "int64",
        "uint8",
        "float16",
        "float32",
        "float64",
    ):
        named[f"numpy.{kind}"] = Opaque
    for builtin in (dict, list, tuple, bool, int, float, str):  # defaultdict(list), argparse's type=int
        named[f"builtins.{builtin.__name__}"] = builtin
    return [(stand_in, name) for name, stand_in in named.items()]


def read_pickle(path: Path) -> Any:
    """The content of a file of torch.save, tensors on the host.

    Raises:
        OSError: the file cannot be read.
        ValueError: it holds anything but tensors, plain data and what this module has stand-ins for.
    """
    try:
        with warnings.catch_warnings(action="ignore"), torch.serialization.safe_globals(_stand_ins()):
            return torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        if error.filename is None:  # not the file system's, but of a reader that runs out of bytes
            raise ValueError(f"{path}: damaged, or cut off ({error})") from None
        raise
    except Exception as error:  # whatever a stranger's bytes make an unpickler do
        # torch's own advice, to load it with its code after all, is left out.
        found = re.search(r"WeightsUnpickler error: (Unsupported \w+: )?(.*?)(\. |\n|$)", str(error))
        reason = (found[2] if found else str(error).partition("\n")[0]) or type(error).__name__
        if reason.startswith("Weights only load failed"):
            reason = "it holds objects that are no data"
        raise ValueError(
            f"{path}: refused, it is not a file of plain tensors ({reason[:160]}); accepted is a file of the "
            "weights alone: where the code that wrote it is trusted, torch.save(model.state_dict(), FILE)"
        ) from None

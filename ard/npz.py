"""Arrays in .npz files: images read part by part, never all at once; nothing in a file is executed."""

from __future__ import annotations

import math
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_HEADERS: dict[tuple[int, int], Any] = {  # NumPy leaves them untyped
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}
# RuntimeError: an encrypted member. NotImplementedError, a kind of it: an unknown compression.
_DAMAGE = (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError)


@contextmanager
def _opened(path: Path) -> Iterator[zipfile.ZipFile]:
    """Open an archive; every defect of it is a ValueError that names the file."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        with zipfile.ZipFile(path) as archive:
            yield archive
    except _DAMAGE as error:
        raise ValueError(f"{path}: not a complete .npz file ({error})") from None


def names(path: Path) -> set[str]:
    """Names of the arrays in a file."""
    with _opened(path) as archive:
        return {name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")}


@contextmanager
def _array(path: Path, name: str) -> Iterator[tuple[tuple[int, ...], np.dtype[Any], IO[bytes]]]:
    """Shape and dtype of an array, and its bytes in C order."""
    with _opened(path) as archive:
        try:
            file = archive.open(f"{name}.npy")
        except KeyError:
            held = ", ".join(sorted(archive.namelist())[:10]) or "nothing"
            raise ValueError(f"{path}: has no {name}, it holds {held}") from None
        with file:
            try:
                version = np.lib.format.read_magic(file)  # type: ignore[no-untyped-call]
                if version not in _HEADERS:
                    raise ValueError(f"format version {version}, accepted are 1.0 and 2.0")
                shape, fortran, dtype = _HEADERS[version](file)
                if fortran:
                    raise ValueError("Fortran order, accepted is C order")
            except ValueError as error:
                raise ValueError(f"{path}: {name} cannot be read ({error})") from None
            yield shape, dtype, file


def _read(file: IO[bytes], path: Path, shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
    """The next elements of an array. A copy, which may be written to."""
    wanted = math.prod(shape) * dtype.itemsize
    data = file.read(wanted)
    if len(data) < wanted:
        raise ValueError(f"{path}: not a complete .npz file (it ends {wanted - len(data)} bytes early)")
    return np.frombuffer(data, dtype).reshape(shape).copy()


def read_floats(path: Path, name: str, shape: tuple[int, ...]) -> Tensor:
    """A floating-point array of a known shape, as float64."""
    with _array(path, name) as (found, dtype, file):
        if found != shape or dtype.kind != "f":
            raise ValueError(f"{path}: {name} is {found} {dtype}, accepted is {shape} of floats")
        values = torch.from_numpy(_read(file, path, shape, dtype).astype(np.float64))
    if not values.isfinite().all():
        raise ValueError(f"{path}: {name} holds values that are not finite")
    return values


class NpzImages:
    """The images of a file: its array `arr_0`, (n, h, w, 1 or 3) uint8."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with _array(path, "arr_0") as (shape, dtype, _):
            if len(shape) != 4 or shape[3] not in (1, 3) or 0 in shape or dtype != np.uint8:
                raise ValueError(f"{path}: arr_0 is {shape} {dtype}, accepted is (n, h, w, 1 or 3) uint8")
        self.count, self.height, self.width, self.channels = shape

    def batches(self, size: int) -> Iterator[Tensor]:
        """(size or fewer, C, h, w) uint8, in the order of the file. Memory: a few batches."""
        with _array(self.path, "arr_0") as (shape, dtype, file):
            for first in range(0, self.count, size):
                part = _read(file, self.path, (min(size, self.count - first), *shape[1:]), dtype)
                yield torch.from_numpy(part).permute(0, 3, 1, 2)

    def labels(self) -> Tensor | None:
        """(n,) int64; None where the file has none."""
        if "labels" not in names(self.path):
            return None
        with _array(self.path, "labels") as (shape, dtype, file):
            if shape != (self.count,) or dtype.kind not in "iu":
                raise ValueError(
                    f"{self.path}: labels is {shape} {dtype}, accepted is ({self.count},) of integers"
                )
            return torch.from_numpy(_read(file, self.path, shape, dtype).astype(np.int64))

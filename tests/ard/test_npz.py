"""Reading images and statistics from .npz files that others wrote: in parts, and never as code."""

from __future__ import annotations

import io
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from ard.npz import NpzImages, names, read_floats

Save = Callable[..., None]


def _images(count: int = 10, channels: int = 3) -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, (count, 5, 4, channels), dtype=np.uint8)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("channels", [1, 3])
def test_batches_are_the_images_in_order(tmp_path: Path, save: Save, channels: int) -> None:
    path, wanted = tmp_path / "a.npz", _images(channels=channels)
    save(path, arr_0=wanted, labels=np.arange(10, dtype=np.int32))
    images = NpzImages(path)
    assert (images.count, images.height, images.width, images.channels) == (10, 5, 4, channels)
    parts = list(images.batches(4))
    assert [len(part) for part in parts] == [4, 4, 2]
    assert torch.equal(torch.cat(parts), torch.from_numpy(wanted).permute(0, 3, 1, 2))
    assert torch.equal(images.labels(), torch.arange(10))  # type: ignore[arg-type]


def test_a_file_need_not_have_labels(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", _images())
    assert NpzImages(tmp_path / "a.npz").labels() is None
    assert names(tmp_path / "a.npz") == {"arr_0"}


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_memory_is_that_of_a_few_batches(tmp_path: Path, save: Save) -> None:
    """20 MB of images in batches of 300 kB."""
    images = np.random.default_rng(0).integers(0, 256, (6400, 32, 32, 3), dtype=np.uint8)
    save(tmp_path / "a.npz", images)
    batch = images[:100].nbytes
    tracemalloc.start()
    for _ in NpzImages(tmp_path / "a.npz").batches(100):
        pass
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    # A batch as bytes and as an array, the batch before, and two copies while zlib's output is joined.
    assert peak < 5 * batch < images.nbytes / 10


def _zip(path: Path, **members: bytes) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(f"{name}.npy", content)


def _npy(array: NDArray[Any], version: tuple[int, int] | None = None) -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array(file, array, version)  # type: ignore[no-untyped-call]
    return file.getvalue()


def _flip(path: Path) -> None:
    """One bit of the last image."""
    content = bytearray(path.read_bytes())
    place = content.index(_images()[-1].tobytes())
    content[place] ^= 1
    path.write_bytes(content)


def _write(array: object, **more: object) -> Callable[[Path], None]:
    return lambda path: np.savez(path, arr_0=array, **more)


_BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "text": (lambda p: p.write_text("no"), r"not a complete \.npz file \(File is not a zip file\)"),
    "one array": (lambda p: p.write_bytes(_npy(_images())), r"not a complete \.npz file"),
    "cut": (lambda p: (np.savez(p, _images()), p.write_bytes(p.read_bytes()[:-30])), r"not a complete \.npz"),
    "short": (lambda p: _zip(p, arr_0=_npy(_images())[:-7]), r"it ends 7 bytes early"),
    "damaged": (lambda p: (np.savez(p, _images()), _flip(p)), r"not a complete \.npz file \(Bad CRC-32"),
    "another name": (lambda p: np.savez(p, images=_images()), r"has no arr_0, it holds images\.npy"),
    "floats": (_write(_images() / 255), r"arr_0 is \(10, 5, 4, 3\) float64, accepted is \(n, h, w, 1 or 3\)"),
    "channels first": (_write(np.zeros((10, 3, 5, 4), np.uint8)), r"arr_0 is \(10, 3, 5, 4\) uint8"),
    "latents": (_write(np.zeros((10, 4, 32, 32), np.float32)), r"arr_0 is \(10, 4, 32, 32\) float32"),
    "none": (_write(_images(0)), r"arr_0 is \(0, 5, 4, 3\) uint8"),
    "objects": (_write(np.array([{}, 1], dtype=object)), r"arr_0 is \(2,\) object, accepted is"),
    "columns first": (_write(np.asfortranarray(_images())), r"arr_0 cannot be read \(Fortran order"),
    "version 3": (lambda p: _zip(p, arr_0=_npy(_images(), (3, 0))), r"format version \(3, 0\)"),
    "no header": (lambda p: _zip(p, arr_0=b"abc"), r"arr_0 cannot be read"),
    "labels of others": (_write(_images(), labels=np.arange(9)), r"labels is \(9,\) int64"),
    "labels of text": (_write(_images(), labels=np.array(["a"] * 10)), r"labels is \(10,\) <U1, accepted is"),
}  # fmt: skip


@pytest.mark.parametrize("case", _BAD)
def test_what_is_no_file_of_images_is_refused_in_one_line(tmp_path: Path, case: str) -> None:
    make, message = _BAD[case]
    path = tmp_path / "bad.npz"
    make(path)

    def read() -> None:
        images = NpzImages(path)
        images.labels()
        for _ in images.batches(4):
            pass

    with pytest.raises(ValueError, match=f"^{path}: .*{message}") as raised:
        read()
    assert "\n" not in str(raised.value)


def test_statistics_have_a_shape_and_are_finite(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    np.savez(path, mu=np.arange(4, dtype=np.float32), bad=np.array([1, np.nan]), count=np.arange(2))
    found = read_floats(path, "mu", (4,))
    assert torch.equal(found, torch.arange(4.0, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"mu is \(4,\) float32, accepted is \(5,\) of floats"):
        read_floats(path, "mu", (5,))
    with pytest.raises(ValueError, match="bad holds values that are not finite"):
        read_floats(path, "bad", (2,))
    with pytest.raises(ValueError, match=r"count is \(2,\) int64"):
        read_floats(path, "count", (2,))
    with pytest.raises(FileNotFoundError, match="no such file"):
        read_floats(tmp_path / "b.npz", "mu", (4,))

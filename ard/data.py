"""Images to train a teacher and a classifier on: Fashion-MNIST, or scikit-learn's digits where it is
absent."""

from __future__ import annotations

import gzip
import math
import zlib
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

Dataset = Literal["fashion-mnist", "digits"]
# Where Debian's package dataset-fashion-mnist puts its files.
DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")
CLASSES = {
    "fashion-mnist": (
        "T-shirt",
        "trouser",
        "pullover",
        "dress",
        "coat",
        "sandal",
        "shirt",
        "sneaker",
        "bag",
        "boot",
    ),
    "digits": tuple("0123456789"),
}


@dataclass(frozen=True)
class Images:
    """Pixels (n, 1, h, w) float32 in [-1, 1], and labels (n,) int64."""

    pixels: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)


def _idx(path: Path, magic: int) -> np.ndarray:
    """An idx file of bytes: big-endian magic number, dimensions, data."""
    try:
        with gzip.open(path) as file:
            raw = file.read()
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: not a complete gzip file ({error})") from None
    if int.from_bytes(raw[:4], "big") != magic:
        raise ValueError(f"{path}: magic number is {raw[:4].hex()}, accepted is {magic:08x}")
    rank = magic & 0xFF
    header = raw[4 : 4 + 4 * rank]
    shape = tuple(int.from_bytes(header[i : i + 4], "big") for i in range(0, len(header), 4))
    if len(header) != 4 * rank or len(raw) != 4 + 4 * rank + math.prod(shape):
        raise ValueError(f"{path}: truncated, {len(raw)} bytes for shape {shape}")
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * rank).reshape(shape)


def load_images(dataset: Dataset, train: bool, folder: Path = DEBIAN_FOLDER) -> Images:
    """Fashion-MNIST from `folder` (28x28), or digits (8x8 enlarged to 28x28; every tenth is a test image)."""
    if dataset == "fashion-mnist":
        prefix = "train" if train else "t10k"
        pixels_path, labels_path = (folder / f"{prefix}-{n}-ubyte.gz" for n in ("images-idx3", "labels-idx1"))
        for path in (pixels_path, labels_path):
            if not path.is_file():
                raise FileNotFoundError(
                    f"{path}: no such file; Fashion-MNIST is the Debian package dataset-fashion-mnist, "
                    "elsewhere download its four files and name their folder, or use --dataset digits"
                )
        raw, classes = _idx(pixels_path, 0x803), _idx(labels_path, 0x801)
        if raw.shape[1:] != (28, 28) or not len(raw):
            raise ValueError(f"{pixels_path}: shape is {raw.shape}, accepted is one or more images of 28x28")
        if classes.shape != raw.shape[:1] or classes.max() > 9:
            raise ValueError(
                f"{labels_path}: {len(classes)} labels for {len(raw)} images, the largest {classes.max()}; "
                "accepted is one per image in 0..9"
            )
        pixels = torch.from_numpy(raw.copy()).float().unsqueeze(1) / 127.5 - 1
        return Images(pixels, torch.from_numpy(classes.astype(np.int64)))
    if dataset == "digits":
        from sklearn.datasets import load_digits

        bunch = load_digits()
        pixels = torch.from_numpy(bunch.images).float().unsqueeze(1) / 8 - 1
        pixels = torch.nn.functional.interpolate(pixels, size=28, mode="bilinear", align_corners=False)
        chosen = (torch.arange(len(pixels)) % 10 != 0) == train
        return Images(pixels[chosen], torch.from_numpy(bunch.target.astype(np.int64))[chosen])
    raise ValueError(f"dataset is {dataset!r}, accepted are 'fashion-mnist', 'digits'")


def to_uint8(pixels: Tensor) -> Tensor:
    """[-1, 1] -> 0..255, clipped and rounded."""
    return (pixels.float().clamp(-1, 1) * 127.5 + 127.5).round().to(torch.uint8)


def shuffled(position: int, count: int, size: int, seed: int) -> Tensor:
    """The `count` data set indices at `position` of an endless stream of epochs, each a permutation of its
    own.

    A function of its arguments alone: a run that goes on at a position sees what an uninterrupted run would
    have seen.
    """
    indices = []
    while count:
        epoch, offset = divmod(position, size)
        part = _epoch_order(seed, epoch, size)[offset : offset + count]
        indices.append(torch.from_numpy(part))
        position, count = position + len(part), count - len(part)
    return torch.cat(indices)


@lru_cache(maxsize=2)
def _epoch_order(seed: int, epoch: int, size: int) -> np.ndarray:
    return np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(size)


def index_noise(indices: Tensor, shape: tuple[int, ...], seed: int) -> Tensor:
    """(n, *shape) float32 standard normal; row i is a function of (seed, indices[i]) alone, on every
    machine."""
    rows = [
        np.random.Generator(np.random.Philox(key=seed, counter=[0, 0, 0, index])).standard_normal(
            shape, np.float32
        )
        for index in indices.tolist()
    ]
    return torch.from_numpy(np.stack(rows))

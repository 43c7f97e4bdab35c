"""Images to train on: Fashion-MNIST, scikit-learn's digits, a folder of files, latents that `ard encode`
cached; and what is random about a sample, as functions of its index."""

from __future__ import annotations

import enum
import gzip
import hashlib
import math
import os
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal, Protocol, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ard.shards import MANIFEST, Shards

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


# What pillow decodes itself. (It would pass others on to a program, PostScript to Ghostscript.)
_FORMATS = {
    ".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP", ".bmp": "BMP", ".ppm": "PPM",
    ".pgm": "PPM",
}  # fmt: skip


class RealImages(Protocol):
    """Labelled images, or latents of images, each of them also mirrored."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, h, w)."""

    @property
    def num_classes(self) -> int: ...

    def __len__(self) -> int: ...

    def fetch(self, indices: Tensor, flips: Tensor) -> tuple[Tensor, Tensor]:
        """The same arguments give the same bits.

        Args:
            indices: (n,) int64, of images.
            flips: (n,) bool, which of them are wanted mirrored (left is right).

        Returns:
            x: (n, C, h, w) float32; pixels are in [-1, 1].
            labels: (n,) int64 in 0..num_classes-1.
        """


@dataclass(frozen=True)
class Images:
    """Pixels (n, 1, h, w) float32 in [-1, 1], and labels (n,) int64. They are `RealImages`."""

    pixels: Tensor
    labels: Tensor
    num_classes: int

    @property
    def shape(self) -> tuple[int, int, int]:
        _, channels, height, width = self.pixels.shape
        return channels, height, width

    def __len__(self) -> int:
        return len(self.labels)

    def fetch(self, indices: Tensor, flips: Tensor) -> tuple[Tensor, Tensor]:
        return _mirrored(self.pixels[indices], flips), self.labels[indices]


def _mirrored(pixels: Tensor, flips: Tensor) -> Tensor:
    return torch.where(flips.view(-1, 1, 1, 1), pixels.flip(-1), pixels)


class ImageFolder:
    """A folder with a subfolder per class: `RealImages`, decoded when they are asked for.

    Classes are the sorted names of the subfolders; images are the files below them that end as .png, .jpg,
    .jpeg, .webp, .bmp, .ppm or .pgm, sorted by path. Names that start with a dot are passed over.

    An image becomes a square as ADM and DiT have it: halved by averaging 2x2 pixels as long as its short side
    is at least twice `size`, resized bicubically so that the short side is `size` (a small one is enlarged),
    and the centre cut out.

    Args:
        folder: of the classes.
        size: height and width.
        channels: 3 (RGB) or 1 (grey); images are converted, transparency is dropped.

    Raises:
        ValueError: no class, a class without images; from `fetch`, a file that is not an image of 8 bits a
            channel, or one so large that pillow takes it for a decompression bomb.
    """

    def __init__(self, folder: Path, size: int, channels: int = 3) -> None:
        if size < 1:
            raise ValueError(f"ImageFolder: size is {size}, accepted is an integer >= 1")
        if channels not in (1, 3):
            raise ValueError(f"ImageFolder: channels is {channels}, accepted are 1 (grey) and 3 (RGB)")
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder}: no such folder")
        self.folder, self.shape = folder, (channels, size, size)
        self.classes = sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
        if not self.classes:
            raise ValueError(f"{folder}: has no subfolder; accepted is a folder with a subfolder per class")
        of_class = [_image_names(folder, name) for name in self.classes]
        if empty := [name for name, files in zip(self.classes, of_class, strict=True) if not files]:
            raise ValueError(
                f"{folder / empty[0]}: a class without an image; accepted are {', '.join(_FORMATS)}"
            )
        self._names = [name for names in of_class for name in names]
        self._labels = torch.arange(len(of_class)).repeat_interleave(torch.tensor([len(n) for n in of_class]))

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    def __len__(self) -> int:
        return len(self._names)

    def fetch(self, indices: Tensor, flips: Tensor) -> tuple[Tensor, Tensor]:
        # Threads: pillow decodes and resizes without holding the interpreter's lock.
        with ThreadPoolExecutor() as pool:
            pixels = torch.stack([*pool.map(self._read, indices.tolist())])  # (n, h, w, C) uint8
        return _mirrored(pixels.movedim(-1, 1).float() / 127.5 - 1, flips), self._labels[indices]

    def checksum(self) -> str:
        """sha256 of the names and the lengths of all files in their order."""
        lines = (f"{name}\0{(self.folder / name).stat().st_size}\n" for name in self._names)
        digest = hashlib.sha256()
        for line in lines:
            digest.update(line.encode("utf-8", "surrogateescape"))
        return digest.hexdigest()

    def _read(self, index: int) -> Tensor:
        path, (channels, size, _) = self.folder / self._names[index], self.shape
        try:
            with Image.open(path, formats=[*set(_FORMATS.values())]) as image:
                if image.mode.startswith(("I", "F")):  # pillow would clip 16 bits a channel to 8
                    raise ValueError(f"mode is {image.mode}, accepted are 8 bits a channel")
                square = _square(image.convert("L" if channels == 1 else "RGB"), size)
        except Exception as error:  # whatever a stranger's bytes make a decoder do
            raise ValueError(f"{path}: not a usable image ({error})") from None
        return torch.from_numpy(np.array(square)).view(size, size, channels)


def _image_names(folder: Path, name: str) -> list[str]:
    """Paths relative to `folder` of the images of class `name`."""
    found = []
    for parent, folders, files in os.walk(folder / name):
        folders[:] = [f for f in folders if not f.startswith(".")]
        below = Path(parent).relative_to(folder)
        found += [
            (below / f).as_posix()
            for f in files
            if not f.startswith(".") and os.path.splitext(f)[1].lower() in _FORMATS
        ]
    return sorted(found)


def _square(image: Image.Image, size: int) -> Image.Image:
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


class LatentStore:
    """Latents that `ard encode` wrote: `RealImages`. A mirrored one is that of the mirrored image.

    Every shard is checked when it is first used, see `Shards`.
    """

    FORMAT = "latents-1"

    def __init__(self, folder: Path) -> None:
        self._shards = Shards(folder, "encode", self.FORMAT, ("shape", "classes"))
        self._shards.check_complete()
        self.manifest = self._shards.manifest
        channels, height, width = self.manifest["shape"]
        self.shape: tuple[int, int, int] = (channels, height, width)
        self.num_classes = len(self.manifest["classes"])

    def __len__(self) -> int:
        return self._shards.samples

    def fetch(self, indices: Tensor, flips: Tensor) -> tuple[Tensor, Tensor]:
        latents, labels = [], []
        for index, flip in zip(indices.tolist(), flips.tolist(), strict=True):
            tensors, row = self._shards.at(index)
            latents.append(tensors["latents"][row, int(flip)])
            labels.append(tensors["labels"][row])
        return torch.stack(latents).float(), torch.stack(labels)


def open_images(
    real: str, channels: int, input_size: tuple[int, int], num_classes: int, folder: Path = DEBIAN_FOLDER
) -> RealImages:
    """Real images that fit a model.

    Args:
        real: "fashion-mnist" or "digits" (the training part), a folder that `ard encode` wrote, or one of
            images in a subfolder per class, which are resized to fit.
        channels, input_size, num_classes: of the model.
        folder: of the Fashion-MNIST files.

    Raises:
        FileNotFoundError: `real` is none of these.
        ValueError: its shape or its number of classes is not the model's.
    """
    images: RealImages
    if real in CLASSES:
        images = load_images(cast(Dataset, real), True, folder)
    elif (Path(real) / MANIFEST).is_file():
        images = LatentStore(Path(real))
    elif Path(real).is_dir():
        if channels not in (1, 3) or input_size[0] != input_size[1]:
            raise ValueError(
                f"real is {real}, a folder of images, but the model takes {_size(channels, *input_size)}: "
                "accepted is a folder that `ard encode` made of it"
            )
        images = ImageFolder(Path(real), input_size[0], channels)
    else:
        raise FileNotFoundError(
            f"real is {real}, accepted are {', '.join(CLASSES)}, a folder written by `ard encode`, "
            "or a folder with images in a subfolder per class"
        )
    if (images.shape, images.num_classes) != ((channels, *input_size), num_classes):
        raise ValueError(
            f"real is {real}, which has {_size(*images.shape)} in {images.num_classes} classes; "
            f"accepted are {_size(channels, *input_size)} in {num_classes} classes, as the model has"
        )
    return images


def _size(channels: int, height: int, width: int) -> str:
    return f"{channels} channel{'s' * (channels > 1)} of {height}x{width}"


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
        return Images(pixels, torch.from_numpy(classes.astype(np.int64)), len(CLASSES[dataset]))
    if dataset == "digits":
        try:
            from sklearn.datasets import load_digits
        except ImportError as error:
            raise ValueError(
                "dataset 'digits' needs the extra `digits` (pip install '.[digits]' in the repository): "
                f"{error}"
            ) from None
        bunch = load_digits()
        pixels = torch.from_numpy(bunch.images).float().unsqueeze(1) / 8 - 1
        pixels = torch.nn.functional.interpolate(pixels, size=28, mode="bilinear", align_corners=False)
        chosen = (torch.arange(len(pixels)) % 10 != 0) == train
        labels = torch.from_numpy(bunch.target.astype(np.int64))
        return Images(pixels[chosen], labels[chosen], len(CLASSES[dataset]))
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


def check_counts(where: str, **counts: int) -> None:
    """An error in the name of `where` about the first of them that is no count."""
    for name, value in counts.items():
        if value < 1:
            raise ValueError(f"{where}: {name} is {value}, accepted is an integer >= 1")


def check_folder(where: str, out: Path) -> None:
    """An error in the name of `where` about a file in the way of the folder `out`."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"{where}: out is {out}, a file; accepted is a folder, there or not")


def check_seed(seed: int, where: str) -> None:
    """An error in the name of `where` about what the generators below cannot take."""
    if not 0 <= seed < 2**63:
        raise ValueError(f"{where}: seed is {seed}, accepted is an integer in 0..2^63-1")


class Stream(enum.IntEnum):
    """Independent streams of random numbers of one seed, one a use. Part of the bits that are stored."""

    TRAJECTORIES = 0
    ROLLOUT = 1
    FLIP = 2
    TIME = 3
    MADE = 4
    REAL = 5
    ENCODE = 100
    DIAGNOSE = 200
    SAMPLE = 300


def index_noise(indices: Tensor, shape: tuple[int, ...], seed: int, stream: int = 0) -> Tensor:
    """(n, *shape) float32 standard normal; row i is a function of (seed, stream, indices[i]) alone, on every
    machine. The streams of a seed are independent of each other, and of `index_uniform`."""
    rows = [_at(seed, stream, index, 0).standard_normal(shape, np.float32) for index in indices.tolist()]
    return torch.from_numpy(np.stack(rows))


def index_uniform(indices: Tensor, seed: int, stream: int = 0) -> Tensor:
    """(n,) float32, multiples of 2^-24 in [0, 1), never 1; entry i is a function as in `index_noise`."""
    values = [_at(seed, stream, index, 1).random(dtype=np.float32) for index in indices.tolist()]
    return torch.tensor(values, dtype=torch.float32)


def _at(seed: int, stream: int, index: int, kind: int) -> np.random.Generator:
    # Drawing counts the first of the four words up: no two of these generators ever meet.
    return np.random.Generator(np.random.Philox(key=seed, counter=[0, kind, stream, index]))

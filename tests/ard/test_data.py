"""Data order and noise depend on the position and the index alone; files that are not what they say are
refused."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from ard.data import (
    ImageFolder,
    Images,
    RealImages,
    index_noise,
    index_uniform,
    load_images,
    open_images,
    shuffled,
    to_uint8,
)


def _write_idx(path: Path, values: np.ndarray, magic: int) -> None:
    header = np.array([magic, *values.shape], ">u4").tobytes()
    path.write_bytes(gzip.compress(header + values.astype(np.uint8).tobytes()))


def _fashion(folder: Path, count: int = 7) -> tuple[np.ndarray, np.ndarray]:
    """A training set in the format of Fashion-MNIST."""
    random = np.random.default_rng(0)
    pixels, labels = random.integers(0, 256, (count, 28, 28)), random.integers(0, 10, count)
    _write_idx(folder / "train-images-idx3-ubyte.gz", pixels, 0x803)
    _write_idx(folder / "train-labels-idx1-ubyte.gz", labels, 0x801)
    return pixels, labels


@given(
    size=st.integers(1, 40), seed=st.integers(0, 2**40),
    cuts=st.lists(st.integers(1, 30), min_size=1, max_size=8)
)  # fmt: skip
@settings(deadline=None, derandomize=True, max_examples=60)
def test_the_order_is_a_permutation_each_epoch_however_it_is_read(
    size: int, seed: int, cuts: list[int]
) -> None:
    """Read in pieces or at once, from anywhere: the same stream; each `size` of it holds every index once."""
    whole = shuffled(0, 3 * size, size, seed)
    for epoch in whole.split(size):
        assert sorted(epoch.tolist()) == list(range(size))
    position, pieces = 0, []
    for cut in cuts:
        pieces.append(shuffled(position, cut, size, seed))
        position += cut
    assert torch.equal(torch.cat(pieces), shuffled(0, position, size, seed))


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    first, second = shuffled(0, 200, 100, 0).split(100)
    assert not torch.equal(first, second)
    assert not torch.equal(first, shuffled(0, 100, 100, 1))


def test_noise_of_an_index_does_not_depend_on_its_batch() -> None:
    indices = torch.tensor([5, 0, 10**9, 5])
    noise = index_noise(indices, (2, 3, 4), seed=3)
    for row, index in zip(noise, indices, strict=True):
        assert torch.equal(row, index_noise(index.view(1), (2, 3, 4), seed=3)[0])
    assert torch.equal(noise[0], noise[3])
    assert not torch.equal(noise, index_noise(indices, (2, 3, 4), seed=4))


def test_noise_is_standard_normal_and_uncorrelated_between_indices() -> None:
    noise = index_noise(torch.arange(200), (1000,), seed=0).double()
    # Six standard errors: of a mean of 200,000, of their variance, of a correlation of 1000.
    assert abs(noise.mean()) < 6 / 200_000**0.5
    assert abs(noise.var() - 1) < 6 * (2 / 200_000) ** 0.5
    correlations = torch.corrcoef(noise) - torch.eye(200)
    assert correlations.abs().max() < 6 / 1000**0.5


def test_noise_is_the_same_on_every_machine() -> None:
    """Philox and numpy's ziggurat: written down once, so that a recording can be continued elsewhere."""
    values = index_noise(torch.tensor([12345]), (3,), seed=7)[0]
    assert values.tolist() == [0.8413693904876709, -0.14441366493701935, -1.2808749675750732]


def test_streams_of_a_seed_are_independent() -> None:
    """Of each other, of the streams of another seed, and of index_uniform at the same index and stream: from
    the same bits it would grow with the noise's absolute value."""
    indices = torch.arange(20)
    rows = [index_noise(indices, (500,), seed, stream) for seed in (0, 1) for stream in (0, 1, 2)]
    correlations = torch.corrcoef(torch.cat(rows).double()) - torch.eye(20 * 6)
    assert correlations.abs().max() < 6 / 500**0.5
    many = torch.arange(2000)
    both = torch.stack([index_uniform(many, 0, 1), index_noise(many, (1,), 0, 1)[:, 0].abs()])
    assert torch.corrcoef(both.double())[0, 1].abs() < 6 / 2000**0.5
    assert torch.equal(index_noise(indices, (3,), 5), index_noise(indices, (3,), 5, 0))


def test_uniform_numbers_of_an_index_do_not_depend_on_their_batch() -> None:
    indices = torch.tensor([5, 0, 10**9, 5])
    values = index_uniform(indices, 3, 2)
    assert values.dtype == torch.float32
    assert torch.equal(values, torch.cat([index_uniform(i.view(1), 3, 2) for i in indices]))
    assert values[0] == values[3]
    for other in (index_uniform(indices, 4, 2), index_uniform(indices, 3, 1)):
        assert not torch.equal(values, other)
    # Written down once, so that a run can be continued on another machine.
    assert index_uniform(torch.tensor([12345]), 7, 1).tolist() == [0.9293552041053772]


def test_uniform_numbers_are_uniform() -> None:
    """Kolmogorov-Smirnov: sqrt(n) times the distance exceeds 3 once in 30 million."""
    values = index_uniform(torch.arange(20_000), 0, 0).double().sort().values
    assert values[0] >= 0
    assert values[-1] < 1
    assert (values - (torch.arange(20_000) + 0.5) / 20_000).abs().max() < 3 / 20_000**0.5


def test_fashion_mnist_files_are_read(tmp_path: Path) -> None:
    pixels, labels = _fashion(tmp_path)
    images = load_images("fashion-mnist", True, tmp_path)
    assert (images.pixels.dtype, images.labels.dtype, len(images)) == (torch.float32, torch.int64, 7)
    assert np.array_equal(to_uint8(images.pixels)[:, 0].numpy(), pixels)
    assert np.array_equal(images.labels.numpy(), labels)
    assert images.pixels.min() >= -1
    assert images.pixels.max() <= 1


def test_files_that_are_not_idx_are_named_and_refused(tmp_path: Path) -> None:
    pixels, labels = _fashion(tmp_path)
    images, train = tmp_path / "train-images-idx3-ubyte.gz", tmp_path / "train-labels-idx1-ubyte.gz"

    def refused(path: Path, message: str) -> None:
        with pytest.raises((ValueError, OSError), match=message) as caught:
            load_images("fashion-mnist", True, tmp_path)
        assert str(path) in str(caught.value)

    raw = gzip.decompress(images.read_bytes())
    images.write_bytes(gzip.compress(raw[:-1]))
    refused(images, r"truncated, 5503 bytes for shape \(7, 28, 28\)")
    images.write_bytes(gzip.compress(raw[:6]))
    refused(images, "truncated, 6 bytes")
    images.write_bytes(gzip.compress(raw)[:-20])
    refused(images, "not a complete gzip file")
    images.write_bytes(raw)
    refused(images, "not a complete gzip file")
    _write_idx(images, labels, 0x801)
    refused(images, "magic number is 00000801, accepted is 00000803")
    _write_idx(images, pixels[:5], 0x803)
    refused(train, "7 labels for 5 images")
    _write_idx(images, pixels[:, :14], 0x803)
    refused(images, r"28x28")
    train.unlink()
    refused(train, "no such file; Fashion-MNIST is the Debian package dataset-fashion-mnist")


def test_digits_are_split_by_every_tenth_image() -> None:
    train, test = load_images("digits", True), load_images("digits", False)
    assert (len(train), len(test)) == (1617, 180)
    for images in (train, test):
        assert images.pixels.shape[1:] == (1, 28, 28)
        assert images.pixels.min() >= -1
        assert images.pixels.max() <= 1
        assert set(images.labels.tolist()) == set(range(10))


def test_an_unknown_data_set_is_refused() -> None:
    with pytest.raises(ValueError, match="dataset is 'cifar', accepted are 'fashion-mnist', 'digits'"):
        load_images("cifar", True)  # type: ignore[arg-type]


def test_pixels_are_clipped_and_rounded() -> None:
    assert to_uint8(torch.tensor([-2.0, -1.0, 0.0, 0.0041, 1.0, 9.0])).tolist() == [0, 0, 128, 128, 255, 255]


def _random_image(width: int, height: int, mode: str = "RGB", seed: int = 0) -> Image.Image:
    shape = (height, width, 3) if mode == "RGB" else (height, width)
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, np.uint8), mode)


def _folder(folder: Path) -> Path:
    """Two classes with three images, one of them a folder further down, and things that are passed over."""
    for i, name in enumerate(("cat/b.png", "ant/2.PNG", "ant/below/3.bmp")):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        _random_image(8, 8, seed=i).save(folder / name)
    for name in ("readme.txt", "ant/notes.txt", "ant/._2.png", "cat/.hidden/4.png", ".cache/5.png"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("no image")
    return folder


def _levels(images: ImageFolder, index: int = 0) -> Tensor:
    """(C, h, w) float32, 0 to 255."""
    x, _ = images.fetch(torch.tensor([index]), torch.tensor([False]))
    return (x[0] + 1) * 127.5


def test_a_folder_is_read_in_the_order_of_its_names(tmp_path: Path) -> None:
    images = ImageFolder(_folder(tmp_path), 8)
    assert (len(images), images.shape, images.num_classes) == (3, (3, 8, 8), 2)
    assert images.classes == ["ant", "cat"]
    x, labels = images.fetch(torch.tensor([2, 0, 1, 0]), torch.zeros(4, dtype=torch.bool))
    assert (x.dtype, labels.tolist()) == (torch.float32, [1, 0, 0, 0])
    for row, seed in zip(x, (0, 1, 2, 1), strict=True):
        pixels = np.asarray(_random_image(8, 8, seed=seed))
        assert np.array_equal(to_uint8(row).movedim(0, -1).numpy(), pixels)
        assert torch.equal(row, torch.from_numpy(pixels.copy()).movedim(-1, 0).float() / 127.5 - 1)


def test_large_images_are_halved_by_averages_and_cut_in_the_centre(tmp_path: Path) -> None:
    """40x24: one halving to a short side of 12, two to one of 6, and no other resizing.
    pillow rounds to integers after each axis of a halving, by at most a half: 1 level each."""
    (tmp_path / "class").mkdir()
    image = _random_image(40, 24)
    image.save(tmp_path / "class/image.png")
    exact = torch.from_numpy(np.asarray(image).copy()).movedim(-1, 0).float()
    for halvings, size in ((1, 12), (2, 6)):
        exact = exact.unflatten(2, (-1, 2)).unflatten(1, (-1, 2)).mean((2, 4))
        left = (exact.shape[2] - size) // 2
        error = _levels(ImageFolder(tmp_path, size)) - exact[:, :, left : left + size]
        assert error.abs().max() <= halvings


@pytest.mark.parametrize(("width", "height"), [(13, 9), (9, 13), (11, 11), (5, 4), (6, 6)])
def test_images_are_resized_bicubically(tmp_path: Path, width: int, height: int) -> None:
    """To a short side of 6, against torch's kernel of the same name; pillow rounds after each axis."""
    (tmp_path / "class").mkdir()
    image = _random_image(width, height)
    image.save(tmp_path / "class/image.png")
    size = [round(side * 6 / min(width, height)) for side in (height, width)]
    exact = torch.nn.functional.interpolate(
        torch.from_numpy(np.asarray(image).copy()).movedim(-1, 0).float().unsqueeze(0),
        size=size, mode="bicubic", antialias=True,
    )[0].clamp(0, 255)  # fmt: skip
    top, left = ((side - 6) // 2 for side in size)
    error = _levels(ImageFolder(tmp_path, 6)) - exact[:, top : top + 6, left : left + 6]
    assert error.abs().max() <= 2


def test_colours_are_converted(tmp_path: Path) -> None:
    """Grey of colours by ITU-R 601, colours of grey by repetition; transparency and palettes are resolved."""
    (tmp_path / "class").mkdir()
    colour, grey = _random_image(8, 8), _random_image(8, 8, "L", seed=1)
    colour.save(tmp_path / "class/0.png")
    grey.save(tmp_path / "class/1.png")
    transparent = colour.copy()
    transparent.putalpha(0)
    transparent.save(tmp_path / "class/2.png")
    grey.convert("P").save(tmp_path / "class/3.png")
    rgb, luma = ImageFolder(tmp_path, 8, 3), ImageFolder(tmp_path, 8, 1)
    assert luma.shape == (1, 8, 8)
    weights = torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)
    assert ((_levels(rgb, 0) * weights).sum(0) - _levels(luma, 0)).abs().max() <= 1
    assert torch.equal(_levels(rgb, 1), _levels(luma, 1).expand(3, -1, -1))
    assert torch.equal(_levels(rgb, 2), _levels(rgb, 0))
    assert torch.equal(_levels(rgb, 3), _levels(rgb, 1))


def test_files_that_are_no_images_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "class" / "image.png"
    path.parent.mkdir()
    _random_image(64, 64).save(path)
    images = ImageFolder(tmp_path, 8)
    whole = path.read_bytes()

    def refused(message: str) -> None:
        with pytest.raises(ValueError, match=rf"image\.png: not a usable image \(.*{message}") as caught:
            _levels(images)
        assert str(path) in str(caught.value)

    path.write_bytes(whole[: len(whole) // 2])
    refused("truncated")
    path.write_bytes(b"")
    refused("cannot identify")
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n")
    refused("cannot identify")  # never handed to Ghostscript
    Image.fromarray(np.full((8, 8), 40_000, np.uint16)).save(path)
    refused("mode is I;16, accepted are 8 bits a channel")
    path.unlink()
    refused("No such file")
    path.write_bytes(whole)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    refused("decompression bomb")


def test_folders_without_classes_or_images_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no subfolder; accepted is a folder with a subfolder per class"):
        ImageFolder(tmp_path, 8)
    _folder(tmp_path)
    (tmp_path / "bee").mkdir()
    with pytest.raises(ValueError, match=r"bee: a class without an image; accepted are \.png"):
        ImageFolder(tmp_path, 8)
    with pytest.raises(ValueError, match="channels is 4, accepted are 1"):
        ImageFolder(tmp_path, 8, 4)
    with pytest.raises(ValueError, match="size is 0, accepted is an integer >= 1"):
        ImageFolder(tmp_path, 0)
    with pytest.raises(FileNotFoundError, match="absent: no such folder"):
        ImageFolder(tmp_path / "absent", 8)


@pytest.mark.parametrize("kind", ["memory", "folder"])
def test_images_are_fetched_mirrored_where_asked(tmp_path: Path, kind: str) -> None:
    """Left is right, up stays up; the same arguments give the same bits, whatever else is in the batch."""
    generator = torch.Generator().manual_seed(0)
    images: RealImages = (
        ImageFolder(_folder(tmp_path), 8)
        if kind == "folder"
        else Images(torch.rand(3, 1, 8, 8, generator=generator), torch.tensor([0, 0, 1]), 2)
    )
    indices, flips = torch.tensor([2, 0, 0]), torch.tensor([True, False, True])
    x, labels = images.fetch(indices, flips)
    plain, _ = images.fetch(indices, torch.zeros(3, dtype=torch.bool))
    assert x.shape == (3, *images.shape)
    assert labels.tolist() == [1, 0, 0]
    assert torch.equal(x[1], plain[1])
    for row in (0, 2):
        assert torch.equal(x[row], torch.stack([*plain[row].unbind(-1)][::-1], -1))
        assert not torch.equal(x[row], plain[row])
    again = torch.cat([images.fetch(i.view(1), f.view(1))[0] for i, f in zip(indices, flips, strict=True)])
    assert torch.equal(again, x)


def test_real_images_that_do_not_fit_the_model_are_refused(tmp_path: Path) -> None:
    fashion = tmp_path / "fashion"
    fashion.mkdir()
    _fashion(fashion)
    assert len(open_images("fashion-mnist", 1, (28, 28), 10, fashion)) == 7
    assert len(open_images("digits", 1, (28, 28), 10)) == 1617
    folder = str(_folder(tmp_path / "images"))
    for channels in (1, 3):
        assert open_images(folder, channels, (16, 16), 2).shape == (channels, 16, 16)
    refused = {
        ("digits", 1, (32, 32), 10): r"real is digits, which has 1 channel of 28x28 in 10 classes; "
        "accepted are 1 channel of 32x32 in 10 classes, as the model has",
        (folder, 3, (8, 8), 1000): "in 2 classes; accepted are 3 channels of 8x8 in 1000 classes",
        (
            folder,
            4,
            (32, 32),
            2,
        ): "the model takes 4 channels of 32x32: accepted is a folder that `ard encode`",
        (folder, 3, (8, 16), 2): "the model takes 3 channels of 8x16: accepted is a folder that `ard encode`",
    }
    for arguments, message in refused.items():
        with pytest.raises(ValueError, match=message):
            open_images(*arguments)
    with pytest.raises(
        FileNotFoundError, match="real is absent, accepted are fashion-mnist, digits, a folder"
    ):
        open_images("absent", 1, (28, 28), 10)

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

from ard.data import index_noise, load_images, shuffled, to_uint8


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

"""Sampling feeds a student its own predictions; a sample depends on its index, its class and the seed
alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import ard
from ard.checkpoints import load_student
from ard.data import index_noise, to_uint8
from ard.models import ARDTransformer
from ard.sampling import SampleConfig, run


@pytest.fixture(scope="module")
def model(student: Path) -> ARDTransformer:
    return load_student(student)[0]


def _npz(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    with np.load(folder / "samples.npz") as file:
        return file["arr_0"], file["labels"]


def test_a_path_is_the_fixed_point_of_the_training_pass(model: ARDTransformer) -> None:
    """Fed with its own path in one teacher-forced pass, the student predicts that path."""
    noise, labels = index_noise(torch.arange(3), (1, 28, 28), 0), torch.tensor([0, 4, 9])
    path = ard.sample(model, noise, labels)
    assert path.shape == (3, 4, 1, 28, 28)
    states = torch.cat([noise.unsqueeze(1), path[:, :-1]], 1)
    with torch.no_grad():
        torch.testing.assert_close(model(states, labels), path, rtol=1e-4, atol=1e-5)
    # Each step, the class and the history matter, or the comparison says nothing.
    assert path.diff(dim=1).abs().amax((0, 2, 3, 4)).min() > 1e-2
    assert (ard.sample(model, noise, labels.flip(0)) - path)[0].abs().max() > 1e-2
    with torch.no_grad():
        assert (model(states[:, [1, 1, 2, 3]], labels) - path)[:, -1].abs().max() > 1e-3


def test_sampling_keeps_the_dtype_of_the_noise_and_no_graph(model: ARDTransformer) -> None:
    noise, labels = index_noise(torch.arange(2), (1, 28, 28), 0), torch.tensor([1, 2])
    exact = ard.sample(model, noise, labels)
    assert not exact.requires_grad
    with torch.autocast("cpu", torch.bfloat16):
        rough = ard.sample(model, noise, labels)
    assert rough.dtype == torch.float32
    assert not torch.equal(rough, exact)
    # Roundings of 2 layers and 4 steps; 0.03 was measured.
    assert (rough - exact).norm() / exact.norm() < 16 * torch.finfo(torch.bfloat16).eps


@pytest.mark.parametrize(
    ("shape", "labels", "message"),
    [
        ((2, 1, 28, 27), [0, 1], r"noise has shape \(2, 1, 28, 27\), accepted is \(B, 1, 28, 28\)"),
        ((2, 28, 28), [0, 1], r"accepted is \(B, 1, 28, 28\)"),
        ((2, 1, 28, 28), [0], r"labels has shape \(1,\), accepted is \(2,\), one per noise"),
        ((2, 1, 28, 28), [0, 10], r"labels are 0\.\.10, accepted are 0\.\.9"),
        ((2, 1, 28, 28), [-1, 1], r"labels are -1\.\.1, accepted are 0\.\.9"),
    ],
)
def test_what_does_not_fit_is_named(
    model: ARDTransformer, shape: tuple[int, ...], labels: list[int], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        ard.sample(model, torch.zeros(shape), torch.tensor(labels))


def test_files_hold_the_samples(model: ARDTransformer, student: Path, tmp_path: Path) -> None:
    run(SampleConfig(student, tmp_path, samples=12, labels=(7, 2), batch_size=5, seed=3))
    images, labels = _npz(tmp_path)
    assert labels.tolist() == [7, 2] * 6
    noise = index_noise(torch.arange(12), (1, 28, 28), 3)
    expected = ard.sample(model, noise, torch.from_numpy(labels))[:, -1]
    assert images.dtype == np.uint8
    assert images.shape == (12, 28, 28, 1)
    # A value beside a rounding boundary may fall to either side when the batch is another one.
    assert np.abs(images.astype(int) - to_uint8(expected).permute(0, 2, 3, 1).numpy()).max() <= 1
    with Image.open(tmp_path / "samples.png") as picture:
        grid = np.asarray(picture)[::2, ::2]  # zoomed by 2
    assert grid.shape == (2 * 30 - 2, 10 * 30 - 2)
    assert np.array_equal(grid[30:58, 30:58], images[11, :, :, 0])


def test_samples_depend_on_the_seed_and_not_on_the_batch(student: Path, tmp_path: Path) -> None:
    config = SampleConfig(student, tmp_path / "a", samples=7, latents=True)
    run(config)
    run(replace(config, out=tmp_path / "b"))
    run(replace(config, out=tmp_path / "c", batch_size=2))
    run(replace(config, out=tmp_path / "d", seed=1))
    first, labels = _npz(tmp_path / "a")
    assert first.dtype == np.float32
    assert first.shape == (7, 1, 28, 28)
    assert labels.tolist() == list(range(7))
    assert (tmp_path / "a" / "samples.npz").read_bytes() == (tmp_path / "b" / "samples.npz").read_bytes()
    assert np.allclose(first, _npz(tmp_path / "c")[0], rtol=1e-4, atol=1e-5)
    assert not np.allclose(first, _npz(tmp_path / "d")[0], atol=1e-1)

"""The Inception network: the public conversion's numbers, and its weights file read as data."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ard.features import inception_extractor
from ard.models.inception import FEATURES, SPATIAL, Inception, resize


def fill(model: nn.Module) -> None:
    """Weights that are the same everywhere, with which activations keep their size from layer to layer."""
    random = np.random.default_rng(0)
    for name, x in model.state_dict().items():
        if name.endswith("num_batches_tracked"):
            continue
        values = torch.from_numpy(random.random(x.numel()) - 0.5).view(x.shape)
        if name.endswith(("bn.weight", "running_var")):
            values = values + 1
        elif x.ndim == 4:
            values = values * (24 / x[0].numel()) ** 0.5
        elif x.ndim == 2:
            values = values / 16
        x.copy_(values)


def _images() -> Tensor:
    return torch.from_numpy(np.random.default_rng(1).integers(0, 256, (2, 3, 40, 50), dtype=np.uint8))


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model, path = Inception(), tmp_path_factory.mktemp("inception") / "weights.pth"
    fill(model)
    torch.save(model.state_dict(), path)
    return path


def test_features_are_those_of_the_public_conversion(weights: Path) -> None:
    """Numbers of torch-fidelity 0.4.0 (FeatureExtractorInceptionV3, "inception-v3-compat", float64 inside) of
    these weights and images: pooled features, Mixed_6d.branch1x1 channels last, unbiased logits."""
    extractor = inception_extractor(weights)
    assert extractor.both is not None
    assert extractor.head is not None
    features, spatial = extractor.both(_images())
    assert (features.shape, spatial.shape) == ((2, FEATURES), (2, SPATIAL))
    logits = features @ extractor.head.T
    wanted = (
        (features, [0, 1, 700, 2047], [1.8533885, 2.7868075, 0.0073609347, 0.23539174],
         [2.1518232, 2.8793509, 0.0071724444, 0.24820746]),
        (spatial, [0, 1, 6, 7, 1000, 2021], [1.9904773, 0.68589693, 0, 2.3535476, 0, 2.9466066],
         [2.1984675, 1.2701195, 0, 2.038424, 0, 2.6976254]),
        (logits, [0, 500, 1007], [-0.56636703, 0.1643604, 3.9058545], [-0.59460384, 0.16576207, 4.1158094]),
    )  # fmt: skip
    for found, indices, *rows in wanted:
        # Float32 through 48 layers, whose sums have another order on every processor.
        torch.testing.assert_close(found[:, indices], torch.tensor(rows), rtol=2e-4, atol=2e-5)


def test_grey_images_are_three_equal_channels(weights: Path) -> None:
    extractor, grey = inception_extractor(weights), _images()[:1, :1]
    assert torch.equal(extractor.features(grey), extractor.features(grey.expand(-1, 3, -1, -1)))


def test_convolutions_are_not_rounded_on_a_gpu(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    allowed = []

    def forward(self: Inception, images: Tensor) -> tuple[Tensor, Tensor]:
        allowed.append(torch.backends.cudnn.allow_tf32)
        return torch.zeros(len(images), FEATURES), torch.zeros(len(images), SPATIAL)

    monkeypatch.setattr(Inception, "forward", forward)
    inception_extractor(weights).features(_images())
    assert allowed == [False]
    assert torch.backends.cudnn.allow_tf32  # as before


def test_resize_is_that_of_tensorflow_1() -> None:
    """Pixel i lies at i * old / new, without half a pixel, and the last column repeats at the border."""
    images = torch.tensor([[[[0.0, 10.0], [100.0, 110.0]]]])
    row = torch.tensor([0.0, 5.0, 10.0, 10.0])
    wanted = torch.stack([row, row + 50, row + 100, row + 100])
    assert torch.equal(resize(images, 4)[0, 0], wanted)


def test_weights_without_counters_are_the_same(weights: Path, tmp_path: Path) -> None:
    tensors = torch.load(weights, weights_only=True)
    few = {name: x for name, x in tensors.items() if not name.endswith("num_batches_tracked")}
    torch.save(few, tmp_path / "few.pth")
    images = _images()[:1]
    found = inception_extractor(tmp_path / "few.pth").features(images)
    assert torch.equal(found, inception_extractor(weights).features(images))
    del few["Mixed_6d.branch1x1.conv.weight"]
    torch.save(few, tmp_path / "fewer.pth")
    with pytest.raises(
        ValueError, match=r"does not fit the model: missing Mixed_6d\.branch1x1\.conv\.weight"
    ):
        inception_extractor(tmp_path / "fewer.pth")


class _Code:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return (open, (str(self.target), "w"))


def test_a_weights_file_is_not_executed(tmp_path: Path) -> None:
    torch.save({"fc.weight": _Code(tmp_path / "ran")}, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match="refused, it is not a file of plain tensors"):
        inception_extractor(tmp_path / "weights.pth")
    assert not (tmp_path / "ran").exists()
    pickle.loads(pickle.dumps(_Code(tmp_path / "ran"))).close()  # that it would have written the file
    assert (tmp_path / "ran").exists()


def test_weights_are_asked_for(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="wanted are FID's Inception weights"):
        inception_extractor(tmp_path / "none.pth")

"""Networks whose features of images are compared, and statistics of real images in such features."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ard.checkpoints import (
    WEIGHTS,
    described,
    load_weights,
    read_metadata,
    read_tensors,
    sha256,
    write_tensors,
)
from ard.metrics import Moments
from ard.models.classifier import Classifier
from ard.models.inception import FEATURES, Inception
from ard.shards import worker_device
from ard.unpickling import read_pickle

# Images that a feature network is given at once.
BATCH = 250
# Of those, how many Inception sees at once on a CPU. 300 images of 256 x 256 on two cores: in passes of 100
# 95 s of CPU time and 2.3 GB at the peak, of 32 66 s and 1.5 GB, of 16 65 s and 1.0 GB.
_CPU_PASS = 16


@dataclass(frozen=True)
class Extractor:
    """Features of images: a name for reports, and (n, C, h, w) uint8 -> (n, d).

    Where the network is a classifier of the labels as well: `classes`, (n, C, h, w) uint8 -> (n,) int64.
    """

    name: str
    features: Callable[[Tensor], Tensor]
    classes: Callable[[Tensor], Tensor] | None = None
    channels: tuple[int, ...] = (1, 3)
    """Of the images that it takes."""
    size: tuple[int, int] | None = None
    """Height and width of them; None: any."""
    network: str = ""
    """sha256 of its weights: distances between features of different networks say nothing."""
    both: Callable[[Tensor], tuple[Tensor, Tensor]] | None = None
    """Where the network has spatial features: (n, C, h, w) uint8 -> features (n, d), spatial ones (n, s)."""
    head: Tensor | None = None
    """Where the features give classes of images: (classes, d), whose products are the logits."""


def extractor_of(classifier: Path, inception: Path | None) -> Extractor:
    """Of Inception weights where they are given, else of a classifier."""
    return classifier_extractor(classifier) if inception is None else inception_extractor(inception)


def load_classifier(folder: Path) -> Classifier:
    """The classifier of a folder, in evaluation mode."""
    with described(folder, ["Classifier"], "Classifier") as description:
        model = Classifier(**description["config"])
    load_weights(model, read_tensors(folder / WEIGHTS), folder / WEIGHTS)
    return model.eval().requires_grad_(False)


def classifier_extractor(folder: Path) -> Extractor:
    """Features of the embedded (or another) classifier. Not the Inception of FID: name it for what it is."""
    device = worker_device()
    model = load_classifier(folder).to(device)
    return Extractor(
        "Fashion-MNIST classifier, 64 features",
        lambda images: model.features(images.to(device).float() / 127.5 - 1).cpu(),
        lambda images: model(images.to(device).float() / 127.5 - 1).argmax(1).cpu(),
        channels=(1,),
        size=(28, 28),
        network=sha256(folder / WEIGHTS),
    )


@contextmanager
def _full_precision() -> Iterator[None]:
    """Inside, a GPU's convolutions do not round float32 to TF32, which is PyTorch's default for them."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def inception_extractor(weights: Path) -> Extractor:
    """FID's Inception, from a local file of its weights (pt_inception-2015-12-05-6726825d.pth)."""
    if not weights.is_file():
        raise FileNotFoundError(f"{weights}: no such file; wanted are FID's Inception weights")
    model = Inception()
    tensors = read_tensors(weights) if weights.suffix == ".safetensors" else read_pickle(weights)
    if not isinstance(tensors, dict) or not all(isinstance(x, Tensor) for x in tensors.values()):
        raise ValueError(f"{weights}: accepted is a mapping of names to tensors, FID's Inception weights")
    # Counters that inference does not read; older conversions lack them.
    counters = {name: x for name, x in model.state_dict().items() if name.endswith("num_batches_tracked")}
    load_weights(model, {**counters, **tensors}, weights)
    device = worker_device()
    model.to(device)

    @torch.no_grad()
    def both(images: Tensor) -> tuple[Tensor, Tensor]:
        colour = images.expand(-1, 3, -1, -1) if images.shape[1] == 1 else images
        parts = colour.split(_CPU_PASS if device.type == "cpu" else len(colour))
        with _full_precision():
            passes = [model(part.to(device)) for part in parts]
        return torch.cat([x for x, _ in passes]).cpu(), torch.cat([x for _, x in passes]).cpu()

    return Extractor(
        f"Inception (2015-12-05), {FEATURES} features",
        lambda images: both(images)[0],
        network=sha256(weights),
        both=both,
        head=model.fc.weight.cpu(),
    )


@torch.no_grad()
def extract(extractor: Extractor, images: Tensor, batch: int = BATCH) -> Tensor:
    """Features (n, d) float32 of images (n, C, h, w) uint8."""
    return torch.cat([extractor.features(part).float() for part in images.split(batch)])


@dataclass(frozen=True)
class Statistics:
    """Reference data in some feature space: moments (float64) of all of it, and the features of a part of
    it."""

    mean: Tensor
    covariance: Tensor
    features: Tensor
    network: str = ""
    """Of the extractor."""

    @classmethod
    def of(cls, features: Tensor, keep: int, network: str = "") -> Statistics:
        return cls.of_parts(features.split(4096), keep, network)

    @classmethod
    def of_parts(cls, parts: Iterable[Tensor], keep: int, network: str = "") -> Statistics:
        """Of features that come in parts (n, d), of which no more than `keep` stay in memory."""
        moments, kept = Moments(), []
        for part in parts:
            moments.add(part)
            if keep > 0:
                kept.append(part[:keep])
                keep -= len(kept[-1])
        return cls(moments.mean, moments.covariance, torch.cat(kept) if kept else part[:0], network)

    def save(self, path: Path, extractor: str) -> None:
        tensors = {"mean": self.mean, "covariance": self.covariance, "features": self.features.half()}
        # In one entry: safetensors writes several in an order that changes.
        write_tensors(path, tensors, {"extractor": f"{extractor}; sha256:{self.network}"})

    @classmethod
    def load(cls, path: Path) -> Statistics:
        tensors = read_tensors(path)
        if set(tensors) != {"mean", "covariance", "features"}:
            raise ValueError(f"{path}: holds {sorted(tensors)}, accepted are mean, covariance and features")
        network = read_metadata(path).get("extractor", "").rpartition("sha256:")[2]
        moments = (tensors["mean"].double(), tensors["covariance"].double())
        return cls(*moments, tensors["features"].float(), network)


def check_reference(features: Tensor, extractor: Extractor, reference: Statistics) -> None:
    if features.shape[1] != len(reference.mean):
        problem = f"makes {features.shape[1]} features, the reference has {len(reference.mean)}"
    elif extractor.network != reference.network:
        problem = "is another network than the reference was made with"
    else:
        return
    raise ValueError(
        f"evaluate: {extractor.name} {problem}; make one in the same features with `ard statistics`"
    )

"""Evaluation of the images of an .npz file, against ADM's reference files or those of `ard statistics`."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ard.adm_reference import AdmReference
from ard.checkpoints import read_json
from ard.features import Extractor, Statistics, check_reference
from ard.metrics import (
    NEIGHBOURS,
    Moments,
    adm_distances,
    frechet_distance,
    inception_score,
    precision_recall,
)
from ard.npz import NpzImages
from ard.shards import worker_device

# sha256 of pt_inception-2015-12-05-6726825d.pth (95,628,359 bytes), converted from TensorFlow's weights.
PUBLISHED_INCEPTION = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
_PUBLISHED_COUNT = 50_000  # of samples, in published FIDs
_HASHED = 1 << 24  # bytes per read: large enough for the disk, small enough for the progress bar


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    size, name = path.stat().st_size, f"sha256 {path.name}"
    with (
        path.open("rb") as file,
        tqdm(total=size, desc=name, unit="B", unit_scale=True, mininterval=1.0) as bar,
    ):
        while part := file.read(_HASHED):
            digest.update(part)
            bar.update(len(part))
    return digest.hexdigest()


@dataclass
class _Seen:
    """Features of all images of a file, and their moments."""

    features: Tensor
    moments: Moments = field(default_factory=Moments)
    spatial: Moments = field(default_factory=Moments)
    right: int = 0
    """Images that the network takes for their label."""


@torch.no_grad()
def _look(images: NpzImages, extractor: Extractor, batch_size: int, labels: Tensor | None = None) -> _Seen:
    seen, first = None, 0
    with tqdm(total=images.count, desc=images.path.name, unit="image", mininterval=1.0) as bar:
        for part in images.batches(batch_size):
            if extractor.both is None:
                features = extractor.features(part).float()
            else:
                features, spatial = extractor.both(part)
            if seen is None:  # in one piece from the start: a list and then its tensor are twice the memory
                seen = _Seen(features.new_empty(images.count, features.shape[1]))
            if not features.isfinite().all():
                raise ValueError(f"{images.path}: features of images from {first} on are not finite")
            last = first + len(part)
            seen.features[first:last] = features
            seen.moments.add(features)
            if extractor.both is not None:
                seen.spatial.add(spatial)
            if labels is not None and extractor.classes is not None:
                seen.right += int((extractor.classes(part) == labels[first:last]).sum())
            first = last
            bar.update(len(part))
    assert seen is not None
    return seen


def _check_images(images: NpzImages, extractor: Extractor) -> None:
    if images.count <= NEIGHBOURS:
        raise ValueError(f"{images.path}: has {images.count} images, accepted are more than {NEIGHBOURS}")
    size = (images.height, images.width)
    if images.channels not in extractor.channels or extractor.size not in (None, size):
        channels = " or ".join(map(str, extractor.channels))
        wanted = f"{channels} channels" + (f" of size {extractor.size}" if extractor.size else "")
        raise ValueError(
            f"{images.path}: has images of {images.channels} channels, size {size}; {extractor.name} takes "
            f"{wanted}"
        )


def _distance(own: Moments, reference: tuple[Tensor, Tensor]) -> float:
    return frechet_distance(own.mean, own.covariance, *reference)


def _rounding(samples: Path) -> str:
    """Rounding of the images to uint8, according to the record of `ard sample` beside them."""
    record = samples.with_name("sample.json")
    written = read_json(record) if record.is_file() else None
    if not isinstance(written, dict) or not {"config", "versions"} <= written.keys():
        return "not recorded"
    return str(written.get("rounding", "nearest"))  # to_uint8 rounds to the nearest


def _against_adm(
    seen: _Seen, images: NpzImages, extractor: Extractor, reference: AdmReference, batch_size: int
) -> tuple[dict[str, float], dict[str, Any], list[str]]:
    """Metrics, the reference's entry in the report, and notes."""
    notes = []
    if extractor.network != PUBLISHED_INCEPTION:
        notes.append(
            f"the weights are not the published ones (sha256 {PUBLISHED_INCEPTION[:8]}): not comparable"
        )
    moments, spatial, other, real = reference.moments, reference.spatial, reference.images, None
    if other is not None:
        if (other.height, other.width) != (images.height, images.width):
            notes.append(
                f"the samples are {images.height} x {images.width}, "
                f"the reference's images {other.height} x {other.width}"
            )
        real = _look(other, extractor, batch_size)
        if moments is None:  # like ADM's: then all moments are those of the images
            moments = (real.moments.mean, real.moments.covariance)
            spatial = (real.spatial.mean, real.spatial.covariance)
    assert moments is not None
    metrics = {"fid": _distance(seen.moments, moments)}
    if spatial is None:
        notes.append("the reference has no mu_s and sigma_s: no sFID")
    else:
        metrics["sfid"] = _distance(seen.spatial, spatial)
    assert extractor.head is not None
    metrics["inception_score"] = inception_score(seen.features, extractor.head)
    if real is None:
        notes.append("the reference has no images arr_0: no precision and recall")
    else:
        device = worker_device()
        pair = precision_recall(seen.features.to(device), real.features.to(device), adm_distances)
        metrics["precision"], metrics["recall"] = pair
    entry = {
        "images": None if other is None else other.count,
        "moments": "of arr_0" if reference.moments is None else "mu, sigma",
    }
    return metrics, entry, notes


def _against_statistics(
    seen: _Seen, extractor: Extractor, reference: Statistics
) -> tuple[dict[str, float], dict[str, Any], list[str]]:
    device = worker_device()
    metrics = {"frechet": _distance(seen.moments, (reference.mean, reference.covariance))}
    pair = precision_recall(seen.features.to(device), reference.features.to(device))
    metrics["precision"], metrics["recall"] = pair
    count, notes = len(reference.features), []
    if count != seen.moments.count:
        notes.append(
            f"precision and recall of {seen.moments.count} samples and {count} real images: compare with "
            "figures of the same counts only"
        )
    return metrics, {"images": count, "moments": "mean, covariance"}, notes


def evaluate_samples(samples: Path, reference: Path, extractor: Extractor, batch_size: int) -> dict[str, Any]:
    """The report on the images of an .npz file.

    Args:
        samples: file of `arr_0`, (n, h, w, 1 or 3) uint8, and perhaps `labels`, (n,).
        reference: .npz of ADM's suite (`mu`, `sigma`, `mu_s`, `sigma_s`, `arr_0`; Inception features), or
            .safetensors of `ard statistics`.
        extractor: the network.
        batch_size: images per pass.

    Raises:
        ValueError: a file is not what is accepted, or does not fit the network. Checked before the long pass.
    """
    images = NpzImages(samples)
    _check_images(images, extractor)
    labels = images.labels()
    adm = own = None
    if reference.suffix == ".npz":
        if extractor.both is None or extractor.head is None:
            raise ValueError(
                f"evaluate: reference is {reference}, statistics of Inception's features; wanted is "
                "--inception FILE"
            )
        adm = AdmReference.load(reference)
        if adm.images is not None:
            _check_images(adm.images, extractor)
    else:
        own = Statistics.load(reference)
        one = torch.zeros(1, images.channels, images.height, images.width, dtype=torch.uint8)
        check_reference(extractor.features(one), extractor, own)
    seen = _look(images, extractor, batch_size, labels)
    if adm is not None:
        metrics, entry, notes = _against_adm(seen, images, extractor, adm, batch_size)
    else:
        assert own is not None
        metrics, entry, notes = _against_statistics(seen, extractor, own)
    if labels is not None and extractor.classes is not None:
        metrics["consistency"] = seen.right / images.count
    if images.count <= seen.features.shape[1]:
        notes.append(
            f"{images.count} samples of {seen.features.shape[1]} features: their covariance is singular, the "
            "distance is far too large"
        )
    elif adm is not None and images.count != _PUBLISHED_COUNT:
        notes.append(
            f"{images.count} samples; published figures are of {_PUBLISHED_COUNT}, fewer give a larger FID"
        )
    return {
        "features": extractor.name,
        "weights_sha256": extractor.network,
        "metrics": metrics,
        "samples": {
            "file": str(samples), "sha256": _sha256(samples), "images": images.count,
            "size": [images.height, images.width, images.channels], "dtype": "uint8",
            "rounding": _rounding(samples),
        },
        "reference": {"file": str(reference), "sha256": _sha256(reference), **entry},
        "batch_size": batch_size,
        "notes": notes,
    }  # fmt: skip


_NAMES = {
    "fid": "FID", "sfid": "sFID", "inception_score": "IS", "frechet": "Frechet", "precision": "precision",
    "recall": "recall", "consistency": "consistency",
}  # fmt: skip


def print_samples_report(report: dict[str, Any]) -> None:
    """A table of one row, and notes."""
    samples, reference = report["samples"], report["reference"]
    print(f"features: {report['features']}; weights sha256 {report['weights_sha256'][:8]}")
    print(f"samples: {samples['file']}, {samples['images']} images, rounding {samples['rounding']}")
    print(f"reference: {reference['file']}, sha256 {reference['sha256'][:8]}")
    print("".join(f"{_NAMES[name]:>13}" for name in report["metrics"]))
    print("".join(f"{value:13.4f}" for value in report["metrics"].values()))
    for note in report["notes"]:
        print(f"note: {note}")

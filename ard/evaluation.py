"""How good samples are: Frechet distance, precision and recall in the features of some network, error against
the teacher from the same noise."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from ard.assets import ASSETS
from ard.checkpoints import (
    CONFIG,
    WEIGHTS,
    described,
    load_student,
    load_weights,
    read_json,
    read_metadata,
    read_tensors,
    replacing,
    save_student,
    sha256,
    write_json,
    write_tensors,
)
from ard.data import (
    DEBIAN_FOLDER,
    Dataset,
    ImageFolder,
    check_counts,
    check_folder,
    load_images,
    to_uint8,
)
from ard.encoding import decode, load_decoder
from ard.models.classifier import Classifier
from ard.pictures import image_grid, save_png
from ard.precision import Precision, PrecisionConfig, computing, settled
from ard.runs import Run, checkpoints, plain, versions
from ard.sampling import check_finite, sample
from ard.shards import worker_device
from ard.training import Batch, Optimisation, accelerator_for, fit, image_batches, settled_options
from ard.trajectories import TrajectoryStore

# Neighbours of a point whose farthest gives its radius: Kynkaanniemi et al., arXiv 1904.06991, section 3.
_NEIGHBOURS = 3
FEWEST = _NEIGHBOURS + 1  # samples that can be evaluated
# Images that a feature network sees at once: the largest of Inception's activations is 5.5 MB an image.
_BATCH = 250


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


def inception_extractor(weights: Path) -> Extractor:
    """FID's Inception, through torch-fidelity, from a local file of its weights
    (pt_inception-2015-12-05-*.pth)."""
    if not weights.is_file():
        raise FileNotFoundError(f"{weights}: no such file; wanted are torch-fidelity's Inception weights")
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except ImportError as error:
        raise ValueError(
            f"Inception features need the extra `eval` (pip install '.[eval]' in the repository): {error}"
        ) from None
    device = worker_device()
    model = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], str(weights)).eval().to(device)

    def features(images: Tensor) -> Tensor:
        colour = images.expand(-1, 3, -1, -1) if images.shape[1] == 1 else images
        (values,) = model(colour.to(device))
        return values.cpu()  # type: ignore[no-any-return]

    return Extractor("Inception (torch-fidelity), 2048 features", features, network=sha256(weights))


@torch.no_grad()
def extract(extractor: Extractor, images: Tensor, batch: int = _BATCH) -> Tensor:
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
        """Of features that come in parts (n, d), of which no more than `keep` stay in memory.

        Two parts' moments make those of both (Chan et al., Updating formulae and a pairwise algorithm for
        computing sample variances, 1979).
        """
        count, mean, scatter, kept = 0, torch.zeros(()), torch.zeros(()), []
        for part in parts:
            wide = part.double()
            own = wide.mean(0)
            step, total = own - mean, count + len(part)
            centred = wide - own
            scatter = scatter + centred.T @ centred + torch.outer(step, step) * (count * len(part) / total)
            mean, count = mean + step * (len(part) / total), total
            if keep > 0:
                kept.append(part[:keep])
                keep -= len(kept[-1])
        return cls(mean, scatter / (count - 1), torch.cat(kept) if kept else part[:0], network)

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


def frechet_distance(mean_a: Tensor, cov_a: Tensor, mean_b: Tensor, cov_b: Tensor) -> float:
    """|mean_a - mean_b|^2 + tr(A + B - 2 (A B)^(1/2)), in float64 (Heusel et al., arXiv 1706.08500, equation
    6).

    (A B)^(1/2) has the eigenvalues of (A^(1/2) B A^(1/2))^(1/2), which is symmetric.
    """
    values, vectors = torch.linalg.eigh(cov_a.double())
    root = (vectors * values.clamp_min(0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cov_b.double() @ root).clamp_min(0).sqrt().sum()
    shift = (mean_a.double() - mean_b.double()).square().sum()
    return float(shift + cov_a.double().trace() + cov_b.double().trace() - 2 * cross)


def _covered(points: Tensor, manifold: Tensor) -> float:
    """Share of `points` within the radius of a point of `manifold`, its distance to its third-nearest
    neighbour."""
    radii = torch.cat(
        [torch.cdist(part, manifold).kthvalue(_NEIGHBOURS + 1)[0] for part in manifold.split(1000)]
    )
    inside = [(torch.cdist(part, manifold) <= radii).any(1) for part in points.split(1000)]
    return float(torch.cat(inside).float().mean())


def precision_recall(generated: Tensor, real: Tensor) -> tuple[float, float]:
    """k-nearest-neighbour precision and recall (arXiv 1904.06991) of features (n, d), on equally many of
    both."""
    n = min(len(generated), len(real))
    return _covered(generated[:n], real[:n]), _covered(real[:n], generated[:n])


def _check_reference(features: Tensor, extractor: Extractor, reference: Statistics) -> None:
    if features.shape[1] != len(reference.mean):
        problem = f"makes {features.shape[1]} features, the reference has {len(reference.mean)}"
    elif extractor.network != reference.network:
        problem = "is another network than the reference was made with"
    else:
        return
    raise ValueError(
        f"evaluate: {extractor.name} {problem}; make one in the same features with `ard statistics`"
    )


def image_metrics(images: Tensor, extractor: Extractor, reference: Statistics) -> dict[str, float]:
    """Frechet distance, precision and recall of images (n, C, h, w) uint8."""
    return _metrics(extract(extractor, images), extractor, reference)


def _metrics(features: Tensor, extractor: Extractor, reference: Statistics) -> dict[str, float]:
    _check_reference(features, extractor, reference)
    own = Statistics.of(features, 0)
    precision, recall = precision_recall(features, reference.features)
    distance = frechet_distance(own.mean, own.covariance, reference.mean, reference.covariance)
    return {"frechet": distance, "precision": precision, "recall": recall, "samples": len(features)}


_SHOWN = 20  # on the picture


class Judged:
    """What a network makes of images that come in batches, and the first of the images."""

    def __init__(self, extractor: Extractor) -> None:
        self._extractor, self._right = extractor, 0
        self._features: list[Tensor] = []
        self._first: list[Tensor] = []

    @torch.no_grad()
    def add(self, images: Tensor, labels: Tensor) -> None:
        """(n, C, h, w) uint8, (n,)."""
        if sum(map(len, self._first)) < _SHOWN:
            self._first.append(images)
        self._features.append(extract(self._extractor, images))
        if self._extractor.classes is not None:
            found = torch.cat([self._extractor.classes(part) for part in images.split(_BATCH)])
            self._right += int((found == labels).sum())

    @property
    def first(self) -> Tensor:
        return torch.cat(self._first)[:_SHOWN]

    @property
    def consistency(self) -> float | None:
        """Share of the images that the network takes for their label; None where it has no classes."""
        return None if self._extractor.classes is None else self._right / sum(map(len, self._features))

    def report(self, reference: Statistics) -> dict[str, Any]:
        metrics = _metrics(torch.cat(self._features), self._extractor, reference)
        return {**metrics, "consistency": self.consistency}


@dataclass(frozen=True)
class EvaluateConfig(PrecisionConfig):
    """Evaluate a student on recorded trajectories that it was not trained on (`ard record` with another
    seed)."""

    student: Path
    """Folder of the student."""
    trajectories: Path
    """Store of held-out trajectories: the noise to start from, and the teacher's results from it."""
    out: Path
    """Folder of the report: evaluation.json and samples.png."""
    samples: int | None = None
    """How many of the trajectories; default: all."""
    batch_size: int = 100
    """Samples per pass."""
    vae: Path | None = None
    """Of a student of latents: folder of a diffusers AutoencoderKL that decodes them."""
    classifier: Path = ASSETS / "classifier"
    """Folder of the classifier whose features are used."""
    inception: Path | None = None
    """Use Inception features instead, from this local weights file of torch-fidelity."""
    reference: Path = ASSETS / "statistics.safetensors"
    """Statistics of real images in the same features (`ard statistics`)."""


def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    config = replace(config, precision=settled(config.precision, worker_device())[0])
    student, trained = load_student(config.student)
    store = TrajectoryStore(config.trajectories)
    count = len(store) if config.samples is None else config.samples
    if not FEWEST <= count <= len(store):
        raise ValueError(
            f"evaluate: samples is {count}, accepted are {FEWEST}..{len(store)}, what {store.folder} holds"
        )
    check_counts("evaluate", batch_size=config.batch_size)
    check_folder("evaluate", config.out)
    grid, state = store.of_student(config.student, student, trained)
    extractor = extractor_of(config.classifier, config.inception)
    reference, device = Statistics.load(config.reference), worker_device()
    vae = None if config.vae is None else load_decoder(config.vae, student.channels, device, "evaluate")

    def images(x: Tensor) -> Tensor:
        return to_uint8(x if vae is None else decode(vae, x.to(device)).cpu())

    one = images(torch.zeros(1, student.channels, *student.input_size))
    if one.shape[1] not in extractor.channels:
        raise ValueError(
            f"evaluate: the student's images have {one.shape[1]} channels, {extractor.name} takes "
            f"{' or '.join(map(str, extractor.channels))}; latents are decoded by --vae"
        )
    if extractor.size not in (None, (*one.shape[2:],)):
        raise ValueError(
            f"evaluate: the student's images have size {(*one.shape[2:],)}, {extractor.name} takes "
            f"{extractor.size}"
        )
    _check_reference(extract(extractor, one), extractor, reference)
    student.to(device)
    seen = {"student": Judged(extractor), "teacher": Judged(extractor)}
    errors = torch.zeros(student.steps, dtype=torch.float64)
    seconds: list[float] = []  # a sample, by batch: kernels are compiled in the first
    for indices in tqdm(torch.arange(count).split(config.batch_size), desc="sample", mininterval=1.0):
        states, labels = store.states(indices, grid, state)
        began = time.perf_counter()
        with computing(config.precision, device):
            path = sample(student, states[:, 0].to(device), labels.to(device)).cpu()
        seconds.append((time.perf_counter() - began) / len(indices))
        check_finite(config.student, path)
        errors += (path - states[:, 1:]).square().mean((2, 3, 4)).double().sum(0)
        seen["student"].add(images(path[:, -1]), labels)
        seen["teacher"].add(images(states[:, -1]), labels)
    metrics = {name: some.report(reference) for name, some in seen.items()}
    report = {
        "features": extractor.name, **metrics, "errors": (errors / count).tolist(),
        "seconds_per_sample": median(seconds), "steps": student.steps,
        "history_layers": student.history_layers, "mask": student.mask,
        "trained_with_the_same_noise": store.has_noise_of(trained),
        "config": plain(config), "versions": versions(),
    }  # fmt: skip
    write_json(config.out / "evaluation.json", report)
    pairs = torch.cat([seen[name].first for name in ("teacher", "student")])
    picture = image_grid(pairs.float() / 127.5 - 1, columns=min(_SHOWN, count))
    save_png(config.out / "samples.png", picture)
    return report


def evaluate_checkpoints(run: Path, held_out: Path, precision: Precision = "auto") -> list[dict[str, Any]]:
    """The report of each checkpoint's averaged weights, and its `step`, over the training of a student.

    Args:
        run: folder of `ard distill` or `ard finetune`. Reports stay in its subfolder `evaluations`.
        held_out: store of trajectories.
        precision: in which the students compute.
    """
    student, trained = load_student(run / "student")
    points = []
    for step, folder in checkpoints(run):
        target = run / "evaluations" / folder.name
        report = target / "evaluation.json"
        if not report.exists() or read_json(report)["config"]["trajectories"] != str(held_out):
            weights = {**student.state_dict(), **read_tensors(folder / "ema.safetensors")}
            save_student(target / "student", student, trained, weights)
            evaluate(EvaluateConfig(target / "student", held_out, target, precision=precision))
        points.append({"step": step, **read_json(report)})
    return points


def print_report(report: dict[str, Any]) -> None:
    print(f"features: {report['features']}; samples: {report['student']['samples']}")
    print(f"{'':10}{'Frechet':>10}{'precision':>11}{'recall':>8}{'consistency':>13}")
    for name in ("teacher", "student"):
        row = report[name]
        consistency = "" if row["consistency"] is None else f"{row['consistency']:.3f}"
        print(f"{name:10}{row['frechet']:10.2f}{row['precision']:11.3f}{row['recall']:8.3f}{consistency:>13}")
    print("error against the teacher from the same noise, per step:", *(f"{e:.4f}" for e in report["errors"]))
    if report["trained_with_the_same_noise"]:
        print("the student was trained from noise of the same seed; these are not held-out samples")


@dataclass(frozen=True)
class TrainClassifierConfig:
    """Train the classifier whose features evaluate samples."""

    out: Path
    """Folder of the run. The classifier is written to its subfolder `classifier`."""
    dataset: Dataset = "fashion-mnist"
    """The images."""
    data: Path = DEBIAN_FOLDER
    """Folder of the Fashion-MNIST files."""
    optimisation: Optimisation = field(
        default_factory=lambda: Optimisation(
            iterations=3000,
            batch_size=128,
            lr=2e-3,
            lr_schedule="cosine",
            warmup=100,
            weight_decay=0.01,
            ema=0.99,
            sample_every=0,
        )
    )
    """How the weights are optimised."""


def train_classifier(config: TrainClassifierConfig) -> None:
    o, precision = settled_options(config.optimisation, config.out)
    config = replace(config, optimisation=o)
    accelerator = accelerator_for(o)
    images, test = (load_images(config.dataset, train, config.data) for train in (True, False))
    run = Run(config.out, "train-classifier", config, accelerator.is_main_process, precision=precision)
    torch.manual_seed(o.seed)
    model = Classifier()

    if o.compile:
        model.compile()

    def loss_of(model: nn.Module, batch: Batch, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        pixels, labels = batch
        return F.cross_entropy(model(pixels).float(), labels), {}

    weights = fit(run, accelerator, model, o, image_batches(images, o.seed), loss_of, None)
    model.load_state_dict(weights)
    model.eval()
    with torch.no_grad():
        right = torch.cat(
            [model(part).argmax(1) for part in test.pixels.to(accelerator.device).split(500)]
        ).cpu()
    accuracy = float((right == test.labels).float().mean())
    if accelerator.is_main_process:
        folder = config.out / "classifier"
        with replacing(folder) as temporary:
            temporary.mkdir()
            write_tensors(temporary / WEIGHTS, model.state_dict())
            write_json(
                temporary / CONFIG, {"class": "Classifier", "config": model.config, "test_accuracy": accuracy}
            )
        print(f"classifier: {folder} (accuracy on the test images {accuracy:.4f})")


@dataclass(frozen=True)
class StatisticsConfig:
    """Compute statistics of real images for `ard evaluate`: of a data set's, or of a folder of images."""

    out: Path
    """The .safetensors file to write."""
    dataset: Dataset = "fashion-mnist"
    """The images: moments over the training images, and the distance of the test images from them as a
    check."""
    data: Path = DEBIAN_FOLDER
    """Folder of the Fashion-MNIST files."""
    images: Path | None = None
    """Instead of the data set: a folder of images in a subfolder a class."""
    size: int = 256
    """Height and width in pixels to which those are resized and cropped."""
    classifier: Path = ASSETS / "classifier"
    """Folder of the classifier whose features are used."""
    inception: Path | None = None
    """Use Inception features instead, from this local weights file of torch-fidelity."""
    keep: int = 5000
    """How many images' features are kept, for precision and recall."""


def _check_folder(images: ImageFolder, extractor: Extractor) -> None:
    if len(images) <= _NEIGHBOURS:
        raise ValueError(f"statistics: images has {len(images)}, accepted are more than {_NEIGHBOURS}")
    if extractor.size not in (None, images.shape[1:]):
        raise ValueError(
            f"statistics: size is {images.shape[1]}, accepted by {extractor.name} is {extractor.size[0]}"
        )


def _folder_features(images: ImageFolder, extractor: Extractor) -> Iterator[Tensor]:
    """(n, d), in a random order, which is always the same: what is kept of them is of all classes."""
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    with tqdm(total=len(images), desc="statistics", unit="image", mininterval=1.0) as bar:
        for indices in order.split(_BATCH):
            pixels, _ = images.fetch(indices, torch.zeros(len(indices), dtype=torch.bool))
            yield extract(extractor, to_uint8(pixels))
            bar.update(len(indices))


def statistics(config: StatisticsConfig) -> None:
    if config.keep <= _NEIGHBOURS:
        raise ValueError(f"statistics: keep is {config.keep}, accepted is an integer > {_NEIGHBOURS}")
    if config.out.suffix != ".safetensors":  # by which `ard evaluate` reads it
        raise ValueError(f"statistics: out is {config.out}, accepted is the name of a .safetensors file")
    extractor = extractor_of(config.classifier, config.inception)
    if config.images is not None:
        images = ImageFolder(config.images, config.size, max(extractor.channels))
        _check_folder(images, extractor)
        features = _folder_features(images, extractor)
        Statistics.of_parts(features, config.keep, extractor.network).save(config.out, extractor.name)
        print(f"statistics: {config.out} ({len(images)} images)")
        return
    train, test = (to_uint8(load_images(config.dataset, t, config.data).pixels) for t in (True, False))
    reference = Statistics.of(extract(extractor, train), config.keep, extractor.network)
    reference.save(config.out, extractor.name)
    print(
        f"statistics: {config.out}; test images: {image_metrics(test[: config.keep], extractor, reference)}"
    )

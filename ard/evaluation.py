"""How good samples are: Frechet distance, precision and recall in the features of some network, error against
the teacher from the same noise."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from ard.adm_reference import write_adm_reference
from ard.assets import ASSETS
from ard.checkpoints import (
    CONFIG,
    WEIGHTS,
    load_student,
    read_json,
    read_tensors,
    replacing,
    save_student,
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
from ard.features import BATCH, Extractor, Statistics, check_reference, extract, extractor_of
from ard.metrics import NEIGHBOURS, frechet_distance, precision_recall
from ard.models.classifier import Classifier
from ard.pictures import image_grid, save_png
from ard.precision import Precision, PrecisionConfig, computing, settled
from ard.runs import Run, checkpoints, plain, versions
from ard.samples_evaluation import evaluate_samples, print_samples_report
from ard.sampling import check_finite, sample
from ard.shards import worker_device
from ard.training import Batch, Optimisation, accelerator_for, fit, image_batches, settled_options
from ard.trajectories import TrajectoryStore

FEWEST = NEIGHBOURS + 1  # samples that can be evaluated


def image_metrics(images: Tensor, extractor: Extractor, reference: Statistics) -> dict[str, float]:
    """Frechet distance, precision and recall of images (n, C, h, w) uint8."""
    return _metrics(extract(extractor, images), extractor, reference)


def _metrics(features: Tensor, extractor: Extractor, reference: Statistics) -> dict[str, float]:
    check_reference(features, extractor, reference)
    own = Statistics.of(features, 0)
    count = min(len(features), len(reference.features))  # of both: fewer cover more
    precision, recall = precision_recall(features[:count], reference.features[:count])
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
            found = torch.cat([self._extractor.classes(part) for part in images.split(BATCH)])
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
    seed), or the images of a file.

    For an FID that compares with published ones: --samples samples.npz --inception FILE --reference
    VIRTUAL_imagenet256_labeled.npz.
    """

    student: Path | None = None
    """Folder of the student."""
    trajectories: Path | None = None
    """Store of held-out trajectories: the noise to start from, and the teacher's results from it."""
    out: Path = field(kw_only=True)
    """Folder of the report: evaluation.json, and samples.png of a student."""
    samples: int | Path | None = None
    """Of a student, how many of the trajectories; default: all. Instead of a student, an .npz file of images
    (`ard sample`): arr_0, (n, h, w, 1 or 3) uint8."""
    batch_size: int = 100
    """Samples per pass."""
    vae: Path | None = None
    """Of a student of latents: folder of a diffusers AutoencoderKL that decodes them."""
    classifier: Path = ASSETS / "classifier"
    """Folder of the classifier whose features are used."""
    inception: Path | None = None
    """Use Inception features instead, from this local file of its weights
    (pt_inception-2015-12-05-6726825d.pth)."""
    reference: Path = ASSETS / "statistics.safetensors"
    """Statistics of real images in the same features (`ard statistics`). With --samples FILE also an .npz of
    ADM's evaluation suite."""


# Options that mean something where the images of a file are evaluated.
_OF_SAMPLES = {"samples", "out", "batch_size", "classifier", "inception", "reference"}


def _of_samples(config: EvaluateConfig, samples: Path) -> dict[str, Any]:
    for option in fields(config):
        if option.name not in _OF_SAMPLES and getattr(config, option.name) != option.default:
            raise ValueError(
                f"evaluate: {option.name} is {getattr(config, option.name)}, accepted with --samples FILE "
                f"are {', '.join(sorted(_OF_SAMPLES))}"
            )
    check_counts("evaluate", batch_size=config.batch_size)
    check_folder("evaluate", config.out)
    extractor = extractor_of(config.classifier, config.inception)
    report = {
        **evaluate_samples(samples, config.reference, extractor, config.batch_size),
        "config": plain(replace(config, precision="no")),  # feature networks compute in float32
        "versions": versions(),
    }
    write_json(config.out / "evaluation.json", report)
    return report


def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """The report, which is also written to the folder `out`."""
    samples = config.samples
    if isinstance(samples, Path):
        return _of_samples(config, samples)
    config = replace(config, precision=settled(config.precision, worker_device())[0])
    if config.student is None or config.trajectories is None:
        missing = "student" if config.student is None else "trajectories"
        raise ValueError(
            f"evaluate: {missing} is not given; accepted are --student FOLDER with --trajectories FOLDER, or "
            "--samples FILE"
        )
    if config.reference.suffix == ".npz":
        raise ValueError(
            f"evaluate: reference is {config.reference}, accepted with --student is a .safetensors file of "
            "`ard statistics`; --samples FILE takes an .npz"
        )
    student, trained = load_student(config.student)
    store = TrajectoryStore(config.trajectories)
    count = len(store) if samples is None else samples
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
    check_reference(extract(extractor, one), extractor, reference)
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
            evaluate(EvaluateConfig(target / "student", held_out, out=target, precision=precision))
        points.append({"step": step, **read_json(report)})
    return points


def print_report(report: dict[str, Any]) -> None:
    if "student" not in report:
        return print_samples_report(report)
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
    """The .safetensors file to write. With --images and --inception also an .npz as in ADM's suite."""
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
    """Use Inception features instead, from this local file of its weights
    (pt_inception-2015-12-05-6726825d.pth)."""
    keep: int = 5000
    """How many images' features (in an .npz: images) are kept, for precision and recall."""


def _check_folder(images: ImageFolder, extractor: Extractor) -> None:
    if len(images) <= NEIGHBOURS:
        raise ValueError(f"statistics: images has {len(images)}, accepted are more than {NEIGHBOURS}")
    if extractor.size not in (None, images.shape[1:]):
        raise ValueError(
            f"statistics: size is {images.shape[1]}, accepted by {extractor.name} is {extractor.size[0]}"
        )


def _parts(images: ImageFolder) -> Iterator[Tensor]:
    """(n, C, h, w) uint8, in a random order, which is always the same: what is kept is of all classes."""
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    with tqdm(total=len(images), desc="statistics", unit="image", mininterval=1.0) as bar:
        for indices in order.split(BATCH):
            pixels, _ = images.fetch(indices, torch.zeros(len(indices), dtype=torch.bool))
            yield to_uint8(pixels)
            bar.update(len(indices))


def statistics(config: StatisticsConfig) -> None:
    if config.keep <= NEIGHBOURS:
        raise ValueError(f"statistics: keep is {config.keep}, accepted is an integer > {NEIGHBOURS}")
    adm = config.out.suffix == ".npz" and config.images is not None and config.inception is not None
    if config.out.suffix != ".safetensors" and not adm:  # by which `ard evaluate` reads it
        raise ValueError(
            f"statistics: out is {config.out}, accepted is the name of a .safetensors file, with --images "
            "and --inception also of an .npz file"
        )
    extractor = extractor_of(config.classifier, config.inception)
    if config.images is not None:
        images = ImageFolder(config.images, config.size, max(extractor.channels))
        _check_folder(images, extractor)
        if adm:
            channels, height, width = images.shape
            shape = (min(config.keep, len(images)), height, width, channels)
            write_adm_reference(config.out, _parts(images), shape, extractor)
        else:
            features = (extract(extractor, part) for part in _parts(images))
            Statistics.of_parts(features, config.keep, extractor.network).save(config.out, extractor.name)
        print(f"statistics: {config.out} ({len(images)} images)")
        return
    train, test = (to_uint8(load_images(config.dataset, t, config.data).pixels) for t in (True, False))
    reference = Statistics.of(extract(extractor, train), config.keep, extractor.network)
    reference.save(config.out, extractor.name)
    print(
        f"statistics: {config.out}; test images: {image_metrics(test[: config.keep], extractor, reference)}"
    )

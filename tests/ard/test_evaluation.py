"""The measures on cases whose answers are known, and the report of a student whose errors can be computed by
hand."""

from __future__ import annotations

import gzip
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image
from tiny import TINY, tiny_teacher

import ard
from ard.assets import ASSETS
from ard.checkpoints import load_student, save_student, save_teacher, write_json
from ard.data import load_images, to_uint8
from ard.diffusion import Diffusion
from ard.evaluation import (
    EvaluateConfig,
    Judged,
    StatisticsConfig,
    TrainClassifierConfig,
    evaluate,
    image_metrics,
    print_report,
    statistics,
    train_classifier,
)
from ard.features import Extractor, Statistics, classifier_extractor, extract, load_classifier
from ard.metrics import precision_recall
from ard.models import ARDTransformer, DiT
from ard.recording import RecordConfig, record
from ard.training import Optimisation
from ard.trajectories import TrajectoryStore


def test_moments_are_those_of_the_samples() -> None:
    features = torch.randn(50, 4)
    own = Statistics.of(features, keep=10)
    assert np.allclose(own.covariance, np.cov(features.double().numpy().T))
    assert np.allclose(own.mean, features.double().numpy().mean(0))
    assert torch.equal(own.features, features[:10])


def test_moments_of_parts_are_those_of_the_whole() -> None:
    """Far from zero, in parts of any size, and without what is not to be kept."""
    features = 1000 + torch.randn(50, 4)
    own = Statistics.of_parts(iter(features.split([1, 20, 4, 25])), keep=23)
    np.testing.assert_allclose(own.covariance, np.cov(features.double().numpy().T), rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(own.mean, features.double().numpy().mean(0), rtol=1e-14)
    assert torch.equal(own.features, features[:23])
    assert Statistics.of_parts([features], keep=0).features.shape == (0, 4)


def test_any_extractor_will_do() -> None:
    """Features that are two pixels of uint8 images: the distance is that of those pixels."""
    extractor = Extractor("two pixels", lambda images: images[:, 0, 0, :2].float())
    images = torch.randint(0, 256, (400, 1, 4, 4), dtype=torch.uint8)
    features = extract(extractor, images, batch=150)
    assert torch.equal(features, images[:, 0, 0, :2].float())
    report = image_metrics(images, extractor, Statistics.of(features, 400))
    assert report == {"frechet": pytest.approx(0, abs=1e-4), "precision": 1, "recall": 1, "samples": 400}
    moved = Statistics.of(features + torch.tensor([3.0, 4.0]), 400)
    assert image_metrics(images, extractor, moved)["frechet"] == pytest.approx(25, rel=1e-4)
    report = image_metrics(images[:50], extractor, moved)  # against as many of the reference's
    wanted = precision_recall(features[:50], moved.features[:50])
    assert (report["precision"], report["recall"]) == wanted
    assert wanted != precision_recall(features[:50], moved.features)
    with pytest.raises(ValueError, match="two pixels makes 2 features, the reference has 3"):
        image_metrics(images, extractor, Statistics.of(torch.randn(9, 3), 9))


def test_class_consistency_of_real_images_is_the_accuracy() -> None:
    images = load_images("digits", train=False)
    extractor = Extractor("by the mean", lambda x: x, lambda x: x.float().mean((1, 2, 3)).long() % 10)
    pixels = to_uint8(images.pixels)
    wanted = sum(int(float(x.float().mean())) % 10 == y for x, y in zip(pixels, images.labels, strict=True))
    judged, other = Judged(extractor), Judged(Extractor("no classes", lambda x: x))
    for part, labels in zip(pixels.split(7), images.labels.split(7), strict=True):
        judged.add(part, labels)
        other.add(part, labels)
    assert judged.consistency == pytest.approx(wanted / len(pixels))
    assert other.consistency is None
    assert torch.equal(judged.first, pixels[:20])


def test_the_embedded_classifier_makes_the_embedded_statistics() -> None:
    extractor = classifier_extractor(ASSETS / "classifier")
    reference = Statistics.load(ASSETS / "statistics.safetensors")
    features = extract(extractor, torch.zeros(3, 1, 28, 28, dtype=torch.uint8))
    assert features.shape[1] == len(reference.mean) == reference.features.shape[1]
    assert reference.network == extractor.network


@pytest.mark.parametrize(
    ("content", "message"),
    [([], "holds no model, wanted is a Classifier"), ({"class": "DiT"}, "holds a DiT, wanted"),
     ({"class": "Classifier"}, r"does not describe a Classifier \(no 'config'\)"),
     ({"class": "Classifier", "config": 3}, "does not describe a Classifier")],
)  # fmt: skip
def test_a_classifier_that_is_not_described_is_refused(tmp_path: Path, content: object, message: str) -> None:
    write_json(tmp_path / "config.json", content)
    with pytest.raises(ValueError, match=rf"config\.json: {message}"):
        load_classifier(tmp_path)


@pytest.mark.parametrize("name", ["refstats", "refstats.npz"])
def test_statistics_have_the_name_that_is_read(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match=rf"{name}, accepted is the name of a \.safetensors file"):
        statistics(StatisticsConfig(tmp_path / name, dataset="digits"))


def test_a_report_says_what_the_student_does(recording: RecordConfig, student: Path, tmp_path: Path) -> None:
    held_out = replace(recording, out=tmp_path / "held-out", seed=1, samples=16)
    record(held_out)
    report = evaluate(
        EvaluateConfig(
            student, held_out.out, out=tmp_path / "report", samples=10, batch_size=4, precision="no"
        )
    )
    model, _ = load_student(student)
    store = TrajectoryStore(held_out.out)
    states, labels = store.states(torch.arange(10), store.grid(4), "x0")
    path = ard.sample(model, states[:, 0], labels)
    errors = (path - states[:, 1:]).square().mean((0, 2, 3, 4))
    assert report["errors"] == pytest.approx(errors.tolist(), rel=1e-4)
    extractor = classifier_extractor(ASSETS / "classifier")
    reference = Statistics.load(ASSETS / "statistics.safetensors")
    teacher = image_metrics(to_uint8(states[:, -1]), extractor, reference)
    right = load_classifier(ASSETS / "classifier")(states[:, -1].clamp(-1, 1)).argmax(1) == labels
    assert report["teacher"] == pytest.approx({**teacher, "consistency": float(right.float().mean())})
    assert report["student"] != report["teacher"]
    assert report["features"] == extractor.name
    assert report["student"]["samples"] == 10
    assert not report["trained_with_the_same_noise"]
    assert {path.name for path in (tmp_path / "report").iterdir()} == {"evaluation.json", "samples.png"}

    again = evaluate(EvaluateConfig(student, recording.out, out=tmp_path / "same", samples=4))
    assert again["trained_with_the_same_noise"]
    # A student trained elsewhere may not know its noise.
    del model.trajectories["seed"]
    model.save_pretrained(tmp_path / "elsewhere")
    again = evaluate(EvaluateConfig(tmp_path / "elsewhere", recording.out, out=tmp_path / "third", samples=4))
    assert not again["trained_with_the_same_noise"]


def test_seconds_are_those_of_a_usual_batch(
    recording: RecordConfig, student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the first one kernels are compiled: on a GPU that is most of a short evaluation."""
    clock = iter([0.0, 80.0, 100.0, 100.4, 200.0, 200.8])
    monkeypatch.setattr("ard.evaluation.time.perf_counter", lambda: next(clock))
    config = EvaluateConfig(student, recording.out, out=tmp_path / "report", samples=12, batch_size=4)
    assert evaluate(config)["seconds_per_sample"] == pytest.approx(0.2)


def _write_fashion(folder: Path) -> None:
    random = np.random.default_rng(0)
    folder.mkdir()
    for prefix, count in (("train", 60), ("t10k", 20)):
        for name, shape, magic, top in (
            ("images-idx3", (count, 28, 28), 0x803, 256),
            ("labels-idx1", (count,), 0x801, 10),
        ):
            header = np.array([magic, *shape], ">u4").tobytes()
            data = header + random.integers(0, top, shape).astype(np.uint8).tobytes()
            (folder / f"{prefix}-{name}-ubyte.gz").write_bytes(gzip.compress(data))


def test_classifier_and_statistics_of_ones_own(
    recording: RecordConfig, student: Path, tmp_path: Path
) -> None:
    """train-classifier, statistics and evaluate fit together on a data set in the format of Fashion-MNIST."""
    data, out = tmp_path / "data", tmp_path / "run"
    _write_fashion(data)
    o = Optimisation(iterations=3, batch_size=10, ema=0.5, checkpoint_every=3, log_every=1, sample_every=1)
    train_classifier(TrainClassifierConfig(out, data=data, optimisation=o))
    reference = tmp_path / "statistics.safetensors"
    statistics(StatisticsConfig(reference, data=data, classifier=out / "classifier", keep=30))
    assert Statistics.load(reference).features.shape == (30, 64)
    report = evaluate(EvaluateConfig(
        student, recording.out, out=tmp_path / "report", samples=8, classifier=out / "classifier",
        reference=reference
    ))  # fmt: skip
    assert np.isfinite(report["student"]["frechet"])
    with pytest.raises(ValueError, match="is another network than the reference was made with; make one"):
        evaluate(EvaluateConfig(student, recording.out, out=tmp_path / "embedded", reference=reference))
    assert not (tmp_path / "embedded").exists()


def test_a_student_of_another_size_is_refused_before_it_samples(tmp_path: Path) -> None:
    teacher = DiT(**{**TINY, "input_size": 14})
    save_teacher(tmp_path / "teacher", teacher, Diffusion("linear", "v"))
    record(RecordConfig(tmp_path / "teacher", tmp_path / "store", samples=4))
    store = TrajectoryStore(tmp_path / "store")
    student = ARDTransformer.from_teacher(teacher, history_layers=2)
    save_student(tmp_path / "student", student, store.summary(store.grid(4), "x0"))
    with pytest.raises(ValueError, match=r"images have size \(14, 14\), .* takes \(28, 28\)"):
        evaluate(EvaluateConfig(tmp_path / "student", store.folder, out=tmp_path / "report"))
    assert not (tmp_path / "report").exists()


def test_a_student_of_another_teacher_is_refused(
    recording: RecordConfig, student: Path, tmp_path: Path
) -> None:
    save_teacher(tmp_path / "teacher", tiny_teacher(5), Diffusion("linear", "v"))
    other = replace(recording, teacher=tmp_path / "teacher", out=tmp_path / "store", samples=8)
    record(other)
    with pytest.raises(ValueError, match="was recorded from another teacher than that of"):
        evaluate(EvaluateConfig(student, other.out, out=tmp_path / "report"))
    assert not (tmp_path / "report").exists()


def test_a_student_of_other_steps_than_it_says_is_refused(
    recording: RecordConfig, student: Path, tmp_path: Path
) -> None:
    model, trained = load_student(student)
    save_student(tmp_path / "student", model, {**trained, "grid": [25, 0]})
    with pytest.raises(ValueError, match=r"states at positions \[25, 0\], accepted are 5 of them"):
        evaluate(EvaluateConfig(tmp_path / "student", recording.out, out=tmp_path / "report"))


def test_a_report_says_that_the_student_was_trained_on_the_noise(
    recording: RecordConfig, student: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = "these are not held-out samples"
    report = evaluate(EvaluateConfig(student, recording.out, out=tmp_path / "report"))
    print_report(report)
    assert said in capsys.readouterr().out
    print_report({**report, "trained_with_the_same_noise": False})
    assert said not in capsys.readouterr().out


def _latents(folder: Path, samples: int) -> tuple[ARDTransformer, TrajectoryStore]:
    """A student of 4 channels in `folder`/student, and trajectories of its teacher."""
    teacher = tiny_teacher(channels=4, input_size=14)
    save_teacher(folder / "teacher", teacher, Diffusion("linear", "v"))
    record(RecordConfig(folder / "teacher", folder / "store", samples=samples))
    store = TrajectoryStore(folder / "store")
    student = ARDTransformer.from_teacher(teacher, steps=2, history_layers=1)
    student.trajectories = store.summary(store.grid(2), "x0")
    student.save_pretrained(folder / "student")
    return student, store


def test_latents_are_judged_as_the_images_that_they_stand_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Statistics of a folder of images, and a student with its VAE, in some network's features."""
    means = Extractor("means", lambda images: images.float().mean((2, 3)), channels=(3,), network="m")
    monkeypatch.setattr("ard.features.inception_extractor", lambda _: means)
    torch.manual_seed(0)
    colours = torch.randint(0, 256, (30, 3), dtype=torch.uint8)
    for i, colour in enumerate(colours):
        (tmp_path / "images" / str(i % 3)).mkdir(parents=True, exist_ok=True)
        plain = Image.new("RGB", (40, 30), tuple(colour.tolist()))
        plain.save(tmp_path / "images" / str(i % 3) / f"{i}.png")
    reference = tmp_path / "reference.safetensors"
    statistics(StatisticsConfig(reference, images=tmp_path / "images", size=28, inception=Path(), keep=12))
    shutil.copytree(tmp_path / "images" / "0", tmp_path / "few" / "0", ignore=lambda _, names: names[3:])
    with pytest.raises(ValueError, match=r"statistics: images has 3, accepted are more than 3"):
        statistics(StatisticsConfig(reference, images=tmp_path / "few", size=28, inception=Path()))
    loaded = Statistics.load(reference)
    torch.testing.assert_close(loaded.mean, colours.double().mean(0), rtol=0, atol=1e-4)
    torch.testing.assert_close(loaded.covariance, torch.cov(colours.double().T), rtol=1e-6, atol=1e-3)
    assert (loaded.features.shape, loaded.network) == ((12, 3), "m")

    vae = AutoencoderKL(
        3, 3, ("DownEncoderBlock2D",) * 2, ("UpDecoderBlock2D",) * 2, (8, 8), latent_channels=4,
        norm_num_groups=4, scaling_factor=0.5,
    )  # fmt: skip
    vae.save_pretrained(tmp_path / "vae")
    student, store = _latents(tmp_path, 25)
    config = EvaluateConfig(
        tmp_path / "student", store.folder, out=tmp_path / "report", batch_size=10, vae=tmp_path / "vae",
        inception=Path(), reference=reference,
    )  # fmt: skip
    report = evaluate(config)
    states, labels = store.states(torch.arange(25), store.grid(2), "x0")
    results = {"student": ard.sample(student, states[:, 0], labels)[:, -1], "teacher": states[:, -1]}
    for name, latents in results.items():
        with torch.no_grad():
            images = to_uint8(vae.decode(latents / 0.5).sample)
        wanted = image_metrics(images, means, loaded)
        assert report[name].pop("consistency") is None
        assert report[name] == pytest.approx(wanted, rel=1e-3)
    assert report["student"]["frechet"] != pytest.approx(report["teacher"]["frechet"], rel=1e-2)
    with Image.open(tmp_path / "report" / "samples.png") as picture:
        assert (picture.mode, picture.size) == ("RGB", (2 * (20 * 30 - 2), 2 * (2 * 30 - 2)))
    AutoencoderKL(3, 3, block_out_channels=(32,), latent_channels=8).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match=r"^evaluate: vae is .*, of 8 latent channels, the student has 4"):
        evaluate(replace(config, vae=tmp_path / "other"))


def test_a_student_of_latents_is_refused_before_it_samples(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _latents(tmp_path, 8)
    monkeypatch.setattr("ard.evaluation.sample", lambda *_: pytest.fail("it sampled"))
    with pytest.raises(ValueError, match=r"images have 4 channels, Fashion-MNIST .* takes 1; .* --vae"):
        evaluate(EvaluateConfig(tmp_path / "student", tmp_path / "store", out=tmp_path / "report"))
    assert not (tmp_path / "report").exists()

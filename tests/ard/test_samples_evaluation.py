"""`ard evaluate --samples`: the figures of ADM's evaluator, computed here with NumPy and SciPy in their own
way."""

from __future__ import annotations

import hashlib
import json
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from scipy import linalg
from torch import Tensor

from ard.assets import ASSETS
from ard.checkpoints import read_json, write_json
from ard.cli import main, parse
from ard.data import load_images, to_uint8
from ard.evaluation import (
    EvaluateConfig,
    StatisticsConfig,
    evaluate,
    image_metrics,
    print_report,
    statistics,
)
from ard.features import Extractor, Statistics, classifier_extractor

_D, _S, _CLASSES = 24, 20, 6
_Floats = NDArray[np.float32]


def _weights() -> tuple[_Floats, _Floats, _Floats]:
    random = np.random.default_rng(9)
    # Features of about the size of Inception's, which float16 rounds.
    shapes = ((_D, 48), (_S, 48), (_CLASSES, _D))
    first, second, head = ((random.normal(size=shape) / 400).astype(np.float32) for shape in shapes)
    return first, second, 40 * head


def _features(images: NDArray[np.uint8]) -> tuple[_Floats, _Floats]:
    pixels = images.reshape(len(images), -1).astype(np.float32)
    return pixels @ _weights()[0].T, pixels @ _weights()[1].T


@pytest.fixture(autouse=True)
def network(monkeypatch: pytest.MonkeyPatch) -> None:
    """A network of few features in the place of Inception: 4 x 4 pixels of 3 colours."""

    def both(images: Tensor) -> tuple[Tensor, Tensor]:
        first, second = _features(images.permute(0, 2, 3, 1).contiguous().numpy())
        return torch.from_numpy(first), torch.from_numpy(second)

    stub = Extractor(
        "stub", lambda images: both(images)[0], channels=(3,), network="n", both=both,
        head=torch.from_numpy(_weights()[2]),
    )  # fmt: skip
    monkeypatch.setattr("ard.features.inception_extractor", lambda _: stub)
    monkeypatch.setattr("ard.adm_reference.FEATURES", _D)
    monkeypatch.setattr("ard.adm_reference.SPATIAL", _S)


def _images(count: int, seed: int, low: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(low, 256, (count, 4, 4, 3), dtype=np.uint8)


def _frechet(a: tuple[Any, Any], b: tuple[Any, Any]) -> float:
    root = linalg.sqrtm(a[1] @ b[1]).real
    shift = a[0] - b[0]
    return float(shift @ shift + np.trace(a[1]) + np.trace(b[1]) - 2 * np.trace(root))


def _moments(x: _Floats, dtype: Any = np.float64) -> tuple[Any, Any]:
    return np.mean(x, axis=0, dtype=dtype), np.cov(x, rowvar=False)


def _distances(a: _Floats, b: _Floats) -> _Floats:
    u, v = a.astype(np.float16), b.astype(np.float16)
    product = (u.astype(np.float32) @ v.astype(np.float32).T).astype(np.float16)
    norm_u, norm_v = (np.square(x).astype(np.float32).sum(1).astype(np.float16) for x in (u, v))
    found: NDArray[np.float16] = np.maximum(norm_u[:, None] - 2 * product + norm_v[None], np.float16(0))
    return found.astype(np.float32)


def _covered(points: _Floats, manifold: _Floats) -> float:
    radii = np.partition(_distances(manifold, manifold), np.arange(4), axis=1)[:, 3]
    return float((_distances(points, manifold) <= radii).any(1).mean())


def _score(x: _Floats, split: int = 5000) -> float:
    scores = []
    for i in range(0, len(x), split):
        logits = x[i : i + split].astype(np.float64) @ _weights()[2].T
        p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
        scores.append(np.exp((p * (np.log(p) - np.log(p.mean(0, keepdims=True)))).sum(1).mean()))
    return float(np.mean(scores))


def _reference(path: Path, images: NDArray[np.uint8] | None, whole: NDArray[np.uint8]) -> None:
    """As ADM's: moments of a whole data set, and some of its images."""
    (mu, sigma), (mu_s, sigma_s) = (_moments(x) for x in _features(whole))
    arrays = {"mu": mu, "sigma": sigma, "mu_s": mu_s, "sigma_s": sigma_s}
    np.savez(path, **arrays, **({} if images is None else {"arr_0": images}))


def _config(folder: Path, **options: Any) -> EvaluateConfig:
    config = EvaluateConfig(
        out=folder / "report", samples=folder / "samples.npz", reference=folder / "reference.npz",
        inception=Path("weights"), batch_size=70,
    )  # fmt: skip
    return replace(config, **options)


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_the_figures_are_those_of_adm(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of different counts, in batches; more samples than one split of the inception score."""
    samples, whole = _images(5200, 0, low=9), _images(900, 1)
    np.savez(tmp_path / "samples.npz", arr_0=samples, labels=np.zeros(5200, np.int64))
    _reference(tmp_path / "reference.npz", whole[:300], whole)
    write_json(tmp_path / "sample.json", {"config": {}, "versions": {}})
    report = evaluate(_config(tmp_path))
    (own, own_s), (real, _) = _features(samples), _features(whole[:300])
    wanted = {
        "fid": _frechet(_moments(own), _moments(_features(whole)[0])),
        "sfid": _frechet(_moments(own_s), _moments(_features(whole)[1])),
        "inception_score": _score(own),
        "precision": _covered(own, real),
        "recall": _covered(real, own),
    }
    assert report["metrics"] == pytest.approx(wanted, rel=1e-6)
    assert list(report["metrics"]) == list(wanted)
    # ADM's means are float32, whose sums of 5,200 features are rounded.
    rounded = _frechet(_moments(own, np.float32), _moments(_features(whole)[0]))
    assert report["metrics"]["fid"] == pytest.approx(rounded, rel=1e-5)
    assert 0.1 < wanted["precision"] < 1
    assert 0.1 < wanted["recall"] < 1
    assert wanted["inception_score"] != pytest.approx(_score(own, 5200), rel=1e-5)
    assert report["samples"] == {
        "file": str(tmp_path / "samples.npz"), "sha256": _sha256(tmp_path / "samples.npz"), "images": 5200,
        "size": [4, 4, 3], "dtype": "uint8", "rounding": "nearest",
    }  # fmt: skip
    assert report["reference"] == {
        "file": str(tmp_path / "reference.npz"), "sha256": _sha256(tmp_path / "reference.npz"), "images": 300,
        "moments": "mu, sigma",
    }  # fmt: skip
    assert (report["weights_sha256"], report["batch_size"]) == ("n", 70)
    assert report["notes"] == [
        "the weights are not the published ones (sha256 6726825d): not comparable",
        "5200 samples; published figures are of 50000, fewer give a larger FID",
    ]
    assert report["config"]["samples"] == str(tmp_path / "samples.npz")
    assert json.loads(json.dumps(report)) == read_json(tmp_path / "report" / "evaluation.json")
    print_report(report)
    said = capsys.readouterr().out
    assert f"{wanted['fid']:.4f}" in said
    assert "FID         sFID           IS    precision       recall" in said
    assert "note: 5200 samples" in said


def test_a_reference_of_images_gives_its_own_moments(tmp_path: Path) -> None:
    samples, real = _images(200, 0, low=60), _images(150, 1)
    np.savez_compressed(tmp_path / "samples.npz", samples)
    np.savez_compressed(tmp_path / "reference.npz", real)
    report = evaluate(_config(tmp_path))
    both = (_features(samples), _features(real))
    for name, i in (("fid", 0), ("sfid", 1)):
        wanted = _frechet(_moments(both[0][i]), _moments(both[1][i]))
        assert report["metrics"][name] == pytest.approx(wanted, rel=1e-6)
    assert report["reference"]["moments"] == "of arr_0"
    assert report["samples"]["rounding"] == "not recorded"
    write_json(tmp_path / "sample.json", {"config": {}, "versions": {}, "rounding": "down"})
    assert evaluate(_config(tmp_path))["samples"]["rounding"] == "down"
    write_json(tmp_path / "sample.json", ["of something else"])
    assert evaluate(_config(tmp_path))["samples"]["rounding"] == "not recorded"


def test_what_a_reference_lacks_is_said(tmp_path: Path) -> None:
    np.savez(tmp_path / "samples.npz", _images(20, 0))
    mu, sigma = _moments(_features(_images(100, 1))[0])
    np.savez(tmp_path / "reference.npz", mu=mu, sigma=sigma)
    report = evaluate(_config(tmp_path))
    assert list(report["metrics"]) == ["fid", "inception_score"]
    assert report["notes"][1:] == [
        "the reference has no mu_s and sigma_s: no sFID",
        "the reference has no images arr_0: no precision and recall",
        "20 samples of 24 features: their covariance is singular, the distance is far too large",
    ]
    assert report["reference"]["images"] is None
    np.savez(tmp_path / "reference.npz", mu=mu, sigma=sigma, arr_0=np.zeros((9, 8, 8, 3), np.uint8))
    with pytest.raises(ValueError, match="matmul"):  # the stub takes 4 x 4 pixels only
        evaluate(_config(tmp_path))


def test_sizes_that_differ_are_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def both(images: Tensor) -> tuple[Tensor, Tensor]:
        first, second = _features(images[:, :, :4, :4].permute(0, 2, 3, 1).contiguous().numpy())
        return torch.from_numpy(first), torch.from_numpy(second)

    head = torch.from_numpy(_weights()[2])
    stub = Extractor("stub", lambda images: both(images)[0], network="n", both=both, head=head)
    monkeypatch.setattr("ard.features.inception_extractor", lambda _: stub)
    np.savez(tmp_path / "samples.npz", _images(30, 0))
    np.savez(tmp_path / "reference.npz", np.zeros((9, 8, 6, 3), np.uint8))
    assert "the samples are 4 x 4, the reference's images 8 x 6" in evaluate(_config(tmp_path))["notes"]


def test_statistics_of_ones_own_are_a_reference_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Real test images of Fashion-MNIST, through the command line, against the embedded statistics."""
    test = load_images("digits", train=False)
    pixels = to_uint8(test.pixels)[:120]
    images = pixels.permute(0, 2, 3, 1).numpy()
    np.savez(tmp_path / "samples.npz", arr_0=images, labels=test.labels[:120].numpy())
    main(["evaluate", "--samples", str(tmp_path / "samples.npz"), "--out", str(tmp_path / "report")])
    report = read_json(tmp_path / "report" / "evaluation.json")
    extractor = classifier_extractor(ASSETS / "classifier")
    reference = Statistics.load(ASSETS / "statistics.safetensors")
    wanted = image_metrics(pixels, extractor, replace(reference, features=reference.features[:120]))
    assert report["metrics"]["frechet"] == pytest.approx(wanted["frechet"], rel=1e-6)
    assert extractor.classes is not None
    right = extractor.classes(pixels) == test.labels[:120]
    assert report["metrics"]["consistency"] == pytest.approx(float(right.float().mean()))
    assert set(report["metrics"]) == {"frechet", "precision", "recall", "consistency"}
    assert report["reference"]["images"] == len(reference.features)
    assert report["notes"][0].startswith("precision and recall of 120 samples and 5000 real images")
    assert "consistency" in capsys.readouterr().out


def test_a_reference_of_ones_own_images(tmp_path: Path) -> None:
    """`ard statistics --out reference.npz`: what NumPy finds in it, twice the same bytes, and its use."""
    images = _images(40, 3)
    for i, pixels in enumerate(images):
        (tmp_path / "images" / str(i % 2)).mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(tmp_path / "images" / str(i % 2) / f"{i}.png")
    config = StatisticsConfig(
        tmp_path / "reference.npz", images=tmp_path / "images", size=4, inception=Path("weights"), keep=30
    )
    statistics(config)
    statistics(replace(config, out=tmp_path / "again.npz"))
    assert _sha256(tmp_path / "reference.npz") == _sha256(tmp_path / "again.npz")
    with np.load(tmp_path / "reference.npz", allow_pickle=False) as found:
        assert set(found) == {"arr_0", "mu", "sigma", "mu_s", "sigma_s"}
        kept = {image.tobytes() for image in found["arr_0"]}
        assert len(kept) == 30
        assert kept <= {image.tobytes() for image in images}
        for values, end in zip(_features(images), ("", "_s"), strict=True):
            wanted = values.mean(0, dtype=np.float64)
            # Values near zero are differences of larger ones, in float32.
            np.testing.assert_allclose(found[f"mu{end}"], wanted, rtol=1e-6, atol=1e-6)
            np.testing.assert_allclose(
                found[f"sigma{end}"], np.cov(values, rowvar=False), rtol=1e-5, atol=1e-9
            )
    np.savez(tmp_path / "samples.npz", images)
    with zipfile.ZipFile(tmp_path / "reference.npz") as archive:  # 128 bytes of header, and no more images
        assert archive.getinfo("arr_0.npy").file_size == 128 + 30 * images[0].nbytes
    metrics = evaluate(_config(tmp_path))["metrics"]
    assert metrics["fid"] == pytest.approx(0, abs=1e-6)
    assert metrics["sfid"] == pytest.approx(0, abs=1e-6)
    assert metrics["recall"] == 1
    for options in ({"images": None}, {"inception": None}):
        with pytest.raises(ValueError, match=r"reference\.npz, accepted is .* with --images and --inception"):
            statistics(replace(config, **options))


def test_features_that_are_not_finite_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def both(images: Tensor) -> tuple[Tensor, Tensor]:
        bad = torch.full((len(images), _D), float("nan") if int(images[0, 0, 0, 0]) else 0.0)
        return bad, torch.zeros(len(images), _S)

    stub = Extractor("stub", lambda images: both(images)[0], network="n", both=both, head=torch.zeros(2, _D))
    monkeypatch.setattr("ard.features.inception_extractor", lambda _: stub)
    images = np.zeros((100, 4, 4, 3), np.uint8)
    images[70:] = 1
    np.savez(tmp_path / "samples.npz", images)
    _reference(tmp_path / "reference.npz", None, _images(50, 1))
    with pytest.raises(ValueError, match=r"samples\.npz: features of images from 70 on are not finite"):
        evaluate(_config(tmp_path))
    assert not (tmp_path / "report").exists()


_REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "student": ({"student": Path("s")}, "student is s, accepted with --samples FILE are batch_size, cl"),
    "trajectories": ({"trajectories": Path("t")}, "trajectories is t, accepted with --samples FILE are"),
    "vae": ({"vae": Path("v")}, "vae is v, accepted with --samples FILE are"),
    "precision": ({"precision": "tf32"}, "precision is tf32, accepted with --samples FILE are"),
    "batch": ({"batch_size": 0}, "batch_size is 0"),
    "no file": ({"samples": Path("none.npz")}, "none.npz: no such file"),
    "no reference": ({"reference": Path("none.npz")}, "none.npz: no such file"),
    "no inception": ({"inception": None}, r"images of 3 channels, size \(4, 4\); Fashion.* takes 1 channels"),
    "the default reference": (
        {"reference": ASSETS / "statistics.safetensors"}, "stub makes 24 features, the reference has 64"),
}  # fmt: skip


@pytest.mark.parametrize("case", _REFUSED)
def test_what_does_not_fit_is_refused_by_name(tmp_path: Path, case: str, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    np.savez(tmp_path / "samples.npz", _images(10, 0))
    _reference(tmp_path / "reference.npz", _images(10, 2), _images(50, 1))
    options, message = _REFUSED[case]
    with pytest.raises((ValueError, OSError), match=message):
        evaluate(_config(tmp_path, **options))
    assert not (tmp_path / "report").exists()


def test_an_npz_reference_wants_inception(tmp_path: Path) -> None:
    np.savez(tmp_path / "samples.npz", np.zeros((9, 28, 28, 1), np.uint8))
    _reference(tmp_path / "reference.npz", None, _images(50, 1))
    with pytest.raises(ValueError, match=r"reference\.npz, statistics of .*; wanted is --inception FILE"):
        evaluate(_config(tmp_path, inception=None))
    np.savez(tmp_path / "other.npz", labels=np.arange(3))
    np.savez(tmp_path / "samples.npz", _images(10, 0))
    with pytest.raises(ValueError, match=r"other\.npz: holds labels; accepted are mu and sigma, or images"):
        evaluate(_config(tmp_path, reference=tmp_path / "other.npz"))
    np.savez(tmp_path / "samples.npz", _images(3, 0))
    with pytest.raises(ValueError, match=r"samples\.npz: has 3 images, accepted are more than 3"):
        evaluate(_config(tmp_path))


def test_one_way_of_evaluating_has_to_be_given(tmp_path: Path) -> None:
    for options, missing in (({}, "student"), ({"student": tmp_path}, "trajectories")):
        with pytest.raises(ValueError, match=f"{missing} is not given; accepted are --student FOLDER with"):
            evaluate(EvaluateConfig(out=tmp_path / "report", **options))
    config = EvaluateConfig(tmp_path, tmp_path, out=tmp_path / "report", reference=Path("r.npz"))
    with pytest.raises(ValueError, match=r"reference is r\.npz, accepted with --student is a \.safetensors"):
        evaluate(config)


def test_samples_are_a_number_or_a_file() -> None:
    words = ["evaluate", "--out", "o", "--samples"]
    assert parse([*words, "10"]).samples == 10
    assert parse([*words, "made/samples.npz"]).samples == Path("made/samples.npz")

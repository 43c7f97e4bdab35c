"""The formulas on cases whose answers are known, and against NumPy and SciPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy import linalg
from torch import Tensor

from ard.metrics import Moments, adm_distances, frechet_distance, inception_score, precision_recall


def _covariance(d: int, seed: int, rank: int | None = None) -> Tensor:
    factor = torch.randn(d, rank or 2 * d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return factor @ factor.T / factor.shape[1]


def test_frechet_distance_of_gaussians_along_the_axes() -> None:
    """|difference of means|^2 + sum of (difference of standard deviations)^2."""
    a, b = torch.tensor([1.0, 4.0, 9.0]), torch.tensor([4.0, 4.0, 0.0])
    means = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1.0, 0.0, 6.0])
    assert frechet_distance(means[0], a.diag(), means[1], b.diag()) == pytest.approx(0 + 4 + 9 + 1 + 0 + 9)


@pytest.mark.parametrize("rank", [None, 3])
def test_frechet_distance_of_any_gaussians(rank: int | None) -> None:
    """tr (A B)^(1/2) by the eigenvalues of A B itself; also where a covariance is singular (few samples)."""
    zero, a, b = torch.zeros(8, dtype=torch.float64), _covariance(8, 0, rank), _covariance(8, 1)
    cross = torch.linalg.eigvals(a @ b).real.clamp_min(0).sqrt().sum()
    expected = float(a.trace() + b.trace() - 2 * cross)
    # The square root of an eigenvalue that should be 0 is that of a rounding error.
    tolerance = 1e-10 if rank is None else 1e-6
    assert frechet_distance(zero, a, zero, b) == pytest.approx(expected, rel=tolerance)
    assert frechet_distance(zero, b, zero, a) == pytest.approx(expected, rel=tolerance)
    assert frechet_distance(zero, a, zero, a) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("samples", [400, 20])
def test_frechet_distance_is_that_of_the_matrix_square_root(samples: int) -> None:
    """SciPy's sqrtm, as in ADM's evaluator; with 20 samples of 32 features both covariances are singular."""
    random = np.random.default_rng(0)
    mix = random.normal(size=(32, 32))
    a = random.normal(size=(samples, 32)) @ mix
    b = 0.3 + random.normal(size=(samples, 32)) @ (mix + 0.3 * random.normal(size=(32, 32)))
    covs = [np.cov(x, rowvar=False) for x in (a, b)]
    root = linalg.sqrtm(covs[0] @ covs[1])
    shift = a.mean(0) - b.mean(0)
    wanted = shift @ shift + np.trace(covs[0]) + np.trace(covs[1]) - 2 * np.trace(root).real
    moments = []
    for x in (a, b):
        own = Moments()
        for part in torch.from_numpy(x).split(7):
            own.add(part)
        moments += [own.mean, own.covariance]
    # The eigenvalues that should be 0 are rounding errors of about 1e-14, whose roots sqrtm adds up.
    assert frechet_distance(*moments) == pytest.approx(wanted, rel=1e-9 if samples == 400 else 1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(("samples", "real"), [(5000, 8000), (1000, 8000), (1000, 1000)])
def test_frechet_distance_of_as_many_features_as_inception_has(samples: int, real: int) -> None:
    """2,048 features of 200 dimensions and noise; fewer samples than features have singular covariances."""
    random = np.random.default_rng(0)
    mix = random.normal(size=(200, 2048)) / 14
    moments = []
    for count, scale in ((samples, 1.05), (real, 1.0)):
        x = scale * random.normal(size=(count, 200)) @ mix + 0.15 * random.normal(size=(count, 2048))
        x = np.log1p(np.exp(0.6 * x - 0.9))  # above 0 and skewed, as behind a ReLU
        moments.append((x.mean(0), np.cov(x, rowvar=False)))
    (mean_a, cov_a), (mean_b, cov_b) = moments
    root = linalg.sqrtm(cov_a @ cov_b)
    shift = mean_a - mean_b
    wanted = shift @ shift + np.trace(cov_a) + np.trace(cov_b) - 2 * np.trace(root).real
    found = frechet_distance(*(torch.from_numpy(x) for pair in moments for x in pair))
    print(f"{samples} of {real}: {found}, SciPy {wanted}, relative {abs(found - wanted) / wanted:.1e}")
    assert found == pytest.approx(wanted, rel=1e-6)


def _softmax(x: NDArray[np.float64]) -> NDArray[np.float64]:
    powers: NDArray[np.float64] = np.exp(x - x.max(1, keepdims=True))
    return powers / powers.sum(1, keepdims=True)


def test_inception_score_is_the_mean_over_splits() -> None:
    """50 images in splits of 20: the last split has 10."""
    random = np.random.default_rng(0)
    features, head = random.normal(size=(50, 8)).astype(np.float32), random.normal(size=(5, 8))
    scores = []
    for i in range(0, 50, 20):
        p = _softmax(features[i : i + 20].astype(np.float64) @ head.T)
        scores.append(np.exp((p * (np.log(p) - np.log(p.mean(0)))).sum(1).mean()))
    found = inception_score(torch.from_numpy(features), torch.from_numpy(head), split=20)
    assert found == pytest.approx(np.mean(scores), rel=1e-12)


def test_inception_score_of_sure_and_of_unsure_networks() -> None:
    """Each of 4 classes as often, for sure, and a fifth never: 4, although 0 has no logarithm. No idea: 1."""
    sure, never = 10_000 * torch.eye(4).repeat(3, 1), torch.full((1, 4), -1.0)
    assert inception_score(sure, torch.cat([torch.eye(4), never])) == pytest.approx(4)
    assert inception_score(torch.zeros(12, 4), torch.eye(4)) == pytest.approx(1)


def _brute(generated: Tensor, real: Tensor) -> float:
    distances = [sorted(float((a - b).norm()) for b in real) for a in real]
    radii = [row[3] for row in distances]  # row[0] is the point itself
    inside = [any((g - r).norm() <= radius for r, radius in zip(real, radii, strict=True)) for g in generated]
    return sum(inside) / len(inside)


def test_precision_and_recall_on_known_cases() -> None:
    real = torch.arange(20.0).unsqueeze(1) * torch.ones(1, 2)
    assert precision_recall(real, real) == (1, 1)
    assert precision_recall(real + 1000, real) == (0, 0)
    # All generated samples in one place: all of them are realistic; the manifold of a point is the point.
    collapsed = real[7:8].expand(20, 2)
    assert precision_recall(collapsed, real) == pytest.approx((1, 1 / 20))
    half = torch.cat([real[:10], real[10:] + 1000])
    assert precision_recall(half, real)[0] == pytest.approx(0.5)


def test_precision_and_recall_are_the_definition() -> None:
    generator = torch.Generator().manual_seed(0)
    real, generated = torch.randn(60, 3, generator=generator), 0.5 + torch.randn(40, 3, generator=generator)
    assert precision_recall(generated, real) == pytest.approx(
        (_brute(generated, real), _brute(real, generated))
    )
    assert 0 < _brute(generated, real) < 1


def _half_distances(a: NDArray[np.float32], b: NDArray[np.float32]) -> NDArray[np.float16]:
    """Squared distances as ADM's graph has them: features, products, norms and sums are float16."""
    u, v = a.astype(np.float16), b.astype(np.float16)
    product = np.array([[np.float32(x) @ np.float32(y) for y in v] for x in u]).astype(np.float16)
    norms = [np.array([np.float32(x * x).sum() for x in w]).astype(np.float16) for w in (u, v)]
    return np.maximum(norms[0][:, None] - np.float16(2) * product + norms[1], np.float16(0))


def test_precision_and_recall_with_the_distances_of_adm() -> None:
    """Of different counts, in float16. Features are multiples of 1/8, of which float32 sums are exact, and
    far from zero: squared norms of 1,400 have steps of 1."""
    random = np.random.default_rng(0)
    real = (6 + np.round(8 * random.normal(size=(90, 40)) * 1.6) / 8).astype(np.float32)
    made = (6 + np.round(8 * random.normal(size=(130, 40)) * 1.5 + 2) / 8).astype(np.float32)
    covered = []
    for points, manifold in ((made, real), (real, made)):
        radii = np.sort(_half_distances(manifold, manifold), 1)[:, 3]
        covered.append((_half_distances(points, manifold) <= radii).any(1).mean())
    found = precision_recall(torch.from_numpy(made), torch.from_numpy(real), adm_distances)
    assert found == pytest.approx(tuple(covered), abs=1e-12)
    assert found != precision_recall(torch.from_numpy(made), torch.from_numpy(real))
    assert 0 < found[1] < 1


def test_distances_that_overflow_float16_are_float32() -> None:
    far = torch.tensor([[300.0, 0.0], [0.0, 400.0]])
    assert torch.equal(adm_distances(far, far), torch.tensor([[0.0, 250_000.0], [250_000.0, 0.0]]))

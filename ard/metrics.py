"""Comparison of generated with real samples by their features: Frechet distance, inception score, precision
and recall.

The formulas are those of ADM's evaluator (openai/guided-diffusion, evaluations/evaluator.py). Moments,
Frechet distance and inception score are computed in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

# Neighbours of a point whose farthest gives its radius: Kynkaanniemi et al., arXiv 1904.06991, section 3.
NEIGHBOURS = 3
# Distances are computed in blocks: a block of rows against 50,000 points is 100 MB of float32.
_ROWS, _COLUMNS = 500, 10_000


class Moments:
    """Mean and covariance of features that come in parts, in float64.

    Two parts' moments make those of both (Chan et al., Updating formulae and a pairwise algorithm for
    computing sample variances, 1979).
    """

    def __init__(self) -> None:
        self.count = 0
        self._mean = self._scatter = torch.zeros(0, dtype=torch.float64)

    def add(self, part: Tensor) -> None:
        """Features (n, d)."""
        wide, size = part.double(), part.shape[1]
        if self.count == 0:
            self._mean, self._scatter = wide.new_zeros(size), wide.new_zeros(size, size)
        own = wide.mean(0)
        step, total = own - self._mean, self.count + len(part)
        centred = wide - own
        # In place: of 2,048 features the matrix is 34 MB.
        self._scatter.addmm_(centred.T, centred)
        self._scatter.addr_(step, step, alpha=self.count * len(part) / total)
        self._mean, self.count = self._mean + step * (len(part) / total), total

    @property
    def mean(self) -> Tensor:
        """(d,)."""
        return self._mean

    @property
    def covariance(self) -> Tensor:
        """(d, d), normalised by count - 1."""
        return self._scatter / (self.count - 1)


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


def inception_score(features: Tensor, head: Tensor, split: int = 5000) -> float:
    """exp of the mean KL divergence of an image's class probabilities from those of all images (Salimans et
    al., arXiv 1606.03498, section 4): the mean over splits.

    Args:
        features: (n, d).
        head: (classes, d). Probabilities are softmax(features @ head.T), without a bias.
        split: images per split; ADM's 5,000. The last split may have fewer.
    """
    scores = []
    for part in features.split(split):
        logs = F.log_softmax(part.double() @ head.double().T, 1)
        mean = logs.exp().mean(0)
        scores.append(((logs.exp() * logs).sum(1).mean() - torch.xlogy(mean, mean).sum()).exp())
    return float(torch.stack(scores).mean())


def adm_distances(a: Tensor, b: Tensor) -> Tensor:
    """Squared distances (n, m) of features (n, d), (m, d), rounded to float16 wherever ADM's graph rounds.

    Squared distances of Inception features are about 50 to 500, where float16 has steps of 1/32 to 1/4: ties
    raise precision and recall by some thousandths. Like ADM's, float32 where float16 overflows.
    """
    u, v = a.half(), b.half()
    # The sums of products are float32, as in a GPU's float16 product; their result is rounded.
    norm_u, norm_v = (x.square().float().sum(1).half() for x in (u, v))
    product = (u.float() @ v.float().T).half()
    rounded = (norm_u[:, None] - 2 * product + norm_v).clamp_min(0).float()
    if rounded.isfinite().all():
        return rounded
    norm_a, norm_b = (x.square().sum(1) for x in (a, b))
    return (norm_a[:, None] - 2 * a @ b.T + norm_b).clamp_min(0)


Distances = Callable[[Tensor, Tensor], Tensor]


def _covered(points: Tensor, manifold: Tensor, distances: Distances) -> float:
    """Share of `points` within the radius of a point of `manifold`, its distance to its third-nearest
    neighbour."""

    def rows(some: Tensor) -> Iterator[Tensor]:
        for part in some.split(_ROWS):
            yield torch.cat([distances(part, others) for others in manifold.split(_COLUMNS)], 1)

    # The nearest of a point's neighbours is the point itself.
    radii = torch.cat([row.topk(NEIGHBOURS + 1, largest=False).values[:, -1] for row in rows(manifold)])
    return float(torch.cat([(row <= radii).any(1) for row in rows(points)]).double().mean())


def precision_recall(
    generated: Tensor, real: Tensor, distances: Distances = torch.cdist
) -> tuple[float, float]:
    """k-nearest-neighbour precision and recall (arXiv 1904.06991) of features (n, d), (m, d).

    Both need more than 3 rows. Fewer points make a coarser manifold, which covers more: compare figures of
    equal counts only. `distances`: (n, d), (m, d) -> (n, m), or any increasing function of them.
    """
    return _covered(generated, real, distances), _covered(real, generated, distances)

"""Row sampling by approximate leverage scores, on the fly while the data stream past."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy import linalg

Array = NDArray[np.float64]


def leverage_sketch(gram: Array, n_probes: int, rng: np.random.Generator) -> Array:
    """Return W, shape (d, n_probes), with ``E |a^T W|^2 = a^T gram^-1 a``, the leverage of row a.

    ``W = L^-T G / sqrt(k)`` with the Cholesky factor of ``gram`` and a Gaussian G: the sketch of Drineas,
    Magdon-Ismail, Mahoney and Woodruff, "Fast approximation of matrix coherence and statistical leverage"
    (2012). A ridge of 1e-10 of the mean diagonal makes rows stand out that are alone in a direction ``gram``
    does not know.
    """
    d = len(gram)
    ridge = 1e-10 * max(float(np.trace(gram)) / d, np.finfo(float).tiny)
    factor = linalg.cholesky(gram + ridge * np.eye(d), lower=True, check_finite=False)
    probes = rng.standard_normal((d, n_probes)) / np.sqrt(n_probes)
    return np.asarray(linalg.solve_triangular(factor, probes, lower=True, trans=1, check_finite=False))


class RowSampler:
    """Keep each unit (a row, or all rows of a short group) independently with probability proportional to its
    score.

    The score of a row is its curvature weight times its approximate leverage; a kept unit is weighted by the
    inverse of its probability, so every sampled sum is unbiased whatever the scores. Leverages are computed
    during the first read and kept (four bytes a row) unless the rows are in other places or too many.

    Parameters
    ----------
    n_rows : int
        Number of rows whose leverages are kept; zero for none.
    budget : float
        Expected number of sampled rows.
    sketch : ndarray, shape (d, k)
        From `leverage_sketch`.
    mass : float
        An estimate of the sum of all scores; after a read it is replaced by the true sum.
    rng : numpy.random.Generator
    most : float
        The budget is never larger.
    """

    def __init__(
        self,
        n_rows: int,
        budget: float,
        sketch: Array,
        mass: float,
        rng: np.random.Generator,
        most: float = np.inf,
    ) -> None:
        self.most = most
        self.budget = budget
        self.sketch = sketch
        self.mass = mass
        self.rng = rng
        self.leverage: NDArray[np.float32] | None = np.empty(n_rows, dtype=np.float32) if n_rows else None
        self.has_leverage = False

    def draw(self, scores: Array, rows_per_unit: float = 1.0) -> tuple[NDArray[np.intp], Array]:
        """Return the kept units and their inverse probabilities."""
        probability = np.minimum(1.0, scores * (self.budget / (self.mass * rows_per_unit)))
        kept = np.flatnonzero(self.rng.random(len(scores)) < probability)
        return kept, 1.0 / probability[kept]

    def double(self) -> None:
        """Draw twice as many rows from now on."""
        self.budget = min(2.0 * self.budget, self.most)

    def finish(self, total: float) -> None:
        """End a read: the true mass of the scores is known now."""
        self.has_leverage = True
        if np.isfinite(total) and total > 0.0:
            self.mass = total

    def split(self, n_parts: int) -> list[RowSampler]:
        """Return a sampler for each of several places, with random numbers of its own."""
        seeds = self.rng.integers(2**63, size=n_parts)
        return [
            RowSampler(0, self.budget, self.sketch, self.mass, np.random.default_rng(seed)) for seed in seeds
        ]

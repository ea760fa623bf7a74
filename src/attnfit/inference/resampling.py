"""Standard errors and intervals from fits of resampled data: the bootstrap and the jackknife over units."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy.stats import t as student

from attnfit.data.inputs import pieces
from attnfit.inference.fitted import Fitted
from attnfit.segments import Array, Index
from attnfit.solvers import minimize_many

# Bytes of the weights that are drawn at a time.
DRAWN_BYTES = 1 << 27


@dataclass(frozen=True)
class Resampled:
    """Fits of resampled data.

    Attributes
    ----------
    coefs : ndarray, shape (n, d)
        One row a fit; infinite or NaN where a coefficient has no finite value.
    status : ndarray of str, shape (n,)
        As `Result.status`. Errors and intervals are those of fits that converged.
    estimate : ndarray, shape (d,)
        The coefficients of all the data.
    kind : {"bootstrap", "jackknife"}
    n_units : int
        Units that were drawn from, or left out.
    n_passes : float
        Reads of the data that all fits took.

    Examples
    --------
    >>> from attnfit import SoftmaxRegressor, datasets
    >>> travel = datasets.load_travel_mode()
    >>> model = SoftmaxRegressor("cross_entropy").fit(travel.A, travel.b, groups=travel.groups)
    >>> drawn = model.bootstrap(200, random_state=0)
    >>> drawn
    200 bootstrap fits of 210 units: 200 converged
    >>> drawn.interval(0.9).shape
    (6, 2)
    """

    coefs: Array
    status: NDArray[np.str_]
    estimate: Array
    kind: Literal["bootstrap", "jackknife"]
    n_units: int
    n_passes: float

    @property
    def usable(self) -> NDArray[np.bool_]:
        """Which fits converged, shape (n,)."""
        return np.asarray(self.status == "converged")

    def covariance(self) -> Array:
        """Return the covariance of the coefficients, shape (d, d): of the fits, or ``(U - 1) / U`` times the
        sum of the squares of those that each leave out one of U units.

        Raises
        ------
        ValueError
            If fewer than two fits converged; of a jackknife if one did not, since each stands for its unit.
        """
        n = int(self.usable.sum())
        if n < 2 or (self.kind == "jackknife" and n < len(self.status)):
            raise ValueError(f"{n} of {len(self.status)} {self.kind} fits converged: {self!r}")
        found = np.atleast_2d(np.cov(self.coefs[self.usable], rowvar=False))
        if self.kind == "jackknife":
            # Of the sum of squares, (U - 1) times what `np.cov` gives.
            found = found * (self.n_units - 1) ** 2 / self.n_units
        return np.asarray(found)

    @property
    def standard_errors(self) -> Array:
        """Standard errors of the coefficients, shape (d,)."""
        return np.sqrt(np.diag(self.covariance()))

    def interval(self, level: float = 0.95) -> Array:
        """Return intervals of the coefficients, shape (d, 2): quantiles of the bootstrap's fits; of the
        jackknife the estimate and a quantile of Student's t with U - 1 degrees of freedom times the error.
        """
        if not 0.0 < level < 1.0:
            raise ValueError(f"level must lie between 0 and 1, not {level!r}")
        tail = 0.5 * (1.0 - level)
        if self.kind == "jackknife":
            half = student.ppf(1.0 - tail, self.n_units - 1) * self.standard_errors
            return np.column_stack([self.estimate - half, self.estimate + half])
        self.covariance()
        return np.quantile(self.coefs[self.usable], [tail, 1.0 - tail], axis=0).T

    def __repr__(self) -> str:
        names, counts = np.unique(self.status, return_counts=True)
        found = ", ".join(f"{k} {name}" for name, k in zip(names, counts, strict=True))
        return f"{len(self.status)} {self.kind} fits of {self.n_units} units: {found}"


def bootstrap(fitted: Fitted, n: int, clusters: Any, random_state: Any, tol: float) -> Resampled:
    """Return fits of data made of units drawn with replacement: see `InferenceMixin.bootstrap`."""
    if isinstance(n, bool) or int(n) != n or n < 2:
        raise ValueError(f"n must be a whole number of fits, at least 2, not {n!r}")
    labels, n_units, copies = _units(fitted, clusters)
    rng = np.random.default_rng(random_state)
    step = max(1, DRAWN_BYTES // (8 * n_units))
    total = n_units if copies is None else round(float(copies.sum()))
    share = np.full(n_units, 1.0 / n_units) if copies is None else copies / copies.sum()
    found = []
    for first in range(0, int(n), step):
        W = rng.multinomial(total, share, size=min(step, int(n) - first)).T.astype(np.float64)
        if copies is not None:
            # The problem multiplies with the copies: what was drawn is to remain.
            W = np.divide(W, copies[:, None], out=np.zeros_like(W), where=copies[:, None] > 0.0)
        found.append(minimize_many(fitted.given, W, units=labels, x0=fitted.point, tol=tol))
    return _resampled(fitted, found, "bootstrap", n_units)


def jackknife(fitted: Fitted, clusters: Any, tol: float) -> Resampled:
    """Return fits that each leave out one unit: see `InferenceMixin.jackknife`."""
    labels, n_units, copies = _units(fitted, clusters)
    if copies is not None:
        raise ValueError("a jackknife leaves out units, not copies of them; use bootstrap")
    step = max(1, DRAWN_BYTES // (8 * n_units))
    found = []
    for first in range(0, n_units, step):
        left_out = np.arange(first, min(first + step, n_units))
        W = np.ones((n_units, len(left_out)))
        W[left_out, np.arange(len(left_out))] = 0.0
        found.append(minimize_many(fitted.given, W, units=labels, x0=fitted.point, tol=tol))
    return _resampled(fitted, found, "jackknife", n_units)


def _resampled(fitted: Fitted, found: list[Any], kind: Any, n_units: int) -> Resampled:
    return Resampled(
        np.concatenate([many.x for many in found]),
        np.concatenate([many.status for many in found]),
        np.where(fitted.finite, fitted.point, np.nan),
        kind,
        n_units,
        sum(many.n_passes for many in found),
    )


def _units(fitted: Fitted, clusters: Any) -> tuple[Index | None, int, Array | None]:
    """Return the units as labels of rows (None: groups, or rows where the loss has none), how many there are,
    and how many copies each unit stands for where weights are frequencies.
    """
    if fitted.n_effects:
        raise ValueError(
            "samples of units of a fit with absorbed effects have effects of their own; use covariance() or "
            "summary(), whose errors are those of a fit with dummies"
        )
    labels = fitted.clusters if clusters is None else fitted.read_labels(clusters)
    rows: Any = fitted.given.rows
    if labels is not None and len(labels.numbers) > 1:
        raise ValueError("units are drawn by one set of labels; pass one label a row as clusters")
    if not getattr(rows, "is_whole", False):
        raise ValueError("resampling needs the data in one place; compute() the columns, or use covariance")
    if labels is not None:
        numbers, n_units = labels.numbers[0], labels.n_units[0]
    else:
        numbers, n_units = None, len(rows.groups) if rows.loss.coupled else rows.n_rows
    if n_units < 2:
        raise ValueError("one unit only: nothing can be drawn; pass clusters, or groups to fit")
    if fitted.weight_type != "frequency" or rows.weights is None:
        return numbers, n_units, None
    if numbers is not None:
        raise ValueError("clusters of rows with frequency weights cannot be drawn; repeat the rows")
    w = np.concatenate([part for _, part in pieces(rows.weights)])
    if rows.loss.coupled:
        w = w[rows.groups.starts]
    return numbers, n_units, w

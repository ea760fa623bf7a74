"""Covariances of coefficients: kinds, small samples, degrees of freedom."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray
from scipy import linalg, stats

from attnfit.inference.bread import leaves_open
from attnfit.segments import Array

Kind = Literal["auto", "classic", "robust", "row", "cluster"]
KINDS: tuple[Kind, ...] = get_args(Kind)
# Below so many units intervals cover less than they say, whatever the reference distribution.
FEW = 30


@dataclass(frozen=True)
class Covariance:
    """A covariance of the coefficients, and what it rests on.

    Attributes
    ----------
    matrix : ndarray, shape (d, d)
        NaN in rows and columns of coefficients without a finite value.
    kind, unit : str
        ``"classic"``, ``"robust"``, ``"row"`` or ``"cluster"``, and what one draw is.
    n_units : float
        Number of draws; with frequency weights, of copies.
    df : float
        Degrees of freedom of the t distribution; infinite where the reference is normal.
    factor : float
        By what the raw sandwich was multiplied for small samples.
    known : ndarray of bool, shape (d,)
        False for coefficients without an error.
    scale, null : ndarray, shapes (d,) and (d, k)
        The directions that the data leave open: see `attnfit.inference.bread.Bread`.
    notes : tuple of str
    reason : str
        Why `auto` took this kind, where it did.
    """

    matrix: Array
    kind: str
    unit: str
    n_units: float
    df: float
    factor: float
    known: NDArray[np.bool_]
    scale: Array
    null: Array
    notes: tuple[str, ...] = ()
    reason: str = ""

    @property
    def standard_errors(self) -> Array:
        """Standard errors of the coefficients, shape (d,); NaN where there is none."""
        return np.where(self.known, np.sqrt(np.maximum(np.diag(self.matrix), 0.0)), np.nan)

    def errors(self, gradients: Array) -> Array:
        """Return ``sqrt(q^T V q)`` of functions of the coefficients with gradients q, shape (..., d); NaN
        where q has a part along which the data say nothing.
        """
        matrix = np.where(np.isfinite(self.matrix), self.matrix, 0.0) if self.n_units >= 2 else self.matrix
        variances = np.einsum("...i,ij,...j->...", gradients, matrix, gradients)
        return np.where(
            leaves_open(gradients, self.scale, self.null), np.nan, np.sqrt(np.maximum(variances, 0.0))
        )

    def with_df(self, df: float | str) -> Covariance:
        """Return the covariance with other degrees of freedom: ``"units"``, ``"normal"`` or a number."""
        if df == "units":
            return self
        if df == "normal":
            return replace(self, df=float("inf"))
        if isinstance(df, str) or not float(df) > 0.0:
            raise ValueError(f"df must be 'units', 'normal' or a positive number, not {df!r}")
        return replace(self, df=float(df))

    def quantile(self, level: float) -> float:
        """Return the half-width in standard errors of an interval with this cover."""
        if not 0.0 < level < 1.0:
            raise ValueError(f"level must lie between 0 and 1, not {level!r}; 0.95 gives 95 % intervals")
        at = 0.5 + 0.5 * level
        return float(stats.norm.ppf(at) if np.isinf(self.df) else stats.t.ppf(at, self.df))

    def p_values(self, statistics: Any) -> Array:
        """Return two-sided p-values of values over their standard errors."""
        size = np.abs(np.asarray(statistics, dtype=np.float64))
        found = 2.0 * (stats.norm.sf(size) if np.isinf(self.df) else stats.t.sf(size, self.df))
        return np.asarray(found)

    def describe(self) -> str:
        """Return kind, unit, number of units, degrees of freedom and factor in one line."""
        why = f" (auto: {self.reason})" if self.reason else ""
        if self.kind == "classic":
            return f"classic ({self.unit}), normal distribution{why}"
        df = "normal distribution" if np.isinf(self.df) else f"t with {self.df:g} degrees of freedom"
        return f"{self.kind}, unit {self.unit}, {self.n_units:,g} units, {df}, factor {self.factor:.6g}{why}"


def sandwich(bread: Array, meats: Sequence[tuple[float, Array]]) -> tuple[Array, bool]:
    """Return ``B (sum of k M) B`` and whether negative eigenvalues were set to zero, which only a difference
    of meats has: see `nearest_covariance`.
    """
    meat = sum((k * m for k, m in meats), np.zeros_like(bread))
    matrix = bread @ meat @ bread
    matrix = 0.5 * (matrix + matrix.T)
    if all(k >= 0.0 for k, _ in meats):
        return matrix, False
    return nearest_covariance(matrix)


def nearest_covariance(matrix: Array) -> tuple[Array, bool]:
    """Return a positive semidefinite matrix, and whether it is another one.

    The first coefficients keep their block as long as it is positive definite; what remains of the others,
    given these, loses its negative eigenvalues. Dummies of a few rows each, which stand last, have negative
    variances in two-way covariances and would spoil those of the coefficients that matter otherwise: the
    block kept is that of a model with the dummies absorbed.
    """
    scale = np.sqrt(np.maximum(np.abs(np.diag(matrix)), np.finfo(float).tiny))
    unit = matrix / scale / scale[:, None]
    if np.linalg.eigvalsh(unit)[0] >= -1e-12:
        return matrix, False
    # Cholesky's method stops at the first leading block that is not positive definite.
    order = linalg.lapack.dpotrf(unit - 1e-12 * np.eye(len(unit)))[1]
    k = order - 1 if order else len(unit)
    across = linalg.solve(unit[:k, :k], unit[:k, k:], assume_a="pos") if k else np.zeros((0, len(unit)))
    values, vectors = linalg.eigh(unit[k:, k:] - unit[k:, :k] @ across)
    rest = (vectors * np.maximum(values, 0.0)) @ vectors.T
    unit[k:, k:] = rest + unit[k:, :k] @ across
    return unit * scale * scale[:, None], True


def small_sample_factor(
    correction: Any, kind: str, n_units: float, n: float, d: int, n_groups: float, *, nested: bool
) -> float:
    """Return by what a raw variance is multiplied.

    Parameters
    ----------
    correction : bool, "fixest" or float
        True: ``U/(U-1)``, the convention of Stata for likelihoods. False: 1. "fixest": that of
        the R package of this name, for the Poisson model with ``n_groups`` constants (0 without groups).
    """
    if isinstance(correction, bool | np.bool_):
        return n_units / (n_units - 1.0) if correction and kind != "classic" else 1.0
    if isinstance(correction, str):
        if correction != "fixest":
            raise ValueError(f"correction must be True, False, 'fixest' or a number, not {correction!r}")
        if kind == "row":
            return n / (n - d - n_groups)
        if kind == "classic":
            return (n - 1.0) / (n - d - n_groups)
        levels = min(n_groups, 1.0) if nested else n_groups
        return n_units / (n_units - 1.0) * (n - 1.0) / (n - d - levels)
    if not float(correction) > 0.0:
        raise ValueError(f"correction must be positive, not {correction!r}; it multiplies the variance")
    return float(correction)

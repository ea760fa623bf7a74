"""Tests of restrictions, and models side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

from attnfit.inference import tables
from attnfit.inference.covariance import Covariance
from attnfit.inference.statistics import checksums
from attnfit.segments import Array

# Eigenvalues of a covariance of restrictions, in units of its diagonal, that are none.
SINGULAR = 1e-10
# By how much, relatively, a restricted likelihood may exceed the full one: what the fits leave open.
ROUNDING = 1e-6


@dataclass(frozen=True)
class WaldTest:
    """``W = (R x - r)^T (R V R^T)^-1 (R x - r)``.

    Attributes
    ----------
    statistic : float
        W.
    df : float or tuple of float
        Of chi-squared, or of F.
    p_value : float
    distribution : str
        ``"chi2"``, or ``"F"`` of ``W / q``.
    kind : str
        Of the covariance.
    """

    statistic: float
    df: Any
    p_value: float
    distribution: str
    kind: str

    def to_frame(self) -> Any:
        """Return a data frame with one row."""
        return tables.to_frame(_columns(self))


@dataclass(frozen=True)
class LikelihoodRatio:
    """``2 (L - L_r)`` against chi-squared with the difference in numbers of parameters."""

    statistic: float
    df: float
    p_value: float
    distribution: str = "chi2"

    def to_frame(self) -> Any:
        """Return a data frame with one row."""
        return tables.to_frame(_columns(self))


def _columns(test: Any) -> dict[str, list[Any]]:
    df = test.df if isinstance(test.df, tuple) else (test.df, None)
    return {
        "statistic": [test.statistic],
        "distribution": [test.distribution],
        "df": [df[0]],
        "df_denominator": [df[1]],
        "p_value": [test.p_value],
    }


def constraints(R: Any, r: Any, names: Sequence[str]) -> tuple[Array, Array]:
    """Return the restrictions as a matrix, shape (q, d), and values, shape (q,)."""
    d = len(names)
    if isinstance(R, str):
        if r is not None:
            raise ValueError("r is part of the equations where R is a string; leave it out")
        try:
            from formulaic.utils.constraints import LinearConstraints
        except ImportError:
            raise ImportError(
                "equations as strings need the extra attnfit[formula]; pass a matrix R of shape (q, d)"
            ) from None
        try:
            parsed = LinearConstraints.from_spec(R, variable_names=list(names))
        except Exception as error:
            raise ValueError(f"{R!r} is no linear equation between {', '.join(names)}: {error}") from None
        return np.asarray(parsed.constraint_matrix, float), np.asarray(parsed.constraint_values, float)
    matrix = np.atleast_2d(np.asarray(R, dtype=np.float64))
    values = np.zeros(len(matrix)) if r is None else np.atleast_1d(np.asarray(r, dtype=np.float64))
    if matrix.ndim != 2 or matrix.shape[1] != d or values.shape != (len(matrix),):
        raise ValueError(
            f"R has shape {matrix.shape} and r {values.shape}; with {d} coefficients pass (q, {d}) and (q,)"
        )
    return matrix, values


def wald(x: Array, covariance: Covariance, R: Any, r: Any, names: Sequence[str]) -> WaldTest:
    """Return the test of ``R x = r``; see `attnfit.estimators.SoftmaxRegressor.wald_test`."""
    matrix, values = constraints(R, r, names)
    q = len(matrix)
    errors = covariance.errors(matrix)
    if not np.isfinite(errors).all() or not np.isfinite(x[(matrix != 0.0).any(axis=0)]).all():
        k = int(np.flatnonzero(~np.isfinite(errors))[0]) if not np.isfinite(errors).all() else 0
        raise ValueError(f"restriction {k} concerns a combination of coefficients that is not identified")
    used = np.where(np.isfinite(covariance.matrix), covariance.matrix, 0.0)
    spread = matrix @ used @ matrix.T
    scale = np.where(errors > 0.0, errors, 1.0)
    eigenvalues, vectors = np.linalg.eigh(spread / scale / scale[:, None])
    rank = int(np.count_nonzero(eigenvalues > SINGULAR * eigenvalues[-1])) if eigenvalues[-1] > 0.0 else 0
    if rank < q:
        units = f", or are more than the {covariance.n_units - 1:g} that {covariance.n_units:g} units allow"
        raise ValueError(
            f"the {q} restrictions have rank {rank}: some follow from others"
            f"{'' if covariance.kind == 'classic' else units}; leave {q - rank} out"
        )
    known = np.where(np.isfinite(x), x, 0.0)
    rest = vectors.T @ ((matrix @ known - values) / scale)
    statistic = float(np.sum(rest**2 / eigenvalues))
    if np.isinf(covariance.df):
        return WaldTest(statistic, q, float(stats.chi2.sf(statistic, q)), "chi2", covariance.kind)
    p = float(stats.f.sf(statistic / q, q, covariance.df))
    return WaldTest(statistic, (q, covariance.df), p, "F", covariance.kind)


def likelihood_ratio(model: Any, restricted: Any) -> LikelihoodRatio:
    """Return the test of a restricted model against the full one."""
    statistics = []
    for name, one in (("this model", model), ("the restricted model", restricted)):
        found = one.fit_statistics()
        if found.log_likelihood is None or found.aic is None:
            raise ValueError(f"{name} has no likelihood ratio ({'; '.join(found.notes)}); use wald_test")
        if one._fitted.penalised:
            raise ValueError(f"{name} has a penalty, under which likelihood ratios are not chi-squared")
        kind = "cluster" if one._fitted.clusters is not None else one.get_params()["covariance"]
        if kind in ("robust", "row", "cluster"):
            raise ValueError(
                f"{name} was asked for {kind} errors, which a likelihood ratio does not have; use wald_test"
            )
        statistics.append(found)
    differing = differences(model, restricted)
    if differing:
        raise ValueError(f"the models were fitted on different data: {', '.join(differing)} differ")
    full, less = statistics
    df = full.n_parameters - less.n_parameters
    if df <= 0:
        raise ValueError(
            f"the restricted model has {less.n_parameters:g} parameters, this one {full.n_parameters:g}; "
            "call the method of the larger model"
        )
    gain = full.log_likelihood - less.log_likelihood
    if gain < -ROUNDING * abs(full.log_likelihood):
        raise ValueError(
            f"the restricted model fits better ({less.log_likelihood:.8g} against "
            f"{full.log_likelihood:.8g}): it is no restriction of this one, or this one has not converged"
        )
    statistic = max(2.0 * gain, 0.0)
    return LikelihoodRatio(statistic, df, float(stats.chi2.sf(statistic, df)))


def differences(one: Any, other: Any) -> list[str]:
    """Return what differs in the data of two models, features aside."""
    if one._fitted.problem.loss.coupled != other._fitted.problem.loss.coupled:
        return ["the kinds of target"]
    ours, theirs = checksums(one._fitted), checksums(other._fitted)
    return [name for name in ours if ours[name] != theirs[name]]


@dataclass(frozen=True)
class Comparison:
    """Models side by side.

    Attributes
    ----------
    names : tuple of str
    rows : tuple of dict
        The fit statistics of each.
    differ : tuple of str
        How a model's data differ from the first one's; empty where they do not.
    rank : tuple of int or None
        By AIC among the models on the first one's data.
    """

    names: tuple[str, ...]
    rows: tuple[dict[str, float | None], ...]
    differ: tuple[str, ...]
    rank: tuple[int | None, ...]

    def columns(self) -> dict[str, list[Any]]:
        """Return one list a column; statistics that no model has are left out."""
        known = [name for name in self.rows[0] if any(row[name] is not None for row in self.rows)]
        return {
            "model": list(self.names),
            **{name: [row[name] for row in self.rows] for name in known},
            "rank": list(self.rank),
            "data": [f"other {differ}" if differ else "the same" for differ in self.differ],
        }

    def to_frame(self) -> Any:
        """Return the table as a data frame."""
        return tables.to_frame(self.columns())

    def cells(self) -> tuple[list[str], list[list[str]]]:
        """Return head and rows as text: one column a model."""
        columns = self.columns()
        names = columns.pop("model")

        def shown(value: Any) -> str:
            return "" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)

        return ["", *names], [[name, *map(shown, values)] for name, values in columns.items()]

    def to_markdown(self) -> str:
        """Return the table in Markdown."""
        return tables.markdown(*self.cells())

    def to_latex(self) -> str:
        """Return the table in LaTeX."""
        return tables.latex(*self.cells())

    def _repr_html_(self) -> str:
        return tables.to_html(*self.cells())

    def __str__(self) -> str:
        return self.to_markdown()


def compare(*models: Any, names: Sequence[str] | None = None) -> Comparison:
    """Return the fit statistics of fitted models side by side; ranked by AIC, where the data are the same.

    Parameters
    ----------
    *models : fitted estimators
    names : sequence of str, optional

    Examples
    --------
    >>> from attnfit import datasets
    >>> from attnfit.estimators import SoftmaxRegressor
    >>> from attnfit.inference import compare
    >>> travel = datasets.load_travel_mode()
    >>> full, less = (
    ...     SoftmaxRegressor("cross_entropy").fit(travel.A[:, :d], travel.b, groups=travel.groups)
    ...     for d in (6, 4)
    ... )
    >>> compare(full, less).rank
    (1, 2)
    """
    if not models:
        raise ValueError("compare needs at least one fitted model")
    rows = tuple(model.fit_statistics().values() for model in models)
    differ = tuple(", ".join(differences(models[0], model)) for model in models)
    ranked = sorted((row["aic"], k) for k, row in enumerate(rows) if row["aic"] is not None and not differ[k])
    rank: list[int | None] = [None] * len(models)
    for place, (_, k) in enumerate(ranked):
        rank[k] = place + 1
    told = tuple(names) if names is not None else tuple(f"model {k + 1}" for k in range(len(models)))
    return Comparison(told, rows, differ, tuple(rank))

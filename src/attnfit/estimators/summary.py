"""The coefficient table of a fitted estimator."""

from __future__ import annotations

import re
from dataclasses import dataclass
from math import isfinite
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attnfit.inference import FitStatistics, tables
from attnfit.inference.covariance import Covariance
from attnfit.objectives.objective import MAX_DENSE

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Summary:
    """A coefficient table: its ``str`` is text, `columns` is for a data frame.

    Attributes
    ----------
    lines : tuple of str
        What stands above the table: the fit, the kind of the standard errors and why it was used.
    names : tuple of str
    coefficients, standard_errors : ndarray, shape (d,)
        Standard errors are NaN where unknown.
    covariance : Covariance or None
        What the errors rest on, if it is known.
    level : float
        Cover of the intervals.
    """

    lines: tuple[str, ...]
    names: tuple[str, ...]
    coefficients: Array
    standard_errors: Array
    covariance: Covariance | None = None
    level: float = 0.95
    library: str | None = None

    @property
    def statistic(self) -> str:
        """``"t"`` or ``"z"``: what the ratio of coefficient and error is compared with."""
        return "z" if self.covariance is None or np.isinf(self.covariance.df) else "t"

    def columns(self) -> dict[str, Any]:
        """Return one sequence a column: ``pandas.DataFrame(summary.columns())`` is the table.

        Returns
        -------
        dict
            Keys name, coefficient, standard_error, z (or t), p_value, lower, upper: the last two bound the
            interval ``coefficient -+ quantile standard_error``.
        """
        x, se = self.coefficients, self.standard_errors
        d = len(x)
        with np.errstate(divide="ignore", invalid="ignore"):
            ratio = x / se
        unknown = self.covariance is None
        half = np.full(d, np.nan) if unknown else self.covariance.quantile(self.level) * se  # type: ignore[union-attr]
        return {
            "name": list(self.names),
            "coefficient": x,
            "standard_error": se,
            self.statistic: ratio,
            "p_value": np.full(d, np.nan) if unknown else self.covariance.p_values(ratio),  # type: ignore[union-attr]
            "lower": x - half,
            "upper": x + half,
        }

    def to_frame(self) -> Any:
        """Return the table as a data frame of the library that the data came in, else of pandas."""
        return tables.to_frame(self.columns(), self.library)

    def cells(self) -> tuple[list[str], list[list[str]]]:
        """Return the head and the rows of the table as text."""
        head = [
            *("", "coefficient", "std. error", self.statistic, "p"),
            *(f"{100 * self.level:g} % from", "to"),
        ]
        rows = []
        for name, x, se, ratio, p, lower, upper in zip(*self.columns().values(), strict=True):
            error = f"{se:.5g}"
            if not np.isfinite(x):
                error = "separated"
            elif self.covariance is not None and np.isnan(se) and self.covariance.n_units >= 2:
                error = "not identified"
            small = "<.0001" if p < 1e-4 else f"{p:.4f}"
            rows.append([name, f"{x:.7g}", error, f"{ratio:.3f}", small, f"{lower:.6g}", f"{upper:.6g}"])
        return head, rows

    def to_markdown(self) -> str:
        """Return the table in Markdown."""
        return tables.markdown(*self.cells())

    def to_latex(self) -> str:
        """Return the table in LaTeX, with the kind of the errors below it; needs the package booktabs."""
        notes = [line for line in self.lines if line.startswith("standard errors")]
        return tables.latex(*self.cells(), notes)

    def _repr_html_(self) -> str:
        return tables.to_html(*self.cells(), self.lines)

    def __str__(self) -> str:
        head, rows = self.cells()
        widths = [max(8, *(len(row[0]) for row in [head, *rows])), 14, 15, 10, 9, 14, 14]
        lines = [
            f"{row[0]:<{widths[0]}}" + "".join(f"{c:>{w}}" for c, w in zip(row[1:], widths[1:], strict=True))
            for row in [head, *rows]
        ]
        rule = "-" * sum(widths)
        return "\n".join([*self.lines, rule, lines[0], rule, *lines[1:], rule])


def summarise(model: Any, covariance: Covariance | None, level: float) -> Summary:
    """Return the summary of a fitted estimator; computes what the data at hand allow."""
    d = len(model.coef_)
    names = getattr(model, "feature_names_in_", [f"x{j}" for j in range(d)])
    errors = np.full(d, np.nan) if covariance is None else covariance.standard_errors
    lines = [*_fit_lines(model), *_error_lines(model, covariance, names), *_statistics(model)]
    lines += [f"note: {note}" for note in getattr(model, "notes_", ())]
    return Summary(
        tuple(lines), tuple(map(str, names)), model.coef_, errors, covariance, level,
        getattr(model, "_library", None),
    )  # fmt: skip


def at_hand(model: Any, name: str) -> bool:
    """Whether something lazy is known or can be had; d x d matrices of many unknowns only on request."""
    return name in model.__dict__ or (model.result_.problem is not None and len(model.coef_) <= MAX_DENSE)


def _statistics(model: Any) -> list[str]:
    if not at_hand(model, "_statistics"):
        return []
    statistics: FitStatistics = model.fit_statistics()
    return statistics.describe()


def _fit_lines(model: Any) -> list[str]:
    result = model.result_
    names = ("loss", "function")
    choice = "".join(f", {name} {getattr(model, name)}" for name in names if hasattr(model, name))
    r2 = model.r2_ if at_hand(model, "r2_") else float("nan")
    size = f"{model.n_rows_} rows"
    if hasattr(model, "n_groups_"):
        size += f" in {model.n_groups_} group{'s' if model.n_groups_ > 1 else ''}"
        size += " with an outside good each" if model.outside_good else ""
    fit = f"{size}, loss value {model.loss_value_:.8g}"
    if hasattr(model, "log_likelihood_"):
        fit += f", log likelihood {model.log_likelihood_:.8g}"
    lines = [
        f"{type(model).__name__}{choice}",
        f"{fit}, r2 {r2:.4f}",
        f"{result.status}: {result.n_iter} steps, {result.n_passes:.2f} reads of the data, "
        f"{result.seconds:.3g} s; relative gradient {result.gradient_norm:.2e}",
    ]
    if not result.converged:
        lines.append(result.message)
    lines.append(f"certificate: {_certified(model)}")
    unbalanced = getattr(model, "n_unbalanced_groups_", 0)
    if unbalanced:
        lines.append(f"the targets of {unbalanced} of {model.n_groups_} groups do not sum to one")
    return lines


def _certified(model: Any) -> str:
    """Return what is certified, or why nothing is, with the names of the columns."""
    if at_hand(model, "certificate_"):
        # Kept with the model when it is saved.
        _ = model.certified_radius_
        told = model.certificate_.describe(model.coef_)
        names = getattr(model, "feature_names_in_", [f"x{j}" for j in range(len(model.coef_))])
        named = re.sub(r"\bcolumn (\d+)\b", lambda match: str(names[int(match[1])]), told)
        return f"valid, {named}" if model.certificate_.valid else named
    from attnfit.certificates.kantorovich import within

    radius = model.__dict__.get("certified_radius_")
    if radius is None:
        return "not computed; read certificate_ of the fitted estimator (before saving it)"
    if not isfinite(radius):
        return "none; certificate_ of the fitted estimator says why"
    return f"valid, {within(radius, model.coef_)}"


def _error_lines(model: Any, covariance: Covariance | None, names: Any) -> list[str]:
    if covariance is None:
        return [
            "standard errors: not computed; read standard_errors_ of the fitted estimator (before saving it)"
        ]
    finite = np.isfinite(model.coef_)
    lines = [f"standard errors: {covariance.describe()}"]
    lines += [f"note: {note}" for note in covariance.notes]
    endless = [str(name) for name, known in zip(names, finite, strict=True) if not known]
    if endless:
        lines.append(f"no finite value: {_some(endless)} (the data are separable)")
    unseen = ~covariance.known & finite & (covariance.n_units >= 2)
    open_ones = [str(name) for name, is_open in zip(names, unseen, strict=True) if is_open]
    if open_ones:
        lines.append(f"not identified by the data: {_some(open_ones)} (shown with the smallest norm)")
    return lines


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f", and {len(names) - 5} more" if len(names) > 5 else "")

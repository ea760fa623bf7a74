"""The coefficient table of a fitted estimator."""

from __future__ import annotations

import re
from dataclasses import dataclass
from math import isfinite
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtri

from attnfit.objectives.objective import MAX_DENSE

Array = NDArray[np.float64]
HALF_WIDTH = float(ndtri(0.975))


@dataclass(frozen=True)
class Summary:
    """A coefficient table: its ``str`` is text, `columns` is for a data frame.

    Attributes
    ----------
    lines : tuple of str
        What stands above the table.
    names : tuple of str
    coefficients, standard_errors : ndarray, shape (d,)
        Standard errors are NaN where unknown.
    """

    lines: tuple[str, ...]
    names: tuple[str, ...]
    coefficients: Array
    standard_errors: Array

    def columns(self) -> dict[str, Any]:
        """Return one sequence a column: ``pandas.DataFrame(summary.columns())`` is the table.

        Returns
        -------
        dict
            Keys name, coefficient, standard_error, z, lower, upper: the last two bound the 95 % interval
            ``coefficient -+ 1.96 standard_error``.
        """
        x, se = self.coefficients, self.standard_errors
        with np.errstate(divide="ignore", invalid="ignore"):
            z = x / se
        return {
            "name": list(self.names),
            "coefficient": x,
            "standard_error": se,
            "z": z,
            "lower": x - HALF_WIDTH * se,
            "upper": x + HALF_WIDTH * se,
        }

    def __str__(self) -> str:
        columns = self.columns()
        width = max(8, *(len(name) for name in self.names))
        head = f"{'':<{width}}{'coefficient':>14}{'std. error':>13}{'z':>10}{'95 % from':>14}{'to':>14}"
        rows = [
            f"{name:<{width}}{x:>14.7g}{se:>13.5g}{z:>10.3f}{lower:>14.6g}{upper:>14.6g}"
            for name, x, se, z, lower, upper in zip(*columns.values(), strict=True)
        ]
        rule = "-" * len(head)
        return "\n".join([*self.lines, rule, head, rule, *rows, rule])


def summarise(model: Any) -> Summary:
    """Return the summary of a fitted estimator; computes what the data at hand allow."""
    from sklearn.utils.validation import check_is_fitted

    check_is_fitted(model)
    d = len(model.coef_)
    names = getattr(model, "feature_names_in_", [f"x{j}" for j in range(d)])
    wanted = _at_hand(model, "_covariance")
    errors = model.standard_errors_ if wanted else np.full(d, np.nan)
    lines = [*_fit_lines(model), *_error_lines(model, errors, names, wanted=wanted)]
    return Summary(tuple(lines), tuple(str(name) for name in names), model.coef_, errors)


def _at_hand(model: Any, name: str) -> bool:
    """Whether something lazy is known or can be had; d x d matrices of many unknowns only on request."""
    return name in model.__dict__ or (model.result_.problem is not None and len(model.coef_) <= MAX_DENSE)


def _fit_lines(model: Any) -> list[str]:
    result = model.result_
    names = ("loss", "function")
    choice = "".join(f", {name} {getattr(model, name)}" for name in names if hasattr(model, name))
    r2 = model.r2_ if _at_hand(model, "r2_") else float("nan")
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
    if _at_hand(model, "certificate_"):
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


def _error_lines(model: Any, errors: Array, names: Any, *, wanted: bool) -> list[str]:
    if not wanted:
        return [
            "standard errors: not computed; read standard_errors_ of the fitted estimator (before saving it)"
        ]
    unit = "group" if getattr(model, "n_groups_", 1) > 1 else "row"
    observed = hasattr(model, "log_likelihood_")
    kind = "inverse observed information" if observed else f"sandwich, one score a {unit}"
    finite = np.isfinite(model.coef_)
    lines = [f"standard errors: {kind}"]
    endless = [str(name) for name, known in zip(names, finite, strict=True) if not known]
    if endless:
        lines.append(f"no finite value: {_some(endless)} (the data are separable)")
    unseen = np.isnan(errors) & finite
    open_ones = [str(name) for name, is_open in zip(names, unseen, strict=True) if is_open]
    if open_ones:
        lines.append(f"not identified by the data: {_some(open_ones)} (shown with the smallest norm)")
    return lines


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f", and {len(names) - 5} more" if len(names) > 5 else "")

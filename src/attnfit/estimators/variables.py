"""What a call for effects names: a variable, which is a column, a term of a formula or given, and errors."""

from __future__ import annotations

from typing import Any

import numpy as np

from attnfit.inference import Covariance
from attnfit.inference.choice_effects import Variable


def covariance_for(model: Any, options: dict[str, Any]) -> tuple[Covariance, float]:
    """Return the covariance that the options of a call ask for, and the level of its intervals."""
    given = dict(options)
    level = given.pop("level", 0.95)
    return model._find_covariance(**given), level


def variable_of(model: Any, variable: Any, derivative: Any, n: int, data: Any = None) -> Variable:
    """Return how logits depend on a variable of n rows; ``data`` are these rows where a formula needs them.

    Raises
    ------
    ValueError
        If there is no such column, its coefficient is not finite, or a derivative has another shape.
    """
    if derivative is not None:
        slopes, values = np.asarray(derivative, dtype=np.float64), np.asarray(variable, dtype=np.float64)
        shape = (n, len(model.coef_))
        if slopes.shape != shape or values.shape != shape[:1]:
            raise ValueError(
                f"derivative has shape {slopes.shape} and the variable {values.shape}; pass {shape} and "
                f"{shape[:1]}: the rows of X differentiated, and the variable's values"
            )
        return Variable(values=values, slopes=slopes)
    formula = model.__dict__.get("_formula")
    if formula is not None and isinstance(variable, str) and not formula.is_plain(variable):
        if data is None:
            raise ValueError(
                f"{variable!r} enters by several columns: pass X, a data frame with the variables"
            )
        values, slopes = formula.derivative(data, variable)
        return Variable(values=values, slopes=slopes)
    names = [str(name) for name in model._names()]
    if isinstance(variable, str):
        if variable not in names:
            raise ValueError(f"{variable!r} is no column of X; its columns are {', '.join(names[:12])}")
        column = names.index(variable)
    else:
        column = int(variable)
        if not -len(names) <= column < len(names):
            raise ValueError(f"column {variable} does not exist: X has {len(names)} columns")
        column %= len(names)
    if not np.isfinite(model.coef_[column]):
        raise ValueError(f"the coefficient of {names[column]!r} has no finite value: its effects have none")
    return Variable(column)

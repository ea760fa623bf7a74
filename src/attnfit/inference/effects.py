"""Functions of the coefficients with delta-method errors and intervals."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from scipy.special import expit, logit

from attnfit.inference import tables
from attnfit.inference.covariance import Covariance
from attnfit.segments import Array


@dataclass(frozen=True)
class Effects:
    """Values with standard errors and intervals.

    Attributes
    ----------
    value, standard_error, lower, upper : ndarray
        Of one shape: one value a row, alternative or group, or one a pair of alternatives.
    names : tuple
        One list of labels for each dimension.
    mean : Effects or None
        The mean over groups, where the values are of groups.
    level : float
        Cover of the intervals.
    notes : tuple of str
    """

    value: Array
    standard_error: Array
    lower: Array
    upper: Array
    names: tuple[Any, ...] = ()
    mean: Effects | None = None
    level: float = 0.95
    notes: tuple[str, ...] = ()
    dimensions: tuple[str, ...] = ("name",)
    library: str | None = None
    index: Any = field(default=None, repr=False, compare=False)

    def columns(self) -> dict[str, Any]:
        """Return one sequence a column: labels, value, standard_error, lower, upper."""
        shape = np.shape(self.value)
        labels: dict[str, Any] = {}
        for axis, (name, of_axis) in enumerate(zip(self.dimensions, self.names, strict=False)):
            along = np.array(list(of_axis), dtype=object)
            spread = along.reshape([-1 if a == axis else 1 for a in range(len(shape))])
            labels[name] = np.broadcast_to(spread, shape).reshape(-1).tolist()
        numbers = {
            name: np.reshape(getattr(self, name), -1)
            for name in ("value", "standard_error", "lower", "upper")
        }
        return labels | numbers

    def to_frame(self) -> Any:
        """Return a data frame of the library that the data came in, with their index if it has one."""
        frame = tables.to_frame(self.columns(), self.library)
        if self.index is not None and len(self.index) == len(frame):
            frame.index = self.index
        return frame

    def cells(self) -> tuple[list[str], list[list[str]]]:
        """Return head and rows as text."""
        columns = self.columns()
        rows = zip(*columns.values(), strict=True)
        shown = [[f"{c:.6g}" if isinstance(c, float) else str(c) for c in row] for row in rows]
        return list(columns), shown

    def to_markdown(self) -> str:
        """Return the table in Markdown."""
        return tables.markdown(*self.cells())

    def to_latex(self) -> str:
        """Return the table in LaTeX; needs the package booktabs."""
        return tables.latex(*self.cells(), self.notes)

    def _repr_html_(self) -> str:
        return tables.to_html(*self.cells(), self.notes)


@dataclass(frozen=True)
class ScenarioComparison:
    """Shares of alternatives in two scenarios, and what changes."""

    before: Effects
    after: Effects
    change: Effects

    def to_frame(self) -> Any:
        """Return a data frame with one row an alternative."""
        columns: dict[str, Any] = {"alternative": list(self.change.names[0])}
        for name in ("before", "after", "change"):
            of_name = getattr(self, name)
            columns[name] = of_name.value
            for part in ("standard_error", "lower", "upper"):
                columns[f"{name}_{part}"] = getattr(of_name, part)
        return tables.to_frame(columns, self.change.library)


def effects_of(
    value: Any,
    gradients: Array,
    covariance: Covariance,
    level: float,
    scale: str = "",
    **labels: Any,
) -> Effects:
    """Return values with gradients, shape (..., d); intervals are symmetric, or so on a ``"logit"`` scale of
    shares or a ``"log"`` scale of positive outcomes.
    """
    value = np.asarray(value, dtype=np.float64)
    errors = covariance.errors(gradients)
    half = covariance.quantile(level) * errors
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        if scale == "logit":
            half = half / (value * (1.0 - value))
            inside = (value > 0.0) & (value < 1.0)
            lower, upper = (np.where(inside, expit(logit(value) + s * half), value) for s in (-1.0, 1.0))
        elif scale == "log":
            ratio = np.exp(half / value)
            lower, upper = value / ratio, value * ratio
        else:
            lower, upper = value - half, value + half
    return Effects(value, errors, lower, upper, level=level, **labels)


def ratio_of(
    values: tuple[float, float],
    gradients: tuple[Array, Array],
    x: Array,
    covariance: Covariance,
    level: float,
    method: str,
    n_draws: int,
    random_state: Any,
    name: str,
    below: str,
) -> Effects:
    """Return the ratio of two linear functions of the coefficients, by ``"delta"``, ``"fieller"`` or
    ``"simulation"``.

    Notes
    -----
    Fieller's set is that of r with ``|a - r b| <= t se(a - r b)``, unbounded where b is not significantly
    different from zero. Sources: Fieller (1954), Journal of the Royal Statistical Society B 16, 175-185;
    Krinsky and Robb (1986) doi:10.2307/1924536.
    """
    a, b = values
    ratio = a / b
    both = np.stack(gradients)
    q = (both[0] - ratio * both[1]) / b
    plain = effects_of([ratio], q[None, :], covariance, level, names=([name],))
    if method == "delta" or np.isnan(plain.standard_error).any():
        return plain
    notes: tuple[str, ...] = ()
    if method == "fieller":
        matrix = np.where(np.isfinite(covariance.matrix), covariance.matrix, 0.0)
        v = both @ matrix @ both.T
        t2 = covariance.quantile(level) ** 2
        A, B, C = b * b - t2 * v[1, 1], a * b - t2 * v[0, 1], a * a - t2 * v[0, 0]
        if A <= 0.0:
            ends = -np.inf, np.inf
            notes = (f"{below} is not significantly different from zero: the interval is unbounded",)
        else:
            root = np.sqrt(max(B * B - A * C, 0.0))
            ends = (B - root) / A, (B + root) / A
    elif method == "simulation":
        rng = np.random.default_rng(random_state)
        matrix = np.where(np.isfinite(covariance.matrix), covariance.matrix, 0.0)
        draws = rng.multivariate_normal(np.zeros(2), both @ matrix @ both.T, size=n_draws, method="eigh")
        found = (a + draws[:, 0]) / (b + draws[:, 1])
        tail = 0.5 - 0.5 * level
        ends = tuple(np.quantile(found, [tail, 1.0 - tail]))
    else:
        raise ValueError(f"method must be 'delta', 'fieller' or 'simulation', not {method!r}")
    return Effects(
        plain.value, plain.standard_error, np.array([ends[0]]), np.array([ends[1]]), ([name],),
        level=level, notes=notes,
    )  # fmt: skip

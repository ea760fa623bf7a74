"""Choice sets at which a model is looked at: those of the training, or others."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from scipy import sparse

from attnfit.inference.choice_effects import (
    Responses,
    Variable,
    Wanted,
    log_sum,
    response_sum,
    rows_of,
    slope_of,
)
from attnfit.inference.scores import evaluated
from attnfit.inference.units import per_part
from attnfit.objectives.objective import Evaluation
from attnfit.segments import Array, Index

# All pairs of alternatives beyond so many take a table of gradients that nobody asked for.
MAX_PAIRS = 50


@dataclass(frozen=True)
class LogSums:
    """Log sums of groups with their gradients, shapes (G,) and (G, d), and the groups' weights and labels."""

    values: Array
    gradients: Array
    weights: Array
    labels: list[Any]


@dataclass
class Scenario:
    """Rows in groups at the coefficients x.

    Attributes
    ----------
    problem : Softmax
        Its targets play no part.
    n_rows : int
        Rows that the user gave; those of outside goods follow in the design.
    kept : ndarray of bool or None
        Which of the user's rows are rows of the design.
    n_outside : int
    labels : ndarray or None
        The user's labels of groups, where the problem has numbers.
    weights : ndarray or None
        Weights of the rows of the design in aggregates; those of the fit by default.
    """

    problem: Any
    x: Array
    n_rows: int
    kept: Any = None
    weights: Array | None = None
    n_outside: int = 0
    labels: Any = None
    library: str | None = None
    index: Any = None
    data: Any = None

    @cached_property
    def at(self) -> Evaluation:
        """The coefficients, evaluated where groups are longer than a block."""
        return evaluated(self.problem, self.x)

    def codes(self, alternatives: Any) -> tuple[Index, list[Any]]:
        """Return the number of the alternative of each row of the design, and the labels in order of first
        appearance; outside goods are one more.
        """
        array = np.asarray(alternatives)
        if array.shape != (self.n_rows,):
            raise ValueError(
                f"alternatives has shape {array.shape} but there are {self.n_rows} rows; pass one label a row"
            )
        array = array if self.kept is None else array[self.kept]
        labels, first, inverse = np.unique(array, return_index=True, return_inverse=True)
        order = np.argsort(first)
        rank = np.empty_like(order)
        rank[order] = np.arange(len(order))
        names = labels[order].tolist()
        if self.n_outside:
            outside = np.full(self.n_outside, len(names))
            return np.concatenate([rank[inverse], outside]), [*names, "outside"]
        return rank[inverse], names

    def responses(self, codes: Index, n_labels: int, variable: Variable | None, *, own: bool) -> Responses:
        """Return sums of shares and of their responses to a variable."""
        if not own and n_labels > MAX_PAIRS:
            d = len(self.x)
            raise ValueError(
                f"all pairs of {n_labels} alternatives need {n_labels**2 * d * 8 / 1e6:,.0f} MB for their "
                "gradients and are rarely wanted; pass pairs='own', or fewer alternatives"
            )
        wanted = Wanted(n_labels, own, variable)
        with np.errstate(under="ignore"):
            found: Responses = self.problem.rows.reduce(
                response_sum, self.at, wanted, per_part(self.problem, (codes,)), self.weights
            )
        return found.finish(own=own)

    def own_effects(self, variable: Variable, kind: str) -> tuple[Array, Array]:
        """Return for each of the user's rows the response of its share to its own variable, and its
        gradient.
        """
        self._require_here()
        n, d = self.problem.n_rows, len(self.x)
        values, gradients = np.zeros(n), np.zeros((n, d))
        fixed = self.is_fixed(variable)
        if fixed and self.problem.rows.n_long:
            raise ValueError("one value a row of a variable of groups needs groups that fit into a block")
        for rows in rows_of(self.problem.rows, self.problem.rows.chunks, self.at, self.weights, d):
            v, D, h = slope_of(rows, variable, self.x)
            v = v if kind == "elasticity" else np.ones_like(v)
            f = rows.f if kind == "marginal" else np.ones_like(rows.f)
            if fixed:
                mean = np.bincount(rows.groups, weights=rows.f * D)[rows.groups]
                change = rows.f[:, None] * (rows.c * D[:, None] + h)
                d_mean = sparse.csr_array((np.ones(len(D)), (rows.groups, np.arange(len(D))))) @ change
                values[rows.index] = f * v * (D - mean)
                gradient = (f * v)[:, None] * (h - d_mean[rows.groups])
                if kind == "marginal":
                    gradient += values[rows.index][:, None] * rows.c
                gradients[rows.index] = gradient
                continue
            values[rows.index] = f * (1.0 - rows.f) * v * D
            d_share = -rows.f[:, None] * rows.c * (f * v * D)[:, None]
            if kind == "marginal":
                d_share += (rows.f * (1.0 - rows.f) * v * D)[:, None] * rows.c
            gradients[rows.index] = d_share + (f * (1.0 - rows.f) * v)[:, None] * h
        return values[: self.n_rows], gradients[: self.n_rows]

    def row_shares(self) -> tuple[Array, Array]:
        """Return the share of each of the user's rows and its gradient, shapes (n,) and (n, d)."""
        self._require_here()
        n, d = self.problem.n_rows, len(self.x)
        values, gradients = np.zeros(n), np.zeros((n, d))
        for rows in rows_of(self.problem.rows, self.problem.rows.chunks, self.at, self.weights, d):
            values[rows.index] = rows.f
            gradients[rows.index] = rows.f[:, None] * rows.c
        return values[: self.n_rows], gradients[: self.n_rows]

    def ratio_slopes(self, one: Variable, other: Variable) -> tuple[Array, Array, Array, Array]:
        """Return D and h of two variables on the user's rows."""
        self._require_here()
        found: list[list[Any]] = [[], [], [], []]
        for rows in rows_of(self.problem.rows, self.problem.rows.chunks, self.at, self.weights, len(self.x)):
            inside = rows.index < self.n_rows
            for k, variable in enumerate((one, other)):
                _, D, h = slope_of(rows, variable, self.x)
                found[2 * k].append(D[inside])
                found[2 * k + 1].append(h[inside])
        D_a, h_a, D_b, h_b = (np.concatenate(pieces) for pieces in found)
        return D_a, h_a, D_b, h_b

    def log_sums(self) -> LogSums:
        """Return the log sum of each group."""
        self._require_here()
        found = self.problem.rows.reduce(log_sum, self.at, self.weights)
        labels = [label for label in self.problem.groups.labels.tolist() if label in found]
        values, gradients, weights = zip(*(found[label] for label in labels), strict=True)
        named = labels if self.labels is None else [self.labels[k] for k in labels]
        return LogSums(np.array(values), np.stack(gradients), np.array(weights), named)

    def is_fixed(self, variable: Variable) -> bool:
        """Whether a variable is one number a group: a change moves all its rows."""
        if variable.values is None or not self.problem.rows.is_whole:
            return False
        labels = np.unique(self.group_labels(), return_inverse=True)[1]
        first = np.zeros(int(labels.max()) + 1)
        first[labels] = variable.values
        return bool((first[labels] == variable.values).all())

    def group_labels(self) -> Any:
        """Return the label of each of the user's rows' groups."""
        groups, n = self.problem.groups, self.problem.n_rows
        numbers = groups.unsort(np.repeat(np.arange(len(groups)), np.diff(groups.starts, append=n)))
        return groups.labels[numbers][: self.n_rows]

    def set_weights(self, weights: Any) -> None:
        """Weigh groups in aggregates: one weight a row of the user, or a group."""
        array = np.asarray(weights, dtype=np.float64)
        groups, n = self.problem.groups, self.problem.n_rows
        if array.shape == (len(groups),) and len(groups) != self.n_rows:
            self.weights = groups.unsort(np.repeat(array, np.diff(groups.starts, append=n)))
            return
        if array.shape != (self.n_rows,):
            raise ValueError(
                f"weights has shape {array.shape}; pass one a row ({self.n_rows}) or a group ({len(groups)})"
            )
        array = array if self.kept is None else array[self.kept]
        numbers = groups.unsort(np.repeat(np.arange(len(groups)), np.diff(groups.starts, append=n)))
        of_rows = numbers[: len(array)]
        mean = np.bincount(of_rows, weights=array) / np.bincount(of_rows)
        self.weights = mean[numbers]

    def _require_here(self) -> None:
        if not self.problem.rows.is_whole:
            raise ValueError("one value a row or group needs the rows in memory; pass X and groups")

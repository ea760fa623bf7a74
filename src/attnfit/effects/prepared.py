"""The data of a problem with absorbed effects, and the rows of it that a fit works on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import xlogy

from attnfit.effects.levels import Codes, Index, LabelSet, read_sets, require_distinct, sort_into_cells
from attnfit.effects.newton import ConvexFit
from attnfit.effects.rows import Features, SortedRows
from attnfit.effects.separation import Dropped, connected, leave_out, redundant
from attnfit.effects.squared import SquaredExponentialRows, SquaredFit, SquaredSoftmaxRows
from attnfit.losses.elementwise import SquaredExponential
from attnfit.losses.softmax import KullbackLeibler, Squared
from attnfit.objectives.rows import RowProblem

Array = NDArray[np.float64]
Mask = NDArray[np.bool_]


class Data:
    """Targets, weights and levels of all rows, in the user's order.

    Parameters
    ----------
    plain : RowProblem
        The problem without effects; of a softmax with its groups, which are the first set.
    X : Design or None
    absorb
        Labels, see `attnfit.effects.levels.read_sets`.
    drop_singletons : bool
    names : list of str, optional
        Names of the sets.

    Attributes
    ----------
    sets : list of LabelSet
        All sets, groups of a softmax first.
    grouped : bool
        Whether the first set are the groups of a softmax.
    target : ndarray, shape (n,)
        Targets times weights.
    measure : ndarray, shape (n,)
        What multiplies ``exp(eta)``: weights, or ones in a softmax, where they multiply the loss of a row and
        not its share.
    """

    def __init__(
        self, plain: RowProblem, X: Any, absorb: Any, *, drop_singletons: bool, names: list[str] | None
    ) -> None:
        self.plain, self.X, self.drop_singletons = plain, X, drop_singletons
        n = self.n_rows = plain.n_rows
        self.grouped = bool(plain.loss.coupled)
        self.sets = read_sets(absorb, n, names)
        unsort = plain.groups.unsort
        if self.grouped:
            sizes = np.diff(plain.groups.starts, append=n)
            numbers = unsort(np.repeat(np.arange(len(sizes)), sizes))
            self.sets = [LabelSet("groups", plain.groups.labels, numbers.astype(np.int32)), *self.sets]
        require_distinct(self.sets)
        b = unsort(np.asarray(plain.b[0:n]))
        w = np.ones(n) if plain.weights is None else unsort(np.asarray(plain.weights[0:n]))
        self.b, self.w, self.target = b, w, w * b
        self.measure = np.ones(n) if self.grouped else w
        self.present = np.ones(n, dtype=bool) if self.grouped else w > 0.0
        self.shift = np.zeros(n) if plain.offset is None else unsort(np.asarray(plain.offset[0:n]))
        self.squared = isinstance(plain.loss, Squared | SquaredExponential)
        self.own = float(np.sum(xlogy(self.target, b))) if isinstance(plain.loss, KullbackLeibler) else 0.0

    def prepare(self, separated: Mask | None = None) -> Prepared:
        """Return the rows that carry information, sorted by level; ``separated`` are known to carry none.

        Raises
        ------
        ValueError
            If none or one is left.
        """
        kept, dropped = leave_out(
            self.sets, self.target, self.present, separable=not self.squared,
            drop_singletons=self.drop_singletons, separated=separated,
        )  # fmt: skip
        rows = np.flatnonzero(kept)
        if len(rows) < 2:
            told = dropped.sentence(self.sets).partition(": ")[0] or "there are no more"
            raise ValueError(
                f"b leaves {len(rows)} row{'' if len(rows) == 1 else 's'} to fit ({told}); pass data with "
                "positive outcomes in several rows"
            )
        levels = [levels_by_appearance(s.codes[rows], s.n_levels) for s in self.sets]
        sizes = [len(found) for found in levels]
        # The largest set is the one that is eliminated exactly; groups are it by their nature.
        order = sorted(range(self.grouped, len(self.sets)), key=lambda k: -sizes[k])
        order = [0, *order] if self.grouped else order
        order = [k for i, k in enumerate(order) if i == 0 or sizes[k] > 1]
        codes = []
        for k in order:
            place = np.zeros(self.sets[k].n_levels, dtype=np.int32)
            place[levels[k]] = np.arange(sizes[k], dtype=np.int32)
            codes.append(place[self.sets[k].codes[rows]])
        cells = sort_into_cells(codes, [sizes[k] for k in order])
        places = rows[cells.order]
        features = Features.of(self.X, places, cells.row_starts[cells.level_starts])
        columns = (self.measure[places], self.target[places], self.shift[places])
        sorted_rows = SortedRows(features, cells, *columns)
        if self.squared:
            kind = SquaredSoftmaxRows if self.grouped else SquaredExponentialRows
            sorted_rows = kind(features, cells, *columns, self.w[places])
        return Prepared(self, kept, dropped, order, [levels[k] for k in order], sorted_rows)


def levels_by_appearance(codes: Codes, n_levels: int) -> Index:
    """Return the levels that occur, in the order in which they do: rows that are stored level by level then
    stay in their order.
    """
    first = np.full(n_levels, len(codes), dtype=np.intp)
    rows = np.arange(len(codes) - 1, -1, -1)
    first[codes[::-1]] = rows
    present = np.flatnonzero(first < len(codes))
    return np.asarray(present[np.argsort(first[present], kind="stable")])


@dataclass(frozen=True)
class Prepared:
    """The rows that are kept, sorted by level.

    Attributes
    ----------
    data : Data
    kept : ndarray of bool, shape (n,)
    dropped : Dropped
    order : list of int
        Sets in the order in which they are worked on, by their number; those with one level are not.
    levels : list of ndarray of int
        Of each set worked on: the levels that have rows.
    rows : SortedRows
    """

    data: Data
    kept: Mask
    dropped: Dropped
    order: list[int]
    levels: list[Index]
    rows: SortedRows

    def standard(self, x: Array) -> Array:
        """Return coefficients of the standardised columns."""
        return np.asarray(x * self.rows.features.scale)

    def user(self, beta: Array) -> Array:
        """Return coefficients in the user's units."""
        return np.asarray(beta / self.rows.features.scale)

    def ridge(self) -> Array:
        """Return the ridge of coefficients of the standardised columns, shape (K,)."""
        scale = self.rows.features.scale
        return np.broadcast_to(np.asarray(self.data.plain.ridge, dtype=np.float64) / scale**2, scale.shape)

    def constant(self) -> float:
        """Return what the loss has beyond that of a cross entropy."""
        if self.data.grouped or self.data.squared:
            return self.data.own
        mass = self.rows.mass
        return float(mass.sum() - xlogy(mass, mass).sum())

    def spread(self, a: Array) -> dict[int, Array]:
        """Return the effects of all sets but the first by level of the set; zero where it has no rows."""
        offsets, found = self.rows.cells.offsets, {}
        for i, (k, levels) in enumerate(zip(self.order[1:], self.levels[1:], strict=True)):
            values = np.zeros(self.data.sets[k].n_levels)
            values[levels] = a[offsets[i] : offsets[i + 1]]
            found[k] = values
        return found

    def gather(self, effects: dict[int, Array]) -> Array:
        """Undo `spread`."""
        pieces = [effects[k][levels] for k, levels in zip(self.order[1:], self.levels[1:], strict=True)]
        return np.concatenate([*pieces, np.zeros(0)])

    def fit(self, tol: float = 1e-8) -> ConvexFit:
        """Return a descent on these rows."""
        kind = SquaredFit if self.data.squared else ConvexFit
        return kind(self.rows, self.ridge(), tol)

    def components(self) -> tuple[int, list[Index]]:
        """Return the number of components of the graph in which rows join levels, and the component of each
        level of the sets worked on.
        """
        cells, n_sets = self.rows.cells, len(self.order)
        if n_sets == 1:
            return 1, [np.zeros(cells.n_first, dtype=np.intp)]
        owner = np.repeat(np.arange(cells.n_first), np.diff(cells.level_starts)).astype(np.int32)
        ones = np.repeat(owner, n_sets - 1)
        number, component = connected(ones, cells.rest.ravel(), (cells.n_first, cells.n_rest))
        return number, [
            component[: cells.n_first],
            *np.split(component[cells.n_first :], cells.offsets[1:-1]),
        ]

    def rank(self) -> int:
        """Return the number of parameters that the effects take up, groups of a softmax included; with three
        sets and more at most.
        """
        sizes = [len(levels) for levels in self.levels]
        codes: list[Codes] = []
        for k, levels in zip(self.order, self.levels, strict=True):
            place = np.zeros(self.data.sets[k].n_levels, dtype=np.int32)
            place[levels] = np.arange(len(levels), dtype=np.int32)
            codes.append(place[self.data.sets[k].codes[self.kept]])
        return sum(sizes) - redundant(codes, sizes)

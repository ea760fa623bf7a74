"""The rows of a problem with absorbed effects, sorted by level, and what one read of them adds up."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from attnfit.effects import kernels
from attnfit.effects.levels import Cells, Codes, Index
from attnfit.effects.schur import Schur
from attnfit.effects.separation import connected

Array = NDArray[np.float64]
# Rows that are worked on at a time stay in cache between the loops over them.
BLOCK_ENTRIES = 1 << 17
# Rows that are left out are read along where they are fewer than the others.
GAPS = 2


@dataclass
class Features:
    """The structural columns of the kept rows in standard units: ``(x - centre) / scale``.

    Attributes
    ----------
    design : Design or None
        Where the rows are; None without columns.
    places : ndarray of int, shape (n,)
        The user's row of each row in sorted order.
    centre, scale : ndarray, shape (K,)
    largest : ndarray, shape (K,)
        The largest size of a standardised entry.
    rows_read : int
        Rows of X that were read so far.
    """

    design: Any
    places: Index
    K: int
    sorted_rows: bool = True
    _held: Array | None = None
    centre: Array = field(default_factory=lambda: np.zeros(0))
    scale: Array = field(default_factory=lambda: np.zeros(0))
    largest: Array = field(default_factory=lambda: np.zeros(0))
    rows_read: int = 0

    @classmethod
    def of(cls, design: Any, places: Index, bounds: Index) -> Features:
        """Return the features of some rows, in this order; what is in memory and dense is copied. ``bounds``
        are the first rows of the levels of set 0, and the number of rows.
        """
        if design is None:
            return cls(None, places, 0)
        K = int(design.shape[1])
        first = np.minimum.reduceat(places, bounds[:-1])
        last = np.maximum.reduceat(places, bounds[:-1])
        # Levels that are stored one after the other can be read one after the other.
        in_order = bool((last[:-1] < first[1:]).all())
        found = cls(design, places, K, sorted_rows=in_order or not design.on_disk)
        if not design.on_disk:
            block = design.block(slice(0, 0))
            if not sparse.issparse(block):
                found._held = np.ascontiguousarray(design.block(places))
        found._standardise()
        return found

    @property
    def n(self) -> int:
        """Number of rows."""
        return len(self.places)

    def _standardise(self) -> None:
        total, n = np.zeros(self.K), max(self.n, 1)
        low, high = np.full(self.K, np.inf), np.full(self.K, -np.inf)
        self.centre, self.scale = np.zeros(self.K), np.ones(self.K)
        if self._held is not None:
            self.centre = self._held.mean(axis=0)
            self._held -= self.centre
            squares = np.einsum("ij,ij->j", self._held, self._held)
            low, high = self._held.min(axis=0), self._held.max(axis=0)
        else:
            # Sums about a row of the data do not cancel where columns are far from zero.
            first, squares = None, np.zeros(self.K)
            for _, block in self.raw_blocks():
                first = block[0].copy() if first is None else first
                block = block - first
                total += block.sum(axis=0)
                squares += np.einsum("ij,ij->j", block, block)
                low, high = np.minimum(low, block.min(axis=0)), np.maximum(high, block.max(axis=0))
            mean = total / n
            squares = np.maximum(squares - n * mean**2, 0.0)
            low, high = low - mean, high - mean
            self.centre = mean + (0.0 if first is None else first)
        sizes = np.maximum(np.abs(low), np.abs(high))
        spread = np.sqrt(squares / n)
        # A constant column has no spread but rounding.
        varies = spread > 1e-13 * np.maximum(np.abs(self.centre), np.finfo(float).tiny)
        self.scale = np.where(varies, spread, 1.0)
        self.largest = sizes / self.scale
        if self._held is not None:
            self._held[:, ~varies] = 0.0
            self._held /= self.scale
        self.constant = ~varies

    def blocks(self, cuts: Index) -> Iterator[tuple[slice, Any]]:
        """Yield rows in standard units with their places in sorted order: runs between cuts where rows are in
        order, else as they are stored with an array of places.
        """
        if self._held is not None:
            self.rows_read += self.n
            for first, last in pairwise(cuts):
                yield slice(first, last), self._held[first:last]
            return
        for where, block in self.raw_blocks(cuts):
            block = (block - self.centre) / self.scale
            block[:, self.constant] = 0.0
            yield where, block

    constant: NDArray[np.bool_] = field(default_factory=lambda: np.zeros(0, dtype=bool))

    def raw_blocks(self, cuts: Index | None = None) -> Iterator[tuple[Any, Array]]:
        """Yield rows in the user's units."""
        self.rows_read += self.n
        if self.sorted_rows:
            cuts = self.even_cuts() if cuts is None else cuts
            for first, last in pairwise(cuts):
                yield slice(first, last), self._dense(self.places[first:last])
            return
        stored = np.argsort(self.places, kind="stable")
        cuts = self.even_cuts()
        for first, last in pairwise(cuts):
            where = stored[first:last]
            yield where, self._dense(self.places[where])

    def even_cuts(self) -> Index:
        """Return bounds of blocks of equal size."""
        step = max(1, BLOCK_ENTRIES // max(self.K, 1))
        return np.append(np.arange(0, self.n, step), self.n).astype(np.intp)

    def _dense(self, rows: Index) -> Array:
        first, last = int(rows.min()), int(rows.max()) + 1
        if last - first <= GAPS * len(rows):
            block = self.design.block(slice(first, last))[rows - first]
        else:
            sorted_rows = np.sort(rows)
            block = self.design.block(sorted_rows)[np.searchsorted(sorted_rows, rows)]
        return np.asarray(block.toarray() if sparse.issparse(block) else block, dtype=np.float64)


@dataclass(frozen=True)
class Moments:
    """What one read at ``(beta, a_R)`` adds up, the effects of set 0 being at their optimum.

    Attributes
    ----------
    value : float
        The loss.
    gradient, gradient_rest : ndarray, shapes (K,) and (M,)
        Of beta, in standard units, and of the effects of the other sets.
    sizes : ndarray, shape (K,)
        The diagonal of ``X'WX``, before anything is eliminated.
    H, B : ndarray, shapes (K, K) and (M, K)
        Curvature of beta, and of beta with the other sets, set 0 eliminated.
    first_columns : ndarray, shape (L_0, K)
        What set 0 takes of each column, ``d^-1 D_0'WX``.
    curvature, metric : Schur
        Curvature of the other sets, set 0 eliminated, and a positive semidefinite matrix near it.
    first : ndarray, shape (L_0,)
        The effects of set 0.
    mu : ndarray, shape (n,)
        Outputs times weights, in sorted order; of a squared loss the outputs.
    residual : ndarray, shape (n,)
        Scores of rows are ``residual (X - what the effects explain)``.
    """

    value: float
    gradient: Array
    gradient_rest: Array
    sizes: Array
    H: Array
    B: Array
    first_columns: Array
    curvature: Schur
    metric: Schur
    first: Array
    mu: Array
    residual: Array


def eliminated(schur: Schur, H: Array, B_first: Array, B_rest: Array) -> tuple[Array, Array, Array]:
    """Return the curvature of beta, that with the other sets, and ``d^-1 B_0``, set 0 eliminated."""
    inverse = np.where(schur.d > 0.0, 1.0 / np.where(schur.d > 0.0, schur.d, 1.0), 0.0)
    first_columns = inverse[:, None] * B_first
    return H - B_first.T @ first_columns, schur.eliminate(B_first, B_rest), first_columns


@dataclass
class SortedRows:
    """Rows in the order of their cells.

    Attributes
    ----------
    features : Features
    cells : Cells
    measure : ndarray, shape (n,)
        What multiplies ``exp(eta)``: weights of a Poisson model, ones of a softmax.
    target : ndarray, shape (n,)
        Targets times weights.
    offset : ndarray, shape (n,)
    """

    features: Features
    cells: Cells
    measure: Array
    target: Array
    offset: Array
    cuts: Index = field(init=False)

    def __post_init__(self) -> None:
        self.cuts = self._whole_levels()
        self.target_cells = np.add.reduceat(self.target, self.cells.row_starts[:-1])
        self.mass = np.add.reduceat(self.target_cells, self.cells.level_starts[:-1])
        self.target_rest = self.by_rest(self.target_cells)

    @property
    def n(self) -> int:
        """Number of rows."""
        return len(self.target)

    def _whole_levels(self) -> Index:
        """Return bounds of blocks of whole levels of set 0."""
        bounds = self.cells.row_starts[self.cells.level_starts]
        step = max(1, BLOCK_ENTRIES // max(self.features.K, 4))
        block = bounds[:-1] // step
        starts = bounds[:-1][np.concatenate([[True], block[1:] != block[:-1]])]
        return np.append(starts, self.n).astype(np.intp)

    def by_rest(self, values: Array) -> Array:
        """Return ``R'v`` of one number a cell, shape (M,)."""
        out = np.zeros(self.cells.n_rest)
        kernels.sum_by_rest()(values, self.cells.rest, out)
        return out

    @cached_property
    def _component(self) -> Index:
        """The component of each level of the other sets in the graph between its set and set 0."""
        cells, found, total = self.cells, [], 0
        owner = np.repeat(np.arange(cells.n_first, dtype=np.int32), np.diff(cells.level_starts))
        for s, (first, last) in enumerate(pairwise(cells.offsets)):
            ends = cells.rest[:, s] - np.int32(first)
            numbers = connected(owner, ends, (cells.n_first, last - first))[1][cells.n_first :]
            numbers = np.unique(numbers, return_inverse=True)[1]
            found.append(numbers + total)
            total += int(numbers.max()) + 1
        return np.concatenate([*found, np.zeros(0, dtype=np.intp)])

    def consistent(self, right: Array) -> Array:
        """Return right-hand sides of systems with the effects, or solutions, without the constants of
        components, shape (M, m): rounding alone puts them there, and no solution can meet them.
        """
        if not len(right):
            return right
        numbers = self._component
        sizes = np.bincount(numbers)
        means = [np.bincount(numbers, weights=column) / sizes for column in right.T]
        return np.asarray(right - np.column_stack(means)[numbers])

    def logits(self, beta: Array) -> Array:
        """Return ``X beta + offset``, shape (n,): one read, none where beta is zero."""
        z = self.offset.copy()
        if self.features.K and beta.any():
            for where, block in self.features.blocks(self.cuts):
                z[where] += block @ beta
        return z

    def expected(self, z: Array, a: Array) -> tuple[float, Array, Array, Array]:
        """Return the loss, outputs mu by row, W by cell and the log sums of set 0; z becomes the logit."""
        cells = self.cells
        mu, W, log_sums = np.empty(self.n), np.empty(cells.n_cells), np.empty(cells.n_first)
        loss = kernels.profile_levels()(
            z, self.measure, self.target, cells.level_starts, cells.row_starts, cells.rest, a, mu, W, log_sums
        )
        return float(loss), mu, W, log_sums

    def moments(self, beta: Array, a: Array) -> Moments:
        """Return what one read adds up: of rows in the order of set 0 in one pass, of others in two."""
        K, cells, features = self.features.K, self.cells, self.features
        H, gradient = np.zeros((K, K)), np.zeros(K)
        B_first, B_rest = np.zeros((cells.n_first, K)), np.zeros((cells.n_rest, K))
        if not features.sorted_rows:
            value, mu, W, log_sums = self.expected(self.logits(beta), a)
            self._add_stored(mu, H, gradient, B_first, B_rest)
            return self._moments(value, gradient, H, B_first, B_rest, W, log_sums, mu)
        mu, W = np.empty(self.n), np.empty(cells.n_cells)
        log_sums, value = np.empty(cells.n_first), 0.0
        profile, add = kernels.profile_levels(), kernels.add_products()
        bounds = cells.row_starts[cells.level_starts]
        for where, X in features.blocks(self.cuts) if K else self._without_columns():
            first, last = (int(v) for v in np.searchsorted(bounds, [where.start, where.stop]))
            c0, c1 = cells.level_starts[first], cells.level_starts[last]
            levels = cells.level_starts[first : last + 1] - c0
            starts, rest = cells.row_starts[c0 : c1 + 1] - where.start, cells.rest[c0:c1]
            z = self.offset[where] + (X @ beta if K else 0.0)
            value += profile(
                z, self.measure[where], self.target[where], levels, starts, rest, a,
                mu[where], W[c0:c1], log_sums[first:last],
            )  # fmt: skip
            if K:
                WX = np.empty_like(X)
                add(X, mu[where], levels, starts, rest, first, WX, B_first, B_rest)
                H += X.T @ WX
                gradient += (mu[where] - self.target[where]) @ X
        return self._moments(value, gradient, H, B_first, B_rest, W, log_sums, mu)

    def _without_columns(self) -> Iterator[tuple[slice, Any]]:
        for first, last in pairwise(self.cuts):
            yield slice(first, last), None

    def _moments(
        self,
        value: float,
        gradient: Array,
        H: Array,
        B_first: Array,
        B_rest: Array,
        W: Array,
        log_sums: Array,
        mu: Array,
    ) -> Moments:
        with np.errstate(divide="ignore"):
            first = np.log(self.mass) - log_sums
        schur = Schur(self.cells, W, self.mass)
        within, B, first_columns = eliminated(schur, H, B_first, B_rest)
        return Moments(
            value, gradient, self.by_rest(W) - self.target_rest, np.diag(H).copy(), within, B, first_columns,
            schur, schur, first, mu, mu - self.target,
        )  # fmt: skip

    def _add_stored(self, mu: Array, H: Array, gradient: Array, B_first: Array, B_rest: Array) -> None:
        """Add up products of rows as they are stored."""
        first, rest = self.codes_by_row()
        add = kernels.add_scattered()
        for where, X in self.features.blocks(self.cuts):
            WX = np.empty_like(X)
            add(X, mu, where, first, rest, WX, B_first, B_rest)
            H += X.T @ WX
            gradient += (mu[where] - self.target[where]) @ X

    def codes_by_row(self) -> tuple[Index, Codes]:
        """Return the level of set 0, shape (n,), and those of the others, shape (n, S - 1), in sorted
        order.
        """
        cells = self.cells
        cell = np.repeat(np.arange(cells.n_cells), np.diff(cells.row_starts))
        bounds = cells.row_starts[cells.level_starts]
        first = np.repeat(np.arange(cells.n_first), np.diff(bounds))
        return first, cells.rest[cell]

    def level_of_row(self) -> Index:
        """Return the level of set 0 of each row, shape (n,)."""
        return self.codes_by_row()[0]

    def residual_rows(self, C_first: Array, C: Array) -> Iterator[tuple[Any, Array]]:
        """Yield rows less what the effects explain of them, ``X - D_0 C_0 - R C``, with their places: one
        read.
        """
        first, rest = self.codes_by_row()
        for where, block in self.features.blocks(self.cuts) if self.features.K else ():
            explained = C_first[first[where]]
            for s in range(rest.shape[1]):
                explained += C[rest[where, s]]
            yield where, block - explained

    def seen(self, d_beta: Array, d_a: Array, d_first: Array) -> float:
        """Return the largest change of a logit along a step as a share of its terms in the columns: two
        reads.
        """
        largest = max(
            (float((np.abs(block) @ np.abs(d_beta)).max()) for _, block in self.features.blocks(self.cuts)),
            default=0.0,
        )
        moved = float(np.abs(self.along(d_beta, d_a, d_first)).max(initial=0.0))
        return moved / largest if largest > 0.0 else 0.0

    def along(self, d_beta: Array, d_a: Array, d_first: Array) -> Array:
        """Return the change of each row's logit along a step, shape (n,): one read."""
        first, rest = self.codes_by_row()
        moved = d_first[first] + d_a[rest].sum(axis=1)
        if self.features.K and d_beta.any():
            for where, block in self.features.blocks(self.cuts):
                moved[where] += block @ d_beta
        return np.asarray(moved)

"""Rows that carry no information on the coefficients: found before the fit, and reported by name.

A level whose outcomes are all zero is fitted by an effect of minus infinity: its rows have output zero, and
leave. With two sets of effects the rule is exact (`separated_by_pair`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from scipy.sparse import csgraph

from attnfit.effects.levels import Codes, Index, LabelSet

Mask = NDArray[np.bool_]
Array = NDArray[np.float64]


def separated_by_pair(one: Codes, other: Codes, positive: Mask, n_levels: tuple[int, int]) -> Mask:
    """Return which rows with a target of zero are separated by the effects of two sets, shape (n,).

    Parameters
    ----------
    one, other : ndarray of int, shape (n,)
        Levels of the rows in the two sets.
    positive : ndarray of bool, shape (n,)
        The rows whose target is positive.
    n_levels : tuple of int

    Notes
    -----
    A direction along which the likelihood rises for ever leaves rows with positive targets alone: on a
    component k of the graph that these rows make between the levels, it is a constant ``c_k`` on the levels
    of the first set and ``-c_k`` on those of the second. A row with target zero changes by ``c_k - c_l``, k
    and l being the components of its two levels. That can be negative, and nowhere positive, if and only if
    no chain of such rows leads back from l to k: if k and l are in different strongly connected components of
    the directed graph with an arc from k to l for each such row. Linear time. Of a regression with these
    effects alone the rule is exact; of the general case see Correia, Guimaraes and Zylkin, "Verifying the
    existence of maximum likelihood estimates for generalized linear models" (2019), arXiv:1903.01633.

    Examples
    --------
    >>> import numpy as np
    >>> origin, destination = np.array([0, 0, 1, 1]), np.array([0, 1, 0, 1])
    >>> separated_by_pair(origin, destination, np.array([True, False, False, True]), (2, 2))
    array([False, False, False, False])
    >>> separated_by_pair(origin[:3], destination[:3], np.array([True, False, True]), (2, 2))
    array([False,  True, False])
    """
    first, second = n_levels
    n = first + second
    ends = one[positive], other[positive] + first
    graph = sparse.coo_array((np.ones(len(ends[0]), dtype=np.int8), ends), shape=(n, n))
    n_components, component = csgraph.connected_components(graph, directed=False)
    zero = np.flatnonzero(~positive)
    tail, head = component[one[zero]], component[other[zero] + first]
    arcs = sparse.coo_array((np.ones(len(zero), dtype=np.int8), (tail, head)), shape=(n_components,) * 2)
    strong = csgraph.connected_components(arcs, directed=True, connection="strong")[1]
    found = np.zeros(len(one), dtype=bool)
    found[zero] = strong[tail] != strong[head]
    return found


def connected(one: Codes, other: Codes, n_levels: tuple[int, int]) -> tuple[int, Index]:
    """Return the number of components of the graph between the levels of two sets, and that of each level, of
    the first set and then of the second; levels without rows are components of their own.
    """
    n = sum(n_levels)
    ends = one, other + n_levels[0]
    graph = sparse.coo_array((np.ones(len(one), dtype=np.int8), ends), shape=(n, n))
    n_components, component = csgraph.connected_components(graph, directed=False)
    return int(n_components), component.astype(np.intp)


@dataclass(frozen=True)
class Dropped:
    """What the fit leaves out; `report` is for users.

    Attributes
    ----------
    zero_weight : ndarray of int
        Rows of weight zero, by number of the user's row.
    all_zero : list of ndarray of int
        Levels of each set all of whose outcomes are zero.
    in_zero_levels : ndarray of int
        Their rows.
    separated : ndarray of int
        Other rows whose output goes to zero.
    singletons : ndarray of int
        Rows that are the only one of a level, where these are dropped.
    n_singletons : list of int
        Levels of each set with a single row among those that are kept.
    """

    zero_weight: Index
    all_zero: list[Index]
    in_zero_levels: Index
    separated: Index
    singletons: Index
    n_singletons: list[int] = field(default_factory=list)

    def report(self, sets: list[LabelSet]) -> dict[str, Any]:
        """Return what was left out by name: see `attnfit.solvers.Result`."""
        levels = {
            s.name: s.labels[levels] for s, levels in zip(sets, self.all_zero, strict=True) if len(levels)
        }
        return {
            "zero weight": len(self.zero_weight),
            "all-zero level": levels,
            "separated": self.separated,
            "singletons": {s.name: n for s, n in zip(sets, self.n_singletons, strict=True) if n},
            "singleton rows": self.singletons,
        }

    @property
    def n_rows(self) -> int:
        """Number of rows left out."""
        parts = (self.zero_weight, self.in_zero_levels, self.separated, self.singletons)
        return sum(len(rows) for rows in parts)

    @property
    def n_without_weight(self) -> int:
        """Number of rows that were left out although they have a weight."""
        return self.n_rows - len(self.zero_weight)

    def sentence(self, sets: list[LabelSet]) -> str:
        """Return what was left out in a clause, empty if nothing was."""
        told = []
        for s, levels in zip(sets, self.all_zero, strict=True):
            if len(levels):
                told.append(
                    f"{len(levels):,} level{'s' if len(levels) > 1 else ''} of {s.name} without outcomes"
                )
        if len(self.separated):
            told.append(f"{_rows(len(self.separated))} separated")
        if len(self.zero_weight):
            told.append(f"{_rows(len(self.zero_weight))} of weight zero")
        if len(self.singletons):
            told.append(f"{_rows(len(self.singletons))} alone in a level")
        return f"{_rows(self.n_rows)} left out ({', '.join(told)}): result.dropped" if told else ""


def _rows(n: int) -> str:
    return f"{n:,} row{'s' if n > 1 else ''}"


def leave_out(
    sets: list[LabelSet],
    target: Array,
    present: Mask,
    *,
    separable: bool,
    drop_singletons: bool,
    separated: Mask | None = None,
) -> tuple[Mask, Dropped]:
    """Return which rows the fit keeps, shape (n,), and what becomes of the others.

    Parameters
    ----------
    sets : list of LabelSet
    target : ndarray, shape (n,)
        Targets times weights.
    present : ndarray of bool, shape (n,)
        The rows with a positive weight.
    separable : bool
        Whether outputs can go to zero at no loss: the losses of likelihoods.
    drop_singletons : bool
        Leave out levels with one row, again and again, as some programs do: coefficients are the same.
    separated : ndarray of bool, shape (n,), optional
        Rows known to be separated already.
    """
    n = len(target)
    kept, in_zero, apart = present.copy(), np.zeros(n, dtype=bool), np.zeros(n, dtype=bool)
    alone, positive = np.zeros(n, dtype=bool), target > 0.0
    all_zero = [np.zeros(s.n_levels, dtype=bool) for s in sets]
    if separated is not None:
        apart |= separated & kept
        kept &= ~separated
    changed = True
    while changed:
        before = int(kept.sum())
        if separable:
            _leave_out_zero_levels(sets, target, kept, in_zero, all_zero)
            for k in range(len(sets)):
                for j in range(k):
                    rows = np.flatnonzero(kept)
                    one, other = sets[j], sets[k]
                    found = separated_by_pair(
                        one.codes[rows], other.codes[rows], positive[rows], (one.n_levels, other.n_levels)
                    )
                    apart[rows[found]], kept[rows[found]] = True, False
        if drop_singletons:
            for s in sets:
                single = np.bincount(s.codes[kept], minlength=s.n_levels) == 1
                rows = kept & single[s.codes]
                alone |= rows
                kept &= ~rows
        # One pass is enough for two sets: the rule is exact.
        changed = int(kept.sum()) < before and (drop_singletons or len(sets) != 2)
    n_singletons = [int(np.count_nonzero(np.bincount(s.codes[kept]) == 1)) for s in sets]
    rows_of = np.flatnonzero
    dropped = Dropped(
        rows_of(~present), [rows_of(z) for z in all_zero], rows_of(in_zero), rows_of(apart), rows_of(alone),
        n_singletons,
    )  # fmt: skip
    return kept, dropped


def _leave_out_zero_levels(
    sets: list[LabelSet], target: Array, kept: Mask, in_zero: Mask, all_zero: list[Mask]
) -> None:
    """Take out levels whose outcomes are all zero, until every set has none."""
    changed = True
    while changed:
        changed = False
        for k, s in enumerate(sets):
            size = np.bincount(s.codes[kept], minlength=s.n_levels)
            mass = np.bincount(s.codes[kept], weights=target[kept], minlength=s.n_levels)
            empty = (size > 0) & (mass == 0.0)
            if empty.any():
                all_zero[k] |= empty
                rows = kept & empty[s.codes]
                in_zero |= rows
                kept &= ~rows
                changed = True


def redundant(sets: list[Codes], n_levels: list[int]) -> int:
    """Return how many of all levels the others imply: exactly for two sets, at least for more.

    For two sets that is the number of components of the graph between them. Of each further set it is the
    largest number of components with an earlier one.
    """
    total = 0
    for k in range(1, len(sets)):
        total += max(connected(sets[j], sets[k], (n_levels[j], n_levels[k]))[0] for j in range(k))
    return total

"""The effects that a fit leaves behind: values of levels, and which of them can be compared."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from attnfit.effects.levels import Index, encode
from attnfit.effects.newton import Point
from attnfit.effects.prepared import Prepared
from attnfit.effects.schur import Schur, Unconditioned, conjugate_gradients

Array = NDArray[np.float64]
# Labels that a warning names.
NAMED = 3


@dataclass(frozen=True)
class EffectSet:
    """The effects of one set.

    Attributes
    ----------
    name : str
    labels : ndarray, shape (L,)
        Sorted; of a set of pairs, tuples.
    values : ndarray, shape (L,)
        -inf for levels whose outcomes are all zero, NaN where nothing is known.
    component : ndarray of int, shape (L,)
        Levels of different components cannot be compared; -1 for levels that the fit left out.
    identified : ndarray of bool, shape (L,)
        Whether the level took part in the fit.
    """

    name: str
    labels: NDArray[Any]
    values: Array
    component: Index
    identified: NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.labels)

    def contrast(self, one: Any, other: Any) -> float:
        """Return the effect of one level less that of another; NaN where the data do not tell it.

        Raises
        ------
        KeyError
            For a label that the fit has not seen.
        """
        place = []
        for label in (one, other):
            one_row = [(part,) for part in label] if isinstance(label, tuple) else [label]
            k = int(encode(self.labels, one_row, self.name)[0])
            if k < 0:
                raise KeyError(f"{label!r} is no label of {self.name}")
            place.append(k)
        i, j = place
        if self.component[i] < 0 or self.component[i] != self.component[j]:
            return float("nan")
        return float(self.values[i] - self.values[j])


class Effects(Sequence[EffectSet]):
    """The effects of all sets, in the order in which they were passed.

    Parameters
    ----------
    sets : list of EffectSet
    n_components : int
        Number of components of the graph in which levels are joined by rows.
    rank : int
        Number of parameters that the effects take up; with three sets and more an upper bound.
    zero_pairs : frozenset of (int, int)
        Components of two sets between which rows are separated: outputs are zero there.
    """

    def __init__(
        self,
        sets: list[EffectSet],
        n_components: int,
        rank: int,
        zero_pairs: frozenset[tuple[int, int]] = frozenset(),
    ) -> None:
        self.sets, self.n_components, self.rank, self.zero_pairs = sets, n_components, rank, zero_pairs

    @overload
    def __getitem__(self, index: int) -> EffectSet: ...

    @overload
    def __getitem__(self, index: slice) -> list[EffectSet]: ...

    def __getitem__(self, index: Any) -> Any:
        return self.sets[index]

    def __len__(self) -> int:
        return len(self.sets)

    def __iter__(self) -> Iterator[EffectSet]:
        return iter(self.sets)

    def __repr__(self) -> str:
        told = ", ".join(f"{s.name}: {len(s):,} levels" for s in self.sets)
        return f"Effects({told}; {self.n_components:,} component{'s' if self.n_components != 1 else ''})"

    def sum_of(self, labels: Sequence[Any], *, quiet: bool = False) -> Array:
        """Return the sum of the effects of each row's levels, shape (n,).

        Parameters
        ----------
        labels : list of array_like, shape (n,)
            Labels of the rows in each set.
        quiet : bool
            Do not warn of labels that the fit has not seen.

        Notes
        -----
        NaN for rows with a label that the fit has not seen, and, of two sets, for rows whose levels are of
        different components; -inf where an output is zero.
        """
        total: Any = 0.0
        components = []
        for s, values in zip(self.sets, labels, strict=True):
            codes = encode(s.labels, values, s.name)
            unseen = codes < 0
            if unseen.any() and not quiet:
                warnings.warn(_unseen(s.name, values, unseen), UserWarning, stacklevel=4)
            total = total + np.where(unseen, np.nan, s.values[codes])
            components.append(np.where(unseen, -1, s.component[codes]))
        found = np.asarray(total)
        if len(components) == 2 and self.n_components > 1:
            one, other = components
            apart = (one >= 0) & (other >= 0) & (one != other)
            zero = np.zeros(len(found), dtype=bool)
            if self.zero_pairs and apart.any():
                rows = np.flatnonzero(apart)
                pairs = zip(one[rows].tolist(), other[rows].tolist(), strict=True)
                zero[rows] = [pair in self.zero_pairs for pair in pairs]
            found = np.where(zero, -np.inf, np.where(apart, np.nan, found))
        return found


def _unseen(name: str, values: Any, unseen: NDArray[np.bool_]) -> str:
    columns = values if isinstance(values, tuple) else (values,)
    rows = np.flatnonzero(unseen)
    labels = list(
        dict.fromkeys(", ".join(str(np.asarray(column)[row]) for column in columns) for row in rows[:1000])
    )
    shown = ", ".join(labels[:NAMED])
    return (
        f"{name} has {len(rows):,} row{'s' if len(rows) > 1 else ''} with labels that the fit has not seen "
        f"({shown}{', ...' if len(labels) > NAMED else ''}): their predictions are NaN"
    )


def effects_at(prepared: Prepared, point: Point) -> Effects:
    """Return the effects at a point of a fit, normalised.

    Of two sets the mean of the second, weighted by its curvature, is zero in each component, and the first,
    which has the most levels or is that of the groups, takes the level; of three and more those of all sets
    but the first have the least norm.
    """
    data, rows, cells = prepared.data, prepared.rows, prepared.rows.cells
    a, first = point.a.copy(), point.moments.first.copy()
    n_components, component = prepared.components()
    schur = point.moments.curvature
    if len(prepared.order) == 2:
        ours, weight = component[1], schur.mass
        mass = np.bincount(ours, weights=weight, minlength=n_components)
        mean = np.bincount(ours, weights=weight * a, minlength=n_components) / np.where(mass > 0.0, mass, 1.0)
        a -= mean[ours]
        first += mean[component[0]]
    elif len(prepared.order) > 2:
        shorter = least_norm(schur, a)
        first += schur.average((a - shorter)[:, None])[:, 0]
        a = shorter
    # Columns were centred for the fit: what that took away belongs to the first set.
    first -= float(np.sum(rows.features.centre * prepared.user(point.beta)))
    pieces = [first, *np.split(a, cells.offsets[1:-1])] if len(prepared.order) > 1 else [first]
    found = []
    for k, s in enumerate(data.sets):
        values, inside = np.full(s.n_levels, np.nan), np.zeros(s.n_levels, dtype=bool)
        of_level = np.full(s.n_levels, -1, dtype=np.intp)
        if k in prepared.order:
            i = prepared.order.index(k)
            levels = prepared.levels[i]
            values[levels], inside[levels], of_level[levels] = pieces[i], True, component[i]
        else:
            only = s.codes[prepared.kept][0]
            values[only], inside[only], of_level[only] = 0.0, True, component[0][0]
        values[prepared.dropped.all_zero[k]] = -np.inf
        found.append(EffectSet(s.name, s.labels, values, of_level, inside))
    ours_only = found[1:] if data.grouped else found
    return Effects(ours_only, n_components, prepared.rank(), _zero_pairs(prepared, ours_only))


def _zero_pairs(prepared: Prepared, sets: list[EffectSet]) -> frozenset[tuple[int, int]]:
    """Return the components between which rows are separated."""
    rows = prepared.dropped.separated
    if len(sets) != 2 or not len(rows):
        return frozenset()
    codes = [s.codes[rows] for s in prepared.data.sets[-2:]]
    one, other = (s.component[c].tolist() for s, c in zip(sets, codes, strict=True))
    return frozenset(pair for pair in zip(one, other, strict=True) if pair[0] != pair[1])


def least_norm(schur: Schur, a: Array) -> Array:
    """Return the effects of least norm among those with the same fit: ``A_1^+ A_1 a`` with unit weights."""
    cells = schur.cells
    unit = Schur(cells, np.ones(cells.n_cells), np.diff(cells.level_starts).astype(np.float64))
    right = unit.product(a[:, None])
    # Conjugate gradients from zero stay in the range of the matrix: their limit has the least norm.
    floor = np.full(1, 1e-26 * max(float(np.sum(right**2)), np.finfo(float).tiny))
    return conjugate_gradients(unit, Unconditioned(), right, None, 1e-13, floor).x[:, 0]


def fitted_rows(prepared: Prepared, mu: Array) -> Array:
    """Return the outputs of all rows in the user's order, shape (n,): zero for rows that are separated, NaN
    for those of weight zero.
    """
    rows, dropped = prepared.rows, prepared.dropped
    out = np.full(prepared.data.n_rows, np.nan)
    out[dropped.in_zero_levels], out[dropped.separated] = 0.0, 0.0
    scale: Any = 1.0 if prepared.data.squared else rows.measure
    if prepared.data.grouped and not prepared.data.squared:
        bounds = rows.cells.row_starts[rows.cells.level_starts]
        scale = np.repeat(rows.mass, np.diff(bounds))
    out[rows.features.places] = mu / scale
    return out

"""Which rows are one draw of the sample: labels of clusters as numbers of units."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import narwhals as nw
import numpy as np

from attnfit.data.inputs import is_dask, unlabelled
from attnfit.objectives.part import Part, PerPart
from attnfit.segments import Chunk, Index


@dataclass(frozen=True)
class Labels:
    """Numbers of units of each row of the design, in the user's order, and how many units there are."""

    numbers: tuple[Index, ...]
    n_units: tuple[int, ...]


def read_clusters(clusters: Any, n: int) -> list[Index]:
    """Return the numbers of units of one set of labels, or of two, each of shape (n,).

    Raises
    ------
    ValueError
        If there is not one label a row, a label is missing, or there are three sets.
    """
    sets = [_one(values, n) for values in _columns(clusters, n)]
    if len(sets) > 2:
        raise ValueError(
            f"clusters has {len(sets)} columns; one or two sets of labels are supported: combine some of "
            "them to one label a row"
        )
    return sets


def _columns(clusters: Any, n: int) -> list[Any]:
    if is_dask(clusters):
        clusters = clusters.compute()
    if nw.dependencies.is_into_dataframe(clusters):
        return list(nw.from_native(clusters, eager_only=True).iter_columns())
    if isinstance(clusters, tuple | list) and len(clusters) <= 3 and np.ndim(clusters[0]) == 1:
        return list(clusters)
    array = np.asarray(clusters)
    return list(array.T) if array.ndim == 2 else [array]


def _one(values: Any, n: int) -> Index:
    if is_dask(values):
        values = values.compute()
    array = np.asarray(values.to_numpy() if hasattr(values, "to_numpy") else values).reshape(-1)
    if array.shape != (n,):
        raise ValueError(f"clusters has {len(array)} labels but X has {n} rows; pass one label a row")
    missing = unlabelled(array)
    if missing:
        raise ValueError(
            f"clusters has no label at index {missing[0]}; give every row a label or drop the row"
        )
    try:
        return np.asarray(np.unique(array, return_inverse=True)[1], dtype=np.intp)
    except TypeError:
        # Labels of several types have no order.
        known: dict[Any, int] = {}
        return np.array([known.setdefault(label, len(known)) for label in array], dtype=np.intp)


def pairs(one: Index, other: Index) -> Index:
    """Return the number of each row's pair of labels."""
    both = one * (int(other.max()) + 1) + other
    return np.asarray(np.unique(both, return_inverse=True)[1], dtype=np.intp)


def with_outside_goods(numbers: Index, groups: Any, n_outside: int) -> Index:
    """Append the units of the outside goods: a group's own where all its rows are of one unit, else one that
    they share.
    """
    if not n_outside:
        return numbers
    n, shared = len(numbers), int(numbers.max()) + 1
    sizes = np.diff(groups.starts, append=n + n_outside)
    of_row = groups.unsort(np.repeat(np.arange(n_outside), sizes))[:n]
    first, last = np.full(n_outside, np.iinfo(np.intp).max), np.full(n_outside, -1)
    np.minimum.at(first, of_row, numbers)
    np.maximum.at(last, of_row, numbers)
    return np.concatenate([numbers, np.where(first == last, first, shared)])


def labels_of(numbers: list[Index]) -> Labels:
    """Return the labels that a covariance needs: of two sets also the pairs."""
    sets = numbers if len(numbers) == 1 else [*numbers, pairs(*numbers)]
    return Labels(tuple(sets), tuple(int(of_row.max()) + 1 for of_row in sets))


def per_part(problem: Any, values: tuple[Index, ...]) -> Any:
    """Return values of rows as the work on each part of the data needs them."""
    if problem.rows.is_whole or not values:
        return values
    sizes = problem.rows.collect(_n_rows)
    cuts = np.cumsum(sizes)[:-1]
    return PerPart(zip(*(np.split(of_row, cuts) for of_row in values), strict=True))


def _n_rows(part: Part, chunks: list[Chunk]) -> int:
    return part.n_rows

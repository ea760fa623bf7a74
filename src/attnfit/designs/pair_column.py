"""Targets of attention maps on disk, one number a pair, read by blocks of queries."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from attnfit.designs.base import Array, Rows
from attnfit.designs.column import Column
from attnfit.designs.kronecker import KroneckerDesign
from attnfit.designs.read_ahead import Recent


class PairColumn(Column):
    """One number a pair of a query and a key, from matrices (n1, n2) of which some are on disk.

    Indexing takes slices that begin and end between queries.

    Parameters
    ----------
    design : KroneckerDesign
        Tells which pairs there are.
    matrices : list of ndarray or Source, shapes (n1, n2)
        One a sequence.
    function : callable, optional
        Applied to what is read.
    """

    def __init__(
        self,
        design: KroneckerDesign,
        matrices: list[Any],
        function: Callable[[Array], Array] | None = None,
    ) -> None:
        self._design, self._matrices, self._function = design, matrices, function
        self.shape = (int(design.shape[0]),)
        self.recent = Recent()

    @property
    def stored_dtype(self) -> np.dtype[Any]:
        return np.result_type(*[matrix.dtype for matrix in self._matrices])

    def spans(self) -> Iterator[slice]:
        starts = self._design.starts
        for first, last in self._design.query_ranges():
            yield slice(int(starts[first]), int(starts[last]))

    def mapped(self, function: Callable[[Array], Array]) -> Column:
        inner = self._function
        return PairColumn(
            self._design, self._matrices, function if inner is None else lambda v: function(inner(v))
        )

    def __getitem__(self, rows: Rows) -> Array:
        assert isinstance(rows, slice)
        start, stop, _ = rows.indices(len(self))
        known = self.recent.find(slice(start, stop))
        return self._read(start, stop) if known is None else known[1][start - known[0] : stop - known[0]]

    def load(self, rows: slice) -> None:
        if not self.recent.renew(rows):
            self.recent.make_room()
            self.recent.keep(rows.start, rows.stop, self._read(rows.start, rows.stop))

    def _read(self, start: int, stop: int) -> Array:
        design, parts = self._design, []
        for s, block in enumerate(design.sequences):
            first, last = design.starts[design.first_query[[s, s + 1]]]
            if last <= start or first >= stop:
                continue
            _, queries = design.find_queries(slice(max(start, int(first)), min(stop, int(last))))
            matrix = self._matrices[s]
            found = (
                matrix[queries]
                if isinstance(matrix, np.ndarray)
                else matrix.read(queries.start, queries.stop)
            )
            parts.append(found.reshape(-1) if block.mask is None else found[block.mask[queries]])
        return self._numbers(parts[0] if len(parts) == 1 else np.concatenate(parts))

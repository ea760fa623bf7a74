"""Read what a head is fitted to: several heads of one group, a column for the sink, and how maps were
rounded.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from attnfit.data.inputs import from_tensor
from attnfit.segments import Array


class Precision(NamedTuple):
    """How maps were rounded: relatively, and absolutely below the smallest normal number."""

    relative: float
    absolute: float

    def of_sum(self, n: Any) -> Any:
        """Return by how much the sum of n rounded shares may differ from one."""
        return self.relative + n * self.absolute


def precision_of(maps: Any) -> Precision:
    """Return how maps were rounded, by the narrowest format that holds all their entries.

    Half precision has 11 bits and steps of 2^-24 below its smallest normal number (IEEE 754), bfloat16 has 8
    bits: single precision with the last 16 of its bits zero.
    """
    entries = [np.asarray(from_tensor(m)) for m in (maps if isinstance(maps, list | tuple) else [maps])]
    with np.errstate(over="ignore", under="ignore"):
        single = [m.astype(np.float32) for m in entries]
        if any((s != m).any() for s, m in zip(single, entries, strict=True)):
            return Precision(2.0**-53, 0.0)
        if all(not (s.view(np.uint32) & 0xFFFF).any() for s in single):
            return Precision(2.0**-8, 0.0)
        if all((s.astype(np.float16) == s).all() for s in single):
            return Precision(2.0**-11, 2.0**-25)
    return Precision(2.0**-24, 0.0)


@dataclass(frozen=True)
class HeadMaps:
    """Maps of all heads of a group, head by head and text by text.

    Attributes
    ----------
    maps : list of ndarray, shape (n1, n2)
        None where there are none.
    n_heads, n_texts : int
    """

    maps: list[Any] | None
    n_heads: int
    n_texts: int

    def repeat(self, values: Any) -> Any:
        """Return one entry a map, given one a text; None and words serve all."""
        if values is None or isinstance(values, str):
            return values
        entries = list(values) if self.n_texts > 1 else [values]
        if self.n_texts > 1 and len(entries) != self.n_texts:
            raise ValueError(f"there are {self.n_texts} texts but {len(entries)} entries; pass one a text")
        every = entries * self.n_heads
        return every[0] if len(every) == 1 else every


def read_head_maps(B: Any, n_texts: int, n_heads: int = 1) -> HeadMaps:
    """Return maps of one head, (n1, n2), or of several that share their keys, (heads, n1, n2), by text.

    Raises
    ------
    ValueError
        If texts have different numbers of heads, or there are not as many as texts.
    """
    if B is None:
        return HeadMaps(None, n_heads, n_texts)
    several = isinstance(B, list | tuple)
    entries = [from_tensor(m) for m in (B if several else [B])]
    entries = [m if hasattr(m, "ndim") else np.asarray(m) for m in entries]
    if len(entries) != n_texts:
        raise ValueError(f"B has {len(entries)} sequences but A1 has {n_texts}; pass one entry a sequence")
    heads = {m.shape[0] if m.ndim == 3 else 1 for m in entries}
    if len(heads) > 1:
        raise ValueError(f"B has {sorted(heads)} heads in different sequences; pass the same heads of all")
    n = heads.pop()
    maps = [m[k] if m.ndim == 3 else m for k in range(n) for m in entries]
    return HeadMaps(maps, n, n_texts)


class WithSink(NamedTuple):
    """Maps with a column for what went to the sink, and the weights of this column."""

    maps: NDArray[Any]
    weights: Array


def with_sink(
    B: NDArray[Any] | None, mask: NDArray[np.bool_] | None, weights: Any, n: tuple[int, int], p: Precision
) -> WithSink:
    """Return a map with the column ``1 - sum_s b_ts``, and weights of all its cells, shape (n1, n2 + 1).

    The column is a difference: it counts as far as it exceeds its rounding. Rows of zeros are padding.
    """
    given = np.ones(n) if weights is None else np.broadcast_to(_as_cells(weights), n)
    if B is None:
        return WithSink(np.zeros((n[0], n[1] + 1)), np.column_stack([given, np.ones(n[0])]))
    seen = np.asarray(B, dtype=np.float64) if mask is None else np.where(mask, B, 0.0).astype(np.float64)
    count = np.count_nonzero(seen, axis=1)
    null = np.maximum(1.0 - seen.sum(axis=1), 0.0)
    trust = np.minimum(null / (2.0 * p.of_sum(count)), 1.0) ** 2 * given.max(axis=1)
    padding = count == 0
    cells = np.column_stack([given, trust])
    cells[padding] = 0.0
    return WithSink(np.column_stack([seen, np.where(padding, 0.0, null)]), cells)


def _as_cells(weights: Any) -> Array:
    array = np.asarray(weights, dtype=np.float64)
    return array[:, None] if array.ndim == 1 else array

"""Queries, keys, values and outputs of the texts of a `FullAttention` problem."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attnfit.designs.kronecker import BLOCK_PAIRS, KroneckerDesign
from attnfit.problems.inputs import as_vector
from attnfit.problems.maps.pairs import per_sequence, read_factor, read_pairs

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Text:
    """One text: every query attends to its keys only.

    Attributes
    ----------
    A1, A2, A3, B : ndarray, shapes (n, d1), (k, d2), (k, v) and (n, m)
    mask : ndarray of bool, shape (n, k), or None
    offset : ndarray, shape (n, k), or None
    first : int
        The number of its first query among those of all texts.
    """

    A1: Array
    A2: Array
    A3: Array
    B: Array
    mask: NDArray[np.bool_] | None
    offset: Array | None
    first: int

    def logits(self, X: Array, rows: slice) -> Array:
        """Return the logits of some queries, shape (..., rows, k), for X of shape (..., d1, d2): minus
        infinity behind the mask.
        """
        z = (self.A1[rows] @ X) @ self.A2.T
        if self.offset is not None:
            z += self.offset[rows]
        if self.mask is not None:
            z[..., ~self.mask[rows]] = -np.inf
        return np.asarray(z)


@dataclass(frozen=True)
class Maps:
    """The maps of all heads for a block of queries of a text.

    Attributes
    ----------
    text : Text
    own, rows : slice
        The queries, numbered within the text and among all.
    P : ndarray, shape (heads, rows, k)
    """

    text: Text
    own: slice
    rows: slice
    P: Array

    @property
    def A1(self) -> Array:
        """Its queries."""
        return self.text.A1[self.own]

    def values(self, P: Array) -> Array:
        """Return ``[P_1 A3 ... P_H A3]``, shape (rows, heads v), of maps or of changes of them."""
        return np.concatenate(list(P @ self.text.A3), axis=1)


def softmax(z: Array) -> Array:
    """Return the softmax over the last axis of z, which is overwritten."""
    z -= z.max(axis=-1, keepdims=True)
    np.exp(z, out=z)
    z /= z.sum(axis=-1, keepdims=True)
    return z


def read_texts(
    A1: Any, A2: Any, A3: Any, B: Any, mask: Any, weights: Any, offset: Any
) -> tuple[KroneckerDesign, list[Text], Array]:
    """Return queries and keys as a design, the texts, and the weights of all queries.

    Raises
    ------
    ValueError
        If anything is not finite or of the wrong shape; the message names the argument and the text.
    """
    design = read_pairs(A1, A2, None, mask, None, offset, None, 0.0).design
    count = len(design.sequences)
    values = _factors(A3, "A3", [len(block.keys) for block in design.sequences], "A2")
    outputs = _factors(B, "B", [len(block.queries) for block in design.sequences], "A1")
    offsets = [None] * count if offset is None else per_sequence(offset, count, "offset")
    texts, first = [], 0
    for block, own, output, added in zip(design.sequences, values, outputs, offsets, strict=True):
        shift = None if added is None else np.asarray(added, dtype=np.float64)
        texts.append(Text(block.queries, block.keys, own, output, block.mask, shift, first))
        first += len(block.queries)
    return design, texts, _weights(weights, texts, first)


def text_maps(texts: list[Text], X: Array) -> Iterator[Maps]:
    """Yield the maps for X, shape (heads, d1, d2), by blocks of queries."""
    for text in texts:
        step = max(8, BLOCK_PAIRS // (len(text.A2) * len(X)))
        for begin in range(0, len(text.A1), step):
            own = slice(begin, min(begin + step, len(text.A1)))
            rows = slice(text.first + own.start, text.first + own.stop)
            yield Maps(text, own, rows, softmax(text.logits(X, own)))


def _factors(matrices: Any, name: str, expected: list[int], other: str) -> list[Array]:
    """Return one matrix a text, with as many rows as expected and one number of columns."""
    several = len(expected) > 1
    entries = per_sequence(matrices, len(expected), name)
    labels = [f"[{s}]" if several else "" for s in range(len(entries))]
    read = [read_factor(entry, name + label) for entry, label in zip(entries, labels, strict=True)]
    for matrix, rows, label in zip(read, expected, labels, strict=True):
        if len(matrix) != rows:
            raise ValueError(
                f"{name}{label} has {len(matrix)} rows but {other}{label} has {rows}; they must agree"
            )
        if matrix.shape[1] != read[0].shape[1]:
            raise ValueError(
                f"{name}{label} has {matrix.shape[1]} columns but {name}[0] has {read[0].shape[1]}; all "
                "texts share one X and one Y"
            )
    return read


def _weights(weights: Any, texts: list[Text], n: int) -> Array:
    """Return one weight a query of all texts."""
    if weights is None:
        return np.ones(n)
    if len(texts) == 1:
        return as_vector(weights, n, "weights", non_negative=True, rows_of="A1")
    if not isinstance(weights, list | tuple) or len(weights) != len(texts):
        raise ValueError(f"weights must be a list of {len(texts)} vectors, one a text")
    pairs = enumerate(zip(weights, texts, strict=True))
    return np.concatenate(
        [
            as_vector(w, len(text.A1), f"weights[{s}]", non_negative=True, rows_of=f"A1[{s}]")
            for s, (w, text) in pairs
        ]
    )

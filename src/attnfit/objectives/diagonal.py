"""The Hessian as a Gram of rows with one weight each, and an exact rest of low rank: what row sampling with a
guarantee works on.

    H = sum_i D_i c_i c_i^T + low rank + ridge,

with ``c_i = a_i`` (elementwise and rescaled losses, two layers) or ``c_i = a_i - mu_g`` (losses of softmax).
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from attnfit.objectives.objective import Evaluation, Offer
from attnfit.segments import Array

Rows = NDArray[np.intp]


class Split(Protocol):
    """A Hessian at a point, split.

    Attributes
    ----------
    weights : ndarray, shape (n,)
        D, row penalties included, in the order of the rows as they are stored.
    penalties : ndarray, shape (n,)
        What of D the row penalties are.
    low_rank, ridge : ndarray, shape (d, d)
    centred : bool
        Whether rows are centred at a mean that moves with x.
    """

    weights: Array
    penalties: Array
    low_rank: Array
    ridge: Array
    centred: bool

    def gram(self, weights: Array, kept: Rows | None = None) -> Array:
        """Return ``sum_i weights_i c_i c_i^T`` over all rows, or those kept, shape (d, d)."""
        ...

    def squares(self, root: Array) -> Array:
        """Return ``|root^T c_i|^2`` of each row, shape (n,)."""
        ...

    def users_row(self, row: int) -> int:
        """Return the number by which the user knows a row."""
        ...


def has_split(problem: Any) -> bool:
    """Return whether a problem's Hessian is split here."""
    if Offer.LAYER_ROWS in problem.offers:
        return True
    rows = problem.rows
    return rows is not None and problem.rows_can_be_drawn and rows.is_whole


def split_hessian(problem: Any, at: Evaluation) -> Split:
    """Return the Hessian at an evaluated point, split: one pass over the data."""
    return LayerSplit(problem, at) if Offer.LAYER_ROWS in problem.offers else RowSplit(problem, at)


class LayerSplit:
    """That of two layers: ``D = a + row_penalty^2``, and a part of rank m + 2."""

    centred = False

    def __init__(self, problem: Any, at: Evaluation) -> None:
        self._problem = problem
        none = np.zeros(0, dtype=np.intp)
        self.weights = problem.diagonal_weights(problem.layers_of(at))
        none_given = problem.penalty is None
        self.penalties = np.zeros(len(self.weights)) if none_given else problem.penalty[:, 0]
        self.ridge = problem.ridge * np.eye(len(at.x))
        self.low_rank = problem.sampled_hessian(at, none, np.zeros(0)) - self.ridge

    def gram(self, weights: Array, kept: Rows | None = None) -> Array:
        """Return ``A1^T diag(weights) A1``, of all rows or those kept."""
        return np.asarray(self._problem.weighted_gram(weights, kept))

    def squares(self, root: Array) -> Array:
        """Return ``|root^T a_i|^2``."""
        return np.asarray(np.sum(self._problem.logit_map.forward(None, root) ** 2, axis=1))

    def users_row(self, row: int) -> int:
        """Return the number of a row of A1."""
        return row


class RowSplit:
    """That of a loss of rows, from the terms ``t (r a - q mu)(r a - q mu)^T`` of its Hessian.

    ``t (r a - q mu)(.)^T`` adds ``t r^2`` to D and ``-e mu^T - mu e^T + Q mu mu^T`` to the low-rank part,
    with ``e = sum t r q a`` and ``Q = sum t q^2`` of the group. Where all rows are ``a - mu`` they are taken
    as they are, and it is the row penalties, of rows that are not centred, that leave such a part.
    """

    def __init__(self, problem: Any, at: Evaluation) -> None:
        rows, d = problem.rows, len(at.x)
        self._rows = rows
        self.weights, self.penalties = np.empty(rows.n_rows), np.zeros(rows.n_rows)
        self.low_rank, self.ridge = np.zeros((d, d)), np.eye(d) * problem.ridge
        self.centred = False
        self._centres = np.zeros((0, d))
        for chunk in rows.prefetch(rows.chunks):
            self._read(chunk, at)

    def _read(self, chunk: Any, at: Evaluation) -> None:
        rows = self._rows
        block, z = rows.logits(chunk, at.x)
        b, w, _ = rows.targets(chunk)
        terms, means = rows.loss.gram_terms(z, b, w, rows.row_state(chunk, z, at))
        self.centred = all(r is None and np.ndim(q) == 0 for _, r, q in terms if q is not None)
        self.centred = self.centred and any(q is not None for *_, q in terms)

        def sums(weights: Array) -> Array:
            found = rows.design.group_rows(block, weights, chunk.segments.starts)
            return np.asarray(found.toarray() if sparse.issparse(found) else found)

        mu = None
        if means is not None:
            mu = at.centre[[chunk.long]] if chunk.long >= 0 else sums(means)
        if self.centred:
            self._keep_centre(chunk, mu)
        D, plain = np.zeros(len(z)), np.zeros(len(z))
        for t, r, q in terms:
            own = t + 0.0 * z if r is None else t * r * r
            D += own
            if q is None:
                plain += own
            elif not self.centred:
                assert mu is not None
                across = t * q if r is None else t * r * q
                self._add(-1.0, sums(across + 0.0 * z), mu, chunk.segments.sum(t * q * q + 0.0 * z))
        penalty = rows.row_penalties(chunk)
        if penalty is not None:
            self.penalties[chunk.rows] = penalty
            D, plain = D + penalty, plain + penalty
        if self.centred and plain.any():
            assert mu is not None
            self._add(1.0, sums(plain), mu, chunk.segments.sum(plain))
        self.weights[chunk.rows] = D

    def _add(self, sign: float, e: Array, mu: Array, total: Array) -> None:
        """Add ``sign (e mu^T + mu e^T - total mu mu^T)`` of each group."""
        mixed = e.T @ mu
        self.low_rank += sign * (mixed + mixed.T - (mu.T * total) @ mu)

    def _keep_centre(self, chunk: Any, mu: Any) -> None:
        if not len(self._centres):
            self._centres = np.zeros((len(self._rows.groups), mu.shape[1]))
        self._centres[chunk.groups] = mu

    def _group_of(self, rows: Rows) -> Rows:
        return np.searchsorted(self._rows.groups.starts, rows, side="right") - 1

    def gram(self, weights: Array, kept: Rows | None = None) -> Array:
        """Return ``sum_i weights_i c_i c_i^T``; of rows that are kept only those are read."""
        if kept is None and not self.centred:
            total = self._rows.design.gram()
            for chunk in self._rows.prefetch(self._rows.chunks):
                total.add(self._rows.fetch(chunk), weights[chunk.rows])
            return np.asarray(total.result())
        out = np.zeros_like(self.low_rank)
        for chunk in self._rows.prefetch(self._rows.chunks):
            places = np.arange(chunk.rows.start, chunk.rows.stop)
            w = weights[chunk.rows] if kept is None else None
            if kept is None:
                block = self._rows.fetch(chunk)
            else:
                first, last = np.searchsorted(kept, (chunk.rows.start, chunk.rows.stop))
                if first == last:
                    continue
                places, w = kept[first:last], weights[first:last]
                index = chunk.index
                inside = places - chunk.rows.start
                block = self._rows.design.block(
                    inside + index.start if isinstance(index, slice) else index[inside]
                )
            self._add_gram(out, block, w, places)
        return out

    def _add_gram(self, out: Array, block: Any, w: Any, places: Rows) -> None:
        if not sparse.issparse(block):
            block = block - self._centres[self._group_of(places)] if self.centred else block
            out += block.T @ (w[:, None] * block)
            return
        weighted = sparse.csr_array(block.multiply(w[:, None]))
        out += (block.T @ weighted).toarray()
        if self.centred:
            group = self._group_of(places)
            numbers, inverse = np.unique(group, return_inverse=True)
            mu, one = self._centres[numbers], np.ones(len(places))
            members = sparse.csr_array(
                (one, (inverse, np.arange(len(places)))), shape=(len(numbers), len(places))
            )
            mixed = (members @ weighted).T @ mu
            out -= mixed + mixed.T - (mu.T * np.bincount(inverse, w, len(numbers))) @ mu

    def squares(self, root: Array) -> Array:
        """Return ``|root^T c_i|^2``, in one pass."""
        out = np.empty(self._rows.n_rows)
        centres = self._centres @ root if self.centred else None
        for chunk in self._rows.prefetch(self._rows.chunks):
            along = np.asarray(self._rows.fetch(chunk) @ root)
            if centres is not None:
                along = along - centres[self._group_of(np.arange(chunk.rows.start, chunk.rows.stop))]
            out[chunk.rows] = np.einsum("ij,ij->i", along, along)
        return out

    def users_row(self, row: int) -> int:
        """Return the row's number before rows were brought into group order."""
        order = self._rows.groups.order
        return row if order is None else int(order[row])

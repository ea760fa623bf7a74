"""The centred weighted Gram matrix, accumulated over dense or CSR blocks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from attnfit.data.kernels import centred_rows_loop, csr_gram_loop, csr_parts_loop, group_rows_loop

Array = NDArray[np.float64]
Index = NDArray[np.intp]

# What is made of a part of a block stays in cache; a compiled loop makes one array, numpy several.
PART_BYTES, COMPILED_BYTES = 1 << 18, 1 << 19
# Entries up to which making a sparse indicator of groups costs more than NumPy's slower sums; columns up to
# which a product that is not symmetric costs less than setting negative weights apart.
FEW, VERY_NARROW = 1 << 14, 8


def flatness(d: int) -> float:
    """Return the share of the largest eigenvalue below which one of a d x d Gram with unit diagonal is
    rounding: chosen on the random problems of the `verdicts` benchmark, and the error of LAPACK for large d.
    """
    return max(5e-15, 0.5 * d * float(np.finfo(np.float64).eps))


def transposed_view(block: Any) -> Any:
    """Return the transpose of a CSR array without the copy that scipy's own makes of a view."""
    view = sparse.csc_array((block.shape[1], block.shape[0]), dtype=block.dtype)
    view.data, view.indices, view.indptr = block.data, block.indices, block.indptr
    return view


def combine_rows(weights: Array, block: Any) -> Array:
    """Return ``weights @ block``: sums of rows, shape (d,) for weights (n_rows,), (k, d) for weights (k,
    n_rows).
    """
    if sparse.issparse(block):
        return np.asarray((transposed_view(block) @ weights.T).T)
    return np.asarray(weights @ block)


def squared_rows(block: Any) -> Any:
    """Return the squares of the entries of a CSR array."""
    block = without_duplicates(block)
    return sparse.csr_array((block.data * block.data, block.indices, block.indptr), shape=block.shape)


def group_rows(block: Any, weights: Array, starts: Index) -> Any:
    """Return ``sum_{i in g} weights_i a_i`` for each group, shape (n_groups, d): dense for dense blocks, else
    CSR.
    """
    dense, n = isinstance(block, np.ndarray), block.shape[0]
    if len(starts) == 1:
        if dense:
            return (weights @ block).reshape(1, -1)
        return sparse.csr_array(combine_rows(weights, block).reshape(1, -1))
    if dense and block.size <= FEW:
        return np.add.reduceat(block * weights[:, None], starts, axis=0)
    indicator = sparse.csr_array((weights, np.arange(n), np.append(starts, n)), shape=(len(starts), n))
    return indicator @ block


def group_rows_compiled(block: Array, weights: Array, starts: Index) -> Array:
    """Return what `group_rows` does of a dense block, in a compiled loop, which pays for large data."""
    out = np.zeros((len(starts), block.shape[1]))
    group_rows_loop()(block, weights, np.append(starts, len(block)), out)
    return out


def centre_rows(block: Any, starts: Index, known: Mapping[int, Array] | None = None) -> Any:
    """Return the rows of a block less the first row of their group; the block itself is left alone.

    Parameters
    ----------
    block : ndarray or csr_array, shape (n_rows, d)
        Rows of a group stand together. In a sparse block only columns that every row of the group stores are
        changed, so nothing is filled in: a dummy stays as it is, a number that all rows have is centred.
    starts : ndarray of int, shape (n_groups,)
        First row of each group; increasing, ``starts[0] == 0``.
    known : dict of ndarray, shape (d,), optional
        What to subtract in place of the first row, by position in ``starts``: `GroupReference.row` of groups
        that are not whole in this block.

    Returns
    -------
    ndarray or csr_array, shape (n_rows, d)

    Examples
    --------
    >>> import numpy as np
    >>> centre_rows(np.array([[1e7, 2.0], [1e7 + 1, 5.0], [3e7, 1.0]]), np.array([0, 2]))
    array([[0., 0.],
           [1., 3.],
           [0., 0.]])
    """
    known = known or {}
    sizes = np.diff(starts, append=block.shape[0])
    if sparse.issparse(block):
        return _centre_sparse(block, starts, sizes, known)
    subtracted = block[starts]
    for k, row in known.items():
        subtracted[k] = row
    return block - (subtracted if len(starts) == 1 else np.repeat(subtracted, sizes, axis=0))


def _centre_sparse(block: Any, starts: Index, sizes: Index, known: Mapping[int, Array]) -> Any:
    block = without_duplicates(block)
    counts = _counts(block, starts)
    everywhere = counts.data == np.repeat(sizes, np.diff(counts.indptr))
    counts.data = everywhere.astype(np.float64)
    subtracted = sparse.csr_array(block[starts].multiply(counts))
    if known:
        own = [k for k in range(len(starts)) if k not in known]
        parts = {k: sparse.csr_array(row[None, :]) for k, row in known.items()}
        parts |= {k: subtracted[[k]] for k in own}
        subtracted = sparse.csr_array(sparse.vstack([parts[k] for k in range(len(starts))]))
    return sparse.csr_array(block - subtracted[np.repeat(np.arange(len(starts)), sizes)])


def without_duplicates(block: Any) -> Any:
    """Return a CSR array in which no row stores a column twice."""
    if block.has_canonical_format:
        return block
    block = block.copy()
    block.sum_duplicates()
    return block


def _counts(block: Any, starts: Index) -> Any:
    """Return how many rows of each group store an entry of each column, shape (n_groups, d), CSR."""
    n = block.shape[0]
    pattern = sparse.csr_array((np.ones(len(block.data)), block.indices, block.indptr), shape=block.shape)
    indicator = sparse.csr_array((np.ones(n), np.arange(n), np.append(starts, n)), shape=(len(starts), n))
    return sparse.csr_array(indicator @ pattern)


class Gram:
    """Accumulate ``sum_i t_i (r_i a_i - q_i mu_g)(r_i a_i - q_i mu_g)^T`` over blocks of rows.

    ``r`` defaults to one, ``q`` to zero. Dense rows are centred before the product, which keeps full accuracy
    whatever the size of ``mu``; for CSR rows the product is expanded so that nothing is densified.

    Parameters
    ----------
    n_columns : int
        Number d of columns.
    compiled : bool
        Whether dense rows are centred in compiled loops, which pays for large data.
    """

    def __init__(self, n_columns: int, *, compiled: bool = False) -> None:
        self._total = np.zeros((n_columns, n_columns))
        self._compiled = compiled
        # Rows whose centred and weighted copies stay in the cache.
        self._step = max(32, (COMPILED_BYTES if compiled else PART_BYTES) // (8 * max(1, n_columns)))
        self._rows: Array | None = None
        self._lower = np.zeros((0, 0))
        self._cross: dict[int, tuple[Array, Array, float]] = {}

    def __getstate__(self) -> dict[str, Any]:
        # What rows are put into does not travel.
        return vars(self) | {"_rows": None}

    def add(self, block: Any, t: Array, r: Array | None = None) -> None:
        """Add rows ``r_i a_i`` that are not centred."""
        if sparse.issparse(block):
            self._add_rows(block, t if r is None else t * r * r)
        else:
            self.add_centred(block, t, r, 0.0, None, np.zeros(1, dtype=np.intp))

    def add_centred(
        self, block: Any, t: Array, r: Array | None, q: Array | float, mu: Any, starts: Index
    ) -> None:
        """Add the rows of whole groups; ``mu`` has one row a group (as from `group_rows`), groups begin at
        ``starts``. Dense rows without ``mu`` are added as they are.
        """
        if sparse.issparse(block):
            self._add_centred_sparse(block, t, r, q, mu, starts)
            return
        if self._compiled:
            self._add_compiled(block, t, r, q, np.zeros((0, 0)) if mu is None else mu, starts)
            return
        sizes = np.diff(starts, append=len(t))
        whole = len(t) <= self._step
        group = np.arange(len(starts)).repeat(sizes)
        for first_row in range(0, len(t), self._step):
            part = slice(first_row, first_row + self._step)
            rows, weights = block[part] if r is None else block[part] * r[part, None], t[part]
            if mu is not None:
                centre = mu.repeat(sizes, axis=0) if whole else mu[group[part]]
                if isinstance(q, np.ndarray) or q != 1.0:
                    centre *= q[part, None] if isinstance(q, np.ndarray) else q
                rows = np.subtract(rows, centre, out=centre)
            if rows.shape[1] <= VERY_NARROW:
                product = (rows * weights[:, None]).T @ rows
                self._total += 0.5 * (product + product.T)
                continue
            rows = rows * np.sqrt(np.abs(weights))[:, None]
            # numpy recognises X^T X and calls the symmetric product: half the arithmetic.
            self._total += rows.T @ rows
            negative = np.flatnonzero(weights < 0.0)
            if len(negative):
                rows = rows[negative]
                self._total -= 2.0 * (rows.T @ rows)

    def _add_centred_sparse(
        self, block: Any, t: Array, r: Array | None, q: Array | float, mu: Any, starts: Index
    ) -> None:
        tr = t if r is None else t * r
        self._add_rows(block, tr if r is None else tr * r)
        nu = group_rows(block, tr * q, starts)
        kappa = np.add.reduceat(t * q * q, starts)
        scaled = sparse.dia_array((kappa[None, :], [0]), shape=(len(kappa), len(kappa))) @ mu
        # mu^T (kappa mu - nu) - nu^T mu: two sparse products, each symmetric together with its transpose.
        cross = mu.T @ (scaled * 0.5 - nu)
        self._total += (cross + cross.T).toarray()

    def add_piece(
        self, block: Any, t: Array, r: Array | None, q: Array | float, mu: Array, group: int
    ) -> None:
        """Add some rows of one large group, whose vector ``mu`` of shape (d,) is known beforehand."""
        if not sparse.issparse(block):
            self.add_centred(block, t, r, q, mu[None, :], np.zeros(1, dtype=np.intp))
            return
        tr = t if r is None else t * r
        self._add_rows(block, tr if r is None else tr * r)
        _, nu, kappa = self._cross.get(group, (mu, 0.0, 0.0))
        self._cross[group] = (mu, nu + combine_rows(tr * q, block), kappa + float(np.sum(t * q * q)))

    def _add_compiled(
        self, block: Any, t: Array, r: Array | None, q: Array | float, mu: Array, starts: Index
    ) -> None:
        rows, bounds = np.ascontiguousarray(block), np.append(starts, len(t))
        own = np.empty(0) if r is None else r
        each = q if isinstance(q, np.ndarray) else np.full(1, float(q))
        if self._rows is None:
            # Fresh memory for every part would cost as much as what is put there.
            self._rows = np.empty((self._step, rows.shape[1]))
        for first_row in range(0, len(t), self._step):
            part = slice(first_row, first_row + self._step)
            out = self._rows[: min(part.stop, len(t)) - part.start]
            first = int(np.searchsorted(starts, part.start, "right")) - 1
            n_positive = centred_rows_loop()(rows, t, own, each, mu, bounds, first, part.start, out)
            positive, negative = out[:n_positive], out[n_positive:]
            # numpy recognises X^T X and calls the symmetric product: half the arithmetic.
            self._total += positive.T @ positive
            if len(negative):
                self._total -= negative.T @ negative

    def merge(self, other: Gram) -> Gram:
        """Return the sum of both."""
        both = Gram(len(self._total), compiled=self._compiled)
        both._total = self._total + other._total
        if self._lower.size and other._lower.size:
            both._lower = self._lower + other._lower
        else:
            both._lower = self._lower if self._lower.size else other._lower
        both._cross = dict(self._cross)
        for group, (mu, nu, kappa) in other._cross.items():
            _, before, sizes = both._cross.get(group, (mu, 0.0, 0.0))
            both._cross[group] = (mu, before + nu, sizes + kappa)
        return both

    def result(self) -> Array:
        """Return the accumulated matrix, shape (d, d)."""
        total = self._total.copy()
        if self._lower.size:
            total += self._lower + np.tril(self._lower, -1).T
        for mu, nu, kappa in self._cross.values():
            half = np.multiply.outer(mu, 0.5 * kappa * mu - nu)
            total += half + half.T
        return total

    def _add_rows(self, block: Any, weights: Array) -> None:
        if not self._lower.size:
            self._lower = np.zeros_like(self._total)
        csr_gram_loop()(block.indptr, block.indices, block.data, weights, self._lower)


class GramParts:
    """What `Gram` adds up, but of its diagonal and along some directions only: O(d) numbers a row.

    Parameters
    ----------
    directions : ndarray, shape (d, k)

    Attributes
    ----------
    diagonal : ndarray, shape (d,)
    along : ndarray, shape (k,)
        ``v^T G v`` of each direction v.
    """

    def __init__(self, directions: Array) -> None:
        d, k = directions.shape
        self.directions = directions
        self.diagonal, self.along = np.zeros(d), np.zeros(k)
        # Four directions at a time, the last ones with zeros beside them.
        self._spare = ((0, 0), (0, -k % 4))
        self._strips = np.pad(directions, self._spare).reshape(d, -1, 4).transpose(1, 0, 2).copy()

    def add(self, block: Any, t: Array, r: Array | None = None) -> None:
        """Add rows ``r_i a_i`` that are not centred."""
        self._add(block, t, r, None)

    def add_centred(
        self, block: Any, t: Array, r: Array | None, q: Array | float, mu: Any, starts: Index
    ) -> None:
        """Add the rows of whole groups: see `Gram.add_centred`."""
        lengths = np.diff(starts, append=len(t))
        if not sparse.issparse(block):
            self._add(block, t, r, q, mu, np.repeat(np.arange(len(starts)), lengths))
            return
        tr = t if r is None else t * r
        nu, kappa = group_rows(block, tr * q, starts), np.add.reduceat(t * q * q, starts)
        scaled = sparse.dia_array((kappa[None, :], [0]), shape=(len(kappa), len(kappa))) @ mu
        self._add(
            block, t, r, q, np.asarray(mu @ self.directions), np.repeat(np.arange(len(starts)), lengths)
        )
        self.diagonal += np.asarray((mu * (scaled - 2.0 * nu)).sum(axis=0)).reshape(-1)

    def add_piece(
        self, block: Any, t: Array, r: Array | None, q: Array | float, mu: Array, group: int
    ) -> None:
        """Add some rows of one large group: see `Gram.add_piece`."""
        centre = mu[None, :]
        if sparse.issparse(block):
            centre = centre @ self.directions
            nu = combine_rows((t if r is None else t * r) * q, block)
            self.diagonal += mu * (float(np.sum(t * q * q)) * mu - 2.0 * nu)
        self._add(block, t, r, q, centre, np.zeros(len(t), dtype=np.intp))

    def merge(self, other: GramParts) -> GramParts:
        """Return the sum of both."""
        both = GramParts(self.directions)
        both.diagonal, both.along = self.diagonal + other.diagonal, self.along + other.along
        return both

    def _add(
        self,
        block: Any,
        t: Array,
        r: Array | None,
        q: Array | float | None,
        centres: Any = None,
        group: Any = None,
    ) -> None:
        """Add rows; the centres of their groups are given along the directions only for CSR blocks, whose
        diagonal is then that of the rows as they are.
        """
        if sparse.issparse(block):
            block = without_duplicates(block)
            own = np.empty(0) if r is None else r
            each = q if isinstance(q, np.ndarray) else np.full(1, 0.0 if q is None else float(q))
            place = np.empty(0, dtype=np.intp) if q is None else group
            centre = np.zeros((0, 0)) if q is None else np.pad(centres, self._spare)
            rows, along = (block.indptr, block.indices, block.data), np.zeros(4 * len(self._strips))
            csr_parts_loop()(*rows, t, own, each, centre, place, self._strips, self.diagonal, along)
            self.along += along[: len(self.along)]
            return
        step = max(32, PART_BYTES // (8 * len(self.diagonal)))
        for start in range(0, len(t), step):
            part = slice(start, start + step)
            rows = block[part] if r is None else block[part] * r[part, None]
            if q is not None:
                centre = centres[group[part]]
                rows = rows - (centre * q[part, None] if isinstance(q, np.ndarray) else centre * q)
            y = rows @ self.directions
            self.along += t[part] @ (y * y)
            self.diagonal += t[part] @ (rows * rows)


def majorant(hessian: Array) -> Array:
    """Return a symmetric matrix with its eigenvalues taken by absolute value: a positive semidefinite
    majorant.
    """
    values, vectors = np.linalg.eigh(hessian)
    return np.asarray((vectors * np.abs(values)) @ vectors.T)

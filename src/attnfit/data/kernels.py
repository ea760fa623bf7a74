"""Compiled loops over the rows of a matrix, kept on disk where that is possible.

Two functions know a storage: ``matvec`` multiplies rows by a vector, ``rmatvec`` sums them up with weights.
OpenBLAS multiplies a tall C-ordered block by a vector at a third of the memory's speed on some processors
(measured: AMD Zen 4); these loops reach it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import numpy as np

# Sums may be reordered and multiply-adds contracted; unlike with full fast-math, NaN and infinity survive.
OPTIONS: dict[str, Any] = {"nogil": True, "error_model": "numpy", "fastmath": {"reassoc", "contract", "nsz"}}
# Numba does not ask of an unsigned index whether it counts from the end; asking makes vector loads gathers.
U = np.uintp


class Compiled:
    """A compiled function that is kept on disk between processes, or compiled anew where nothing can be kept.

    Numba refuses to compile at all where its cache can not be written: a read-only installation without a
    home directory, a full disk.

    Parameters
    ----------
    function : callable
        What Numba compiles in nopython mode; it must not raise OSError itself.
    **options
        Of `numba.njit`.
    """

    _warned = False

    def __init__(self, function: Callable[..., Any], **options: Any) -> None:
        import numba

        self.function, self.options = function, options
        self._compiled = numba.njit(**options)(function)
        try:
            self._compiled.enable_caching()
        except (RuntimeError, OSError) as error:
            self._without_cache(error)

    def __call__(self, *args: Any) -> Any:
        """Run it; it is compiled for the types of the first call."""
        try:
            return self._compiled(*args)
        except OSError as error:
            # Numba reads and writes its cache before it runs anything.
            self._without_cache(error)
            return self._compiled(*args)

    @property
    def stats(self) -> Any:
        """What Numba counts of its cache."""
        return self._compiled.stats

    def _without_cache(self, error: Exception) -> None:
        import numba

        self._compiled = numba.njit(**self.options)(self.function)
        if not Compiled._warned:
            Compiled._warned = True
            reason = str(error).splitlines()[0]
            warnings.warn(
                f"compiled loops cannot be kept ({reason}): every process compiles them anew, some seconds "
                "each; set NUMBA_CACHE_DIR to a directory that can be written",
                RuntimeWarning,
                stacklevel=3,
            )


class RowKernels(NamedTuple):
    """The two loops of a storage; ``block_rows(block)`` rows at a time stay in cache between them."""

    matvec: Callable[..., Any]
    rmatvec: Callable[..., Any]
    block_rows: Callable[[Any], int]


def _matvec(block, first, count, x, z):  # type: ignore[no-untyped-def]
    for i in range(count):
        row, total = U(first + i), 0.0
        for j in range(len(x)):
            total += block[row, j] * x[j]
        z[i] = total


def _rmatvec(block, first, count, weights, out):  # type: ignore[no-untyped-def]
    # Four rows at a time, so that ``out`` is touched less; where rows are long enough to pay, three sums at a
    # time, so that rows are. Rows of an array on their own would be counted references.
    d, whole = out.shape[1], count - count % 4
    triples = len(out) - len(out) % 3 if d >= 32 else 0
    for q in range(0, triples, 3):
        p, s = U(q + 1), U(q + 2)
        for i in range(0, whole, 4):
            i1, i2, i3 = U(i + 1), U(i + 2), U(i + 3)
            r0, r1, r2, r3 = U(first + i), U(first + i + 1), U(first + i + 2), U(first + i + 3)
            a0, a1, a2, a3 = weights[q, i], weights[q, i1], weights[q, i2], weights[q, i3]
            b0, b1, b2, b3 = weights[p, i], weights[p, i1], weights[p, i2], weights[p, i3]
            c0, c1, c2, c3 = weights[s, i], weights[s, i1], weights[s, i2], weights[s, i3]
            for j in range(d):
                v0, v1, v2, v3 = block[r0, j], block[r1, j], block[r2, j], block[r3, j]
                out[q, j] += a0 * v0 + a1 * v1 + a2 * v2 + a3 * v3
                out[p, j] += b0 * v0 + b1 * v1 + b2 * v2 + b3 * v3
                out[s, j] += c0 * v0 + c1 * v1 + c2 * v2 + c3 * v3
    for q in range(triples, len(out)):
        for i in range(0, whole, 4):
            r0, r1, r2, r3 = U(first + i), U(first + i + 1), U(first + i + 2), U(first + i + 3)
            k0, k1, k2, k3 = weights[q, i], weights[q, U(i + 1)], weights[q, U(i + 2)], weights[q, U(i + 3)]
            for j in range(d):
                out[q, j] += k0 * block[r0, j] + k1 * block[r1, j] + k2 * block[r2, j] + k3 * block[r3, j]
    for q in range(len(out)):
        for i in range(whole, count):
            for j in range(d):
                out[q, j] += weights[q, i] * block[U(first + i), j]


def _dots_columns(block, first, count, x, z):  # type: ignore[no-untyped-def]
    # Four columns at a time, so that ``z`` is touched less.
    whole = len(x) - len(x) % 4
    rows = slice(first, first + count)
    z[:count] = 0.0
    for j in range(0, whole, 4):
        x0, x1, x2, x3 = x[j], x[U(j + 1)], x[U(j + 2)], x[U(j + 3)]
        v0, v1, v2, v3 = block[rows, j], block[rows, j + 1], block[rows, j + 2], block[rows, j + 3]
        for i in range(count):
            z[i] += v0[i] * x0 + v1[i] * x1 + v2[i] * x2 + v3[i] * x3
    for j in range(whole, len(x)):
        v0, x0 = block[rows, j], x[j]
        for i in range(count):
            z[i] += v0[i] * x0


def _add_columns(block, first, count, weights, out):  # type: ignore[no-untyped-def]
    # Three sums at a time, so that columns are read less.
    triples = len(out) - len(out) % 3
    for j in range(out.shape[1]):
        column = block[first : first + count, j]
        for q in range(0, triples, 3):
            a, b, c = weights[q], weights[q + 1], weights[q + 2]
            t0, t1, t2 = 0.0, 0.0, 0.0
            for i in range(len(column)):
                t0 += a[i] * column[i]
                t1 += b[i] * column[i]
                t2 += c[i] * column[i]
            out[q, j] += t0
            out[q + 1, j] += t1
            out[q + 2, j] += t2
        for q in range(triples, len(out)):
            a, t0 = weights[q], 0.0
            for i in range(len(column)):
                t0 += a[i] * column[i]
            out[q, j] += t0


def _dots_csr(block, first, count, x, z):  # type: ignore[no-untyped-def]
    indptr, indices, values = block
    for i in range(count):
        # Two sums at a time.
        even, odd = 0.0, 0.0
        p, stop = np.int64(indptr[U(first + i)]), np.int64(indptr[U(first + i + 1)])
        while p + 1 < stop:
            even += values[U(p)] * x[U(indices[U(p)])]
            odd += values[U(p + 1)] * x[U(indices[U(p + 1)])]
            p += 2
        if p < stop:
            even += values[U(p)] * x[U(indices[U(p)])]
        z[i] = even + odd


def _add_csr(block, first, count, weights, out):  # type: ignore[no-untyped-def]
    # Up to three sums at a time, which lie beside each other: see `empty_sums`.
    indptr, indices, values = block
    for q in range(0, len(out), 3):
        p, s, lanes = U(q + 1), U(q + 2), min(3, len(out) - q)
        for i in range(count):
            start, stop = np.int64(indptr[U(first + i)]), np.int64(indptr[U(first + i + 1)])
            if lanes == 3:
                k0, k1, k2 = weights[q, i], weights[p, i], weights[s, i]
                for e in range(start, stop):
                    j, v = U(indices[U(e)]), values[U(e)]
                    # All read before any is written: they then fit one instruction.
                    t0, t1, t2 = out[q, j] + k0 * v, out[p, j] + k1 * v, out[s, j] + k2 * v
                    out[q, j], out[p, j], out[s, j] = t0, t1, t2
            elif lanes == 2:
                k0, k1 = weights[q, i], weights[p, i]
                for e in range(start, stop):
                    j, v = U(indices[U(e)]), values[U(e)]
                    t0, t1 = out[q, j] + k0 * v, out[p, j] + k1 * v
                    out[q, j], out[p, j] = t0, t1
            else:
                k0 = weights[q, i]
                for e in range(start, stop):
                    out[q, U(indices[U(e)])] += k0 * values[U(e)]


def _rows_at_a_time(block: Any) -> int:
    # Few, so that the processor fetches the next rows while these are added; enough for vector instructions.
    return min(max(8, 4096 // int(block.itemsize * block.shape[1])), 64)


def empty_sums(storage: str, count: int, n_columns: int) -> Any:
    """Return zeros for ``rmatvec``, shape (count, n_columns): each sum contiguous, or each column for CSR."""
    return np.zeros((n_columns, count)).T if storage == "csr" else np.zeros((count, n_columns))


STORAGES = {
    "rows": RowKernels(_matvec, _rmatvec, _rows_at_a_time),
    "columns": RowKernels(_dots_columns, _add_columns, lambda block: 512),
    "csr": RowKernels(_dots_csr, _add_csr, lambda block: 256),
}


@cache
def block_times_vector() -> Any:
    """Compile ``z = M x`` for C-ordered float64."""
    return Compiled(_matvec, **OPTIONS)


@cache
def csr_gram_loop() -> Any:
    """Compile on first use only: importing the package must not pay for numba."""

    def gram(indptr, indices, data, weights, lower):  # type: ignore[no-untyped-def]
        for i in range(len(indptr) - 1):
            start = U(indptr[i])
            for p in range(start, U(indptr[i + 1])):
                scaled = weights[i] * data[p]
                row = U(indices[p])
                lower[row, row] += scaled * data[p]
                for s in range(start, p):
                    column = U(indices[s])
                    if column < row:
                        lower[row, column] += scaled * data[s]
                    elif column > row:
                        lower[column, row] += scaled * data[s]
                    else:
                        # A column stored twice in one row: both orders fall on the diagonal.
                        lower[row, row] += 2.0 * scaled * data[s]

    return Compiled(gram, nogil=True)


@cache
def csr_parts_loop() -> Any:
    """Compile on first use, as the loop over sparse rows is."""

    def parts(indptr, indices, data, t, r, q, centres, group, strips, diagonal, along):  # type: ignore[no-untyped-def]
        # Directions are named one by one: a short loop over them is not made one instruction.
        zero, one, two, three = U(0), U(1), U(2), U(3)
        for i in range(len(indptr) - 1):
            start, stop = U(indptr[i]), U(indptr[i + 1])
            own = r[i] if len(r) else 1.0
            centre = 0.0 if not len(group) else q[i] if len(q) > 1 else q[0]
            weight = t[i] * own * own
            for p in range(start, stop):
                diagonal[U(indices[p])] += weight * data[p] * data[p]
            for s in range(len(strips)):
                strip = strips[s]
                a = b = c = d = 0.0
                for p in range(start, stop):
                    v, j = data[p], U(indices[p])
                    a += v * strip[j, zero]
                    b += v * strip[j, one]
                    c += v * strip[j, two]
                    d += v * strip[j, three]
                for m, y in enumerate((a, b, c, d)):
                    y *= own
                    if len(group):
                        y -= centre * centres[group[i], 4 * s + m]
                    along[4 * s + m] += t[i] * y * y

    return Compiled(parts, **OPTIONS)


@cache
def centred_rows_loop() -> Any:
    """Compile on first use, as the loop over sparse rows is."""

    def centred(block, t, r, q, mu, bounds, g, start, out):  # type: ignore[no-untyped-def]
        # Rows of positive weight from the front on, the others from the back: a product each.
        front, back = 0, len(out)
        for i in range(start, start + len(out)):
            while i >= bounds[g + 1]:
                g += 1
            root = np.sqrt(abs(t[i]))
            own = root * r[i] if len(r) else root
            if t[i] < 0.0:
                back -= 1
                k = back
            else:
                k = front
                front += 1
            if len(mu):
                centre = root * (q[i] if len(q) > 1 else q[0])
                for j in range(out.shape[1]):
                    out[k, j] = own * block[i, j] - centre * mu[g, j]
            else:
                for j in range(out.shape[1]):
                    out[k, j] = own * block[i, j]
        return front

    return Compiled(centred, **OPTIONS)


@cache
def group_rows_loop() -> Any:
    """Compile on first use, as the loop over sparse rows is."""

    def sums(block, weights, bounds, out):  # type: ignore[no-untyped-def]
        for g in range(len(out)):
            for i in range(bounds[g], bounds[g + 1]):
                for j in range(out.shape[1]):
                    out[g, j] += weights[i] * block[i, j]

    return Compiled(sums, **OPTIONS)

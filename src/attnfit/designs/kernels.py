"""Loops over the rows of a matrix: plain functions that Numba compiles, alone or within a fused read.

Two functions know a storage: ``dots`` multiplies rows by a vector, ``add`` sums them up with weights.
OpenBLAS multiplies a tall C-ordered block by a vector at a third of the memory's speed on some processors
(measured: AMD Zen 4); these loops reach it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import numpy as np

# Sums may be reordered and multiply-adds contracted; unlike with full fast-math, NaN and infinity survive.
OPTIONS: dict[str, Any] = {"nogil": True, "error_model": "numpy", "fastmath": {"reassoc", "contract", "nsz"}}


class RowKernels(NamedTuple):
    """The two loops of a storage; of a block, ``step(block)`` rows at a time stay in cache between them."""

    dots: Callable[..., Any]
    add: Callable[..., Any]
    step: Callable[[Any], int]


def _dots(block, first, count, x, z):  # type: ignore[no-untyped-def]
    for i in range(count):
        total = 0.0
        for j in range(len(x)):
            total += block[first + i, j] * x[j]
        z[i] = total


def _add(block, first, count, weights, out):  # type: ignore[no-untyped-def]
    # Four rows at a time, so that ``out`` is touched less; where rows are long enough to pay, three sums at a
    # time, so that rows are. Rows of an array on their own would be counted references.
    d, whole = out.shape[1], count - count % 4
    triples = len(out) - len(out) % 3 if d >= 32 else 0
    for i in range(0, whole, 4):
        r0, r1, r2, r3 = first + i, first + i + 1, first + i + 2, first + i + 3
        for q in range(0, triples, 3):
            a0, a1, a2, a3 = weights[q, i], weights[q, i + 1], weights[q, i + 2], weights[q, i + 3]
            p = q + 1
            b0, b1, b2, b3 = weights[p, i], weights[p, i + 1], weights[p, i + 2], weights[p, i + 3]
            p = q + 2
            c0, c1, c2, c3 = weights[p, i], weights[p, i + 1], weights[p, i + 2], weights[p, i + 3]
            for j in range(d):
                v0, v1, v2, v3 = block[r0, j], block[r1, j], block[r2, j], block[r3, j]
                out[q, j] += a0 * v0 + a1 * v1 + a2 * v2 + a3 * v3
                out[q + 1, j] += b0 * v0 + b1 * v1 + b2 * v2 + b3 * v3
                out[q + 2, j] += c0 * v0 + c1 * v1 + c2 * v2 + c3 * v3
        for q in range(triples, len(out)):
            k0, k1, k2, k3 = weights[q, i], weights[q, i + 1], weights[q, i + 2], weights[q, i + 3]
            for j in range(d):
                out[q, j] += k0 * block[r0, j] + k1 * block[r1, j] + k2 * block[r2, j] + k3 * block[r3, j]
    for i in range(whole, count):
        for q in range(len(out)):
            for j in range(d):
                out[q, j] += weights[q, i] * block[first + i, j]


def _dots_columns(block, first, count, x, z):  # type: ignore[no-untyped-def]
    z[:count] = 0.0
    for j in range(len(x)):
        column, factor = block[first : first + count, j], x[j]
        for i in range(count):
            z[i] += column[i] * factor


def _add_columns(block, first, count, weights, out):  # type: ignore[no-untyped-def]
    for j in range(out.shape[1]):
        column = block[first : first + count, j]
        for q in range(len(out)):
            weight = weights[q]
            total = 0.0
            for i in range(len(column)):
                total += weight[i] * column[i]
            out[q, j] += total


def _dots_csr(block, first, count, x, z):  # type: ignore[no-untyped-def]
    indptr, indices, values = block
    for i in range(count):
        # Two sums at a time; unsigned indices, which Numba does not ask whether they count from the end.
        even, odd = 0.0, 0.0
        p, stop = np.int64(indptr[first + i]), np.int64(indptr[first + i + 1])
        while p + 1 < stop:
            even += values[p] * x[np.uint32(indices[p])]
            odd += values[p + 1] * x[np.uint32(indices[p + 1])]
            p += 2
        if p < stop:
            even += values[p] * x[np.uint32(indices[p])]
        z[i] = even + odd


def _add_csr(block, first, count, weights, out):  # type: ignore[no-untyped-def]
    # Two sums at a time, so that indices are read less.
    indptr, indices, values = block
    pairs = len(out) - len(out) % 2
    for i in range(count):
        start, stop = np.int64(indptr[first + i]), np.int64(indptr[first + i + 1])
        for q in range(0, pairs, 2):
            k0, k1, t0, t1 = weights[q, i], weights[q + 1, i], out[q], out[q + 1]
            for p in range(start, stop):
                j = np.uint32(indices[p])
                t0[j] += k0 * values[p]
                t1[j] += k1 * values[p]
        if pairs < len(out):
            k0, t0 = weights[pairs, i], out[pairs]
            for p in range(start, stop):
                t0[np.uint32(indices[p])] += k0 * values[p]


def _rows_at_a_time(block: Any) -> int:
    # Few, so that the processor fetches the next rows while these are added; enough for vector instructions.
    size = int(block.itemsize * block.shape[1])
    return 4 if size >= 512 else min(4096 // size, 64)


STORAGES = {
    "rows": RowKernels(_dots, _add, _rows_at_a_time),
    "columns": RowKernels(_dots_columns, _add_columns, lambda block: 512),
    "csr": RowKernels(_dots_csr, _add_csr, lambda block: 64),
}


@cache
def block_times_vector() -> Any:
    """Compile ``z = M x`` for C-ordered float64."""
    import numba

    return numba.njit(cache=True, **OPTIONS)(_dots)

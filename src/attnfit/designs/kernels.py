"""Compiled products of dense row blocks, for matrices large enough to repay the compiler.

OpenBLAS multiplies a tall C-ordered block by a vector at a third of the memory's speed on some processors
(measured: AMD Zen 4); these loops reach it. They reorder sums but, unlike full fast-math, keep NaN and
infinity.
"""

from __future__ import annotations

from functools import cache
from typing import Any

FLAGS = {"reassoc", "contract", "nsz"}


@cache
def block_times_vector() -> Any:
    """Compile ``z = M x`` for C-ordered float64."""
    import numba

    def kernel(M, x, z):  # type: ignore[no-untyped-def]
        for i in range(M.shape[0]):
            total = 0.0
            for j in range(M.shape[1]):
                total += M[i, j] * x[j]
            z[i] = total

    return numba.njit(cache=True, nogil=True, fastmath=FLAGS)(kernel)


@cache
def weights_times_block() -> Any:
    """Compile ``out += K M`` for C-ordered float64, four rows at a time so that ``out`` is touched less."""
    import numba

    def kernel(K, M, out):  # type: ignore[no-untyped-def]
        n = M.shape[0]
        whole = n - n % 4
        for i in range(0, whole, 4):
            for c in range(K.shape[0]):
                k0, k1, k2, k3 = K[c, i], K[c, i + 1], K[c, i + 2], K[c, i + 3]
                for j in range(M.shape[1]):
                    out[c, j] += k0 * M[i, j] + k1 * M[i + 1, j] + k2 * M[i + 2, j] + k3 * M[i + 3, j]
        for i in range(whole, n):
            for c in range(K.shape[0]):
                for j in range(M.shape[1]):
                    out[c, j] += K[c, i] * M[i, j]

    return numba.njit(cache=True, nogil=True, fastmath=FLAGS)(kernel)

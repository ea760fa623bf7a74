"""A 64-bit checksum at memory speed: a guard against files that change by accident, not against forgery."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attnfit.designs.compiling import Compiled


def _compare(data, edges, first, width, key, known):  # type: ignore[no-untyped-def]
    for block in range(len(known)):
        begin, end = (edges[block] - first) * width, (edges[block + 1] - first) * width
        # Words of the two halves meet keys of their place and are multiplied, 32 bits by 32 (the NH hash of
        # UMAC): order counts, a difference in two places does not cancel, and unlike full 64-bit products
        # these are computed several at a time on every processor.
        step, low, high = np.uint64(0x9E3779B185EBCA87), np.uint64(0xFFFFFFFF), np.uint64(32)
        half = (end - begin) // 16
        left = data[begin : begin + 8 * half].view(np.uint64)
        right = data[begin + 8 * half : begin + 16 * half].view(np.uint64)
        total = place = np.uint64(key)
        for i in range(half):
            a, b = left[i] + place, right[i] ^ place
            place += step
            total += (a & low) * (b & low) + (a >> high) * (b >> high)
        for i in range(begin + 16 * half, end):
            total = (total ^ np.uint64(data[i])) * step
        # 0 is kept for what has not been read.
        total = max(total, np.uint64(1))
        if known[block] == 0:
            known[block] = total
        elif known[block] != total:
            return block
    return -1


@cache
def _compiled() -> Callable[..., int]:
    return Compiled(_compare, nogil=True, error_model="numpy")


def first_difference(
    rows: NDArray[Any], edges: NDArray[np.intp], width: int, known: NDArray[np.uint64]
) -> int:
    """Compare blocks with their known checksums, and keep those that are not known (0).

    Parameters
    ----------
    rows : ndarray
        Contiguous; its first row is the first of ``edges``.
    edges : ndarray of intp, shape (n_blocks + 1,)
        First row of each block, and the one after the last.
    width : int
        Bytes a row.
    known : ndarray of uint64, shape (n_blocks,)

    Returns
    -------
    int
        The first block that differs; -1 if none does.

    Notes
    -----
    One core of an AMD Zen 4 server: 65 GB/s in the second-level cache, 25 GB/s from memory.
    """
    return _compiled()(rows.reshape(-1).view(np.uint8), edges, int(edges[0]), width, 0, known)


def checksum(*arrays: NDArray[Any]) -> int:
    """Return one checksum, never 0, of the bytes of several contiguous arrays in their order."""
    found = np.zeros(1, dtype=np.uint64)
    for array in arrays:
        key = (int(found[0]) ^ array.nbytes) & 0x7FFFFFFFFFFFFFFF
        found[0] = 0
        data = array.reshape(-1).view(np.uint8)
        _compiled()(data, np.array([0, len(data)]), 0, 1, key, found)
    return int(found[0])

"""A source of rows against itself: every way to read it must give the same rows."""

from __future__ import annotations

import json
import pickle
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from copy import copy
from itertools import pairwise
from typing import Any

import numpy as np
from scipy import sparse

from attnfit.data.sources.base import Source


def check_source(source: Source, *, random_state: Any = 0) -> None:
    """Read a source in every way that a fit does, and compare.

    All rows at once, block by block, across the edges of blocks, single rows in any order and twice, into
    memory that is given, from a copy, from a pickled copy (where the class can be imported by its name), and
    from several threads. Rows that do not exist must be refused, blocks must have names, and the fingerprint
    must be JSON.

    Parameters
    ----------
    source : Source
        Of at least two rows, few enough to hold in memory.
    random_state : int or numpy.random.Generator

    Raises
    ------
    AssertionError
        Naming what differs.

    Examples
    --------
    >>> import numpy as np, tempfile
    >>> from attnfit.data import check_source, open_source
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     np.save(f"{folder}/rows.npy", np.arange(30.0).reshape(10, 3))
    ...     check_source(open_source(f"{folder}/rows.npy"))
    """
    rng = np.random.default_rng(random_state)
    n = int(source.shape[0])
    whole = _dense(source.read(0, n))
    assert whole.shape == tuple(source.shape), f"read gives shape {whole.shape}; shape says {source.shape}"
    assert whole.dtype == source.dtype, f"read gives dtype {whole.dtype}; dtype says {source.dtype}"
    edges = np.asarray(source.edges)
    assert edges[0] == 0 and edges[-1] == n and (np.diff(edges) > 0).all(), (
        "edges run from 0 to n, increasing"
    )
    for first, last in pairwise(edges):
        _same(source.read(int(first), int(last)), whole[first:last], f"rows {first} to {last}, a block")
    for _ in range(20):
        first, last = np.sort(rng.choice(n + 1, 2, replace=False))
        _same(source.read(int(first), int(last)), whole[first:last], f"rows {first} to {last}")
    rows = rng.integers(0, n, size=min(4 * n, 200))
    _same(source.take(rows), whole[rows], "rows taken in any order")
    _same(source.take(np.zeros(0, dtype=np.intp)), whole[:0], "no rows")
    if not source.sparse:
        memory = np.empty(whole.nbytes, dtype=np.uint8)
        _same(source.read(0, n, memory), whole, "rows read into given memory")
        assert np.shares_memory(source.read(0, n, memory), memory), "rows must be a view of the memory given"
    copies = {"a copy": copy(source)}
    # A class that cannot be imported by its name cannot be pickled either.
    with suppress(pickle.PicklingError, AttributeError):
        copies["a pickled copy"] = pickle.loads(pickle.dumps(source))
    for name, other in copies.items():
        _same(other.read(0, n), whole, name)
        assert other.fingerprint() == source.fingerprint(), f"{name} has another fingerprint"
    readers = [source.thread_copy() for _ in range(4)]
    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(lambda reader: reader.read(0, n), readers):
            _same(found, whole, "rows read by several threads")
    for outside in ((n, n + 1), (-1, 1), (1, 1)):
        try:
            source.read(*outside)
        except IndexError:
            continue
        raise AssertionError(f"rows {outside[0]} to {outside[1]} do not exist, but are read")
    assert source.locate(n - 1), "locate names file and block of a row"
    json.dumps(source.fingerprint())
    source.close()
    _same(source.read(0, n), whole, "rows read after close")


def _dense(rows: Any) -> Any:
    return rows.toarray() if sparse.issparse(rows) else rows


def _same(found: Any, expected: Any, what: str) -> None:
    found = _dense(found)
    same = found.shape == expected.shape and np.array_equal(found, expected)
    assert same, f"{what} differ from the same rows of read(0, n)"

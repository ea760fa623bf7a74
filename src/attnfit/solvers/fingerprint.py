"""Which data a fit is made on: a digest of each argument of a problem, from a thousand of its rows."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from functools import cached_property
from inspect import getattr_static
from typing import Any

import numpy as np
from scipy import sparse

# Rows of an array that are looked at, fewer where they are long.
ROWS, ENTRIES = 1_000, 1 << 20
# What follows from the other attributes, how much is read at a time, and counts.
DERIVED = ("chunks", "constants", "long_groups", "run_bytes", "rows_read")
# Attributes as the user knows them.
ARGUMENTS = {"design": "A", "penalty": "row_penalty"}


def fingerprint(problem: Any) -> dict[str, str]:
    """Return the class of a problem, and a digest of each of its arguments by name.

    It tells data apart that are not the same at all; a row that has changed may escape it.
    """
    found = {"problem": f"{type(problem).__name__} of {' x '.join(map(str, problem.shape))} unknowns"}
    for name, value in _attributes(problem).items():
        digest = hashlib.blake2b(digest_size=16)
        _add(digest, value, {id(problem)})
        found[ARGUMENTS.get(name, name)] = digest.hexdigest()
    return found


def _attributes(value: Any) -> dict[str, Any]:
    """Return the public attributes of an object that were given and not computed."""
    return {
        name: part
        for name, part in sorted(vars(value).items())
        if not name.startswith("_")
        and name not in DERIVED
        and not isinstance(getattr_static(type(value), name, None), cached_property)
    }


def _add(digest: Any, value: Any, seen: set[int]) -> None:
    """Feed a value, and what it is made of, to a digest."""
    if id(value) in seen:
        return
    if callable(getattr(value, "fingerprint", None)):
        value = value.fingerprint()
    digest.update(type(value).__name__.encode())
    if isinstance(value, np.ndarray):
        _add_array(digest, value)
    elif isinstance(value, int | float | np.number | str | bytes | slice | None):
        digest.update(repr(value).encode())
    elif sparse.issparse(value):
        digest.update(repr(value.shape).encode())
        for name in ("data", "indices", "indptr"):
            _add(digest, getattr(value, name, None), seen)
    elif isinstance(value, Mapping | list | tuple):
        for part in value.items() if isinstance(value, Mapping) else value:
            _add(digest, part, seen)
    elif hasattr(value, "__qualname__"):
        digest.update(value.__qualname__.encode())
    elif type(value).__module__.startswith("attnfit."):
        for name, part in _attributes(value).items():
            digest.update(name.encode())
            _add(digest, part, seen | {id(value)})


def _add_array(digest: Any, array: np.ndarray[Any, Any]) -> None:
    digest.update(f"{array.dtype.str} {array.shape}".encode())
    rows = array.reshape(1) if array.ndim == 0 else array
    row_size = max(1, rows.size // max(1, len(rows)))
    looked_at = rows[:: max(1, len(rows) // max(16, min(ROWS, ENTRIES // row_size)))]
    text = repr(looked_at.tolist()).encode() if array.dtype.hasobject else None
    digest.update(np.ascontiguousarray(looked_at).tobytes() if text is None else text)

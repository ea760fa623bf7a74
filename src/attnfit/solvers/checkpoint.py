"""A fit that survives its process: what it has read is kept in a file, from which the same call goes on; and
which data a fit is made on, told by a digest of each argument from a thousand of its rows.
"""

from __future__ import annotations

import hashlib
import os
import time
import warnings
from collections.abc import Mapping
from contextlib import suppress
from copy import deepcopy
from dataclasses import asdict, fields, is_dataclass, replace
from functools import cached_property
from inspect import getattr_static
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from attnfit.losses.loss import Loss
from attnfit.objectives.objective import Problem
from attnfit.solvers.checkpoint_file import read, write
from attnfit.solvers.loop import Callback, StopFit
from attnfit.solvers.record import CheckpointError, Draw, Entry, Recording, digest
from attnfit.solvers.result import History, Record, Result
from attnfit.version import __version__
from attnfit.writing import clean_up

# Rows of an array that are looked at, fewer where they are long.
ROWS, ENTRIES = 1_000, 1 << 20
# What follows from the other attributes, how much is read at a time, and counts.
DERIVED = (
    "chunks", "constants", "long_groups", "run_bytes", "rows_read", "n_rows", "n_unknowns", "n_groups",
    "n_long", "long_numbers", "long_constants", "long_states_at_zero", "largest_group", "in_better_units",
    "storage", "is_shared_out",
)  # fmt: skip
# What a problem notes of its rows and their loss, whose own attributes of these names count.
NOTED = ("shape", "convex", "zero_is_trivial", "guesses_normaliser")
# Attributes as the user knows them.
ARGUMENTS = {"design": "A", "penalty": "row_penalty"}
FORMAT_VERSION = 1
# The status of a fit that has not ended.
RUNNING = "running"
# The file is written again after this many times the last writing: it takes a tenth of the time at most.
PAUSE = 9.0
GENERATORS = ("PCG64", "PCG64DXSM", "MT19937", "Philox", "SFC64")


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
    """Return the public attributes of an object that were given and not computed; those of the rows of a
    problem among its own.
    """
    found = {
        name: part
        for name, part in sorted(vars(value).items())
        if not name.startswith("_")
        and name not in DERIVED
        and not isinstance(getattr_static(type(value), name, None), cached_property)
    }
    rows = found.pop("rows", None)
    if rows is None:
        return found
    of_rows = _attributes(rows)
    given = {name: part for name, part in found.items() if name not in NOTED and name not in of_rows}
    # In this order, which a digest depends on.
    return given | of_rows


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
    elif isinstance(value, Loss) or type(value).__module__.startswith("attnfit."):
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


class Checkpoint:
    """The recording of a fit in a file.

    Parameters
    ----------
    path : str or path-like
    problem, solver, x0, random_state
        What the fit is a function of; it must be that of the file. With ``random_state=None`` the file's is
        taken.
    tol, max_iter
        May differ from those of the file.
    resume : bool
        Without it a file is overwritten.

    Attributes
    ----------
    recording : Recording
    rng : numpy.random.Generator
        At the start of the fit.
    resumed : bool
        Whether there was a file.

    Raises
    ------
    CheckpointError
        If the file is none of this fit.
    OSError
        If it cannot be written.
    """

    def __init__(
        self,
        path: str | PathLike[str],
        problem: Problem,
        solver: Any,
        x0: NDArray[np.float64] | None,
        random_state: Any,
        *,
        tol: float,
        max_iter: int,
        resume: bool,
    ) -> None:
        # A link stays one: what it points to is replaced.
        self.path = Path(os.path.realpath(path))
        if self.path.exists() and not self.path.is_file():
            raise CheckpointError(f"checkpoint {self.path} is not a file; name a file")
        self.rng = np.random.default_rng(random_state)
        self._fit = {
            **fingerprint(problem),
            "solver": repr(solver) if is_dataclass(solver) else type(solver).__qualname__,
            "x0": "none" if x0 is None else digest(x0),
        }
        self._goal = {"tol": float(tol), "max_iter": int(max_iter)}
        self._history = History()
        self.resumed = resume and self.path.exists()
        clean_up(self.path)
        if self.resumed:
            arrays, header = read(self.path)
            try:
                self._adopt(header, arrays, seeded=random_state is not None)
            except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
                if isinstance(error, CheckpointError):
                    raise
                raise CheckpointError(
                    f"{self._name} is malformed ({type(error).__name__}: {error}); pass resume=False to "
                    "start afresh"
                ) from None
        else:
            self.recording = Recording([], self._name)
        self._random = deepcopy(self.rng.bit_generator.state)
        self.recording.on_add = self._write_in_time
        self._written, self._cost, self._pending = time.perf_counter(), 0.0, False
        if not self.resumed:
            # Whether the file can be written shows before the first read.
            self._write(RUNNING)

    @property
    def _name(self) -> str:
        return f"checkpoint {self.path}"

    def _adopt(self, header: dict[str, Any], arrays: dict[str, NDArray[Any]], *, seeded: bool) -> None:
        """Take over the recording of a file, if it is one of this fit."""
        version = header["format_version"]
        if version != FORMAT_VERSION or isinstance(version, bool):
            raise self._refusal(f"has format version {version!r}, this attnfit reads {FORMAT_VERSION}")
        if header["attnfit_version"] != __version__:
            raise self._refusal(f"was written by attnfit {header['attnfit_version']}, this is {__version__}")
        there, here = dict(header["fit"]), self._fit
        names = [name for name in {**here, **there} if here.get(name) != there.get(name)]
        if "problem" in names:
            raise self._refusal(f"is of another problem: {there.get('problem')}, not {here['problem']}")
        if "solver" in names:
            raise self._refusal(f"is of another solver: {there.get('solver')}, not {here['solver']}")
        if names:
            raise self._refusal(f"is of another fit: it differs in {' and '.join(names)}")
        stored = _generator(header["random_state"])
        if seeded and not _same_state(stored, self.rng):
            raise self._refusal("is of another random_state; leave it out to go on with the stored one")
        self.rng = stored
        may_differ = header["status"] == "interrupted" or self._goal != header["goal"]
        entries = [_entry(k, record, arrays) for k, record in enumerate(header["entries"])]
        self.recording = Recording(entries, self._name, may_differ=may_differ)

    def _refusal(self, reason: str) -> CheckpointError:
        return CheckpointError(
            f"{self._name} {reason}; name another file, or pass resume=False to start afresh"
        )

    # ---- during the fit

    def wrap_callback(self, callback: Callback | None) -> Callback:
        """Return a callback that keeps the records, and ends the recording where the given one stops."""

        def listen(record: Record) -> Any:
            self._history.append(record)
            if callback is None:
                return False
            try:
                stop = callback(record)
            except (KeyboardInterrupt, StopFit):
                self.recording.seal()
                raise
            if stop:
                self.recording.seal()
            return stop

        return listen

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if error is not None and self._pending:
            # The error that ends the fit is the one to be told.
            with suppress(OSError):
                self._write("interrupted" if isinstance(error, KeyboardInterrupt) else RUNNING)

    def finish(self, result: Result) -> Result:
        """Write the file a last time; return the result with a word on where it was resumed."""
        try:
            self._write(result.status)
        except OSError as error:
            # The answer is worth more than the way to it.
            warnings.warn(str(error), stacklevel=3)
        if not self.resumed:
            return result
        reads = f"{self.recording.reads_saved:.3g} reads"
        return replace(result, message=f"{result.message}; resumed from {self.path} after {reads}")

    def _write_in_time(self) -> None:
        self._pending = True
        if time.perf_counter() - self._written >= PAUSE * self._cost:
            self._write(RUNNING)

    def _write(self, status: str) -> None:
        began = time.perf_counter()
        header = {
            "format_version": FORMAT_VERSION,
            "attnfit_version": __version__,
            "fit": self._fit,
            "goal": self._goal,
            "random_state": self._random,
            "status": status,
            "last": asdict(self._history[-1]) if len(self._history) else {},
            "history": self._history.columns(),
            "entries": [_record(entry) for entry in self.recording.entries],
        }
        arrays = {
            f"{k}.{name}": array
            for k, entry in enumerate(self.recording.entries)
            for name, array in entry.arrays.items()
        }
        if self.recording.at is not None:
            # Nobody reads these but people who look into the file, nor the history.
            arrays |= {name: np.array(getattr(self.recording.at, name)) for name in ("x", "gradient")}
        write(self.path, arrays, header)
        self._written, self._pending = time.perf_counter(), False
        self._cost = self._written - began


def _record(entry: Entry) -> dict[str, Any]:
    """Return an entry as JSON; its arrays are stored by number and name."""
    record = {field.name: getattr(entry, field.name) for field in fields(entry)}
    return record | {"arrays": list(entry.arrays), "draw": None if entry.draw is None else asdict(entry.draw)}


def _entry(k: int, record: dict[str, Any], arrays: dict[str, NDArray[Any]]) -> Entry:
    """Return entry k of a file."""
    draw = record["draw"]
    if draw is not None:
        state = _generator(draw["random"]).bit_generator.state
        n_rows = None if draw["n_rows"] is None else int(draw["n_rows"])
        draw = Draw(state, float(draw["mass"]), bool(draw["has_leverage"]), n_rows)
    overflow = record["overflow"]
    return Entry(
        str(record["call"]),
        str(record["digest"]),
        float(record["n_passes"]),
        float(record["seconds"]),
        {str(name): arrays[f"{k}.{name}"] for name in record["arrays"]},
        draw,
        None if overflow is None else str(overflow),
    )


def _generator(state: dict[str, Any]) -> np.random.Generator:
    """Return the generator in a state."""
    if state["bit_generator"] not in GENERATORS:
        raise ValueError(f"unknown generator {state['bit_generator']!r}")
    generator = np.random.Generator(getattr(np.random, state["bit_generator"])())
    generator.bit_generator.state = state
    return generator


def _same_state(one: np.random.Generator, other: np.random.Generator) -> bool:
    return repr(one.bit_generator.state) == repr(other.bit_generator.state)

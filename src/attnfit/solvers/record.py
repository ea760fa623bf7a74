"""What the reads of a fit returned, in order: enough to run the same fit again without them.

A fit is a function of its data and of the state of its generator, and what takes long is reading the data. So
no solver has to store its state: it runs again, and its questions to the problem are answered from here.
"""

from __future__ import annotations

import hashlib
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attnfit.objectives.objective import Evaluation


class CheckpointError(ValueError):
    """A checkpoint that is damaged, or of other data, another fit or another version."""


@dataclass(frozen=True)
class Draw:
    """What a draw of rows leaves behind: the generator's state, what the sampler knows, how many rows."""

    random: Mapping[str, Any]
    mass: float
    has_leverage: bool
    n_rows: int | None


@dataclass(frozen=True)
class Entry:
    """A call and its answer.

    Attributes
    ----------
    call, digest : str
        The name of the call and a digest of its arguments.
    n_passes, seconds : float
        Reads of the data and time that it took.
    arrays : dict of str to ndarray
        The answer, by its parts.
    draw : Draw, optional
    overflow : str, optional
        The message, where the answer was an OverflowError.
    """

    call: str
    digest: str
    n_passes: float
    seconds: float
    arrays: dict[str, NDArray[Any]] = field(default_factory=dict)
    draw: Draw | None = None
    overflow: str | None = None


def digest(*arguments: Any) -> str:
    """Return a digest of arrays, numbers and words."""
    found = hashlib.blake2b(digest_size=16)
    for argument in arguments:
        array = isinstance(argument, np.ndarray)
        found.update(np.ascontiguousarray(argument).tobytes() if array else repr(argument).encode())
        found.update(b"\n")
    return found.hexdigest()


class Recording:
    """The entries of a fit: taken from one by one while they last, added to from then on.

    Parameters
    ----------
    entries : list of Entry
        Of an earlier run.
    name : str
        For messages.
    may_differ : bool
        Whether this run may leave the path of the earlier one, because it was given another goal.

    Attributes
    ----------
    reads_saved, seconds_saved : float
        What the entries taken took when they were made.
    at : Evaluation, optional
        The last point evaluated.
    """

    def __init__(self, entries: list[Entry], name: str = "", *, may_differ: bool = False) -> None:
        self.entries = entries
        self.reads_saved, self.seconds_saved = 0.0, 0.0
        self.at: Evaluation | None = None
        self.on_add: Callable[[], None] = _nothing
        self._name, self._may_differ = name, may_differ
        self._position = 0
        self._unchecked: tuple[Evaluation, Callable[[], Evaluation]] | None = None
        self._leverages: dict[int, Callable[[], Any]] = {}
        self._depth = 0
        self._sealed = False

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what belongs to this run: what it still owed is done first."""
        self.check()
        for again in list(self._leverages.values()):
            again()
        at = None if self.at is None else self.at.bare()
        return vars(self) | {"at": at, "on_add": _nothing, "_unchecked": None, "_leverages": {}}

    @property
    def silent(self) -> bool:
        """Whether calls are neither answered nor entered."""
        return self._sealed or self._depth > 0

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Leave out the calls made inside: they are part of an answer."""
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1

    def seal(self) -> None:
        """End the recording: what an interrupted fit still asks for, to report, the resumed one will not."""
        self._sealed = True

    def clock(self) -> float:
        """Return the time, in which a call that is answered from here takes as long as it first did."""
        return time.perf_counter() + self.seconds_saved

    def take(self, call: str, key: str) -> Entry | None:
        """Return the entry of a call, None where there is none and it must be made.

        Raises
        ------
        CheckpointError
            If the data have changed.
        """
        if self._position < len(self.entries):
            entry = self.entries[self._position]
            if (entry.call, entry.digest) == (call, key):
                self._position += 1
                self.reads_saved += entry.n_passes
                self.seconds_saved += entry.seconds
                return entry
            if not self._may_differ:
                warnings.warn(
                    f"entry {self._position + 1} of {len(self.entries)} in {self._name} ({entry.call}) is "
                    "not what the fit asks for now: the data have changed, or it runs differently on this "
                    "machine or with this number of threads; from here on the data are read",
                    stacklevel=2,
                )
            del self.entries[self._position :]
        self.check()
        return None

    def add(self, entry: Entry) -> None:
        """Enter a call that was made."""
        self.entries.append(entry)
        self._position = len(self.entries)
        self.on_add()

    def expect(self, at: Evaluation, again: Callable[[], Evaluation]) -> None:
        """Keep an evaluation taken from here, and how to repeat it, for `check`."""
        self._unchecked = at, again

    def check(self) -> None:
        """Repeat the last evaluation that was taken from here: the data must give the same bits.

        Raises
        ------
        CheckpointError
            If they do not.
        """
        if self._unchecked is None or self._sealed:
            return
        expected, again = self._unchecked
        try:
            found = again()
            same = np.array_equal(expected.value, found.value, equal_nan=True)
            same = same and np.array_equal(expected.gradient, found.gradient, equal_nan=True)
        except OverflowError:
            # A solver would take it for a step too far.
            same = False
        if not same:
            raise CheckpointError(
                f"the data are not those of {self._name}: the last point it holds has another value or "
                "gradient now (if only by rounding, it comes from another machine or number of threads); "
                "restore the data, or pass resume=False to start afresh"
            )
        self._unchecked = None

    # ---- leverages of rows, which are too many to keep

    def leverage_from(self, sampler: Any, again: Callable[[], Any]) -> None:
        """Keep how to compute the leverages of a sampler, which were not read in this run."""
        if sampler.leverage is not None:
            self._leverages[id(sampler.leverage)] = again

    def renew(self, sampler: Any) -> None:
        """Compute the leverages of a sampler unless they are known."""
        self._leverages.pop(id(sampler.leverage), lambda: None)()


def _nothing() -> None:
    """Do nothing."""

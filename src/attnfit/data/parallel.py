"""Threads that read ahead and compute, and how many there may be."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from threading import Lock, RLock
from typing import Any, TypeVar

from threadpoolctl import ThreadpoolController

T = TypeVar("T")
R = TypeVar("R")
# The piece in use, the one being read, and one that a caller may not have let go of yet.
KEPT = 3


def available_threads() -> int:
    """Return the number of threads that BLAS may use now, or that `one_blas_thread` leaves to others: who
    limits those means these as well.
    """
    return _ONE_THREAD.others or _allowed()


def _allowed() -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    allowed = cores or 1
    for pool in pools().info():
        if pool["user_api"] == "blas":
            allowed = min(allowed, int(pool["num_threads"]))
    return allowed


def in_order(work: Callable[[T], R], items: Iterable[T], n_threads: int) -> Iterator[R]:
    """Yield ``work(item)`` of each item, in order, from so many threads."""
    if n_threads == 1:
        yield from map(work, items)
        return
    with ThreadPoolExecutor(n_threads) as pool:
        waiting: deque[Future[R]] = deque()
        for item in items:
            waiting.append(pool.submit(work, item))
            # A thread that is done does not wait for another that is not.
            if len(waiting) == 2 * n_threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


class _OneThread:
    """BLAS has one thread as long as anybody is inside; the last to leave restores what was."""

    def __init__(self) -> None:
        self._lock, self._inside = Lock(), 0
        self._limit: Any = None
        # Threads that are not BLAS's; zero while nobody is inside.
        self.others = 0

    def enter(self, *, alone: bool) -> None:
        """Take BLAS its threads; the first to come says whether there is to be one thread alone."""
        with self._lock:
            if not self._inside:
                self.others = 1 if alone else _allowed()
                self._limit = pools().limit(limits=1)
            self._inside += 1

    def leave(self) -> None:
        """Give them back."""
        with self._lock:
            self._inside -= 1
            if not self._inside:
                self._limit.restore_original_limits()
                self.others = 0


_ONE_THREAD = _OneThread()


@contextmanager
def one_blas_thread(*, alone: bool = True) -> Iterator[None]:
    """BLAS has one thread inside; the number is the process's, so it is shared. Unless that is ``alone``,
    others may be as many as BLAS had.
    """
    _ONE_THREAD.enter(alone=alone)
    try:
        yield
    finally:
        _ONE_THREAD.leave()


@cache
def pools() -> Any:
    """Return the thread pools of this process; to find them takes some milliseconds."""
    return ThreadpoolController()


def read_ahead(load: Callable[[T], Any], items: Iterable[T]) -> Iterator[T]:
    """Yield the items, each once ``load(item)`` is done; a thread loads the next one meanwhile."""
    iterator = iter(items)
    with ThreadPoolExecutor(1) as reader:
        item = next(iterator, None)
        loading = None if item is None else reader.submit(load, item)
        while item is not None and loading is not None:
            loading.result()
            ready, item = item, next(iterator, None)
            loading = None if item is None else reader.submit(load, item)
            yield ready


class Recent:
    """The pieces read last, by their rows.

    Parameters
    ----------
    most : int
        Number of pieces to keep.

    Attributes
    ----------
    lock : RLock
        Held by whoever goes over the rows: another thread would write over the pieces in use.
    """

    def __init__(self, most: int = KEPT) -> None:
        self._most = most
        self._pieces: list[tuple[int, int, Any]] = []
        self.lock = RLock()

    def __reduce__(self) -> tuple[type[Recent], tuple[int]]:
        # What was read stays behind.
        return Recent, (self._most,)

    def find(self, rows: slice) -> tuple[int, Any] | None:
        """Return the first row of the piece that holds these rows, and the piece."""
        for start, stop, piece in reversed(list(self._pieces)):
            if start <= rows.start and rows.stop <= stop:
                return start, piece
        return None

    def renew(self, rows: slice) -> bool:
        """Make the piece that holds these rows the last to be let go; return whether there is one."""
        for known in list(self._pieces):
            if known[0] <= rows.start and rows.stop <= known[1]:
                self._pieces.remove(known)
                self._pieces.append(known)
                return True
        return False

    def make_room(self) -> Any:
        """Let go of the oldest piece where there are enough; return it for its memory."""
        return self._pieces.pop(0)[2] if len(self._pieces) >= self._most else None

    def keep(self, start: int, stop: int, piece: Any) -> None:
        """Keep a piece."""
        self._pieces.append((start, stop, piece))

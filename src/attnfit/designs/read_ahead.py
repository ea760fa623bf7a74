"""Read the next piece of the data while the present one is worked on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from threading import RLock
from typing import Any, TypeVar

T = TypeVar("T")

# The piece in use, the one being read, and one that a caller may not have let go of yet.
KEPT = 3


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

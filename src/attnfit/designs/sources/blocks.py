"""Storage that decodes many rows at once: each block is decoded once a pass, and the last one is kept."""

from __future__ import annotations

from abc import abstractmethod
from bisect import bisect_left, bisect_right
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attnfit.designs.sources.base import Source
from attnfit.designs.sources.errors import DriftError, FileFormatError


class BlockSource(Source):
    """A source that keeps the block it decoded last, so that small reads in a row decode it once."""

    _last: tuple[int, Any] | None = None

    def close(self) -> None:
        super().close()
        self._last = None

    @abstractmethod
    def _load(self, block: int) -> Any:
        """Return the rows of a block, checked."""

    def _kept(self, block: int, *, anew: bool = False) -> Any:
        """Return the rows of a block; decoded ``anew``, they are compared with those of the last pass."""
        if anew or self._last is None or self._last[0] != block:
            self._last = None
            self._last = block, self._load(block)
        return self._last[1]

    def _decoded(self, block: int, decode: Callable[[], Any]) -> Any:
        """Return what ``decode`` returns, or name the block that it fails on."""
        try:
            return decode()
        except DriftError:
            raise
        except Exception as error:  # decoders let through whatever a damaged block provokes
            reason = str(error) or type(error).__name__
            if self.checksums[block]:
                raise self._drift(block, f"cannot be decoded any more ({reason})") from error
            if isinstance(error, FileFormatError):
                raise
            where = ", ".join(self._place(block))
            raise FileFormatError(f"{where} cannot be decoded: {reason}; write the file again") from error

    def _by_block(self, rows: NDArray[np.intp]) -> list[tuple[int, NDArray[np.intp]]]:
        """Return each block that holds some of these rows, with the places of those rows among them."""
        blocks = self.block_of(rows)
        order = np.argsort(blocks, kind="stable")
        found, starts = np.unique(blocks[order], return_index=True)
        return list(zip(found.tolist(), np.split(order, starts[1:]), strict=True)) if len(rows) else []

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_last": None}


class DenseBlockSource(BlockSource):
    """Blocks that are decoded into arrays."""

    @abstractmethod
    def _decode(self, first: int, last: int, rows: NDArray[Any]) -> None:
        """Fill an array with the rows of blocks first to last - 1."""

    def _load(self, block: int) -> NDArray[Any]:
        rows = self._room(int(self.edges[block + 1] - self.edges[block]), None)
        self._fill(block, block + 1, rows)
        return rows

    def _fill(self, first: int, last: int, rows: NDArray[Any]) -> None:
        start = int(self.edges[first])
        try:
            self._decode(first, last, rows)
        except Exception:
            # One by one, to find out which it is.
            for block in range(first, last):
                piece = rows[self.edges[block] - start : self.edges[block + 1] - start]
                self._decoded(block, lambda b=block, r=piece: self._decode(b, b + 1, r))  # type: ignore[misc]
        self._check(start, rows)

    def _read(self, start: int, stop: int, out: NDArray[np.uint8] | None) -> NDArray[Any]:
        rows = self._room(stop - start, out)
        first, last = bisect_left(self.edges, start), bisect_right(self.edges, stop) - 1
        inner, tail = int(self.edges[first]), int(self.edges[last])
        if start < inner:
            offset = start - int(self.edges[first - 1])
            rows[: inner - start] = self._kept(first - 1)[offset : offset + stop - start]
        if first < last:
            self._fill(first, last, rows[inner - start : tail - start])
        if first <= last and tail < stop:
            rows[tail - start :] = self._kept(last, anew=True)[: stop - tail]
        return rows

    def _take(self, rows: NDArray[np.intp]) -> NDArray[Any]:
        found = self._room(len(rows), None)
        for block, places in self._by_block(rows):
            found[places] = self._kept(block)[rows[places] - self.edges[block]]
        return found

"""How many rows stand for all of them."""

from __future__ import annotations

from copy import copy
from typing import Any, Self

from attnfit.data.on_disk import RUN_BYTES, DenseOnDisk, SparseOnDisk
from attnfit.data.parallel import KEPT
from attnfit.objectives.objective import DRAWN, MAX_DENSE, READING, SAMPLES, STORED, WORKING, MemoryEstimate
from attnfit.objectives.part import StoredProblem

# Starts are searched on the small sample and polished on the large one, whose answer is about one per cent
# off.
SCOUT_ROWS = 4_000
SAMPLE_ROWS = 20_000
# Rows per unknown: fewer than the first and an answer means little; the second give a Hessian to within
# three per cent.
SCOUT_RATIO = 10
SAMPLE_RATIO = 1000
# A sample larger than this share of the data costs more than it saves.
MAX_SHARE = 0.1
# For the curvature at a point: a share of the rows, and no fewer than this many an unknown.
DRAWN_SHARE = 0.05
DRAWN_RATIO = 100.0


def sample_sizes(n: int, d: int) -> tuple[int, int]:
    """Return the numbers of rows of the small sample and of the large one."""
    scout_rows = max(SCOUT_ROWS, SCOUT_RATIO * d)
    if n <= SAMPLE_ROWS:
        return scout_rows, SAMPLE_ROWS
    affordable = max(int(MAX_SHARE * n), min(SAMPLE_ROWS, n // 4))
    return scout_rows, max(scout_rows, min(max(SAMPLE_ROWS, SAMPLE_RATIO * d), affordable))


def rows_to_draw(n: int, d: int, ratio: float = DRAWN_RATIO) -> float:
    """Return how many rows drawn by leverage stand for the curvature of all."""
    return max(DRAWN_SHARE * n, ratio * d)


# Row weights for products with the Hessian are kept up to this many rows, else computed in each product.
KEPT_ROWS = 1 << 25
# Arrays the size of drawn rows at a time: as fetched, as kept, and what the formulas make of them.
COPIES = 3
# Reading less at a time costs more in calls than in memory.
SMALLEST_RUN = 1 << 20


class BudgetedProblem(StoredProblem):
    """Counts what a fit keeps in memory; with a limit it keeps less, and reads in smaller pieces."""

    memory_limit: int | None = None

    def memory_estimate(self) -> MemoryEstimate:
        """Return the memory that a fit of this problem by the default solver takes at its peak, in bytes by
        purpose; ``print`` shows a table.
        """
        n, d, design = self.n_rows, self.n_unknowns, self.design
        parts = dict(super().memory_estimate().parts)
        if self.rows_can_be_drawn:
            parts[SAMPLES] = COPIES * 8 * (d + 5) * min(n, sample_sizes(n, d)[1])
        parts[WORKING] += COPIES * 8 * design.block_rows * (d + 12)
        if isinstance(design, DenseOnDisk | SparseOnDisk):
            row_bytes = self._row_bytes
            parts[READING] = (KEPT * design.run_rows + self.n_readers * design.thread_rows) * row_bytes
            if design.source.stored_rows > 1:
                parts[STORED] = 2 * design.source.stored_rows * design.row_bytes
        if not design.gram_pays and d <= MAX_DENSE and self.rows_can_be_drawn:
            drawn = min(self.most_drawn, rows_to_draw(n, d))
            parts[DRAWN] = int(COPIES * 8 * drawn * (d + 5)) + 4 * self.n_leverages
        return MemoryEstimate({name: size for name, size in parts.items() if size})

    def within(self, limit: int) -> Self:
        """Return the problem, read in such pieces that a fit takes at most so many bytes. Raises like that of
        the base class.
        """
        bounded = copy(self)
        bounded.memory_limit = limit
        if isinstance(self.design, DenseOnDisk | SparseOnDisk):
            bounded.design = design = copy(self.design)
            # A function of the limit alone: a resumed fit must add up in the same order.
            design.run_bytes = min(RUN_BYTES, max(SMALLEST_RUN, limit // 32))
        bounded.memory_estimate().require(limit)
        return bounded

    @property
    def n_readers(self) -> int:
        """Number of threads that each hold a run of rows: there is room for two at least."""
        if self.memory_limit is None or not self.design.on_disk:
            return super().n_readers
        return min(
            super().n_readers, max(2, self.memory_limit // (8 * self.design.thread_rows * self._row_bytes))
        )

    @property
    def _row_bytes(self) -> int:
        """Size of a row and of what belongs to it, as they are read."""
        design: Any = self.design
        return int(design.row_bytes) + 8 * (len(self.stored) - 1)

    @property
    def n_leverages(self) -> int:
        """Number of leverages to keep between reads: one a row where there is room."""
        keep = self.is_whole and (self.memory_limit is None or 4 * self.n_rows <= self.memory_limit // 8)
        return self.n_rows if keep else 0

    @property
    def most_drawn(self) -> float:
        """Largest number of rows that may be drawn in a read."""
        if self.memory_limit is None:
            return float("inf")
        return self.memory_limit / (4 * COPIES * 8 * (self.n_unknowns + 5))

    @property
    def keeps_row_weights(self) -> bool:
        """Whether there is room for the row weights of the Hessian, some five numbers a row."""
        room = KEPT_ROWS if self.memory_limit is None else min(KEPT_ROWS, self.memory_limit // 160)
        return self.is_whole and self.n_rows <= room

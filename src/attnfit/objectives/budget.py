"""The memory that a fit of rows takes, and how many rows it may draw for the curvature."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from attnfit.data.on_disk import DenseOnDisk, SparseOnDisk
from attnfit.data.parallel import KEPT
from attnfit.objectives.beginning import sample_sizes
from attnfit.objectives.objective import DRAWN, MAX_DENSE, READING, SAMPLES, STORED, WORKING, MemoryEstimate

if TYPE_CHECKING:
    from attnfit.objectives.rows import RowProblem

# For the curvature at a point: a share of the rows, and no fewer than this many an unknown.
DRAWN_SHARE = 0.05
DRAWN_RATIO = 100.0
# Row weights for products with the Hessian are kept up to this many rows, else computed in each product.
KEPT_ROWS = 1 << 25
# Arrays the size of drawn rows at a time: as fetched, as kept, and what the formulas make of them.
COPIES = 3


def rows_to_draw(n: int, d: int, ratio: float = DRAWN_RATIO) -> float:
    """Return how many rows drawn by leverage stand for the curvature of all."""
    return max(DRAWN_SHARE * n, ratio * d)


def memory_of_rows(problem: RowProblem, parts: dict[str, int]) -> MemoryEstimate:
    """Return what a fit of a problem on rows takes at its peak, given what any fit of its size does."""
    rows, design = problem.rows, problem.rows.design
    n, d = rows.n_rows, rows.n_unknowns
    if problem.rows_can_be_drawn:
        parts[SAMPLES] = COPIES * 8 * (d + 5) * min(n, sample_sizes(n, d)[1])
    parts[WORKING] += COPIES * 8 * design.block_rows * (d + 12)
    if isinstance(design, DenseOnDisk | SparseOnDisk):
        held = KEPT * design.run_rows + rows.n_readers * design.thread_rows
        parts[READING] = held * rows.row_bytes
        if design.source.stored_rows > 1:
            parts[STORED] = 2 * design.source.stored_rows * design.row_bytes
    if not design.gram_pays and d <= MAX_DENSE and problem.rows_can_be_drawn:
        drawn = min(most_drawn(rows), rows_to_draw(n, d))
        parts[DRAWN] = int(COPIES * 8 * drawn * (d + 5)) + 4 * n_leverages(rows)
    return MemoryEstimate({name: size for name, size in parts.items() if size})


def n_leverages(rows: Any) -> int:
    """Return the number of leverages to keep between passes: one a row where there is room."""
    limit = rows.memory_limit
    keep = rows.is_whole and (limit is None or 4 * rows.n_rows <= limit // 8)
    return int(rows.n_rows) if keep else 0


def most_drawn(rows: Any) -> float:
    """Return the largest number of rows that may be drawn in a pass."""
    if rows.memory_limit is None:
        return float("inf")
    return float(rows.memory_limit / (4 * COPIES * 8 * (rows.n_unknowns + 5)))


def keeps_row_weights(rows: Any) -> bool:
    """Whether there is room for the row weights of the Hessian, some five numbers a row."""
    room = KEPT_ROWS if rows.memory_limit is None else min(KEPT_ROWS, rows.memory_limit // 160)
    return bool(rows.is_whole and rows.n_rows <= room)

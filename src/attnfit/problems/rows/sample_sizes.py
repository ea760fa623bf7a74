"""How many rows stand for all of them."""

from __future__ import annotations

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

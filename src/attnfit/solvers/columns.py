"""What is said of a fit of many right-hand sides, each with a status of its own."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
# The worst comes first: it is the status of the whole.
RANKING = ("interrupted", "overflow", "false_optimum", "max_iter", "precision", "converged")
REMEDIES = {
    "interrupted": "the fit was interrupted, x is the best point so far",
    "overflow": "the loss overflows; scale the data",
    "false_optimum": "a softmax output has underflowed and its gradient with it, but the loss falls "
    "where it is raised; pass another x0, or add ridge",
    "max_iter": "raise max_iter, or loosen tol",
    "precision": "no further decrease is possible in float64; loosen tol, or add ridge",
}


def overall(status: NDArray[Any]) -> str:
    """Return the worst status."""
    present = set(status.tolist())
    return next(name for name in RANKING if name in present)


def describe(status: NDArray[Any], reached: str, remedies: dict[str, str] = REMEDIES) -> str:
    """Return how many right-hand sides did not converge, the first of them and the remedy."""
    k = len(status)
    every = "the right-hand side" if k == 1 else f"all {k:,} right-hand sides"
    bad = np.flatnonzero(status != "converged")
    if not len(bad):
        return f"converged: {every} ({reached})"
    if k == 1:
        return f"not converged: {remedies[str(status[0])]} ({reached})"
    counts = Counter(status[bad].tolist())
    listed = ", ".join(f"{count:,} {name}" for name, count in counts.most_common())
    first = str(status[bad[0]])
    return (
        f"{len(bad):,} of {k:,} right-hand sides did not converge ({listed}), the first at index {bad[0]}: "
        f"{remedies[first]} ({reached})"
    )

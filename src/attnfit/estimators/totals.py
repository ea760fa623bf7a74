"""What the targets of each group sum to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attnfit.estimators.outside import ROUNDING

# Groups that are named.
EXAMPLES = 3


@dataclass(frozen=True)
class ShareTotals:
    """Groups whose targets do not sum to one; more than one means something else than less.

    Attributes
    ----------
    n_above, n_below : int
    above, below : tuple of (label, float)
        Up to three groups of each kind and their totals, the farthest from one first.
    n_single : int
        Groups of one row, whose share is one whatever the features.
    """

    n_above: int
    n_below: int
    above: tuple[tuple[Any, float], ...]
    below: tuple[tuple[Any, float], ...]
    n_single: int = 0

    @classmethod
    def of(
        cls, totals: NDArray[np.floating[Any]], labels: Sequence[Any] | NDArray[Any], sizes: Any = ()
    ) -> ShareTotals:
        """Tell the groups apart.

        Examples
        --------
        >>> import numpy as np
        >>> ShareTotals.of(np.array([1.0, 1.5, 0.25]), ["a", "b", "c"])
        ShareTotals(n_above=1, n_below=1, above=(('b', 1.5),), below=(('c', 0.25),), n_single=0)
        """
        order = np.argsort(-np.abs(totals - 1.0), kind="stable")
        above = order[totals[order] > 1.0 + ROUNDING]
        below = order[totals[order] < 1.0 - ROUNDING]

        def named(groups: NDArray[np.intp]) -> tuple[tuple[Any, float], ...]:
            return tuple((labels[int(g)], float(totals[g])) for g in groups[:EXAMPLES])

        single = int(np.count_nonzero(np.asarray(sizes) == 1))
        return cls(len(above), len(below), named(above), named(below), single)

    @property
    def n_unbalanced(self) -> int:
        """How many there are."""
        return self.n_above + self.n_below

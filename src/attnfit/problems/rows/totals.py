"""What a read of the data sums up."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from attnfit.losses.segments import Array
from attnfit.problems.rows.stored import StoredProblem


@dataclass
class LongSums:
    """Sums over the pieces of one long group; pieces merge by addition."""

    products: Array
    columns: Array
    extras: Array


@dataclass
class Totals:
    """Value and gradients but for the long groups, whose sums are closed at the end.

    Attributes
    ----------
    origin_gradient : ndarray, shape (d,)
        The gradient at zero, where asked for.
    long : dict of LongSums
        By number of the long group.
    """

    value: float
    gradient: Array
    origin_gradient: Array
    long: dict[int, LongSums] = field(default_factory=dict)

    @classmethod
    def zero(cls, n_unknowns: int) -> Totals:
        """Nothing read yet."""
        return cls(0.0, np.zeros(n_unknowns), np.zeros(n_unknowns))

    def add_piece(self, number: int, products: Array, columns: Array, extras: Array) -> None:
        """Add a piece of a long group."""
        if number not in self.long:
            self.long[number] = LongSums(products, columns, extras)
            return
        sums = self.long[number]
        sums.products = sums.products + products
        sums.columns = sums.columns + columns
        sums.extras = sums.extras + extras

    def close(self, problem: StoredProblem, reference: Array) -> tuple[Array, Array]:
        """Add the long groups; return their states and centres."""
        states = np.zeros((2 if problem.loss.coupled else 0, len(problem.long_groups)))
        centres = np.zeros((len(problem.long_groups), problem.n_unknowns))
        for number, sums in self.long.items():
            constant = problem.constants[problem.long_groups[number]]
            closed = problem.loss.close(list(sums.columns), list(sums.extras), reference[number], constant)
            self.value += float(closed.value)
            self.gradient += np.array(closed.coefficients) @ sums.products
            states[:, number] = closed.state
            centres[number] = closed.centre * sums.products[-1]
        return states, centres

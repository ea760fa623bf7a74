"""What a read of the data sums up."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from attnfit.losses.base import Loss
from attnfit.losses.segments import Array
from attnfit.problems.rows.merging import merged


@dataclass
class LongSums:
    """Sums over the pieces of one long group; pieces merge by addition."""

    products: Array
    columns: Array
    extras: Array

    def merge(self, other: LongSums) -> LongSums:
        """Return the sums over both pieces."""
        return LongSums(
            self.products + other.products, self.columns + other.columns, self.extras + other.extras
        )


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
        self.long[number] = merged(self.long.get(number), LongSums(products, columns, extras))

    def merge(self, other: Totals) -> Totals:
        """Return the sums over both parts of the data."""
        return Totals(
            self.value + other.value,
            self.gradient + other.gradient,
            self.origin_gradient + other.origin_gradient,
            merged(self.long, other.long),
        )

    def close(self, loss: Loss, reference: Array, constants: Array) -> tuple[Array, Array]:
        """Add the long groups; return their states and centres."""
        states = np.zeros((2 if loss.coupled else 0, len(constants)))
        centres = np.zeros((len(constants), len(self.gradient)))
        for number, sums in self.long.items():
            closed = loss.close(list(sums.columns), list(sums.extras), reference[number], constants[number])
            self.value += float(closed.value)
            self.gradient += np.array(closed.coefficients) @ sums.products
            states[:, number] = closed.state
            centres[number] = closed.centre * sums.products[-1]
        return states, centres

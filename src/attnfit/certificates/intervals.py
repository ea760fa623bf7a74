"""Intervals of outputs on a ball, entry by entry."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from attnfit.losses.elementwise import output_range
from attnfit.segments import Array


@dataclass(frozen=True)
class Interval:
    """Entrywise bounds ``low <= . <= high``."""

    low: Array
    high: Array

    def __add__(self, other: Interval) -> Interval:
        return Interval(self.low + other.low, self.high + other.high)

    def __sub__(self, other: Interval) -> Interval:
        return Interval(self.low - other.high, self.high - other.low)

    def __mul__(self, other: Interval) -> Interval:
        products = [x * y for x in (self.low, self.high) for y in (other.low, other.high)]
        return Interval(np.minimum.reduce(products), np.maximum.reduce(products))

    @property
    def magnitude(self) -> Array:
        """Largest absolute value."""
        return np.maximum(-self.low, self.high)

    def deviation(self, centre: Array) -> Array:
        """Largest distance from a value inside."""
        return np.maximum(self.high - centre, centre - self.low)


def output_bounds(h: Array, reach: Array, total: Array) -> tuple[Interval, Interval]:
    """Return bounds of the outputs f and of their logarithms where centred logits move by at most ``reach``.

    The normaliser of centred logits does not fall, by Jensen's inequality, and grows to at most ``total``,
    the group's sum of ``f exp(reach)``.
    """
    logs = Interval(h - reach - np.log(total), np.minimum(0.0, h + reach))
    return Interval(np.exp(h - reach) / total, np.minimum(1.0, np.exp(h + reach))), logs


def unit_outputs(function: Any, z: Array, reach: Array) -> tuple[Interval, Interval]:
    """Return the ranges of u and u' on ``z +- reach``."""
    u_low, u_high, v_low, v_high = output_range(function, z - reach, z + reach)
    return Interval(u_low, u_high), Interval(v_low, v_high)

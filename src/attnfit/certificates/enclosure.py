"""Arrays known to within a radius, with rounding included: midpoint-radius arithmetic.

Every operation returns an enclosure of the exact result for all numbers within the operands' radii,
provided that sums and products round to nearest in IEEE double precision, in any order of summation and
with or without fused multiplication, and that the computed exponential is within 2 units in the last place.
Rump, "Fast and parallel interval arithmetic" (1999), doi:10.1023/A:1022374804152; Higham, "Accuracy and
Stability of Numerical Algorithms" (2002), Section 3.1 for ``gamma_n = n u / (1 - n u)``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from attnfit.losses.segments import Array, Segments

U = 2.0**-53
# Radii are sums of non-negative terms: their own rounding, of so many terms, is less than this.
OUTWARD = 1.0 + 1e-8
MOST_TERMS = 10_000_000
# Roots of squares that underflow.
UNDERFLOW = 1e-153
# Covers what underflows.
TINY = float(np.finfo(np.float64).tiny)


def gamma(n: int) -> float:
    """Return ``n u / (1 - n u)``, the relative error of a product of n roundings."""
    return n * U / (1.0 - n * U)


@dataclass(frozen=True)
class Enclosure:
    """Numbers within ``rad`` of ``mid``, entrywise."""

    mid: Array
    rad: Array

    @classmethod
    def exact(cls, values: Array) -> Enclosure:
        """Return numbers known exactly."""
        return cls(values, np.zeros_like(values))

    @classmethod
    def rounded(cls, mid: Array, rad: Array, units: float = 1.0) -> Enclosure:
        """Return a computed midpoint; the radius grows by its rounding."""
        return cls(mid, (rad + units * U * np.abs(mid)) * OUTWARD + TINY)

    @property
    def size(self) -> Array:
        """Largest absolute value."""
        return (np.abs(self.mid) + self.rad) * OUTWARD

    def __getitem__(self, index: Any) -> Enclosure:
        return Enclosure(self.mid[index], self.rad[index])

    def __add__(self, other: Enclosure) -> Enclosure:
        return self.rounded(self.mid + other.mid, self.rad + other.rad)

    def __neg__(self) -> Enclosure:
        return Enclosure(-self.mid, self.rad)

    def __sub__(self, other: Enclosure) -> Enclosure:
        return self + -other

    def __mul__(self, other: Enclosure) -> Enclosure:
        rad = np.abs(self.mid) * other.rad + self.rad * other.size
        return self.rounded(self.mid * other.mid, rad)

    def __matmul__(self, other: Enclosure) -> Enclosure:
        n = self.mid.shape[-1]
        sizes = np.abs(self.mid)
        rad = sizes @ (other.rad + gamma(n) * np.abs(other.mid)) + self.rad @ other.size
        return self.rounded(self.mid @ other.mid, rad + n * TINY)

    @property
    def T(self) -> Enclosure:
        """The transpose."""
        return Enclosure(self.mid.T, self.rad.T)

    def scaled(self, factor: float) -> Enclosure:
        """Return the product with a power of two: it does not round."""
        return Enclosure(factor * self.mid, abs(factor) * self.rad)

    def reciprocal(self) -> Enclosure:
        """Return one over positive numbers; the radius is infinite where they may not be positive."""
        least = self.mid - self.rad
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            rad = np.where(least > 0.0, self.rad / (self.mid * least), np.inf)
            return self.rounded(1.0 / self.mid, rad, 2.0)

    def exp(self) -> Enclosure:
        """Return the exponential, to 2 units in the last place: four roundings."""
        value = np.exp(self.mid)
        # expm1(r) <= r e^r, and the exponential in it is rounded too.
        return self.rounded(value, value * self.rad * np.exp(self.rad) * OUTWARD, 4.0)

    def log(self) -> Enclosure:
        """Return the logarithm of positive numbers, checked by the exponential of what is computed."""
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            found = np.log(self.mid)
            ratio = self * Enclosure.exact(-found).exp()
            off = np.abs(ratio.mid - 1.0) + ratio.rad + U
            return Enclosure(found, np.where(off < 0.5, off / (1.0 - off) * OUTWARD, np.inf))

    def sums(self, segments: Segments) -> Enclosure:
        """Return the sum over each run of rows."""
        longest = int(segments.sizes.max())
        rad = segments.sum(self.rad) + gamma(longest) * segments.sum(np.abs(self.mid))
        return self.rounded(segments.sum(self.mid), rad)

    def spread(self, segments: Segments) -> Enclosure:
        """Repeat one value a run on its rows."""
        return Enclosure(np.repeat(self.mid, segments.sizes), np.repeat(self.rad, segments.sizes))

    def norm(self) -> float:
        """Return an upper bound of the Euclidean (Frobenius) norm."""
        return float(np.linalg.norm(self.size) * OUTWARD + np.sqrt(self.size.size) * UNDERFLOW)

    def row_norms(self) -> Array:
        """Return an upper bound of the norm of each row."""
        return np.asarray(
            np.linalg.norm(self.size, axis=1) * OUTWARD + np.sqrt(self.size.shape[1]) * UNDERFLOW
        )

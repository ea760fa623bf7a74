"""What the lowest value of a fit of attention outputs means, in words."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

# A residual of this share of |B| is zero; values closer than SAME, relatively, are of one minimum.
EXACT, SAME = 1e-9, 1e-6


class Reached(NamedTuple):
    """The end of a search.

    Attributes
    ----------
    share : float
        The residual as a share of |B|.
    n_equations, n_unknowns : int
    n_starts, n_reached : int
        Starts, and those that reached the lowest value.
    """

    share: float
    n_equations: int
    n_unknowns: int
    n_starts: int
    n_reached: int

    def said(self, simpler: list[Array], B: Array) -> str:
        """Return what the lowest value means, and how much of B it explains.

        Parameters
        ----------
        simpler : list of ndarray, shape (n, k)
            Outputs of uniform attention and an affine map of A1, whose combinations are compared.
        B : ndarray, shape (n, m)
        """
        starts = f"{self.n_starts} start{'s'[: self.n_starts > 1]}"
        if not B.any():
            return "all outputs are zero, so that Y = 0 fits them whatever X is: nothing is known of X"
        if self.share <= EXACT:
            if self.n_equations > self.n_unknowns:
                return (
                    f"exact fit (residual {self.share:.1e} of |B|, {self.n_equations:,} equations for "
                    f"{self.n_unknowns:,} unknowns), found by one of {starts}"
                )
            return (
                f"residual {self.share:.1e} of |B|, but {self.n_equations:,} equations for "
                f"{self.n_unknowns:,} unknowns leave room for other X and Y"
            )
        if self.n_reached > 1:
            said = f"lowest of {starts}, reached {self.n_reached} times"
        else:
            said = (
                f"warning: reached by one of {starts}: a lower one may exist; more starts, several texts or "
                "a causal mask help"
            )
        size, square = float(np.sum(B * B)) or 1.0, self.share**2
        left = []
        for model in simpler:
            rest = B - model @ np.linalg.lstsq(model, B, rcond=None)[0]
            left.append(float(np.sum(rest * rest)) / size)
        shares = [f"{square / one:.1e}" if one > EXACT**2 else "more than all" for one in left]
        return (
            f"{said}; the squared residual is {square:.1e} of |B|^2, {shares[0]} of what uniform attention "
            f"leaves and {shares[1]} of what an affine map of A1 leaves"
        )

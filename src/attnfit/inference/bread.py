"""The inverse information, and which directions the data leave open."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import linalg

from attnfit.segments import Array

# Eigenvalues of the information in units of its diagonal below this share of the largest belong to directions
# that the data leave open, and a unit vector with more than OPEN of its length along them is open itself.
FLAT, OPEN = 1e-10, 1e-5
# A column that keeps less than this share of its square when rows are centred by group has nothing left but
# rounding: sparse rows are centred after squaring.
NOTHING_LEFT = 1e-13


@dataclass(frozen=True)
class Bread:
    """``B = (H + R)^+``, H the information of the data and R the curvature of the penalties.

    Attributes
    ----------
    inverse, information : ndarray, shape (d, d)
        B and H.
    scale : ndarray, shape (d,)
        Units in which H + R has ones on its diagonal.
    null : ndarray, shape (d, k)
        Orthonormal basis, in these units, of the directions that are left open.
    rank : int
        Of the directions that are not.
    """

    inverse: Array
    information: Array
    scale: Array
    null: Array
    rank: int

    @property
    def effective_parameters(self) -> float:
        """``tr(B H)``: the rank without penalties."""
        return float(np.sum(self.inverse * self.information))

    def is_open(self, gradients: Array) -> NDArray[np.bool_]:
        """Return which linear functions of the coefficients, shape (..., d), the data leave open."""
        return leaves_open(gradients, self.scale, self.null)


def leaves_open(gradients: Array, scale: Array, null: Array) -> NDArray[np.bool_]:
    """Return for each gradient q, shape (..., d), whether ``||Z^T D^-1 q|| > 1e-5 ||D^-1 q||``."""
    scaled = gradients / scale
    return np.asarray(np.linalg.norm(scaled @ null, axis=-1) > OPEN * np.linalg.norm(scaled, axis=-1))


def bread_of(information: Array, penalty: Array, sizes: Array) -> Bread:
    """Return the bread; ``sizes`` is the diagonal of the information before rows were centred, shape (d,).

    Notes
    -----
    Of the flat directions the pseudo-inverse, in units of the diagonal, takes none: a linear function of the
    coefficients that is constant along them has the right variance.
    """
    total = information + penalty
    diagonal = np.diag(total)
    squares = np.where(diagonal > NOTHING_LEFT * (sizes + np.diag(penalty)), diagonal, sizes)
    scale = np.sqrt(np.where(squares > 0.0, squares, 1.0))
    values, vectors = linalg.eigh(total / scale / scale[:, None], driver="evd")
    steep = values > FLAT * max(float(values[-1]), np.finfo(float).tiny)
    half = vectors[:, steep] / scale[:, None]
    inverse = (half / values[steep]) @ half.T
    return Bread(inverse, information, scale, vectors[:, ~steep], int(steep.sum()))

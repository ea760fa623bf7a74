"""What the output of an attention layer can tell about its input."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import linalg

from attnfit.inversion.counting import count
from attnfit.objectives.token_problem import TokenProblem

Array = NDArray[np.float64]

# Singular values below this share of the largest are rounding.
RANK_TOLERANCE = 1e-12
# By the sign of equations less unknowns.
COUNTING = {-1: "not isolated", 0: "isolated, often not unique", 1: "isolated and mostly unique"}


@dataclass(frozen=True)
class Identifiability:
    """Counting, and at a point the Jacobian.

    Attributes
    ----------
    n_equations, n_unknowns : int
        Independent numbers in the output that depend on unknown tokens, the rank of the value maps below one
        another to a row, and numbers in these tokens. Columns of the output that are zero, repeated or
        combinations of others do not count.
    value_rank : int
        Rank of the value maps side by side: below d, some directions of a token show in the attention only.
    counting : {"isolated and mostly unique", "isolated, often not unique", "not isolated"}
        For generic weights. More equations than unknowns: in all experiments a zero residual was the input.
        As many: zero residuals are isolated, but others than the input are common. Fewer: a continuum. With a
        mask this holds for every set of unknown tokens and the rows that depend on it: the worst decides.
    singular_values : ndarray, optional
        Of the Jacobian at the point.
    rank : int, optional
    condition : float, optional
        Largest over smallest singular value, infinite where the rank is short.
    directions : ndarray, shape (n_unknowns, k), optional
        Orthonormal directions along which the output does not move, flat, as columns.
    """

    n_equations: int
    n_unknowns: int
    value_rank: int
    counting: str
    singular_values: Array | None = None
    rank: int | None = None
    condition: float | None = None
    directions: Array | None = None


def identifiable(layer: TokenProblem, x: Any = None) -> Identifiability:
    """Say what can be identified: by counting, and given x by the Jacobian there.

    Parameters
    ----------
    layer : LayerInversion or BlockInversion
    x : array_like, in the layer's natural shape, optional

    Returns
    -------
    Identifiability
    """
    counted = count(layer)
    n_equations, n_unknowns = counted.n_equations, counted.n_unknowns
    value_rank = layer.value_rank
    counting = COUNTING[counted.excess]
    if x is None:
        return Identifiability(n_equations, n_unknowns, value_rank, counting)
    J = layer.jacobian(x)
    s = linalg.svdvals(J)
    rank = int(np.sum(s > RANK_TOLERANCE * max(float(s[0]), np.finfo(float).tiny)))
    if rank == n_unknowns:
        flat, condition = np.zeros((n_unknowns, 0)), float(s[0] / s[-1])
    else:
        flat, condition = np.linalg.svd(J, full_matrices=True)[2][rank:].T, np.inf
    return Identifiability(n_equations, n_unknowns, value_rank, counting, s, rank, condition, flat)

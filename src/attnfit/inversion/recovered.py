"""What an output can tell of its input, by counting and by the Jacobian, and what a recovery says of one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import linalg, sparse
from scipy.sparse.csgraph import maximum_flow

from attnfit.certificates import Certificate
from attnfit.objectives.block_problem import BlockInversion
from attnfit.objectives.token_problem import TokenProblem
from attnfit.problems import LayerInversion

Array = NDArray[np.float64]
Seen = NDArray[np.bool_]
AnyInversion = LayerInversion | BlockInversion

# Capacities of scipy's maximum flow are of 32 bits.
LARGEST = 2**31 - 1
# Singular values of a Jacobian below this share of the largest are rounding.
RANK_TOLERANCE = 1e-12
# By the sign of equations less unknowns.
COUNTING = {-1: "not isolated", 0: "isolated, often not unique", 1: "isolated and mostly unique"}
# Numbers that a message lists.
SHOWN = 8


@dataclass(frozen=True)
class Count:
    """Equations against unknowns.

    Attributes
    ----------
    n_equations : int
        Output rows that an unknown token reaches, each distinct one once, times the rank of the value maps
        below one another.
    n_unknowns : int
    excess : {-1, 0, 1}
        Sign of the least ``equations - unknowns`` over all sets of unknown tokens, the others taken as given:
        a mask may leave too few rows for some while there are enough in all.
    """

    n_equations: int
    n_unknowns: int
    excess: int


def count(layer: TokenProblem, x: Any = None, precision: float = 0.0) -> Count:
    """Count the equations of a layer; given a point and the relative error of the output, those that depend
    on a token there by more than such errors can hide.

    Masks tell which rows may depend on a token. Where attention is sharp fewer do: a row with a weight of
    1e-12 on a token says nothing of it. A row that moves by less than the root of the error is not counted:
    at another token weights can be squared, and where a second token makes up for the first, what moves is
    the product of two such shares.
    """
    rank, d, n, u = layer.rank, layer.d, layer.n, len(layer.unknown)
    # A row depends on its keys, and on its query where that has more than one key to choose from.
    mask = np.ones((n, n), dtype=bool) if layer.layer.mask is None else layer.layer.mask
    seen, own = mask.copy(), np.arange(n)
    seen[own, own] |= mask.sum(axis=1) > 1
    if x is not None:
        seen[:, layer.unknown] &= _moved(layer, x, precision)
    # Rows of equal known queries with equal keys say the same.
    known = np.delete(own, layer.unknown)
    alike = np.column_stack([layer.known.T[known], mask[known]])
    first = np.unique(alike, axis=0, return_index=True)[1] if len(known) else known
    kept = np.sort(np.concatenate([layer.unknown, known[first]]))
    seen = seen[np.ix_(kept, layer.unknown)]
    seen = seen[seen.any(axis=1)]
    total = rank * len(seen)
    excess = int(np.sign(total - d * u))
    if not seen.all() and excess >= 0:
        if not _enough(seen, rank, d, strictly=False):
            excess = -1
        elif not _enough(seen, rank, d, strictly=True):
            excess = 0
    return Count(total, layer.n_unknowns, excess)


def _moved(layer: TokenProblem, x: Any, precision: float) -> Seen:
    """Return which rows move with which unknown tokens, shape (n, n_unknown), along a random direction as
    long as the token, to first order.
    """
    at = layer.layer.forward(layer.token_rows(np.asarray(x).reshape(-1)))
    directions = np.random.default_rng(0).standard_normal((len(layer.unknown), layer.d))
    sizes = np.linalg.norm(at.T[layer.unknown], axis=1) / np.sqrt(layer.d)
    enough = np.sqrt(precision / layer.n) * float(np.linalg.norm(layer.B))
    moved = np.empty((layer.n, len(layer.unknown)), dtype=bool)
    for k, position in enumerate(layer.unknown):
        D = np.zeros_like(at.T)
        D[position] = sizes[k] * directions[k]
        moved[:, k] = np.linalg.norm(layer.layer.push_forward(at, D), axis=1) > enough
    return moved


def _enough(seen: Seen, rank: int, d: int, *, strictly: bool) -> bool:
    """Return whether every set of tokens is reached by at least (or by more than) as many equations as it has
    unknowns: by Hall's theorem, whether a flow from tokens through the rows they reach meets all demands.

    More than as many is as many with a demand raised by less than one in all. With capacities scaled by k
    that is one a token, and k need only exceed their number; a smaller k asks for more.
    """
    n_rows, u = seen.shape
    k = min(u + 1, (LARGEST // u - 1) // max(d, rank)) if strictly else 1
    demand = k * d + strictly
    source, sink = 0, 1 + u + n_rows
    token, row = 1 + np.arange(u), 1 + u + np.arange(n_rows)
    at, to = np.nonzero(seen)
    # SciPy 1.14 takes 32-bit numbers only.
    tails = np.concatenate([np.zeros(u, dtype=int), token[to], row]).astype(np.int32)
    heads = np.concatenate([token, row[at], np.full(n_rows, sink)]).astype(np.int32)
    room = np.concatenate([np.full(u, demand), np.full(len(at), demand), np.full(n_rows, k * rank)])
    size = sink + 1
    graph = sparse.csr_array((room.astype(np.int32), (tails, heads)), shape=(size, size))
    return bool(maximum_flow(graph, source, sink).flow_value == demand * u)


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


@dataclass(frozen=True)
class Recovery:
    """What was found; ``print`` it for a sentence.

    Attributes
    ----------
    verdict : {"recovered", "ambiguous", "not recovered"}
        A small residual alone is never called recovery. "recovered": one input with a zero residual was
        found, all directions are identified there, and more independent equations than unknowns depend on
        every set of unknown tokens there, so that another one would be a coincidence; or rows of the
        vocabulary reproduce the output, and no other rows that were tried in the place of one or two of them
        do.
        "ambiguous": several inputs give this output, or nothing speaks against others.
    message : str
        The same as a sentence, with the reason.
    x : ndarray, shape (d, n_unknown)
        The best input: unknown tokens as columns.
    residual : float
        ``||output(x) - B||_F / ||B||_F``. It counts as zero where what is left of it beside `residual_floor`
        is at most the precision.
    inputs : list of ndarray
        The distinct zero-residual inputs found; with a vocabulary at most ten beside x. Where uniform
        attention leaves the order open, the tokens in the order of their rows.
    n_starts : int
        Descents made, or decodings with a vocabulary.
    identifiability : Identifiability
        At x: counting, rank and condition of the Jacobian, directions that the output does not determine.
    residual_floor : float
        The share of ``||B||_F`` that no input produces: the part outside the row space of the value maps
        below one another. It is taken off before the search.
    certificate : Certificate
        The ball around x that holds exactly one stationary point, or why there is none.
    tokens : ndarray of int, shape (n_unknown,), optional
        With a vocabulary: the row of each unknown token.
    margins : ndarray, shape (n_unknown,), optional
        With a vocabulary: the relative residual after the best exchange of that token alone.
    equal_rows : list of ndarray of int, optional
        With a vocabulary: the rows that are equal to that of each unknown token, its own among them. Nothing
        tells these apart, and they count as one token.
    signs : ndarray of int, shape (len(inputs),), optional
        Of blocks with as many equations as unknowns: the sign of the determinant of the Jacobian at each
        input; 0 where it is lost in rounding. A negative one proves that there are other inputs.
    sign_sum : int, optional
        Their sum. Over all inputs it is one: another sum proves that inputs are missing.
    homotopy_steps : int
        Of blocks: points of the paths that were followed where Newton's method stalled, or for other inputs.
    radius : ndarray, shape (n_unknown,), optional
        Of blocks: how far each token can be from that of an exact input, in the 2-norm, for outputs within
        the precision of B; of causal blocks with the tokens before it as found.
    radius_proven : bool
        Whether these are proven up to rounding (Newton-Kantorovich), or estimates to first order.
    """

    verdict: str
    message: str
    x: Array
    residual: float
    inputs: list[Array]
    n_starts: int
    identifiability: Identifiability
    residual_floor: float
    certificate: Certificate
    tokens: NDArray[np.intp] | None = None
    margins: Array | None = None
    equal_rows: list[NDArray[np.intp]] | None = None
    signs: NDArray[np.intp] | None = None
    sign_sum: int | None = None
    homotopy_steps: int = 0
    radius: Array | None = None
    radius_proven: bool = False

    def __str__(self) -> str:
        return self.message


@dataclass(frozen=True)
class Given:
    """What an input is judged by.

    Attributes
    ----------
    layer : LayerInversion or BlockInversion
        With the rows of B projected on what the value maps produce.
    size : float
        ``||B||_F^2`` before; 1 for an output of zero, whose residuals are what they are.
    floor : float
        Share of ``||B||_F`` that the projection takes off.
    precision : float
    enough : float
        Squared residual that counts as zero.
    """

    layer: AnyInversion
    size: float
    floor: float
    precision: float
    enough: float


def listed(numbers: NDArray[np.intp]) -> str:
    """Return numbers as words: 3, 5 and 8."""
    shown = [str(number) for number in numbers[:SHOWN]]
    if len(numbers) > SHOWN:
        shown.append(f"{len(numbers) - SHOWN} more")
    return shown[0] if len(shown) == 1 else f"{', '.join(shown[:-1])} and {shown[-1]}"

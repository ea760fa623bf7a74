"""Which rows play a part in a loss, which of them it holds where they are, and which it lets fall."""

from __future__ import annotations

from enum import Enum
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from attnfit.losses.base import Loss
from attnfit.losses.exponential import PoissonDeviance, SquaredExponential, Total
from attnfit.losses.rescaled import SquaredRescaled
from attnfit.losses.segments import Array
from attnfit.losses.softmax import CrossEntropy, SoftmaxLoss
from attnfit.problems.evaluation import Evaluation
from attnfit.problems.rows.partition import Chunk
from attnfit.problems.rows.stored import StoredProblem

Mask = NDArray[np.bool_]

# Shares above this are held where they are, where the loss itself does not tell.
SHARE = 1e-4
# The logarithm of a share that is zero in float64.
LOG_OF_NOTHING = -800.0
ROUNDING = 8.0 * float(np.finfo(np.float64).eps)


def counting_rows(part: StoredProblem, chunk: Chunk) -> Mask:
    """Return which rows of a chunk play a part in the loss, shape (n_rows,)."""
    _, w, constants = part.targets(chunk)
    segments = chunk.segments
    if part.loss.needs_mass:
        counts = np.asarray(segments.spread(np.asarray(constants > 0.0, dtype=np.float64)) > 0.0)
    elif part.loss.coupled and chunk.long >= 0:
        counts = np.ones(1, dtype=bool)
    else:
        counts = np.asarray(np.asarray(w) > 0.0)
        if part.loss.coupled and not counts.all():
            counts = np.asarray(segments.spread(segments.max(np.asarray(counts, dtype=np.float64))) > 0.0)
    return np.broadcast_to(counts, segments.n_rows)


class Kind(Enum):
    """What a recession direction of a loss proves."""

    # No finite minimum exists.
    EXACT = 1
    # None exists near the point, if the gradient agrees.
    LOCAL = 2
    # All outputs of some groups can go to zero together, and the loss of these groups with them.
    SCALING = 3
    # A finite minimum always exists.
    NONE = 4


def kind_of(loss: Loss) -> Kind:
    """Return what recession directions mean for a loss."""
    if isinstance(loss, CrossEntropy | PoissonDeviance | Total):
        return Kind.EXACT
    if isinstance(loss, SquaredExponential):
        return Kind.EXACT if loss.function == "exp" else Kind.NONE
    if isinstance(loss, SquaredRescaled):
        return Kind.SCALING if loss.function == "exp" else Kind.NONE
    return Kind.LOCAL if isinstance(loss, SoftmaxLoss) else Kind.NONE


class Rows(NamedTuple):
    """The rows of a chunk: which are fixed, which are free, and how large their outputs are."""

    fixed: Mask
    free: Mask
    size: Array


def rows_of(part: StoredProblem, chunk: Chunk, block: Any, at: Evaluation, *, each: bool = True) -> Rows:
    """Tell fixed rows from free ones; where the loss is not convex, rows with a small share are free, with
    ``each`` only if the loss falls as theirs does.
    """
    loss, segments = part.loss, chunk.segments
    b, w, _ = part.targets(chunk)
    z = part.design.product(block, at.x) + part.shift(chunk)
    counts = counting_rows(part, chunk)
    if not loss.coupled:
        fixed = counts & (b > 0.0) if loss.has_target and not isinstance(loss, Total) else counts & False
        return Rows(fixed, counts & ~fixed, np.exp(z - z.max()))
    if kind_of(loss) is Kind.SCALING:
        return Rows(counts & False, counts, np.ones(len(z)))
    state = part.row_state(chunk, z, at)
    f = np.broadcast_to(np.exp(z - state[0]), z.shape)
    if kind_of(loss) is Kind.EXACT:
        fixed = counts & (np.broadcast_to(np.asarray(w), b.shape) * b > 0.0)
    else:
        fixed = f > SHARE
        if each:
            fixed = fixed | ~wants_to_fall(loss, chunk, z, b, w, state)
        fixed = counts & fixed
    return Rows(fixed, counts & ~fixed, f / segments.spread(segments.max(f)))


def wants_to_fall(loss: Any, chunk: Chunk, z: Array, b: Array, w: Any, state: list[Array]) -> Mask:
    """Return for which rows of a softmax the loss would fall as their share goes to zero, to first order and
    up to rounding: ``Phi'(f)_k >= <Phi'(f), f>`` at share zero, shape (n_rows,).
    """
    gamma = np.broadcast_to(state[1], z.shape)
    zero, h = np.zeros_like(z), z - state[0]
    f = np.exp(h)
    terms = chunk.segments.spread(chunk.segments.sum(f * np.abs(loss.p(f, h, b, w))))
    p = loss.p(zero, zero + LOG_OF_NOTHING, b, w)
    return np.asarray(p - gamma >= -ROUNDING * terms - 1e-9 * (np.abs(gamma) + np.abs(p)))

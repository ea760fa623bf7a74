"""The same rows under a convex loss, and from which ridge on an objective over rows is convex."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import linalg

from attnfit.data.inputs import pieces
from attnfit.data.on_disk import Column
from attnfit.losses.elementwise import LeastSquares, PoissonDeviance, SquaredExponential
from attnfit.losses.loss import GroupSizes, Loss
from attnfit.losses.rescaled import SquaredRescaled
from attnfit.losses.softmax import LOSSES, SoftmaxLoss
from attnfit.losses.sums import Composite
from attnfit.objectives.objective import MAX_DENSE
from attnfit.objectives.part import Part, merged
from attnfit.segments import Array, Chunk, Index, Segments

if TYPE_CHECKING:
    from attnfit.objectives.rows import RowProblem


# ---- a convex loss in place of another


def surrogate_rows(rows: Part) -> Part | None:
    """Return the same rows under a convex loss whose minimiser is a good start; None where there is none."""
    segments = Segments(rows.groups.starts, rows.n_rows)
    sizes = np.repeat(segments.sizes, segments.sizes)
    found = surrogate_targets(rows.loss, rows.b, rows.weights, segments, sizes)
    return rows.with_loss(*found) if found is not None and has_weight(found[2]) else None


def has_weight(w: Any) -> bool:
    """Whether any row has a weight: none is left where targets are positive only at weights of zero."""
    return w is None or any(v.any() for _, v in pieces(w))


def surrogate_targets(
    loss: Loss, b: Any, w: Any, segments: Segments, sizes: Array | Index, multiplicity: Array | float = 1.0
) -> tuple[Loss, Any, Any] | None:
    """Return loss, target and weights of the convex surrogate.

    Cross entropy for losses of a softmax with a target, the Poisson likelihood for exp, least squares on the
    inverse function of the target for sinh and cosh (rescaled: of the target times the size of the group).

    Parameters
    ----------
    loss : Loss
    b, w : ndarray or Column, shape (n,)
        Target and weights; these may be None.
    segments : Segments
        The groups of these rows.
    sizes : ndarray, shape (n,)
        The size of each row's whole group.
    multiplicity : ndarray, shape (n,)
        How many rows each one stands for.
    """
    exponential = isinstance(loss, SquaredRescaled) and loss.function == "exp"
    if exponential or (isinstance(loss, SoftmaxLoss | Composite) and loss.has_target):
        b = _positive_part(b)
        if w is not None:
            # Weights that differ within a group would move the minimiser of cross entropy away from f = b.
            mass = segments.sum(multiplicity * np.asarray(b))
            mean = segments.sum(multiplicity * np.asarray(w) * np.asarray(b)) / np.where(mass > 0, mass, 1.0)
            w = segments.spread(mean) + np.zeros(segments.n_rows)
        return (LOSSES["cross_entropy"], b, w) if any(v.any() for _, v in pieces(b)) else None
    if isinstance(loss, SquaredExponential) and loss.function == "exp":
        return PoissonDeviance(), _positive_part(b), w
    if not isinstance(loss, SquaredExponential | SquaredRescaled):
        return None
    b = np.asarray(b)
    unit = np.ones(len(b)) if w is None else np.asarray(w)
    if isinstance(loss, SquaredRescaled):
        b = b * sizes
    # Near the fit an error dz in the logit costs w v^2 dz^2, with v = cosh(z) for sinh and sinh(z) for cosh.
    if loss.function == "sinh":
        return LeastSquares(), np.arcsinh(b), unit * (1.0 + b * b)
    return LeastSquares(), np.arccosh(np.maximum(b, 1.0)), unit * np.maximum(b * b - 1.0, 1e-3)


def _positive_part(b: Any) -> Any:
    return b.mapped(_positive_part) if isinstance(b, Column) else np.maximum(b, 0.0)


# ---- convex from a ridge on


@dataclass
class Curvatures:
    """The largest negative curvature of a group, and what is known of groups in pieces."""

    gram: Any
    squares: float
    largest: float = 0.0
    long: dict[int, Pieces] = field(default_factory=dict)

    def merge(self, other: Curvatures) -> Curvatures:
        """Return what is known of both parts of the data."""
        return Curvatures(
            merged(self.gram, other.gram),
            self.squares + other.squares,
            max(self.largest, other.largest),
            merged(self.long, other.long),
        )


@dataclass(frozen=True)
class Pieces:
    """Sum of ``(w b)^2``, smallest and largest weight and number of rows of the pieces of a group."""

    target: Array
    low: Array
    high: Array
    sizes: Array

    def merge(self, other: Pieces) -> Pieces:
        """Return the same of both pieces."""
        return Pieces(
            self.target + other.target,
            np.minimum(self.low, other.low),
            np.maximum(self.high, other.high),
            self.sizes + other.sizes,
        )

    def group_sizes(self) -> GroupSizes:
        """Return what a loss needs of a whole group."""
        return GroupSizes(np.sqrt(self.target), self.low, self.high, self.sizes)


def convex_from_ridge(problem: RowProblem) -> float:
    """Return a ridge from which on the objective is convex: ``lambda_max(A^T A) max_g kappa_g`` with kappa
    the largest negative curvature that the loss of a group may have in its logits.

    Zero of a convex loss, infinite where no bound is known (of the rescaled losses there is none). One pass.
    """
    loss = problem.loss
    if loss.convex:
        return 0.0
    found: Curvatures = problem.rows.reduce(_curvatures, problem.n_unknowns <= MAX_DENSE)
    bounds = [loss.negative_curvature(p.group_sizes()) for p in found.long.values()]
    largest = max([found.largest, *(float(k.max()) for k in bounds)])
    if not np.isfinite(largest):
        return float("inf")
    # With many unknowns the trace, which is larger.
    top = found.squares if found.gram is None else float(linalg.eigvalsh(found.gram.result())[-1])
    return largest * top


def _curvatures(part: Part, chunks: list[Chunk], dense: bool) -> Curvatures:
    found = Curvatures(part.design.gram() if dense else None, 0.0)
    for chunk in part.prefetch(chunks):
        block, segments = part.fetch(chunk), chunk.segments
        one = np.ones(segments.n_rows)
        if dense:
            found.gram.add(block, one)
        else:
            found.squares += float(part.design.combine(one[None, :], part.design.squares(block)).sum())
        b, w, _ = part.targets(chunk)
        w = w * one
        pieces = Pieces(
            segments.sum((w * b) ** 2), -segments.max(-w), segments.max(w), segments.sizes.astype(np.float64)
        )
        if chunk.long >= 0:
            found.long[chunk.long] = merged(found.long.get(chunk.long), pieces)
        else:
            kappa = part.loss.negative_curvature(pieces.group_sizes())
            found.largest = max(found.largest, float(kappa.max(initial=0.0)))
    return found

"""From which ridge on an objective over rows is convex."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import linalg

from attnfit.data.groups import Chunk
from attnfit.losses.loss import GroupSizes
from attnfit.objectives.objective import MAX_DENSE
from attnfit.objectives.part import Part, merged
from attnfit.segments import Array

if TYPE_CHECKING:
    from attnfit.objectives.rows import RowProblem


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

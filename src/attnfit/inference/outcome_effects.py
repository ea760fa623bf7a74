"""Responses of positive outcomes ``u(z)``: sums over rows, one sweep."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import numpy as np
from scipy import sparse

from attnfit.inference.choice_effects import Rows, Variable, slope_of
from attnfit.losses.elementwise import FUNCTIONS
from attnfit.objectives.objective import Evaluation
from attnfit.objectives.part import Part, merged
from attnfit.segments import Array, Chunk


@dataclass
class OutcomeSums:
    """``S = sum w u`` and ``N = sum w v D u'`` with their gradients, shape (d,), and ``sum w``."""

    total: float
    d_total: Array
    change: float
    d_change: Array
    weight: float

    def merge(self, other: OutcomeSums) -> OutcomeSums:
        """Return the sums over both parts."""
        return OutcomeSums(*(merged(getattr(self, f.name), getattr(other, f.name)) for f in fields(self)))


class OutcomeRows(NamedTuple):
    """One value a row and its gradient, shapes (n,) and (n, d)."""

    values: Array
    gradients: Array


def outcome_sum(
    part: Part, chunks: list[Chunk], at: Evaluation, function: str, variable: Variable
) -> OutcomeSums:
    """Add up outcomes and their responses over some chunks."""
    sums = OutcomeSums(0.0, np.zeros(part.n_unknowns), 0.0, np.zeros(part.n_unknowns), 0.0)
    for chunk in part.prefetch(chunks):
        rows, u, slope, w = _rows(part, chunk, at, function)
        v, D, h = slope_of(rows, variable, at.x)
        v = v if variable.relative else np.ones_like(v)
        sums.weight += float(w.sum())
        sums.total += float(w @ u)
        sums.d_total += (w * slope) @ rows.block
        sums.change += float((w * v * D) @ slope)
        # The second derivative of exp, cosh and sinh is the function itself.
        sums.d_change += (w * v * D * u) @ rows.block + (w * v * slope) @ h
    return sums


def outcome_rows(
    part: Part,
    chunks: list[Chunk],
    at: Evaluation,
    function: str,
    variable: Variable | None,
    kind: str,
) -> OutcomeRows:
    """Return outcomes, or their responses: elasticities ``v D u'/u``, the same without v, or ``D u'``."""
    values, gradients = np.zeros(part.n_rows), np.zeros((part.n_rows, part.n_unknowns))
    for chunk in part.prefetch(chunks):
        rows, u, slope, _ = _rows(part, chunk, at, function)
        if variable is None:
            values[rows.index], gradients[rows.index] = u, slope[:, None] * rows.block
            continue
        v, D, h = slope_of(rows, variable, at.x)
        v = v if kind == "elasticity" else np.ones_like(v)
        relative = kind != "marginal"
        size = slope / u if relative else slope
        change = 1.0 - size**2 if relative else u
        values[rows.index] = v * D * size
        gradients[rows.index] = (v * D * change)[:, None] * rows.block + (v * size)[:, None] * h
    return OutcomeRows(values, gradients)


def _rows(part: Part, chunk: Chunk, at: Evaluation, function: str) -> tuple[Rows, Array, Array, Any]:
    block, z = part.logits(chunk, at.x)
    u, slope = FUNCTIONS[function](z, 0.0)
    w = np.broadcast_to(part.targets(chunk)[1], z.shape)
    index = (
        chunk.index if not isinstance(chunk.index, slice) else np.arange(chunk.index.start, chunk.index.stop)
    )
    dense = np.asarray(block.toarray() if sparse.issparse(block) else block)
    none = np.zeros(0)
    return Rows(index, dense, none, none, np.zeros(0, dtype=np.intp), w, -1), u, slope, w

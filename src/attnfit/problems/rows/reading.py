"""One read of the data: value, gradient and, on request, a Hessian or a sample of rows."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from attnfit.losses.segments import Array
from attnfit.problems.evaluation import Evaluation
from attnfit.problems.rows.draws import Draws
from attnfit.problems.rows.merging import merged
from attnfit.problems.rows.partition import Chunk
from attnfit.problems.rows.stored import StoredProblem
from attnfit.problems.rows.totals import Totals
from attnfit.sketching import RowSampler


@dataclass
class Sums:
    """What one read sums up; sums of parts of the data merge by addition.

    Attributes
    ----------
    weights : ndarray, shape (n_long,)
        Sums of the absolute row weights of the Hessian over each long group.
    scores : float
        Sum of what rows were drawn by.
    """

    totals: Totals
    weights: Array
    gram: Any
    scores: float

    def merge(self, other: Sums) -> Sums:
        """Return the sums over both parts."""
        return Sums(*(merged(getattr(self, f.name), getattr(other, f.name)) for f in fields(self)))


def read(
    problem: StoredProblem,
    x: Array,
    reference: Array,
    near: Evaluation | None,
    sampler: RowSampler | None,
    *,
    origin: bool,
    hessian: bool,
) -> Evaluation:
    """Evaluate at x in one read; ``reference`` holds the predicted normalisers of the long groups."""
    arguments = (
        x,
        reference,
        None if near is None else near.bare(),
        None if sampler is None else problem.share_out(sampler),
        problem.origin_states if origin else None,
        hessian,
    )
    sample = total_hessian = None
    if sampler is None:
        sums: Sums = problem.reduce(_read_part, *arguments)
    else:
        sums, sample = problem.reduce_and_draw(_read_and_draw_part, *arguments)
        sampler.finish(sums.scores)
    totals = sums.totals
    states, centres = totals.close(problem.loss, reference, problem.long_constants)
    value = totals.value + 0.5 * float(np.sum(problem.ridge * x * x))
    gradient = totals.gradient + problem.ridge * x
    value = value if np.isfinite(value) and np.isfinite(gradient).all() else np.inf
    if hessian and (near is None or _trustworthy(reference, near.state, states, sums.weights)):
        total_hessian = sums.gram.result()
        total_hessian[np.diag_indices(problem.n_unknowns)] += problem.ridge
    origin_gradient = totals.origin_gradient if origin else None
    return Evaluation(x, value, gradient, states, centres, origin_gradient, sample, total_hessian)


def _read_part(part: StoredProblem, chunks: list[Chunk], *arguments: Any) -> Sums:
    return _read_and_draw_part(part, chunks, *arguments)[0]


def _read_and_draw_part(
    part: StoredProblem,
    chunks: list[Chunk],
    x: Array,
    reference: Array,
    near: Evaluation | None,
    sampler: RowSampler | None,
    origin_states: Array | None,
    hessian: bool,
) -> tuple[Sums, list[Chunk]]:
    """Read one part of the data; return its sums and the rows drawn from it."""
    sums = Sums(Totals.zero(part.n_unknowns), np.zeros(part.n_long), None, 0.0)
    if sampler is None and not hessian and part.design.storage is not None:
        # Numba takes a third of a second to import.
        from attnfit.problems.rows.fused import sum_up

        # Where a logit is not finite it must be named: the chunks do that.
        totals = sum_up(part, chunks, x, reference, origin_states)
        if totals is not None:
            sums.totals = totals
            return sums, []
    sums.gram = part.design.gram() if hessian else None
    draws = Draws()
    for chunk in part.ahead(chunks):
        block, z = part.logits(chunk, x)
        state = _add_chunk(part, chunk, block, z, reference, origin_states, sums.totals)
        if chunk.long >= 0:
            state = [] if near is None else [reference[chunk.long], *near.state[1:, chunk.long]]
        elif sampler is not None or hessian:
            state = [chunk.segments.spread(s) for s in state]
        if sampler is not None:
            centre = None if near is None or chunk.long < 0 else near.centre[chunk.long]
            sums.scores += draws.visit(sampler, part, chunk, block, z, state, centre)
        if hessian:
            centres = None if near is None else near.centre
            mass = part.add_to_gram(sums.gram, chunk, block, z, state, centres)
            if chunk.long >= 0:
                sums.weights[chunk.long] += mass
    return sums, draws.chunks()


def _add_chunk(
    problem: StoredProblem,
    chunk: Chunk,
    block: Any,
    z: Array,
    reference: Array,
    origin_states: Array | None,
    totals: Totals,
) -> list[Array]:
    """Add a chunk's value and gradients to the totals; return the states of its whole groups."""
    loss = problem.loss
    b, w, constant = problem.targets(chunk)
    state: list[Array] = []
    extras: tuple[Array, ...] = ()
    rows: list[Array]
    if chunk.long >= 0:
        y, v = loss.link(z, reference[chunk.long])
        columns, extras = loss.moments(y, v, b, w, reference[chunk.long], constant)
        rows = list(columns)
    elif loss.coupled:
        value, slope, state = _close_chunk(problem, chunk, z, b, w, constant)
        totals.value += value
        rows = [slope]
    else:
        columns, (terms,) = loss.moments(*loss.link(z, 0.0), b, w, 0.0, 0.0)
        totals.value += float(terms.sum())
        rows = list(columns)
    n_columns = len(rows)
    penalty = problem.row_penalties(chunk)
    if penalty is not None:
        linear = z - problem.shift(chunk)
        totals.value += 0.5 * float(np.sum(penalty * linear * linear))
        rows = [*rows, penalty * linear]
    if origin_states is not None:
        rows = [*rows, problem.origin_slope(chunk, b, w, origin_states)]
    products = problem.design.combine(np.stack(rows), block)
    if chunk.long < 0:
        totals.gradient += products[0]
    else:
        sums = np.array([row.sum() for row in rows[:n_columns]])
        totals.add_piece(chunk.long, products[:n_columns], sums, np.array([e.sum() for e in extras]))
    if penalty is not None:
        totals.gradient += products[n_columns]
    if origin_states is not None:
        totals.origin_gradient += products[-1]
    return state


def _trustworthy(reference: Array, predicted: Array, states: Array, weight: Array) -> bool:
    """Whether the predicted states of long groups weighted the rows of the Hessian to within a few per
    cent.
    """
    if not states.size:
        return True
    close = np.abs(states[0] - reference) <= 0.02
    # An error in gamma adds gamma's error times f, which sums to one, to weights that sum to ``weight`` in
    # absolute value.
    return bool((close & (np.abs(states[1] - predicted[1]) <= 0.05 * weight)).all())


def _close_chunk(
    problem: StoredProblem, chunk: Chunk, z: Array, b: Array, w: Any, constant: Array
) -> tuple[float, Array, list[Array]]:
    """Value, gradient in the logits and group states of a chunk of whole groups."""
    closed, columns = problem.close_groups(chunk, z, b, w, constant)
    slope: Array | None = None
    for coefficient, column in zip(closed.coefficients, columns, strict=True):
        # At an exact normaliser most coefficients are zero or one.
        if not np.any(coefficient):
            continue
        one = np.all(coefficient == 1.0)
        part = column if one else chunk.segments.spread(np.asarray(coefficient)) * column
        slope = part if slope is None else slope + part
    return float(closed.value.sum()), np.zeros_like(z) if slope is None else slope, list(closed.state)

"""One read of the data: value, gradient and, on request, a Hessian or a sample of rows."""

from __future__ import annotations

from typing import Any

import numpy as np

from attnfit.losses.segments import Array
from attnfit.problems.evaluation import Evaluation
from attnfit.problems.rows.draws import Draws
from attnfit.problems.rows.partition import Chunk
from attnfit.problems.rows.stored import StoredProblem
from attnfit.problems.rows.totals import Totals
from attnfit.sketching import RowSampler


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
    origin_states = problem.long_states_without_data() if origin else None
    sample = total_hessian = totals = None
    if sampler is None and not hessian:
        totals = _compiled(problem, x, reference, origin_states)
    if totals is None:
        draws = None if sampler is None else Draws()
        gram = problem.design.gram() if hessian else None
        totals, weight = _by_chunks(problem, x, reference, near, sampler, draws, gram, origin_states)
    states, centres = totals.close(problem, reference)
    value = totals.value + 0.5 * float(np.sum(problem.ridge * x * x))
    gradient = totals.gradient + problem.ridge * x
    if sampler is not None and draws is not None:
        sampler.finish()
        sample = draws.chunks()
    value = value if np.isfinite(value) and np.isfinite(gradient).all() else np.inf
    if hessian and gram is not None and (near is None or _trustworthy(reference, near.state, states, weight)):
        total_hessian = gram.result()
        total_hessian[np.diag_indices(problem.n_unknowns)] += problem.ridge
    origin_gradient = totals.origin_gradient if origin else None
    return Evaluation(x, value, gradient, states, centres, origin_gradient, sample, total_hessian)


def _compiled(
    problem: StoredProblem, x: Array, reference: Array, origin_states: Array | None
) -> Totals | None:
    """Sum up in compiled loops; None where the data are small, or a logit is not finite and must be named."""
    if problem.design.storage is None:
        return None
    # Numba takes a third of a second to import.
    from attnfit.problems.rows.fused import sum_up

    return sum_up(problem, x, reference, origin_states)


def _by_chunks(
    problem: StoredProblem,
    x: Array,
    reference: Array,
    near: Evaluation | None,
    sampler: RowSampler | None,
    draws: Draws | None,
    gram: Any,
    origin_states: Array | None,
) -> tuple[Totals, Array]:
    """Sum up chunk by chunk, with what else is asked for; return also the row weights' sums of the long
    groups.
    """
    totals = Totals.zero(problem.n_unknowns)
    weight = np.zeros(len(problem.long_groups))
    for chunk in problem.chunks:
        block, z = problem.logits(chunk, x)
        state = _add_chunk(problem, chunk, block, z, reference, origin_states, totals)
        if chunk.long >= 0:
            state = [] if near is None else [reference[chunk.long], *near.state[1:, chunk.long]]
        elif sampler is not None or gram is not None:
            state = [chunk.segments.spread(s) for s in state]
        if sampler is not None and draws is not None:
            centre = None if near is None or chunk.long < 0 else near.centre[chunk.long]
            draws.visit(sampler, problem, chunk, block, z, state, centre)
        if gram is not None:
            mass = problem.add_to_gram(gram, chunk, block, z, state, None if near is None else near.centre)
            if chunk.long >= 0:
                weight[chunk.long] += mass
    return totals, weight


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

"""What other reads than the first-order one sum up: curvature, products, scales, scores.

Each function goes over chunks of one part of the data and returns what `merged` adds up over the parts.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from attnfit.data import Design
from attnfit.data.gram import GramParts
from attnfit.data.groups import Chunk
from attnfit.losses.loss import GramTerm
from attnfit.objectives.leverage import Draws, RowSampler
from attnfit.objectives.moves import Moves, counting_rows
from attnfit.objectives.objective import Evaluation
from attnfit.objectives.part import StoredProblem, Totals, merged
from attnfit.segments import Array


def hessian_sum(
    part: StoredProblem, chunks: list[Chunk], at: Evaluation, absolute: bool, gauss_newton: bool
) -> Any:
    """Return the Gram that is the Hessian of the data term."""
    gram = part.design.gram()
    for chunk in part.ahead(chunks):
        block, z = part.logits(chunk, at.x)
        state = part.row_state(chunk, z, at)
        part.add_to_gram(
            gram, chunk, block, z, state, at.centre, absolute=absolute, gauss_newton=gauss_newton
        )
    return gram


def product_sum(
    part: StoredProblem, chunks: list[Chunk], at: Evaluation, v: Array, gauss_newton: bool
) -> Array:
    """Return the Hessian of the data term times v, shape (d,)."""
    out = np.zeros_like(v)
    for chunk in part.ahead(chunks):
        block, z = part.logits(chunk, at.x)
        state = part.row_state(chunk, z, at)
        terms, weights = part.gram_rows(chunk, z, state, gauss_newton=gauss_newton)
        out += chunk_product(part.design, chunk, block, terms, weights, at.centre, v)
    return out


def diagonal_sum(
    part: StoredProblem, chunks: list[Chunk], at: Evaluation
) -> tuple[Array, Array, Array, float]:
    """Return absolutely weighted sums of the squares of rows that are not centred, of the squares of those
    that are, of these rows, and of their weights.
    """
    uncentred, second, first = np.zeros((3, part.n_unknowns))
    total = 0.0
    for chunk in part.ahead(chunks):
        block, z = part.logits(chunk, at.x)
        for t, r, q in part.gram_rows(chunk, z, part.row_state(chunk, z, at))[0]:
            weight = np.abs(t) if r is None else np.abs(t) * r * r
            squares = part.design.combine(weight[None, :], part.design.squares(block))[0]
            if q is None:
                uncentred += squares
            else:
                second += squares
                first += part.design.combine(weight[None, :], block)[0]
                total += float(weight.sum())
    return uncentred, second, first, total


def parts_sum(
    part: StoredProblem, chunks: list[Chunk], at: Evaluation, step: Array, directions: Array
) -> tuple[Moves, GramParts]:
    """Return the move of a step, shape (d,), and the Hessian's diagonal and curvature along directions, shape
    (d, k).
    """
    moves, parts = Moves(np.zeros(1)), GramParts(directions)
    for chunk in part.ahead(chunks):
        block, z = part.logits(chunk, at.x)
        moves.add(part, chunk, block, at, step[:, None])
        part.add_to_gram(parts, chunk, block, z, part.row_state(chunk, z, at), at.centre)
    return moves, parts


def score_sum(part: StoredProblem, chunks: list[Chunk], at: Evaluation, by_group: bool) -> tuple[Any, Array]:
    """Return the Gram of the scores of rows, or of whole groups, and the scores of long groups, shape
    (n_long, d).
    """
    gram = part.design.gram()
    long_scores = np.zeros((part.n_long, part.n_unknowns))
    for chunk in part.ahead(chunks):
        block, z = part.logits(chunk, at.x)
        b, w, _ = part.targets(chunk)
        state = part.row_state(chunk, z, at)
        if not by_group:
            weights = part.loss.gram_terms(z, b, w, state)[1]
            part.add_term(gram, chunk, block, part.loss.score_term(z, b, w, state), weights, at.centre)
            continue
        slope = part.loss.slope(z, b, w, state)
        if chunk.long >= 0:
            long_scores[chunk.long] += part.design.combine(slope[None, :], block)[0]
        else:
            scores = part.design.group_rows(block, slope, chunk.segments.starts)
            gram.add(scores, np.ones(scores.shape[0]))
    return gram, long_scores


def varying_columns(part: StoredProblem, chunks: list[Chunk]) -> Array:
    """Return by a positive number which columns the first rows show to matter, shape (d,)."""
    seen = np.zeros(part.n_unknowns)
    for chunk in chunks[:1]:
        block, segments = part.fetch(chunk), chunk.segments
        own = np.full(segments.n_rows, 1.0)
        seen = part.design.combine(own[None, :], part.design.squares(block))[0]
        if part.loss.shift_invariant:
            mean = own / segments.spread(segments.sizes.astype(np.float64))
            centres = part.design.group_rows(block, mean, segments.starts)
            centres = np.asarray(centres.toarray() if hasattr(centres, "toarray") else centres)
            seen = np.where(seen - segments.sizes @ (centres * centres) > 1e-8 * seen, seen, 0.0)
    return np.asarray(seen > 0.0, dtype=np.float64)


def structure_sum(part: StoredProblem, chunks: list[Chunk], at: Evaluation) -> tuple[Any, Array]:
    """Return the Gram of all rows that play a part, centred by group where the loss ignores what their logits
    have in common, and its diagonal before centring, shape (d,).
    """
    gram, sizes = part.design.gram(), np.zeros(part.n_unknowns)
    for chunk in part.ahead(chunks):
        block, counts = part.fetch(chunk), counting_rows(part, chunk).astype(np.float64)
        sizes += part.design.combine(counts[None, :], part.design.squares(block))[0]
        if not part.loss.shift_invariant:
            part.add_term(gram, chunk, block, GramTerm(counts, None, None), None, None)
            continue
        total = chunk.segments.sum(counts)
        mean = counts / chunk.segments.spread(np.where(total > 0.0, total, 1.0))
        part.add_term(gram, chunk, block, GramTerm(counts, None, 1.0), mean, at.centre)
        penalty = part.row_penalties(chunk)
        if penalty is not None:
            part.add_term(
                gram,
                chunk,
                block,
                GramTerm(np.asarray(penalty > 0.0, dtype=np.float64), None, None),
                None,
                None,
            )
    return gram, sizes


def chunk_product(
    design: Design,
    chunk: Chunk,
    block: Any,
    terms: list[GramTerm],
    weights: Array | None,
    centres: Array,
    v: Array,
) -> Array:
    """Return a chunk's part of the Hessian times v."""
    along = design.product(block, v)
    if chunk.long < 0:
        return np.asarray(design.combine(change_of_slope(chunk, terms, weights, along)[None, :], block)[0])
    rows, beside = np.zeros_like(along), np.zeros_like(v)
    for t, r, q in terms:
        y = along if r is None else r * along
        part = t * y
        if q is not None:
            part -= t * (q * (centres[chunk.long] @ v))
            beside -= centres[chunk.long] * float(np.sum(q * part))
        rows += part if r is None else r * part
    return np.asarray(design.combine(rows[None, :], block)[0] + beside)


def change_of_slope(chunk: Chunk, terms: list[GramTerm], weights: Array | None, along: Array) -> Array:
    """Return the change of the gradient in the logits where these change by ``along``; a chunk of whole
    groups.
    """
    spread, total = chunk.segments.spread, chunk.segments.sum
    rows = np.zeros_like(along)
    for t, r, q in terms:
        y = along if r is None else r * along
        if q is None:
            part = t * y
        else:
            assert weights is not None
            part = t * (y - q * spread(total(weights * along)))
            rows -= weights * spread(total(q * part))
        rows += part if r is None else r * part
    return rows


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
        from attnfit.objectives.compiled import sum_up

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

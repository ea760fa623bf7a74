"""One pass over the data: value, gradient and, on request, a Hessian or a sample of rows; or a Hessian alone.

A group longer than a chunk ends in a later one, so its sums are added up with a predicted normaliser and
finalized at the end: `attnfit.losses.loss` says how.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from attnfit.losses.loss import Loss
from attnfit.losses.sums import Composite
from attnfit.objectives.leverage import Draws, RowSampler
from attnfit.objectives.objective import Evaluation
from attnfit.objectives.part import Part, group_slopes, group_sums, in_runs, merged
from attnfit.segments import Array, Chunk, Segments

if TYPE_CHECKING:
    from attnfit.objectives.rows import RowProblem

# Rows of a group that predict its normaliser to a few per cent.
GUESS_ROWS = 1000


@dataclass
class LongSums:
    """Sums over the pieces of one long group; pieces merge by addition."""

    products: Array
    columns: Array
    extras: Array

    def merge(self, other: LongSums) -> LongSums:
        """Return the sums over both pieces."""
        return LongSums(
            self.products + other.products, self.columns + other.columns, self.extras + other.extras
        )


@dataclass
class Totals:
    """What one pass sums up; totals of parts of the data merge by addition.

    Attributes
    ----------
    value, gradient
        Of the data term and the row penalties, without the long groups, which are finalized at the end.
    gradient_at_zero : ndarray, shape (d,)
        The gradient at x = 0, where asked for.
    long : dict of LongSums
        By number of the long group.
    long_weights : ndarray, shape (n_long,)
        Sums of the absolute row weights of the Hessian over each long group.
    gram : Gram or None
        The Hessian of the data term.
    scores : float
        Sum of what rows were drawn by.
    """

    value: float
    gradient: Array
    gradient_at_zero: Array
    long_weights: Array
    long: dict[int, LongSums] = field(default_factory=dict)
    gram: Any = None
    scores: float = 0.0

    def add_piece(self, number: int, products: Array, columns: Array, extras: Array) -> None:
        """Add a piece of a long group."""
        piece, known = LongSums(products, columns, extras), self.long.get(number)
        self.long[number] = piece if known is None else known.merge(piece)

    def merge(self, other: Totals) -> Totals:
        """Return the sums over both parts of the data."""
        return Totals(
            self.value + other.value,
            self.gradient + other.gradient,
            self.gradient_at_zero + other.gradient_at_zero,
            self.long_weights + other.long_weights,
            merged(self.long, other.long),
            merged(self.gram, other.gram),
            self.scores + other.scores,
        )

    def finalize(self, loss: Loss, reference: Array, constants: Array) -> tuple[Array, Array]:
        """Add the long groups; return their states and centres."""
        states = np.zeros((loss.n_states if loss.coupled else 0, len(constants)))
        centres = np.zeros((len(constants), len(self.gradient)))
        for number, sums in self.long.items():
            closed = loss.finalize(
                list(sums.columns), list(sums.extras), reference[number], constants[number]
            )
            self.value += float(closed.value)
            self.gradient += np.array(closed.coefficients) @ sums.products
            states[:, number] = closed.state
            centres[number] = closed.centre * sums.products[-1]
        return states, centres


# ---- the pass


def read(
    problem: RowProblem,
    x: Array,
    reference: Array,
    near: Evaluation | None,
    sampler: RowSampler | None,
    *,
    at_zero: bool,
    hessian: bool,
) -> Evaluation:
    """Evaluate at x in one pass; ``reference`` holds the predicted normalisers of the long groups."""
    rows, sample, long_states = problem.rows, None, None
    if at_zero:
        # Groups that are not long need none.
        long_states = states_at_zero(problem) if rows.n_long else np.zeros((0, 0))
    if sampler is None:
        work = _read_curvature if hessian else _read_part
        totals, _ = rows.reduce(work, x, reference, near, long_states, hessian)
    else:
        own = rows.share_out(sampler)
        totals, sample = rows.reduce_and_draw(_read_part, x, reference, near, long_states, hessian, own)
        sampler.finish(totals.scores)
    states, centres = totals.finalize(rows.loss, reference, rows.long_constants)
    pull = problem.ridge * x
    value, gradient = totals.value + 0.5 * float(pull @ x), totals.gradient + pull
    value = value if np.isfinite(value) and np.isfinite(gradient).all() else np.inf
    matrix = None
    if hessian and (near is None or _trustworthy(reference, near.state, states, totals.long_weights)):
        matrix = totals.gram.result()
        matrix.flat[:: len(x) + 1] += problem.ridge
    return Evaluation(
        x, value, gradient, states, centres, totals.gradient_at_zero if at_zero else None, sample, matrix
    )


def _read_part(
    part: Part,
    chunks: list[Chunk],
    x: Array,
    reference: Array,
    near: Evaluation | None,
    long_states: Array | None,
    hessian: bool,
    sampler: RowSampler | None = None,
) -> tuple[Totals, list[Chunk]]:
    """Read one part of the data; return its totals and the rows drawn from it."""
    sum_up_run: Any = None
    if part.loss.compiled and part.design.storage is not None:
        # Numba takes a third of a second to import.
        from attnfit.objectives.compiled import sum_up, sum_up_run

        # Where a logit is not finite it must be named: the chunks do that.
        found = None if hessian or sampler is not None else sum_up(part, chunks, x, reference, long_states)
        if found is not None:
            return found, []
    totals = Totals(0.0, np.zeros(part.n_unknowns), np.zeros(part.n_unknowns), np.zeros(part.n_long))
    totals.gram = part.design.gram() if hessian else None
    draws = None if sampler is None else Draws()
    compiled = sum_up_run is not None and not part.design.on_disk
    for chunk in part.prefetch(chunks):
        read = _add_compiled(sum_up_run, part, chunk, x, reference, long_states) if compiled else None
        if read is None:
            block, z = part.logits(chunk, x)
            before = None if long_states is None else part.slope_at_zero(chunk, long_states)
            state = _add_chunk(part, chunk, block, z, reference, before, totals)
        else:
            block, z, state, found = read
            totals = totals.merge(found)
        if sampler is None and not hessian:
            continue
        if chunk.long >= 0:
            state = [] if near is None else [reference[chunk.long], *near.state[1:, chunk.long]]
        else:
            state = list(map(chunk.segments.spread, state))
        if draws is not None and sampler is not None:
            centre = None if near is None or chunk.long < 0 else near.centre[chunk.long]
            totals.scores += draws.visit(sampler, part, chunk, block, z, state, centre)
        if hessian:
            centres = None if near is None else near.centre
            terms, weights = part.gram_rows(chunk, z, state)
            weight = part.add_to_gram(totals.gram, chunk, block, terms, weights, centres)
            if chunk.long >= 0:
                totals.long_weights[chunk.long] += weight
    return totals, [] if draws is None else draws.chunks()


_read_curvature = in_runs(_read_part)


@in_runs
def hessian_sum(part: Part, chunks: list[Chunk], at: Evaluation, absolute: bool, gauss_newton: bool) -> Any:
    """Return the Gram that is the Hessian of the data term."""
    gram = part.design.gram()
    for chunk in part.prefetch(chunks):
        block, z = part.logits(chunk, at.x)
        state = part.row_state(chunk, z, at)
        terms, weights = part.gram_rows(chunk, z, state, gauss_newton=gauss_newton)
        part.add_to_gram(gram, chunk, block, terms, weights, at.centre, absolute=absolute)
    return gram


def _add_compiled(
    sum_up_run: Any, part: Part, chunk: Chunk, x: Array, reference: Array, long_states: Array | None
) -> tuple[Any, Array, list[Array], Totals] | None:
    """Return block and logits of a chunk, the states of its whole groups, and what compiled loops add up;
    None where they do not tell all of these.
    """
    whole = part.loss.coupled and chunk.long < 0
    if not whole:
        block, z = part.logits(chunk, x)
        found = sum_up_run(part, [chunk], x, reference, long_states)
        return None if found is None else (block, z, [], found)
    if isinstance(part.loss, Composite):
        return None
    z, states = np.empty(chunk.segments.n_rows), np.empty((part.loss.n_states, len(chunk.segments)))
    found = sum_up_run(part, [chunk], x, reference, long_states, kept=(z, states))
    return None if found is None else (part.fetch(chunk), z, list(states), found)


def _add_chunk(
    part: Part,
    chunk: Chunk,
    block: Any,
    z: Array,
    reference: Array,
    slope_at_zero: Array | None,
    totals: Totals,
) -> list[Array]:
    """Add a chunk's value and gradients to the totals; return the states of its whole groups."""
    loss, long = part.loss, chunk.long
    state: list[Array] = []
    extras: tuple[Array, ...] = ()
    if loss.coupled and long < 0:
        normalised = loss.normalise(z, chunk.segments)
        closed, columns = group_sums(loss, normalised, chunk.segments, *part.targets(chunk))
        totals.value += float(closed.value.sum())
        rows, state = [group_slopes(closed, columns, chunk.segments)], list(closed.state)
    else:
        b, w, constant = part.targets(chunk)
        shift = reference[long] if long >= 0 else 0.0
        columns, extras = loss.accumulate(
            *loss.transform(z, shift), b, w, shift, constant if long >= 0 else 0.0
        )
        rows = list(columns)
        if long < 0:
            totals.value += float(extras[0].sum())
    n_columns = len(rows)
    if part.penalty is not None:
        penalty, linear = part.penalty[chunk.rows], z - part.shift(chunk)
        totals.value += 0.5 * float(np.sum(penalty * linear * linear))
        rows.append(penalty * linear)
    if slope_at_zero is not None:
        rows.append(slope_at_zero)
    products = part.design.combine(rows[0][None, :] if len(rows) == 1 else np.stack(rows), block)
    if long < 0:
        totals.gradient += products[0]
    else:
        sums = np.array([row.sum() for row in rows[:n_columns]])
        totals.add_piece(long, products[:n_columns], sums, np.array([e.sum() for e in extras]))
    if part.penalty is not None:
        totals.gradient += products[n_columns]
    if slope_at_zero is not None:
        totals.gradient_at_zero += products[-1]
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


# ---- normalisers of long groups, where no evaluation nearby predicts them


@dataclass
class Normalisers:
    """Normalisers of long groups by number, over the rows seen so far."""

    loss: Loss
    found: dict[int, Array] = field(default_factory=dict)

    def add(self, number: int, part: Array) -> None:
        """Add rows of a group."""
        known = self.found.get(number)
        self.found[number] = part if known is None else self.loss.merge_references(known, part)

    def merge(self, other: Normalisers) -> Normalisers:
        """Return the normalisers over the rows of both."""
        both = Normalisers(self.loss, dict(self.found))
        for number, part in other.found.items():
            both.add(number, part)
        return both

    def in_order(self) -> Array:
        """Return them, shape (n_long,)."""
        return np.array([self.found[number][0] for number in range(len(self.found))])


def normaliser_sums(part: Part, chunks: list[Chunk], x: Array | None) -> Normalisers:
    """Return the normalisers at x; at zero, where A is not needed, for None."""
    sums = Normalisers(part.loss)
    long = [chunk for chunk in chunks if chunk.long >= 0]
    for chunk in long if x is None else part.prefetch(long):
        z = np.zeros(chunk.segments.n_rows) + part.shift(chunk) if x is None else part.logits(chunk, x)[1]
        sums.add(chunk.long, part.loss.reference(z, chunk.segments))
    return sums


def guess_normalisers(part: Part, x: Array) -> Array | None:
    """Predict the normalisers of the long groups from rows at equal distances; None where the groups are too
    short for that to save much.

    An error of a few per cent costs no accuracy: it multiplies what cancels by those per cent.
    """
    starts, order, sizes = part.groups.starts, part.groups.order, part.group_sizes()
    if sizes[part.long_groups].min() < 10 * GUESS_ROWS:
        return None
    guesses = []
    for g in part.long_groups:
        step = sizes[g] // GUESS_ROWS
        at = np.arange(starts[g] + step // 2, starts[g] + sizes[g], step)
        segments = Segments(np.zeros(1, dtype=np.intp), len(at))
        chunk = Chunk(at, at if order is None else order[at], segments, slice(g, g + 1))
        found = part.loss.reference(part.logits(chunk, x)[1], segments)
        guesses.append(part.loss.extrapolate(found, sizes[g] / len(at))[0])
    return np.array(guesses)


def states_at_zero(problem: RowProblem) -> Array:
    """Return the states of the long groups at x = 0, shape (n_states, n_long): the target and the offset
    tell, the matrix is not read.
    """
    rows = problem.rows
    if problem.long_states_at_zero is None:
        reference = rows.reduce(normaliser_sums, None).in_order()
        totals: Totals = rows.reduce(_moment_sums, reference)
        problem.long_states_at_zero = totals.finalize(rows.loss, reference, rows.long_constants)[0]
    return problem.long_states_at_zero


def _moment_sums(part: Part, chunks: list[Chunk], reference: Array) -> Totals:
    totals, loss = Totals(0.0, np.zeros(0), np.zeros(0), np.zeros(0)), part.loss
    for chunk in chunks:
        if chunk.long >= 0:
            b, w, constant = part.targets(chunk)
            shift = reference[chunk.long]
            z = np.zeros(chunk.segments.n_rows) + part.shift(chunk)
            columns, extras = loss.accumulate(*loss.transform(z, shift), b, w, shift, constant)
            sums = np.array([column.sum() for column in columns])
            totals.add_piece(chunk.long, np.zeros((len(sums), 0)), sums, np.array([e.sum() for e in extras]))
    return totals


def value_at_zero(part: Part, chunks: list[Chunk]) -> float:
    """Return the loss at x = 0; A is not needed. NaN where a group is longer than a chunk."""
    total, loss = 0.0, part.loss
    for chunk in chunks:
        z = np.zeros(chunk.segments.n_rows) + part.shift(chunk)
        if chunk.long >= 0:
            return np.nan
        if loss.coupled:
            normalised = loss.normalise(z, chunk.segments)
            closed, _ = group_sums(loss, normalised, chunk.segments, *part.targets(chunk))
            total += float(closed.value.sum())
        else:
            b, w, _ = part.targets(chunk)
            total += float(loss.accumulate(*loss.transform(z, 0.0), b, w, 0.0, 0.0)[1][0].sum())
    return total

"""One read of the data: value, gradient and, on request, a sample of rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import sparse

from attnfit.losses.segments import Array, Index, Segments
from attnfit.problems.evaluation import Evaluation
from attnfit.problems.partition import Chunk
from attnfit.problems.stored import StoredProblem
from attnfit.sketching import RowSampler


@dataclass
class _LongSums:
    """Sums over the pieces of one long group; pieces merge by addition."""

    products: Array
    columns: Array
    extras: Array

    def merge(self, other: _LongSums) -> None:
        self.products += other.products
        self.columns += other.columns
        self.extras += other.extras


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
    loss = problem.loss
    value, gradient = 0.0, np.zeros(problem.n_unknowns)
    origin_gradient = np.zeros(problem.n_unknowns) if origin else None
    origin_states = problem.long_states_without_data() if origin else None
    sums: dict[int, _LongSums] = {}
    draws = Draws()
    gram = problem.design.gram() if hessian else None
    weight = np.zeros(len(problem.long_groups))
    for chunk in problem.chunks:
        block, z = problem.logits(chunk, x)
        b, w, constant = problem.targets(chunk)
        if chunk.long < 0:
            total, slope, state = _close_chunk(problem, chunk, z, b, w, constant)
            value += total
            if sampler is not None or gram is not None:
                state = [chunk.segments.spread(s) for s in state]
            rows = [slope]
        else:
            rows, extras = loss.moments(z, b, w, reference[chunk.long], constant)
            state = [] if near is None else [reference[chunk.long], *near.state[1:, chunk.long]]
        n_columns = len(rows)
        penalty = problem.row_penalties(chunk)
        if penalty is not None:
            linear = z - problem.shift(chunk)
            value += 0.5 * float(np.sum(penalty * linear * linear))
            rows = [*rows, penalty * linear]
        if origin_states is not None:
            rows = [*rows, problem.origin_slope(chunk, b, w, origin_states)]
        products = problem.design.combine(np.stack(rows), block)
        if chunk.long < 0:
            gradient += products[0]
        else:
            columns = np.array([row.sum() for row in rows[:n_columns]])
            piece = _LongSums(products[:n_columns], columns, np.array([e.sum() for e in extras]))
            sums[chunk.long].merge(piece) if chunk.long in sums else sums.update({chunk.long: piece})
        if penalty is not None:
            gradient += products[n_columns]
        if origin_gradient is not None:
            origin_gradient += products[-1]
        if sampler is not None:
            centre = None if near is None or chunk.long < 0 else near.centre[chunk.long]
            draws.visit(sampler, problem, chunk, block, z, state, centre)
        if gram is not None:
            mass = problem.add_to_gram(gram, chunk, block, z, state, None if near is None else near.centre)
            if chunk.long >= 0:
                weight[chunk.long] += mass
    long_value, long_gradient, states, centres = _close_long_groups(problem, sums, reference)
    value += long_value
    gradient += long_gradient
    value += 0.5 * float(np.sum(problem.ridge * x * x))
    gradient += problem.ridge * x
    if sampler is not None:
        sampler.finish()
    value = value if np.isfinite(value) and np.isfinite(gradient).all() else np.inf
    total_hessian = None
    if gram is not None and (near is None or _trustworthy(reference, near.state, states, weight)):
        total_hessian = gram.result()
        total_hessian[np.diag_indices(problem.n_unknowns)] += problem.ridge
    sample = None if sampler is None else draws.chunks()
    return Evaluation(x, value, gradient, states, centres, origin_gradient, sample, total_hessian)


def _close_long_groups(
    problem: StoredProblem, sums: dict[int, _LongSums], reference: Array
) -> tuple[float, Array, Array, Array]:
    """Value, gradient, states and centres of the long groups, once all their pieces are summed."""
    value, gradient = 0.0, np.zeros(problem.n_unknowns)
    states = np.zeros((2 if problem.loss.coupled else 0, len(problem.long_groups)))
    centres = np.zeros((len(problem.long_groups), problem.n_unknowns))
    for number, total_sums in sums.items():
        closed = problem.loss.close(
            list(total_sums.columns[:, None]),
            list(total_sums.extras[:, None]),
            reference[[number]],
            problem.constants[problem.long_groups[[number]]],
        )
        value += float(closed.value[0])
        gradient += np.concatenate(closed.coefficients) @ total_sums.products
        states[:, number] = np.concatenate(closed.state)
        if closed.centre is not None:
            centres[number] = closed.centre[0] * total_sums.products[-1]
    return value, gradient, states, centres


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
    segments, loss = chunk.segments, problem.loss
    spread = segments.spread
    normaliser, known = loss.normalise(z, segments)
    columns, extras = loss.moments(z, b, w, spread(normaliser), spread(constant), known)
    if not loss.coupled:
        return float(extras[0].sum()), columns[0], []
    one = np.ones(len(segments))
    sums = [segments.sum(c) if j in loss.exact_sums else one for j, c in enumerate(columns)]
    closed = loss.close(sums, [segments.sum(e) for e in extras], normaliser, constant)
    slope: Array | None = None
    for coefficient, column in zip(closed.coefficients, columns, strict=True):
        # At an exact normaliser most coefficients are zero or one.
        if not coefficient.any():
            continue
        part = column if (coefficient == 1.0).all() else spread(coefficient) * column
        slope = part if slope is None else slope + part
    return float(closed.value.sum()), np.zeros_like(z) if slope is None else slope, closed.state


class Draws:
    """Rows kept by a sampler, gathered into chunks that the second-order formulas read like any other."""

    def __init__(self) -> None:
        self._short: list[tuple[Any, Index, Array, Index, Index]] = []
        self._pieces: dict[int, list[tuple[Any, Index, Array]]] = {}
        self._long_group: dict[int, Any] = {}

    def visit(
        self,
        sampler: RowSampler,
        problem: StoredProblem,
        chunk: Chunk,
        block: Any,
        z: Array,
        state: list[Array],
        centre: Array | None,
    ) -> None:
        """Offer the rows of a chunk to the sampler."""
        assert isinstance(chunk.rows, slice)
        scores = _scores(sampler, problem, chunk, block, z, state, centre)
        first = chunk.rows.start
        whole_groups = problem.loss.coupled and chunk.long < 0
        if whole_groups:
            kept, inverse = sampler.draw(chunk.segments.sum(scores), problem.rows_per_short_group)
        else:
            kept, inverse = sampler.draw(scores)
        if len(kept) == 0:
            return
        if not whole_groups:
            self._pieces.setdefault(chunk.long, []).append((block[kept], kept + first, inverse))
            self._long_group[chunk.long] = chunk.groups
            return
        sizes = chunk.segments.sizes[kept]
        starts = np.cumsum(sizes) - sizes
        inside = np.arange(sizes.sum()) - np.repeat(starts - chunk.segments.starts[kept], sizes)
        assert isinstance(chunk.groups, slice)
        self._short.append(
            (block[inside], inside + first, np.repeat(inverse, sizes), sizes, kept + chunk.groups.start)
        )

    def chunks(self) -> list[Chunk]:
        """Return the sample: one chunk for all whole groups, one for each long group."""
        out = []
        if self._short:
            blocks, rows, inverse, sizes, groups = zip(*self._short, strict=True)
            lengths = np.concatenate(sizes)
            segments = Segments(np.cumsum(lengths) - lengths, int(lengths.sum()))
            index = np.concatenate(rows)
            out.append(
                Chunk(
                    index,
                    index,
                    segments,
                    np.concatenate(groups),
                    -1,
                    _stack(blocks),
                    np.concatenate(inverse),
                )
            )
        for long, pieces in self._pieces.items():
            blocks, rows, inverse = zip(*pieces, strict=True)
            index = np.concatenate(rows)
            segments = Segments(np.zeros(1, dtype=np.intp), len(index))
            out.append(
                Chunk(
                    index,
                    index,
                    segments,
                    self._long_group[long],
                    long,
                    _stack(blocks),
                    np.concatenate(inverse),
                )
            )
        return out


def _scores(
    sampler: RowSampler,
    problem: StoredProblem,
    chunk: Chunk,
    block: Any,
    z: Array,
    state: list[Array],
    centre: Array | None,
) -> Array:
    """Return each row's curvature weight times its approximate leverage."""
    b, w, _ = problem.targets(chunk)
    terms, weights = problem.loss.gram_terms(z, b, w, state)
    penalty = problem.row_penalties(chunk)
    if sampler.has_leverage and terms[0].r is None:
        leverage = sampler.leverage[chunk.rows]
        scores = problem.loss.importance(z, b, w, state) * leverage
        return scores if penalty is None else scores + penalty * leverage
    probe = block @ sampler.sketch
    if centre is not None:
        middle = np.broadcast_to(centre @ sampler.sketch, probe.shape)
    elif weights is not None:
        sums = np.add.reduceat(weights[:, None] * probe, chunk.segments.starts, axis=0)
        middle = np.repeat(sums, chunk.segments.sizes, axis=0)
    scores = np.zeros(len(z))
    for t, r, q in terms:
        rows = probe if r is None else r[:, None] * probe
        if q is not None:
            rows = rows - (q[:, None] if isinstance(q, np.ndarray) else q) * middle
        leverage = np.einsum("ij,ij->i", rows, rows)
        weight = np.abs(t) if len(terms) > 1 else problem.loss.importance(z, b, w, state)
        scores += weight * leverage
    sampler.leverage[chunk.rows] = leverage
    if penalty is not None:
        scores += penalty * np.einsum("ij,ij->i", probe, probe)
    return scores


def _stack(blocks: Any) -> Any:
    return sparse.vstack(blocks, format="csr") if sparse.issparse(blocks[0]) else np.concatenate(blocks)

"""What passes other than the first-order one add up: curvature, products, scales, structure.

Each function goes over chunks of one part of the data and returns what `merged` adds up over the parts.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy import linalg

from attnfit.data import Design
from attnfit.data.gram import GramParts, flatness
from attnfit.losses.loss import GramTerm
from attnfit.objectives.moves import Moves, counting_rows
from attnfit.objectives.objective import Evaluation
from attnfit.objectives.part import Part, in_runs
from attnfit.segments import Array, Chunk


@in_runs
def product_sum(part: Part, chunks: list[Chunk], at: Evaluation, v: Array, gauss_newton: bool) -> Array:
    """Return the Hessian of the data term times v, shape (d,)."""
    out = np.zeros_like(v)
    for chunk in part.prefetch(chunks):
        block, z = part.logits(chunk, at.x)
        state = part.row_state(chunk, z, at)
        terms, weights = part.gram_rows(chunk, z, state, gauss_newton=gauss_newton)
        out += chunk_product(part.design, chunk, block, terms, weights, at.centre, v)
    return out


@in_runs
def diagonal_sum(part: Part, chunks: list[Chunk], at: Evaluation) -> tuple[Array, Array, Array, float]:
    """Return absolutely weighted sums of the squares of rows that are not centred, of the squares of those
    that are, of these rows, and of their weights.
    """
    uncentred, second, first = np.zeros((3, part.n_unknowns))
    total = 0.0
    for chunk in part.prefetch(chunks):
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


@in_runs
def parts_sum(
    part: Part, chunks: list[Chunk], at: Evaluation, step: Array, directions: Array
) -> tuple[Moves, GramParts]:
    """Return the move of a step, shape (d,), and the Hessian's diagonal and curvature along directions, shape
    (d, k).
    """
    moves, parts = Moves(np.zeros(1)), GramParts(directions)
    for chunk in part.prefetch(chunks):
        block, z = part.logits(chunk, at.x)
        moves.add(part, chunk, block, at, step[:, None])
        terms, weights = part.gram_rows(chunk, z, part.row_state(chunk, z, at))
        part.add_to_gram(parts, chunk, block, terms, weights, at.centre)
    return moves, parts


@in_runs
def structure_sum(part: Part, chunks: list[Chunk], at: Evaluation) -> tuple[Any, Array]:
    """Return the Gram of all rows that play a part, centred by group where the loss ignores what their logits
    have in common, and its diagonal before centring, shape (d,).
    """
    gram, sizes = part.design.gram(), np.zeros(part.n_unknowns)
    for chunk in part.prefetch(chunks):
        block, counts = part.fetch(chunk), counting_rows(part, chunk).astype(np.float64)
        sizes += part.design.combine(counts[None, :], part.design.squares(block))[0]
        if not part.loss.shift_invariant:
            part.add_to_gram(gram, chunk, block, [GramTerm(counts, None, None)], None, None)
            continue
        total = chunk.segments.sum(counts)
        mean = counts / chunk.segments.spread(np.where(total > 0.0, total, 1.0))
        part.add_to_gram(gram, chunk, block, [GramTerm(counts, None, 1.0)], mean, at.centre)
        penalty = part.row_penalties(chunk)
        if penalty is not None:
            penalised = GramTerm(np.asarray(penalty > 0.0, dtype=np.float64), None, None)
            part.add_to_gram(gram, chunk, block, [penalised], None, None)
    return gram, sizes


def target_squares(part: Part, chunks: list[Chunk]) -> float:
    """Return ``sum w b^2``; A is not needed."""
    total = 0.0
    for chunk in chunks:
        b, w, _ = part.targets(chunk)
        total += float(np.sum(w * b * b))
    return total


def slope_sizes(part: Part, chunks: list[Chunk], at: Evaluation) -> float:
    """Return the sum of the squares of the terms whose difference is the slope of a row: its output and its
    target, weighted.
    """
    total = 0.0
    for chunk in part.prefetch(chunks):
        _, z = part.logits(chunk, at.x)
        b, w, _ = part.targets(chunk)
        terms = part.loss.importance(z, b, w, part.row_state(chunk, z, at)) + np.abs(w * b)
        total += float(np.sum(terms * terms))
    return total


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


# Two columns of unit length whose difference is shorter are looked at row by row: a Gram, which squares the
# difference, cannot tell one of 1e-8 from rounding.
DOUBTFUL = 1e-3


def doubtful_directions(gram: Array, sizes: Array) -> Array:
    """Return directions, shape (d, k), among which are all that no row sees; none where no eigenvalue of the
    Gram is as small as its rounding. ``sizes`` is its diagonal before its rows were centred.
    """
    squares = np.diag(gram)
    clear = squares > 1e-16 * sizes
    # The own Gram of a column that lost all but 1e-8 of its length by that is no more than rounding.
    unclear = np.flatnonzero(~clear)
    scale = np.sqrt(np.where(clear, squares, np.where(sizes > 0.0, sizes, 1.0)))
    scaled = np.where(np.multiply.outer(clear, clear), gram / scale / scale[:, None], 0.0)
    scaled[unclear, unclear] = 1.0
    values, vectors = linalg.eigh(scaled, driver="evd")
    top = max(float(values[-1]), 1.0)
    chosen = vectors[:, values <= DOUBTFUL**2 * top]
    if not (values <= flatness(len(scale)) * top).any():
        chosen = chosen[:, :0]
    return np.asarray(np.hstack([chosen, np.eye(len(scale))[:, unclear]]) / scale[:, None])


def along_sum(part: Part, chunks: list[Chunk], at: Evaluation, directions: Array) -> tuple[Array, Array]:
    """Return the Gram of what the rows that play a part see of directions (d, k), shape (k, k), relative to
    another row of their group where the loss ignores what they have in common, and the squares of what
    rounding may make of it, shape (k,).
    """
    gram, rounding = np.zeros((directions.shape[1],) * 2), np.zeros(directions.shape[1])
    for chunk in part.prefetch(chunks):
        block, counts = part.fetch(chunk), counting_rows(part, chunk)
        along = np.asarray(block @ directions, dtype=np.float64)
        unit = float(np.finfo(block.dtype if block.dtype.kind == "f" else np.float64).eps)
        terms = unit * np.asarray(abs(block) @ np.abs(directions), dtype=np.float64)
        rounding += np.sum(terms[counts] ** 2, axis=0)
        if part.loss.shift_invariant:
            penalty = part.row_penalties(chunk)
            if penalty is not None:
                penalised = along[np.broadcast_to(penalty > 0.0, len(along))]
                gram += penalised.T @ penalised
            if chunk.long >= 0:
                along -= at.centre[chunk.long] @ directions
            else:
                along -= np.repeat(along[chunk.segments.starts], chunk.segments.sizes, axis=0)
        gram += along[counts].T @ along[counts]
    return gram, rounding


def null_directions(directions: Array, gram: Array, rounding: Array) -> Array:
    """Return an orthonormal basis, shape (d, k), of those combinations of directions that no row sees, given
    what `along_sum` found.
    """
    d, k = directions.shape
    unit = np.sqrt(np.where(rounding > 0.0, rounding, 1.0))
    values, vectors = linalg.eigh(gram / unit / unit[:, None], driver="evd")
    eps = float(np.finfo(np.float64).eps)
    null = values <= max(64.0 * d, 16.0 * k * eps * float(values[-1]))
    return np.asarray(np.linalg.qr(directions / unit @ vectors[:, null])[0])

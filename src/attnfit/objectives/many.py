"""Passes that serve many fits of one problem, which differ in the weights of its units: values, gradients and
Hessians of all of them from one read of the data.

A *unit* is what a fit weights as a whole: a group, a cluster of groups, or a row of a loss without groups.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce, wraps
from itertools import pairwise
from typing import Any

import numpy as np

from attnfit.objectives.objective import Evaluation
from attnfit.objectives.part import Part, group_slopes, group_sums, merged, over_runs
from attnfit.segments import Array, Chunk, Index

# Numbers of rows times fits, or times entries of a Hessian, that are worked on at a time: 1 MB.
ENTRIES = 1 << 17
# Chunks that a thread takes at a time: merging what it returns costs little then.
CHUNKS_A_RUN = 4


def in_threads(work: Callable[..., Any]) -> Callable[..., Any]:
    """Let threads share out the rows in memory of a function that returns what `merged` adds up."""

    @wraps(work)
    def shared_out(part: Part, chunks: list[Chunk], *args: Any) -> Any:
        if part.design.on_disk or len(chunks) < 2:
            return work(part, chunks, *args)
        n_rows = CHUNKS_A_RUN * part.design.block_rows
        return reduce(merged, over_runs(part, chunks, n_rows, lambda own, run: work(own, run, *args)))

    return shared_out


@in_threads
def values_and_gradients(
    part: Part, chunks: list[Chunk], X: Array, W: Array, units: Index
) -> tuple[Array, Array]:
    """Return the data terms of fits at their own points, shape (R,), and their gradients, shape (R, d).

    Parameters
    ----------
    part : Part
        Without groups longer than a chunk.
    chunks : list of Chunk
    X : ndarray, shape (R, d)
    W : ndarray, shape (n_units, R)
    units : ndarray of int
        The unit of each group, or of each row (in group order) where the loss has none.
    """
    values, gradients = np.zeros(len(X)), np.zeros(X.shape)
    for chunk in part.prefetch(chunks):
        block, mine = part.fetch(chunk), W[_units(part, chunk, units)]
        shift = np.reshape(part.shift(chunk), (-1, 1))
        step = max(1, ENTRIES // chunk.segments.n_rows)
        for first in range(0, len(X), step):
            fits = slice(first, first + step)
            losses, slopes = _losses(part, chunk, np.asarray(block @ X[fits].T) + shift)
            w = mine[:, fits]
            values[fits] += np.einsum("gr,gr->r", losses, w)
            slopes *= chunk.segments.spread(w) if part.loss.coupled else w
            gradients[fits] += part.design.combine(slopes.T, block)
    return values, gradients


def _units(part: Part, chunk: Chunk, units: Index) -> Index:
    """Return the units of the groups, or the rows, of a chunk."""
    return units[chunk.groups if part.loss.coupled else chunk.rows]


def _losses(part: Part, chunk: Chunk, z: Array) -> tuple[Array, Array]:
    """Return the loss of each group or row, shape (n_groups, k) or (n_rows, k), and its slopes, shape
    (n_rows, k), for k fits with logits z, shape (n_rows, k).
    """
    loss = part.loss
    b, w, constant = (np.reshape(v, (-1, 1)) for v in part.targets(chunk))
    # A loss of one's own may look for rows by its target: it has the shape of the outputs.
    b, w = np.broadcast_to(b, z.shape), np.broadcast_to(w, z.shape)
    if not loss.coupled:
        columns, extras = loss.accumulate(*loss.transform(z, 0.0), b, w, 0.0, 0.0)
        return extras[0], columns[0]
    sums, columns = group_sums(loss, loss.normalise(z, chunk.segments), chunk.segments, b, w, constant)
    return sums.value, group_slopes(sums, columns, chunk.segments)


@in_threads
def all_at_one_point(
    part: Part, chunks: list[Chunk], at: Evaluation, W: Array, units: Index
) -> tuple[Array, Array, Array]:
    """Return value, shape (R,), gradient, shape (R, d), and Hessian, shape (R, d, d), of every fit at one
    point: each unit's own are formed once, and weighted.
    """
    d, R = part.n_unknowns, W.shape[1]
    values, gradients = np.zeros(R), np.zeros((R, d))
    upper = np.triu_indices(d)
    packed = np.zeros((R, len(upper[0])))
    for chunk in part.prefetch(chunks):
        block, z = part.logits(chunk, at.x)
        mine = W[_units(part, chunk, units)]
        losses, slopes = _losses(part, chunk, z[:, None])
        values += losses[:, 0] @ mine
        rows = _dense(block)
        terms = _terms(part, chunk, rows, z, at)
        starts = chunk.segments.starts if part.loss.coupled else np.arange(len(z))
        for whole, own in _runs(starts, len(z), len(upper[0])):
            first = starts[whole] - own.start
            w = mine[whole].T
            gradients += w @ _sums(slopes[own] * rows[own], first)
            for t, centred in terms:
                c = centred[own]
                products = (t[own, None] * c[:, upper[0]]) * c[:, upper[1]]
                packed += w @ _sums(products, first)
    hessians = np.zeros((R, d, d))
    hessians[:, upper[0], upper[1]] = packed
    hessians[:, upper[1], upper[0]] = packed
    return values, gradients, hessians


@in_threads
def each_at_its_own(part: Part, chunks: list[Chunk], X: Array, W: Array, units: Index) -> Array:
    """Return the Hessian of each fit at its own point, shape (R, d, d)."""
    hessians = np.zeros((len(X), part.n_unknowns, part.n_unknowns))
    for chunk in part.prefetch(chunks):
        block, mine = part.fetch(chunk), W[_units(part, chunk, units)]
        rows, sizes = _dense(block), chunk.segments.sizes
        for r, x in enumerate(X):
            at = Evaluation(x, np.nan, x)
            w = np.repeat(mine[:, r], sizes) if part.loss.coupled else mine[:, r]
            for t, centred in _terms(part, chunk, rows, rows @ x + part.shift(chunk), at):
                hessians[r] += (centred * (t * w)[:, None]).T @ centred
    return hessians


def _dense(block: Any) -> Array:
    return np.asarray(block.toarray() if hasattr(block, "toarray") else block, dtype=np.float64)


def _terms(part: Part, chunk: Chunk, rows: Array, z: Array, at: Evaluation) -> list[tuple[Array, Array]]:
    """Return the weights and the centred rows whose weighted Gram is the Hessian of a chunk's loss."""
    terms, weights = part.gram_rows(chunk, z, part.row_state(chunk, z, at))
    out = []
    for t, r, q in terms:
        centred = rows if r is None else np.reshape(r, (-1, 1)) * rows
        if q is not None:
            assert weights is not None
            means = _sums(weights[:, None] * rows, chunk.segments.starts)
            centred = centred - np.reshape(q, (-1, 1)) * np.repeat(means, chunk.segments.sizes, axis=0)
        out.append((np.broadcast_to(t, z.shape), centred))
    return out


def _sums(rows: Array, starts: Index) -> Array:
    """Return the sum over each run of rows, shape (n_runs, ...)."""
    length, rest = divmod(len(rows), len(starts))
    if rest or not (np.diff(starts) == length).all():
        return np.add.reduceat(rows, starts, axis=0)
    total = rows[::length].copy()
    for k in range(1, length):
        total += rows[k::length]
    return total


def _runs(starts: Index, n: int, width: int) -> list[tuple[slice, slice]]:
    """Cut groups into runs of about `ENTRIES` products; return the groups and the rows of each."""
    wanted = max(1, 8 * ENTRIES // width)
    ends = np.append(starts, n)
    cuts = [0]
    while cuts[-1] < len(starts):
        last = int(np.searchsorted(ends, ends[cuts[-1]] + wanted, side="right")) - 1
        cuts.append(min(max(last, cuts[-1] + 1), len(starts)))
    return [(slice(a, b), slice(int(ends[a]), int(ends[b]))) for a, b in pairwise(cuts)]

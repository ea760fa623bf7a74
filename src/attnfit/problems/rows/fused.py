"""The first-order read in compiled loops: value and gradient, nothing else. Importing this imports Numba."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from threading import Semaphore, local
from typing import Any

import numpy as np
from scipy import sparse

from attnfit.designs.gram import Gram
from attnfit.designs.kernels import STORAGES, block_times_vector, empty_sums
from attnfit.designs.sources.checksum import checksum
from attnfit.designs.threads import available_threads, in_order
from attnfit.losses.base import Loss, Moments
from attnfit.losses.segments import Array
from attnfit.problems.rows.exponential import Exponential
from attnfit.problems.rows.loops import compile_loop, pieces, whole_groups
from attnfit.problems.rows.partition import Chunk, Rows, runs
from attnfit.problems.rows.poisson import Poisson
from attnfit.problems.rows.rescaled import Rescaled
from attnfit.problems.rows.softmax import Softmax
from attnfit.problems.rows.stored import StoredProblem
from attnfit.problems.rows.totals import Totals

NONE = np.zeros(0)


def sum_up(
    problem: StoredProblem,
    chunks: list[Chunk],
    x: Array,
    reference: Array,
    origin_states: Array | None,
) -> Totals | None:
    """Read once; None where a logit is not finite."""
    x = np.ascontiguousarray(x)
    own, may_compute = local(), Semaphore(available_threads())

    def work(run: list[Chunk]) -> Totals | None:
        # A thread computes with what it has just read, while that is in its cache.
        if not hasattr(own, "problem"):
            own.problem = problem.apart()
        own.problem.load(run)
        with may_compute:
            return _sum_up_run(own.problem, run, x, reference, origin_states)

    totals = Totals.zero(problem.n_unknowns)
    for found in in_order(work, runs(chunks, problem.design.thread_rows), problem.n_readers):
        if found is None:
            return None
        totals = totals.merge(found)
    # Threads would lose some of what they count.
    problem.design.rows_read += sum(chunk.segments.n_rows for chunk in chunks)
    return totals


def _sum_up_run(
    problem: StoredProblem,
    span: list[Chunk],
    x: Array,
    reference: Array,
    origin_states: Array | None,
    storage: str | None = None,
) -> Totals | None:
    """Return the totals of a run of chunks; None where a logit is not finite."""
    storage = storage or problem.design.storage
    assert storage is not None
    loss, long, d = problem.loss, span[0].long, problem.n_unknowns
    by_group = loss.coupled and long < 0
    rows = _join([chunk.rows for chunk in span])
    parts = problem.design.parts(_join([chunk.index for chunk in span]))
    vectors = [problem.b[rows]]
    vectors += [NONE if v is None else v[rows] for v in (problem.weights, problem.offset, problem.penalty)]
    beside, origin = NONE, origin_states is not None
    if origin_states is not None and not by_group:
        slopes = [problem.origin_slope(c, *problem.targets(c)[:2], origin_states) for c in span]
        beside = np.concatenate(
            [np.broadcast_to(s, c.segments.n_rows) for s, c in zip(slopes, span, strict=True)]
        )
    groups = _join([chunk.groups for chunk in span])
    constants = problem.constants[groups]
    if by_group:
        first = problem.groups.starts[groups]
        shared: Any = (np.append(first, first[0] + len(vectors[0])) - first[0], constants)
    else:
        shared = (beside, float(reference[long]) if long >= 0 else 0.0, float(constants[0]))
    n_columns, n_extras = _n_moments(loss.moments)
    n_rows_out = 1 if by_group else n_columns + bool(len(vectors[3]))
    out = empty_sums(storage, n_rows_out + origin, d)
    sums = np.zeros(n_columns + n_extras + 2)
    kernel = loop_of(loss, storage, by_group=by_group)
    # Several short groups at a time: one alone ends in loops too short to pay.
    step = STORAGES[storage].step(parts[0]) * (16 if by_group else 1)
    kernel(*parts, x, *vectors, *shared, step, n_columns, out, sums)
    if sums[-1] != 0.0:
        return None
    totals = Totals.zero(d)
    totals.value += float(sums[-2])
    if by_group:
        totals.gradient += out[0]
    elif long >= 0:
        totals.add_piece(long, out[:n_columns], sums[:n_columns], sums[n_columns:-2])
    else:
        totals.value += float(sums[n_columns])
        totals.gradient += out[0]
    if not by_group and n_rows_out > n_columns:
        totals.gradient += out[n_columns]
    if origin:
        totals.origin_gradient += out[-1]
    return totals


def loop_of(loss: Loss, storage: str, *, by_group: bool) -> Any:
    """Return the compiled loop over whole groups, or over other rows, of a loss."""
    n_columns, _ = _n_moments(loss.moments)
    summed = tuple(q in loss.exact_sums for q in range(n_columns))
    template = whole_groups if by_group else pieces
    return compile_loop(template, storage, loss.link, loss.moments, loss.close, loss.logarithmic, summed)


def warm_up(everything: bool = False) -> int:
    """Compile the loops of large fits, and keep them on disk; return how many there are.

    A fit of fewer than 17 million entries needs none of them, and a larger one compiles what it needs, some
    seconds each: this is for images, whose first fit shall not wait.

    Parameters
    ----------
    everything : bool
        All losses and storages: six times as many.

    Examples
    --------
    >>> from attnfit.problems.rows.fused import warm_up
    >>> n_loops = warm_up()  # doctest: +SKIP
    """
    losses = ["squared", "cross_entropy"] + ["kl", "linear_cross_entropy", "entropy"] * everything
    functions = ["exp"] + ["cosh", "sinh"] * everything
    kinds: list[tuple[Any, dict[str, Any]]] = [(Softmax, {"loss": name}) for name in losses]
    kinds += [(kind, {"function": u}) for kind in (Exponential, Rescaled) for u in functions]
    kinds.append((Poisson, {}))
    uncoupled = (Exponential, Poisson)
    n = 0
    rows = np.array([[0.1, 0.2], [0.3, 0.1], [0.2, 0.4], [0.5, 0.1]])
    for kind, options in kinds:
        for matrix, storage in _stored(rows, everything):
            for groups in (None,) if kind in uncoupled else ([0, 0, 1, 1], None):
                arguments = options if kind in uncoupled else options | {"groups": groups}
                problem = kind(matrix, np.full(4, 0.5), **arguments)
                whole = groups is not None or kind in uncoupled
                chunks = problem.chunks if whole else _as_pieces(problem)
                _sum_up_run(problem, chunks, np.zeros(2), np.ones(1), None, storage)
                n += 1
    block_times_vector()(rows, 0, len(rows), np.zeros(2), np.empty(len(rows)))
    gram = Gram(2)
    gram.add(sparse.csr_array(rows), np.ones(len(rows)))
    checksum(rows)
    return n + 3


def _stored(rows: Array, everything: bool) -> Iterator[tuple[Any, str]]:
    """Yield rows in the forms that have loops of their own."""
    yield rows, "rows"
    yield sparse.csr_array(rows), "csr"
    if everything:
        yield np.asfortranarray(rows), "columns"
        yield rows.astype(np.float32), "rows"
        yield np.asfortranarray(rows, dtype=np.float32), "columns"
        yield sparse.csr_array(rows.astype(np.float32)), "csr"


def _as_pieces(problem: StoredProblem) -> list[Chunk]:
    """Return the rows as a piece of a group longer than a block."""
    return [replace(chunk, long=0) for chunk in problem.chunks]


def _join(rows: list[Rows]) -> Rows:
    """Return consecutive slices as one; an index array stands alone."""
    first, last = rows[0], rows[-1]
    return slice(first.start, last.stop) if isinstance(first, slice) and isinstance(last, slice) else first


@cache
def _n_moments(moments: Callable[..., Moments]) -> tuple[int, int]:
    """Return the number of columns and of further sums of a loss."""
    columns, extras = moments(*[np.zeros(1)] * 6)
    return len(columns), len(extras)

"""The first-order pass in compiled loops: value and gradient, nothing else. Importing this imports Numba.

The loops multiply each row, apply the loss to it and add it up while it is in cache. The formulas are the
loss's own: `compile_loop` puts them, and the loops that know the storage, in the place of the names below.

Numba's ``np.exp`` calls the C library for each number: 3 to 11 ns. The one here becomes vector instructions,
right to within one unit in the last place: 1 ns (measured, AVX-512).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from types import FunctionType, ModuleType
from typing import Any
from zlib import crc32

import numba
import numpy as np
from scipy import sparse

from attnfit.data.gram import Gram
from attnfit.data.kernels import OPTIONS, STORAGES, Compiled, U, block_times_vector, empty_sums
from attnfit.data.sources.base import checksum
from attnfit.losses.loss import Accumulated, Loss
from attnfit.losses.sums import Composite
from attnfit.objectives.chained import CHAIN, chain_accumulates, chain_finalizes, inlined
from attnfit.objectives.first_order import Totals
from attnfit.objectives.models import Exponential, Poisson, Rescaled, Softmax
from attnfit.objectives.part import Part, join, over_runs
from attnfit.segments import Array, Chunk

# Adding it rounds to an integer, which is then found in the lower bits.
_SHIFTER = 6755399441055744.0
_SHIFTER_BITS = 0x4338000000000000
_LOG2_E = 1.4426950408889634
# log 2 in two parts, of which the first times any exponent is exact.
_LOG_2_HIGH, _LOG_2_LOW = 6.93147180369123816490e-01, 1.90821492927058770002e-10
# The polynomial that meets exp at the Chebyshev nodes of [-log(2)/2, log(2)/2]: relative error 4e-18.
_C2, _C3, _C4, _C5 = 0.5000000000000019, 0.1666666666666668, 0.04166666666648795, 0.008333333333319589
_C6, _C7, _C8 = 0.0013888888952352863, 0.00019841269890076403, 2.4801485441561313e-05
_C9, _C10, _C11 = 2.755724088722987e-06, 2.763265472252779e-07, 2.5110049204818658e-08
NONE = np.zeros(0)


# Sums in another order would undo the two parts of log 2: the loops around this allow it, this does not.
@numba.njit(error_model="numpy", fastmath={"contract"})
def exp(x):  # type: ignore[no-untyped-def]
    """Return ``e^x`` of a number; 0, infinity and NaN where they are due."""
    x = -750.0 if x < -750.0 else x
    x = 720.0 if x > 720.0 else x
    shifted = x * _LOG2_E + _SHIFTER
    whole = shifted - _SHIFTER
    r = (x - whole * _LOG_2_HIGH) - whole * _LOG_2_LOW
    p = _C8 + r * (_C9 + r * (_C10 + r * _C11))
    p = _C4 + r * (_C5 + r * (_C6 + r * (_C7 + r * p)))
    p = r + r * r * (_C2 + r * (_C3 + r * p))
    # Two factors, because the power of two itself may be out of range where the result is not.
    exponent = np.float64(shifted).view(np.int64) - _SHIFTER_BITS
    half = exponent >> 1
    first = np.int64((half + 1023) << 52).view(np.float64)
    second = np.int64((exponent - half + 1023) << 52).view(np.float64)
    return (first + first * p) * second


# What stands for numpy in the formulas of a loss when they are compiled.
vectorised = ModuleType("vectorised")
vars(vectorised).update({name: getattr(np, name) for name in ("log", "cosh", "sinh")} | {"exp": exp})


matvec: Any = None
rmatvec: Any = None
transform: Any = None
accumulate: Any = None
finalize: Any = None
logarithmic = False
summed: tuple[bool, ...] = ()


@cache
def compile_loop(template: Callable[..., Any], storage: str, *formulas: Any) -> Any:
    """Compile a loop for a storage and the formulas of a loss: ``transform``, ``accumulate``, ``finalize``,
    whether the normaliser is logarithmic, and which columns are to be summed up where it is exact.

    Numba keeps compiled code on disk under a function's name and does not look into the functions it calls:
    the name must tell the formulas. (A closure would be compiled anew in every process.)
    """
    transform, accumulates, finalizes, logarithmic, summed = formulas
    functions = [*STORAGES[storage][:2], transform, *accumulates, *finalizes]
    meanings = [*map(_meaning, (*functions, *CHAIN, exp.py_func))]
    text = repr([*meanings, logarithmic, summed, sorted(OPTIONS["fastmath"])])
    matvec, rmatvec = map(inlined, functions[:2])
    transform, *others = (
        inlined(FunctionType(f.__code__, f.__globals__ | {"np": vectorised})) for f in functions[2:]
    )
    n_parts = len(accumulates)
    compiled = {
        "matvec": matvec,
        "rmatvec": rmatvec,
        "transform": transform,
        "accumulate": chain_accumulates(others[:n_parts]),
        "finalize": chain_finalizes(others[n_parts:], [_n_sums(f) for f in accumulates]),
    }
    scope = template.__globals__ | compiled | {"logarithmic": logarithmic, "summed": summed}
    kernel = FunctionType(template.__code__, scope, template.__name__)
    kernel.__qualname__ = f"{template.__name__}_{storage}_{crc32(text.encode()):08x}"
    kernel.__module__ = template.__module__
    return Compiled(kernel, **OPTIONS)


def _meaning(function: Any) -> tuple[Any, ...]:
    """Return what a compiled function depends on: its code and the numbers that it takes from its module."""
    code = function.__code__
    numbers = [v for v in map(function.__globals__.get, code.co_names) if isinstance(v, int | float)]
    return code.co_code, code.co_consts, code.co_names, numbers


def pieces(  # type: ignore[no-untyped-def]
    data, first_row, x, b, w, offset, penalty, beside, reference, constant, factors, step,
    n_columns, out, sums,
):  # fmt: skip
    """Rows that share no normaliser, or one that was predicted: sum up the columns."""
    n_terms = len(sums) - 2
    z, y, v, weights = np.empty(step), np.empty(step), np.empty(step), np.empty((len(out), step))
    # Summed up row by row of a step, which needs no sums across vectors.
    totals, checks, penalties = np.zeros((n_terms, step)), np.zeros(step), 0.0
    for start in range(0, len(b), step):
        count = min(step, len(b) - start)
        matvec(data, first_row + start, count, x, z)
        # Several short loops, each of which becomes vector instructions.
        for r in range(count):
            checks[r] += 0.0 * z[r]
            y[r], v[r] = transform(z[r] + offset[U(start + r)] if len(offset) else z[r], reference)
        for r in range(count):
            i = U(start + r)
            own = w[i] if len(w) else 1.0
            columns, extras = accumulate(y[r], v[r], b[i], own, reference, constant, factors)
            for q, term in enumerate(columns + extras):
                if q < n_columns:
                    weights[q, r] = term
                totals[q, r] += term
        if len(penalty):
            for r in range(count):
                weights[n_columns, r] = penalty[U(start + r)] * z[r]
                penalties += 0.5 * weights[n_columns, r] * z[r]
        if len(beside):
            weights[len(out) - 1, :count] = beside[start : start + count]
        rmatvec(data, first_row + start, count, weights, out)
    for q in range(n_terms):
        sums[q] = totals[q].sum()
    sums[-2], sums[-1] = penalties, checks.sum()


def whole_groups(  # type: ignore[no-untyped-def]
    data, first_row, x, b, w, offset, penalty, bounds, constants, factors, step, n_columns, out,
    sums, logits, states,
):  # fmt: skip
    """Whole groups: normalise, finalize and add up several at a time while their rows are in cache.

    A second row of ``out`` is for the gradient at zero. What the curvature needs is kept in ``logits`` and
    ``states``, unless they are empty.
    """
    size = step
    for g in range(len(constants)):
        size = max(size, bounds[g + 1] - bounds[g])
    z, t, y, v = np.empty(size), np.empty(size), np.empty(size), np.empty(size)
    # Of the group of each row: the normaliser (at first a guess), its inverse, the constant.
    reference, scale, constant = np.empty(size), np.empty(size), np.empty(size)
    weights, parts = np.empty((len(out), size)), np.empty((len(sums) - 2, size))
    column_sums, extra_sums = sums[:n_columns], sums[n_columns:]
    value, check = 0.0, 0.0
    stop_group = 0
    while stop_group < len(constants):
        first_group, start = stop_group, bounds[stop_group]
        stop_group += 1
        while stop_group < len(constants) and bounds[stop_group + 1] - start <= step:
            stop_group += 1
        count = bounds[stop_group] - start
        matvec(data, first_row + start, count, x, z)
        for r in range(count):
            check += 0.0 * z[r]
        # At x and, where its gradient is wanted too, at zero.
        for place in range(len(out)):
            for r in range(count):
                logit = z[r] if place == 0 else 0.0
                t[r] = logit + offset[U(start + r)] if len(offset) else logit
            for g in range(first_group, stop_group):
                # Any row serves as the shift that keeps exponentials in range, as long as it does.
                first = bounds[g] - start
                for r in range(U(first), U(bounds[g + 1] - start)):
                    reference[r] = t[U(first)] if logarithmic else 0.0
                    constant[r] = constants[g]
            # Loops over all rows, with nothing but formulas in them, become vector instructions.
            for r in range(count):
                y[r], v[r] = transform(t[r], reference[r])
            for g in range(first_group, stop_group):
                begin, end = bounds[g] - start, bounds[g + 1] - start
                total = 0.0
                for r in range(U(begin), U(end)):
                    total += v[r] if logarithmic else y[r]
                if logarithmic:
                    top = t[begin]
                    if not total < 1e300:
                        top, total = t[begin:end].max(), 0.0
                        for r in range(U(begin), U(end)):
                            v[r] = transform(t[r], top)[1]
                            total += v[r]
                    inverse, total = 1.0 / total, top + np.log(total)
                else:
                    inverse = 1.0
                for r in range(U(begin), U(end)):
                    reference[r], scale[r] = total, inverse
            for r in range(count):
                columns, extras = accumulate(
                    t[r] - reference[r] if logarithmic else y[r],
                    v[r] * scale[r],
                    b[U(start + r)],
                    w[U(start + r)] if len(w) else 1.0,
                    reference[r],
                    constant[r],
                    factors,
                )
                for q, term in enumerate(columns + extras):
                    parts[q, r] = term
                weights[place, r] = 0.0
            for g in range(first_group, stop_group):
                begin, end = bounds[g] - start, bounds[g + 1] - start
                # At an exact normaliser most sums of columns are one.
                for q in range(len(parts)):
                    total = 1.0
                    if q >= n_columns or summed[q]:
                        total = 0.0
                        for r in range(U(begin), U(end)):
                            total += parts[q, r]
                    sums[q] = total
                own, coefficients, state = finalize(
                    column_sums, extra_sums, reference[begin], constants[g], factors
                )
                if place == 0:
                    value += own
                    if len(logits):
                        for q, one in enumerate(state):
                            states[q, g] = one
                        for r in range(U(begin), U(end)):
                            logits[U(start + r)] = t[r]
                for q, coefficient in enumerate(coefficients):
                    if coefficient != 0.0:
                        for r in range(U(begin), U(end)):
                            weights[place, r] += coefficient * parts[q, r]
        if len(penalty):
            for r in range(count):
                weights[0, r] += penalty[U(start + r)] * z[r]
                value += 0.5 * penalty[U(start + r)] * z[r] * z[r]
        rmatvec(data, first_row + start, count, weights, out)
    sums[-2], sums[-1] = value, check


def sum_up(
    part: Part,
    chunks: list[Chunk],
    x: Array,
    reference: Array,
    long_states: Array | None,
) -> Totals | None:
    """Read once; None where a logit is not finite."""
    x = np.ascontiguousarray(x)
    totals = Totals(0.0, np.zeros(part.n_unknowns), np.zeros(part.n_unknowns), np.zeros(part.n_long))

    def add_up(own: Part, run: list[Chunk]) -> Totals | None:
        return sum_up_run(own, run, x, reference, long_states)

    for found in over_runs(part, chunks, part.design.thread_rows, add_up):
        if found is None:
            return None
        totals = totals.merge(found)
    part.design.rows_read += sum(chunk.segments.n_rows for chunk in chunks)
    return totals


def sum_up_run(
    part: Part,
    span: list[Chunk],
    x: Array,
    reference: Array,
    long_states: Array | None,
    storage: str | None = None,
    kept: tuple[Array, Array] | None = None,
) -> Totals | None:
    """Return the totals of a run of chunks; None where a logit is not finite.

    The logits of its rows and the states of its whole groups are ``kept``, arrays of shapes (n_rows,) and
    (n_states, n_groups), where they are asked for.
    """
    storage = storage or part.design.storage
    assert storage is not None
    loss, long, d = part.loss, span[0].long, part.n_unknowns
    by_group = loss.coupled and long < 0
    first, last = span[0], span[-1]
    rows = join(first.rows, last.rows)
    parts = part.design.parts(join(first.index, last.index))
    vectors = [part.b[rows]]
    vectors += [NONE if v is None else v[rows] for v in (part.weights, part.offset, part.penalty)]
    beside, at_zero = NONE, long_states is not None
    if long_states is not None and not by_group:
        slopes = [part.slope_at_zero(c, long_states) for c in span]
        beside = np.concatenate(
            [np.broadcast_to(s, c.segments.n_rows) for s, c in zip(slopes, span, strict=True)]
        )
    groups = join(first.groups, last.groups)
    constants = part.constants[groups]
    if by_group:
        starts = part.groups.starts[groups]
        shared: Any = (np.append(starts, starts[0] + len(vectors[0])) - starts[0], constants)
    else:
        shared = (beside, float(reference[long]) if long >= 0 else 0.0, float(constants[0]))
    n_columns, n_extras = _n_sums(loss.accumulate)
    n_rows_out = 1 if by_group else n_columns + bool(len(vectors[3]))
    out = empty_sums(storage, n_rows_out + at_zero, d)
    sums = np.zeros(n_columns + n_extras + 2)
    kernel = loop_of(loss, storage, by_group=by_group)
    # Several short groups at a time: one alone ends in loops too short to pay.
    step = STORAGES[storage].block_rows(parts[0]) * (16 if by_group else 1)
    factors = np.array([c for c, _ in _leaves(loss)])
    keep = (NONE, NONE[:, None]) if kept is None else kept
    kernel(*parts, x, *vectors, *shared, factors, step, n_columns, out, sums, *(keep if by_group else ()))
    if sums[-1] != 0.0:
        return None
    totals = Totals(0.0, np.zeros(d), np.zeros(d), np.zeros(part.n_long))
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
    if at_zero:
        totals.gradient_at_zero += out[-1]
    return totals


def loop_of(loss: Loss, storage: str, *, by_group: bool) -> Any:
    """Return the compiled loop over whole groups, or over other rows, of a loss."""
    n_columns, _ = _n_sums(loss.accumulate)
    leaves = [leaf for _, leaf in _leaves(loss)]
    accumulates, finalizes = (tuple(getattr(f, name) for f in leaves) for name in ("accumulate", "finalize"))
    summed = tuple(q in loss.exact_sums for q in range(n_columns))
    template = whole_groups if by_group else pieces
    return compile_loop(template, storage, loss.transform, accumulates, finalizes, loss.logarithmic, summed)


def _leaves(loss: Loss) -> tuple[tuple[float, Loss], ...]:
    """Return the factor and the loss of each part of a sum, or the loss itself."""
    return loss.leaves if isinstance(loss, Composite) else ((1.0, loss),)


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
    >>> from attnfit.objectives.compiled import warm_up
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
                chunks = problem.rows.chunks if whole else _as_pieces(problem.rows)
                sum_up_run(problem.rows, chunks, np.zeros(2), np.ones(1), None, storage)
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


def _as_pieces(part: Part) -> list[Chunk]:
    """Return the rows as a piece of a group longer than a block."""
    return [replace(chunk, long=0) for chunk in part.chunks]


@cache
def _n_sums(accumulate: Callable[..., Accumulated]) -> tuple[int, int]:
    """Return the number of columns and of further sums of a loss."""
    columns, extras = accumulate(*[np.zeros(1)] * 6)
    return len(columns), len(extras)

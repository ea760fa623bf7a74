"""Loops that multiply each row, apply the loss to it and add it up while it is in cache.

The formulas are the loss's own: `compile_loop` puts them, and the loops that know the storage, in the place
of the names below.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from types import FunctionType
from typing import Any
from zlib import crc32

import numba
import numpy as np

from attnfit.designs.compiling import Compiled
from attnfit.designs.kernels import OPTIONS, STORAGES, U
from attnfit.problems.rows.vector_exp import exp, vectorised

dots: Any = None
add: Any = None
link: Any = None
moments: Any = None
close: Any = None
logarithmic = False
summed: tuple[bool, ...] = ()


@cache
def compile_loop(template: Callable[..., Any], storage: str, *formulas: Any) -> Any:
    """Compile a loop for a storage and the formulas of a loss: ``link``, ``moments``, ``close``, whether the
    normaliser is logarithmic, and which columns are to be summed up where it is exact.

    Numba keeps compiled code on disk under a function's name and does not look into the functions it calls:
    the name must tell the formulas. (A closure would be compiled anew in every process.)
    """
    *functions, logarithmic, summed = [*STORAGES[storage][:2], *formulas]
    text = repr([*map(_meaning, (*functions, exp.py_func)), logarithmic, summed, sorted(OPTIONS["fastmath"])])
    for number, f in enumerate(formulas[:-2], 2):
        functions[number] = FunctionType(f.__code__, f.__globals__ | {"np": vectorised})
    names = ("dots", "add", "link", "moments", "close")
    # With calls, code from the cache of Numba took up to twice as long (measured; why is not known).
    compiled = {
        name: numba.njit(forceinline=True, **OPTIONS)(f) for name, f in zip(names, functions, strict=True)
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
    data, first_row, x, b, w, offset, penalty, beside, reference, constant, step, n_columns, out, sums
):
    """Rows that share no normaliser, or one that was predicted: sum up the moments."""
    n_terms = len(sums) - 2
    z, y, v, weights = np.empty(step), np.empty(step), np.empty(step), np.empty((len(out), step))
    # Summed up row by row of a step, which needs no sums across vectors.
    totals, checks, penalties = np.zeros((n_terms, step)), np.zeros(step), 0.0
    for start in range(0, len(b), step):
        count = min(step, len(b) - start)
        dots(data, first_row + start, count, x, z)
        # Several short loops, each of which becomes vector instructions.
        for r in range(count):
            checks[r] += 0.0 * z[r]
            y[r], v[r] = link(z[r] + offset[U(start + r)] if len(offset) else z[r], reference)
        for r in range(count):
            i = U(start + r)
            columns, extras = moments(y[r], v[r], b[i], w[i] if len(w) else 1.0, reference, constant)
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
        add(data, first_row + start, count, weights, out)
    for q in range(n_terms):
        sums[q] = totals[q].sum()
    sums[-2], sums[-1] = penalties, checks.sum()


def whole_groups(  # type: ignore[no-untyped-def]
    data, first_row, x, b, w, offset, penalty, bounds, constants, step, n_columns, out, sums
):
    """Whole groups: normalise, close and add up several at a time while their rows are in cache.

    A second row of ``out`` is for the gradient at the origin.
    """
    size = step
    for g in range(len(constants)):
        size = max(size, bounds[g + 1] - bounds[g])
    z, t, y, v = np.empty(size), np.empty(size), np.empty(size), np.empty(size)
    # Of the group of each row: the normaliser (at first a guess), its inverse, the constant.
    reference, scale, constant = np.empty(size), np.empty(size), np.empty(size)
    weights, parts = np.empty((len(out), size)), np.empty((len(sums) - 2, size))
    extra_sums = sums[n_columns:]
    value, check = 0.0, 0.0
    stop_group = 0
    while stop_group < len(constants):
        first_group, start = stop_group, bounds[stop_group]
        stop_group += 1
        while stop_group < len(constants) and bounds[stop_group + 1] - start <= step:
            stop_group += 1
        count = bounds[stop_group] - start
        dots(data, first_row + start, count, x, z)
        for r in range(count):
            check += 0.0 * z[r]
        # At x and, where its gradient is wanted too, at the origin.
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
                y[r], v[r] = link(t[r], reference[r])
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
                            v[r] = link(t[r], top)[1]
                            total += v[r]
                    inverse, total = 1.0 / total, top + np.log(total)
                else:
                    inverse = 1.0
                for r in range(U(begin), U(end)):
                    reference[r], scale[r] = total, inverse
            for r in range(count):
                columns, extras = moments(
                    t[r] - reference[r] if logarithmic else y[r],
                    v[r] * scale[r],
                    b[U(start + r)],
                    w[U(start + r)] if len(w) else 1.0,
                    reference[r],
                    constant[r],
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
                closed = close(sums, extra_sums, reference[begin], constants[g])
                if place == 0:
                    value += closed.value
                for q, coefficient in enumerate(closed.coefficients):
                    if coefficient != 0.0:
                        for r in range(U(begin), U(end)):
                            weights[place, r] += coefficient * parts[q, r]
        if len(penalty):
            for r in range(count):
                weights[0, r] += penalty[U(start + r)] * z[r]
                value += 0.5 * penalty[U(start + r)] * z[r] * z[r]
        add(data, first_row + start, count, weights, out)
    sums[-2], sums[-1] = value, check

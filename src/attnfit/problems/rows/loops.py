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

from attnfit.designs.kernels import OPTIONS, STORAGES

dots: Any = None
add: Any = None
link: Any = None
moments: Any = None
close: Any = None
logarithmic = False


@cache
def compile_loop(template: Callable[..., Any], storage: str, *formulas: Any) -> Any:
    """Compile a loop for a storage and the formulas of a loss: ``link``, ``moments``, ``close`` and whether
    the normaliser is logarithmic.

    Numba keeps compiled code on disk under a function's name and does not look into the functions it calls:
    the name must tell the formulas. (A closure would be compiled anew in every process.)
    """
    *functions, logarithmic = [*STORAGES[storage][:2], *formulas]
    text = repr([(f.__code__.co_code, f.__code__.co_consts, f.__code__.co_names) for f in functions])
    names = ("dots", "add", "link", "moments", "close")
    compiled = {name: numba.njit(**OPTIONS)(f) for name, f in zip(names, functions, strict=True)}
    scope = template.__globals__ | compiled | {"logarithmic": logarithmic}
    kernel = FunctionType(template.__code__, scope, template.__name__)
    kernel.__qualname__ = f"{template.__name__}_{storage}_{crc32(text.encode()):08x}"
    kernel.__module__ = template.__module__
    return numba.njit(cache=True, **OPTIONS)(kernel)


def pieces(  # type: ignore[no-untyped-def]
    data, first_row, x, b, w, offset, penalty, beside, reference, constant, step, n_columns, out, sums
):
    """Rows that share no normaliser, or one that was predicted: sum up the moments."""
    z, weights = np.empty(step), np.empty((len(out), step))
    penalties, check = 0.0, 0.0
    for start in range(0, len(b), step):
        stop = min(start + step, len(b))
        dots(data, first_row + start, stop - start, x, z)
        for r in range(stop - start):
            i = start + r
            check += 0.0 * z[r]
            y, v = link(z[r] + offset[i] if len(offset) else z[r], reference)
            columns, extras = moments(y, v, b[i], w[i] if len(w) else 1.0, reference, constant)
            for q, term in enumerate(columns + extras):
                sums[q] += term
            for q, term in enumerate(columns):
                weights[q, r] = term
            if len(penalty):
                weights[n_columns, r] = penalty[i] * z[r]
                penalties += 0.5 * penalty[i] * z[r] * z[r]
            if len(beside):
                weights[-1, r] = beside[i]
        add(data, first_row + start, stop - start, weights, out)
    sums[-2], sums[-1] = penalties, check


def whole_groups(  # type: ignore[no-untyped-def]
    data, first_row, x, b, w, offset, penalty, beside, bounds, constants, step, n_columns, out, sums
):
    """Whole groups: normalise, close and add up each while its rows are in cache."""
    size = step
    for g in range(len(constants)):
        size = max(size, bounds[g + 1] - bounds[g])
    z, t, y, v = np.empty(size), np.empty(size), np.empty(size), np.empty(size)
    weights, parts = np.empty((len(out), size)), np.empty((len(sums), size))
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
            t[r] = z[r] + offset[start + r] if len(offset) else z[r]
        for g in range(first_group, stop_group):
            begin, end = bounds[g] - start, bounds[g + 1] - start
            reference, scale = 0.0, 1.0
            if logarithmic:
                # Any row serves as the shift that keeps exponentials in range, as long as it does.
                top, total = t[begin], 0.0
                for r in range(begin, end):
                    v[r] = link(t[r], top)[1]
                    total += v[r]
                if not total < 1e300:
                    top, total = t[begin:end].max(), 0.0
                    for r in range(begin, end):
                        v[r] = link(t[r], top)[1]
                        total += v[r]
                reference, scale = top + np.log(total), 1.0 / total
            else:
                for r in range(begin, end):
                    y[r], v[r] = link(t[r], 0.0)
                    reference += y[r]
            sums[:] = 0.0
            for r in range(begin, end):
                i = start + r
                argument = t[r] - reference if logarithmic else y[r]
                columns, extras = moments(
                    argument, v[r] * scale, b[i], w[i] if len(w) else 1.0, reference, constants[g]
                )
                for q, term in enumerate(columns + extras):
                    parts[q, r] = term
                    sums[q] += term
            closed = close(sums, extra_sums, reference, constants[g])
            value += closed.value
            for r in range(begin, end):
                slope = 0.0
                for q, coefficient in enumerate(closed.coefficients):
                    slope += coefficient * parts[q, r]
                if len(penalty):
                    slope += penalty[start + r] * z[r]
                    value += 0.5 * penalty[start + r] * z[r] * z[r]
                weights[0, r] = slope
                if len(beside):
                    weights[-1, r] = beside[start + r]
        add(data, first_row + start, count, weights, out)
    sums[-2], sums[-1] = value, check

"""Formulas of the parts of a sum of losses, compiled into one: inlined, one after another.

Importing this imports Numba. ``factors`` are those of the parts, one of any other loss: a loss is
proportional to its weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import FunctionType
from typing import Any

import numba

from attnfit.data.kernels import OPTIONS

# Nobody calls it from Python or C: entries for them would take a tenth of the time to compile.
INLINED = OPTIONS | {"forceinline": True, "no_cpython_wrapper": True, "no_cfunc_wrapper": True}

first: Any = None
rest: Any = None
k = columns_before = extras_before = 0


def inlined(function: Any) -> Any:
    """Compile a function into its callers."""
    # With calls, code from the cache of Numba took up to twice as long (measured; why is not known).
    return numba.njit(**INLINED)(function)


def chain_accumulates(formulas: Sequence[Any]) -> Any:
    """Return ``accumulate`` of a sum, given those of its parts, compiled."""
    return _chained(formulas, _accumulate_one, _accumulate_more, [{}] * len(formulas))


def chain_finalizes(formulas: Sequence[Any], sizes: Sequence[tuple[int, int]]) -> Any:
    """Return what ``finalize`` of a sum says of value, coefficients and state, given those of its parts,
    compiled, and the numbers of columns and further sums of each. The state is that of a loss alone.
    """
    # Without the column that all parts have in common.
    scopes = [{"columns_before": columns - 1, "extras_before": extras} for columns, extras in sizes]
    return _chained(formulas, _finalize_one, _finalize_more, scopes)


def _chained(formulas: Sequence[Any], one: Any, more: Any, scopes: Sequence[dict[str, int]]) -> Any:
    found = None
    for number in range(len(formulas) - 1, -1, -1):
        scope = {"first": formulas[number], "rest": found, "k": number, **scopes[number]}
        found = inlined(FunctionType((one if found is None else more).__code__, scope))
    return found


def _accumulate_one(y, v, b, w, reference, constant, factors):  # type: ignore[no-untyped-def]
    return first(y, v, b, factors[k] * w, reference, factors[k] * constant)


def _accumulate_more(y, v, b, w, reference, constant, factors):  # type: ignore[no-untyped-def]
    own, beside = first(y, v, b, factors[k] * w, reference, factors[k] * constant)
    columns, extras = rest(y, v, b, w, reference, constant, factors)
    return own[:-1] + columns, beside + extras


def _finalize_one(columns, extras, reference, constant, factors):  # type: ignore[no-untyped-def]
    own = first(columns, extras, reference, factors[k] * constant)
    return own.value, own.coefficients, own.state


def _finalize_more(columns, extras, reference, constant, factors):  # type: ignore[no-untyped-def]
    own = first(columns, extras, reference, factors[k] * constant)
    before = columns[columns_before:], extras[extras_before:]
    value, coefficients, state = rest(*before, reference, constant, factors)
    common = (own.coefficients[-1] + coefficients[-1],)
    return own.value + value, own.coefficients[:-1] + coefficients[:-1] + common, state


# What the code of a sum depends on besides the formulas.
CHAIN = (_accumulate_one, _accumulate_more, _finalize_one, _finalize_more)

"""Columns of data frames as formulas take them: numbers, and categories with fixed levels."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from typing import Any

import narwhals as nw
import numpy as np


def require_columns(names: Iterable[str], frame: Any) -> None:
    """Raise KeyError naming the first column that is missing, and the nearest that is there."""
    there = [str(name) for name in frame.columns]
    for name in names:
        if name not in there:
            near = get_close_matches(name, there, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}?" if near else f"the columns are {', '.join(there[:12])}"
            raise KeyError(f"the data have no column {name!r}; {hint}")


def column_kind(series: Any, name: str) -> str:
    """Return ``"number"``, ``"category"`` or ``"bool"``.

    Raises
    ------
    ValueError
        For dates and times, and what is neither a number nor a label.
    """
    dtype = series.dtype
    if dtype.is_temporal():
        raise ValueError(
            f"column {name!r} holds dates; use a number, e.g. data[{name!r}].dt.dayofyear, as a column"
        )
    if dtype == nw.Boolean:
        return "bool"
    if dtype.is_numeric():
        return "number"
    if dtype in (nw.String, nw.Categorical) or isinstance(dtype, nw.Enum):
        return "category"
    known = [value for value in series.to_list() if value is not None and value == value]
    if all(isinstance(value, str) for value in known):
        return "category"
    if all(isinstance(value, bool | np.bool_) for value in known):
        return "bool"
    raise ValueError(f"column {name!r} has type {dtype}: convert it to numbers or text")


def levels_of(series: Any, kind: str) -> list[Any]:
    """Return the levels of a category: in their own order where it has one, else sorted; those without a row
    are left out.
    """
    if kind == "bool":
        return [False, True]
    known = {value for value in series.to_list() if value is not None and value == value}
    ordered = fixed_categories(series)
    return sorted(known) if ordered is None else [level for level in ordered if level in known]


def unused_levels(series: Any) -> list[Any]:
    """Return the categories of a column that no row has."""
    known = set(series.to_list())
    return [level for level in fixed_categories(series) or [] if level not in known]


def fixed_categories(series: Any) -> list[Any] | None:
    """Return the categories of a column whose type has them in an order, None for any other."""
    native = series.to_native()
    if hasattr(native, "cat") and hasattr(native.cat, "categories"):
        return list(native.cat.categories.tolist())
    return list(series.dtype.categories) if isinstance(series.dtype, nw.Enum) else None


def is_missing(series: Any) -> np.ndarray:
    """Return which entries are missing or NaN, shape (n,)."""
    missing = np.asarray(series.is_null().to_numpy(), dtype=bool)
    if series.dtype.is_float():
        missing = missing | np.isnan(np.asarray(series.to_numpy(), dtype=np.float64))
    return missing


def to_pandas(frame: Any, names: Sequence[str], levels: dict[str, list[Any]]) -> Any:
    """Return some columns as a pandas data frame, those with levels as categories.

    Raises
    ------
    ValueError
        Naming column, value and row of a level that the training did not have.
    """
    import pandas as pd

    table = nw.from_native(frame, eager_only=True)
    columns: dict[str, Any] = {}
    for name in names:
        series = table[name]
        if name not in levels:
            columns[name] = np.asarray(series.to_numpy(), dtype=np.float64)
            continue
        values = series.to_list()
        known = levels[name]
        place = {level: k for k, level in enumerate(known)}
        codes = np.array([place.get(_plain(value), -1) for value in values], dtype=np.intp)
        if (codes < 0).any():
            row = int(np.argmax(codes < 0))
            raise ValueError(
                f"column {name!r} has the level {values[row]!r} at row {row}, which the training data did "
                f"not have; known levels are {', '.join(map(repr, known[:12]))}"
            )
        columns[name] = pd.Categorical.from_codes(codes, categories=known)
    return pd.DataFrame(columns, index=range(len(table)))


def require_finite(frame: Any, names: Iterable[str]) -> None:
    """Raise ValueError naming column and row of the first entry that is missing or infinite."""
    table = nw.from_native(frame, eager_only=True)
    for name in names:
        series = table[name]
        bad = is_missing(series)
        if bad.any():
            raise ValueError(
                f"column {name!r} has a missing value at row {int(np.argmax(bad))}; drop or impute such rows"
            )
        if series.dtype.is_float():
            values = np.asarray(series.to_numpy(), dtype=np.float64)
            if np.isinf(values).any():
                raise ValueError(
                    f"column {name!r} is infinite at row {int(np.argmax(np.isinf(values)))}; correct the data"
                )


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else value

"""The arguments of ``from_formula`` as a fit takes them: rows without missing values, target, columns."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import narwhals as nw
import numpy as np
from numpy.typing import NDArray

from attnfit.data.inputs import unlabelled
from attnfit.formulas.design import FormulaDesign, factor_variables, formulaic, learn
from attnfit.formulas.frames import column_kind, is_missing, require_columns, require_finite

Array = NDArray[np.float64]
Missing = Literal["drop", "drop_rows", "raise"]


@dataclass(frozen=True)
class Training:
    """What a formula and a data frame give a fit.

    Attributes
    ----------
    design : FormulaDesign
    matrix : pandas data frame, shape (n, d)
    y : ndarray, shape (n,)
    given : dict
        groups, alternatives, clusters, weights, offset: values of the rows that remain.
    names : dict
        Of those that are columns.
    frame : data frame
        The rows that remain.
    """

    design: FormulaDesign
    matrix: Any
    y: Array
    given: dict[str, Any]
    names: dict[str, str]
    frame: Any


def read_training(
    formula: str,
    data: Any,
    given: dict[str, Any],
    missing: Missing,
    *,
    constants: bool,
    context: Mapping[str, Any],
) -> Training:
    """Return what a fit takes.

    Raises
    ------
    KeyError
        If a column is missing; the nearest name is told.
    ValueError
        For infinite entries, dates, duplicated alternatives, or a target that cannot be read.
    """
    if missing not in ("drop", "drop_rows", "raise"):
        raise ValueError(f"missing must be 'drop', 'drop_rows' or 'raise', not {missing!r}")
    if not nw.dependencies.is_into_dataframe(data):
        raise ValueError("data must be a data frame of pandas or polars")
    left, tilde, right = formula.partition("~")
    left, right = left.strip(), right.strip()
    if not tilde or not left or not right:
        raise ValueError(f"formula {formula!r} must read 'target ~ terms'")
    names = {key: value for key, value in given.items() if isinstance(value, str)}
    require_columns(names.values(), data)
    table = nw.from_native(data, eager_only=True)
    n = len(table)
    values = {key: _column(key, value, table, n) for key, value in given.items() if value is not None}
    package = formulaic()
    target = left.strip("`")
    whole = target in table.columns
    sides = [right] if whole else [right, f"0 + {left}"]
    used = set().union(*(factor_variables(f) for s in sides for t in package.Formula(s) for f in t.factors))
    used = {name for name in used if name in table.columns or name not in context}
    used |= {target} if whole else set()
    require_columns(sorted(used), data)
    kept = _complete(table, sorted(used), values, names, missing)
    if not kept.any():
        raise ValueError("no row is left without missing values")
    if not kept.all():
        table = table.filter(kept.tolist())
        values = {key: value[kept] for key, value in values.items()}
    frame = table.to_native()
    require_finite(frame, sorted(name for name in used if column_kind(table[name], name) == "number"))
    groups = values.get("groups")
    numbers = None if groups is None else np.unique(groups, return_inverse=True)[1]
    alternatives = values.get("alternatives")
    if alternatives is not None and numbers is not None:
        _refuse_duplicates(numbers, alternatives)
    if whole:
        y = _target(table[target], target, alternatives, numbers)
    else:
        found = package.model_matrix(f"0 + {left}", table.to_pandas(), context=dict(context))
        if found.shape[1] != 1:
            raise ValueError(f"{left!r} gives {found.shape[1]} columns; the target is one")
        y = np.asarray(found, dtype=np.float64)[:, 0]
    design, matrix = learn(right, frame, numbers, constants=constants, context=context)
    _note_never_chosen(design, table, y)
    index = getattr(frame, "index", None)
    if index is not None:
        matrix.index = index
    return Training(design, matrix, y, values, names, frame)


def _column(key: str, value: Any, table: Any, n: int) -> NDArray[Any]:
    if isinstance(value, list | tuple) and value and all(isinstance(name, str) for name in value):
        # Two sets of clusters by name.
        require_columns(value, table)
        return np.column_stack([table[name].to_numpy().astype(object) for name in value])
    array = np.asarray(table[value].to_numpy() if isinstance(value, str) else value)
    if len(array) != n:
        raise ValueError(f"{key} has {len(array)} entries but the data have {n} rows; pass one a row")
    if isinstance(value, str) and key in ("weights", "offset"):
        return np.asarray(array, dtype=np.float64)
    return array


def _complete(
    table: Any, used: list[str], values: dict[str, Any], names: dict[str, str], missing: str
) -> NDArray[np.bool_]:
    """Return which rows stay; warn once about those that do not."""
    bad = np.zeros(len(table), dtype=bool)
    where = []
    for name in dict.fromkeys([*used, *names.values()]):
        gone = is_missing(table[name])
        if gone.any():
            where.append(name)
            bad |= gone
    if not bad.any():
        return ~bad
    if missing == "raise":
        raise ValueError(
            f"column {where[0]!r} has a missing value at row {int(np.argmax(bad))}; missing='drop' leaves "
            "out what lacks values"
        )
    n_bad, told = int(bad.sum()), f"{int(bad.sum())} rows"
    groups = values.get("groups")
    if missing == "drop" and groups is not None:
        # Without one of its alternatives a group is another choice set.
        lacking = np.zeros(len(groups), dtype=bool)
        lacking[unlabelled(groups)] = True
        numbers = np.unique(np.where(lacking, "", groups.astype(str)), return_inverse=True)[1]
        hit = np.unique(numbers[bad & ~lacking])
        bad = bad | np.isin(numbers, hit)
        told = f"{int(bad.sum())} rows in {len(hit)} groups ({n_bad} of them have missing values)"
    warnings.warn(f"left out {told}: missing values in {', '.join(where)}", UserWarning, stacklevel=5)
    return ~bad


def _target(series: Any, name: str, alternatives: Any, groups: Any) -> Array:
    kind = column_kind(series, name)
    values = np.asarray(series.to_list(), dtype=object if kind == "category" else None)
    if kind == "number":
        numbers = np.asarray(values, dtype=np.float64)
        if alternatives is None or groups is None or alternatives.dtype.kind not in "iuf":
            return numbers
        of_group = np.zeros(int(groups.max()) + 1)
        of_group[groups] = numbers
        codes = set(alternatives.tolist())
        is_code = (of_group[groups] == numbers).all() and set(numbers.tolist()) <= codes
        if not is_code or set(numbers.tolist()) <= {0.0, 1.0}:
            return numbers
        return np.asarray(numbers == alternatives, dtype=np.float64)
    if kind == "bool":
        return values.astype(np.float64)
    if alternatives is None:
        raise ValueError(
            f"{name} is text: pass alternatives= where it is the label of the chosen alternative, or "
            f"numbers, e.g. (data[{name!r}] == {values[0]!r}) * 1"
        )
    known = set(map(str, alternatives.tolist()))
    other = [value for value in values.tolist() if str(value) not in known]
    if other:
        raise ValueError(
            f"{name} has the value {other[0]!r}, which is no alternative ({', '.join(sorted(known)[:8])}); "
            f"write (data[{name!r}] == {other[0]!r}) * 1 for a yes or no"
        )
    return np.array([float(str(v) == str(a)) for v, a in zip(values, alternatives, strict=True)])


def _refuse_duplicates(groups: NDArray[np.intp], alternatives: Any) -> None:
    numbers = np.unique(np.asarray(alternatives).astype(str), return_inverse=True)[1]
    pairs = groups * (int(numbers.max()) + 1) + numbers
    n = len(pairs) - len(np.unique(pairs))
    if n:
        first, counts = np.unique(pairs, return_counts=True)
        row = int(np.argmax(pairs == first[np.argmax(counts > 1)]))
        raise ValueError(
            f"{n} rows repeat an alternative of their group, first {alternatives[row]!r} of the group of row "
            f"{row}; after a join? Drop duplicates, or leave alternatives out"
        )


def _note_never_chosen(design: FormulaDesign, table: Any, y: Array) -> None:
    for name, known in design.levels.items():
        values = np.array(table[name].to_list(), dtype=object)
        for level in known:
            rows = values == level
            if rows.any() and not y[rows].any():
                design.notes.append(f"{name}: {level} is never chosen, its constant has no finite value")

"""Absorbed effects in a model file: labels as they were, values beside them."""

from __future__ import annotations

from datetime import date, datetime
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attnfit.effects.values import Effects, EffectSet
from attnfit.estimators.model_header import ModelFileError

# Entries of a set in the header.
ENTRIES = {"name", "kind", "labels", "columns"}
# Labels that JSON holds, by what NumPy calls their kind.
NUMBERS, TIMES = "iub", "mM"


def described(effects: Effects, columns: Any) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
    """Return the part of the header and the arrays that hold effects.

    Parameters
    ----------
    effects : Effects
    columns : list of (str or tuple of str), optional
        The columns that the labels came from, where they have names.

    Raises
    ------
    ValueError
        For labels that are neither numbers, text nor times.
    """
    sets, arrays = [], {}
    for k, s in enumerate(effects):
        kind, labels = _as_json(s.labels, s.name)
        own = None if columns is None else [columns[k]] if isinstance(columns[k], str) else list(columns[k])
        sets.append({"name": s.name, "kind": kind, "labels": labels, "columns": own})
        arrays[f"effects {k}"] = np.column_stack([s.values, s.component, s.identified]).astype(np.float64)
    pairs = sorted(list(pair) for pair in effects.zero_pairs)
    told = {"sets": sets, "n_components": effects.n_components, "rank": effects.rank, "zero_pairs": pairs}
    return told, arrays


def restored(told: Any, arrays: dict[str, NDArray[np.float64]]) -> tuple[Effects, Any]:
    """Return the effects, and the columns of their labels.

    Raises
    ------
    ModelFileError
        If the header is malformed, or contradicts the arrays.
    """
    _require(
        isinstance(told, dict) and set(told) == {"sets", "n_components", "rank", "zero_pairs"},
        "effects of the header are malformed",
    )
    for name in ("n_components", "rank"):
        _require(_is_count(told[name]), f"{name} of effects is {told[name]!r}")
    _require(isinstance(told["sets"], list) and len(told["sets"]) > 0, "effects has no set")
    pairs = told["zero_pairs"]
    fit = isinstance(pairs, list) and all(isinstance(p, list) and len(p) == 2 for p in pairs)
    _require(fit and all(_is_count(k) for p in pairs for k in p), "zero_pairs of effects are malformed")
    sets, columns = [], []
    for k, one in enumerate(told["sets"]):
        _require(isinstance(one, dict) and set(one) == ENTRIES, f"set {k} of effects is malformed")
        _require(isinstance(one["name"], str), f"the name of set {k} of effects is no text")
        labels = _from_json(one["kind"], one["labels"])
        table = arrays.get(f"effects {k}")
        _require(
            table is not None and table.shape == (len(labels), 3),
            f"the values of {one['name']} do not fit its {len(labels)} labels",
        )
        assert table is not None
        values, component, identified = table.T
        _require(bool((component == np.rint(component)).all()), f"components of {one['name']} are broken")
        sets.append(
            EffectSet(one["name"], labels, values.copy(), component.astype(np.intp), identified != 0.0)
        )
        columns.append(_columns(one["columns"], k))
    _require(len(arrays) == len(sets), f"effects has {len(sets)} sets but values of {len(arrays)}")
    named = [entry for entry in columns if entry is not None]
    zero = frozenset((int(one), int(other)) for one, other in pairs)
    return Effects(sets, told["n_components"], told["rank"], zero), named if len(named) == len(sets) else None


def _columns(names: Any, k: int) -> Any:
    if names is None:
        return None
    whole = isinstance(names, list) and len(names) > 0 and all(isinstance(name, str) for name in names)
    _require(whole, f"the columns of set {k} of effects are malformed")
    return names[0] if len(names) == 1 else tuple(names)


def _as_json(labels: NDArray[Any], name: str) -> tuple[Any, list[Any]]:
    """Return what labels are, and a list of them that JSON holds."""
    if labels.dtype.kind in TIMES:
        return labels.dtype.str, labels.astype(np.int64).tolist()
    if labels.dtype.kind in NUMBERS:
        return labels.dtype.str, labels.tolist()
    if labels.dtype.kind == "U" or (labels.dtype == object and _all(labels, str)):
        return "text" if labels.dtype == object else labels.dtype.str, labels.tolist()
    if labels.dtype == object and _all(labels, tuple):
        parts = [_as_json(_one(part), name) for part in zip(*labels.tolist(), strict=True)]
        return [kind for kind, _ in parts], [list(row) for row in zip(*(of for _, of in parts), strict=True)]
    kinds = sorted({type(label).__name__ for label in labels.tolist()})
    raise ValueError(
        f"the labels of {name} are {', '.join(kinds)}, which a model file does not hold; make them text or "
        "numbers"
    )


def _all(labels: NDArray[Any], kind: type) -> bool:
    return all(type(label) is kind for label in labels.tolist())


def _one(values: tuple[Any, ...]) -> NDArray[Any]:
    """Return part of combinations as an array: text stays what it is, times what NumPy made them from."""
    kinds = set(map(type, values))
    if kinds == {str}:
        return np.array(values, dtype=object)
    dtype = "M8[us]" if kinds == {datetime} else "M8[D]" if kinds == {date} else None
    return np.array(values, dtype=dtype)


def _from_json(kind: Any, labels: Any) -> NDArray[Any]:
    _require(isinstance(labels, list), "labels of effects are no list")
    if isinstance(kind, list):
        whole = all(isinstance(label, list) and len(label) == len(kind) for label in labels)
        _require(whole, "combinations of labels of effects are malformed")
        parts = [_from_json(k, [label[i] for label in labels]).tolist() for i, k in enumerate(kind)]
        tuples = np.empty(len(labels), dtype=object)
        tuples[:] = list(zip(*parts, strict=True))
        return tuples
    if kind == "text":
        _require(all(isinstance(label, str) for label in labels), "labels of effects are no text")
        found = np.empty(len(labels), dtype=object)
        found[:] = labels
        return found
    try:
        dtype = np.dtype(kind) if isinstance(kind, str) else None
    except TypeError:
        dtype = None
    _require(dtype is not None and dtype.kind in NUMBERS + TIMES + "U", f"labels of effects are {kind!r}")
    assert dtype is not None
    wanted = str if dtype.kind == "U" else bool if dtype.kind == "b" else int
    _require(all(type(label) is wanted for label in labels), f"labels of effects are no {kind}")
    try:
        return (
            np.array(labels, dtype=np.int64).astype(dtype) if dtype.kind in TIMES else np.array(labels, dtype)
        )
    except (OverflowError, ValueError) as error:
        raise ModelFileError(f"labels of effects: {error}") from None


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise ModelFileError(message)

"""From one row a choice to one row an alternative, and back; rankings as choices."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import narwhals as nw
import numpy as np
from numpy.typing import NDArray

from attnfit.data.inputs import library_and_index
from attnfit.formulas.frames import require_columns
from attnfit.inference.tables import to_frame

__all__ = ["explode_rankings", "long_to_wide", "wide_to_long"]

Missing = Literal["raise", "drop"]


def wide_to_long(
    data: Any,
    choice: str,
    alternatives: Sequence[Any],
    varying: Mapping[str, Mapping[Any, str]] | Sequence[str],
    case: str | None = None,
    availability: Mapping[Any, Any] | None = None,
    codes: Mapping[Any, Any] | str | None = None,
    keep: Sequence[str] | None = None,
    fill: float | None = None,
    sep: str = ".",
    missing: Missing = "raise",
) -> Any:
    """Return one row an available alternative of each choice, in the library of the data.

    Parameters
    ----------
    data : pandas or polars data frame, one row a choice
    choice : str
        Column of the chosen alternative: its label, or a code.
    alternatives : sequence
        Labels, in the order of the rows of a case.
    varying : mapping or sequence of str
        The columns of each variable by alternative, ``{"cost": {"train": "TRAIN_CO", "car": "CAR_CO"}}``, or
        names of variables whose columns are ``name + sep + alternative``.
    case : str, optional
        Column that numbers choices; the number of the row by default.
    availability : mapping, optional
        By alternative a column, or one value a row, that is zero or False where it cannot be chosen.
    codes : mapping or str, optional
        The label of each code of the choice column, ``{1: "train"}``, or a prefix of labels to be stripped.
    keep : sequence of str, optional
        Columns to repeat on all rows of a case.
    fill : float, optional
        The value of a variable for alternatives without a column of it.
    sep : str
        Between variable and alternative in names of columns.
    missing : {"raise", "drop"}
        What becomes of rows without a choice (missing, or code 0 that ``codes`` does not know).

    Returns
    -------
    data frame
        Columns case, alternative, choice (0 or 1), the varying ones, and those kept.

    Raises
    ------
    KeyError
        If a column is missing.
    ValueError
        If a chosen alternative is not available, a code is unknown, a case repeats, or a variable has no
        column for an alternative and there is no ``fill``.

    Examples
    --------
    >>> import pandas as pd
    >>> from attnfit.reshape import wide_to_long
    >>> wide = pd.DataFrame({"mode": [1, 2], "t.bus": [30, 25], "t.car": [20, 40], "owns": [1, 0]})
    >>> wide_to_long(wide, "mode", ["bus", "car"], ["t"], codes={1: "bus", 2: "car"}, keep=["owns"])
       case alternative  choice   t  owns
    0     0         bus       1  30     1
    1     0         car       0  20     1
    2     1         bus       0  25     0
    3     1         car       1  40     0
    """
    labels = list(alternatives)
    if len(set(labels)) < len(labels) or len(labels) < 2:
        raise ValueError("alternatives must be two or more different labels")
    columns = _varying(varying, labels, sep, data, fill)
    keep = list(keep or [])
    needed = [choice, *keep, *([] if case is None else [case])]
    available_by = dict(availability or {})
    needed += [name for name in available_by.values() if isinstance(name, str)]
    require_columns([*needed, *(c for of in columns.values() for c in of if c is not None)], data)
    table = nw.from_native(data, eager_only=True)
    n, J = len(table), len(labels)
    cases = np.arange(n) if case is None else table[case].to_numpy()
    if len(set(cases.tolist())) < n:
        values, counts = np.unique(cases.astype(str), return_counts=True)
        raise ValueError(
            f"case {values[np.argmax(counts > 1)]} has more than one row; give each choice a case"
        )
    chosen = _chosen(table[choice].to_list(), labels, codes)
    lost = chosen < 0
    if lost.any():
        if missing != "drop":
            raise ValueError(
                f"{int(lost.sum())} rows have no choice in column {choice!r}, first row "
                f"{int(np.argmax(lost))}; missing='drop' leaves them out"
            )
        warnings.warn(f"left out {int(lost.sum())} rows without a choice", UserWarning, stacklevel=2)
    able = np.ones((n, J), dtype=bool)
    for k, label in enumerate(labels):
        source = available_by.pop(label, None)
        if source is not None:
            values = table[source].to_numpy() if isinstance(source, str) else np.asarray(source)
            able[:, k] = np.asarray(values, dtype=np.float64) != 0.0
    if available_by:
        raise ValueError(f"availability names {next(iter(available_by))!r}, which is no alternative")
    refused = ~lost & ~able[np.arange(n), np.maximum(chosen, 0)]
    if refused.any():
        first = int(np.argmax(refused))
        raise ValueError(
            f"{int(refused.sum())} cases chose what is not available, first case {cases[first]!r} "
            f"({labels[chosen[first]]!r}); correct choice or availability"
        )
    row, j = np.nonzero(able & ~lost[:, None])
    found: dict[str, Any] = {
        case or "case": cases[row],
        "alternative": np.array(labels, dtype=object)[j].tolist(),
        "choice": (chosen[row] == j).astype(np.int64),
    }
    for name, of in columns.items():
        of_cases = [np.full(n, fill) if column is None else table[column].to_numpy() for column in of]
        found[name] = np.stack(of_cases, axis=1)[row, j]
    for name in keep:
        found[name] = table[name].to_numpy()[row]
    plain = {name: np.asarray(of).tolist() if _is_text(of) else of for name, of in found.items()}
    return to_frame(plain, library_and_index(data)[0])


def _is_text(values: Any) -> bool:
    return bool(np.asarray(values).dtype.kind == "O")


def _varying(
    varying: Any, labels: list[Any], sep: str, data: Any, fill: float | None
) -> dict[str, list[str | None]]:
    """Return the column of each variable by alternative, None where there is none."""
    there = set(map(str, data.columns))
    if not isinstance(varying, Mapping):
        varying = {name: {label: f"{name}{sep}{label}" for label in labels} for name in varying}
        varying = {
            name: {label: column for label, column in of.items() if fill is None or column in there}
            for name, of in varying.items()
        }
    found = {}
    for name, of in varying.items():
        unknown = set(of) - set(labels)
        if unknown:
            raise ValueError(f"varying {name!r} names {next(iter(unknown))!r}, which is no alternative")
        absent = [label for label in labels if label not in of]
        if absent and fill is None:
            raise ValueError(f"varying {name!r} has no column for {absent[0]!r}; name one, or pass fill=")
        found[name] = [of.get(label) for label in labels]
    return found


def _chosen(values: list[Any], labels: list[Any], codes: Any) -> NDArray[np.intp]:
    """Return the number of the chosen alternative of each row, -1 without a choice."""
    place = {label: j for j, label in enumerate(labels)}
    if isinstance(codes, Mapping):
        unknown = [label for label in codes.values() if label not in place]
        if unknown:
            raise ValueError(f"codes name {unknown[0]!r}, which is no alternative")
        place = {code: place[label] for code, label in codes.items()}
    elif isinstance(codes, str):
        place = {f"{codes}{label}": j for label, j in place.items()}
    found = np.empty(len(values), dtype=np.intp)
    for i, value in enumerate(values):
        if value in place:
            found[i] = place[value]
        elif value is None or value != value or value == 0:
            found[i] = -1
        else:
            known = ", ".join(map(repr, list(place)[:8]))
            raise ValueError(f"row {i} has the unknown choice {value!r}; known are {known}: pass codes=")
    return found


def long_to_wide(
    data: Any, varying: Sequence[str], case: str = "case", alternative: str = "alternative",
    choice: str = "choice", keep: Sequence[str] | None = None, sep: str = ".",
) -> Any:  # fmt: skip
    """Return one row a case: the chosen label, columns ``name + sep + alternative``, and those kept; the
    inverse of `wide_to_long`.

    Parameters
    ----------
    data : pandas or polars data frame, one row an alternative
    varying : sequence of str
        Columns that differ within cases; NaN where an alternative is absent, for which ``available`` columns
        say 0.
    case, alternative, choice : str
        Columns.
    keep : sequence of str, optional
        Columns that are the same for all rows of a case.
    sep : str

    Raises
    ------
    ValueError
        If a case has not exactly one choice, or an alternative twice.
    """
    keep = list(keep or [])
    require_columns([case, alternative, choice, *varying, *keep], data)
    table = nw.from_native(data, eager_only=True)
    cases, first, row = np.unique(table[case].to_numpy(), return_index=True, return_inverse=True)
    order = np.argsort(first)
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    row, names = rank[row], table[alternative].to_list()
    labels = list(dict.fromkeys(names))
    j = np.array([labels.index(name) for name in names])
    n, J = len(cases), len(labels)
    pairs, counts = np.unique(row * J + j, return_counts=True)
    if (counts > 1).any():
        twice = int(pairs[np.argmax(counts > 1)])
        raise ValueError(
            f"case {cases[order][twice // J]!r} has {labels[twice % J]!r} twice; drop duplicates"
        )
    picked = np.asarray(table[choice].to_numpy(), dtype=np.float64) > 0
    chosen = np.bincount(row, weights=picked, minlength=n)
    if (chosen != 1).any():
        bad = int(np.argmax(chosen != 1))
        raise ValueError(f"case {cases[order][bad]!r} has {int(chosen[bad])} choices; one is needed")
    able = np.zeros((n, J), dtype=np.int64)
    able[row, j] = 1
    found: dict[str, Any] = {case: cases[order]}
    picks = np.empty(n, dtype=object)
    picks[row[picked]] = np.array(names, dtype=object)[picked]
    found[choice] = picks.tolist()
    for name in varying:
        values = np.full((n, J), np.nan)
        values[row, j] = table[name].to_numpy()
        found |= {f"{name}{sep}{label}": values[:, k] for k, label in enumerate(labels)}
    found |= {f"available{sep}{label}": able[:, k] for k, label in enumerate(labels)}
    for name in keep:
        values = table[name].to_numpy()
        found[name] = values[np.sort(first)]
    return to_frame(found, library_and_index(data)[0])


def explode_rankings(data: Any, case: str, rank: str, stage: str = "stage") -> Any:
    """Return rankings as a sequence of choices: the best of all, the best of the rest, and so on.

    Parameters
    ----------
    data : pandas or polars data frame, one row an alternative
    case, rank : str
        Columns; ranks 1, 2, ... in each case, missing or 0 for alternatives that were not ranked.
    stage : str
        Name of the column that numbers the choices: 1, 2, ...

    Returns
    -------
    data frame
        The rows of each stage with a column ``choice``; group by ``stage_case``, cluster by the case.

    Notes
    -----
    Under the logit model the stages are independent: the likelihood of a ranking is the product of theirs.
    Source: Beggs, Cardell and Hausman (1981) doi:10.1016/0304-4076(81)90056-7.

    Examples
    --------
    >>> import pandas as pd
    >>> from attnfit.reshape import explode_rankings
    >>> ranked = pd.DataFrame({"case": [1, 1, 1], "brand": ["a", "b", "c"], "rank": [2, 1, 3]})
    >>> explode_rankings(ranked, "case", "rank")[["brand", "stage", "stage_case", "choice"]]
      brand  stage  stage_case  choice
    0     a      1           0       0
    1     b      1           0       1
    2     c      1           0       0
    3     a      2           1       1
    4     c      2           1       0
    """
    require_columns([case, rank], data)
    table = nw.from_native(data, eager_only=True)
    ranks = np.array([np.inf if r is None or r != r or r == 0 else float(r) for r in table[rank].to_list()])
    numbers = np.unique(table[case].to_numpy(), return_inverse=True)[1]
    rows: list[NDArray[np.intp]] = []
    columns: tuple[list[Any], list[Any], list[Any]] = ([], [], [])
    n_sets = 0
    for number in range(int(numbers.max()) + 1):
        mine = np.flatnonzero(numbers == number)
        for k, best in enumerate(np.sort(ranks[mine][np.isfinite(ranks[mine])])):
            left = mine[ranks[mine] >= best]
            if (ranks[left] == best).sum() > 1:
                raise ValueError(
                    f"case of row {left[0]} has rank {best:g} twice; break ties, or leave both out"
                )
            if len(left) < 2:
                continue
            rows.append(left)
            columns[0].append(np.full(len(left), k + 1))
            columns[1].append(np.full(len(left), n_sets))
            columns[2].append((ranks[left] == best).astype(np.int64))
            n_sets += 1
    if not rows:
        raise ValueError(f"column {rank!r} ranks nothing; ranks are 1, 2, ...")
    taken = table[np.concatenate(rows).tolist()]
    found = {name: taken[name].to_list() for name in taken.columns if name != "choice"}
    for name, pieces in zip((stage, f"{stage}_case", "choice"), columns, strict=True):
        found[name] = np.concatenate(pieces)
    return to_frame(found, library_and_index(data)[0])

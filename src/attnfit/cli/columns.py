"""Choose the columns of a fit; every complaint names the column and the line."""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attnfit.cli.console import note
from attnfit.cli.errors import InputError, suggest
from attnfit.cli.suspects import suspicion
from attnfit.cli.tables import MISSING, Array, Table

# Columns that a note names one by one.
MAX_NAMED = 12


@dataclass(frozen=True)
class Roles:
    """Which column plays which part; None where there is none, and features None for all that are left."""

    target: str
    features: tuple[str, ...] | None = None
    group: str | None = None
    weight: str | None = None
    offset: str | None = None
    exclude: tuple[str, ...] = ()
    clusters: tuple[str, ...] = ()
    absorb: tuple[tuple[str, ...], ...] = ()

    def __post_init__(self) -> None:
        """Raise InputError if one column has two parts to play."""
        named = [name for name in (self.target, self.group, self.weight, self.offset) if name is not None]
        if len(self.clusters) > 2:
            raise InputError(f"--cluster takes one column or two, not {len(self.clusters)}")
        # Groups may well be the clusters, and levels too.
        levels = dict.fromkeys(name for parts in self.absorb for name in parts)
        named += [name for name in self.clusters if name != self.group and name not in levels]
        named += [name for name in levels if name != self.group]
        if len(self.taken) < len(named):
            twice = next(name for k, name in enumerate(named) if name in named[:k])
            raise InputError(
                f"Column {twice!r} is given to two options; each of them needs a column of its own"
            )
        if self.features is not None and self.exclude:
            raise InputError("--exclude takes columns from the default features; leave it or --features out")
        for name in self.exclude:
            if name in self.taken:
                raise InputError(f"Column {name!r} is {self.taken[name]}; take it out of --exclude")
        for k, name in enumerate(self.features or ()):
            if name in self.taken:
                raise InputError(
                    f"Column {name!r} is {self.taken[name]} and a feature; take it out of --features"
                )
            if name in self.features[:k]:  # type: ignore[index]
                raise InputError(f"Column {name!r} is twice in --features; name it once")

    @property
    def taken(self) -> dict[str, str]:
        """The columns that are not features, with the option that names them."""
        options = {
            "--target": self.target,
            "--group": self.group,
            "--weight": self.weight,
            "--offset": self.offset,
        }
        found = {name: option for option, name in options.items() if name is not None}
        levels = dict.fromkeys((name for parts in self.absorb for name in parts), "--absorb")
        return dict.fromkeys(self.clusters, "--cluster") | levels | found

    @property
    def labelled(self) -> tuple[str, ...]:
        """The columns of labels, which are read as text."""
        levels = [name for parts in self.absorb for name in parts]
        return tuple(dict.fromkeys([*([] if self.group is None else [self.group]), *self.clusters, *levels]))


def listed(names: str | None) -> tuple[str, ...] | None:
    """Return the names of an option; one with a comma in it stands in double quotes."""
    if names is None:
        return None
    rows = list(csv.reader([names], skipinitialspace=True))
    return tuple(name.strip() for name in rows[0] if name.strip()) if rows else ()


def levels_of(absorb: str | None) -> tuple[tuple[str, ...], ...]:
    """Return the sets of effects of an option, each as the columns whose combinations are its levels."""
    sets = [tuple(part.strip() for part in name.split("*")) for name in listed(absorb) or ()]
    whole = all(all(parts) and len(set(parts)) == len(parts) for parts in sets)
    if absorb is not None and not (sets and whole):
        raise InputError(f'--absorb {absorb!r} must name columns, such as "origin,destination*year"')
    return tuple(sets)


def choose_features(
    roles: Roles,
    path: Any,
    names: Sequence[str],
    numeric: Sequence[str],
    values: Callable[[str], Array],
    groups: NDArray[Any] | None,
    text: Sequence[str] = (),
) -> list[str]:
    """Return the features asked for, or else the numeric columns left that do not number rows; say which.

    Parameters
    ----------
    path : Path
    names, numeric : sequence of str
        All columns, and those of numbers.
    values : callable
        Returns a column by name, or its beginning where it is large.
    groups : ndarray or None
        Of the same rows.
    text : sequence of str
        What is said of the columns of text.

    Raises
    ------
    InputError
        If there is no such column, or none is left.
    """
    for name in (*(roles.features or ()), *roles.exclude):
        if name not in names:
            hint = suggest(name, names, "its columns are")
            option = "--features" if name in (roles.features or ()) else "--exclude"
            raise InputError(f"{path} has no column {name!r}, which {option} needs{hint}")
    if roles.features is not None:
        if not roles.features:
            raise InputError("--features names no column")
        return list(roles.features)
    taken, left = [], []
    for name in numeric:
        if name in roles.taken or name in roles.exclude:
            continue
        why = suspicion(name, values(name), groups)
        if why is None:
            taken.append(name)
        else:
            left.append(f"{name} ({why})")
    out = f"; left out: {_some(left)}" if left else ""
    out += f"; left out because they hold text: {_some(list(text))}" if text else ""
    if not taken:
        why_none = out or "; add one"
        remedy = "; name those that are meant with --features" if left else ""
        raise InputError(f"{path} has no numeric column left for a feature{why_none}{remedy}")
    note(f"Features: {', '.join(taken)}{out}.")
    return taken


def features_of(table: Table, roles: Roles) -> list[str]:
    """Return `choose_features` of a table."""
    groups = None if roles.group is None else table.labels.get(roles.group)
    numeric = [name for name in table.names if name in table.numbers]
    text = left_out(table, roles)
    return choose_features(roles, table.path, table.names, numeric, table.numbers.__getitem__, groups, text)


def left_out(table: Table, roles: Roles) -> list[str]:
    """Return the text columns without a part to play, each with what makes it text."""
    return [
        f"{name} ({value!r} in {table.where(row)})"
        for name, (row, value) in table.text.items()
        if name not in roles.taken and name not in roles.exclude
    ]


def without_missing(table: Table, names: Sequence[str], labelled: Sequence[str], missing: str) -> Table:
    """Return the table without rows in which one of the columns has no value, and say how many; with
    ``missing`` "error" all rows.

    Raises
    ------
    InputError
        If no row is left, or ``missing`` is neither "drop" nor "error".
    """
    kept = complete_rows(table, names, labelled, missing)
    return table if kept is None else table.rows(kept)


def complete_rows(
    table: Table, names: Sequence[str], labelled: Sequence[str], missing: str
) -> NDArray[np.bool_] | None:
    """Return which rows have a value in all of these columns, and say how many have not; None where all are
    to be kept.
    """
    check_missing(missing)
    if missing == "error":
        return None
    empty: dict[str, NDArray[np.bool_]] = {
        name: np.isnan(table.numbers[name]) for name in dict.fromkeys(names) if name in table.numbers
    }
    for name in labelled:
        if name in table.labels:
            empty[name] = np.array([label.lower() in MISSING for label in table.labels[name]])
    counts = {name: int(there.sum()) for name, there in empty.items()}
    keep = ~np.logical_or.reduce(list(empty.values()), axis=0) if empty else np.ones(table.n_rows, dtype=bool)
    tell_missing(table.path, counts, int(keep.sum()), table.n_rows)
    return None if keep.all() else keep


def check_missing(missing: str) -> None:
    """Raise InputError unless rows with a missing value are dropped or an error."""
    if missing not in ("drop", "error"):
        raise InputError(f"--missing must be drop or error, not {missing!r}")


def tell_missing(path: Any, counts: Mapping[str, int], n_kept: int, n_rows: int) -> None:
    """Say how many rows have no value in which columns.

    Raises
    ------
    InputError
        If no row is left.
    """
    told = ", ".join(f"{name}: {count:,}" for name, count in counts.items() if count)
    if not n_kept:
        raise InputError(f"No row of {path} is complete (missing: {told}); leave a column out")
    if n_kept < n_rows:
        note(f"Dropped {n_rows - n_kept:,} of {n_rows:,} rows in which a value is missing ({told}).")


def numbers(table: Table, name: str, option: str, *, non_negative: bool = False) -> Array:
    """Return a column of finite numbers.

    Raises
    ------
    InputError
        If the column is missing, is text, or has an entry that will not do.
    """
    require(table, name, option)
    if name in table.text:
        row, value = table.text[name]
        remedy = table.doubts.get(name) or _remedy(value)
        raise InputError(f"Column {name!r} is not numeric: {table.where(row)} holds {value!r}; {remedy}")
    values = table.numbers[name]
    bad = np.flatnonzero(~np.isfinite(values))
    if len(bad):
        absent = bool(np.isnan(values[bad[0]]))
        what = "no value" if absent else f"{values[bad[0]]}"
        more = f" (and {len(bad) - 1} more)" if len(bad) > 1 else ""
        drop = ", or add --missing drop" if absent else ""
        raise InputError(
            f"Column {name!r} has {what} in {table.where(bad[0])}{more}; "
            f"fill it in, delete such rows or leave the column out{drop}"
        )
    if non_negative and (values < 0).any():
        row = int(np.flatnonzero(values < 0)[0])
        raise InputError(
            f"Column {name!r} is negative in {table.where(row)} ({values[row]:g}); "
            f"{option} needs numbers >= 0"
        )
    return values


def labels(table: Table, name: str, option: str = "--group") -> NDArray[Any]:
    """Return the group, or another label, of every row.

    Raises
    ------
    InputError
        If the column is missing, or a label is.
    """
    require(table, name, option)
    values = table.labels[name]
    for row, label in enumerate(values):
        if label.lower() in MISSING:
            raise InputError(no_label(name, table.where(row), label))
    return values


def no_label(name: str, where: str, label: str | None) -> str:
    """Return what to say of a row without a group."""
    word = f" ({label!r} stands for none)" if label else ""
    return (
        f"Column {name!r} has no value in {where}{word}; give the row a group or delete it (--missing drop)"
    )


def matrix(table: Table, names: Sequence[str], option: str = "--features") -> Array:
    """Return several columns of finite numbers side by side."""
    return np.column_stack([numbers(table, name, option) for name in names])


def require(table: Table, name: str, option: str) -> None:
    """Raise InputError if there is no such column."""
    if name not in table.names:
        hint = suggest(name, table.names, "its columns are")
        raise InputError(f"{table.path} has no column {name!r}, which {option} needs{hint}")


def _some(names: list[str]) -> str:
    more = f", and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else ""
    return ", ".join(names[:MAX_NAMED]) + more


def _remedy(value: str) -> str:
    if value.strip().startswith("#"):
        return "that is an error of the spreadsheet: mend its formula, or empty the cell"
    if "," in value and value.replace(",", "", 1).strip().lstrip("+-").replace(".", "").isdigit():
        return "write decimals with a point, or all of them with a comma and add --decimal ,"
    return "encode it as numbers (one 0/1 column a category) or leave it out"

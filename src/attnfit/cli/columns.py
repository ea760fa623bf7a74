"""Choose the columns of a fit; every complaint names the column and the line."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attnfit.cli.errors import InputError, suggest
from attnfit.cli.tables import MISSING, Array, Table


@dataclass(frozen=True)
class Roles:
    """Which column plays which part; None where there is none, and features None for all that are left."""

    target: str
    features: tuple[str, ...] | None = None
    group: str | None = None
    weight: str | None = None
    offset: str | None = None

    def __post_init__(self) -> None:
        """Raise InputError if one column has two parts to play."""
        named = [name for name in (self.target, self.group, self.weight, self.offset) if name is not None]
        if len(self.taken) < len(named):
            twice = next(name for k, name in enumerate(named) if name in named[:k])
            raise InputError(
                f"Column {twice!r} is given to two options; each of them needs a column of its own"
            )

    @property
    def taken(self) -> dict[str, str]:
        """The columns that are not features, with the option that names them."""
        options = {
            "--target": self.target,
            "--group": self.group,
            "--weight": self.weight,
            "--offset": self.offset,
        }
        return {name: option for option, name in options.items() if name is not None}


def features_of(table: Table, roles: Roles) -> tuple[str, ...]:
    """Return the features asked for, or else every numeric column without another part to play.

    Raises
    ------
    InputError
        If a feature is the target, is named twice, or none is left.
    """
    if roles.features is None:
        left = tuple(name for name in table.names if name in table.numbers and name not in roles.taken)
        if not left:
            raise InputError(
                f"{table.path} has no numeric column left for a feature{_listed(left_out(table, roles))}"
            )
        return left
    for k, name in enumerate(roles.features):
        if name in roles.taken:
            raise InputError(
                f"Column {name!r} is {roles.taken[name]} and a feature; take it out of --features"
            )
        if name in roles.features[:k]:
            raise InputError(f"Column {name!r} is twice in --features; name it once")
    return roles.features


def left_out(table: Table, roles: Roles) -> list[str]:
    """Return the text columns without a part to play, each with what makes it text."""
    return [
        f"{name} ({value!r} in {table.where(row)})"
        for name, (row, value) in table.text.items()
        if name not in roles.taken
    ]


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
        raise InputError(
            f"Column {name!r} is not numeric: {table.where(row)} holds {value!r}; {_remedy(value)}"
        )
    values = table.numbers[name]
    bad = np.flatnonzero(~np.isfinite(values))
    if len(bad):
        what = "no value" if np.isnan(values[bad[0]]) else f"{values[bad[0]]}"
        more = f" (and {len(bad) - 1} more)" if len(bad) > 1 else ""
        raise InputError(
            f"Column {name!r} has {what} in {table.where(bad[0])}{more}; "
            "fill it in, delete such rows or leave the column out"
        )
    if non_negative and (values < 0).any():
        row = int(np.flatnonzero(values < 0)[0])
        raise InputError(
            f"Column {name!r} is negative in {table.where(row)} ({values[row]:g}); "
            f"{option} needs numbers >= 0"
        )
    return values


def labels(table: Table, name: str, *, singles: bool) -> NDArray[Any]:
    """Return the group of every row; with ``singles`` a group may have one row.

    Raises
    ------
    InputError
        If the column is missing, or a label is, or a group has one row.
    """
    require(table, name, "--group")
    values = table.labels[name]
    for row, label in enumerate(values):
        if label.lower() in MISSING:
            raise InputError(
                f"Column {name!r} has no value in {table.where(row)}; give the row a group or delete it"
            )
    if not singles:
        sizes = Counter(values)
        for row, label in enumerate(values):
            if sizes[label] == 1:
                raise InputError(
                    f"Group {label!r} of column {name!r} has only one row ({table.where(row)}), so its share "
                    "is 1 whatever the features; delete it, or add --outside-good if its share is below 1"
                )
    return values


def matrix(table: Table, names: Sequence[str], option: str = "--features") -> Array:
    """Return several columns of finite numbers side by side."""
    return np.column_stack([numbers(table, name, option) for name in names])


def require(table: Table, name: str, option: str) -> None:
    """Raise InputError if there is no such column."""
    if name not in table.names:
        hint = suggest(name, table.names, "its columns are")
        raise InputError(f"{table.path} has no column {name!r}, which {option} needs{hint}")


def _listed(columns: list[str]) -> str:
    return f"; these hold text: {', '.join(columns)}" if columns else "; add one"


def _remedy(value: str) -> str:
    if "," in value and value.replace(",", "", 1).strip().lstrip("+-").replace(".", "").isdigit():
        return "write decimals with a point and no thousands separator"
    return "encode it as numbers (one 0/1 column a category) or leave it out"

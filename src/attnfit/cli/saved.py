"""A saved model on the rows of a file: what `score` and `elasticities` share."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from attnfit.cli import columns
from attnfit.cli.errors import InputError
from attnfit.cli.models import (
    column_of,
    level_columns,
    levels_in,
    model_matrix,
    needed,
    read_model,
    text_columns,
)
from attnfit.cli.options import ReadOptions
from attnfit.cli.tables import Table, read_table


@dataclass(frozen=True)
class SavedRows:
    """The rows of a file as a saved model takes them.

    Attributes
    ----------
    estimator : fitted estimator
    table : Table
    X : ndarray or data frame
    groups, offset, alternatives : ndarray or None
    absorb : list of ndarray or None
        Labels of sets of effects.
    """

    estimator: Any
    table: Table
    X: Any
    groups: Any = None
    offset: Any = None
    alternatives: Any = None
    absorb: Any = None

    @property
    def where(self) -> dict[str, Any]:
        """What predictions take besides X."""
        found = {"groups": self.groups, "offset": self.offset, "absorb": self.absorb}
        return {name: of for name, of in found.items() if of is not None}


def read_saved(
    model: Path,
    data: Path,
    reading: ReadOptions,
    group: str | None,
    offset: str | None,
    alternatives: str | None = None,
    more: tuple[str, ...] = (),
) -> SavedRows:
    """Read a model and the rows of a file.

    Parameters
    ----------
    model, data : Path
    reading : ReadOptions
    group, offset, alternatives : str, optional
        Columns; a model with a formula knows its own groups and alternatives.
    more : tuple of str
        Columns of numbers that must be complete too.

    Raises
    ------
    InputError
        If the file lacks a column, or an entry.
    """
    estimator = read_model(model)
    if group is not None and not hasattr(estimator, "n_groups_"):
        raise InputError(f"{model} is a model without groups; leave --group out")
    group = column_of(estimator, "groups") if group is None else group
    alternatives = column_of(estimator, "alternatives") if alternatives is None else alternatives
    if group is None and getattr(estimator, "n_groups_", 1) > 1:
        raise InputError(
            f"{model} was fitted on {estimator.n_groups_:,} groups; name their column with --group"
        )
    labels = {"--group": group, "--alternatives": alternatives}
    levels = [name for parts in level_columns(estimator) for name in parts]
    labelled = [*(name for name in labels.values() if name is not None), *levels]
    table = read_table(data, [*labelled, *text_columns(estimator)], reading.decimal)
    for option, name in [*labels.items(), *(("the model", name) for name in levels)]:
        if name is not None:
            columns.require(table, name, option)
    used = [*needed(table, estimator, offset), *more]
    table = columns.without_missing(table, used, [*labelled, *text_columns(estimator)], reading.missing)
    table.tell(used)
    return SavedRows(
        estimator, table, model_matrix(table, estimator),
        None if group is None else columns.labels(table, group),
        None if offset is None else columns.numbers(table, offset, "--offset"),
        None if alternatives is None else columns.labels(table, alternatives, "--alternatives"),
        levels_in(table, estimator),
    )  # fmt: skip

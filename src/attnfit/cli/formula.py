"""The rows of a fit by a formula: checked before it is evaluated, and read with the categories it needs."""

from __future__ import annotations

import re
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from attnfit.cli import columns
from attnfit.cli.errors import InputError, suggest
from attnfit.cli.options import ColumnOptions, ReadOptions
from attnfit.cli.output import STREAM, require_input
from attnfit.cli.rows import Rows
from attnfit.cli.suspects import refuse_codes
from attnfit.cli.tables import MISSING, Table, read_table, with_text
from attnfit.estimators.formula import absorbed_columns, absorbed_labels, without_constant
from attnfit.formulas import read_training
from attnfit.formulas.safe import names_in, require_safe


def split_formula(formula: str) -> tuple[str, str]:
    """Return target and terms.

    Raises
    ------
    InputError
        If there are none, or the target is more than a column.
    """
    left, tilde, right = (part.strip() for part in formula.partition("~"))
    if not (left and tilde and right):
        raise InputError(f'--formula {formula!r} must read "target ~ terms"')
    if not re.fullmatch(r"\w+", left):
        raise InputError(f"--formula: {left!r} must be the name of one column; put what it means in a column")
    return left, right


def check_formula(given: ColumnOptions) -> None:
    """Raise InputError where another option says what the formula says, or the package is missing."""
    named = {"--target": given.target, "--features": given.features, "--exclude": given.exclude}
    twice = next((option for option, value in named.items() if value is not None), None)
    if twice is not None:
        raise InputError(f"--formula says what {twice} says; leave one of them out")
    if given.constant:
        raise InputError("--formula has a constant unless it says 0 +; leave --constant out")
    if find_spec("formulaic") is None or find_spec("pandas") is None:
        raise InputError('--formula needs formulaic; type: python -m pip install "attnfit[formula]"')
    split_formula(given.formula or "")


def read_formula(
    data: Path, given: ColumnOptions, reading: ReadOptions, *, shares: bool, constants: bool
) -> Rows:
    """Read the columns of a formula and make its matrix.

    Parameters
    ----------
    data : Path
    given, reading
    shares : bool
        Whether the target should be shares or choices, so that codes are refused.
    constants : bool
        Whether the model can tell what is the same in all rows of a group.

    Raises
    ------
    InputError
        If a column is missing or has an entry that will not do, or the formula holds more than columns,
        numbers and known functions.
    """
    require_input(data)
    if data != STREAM and data.is_dir():
        raise InputError(f"{data} is a folder; give one file of it")
    columns.check_missing(reading.missing)
    target, right = split_formula(given.formula or "")
    clusters = columns.listed(given.cluster) or ()
    levels = columns.levels_of(given.absorb)
    roles = columns.Roles(
        target, (), given.group, given.weight, given.offset, clusters=clusters, absorb=levels
    )
    table = read_table(data, roles.labelled, reading.decimal)
    for name, option in roles.taken.items():
        columns.require(table, name, "--formula" if option == "--target" else option)
    if given.alternatives is not None:
        columns.require(table, given.alternatives, "--alternatives")
    variables = _variables(table, right)
    table = with_text(table, [n for n in (*variables, target, given.alternatives) if n in table.text])
    numeric = [given.weight, given.offset, target, *variables]
    used = [name for name in numeric if name is not None and name in table.numbers]
    named = [*roles.labelled, *variables, target, given.alternatives]
    words = [name for name in named if name in table.labels]
    if reading.missing == "error":
        for name in used:
            columns.numbers(table, name, "--formula")
        for name in words:
            columns.labels(table, str(name), "--formula")
    table.tell(used)
    if given.weight is not None and (table.numbers[given.weight] < 0).any():
        columns.numbers(table, given.weight, "--weight", non_negative=True)
    if shares and given.alternatives is None and target in table.numbers and not given.counts:
        refuse_codes(table.numbers[target], target, table.names)
    return _rows(table, given, roles, [*used, *map(str, words)], constants=constants)


def _variables(table: Table, right: str) -> list[str]:
    try:
        names = names_in(right)
    except ValueError as error:
        raise InputError(f"--formula: {error}") from None
    for name in names:
        if name not in table.names:
            hint = suggest(name, table.names, "its columns are")
            raise InputError(f"{table.path} has no column {name!r}, which --formula needs{hint}")
    try:
        require_safe(right, names)
    except ValueError as error:
        raise InputError(f"--formula: {error}") from None
    return names


def _rows(
    table: Table, given: ColumnOptions, roles: columns.Roles, used: Sequence[str], *, constants: bool
) -> Rows:
    parts: dict[str, Any] = {
        "groups": given.group, "alternatives": given.alternatives, "weights": given.weight,
        "offset": given.offset,
        "clusters": list(roles.clusters) if len(roles.clusters) > 1 else next(iter(roles.clusters), None),
        **absorbed_columns(list(roles.absorb) or None),
    }  # fmt: skip
    formula = given.formula or ""
    try:
        found = read_training(
            formula, _frame(table, used), {name: of for name, of in parts.items() if of is not None},
            "drop", constants=constants, context={},
        )  # fmt: skip
    except Exception as error:
        if not _of_formulaic(error):
            raise
        raise InputError(f"--formula cannot be evaluated: {' '.join(str(error).split())}") from error
    if roles.absorb:
        found = without_constant(found)
    inputs = {
        "y": found.y,
        "groups": found.given.get("groups"),
        "clusters": found.given.get("clusters"),
        "sample_weight": found.given.get("weights"),
        "offset": found.given.get("offset"),
        "absorb": absorbed_labels(list(roles.absorb) or None, found.given),
    }
    X = np.asarray(found.matrix, dtype=np.float64)
    return Rows(
        X, {name: of for name, of in inputs.items() if of is not None}, list(found.matrix.columns),
        lambda labels: 0, here=True, training=found, target=roles.target, formula=formula,
    )  # fmt: skip


def _of_formulaic(error: BaseException) -> bool:
    """Whether the package for formulas raised an error, whatever its type."""
    at = error.__traceback__
    while at is not None and at.tb_next is not None:
        at = at.tb_next
    raised_in = "" if at is None else str(at.tb_frame.f_globals.get("__name__", ""))
    return raised_in.partition(".")[0] == "formulaic"


def _frame(table: Table, names: Sequence[str]) -> Any:
    """Return columns as a pandas data frame: whole numbers as such, so that codes are named without a point,
    and what stands for nothing as missing.
    """
    import pandas as pd

    found: dict[str, Any] = {}
    for name in dict.fromkeys(names):
        if name in table.labels:
            cells = [None if cell.lower() in MISSING else cell for cell in table.labels[name]]
            found[name] = pd.Series(cells, dtype=object)
            continue
        values = table.numbers[name]
        whole = np.isfinite(values).all() and (values == np.rint(values)).all()
        found[name] = values.astype(np.int64) if whole and np.abs(values).max() < 2**53 else values
    return pd.DataFrame(found)

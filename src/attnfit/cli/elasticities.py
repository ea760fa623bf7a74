"""``attnfit elasticities``: what a saved model says of a change by one per cent, with errors."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from attnfit.cli.console import Grid, Literal, note
from attnfit.cli.errors import Debug, InputError, one_sentence, suggest
from attnfit.cli.options import ReadOptions, flat
from attnfit.cli.output import check_paths, put, put_json, results
from attnfit.cli.report import print_whole
from attnfit.cli.saved import SavedRows, read_saved

EFFECTS = {
    "elasticity": ("elasticities", "per cent more for one per cent more"),
    "semi-elasticity": ("semi_elasticities", "relative change for one more"),
    "marginal": ("marginal_effects", "change for one more"),
}
# Rows of a table that a terminal holds; all of them are in --output.
MOST = 40


def elasticities(
    model: Annotated[Path, typer.Argument(help="File written by attnfit fit --save", metavar="MODEL")],
    data: Annotated[Path, typer.Argument(help="File with the model's columns", metavar="DATA")],
    reading: ReadOptions,
    variable: Annotated[str, typer.Option(help="Column that changes, such as the price.")],
    group: Annotated[
        str | None, typer.Option(help="Column of the market, traveller or origin of a row.")
    ] = None,
    alternatives: Annotated[
        str | None,
        typer.Option(
            help="Column that names the alternative of a row: one number a pair. Without it one number a row."
        ),
    ] = None,
    offset: Annotated[str | None, typer.Option(help="Column added to the linear predictor.")] = None,
    effect: Annotated[str, typer.Option(help=f"{', '.join(EFFECTS)}.")] = "elasticity",
    pairs: Annotated[
        str | None, typer.Option(help="all pairs of alternatives, or own: each to itself.")
    ] = None,
    level: Annotated[float, typer.Option(help="Cover of intervals.")] = 0.95,
    output: Annotated[Path | None, typer.Option(help="Write the table here as CSV.")] = None,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the table here as data.")] = None,
    debug: Debug = False,
) -> None:
    """Print by how many per cent shares or outcomes change for one per cent more of a column."""
    check_paths({"MODEL": model, "DATA": data}, {"--output": output, "--json": json_path})
    if effect not in EFFECTS:
        raise InputError(f"There is no effect {effect!r}{suggest(effect, EFFECTS)}")
    if pairs not in (None, "all", "own"):
        raise InputError(f"--pairs must be all or own, not {pairs!r}")
    rows = read_saved(model, data, reading, group, offset, alternatives)
    found = effects_of(rows, variable, effect, pairs, level)
    console = results(output, json_path)
    covariance = rows.estimator._covariance
    console.say(f"{variable}: {EFFECTS[effect][1]}", "bold")
    show(console, found)
    console.say(f"standard errors: {covariance.describe()}")
    columns = found.columns()
    if output is not None:
        put(output, as_csv(columns))
    put_json(json_path, {"variable": variable, "effect": effect, **columns})


def effects_of(rows: SavedRows, variable: str, effect: str, pairs: str | None, level: float) -> Any:
    """Return the effects, of pairs of alternatives where these have names, else of rows.

    Raises
    ------
    InputError
        If the model has no such effects, no errors, or the variable is no column of it.
    """
    estimator = rows.estimator
    name = EFFECTS[effect][0]
    if not hasattr(estimator, name):
        raise InputError(f"{type(estimator).__name__} has none; fit a softmax, exponential or poisson model")
    if "_covariance" not in estimator.__dict__:
        raise InputError("The model file has no standard errors; fit it again with attnfit fit --save")
    formula = estimator.__dict__.get("_formula")
    known = [str(n) for n in estimator.feature_names_in_] if formula is None else formula.variables
    if variable not in known:
        raise InputError(f"The model has no variable {variable!r}{suggest(variable, known, 'it has')}")
    if not hasattr(estimator, "n_groups_"):
        return getattr(estimator, name)(variable, X=rows.X, offset=rows.offset, level=level)
    options: dict[str, Any] = {"X": rows.X, **rows.where, "level": level}
    if rows.alternatives is None:
        return getattr(estimator, name)(variable, rows=True, **options)
    return getattr(estimator, name)(variable, rows.alternatives, pairs=pairs, **options)


def show(console: Literal, found: Any) -> None:
    """Print the table; of many rows how they are spread."""
    columns = found.columns()
    labels = [name for name in columns if name not in ("value", "standard_error", "lower", "upper")]
    heads = {"value": "value", "standard_error": "std. error", "lower": f"{100 * found.level:g} % from"}
    table = Grid(padding=(0, 1, 0, 0))
    if len(columns["value"]) > MOST:
        value = np.asarray(columns["value"])
        value = value[np.isfinite(value)]
        table.add_column("")
        table.add_column("value", justify="right")
        spread = {"least": value.min(), "median": np.median(value), "mean": value.mean(), "most": value.max()}
        for name, one in spread.items():
            table.add_row(name, f"{one:#.5g}")
        note(f"{len(columns['value']):,} rows; --output FILE.csv writes all of them.")
    else:
        for name in columns:
            table.add_column(
                {**heads, "upper": "to"}.get(name, name.replace("_", " ")),
                justify="left" if name in labels else "right",
            )
        for row in zip(*columns.values(), strict=True):
            cells = zip(columns, row, strict=True)
            table.add_row(*(str(cell) if name in labels else f"{cell:#.5g}" for name, cell in cells))
    print_whole(console, table)
    for told in found.notes:
        console.say(told)


def as_csv(columns: dict[str, Any]) -> str:
    """Return a table as CSV with every digit."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(columns)
    for row in zip(*columns.values(), strict=True):
        writer.writerow([repr(float(c)) if isinstance(c, float) else c for c in row])
    return stream.getvalue()


elasticities_command = one_sentence(flat(elasticities))

"""``attnfit score``: how well a saved model predicts the rows of a file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from attnfit.cli import columns
from attnfit.cli.errors import Debug, InputError, one_sentence
from attnfit.cli.options import ReadOptions, flat
from attnfit.cli.output import check_paths, put_json, results
from attnfit.cli.saved import SavedRows, read_saved
from attnfit.cli.tables import Array, with_text
from attnfit.cli.validation import measures


def score(
    model: Annotated[Path, typer.Argument(help="File written by attnfit fit --save", metavar="MODEL")],
    data: Annotated[
        Path, typer.Argument(help="File with the model's columns and the target", metavar="DATA")
    ],
    reading: ReadOptions,
    target: Annotated[
        str | None, typer.Option(help="Column to predict.", show_default="that of the model's formula")
    ] = None,
    group: Annotated[
        str | None, typer.Option(help="Column of the market, traveller or origin of a row.")
    ] = None,
    weight: Annotated[str | None, typer.Option(help="Column of row weights.")] = None,
    offset: Annotated[str | None, typer.Option(help="Column added to the linear predictor.")] = None,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the scores here.")] = None,
    debug: Debug = False,
) -> None:
    """Print how well a saved model predicts the rows of a file."""
    check_paths({"MODEL": model, "DATA": data}, {"--json": json_path})
    rows = read_saved(
        model, data, reading, group, offset, more=tuple(name for name in (weight,) if name is not None)
    )
    formula = getattr(rows.estimator, "formula_", None)
    name = target or (formula or "").partition("~")[0].strip()
    if not name:
        raise InputError(f"{model} does not know what it explains; name the column with --target")
    inputs: dict[str, Any] = {"y": observed(rows, name), **rows.where}
    if weight is not None:
        inputs["sample_weight"] = columns.numbers(rows.table, weight, "--weight", non_negative=True)
    found = measures(rows.estimator, rows.X, inputs)
    sizes = {"rows": len(inputs["y"])}
    if rows.groups is not None:
        sizes["groups"] = len(np.unique(rows.groups))
    console = results(json_path)
    console.say(", ".join(f"{size:,} {what}" for what, size in sizes.items()))
    for measure, value in found.items():
        console.say(f"{measure} {value:.6g}")
    put_json(json_path, {"model": str(model), "data": str(data), **sizes, "scores": found})


def observed(rows: SavedRows, name: str) -> Array:
    """Return the target, or where it names the chosen alternative, which row that is."""
    columns.require(rows.table, name, "--target")
    if name not in rows.table.text:
        return columns.numbers(rows.table, name, "--target")
    if rows.alternatives is None:
        return columns.numbers(rows.table, name, "--target")
    words = with_text(rows.table, [name]).labels[name]
    return np.asarray(words == rows.alternatives, dtype=np.float64)


score_command = one_sentence(flat(score))

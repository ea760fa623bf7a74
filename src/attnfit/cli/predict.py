"""``attnfit predict``: a saved model on new rows."""

from __future__ import annotations

import csv
import gzip
import io
from itertools import compress
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from attnfit.cli import columns
from attnfit.cli.console import note
from attnfit.cli.errors import Debug, InputError, one_sentence
from attnfit.cli.models import (
    column_of,
    level_columns,
    levels_in,
    model_matrix,
    needed,
    predict_named,
    read_model,
    text_columns,
)
from attnfit.cli.output import STREAM, check_paths, put
from attnfit.cli.sources import is_parquet
from attnfit.cli.tables import Array, Table, read_table
from attnfit.writing import rendered

PREDICTED = "predicted"
# What is written is text or parquet: the ending of another format would promise something else.
ENDINGS = ("", ".csv", ".tsv", ".tab", ".txt", ".dat", ".gz", ".parquet", ".pq")


@one_sentence
def predict(
    model: Annotated[Path, typer.Argument(help="File written by attnfit fit --save", metavar="MODEL")],
    data: Annotated[
        Path, typer.Argument(help="File with the model's columns: CSV, Excel, parquet ...", metavar="DATA")
    ],
    output: Annotated[
        Path, typer.Option(help="File to write: .csv, .csv.gz, .parquet.", show_default="print CSV")
    ] = STREAM,
    group: Annotated[
        str | None, typer.Option(help="Column of the market, traveller or origin of a row.")
    ] = None,
    offset: Annotated[str | None, typer.Option(help="Column added to the linear predictor.")] = None,
    decimal: Annotated[
        str | None, typer.Option(help="Decimal mark of the file: . or , (by default as its entries show).")
    ] = None,
    missing: Annotated[
        str,
        typer.Option(
            help="Rows with a missing value: error, or drop (they are left out of the output, and the shares "
            "of a group are those of its other rows)."
        ),
    ] = "error",
    debug: Debug = False,
) -> None:
    """Add a column of predictions to a file."""
    check_paths({"MODEL": model, "DATA": data}, {"--output": output})
    if output.suffix.lower() not in ENDINGS:
        raise InputError(f"--output: {output} would be CSV by another name; write .csv, .csv.gz or .parquet")
    estimator = read_model(model)
    if group is not None and not hasattr(estimator, "n_groups_"):
        raise InputError(f"{model} is an exponential model, which has no groups; leave --group out")
    group = column_of(estimator, "groups") if group is None else group
    if group is None and getattr(estimator, "n_groups_", 1) > 1:
        raise InputError(
            f"{model} was fitted on {estimator.n_groups_:,} groups; name their column with --group"
        )
    labelled = [
        *([] if group is None else [group]),
        *(n for parts in level_columns(estimator) for n in parts),
    ]
    words = text_columns(estimator)
    table = read_table(data, [*labelled, *words], decimal)
    if is_parquet(output) and table.frame is None:
        raise InputError(f"--output: {data} is text, so its copy is too; give a name that ends in .csv")
    if PREDICTED in table.names:
        raise InputError(f"{data} already has a column {PREDICTED!r}; rename it")
    kept = columns.complete_rows(table, needed(table, estimator, offset), [*labelled, *words], missing)
    table = table if kept is None else table.rows(kept)
    where: dict[str, Any] = {}
    if group is not None:
        where["groups"] = columns.labels(table, group)
    if offset is not None:
        where["offset"] = columns.numbers(table, offset, "--offset")
    levels = levels_in(table, estimator)
    if levels is not None:
        where["absorb"] = levels
    X = model_matrix(table, estimator)
    table.tell(needed(table, estimator, offset))
    predicted = predict_named(estimator, X, where)
    if is_parquet(output):
        put(output, rendered(with_prediction(table, predicted).write_parquet))
    else:
        text = as_csv(table, predicted, kept) if table.frame is None else frame_as_csv(table, predicted)
        put(output, gzip.compress(text.encode(), mtime=0) if output.suffix.lower() == ".gz" else text)
    if levels is not None and not np.isfinite(predicted).all():
        n = int(np.count_nonzero(~np.isfinite(predicted)))
        note(
            f"Without a prediction (nan): {n:,} of {len(predicted):,} rows, for labels that the fit has not "
            "seen."
        )
    if output != STREAM:
        note(f"{len(predicted):,} rows with a column {PREDICTED!r} written to {output}.")


def as_csv(table: Table, predicted: Array, kept: Any = None) -> str:
    """Return a file of text as it stands, or the rows of it that are kept, with one more column."""
    assert table.source is not None
    stream = io.StringIO()
    with table.source.rows() as (reader, delimiter):
        writer = csv.writer(stream, delimiter=delimiter, lineterminator="\n")
        writer.writerow([*(name.strip() for name in next(reader)), PREDICTED])
        every = (row for row in reader if row)
        rows = every if kept is None else compress(every, kept)
        for row, value in zip(rows, predicted, strict=True):
            writer.writerow([*row, repr(float(value)).replace(".", table.decimal)])
    return stream.getvalue()


def frame_as_csv(table: Table, predicted: Array) -> str:
    """Return a data frame's rows as CSV, with one more column."""
    frame = with_prediction(table, predicted)
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(frame.columns)
    writer.writerows(frame.iter_rows())
    return stream.getvalue()


def with_prediction(table: Table, predicted: Array) -> Any:
    """Return the data frame that was read with one more column."""
    import narwhals as nw

    backend = table.frame.implementation
    return table.frame.with_columns(nw.new_series(PREDICTED, predicted, nw.Float64, backend=backend))

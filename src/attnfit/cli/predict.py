"""``attnfit predict``: a saved model on new rows."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Annotated, Any

import typer

from attnfit.cli import columns
from attnfit.cli.console import note
from attnfit.cli.errors import Debug, InputError, one_sentence
from attnfit.cli.models import model_matrix, predict_named, read_model
from attnfit.cli.output import STREAM, check_paths, put
from attnfit.writing import rendered
from attnfit.cli.tables import Array, Table, csv_reader, is_parquet, parquet_backend, read_table

PREDICTED = "predicted"


@one_sentence
def predict(
    model: Annotated[Path, typer.Argument(help="File written by attnfit fit --save", metavar="MODEL")],
    data: Annotated[
        Path, typer.Argument(help="CSV or parquet file with the model's columns", metavar="DATA")
    ],
    output: Annotated[Path, typer.Option(help="File to write.", show_default="print CSV")] = STREAM,
    group: Annotated[
        str | None, typer.Option(help="Column of the market, traveller or origin of a row.")
    ] = None,
    offset: Annotated[str | None, typer.Option(help="Column added to the linear predictor.")] = None,
    debug: Debug = False,
) -> None:
    """Add a column of predictions to a file."""
    check_paths({"MODEL": model, "DATA": data}, {"--output": output})
    if is_parquet(output) and not is_parquet(data):
        raise InputError(f"--output: {data} is text, so its copy is too; give a name that ends in .csv")
    estimator = read_model(model)
    if group is not None and not hasattr(estimator, "n_groups_"):
        raise InputError(f"{model} is an exponential model, which has no groups; leave --group out")
    if group is None and getattr(estimator, "n_groups_", 1) > 1:
        raise InputError(
            f"{model} was fitted on {estimator.n_groups_:,} groups; name their column with --group"
        )
    table = read_table(data, as_text=() if group is None else (group,))
    if PREDICTED in table.names:
        raise InputError(f"{data} already has a column {PREDICTED!r}; rename it")
    where: dict[str, Any] = {}
    if group is not None:
        where["groups"] = columns.labels(table, group, singles=True)
    if offset is not None:
        where["offset"] = columns.numbers(table, offset, "--offset")
    predicted = predict_named(estimator, model_matrix(table, estimator), where)
    if not is_parquet(data):
        put(output, as_csv(table, predicted))
    elif is_parquet(output):
        put(output, rendered(with_prediction(table, predicted).write_parquet))
    else:
        put(output, frame_as_csv(table, predicted))
    if output != STREAM:
        note(f"{len(predicted):,} rows with a column {PREDICTED!r} written to {output}.")


def as_csv(table: Table, predicted: Array) -> str:
    """Return a CSV file as it stands, with one more column."""
    stream = io.StringIO()
    with csv_reader(table.path) as reader:
        writer = csv.writer(stream, lineterminator="\n")
        next(reader)
        writer.writerow([*table.names, PREDICTED])
        rows = (row for row in reader if row)
        writer.writerows([*row, repr(float(value))] for row, value in zip(rows, predicted, strict=True))
    return stream.getvalue()


def frame_as_csv(table: Table, predicted: Array) -> str:
    """Return a parquet file's rows as CSV, with one more column."""
    frame = with_prediction(table, predicted)
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(frame.columns)
    writer.writerows(frame.iter_rows())
    return stream.getvalue()


def with_prediction(table: Table, predicted: Array) -> Any:
    """Return a parquet file as a data frame with one more column."""
    import narwhals as nw

    backend = parquet_backend()
    frame = nw.read_parquet(str(table.path), backend=backend)
    return frame.with_columns(nw.new_series(PREDICTED, predicted, nw.Float64, backend=backend))

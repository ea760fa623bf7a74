"""``attnfit fit softmax | exponential | rescaled``: a model of a file's columns."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import ExitStack
from functools import wraps
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from attnfit.cli import columns
from attnfit.cli.columns import Roles
from attnfit.cli.console import note, problem
from attnfit.cli.errors import Debug, Exit, InputError, one_sentence
from attnfit.cli.large import Scale, fit_large
from attnfit.cli.models import CONSTANT, FUNCTIONS, LOSSES, check_options, fit_named, new_model
from attnfit.cli.output import check_paths, put, put_json, results
from attnfit.cli.progress import FitProgress
from attnfit.cli.report import FitReport, end_of_fit
from attnfit.cli.tables import Table, read_table


def command_for(model: str) -> Callable[..., None]:
    """Return the command that fits one kind of model: `fit` with ``model`` given."""

    @wraps(fit)
    def command(**options: Any) -> None:
        fit(model=model, **options)

    signature = inspect.signature(fit, eval_str=True)
    options = [p for name, p in signature.parameters.items() if name != "model"]
    command.__signature__ = signature.replace(parameters=options)  # type: ignore[attr-defined]
    return command


@one_sentence
def fit(
    model: str,
    data: Annotated[Path, typer.Argument(help="CSV or parquet file", metavar="DATA")],
    target: Annotated[str, typer.Option(help="Column to explain: shares, choices, outcomes.")],
    group: Annotated[
        str | None, typer.Option(help="Column of the market, traveller or origin of a row.")
    ] = None,
    features: Annotated[
        str | None,
        typer.Option(
            help="Columns to explain it with, separated by commas; by default all numeric ones left."
        ),
    ] = None,
    loss: Annotated[
        str | None, typer.Option(help=f"For softmax: {', '.join(LOSSES)}.", show_default=LOSSES[0])
    ] = None,
    function: Annotated[
        str | None,
        typer.Option(
            help=f"For exponential and rescaled: {', '.join(FUNCTIONS)}.", show_default=FUNCTIONS[0]
        ),
    ] = None,
    weight: Annotated[str | None, typer.Option(help="Column of row weights.")] = None,
    offset: Annotated[str | None, typer.Option(help="Column added to the linear predictor.")] = None,
    outside_good: Annotated[
        bool,
        typer.Option(
            "--outside-good", help="Add to each group a row of zeros with the share that is left to one."
        ),
    ] = False,
    constant: Annotated[bool, typer.Option("--constant", help="Add a column of ones.")] = False,
    ridge: Annotated[float, typer.Option(help="Penalty 0.5 ridge |x|^2.")] = 0.0,
    tol: Annotated[float, typer.Option(help="Relative gradient at which to stop.")] = 1e-8,
    max_iter: Annotated[int, typer.Option(help="Largest number of steps.")] = 100,
    seed: Annotated[int, typer.Option(help="Seed of the row samples on large data.")] = 0,
    dask: Annotated[
        str | None,
        typer.Option(help="Fit on a Dask cluster: the address of its scheduler (tcp://...), or local."),
    ] = None,
    memory_limit: Annotated[
        str | None,
        typer.Option(help="Take no more memory than this, such as 1GB; parquet is read in pieces."),
    ] = None,
    checkpoint: Annotated[
        Path | None, typer.Option(help="Keep the state of the fit here; the same command goes on from it.")
    ] = None,
    afresh: Annotated[
        bool, typer.Option("--afresh", help="Start anew although the checkpoint exists.")
    ] = False,
    save: Annotated[Path | None, typer.Option(help="Write the model here (.safetensors).")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the fit here (.png, .pdf, .svg).")] = None,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the report here.")] = None,
    debug: Debug = False,
) -> None:
    """Fit a model to the columns of a file and print its coefficients."""
    given = {"loss": loss, "function": function, "group": group, "outside_good": outside_good or None}
    check_options(model, given)
    outputs = {"--save": save, "--plot": plot, "--json": json_path}
    check_paths({"DATA": data}, outputs, {"--checkpoint": checkpoint})
    scale = Scale(dask, memory_limit, checkpoint, resume=not afresh)
    if scale.is_large and (plot is not None or constant):
        option = "--plot" if plot is not None else "--constant"
        raise InputError(f"{option} needs the whole table; leave out --dask, --memory-limit and --checkpoint")
    if plot is not None:
        from attnfit.cli.figure import check_plot

        check_plot(plot)
    names = None if features is None else tuple(name.strip() for name in features.split(",") if name.strip())
    roles = Roles(target, names, group, weight, offset)
    own = {key: value for key, value in given.items() if value is not None and key != "group"}
    parameters = own | {"ridge": ridge, "tol": tol, "max_iter": max_iter, "random_state": seed}
    with FitProgress(tol) as progress, ExitStack() as stack:
        if scale.is_large:
            estimator = fit_large(model, data, roles, parameters, scale, progress, stack)
        else:
            table = read_table(data, as_text=() if group is None else (group,))
            X, inputs, used = read_inputs(
                table, roles, model, loss, outside_good=outside_good, constant=constant
            )
            progress.say("fitting")
            estimator = new_model(model, parameters)
            progress.watch(estimator)
            fit_named(estimator, X, used, inputs)
        end_of_fit(estimator.result_)
        progress.say("standard errors and certificate")
        report = make_report(estimator, model, target)
    report.show(results(save, json_path))
    if save is not None:
        from attnfit.estimators.files import dumps

        put(save, dumps(estimator))
    put_json(json_path, report.as_json())
    if plot is not None:
        from attnfit.cli.figure import draw

        draw(plot, estimator, X, inputs, report)
    if report.result.status == "precision":
        # As good as float64 allows is not a failure, whatever the tolerance.
        note(report.message)
    elif not report.result.converged:
        problem(report.message)
        raise typer.Exit(Exit.BAD_NEWS)


def read_inputs(
    table: Table, roles: Roles, model: str, loss: str | None, *, outside_good: bool, constant: bool
) -> tuple[Any, dict[str, Any], list[str]]:
    """Return features, the other arguments of ``fit`` and the names of the features."""
    # The target first: a slip there should not read as a complaint about some feature.
    shares = model == "softmax" and loss in (None, "cross_entropy", "kl")
    inputs: dict[str, Any] = {"y": columns.numbers(table, roles.target, "--target", non_negative=shares)}
    if roles.group is not None:
        inputs["groups"] = columns.labels(table, roles.group, singles=outside_good)
    if roles.weight is not None:
        inputs["sample_weight"] = columns.numbers(table, roles.weight, "--weight", non_negative=True)
    if roles.offset is not None:
        inputs["offset"] = columns.numbers(table, roles.offset, "--offset")
    used = list(columns.features_of(table, roles))
    X = columns.matrix(table, used)
    if roles.features is None:
        skipped = columns.left_out(table, roles)
        left = f"; left out because they hold text: {', '.join(skipped)}" if skipped else ""
        note(f"Features: {', '.join(used)}{left}.")
    if constant:
        X, used = np.column_stack([np.ones(len(X)), X]), [CONSTANT, *used]
    elif (model == "exponential" or outside_good) and not (X[0] == X).all(axis=0).any():
        note("No feature is constant, so the model has no intercept; add --constant for one.")
    if model == "softmax" and roles.group is None:
        note("All rows form one group; if there are several, name the column of the market with --group.")
    return X, inputs, used


def make_report(estimator: Any, model: str, target: str) -> FitReport:
    """Collect what is said about a fitted estimator."""
    choice = f"loss {estimator.loss}" if model == "softmax" else f"function {estimator.function}"
    return FitReport(
        title=f"{model} regression of {target}, {choice}",
        columns={key: list(values) for key, values in estimator.summary().columns().items()},
        result=estimator.result_,
        certificate=estimator.certificate_,
        loss=estimator.loss_value_,
        n_rows=estimator.n_rows_,
        n_groups=getattr(estimator, "n_groups_", 0),
        n_unbalanced=getattr(estimator, "n_unbalanced_groups_", 0),
    )

"""``attnfit fit softmax | exponential | rescaled``: a model of a file's columns."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import wraps
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from attnfit.cli.columns import Roles, listed
from attnfit.cli.console import note, problem
from attnfit.cli.errors import Debug, Exit, InputError, one_sentence
from attnfit.cli.models import FUNCTIONS, LOSSES, check_options, fit_named, new_model
from attnfit.cli.output import check_paths, put, put_json, results
from attnfit.cli.progress import FitProgress
from attnfit.cli.report import FitReport, end_of_fit
from attnfit.cli.rows import Reading, Rows, Scale, read_rows


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
    data: Annotated[
        Path,
        typer.Argument(
            help="CSV, Excel, parquet, feather or Stata, also packed; - for stdin.", metavar="DATA"
        ),
    ],
    target: Annotated[str, typer.Option(help="Column to explain: shares, choices, outcomes.")],
    group: Annotated[
        str | None, typer.Option(help="Column of the market, traveller or origin of a row.")
    ] = None,
    features: Annotated[
        str | None,
        typer.Option(
            help="Columns to explain it with, separated by commas; by default the numeric ones left that do "
            "not number rows."
        ),
    ] = None,
    exclude: Annotated[
        str | None, typer.Option(help="Columns to leave out of the default features, separated by commas.")
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
    counts: Annotated[
        bool, typer.Option("--counts", help="The target counts choices: small whole numbers are no codes.")
    ] = False,
    missing: Annotated[
        str, typer.Option(help="Rows with a missing value: drop (and say how many) or error.")
    ] = "error",
    decimal: Annotated[
        str | None, typer.Option(help="Decimal mark of the file: . or , (by default as its entries show).")
    ] = None,
    separation: Annotated[
        str,
        typer.Option(
            help="Where there is no finite minimum: warn, or drop the rows that say so and fit the rest."
        ),
    ] = "warn",
    starts: Annotated[
        int | None, typer.Option(min=1, help="Number of descents of a problem that is not convex.")
    ] = None,
    ridge: Annotated[float, typer.Option(help="Penalty 0.5 ridge |x|^2.")] = 0.0,
    tol: Annotated[
        float, typer.Option(help="Largest change of a fitted logit that the next step may make.")
    ] = 1e-8,
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
    if separation not in ("warn", "drop"):
        raise InputError(f"--separation must be warn or drop, not {separation!r}")
    given = {"loss": loss, "function": function, "group": group, "outside_good": outside_good or None}
    check_options(model, given)
    outputs = {"--save": save, "--plot": plot, "--json": json_path}
    check_paths({"DATA": data}, outputs, {"--checkpoint": checkpoint})
    if plot is not None:
        from attnfit.cli.figure import check_plot

        check_plot(plot)
    roles = Roles(target, listed(features), group, weight, offset, listed(exclude) or ())
    own = {key: value for key, value in given.items() if value is not None and key != "group"}
    parameters: dict[str, Any] = own | {
        "ridge": ridge,
        "tol": tol,
        "max_iter": max_iter,
        "random_state": seed,
    }
    if starts is not None:
        from attnfit.solvers import Newton

        parameters["solver"] = Newton(n_starts=starts)
    limits = {"checkpoint": checkpoint, "resume": not afresh, "memory_limit": memory_limit}
    scale = Scale(dask, memory_limit)
    with FitProgress(tol) as progress, ExitStack() as stack:
        rows = read_rows(
            data, roles, scale, Reading(decimal, missing), stack,
            shares=model != "exponential" and not counts,
            positive=model == "softmax" and loss in (None, "cross_entropy", "kl"),
        )  # fmt: skip
        if constant:
            rows = rows.with_constant()
        elif rows.here:
            remark(rows, model, outside_good=outside_good)
        if plot is not None and group is None and model != "exponential":
            rows.require_here()
        progress.say("fitting")
        estimator = new_model(model, parameters)
        progress.watch(estimator)
        fit_named(estimator, rows.X, rows.names, rows.inputs | limits)
        end_of_fit(estimator.result_)
        n_rows, n_groups = estimator.n_rows_, getattr(estimator, "n_groups_", 0)
        shown = None if plot is None else rows.drawn(roles, n_rows, n_groups)
        progress.say("standard errors and certificate")
        report = make_report(estimator, model, target, rows.repeated, rest_of(estimator, separation))
    report.show(results(save, json_path))
    if save is not None:
        from attnfit.estimators.files import dumps

        put(save, dumps(estimator))
    put_json(json_path, report.as_json())
    if plot is not None and shown is not None:
        from attnfit.cli.figure import draw

        draw(plot, estimator, *shown, report)
    if report.result.status == "precision":
        # As good as float64 allows is not a failure, whatever the tolerance.
        note(report.message)
    elif not report.result.converged:
        problem(f"{report.message}{offer(report.result, separation)}")
        raise typer.Exit(Exit.BAD_NEWS)


def remark(rows: Rows, model: str, *, outside_good: bool) -> None:
    """Say what the columns leave open."""
    X = rows.X
    if (model == "exponential" or outside_good) and not (X[0] == X).all(axis=0).any():
        note("No feature is constant, so the model has no intercept; add --constant for one.")
    if model == "softmax" and "groups" not in rows.inputs:
        note("All rows form one group; if there are several, name the column of the market with --group.")


def rest_of(estimator: Any, separation: str) -> Any:
    """Return the fit of the rows that remain where the others are to be dropped."""
    found = estimator.result_.separation
    if separation == "warn" or not _leaves_something(estimator.result_):
        return None
    return found.fit(tol=estimator.tol, max_iter=estimator.max_iter, random_state=estimator.random_state)


def _leaves_something(result: Any) -> bool:
    """Whether rows remain that determine a coefficient."""
    found = result.separation
    return found is not None and found.has_rest and bool(np.isfinite(result.x).any())


def offer(result: Any, separation: str) -> str:
    """Return what can be done about data without a finite minimum."""
    found = result.separation
    if found is None:
        return ""
    if _leaves_something(result):
        return "; add --separation drop to fit the remaining rows"
    if separation == "drop":
        nothing = found.has_rest or not found.remaining.any()
        why = "no coefficient has a finite value" if nothing else "rows on disk cannot be left out"
        return f"; --separation drop cannot help here: {why}"
    return ""


def make_report(
    estimator: Any, model: str, target: str, repeated: Callable[[Sequence[Any]], int], rest: Any
) -> FitReport:
    """Collect what is said about a fitted estimator; where ``rest`` is given, of the fit of these rows."""
    choice = f"loss {estimator.loss}" if model == "softmax" else f"function {estimator.function}"
    totals = getattr(estimator, "share_totals_", None)
    separation, n_rows = estimator.result_.separation, estimator.n_rows_
    separated = np.zeros(0, dtype=int) if separation is None else np.asarray(separation.rows)
    # Rows of zeros that the estimator adds stand after those of the data.
    outside = int((separated >= n_rows).sum())
    return FitReport(
        title=f"{model} regression of {target}, {choice}",
        columns={key: list(values) for key, values in estimator.summary().columns().items()},
        result=estimator.result_ if rest is None else rest,
        certificate=estimator.certificate_ if rest is None else rest.certificate(),
        loss=estimator.loss_value_,
        n_rows=n_rows,
        n_groups=getattr(estimator, "n_groups_", 0),
        totals=totals,
        n_repeated=repeated([label for label, _ in totals.above]) if totals and totals.n_above else 0,
        vanishing=(len(separated) - outside, outside),
        dropped=rest is not None,
    )

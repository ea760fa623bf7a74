"""``attnfit fit softmax | exponential | poisson | rescaled``: a model of a file's columns."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from attnfit.cli.columns import Roles, levels_of, listed
from attnfit.cli.console import note, problem
from attnfit.cli.errors import Debug, Exit, InputError, one_sentence
from attnfit.cli.models import check_options, fit_named, new_model
from attnfit.cli.options import (
    ColumnOptions,
    InferenceOptions,
    ModelOptions,
    OutputOptions,
    ReadOptions,
    ScaleOptions,
    flat,
)
from attnfit.cli.output import check_paths, put, put_json, results
from attnfit.cli.progress import FitProgress
from attnfit.cli.report import FitReport, end_of_fit
from attnfit.cli.rows import Rows, read_rows
from attnfit.cli.validation import Scores, cross_validate, hold_out, measures, units_of

# Lines of a summary about its standard errors.
ERRORS = ("standard errors", "note: ")
# Models whose target is shares or choices.
SHARES = ("softmax", "rescaled")


def command_for(model: str) -> Callable[..., None]:
    """Return the command that fits one kind of model: `fit` with ``model`` given."""
    return one_sentence(flat(fit, model=model))


def fit(
    model: str,
    data: Annotated[
        Path,
        typer.Argument(
            help="CSV, Excel, parquet, feather or Stata, also packed; - for stdin.", metavar="DATA"
        ),
    ],
    columns: ColumnOptions,
    reading: ReadOptions,
    how: ModelOptions,
    inference: InferenceOptions,
    scale: ScaleOptions,
    outputs: OutputOptions,
    debug: Debug = False,
) -> None:
    """Fit a model to the columns of a file and print its coefficients."""
    check(model, data, columns, how, inference, scale, outputs)
    parameters = how.parameters(model)
    parameters["covariance"] = inference.kind(columns.cluster is not None)
    parameters["weight_type"] = inference.weight_type
    with FitProgress(how.tol) as progress, ExitStack() as stack:
        rows = read(model, data, columns, reading, how, scale, stack)
        if outputs.plot is not None and columns.group is None and model in SHARES:
            rows.require_here()
        held = None
        if inference.holdout is not None:
            rows, held, title = hold_out(rows, inference.holdout, how.seed)
        scores: list[Scores] = []
        if how.ridge == "auto":
            progress.say("choosing the ridge")
            parameters["ridge"], found = choose_ridge(parameters, rows, inference.cv or 5)
            scores.append(found)
        progress.say("fitting")
        estimator = new_model(model, parameters)
        progress.watch(estimator)
        fit_named(estimator, rows, scale.limits)
        end_of_fit(estimator.result_)
        shown = None
        if outputs.plot is not None:
            roles = roles_of(columns)
            shown = rows.drawn(roles, estimator.n_rows_, getattr(estimator, "n_groups_", 0))
        if held is not None:
            seen = measures(estimator, held.X, held.inputs)
            scores.append(Scores(title, {name: [value] for name, value in seen.items()}))
        if inference.cv is not None:
            progress.say("cross-validating")
            scores.append(
                cross_validate(
                    lambda: new_model(model, parameters), lambda one, some: fit_named(one, some, {}),
                    rows, inference.cv,
                )
            )  # fmt: skip
        progress.say("standard errors and certificate")
        rest = rest_of(estimator, how.separation)
        named = {"group": columns.group, "cluster": columns.cluster}
        report = make_report(
            estimator, model, rows, rest, scores, inference.level, named, counts=columns.counts
        )
        if outputs.report is not None:
            from attnfit.cli.handover import Handover

            page = Handover.of(estimator, report, rows, data).written(outputs.report)
    report.show(results(outputs.save, outputs.json_path, outputs.report))
    if outputs.save is not None:
        from attnfit.estimators.files import dumps

        put(outputs.save, dumps(estimator))
    put_json(outputs.json_path, report.as_json())
    if outputs.report is not None:
        put(outputs.report, page)
    if outputs.plot is not None and shown is not None:
        from attnfit.cli.figure import draw

        draw(outputs.plot, estimator, *shown, report)
    if report.result.status == "precision":
        # As good as float64 allows is not a failure, whatever the tolerance.
        note(report.message)
    elif not report.result.converged:
        problem(f"{report.message}{offer(report.result, how.separation)}")
        raise typer.Exit(Exit.BAD_NEWS)


def check(
    model: str,
    data: Path,
    columns: ColumnOptions,
    how: ModelOptions,
    inference: InferenceOptions,
    scale: ScaleOptions,
    outputs: OutputOptions,
) -> None:
    """Raise InputError, before any work, for options that do not go together or cannot be written."""
    check_options(model, how.own | {"group": columns.group})
    check_paths({"DATA": data}, outputs.named, {"--checkpoint": scale.checkpoint})
    if outputs.plot is not None:
        from attnfit.cli.figure import check_plot

        check_plot(outputs.plot)
    if outputs.report is not None:
        from attnfit.cli.handover import check_report

        check_report(outputs.report)
    inference.kind(columns.cluster is not None)
    if columns.absorb is not None:
        check_absorb(model, columns, how, scale)
    away = scale.dask is not None or scale.memory_limit is not None
    once = {"--holdout": inference.holdout, "--cv": inference.cv, "--formula": columns.formula}
    whole = next((option for option, value in once.items() if value is not None), None)
    if away and whole is not None:
        raise InputError(f"{whole} needs the rows in memory; leave out --dask and --memory-limit")
    if columns.formula is not None:
        from attnfit.cli.formula import check_formula

        check_formula(columns)
    elif columns.target is None:
        raise InputError('Name the column to explain with --target, or give --formula "target ~ terms"')
    elif columns.alternatives is not None:
        raise InputError("--alternatives goes with --formula; leave it out")


def check_absorb(model: str, columns: ColumnOptions, how: ModelOptions, scale: ScaleOptions) -> None:
    """Raise InputError for what absorbed effects have no form for."""
    without = {
        "--constant": columns.constant and "the effects hold the constant",
        "--outside-good": how.outside_good and "an outside good has no label",
        "--ridge auto": how.ridge == "auto" and "give a number",
        "--checkpoint": scale.checkpoint is not None and "such a fit is not recorded",
        "--dask": scale.dask is not None and "labels and cells are held in memory",
        "--memory-limit": scale.memory_limit is not None and "labels and cells are held in memory",
        "--ties exact": how.ties == "exact" and "the number of ones is not conditioned on",
    }  # fmt: skip
    for option, why in without.items():
        if why:
            raise InputError(f"{option} does not go with --absorb ({why}); leave one of them out")
    if model == "rescaled":
        raise InputError("--absorb is for softmax, poisson and exponential")


def roles_of(columns: ColumnOptions) -> Roles:
    """Return which column plays which part in a fit without a formula."""
    return Roles(
        columns.target or "", listed(columns.features), columns.group, columns.weight, columns.offset,
        listed(columns.exclude) or (), listed(columns.cluster) or (), levels_of(columns.absorb),
    )  # fmt: skip


def read(
    model: str,
    data: Path,
    columns: ColumnOptions,
    reading: ReadOptions,
    how: ModelOptions,
    scale: ScaleOptions,
    stack: ExitStack,
) -> Rows:
    """Read the rows of the fit, by a formula or column by column."""
    shares = model in SHARES and not columns.counts
    if columns.formula is not None:
        from attnfit.cli.formula import read_formula

        constants = model not in SHARES or how.outside_good
        return read_formula(data, columns, reading, shares=shares, constants=constants)
    positive = model == "poisson" or (model == "softmax" and how.loss in (None, "cross_entropy", "kl"))
    rows = read_rows(data, roles_of(columns), scale, reading, stack, shares=shares, positive=positive)
    if columns.constant:
        return rows.with_constant()
    if rows.here:
        remark(rows, model, outside_good=how.outside_good)
    return rows


def choose_ridge(parameters: dict[str, Any], rows: Rows, n_folds: int) -> tuple[float, Scores]:
    """Return the ridge with the least log loss of folds, and the path."""
    from attnfit.model_selection import SoftmaxRegressorCV

    own = ("n_starts", "solver", "ties")
    model = SoftmaxRegressorCV(
        cv=n_folds, **{"loss": "cross_entropy", **{k: v for k, v in parameters.items() if k not in own}}
    )
    inputs = {name: of for name, of in rows.inputs.items() if of is not None}
    model.fit(rows.X, **inputs)
    k = int(np.argmax(model.ridges_ == model.ridge_))
    title = f"Ridge {model.ridge_:.6g}, of {len(model.ridges_)} by {n_folds} folds of {units_of(rows).name}"
    return model.ridge_, Scores(title, {"log loss": model.scores_[k].tolist()})


def remark(rows: Rows, model: str, *, outside_good: bool) -> None:
    """Say what the columns leave open."""
    X = rows.X
    if (
        "absorb" not in rows.inputs
        and (model not in SHARES or outside_good)
        and not (X[0] == X).all(axis=0).any()
    ):
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
    estimator: Any,
    model: str,
    rows: Rows,
    rest: Any,
    scores: Sequence[Scores] = (),
    level: float = 0.95,
    named: Mapping[str, str | None] | None = None,
    *,
    counts: bool = False,
) -> FitReport:
    """Collect what is said about a fitted estimator.

    Parameters
    ----------
    estimator : fitted estimator
    model : str
    rows : Rows
    rest : Result, optional
        The fit of the rows that remain, where the others were dropped.
    scores, level
        See `FitReport`.
    named : dict, optional
        The columns of groups and clusters, by which the errors name their unit.
    counts : bool
        Whether the user has said that the target counts choices.
    """
    choices = {"loss": ("softmax",), "function": ("exponential", "rescaled")}
    choice = "".join(f", {name} {getattr(estimator, name)}" for name, of in choices.items() if model in of)
    totals = getattr(estimator, "share_totals_", None)
    separation, n_rows = estimator.result_.separation, estimator.n_rows_
    dropped = estimator.result_.dropped or {}
    separated = np.asarray(dropped.get("separated", ()) if separation is None else separation.rows, dtype=int)
    # Rows of zeros that the estimator adds stand after those of the data.
    outside = int((separated >= n_rows).sum())
    summary = estimator.summary(level=level)
    return FitReport(
        title=f"{model} regression of {rows.target}{choice}",
        columns={key: list(values) for key, values in summary.columns().items()},
        result=estimator.result_ if rest is None else rest,
        certificate=estimator.certificate_ if rest is None else rest.certificate(),
        loss=estimator.loss_value_,
        n_rows=n_rows,
        n_groups=getattr(estimator, "n_groups_", 0),
        totals=totals,
        n_repeated=rows.repeated([label for label, _ in totals.above]) if totals and totals.n_above else 0,
        vanishing=(len(separated) - outside, outside),
        dropped=rest is not None,
        errors=tuple(_with_unit(line, named or {}) for line in summary.lines if line.startswith(ERRORS)),
        statistics=estimator.__dict__.get("_statistics"),
        scores=tuple(scores),
        level=level,
        counts=counts,
        absorbed=absorbed_lines(estimator.result_),
    )


def absorbed_lines(result: Any) -> tuple[str, ...]:
    """Return what is said of absorbed effects: their levels, what can be compared, who was left out."""
    effects = result.effects
    if effects is None:
        return ()
    told = ", ".join(f"{s.name} ({len(s):,} levels)" for s in effects)
    n = effects.n_components
    apart = f"; {n:,} components, between which effects cannot be compared" if n > 1 else ""
    left = result.absorbed.note.replace(": result.dropped", "")
    return (f"effects absorbed: {told}{apart}", *([left] if left else []))


def _with_unit(line: str, named: Mapping[str, str | None]) -> str:
    """Name the unit of the errors as the file does."""
    for unit, column in named.items():
        if column is not None:
            line = line.replace(f"unit {unit},", f"unit {unit} ({column}),")
    return line

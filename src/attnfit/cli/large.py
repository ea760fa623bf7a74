"""Fits of files that do not fit in memory, on a cluster, or with a checkpoint."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from attnfit.cli import columns
from attnfit.cli.cluster import connected
from attnfit.cli.columns import Roles
from attnfit.cli.errors import InputError, suggest
from attnfit.cli.models import new_model
from attnfit.cli.progress import FitProgress
from attnfit.cli.tables import read_table


@dataclass(frozen=True)
class Scale:
    """How a large fit is run; all None for an ordinary one.

    Attributes
    ----------
    dask : str
        Address of a Dask scheduler, or "local" for workers on this machine.
    memory_limit : str
        Such as "1GB": data are read from disk in pieces.
    checkpoint : Path
        File from which an interrupted fit goes on.
    resume : bool
    """

    dask: str | None = None
    memory_limit: str | None = None
    checkpoint: Path | None = None
    resume: bool = True

    @property
    def is_large(self) -> bool:
        """Whether anything is asked for."""
        return self.dask is not None or self.memory_limit is not None or self.checkpoint is not None


@dataclass(frozen=True)
class Rows:
    """The columns of a file in their parts, wherever they are."""

    A: Any
    b: Any
    groups: Any
    weights: Any
    offset: Any
    names: list[str]


def fit_large(
    model: str,
    data: Path,
    roles: Roles,
    parameters: dict[str, Any],
    scale: Scale,
    progress: FitProgress,
    stack: ExitStack,
) -> Any:
    """Return the estimator with what was fitted; ``parameters`` are its own. The workers are there until
    ``stack`` is closed.

    Raises
    ------
    InputError
        If the file has no such columns, or an option has no meaning here.
    """
    if parameters.get("outside_good"):
        raise InputError(
            "--outside-good needs the whole table; add a row of zeros to each group of the file, or leave "
            "out --dask, --memory-limit and --checkpoint"
        )
    if roles.weight is not None and roles.group is None and model != "exponential":
        raise InputError(
            "--weight without --group repeats rows, which needs the whole table; name a group, or leave out "
            "--dask, --memory-limit and --checkpoint"
        )
    estimator = new_model(model, parameters)
    if scale.dask is not None:
        stack.enter_context(connected(scale.dask))
    rows = _rows(data, roles, scale)
    progress.say("fitting")
    _fit(estimator, model, rows, scale, progress)
    estimator.feature_names_in_ = np.array(rows.names, dtype=object)
    return estimator


def _fit(estimator: Any, model: str, rows: Rows, scale: Scale, progress: FitProgress) -> None:
    from attnfit import minimize, problems
    from attnfit.estimators import inference

    given = {"weights": rows.weights, "offset": rows.offset, "ridge": estimator.ridge}
    if model == "exponential":
        problem: Any = problems.Exponential(rows.A, rows.b, estimator.function, **given)
    elif model == "softmax":
        problem = problems.Softmax(rows.A, rows.b, rows.groups, estimator.loss, **given)
    else:
        problem = problems.Rescaled(rows.A, rows.b, estimator.function, rows.groups, **given)
    result = minimize(
        problem,
        tol=estimator.tol,
        max_iter=estimator.max_iter,
        random_state=estimator.random_state,
        callback=progress.record,
        checkpoint=scale.checkpoint,
        resume=scale.resume,
        memory_limit=scale.memory_limit,
    )
    estimator.result_, estimator.coef_ = result, result.x
    estimator._limit = None if result.separation is None else result.separation.point
    estimator.n_iter_, estimator.n_rows_ = max(1, result.n_iter), problem.n_rows
    estimator.n_features_in_ = problem.n_unknowns
    estimator.loss_value_ = inference.loss_without_penalties(problem, result.x, result.value)
    # One more number a row would have to be kept.
    estimator.__dict__["r2_"] = float("nan")
    progress.say("standard errors")
    estimator.__dict__["_covariance"] = inference.covariance_of(result, problem)
    if model != "exponential":
        estimator.n_groups_, estimator.n_unbalanced_groups_ = problem.n_groups, 0
        if problem.n_groups == 1:
            setattr(estimator, estimator._normaliser_name, _normaliser(problem, estimator._point))


def _normaliser(problem: Any, x: Any) -> float:
    """Return the normaliser of the only group."""
    at = problem.evaluate(x)
    if problem.n_long:
        return float(at.state[0, 0])
    (chunk,) = problem.chunks
    return float(problem.loss.reference(problem.logits(chunk, x)[1], chunk.segments)[0])


def _rows(data: Path, roles: Roles, scale: Scale) -> Rows:
    if not data.exists():
        raise InputError(f"There is no file {data}; check the path (the current folder is {Path.cwd()})")
    parquet = data.is_dir() or data.suffix.lower() in (".parquet", ".pq")
    if scale.dask is not None:
        return _in_dask(data, roles, parquet=parquet)
    return _on_disk(data, roles) if parquet else _in_memory(data, roles)


def _in_memory(data: Path, roles: Roles) -> Rows:
    table = read_table(data, as_text=() if roles.group is None else (roles.group,))
    names = list(columns.features_of(table, roles))

    def optional(name: str | None, option: str, **rules: bool) -> Any:
        return None if name is None else columns.numbers(table, name, option, **rules)

    return Rows(
        columns.matrix(table, names),
        columns.numbers(table, roles.target, "--target"),
        None if roles.group is None else columns.labels(table, roles.group, singles=False),
        optional(roles.weight, "--weight", non_negative=True),
        optional(roles.offset, "--offset"),
        names,
    )


def _on_disk(data: Path, roles: Roles) -> Rows:
    import pyarrow.dataset as ds

    from attnfit.designs import open_source

    schema = ds.dataset(data, format="parquet").schema
    numeric = [f.name for f in schema if _is_numeric(f.type)]
    names = _features(roles, list(schema.names), numeric, data)

    def column(name: str | None) -> Any:
        return None if name is None else open_source(data, name)

    A = open_source(data, names)
    return Rows(
        A, column(roles.target), column(roles.group), column(roles.weight), column(roles.offset), names
    )


def _in_dask(data: Path, roles: Roles, *, parquet: bool) -> Rows:
    import dask.dataframe as dd

    path = str(data.absolute())
    frame = dd.read_parquet(path) if parquet else dd.read_csv(path)
    numeric = [name for name, dtype in frame.dtypes.items() if getattr(dtype, "kind", "O") in "fiub"]
    names = _features(roles, list(frame.columns), numeric, data)

    def column(name: str | None) -> Any:
        return None if name is None else frame[name]

    return Rows(
        frame[names],
        column(roles.target),
        column(roles.group),
        column(roles.weight),
        column(roles.offset),
        names,
    )


def _features(roles: Roles, known: list[str], numeric: list[str], data: Path) -> list[str]:
    for name, option in roles.taken.items():
        if name not in known:
            hint = suggest(name, known, "its columns are")
            raise InputError(f"{data} has no column {name!r}, which {option} needs{hint}")
    names = list(roles.features or [name for name in numeric if name not in roles.taken])
    for name in names:
        if name not in known:
            hint = suggest(name, known, "its columns are")
            raise InputError(f"{data} has no column {name!r}, which --features needs{hint}")
    if not names:
        raise InputError(f"{data} has no numeric column left for a feature; add one")
    return names


def _is_numeric(kind: Any) -> bool:
    import pyarrow as pa

    return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind))

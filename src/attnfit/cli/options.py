"""The options of a fit in groups, and commands that take such groups."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from attnfit.cli.errors import InputError
from attnfit.cli.models import FUNCTIONS, LOSSES

KINDS = ("auto", "classic", "robust", "row", "cluster")


@dataclass(frozen=True)
class ColumnOptions:
    """Which column plays which part."""

    target: Annotated[
        str | None, typer.Option(help="Column to explain: shares, choices, outcomes; or use --formula.")
    ] = None
    formula: Annotated[
        str | None,
        typer.Option(help='Such as "choice ~ cost + log(time) + C(mode)": in place of --target, --features.'),
    ] = None
    group: Annotated[str | None, typer.Option(help="Column of the market, traveller or origin of a row.")] = (
        None
    )
    alternatives: Annotated[
        str | None,
        typer.Option(help="With --formula: column that names the alternative, if the target is a name."),
    ] = None
    features: Annotated[
        str | None,
        typer.Option(
            help="Columns to explain it with, separated by commas; by default the numeric ones left that do "
            "not number rows."
        ),
    ] = None
    exclude: Annotated[
        str | None, typer.Option(help="Columns to leave out of the default features, separated by commas.")
    ] = None
    cluster: Annotated[
        str | None,
        typer.Option(help="Column of what was drawn independently, such as persons; two with a comma."),
    ] = None
    absorb: Annotated[
        str | None,
        typer.Option(
            help="Columns with an effect for each of their labels, fitted without a column each: "
            "origin*year,destination*year; * joins columns to one set of combinations."
        ),
    ] = None
    weight: Annotated[str | None, typer.Option(help="Column of row weights.")] = None
    offset: Annotated[str | None, typer.Option(help="Column added to the linear predictor.")] = None
    constant: Annotated[bool, typer.Option("--constant", help="Add a column of ones.")] = False
    counts: Annotated[
        bool, typer.Option("--counts", help="The target counts choices: small whole numbers are no codes.")
    ] = False


@dataclass(frozen=True)
class ReadOptions:
    """How a file is read: the decimal mark, and what becomes of rows with a missing value."""

    missing: Annotated[
        str,
        typer.Option(
            help="Rows with a missing value: drop (and say how many; with --formula whole groups) or error."
        ),
    ] = "error"
    decimal: Annotated[
        str | None, typer.Option(help="Decimal mark of the file: . or , (by default as its entries show).")
    ] = None


@dataclass(frozen=True)
class ModelOptions:
    """What is fitted, and how far."""

    loss: Annotated[
        str | None, typer.Option(help=f"For softmax: {', '.join(LOSSES)}.", show_default=LOSSES[0])
    ] = None
    function: Annotated[
        str | None,
        typer.Option(
            help=f"For exponential and rescaled: {', '.join(FUNCTIONS)}.", show_default=FUNCTIONS[0]
        ),
    ] = None
    outside_good: Annotated[
        bool,
        typer.Option(
            "--outside-good", help="Add to each group a row of zeros with the share that is left to one."
        ),
    ] = False
    ties: Annotated[
        str | None,
        typer.Option(help="For softmax, several ones in a group: counts, or exact, their number as given."),
    ] = None
    separation: Annotated[
        str,
        typer.Option(
            help="Where there is no finite minimum: warn, or drop the rows that say so and fit the rest."
        ),
    ] = "warn"
    starts: Annotated[
        int | None, typer.Option(min=1, help="Number of descents of a problem that is not convex.")
    ] = None
    ridge: Annotated[
        str, typer.Option(help="Penalty 0.5 ridge |x|^2: a number, or auto (softmax: by cross-validation).")
    ] = "0"
    tol: Annotated[
        float, typer.Option(help="Largest change of a fitted logit that the next step may make.")
    ] = 1e-8
    max_iter: Annotated[int, typer.Option(help="Largest number of steps.")] = 100
    seed: Annotated[int, typer.Option(help="Seed of row samples on large data, and of --holdout.")] = 0

    def __post_init__(self) -> None:
        """Raise InputError for what no model takes."""
        if self.ties not in (None, "counts", "exact"):
            raise InputError(f"--ties must be counts or exact, not {self.ties!r}")
        if self.separation not in ("warn", "drop"):
            raise InputError(f"--separation must be warn or drop, not {self.separation!r}")
        if self.ridge != "auto":
            try:
                float(self.ridge)
            except ValueError:
                raise InputError(f"--ridge must be a number or auto, not {self.ridge!r}") from None

    @property
    def own(self) -> dict[str, Any]:
        """What only some models have; None where it was not given."""
        outside = self.outside_good or None
        return {"loss": self.loss, "function": self.function, "ties": self.ties, "outside_good": outside}

    def parameters(self, model: str) -> dict[str, Any]:
        """Return what the estimator is made with."""
        found: dict[str, Any] = {name: value for name, value in self.own.items() if value is not None}
        found |= {"tol": self.tol, "max_iter": self.max_iter, "random_state": self.seed}
        if self.ridge != "auto":
            found["ridge"] = float(self.ridge)
        elif model != "softmax":
            raise InputError(f"--ridge auto is for softmax; give {model} a number")
        if self.starts is not None:
            from attnfit.solvers import Newton

            found["solver"] = Newton(n_starts=self.starts)
        return found


@dataclass(frozen=True)
class InferenceOptions:
    """What is said beyond the coefficients."""

    se: Annotated[
        str, typer.Option(help=f"Standard errors: {', '.join(KINDS)}; with --cluster clustered.")
    ] = "auto"
    weight_type: Annotated[
        str, typer.Option(help="What --weight holds: sampling weights, or frequency (numbers of copies).")
    ] = "sampling"
    level: Annotated[float, typer.Option(help="Cover of intervals.")] = 0.95
    holdout: Annotated[
        float | None,
        typer.Option(help="Leave this share of the groups (clusters, rows) out of the fit and score it."),
    ] = None
    cv: Annotated[
        int | None,
        typer.Option(min=2, help="Cross-validate with so many folds of groups (clusters, rows)."),
    ] = None

    def __post_init__(self) -> None:
        """Raise InputError for what has no meaning."""
        if self.se not in KINDS:
            raise InputError(f"--se must be one of {', '.join(KINDS)}, not {self.se!r}")
        if self.weight_type not in ("sampling", "frequency"):
            raise InputError(f"--weight-type must be sampling or frequency, not {self.weight_type!r}")
        if not 0.0 < self.level < 1.0:
            raise InputError(f"--level must lie between 0 and 1, not {self.level:g}; 0.95 gives 95 %")
        if self.holdout is not None and not 0.0 < self.holdout < 1.0:
            raise InputError(
                f"--holdout is a share between 0 and 1, not {self.holdout:g}; 0.2 leaves out a fifth"
            )

    def kind(self, clustered: bool) -> str:
        """Return the kind of standard errors: robust ones of clusters are clustered."""
        if clustered and self.se in ("classic", "row"):
            raise InputError(f"--cluster has no meaning with --se {self.se}; leave one of them out")
        if self.se == "cluster" and not clustered:
            raise InputError("--se cluster needs --cluster, the column of what was drawn independently")
        return "cluster" if clustered and self.se == "robust" else self.se


@dataclass(frozen=True)
class ScaleOptions:
    """How a large fit is run; as they are for an ordinary one."""

    dask: Annotated[
        str | None,
        typer.Option(help="Fit on a Dask cluster: the address of its scheduler (tcp://...), or local."),
    ] = None
    memory_limit: Annotated[
        str | None,
        typer.Option(help="Take no more memory than this, such as 1GB; parquet is read in pieces."),
    ] = None
    checkpoint: Annotated[
        Path | None, typer.Option(help="Keep the state of the fit here; the same command goes on from it.")
    ] = None
    afresh: Annotated[bool, typer.Option("--afresh", help="Start anew although the checkpoint exists.")] = (
        False
    )

    @property
    def limits(self) -> dict[str, Any]:
        """What ``fit`` takes of it."""
        limits = {"checkpoint": self.checkpoint, "memory_limit": self.memory_limit}
        known: dict[str, Any] = {name: value for name, value in limits.items() if value is not None}
        return known | ({"resume": False} if self.afresh else {})


@dataclass(frozen=True)
class OutputOptions:
    """What is written."""

    save: Annotated[Path | None, typer.Option(help="Write the model here (.safetensors).")] = None
    report: Annotated[Path | None, typer.Option(help="Write a report to hand over: .html, .md or .tex.")] = (
        None
    )
    plot: Annotated[Path | None, typer.Option(help="Draw the fit here (.png, .pdf, .svg).")] = None
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the results here as data.")] = None

    @property
    def named(self) -> dict[str, Path | None]:
        """The files by option."""
        return {
            "--save": self.save,
            "--report": self.report,
            "--plot": self.plot,
            "--json": self.json_path,
        }


def flat(command: Callable[..., None], **fixed: Any) -> Callable[..., None]:
    """Return a command whose groups of options are single options, as typer reads and passes them.

    Parameters
    ----------
    command : callable
        Parameters whose types are dataclasses are groups.
    **fixed
        Parameters that the command line does not give.
    """
    parameters = inspect.signature(command, eval_str=True).parameters
    groups: dict[str, Any] = {
        name: p.annotation for name, p in parameters.items() if is_dataclass(p.annotation)
    }
    single: list[inspect.Parameter] = []
    for name, parameter in parameters.items():
        if name in groups:
            hints = get_type_hints(groups[name], include_extras=True)
            single += [
                parameter.replace(name=field.name, annotation=hints[field.name], default=field.default)
                for field in fields(groups[name])
            ]
        elif name not in fixed:
            single.append(parameter)

    @wraps(command)
    def flattened(**options: Any) -> None:
        made = {
            name: kind(**{field.name: options.pop(field.name) for field in fields(kind)})
            for name, kind in groups.items()
        }
        command(**fixed, **made, **options)

    without = [p for p in single if p.default is inspect.Parameter.empty]
    with_default = [p for p in single if p.default is not inspect.Parameter.empty]
    flattened.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in [*without, *with_default]]
    )
    flattened.__annotations__ = {p.name: p.annotation for p in single}
    del flattened.__wrapped__
    return flattened

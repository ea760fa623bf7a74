"""What a fit prints at its end: the coefficients, one line of facts, and what went wrong."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

import typer
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

from attnfit.cli.console import Grid, Literal, problem
from attnfit.cli.errors import Exit, in_options

# Headers of the columns of `Summary.columns`.
HEADERS = {
    "name": "",
    "coefficient": "coefficient",
    "standard_error": "std. error",
    "z": "z",
    "t": "t",
    "p_value": "p",
    "lower": "from",
    "upper": "to",
}
# Trailing zeros are kept: digits that line up are easier to compare.
FORMATS = {"coefficient": "#.6g", "standard_error": "#.4g", "lower": "#.5g", "upper": "#.5g"}
FORMATS |= {"z": ".2f", "t": ".2f"}
# A narrow terminal loses whole columns rather than digits of a number; these together, in this order.
DISPENSABLE = (("lower", "upper"), ("z", "t"), ("p_value",), ("standard_error",))


@dataclass(frozen=True)
class FitReport:
    """Everything that is said about a fit.

    Attributes
    ----------
    title : str
        Model, target and loss.
    columns : dict of str to list
        The coefficient table, from ``summary().columns()``.
    result : Result
    certificate : Certificate
    loss : float
        Without penalties.
    n_rows, n_groups : int
        Groups 0 where the model has none.
    totals : ShareTotals or None
        What the targets of the groups sum to.
    n_repeated : int
        Rows of the groups named as above one that repeat another row.
    vanishing : (int, int)
        Rows of the data whose outputs go to zero, and groups in which that of the outside good does.
    dropped : bool
        Whether they were left out.
    errors : tuple of str
        Which kind of standard errors is shown and why, and what to know of them.
    statistics : FitStatistics, optional
    scores : tuple of Scores
        Of rows that were not fitted.
    level : float
        Cover of the intervals.
    counts : bool
        Whether the target counts choices, so that its totals say nothing.
    absorbed : tuple of str
        What is said of absorbed effects.
    """

    title: str
    columns: dict[str, list[Any]]
    result: Any
    certificate: Any
    loss: float
    n_rows: int
    n_groups: int
    totals: Any = None
    n_repeated: int = 0
    vanishing: tuple[int, int] = (0, 0)
    dropped: bool = False
    errors: tuple[str, ...] = ()
    statistics: Any = None
    scores: tuple[Any, ...] = ()
    level: float = 0.95
    counts: bool = False
    absorbed: tuple[str, ...] = ()

    @property
    def n_dropped(self) -> int:
        """Rows of the data that were left out."""
        return self.vanishing[0] if self.dropped else 0

    @property
    def message(self) -> str:
        """The solver's message with the names of the columns."""
        return in_options(self._named(self.result.message))

    def _named(self, sentence: str) -> str:
        names = self.columns["name"]

        def named(match: re.Match[str]) -> str:
            return ", ".join(str(names[int(k)]) for k in match[1].split(", "))

        return re.sub(r"\bcolumns? (\d+(?:, \d+)*)\b", named, sentence)

    def effects(self) -> list[str]:
        """Return what is said of absorbed effects, with the names of the columns."""
        return [self._named(line) for line in self.absorbed]

    def facts(self) -> list[str]:
        """Return the closing line in pieces."""
        result = self.result
        rows = f"{self.n_rows - self.n_dropped:,} rows" + (
            f" in {self.n_groups:,} group{'s'[: self.n_groups > 1]}" if self.n_groups else ""
        )
        facts = [
            f"loss {self.loss:.10g}",
            rows,
            f"{result.n_passes:.1f} reads of the data",
            f"{result.seconds:.2f} s",
        ]
        if "resumed from" in result.message:
            facts.append(result.message[result.message.index("resumed from") :])
        told = self._named(self.certificate.describe(result.x))
        facts.append(f"certified {told}" if self.certificate.valid else f"certificate {told}")
        return facts

    def local_values(self) -> dict[str, float]:
        """Return the local minima if there are several; starts that reached the same one count once."""
        if not self.result.converged:
            return {}
        kept: dict[str, float] = {}
        for name, value in self.result.local_values.items():
            if not any(math.isclose(value, other, rel_tol=1e-6) for other in kept.values()):
                kept[name] = value
        return kept if len(kept) > 1 else {}

    def remarks(self) -> list[str]:
        """Return what a reader of the coefficients should know besides."""
        remarks = []
        pairs = zip(self.columns["name"], self.columns["standard_error"], strict=True)
        finite = [math.isfinite(value) for value in self.columns["coefficient"]]
        values = dict(zip(map(str, self.columns["name"]), self.columns["coefficient"], strict=True))
        # Beside absorbed effects what is not identified has no value; elsewhere it has that of least norm.
        lost = [name for name, value in values.items() if self.absorbed and math.isnan(value)]
        if lost:
            remarks.append(
                f"The data do not identify {', '.join(lost)} (constant within the levels of an effect, or a "
                "combination of others): no value is shown"
            )
        endless = [n for n, value in values.items() if not math.isfinite(value) and n not in lost]
        if endless:
            n, outside = self.vanishing
            told = [f"{n:,} row{'s'[: n != 1]}"] if n or not outside else []
            told += [f"the outside good in {outside:,} group{'s'[: outside != 1]}"] if outside else []
            dropped = f" Dropped {' and '.join(told)}." if self.dropped else ""
            remarks.append(
                f"No finite value: {', '.join(endless)}. The outputs of {' and '.join(told)} go to "
                f"zero; the other coefficients are those of the fit without these rows.{dropped}"
            )
        shown = [pair for pair, known in zip(pairs, finite, strict=True) if known]
        unknown = [str(name) for name, error in shown if math.isnan(error)]
        if 0 < len(unknown) < len(self.columns["name"]) or self.certificate.n_unidentified:
            what = ", ".join(unknown) or "some combinations of coefficients"
            remarks.append(
                f"The data do not identify {what} (constant within groups, or a combination of others): "
                "the answer of smallest norm is shown"
            )
        remarks += self._totals()
        minima = self.local_values()
        if minima:
            listed = ", ".join(f"{value:.10g} from {name}" for name, value in minima.items())
            remarks.append(
                f"{len(minima)} local minima of the objective, of which the lowest is shown: {listed}"
            )
        return remarks

    def _totals(self) -> list[str]:
        """Return what is said of targets that do not sum to one."""
        if self.totals is None:
            return []
        remarks = []
        for n, examples, kind, remedy in (
            (self.totals.n_above, self.totals.above, "more than one", self._repeated()),
            (
                self.totals.n_below,
                self.totals.below,
                "less than one",
                "add --outside-good if the rest went elsewhere",
            ),
        ):
            if self.counts:
                continue
            if n and self.n_groups == 1:
                remarks.append(f"The target sums to {kind} ({examples[0][1]:.6g}); {remedy}")
            elif n:
                named = ", ".join(f"{label}: {total:.6g}" for label, total in examples)
                more = ", ..." if n > len(examples) else ""
                remarks.append(
                    f"The target sums to {kind} in {n:,} of {self.n_groups:,} groups ({named}{more}); "
                    f"{remedy}"
                )
        if self.totals.n_single:
            n = self.totals.n_single
            told = "groups have one row each" if n > 1 else "group has one row"
            remarks.append(
                f"{n:,} {told}, whose share is one whatever the features: nothing is learnt there (add "
                "--outside-good if the share is below one)"
            )
        return remarks

    def _repeated(self) -> str:
        if not self.n_repeated:
            more = (
                "name the column of the market with --group, if there is one: " if self.n_groups == 1 else ""
            )
            return f"{more}these are no shares of one whole, unless they count choices"
        n = self.n_repeated
        return f"{n:,} row{'s'[: n > 1]} there repeat{'s'[n > 1 :]} another one exactly: remove duplicates"

    def show(self, console: Literal) -> None:
        """Print the report."""
        console.say(self.title, "bold")
        print_whole(console, _fitting(self.columns, console, self.level))
        lines = ["; ".join(self.facts()), *self.errors]
        if self.statistics is not None:
            value = self.statistics.log_likelihood
            before = "" if value is None else f"log likelihood {value:.10g}, "
            lines += [before + line for line in self.statistics.describe()]
        for line in [*lines, *self.effects(), *(found.sentence() for found in self.scores), *self.remarks()]:
            console.say(line)

    def as_json(self) -> dict[str, Any]:
        """Return the report as data."""
        rows = [dict(zip(self.columns, row, strict=True)) for row in zip(*self.columns.values(), strict=True)]
        result, certificate = self.result, self.certificate
        return {
            "title": self.title,
            "coefficients": rows,
            "loss": self.loss,
            "objective": result.value,
            "rows": self.n_rows - self.n_dropped,
            "dropped_rows": self.n_dropped,
            "groups": self.n_groups,
            "groups_above_one": 0 if self.totals is None else self.totals.n_above,
            "groups_below_one": 0 if self.totals is None else self.totals.n_below,
            "groups_of_one_row": 0 if self.totals is None else self.totals.n_single,
            "reads_of_the_data": result.n_passes,
            "iterations": result.n_iter,
            "seconds": result.seconds,
            "converged": result.converged,
            "status": result.status,
            "message": self.message,
            "relative_gradient": result.gradient_norm,
            "solver": result.solver,
            "local_values": result.local_values,
            "certificate": {
                "valid": certificate.valid,
                "radius": certificate.radius,
                "scaled_radius": certificate.scaled_radius,
                "valid_for_predictions": certificate.valid_for_predictions,
                "coefficient_radius": certificate.coefficient_radius.tolist(),
                "reason": certificate.reason,
            },
            "standard_errors": list(self.errors),
            "absorbed": self.effects(),
            "level": self.level,
            "statistics": {} if self.statistics is None else self.statistics.values(),
            "scores": [{"title": found.title, "values": found.values} for found in self.scores],
        }


def end_of_fit(result: Any) -> None:
    """End the command where the user has stopped the fit: a half-done one is written nowhere."""
    if result.status == "interrupted":
        told = " The same command goes on from the checkpoint." if "checkpoint" in result.message else ""
        problem(f"Stopped before the end; nothing was written.{told}")
        raise typer.Exit(Exit.STOPPED)


def certificate_radius(certificate: Any) -> str:
    """Return the radius, or none."""
    return f"{certificate.radius:.1e}" if certificate.valid else "none"


def width_of(console: Console, *tables: Table) -> int:
    """Return the width that the widest table needs to show every digit."""
    unbounded = console.options.update(max_width=10_000)
    return max(Measurement.get(console, unbounded, table).maximum for table in tables)


def print_whole(console: Console, table: Table) -> None:
    """Print a table; one wider than the terminal is left to wrap: a cropped number is a wrong number."""
    width = console.width
    console.width = max(width, width_of(console, table))
    console.print(table)
    console.width = width


def _fitting(columns: dict[str, list[Any]], console: Console, level: float) -> Table:
    """Return the coefficient table with as many columns as the terminal holds."""
    shown = {name: values for name, values in columns.items() if name in HEADERS}
    table = _coefficients(shown, level)
    for names in DISPENSABLE:
        if width_of(console, table) <= console.width:
            break
        for name in names:
            shown.pop(name, None)
        table = _coefficients(shown, level)
    return table


def _coefficients(columns: dict[str, list[Any]], level: float) -> Table:
    table = Grid(padding=(0, 1, 0, 0))
    heads = HEADERS | {"lower": f"{100 * level:g} % from"}
    for k, name in enumerate(columns):
        table.add_column(heads[name], justify="right" if k else "left", no_wrap=True)
    for row in zip(*columns.values(), strict=True):
        table.add_row(*(_cell(name, value) for name, value in zip(columns, row, strict=True)))
    return table


def _cell(column: str, value: Any) -> str:
    if column == "name":
        return str(value)
    if not math.isfinite(value):
        return "-"
    if column == "p_value":
        return "<.0001" if value < 1e-4 else f"{value:.4f}"
    # Of data without noise: two decimals of a huge number say nothing.
    shape = "#.4g" if column in ("z", "t") and abs(value) >= 1e6 else FORMATS[column]
    return format(value, shape)

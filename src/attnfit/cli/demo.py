"""``attnfit demo``: three real data sets against the answers of other software."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

import typer
from rich.text import Text

from attnfit.cli.console import Grid, Literal, problem, stdout
from attnfit.cli.errors import Debug, Exit, one_sentence
from attnfit.cli.report import certificate_radius, print_whole, width_of
from attnfit.datasets import Dataset, Reference, load_austrian_flows, load_car_shares, load_travel_mode
from attnfit.losses.softmax import LossName

LOSSES = {"cross_entropy": "cross entropy", "squared": "squared"}
DUMMIES = "dummies: "
TRAP = (
    "The squared loss of one-hot choices has its minimum at the end of a flat valley, where constants and "
    "ttme mean little: compare the squared error, 70.547, and use cross entropy for choices."
)


@dataclass(frozen=True)
class Comparison:
    """A number of ours beside the reference's, as printed there."""

    label: str
    ours: float
    reference: float | None

    @property
    def decimals(self) -> int:
        """Decimals the reference prints; six where there is none."""
        if self.reference is None:
            return 6
        return max(0, -int(Decimal(repr(self.reference)).as_tuple().exponent))

    @property
    def agrees(self) -> bool:
        """Whether ours, rounded to the reference's decimals, could print the same number."""
        return self.reference is None or self.difference <= 0.5001 * 10.0**-self.decimals

    @property
    def difference(self) -> float:
        """Absolute difference, NaN without a reference."""
        return math.nan if self.reference is None else abs(self.ours - self.reference)

    def cells(self) -> list[Text]:
        """Return ours, the reference and the difference."""
        if self.reference is None:
            return [Text(f"{self.ours:.5g}"), Text("not given", style="dim"), Text("")]
        ours = Text(f"{self.ours:.{self.decimals}f}")
        reference = Text(f"{self.reference:.{self.decimals}f}")
        style, mark = ("green", "") if self.agrees else ("bold red", " !")
        return [ours, reference, Text(f"{self.difference:.0e}{mark}", style=style)]


@dataclass(frozen=True)
class Fit:
    """One loss of one data set; standard errors are compared too, but shown in one row."""

    comparisons: list[Comparison]
    errors: list[Comparison]
    radius: str
    reads: str

    def compared(self) -> list[Comparison]:
        """Return every number that has a reference."""
        return [c for c in [*self.comparisons, *self.errors] if c.reference is not None]

    def error_cells(self) -> list[Text]:
        """Return what is said about the standard errors."""
        known = [c for c in self.errors if c.reference is not None]
        if not known:
            return [Text("")] * 3
        worst = max(known, key=lambda c: c.difference * 10.0**c.decimals)
        return [Text(f"{len(known)} numbers"), Text(""), worst.cells()[2]]


def fit(data: Dataset, loss: LossName) -> Fit:
    """Fit a data set and line it up with its reference."""
    # A second of imports that --help should not wait for.
    from attnfit.estimators import SoftmaxRegressor

    weights = data.weights if loss == "cross_entropy" else None
    with warnings.catch_warnings():
        # TRAP says it for the one data set of choices.
        warnings.filterwarnings("ignore", "y holds choices", UserWarning)
        warnings.filterwarnings("ignore", ".* no curvature in float64", UserWarning)
        # Published errors are inverse informations; the weights of flows count migrants.
        model = SoftmaxRegressor(loss=loss, covariance="classic", weight_type="frequency")
        model.fit(data.A, data.b, groups=data.groups, sample_weight=weights)
    reference, result = data.references[loss], model.result_
    names = data.feature_names
    comparisons = _compare_all(names, model.coef_, reference.coefficients)
    comparisons += _values(
        data, reference, model.predict(data.A, groups=data.groups), loss, model.loss_value_
    )
    errors = []
    if reference.standard_errors is not None:
        labels = [f"standard error of {name}" for name in names]
        errors = _compare_all(labels, model.standard_errors_, reference.standard_errors)
    return Fit(comparisons, errors, certificate_radius(result.certificate()), f"{result.n_passes:.0f}")


def _compare_all(labels: Sequence[str], ours: Any, theirs: Any) -> list[Comparison]:
    return [_compare(*row) for row in zip(labels, ours, theirs, strict=True)]


def _values(
    data: Dataset, reference: Reference, fitted: Any, loss: LossName, value: float
) -> list[Comparison]:
    squared = ((fitted - data.b) ** 2).sum()
    values = [_compare("squared error", squared, reference.squared_error)]
    if loss == "cross_entropy" and reference.log_likelihood is not None:
        values.append(_compare("log likelihood", -value, reference.log_likelihood))
    return values


def _compare(label: str, ours: Any, reference: float | None) -> Comparison:
    known = reference is not None and not math.isnan(reference)
    return Comparison(label, float(ours), float(reference) if known and reference is not None else None)


def table(data: Dataset, fits: dict[LossName, Fit], gap: int) -> Grid:
    """Lay out the fits of a data set side by side."""
    view = Grid(padding=(0, gap, 0, 0))
    view.add_column("", no_wrap=True)
    for loss in fits:
        head = Text(LOSSES[loss].replace(" ", "\n"))
        view.add_column(head, justify="right", no_wrap=True, vertical="bottom")
        view.add_column("reference", justify="right", no_wrap=True)
        view.add_column("off by", justify="right", no_wrap=True)
    by_label = {loss: {c.label: c for c in one.comparisons} for loss, one in fits.items()}
    for label in dict.fromkeys(label for one in by_label.values() for label in one):
        cells = [one[label].cells() if label in one else [Text("")] * 3 for one in by_label.values()]
        view.add_row(label, *(cell for three in cells for cell in three))
    if any(one.errors for one in fits.values()):
        view.add_row("standard errors", *(cell for one in fits.values() for cell in one.error_cells()))
    view.add_row("certificate radius", *(cell for one in fits.values() for cell in (one.radius, "", "")))
    view.add_row("reads of the data", *(cell for one in fits.values() for cell in (one.reads, "", "")))
    return view


def show(console: Literal, data: Dataset, fits: dict[LossName, Fit]) -> None:
    """Print a data set's table, one loss below the other where the terminal is narrow."""
    size = f"{len(data.b):,} rows in {len(set(data.groups.tolist()))} groups"
    console.gap()
    console.say(f"{data.name}: {size}", "bold")
    one_by_one = [{loss: one} for loss, one in fits.items()]
    layouts = [[table(data, part, gap) for part in parts] for parts in ([fits], one_by_one) for gap in (1, 0)]
    for view in next(
        (layout for layout in layouts if width_of(console, *layout) <= console.width), layouts[-1]
    ):
        print_whole(console, view)
    if any(c.label.startswith(DUMMIES) for c in fits["cross_entropy"].comparisons):
        console.say(f"{DUMMIES}one more column a destination (doubly constrained model)", "dim")
    for loss in fits:
        console.say(f"{LOSSES[loss]} reference: {data.references[loss].source}", "dim")


@one_sentence
def demo(debug: Debug = False) -> None:
    """Fit three real data sets and compare with published numbers."""
    began = time.perf_counter()
    console = stdout()
    wrong: list[str] = []
    count = 0
    for data, extra in (
        (load_car_shares(), None),
        (load_austrian_flows(), load_austrian_flows(dummies=True)),
        (load_travel_mode(), None),
    ):
        fits = {loss: fit(data, loss) for loss in data.references}
        if extra is not None:
            for loss, one in fits.items():
                with_dummies = fit(extra, loss)
                known = [c for c in with_dummies.comparisons if c.reference is not None]
                one.comparisons.extend(Comparison(f"{DUMMIES}{c.label}", c.ours, c.reference) for c in known)
                one.errors.extend(with_dummies.errors)
        show(console, data, fits)
        compared = [(loss, c) for loss, one in fits.items() for c in one.compared()]
        count += len(compared)
        wrong += [f"{c.label} of {data.name} ({LOSSES[loss]})" for loss, c in compared if not c.agrees]
        if data.name == "Travel mode choice":
            console.say(TRAP, "yellow")
    if wrong:
        problem(
            f"{len(wrong)} of {count} numbers differ in a printed digit of the reference: {', '.join(wrong)}"
        )
        raise typer.Exit(Exit.BAD_NEWS)
    seconds = time.perf_counter() - began
    told = f"All {count} numbers agree with their references in every printed digit ({seconds:.1f} s)."
    console.gap()
    console.say(told, "green")

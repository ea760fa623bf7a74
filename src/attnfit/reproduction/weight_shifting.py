"""What "The Closeness of In-Context Learning and Weight Shifting for Softmax Regression" says of
closeness.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from attnfit.incontext.closeness import Closeness
from attnfit.incontext.experiment import SHAPES, Cell, measure, verdict
from attnfit.reproduction import similarity
from attnfit.reproduction.page import Claim, Curve, Page, Table
from attnfit.theory import PAPERS, search

Array = NDArray[np.float64]

QUICK_SHAPES = ((12, 4), (12, 12), (40, 13))


@dataclass(frozen=True)
class Measured:
    """What the claims are judged by.

    Attributes
    ----------
    cells : list of Cell
        One step, by size and kind of target.
    bound : float
        Largest ratio found of a shift to its bound of Theorem 8.1.
    closeness : dict of Closeness
        Several steps, by problem.
    """

    cells: list[Cell]
    bound: float
    closeness: dict[str, Closeness]


def run(quick: bool) -> Page:
    """Return the page."""
    if quick:
        cells = [measure(n, d, count=100, n_training=2000, n_epochs=5) for n, d in QUICK_SHAPES]
    else:
        cells = [measure(n, d, planted=p) for n, d in SHAPES for p in (False, True)]
    close = {
        "n = 12, d = 4": similarity.drawn("softmax", (12, 4), quick),
        "car markets": similarity.on_car_markets("softmax"),
    }
    return page(Measured(cells, search("WS-8.1", budget=200).check.ratio, close))


def claims(found: Measured) -> list[Claim]:
    """Judge each claim by what was measured."""
    slack = min(float(np.median(cell.slack)) for cell in found.cells)
    told = verdict(found.cells)
    return [
        Claim(
            "a gradient step on the weights shifts the target by at most n^1.5 e^{10 R^2} |x' - x| "
            "(Theorem 8.1)",
            f"the worst ratio found is {found.bound:.1e}, and on data the bound is {slack:.0f} powers of ten "
            "too large",
            found.bound <= 1.0 and slack >= 0.0,
        ),
        Claim(
            "a self-attention update of the data and a gradient step on the weights are close",
            told.sentence,
            all(told.close.values()),
        ),
        similarity.claim("several of them are close too, on data of a reader as well", found.closeness),
    ]


def page(found: Measured) -> Page:
    """Lay out the page."""
    cells = found.cells
    summary = (
        "The theorem holds and says little: every move of that size satisfies it, a random one included. "
        "Measured "
        "directly, steps on the data and trained attention point in the direction of a gradient step and "
        "are not "
        "close to it unless the rows are nearly orthogonal."
    )
    return Page(
        "weight-shifting",
        PAPERS["WS"],
        summary,
        claims(found),
        [
            _table(cells),
            *_curves(cells[0]),
            _decreases(cells),
            _slack(cells),
            _repeated(cells),
            similarity.table(found.closeness),
        ],
    )


def _table(cells: list[Cell]) -> Table:
    rows = []
    for cell in cells:
        for name, one in cell.at_best.items():
            rows.append((
                cell.n, cell.d, "planted" if cell.planted else "noise", name, float(np.median(one.cosines)),
                float(np.quantile(one.cosines, 0.05)), float(np.median(one.errors)),
                float(np.median(one.losses)),
            ))  # fmt: skip
    head = (
        "n",
        "d",
        "targets",
        "move",
        "cosine, median",
        "cosine, 5 %",
        "relative error",
        "loss after / before",
    )
    return Table("Shifts beside that of the gradient step, each at its best step size", head, rows)


def _curves(cell: Cell) -> list[Table | Curve]:
    """Draw cosine and loss against the step size, medians with the band of 5 to 95 %."""
    size = f"n = {cell.n}, d = {cell.d}"
    return [
        Curve(
            f"Cosine with the gradient step, {size}",
            "step size",
            "cosine",
            _bands(cell.curves),
            (True, False),
        ),
        Curve(f"Loss after the step, {size}", "step size", "loss / start", _bands(cell.losses), (True, True)),
    ]


def _bands(quantiles: dict[str, Array]) -> dict[str, tuple[list[float], list[float]]]:
    return {
        f"{name}, {told}": (rows[:, 0].tolist(), rows[:, k].tolist())
        for name, rows in quantiles.items()
        for k, told in ((1, "5 %"), (2, "median"), (3, "95 %"))
    }


def _decreases(cells: list[Cell]) -> Curve:
    """Draw what one trained attention layer does to the loss of each instance beside a gradient step."""
    points = {
        f"n = {cell.n}, d = {cell.d}": (
            cell.at_best["gradient step"].losses.tolist(), cell.at_best["trained attention"].losses.tolist()
        )
        for cell in cells if not cell.planted
    }  # fmt: skip
    title = "Loss / start of every instance: a gradient step across, trained attention up"
    return Curve(title, "gradient step", "trained attention", points, (False, False), points=True)


def _slack(cells: list[Cell]) -> Curve:
    """Draw the histogram of how far the published bound is above the shift."""
    lines = {}
    for cell in cells:
        if not cell.planted:
            counts, edges = np.histogram(cell.slack, 15)
            lines[f"n = {cell.n}, d = {cell.d}"] = (
                (0.5 * (edges[1:] + edges[:-1])).tolist(),
                counts.tolist(),
            )
    title = "Powers of ten between the published bound and the shift"
    return Curve(title, "powers of ten", "instances", lines, (False, False))


def _repeated(cells: list[Cell]) -> Table:
    rows = [
        (cell.n, cell.d, name, step, float(path[step, 0]), float(path[step, 1]))
        for cell in cells if not cell.planted
        for name, path in cell.trajectories.items() for step in (1, 5, 10)
    ]  # fmt: skip
    return Table(
        "Repeated moves",
        ("n", "d", "move", "steps", "loss / start, median", "cosine with gradient descent"),
        rows,
    )

"""The picture that ``attnfit fit --plot`` draws."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from attnfit.cli.errors import InputError, suggest
from attnfit.cli.models import predict_named
from attnfit.cli.output import put
from attnfit.cli.report import FitReport
from attnfit.writing import rendered


def check_plot(path: Path) -> None:
    """Raise InputError before any work if the picture cannot be drawn."""
    if find_spec("matplotlib") is None:
        raise InputError('--plot needs matplotlib; type: python -m pip install "attnfit[plot]"')
    from matplotlib.backend_bases import FigureCanvasBase

    kinds = FigureCanvasBase.get_supported_filetypes()
    kind = path.suffix.lstrip(".").lower()
    if kind not in kinds:
        raise InputError(f"--plot: no picture can be written as {path.name!r}{suggest(kind, kinds)}")


def put_figure(path: Path, figure: Any) -> None:
    """Write a picture in the format of its name."""
    kind = path.suffix.lstrip(".").lower()
    put(path, rendered(lambda stream: figure.savefig(stream, format=kind)))


def draw(path: Path, estimator: Any, X: Any, inputs: dict[str, Any], report: FitReport) -> None:
    """Draw fitted against observed values, the coefficients and the convergence side by side."""
    from matplotlib.figure import Figure

    from attnfit import plots

    where: dict[str, Any] = {key: inputs[key] for key in ("groups", "offset") if key in inputs}
    n = len(report.columns["name"])
    figure = Figure(figsize=(13.5, max(4.2, 0.3 * min(n, 30) + 1.4)), layout="constrained", dpi=150)
    left, middle, right = figure.subplots(1, 3)
    weights = inputs.get("sample_weight")
    plots.fitted_versus_observed(inputs["y"], predict_named(estimator, X, where), weights, ax=left)
    plots.coefficients(
        report.columns["name"], report.columns["coefficient"], report.columns["standard_error"], ax=middle
    )
    plots.convergence(report.result.history, ax=right)
    title = figure.suptitle("; ".join([report.title, *report.facts()[:2]]), x=0.01, ha="left", fontsize=11)
    # A dollar in a name is no formula.
    title.set_parse_math(False)
    put_figure(path, figure)

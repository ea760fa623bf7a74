"""The report of a fit that a person can hand over: as HTML, Markdown or LaTeX, from templates."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from attnfit.cli.errors import InputError
from attnfit.cli.origin import command, versions
from attnfit.cli.output import STREAM
from attnfit.cli.report import FitReport
from attnfit.cli.rows import Rows
from attnfit.inference import tables
from attnfit.writing import is_special, rendered

Pairs = list[tuple[str, str]]
Cells = tuple[list[str], list[list[str]]]
ENDINGS = {".html": "HTML", ".htm": "HTML", ".md": "Markdown", ".tex": "LaTeX"}
# Names of the fit statistics, in the order in which they are read.
STATISTICS = {
    "log_likelihood": "log likelihood",
    "log_likelihood_null": "log likelihood at zero",
    "rho2": "rho2 (McFadden)",
    "rho2_adjusted": "rho2, adjusted",
    "aic": "AIC",
    "bic": "BIC",
    "hit_rate": "hit rate",
    "log_loss": "log loss",
    "brier": "Brier score",
    "deviance": "deviance",
    "null_deviance": "deviance of a constant",
    "pseudo_r2": "pseudo R2",
    "residual_scale": "residual standard error",
    "n_parameters": "parameters",
    "n_observations": "observations",
}
CONSTANTS = ("Intercept", "(constant)")


def check_report(path: Path) -> None:
    """Raise InputError before any work if no report can be written."""
    if path != STREAM and not is_special(path) and path.suffix.lower() not in ENDINGS:
        raise InputError(f"--report: {path} should end in .html, .md or .tex")
    if find_spec("jinja2") is None:
        raise InputError('--report needs jinja2; type: python -m pip install "attnfit[cli]"')


@dataclass(frozen=True)
class Handover:
    """All that a report says, as text; templates set and escape it.

    Attributes
    ----------
    title, verdict : str
    good : bool
        Whether the verdict leaves nothing to wish for.
    warnings : list of str
        What a reader should know before using the numbers.
    data, statistics, origin : list of (str, str)
        Facts about data and model, fit statistics, versions and digest of the data.
    coefficients, tests : (head, rows)
    errors, statistics_notes : list of str
    scores : list of (str, list of (str, str))
        Of rows that were not fitted.
    pictures : list of (str, str)
        Captions and SVG; empty without matplotlib.
    command : str
    """

    title: str
    verdict: str
    good: bool
    warnings: list[str]
    data: Pairs
    coefficients: Cells
    errors: list[str]
    statistics: Pairs
    statistics_notes: list[str]
    tests: Cells
    scores: list[tuple[str, Pairs]]
    pictures: list[tuple[str, str]]
    command: str
    origin: Pairs

    @classmethod
    def of(cls, estimator: Any, report: FitReport, rows: Rows, data: Path) -> Handover:
        """Collect what is said about a fitted estimator."""
        head, cells = estimator.summary(level=report.level).cells()
        notes = [line.removeprefix("note: ") for line in report.errors if line.startswith("note: ")]
        told = [line for line in report.errors if not line.startswith("note: ")]
        converged = bool(report.result.converged) or report.result.status == "precision"
        found = report.statistics
        return cls(
            title=report.title[0].upper() + report.title[1:],
            verdict=_verdict(report),
            good=converged and not report.dropped,
            warnings=[*report.remarks(), *notes],
            data=_data(estimator, report, rows, data),
            coefficients=(head, cells),
            errors=told,
            statistics=[] if found is None else _statistics(found),
            statistics_notes=[] if found is None else list(found.notes),
            tests=(["hypothesis", "statistic", "distribution", "p"], _tests(estimator, report)),
            scores=[(one.title, _split(one.lines(), one.values)) for one in report.scores],
            pictures=pictures(estimator, report.level),
            command=command(),
            origin=_origin(data),
        )

    def written(self, path: Path) -> str:
        """Return the report in the language of a file's ending; as HTML where a stream has none."""
        kind = ENDINGS.get(path.suffix.lower(), "HTML")
        if kind == "HTML":
            from markupsafe import Markup

            pictures = [(caption, Markup(svg)) for caption, svg in self.pictures]
            return _fill("report.html", None, r=_View(self, pictures), style=Markup(_read("report.css")))
        escape = _markdown if kind == "Markdown" else tables.latex_text
        return _fill("report.md" if kind == "Markdown" else "report.tex", escape, r=self)


class _View:
    """A report whose pictures are markup."""

    def __init__(self, report: Handover, pictures: Any) -> None:
        self._report, self.pictures = report, pictures

    def __getattr__(self, name: str) -> Any:
        return getattr(self._report, name)


def _verdict(report: FitReport) -> str:
    status = report.result.status
    if report.result.converged:
        certified = report.certificate.describe(report.result.x)
        rest = " The rows that have no finite fit were left out." if report.dropped else ""
        return f"The fit has converged{', certified ' + certified if report.certificate.valid else ''}.{rest}"
    return f"The fit ended as {status}: {report.message}."


def _data(estimator: Any, report: FitReport, rows: Rows, data: Path) -> Pairs:
    named = {
        "data": "standard input" if data == STREAM else data.name,
        "model": type(estimator).__name__,
        "loss": getattr(estimator, "loss", None),
        "function": getattr(estimator, "function", None),
        "explained": rows.target,
        "formula": rows.formula or None,
        "columns": None if rows.formula else ", ".join(rows.names),
        "rows": f"{report.n_rows - report.n_dropped:,}",
        "groups": f"{report.n_groups:,}" if report.n_groups else None,
        "left out": f"{report.n_dropped:,} rows" if report.n_dropped else None,
        "effects absorbed": "; ".join(report.effects()).removeprefix("effects absorbed: ") or None,
        "outside good": "one a group" if getattr(estimator, "outside_good", False) else None,
        "weights": estimator.weight_type if rows.inputs.get("sample_weight") is not None else None,
        "offset": "yes" if rows.inputs.get("offset") is not None else None,
        "ridge": f"{estimator.ridge:g}" if estimator.ridge else None,
        "loss value": f"{report.loss:.10g}",
        "reads of the data": f"{report.result.n_passes:.1f}",
    }
    return [(name, str(value)) for name, value in named.items() if value is not None]


def _statistics(found: Any) -> Pairs:
    values = found.values()
    return [(told, f"{values[name]:.7g}") for name, told in STATISTICS.items() if values[name] is not None]


def _split(lines: Sequence[str], names: Any) -> Pairs:
    return [(name, line.removeprefix(name).strip()) for name, line in zip(names, lines, strict=True)]


def _tests(estimator: Any, report: FitReport) -> list[list[str]]:
    """Return Wald tests of all slopes and of each category, and the likelihood ratio against none."""
    names = [str(name) for name in report.columns["name"]]
    finite = np.isfinite(report.columns["standard_error"]) & np.isfinite(report.columns["coefficient"])
    slopes = finite & np.array([name not in CONSTANTS for name in names])
    sets = {"all slopes are zero": slopes}
    design = estimator.__dict__.get("_formula")
    for category in [] if design is None else design.levels:
        own = np.array([_holds(name, category) for name in names]) & finite
        if own.sum() > 1 and not (own == slopes).all():
            sets[f"{category}: {own.sum()} coefficients are zero"] = own
    rows = []
    for told, chosen in sets.items():
        if not chosen.any():
            continue
        try:
            test = estimator.wald_test(np.eye(len(names))[chosen])
        except ValueError as error:
            rows.append([told, "-", f"not defined: {error}", "-"])
            continue
        df = test.df if isinstance(test.df, tuple) else (test.df,)
        distribution = f"{test.distribution}({', '.join(f'{one:g}' for one in df)})"
        rows.append([f"{told} (Wald)", f"{test.statistic:.6g}", distribution, _p(test.p_value)])
    return rows + _likelihood_ratio(estimator, report)


def _likelihood_ratio(estimator: Any, report: FitReport) -> list[list[str]]:
    from scipy.stats import chi2

    found = report.statistics
    kind = estimator.covariance_kind_
    if found is None or kind != "classic" or found.log_likelihood is None or found.aic is None:
        return []
    null, k = found.log_likelihood_null, found.n_parameters
    # That of a Poisson model has a constant.
    k -= 0.0 if hasattr(estimator, "n_groups_") else 1.0
    if null is None or k <= 0 or estimator.ridge:
        return []
    statistic = 2.0 * (found.log_likelihood - null)
    told = "all slopes are zero (likelihood ratio)"
    return [[told, f"{statistic:.6g}", f"chi2({k:g})", _p(float(chi2.sf(statistic, k)))]]


def _holds(column: str, variable: str) -> bool:
    """Whether a column of a formula is of a category, by its name less its levels."""
    return bool(re.search(rf"(?<!\w){re.escape(variable)}(?!\w)", re.sub(r"\[[^\]]*\]", "", column)))


def _p(value: float) -> str:
    if not math.isfinite(value):
        return "-"
    return "<.0001" if value < 1e-4 else f"{value:.4f}"


def pictures(estimator: Any, level: float) -> list[tuple[str, str]]:
    """Return captions and SVG of the coefficients and of fitted against observed values."""
    if find_spec("matplotlib") is None:
        return []
    from attnfit import plots

    cover = f"{100 * level:g} %"
    found = [
        (
            f"Coefficients in their units with {cover} intervals, each on its own axis; grey is zero.",
            _svg(plots.coefficients(estimator, units=True, level=level)),
        )
    ]
    if getattr(estimator, "_training", None) is not None:
        told = "Fitted against observed values; on the dashed line they are equal."
        found.append((told, _svg(plots.fitted_versus_observed(estimator))))
    return found


def _svg(figure: Any) -> str:
    """Return a figure as an element of a page: text as text, ids that do not depend on the moment."""
    import matplotlib

    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "attnfit"}):
        data = rendered(lambda stream: figure.savefig(stream, format="svg", metadata={"Date": None}))
    text = data.decode("utf-8")
    return text[text.index("<svg") :]


def _origin(data: Path) -> Pairs:
    digest = None
    if data != STREAM and data.is_file():
        with data.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
    told = {"date": date.today().isoformat(), "SHA-256 of the data": digest}
    return [(name, value) for name, value in {**told, **versions()}.items() if value is not None]


def _read(name: str) -> str:
    return (files("attnfit.cli") / "pages" / name).read_text("utf-8")


def _fill(template: str, escape: Any, **given: Any) -> str:
    """Return a template with what it is given; all of it is escaped, as HTML where ``escape`` is None."""
    from jinja2 import Environment, FunctionLoader, StrictUndefined
    from markupsafe import Markup

    def finalize(value: Any) -> Any:
        # What macros of the template return is escaped already.
        return value if escape is None or isinstance(value, Markup) else Markup(escape(str(value)))

    environment = Environment(
        loader=FunctionLoader(_read), autoescape=True, undefined=StrictUndefined, finalize=finalize,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.globals |= {"table": _markdown_table, "code": _markdown_code} if escape is _markdown else {}
    return str(environment.get_template(template).render(**given))


def _markdown(text: str) -> str:
    """Return text that Markdown shows as it is."""
    return re.sub(r"([\\`*_{}\[\]<>#|~$])", r"\\\1", " ".join(text.split()))


def _markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Any:
    from markupsafe import Markup

    cells = [[_markdown(cell).replace(r"\|", "|") for cell in row] for row in rows]
    return Markup(tables.markdown([_markdown(one) for one in head], cells))


def _markdown_code(text: str) -> Any:
    from markupsafe import Markup

    # A fence longer than any run of backticks in what it holds.
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return Markup(f"{fence}\n{text}\n{fence}")

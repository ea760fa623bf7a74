"""One self-contained page a paper: what it claims, what was measured, whether it held."""

from __future__ import annotations

import html
import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from attnfit.version import __version__
from attnfit.writing import write


@dataclass(frozen=True)
class Claim:
    """A statement of the paper and what came of it.

    Attributes
    ----------
    claimed, measured : str
    held : bool or None
        None where neither was shown.
    """

    claimed: str
    measured: str
    held: bool | None


@dataclass(frozen=True)
class Table:
    """Rows of numbers and words under a head."""

    title: str
    head: tuple[str, ...]
    rows: Sequence[tuple[Any, ...]]


@dataclass(frozen=True)
class Curve:
    """Lines of y against x, both positive, drawn on logarithmic axes where asked.

    Attributes
    ----------
    title, x_label, y_label : str
    lines : dict of (x, y)
    log : tuple of bool
        Of the x and of the y axis.
    points : bool
        Marks without lines between them.
    """

    title: str
    x_label: str
    y_label: str
    lines: Mapping[str, tuple[Sequence[float], Sequence[float]]]
    log: tuple[bool, bool] = (False, True)
    points: bool = False


@dataclass(frozen=True)
class Page:
    """What was found for one paper.

    Attributes
    ----------
    id, paper, summary : str
    claims : list of Claim
    parts : list of Table and Curve
    seconds : float
    """

    id: str
    paper: str
    summary: str
    claims: list[Claim]
    parts: list[Table | Curve] = field(default_factory=list)
    seconds: float = 0.0

    def to_json(self, path: Path) -> None:
        """Write all numbers, rounded to four digits."""
        tables = [part for part in self.parts if isinstance(part, Table)]
        curves = [part for part in self.parts if isinstance(part, Curve)]
        data = {
            "id": self.id,
            "paper": self.paper,
            "version": __version__,
            "claims": [vars(claim) for claim in self.claims],
            "tables": [
                {"title": t.title, "rows": [dict(zip(t.head, row, strict=True)) for row in t.rows]}
                for t in tables
            ],
            "curves": [
                {
                    "title": c.title,
                    "lines": {k: {"x": list(x), "y": list(y)} for k, (x, y) in c.lines.items()},
                }
                for c in curves
            ],
        }
        write(path, json.dumps(_rounded(data), indent=1) + "\n")

    def to_html(self, path: Path, command: str) -> None:
        """Write one page that needs no other file."""
        claims = Table(
            "Claims",
            ("the paper says", "measured here", "held"),
            [(c.claimed, c.measured, {True: "yes", False: "no", None: "open"}[c.held]) for c in self.claims],
        )
        body = [f"<h1>{_text(self.paper)}</h1>", f"<p>{_text(self.summary)}</p>"]
        body += [_render(part) for part in [claims, *self.parts]]
        versions = f"attnfit {__version__}, numpy {np.__version__}, Python {platform.python_version()}"
        body.append(f"<p class=small>{_text(command)}, {self.seconds:.0f} s; {_text(versions)}.</p>")
        write(path, FRAME.format(title=_text(self.paper), body="\n".join(body)))


FRAME = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color:
#1b1b1b }} h1 {{ font-size: 1.5rem }} h2 {{ font-size: 1.1rem; margin-top: 2rem }}
table {{ border-collapse: collapse; font-size: .9rem }}
td, th {{ border-bottom: 1px solid #ccc; padding: .3rem .7rem; text-align: left; vertical-align: top }}
.small {{ color: #666; font-size: .85rem; margin-top: 3rem }} svg {{ max-width: 100%; height: auto }}
</style></head><body>
{body}
</body></html>
"""


def _render(part: Table | Curve) -> str:
    title = f"<h2>{_text(part.title)}</h2>"
    if isinstance(part, Curve):
        return title + _drawn(part)
    head = "".join(f"<th>{_text(cell)}</th>" for cell in part.head)
    rows = (
        "<tr>" + "".join(f"<td>{_text(_shown(cell))}</td>" for cell in row) + "</tr>" for row in part.rows
    )
    return f"{title}<table><tr>{head}</tr>{''.join(rows)}</table>"


def _drawn(curve: Curve) -> str:
    """Return the curve as an SVG element."""
    from io import StringIO

    from attnfit.plots.canvas import new_axes

    axes: Any = new_axes(None, 7.0, 4.0)
    for name, (x, y) in curve.lines.items():
        axes.plot(x, y, "o" if curve.points else "o-", markersize=3, label=name)
    axes.set(xlabel=curve.x_label, ylabel=curve.y_label)
    axes.set(xscale="log" if curve.log[0] else "linear", yscale="log" if curve.log[1] else "linear")
    axes.legend(frameon=False)
    target = StringIO()
    axes.figure.savefig(target, format="svg", metadata={"Date": None})
    svg = target.getvalue()
    return svg[svg.index("<svg") :]


def _shown(cell: Any) -> str:
    return f"{cell:.3g}" if isinstance(cell, float) else str(cell)


def _text(value: str) -> str:
    return html.escape(value)


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(one) for one in value]
    if isinstance(value, float | np.floating):
        return float(f"{value:.4g}") if np.isfinite(value) else str(value)
    if isinstance(value, np.integer | np.bool_):
        return value.item()
    return value

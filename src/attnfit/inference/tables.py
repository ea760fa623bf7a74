"""Tables as text, Markdown, LaTeX, HTML and data frames."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

from attnfit.data.inputs import FRAMES

LATEX = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "_": r"\_", "%": r"\%", "&": r"\&", "#": r"\#",
    "$": r"\$", "<": r"\textless{}", ">": r"\textgreater{}", "^": r"\textasciicircum{}",
    "~": r"\textasciitilde{}", '"': r"\char34{}", "'": r"\textquotesingle{}", "`": r"\textasciigrave{}",
}  # fmt: skip


def to_frame(columns: dict[str, Any], library: Any = None, index: Any = None) -> Any:
    """Return a data frame of a library; of pandas, or else polars, if none is named.

    Raises
    ------
    ImportError
        If no library for data frames is installed.
    """
    library = library or next((name for name in FRAMES if find_spec(name)), None)
    if library is None:
        raise ImportError("a data frame needs pandas or polars; install one, or use columns()")
    import narwhals as nw

    frame = nw.from_dict(columns, backend=library).to_native()
    return frame if index is None or library != "pandas" else frame.set_index(index)


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table: names to the left, numbers to the right."""
    rule = [":---", *("---:" for _ in head[1:])]
    return "\n".join(
        "| " + " | ".join(cell.replace("|", r"\|") for cell in row) + " |" for row in (head, rule, *rows)
    )


def latex_text(text: str) -> str:
    """Return text that LaTeX sets as it is, dashes and commas apart; negative numbers get a minus."""
    escaped = "".join(LATEX.get(c, c) for c in " ".join(text.split()))
    return re.sub(r"^-(?=[\d.]+(e|$))", "$-$", re.sub(r"([-,])(?=\1)", r"\1{}", escaped))


def latex(head: Sequence[str], rows: Sequence[Sequence[str]], notes: Sequence[str] = ()) -> str:
    """Return a LaTeX tabular with rules of the package booktabs, notes below it."""

    def line(cells: Sequence[str]) -> str:
        return " & ".join(map(latex_text, cells)) + r" \\"

    below = [rf"\multicolumn{{{len(head)}}}{{l}}{{{line([note])[:-3]}}} \\" for note in notes]
    return "\n".join(
        [
            r"\begin{tabular}{l" + "r" * (len(head) - 1) + "}",
            r"\toprule",
            line(head),
            r"\midrule",
            *map(line, rows),
            r"\bottomrule",
            *below,
            r"\end{tabular}",
        ]
    )


def to_html(head: Sequence[str], rows: Sequence[Sequence[str]], notes: Sequence[str] = ()) -> str:
    """Return an HTML table with everything escaped."""

    def line(tag: str, cells: Sequence[str]) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    body = "".join(line("td", row) for row in rows)
    said = "".join(f"<p>{html.escape(note)}</p>" for note in notes)
    return f"<div>{said}<table><thead>{line('th', head)}</thead><tbody>{body}</tbody></table></div>"

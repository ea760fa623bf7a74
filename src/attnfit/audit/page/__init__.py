"""Self-contained pages: one file with style, script and pictures inside, which may fetch nothing."""

from __future__ import annotations

import math
from base64 import b64encode
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from html import escape
from importlib.resources import files
from string import Template


@dataclass(frozen=True)
class Column:
    """A column of a table.

    Attributes
    ----------
    name : str
    word : bool
        Whether it holds words, which are aligned left, and not numbers.
    """

    name: str
    word: bool = False


@dataclass(frozen=True)
class Entry:
    """A table cell: what is read, and the number by which it is sorted.

    Attributes
    ----------
    markup : str
        HTML.
    value : float or None
        None: by its text.
    style : str
        A class.
    """

    markup: str
    value: float | None = None
    style: str = ""


def assemble(title: str, body: str) -> str:
    """Return a page; its policy allows its own style and script only.

    Parameters
    ----------
    title : str
    body : str
        HTML.
    """
    home = files(__name__)
    style, script = ((home / name).read_text("utf-8") for name in ("page.css", "page.js"))
    policy = (
        f"default-src 'none'; style-src {_hash(style)}; script-src {_hash(script)}; base-uri 'none'; "
        "form-action 'none'"
    )
    parts = {"policy": policy, "title": escape(title), "style": style, "script": script, "body": body}
    return Template((home / "page.html").read_text("utf-8")).substitute(parts)


def _hash(text: str) -> str:
    return f"'sha256-{b64encode(sha256(text.encode()).digest()).decode()}'"


def table(
    name: str, columns: Sequence[Column], rows: Sequence[Sequence[Entry]], searched: bool = False
) -> str:
    """Return a table that can be sorted by every column and, where it is searched, filtered by words."""
    head = "".join(
        f'<th class="{"word" if column.word else ""}" scope="col"><button type="button">'
        f"{escape(column.name)}</button></th>"
        for column in columns
    )
    body = "".join(
        "<tr>" + "".join(_td(column, entry) for column, entry in zip(columns, row, strict=True)) + "</tr>\n"
        for row in rows
    )
    search = (
        f'<label>Show rows with <input type="search" data-table="{name}" placeholder="for example: hidden '
        f'int8"></label><span class="soft" id="{name}-count" role="status"></span>\n'
    )
    return (
        f"{search if searched else ''}"
        f'<div class="wide"><table class="sortable" id="{name}"><thead><tr>{head}</tr></thead>\n'
        f"<tbody>{body}</tbody></table></div>"
    )


def _td(column: Column, entry: Entry) -> str:
    classes = " ".join(filter(None, ["word" if column.word else "", entry.style]))
    shown = f' class="{classes}"' if classes else ""
    value = "" if entry.value is None else f' data-value="{entry.value:.10g}"'
    return f"<td{shown}{value}>{entry.markup}</td>"


def word(text: str) -> Entry:
    """Return a cell with some words."""
    return Entry(escape(text))


def number(value: float | None, form: str = ".3g") -> Entry:
    """Return a cell with a number; a dash where there is none."""
    if value is None or not math.isfinite(value):
        return Entry("–", math.nan)
    return Entry(format(value, form), value)


def paragraph(text: str, style: str = "") -> str:
    """Return some text as a paragraph."""
    return f'<p class="{style}">{escape(text)}</p>' if style else f"<p>{escape(text)}</p>"


def items(sentences: Sequence[str], style: str) -> str:
    """Return a list of sentences."""
    return f'<ul class="{style}">' + "".join(f"<li>{escape(one)}</li>" for one in sentences) + "</ul>"

"""Self-contained pages from templates: one file with style, script and pictures inside, which may fetch
nothing. What a template is given is text, and escaped.
"""

from __future__ import annotations

import math
from base64 import b64encode
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from importlib.resources import files
from typing import Any

from jinja2 import Environment, FunctionLoader, StrictUndefined
from markupsafe import Markup


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
    text : str
    value : float or None
        None: by its text.
    style : str
        A class.
    pieces : sequence of (str, bool)
        In place of the text, where parts of it are marked.
    """

    text: str
    value: float | None = None
    style: str = ""
    pieces: Sequence[tuple[str, bool]] = ()


def word(text: str, style: str = "") -> Entry:
    """Return a cell with some words."""
    return Entry(text, style=style)


def number(value: float | None, form: str = ".3g") -> Entry:
    """Return a cell with a number; a dash where there is none."""
    if value is None or not math.isfinite(value):
        return Entry("–", math.nan)
    return Entry(format(value, form), value)


def fill(template: str, **data: Any) -> Markup:
    """Return a template with what it is given in its places."""
    return Markup(templates().get_template(template).render(**data))


def page(template: str, **data: Any) -> str:
    """Return a page; its policy allows its own style and script only."""
    style, script = _read("page.css"), _read("page.js")
    policy = (
        f"default-src 'none'; style-src {_hash(style)}; script-src {_hash(script)}; base-uri 'none'; "
        "form-action 'none'"
    )
    ours = {"style": Markup(style), "script": Markup(script), "policy": Markup(policy)}
    return str(fill(template, **ours, **data))


@cache
def templates() -> Environment:
    """Return the templates of this folder, which escape what they are given."""
    return Environment(
        loader=FunctionLoader(_read),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _read(name: str) -> str:
    return (files(__name__) / name).read_text("utf-8")


def _hash(text: str) -> str:
    return f"'sha256-{b64encode(sha256(text.encode()).digest()).decode()}'"

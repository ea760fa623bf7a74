"""What an audit found."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import date
from itertools import pairwise
from os import PathLike
from typing import Any

from attnfit.audit.advice import advise, options, scope, verdict
from attnfit.audit.breakpoints import BITS, NOISE, Forecast
from attnfit.audit.cells import NONE, Cell, Key, as_record
from attnfit.audit.forms import parse_access
from attnfit.audit.models.model import Model, Tokens
from attnfit.audit.settings import Settings, plain_text
from attnfit.audit.summary import BreakPoint, Control, Pair, measured_bracket, summarise
from attnfit.audit.versions import versions
from attnfit.writing import write

SCHEMA = "attnfit-audit/1"
# Share of tokens up to which a combination counts as protected where no other limit is given.
LIMIT = 0.05


@dataclass(frozen=True)
class Report:
    """The outcome of an audit.

    Attributes
    ----------
    model : dict
        Name, fingerprint and sizes of the model.
    settings : Settings
    pairs : tuple of Pair
        One for each form of access and defence.
    breakpoints : tuple of BreakPoint
    controls : tuple of Control
    cells : tuple of Cell
    pieces : tuple of tuple of str
        The tokens of each text as text.
    n_planned : int
        Cells; those that are not in `cells` were not reached.
    interrupted : bool
    seconds : float
    command : str
        What to type to run it again.
    made : str
        Day of the audit, as 2026-01-31.
    owner : str
        Who answers for the model, as given.
    """

    model: dict[str, Any]
    settings: Settings
    pairs: tuple[Pair, ...]
    breakpoints: tuple[BreakPoint, ...]
    controls: tuple[Control, ...]
    cells: tuple[Cell, ...] = field(repr=False)
    pieces: tuple[tuple[str, ...], ...] = field(repr=False)
    n_planned: int
    interrupted: bool
    seconds: float
    command: str = ""
    made: str = ""
    owner: str = ""

    @classmethod
    def of(
        cls,
        model: Model,
        settings: Settings,
        truths: Sequence[Tokens],
        cells: Mapping[Key, Cell],
        forecasts: Mapping[str, Forecast],
        n_planned: int,
        interrupted: bool,
        seconds: float,
    ) -> Report:
        """Put a report together."""
        some = list(cells.values())
        pairs = [
            summarise(form, defence, some, forecasts.get(form), len(settings.texts))
            for form in settings.access
            for defence in settings.defences
            if parse_access(form).observed or defence == NONE
        ]
        known = {
            "name": model.name,
            "fingerprint": model.fingerprint,
            "kind": model.kind,
            "layers": model.n_layers,
            "width": model.width,
            "vocabulary": model.n_vocabulary,
        }
        return cls(
            known,
            settings,
            tuple(pairs),
            tuple(_breakpoints(forecasts, pairs)),
            tuple(Control.of(form, some) for form in settings.access if parse_access(form).observed),
            tuple(some),
            tuple(_pieces(model, tokens) for tokens in truths),
            n_planned,
            interrupted,
            seconds,
            made=date.today().isoformat(),
        )

    def pair(self, access: str, defence: str = NONE) -> Pair | None:
        """Return the outcome of one combination; None where it was not part of the audit."""
        same = [pair for pair in self.pairs if (pair.access, pair.defence) == (access, defence)]
        return same[0] if same else None

    @property
    def verdict(self) -> str:
        """The audit in one line."""
        return verdict(self)

    @property
    def advice(self) -> list[str]:
        """What to change, in sentences."""
        return advise(self, LIMIT)

    @property
    def coverage(self) -> str:
        """What was not reached; empty if everything was."""
        missing = self.n_planned - len(self.cells)
        cut = sum(cell.status == "cut" for cell in self.cells)
        why = "stopped" if self.interrupted else "budget"
        told = [f"{missing} of {self.n_planned} cells not run: {why}"] if missing else []
        return "; ".join(told + ([f"{cut} cut short"] if cut else []))

    def judged(self) -> list[Pair]:
        """Return the combinations asked for; masked access always, since no defence of outputs changes it."""
        judged = self.settings.judged
        return [p for p in self.pairs if p.defence in judged or not parse_access(p.access).observed]

    def leaks(self, limit: float) -> list[Pair]:
        """Return the combinations asked for that are known to let more than this share of tokens through.

        Parameters
        ----------
        limit : float
            From 0 to 1.
        """
        return [pair for pair in self.judged() if pair.leak > limit]

    def untested(self) -> list[Pair]:
        """Return the combinations asked for of which something is not known: no sign of protection."""
        return [pair for pair in self.judged() if not pair.complete]

    def failures(self, limit: float) -> list[Pair]:
        """Return the combinations that leak more than this share of tokens, or were not tested to the end."""
        return [pair for pair in self.judged() if not pair.complete or pair.leak > limit]

    def contradictions(self) -> list[str]:
        """Return where a defence seems to give away more than no defence does, which is impossible.

        The attack without a defence then missed what it could have found, and its low share means nothing.
        """
        told = []
        for access in self.settings.access:
            right = {(c.key.defence, c.key.text): sum(c.right) for c in self.cells
                     if c.key.access == access and not c.key.control and c.status == "done"}  # fmt: skip
            for defence in self.settings.defences:
                both = [t for d, t in right if d == defence and (NONE, t) in right]
                bare, defended = (sum(right[d, text] for text in both) for d in (NONE, defence))
                if defended > bare:
                    told.append(f"{access} gives away {defended} tokens with {defence} and {bare} without it")
        return told

    def as_json(self, redact: bool = True) -> dict[str, Any]:
        """Return the report as plain data.

        Parameters
        ----------
        redact : bool
            Leave texts and recovered tokens out, and where in a text they are: only counts remain.
        """
        cells = [{**as_record(cell), "n_right": sum(cell.right)} for cell in self.cells]
        if redact:
            hidden = {"tokens": None, "right": None, "failed_at": None, "message": ""}
            cells = [{**cell, **hidden} for cell in cells]
        settings = vars(self.settings) | {
            "texts": None if redact else list(map(plain_text, self.settings.texts))
        }
        plain: dict[str, Any] = _plain(
            {
                "schema": SCHEMA,
                "verdict": self.verdict,
                "made": self.made,
                "owner": self.owner,
                "scope": scope(self),
                "options": [vars(option) for option in options(self, LIMIT)],
                "advice": self.advice,
                "model": self.model,
                "settings": settings | {"n_texts": len(self.settings.texts)},
                "coverage": {
                    "planned": self.n_planned,
                    "run": len(self.cells),
                    "cut": sum(cell.status == "cut" for cell in self.cells),
                    "interrupted": self.interrupted,
                    "message": self.coverage,
                },
                "pairs": [pair.as_json() for pair in self.pairs],
                "breakpoints": [vars(point) for point in self.breakpoints],
                "controls": [vars(control) for control in self.controls],
                "cells": cells,
                "seconds": self.seconds,
                "versions": versions(),
                "command": self.command,
            }
        )
        return plain

    def to_json(self, path: str | PathLike[str], *, redact: bool = True) -> None:
        """Write the report as JSON.

        Parameters
        ----------
        path : path
        redact : bool
            Leave texts and recovered tokens out: only counts remain.
        """
        text = json.dumps(self.as_json(redact), indent=2, allow_nan=False)
        write(path, text + "\n")

    def to_html(self, path: str | PathLike[str], *, redact: bool = True) -> None:
        """Write the report as one page that fetches nothing.

        Parameters
        ----------
        path : path
        redact : bool
            Leave texts and recovered tokens out: only counts remain. Otherwise the page hides them until it
            is asked to show them.
        """
        from attnfit.audit.report_html import render

        write(path, render(self, redact))

    def with_command(self, command: str) -> Report:
        """Return the same report with another command to run it again."""
        return replace(self, command=command)


def _breakpoints(forecasts: Mapping[str, Forecast], pairs: Sequence[Pair]) -> list[BreakPoint]:
    points = []
    for form, one in forecasts.items():
        mine = [pair for pair in pairs if pair.access == form and pair.tested]
        for unit, name in (NOISE | BITS).items():
            predicted = one.noise[unit] if unit in one.noise else one.bits[unit]
            points.append(BreakPoint(form, unit, predicted, *measured_bracket(mine, name, unit in BITS)))
    return points


def _pieces(model: Model, tokens: Tokens) -> tuple[str, ...]:
    """Return what each token adds to the text."""
    grown = [model.detokenise(tokens[:count]) for count in range(len(tokens) + 1)]
    return tuple(after[len(before) :] for before, after in pairwise(grown))


def _plain(value: Any) -> Any:
    """Return plain data; JSON has no NaN or infinity."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value

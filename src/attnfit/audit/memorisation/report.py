"""What a model that one has trained memorised: texts that it completes, members that it betrays, canaries."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, astuple, dataclass, field
from datetime import date
from os import PathLike
from typing import Any

from attnfit.audit.advice import percent
from attnfit.audit.errors import AuditError
from attnfit.audit.memorisation.canaries import MOST_COMPARED, Canaries, Exposure, exposure
from attnfit.audit.memorisation.extraction import SUFFIX, Extraction, counted, extraction, windows
from attnfit.audit.memorisation.membership import Membership, membership
from attnfit.audit.memorisation.scores import Scorer, score_texts, tokens_of
from attnfit.audit.models.model import Model, Tokens
from attnfit.audit.models.texts import Text
from attnfit.audit.versions import versions
from attnfit.inference.tables import to_frame
from attnfit.writing import write

SCHEMA = "attnfit-memorised/1"


@dataclass(frozen=True)
class Extracted:
    """A text that greedy decoding completes.

    Attributes
    ----------
    place : int
        Among the members given.
    prefix, suffix : str
        What the model was given, and what it produced; numbers of tokens where it has no tokenizer.
    """

    place: int
    prefix: str
    suffix: str


@dataclass(frozen=True, eq=False)
class Memorised:
    """What a model has memorised, as far as it was measured.

    Attributes
    ----------
    model : str
        Its name.
    extraction, extraction_of_others : Extraction or None
        Of members, and of texts that the model was not trained on, if there are some: what comes back of
        these could be predicted, and was not memorised.
    membership : Membership or None
    exposure : Exposure or None
    settings : dict
        What was asked for, to measure it again.
    extracted : tuple of Extracted
        Members that come back by greedy decoding after the longest prefix, for those who may see them.
    made : str
        Day of the measurement, as 2026-01-31.
    command : str
        What measures it again.
    owner : str
        Who answers for the model, as given.
    """

    model: str
    extraction: Extraction | None
    extraction_of_others: Extraction | None
    membership: Membership | None
    exposure: Exposure | None
    settings: dict[str, Any] = field(repr=False)
    extracted: tuple[Extracted, ...] = field(default=(), repr=False)
    made: str = ""
    command: str = ""
    owner: str = ""

    @property
    def verdict(self) -> str:
        """What was found, in a sentence for each measure."""
        told = []
        if self.extraction is not None:
            told.append(self.extraction.verdict)
        if self.extraction_of_others is not None:
            base = self.extraction_of_others
            count = base.count(max(base.prefixes))
            told[-1] = f"{told[-1][:-1]}; of texts not trained on, {counted(count, base.n_texts)} do."
        told += [one.verdict for one in (self.membership, self.exposure) if one is not None]
        return f"{self.model}: {' '.join(told)}"

    def as_json(self, redact: bool = True) -> dict[str, Any]:
        """Return everything as plain data.

        Parameters
        ----------
        redact : bool
            Leave texts out: counts and figures remain.
        """
        measures = {
            "extraction": self.extraction,
            "extraction_of_others": self.extraction_of_others,
            "membership": self.membership,
            "exposure": self.exposure,
        }
        found: dict[str, Any] = {
            name: None if one is None else {"verdict": one.verdict, **one.columns()}
            for name, one in measures.items()
        }
        if self.membership is not None:
            members = self.membership
            found["membership"] |= {
                "conclusion": members.conclusion,
                "blind_auc": None if members.blind is None else vars(members.blind),
                "epsilon_at_least": members.epsilon,
                "delta": members.delta,
                "n_duplicates": members.n_duplicates,
            }
        if self.exposure is not None:
            exposed = self.exposure
            found["exposure"] |= {
                "n_compared": exposed.n_compared,
                "n_possible": exposed.n_possible,
                "fit": exposed.fit,
                "fit_p_values": exposed.fit_p_values,
            }
        about = {"schema": SCHEMA, "verdict": self.verdict, "model": self.model, "settings": self.settings}
        texts = {
            "extracted": None if redact else [asdict(one) for one in self.extracted],
            "canaries": None if redact or self.exposure is None else list(self.exposure.texts),
        }
        run = {"made": self.made, "command": self.command, "owner": self.owner}
        return {**about, **found, "texts": texts, **run, "versions": versions()}

    def to_html(self, path: str | PathLike[str], *, redact: bool = True) -> None:
        """Write the report as one page that fetches nothing.

        Parameters
        ----------
        path : path
        redact : bool
            Leave texts out: counts and figures remain. Otherwise the page hides them until it is asked to
            show them.
        """
        from attnfit.audit.memorisation.report_html import render

        write(path, render(self, redact))

    def to_frame(self) -> Any:
        """Return the counts of all measures as one data frame, of pandas or else polars, a row for each."""
        return to_frame(self.columns())

    def columns(self) -> dict[str, list[Any]]:
        """Return the table, a list for each column: shares with their intervals, and exposures in bits."""
        rows: list[tuple[Any, ...]] = []
        for name, one in (("members", self.extraction), ("others", self.extraction_of_others)):
            if one is not None:
                table = one.columns()
                ways = map(_decoded, table["prefix"], table["samples"])
                figures = zip(ways, table["share"], table["low"], table["high"], strict=True)
                rows += [(f"extraction of {name}", *row) for row in figures]
        if self.membership is not None:
            for score in self.membership.scores:
                rows.append(("membership", f"{score.name}: AUC", *astuple(score.auc)))
                rows += [
                    ("membership", f"{score.name}: told at {percent(at.rate)}", at.share, *at.interval)
                    for at in score.at_rates
                ]
            if self.membership.blind is not None:
                rows.append(("membership", "words alone: AUC", *astuple(self.membership.blind)))
        if self.exposure is not None:
            bits = self.exposure.columns()
            names = (f"canary {k}, bits, {how}" for k, how in enumerate(bits["method"]))
            figures = zip(names, bits["exposure"], bits["low"], bits["high"], strict=True)
            rows += [("exposure", *row) for row in figures]
        return {
            name: [row[k] for row in rows]
            for k, name in enumerate(("measure", "figure", "value", "low", "high"))
        }

    def __str__(self) -> str:
        return self.verdict


def memorised(
    model: Scorer,
    members: Sequence[Text] | None = None,
    others: Sequence[Text] | None = None,
    *,
    prefixes: Sequence[int] = (),
    suffix: int = SUFFIX,
    temperature: float = 1.0,
    reference: Scorer | None = None,
    rates: Sequence[float] | None = None,
    canaries: Canaries | None = None,
    max_compared: int = MOST_COMPARED,
    random_state: int = 0,
    progress: Callable[[str], None] | None = None,
) -> Memorised:
    """Measure what a model has memorised of the texts that it was trained on.

    Parameters
    ----------
    model : Model or callable
        A causal model, or a function of token ids that returns logits, as for `score_texts`.
    members : sequence of str, list of int or list of dict, optional
        Texts that it was trained on.
    others : sequence of str, list of int or list of dict, optional
        Texts like them that it was not trained on, for `membership`, and to see how many come back anyway.
    prefixes : sequence of int
        Numbers of tokens given, for `extraction`.
    suffix : int
        Number of tokens that the model is to produce.
    temperature : float
        Of draws, for (n, p)-discoverable extraction.
    reference : Model or callable, optional
        One with the same tokenizer that was not trained on the members, for `membership`.
    rates : sequence of float, optional
        False-positive rates of `membership`.
    canaries : Canaries, optional
        Those that were inserted in the training data, for `exposure`.
    max_compared : int
        Texts of their template that they are compared with.
    random_state : int
        Seed of folds, halves and refits.
    progress : callable, optional
        Called with what is being done.

    Returns
    -------
    Memorised

    Raises
    ------
    AuditError
        If there is nothing to measure, or as `extraction`, `membership` and `exposure`.

    Examples
    --------
    >>> from attnfit import audit
    >>> model = audit.load("tiny")
    >>> found = audit.memorised(model, model.private_texts[:40], prefixes=[2, 6], suffix=4)
    >>> found.extraction.count(6), found.extraction.n_texts
    (34, 35)
    """
    if not ((members is not None and (prefixes or others is not None)) or canaries is not None):
        raise AuditError(
            "nothing can be measured: pass members with prefixes or with others, or else the canaries"
        )
    for name, given in (("prefixes", prefixes or None), ("others", others), ("reference", reference)):
        if given is not None and members is None:
            raise AuditError(f"{name} is for members, which are missing; pass them too")
    if reference is not None and others is None:
        raise AuditError(
            "reference is for membership, which takes others: texts not trained on; pass them too"
        )
    say = progress or (lambda _: None)
    texts = {name: one for name, one in (("members", members), ("others", others)) if one is not None}
    extractions: dict[str, Extraction] = {}
    extracted: tuple[Extracted, ...] = ()
    for name, given in texts.items() if prefixes else ():
        say(f"extraction of {name}")
        cut = _cut(model, given, prefixes, suffix, name)
        scored = {
            size: score_texts(model, rows, temperature=temperature, name=name) for size, rows in cut.items()
        }
        extractions[name] = extraction(scored, suffix)
        if name == "members":
            extracted = _extracted(model, extractions[name], cut[max(prefixes)])
    told = None
    if others is not None:
        say("membership")
        scores = [score_texts(model, given, name=name) for name, given in texts.items()]
        its = None
        if reference is not None:
            its = tuple(score_texts(reference, given, name=name) for name, given in texts.items())
        told = membership(*scores, reference=its, rates=rates, random_state=random_state)  # type: ignore[arg-type]
    exposed = None
    if canaries is not None:
        say("exposure")
        exposed = exposure(
            score_texts(model, canaries.texts, name="canaries"),
            score_texts(model, canaries.compared(max_compared), name="compared"),
            canaries.n_possible,
            repeats=canaries.repeats,
            random_state=random_state,
        )
    settings = {
        "fingerprint": model.fingerprint if isinstance(model, Model) else None,
        "members": None if members is None else len(members),
        "others": None if others is None else len(others),
        "prefixes": list(prefixes),
        "suffix": suffix,
        "temperature": temperature,
        "reference": None if reference is None else _name(reference),
        "template": None if canaries is None else canaries.template,
        "max_compared": max_compared,
        "random_state": random_state,
    }
    return Memorised(
        _name(model),
        extractions.get("members"),
        extractions.get("others"),
        told,
        exposed,
        settings,
        extracted=extracted,
        made=date.today().isoformat(),
    )


def _cut(
    model: Scorer, texts: Sequence[Text], prefixes: Sequence[int], suffix: int, name: str
) -> dict[int, list[Tokens]]:
    """Return windows, each after the special tokens that the tokenizer begins a text with."""
    rows = tokens_of(model, texts, name)
    before, after = model.around if isinstance(model, Model) else ([], [])
    inner = []
    for row in rows:
        first = len(before) if before and row[: len(before)] == before else 0
        last = len(after) if after and row[-len(after) :] == after else 0
        inner.append(row[first : len(row) - last])
    cut = windows(inner, prefixes, suffix, name=name)
    return {size: [[*before, *row] for row in found] for size, found in cut.items()}


def _extracted(model: Scorer, found: Extraction, rows: list[Tokens]) -> tuple[Extracted, ...]:
    """Return the texts that greedy decoding completes, out of windows with the longest prefix."""
    first = len(model.around[0]) if isinstance(model, Model) else 0

    def told(tokens: Tokens) -> str:
        return model.detokenise(tokens) if isinstance(model, Model) else " ".join(map(str, tokens))

    hits = zip(found.places, found.greedy[max(found.prefixes)], strict=True)
    return tuple(
        Extracted(place, told(rows[place][first : -found.suffix]), told(rows[place][-found.suffix :]))
        for place, hit in hits
        if hit
    )


def _decoded(prefix: int, n_samples: int) -> str:
    way = "greedy" if not n_samples else "1 draw" if n_samples == 1 else f"{n_samples:,} draws"
    return f"after {prefix} tokens, {way}"


def _name(model: Scorer) -> str:
    return model.name if isinstance(model, Model) else "model"

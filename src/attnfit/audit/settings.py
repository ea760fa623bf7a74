"""What an audit is asked for, checked before any work."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from attnfit.audit.access import Access
from attnfit.audit.cells import NONE
from attnfit.audit.defences import apply_defence
from attnfit.audit.errors import AuditError
from attnfit.audit.forms import parse_access
from attnfit.audit.lower_precision import split_run
from attnfit.audit.models.model import Model, Tokens
from attnfit.audit.models.texts import Text, is_chat


@dataclass(frozen=True)
class Settings:
    """What was asked for.

    Attributes
    ----------
    texts : tuple of str, of lists of token ids or of lists of messages
    access : tuple of str
    defences : tuple of str
        All that were run, "none" among them.
    judged : tuple of str
        Those that were asked for.
    budget : float
    random_state : int
    first_position : int
    """

    texts: tuple[Text, ...]
    access: tuple[str, ...]
    defences: tuple[str, ...]
    judged: tuple[str, ...]
    budget: float
    random_state: int
    first_position: int = 0


def default_access(model: Model, texts: Sequence[Text]) -> list[str]:
    """Return the forms of access that a first look at a model should have."""
    if model.kind != "causal":
        return ["attention:0"]
    layers = dict.fromkeys([1, (model.n_layers + 1) // 2, model.n_layers])
    forms = [*(f"hidden:{layer}" for layer in layers), "attention:0", "logits", "topk:5"]
    # What a chat begins with is its template.
    return forms if any(map(is_chat, texts)) else [*forms, "masked"]


def check_request(
    model: Model,
    texts: Sequence[Text],
    access: Sequence[str | Access] | None,
    defences: Sequence[str | None],
    budget: float,
    random_state: int,
    first_position: int = 0,
) -> Settings:
    """Return the settings, after every check that needs no forward pass of a text."""
    if isinstance(texts, str) or not len(texts):
        raise AuditError("texts must be a list with at least one text")
    if isinstance(texts[0], int | np.integer | Mapping):
        what = "messages of a chat" if isinstance(texts[0], Mapping) else "tokens of a text"
        raise AuditError(f"texts must be a list of texts: put the {what} in a list of their own")
    if not budget > 0:
        raise AuditError(f"budget must be a positive number of seconds, not {budget!r}")
    forms = default_access(model, texts) if access is None else list(dict.fromkeys(map(str, access)))
    if not forms:
        raise AuditError("access is empty; leave it out for the usual forms")
    known = [parse_access(form) for form in forms]
    _check_kind(model, known)
    for form in known:
        if form.observed:
            form.leak(model, [0, 1])
    chosen = list(dict.fromkeys(defence or NONE for defence in defences))
    for defence in chosen:
        apply_defence(np.ones((2, 2), dtype=np.float32), split_run(defence)[1])
    every = list(dict.fromkeys([NONE, *chosen]))
    return Settings(
        tuple(texts),
        tuple(forms),
        tuple(every),
        tuple(chosen or [NONE]),
        float(budget),
        random_state,
        first_position,
    )


def _check_kind(model: Model, forms: Sequence[Access]) -> None:
    """Raise AuditError naming every form of access that does not apply to an encoder."""
    unfit = [repr(str(form)) for form in forms if not form.reads_encoders]
    if model.kind != "causal" and unfit:
        raise AuditError(
            f"access {', '.join(unfit)} does not apply: {model.name!r} is an encoder, which predicts no next "
            "token, and whose states depend on all tokens at once; ask for attention:0"
        )


def tokenise_all(model: Model, texts: Sequence[Text]) -> tuple[list[Tokens], dict[int, str]]:
    """Return the tokens of every text, and what is wrong with those that have none.

    Raises
    ------
    AuditError
        If that is all of them.
    """
    truths: list[Tokens] = []
    faults: dict[int, AuditError] = {}
    for place, text in enumerate(texts):
        try:
            truths.append(_tokens(model, text))
        except AuditError as error:
            truths.append([])
            faults[place] = type(error)(f"texts[{place}]: {error}")
    if len(faults) == len(truths):
        raise faults[0]
    return truths, {place: str(error) for place, error in faults.items()}


def _tokens(model: Model, text: Text) -> Tokens:
    tokens = model.tokenise(text)
    if len(tokens) > model.max_length:
        raise AuditError(f"it has {len(tokens)} tokens; {model.name!r} takes {model.max_length}: shorten it")
    return tokens


def identity(model: Model, settings: Settings) -> dict[str, Any]:
    """Return what must agree for kept cells to be of use."""
    # Also of texts that are no valid Unicode.
    told = [text if isinstance(text, str) else "\1" + json.dumps(plain_text(text)) for text in settings.texts]
    texts = hashlib.sha256("\0".join(told).encode("utf-8", "surrogatepass")).hexdigest()
    return {
        "model": model.fingerprint,
        "texts": texts,
        "access": list(settings.access),
        "defences": list(settings.defences),
        "random_state": settings.random_state,
        **({"first_position": settings.first_position} if settings.first_position else {}),
    }


def plain_text(text: Text) -> Any:
    """Return a text as JSON knows it."""
    if isinstance(text, str):
        return text
    return [dict(one) if isinstance(one, Mapping) else int(one) for one in text]

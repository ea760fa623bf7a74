"""Every form of access on the packaged model, there and back; and what must be refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from time import perf_counter

import numpy as np

from attnfit.audit.errors import AuditError, NoRoundTrip, ObservationMismatch
from attnfit.audit.inverting import invert
from attnfit.audit.masked import recover_masked
from attnfit.audit.models import load
from attnfit.audit.models.model import Model
from attnfit.audit.observation import observe
from attnfit.audit.running import run
from attnfit.audit.states import invert_hidden

ROUND_TRIPS = (
    ("hidden:1", None),
    ("hidden:2", None),
    ("hidden:4", None),
    ("hidden:2", "int8"),
    ("attention:0", None),
    ("kv:0", None),
    ("k:2", "int8"),
    ("v:1", None),
    ("permuted:2", None),
    ("logits", None),
    ("logits", "round:1"),
    ("topk:5", None),
)
N_MASKED = 2


@dataclass(frozen=True)
class Check:
    """One check and how it went.

    Attributes
    ----------
    name : str
    passed : bool
    message : str
    seconds : float
    """

    name: str
    passed: bool
    message: str
    seconds: float

    def __str__(self) -> str:
        return f"{self.name}: {self.message} ({self.seconds:.1f} s)"


def self_test(progress: Callable[[str], None] | None = None) -> list[Check]:
    """Invert every form of access on "tiny", and give it what it must refuse.

    Parameters
    ----------
    progress : callable, optional
        Called with the name of each check.

    Returns
    -------
    list of Check
    """
    model = load("tiny")
    tests: dict[str, Callable[[], tuple[bool, str]]] = {
        f"{access}{f' with {defence}' if defence else ''}": partial(_round_trip, model, access, defence)
        for access, defence in ROUND_TRIPS
    }
    tests["masked"] = partial(_masked, model)
    tests["states of another layer"] = partial(_other_layer, model)
    tests["states without a number"] = partial(
        _refused, ObservationMismatch, lambda: invert_hidden(model, _states(model) * np.nan, 2)
    )
    tests["a text no token stands for"] = partial(_refused, NoRoundTrip, lambda: observe(model, "\udcff"))
    tests["no budget"] = partial(_refused, AuditError, lambda: run(model, model.private_texts[:1], budget=0))
    checks = []
    for name, test in tests.items():
        if progress is not None:
            progress(name)
        began = perf_counter()
        try:
            passed, message = test()
        except AuditError as error:
            passed, message = False, str(error)
        checks.append(Check(name, passed, message, perf_counter() - began))
    return checks


def _round_trip(model: Model, access: str, defence: str | None) -> tuple[bool, str]:
    text = model.private_texts[0]
    found = invert(model, observe(model, text, access, defence))
    return found.text == text and found.verified, found.message


def _masked(model: Model) -> tuple[bool, str]:
    texts = model.private_texts[:4]
    tokens = [model.tokenise(text) for text in texts]
    found = recover_masked(model, [known[N_MASKED:] for known in tokens], N_MASKED)
    right = sum(one.text == text for one, text in zip(found, texts, strict=True))
    return right == len(texts), f"{right} of {len(texts)} hidden beginnings recovered"


def _other_layer(model: Model) -> tuple[bool, str]:
    found = invert_hidden(model, _states(model), 3)
    return not found.verified and "another model or layer" in found.message, found.message


def _refused(kind: type[AuditError], call: Callable[[], object]) -> tuple[bool, str]:
    try:
        call()
    except kind as error:
        return True, f"refused: {error}"
    return False, "accepted"


def _states(model: Model) -> np.ndarray:
    return model.states(model.tokenise(model.private_texts[0]), 2)

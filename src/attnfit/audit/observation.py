"""What a model gives away about one text under one form of access."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import log_softmax

from attnfit.audit.defences import apply_defence
from attnfit.audit.errors import AuditError
from attnfit.audit.lower_precision import RunError, run_error, split_run
from attnfit.audit.models.model import Model, Tokens
from attnfit.audit.models.texts import Text

Array = NDArray[np.float32]
ACCESS = "hidden:LAYER, attention:BLOCK, logits, topk:COUNT"


@dataclass(frozen=True)
class Access:
    """A form of access.

    Attributes
    ----------
    kind : {"hidden", "attention", "logits", "topk"}
    place : int
        Layer of the states (from 1), block of the attention (from 0), count of the log-probabilities shown.
    """

    kind: str
    place: int = 0

    def __str__(self) -> str:
        return self.kind if self.kind == "logits" else f"{self.kind}:{self.place}"


@dataclass(frozen=True, eq=False)
class Observation:
    """What leaked.

    Attributes
    ----------
    access : Access
    array : ndarray, shape (n, width)
        States, outputs of an attention, logits, or the log-probabilities shown, largest first.
    error : ndarray, shape of array
        Standard deviation of the error that the defence adds to each number, as far as the defence is known.
    reach : ndarray, shape of array, optional
        The largest error that each number can have; infinite, as without it, where noise was added.
    shown : ndarray of int, shape of array, optional
        With "topk": the tokens that the log-probabilities belong to.
    dropped : tuple of int
        Positions that were withheld.
    defence : str or None
    fingerprint : str
        Of the model it came from; empty where unknown.
    first_position : int
        Position of the first token of the text.
    run : RunError, optional
        The run in fewer digits that it comes from.
    """

    access: Access
    array: Array
    error: Array
    shown: NDArray[np.int64] | None = field(default=None, repr=False)
    dropped: tuple[int, ...] = ()
    defence: str | None = None
    fingerprint: str = ""
    reach: Array | None = field(default=None, repr=False)
    first_position: int = 0
    run: RunError | None = field(default=None, repr=False)


def parse_access(access: str) -> Access:
    """Read a form of access, for example "hidden:15".

    Raises
    ------
    AuditError
        If it is none of hidden:LAYER, attention:BLOCK, logits, topk:COUNT.
    """
    found = re.fullmatch(r"(hidden|attention|topk):([0-9]+)|(logits)", access)
    if not found or access == "topk:0":
        raise AuditError(f"access must be one of {ACCESS}, not {access!r}")
    return Access(found[3]) if found[3] else Access(found[1], int(found[2]))


def observe(
    model: Model,
    text: Text,
    access: str = "hidden:1",
    defence: str | None = None,
    random_state: int = 0,
    first_position: int | None = None,
) -> Observation:
    """Return what the model gives away about a text.

    Parameters
    ----------
    model : Model
    text : str, list of int or list of dict
        Text, token ids, or the messages of a chat (see `Model.tokenise`).
    access : str
        ``"hidden:LAYER"`` (states after that block, from 1), ``"attention:BLOCK"`` (output of that block's
        self-attention, from 0), ``"logits"`` (at every position), ``"topk:COUNT"`` (the largest
        log-probabilities at every position, and their tokens).
    defence : str, optional
        ``"float16"``, ``"bfloat16"``, ``"int8"``, ``"int4"`` (one scale a row; ``":channel"``: a channel),
        ``"noise:R"`` (Gaussian, R times the root mean square of each row; ``"noise:Rstd"``: times each
        channel's standard deviation), ``"round:DECIMALS"``, ``"drop0"``; several joined by ``"+"``. With
        ``"run:bfloat16"``, which comes first, the model itself is run in bfloat16.
    random_state : int
        Seed of the noise.
    first_position : int, optional
        Position of the first token, 0 unless given; of no consequence to models whose positions only turn
        queries and keys, or that count distances.

    Returns
    -------
    Observation

    Raises
    ------
    NoRoundTrip
        If the tokenizer cannot represent the text.
    AuditError
        If the access or the defence is not known, or not available from this model.
    """
    if first_position is not None:
        model = model.at(first_position)
    tokens = model.tokenise(text)
    if len(tokens) > model.max_length:
        raise AuditError(f"text has {len(tokens)} tokens; {model.name!r} takes {model.max_length}")
    form = parse_access(access)
    dtype, rest = split_run(defence)
    run = None if dtype is None else _run_error(model, form, dtype)
    array, shown = leak(model if dtype is None else model.in_dtype(dtype), tokens, form)
    defended = apply_defence(array, rest, random_state)
    error, reach = defended.error, defended.reach
    if run is not None:
        own = run.errors(len(defended.array), len(defended.dropped))
        error, reach = np.hypot(error, own), np.full_like(reach, np.inf)
    if shown is not None:
        shown = shown[len(defended.dropped) :]
    return Observation(
        form,
        defended.array,
        error,
        shown,
        defended.dropped,
        defence,
        model.fingerprint,
        reach,
        model.first_position,
        run,
    )


def _run_error(model: Model, form: Access, dtype: str) -> RunError:
    if form.kind not in ("hidden", "attention"):
        raise AuditError(f"run:{dtype} is measured for states and attention outputs, not for {form}")
    return run_error(model, form.place if form.kind == "hidden" else str(form), dtype)


def leak(model: Model, tokens: Tokens, access: Access) -> tuple[Array, Any]:
    """Return the undefended array, and the tokens shown where only some are."""
    if access.kind == "hidden":
        return model.states(tokens, access.place), None
    if access.kind == "attention":
        return model.states(tokens, str(access)), None
    logits = model.logits(tokens)
    if access.kind == "logits":
        return logits, None
    if access.place > model.n_vocabulary:
        raise AuditError(f"topk:{access.place} exceeds the vocabulary of {model.n_vocabulary}")
    chances = log_softmax(logits.astype(np.float64), axis=1)
    shown = np.argsort(-chances, axis=1, kind="stable")[:, : access.place]
    return np.take_along_axis(chances, shown, axis=1).astype(np.float32), shown

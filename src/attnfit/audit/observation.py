"""What a model gives away about one text under one form of access."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from attnfit.audit.access import Access
from attnfit.audit.defences import apply_defence
from attnfit.audit.errors import AuditError
from attnfit.audit.forms import parse_access
from attnfit.audit.lower_precision import RunError, run_error, split_run
from attnfit.audit.models.model import Model
from attnfit.audit.models.texts import Text

Array = NDArray[np.float32]


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
    error_bound : ndarray, shape of array, optional
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
    error_bound: Array | None = field(default=None, repr=False)
    first_position: int = 0
    run: RunError | None = field(default=None, repr=False)


def observe(
    model: Model,
    text: Text,
    access: str | Access = "hidden:1",
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
    access : str or Access
        ``"hidden:LAYER"`` (states after that block, from 1), ``"attention:BLOCK"`` (output of that block's
        self-attention, from 0), ``"kv:BLOCK"``, ``"k:BLOCK"``, ``"v:BLOCK"`` (its keys and values as
        cached), ``"permuted:LAYER"`` (states in unknown order), ``"gradient"`` (of a training step),
        ``"last:LAYER"`` (the state of the last position alone), ``"last:logits"`` (its scores of the next
        token), ``"pooled"`` (the mean of the last states, of length one),
        ``"logits"`` (at every position), ``"topk:COUNT"`` (the largest log-probabilities at every position,
        and their tokens), or a form of one's own, a subclass of `attnfit.audit.Access`.
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
    form = parse_access(access)
    if first_position is not None:
        model = model.at(first_position, keys=form.counts_positions)
    tokens = model.tokenise(text)
    if len(tokens) > model.max_length:
        raise AuditError(f"text has {len(tokens)} tokens; {model.name!r} takes {model.max_length}")
    dtype, rest = split_run(defence)
    run = None
    if dtype is not None:
        layer = form.run_layer(model)
        if layer is None:
            raise AuditError(f"run:{dtype} is measured for states and attention outputs, not for {form}")
        run = run_error(model, layer, dtype)
    array, shown = form.leak(model if dtype is None else model.in_dtype(dtype), tokens)
    defended = apply_defence(array, rest, random_state)
    error, error_bound = defended.error, defended.error_bound
    if run is not None:
        own = run.errors(len(defended.array), len(defended.dropped))
        error, error_bound = np.hypot(error, own), np.full_like(error_bound, np.inf)
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
        error_bound,
        model.first_position,
        run,
    )

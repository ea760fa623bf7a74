"""From the output of an encoder's first attention to its input: tokens of a table, all seen by all."""

from __future__ import annotations

from time import perf_counter
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from attnfit.audit.checks import check_states
from attnfit.audit.errors import AuditError
from attnfit.audit.found import Found, Position
from attnfit.audit.models.model import Model
from attnfit.inversion import recover
from attnfit.problems import LayerInversion

Array = NDArray[np.float64]

# Relative residual of float32 arithmetic, and how far a residual may exceed its expectation.
ROUNDING = 1e-5
SLACK = 1.5


def invert_encoder_attention(model: Model, output: Any, *, error: Any = 0.0) -> Found:
    """Recover the tokens from the output of the first attention of an encoder of the BERT family.

    The rows that a token can be at each position are known: word, position and type embedding, normed. A row
    can be a token only if its value lies in the span of each head's output; see `attnfit.inversion.recover`.

    Parameters
    ----------
    model : Model
        An encoder.
    output : array_like, shape (n, width)
        What the attention adds, its output projection and bias included.
    error : array_like, broadcastable to output
        Standard deviation of the error of each number.

    Returns
    -------
    Found

    Raises
    ------
    AuditError
        If the encoder has another architecture.
    ObservationMismatch
        If the output has another width or is not finite.
    """
    began = perf_counter()
    observed, uncertainty = check_states(model, output, error)
    B = observed.double().numpy()
    size = float(np.sqrt(np.mean(B**2)))
    noise = float(uncertainty.error.square().mean().sqrt()) / max(size, float(np.finfo(float).tiny))
    precision = min(SLACK * float(np.hypot(noise, ROUNDING)), 0.5)

    def interruptible(*_: object) -> None:
        if model.before_work is not None:
            model.before_work()

    interruptible()
    found = recover(
        first_attention(model, B),
        vocabulary=lambda position: token_rows(model, position),
        precision=precision,
        random_state=0,
        callback=interruptible,
    )
    assert found.tokens is not None
    assert found.margins is not None
    tokens = [int(token) for token in found.tokens]
    # Rows that are equal are one token to the layer, and several words to a reader.
    verified = found.verdict == "recovered" and all(len(rows) == 1 for rows in found.equal_rows or [])
    positions = tuple(
        Position(token, found.residual, float(margin) - found.residual, model.n_vocabulary, "scan")
        for token, margin in zip(tokens, found.margins, strict=True)
    )
    return Found(
        text=model.detokenise(tokens),
        tokens=tokens,
        verified=verified,
        positions=positions,
        failed_at=None if verified else 0,
        message=found.message,
        n_candidates=len(tokens) * model.n_vocabulary,
        n_forwards=len(tokens) * found.n_starts,
        seconds=perf_counter() - began,
    )


def first_attention(model: Model, output: Array) -> LayerInversion:
    """Return the problem of inverting the first attention of an encoder of the BERT family."""
    attention: Any = getattr(model.blocks[0], "attention", None)
    inner = getattr(attention, "self", None)
    if not all(hasattr(inner, name) for name in ("query", "key", "value")):
        raise AuditError(
            f"the attention of {model.name!r} is not of the BERT family (query, key, value): its output "
            "cannot "
            "be inverted"
        )
    (W_Q, b_Q), (W_K, _), (W_V, b_V) = (_linear(getattr(inner, n)) for n in ("query", "key", "value"))
    W_O, b_O = _linear(attention.output.dense)
    n_heads = model.module.config.num_attention_heads
    return LayerInversion.from_projections(
        W_Q, W_K, W_V, W_O, output, n_heads=n_heads, b_Q=b_Q, b_V=b_V, b_O=b_O
    )


def token_rows(model: Model, position: int) -> Array:
    """Return what every token of the vocabulary is to the first block at a position, shape (N, width)."""
    embed = model.base.embeddings
    tokens = torch.arange(model.n_vocabulary)[:, None]
    with torch.no_grad():
        rows = embed(input_ids=tokens, position_ids=torch.full_like(tokens, position))
    return np.asarray(rows[:, 0].double().numpy())


def _linear(layer: Any) -> tuple[Array, Array]:
    return layer.weight.double().numpy().T, layer.bias.double().numpy()

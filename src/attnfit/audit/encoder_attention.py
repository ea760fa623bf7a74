"""From the output of an encoder's first attention to its input: tokens of a table, all seen by all."""

from __future__ import annotations

from collections.abc import Sequence
from time import perf_counter
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.linalg import block_diag

from attnfit.audit.checks import check_states
from attnfit.audit.errors import AuditError
from attnfit.audit.models.model import Model, Tokens
from attnfit.audit.result import InversionResult, Position
from attnfit.inversion import recover
from attnfit.objectives.inverse_curvature import heads_of_projections
from attnfit.problems import LayerInversion

Array = NDArray[np.float64]

# Relative residual of float32 arithmetic, and how far a residual may exceed its expectation.
ROUNDING = 1e-5
SLACK = 1.5
# The row of a token is what enters the first block up to this.
SAME_ROW = 1e-6


class EncoderSearch:
    """The inversion of one output of the first attention of an encoder of the BERT family.

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

    Raises
    ------
    AuditError
        If the encoder has another architecture.
    ObservationMismatch
        If the output has another width or is not finite.
    """

    def __init__(self, model: Model, output: Any, error: Any) -> None:
        observed, uncertainty = check_states(model, output, error)
        self._model, self._output = model, observed.double().numpy()
        size = float(np.sqrt(np.mean(self._output**2)))
        noise = float(uncertainty.error.square().mean().sqrt()) / max(size, float(np.finfo(float).tiny))
        self._precision = min(SLACK * float(np.hypot(noise, ROUNDING)), 0.5)

    def contradiction(self, truth: Tokens) -> str:
        """Return why the true tokens would not be accepted; empty if they would."""
        model = self._model
        entering = model.states(truth, 0).astype(np.float64)
        rows = np.stack([self._rows(place, [token])[0] for place, token in enumerate(truth)])
        far = np.abs(rows[:, : model.width] - entering).max(1) / np.abs(entering).max()
        if far.max() > SAME_ROW:
            return (
                f"at position {far.argmax()} the row of the true token differs from what enters the first "
                f"block by {far.max():.0e} (allowed {SAME_ROW:.0e}): its positions are counted otherwise"
            )
        problem = first_attention(model, self._output)
        missed = np.sqrt(2.0 * problem.value(rows.T)) / np.linalg.norm(self._output)
        if not missed <= self._precision:
            return (
                f"the first attention, computed from the true rows, misses the output by {missed:.0e} "
                f"(allowed {self._precision:.0e})"
            )
        return ""

    def _rows(self, position: int, some: Sequence[int] | None = None) -> Array:
        """Return what every token, or some, is to the problem at a position."""
        rows = token_rows(self._model, position, some)
        n = len(self._output)
        if relative_biases(self._model, n) is None:
            return rows
        place = np.zeros((len(rows), n))
        place[:, position] = 1.0
        return np.hstack([rows, place])

    def run(self, known: Tokens) -> InversionResult:
        """Return everything that could be recovered."""
        if known:
            raise AuditError(
                "known_prefix cannot be used with outputs of an encoder, which sees all tokens at once"
            )
        began, model = perf_counter(), self._model

        def interruptible(*_: object) -> None:
            if model.before_work is not None:
                model.before_work()

        interruptible()
        found = recover(
            first_attention(model, self._output),
            vocabulary=self._rows,
            precision=self._precision,
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
        return InversionResult(
            text=model.detokenise(tokens),
            tokens=tokens,
            verified=verified,
            positions=positions,
            failed_at=None if verified else 0,
            message=found.message,
            n_candidates=len(tokens) * model.n_vocabulary,
            n_forwards=len(tokens) * found.n_starts,
            seconds=perf_counter() - began,
            alternatives={
                place: [int(row) for row in rows if row != tokens[place]]
                for place, rows in enumerate(found.equal_rows or [])
                if len(rows) > 1
            },
        )


def first_attention(model: Model, output: Array) -> LayerInversion:
    """Return the problem of inverting the first attention of an encoder of the BERT family.

    Where a bias ``b_ij`` that depends on positions only is added to the logits (MPNet), the tokens of the
    problem are ``(x_i, e_i)`` with e_i the i-th unit vector: the logits of ``diag(W, b)`` are those wanted.
    """
    (W_Q, b_Q), (W_K, _), (W_V, b_V), (W_O, b_O) = _projections(model)
    n_heads = model.module.config.num_attention_heads
    W, V, key_bias, shift = heads_of_projections(W_Q, W_K, W_V, W_O, n_heads, b_Q, b_V, b_O)
    biases = relative_biases(model, len(output))
    if biases is not None:
        n = len(output)
        W = [block_diag(matrix, bias) for matrix, bias in zip(W, biases, strict=True)]
        V = [np.pad(value, ((0, n), (0, 0))) for value in V]
        key_bias = np.pad(key_bias, ((0, 0), (0, n)))
    return LayerInversion(W, V, output - shift, key_bias=key_bias)


# Under which names the first block's attention has query, key, value and output projection.
PROJECTIONS = (
    ("self.query", "self.key", "self.value", "output.dense"),
    ("attn.q", "attn.k", "attn.v", "attn.o"),
)


def _projections(model: Model) -> list[tuple[Array, Array]]:
    """Return weight and bias of query, key, value and output of the first attention."""
    attention: Any = getattr(model.blocks[0], "attention", None)
    for names in PROJECTIONS:
        layers = [_part(attention, name) for name in names]
        if all(layer is not None for layer in layers):
            return [_linear(layer) for layer in layers]
    raise AuditError(
        f"the attention of {model.name!r} ({model.family}) is not of the BERT family (query, key, value): "
        "its output cannot be inverted"
    )


def _part(module: Any, path: str) -> Any:
    for name in path.split("."):
        module = getattr(module, name, None)
    return module


def relative_biases(model: Model, n: int) -> Array | None:
    """Return what is added to the logits of n positions by their distance, shape (heads, n, n), or None."""
    encoder: Any = getattr(model.base, "encoder", None)
    if not hasattr(encoder, "compute_position_bias"):
        return None
    with torch.no_grad():
        biases = encoder.compute_position_bias(torch.zeros(1, n, model.width))[0]
    return np.asarray(biases.double().numpy())


def token_rows(model: Model, position: int, some: Sequence[int] | None = None) -> Array:
    """Return what every token, or some, is to the first block at a position, shape (N, width)."""
    embed = model.base.embeddings
    tokens = torch.arange(model.n_vocabulary)[:, None] if some is None else torch.tensor(some)[:, None]
    place = position + model.n_reserved + model.first_position
    with torch.no_grad():
        rows = embed(input_ids=tokens, position_ids=torch.full_like(tokens, place))
        # ELECTRA may keep narrower embeddings.
        project = getattr(model.base, "embeddings_project", None)
        rows = rows if project is None else project(rows)
    return np.asarray(rows[:, 0].double().numpy())


def _linear(layer: Any) -> tuple[Array, Array]:
    return layer.weight.double().numpy().T, layer.bias.double().numpy()

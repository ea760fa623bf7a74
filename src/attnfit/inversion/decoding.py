"""Find the tokens of a table that give the output of a layer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attnfit.inversion.exchange import improve, rivals
from attnfit.inversion.joint import MOVES, NOISE, JointDecoder
from attnfit.inversion.sequential import decode_in_order, is_sequential
from attnfit.inversion.span import SpanTest
from attnfit.inversion.vocabulary import Vocabulary
from attnfit.problems import LayerInversion
from attnfit.problems.base import MAX_DENSE

Array = NDArray[np.float64]
Index = NDArray[np.intp]
Callback = Callable[[float, int], Any]

# Rows of the table that the test of spans leaves at each position.
CANDIDATES = 64


@dataclass(frozen=True)
class Decoded:
    """The tokens nearest to the output that were found.

    Attributes
    ----------
    tokens : ndarray of int, shape (n_unknown,)
        Numbers of their rows in the table.
    rows : ndarray, shape (n_unknown, d)
    square : float
        Squared residual of the output.
    method : {"in order", "spans", "jointly"}
    n_decodings : int
    seconds : ndarray of int, shape (n_unknown,)
        The row that comes nearest to the output in the place of each token alone; -1 without another.
    second_squares : ndarray, shape (n_unknown,)
        Squared residuals with these.
    """

    tokens: Index
    rows: Array
    square: float
    method: str
    n_decodings: int
    seconds: Index
    second_squares: Array


def decode(
    layer: LayerInversion,
    vocabulary: Vocabulary,
    precision: float,
    n_starts: int,
    rng: np.random.Generator,
    callback: Callback,
) -> Decoded:
    """Return the tokens that give the output, or the nearest found.

    Where no query sees a later key, tokens are found one after the other. Where a head has more values than
    there are tokens, each row of the table is tested by itself. What these leave open is decoded jointly.

    Parameters
    ----------
    layer : LayerInversion
    vocabulary : Vocabulary
    precision : float
        Relative residual that counts as reproduced.
    n_starts : int
        Largest number of chains of joint decodings.
    rng : numpy.random.Generator
    callback : callable
        Called with the tokens or chains done, and their number.
    """
    enough = precision**2 * float(np.sum(layer.B**2))
    small = layer.n_unknowns <= MAX_DENSE
    spans = SpanTest.of(layer, precision)
    if is_sequential(layer):
        found = _compared(
            layer, vocabulary, decode_in_order(layer, vocabulary, enough, callback), "in order", 1
        )
    elif spans is not None:
        return _within_spans(layer, vocabulary, spans, enough, n_starts, rng, callback)
    elif small:
        return _jointly(layer, vocabulary, enough, n_starts, rng, callback)
    else:
        raise ValueError(
            f"{layer.n_unknowns} unknowns are more than the {MAX_DENSE} that are decoded jointly; give known "
            "tokens, or the outputs of heads with more values than tokens"
        )
    if found.square <= enough or not small:
        return found
    return min(
        found, _jointly(layer, vocabulary, enough, n_starts, rng, callback), key=lambda one: one.square
    )


def _within_spans(
    layer: LayerInversion,
    vocabulary: Vocabulary,
    spans: SpanTest,
    enough: float,
    n_starts: int,
    rng: np.random.Generator,
    callback: Callback,
) -> Decoded:
    """Return what is found among the rows that the spans of the heads' values leave."""
    left, rows = [], []
    for position in layer.unknown:
        table = vocabulary.rows(int(position))
        scores = spans.scores(table)
        few = np.argpartition(scores, min(CANDIDATES, len(scores)) - 1)[:CANDIDATES]
        left.append(few[np.argsort(scores[few])])
        rows.append(table[left[-1]])
        callback(len(rows), len(layer.unknown))
    place = {int(position): i for i, position in enumerate(layer.unknown)}
    narrow = Vocabulary(lambda position: rows[place[position]], layer.d, layer.n)
    numbers = np.stack(left)
    tokens = improve(layer, narrow, numbers, np.zeros(len(rows), dtype=np.intp), enough)
    found = _compared(layer, narrow, tokens, "spans", 1)
    if found.square > enough and layer.n_unknowns <= MAX_DENSE:
        found = min(
            found, _jointly(layer, narrow, enough, n_starts, rng, callback), key=lambda one: one.square
        )
    every = np.arange(len(numbers))
    return replace(
        found,
        tokens=numbers[every, found.tokens],
        seconds=np.where(found.seconds < 0, -1, numbers[every, found.seconds]),
    )


def _jointly(
    layer: LayerInversion,
    vocabulary: Vocabulary,
    enough: float,
    n_starts: int,
    rng: np.random.Generator,
    callback: Callback,
) -> Decoded:
    """Return the best that chains of joint decodings find."""
    joint = JointDecoder(layer, vocabulary)
    bases = [layer.rows(point) for point in reversed(layer.starts(rng).values())]
    tokens, square, made = np.zeros(len(layer.unknown), dtype=np.intp), np.inf, 0
    for s in range(n_starts):
        base = bases[s // len(NOISE) % len(bases)]
        if s >= len(NOISE) * len(bases):
            move = MOVES[s % len(MOVES)] * float(np.sqrt(np.mean(base**2)))
            base = base + move * rng.standard_normal(base.shape)
        found, least, more = joint.chain(base, NOISE[s % len(NOISE)], enough)
        made += more
        callback(s + 1, n_starts)
        if least < square:
            tokens, square = found, least
        if square <= enough:
            break
    return _compared(layer, vocabulary, tokens, "jointly", made)


def _compared(
    layer: LayerInversion, vocabulary: Vocabulary, tokens: Index, method: str, n_decodings: int
) -> Decoded:
    """Return tokens with their residual and their rivals."""
    rows = vocabulary.tokens(layer.unknown, tokens)
    output = layer.layer.forward(layer.rows_with(rows)).output
    square = float(np.sum((output - layer.B) ** 2))
    return Decoded(tokens, rows, square, method, n_decodings, *rivals(layer, vocabulary, tokens))

"""Find the tokens of a table that give the output of a layer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attnfit.inversion.exchange import improve
from attnfit.inversion.joint import MOVES, NOISE, JointDecoder
from attnfit.inversion.recovered import AnyInversion
from attnfit.inversion.rivals import Rivals, rivals
from attnfit.inversion.sequential import decode_in_order, is_sequential
from attnfit.inversion.span import SpanTest
from attnfit.inversion.vocabulary import Vocabulary
from attnfit.objectives.block_problem import BlockInversion
from attnfit.objectives.objective import MAX_DENSE

Array = NDArray[np.float64]
Index = NDArray[np.intp]
Callback = Callable[[float, int], Any]

# Rows of the table that the test of spans leaves at each position.
CANDIDATES = 64
# Where a search fails, all tuples are tried if they are no more than this.
MOST_TUPLES = 100_000
# Numbers of attention held at once.
BLOCK = 1 << 22


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
    n_decodings : int
    rivals : Rivals
        What was tried in their place.
    exhausted : bool
        Whether all tuples of the table were tried.
    """

    tokens: Index
    rows: Array
    square: float
    n_decodings: int
    rivals: Rivals
    exhausted: bool


def decode(
    layer: AnyInversion,
    vocabulary: Vocabulary,
    precision: float,
    enough: float,
    n_starts: int,
    rng: np.random.Generator,
    callback: Callback,
) -> Decoded:
    """Return the tokens that give the output, or the nearest found.

    Where no query sees a later key, tokens are found one after the other. Where a head has more values than
    there are tokens, each row of the table is tested by itself. What these leave open is decoded jointly.

    Parameters
    ----------
    layer : LayerInversion or BlockInversion
    vocabulary : Vocabulary
    precision : float
        Relative error of the output.
    enough : float
        Squared residual at which it counts as reproduced.
    n_starts : int
        Largest number of chains of joint decodings.
    rng : numpy.random.Generator
    callback : callable
        Called with the tokens or chains done, and their number.
    """
    small = layer.n_unknowns <= MAX_DENSE
    spans = None if isinstance(layer, BlockInversion) else SpanTest.of(layer, precision)
    numbers, tokens, square, made, exhausted = None, None, np.inf, 0, False
    if is_sequential(layer):
        tokens = decode_in_order(layer, vocabulary, enough, callback)
    elif spans is not None:
        numbers, vocabulary = _within_spans(layer, vocabulary, spans, callback)
        tokens = improve(layer, vocabulary, numbers, np.zeros(len(numbers), dtype=np.intp), enough)
    elif not small:
        raise ValueError(
            f"{layer.n_unknowns} unknowns are more than the {MAX_DENSE} that are decoded jointly; give known "
            "tokens, or the outputs of heads with more values than tokens"
        )
    if tokens is not None:
        square, made = JointDecoder(layer, vocabulary).square(tokens), 1
    if tokens is None or (not square <= enough and small):
        joint, joint_square, joint_made = _jointly(layer, vocabulary, enough, n_starts, rng, callback)
        if tokens is None or joint_square < square:
            tokens, square, made = joint, joint_square, joint_made
    if not square <= enough:
        tokens, square, exhausted = _every_tuple(layer, vocabulary, tokens, square)
    rows = vocabulary.tokens(layer.unknown, tokens)
    others = rivals(layer, vocabulary, tokens, enough, numbers)
    if numbers is not None:
        tokens, others = numbers[np.arange(len(numbers)), tokens], others.renumbered(numbers)
    return Decoded(tokens, rows, square, made, others, exhausted)


def _every_tuple(
    layer: AnyInversion, vocabulary: Vocabulary, tokens: Index, square: float
) -> tuple[Index, float, bool]:
    """Return the nearest tokens of all, and True, where they can all be tried; else those given."""
    tables = [vocabulary.rows(int(position)) for position in layer.unknown[: MOST_TUPLES.bit_length()]]
    sizes = [len(table) for table in tables]
    if len(tables) < len(layer.unknown) or prod(sizes) > MOST_TUPLES:
        return tokens, square, False
    every = np.stack(np.unravel_index(np.arange(prod(sizes)), sizes), axis=1)
    squares = np.empty(len(every))
    step = max(1, BLOCK // layer.n**2)
    for first in range(0, len(every), step):
        part = every[first : first + step]
        T = np.tile(layer.rows_with(np.zeros((len(tables), layer.d))), (len(part), 1, 1))
        for i, position in enumerate(layer.unknown):
            T[:, position] = tables[i][part[:, i]]
        squares[first : first + step] = np.sum((layer.layer.forward(T).output - layer.B) ** 2, axis=(1, 2))
    best = int(np.argmin(np.where(np.isnan(squares), np.inf, squares)))
    return (every[best], float(squares[best]), True) if squares[best] < square else (tokens, square, True)


def _within_spans(
    layer: AnyInversion, vocabulary: Vocabulary, spans: SpanTest, callback: Callback
) -> tuple[Index, Vocabulary]:
    """Return the rows that the spans of the heads' values leave at each position, the likeliest first: their
    numbers, shape (n_unknown, N), and themselves. Fewer than others are filled up with the first again.
    """
    left, tables = [], []
    for position in layer.unknown:
        table = vocabulary.rows(int(position))
        scores = spans.scores(table)
        few = np.argpartition(scores, min(CANDIDATES, len(scores)) - 1)[:CANDIDATES]
        left.append(few[np.argsort(scores[few])])
        tables.append(table[left[-1]])
        callback(len(left), len(layer.unknown))
    widest = max(map(len, left))
    fill = [np.r_[np.arange(len(few)), np.zeros(widest - len(few), dtype=np.intp)] for few in left]
    rows = {int(p): table[own] for p, table, own in zip(layer.unknown, tables, fill, strict=True)}
    numbers = np.stack([few[own] for few, own in zip(left, fill, strict=True)])
    return numbers, Vocabulary(lambda position: rows[position], layer.d, layer.n)


def _jointly(
    layer: AnyInversion,
    vocabulary: Vocabulary,
    enough: float,
    n_starts: int,
    rng: np.random.Generator,
    callback: Callback,
) -> tuple[Index, float, int]:
    """Return the best tokens that chains of joint decodings find, their squared residual and how many were
    made.
    """
    joint = JointDecoder(layer, vocabulary)
    bases = [layer.token_rows(point) for point in reversed(layer.starts(rng).values())]
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
    return tokens, square, made

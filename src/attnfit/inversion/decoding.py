"""Find the tokens of a table that give the output of a layer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import linalg

from attnfit.inversion.exchange import Rivals, improve, rivals
from attnfit.inversion.recovered import AnyInversion
from attnfit.inversion.vocabulary import SpanTest, Vocabulary, decode_in_order, is_sequential
from attnfit.objectives.inverse import LayerInversion
from attnfit.objectives.objective import MAX_DENSE
from attnfit.objectives.token_problem import TokenProblem

Array = NDArray[np.float64]
Index = NDArray[np.intp]
Callback = Callable[[float, int], Any]

# Rows of the table that the test of spans leaves at each position.
CANDIDATES = 64
# Where a search fails, all tuples are tried if they are no more than this.
MOST_TUPLES = 100_000
# Numbers of attention held at once.
BLOCK = 1 << 22
# Assumed error of the linear model, as a share of the output: a chain of decodings starts with one of these.
NOISE = (0.1, 0.03, 0.01, 0.3)
# Later starts are moved by these shares of the tokens' size.
MOVES = (0.3, 0.3, 1.0, 1.0)
# A token this many nats ahead of its rival is taken together with others; at most this share of them a round.
CERTAIN = 10.0
SHARE = 4
# Steps of damped Gauss-Newton a round, and decodings without progress that end a chain.
STEPS = 8
PATIENCE = 2


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
    spans = None
    # Where no head has more values than there are tokens, none leaves room.
    if isinstance(layer, LayerInversion) and layer.n < min(layer.d, layer.m):
        spans = SpanTest.of(layer, precision)
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
    bases = layer.token_rows(np.stack(list(layer.starts(rng).values()))[::-1])
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


@dataclass(frozen=True)
class Prior:
    """Tokens as normal variables: mean of each position, shape (n, d), and one precision, shape (d, d)."""

    mean: Array
    precision: Array

    @classmethod
    def of(cls, vocabulary: Vocabulary, positions: Index, n: int) -> Prior:
        """Return the moments of the vocabulary."""
        tables = [vocabulary.rows(int(p)) for p in positions]
        mean = np.zeros((n, tables[0].shape[1]))
        for position, rows in zip(positions, tables, strict=True):
            mean[position] = rows.mean(axis=0)
        covariance = np.cov(tables[0].T, bias=True).reshape(mean.shape[1], -1)
        floor = 1e-6 * max(np.trace(covariance) / len(covariance), np.finfo(float).tiny)
        return cls(mean, np.linalg.inv(covariance + floor * np.eye(len(covariance))))


class Posterior:
    """``||output - B||_F^2 / (2 s^2) + 0.5 sum_i (t_i - mean)^T precision (t_i - mean)``, open tokens alone.

    Parameters
    ----------
    problem : TokenProblem
    prior : Prior
    T : ndarray, shape (n, d)
        Where to start.
    deviation : float
        s.
    """

    def __init__(self, problem: TokenProblem, prior: Prior, T: Array, deviation: float) -> None:
        self.problem, self.prior, self.variance = problem, prior, deviation**2
        self.open = problem.unknown.copy()
        self.T, self.damping = T.copy(), 1e-3

    def fix(self, which: Index, tokens: Array) -> None:
        """Take some of the open tokens, numbered among themselves, as known."""
        self.T[self.open[which]] = tokens
        self.open = np.delete(self.open, which)

    def settle(self) -> None:
        """Descend for a few damped Gauss-Newton steps, or until they gain little."""
        energy = self._energy(self.T)
        for _ in range(STEPS):
            self._linearise()
            for _ in range(30):
                move = linalg.lapack.dpotrs(self._factor(self.damping), self.gradient)[0]
                trial = self.T.copy()
                trial[self.open] -= move.reshape(-1, self.problem.d)
                lower = self._energy(trial)
                if lower < energy:
                    break
                self.damping *= 4.0
            else:
                # No damping helps.
                return
            self.T, self.damping = trial, max(self.damping / 5.0, 1e-6)
            gained, energy = energy - lower, lower
            if gained < 1e-3 * energy:
                break
        self._linearise()

    def marginals(self) -> Array:
        """Return the precision of each open token by itself, shape (open, d, d)."""
        d, k = self.problem.d, len(self.open)
        covariance = linalg.lapack.dpotri(self._factor(0.0))[0]
        own = np.arange(k)
        upper = covariance.reshape(k, d, k, d)[own, :, own, :]
        blocks = np.triu(upper) + np.swapaxes(np.triu(upper, 1), 1, 2)
        return np.linalg.inv(blocks)

    def _linearise(self) -> None:
        d, k = self.problem.d, len(self.open)
        forward = self.problem.layer.forward(self.T)
        J = (
            self.problem.layer.jacobian(forward, self.open)
            .reshape(-1, d, k)
            .swapaxes(1, 2)
            .reshape(-1, k * d)
        )
        apart = self.T[self.open] - self.prior.mean[self.open]
        self.gradient = J.T @ (forward.output - self.problem.B).reshape(-1) / self.variance
        self.gradient += (apart @ self.prior.precision).reshape(-1)
        self.H = J.T @ J / self.variance
        blocks = self.H.reshape(k, d, k, d)
        own = np.arange(k)
        blocks[own, :, own, :] += self.prior.precision

    def _factor(self, damping: float) -> Array:
        H = self.H.copy()
        H[np.diag_indices(len(H))] *= 1.0 + damping
        factor, info = linalg.lapack.dpotrf(H, overwrite_a=True)
        if info:
            raise np.linalg.LinAlgError("the posterior precision is not finite")
        return np.asarray(factor)

    def _energy(self, T: Array) -> float:
        with np.errstate(over="ignore", invalid="ignore"):
            C = self.problem.layer.forward(T).output - self.problem.B
            apart = T[self.open] - self.prior.mean[self.open]
            energy = float(np.sum(C * C) / self.variance + np.sum((apart @ self.prior.precision) * apart))
        return 0.5 * energy if np.isfinite(energy) else np.inf


@dataclass(frozen=True)
class JointDecoder:
    """Tokens of a vocabulary from the output of a layer, without a search over single tokens.

    Linearised at its best point, the posterior of all open tokens is normal. The tokens whose best row of the
    table is far ahead of the second in their marginals are taken as known, the others follow to their new
    best point, and so on until none is open. Known tokens make the rest overdetermined: a right beginning
    decides the rest. A decoding that does not reproduce the output is the start of the next one, with half
    the assumed error.

    Parameters
    ----------
    problem : TokenProblem
    vocabulary : Vocabulary
    """

    problem: TokenProblem
    vocabulary: Vocabulary

    def chain(self, start: Array, noise: float, enough: float) -> tuple[Index, float, int]:
        """Return the best tokens of a chain of decodings, their squared residual and the decodings made.

        Parameters
        ----------
        start : ndarray, shape (n, d)
        noise : float
            Assumed error of the first decoding, as a share of the output.
        enough : float
            Squared residual that ends the chain.
        """
        best, least, misses, made = np.zeros(0, dtype=np.intp), np.inf, 0, 0
        scale = float(np.sqrt(np.mean(self.problem.B**2)))
        prior = Prior.of(self.vocabulary, self.problem.unknown, self.problem.n)
        T = start
        while misses <= PATIENCE and least > enough:
            try:
                tokens = self._decode(Posterior(self.problem, prior, T, noise * (scale or 1.0)))
            except np.linalg.LinAlgError:
                break
            made += 1
            square = self.square(tokens)
            misses += square >= least
            if square < least:
                best, least = tokens, square
                T = self.rows(best)
            noise *= 0.5
        return best, least, made

    def rows(self, tokens: Index) -> Array:
        """Return all tokens as rows, shape (n, d)."""
        return self.problem.rows_with(self.vocabulary.tokens(self.problem.unknown, tokens))

    def square(self, tokens: Index) -> float:
        """Return the squared residual of tokens."""
        return float(np.sum((self.problem.layer.forward(self.rows(tokens)).output - self.problem.B) ** 2))

    def _decode(self, posterior: Posterior) -> Index:
        """Return one token for each unknown position."""
        chosen = np.full(self.problem.n, -1)
        while len(posterior.open):
            posterior.settle()
            precisions = posterior.marginals()
            winners, leads = np.zeros(len(precisions), dtype=np.intp), np.zeros(len(precisions))
            for i, (position, precision) in enumerate(zip(posterior.open, precisions, strict=True)):
                apart = self.vocabulary.rows(int(position)) - posterior.T[position]
                nats = 0.5 * np.einsum("cl,cl->c", apart @ precision, apart)
                winners[i] = np.argmin(nats)
                ahead = np.partition(nats, 1)[:2] if len(nats) > 1 else np.array([0.0, np.inf])
                leads[i] = ahead[1] - ahead[0]
            order = np.argsort(-leads)
            taken = order[: max(1, min(len(order) // SHARE, int(np.sum(leads >= CERTAIN))))]
            positions = posterior.open[taken]
            chosen[positions] = winners[taken]
            posterior.fix(taken, self.vocabulary.tokens(positions, winners[taken]))
        return chosen[self.problem.unknown]

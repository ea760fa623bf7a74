"""Decode all tokens of a layer jointly: the most certain first, the others given these."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import linalg

from attnfit.inversion.vocabulary import Vocabulary
from attnfit.objectives.token_problem import TokenProblem

Array = NDArray[np.float64]
Index = NDArray[np.intp]

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
class Prior:
    """Tokens as normal variables: mean of each position, shape (n, d), and one precision, shape (d, d)."""

    mean: Array
    precision: Array

    @classmethod
    def of(cls, vocabulary: Vocabulary, positions: Index, n: int) -> Prior:
        """Return the moments of the vocabulary."""
        tables = [vocabulary.rows(int(p)) for p in positions]
        mean = np.zeros((n, tables[0].shape[1]))
        mean[positions] = [rows.mean(axis=0) for rows in tables]
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
            lower = self._step(energy)
            if lower is None:
                return
            gained, energy = energy - lower, lower
            if gained < 1e-3 * energy:
                break
        self._linearise()

    def marginals(self) -> Array:
        """Return the precision of each open token by itself, shape (open, d, d)."""
        d, k = self.problem.d, len(self.open)
        covariance = linalg.lapack.dpotri(self._factor(0.0))[0]
        diagonal = range(0, k * d, d)
        upper = np.stack([covariance[i : i + d, i : i + d] for i in diagonal])
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

    def _step(self, energy: float) -> float | None:
        """Take one step; return the energy there, None where no damping helps."""
        d = self.problem.d
        for _ in range(30):
            move = linalg.lapack.dpotrs(self._factor(self.damping), self.gradient)[0]
            trial = self.T.copy()
            trial[self.open] -= move.reshape(-1, d)
            lower = self._energy(trial)
            if lower < energy:
                self.T, self.damping = trial, max(self.damping / 5.0, 1e-6)
                return lower
            self.damping *= 4.0
        return None

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

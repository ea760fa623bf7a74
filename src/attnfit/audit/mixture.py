"""From one state after the first block to the mixture of values in it, and from there to the tokens.

The attention of head h at the last position hands on ``o_h = sum_d e_hd v_hd / sum_d e_hd``, d the distance
of a token from the last one and ``e_hd = exp(q_h . k_hd - q_h . k_h0)``. So ``sum_d psi_d = 0`` with
``psi_hd = e_hd (v_hd - o_h)``: one row of a table for each distance, all rows together must cancel. Taken as
Gaussian, the rows of all other distances tell how likely each token is at one, and this is repeated while
the distributions sharpen (mean-field annealing).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import torch

from attnfit.audit.engine.first_block import FirstBlock, spread
from attnfit.audit.models.model import Tokens

# Dampings of a Levenberg-Marquardt step tried at once, relative to the largest curvature, and shares of each.
DAMPINGS = tuple(10.0 ** (-2 * k) for k in range(10))
SHARES = (1.0, 0.5, 0.2)
# Steps from a start; starts; what is left of a miss after a step that made progress.
MAX_STEPS, STARTS, PROGRESS = 30, 3, 0.9
# Ridge of the regression that the first start is of; states missed by a smaller share need double precision.
RIDGE_START, CLOSE = 1e-6, 1e-2
CHUNK = 512
# Exchanges of one or two tokens looked at more closely, and tokens at each distance that pairs are made of.
N_EXCHANGED, PAIRED = 8, 1024
# A mixture gives the state if it misses by at most so many roundings a channel.
MISSED = 10.0
# Mean square of a mixture in units of the spread of those of texts, above which it is none of a text: seen at
# most 10 for the true last token in 11 of 12 texts of "tiny" (in one Newton's method ended at another
# mixture), and 1,700 and more for others.
UNLIKELY = 100.0
# Tokens drawn to learn what rows look like.
N_DRAWN = 4096
# Perplexity of the tokens at each distance, round by round, and how much of the spread of all tokens remains.
PERPLEXITIES = (300.0, 200.0, 100.0, 60.0, 30.0, 15.0, 8.0, 4.0, 2.0, 1.0, 1.0, 1.0)
REMAINING = (1.0, 0.3, 0.2, 0.1, 0.07, 0.05, 0.03, 0.02, 0.01, 0.005, 0.0, 0.0)
# Tokens kept at each distance, in units of the perplexity, and at least.
KEPT, LEAST = 16, 1024
# Chances below this are none.
NEGLIGIBLE = 1e-9
# Share of the new distribution in each round after the first.
DAMPED = 0.7
# Ridge of covariances, relative to their mean; directions of a Jacobian smaller than this do not show.
RIDGE, RANK = 1e-10, 1e-14
# Numbers of a table of all tokens that can be gone through many times.
CHEAP = 1 << 17
ROWS = 8192


@dataclass(frozen=True, eq=False)
class Mixture:
    """What the heads hand on at the last position.

    Attributes
    ----------
    token : int
        The last one.
    place : int
        Its position.
    values : Tensor, shape (heads, w)
        In double precision.
    jacobian : Tensor, shape (width, heads w)
        Of the block's output with respect to them.
    """

    token: int
    place: int
    values: Any
    jacobian: Any


class MixtureFinder:
    """The mixtures that a block may be given at a last token, and the one that gives a state.

    Parameters
    ----------
    block : FirstBlock
    prior : Tensor, shape (n_vocabulary,)
        Log-probabilities of tokens.
    token, length : int
        The last token, and how many there are; where only distances count, at most.
    generator : torch.Generator
    """

    def __init__(self, block: FirstBlock, prior: Any, token: int, length: int, generator: Any) -> None:
        self._block, self._token, self._place = block, token, block.place(length)
        self._queries, keys, values = block.asked(token, self._place)
        self._own = block.scores(self._queries, keys[:, None]), values
        drawn = torch.multinomial(prior.exp(), N_DRAWN * length, replacement=True, generator=generator)
        lengths = torch.randint(1 if block.aligned else length - 1, length, (N_DRAWN,), generator=generator)
        self._mixtures = self._of(drawn.reshape(length, N_DRAWN), lengths)
        self._root = torch.linalg.cholesky(_ridged(torch.cov(self._mixtures.T)))

    def find(self, state: Any) -> Mixture | None:
        """Return the mixture for which the block gives a state; None if none is found that is likely at all.

        Levenberg-Marquardt in double precision, in units of the spread of mixtures of likely tokens, from
        where a regression of mixtures on states leads, then from the mixtures whose states are nearest.

        Parameters
        ----------
        state : Tensor, shape (width,)
        """
        state, given = state.double(), self._outputs(self._mixtures)
        centred, mean = given - given.mean(0), self._mixtures.mean(0)
        gram = _ridged(centred.T @ centred, RIDGE_START)
        slope = torch.linalg.solve(gram, centred.T @ (self._mixtures - mean))
        near = (given - state).square().sum(1).argsort()[: STARTS - 1]
        starts = [mean + (state - given.mean(0)) @ slope, *self._mixtures[near]]
        enough = MISSED * self._block.rounding * math.sqrt(len(state))
        found = (self._descend(state, start, enough) for start in starts)
        return next((one for one in found if one is not None), None)

    def _of(self, tokens: Any, lengths: Any) -> Any:
        """Return the mixtures of tokens at distances 1, 2, ... of which so many count, one a row."""
        scores, values = [self._own[0].expand(-1, tokens.shape[1])], [self._own[1][:, None]]
        for d, some in enumerate(tokens[: int(lengths.max())], 1):
            entries = self._block.entries(self._place - d)
            heads = len(self._queries)
            keys = self._block.scores(self._queries, entries.keys[:, some])
            scores.append(keys.masked_fill(lengths < d, -math.inf))
            values.append(spread(entries.values[:, some], heads))
        weights = torch.softmax(torch.stack(scores), 0)
        mixed = sum(weight[..., None] * value for weight, value in zip(weights, values, strict=True))
        return mixed.transpose(0, 1).reshape(tokens.shape[1], -1).double()

    def _outputs(self, mixtures: Any) -> Any:
        with torch.no_grad():
            shaped = mixtures.reshape(len(mixtures), len(self._queries), -1)
            return torch.cat(
                [self._block.output(self._token, self._place, some) for some in shaped.split(CHUNK)]
            )

    def _descend(self, state: Any, start: Any, enough: float) -> Mixture | None:
        point = start
        missed = state - self._outputs(point[None])[0]
        for _ in range(MAX_STEPS):
            close = float(missed.norm()) <= CLOSE * float(state.norm())
            J = self._jacobian(point if close else point.float(), len(state)).double()
            if float(missed.norm()) <= enough:
                shaped = point.reshape(len(self._queries), -1)
                return Mixture(self._token, self._place, shaped, J) if self._likely(point) else None
            U, s, Vh = torch.linalg.svd(J @ self._root, full_matrices=False)
            along = U.T @ missed
            damped = torch.stack([s / (s.square() + damping * s[0].square()) for damping in DAMPINGS])
            steps = torch.cat([share * (damped * along) @ Vh for share in SHARES]) @ self._root.T
            missing = state - self._outputs(point + steps)
            sizes = missing.norm(dim=1).nan_to_num(math.inf)
            best = int(sizes.argmin())
            if not float(sizes[best]) <= PROGRESS * float(missed.norm()):
                return None
            point, missed = point + steps[best], missing[best]
        return None

    def _likely(self, point: Any) -> bool:
        """Return whether a mixture is like those of texts: the last token, or the length, is wrong if not."""
        centred = (point - self._mixtures.mean(0))[:, None]
        squares = torch.linalg.solve_triangular(self._root, centred, upper=False).square()
        return float(squares.mean()) <= UNLIKELY

    def _jacobian(self, point: Any, width: int) -> Any:
        """Return the derivatives of the output, one channel a row."""
        copies = point.expand(width, -1).clone().requires_grad_()
        with torch.enable_grad():
            shaped = copies.reshape(width, len(self._queries), -1)
            given = self._block.output(self._token, self._place, shaped)
            return torch.autograd.grad(given.diagonal().sum(), copies)[0]


def _ridged(matrix: Any, share: float = 1e-6) -> Any:
    size = matrix.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    return matrix + share * size * torch.eye(matrix.shape[-1], dtype=matrix.dtype)


class TokenMixture:
    """The search for the tokens of a mixture.

    Parameters
    ----------
    block : FirstBlock
    prior : Tensor, shape (n_vocabulary,)
        Log-probabilities of tokens.
    mixture : Mixture
    generator : torch.Generator

    Attributes
    ----------
    n_scored : int
        Tokens compared so far, at one distance each.
    """

    def __init__(self, block: FirstBlock, prior: Any, mixture: Mixture, generator: Any) -> None:
        self._block, self._prior, self._mixture = block, prior, mixture
        self._queries, own_keys, own = block.asked(mixture.token, mixture.place)
        self._heads, self._width = mixture.values.shape
        self._values = mixture.values.float()
        self._own = (own - self._values).reshape(-1).double()
        self._reference = block.scores(self._queries, own_keys[:, None])
        self._likely = torch.multinomial(prior.exp(), N_DRAWN, replacement=True, generator=generator)
        J = mixture.jacobian
        sizes, directions = torch.linalg.eigh(J.T @ J)
        self._error = (
            directions * (block.rounding**2 / sizes.clamp_min(RANK * float(sizes[-1])))
        ) @ directions.T
        self._weights: list[Any] = []
        self._moments: list[tuple[Any, Any]] = []
        self.n_scored = 0

    def tokens(self, length: int, budget: int) -> Tokens:
        """Return the likeliest tokens of a text of some length, which need not give the mixture.

        At most so many tokens are compared at each distance.
        """
        self._prepare(length)
        kept = [self._prior.topk(min(budget, len(self._prior))).indices] * (length - 1)
        moments = list(self._moments[: length - 1])
        sizes = [weights[:, self._likely].mean(1) for weights in self._weights[: length - 1]]
        errors = self._errors(self._normalisers(length))
        best: Tokens = []
        for perplexity, remaining in zip(PERPLEXITIES, REMAINING, strict=True):
            if self._block.model.before_work is not None:
                self._block.model.before_work()
            spreads = [
                (1 - remaining) * now + remaining * all_
                for (_, now), (_, all_) in zip(moments, self._moments, strict=False)
            ]
            mean, size = sum(one for one, _ in moments), 1.0 + sum(sizes)
            before, best = best, []
            for d in range(length - 1):
                others = sum(spreads[:d] + spreads[d + 1 :], errors)
                scores = self._scores(d, kept[d], moments[d][0] - mean - self._own, others, size - sizes[d])
                count = min(len(scores), max(LEAST, int(KEPT * perplexity)))
                scores, order = scores.topk(count)
                kept[d] = kept[d][order]
                chances = _sharpened(scores.double(), perplexity)
                fresh = self._weighted(d, kept[d], chances)
                moments[d] = fresh if not before else _blended(moments[d], fresh)
                sizes[d] = self._weights[d][:, kept[d]] @ chances.float()
                best.append(int(kept[d][chances.argmax()]))
            if self.misfit(best) <= MISSED:
                return [*best[::-1], self._mixture.token]
        # Wide states need no more.
        if len(self._prior) * len(self._own) <= CHEAP:
            best = self._polished(best, budget)
        return [*best[::-1], self._mixture.token]

    def rivals(self, tokens: Tokens, count: int) -> list[Tokens]:
        """Return for each position of a text the tokens with which its rows cancel nearly as well."""
        best = tokens[-2::-1]
        root, left = self._left(best)
        every = torch.arange(len(self._prior))
        squares = [self._cancelled(d, every, one, root) for d, one in enumerate(left)]
        return [one.topk(count, largest=False).indices.tolist() for one in squares[::-1]] + [[]]

    def _polished(self, best: Tokens, budget: int) -> Tokens:
        """Exchange one token, or two at once, where that makes rows cancel."""
        root, left = self._left(best)
        rows = torch.cat([self._rows(d, torch.tensor([token])) for d, token in enumerate(best)])
        every = self._prior.topk(min(budget, len(self._prior))).indices
        squares = [self._cancelled(d, every, one, root) for d, one in enumerate(left)]
        tried = [
            [*best[:d], int(token), *best[d + 1 :]]
            for d, one in enumerate(squares)
            for token in every[one.topk(min(N_EXCHANGED, len(every)), largest=False).indices]
        ]
        for d, e in combinations(range(len(best)), 2):
            some = [every[squares[k].topk(min(PAIRED, len(every)), largest=False).indices] for k in (d, e)]
            tried += self._pairs(best, d, e, some, left[d] - rows[e], root)
        return min([best, *tried], key=self.misfit)

    def _pairs(self, best: Tokens, d: int, e: int, some: list[Any], left: Any, root: Any) -> list[Tokens]:
        """Return the texts with the two of some tokens that cancel best what is left."""
        first, second = self._rows(d, some[0]) @ root + left @ root, self._rows(e, some[1]) @ root
        near = torch.cdist(first, -second).flatten().topk(N_EXCHANGED, largest=False).indices
        pairs = [(int(some[0][k // len(some[1])]), int(some[1][k % len(some[1])])) for k in near.tolist()]
        return [[*best[:d], a, *best[d + 1 : e], b, *best[e + 1 :]] for a, b in pairs]

    def _cancelled(self, d: int, tokens: Any, left: Any, root: Any) -> Any:
        """Return how much of what is left the rows of tokens do not cancel, in units of the error."""
        self.n_scored += len(tokens)
        parts = [((self._rows(d, some) + left) @ root).square().sum(1) for some in tokens.split(ROWS)]
        return torch.cat(parts)

    def _left(self, best: Tokens) -> tuple[Any, Any]:
        """Return what weighs errors, and the sum of all rows but one of each token."""
        errors = _root(self._errors(self._sizes(best)))
        rows = torch.cat([self._rows(d, torch.tensor([token])) for d, token in enumerate(best)])
        return torch.linalg.inv(errors).T.float(), self._own.float() + rows.sum(0) - rows

    def _sizes(self, best: Tokens) -> Any:
        """Return the sum of the weights of each head."""
        return 1.0 + sum(self._weights[d][:, token] for d, token in enumerate(best))

    def misfit(self, before: Tokens) -> float:
        """Return by how many roundings the state of some tokens, the nearest first, is missed."""
        rows = sum(self._rows(d, torch.tensor([token]))[0].double() for d, token in enumerate(before))
        missed = self._mixture.jacobian @ ((self._own + rows) / self._by_row(self._sizes(before)))
        return float(missed.square().mean().sqrt()) / self._block.rounding

    def _prepare(self, length: int) -> None:
        """Learn what rows look like up to the distance of the first of so many tokens."""
        for d in range(len(self._weights), length - 1):
            keys = self._block.entries(self._mixture.place - 1 - d).keys
            self._weights.append((self._block.scores(self._queries, keys) - self._reference).exp())
            self._moments.append(
                self._weighted(d, self._likely, torch.full((N_DRAWN,), 1.0 / N_DRAWN).double())
            )

    def _rows(self, d: int, tokens: Any) -> Any:
        """Return psi of tokens at a distance, shape (n, heads w)."""
        values = self._block.entries(self._mixture.place - 1 - d).values[:, tokens]
        rows = self._weights[d][:, tokens, None] * (spread(values, self._heads) - self._values[:, None])
        return rows.transpose(0, 1).reshape(len(tokens), -1)

    def _weighted(self, d: int, tokens: Any, chances: Any) -> tuple[Any, Any]:
        """Return mean and covariance of the rows of tokens with such chances."""
        known = chances > NEGLIGIBLE
        rows = self._rows(d, tokens[known]).double()
        mean = chances[known] @ rows
        centred = (rows - mean) * chances[known, None].sqrt()
        return mean, centred.T @ centred

    def _scores(self, d: int, tokens: Any, missing: Any, covariance: Any, size: Any) -> Any:
        """Return the log-probability of tokens at a distance, up to a constant.

        The density of a mixture is that of its rows times the normaliser of each head, once a number.
        """
        inverse = torch.linalg.inv(_root(covariance))
        wanted, inverse = (inverse @ missing).float(), inverse.float()
        parts = []
        for some in tokens.split(ROWS):
            squares = (self._rows(d, some) @ inverse.T - wanted).square().sum(1)
            volume = (size[:, None] + self._weights[d][:, some]).log().sum(0)
            parts.append(self._prior[some] + self._width * volume - 0.5 * squares)
        self.n_scored += len(tokens)
        return torch.cat(parts)

    def _normalisers(self, length: int) -> Any:
        """Return the sum of the weights of each head, as expected before anything is known."""
        return 1.0 + sum(weights[:, self._likely].mean(1) for weights in self._weights[: length - 1])

    def _errors(self, normalisers: Any) -> Any:
        """Return the covariance of the sum of rows that the errors of the mixture cause."""
        size = self._by_row(normalisers)
        return size[:, None] * self._error * size

    def _by_row(self, heads: Any) -> Any:
        return heads.double().repeat_interleave(self._width)


def _root(covariance: Any) -> Any:
    """Return a Cholesky factor, with as much of a ridge as rounding asks for."""
    ridge = RIDGE
    while True:
        root, failed = torch.linalg.cholesky_ex(_ridged(covariance, ridge))
        if not failed:
            return root
        ridge *= 10.0


def _sharpened(scores: Any, perplexity: float) -> Any:
    """Return chances from log-probabilities, tempered until they have at least some perplexity."""
    chances = torch.softmax(scores, 0)
    low, high = -16.0, 0.0
    if _entropy(chances) >= math.log(perplexity):
        return chances
    for _ in range(20):
        middle = 0.5 * (low + high)
        chances = torch.softmax(scores * math.exp(middle), 0)
        low, high = (middle, high) if _entropy(chances) > math.log(perplexity) else (low, middle)
    return chances


def _entropy(chances: Any) -> float:
    return float(torch.special.entr(chances).sum())


def _blended(old: tuple[Any, Any], new: tuple[Any, Any]) -> tuple[Any, Any]:
    return (
        DAMPED * new[0] + (1.0 - DAMPED) * old[0],
        DAMPED * new[1] + (1.0 - DAMPED) * old[1],
    )

"""Find the token at one position, the cheapest way first."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from attnfit.audit.candidates import CandidateSet
from attnfit.audit.context_free import ContextFree
from attnfit.audit.embedding_newton import EmbeddingNewton
from attnfit.audit.engine.prior import with_surprises
from attnfit.audit.models.model import Tokens
from attnfit.audit.ordering import interleaved
from attnfit.audit.probes import Ranker
from attnfit.audit.reference import Reference
from attnfit.audit.regression import local_embeddings, regressed_embedding

# The probe knows less than its score says: beside the model's own prior it counts this much.
TRUST = (1.0, 0.3, 0.03)
FIRST_BATCH, SCAN_BATCH, DOUBT_BATCH = 16, 2048, 1 << 14
# After each of these the vocabulary is ranked again by what the candidates tried tell.
BATCHES = (16, 16, 32, *(64,) * 8)
# After these batches of words like those whose states are near, hardly any word of a text is left.
LIKE_BATCHES = (16, 16, 32, *(64,) * 16)
# Candidates before Newton's method, which takes three to seven thousand, and between two rankings of them.
LIKELY, LIKELY_BATCH = 4096, 256
# Candidates whose lessons order the rest: the nearest.
N_REGRESSED = 2048
NOISY_SHORTLIST, NOISY_WIDER = 64, 1024
# The best token stands alone if every rival tried is further from it, in squared errors, than this many times
# the certain log odds, and than this many times as far as its misfit lets the true token be: the nearest of
# those tried, which are most like it, may not be the nearest of all.
FAR, BEYOND_REACH, RIVALS = 16.0, 2.0, 64
# What rounding may make of distances that a table tells.
SLACK = 1e-2


@dataclass(frozen=True, eq=False)
class Clues:
    """What is known about a position before any candidate is tried.

    Attributes
    ----------
    drafter : Ranker
        Ranks the vocabulary given the observed state.
    mover : Ranker
        Ranks it given differences to candidates tried; its probe maps differences.
    prior : Tensor, shape (n_vocabulary,)
        Log-probabilities of the model itself.
    """

    drafter: Ranker
    mover: Ranker
    prior: Any


class PositionSearch:
    """The stages: a shortlist, regression on the candidates tried, words like those whose states are near,
    the likeliest words, Newton on the embedding, everything.

    Parameters
    ----------
    evaluated : CandidateSet
    clues : Clues
    table : Tensor, shape (n_vocabulary, width)
    budget : int
        Largest number of candidates.
    cheap : bool
        Whether to try the whole vocabulary takes less than Newton's method, which is then left out; where
        errors leave doubt, many are tried, and all where none of them explains the state.
    context_free : ContextFree, optional
        Tells which tokens cannot be the true one without trying them.
    reference : Reference, optional
        The states of all tokens after another text, which are made where the first stages fail.
    """

    def __init__(
        self, evaluated: CandidateSet, clues: Clues, table: Any, budget: int, *, cheap: bool,
        context_free: ContextFree | None = None, reference: Reference | None = None,
    ) -> None:  # fmt: skip
        self._evaluated, self._clues, self._table, self._budget = evaluated, clues, table, budget
        self._cheap, self._context_free, self._reference = cheap, context_free, reference

    def run(self) -> str | None:
        """Return the stage that found a token which explains the observation, None if all of them fail."""
        stages: dict[str, Callable[[], bool]] = {"shortlist": self.shortlist}
        reference = None if self._cheap or self._budget < len(self._table) else self._reference
        # A vocabulary that is one pass costs less than to be clever about it.
        pays = not self._cheap or len(self._table) > self._evaluated.prefix.chunk
        if pays and (reference is None or not reference.learned):
            stages["regression"] = self.regress
        if reference is not None:
            stages["likeness"] = partial(self._try_like, reference)
        if not self._cheap:
            stages["likely"] = self._try_likely
            stages["newton"] = self._newton
        stages["scan"] = self._scan
        return next((name for name, stage in stages.items() if stage()), None)

    def most_likely(self, certain: float, *, thorough: bool) -> str:
        """Choose by likelihood and prior among the candidates, where errors let several explain a state.

        Parameters
        ----------
        certain : float
            The log odds in nats over its rivals at which a candidate leaves no doubt.
        thorough : bool
            Whether the state is known to be that of a token after this prefix, so that all are worth trying.
        """
        found = self._evaluated
        self.shortlist(NOISY_SHORTLIST)
        for size in BATCHES:
            best = found.best
            if found.solved and found.log_odds >= certain:
                break
            self._regress_once(size)
            if found.solved and found.best == best:
                break
        method = "shortlist" if found.best < NOISY_SHORTLIST else "regression"
        if not found.solved and thorough and not self._cheap and self._newton():
            method = "newton"
        if not found.solved:
            method = "scan" if (self._cheap or thorough) and self._scan() else "nearest"
        self._challenge(certain)
        score = found.target.likelihoods(found.states) + with_surprises(self._clues.prior)[found.tokens]
        found.choose(int(score.argmax()))
        return method

    def _challenge(self, certain: float) -> None:
        """Try the tokens most like the best one, and many more if the errors could hide one of them."""
        found, mover = self._evaluated, self._clues.mover
        for _ in BATCHES:
            best = found.best
            like = mover.scores(self._table[found.tokens[best]])
            self._try(interleaved([like], found.seen, RIVALS))
            if found.best == best:
                break
        if self._fits and self._is_alone(certain) and found.log_odds >= certain:
            return
        if self._cheap:
            known = self._context_free is not None
            if not (known and self._fits):
                self.shortlist(NOISY_WIDER)
            # Where a table tells which tokens are worth it, one is looked for that fits, too.
            missed = known and not self._fits
            while (missed or (found.log_odds >= certain and not self._is_alone(certain))) and self._left:
                rest = self._within_reach(certain)
                if not rest:
                    found.exhausted = True
                    return
                self._try(rest[:DOUBT_BATCH])
                missed = missed and not self._fits
        # Where some tokens are as near as that, others that were not tried may be.
        found.exhausted = self._is_alone(certain) or len(found.tokens) == len(self._table)

    @property
    def _fits(self) -> bool:
        """Whether the best token misses the observation by no more than the true one may."""
        return float(self._evaluated.misfits.min()) <= self._evaluated.target.limit

    def _is_alone(self, certain: float) -> bool:
        """Return whether every rival tried is further from the best token than the true one can be."""
        return self._evaluated.apart > self._far(certain)

    def _far(self, certain: float) -> float:
        """Return how far from the best token the true one cannot be, nor count."""
        found = self._evaluated
        within = found.target.reach(float(found.misfits.min()))
        return max(FAR * certain, BEYOND_REACH * within)

    def _within_reach(self, certain: float) -> Tokens:
        """Return the tokens not tried yet that may be as near to the best one as the true token can be."""
        found, free = self._evaluated, self._context_free
        left = [token for token in range(len(self._table)) if token not in found.seen]
        if free is None or not free.holds(found.tokens, found.states, found.best):
            return left
        near = free.apart(found.target, found.tokens[found.best]) <= (1.0 + SLACK) * self._far(certain)
        return [token for token in left if near[token]]

    def shortlist(self, count: int = FIRST_BATCH) -> bool:
        """Try the best of the probe, of the prior and of both."""
        drafter, prior = self._clues.drafter, self._clues.prior
        probe = drafter.scores(drafter.probe.estimate(self._evaluated.target.state))
        lists = [_doubted(TRUST[-1] * probe) + prior, probe, prior]
        return self._try(interleaved(lists, self._evaluated.seen, count))

    def regress(self) -> bool:
        """Rank the vocabulary by what the candidates tried so far tell, again after each batch."""
        return any(self._regress_once(size) for size in BATCHES)

    def _regress_once(self, size: int) -> bool:
        found, mover, prior = self._evaluated, self._clues.mover, self._clues.prior
        embedding = regressed_embedding(
            mover.probe, found.target.state, found.states, self._table[found.tokens]
        )
        score = mover.scores(embedding)
        lists = [score, *(_doubted(trust * score) + prior for trust in TRUST[1:]), prior]
        return self._try(interleaved(lists, found.seen, size))

    def _try_like(self, reference: Reference) -> bool:
        """Try words that after another text are like those whose states are near, again after each batch."""
        found, prior = self._evaluated, self._clues.prior
        for size in LIKE_BATCHES:
            score = reference.scores(found)
            lists = [score, *(_doubted(trust * score) + prior for trust in TRUST[1:])]
            if self._try(interleaved(lists, found.seen, size)):
                return True
        return False

    def _newton(self) -> bool:
        return EmbeddingNewton(self._evaluated, self._table, self._budget).search()

    def _try_likely(self) -> bool:
        """Try the likeliest words and those that the candidates tried point to, ranked again after each
        batch.
        """
        return any(self._try(self._in_order(LIKELY_BATCH)) for _ in range(0, LIKELY, LIKELY_BATCH))

    def _scan(self) -> bool:
        """Try everything that is left."""
        while self._left and len(self._evaluated.tokens) < len(self._table):
            if self._try(self._in_order(SCAN_BATCH)):
                return True
        return False

    def _in_order(self, count: int) -> Tokens:
        """Return the next words to try, by the prior and by what the candidates tried tell in turn."""
        found, mover, prior = self._evaluated, self._clues.mover, self._clues.prior
        near = found.misfits.argsort()[:N_REGRESSED]
        embeddings = local_embeddings(
            mover.probe, found.target.state, found.states[near], self._table[found.tokens][near]
        )
        return interleaved([prior, *mover.scores(embeddings)], found.seen, count)

    @property
    def _left(self) -> int:
        """How many candidates may still be tried."""
        return max(0, self._budget - self._evaluated.n_candidates)

    def _try(self, tokens: list[int]) -> bool:
        self._evaluated.add(tokens[: self._left])
        return self._evaluated.solved


def _doubted(scores: Any) -> Any:
    """Return log-probabilities of tokens by a probe that may be wrong altogether: rare embeddings lie so far
    out that it finds all others likelier, however well the prior knows them.
    """
    return with_surprises(scores.log_softmax(0))

"""Find the token at one position, the cheapest way first."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from attnfit.audit.embedding_newton import EmbeddingNewton
from attnfit.audit.evaluated import Evaluated
from attnfit.audit.ordering import interleaved
from attnfit.audit.probes import Ranker
from attnfit.audit.regression import regressed_embedding

# The probe knows less than its score says: beside the model's own prior it counts this much.
TRUST = (1.0, 0.3, 0.03)
FIRST_BATCH, BATCH, SCAN_BATCH = 16, 64, 2048
N_ROUNDS = 8
# Candidates whose lessons order the rest.
N_REGRESSED = 1024
NOISY_SHORTLIST = 64
# A runner-up that misses by this many errors leaves no doubt about the best.
CLEAR = 3.0


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
    """The stages: a shortlist, regression on the candidates tried, Newton on the embedding, everything.

    Parameters
    ----------
    evaluated : Evaluated
    clues : Clues
    table : Tensor, shape (n_vocabulary, width)
    budget : int
        Largest number of candidates.
    cheap : bool
        Whether candidates cost so little that all are tried where noise leaves none of the first ones likely.
    """

    def __init__(self, evaluated: Evaluated, clues: Clues, table: Any, budget: int, *, cheap: bool) -> None:
        self._evaluated, self._clues, self._table, self._budget = evaluated, clues, table, budget
        self._cheap = cheap

    def run(self) -> str | None:
        """Return the stage that found a token which explains the observation, None if all of them fail."""
        stages = (self.shortlist, self.regress, self._newton, self._scan)
        for name, stage in zip(("shortlist", "regression", "newton", "scan"), stages, strict=True):
            if stage():
                return name
        return None

    def most_likely(self) -> str:
        """Choose by likelihood and prior among the candidates, where noise lets several explain a state."""
        found = self._evaluated
        self.shortlist(NOISY_SHORTLIST)
        for _ in range(N_ROUNDS):
            best = found.best
            if found.solved and float(found.misfits.sort().values[1]) > CLEAR:
                break
            self._regress_once()
            if found.solved and found.best == best:
                break
        method = "shortlist" if found.best < NOISY_SHORTLIST else "regression"
        if not found.solved:
            method = "scan" if self._cheap and self._scan() else "nearest"
        score = -0.5 * len(found.target.state) * found.misfits.square() + self._clues.prior[found.tokens]
        found.choose(int(score.argmax()))
        return method

    def shortlist(self, count: int = FIRST_BATCH) -> bool:
        """Try the best of the probe, of the prior and of both."""
        drafter, prior = self._clues.drafter, self._clues.prior
        probe = drafter.scores(drafter.probe.estimate(self._evaluated.target.state))
        return self._try(interleaved([TRUST[-1] * probe + prior, probe, prior], self._evaluated.seen, count))

    def regress(self) -> bool:
        """Rank the vocabulary by what the candidates tried so far tell, again after each batch."""
        return any(self._regress_once() for _ in range(N_ROUNDS))

    def _regress_once(self) -> bool:
        found, mover, prior = self._evaluated, self._clues.mover, self._clues.prior
        embedding = regressed_embedding(
            mover.probe, found.target.state, found.states, self._table[found.tokens]
        )
        score = mover.scores(embedding)
        lists = [score, *(trust * score + prior for trust in TRUST[1:])]
        return self._try(interleaved(lists, found.seen, BATCH))

    def _newton(self) -> bool:
        return EmbeddingNewton(self._evaluated, self._table, self._budget).search()

    def _scan(self) -> bool:
        """Try everything that is left, by the prior and by what the candidates tried tell in turn."""
        found, mover, prior = self._evaluated, self._clues.mover, self._clues.prior
        some = slice(N_REGRESSED)
        embedding = regressed_embedding(
            mover.probe, found.target.state, found.states[some], self._table[found.tokens[some]]
        )
        lists = [prior, TRUST[1] * mover.scores(embedding) + prior]
        rest = interleaved(lists, found.seen, len(prior))
        return any(self._try(rest[at : at + SCAN_BATCH]) for at in range(0, len(rest), SCAN_BATCH))

    def _try(self, tokens: list[int]) -> bool:
        left = max(0, self._budget - self._evaluated.n_candidates)
        self._evaluated.add(tokens[:left])
        return self._evaluated.solved

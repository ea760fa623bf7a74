"""The hidden beginning of a memorised sentence, from likelihoods alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from attnfit.audit.access import Access, Leak, Search
from attnfit.audit.errors import AuditError
from attnfit.audit.likelihood import Likelihood
from attnfit.audit.models.model import Layer, Model, Tokens

if TYPE_CHECKING:
    from attnfit.audit.observation import Observation

Ranks = NDArray[np.float32]

# Continuations kept of each beginning, and beginnings kept in all.
CONTINUATIONS = 16
BEAM = 1 << 14
# What the beginning's own likelihood counts beside that of the known tokens: with 1 it hides rare names, with
# 0 little is left to tell beginnings apart by one or two tokens.
WEIGHT = 0.15
# Beginnings whose second known token enters the table; scored on the first known tokens, and how many of
# these; scored in full.
LEADERS, LOOK_AHEAD, LENGTH, IN_FULL = 5000, 340, 6, 32
# A vocabulary with more beginnings than this is searched from the known part backwards.
TABLE = 1 << 14
GENERIC, LASTS, LASTS_KEPT, FIRSTS, PAIRS = 2, 64, 8, 64, 12
# Tokens that a masked one may be where the vocabulary is too large to try all pairs.
COMMON = 2048


class Masked(Access):
    """The model itself, and the rest of a text whose beginning is hidden."""

    kind, observed, forecasts = "masked", False, False

    @property
    def description(self) -> str:
        """What is seen, in words."""
        return "the model itself"

    def layer(self, model: Model) -> Layer:
        """Return the last states, from which tokens are predicted."""
        return model.n_layers + 1

    def leak(self, model: Model, tokens: Tokens) -> Leak:
        """Raise AuditError: no outputs leave."""
        raise AuditError(
            "with access 'masked' no outputs leave that could be observed: attnfit.audit.run tries it, and "
            "attnfit.audit.recover_masked finds hidden tokens"
        )

    def search(self, model: Model, observation: Observation, budget: int) -> Search:
        """Raise AuditError: there is no observation."""
        self.leak(model, [])
        raise AssertionError


@dataclass(frozen=True)
class MaskedResult:
    """The likeliest beginning found.

    Attributes
    ----------
    tokens : list of int
        The masked tokens.
    text : str
        Beginning and known part together.
    loss : float
        ``-log p(s | x) - 0.15 log p(x_2 .. x_m | x_1)`` in nats.
    gap : float
        By how much the next best beginning is less likely, in nats; infinite where none was scored.
    exposures : ndarray, shape (n_masked, n_vocabulary)
        log2 of the rank of every token at every masked position, by the best beginning it is part of; NaN
        where it was not admitted. A token of small rank is exposed even where another one wins.
    n_candidates : int
        Beginnings scored on the known part.
    forwards : float
        Cost in passes of one whole sequence, this target's share of what targets have in common included.
    seconds : float
    """

    tokens: Tokens
    text: str
    loss: float
    gap: float
    exposures: Ranks = field(repr=False)
    n_candidates: int
    forwards: float
    seconds: float


def common_words(model: Model) -> list[list[int]] | None:
    """Return common words that may stand first, and that may follow; None where all tokens can be tried."""
    if model.n_vocabulary * CONTINUATIONS <= TABLE:
        return None
    names = [model.detokenise([token]) for token in range(model.n_vocabulary)]
    # Tokenizers number their tokens from common to rare.
    first = [i for i, name in enumerate(names) if name.isalpha() and name[:1].isupper()]
    later = [i for i, name in enumerate(names) if name[:1] == " " and name[1:].isalpha()]
    return [first[:COMMON], later[:COMMON]]


def recover_masked(
    model: Model,
    suffixes: Any,
    n_masked: int = 2,
    *,
    admissible: Sequence[Any] | None = None,
) -> list[MaskedResult]:
    """Recover masked beginnings: the tokens before a known part of which the model is likeliest to have
    learned it.

    Beginnings ``x_1 .. x_m`` are ranked by ``0.15 log p(x_2 .. x_m | x_1) + log p(s_1 .. s_k | x)``: all of
    them with one known token and the leaders with two, from tables that all targets share, the best with six
    tokens and the last ones with all. A vocabulary too
    large for tables is searched from the known part backwards, two masked tokens at most.

    Parameters
    ----------
    model : Model
        A causal one.
    suffixes : str or sequence of int, or a list of them
        The known part of each target.
    n_masked : int
        Number of tokens before it.
    admissible : sequence of array_like of int, optional
        Tokens to consider at each masked position; all unless given.

    Returns
    -------
    list of MaskedResult

    Raises
    ------
    AuditError
        If a known part is empty, n_masked is not positive, admissible tokens do not fit, or the search is too
        large.

    Notes
    -----
    The target of the experiment in "Unmasking Transformers: A Theoretical Approach to Data Recovery via
    Attention Weights", whose own attack is `attnfit.audit.masked_relaxation`.
    """
    known = [as_tokens(model, one, i) for i, one in enumerate(_as_list(suffixes))]
    if n_masked < 1:
        raise AuditError(f"n_masked must be at least 1, not {n_masked}")
    allowed = _as_allowed(model, admissible, n_masked)
    likelihood = Likelihood(model)
    began = perf_counter()
    if n_masked > 1 and len(allowed[0]) * min(CONTINUATIONS, len(allowed[1])) > TABLE:
        if n_masked > 2:
            raise AuditError(
                f"{len(allowed[0])} first tokens are too many for {n_masked} masked ones; pass admissible "
                f"tokens, at most {TABLE // CONTINUATIONS} of them first"
            )
        search: Any = _Backwards(likelihood, allowed)
    else:
        search = _Tables(likelihood, allowed, known)
    shared = likelihood.n_tokens / len(known)
    setup = (perf_counter() - began) / len(known)
    results = []
    for tokens in known:
        began, before = perf_counter(), likelihood.n_tokens
        ranking = search.rank(tokens)
        cost = (shared + likelihood.n_tokens - before) / (n_masked + len(tokens))
        results.append(_found(model, tokens, allowed, ranking, cost, setup + perf_counter() - began))
    return results


@dataclass(frozen=True, eq=False)
class _Ranking:
    """Beginnings from best to worst, and the losses of the first ones, which were scored in full."""

    beginnings: Any
    losses: Any
    n_candidates: int


class _Tables:
    """Beginnings in the order they are read, with the likelihoods that all targets share."""

    def __init__(self, likelihood: Likelihood, allowed: list[Any], targets: list[Tokens]) -> None:
        self._likelihood = likelihood
        beginnings = allowed[0][:, None]
        own = torch.zeros(len(beginnings))
        for tokens in allowed[1:]:
            chances, which = likelihood.after(beginnings, tokens).topk(min(CONTINUATIONS, len(tokens)))
            own = (own[:, None] + chances).reshape(-1)
            beginnings = torch.cat([
                beginnings.repeat_interleave(which.shape[1], 0), tokens[which].reshape(-1, 1)
            ], 1)  # fmt: skip
            kept = own.topk(min(BEAM, len(own))).indices
            beginnings, own = beginnings[kept], own[kept]
        self._beginnings, self._own = beginnings, own
        # For each first known token: the leaders, and for each second one their score with both.
        self._scores: dict[int, Any] = {}
        self._leaders: dict[int, tuple[Any, dict[int, Any]]] = {}
        firsts = sorted({known[0] for known in targets})
        ahead = likelihood.after(beginnings, torch.tensor(firsts))
        for i, first in enumerate(firsts):
            self._scores[first] = WEIGHT * own + ahead[:, i]
            leaders = self._scores[first].topk(min(LEADERS, len(own))).indices
            seconds = sorted({known[1] for known in targets if known[0] == first and len(known) > 1})
            further = likelihood.after(
                _joined(beginnings[leaders], [first]), torch.tensor(seconds, dtype=int)
            )
            scores = self._scores[first][leaders, None] + further
            self._leaders[first] = leaders, dict(zip(seconds, scores.T, strict=True))

    def rank(self, known: Tokens) -> _Ranking:
        order = self._scores[known[0]].argsort(descending=True)
        if len(known) > 1:
            leaders, scores = self._leaders[known[0]]
            order = torch.cat([leaders[scores[known[1]].argsort(descending=True)], order[len(leaders) :]])
        for count, length in ((LOOK_AHEAD, LENGTH), (IN_FULL, len(known))):
            few = order[:count]
            seen = self._likelihood.of(_joined(self._beginnings[few], known[:length]), self._width)
            likeliest, best = (WEIGHT * self._own[few] + seen).sort(descending=True)
            order = torch.cat([few[best], order[count:]])
        return _Ranking(self._beginnings[order], -likeliest, min(LOOK_AHEAD, len(order)))

    @property
    def _width(self) -> int:
        return int(self._beginnings.shape[1])


class _Backwards:
    """Pairs from the token beside the known part, which carries most of the signal, to the one before."""

    def __init__(self, likelihood: Likelihood, allowed: list[Any]) -> None:
        self._likelihood = likelihood
        self._firsts, self._lasts = allowed
        self._follows = likelihood.after(self._firsts[:, None], self._lasts)
        # The firsts whose continuations are most like those of all others stand for any first.
        apart = (self._follows - self._follows.mean(0)).square().sum(1)
        self._generic = apart.argsort()[:GENERIC]
        self._ahead: dict[int, Any] = {}

    def rank(self, known: Tokens) -> _Ranking:
        beside = self._beside(known[0]).argsort(descending=True)
        few = beside[:LASTS]
        generic = self._generic[:1].expand(len(beside))
        seen = self._likelihood.of(_joined(self._pairs(generic[: len(few)], few), known[:3]), 2)
        kept = few[seen.argsort(descending=True)][:LASTS_KEPT]
        firsts = self._follows[:, kept].topk(min(FIRSTS, len(self._firsts)), 0).indices
        lasts = kept.expand_as(firsts).reshape(-1)
        order, _ = self._scored(firsts.reshape(-1), lasts, known[:2])
        firsts, lasts = firsts.reshape(-1)[order], lasts[order]
        best, losses = self._scored(firsts[:PAIRS], lasts[:PAIRS], known)
        pairs = [
            self._pairs(firsts[:PAIRS][best], lasts[:PAIRS][best]),
            self._pairs(firsts[PAIRS:], lasts[PAIRS:]),
            self._pairs(generic, beside),
        ]
        return _Ranking(torch.cat(pairs), losses, len(few) + len(lasts))

    def _pairs(self, firsts: Any, lasts: Any) -> Any:
        return torch.stack([self._firsts[firsts], self._lasts[lasts]], 1)

    def _scored(self, firsts: Any, lasts: Any, known: Tokens) -> tuple[Any, Any]:
        """Return the order of pairs and their losses in it."""
        seen = self._likelihood.of(_joined(self._pairs(firsts, lasts), known), 2)
        losses, order = (-WEIGHT * self._follows[firsts, lasts] - seen).sort()
        return order, losses

    def _beside(self, token: int) -> Any:
        """Return how likely each last token makes the first known one, after generic firsts."""
        if token not in self._ahead:
            total = torch.zeros(len(self._lasts))
            every = torch.arange(len(self._lasts))
            for first in self._generic:
                pairs = self._pairs(first.expand(len(every)), every)
                total += self._likelihood.after(pairs, torch.tensor([token]))[:, 0]
            self._ahead[token] = total
        return self._ahead[token]


def _joined(beginnings: Any, known: Tokens) -> Any:
    """Return each beginning with the known tokens after it."""
    tail = torch.tensor(known)[None].expand(len(beginnings), -1)
    return torch.cat([beginnings, tail], 1)


def _found(
    model: Model, known: Tokens, allowed: list[Any], ranking: _Ranking, forwards: float, seconds: float
) -> MaskedResult:
    tokens = [int(token) for token in ranking.beginnings[0]]
    exposures = np.full((len(tokens), model.n_vocabulary), np.nan, dtype=np.float32)
    for place, some in enumerate(allowed):
        met = list(dict.fromkeys(ranking.beginnings[:, place].tolist()))
        # Tokens in no beginning that was kept share the ranks that are left.
        exposures[place, some] = np.log2(0.5 * (len(met) + 1 + len(some)))
        exposures[place, met] = np.log2(np.arange(1, len(met) + 1))
    losses = ranking.losses
    return MaskedResult(
        tokens=tokens,
        text=model.detokenise([*tokens, *known]),
        loss=float(losses[0]),
        gap=float(losses[1] - losses[0]) if len(losses) > 1 else float("inf"),
        exposures=exposures,
        n_candidates=ranking.n_candidates,
        forwards=forwards,
        seconds=seconds,
    )


def _as_list(suffixes: Any) -> list[Any]:
    if isinstance(suffixes, str) or (len(suffixes) and isinstance(suffixes[0], int | np.integer)):
        return [suffixes]
    return list(suffixes)


def as_tokens(model: Model, suffix: Any, index: int) -> Tokens:
    """Return a known part as tokens, checked."""
    if isinstance(suffix, str):
        suffix = model.tokenizer(suffix, add_special_tokens=False)["input_ids"]
    tokens = [int(token) for token in suffix]
    if not tokens:
        raise AuditError(f"suffixes[{index}] is empty: there is nothing to judge beginnings by")
    bad = [token for token in tokens if not 0 <= token < model.n_vocabulary]
    if bad:
        raise AuditError(f"suffixes[{index}] has token {bad[0]}; {model.name!r} has {model.n_vocabulary}")
    return tokens


def _as_allowed(model: Model, admissible: Sequence[Any] | None, n_masked: int) -> list[Any]:
    if admissible is None:
        return [torch.arange(model.n_vocabulary)] * n_masked
    if len(admissible) != n_masked:
        raise AuditError(
            f"admissible has {len(admissible)} lists for {n_masked} masked tokens; pass one each"
        )
    allowed = [torch.as_tensor(np.asarray(tokens, dtype=np.int64)) for tokens in admissible]
    for place, tokens in enumerate(allowed):
        if not len(tokens) or int(tokens.min()) < 0 or int(tokens.max()) >= model.n_vocabulary:
            raise AuditError(f"admissible[{place}] must hold tokens from 0 to {model.n_vocabulary - 1}")
    return allowed

"""The text behind one row, by exact exchange of its tokens: rows of all lengths are searched in turn."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from math import inf
from time import perf_counter, process_time
from typing import Any

import torch

from attnfit.audit.errors import AuditError, Unsupported
from attnfit.audit.models.model import Tokens
from attnfit.audit.result import Cost, InversionResult, Position, conclude
from attnfit.audit.row_response import Reader, Response, response

# The one budget of a search: texts whose rows are computed, and processor seconds.
EVALUATIONS, SECONDS = 30_000, 60.0
# Random texts that a start is made from and sweeps of the linear model over them; texts whose tokens are
# exchanged in one round, and tokens that are tried at each of their positions: more where there is
# one position only.
STARTS, SWEEPS, BEAM, PROPOSED, ALONE = 8, 2, 4, 32, 256
# Rounds without a nearer text after which a length starts again.
PATIENCE = 6
# Rows agree within so many roundings, measured on the text itself, and at least within this share of the
# spread of a channel; where more would be needed nothing can be told. Others must miss by so many times more.
REPEATS, AGREES, LOOSEST, APART = 30.0, 1e-5, 1e-3, 3.0
# Before a text is claimed: tokens exchanged at each position, beside all with nearly the same embedding;
# tokens of each of two positions exchanged together; and tokens put before or after it.
RIVALS, PAIRED, DRAWN = 64, 4, 16
NOT_PROVEN = "not recovered within the budget, and no protection proven"

Text = tuple[int, ...]


class Exchange:
    """The search among texts of one length, special tokens left out.

    Each round takes the nearest texts that were not taken yet, and computes the rows of those that differ
    from them by one token, the likeliest by `Response.scores`, or by the place of a token where that model
    cannot tell places apart. After some rounds in vain it starts again from other random tokens.

    Parameters
    ----------
    reader : Reader
    response : Response
    prior : Tensor, shape (n_vocabulary,)
        Log-probabilities of tokens.
    target : Tensor, shape (width,)
    proposed : int
        Tokens tried at each position of a text.

    Attributes
    ----------
    n_evaluated : int
        Texts whose rows were computed.
    best : tuple of int
        The nearest text.
    rows : dict of tuple of int to Tensor
        Those of all texts so far, by text.
    """

    def __init__(self, reader: Reader, response: Response, prior: Any, target: Any, proposed: int) -> None:
        self._reader, self.response, self._prior, self._target = reader, response, prior, target
        self._proposed = min(proposed, len(prior))
        self._generator = torch.Generator().manual_seed(0)
        self.rows: dict[Text, Any] = {}
        self._stale = 0
        self.n_evaluated, self._least = 0, inf
        self.best: Text = ()
        self._restart()

    @property
    def is_done(self) -> bool:
        """Whether all texts of one token were read: there are no others."""
        return self.response.length == 1 and len(self.rows) == len(self._prior)

    def advance(self) -> None:
        """Make one round."""
        if self._stale >= PATIENCE or len(self._taken) == len(self._far):
            self._restart()
        left = sorted((far, text) for text, far in self._far.items() if text not in self._taken)
        texts = [text for _, text in left[:BEAM]]
        self._taken.update(texts)
        before = min(self._far.values())
        rows = torch.stack([self.rows[text] for text in texts])
        likely = self.likely(texts, rows, self._proposed).tolist()
        new = [
            exchanged(text, place, token)
            for text, tokens in zip(texts, likely, strict=True)
            for place, some in enumerate(tokens)
            for token in some
        ]
        if not self.response.ordered:
            new += [other for text in texts for other in reordered(text)]
        self._add(new)
        self._stale = 0 if min(self._far.values()) < before else self._stale + 1

    def likely(self, texts: Sequence[Text], rows: Any, count: int) -> Any:
        """Return the likeliest tokens at each position of texts, shape (len(texts), length, count)."""
        ids, count = torch.tensor(texts), min(count, len(self._prior))
        places = [
            (self.response.scores(ids, rows, self._target, place) + self._prior).topk(count).indices
            for place in range(self.response.length)
        ]
        return torch.stack(places, 1)

    def _restart(self) -> None:
        """Start again from random tokens, exchanged for those that the linear model finds likeliest."""
        learned = self.response
        drawn = torch.multinomial(
            self._prior.exp(), STARTS * learned.length, replacement=True, generator=self._generator
        )
        ids = drawn.reshape(STARTS, -1)
        rows = self._reader.rows(ids.tolist())
        self.n_evaluated += STARTS
        for _ in range(SWEEPS):
            for place in range(learned.length):
                best = (learned.scores(ids, rows, self._target, place) + self._prior).argmax(1)
                rows = learned.changed(rows, ids[:, place], best, place)
                ids[:, place] = best
        self._far: dict[Text, float] = {}
        self._taken: set[Text] = set()
        self._stale = 0
        self._add([tuple(text) for text in ids.tolist()])

    def _add(self, texts: list[Text]) -> None:
        """Compute the rows of texts that are new."""
        new = [text for text in dict.fromkeys(texts) if text not in self.rows]
        if new:
            self.n_evaluated += len(new)
            self.rows.update(zip(new, self._reader.rows(new), strict=True))
        some = [text for text in dict.fromkeys(texts) if text not in self._far]
        if some:
            rows = torch.stack([self.rows[text] for text in some])
            far = self.response.missed(rows, self._target).square().mean(1).sqrt().tolist()
            self._far.update(zip(some, far, strict=True))
            least = min(zip(far, some, strict=True))
            if least[0] < self._least:
                self._least, self.best = least


class RowSearch:
    """The inversion of one row for a whole text.

    Rounds of `Exchange` go to the length with the nearest text and, every other one, to a length that had
    few: distances of different lengths are in units of their own. A text is verified if
    one plain forward pass of it gives the row to rounding, or to the bounds of its errors, and no other text
    does that was met on the way, has another token or two, the same in another order, or one more or less.

    Parameters
    ----------
    reader : Reader
    row : Tensor, shape (width,)
    prior : Tensor, shape (n_vocabulary,)
        Log-probabilities of tokens.
    budget : int
        Largest number of tokens tried at a position in one round.
    error_bound : Tensor, shape (width,), optional
        The largest error of each number.
    published : str
        What others have read from such rows, for the message where no text is found.
    evaluations : int, optional
        Texts whose rows are computed at most, but for those of the round begun; `EVALUATIONS` unless given.
    seconds : float
        Processor time, but for the round begun.
    longest : int, optional
        Texts of at most so many tokens are looked for, special ones left out.
    """

    def __init__(
        self,
        reader: Reader,
        row: Any,
        prior: Any,
        budget: int,
        *,
        error_bound: Any = None,
        published: str = "",
        evaluations: int | None = None,
        seconds: float = SECONDS,
        longest: int | None = None,
    ) -> None:
        self._began, self._began_work = perf_counter(), process_time()
        self._model, self._reader, self._row, self._prior = reader.model, reader, row, prior
        self._bound = torch.zeros_like(row) if error_bound is None else error_bound
        self._budget = budget
        self._evaluations = EVALUATIONS if evaluations is None else evaluations
        self._published, self._seconds = published, seconds
        self._longest = reader.longest if longest is None else longest
        self._around = len(reader.model.around[0]), len(reader.model.around[1])
        self._roomiest = self._model.max_length - sum(self._around)
        self._n_evaluated = self._n_forwards = 0

    def contradiction(self, truth: Tokens) -> str:
        """Return why the true text would not be accepted; empty if it would."""
        inner = self._inner(truth)
        if not inner:
            return "the text lacks the special tokens that the model's tokenizer puts around every text"
        (missed,) = self._missed([inner])
        limit = self._limit(inner)
        return (
            "" if missed <= limit else f"the true text misses the row by {missed:.2g} (allowed {limit:.2g})"
        )

    def run(self, known: Tokens) -> InversionResult:
        """Return the text, if one was found."""
        if known:
            raise AuditError("known_prefix cannot be used with one row, in which all tokens are mixed")
        searches: list[Exchange] = []
        found: Text = ()
        others: dict[int, Tokens] = {}
        reason = NOT_PROVEN
        try:
            found = self._found(searches)
            if found:
                others, reason = self._doubts(found, searches)
        except KeyboardInterrupt:
            found, reason = (), "interrupted"
        n = self._n_evaluated + sum(search.n_evaluated for search in searches)
        cost = Cost(n, self._n_forwards, perf_counter() - self._began)
        if reason:
            # What is not known counts as not tested: it has no tokens, which could be the wrong ones.
            told = f"no text of up to {self._longest} tokens was found that alone gives the row"
            told += f" (others have read: {self._published})" if self._published else ""
            return InversionResult("", [], False, (), 0, f"{told}: {reason}", **vars(cost))
        tokens, missed = self._reader.whole(found), self._missed([found])[0]
        positions = [Position(token, missed, inf, 0, "joint") for token in tokens]
        return conclude(self._model, positions, len(tokens), reason, True, cost, others)

    def _found(self, searches: list[Exchange]) -> Text:
        """Return a text that gives the row; empty if none was met within the budget."""
        for length in range(1, self._longest + 1):
            learned = response(self._reader, self._prior, length)
            proposed = min(self._budget, PROPOSED if length > 1 else ALONE)
            searches.append(Exchange(self._reader, learned, self._prior, self._row, proposed))
            if length == 1:
                searches[0].advance()
            if self._gives_row(searches[-1].best):
                return searches[-1].best
        while (
            sum(search.n_evaluated for search in searches) < self._evaluations
            and process_time() - self._began_work < self._seconds
        ):
            # How near texts of different lengths are does not compare: one of many tokens comes near any row.
            search = min(
                (one for one in searches if not one.is_done),
                key=lambda one: one.n_evaluated * one.response.length,
            )
            search.advance()
            if self._gives_row(search.best):
                return search.best
        return ()

    def _doubts(self, found: Text, searches: Sequence[Exchange]) -> tuple[dict[int, Tokens], str]:
        """Return other tokens that give the row as well, by position, and why else the text is not known."""
        search, rows = searches[len(found) - 1], self._reader.rows([found])
        likely = search.likely([found], rows, RIVALS)[0].tolist()
        others: dict[int, Tokens] = {}
        for place, token in enumerate(found):
            near = [*self._model.near(token), *likely[place]]
            rivals = [other for other in dict.fromkeys(near) if other != token]
            fits = self._agree([exchanged(found, place, other) for other in rivals])
            same = [other for other, one in zip(rivals, fits, strict=True) if one]
            if not set(same) <= set(self._model.near(token)):
                return {}, "a text with another token gives the row too"
            others |= {place + self._around[0]: same} if same else {}
        pairs = [
            exchanged(exchanged(found, i, a), j, b)
            for i, j in combinations(range(len(found)), 2)
            for a in likely[i][: PAIRED + 1]
            for b in likely[j][: PAIRED + 1]
            if a != found[i] and b != found[j]
        ]
        generator = torch.Generator().manual_seed(0)
        drawn = torch.multinomial(self._prior.exp(), DRAWN, generator=generator).tolist()
        shorter = [found[:i] + found[i + 1 :] for i in range(len(found))] if len(found) > 1 else []
        added = dict.fromkeys([*drawn, *found] if search.response.length < self._roomiest else [])
        longer = [text for token in added for text in ((token, *found), (*found, token))]
        for told, texts in (
            ("the same tokens in another order give the row too", reordered(found)),
            ("a text with two other tokens gives the row too", pairs),
            ("a text of another length gives the row too", shorter),
            ("a text of another length gives the row too", longer),
            ("another text that was met on the way gives the row too", self._met(found, searches, others)),
        ):
            if any(self._agree(texts)):
                return others, told
        return others, ""

    def _met(self, found: Text, searches: Sequence[Exchange], others: dict[int, Tokens]) -> list[Text]:
        """Return the other texts met on the way that come near the row."""
        known = {
            exchanged(found, at - self._around[0], token) for at, some in others.items() for token in some
        }
        return [
            text
            for search in searches
            for text, missed in zip(
                search.rows,
                self._beyond(torch.stack(list(search.rows.values())), search.response.length),
                strict=True,
            )
            if missed <= APART * LOOSEST and text != found and text not in known
        ]

    def _gives_row(self, text: Text) -> bool:
        (missed,) = self._missed([text])
        return missed <= LOOSEST and missed <= self._limit(text)

    def _agree(self, texts: Sequence[Text]) -> list[bool]:
        """Return which texts cannot be told from the one that gives the row."""
        self._n_evaluated += len(texts)
        missed = self._missed(texts)
        return [
            miss <= APART * LOOSEST and miss <= APART * self._limit(text)
            for miss, text in zip(missed, texts, strict=True)
        ]

    def _missed(self, texts: Sequence[Text]) -> list[float]:
        """Return how far the rows of texts are beyond the errors of the one observed, relative to spread."""
        missed = [0.0] * len(texts)
        self._n_forwards += sum(len(text) + sum(self._around) for text in texts)
        for length in {len(text) for text in texts}:
            same = [place for place, text in enumerate(texts) if len(text) == length]
            far = self._beyond(self._reader.rows([texts[place] for place in same]), length)
            for place, one in zip(same, far, strict=True):
                missed[place] = one
        return missed

    def _beyond(self, rows: Any, length: int) -> list[float]:
        spread = response(self._reader, self._prior, min(length, self._longest)).spread
        beyond = ((rows - self._row).abs() - self._bound).clamp_min(0.0) / spread
        return list(beyond.square().mean(1).sqrt().tolist())

    def _limit(self, text: Text) -> float:
        """Return how far apart two runs of a text may be."""
        alone, twice = self._reader.rows([text])[0], self._reader.rows([text, text[::-1]])[0]
        spread = response(self._reader, self._prior, min(len(text), self._longest)).spread
        repeated = float(((alone - twice) / spread).square().mean().sqrt())
        if REPEATS * repeated > LOOSEST:
            raise Unsupported(f"{self._model.family}: the same text beside another differs by {repeated:.0e}")
        return max(AGREES, REPEATS * repeated)

    def _inner(self, tokens: Tokens) -> Text:
        """Return tokens without the special ones around a text; empty if they are not there."""
        before, after = self._around
        inner = tuple(tokens[before : len(tokens) - after])
        return inner if inner and self._reader.whole(inner) == list(tokens) else ()


def exchanged(text: Text, place: int, token: int) -> Text:
    """Return a text with another token at a place."""
    return (*text[:place], token, *text[place + 1 :])


def reordered(text: Text) -> list[Text]:
    """Return the texts with one token moved, or two exchanged."""
    n = len(text)
    moved = [
        (*rest[:to], text[at], *rest[to:])
        for at in range(n)
        for rest in [text[:at] + text[at + 1 :]]
        for to in range(n)
        if to != at
    ]
    swapped = [exchanged(exchanged(text, i, text[j]), j, text[i]) for i, j in combinations(range(n), 2)]
    return [other for other in dict.fromkeys(moved + swapped) if other != text]

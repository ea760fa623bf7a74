"""Counts over texts: what came back, how sure that is, and what it cost."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from attnfit.audit.breakpoints import HALF, Forecast
from attnfit.audit.cells import Cell
from attnfit.audit.forms import parse_access
from attnfit.audit.intervals import wilson

# The interval of a share of which nothing is known.
UNKNOWN = (0.0, 1.0)


@dataclass(frozen=True)
class Pair:
    """One form of access under one defence.

    Attributes
    ----------
    access, defence : str
    n_texts, n_cut, n_errors : int
        Inversions that ended, that time cut short, and that cannot be done. Only the first count below.
    n_unsupported, n_missing : int
        Those that the attack cannot be trusted with on this model, and those that were not run.
    tokens_right, tokens_ambiguous, tokens : int
        Of chats those of the contents. Ambiguous ones are wrong, but known up to tokens with all but the same
        embedding.
    all_right, all_tokens : int
        Those of chat templates included.
    n_open : int
        Those that ended without a token, of a form of access where that proves nothing (`Access.conclusive`).
    sentences_exact : int
    verified, false_claims : int
        Inversions that claim to be right, and those of them that are wrong.
    divergence, agreement : float or None
        Mean KL divergence of the next-token distributions in nats, and share of likeliest tokens kept.
    predicted : float or None
        Share of tokens expected from the distances between candidates.
    seconds : float
        Mean of an inversion.
    message : str
        Why something was not tested, if so.
    """

    access: str
    defence: str
    n_texts: int
    n_cut: int
    n_errors: int
    tokens_right: int
    tokens: int
    sentences_exact: int
    verified: int
    false_claims: int
    divergence: float | None
    agreement: float | None
    predicted: float | None
    seconds: float
    message: str
    n_unsupported: int = 0
    n_missing: int = 0
    tokens_ambiguous: int = 0
    all_right: int = 0
    all_tokens: int = 0
    n_open: int = 0

    @property
    def has_template(self) -> bool:
        """Whether some tokens are those of a chat template."""
        return self.all_tokens > self.tokens

    @property
    def all_share(self) -> float:
        """Share of tokens that are right, those of chat templates included."""
        return self.all_right / self.all_tokens if self.all_tokens else 0.0

    @property
    def tested(self) -> bool:
        """Whether any inversion that ran to its end says something, and all can be trusted."""
        return self.n_texts > self.n_open and not self.n_unsupported

    @property
    def complete(self) -> bool:
        """Whether every text was inverted to its end."""
        return not (self.n_cut or self.n_errors or self.n_unsupported or self.n_missing or self.n_open)

    @property
    def leak(self) -> float:
        """Share of tokens known to come back, ambiguous ones too; also where not everything was tested."""
        return (self.tokens_right + self.tokens_ambiguous) / self.tokens if self.tokens else 0.0

    @property
    def token_share(self) -> float:
        """Share of tokens that are right at their positions."""
        return self.tokens_right / self.tokens if self.tokens else 0.0

    @property
    def sentence_share(self) -> float:
        """Share of texts recovered to the last token."""
        return self.sentences_exact / self.n_texts if self.n_texts else 0.0

    @property
    def token_interval(self) -> tuple[float, float]:
        """Wilson interval of the share of tokens, as if they were independent."""
        return wilson(self.tokens_right, self.tokens)

    @property
    def sentence_interval(self) -> tuple[float, float]:
        """Wilson interval of the share of texts."""
        return wilson(self.sentences_exact, self.n_texts)

    def as_json(self) -> dict[str, Any]:
        """Return counts, shares and intervals as plain data; no shares where nothing was tested."""
        shares = {
            "tested": self.tested,
            "token_share": self.token_share if self.tested else None,
            "token_interval": list(self.token_interval if self.tested else UNKNOWN),
            "all_share": self.all_share if self.tested else None,
            "sentence_share": self.sentence_share if self.tested else None,
            "sentence_interval": list(self.sentence_interval if self.tested else UNKNOWN),
        }
        return vars(self) | shares


def summarise(
    access: str, defence: str, cells: Sequence[Cell], forecast: Forecast | None, n_asked: int | None = None
) -> Pair:
    """Return the outcome of one combination over all texts, of which so many were asked for."""
    mine = [c for c in cells if (c.key.access, c.key.defence, c.key.control) == (access, defence, "")]
    done = [cell for cell in mine if cell.status == "done"]
    failed = [cell for cell in mine if cell.status == "error"]
    unsupported = [cell for cell in mine if cell.status == "unsupported"]
    open_ = [] if parse_access(access).conclusive else [cell for cell in done if not cell.tokens]
    cut = len(mine) - len(done) - len(failed) - len(unsupported)
    message = ""
    if unsupported:
        message = unsupported[0].message
    elif failed:
        message = failed[0].message
    elif open_:
        message = open_[0].message
    elif not done:
        message = "no inversion ended within the budget"
        if cut:
            part = f"{sum(sum(cell.right) for cell in mine)} of {sum(cell.n_tokens for cell in mine)} tokens"
            message += f"; {part} came back until it was cut"
    return Pair(
        access=access,
        defence=defence,
        n_texts=len(done),
        n_cut=cut,
        n_errors=len(failed),
        tokens_right=sum(cell.content[0] for cell in done),
        tokens=sum(cell.content[1] for cell in done),
        all_right=sum(sum(cell.right) for cell in done),
        all_tokens=sum(cell.n_tokens for cell in done),
        sentences_exact=sum(cell.exact for cell in done),
        verified=sum(cell.verified for cell in done),
        false_claims=sum(cell.false_claim for cell in done),
        divergence=_mean([cell.divergence for cell in done]),
        agreement=_mean([cell.agreement for cell in done]),
        predicted=None if forecast is None else forecast.shares.get(defence),
        seconds=_mean([cell.seconds for cell in done]) or 0.0,
        message=message,
        n_unsupported=len(unsupported),
        tokens_ambiguous=sum(cell.n_ambiguous for cell in done),
        n_open=len(open_),
        n_missing=0 if n_asked is None else n_asked - len(mine),
    )


@dataclass(frozen=True)
class Control:
    """Inversions of one form of access that have nothing to find.

    Attributes
    ----------
    access : str
    other_texts, noise : int
        Runs on random texts, and on noise.
    other_texts_exact : int
        Random texts recovered: the attack does not depend on what the text is about.
    claims, false_claims : int
        Claims to be right, and wrong ones among them.
    """

    access: str
    other_texts: int
    other_texts_exact: int
    noise: int
    claims: int
    false_claims: int

    @classmethod
    def of(cls, access: str, cells: Sequence[Cell]) -> Control:
        """Count the controls of one form of access."""
        mine = [cell for cell in cells if cell.key.access == access and cell.key.control]
        texts = [cell for cell in mine if cell.key.control == "other text"]
        return cls(
            access,
            len(texts),
            sum(cell.exact for cell in texts),
            len(mine) - len(texts),
            sum(cell.verified for cell in mine),
            sum(cell.false_claim for cell in mine),
        )


@dataclass(frozen=True)
class BreakPoint:
    """Where half of the tokens are lost.

    Attributes
    ----------
    access, unit : str
    predicted : float or None
        From distances between candidates. None: no number of bits from 2 on is few enough.
    kept_at, lost_at : float or None
        The strongest member of the family at which half of the tokens still came back, and the weakest at
        which they did not.
    """

    access: str
    unit: str
    predicted: float | None
    kept_at: float | None
    lost_at: float | None


def measured_bracket(pairs: Sequence[Pair], name: str, falling: bool) -> tuple[float | None, float | None]:
    """Return the strongest member of a family that keeps half of the tokens, and the weakest that does not.

    Parameters
    ----------
    pairs : sequence of Pair
        Tested ones of one form of access.
    name : str
        How members are written, with ``{}`` for their size.
    falling : bool
        Whether smaller members are stronger.
    """
    pattern = re.compile(re.escape(name).replace(r"\{\}", "([0-9.e-]+)"))
    sizes = [(float(match[1]), pair) for pair in pairs if (match := pattern.fullmatch(pair.defence))]
    kept = [size for size, pair in sizes if pair.token_share >= HALF]
    lost = [size for size, pair in sizes if pair.token_share < HALF]
    strongest, weakest = (min, max) if falling else (max, min)
    return strongest(kept, default=None), weakest(lost, default=None)


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None

"""What an inversion hands back."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from attnfit.audit.models.model import Model, Tokens

# The chance of a wrong token that a verified text may have, were all tokens alike before the observation.
DOUBT = 0.01
# Ambiguous positions that a message names.
NAMED = 5


@dataclass(frozen=True)
class Position:
    """How one token was found.

    Attributes
    ----------
    token : int
    distance : float
        Root mean square, over channels in units of their standard deviation, between the observation and
        what this token gives.
    margin : float
        Distance of the nearest other candidate minus this one's; infinite where no other was tried. At least
        that for log-probabilities, which are compared exactly only where it decides.
    n_candidates : int
        Candidates evaluated for this position.
    method : {"known", "draft", "shortlist", "regression", "likely", "newton", "scan", "joint", "nearest"}
        The stage that found it; "joint" with all later positions, as its own was withheld; "nearest" is a
        best guess that the noise does not explain.
    log_odds : float
        Its log odds against all others that the errors could hide: by how many nats the observation prefers
        it to them together.
    """

    token: int
    distance: float
    margin: float
    n_candidates: int
    method: str
    log_odds: float = math.inf


@dataclass(frozen=True)
class Cost:
    """What an inversion took, as in InversionResult."""

    n_candidates: int
    n_forwards: int
    seconds: float


@dataclass(frozen=True)
class InversionResult:
    """The text behind an observation.

    Attributes
    ----------
    text : str
    tokens : list of int
        All, or those before the position at which the search failed.
    verified : bool
        Whether one forward pass of exactly these tokens reproduces the whole observation within its
        precision, and no other token tried at any position comes near it.
    positions : tuple of Position
        One for each token.
    failed_at : int or None
        The first position that was not solved.
    message : str
        The same as a sentence.
    n_candidates : int
        Candidates evaluated, those for a position that was not solved included.
    n_forwards : int
        Passes of single tokens to extend, verify and predict, beside the candidates.
    seconds : float
    alternatives : dict of int to list of int
        Positions at which other tokens, whose embeddings are equal or nearly so, explain the observation too.
    """

    text: str
    tokens: Tokens
    verified: bool
    positions: tuple[Position, ...] = field(repr=False)
    failed_at: int | None
    message: str
    n_candidates: int
    n_forwards: int
    seconds: float
    alternatives: dict[int, Tokens] = field(default_factory=dict)

    @property
    def distances(self) -> list[float]:
        """Distance of each token's state from the observation."""
        return [position.distance for position in self.positions]

    @property
    def margins(self) -> list[float]:
        """How much farther the nearest other candidate is, for each token."""
        return [position.margin for position in self.positions]

    @property
    def log_odds(self) -> list[float]:
        """By how many nats the observation prefers each token to all others together."""
        return [position.log_odds for position in self.positions]

    @property
    def methods(self) -> list[str]:
        """The stage that found each token."""
        return [position.method for position in self.positions]

    def __str__(self) -> str:
        return self.message


def certain_log_odds(length: int) -> float:
    """Return the log odds in nats at which no token of a text of some length is in doubt."""
    return math.log(max(1, length) / DOUBT)


def conclude(
    model: Model,
    positions: list[Position],
    expected: int,
    reason: str,
    consistent: bool,
    cost: Cost,
    alternatives: dict[int, Tokens] | None = None,
) -> InversionResult:
    """Put a result together.

    Parameters
    ----------
    model : Model
    positions : list of Position
        What was found before the search ended.
    expected : int
        Positions observed.
    reason : str
        Why it ended early; empty where it did not.
    consistent : bool
        Whether one forward pass of all tokens gives the observation.
    cost : Cost
    alternatives : dict of int to list of int, optional
        Other tokens that explain the observation at a position.
    """
    others = alternatives or {}
    tokens = [position.token for position in positions]
    guessed = [place for place, position in enumerate(positions) if position.method == "nearest"]
    doubtful = min(range(len(positions)), key=lambda place: positions[place].log_odds, default=0)
    sure = bool(positions) and positions[doubtful].log_odds >= certain_log_odds(expected)
    if reason:
        message = f"{len(tokens)} of {expected} tokens recovered: {reason}"
    elif not consistent:
        message = f"{expected} tokens guessed: one forward pass of the text does not give the observation"
        if guessed:
            message += f", from position {guessed[0]} on, where the nearest token does not explain it"
    elif others:
        told = [f"token {at} is {' or '.join(map(str, [tokens[at], *same]))}" for at, same in others.items()]
        more = f" and {len(told) - NAMED} more" if len(told) > NAMED else ""
        message = f"{expected} tokens found, ambiguous: {', '.join(told[:NAMED])}{more}"
    elif not sure:
        message = f"{expected} tokens guessed: they give the observation, but so would others"
        log_odds = positions[doubtful].log_odds
        message += f" (at position {doubtful} other tokens are " + (
            f"only {log_odds:.1f} nats less likely)" if log_odds > 0 else "no less likely)"
        )
    else:
        message = (
            f"{expected} of {expected} tokens recovered: one forward pass of the text gives the observation"
        )
    failed = len(tokens) if reason else None
    text = model.detokenise(tokens)
    verified = not reason and consistent and sure and not others
    return InversionResult(
        text, tokens, verified, tuple(positions), failed, message, **vars(cost), alternatives=others
    )

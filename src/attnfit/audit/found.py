"""What an inversion hands back."""

from __future__ import annotations

from dataclasses import dataclass, field

from attnfit.audit.models.model import Model, Tokens


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
        Distance of the nearest other candidate minus this one's; infinite where no other was tried.
    n_candidates : int
        Candidates evaluated for this position.
    method : {"known", "draft", "shortlist", "regression", "newton", "scan", "nearest"}
        The stage that found it; "nearest" is a best guess that the noise does not explain.
    """

    token: int
    distance: float
    margin: float
    n_candidates: int
    method: str


@dataclass(frozen=True)
class Cost:
    """What an inversion took, as in Found."""

    n_candidates: int
    n_forwards: int
    seconds: float


@dataclass(frozen=True)
class Found:
    """The text behind an observation.

    Attributes
    ----------
    text : str
    tokens : list of int
        All, or those before the position at which the search failed.
    verified : bool
        Whether one forward pass of exactly these tokens reproduces the whole observation within its
        precision.
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

    @property
    def distances(self) -> list[float]:
        """Distance of each token's state from the observation."""
        return [position.distance for position in self.positions]

    @property
    def margins(self) -> list[float]:
        """How much farther the nearest other candidate is, for each token."""
        return [position.margin for position in self.positions]

    @property
    def methods(self) -> list[str]:
        """The stage that found each token."""
        return [position.method for position in self.positions]

    def __str__(self) -> str:
        return self.message


def conclude(
    model: Model, positions: list[Position], expected: int, reason: str, verified: bool, cost: Cost
) -> Found:
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
    verified : bool
    cost : Cost
    """
    tokens = [position.token for position in positions]
    guessed = [place for place, position in enumerate(positions) if position.method == "nearest"]
    if reason:
        message = f"{len(tokens)} of {expected} tokens recovered: {reason}"
    elif verified:
        message = (
            f"{expected} of {expected} tokens recovered: one forward pass of the text gives the observation"
        )
    else:
        message = f"{expected} tokens guessed: one forward pass of the text does not give the observation"
        if guessed:
            message += f", from position {guessed[0]} on, where the nearest token does not explain it"
    failed = len(tokens) if reason else None
    text = model.detokenise(tokens)
    return Found(text, tokens, verified, tuple(positions), failed, message, **vars(cost))

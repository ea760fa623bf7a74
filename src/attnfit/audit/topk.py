"""From the few largest log-probabilities at every position to the text."""

from __future__ import annotations

from collections.abc import Sequence
from time import perf_counter
from typing import Any

import numpy as np
import torch

from attnfit.audit.checks import check_budget, check_prefix
from attnfit.audit.engine.prefix import Prefix
from attnfit.audit.engine.prior import Prior
from attnfit.audit.errors import ObservationMismatch
from attnfit.audit.found import Cost, Found, Position, conclude
from attnfit.audit.models.model import Model

# Log-probabilities agree up to this beyond the stated error: rounding of the forward passes.
ROUNDING = 2e-3
# A uniform error never exceeds this many of its standard deviations; a few more for Gaussian ones.
WIDTHS = 4.0
FIRST_BATCH, GROWTH, LARGEST_BATCH = 32, 4, 1024


def invert_topk(
    model: Model,
    shown: Any,
    values: Any,
    *,
    error: Any = 0.0,
    known_prefix: Sequence[int] = (),
    budget: int | None = None,
) -> Found:
    """Recover the tokens from the largest log-probabilities at every position.

    Candidates are tried in the order of the model's own next-token distribution, and compared by the numbers
    shown: even one with two decimals tells the true token from most others.

    Parameters
    ----------
    model : Model
    shown : array_like of int, shape (n, k)
        Tokens whose log-probabilities are known.
    values : array_like, shape (n, k)
        These log-probabilities.
    error : array_like, broadcastable to values
        Standard deviation of their errors.
    known_prefix : sequence of int
        Tokens known to come first. Without any, all tokens are equally likely at position 0.
    budget : int, optional
        Largest number of candidates at a position.

    Returns
    -------
    Found
    """
    search = _TopkSearch(model, *_checked(model, shown, values, error), check_budget(budget, model))
    return search.run(list(known_prefix))


class _TopkSearch:
    """The inversion of one observation."""

    def __init__(self, model: Model, shown: Any, values: Any, error: Any, budget: int) -> None:
        self._began = perf_counter()
        self._model, self._budget = model, budget
        self._shown, self._values, self._error = shown, values, error
        self._prefix, self._prior = Prefix(model, model.n_layers + 1), Prior(model)
        self._positions: list[Position] = []

    def run(self, known: list[int]) -> Found:
        """Return everything that could be recovered."""
        reason = ""
        if known:
            check_prefix(known, len(self._shown), self._model)
            for at, state in enumerate(self._prefix.extend(known)):
                gap = float(self._gaps(at, state[None]))
                if not gap <= 1.0:
                    raise ObservationMismatch(
                        f"known_prefix[{at}] is {known[at]}, which the observation contradicts"
                    )
                self._positions.append(Position(known[at], gap, float("inf"), 0, "known"))
        while not reason and len(self._positions) < len(self._shown):
            try:
                reason = self._search(len(self._positions))
            except KeyboardInterrupt:
                reason = "interrupted"
        return self._found(reason)

    def _search(self, at: int) -> str:
        """Find one token; return why not, if not."""
        order = self._prior.after(self._prefix.tokens).argsort(descending=True, stable=True)
        order = order[: self._budget]
        before, start, size = float("inf"), 0, FIRST_BATCH
        while start < len(order):
            batch = order[start : start + size]
            gaps = self._gaps(at, self._prefix.candidates(batch))
            best = int(gaps.argmin())
            start, size = start + len(batch), min(GROWTH * size, LARGEST_BATCH)
            others = torch.cat([gaps[:best], gaps[best + 1 :], torch.tensor([before])])
            if float(gaps[best]) <= 1.0:
                margin = float(others.min() - gaps[best])
                token = int(batch[best])
                self._positions.append(Position(token, float(gaps[best]), margin, start, "shortlist"))
                self._prefix.extend([token])
                return ""
            before = min(before, float(gaps.min()))
        return (
            f"no token explains position {at} after {len(order)} candidates; the nearest misses the "
            "numbers shown by "
            f"{before:.2g} times their error"
        )

    def _gaps(self, at: int, states: Any) -> Any:
        """Return the largest difference from the numbers shown, in units of what may be: above 1 is wrong."""
        allowed = WIDTHS * self._error[at] + ROUNDING
        logits = self._model.unembed(states)
        chances = logits[:, self._shown[at]] - logits.logsumexp(-1, keepdim=True)
        return ((chances - self._values[at]).abs() / allowed).amax(-1)

    def _found(self, reason: str) -> Found:
        tokens = [position.token for position in self._positions]
        verified = False
        if not reason:
            states = torch.from_numpy(self._model.states(tokens, self._model.n_layers + 1))
            verified = all(float(self._gaps(at, state[None])) <= 1.0 for at, state in enumerate(states))
        n_forwards = self._prefix.n_forwards + self._prior.n_forwards + len(tokens) * (not reason)
        cost = Cost(self._prefix.n_candidates, n_forwards, perf_counter() - self._began)
        return conclude(self._model, self._positions, len(self._shown), reason, verified, cost)


def _checked(model: Model, shown: Any, values: Any, error: Any) -> tuple[Any, Any, Any]:
    """Return tokens, log-probabilities and errors as tensors of one shape."""
    tokens, chances = np.asarray(shown), np.asarray(values, dtype=np.float32)
    if tokens.ndim != 2 or tokens.shape != chances.shape or not tokens.size:
        raise ObservationMismatch(
            f"shown and values must have one shape (n, k), not {tokens.shape} and {chances.shape}"
        )
    outside = (tokens < 0) | (tokens >= model.n_vocabulary)
    if outside.any():
        at = tuple(int(place) for place in np.argwhere(outside)[0])
        raise ObservationMismatch(
            f"shown[{at[0]}, {at[1]}] is {tokens[at]}, not a token of {model.name!r}, which has "
            f"{model.n_vocabulary}"
        )
    if not np.isfinite(chances).all():
        row, place = np.argwhere(~np.isfinite(chances))[0]
        raise ObservationMismatch(
            f"values[{row}, {place}] is {chances[row, place]}: observations must be finite"
        )
    likely = np.broadcast_to(np.asarray(error, dtype=np.float32), chances.shape)
    return (
        torch.from_numpy(tokens.astype(np.int64)),
        torch.from_numpy(chances),
        torch.from_numpy(likely.copy()),
    )

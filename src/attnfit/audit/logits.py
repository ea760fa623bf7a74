"""From logits to the normed last states they were computed from, and from there to the text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from attnfit.audit.access import Leak
from attnfit.audit.checks import check_budget
from attnfit.audit.errors import ObservationMismatch
from attnfit.audit.hidden import HiddenSearch
from attnfit.audit.logit_target import LogitUncertainty
from attnfit.audit.models.model import Layer, Model, Tokens
from attnfit.audit.result import InversionResult
from attnfit.audit.states import StatesAccess
from attnfit.audit.target import SLACK
from attnfit.audit.uncertainty import Uncertainty

if TYPE_CHECKING:
    from attnfit.audit.observation import Observation

# Share of the logits, beyond their error, that no state may explain: above it, another model wrote them.
MAX_UNEXPLAINED = 0.3
# Directions of the head smaller than this, relative to the largest, do not show.
RANK = 1e-12
# Shares of a cap on logits beyond this tell no more.
SATURATED = 0.9999


class Logits(StatesAccess):
    """The scores of all next tokens at every position."""

    kind = "logits"

    @property
    def description(self) -> str:
        """What leaves, in words."""
        return "all next-token scores (logits)"

    def layer(self, model: Model) -> Layer:
        """Return the last states, after the final norm."""
        return model.n_layers + 1

    def leak(self, model: Model, tokens: Tokens) -> Leak:
        """Return the logits."""
        return Leak(model.logits(tokens))

    def states(self, model: Model, observation: Observation) -> tuple[Any, Uncertainty]:
        """Return the normed last states behind them."""
        return logit_states(model, observation.array, observation.error, observation.error_bound)

    def metric(self, model: Model) -> NDArray[np.float64]:
        """Return L with |centred logits of y| = |y L|."""
        values, vectors = model.head_directions
        return np.asarray((vectors * values.clamp_min(0).sqrt()).numpy())

    def continued(self, model: Model, tokens: Tokens, observation: Observation) -> Any:
        """Return them: nothing comes after."""
        return torch.from_numpy(np.asarray(observation.array, dtype=np.float32))


def invert_logits(
    model: Model,
    logits: Any,
    *,
    error: Any = 0.0,
    error_bound: Any = None,
    known_prefix: Sequence[int] = (),
    budget: int | None = None,
) -> InversionResult:
    """Recover the tokens from the next-token logits, or log-probabilities, at every position.

    Logits are linear in the normed last state: ``logits - mean = (U - mean(U)) y``, whatever constant was
    added to them. The least-squares solution is a state to invert.

    Parameters
    ----------
    model : Model
        The one that produced the logits.
    logits : array_like, shape (n, n_vocabulary)
    error : array_like, broadcastable to logits
        Standard deviation of the error of each number.
    error_bound : array_like, broadcastable to logits, optional
        The largest error of each number, as half a step where they were rounded.
    known_prefix : sequence of int
        Tokens known to come first.
    budget : int, optional
        Largest number of candidates at a position.

    Returns
    -------
    InversionResult

    Raises
    ------
    ObservationMismatch
        If the logits have another width, are not finite, or no states of this model explain them.
    """
    states, uncertainty = logit_states(model, logits, error, error_bound)
    search = HiddenSearch(model, model.n_layers + 1, states, uncertainty, check_budget(budget, model))
    return search.run(list(known_prefix))


def logit_states(model: Model, logits: Any, error: Any, error_bound: Any) -> tuple[Any, Uncertainty]:
    """Return the normed last states behind some logits, to be compared by logits where these were rounded."""
    states, uncertainty = last_states(model, logits, error)
    if error_bound is not None:
        uncertainty = LogitUncertainty(
            uncertainty.error,
            uncertainty.basis,
            model=model,
            logits=torch.from_numpy(np.array(logits, dtype=np.float32)),
            widths=torch.from_numpy(np.broadcast_to(error_bound, np.shape(logits)).astype(np.float32)),
        )
    return states, uncertainty


def last_states(model: Model, logits: Any, error: Any = 0.0) -> tuple[Any, Uncertainty]:
    """Return the normed last states behind some logits, and what is known about their errors.

    Weighted least squares: many more logits than channels, so that their errors average out, along each
    principal direction of the head as its size allows.

    Parameters
    ----------
    model : Model
    logits : array_like, shape (n, n_vocabulary)
    error : array_like, broadcastable to logits

    Returns
    -------
    states : Tensor, shape (n, width)
    uncertainty : Uncertainty
    """
    U = model.head_weight
    observed = _checked(model, logits)
    likely = torch.from_numpy(np.broadcast_to(error, observed.shape).astype(np.float64))
    if model.softcap is not None:
        observed, likely = _uncapped(observed, likely, model.softcap)
    weights = _weights(likely)
    if model.head.bias is not None:
        observed = observed - model.head.bias * model.head_scale
    # Weighted means are the constants that the logits were shifted by.
    observed = (observed - (observed @ weights)[:, None] / weights.sum()) * weights.sqrt()
    U = (U - weights @ U / weights.sum()) * weights.sqrt()[:, None]
    alike = bool((weights == 1.0).all())
    values, vectors = model.head_directions if alike else torch.linalg.eigh(U.T @ U)
    kept = values > RANK * values[-1]
    values, basis = values[kept], vectors[:, kept]
    states = ((observed @ U) @ basis / values) @ basis.T
    missed = (observed - states @ U.T).square().mean(1).sqrt()
    noise = (likely.square() @ weights / len(weights)).sqrt()
    _check_explained(model, missed, noise, observed.square().mean(1).sqrt())
    along = torch.maximum(noise, missed)[:, None] / values.sqrt()
    return states.float(), Uncertainty(along.float(), basis.float())


def _checked(model: Model, logits: Any) -> Any:
    given, expected = np.asarray(logits), model.n_vocabulary
    if given.ndim != 2 or given.shape[1] != expected or not len(given):
        raise ObservationMismatch(
            f"logits must have shape (n, {expected}) for {model.name!r}, not {given.shape}"
        )
    if not np.isfinite(given).all():
        row, token = np.argwhere(~np.isfinite(given))[0]
        raise ObservationMismatch(
            f"logits[{row}, {token}] is {given[row, token]}: observations must be finite"
        )
    return torch.from_numpy(given.astype(np.float64))


def _uncapped(observed: Any, likely: Any, cap: float) -> tuple[Any, Any]:
    """Return what a tanh was applied to, and the errors of that; beyond the cap there is only its sign."""
    shares = (observed / cap).clamp(-SATURATED, SATURATED)
    return cap * torch.atanh(shares), likely / (1.0 - shares.square())


def _weights(likely: Any) -> Any:
    """Return the weight of each column, one on average: the inverse of its mean squared error."""
    squares = likely.square().mean(0)
    if squares.max() == squares.min():
        return torch.ones_like(squares)
    weights = 1.0 / squares.clamp_min(1e-6 * float(squares.mean()))
    return weights / weights.mean()


def _check_explained(model: Model, missed: Any, noise: Any, size: Any) -> None:
    """Raise ObservationMismatch if more of the logits lies outside the head's range than their error."""
    beyond = (missed.square() - (SLACK * noise).square()).clamp_min(0.0).sqrt()
    share = float((beyond / size.clamp_min(torch.finfo(size.dtype).tiny)).median())
    if share > MAX_UNEXPLAINED:
        raise ObservationMismatch(
            f"no states of {model.name!r} explain the logits: a share {share:.2f} of them lies outside what "
            "its head produces, beyond the error that was stated"
        )

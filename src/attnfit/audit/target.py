"""One observed state and the distance of others from it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

# Distances up to this are rounding: true tokens come within 1e-5, wrong ones mostly stay beyond 1e-2.
TOLERANCE = 1e-3
# The same for what exceeds a known bound of the error, within which everything agrees.
BEYOND = 1e-4
# Errors from which on several tokens may explain a state, relative to its spread.
NOISY = 1e-3
# Standard deviations of a mean square of channels, and what is left for errors that are not quite as
# estimated.
CONFIDENCE = 4.0
SLACK = 1.2


def reach(n_numbers: int, squares: float) -> float:
    """Return how far from a candidate the true state can be at most, in squared errors, where the candidate
    misses the observation by so many: beyond, four standard deviations of a noncentral chi-squared
    distribution separate them.
    """
    most = 2.0 * n_numbers + 4.0 * max(squares - n_numbers, 0.0)
    root = 2.0 * CONFIDENCE + math.sqrt(4.0 * CONFIDENCE**2 + most)
    return 0.25 * (root**2 - 2.0 * n_numbers)


@dataclass(frozen=True, eq=False)
class Target:
    """An observed state, its likely error and the scale of each channel.

    Attributes
    ----------
    state : Tensor, shape (width,)
    error : Tensor, shape (k,)
        Standard deviation of the error along each column of the basis; zero where the observation is exact.
    scale : Tensor, shape (width,)
        Standard deviation of each channel over text in general.
    basis : Tensor, shape (width, k), optional
        Directions in which errors are independent; the channels unless given.
    error_bound : Tensor, shape (width,), optional
        The largest error that each channel can have.
    most : float, optional
        The misfit of the true state at most, where it was measured; errors are correlated then, and count
        accordingly less.
    """

    state: Any
    error: Any
    scale: Any
    basis: Any = None
    error_bound: Any = None
    most: float | None = None

    def distances(self, states: Any) -> Any:
        """Return the root mean square of the differences in units of the scale."""
        return (self._along(states - self.state) / self._spread).square().mean(-1).sqrt()

    def misfits(self, states: Any) -> Any:
        """Return the root mean square of the differences in units of their likely size.

        Where rounding bounds the error, only what exceeds the bound counts: the defence of the true state
        gives the observation itself.
        """
        if self.bounded:
            beyond = ((states - self.state).abs() - self.error_bound).clamp_min(0.0)
            return (beyond / (BEYOND * self.scale)).square().mean(-1).sqrt()
        return (self._squares(states, self.state) / len(self.error)).sqrt()

    def separations(self, states: Any, state: Any) -> Any:
        """Return how far states are from another one: the sum of squares in units of the error."""
        return self.in_errors(self._squares(states, state))

    def in_errors(self, squares: Any) -> Any:
        """Return sums of squares in units of `likely` as `separations` count them."""
        return squares / self._unit

    def reach(self, misfit: float) -> float:
        """Return how far from a candidate of some misfit the true state can be, as `separations` are."""
        if self.bounded:
            return 0.0
        return reach(self.n_numbers, self.n_numbers * misfit**2 / self._unit)

    def likelihoods(self, states: Any) -> Any:
        """Return the log-likelihood of each state up to a constant, in nats."""
        return -0.5 * self.n_numbers / self._unit * self.misfits(states).double().square()

    @property
    def _unit(self) -> float:
        """The variance that stands for one where errors were measured together."""
        return 1.0 if self.most is None else max(1.0, self.most) ** 2

    def _squares(self, states: Any, state: Any) -> Any:
        return (self._along(states - state) / self.likely).square().sum(-1)

    @cached_property
    def likely(self) -> Any:
        """Standard deviation of what error and rounding make of a state, along each column of the basis."""
        return (self.error.square() + (TOLERANCE * self._spread).square()).sqrt()

    @cached_property
    def noisy(self) -> bool:
        """Whether the error exceeds what the tolerance allows for."""
        return bool((self.error / self._spread).square().mean().sqrt() > NOISY)

    @cached_property
    def bounded(self) -> bool:
        """Whether the error matters and cannot exceed a known size."""
        return self.noisy and self.error_bound is not None and bool(self.error_bound.isfinite().all())

    @property
    def bound(self) -> float:
        """The misfit up to which a candidate explains the observation."""
        return SLACK * self.limit if self.noisy and not self.bounded else 1.0

    @property
    def limit(self) -> float:
        """The misfit that the true state never exceeds, if its errors are as large as was stated."""
        if self.bounded or not self.noisy:
            return 1.0
        return max(1.0 + CONFIDENCE / math.sqrt(2.0 * len(self.error)), self.most or 0.0)

    @property
    def n_numbers(self) -> int:
        """How many numbers a misfit is the mean of."""
        return len(self.error)

    def _along(self, differences: Any) -> Any:
        return differences if self.basis is None else differences @ self.basis

    @cached_property
    def _spread(self) -> Any:
        """Standard deviation along each column of the basis over text in general."""
        if self.basis is None:
            return self.scale
        return (self.basis.square() * self.scale.square()[:, None]).sum(0).sqrt()

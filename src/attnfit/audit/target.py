"""One observed state and the distance of others from it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

# Distances up to this are rounding: true tokens come within 1e-5, wrong ones stay beyond 1e-2.
TOLERANCE = 1e-2
# Standard deviations of a mean square of channels, and what is left for errors that are not quite as
# estimated.
CONFIDENCE = 4.0
SLACK = 1.2


@dataclass(frozen=True, eq=False)
class Target:
    """An observed state, its likely error and the scale of each channel, all of shape (width,).

    Attributes
    ----------
    state : Tensor
    error : Tensor
        Standard deviation of the error of each channel; zero where the observation is exact.
    scale : Tensor
        Standard deviation of each channel over text in general.
    """

    state: Any
    error: Any
    scale: Any

    def distances(self, states: Any) -> Any:
        """Return the root mean square of the differences in units of the scale."""
        return ((states - self.state) / self.scale).square().mean(-1).sqrt()

    def misfits(self, states: Any) -> Any:
        """Return the root mean square of the differences in units of their likely size."""
        likely = (self.error.square() + (TOLERANCE * self.scale).square()).sqrt()
        return ((states - self.state) / likely).square().mean(-1).sqrt()

    @property
    def noisy(self) -> bool:
        """Whether the error exceeds what the tolerance allows for."""
        return bool((self.error / self.scale).square().mean().sqrt() > 0.1 * TOLERANCE)

    @property
    def bound(self) -> float:
        """The misfit up to which a candidate explains the observation."""
        if not self.noisy:
            return 1.0
        return SLACK * (1.0 + CONFIDENCE / math.sqrt(2.0 * len(self.state)))

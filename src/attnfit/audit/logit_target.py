"""A state seen through logits that were rounded: a candidate's own logits must round to the same."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from attnfit.audit.models.model import Model
from attnfit.audit.target import BEYOND, Target
from attnfit.audit.uncertainty import Uncertainty

# Logits of candidates held at once.
ENTRIES = 1 << 24


@dataclass(frozen=True, eq=False, kw_only=True)
class LogitTarget(Target):
    """A state whose rounded logits were observed.

    Coarse rounding errs in ways that depend on the logits, so that least squares is a start and no more.

    Attributes
    ----------
    model : Model
    logits : Tensor, shape (n_vocabulary,)
        As observed.
    widths : Tensor, shape (n_vocabulary,)
        The largest error of each.
    """

    model: Model
    logits: Any
    widths: Any

    def misfits(self, states: Any) -> Any:
        """Return the root mean square of what exceeds the bounds, relative to the spread of the logits."""
        if not self.bounded:
            return super().misfits(states)
        rows = states.reshape(-1, states.shape[-1])
        parts = rows.split(max(1, ENTRIES // len(self.logits)))
        return torch.cat([self._beyond(self.model.unembed(part)) for part in parts]).reshape(
            states.shape[:-1]
        )

    @property
    def bounded(self) -> bool:
        """Whether the error matters and cannot exceed a known size."""
        return self.noisy and bool(self.widths.isfinite().all())

    @property
    def n_numbers(self) -> int:
        """How many numbers a misfit is the mean of."""
        return len(self.logits) if self.bounded else len(self.error)

    def _beyond(self, given: Any) -> Any:
        difference = given - self.logits
        # Logits are known up to a constant: the one in the middle of those that the bounds allow.
        least, most = (difference - self.widths).amax(-1), (difference + self.widths).amin(-1)
        beyond = (difference - 0.5 * (least + most)[:, None]).abs() - self.widths
        return beyond.clamp_min(0.0).square().mean(-1).sqrt() / (BEYOND * self.logits.std())


@dataclass(frozen=True, eq=False, kw_only=True)
class LogitUncertainty(Uncertainty):
    """What is known about states behind rounded logits.

    Attributes
    ----------
    model : Model
    logits, widths : Tensor, shape (n, n_vocabulary)
    """

    model: Model
    logits: Any
    widths: Any

    def target(self, place: int, state: Any, scale: Any) -> Target:
        """Return what is to be explained at a position."""
        return LogitTarget(
            state,
            self.error[place],
            scale,
            self.basis,
            model=self.model,
            logits=self.logits[place],
            widths=self.widths[place],
        )

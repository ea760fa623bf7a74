"""What is known about the errors of observed states."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch

from attnfit.audit.target import Target


@dataclass(frozen=True, eq=False)
class Uncertainty:
    """Errors of states of shape (n, width).

    Attributes
    ----------
    error : Tensor, shape (n, k)
        Standard deviations along the columns of the basis.
    basis : Tensor, shape (width, k), optional
        Directions in which errors are independent, the channels unless given. What lies across all of them
        was not observed.
    reach : Tensor, shape (n, width), optional
        The largest error that each channel can have; infinite where unknown.
    """

    error: Any
    basis: Any = None
    reach: Any = None

    def target(self, place: int, state: Any, scale: Any) -> Target:
        """Return what is to be explained at a position."""
        reach = None if self.reach is None else self.reach[place]
        return Target(state, self.error[place], scale, self.basis, reach)

    def preceded(self) -> Uncertainty:
        """Return the same with a row before the first that has no error."""
        rows = {
            field.name: torch.cat([torch.zeros_like(value[:1]), value])
            for field in fields(self)
            if field.name not in ("basis", "model") and (value := getattr(self, field.name)) is not None
        }
        return replace(self, **rows)

    def typical(self, rows: slice) -> Any:
        """Return a factor F of the mean covariance ``F F^T`` of some rows, shape (width, k)."""
        size = self.error[rows].square().mean(0).sqrt()
        return torch.diag(size) if self.basis is None else self.basis * size

"""What is known about the errors of observed states."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import torch

from attnfit.audit.target import Target

if TYPE_CHECKING:
    from attnfit.audit.lower_precision import RunError

# What is the same for all positions.
SHARED = ("basis", "model", "run")


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
    error_bound : Tensor, shape (n, width), optional
        The largest error that each channel can have; infinite where unknown.
    run : RunError, optional
        The run in fewer digits that the errors are, in part at least, those of.
    """

    error: Any
    basis: Any = None
    error_bound: Any = None
    run: RunError | None = None

    def target(self, place: int, state: Any, scale: Any) -> Target:
        """Return what is to be explained at a position."""
        error_bound = None if self.error_bound is None else self.error_bound[place]
        most = None if self.run is None else self.run.limit
        return Target(state, self.error[place], scale, self.basis, error_bound, most)

    def preceded(self) -> Uncertainty:
        """Return the same with a row before the first that has no error."""
        rows = {
            field.name: torch.cat([torch.zeros_like(value[:1]), value])
            for field in fields(self)
            if field.name not in ("basis", "model", "run")
            and (value := getattr(self, field.name)) is not None
        }
        return replace(self, **rows)

    def typical(self, rows: slice) -> Any:
        """Return a factor F of the mean covariance ``F F^T`` of some rows, shape (width, k)."""
        size = self.error[rows].square().mean(0).sqrt()
        return torch.diag(size) if self.basis is None else self.basis * size

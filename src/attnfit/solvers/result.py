"""What a fit returns: the answer and the report on how it was found."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from attnfit.certificates import Certificate

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Record:
    """One evaluation of the objective.

    Attributes
    ----------
    phase : str
        "convex neighbour", "scout: ..." and "sample: ..." on sampled rows, "fit: ..." on all the data, each
        with the name of the start; "least norm" where directions are left open.
    iteration : int
    value : float
    gradient_norm : float
        Of the scaled gradient, relative to the one at zero.
    step_norm, radius : float
        In scaled variables.
    accepted : bool
    n_passes : float
        Reads of the data so far.
    seconds_model, seconds_step, seconds_evaluate : float
        Time to build the curvature model, to solve the trust-region problem and to read the data.
    """

    phase: str
    iteration: int
    value: float
    gradient_norm: float
    step_norm: float
    radius: float
    accepted: bool
    n_passes: float
    seconds_model: float
    seconds_step: float
    seconds_evaluate: float


class History(Sequence[Record]):
    """The records of a fit; prints as a table, `columns` gives it as arrays (for a data frame)."""

    def __init__(self, records: Sequence[Record] = ()) -> None:
        self._records = list(records)

    def append(self, record: Record) -> None:
        """Add a record."""
        self._records.append(record)

    def __getitem__(self, index: Any) -> Any:
        return self._records[index]

    def __len__(self) -> int:
        return len(self._records)

    def columns(self) -> dict[str, list[Any]]:
        """Return one list a field: ``pandas.DataFrame(history.columns())`` is a table."""
        names = Record.__dataclass_fields__
        return {name: [getattr(r, name) for r in self._records] for name in names}

    def __repr__(self) -> str:
        head = f"{'phase':<28}{'it':>4}{'value':>18}{'rel.grad':>11}{'step':>11}{'reads':>8}{'seconds':>9}"
        lines = [head]
        for r in self._records:
            seconds = r.seconds_model + r.seconds_step + r.seconds_evaluate
            lines.append(
                f"{r.phase[:27]:<28}{r.iteration:>4}{r.value:>18.10g}{r.gradient_norm:>11.2e}{r.step_norm:>11.2e}"
                f"{r.n_passes:>8.2f}{seconds:>9.3f}{'' if r.accepted else '  rejected'}"
            )
        return "\n".join(lines)


@dataclass(frozen=True)
class Result:
    """The outcome of `attnfit.minimize`.

    Attributes
    ----------
    x : ndarray
        The best point found, in the problem's natural shape.
    value : float
    gradient : ndarray
        Gradient at x.
    gradient_norm : float
        Norm of the scaled gradient relative to the one at zero (to the largest seen where zero is
        stationary): what ``tol`` bounds.
    converged : bool
    status : {"converged", "max_iter", "precision", "separable", "false_optimum", "interrupted", "overflow"}
    message : str
        The status in a sentence, with the remedy where there is one; where the fit was resumed, from which
        checkpoint and after how many reads.
    n_iter : int
        Steps taken on the full data.
    n_passes : float
        Reads of the data, sampled rows as fractions; those before a fit was resumed are included, as in
        ``seconds``.
    history : History
    seconds : float
    local_values : dict of str to float
        Value of every local minimum found, by the name of its start.
    unidentified : ndarray, shape (n_unknowns, k)
        Orthonormal directions, in the user's units, along which the data leave x open; x has the smallest
        norm in scaled units. None where the solver keeps no matrix from which to tell.
    column_status : ndarray of str, shape (k,)
        Status of each right-hand side where a solver takes them one by one; None elsewhere.
    """

    x: Array
    value: float
    gradient: Array
    gradient_norm: float
    converged: bool
    status: str
    message: str
    n_iter: int
    n_passes: float
    history: History
    seconds: float
    solver: str
    problem: Any = field(repr=False)
    local_values: dict[str, float] = field(default_factory=dict)
    unidentified: Array | None = None
    column_status: NDArray[np.str_] | None = None

    def certificate(self, rigorous: bool = False) -> Certificate:
        """Return the Newton-Kantorovich certificate at x: a radius within which the exact stationary point
        lies.

        Parameters
        ----------
        rigorous : bool
            Bound rounding without assumptions; by default to first order, with a probabilistic constant. See
            `attnfit.certificates.certify`.
        """
        from attnfit.certificates import certify

        return certify(self.problem, self.x, rigorous)

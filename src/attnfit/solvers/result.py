"""What a fit returns: the answer, the report on how it was found, and what is said of its end."""

from __future__ import annotations

import html
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from attnfit.solvers.verdicts import Status, Verdict

if TYPE_CHECKING:
    from attnfit.certificates import Certificate
    from attnfit.effects import Effects
    from attnfit.solvers.published import Sampling
    from attnfit.solvers.separation import Separation

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Record:
    """One evaluation of the objective.

    Attributes
    ----------
    phase : str
        "convex surrogate", "pilot: ..." and "sample: ..." on sampled rows, "fit: ..." on all the data, each
        with the name of the start; "least norm" from where directions are left open.
    iteration : int
    value : float
    gradient_norm : float
        Of the gradient scaled by the curvature, relative to the one at zero.
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
        self._points: dict[int, Array] = {}

    def append(self, record: Record, point: Array | None = None) -> None:
        """Add a record, and the point that was evaluated if points are kept."""
        if point is not None:
            self._points[len(self._records)] = point
        self._records.append(record)

    def points_to(self, x: Array) -> list[Array]:
        """Return the points kept of the descent that ended at x, first to last, without those that were
        rejected; a start that was followed twice is one descent.
        """
        numbers = [k for k, point in self._points.items() if self._records[k].accepted]
        last = next((k for k in reversed(numbers) if np.array_equal(self._points[k], x)), None)
        if last is None:
            return []
        found = [self._points[last]]
        for k in reversed(numbers[: numbers.index(last)]):
            later, record = self._records[last], self._records[k]
            begins, same = later.iteration == 0, np.array_equal(self._points[k], found[-1])
            if record.phase != later.phase or (begins and not same):
                break
            last = k
            if not same:
                found.append(self._points[k])
        return found[::-1]

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
        Norm of the gradient, scaled by the curvature, relative to the one at zero (to the first where zero is
        stationary). For information only.
    converged : bool
        Whether status is "converged".
    status : Status
        A string: "converged"; "separable" and "no_minimum" (see ``separation``); "flat" (directions without
        curvature in float64 although the data see them), "saddle", "precision", "max_iter", "overflow",
        "interrupted", "false_optimum", "indefinite" (`Newton.as_published` takes no other step then).
    message : str
        The status in a sentence, with the remedy where there is one; where the fit was resumed, from which
        checkpoint and after how many reads.
    n_iter : int
        Steps on the full data of the descent that led to x.
    n_passes : float
        Reads of the data, sampled rows as fractions; those before a fit was resumed are included, as in
        ``seconds``.
    history : History
    seconds : float
    local_values : dict of str to float
        Value of every distinct local minimum found, by the name of the start that led there; ends that are
        not finished are not listed.
    unidentified : ndarray, shape (n_unknowns, k)
        Orthonormal directions, in the user's units, along which the data leave x open; x has the smallest
        norm in scaled units. None where the solver keeps no matrix from which to tell.
    column_status : ndarray of str, shape (k,)
        Status of each right-hand side where a solver takes them one by one; None elsewhere.
    move : float
        The largest change of a fitted logit that the next Newton step would make, what ``tol`` bounds: of
        ``exp(z)`` relatively, or of half a log-odds. NaN where it is not known.
    decrement : float
        ``g^T H^-1 g``: twice the fall of the loss that this step promises.
    n_flat : int
        Number of directions without curvature; None where the solver keeps no matrix.
    separation : Separation, optional
        Where there is no finite minimum: ``direction``, ``columns``, ``rows``, ``remaining`` and ``fit()``.
        ``x`` is then the fit of the remaining rows, -inf or inf where a coefficient has no finite value, NaN
        where only its combinations with others have one.
    kinks : list of Kink
        The outputs (``output``, ``column``, ``y``, ``side``) that x puts on a kink of the activation.
    effects : Effects, optional
        Of a problem with absorbed effects: ``effects[s]`` has the labels of set s, their values, components
        and what is identified.
    dropped : dict, optional
        What such a fit leaves out: "zero weight" (rows), "all-zero level" (labels by set), "separated" (row
        numbers), and "singletons" (levels with one row by set, which stay unless they are "singleton rows").
    points : ndarray, shape (n_points, ...)
        Where ``minimize(..., history="points")`` asked for them: the iterates of the descent that led to x,
        from its start on, each in the natural shape. `attnfit.theory.on` evaluates the papers' convergence
        theorems on them.
    sampling : Sampling, optional
        Of `Newton.as_published`: the rows drawn in each step, and how far their Hessian is off.
    """

    x: Array
    value: float
    gradient: Array
    gradient_norm: float
    converged: bool
    status: Status
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
    move: float = float("nan")
    decrement: float = float("nan")
    n_flat: int | None = None
    separation: Separation | None = None
    kinks: list[Any] = field(default_factory=list)
    effects: Effects | None = None
    dropped: dict[str, Any] | None = field(default=None, repr=False)
    points: Array | None = field(default=None, repr=False)
    sampling: Sampling | None = field(default=None, repr=False)
    # The end of a fit with absorbed effects, from which standard errors and predictions go on.
    absorbed: Any = field(default=None, repr=False)

    def _repr_html_(self) -> str:
        facts = {
            "status": f"{self.status}: {self.message}",
            "value": f"{self.value:.10g}",
            "x": f"shape {self.x.shape}, {np.array2string(self.x, precision=6, threshold=8, edgeitems=3)}",
            "relative gradient": f"{self.gradient_norm:.2e}",
            "largest change by another step": f"{self.move:.2e}",
            "steps, reads of the data": f"{self.n_iter}, {self.n_passes:.2f}",
            "seconds": f"{self.seconds:.3g}",
            "solver": self.solver,
        }
        if self.local_values:
            facts["local minima"] = ", ".join(f"{v:.8g} ({name})" for name, v in self.local_values.items())
        rows = "".join(
            f"<tr><th>{html.escape(name)}</th><td>{html.escape(told)}</td></tr>"
            for name, told in facts.items()
        )
        return f"<table>{rows}</table>"

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
        from attnfit.certificates.kantorovich import refused

        if self.separation is not None:
            return refused("there is no finite minimum; result.separation.fit() fits the remaining rows")
        return certify(self.problem, self.x, rigorous)


@dataclass(frozen=True)
class End:
    """The end of a fit, and what is said of it."""

    status: Status
    verdict: Verdict
    tol: float
    max_iter: int
    n_starts: int
    problem: Any
    gradient_norm: float
    lift: Callable[[Array], Array] | None = None
    reason: str | None = None
    settled: Any = None

    def message(self) -> str:
        """Return the status in a sentence, with the remedy; unknowns are named as the user knows them."""
        move = self.verdict.move
        reached = f": the next step moves a logit by {move:.1e}, tol {self.tol:.0e}"
        if np.isnan(move):
            reached = f": relative gradient {self.gradient_norm:.1e}"
        match self.status:
            case Status.CONVERGED if self.verdict.at_floor:
                return f"converged to the rounding of the data: {move:.1e} in the logits"
            case Status.CONVERGED:
                text = f"converged{reached}" + (", curvature sampled" if self.verdict.sampled else "")
                if self.settled is not None:
                    return f"{text}; a minimum on a kink of the activation: see result.kinks"
                if self.problem.convex or not self.problem.has_logits:
                    return text
                if self.n_starts > 1:
                    return f"{text}; the lowest minimum found from {self.n_starts} starts"
                return f"{text}; one descent, the loss is not convex: pass n_starts to look for other minima"
            case Status.SEPARABLE:
                return (
                    f"the data are separable: {self._loss()} has no finite minimum and falls for ever along "
                    f"the direction ({self._direction()}), along which the outputs of {self._rows()} go to "
                    "zero; result.separation names them and fits the others; add ridge > 0, or drop or merge "
                    "the columns it names"
                )
            case Status.NO_MINIMUM:
                return (
                    f"no minimum: the loss falls to {self._limit()} along the direction "
                    f"({self._direction()}), where {self._rows()} have output zero; result.separation fits "
                    "the others; add ridge > 0"
                )
            case Status.FLAT if self.settled is not None and self.settled.dead:
                return (
                    "all outputs are dead: A2 f is negative everywhere, where the slope of the activation is "
                    "zero, although targets are positive; pass another x0, or take activation='leaky_relu'"
                )
            case Status.FLAT:
                assert self.verdict.flat is not None
                n = self.verdict.flat.shape[1]
                return (
                    f"{n} direction{'s have' if n > 1 else ' has'} no curvature in float64 although the data "
                    f"see {'them' if n > 1 else 'it'}: {self._flat_columns()}; centre or rescale these "
                    "columns, or add ridge"
                )
            case Status.SADDLE:
                return "a saddle point: the loss falls on both sides, but no step off it succeeded; pass x0"
            case Status.PRECISION if self.verdict.undecided:
                return (
                    "an output has all but vanished, and whether a finite minimum exists was not decided "
                    "(too many unknowns, or no time); add ridge > 0"
                )
            case Status.PRECISION:
                return (
                    f"no further step succeeds in float64{reached}; add ridge if columns are nearly "
                    "dependent, or loosen tol"
                )
            case Status.MAX_ITER:
                return f"not converged after max_iter={self.max_iter} steps{reached}; raise max_iter"
            case Status.OVERFLOW:
                return "a step overflowed; scale the data, or use a smaller step_size"
            case Status.INTERRUPTED:
                return "interrupted; x is the best point so far"
            case Status.INDEFINITE:
                return "a Hessian is not positive definite; use Newton(), or start nearer"
            case Status.FALSE_OPTIMUM:
                return f"not a minimum: {self.reason}; pass another x0, or add ridge"

    def _loss(self) -> str:
        name = type(getattr(self.problem, "loss", self.problem)).__name__
        return {"CrossEntropy": "cross entropy", "KullbackLeibler": "the divergence"}.get(name, "the loss")

    def _direction(self) -> str:
        assert self.verdict.separation is not None
        v = self.verdict.separation.direction
        v = v if self.lift is None else self.lift(v)
        return self._entries(v)

    def _entries(self, v: Array) -> str:
        order = np.argsort(-np.abs(v), kind="stable")
        size = max(float(np.abs(v).max()), np.finfo(float).tiny)
        moved = [int(j) for j in order if abs(v[j]) > 1e-9 * size]
        entries = ", ".join(f"{unknown(j, self.problem.shape)}: {v[j] / size:+.3g}" for j in moved[:3])
        return entries + (f", and {len(moved) - 3} more" if len(moved) > 3 else "")

    def _rows(self) -> str:
        assert self.verdict.separation is not None
        n = len(self.verdict.separation.rows)
        return f"{n:,} row{'s' if n > 1 else ''}"

    def rows_left_out(self) -> str:
        """Return what was fitted without, where rows are separated."""
        return f"{self._rows()} left out, whose outputs go to zero along the direction ({self._direction()})"

    def _limit(self) -> str:
        assert self.verdict.separation is not None
        return f"{self.verdict.separation.value:.6g}"

    def _flat_columns(self) -> str:
        assert self.verdict.flat is not None
        sizes = np.abs(self.verdict.flat).max(axis=1)
        return self._entries(sizes)


def unknown(j: int, shape: tuple[int, ...]) -> str:
    """Return the name of an unknown."""
    if len(shape) == 1:
        return f"column {j}"
    return f"entry ({', '.join(str(int(k)) for k in np.unravel_index(j, shape))})"

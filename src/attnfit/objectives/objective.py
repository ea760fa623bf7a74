"""What every problem offers its users, and what it must offer the solvers for that; what is known after one
pass; the memory that a fit takes.
"""

from __future__ import annotations

import os
import re
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Any, NamedTuple, Self, TypeVar

import numpy as np
from numpy.typing import NDArray

from attnfit.data.inputs import as_point
from attnfit.segments import Array

UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
BINARY = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
HELD = "in memory already"
CURVATURE = "Hessian and its factors"
SAMPLES = "rows drawn for the start"
DRAWN = "rows drawn for the curvature"
READING = "blocks being read"
WORKING = "blocks being worked on"
STORED = "stored blocks being decoded"
REMEDIES = {
    HELD: "pass data on disk, opened by attnfit.data.open_source, or raise memory_limit",
    CURVATURE: "use solver=Newton(hessian='matrix_free'), or raise memory_limit",
    STORED: "store the data in smaller chunks or row groups, or raise memory_limit",
}
T = TypeVar("T", float, Array)
# d x d arrays beyond this size cost more than the products that replace them.
MAX_DENSE = 3_000
# Arrays of that size at a time: the Hessian, scaled, its factors or eigenvectors, and what LAPACK works in.
DENSE_COPIES = 6
# Blocks that are worked on, and the code that is compiled for it.
WORK_BYTES = 1 << 26


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes that a fit is expected to take at its peak; prints as a table.

    Attributes
    ----------
    parts : dict of int
        Bytes by what they are for; "in memory already" is what the process holds now, data included.
    """

    parts: dict[str, int]

    @property
    def total(self) -> int:
        """Sum of all parts, in bytes."""
        return sum(self.parts.values())

    @property
    def needed(self) -> int:
        """Bytes beyond what the process holds already."""
        return self.total - self.parts.get(HELD, 0)

    def __str__(self) -> str:
        width = max(map(len, self.parts))
        lines = [f"{name:<{width}}  {size / 1e6:>10,.1f} MB" for name, size in self.parts.items()]
        return "\n".join([*lines, f"{'total':<{width}}  {self.total / 1e6:>10,.1f} MB"])

    def require(self, limit: int) -> None:
        """Raise MemoryError, with the remedy, where the fit does not fit.

        Raises
        ------
        MemoryError
        """
        if self.total <= limit:
            return
        name, size = max(self.parts.items(), key=lambda item: item[1])
        remedy = REMEDIES.get(name, "raise memory_limit")
        raise MemoryError(
            f"the fit takes about {self.total / 1e6:,.0f} MB; memory_limit is {limit / 1e6:,.0f} MB; "
            f"{name} is the largest part, {size / 1e6:,.0f} MB: {remedy}"
        )


def parse_size(size: Any) -> int:
    """Return a size in bytes: a number, or text such as ``"1GB"`` (10^9) or ``"1GiB"`` (2^30).

    Raises
    ------
    ValueError
        If it is neither, or not positive.
    """
    found = re.fullmatch(
        r"\s*([0-9.]+(?:e[0-9]+)?)\s*([KMGT]?)(I?)B?\s*", str(size).upper().replace("E", "e")
    )
    try:
        number = float(found[1]) if found else 0.0
    except ValueError:
        number = 0.0
    if found is None or number <= 0 or (found[3] and not found[2]):
        raise ValueError(
            f"memory_limit must be a size such as '1GB', '500MB' or a number of bytes, not {size!r}"
        )
    return int(number * (BINARY if found[3] else UNITS)[found[2]])


def held_now() -> int:
    """Return the bytes of memory that this process holds; zero where the system does not tell."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError, AttributeError):
        return 0


@dataclass(frozen=True)
class Drawn:
    """Rows drawn during a read: ``chunks`` is for the problem that drew them, and may be kept elsewhere."""

    chunks: Any = field(repr=False)
    n_rows: int


@dataclass(frozen=True)
class Evaluation:
    """Value and gradient at ``x``, and what later reads need of the long groups.

    Attributes
    ----------
    x, gradient : ndarray, shape (d,)
    value : float
        Infinite where the loss overflows.
    state : ndarray, shape (n_states, n_long)
        Normaliser and inner product of each group too long for one chunk; shorter groups recompute theirs.
    centre : ndarray, shape (n_long, d)
        ``mu_g = A_g^T centre weights`` of the long groups: also the derivative of their normaliser.
    gradient_at_zero : ndarray, shape (d,), optional
        The gradient at zero, when asked for.
    sample : Drawn, optional
        Rows drawn during the read.
    hessian : ndarray, shape (d, d), optional
        The Hessian, when asked for and the predicted states of long groups were good enough to weight the
        rows.
    inner : Evaluation, optional
        Of the problem that this one is made of.
    """

    x: Array
    value: float
    gradient: Array
    state: Array = field(default_factory=lambda: np.zeros((0, 0)))
    centre: Array = field(default_factory=lambda: np.zeros((0, 0)))
    gradient_at_zero: Array | None = None
    sample: Drawn | None = field(default=None, repr=False)
    hessian: Array | None = field(default=None, repr=False)
    inner: Evaluation | None = field(default=None, repr=False)

    def bare(self) -> Evaluation:
        """Return what other reads need of this one."""
        return Evaluation(self.x, self.value, self.gradient, self.state, self.centre)


class Moved(NamedTuple):
    """What steps do to the fitted logits.

    Attributes
    ----------
    largest : ndarray, shape (k,)
        The largest change of a logit along each step.
    least : float
        The smallest output, relative to the largest of its group, of a row that the loss lets fall; infinite
        where the loss always has a minimum.
    """

    largest: Array
    least: float = float("inf")


@dataclass(frozen=True)
class Reduction:
    """A problem in better variables: what a solver works on in place of the one it was given.

    Attributes
    ----------
    problem : Problem
        The same objective over all unknowns that the data identify, or minimised over the others.
    lift : callable
        Takes its unknowns, flat, to those of the original problem, flat; of all that fit as well, the ones of
        least norm.
    restrict : callable
        The inverse on the identified part.
    note : str
        One clause for the report.
    keeps_unknowns : bool
        Whether the unknowns are the same ones, in other units at most.
    """

    problem: Problem
    lift: Callable[[Array], Array]
    restrict: Callable[[Array], Array]
    note: str
    keeps_unknowns: bool = False


class Offer(Enum):
    """What a problem offers a solver besides value and derivatives."""

    # Independent right-hand sides: `n_columns`, `columns`, `escapes`, `false_optimum`.
    COLUMNS = auto()
    # A convex problem in proportions, whose faces an active set can walk.
    MIXTURE = auto()
    # Rows and factors of the Hessian of a softmax followed by a layer: `sampled_hessian`.
    LAYER_ROWS = auto()
    # Residuals of which some can be drawn: `gauss_newton_rows`.
    RESIDUALS = auto()
    # The input of a layer: zero residuals, sought from many starts.
    INVERSION = auto()
    # Outputs with the values projected out, at several points at once.
    PROJECTION = auto()
    # Fixed effects that are eliminated together with the fit: `descend`.
    ABSORBED = auto()
    # An activation with kinks, on which a fit may end: `end`, `kinks`.
    KINKS = auto()
    # One linear system, solved by conjugate gradients: `right_sides`, `operator`, `preconditioner`.
    LINEAR_SYSTEM = auto()
    # Two factors that enter one product: `gauss_newton_operator`, `metric`, `first_factor`.
    FACTORS = auto()


class Problem(ABC):
    """An objective L(x) with two derivatives."""

    offers: frozenset[Offer] = frozenset()
    # The rows that the objective is a sum over, with their loss; None where it is none.
    rows: Any = None
    # Whether a solver may draw rows of the data to find a start or to estimate the curvature.
    rows_can_be_drawn: bool = False
    # Whether the unknown enters through a linear map, so that flat directions are the same everywhere.
    linear: bool = True
    # "exact" where a Hessian comes nearly free with a gradient, "kept" where one costs many and serves for
    # several steps, "matrix_free" where products are all that pays.
    best_hessian: str = "kept"
    # One clause for the report of every fit.
    note: str = ""
    # Whether the gradient at zero vanishes for every data set.
    zero_is_stationary: bool = False
    # Whether zero is a minimum that says nothing about the data.
    zero_is_trivial: bool = False

    @property
    @abstractmethod
    def shape(self) -> tuple[int, ...]:
        """Natural shape of the unknown."""

    @property
    def n_unknowns(self) -> int:
        """Number of unknowns."""
        return int(np.prod(self.shape))

    @property
    @abstractmethod
    def n_passes(self) -> float:
        """Reads of the data since the problem was made."""

    @property
    def convex(self) -> bool:
        """Whether L is convex."""
        return False

    def is_trivial(self, at: Evaluation) -> bool:
        """Return whether a point is a minimum that says nothing about the data."""
        return False

    def initial_point(self, random_state: Any = None) -> Array:
        """Return a point to start from, in the natural shape."""
        return np.zeros(self.shape)

    def starts(self, rng: np.random.Generator) -> dict[str, Array]:
        """Return points to descend from by name, flat."""
        return {"zero": self.initial_point(rng).reshape(-1)}

    def convex_surrogate(self) -> Problem | None:
        """Return a convex problem whose minimiser is a good start (see `adopt`), if there is one."""
        return None

    def adopt(self, x: Array) -> Array:
        """Return the point of this problem that corresponds to one of its convex surrogate, flat."""
        return x

    def reduction(self) -> Reduction | None:
        """Return the problem in better variables, if there are any."""
        return None

    def false_optimum(self, at: Evaluation) -> str | None:
        """Return why a point without gradient is no minimum, None if nothing speaks against it."""
        return None

    # ---- what a verdict looks at

    # Whether the unknown has an effect through logits alone, so that `unseen_directions` tells which
    # directions may be flat.
    has_logits: bool = False

    def moves(self, at: Evaluation, steps: Array) -> Moved | None:
        """Return by how much each step changes a fitted logit at most, in one read.

        Parameters
        ----------
        at : Evaluation
        steps : ndarray, shape (n_unknowns, k)

        Returns
        -------
        Moved or None
            None where the problem has no logits: steps are then compared with the point itself.
        """
        return None

    def unseen_columns(self, at: Evaluation) -> NDArray[np.bool_]:
        """Return which unknowns no datum and no penalty sees, shape (n_unknowns,): what a Hessian has there
        is rounding.
        """
        return np.zeros(self.n_unknowns, dtype=bool)

    def unseen_directions(self, at: Evaluation) -> Array:
        """Return an orthonormal basis, shape (n_unknowns, k), of the directions along which no datum and no
        penalty changes.
        """
        return np.zeros((self.n_unknowns, 0))

    # ---- what a fit takes

    def memory_estimate(self) -> MemoryEstimate:
        """Return the memory that a fit of this problem by the default solver takes at its peak, in bytes by
        purpose; ``print`` shows a table.
        """
        d = self.n_unknowns
        dense = d if d <= MAX_DENSE else 0
        return MemoryEstimate({HELD: held_now(), CURVATURE: DENSE_COPIES * 8 * dense**2, WORKING: WORK_BYTES})

    def with_memory_limit(self, limit: int) -> Self:
        """Return the problem, read in such pieces that a fit takes at most so many bytes.

        Raises
        ------
        MemoryError
            If that cannot be; the message names what takes most, and the remedy.
        """
        self.memory_estimate().require(limit)
        return self

    # ---- what the solvers use; points are flat

    @abstractmethod
    def evaluate(
        self,
        x: Array,
        near: Evaluation | None = None,
        sampler: Any = None,
        *,
        at_zero: bool = False,
        hessian: bool = False,
    ) -> Evaluation:
        """Return value and gradient at x, and on request the gradient at zero and the Hessian (which may be
        withheld).
        """

    @abstractmethod
    def hessian_at(self, at: Evaluation, sample: Any = None, *, absolute: bool = False) -> Array:
        """Return the Hessian at an evaluated point, shape (n_unknowns, n_unknowns); with ``absolute`` a
        positive semidefinite majorant.
        """

    @abstractmethod
    def hessian_operator(self, at: Evaluation, sample: Any = None) -> Callable[[Array], Array]:
        """Return v -> H v at an evaluated point."""

    def hvp_at(self, at: Evaluation, v: Array) -> Array:
        """Return the Hessian at an evaluated point times v."""
        return self.hessian_operator(at)(v)

    @abstractmethod
    def diagonal_at(self, at: Evaluation) -> Array:
        """Return the diagonal of a positive majorant of the Hessian, shape (n_unknowns,)."""

    # ---- what users call

    def value(self, x: Any) -> float:
        """Return L(x).

        Raises
        ------
        OverflowError
            If the loss itself, or its gradient, exceeds the range of float64.
        """
        return self._evaluate_checked(x).value

    def gradient(self, x: Any) -> Array:
        """Return the gradient of L at x in the natural shape. Raises like `value`."""
        return self._evaluate_checked(x).gradient.reshape(self.shape)

    def value_and_gradient(self, x: Any) -> tuple[float, Array]:
        """Return L(x) and its gradient from the same read of the data. Raises like `value`."""
        at = self._evaluate_checked(x)
        return at.value, at.gradient.reshape(self.shape)

    def hessian(self, x: Any) -> Array:
        """Return the Hessian of L at x, shape (n_unknowns, n_unknowns), in C order of the natural shape.

        Raises like `value`.
        """
        at = self._evaluate_checked(x)
        with np.errstate(over="ignore", invalid="ignore"):
            return self._finite(self.hessian_at(at), at)

    def hvp(self, x: Any, v: Any) -> Array:
        """Return the product of the Hessian at x with v, in the natural shape. Raises like `value`."""
        at = self._evaluate_checked(x)
        with np.errstate(over="ignore", invalid="ignore"):
            return self._finite(self.hvp_at(at, as_point(v, self.shape, "v")), at).reshape(self.shape)

    def _evaluate_checked(self, x: Any) -> Evaluation:
        at = self.evaluate(as_point(x, self.shape))
        self._finite(at.value, at)
        return at

    def _finite(self, result: T, at: Evaluation) -> T:
        if not np.isfinite(result).all():
            raise OverflowError(self._overflow_message(at))
        return result

    def _overflow_message(self, at: Evaluation) -> str:
        return "the loss or a derivative overflows float64 at this x; scale the data or move x towards zero"

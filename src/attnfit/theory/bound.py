"""A published bound as an object: what it says, what it assumes, and both of its sides on an instance."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, Literal, NamedTuple, Protocol, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from attnfit.theory.logs import LOG10

Array = NDArray[np.float64]

# A ratio above one by no more than this is rounding.
ROUNDING = 1e-9

PAPERS = {
    "WS": "The Closeness of In-Context Learning and Weight Shifting for Softmax Regression",
    "RH": "An Iterative Algorithm for Rescaled Hyperbolic Functions Regression",
    "TT": "In-Context Learning for Attention Scheme: from Single Softmax Regression to Multiple Softmax "
    "Regression via a Tensor Trick",
    "TL": "Local Convergence of Approximate Newton Method for Two Layer Nonlinear Regression",
    "UT": "Unmasking Transformers: A Theoretical Approach to Data Recovery via Attention Weights",
}


class Instance(Protocol):
    """Arrays on which bounds can be evaluated."""

    @property
    def R(self) -> float | None:
        """The bound R of the papers' assumptions; None: the smallest that the assumptions allow."""


I = TypeVar("I", bound=Instance)  # noqa: E741
Side = Callable[[I], ArrayLike]
RightSide = Callable[[I, float], ArrayLike]


@dataclass(frozen=True)
class Size(Generic[I]):
    """The assumption ``name <= R``, the largest one where there are several."""

    name: str
    of: Callable[[I], ArrayLike]

    @property
    def text(self) -> str:
        """The assumption as a formula."""
        return f"{self.name} <= R"

    def largest(self, instance: I) -> float:
        """Return the value that R must reach."""
        return float(np.max(self.of(instance)))

    def violation(self, instance: I, R: float) -> str | None:
        """Return a sentence naming the offending value, None where the assumption holds."""
        value = self.largest(instance)
        if value <= R * (1.0 + ROUNDING):
            return None
        return f"{self.name} = {value:.6g} exceeds R = {R:.6g}"


@dataclass(frozen=True)
class Condition(Generic[I]):
    """Any other assumption: ``fails`` returns a sentence naming the offending quantity, or None."""

    text: str
    fails: Callable[[I, float], str | None]

    def violation(self, instance: I, R: float) -> str | None:
        """Return a sentence naming the offending value, None where the assumption holds."""
        return self.fails(instance, R)


def below(name: str, of: Callable[[I], ArrayLike], limit: float, *, strict: bool = False) -> Condition[I]:
    """Return the assumption that a quantity does not exceed a number."""
    sign = "<" if strict else "<="

    def fails(instance: I, R: float) -> str | None:
        value = float(np.max(of(instance)))
        kept = value < limit if strict else value <= limit * (1.0 + ROUNDING)
        return None if kept else f"{name} = {value:.6g}, not {sign} {limit:g}"

    return Condition(f"{name} {sign} {limit:g}", fails)


@dataclass(frozen=True)
class Sharp(Generic[I]):
    """What holds in place of, or more tightly than, the printed right side.

    Attributes
    ----------
    formula : str
    log_rhs : callable
        (instance, R) -> its natural logarithm.
    log_lhs : callable, optional
        The left side where it differs from the printed one.
    """

    formula: str
    log_rhs: RightSide[I]
    log_lhs: Side[I] | None = None


@dataclass(frozen=True)
class Corrected(Generic[I]):
    """The printed right side against a left side without its misprints.

    Attributes
    ----------
    what : str
        Of what the left side is then.
    log_lhs : callable
    status : {"holds", "fails"}
    worst : str
    counterexample : callable, optional
        Returns an instance that meets the assumptions of the bound and violates this form of it.
    """

    what: str
    log_lhs: Side[I]
    status: Literal["holds", "fails"]
    worst: str
    counterexample: Callable[[], I] | None = None


@dataclass(frozen=True)
class Check:
    """Both sides of a bound on one instance; prints as a few lines.

    Attributes
    ----------
    id : str
    lhs : float
        Infinite where it leaves float64, or where it is not defined (a normaliser that is zero).
    log10_lhs, log10_rhs : float
        Of the printed bound, at the group, row or entry of the largest ratio.
    log10_sharp : float or None
        Of the sharp right side, None where there is none.
    ratio, sharp_ratio, corrected_ratio : float or None
        Left over right; the bound holds up to 1. The last two are None where there is no such form, or where
        both of its sides are zero.
    tested : bool
        Whether the instance says anything: false where both sides are zero.
    R : float
        As given with the instance, or the smallest that the assumptions allow.
    violated : tuple of str
        Assumptions the instance violates, each naming the quantity and its value. The sides are evaluated
        all the same.
    """

    id: str
    lhs: float
    log10_lhs: float
    log10_rhs: float
    log10_sharp: float | None
    ratio: float
    sharp_ratio: float | None
    R: float
    violated: tuple[str, ...]
    tested: bool
    corrected_ratio: float | None = None

    @property
    def verdict(self) -> Literal["holds", "fails", "undefined", "not tested"]:
        """What the instance says of the printed bound; a ratio within rounding of 1 holds."""
        if not self.tested:
            return "not tested"
        if np.isnan(self.ratio):
            return "undefined"
        return "holds" if self.ratio <= 1.0 + ROUNDING else "fails"

    @property
    def holds(self) -> bool:
        """Whether the printed bound was tested here and holds."""
        return self.verdict == "holds"

    @property
    def sharp_holds(self) -> bool | None:
        """Whether the sharp one does; None where there is none, or where it is not tested."""
        return None if self.sharp_ratio is None else bool(self.sharp_ratio <= 1.0 + ROUNDING)

    @property
    def corrected_holds(self) -> bool | None:
        """Whether the printed right side bounds the corrected left one; None where there is none."""
        return None if self.corrected_ratio is None else bool(self.corrected_ratio <= 1.0 + ROUNDING)

    @property
    def slack(self) -> float:
        """By how many powers of ten the printed right side exceeds the left one; negative where it fails, NaN
        where it is not tested.
        """
        if not self.tested:
            return np.nan
        if np.isnan(self.ratio):
            return -np.inf
        return np.inf if self.log10_lhs == -np.inf else self.log10_rhs - self.log10_lhs

    def __str__(self) -> str:
        forms = "" if self.log10_sharp is None else f", sharp {power(self.log10_sharp)}"
        if self.corrected_ratio is not None:
            forms += f", corrected left side {self.corrected_ratio:.3g}"
        lines = [
            f"{self.id}: {power(self.log10_lhs)} <= {power(self.log10_rhs)} {self.verdict}"
            f" (ratio {self.ratio:.3g}{forms}, R = {self.R:.4g})"
        ]
        return "\n".join([*lines, *(f"  assumption violated: {text}" for text in self.violated)])


def power(log10: float) -> str:
    """Return a number from its decimal logarithm, whatever its size, to three digits."""
    if log10 == -np.inf:
        return "0"
    if not np.isfinite(log10):
        return str(log10)
    if -3.0 <= log10 < 4.0:
        return f"{10.0**log10:.3g}"
    exponent = int(np.floor(log10))
    mantissa = 10.0 ** (log10 - exponent)
    if mantissa >= 9.995:
        exponent, mantissa = exponent + 1, 1.0
    return f"{mantissa:.2f}e{exponent:+03d}"


@dataclass(frozen=True)
class Bound(Generic[I]):
    """One inequality ``lhs <= rhs`` of a paper.

    Attributes
    ----------
    id : str
        Paper and number, such as "TT-7.4"; "NEW" in front marks a bound of this library beside theirs.
    statement : str
        What the left side is.
    formula : str
        The inequality as printed.
    kind : type
        The instances it applies to.
    log_lhs, log_rhs : callable
        Natural logarithms of the sides, arrays where the bound is claimed for every group or entry.
    assumptions : tuple of Size and Condition
    status : {"holds", "fails"}
        Whether the printed bound survived search; "fails" comes with a counterexample.
    worst : str
        The largest ratio found by `attnfit.theory.search` and by adversarial search when the table was made.
    floor : float
        The smallest R the bound is claimed for.
    sharp : Sharp, optional
        The corrected form of a bound that fails, or a tighter one.
    corrected : Corrected, optional
        The same right side where misprints change the left one: both are judged.
    remark : str
    counterexample : callable, optional
        Returns an instance that meets the assumptions and violates the printed bound.
    models : tuple of str
        Problems whose data it speaks of: "exponential", "softmax", "rescaled", "two_layer", "layer".
    """

    id: str
    statement: str
    formula: str
    kind: type[I]
    log_lhs: Side[I]
    log_rhs: RightSide[I]
    assumptions: tuple[Size[I] | Condition[I], ...] = ()
    status: Literal["holds", "fails"] = "holds"
    worst: str = ""
    floor: float = 0.0
    sharp: Sharp[I] | None = None
    corrected: Corrected[I] | None = None
    remark: str = ""
    counterexample: Callable[[], I] | None = None
    models: tuple[str, ...] = ()

    @property
    def paper(self) -> str:
        """Title of the paper; empty for a bound of this library."""
        return PAPERS.get(self.id.split("-")[0], "")

    @property
    def number(self) -> str:
        """Number of the result in the paper."""
        return self.id.split("-", 1)[1]

    @property
    def verdict(self) -> str:
        """Status as a phrase."""
        if self.corrected is not None and self.corrected.status != self.status:
            return f"{self.status} as printed; {self.corrected.status} for {self.corrected.what}"
        if self.status == "holds":
            return "holds"
        return "fails as printed" + ("; corrected form holds" if self.sharp is not None else "")

    def radius(self, instance: I) -> float:
        """Return the R at which the bound is evaluated."""
        if instance.R is not None:
            return instance.R
        sizes = [a.largest(instance) for a in self.assumptions if isinstance(a, Size)]
        return max([self.floor, *sizes])

    def lhs(self, instance: I) -> float:
        """Return the left side at the worst group or entry, infinite where it leaves float64."""
        return self.check(instance).lhs

    def rhs(self, instance: I) -> float:
        """Return the printed right side there, infinite where it leaves float64: see `log10_rhs`."""
        with np.errstate(over="ignore"):
            return float(np.power(10.0, self.check(instance).log10_rhs))

    def log10_rhs(self, instance: I) -> float:
        """Return the decimal logarithm of the printed right side there."""
        return self.check(instance).log10_rhs

    def ratio(self, instance: I) -> float:
        """Return lhs over printed rhs at the worst group or entry."""
        return self.check(instance).ratio

    def check(self, instance: I) -> Check:
        """Evaluate both sides; assumptions that the instance violates are listed, not enforced.

        Raises
        ------
        TypeError
            If the bound speaks of another kind of instance.
        """
        if not isinstance(instance, self.kind):
            raise TypeError(
                f"{self.id} is a bound on {self.kind.__name__} instances, not {type(instance).__name__}; "
                f"make one with theory.instances.{self.kind.__name__}(...)"
            )
        R = self.radius(instance)
        found = [a.violation(instance, R) for a in self.assumptions]
        if self.floor > R * (1.0 + ROUNDING):
            found.append(f"R = {R:.6g} is below the {self.floor:g} the bound is claimed for")
        with np.errstate(all="ignore"):
            right = self.log_rhs(instance, R)
            printed = _compare(self.log_lhs(instance), right)
            sharp = corrected = None
            if self.sharp is not None:
                left = self.log_lhs if self.sharp.log_lhs is None else self.sharp.log_lhs
                sharp = _compare(left(instance), self.sharp.log_rhs(instance, R))
            if self.corrected is not None:
                corrected = _compare(self.corrected.log_lhs(instance), right)
            return Check(
                id=self.id,
                lhs=float(np.exp(printed.log_lhs)),
                log10_lhs=printed.log_lhs / LOG10,
                log10_rhs=printed.log_rhs / LOG10,
                log10_sharp=None if sharp is None else sharp.log_rhs / LOG10,
                ratio=printed.ratio,
                sharp_ratio=None if sharp is None or not sharp.tested else sharp.ratio,
                R=R,
                violated=tuple(text for text in found if text is not None),
                tested=printed.tested,
                corrected_ratio=None if corrected is None or not corrected.tested else corrected.ratio,
            )


class _Compared(NamedTuple):
    log_lhs: float
    log_rhs: float
    ratio: float
    tested: bool


def _compare(log_lhs: ArrayLike, log_rhs: ArrayLike) -> _Compared:
    """Return both logarithms and the ratio where it is largest; where both sides are zero nothing is said."""
    left, right = np.broadcast_arrays(np.asarray(log_lhs, float), np.asarray(log_rhs, float))
    left, right = left.reshape(-1), right.reshape(-1)
    says = (left > -np.inf) | (right > -np.inf) | np.isnan(left) | np.isnan(right)
    gap = np.where((left == -np.inf) & ~np.isnan(right), -np.inf, left - right)
    order = np.where(np.isnan(gap), np.inf, gap)
    # Of ratios that are all zero, one that says something.
    worst = int(np.argmax(order if order.max() > -np.inf else says))
    return _Compared(float(left[worst]), float(right[worst]), float(np.exp(gap[worst])), bool(says.any()))


AnyBound = Bound[Any]

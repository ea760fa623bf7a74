"""What can be done to outputs before they leave, and how much error that adds."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cache
from importlib.metadata import entry_points
from typing import ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from attnfit.audit.errors import AuditError

Array = NDArray[np.float32]
# Half a unit in the last place of the significand, as a standard deviation: uniform errors.
UNIFORM = 12.0**-0.5
FLOAT16_DIGITS, BFLOAT16_DIGITS = 11, 8
# Of half-precision numbers, below which the last place stays where it is: gradients are mostly so small.
FLOAT16_LEAST = -13
NUMBER = r"[0-9.]+(?:e-?[0-9]+)?"
# Entry points of this group name subclasses of `Defence`.
GROUP = "attnfit.defences"
DEFENCES: dict[str, type[Defence]] = {}


@dataclass(frozen=True, eq=False)
class Defended:
    """An array after a defence.

    Attributes
    ----------
    array : ndarray, shape (n, width)
    error : ndarray, shape (n, width)
        Standard deviation of what was added to each number, as an attacker who knows the defence estimates
        it.
    error_bound : ndarray, shape (n, width)
        The largest error that each number can have; infinite where noise was added.
    dropped : tuple of int
        Positions that were withheld.
    """

    array: Array
    error: Array
    error_bound: Array
    dropped: tuple[int, ...] = ()

    @classmethod
    def rounded(cls, array: Array, error: Array) -> Defended:
        """Return what rounding of any kind gives: it errs by half a step at most, and uniformly within it."""
        return cls(array, error, np.asarray(error / UNIFORM / 2, dtype=np.float32))


class Defence(ABC):
    """A defence, known to every audit by its name from the definition of its class on.

    `attnfit.audit.check_defence` tests one.

    Attributes
    ----------
    pattern : str
        Regular expression of its names; the groups are the arguments of the constructor, as text or None.
    written : str
        How its names are written, in messages.
    """

    pattern: ClassVar[str] = ""
    written: ClassVar[str] = ""

    def __init_subclass__(cls, **more: object) -> None:
        super().__init_subclass__(**more)
        if "pattern" in vars(cls):
            known = DEFENCES.get(cls.pattern)
            if known is not None and known.__qualname__ != cls.__qualname__:
                raise TypeError(f"defence {cls.pattern!r} is {known.__qualname__} already")
            DEFENCES[cls.pattern] = cls

    @abstractmethod
    def apply(self, array: Array, rng: np.random.Generator) -> Defended:
        """Return an array, shape (n, width), after the defence.

        Raises
        ------
        AuditError
            If it cannot be applied to these numbers.
        """


class Nothing(Defence):
    """The outputs as they are."""

    pattern = written = "none"

    def apply(self, array: Array, rng: np.random.Generator) -> Defended:
        """Return the array."""
        return Defended.rounded(array, np.zeros_like(array))


class Float16(Defence):
    """The nearest numbers of 11 binary digits."""

    pattern = written = "float16"

    def apply(self, array: Array, rng: np.random.Generator) -> Defended:
        """Return the nearest half-precision numbers."""
        if np.abs(array).max() > np.finfo(np.float16).max:
            raise AuditError("float16 overflows: the largest number is beyond 65,504; use bfloat16")
        return Defended.rounded(
            array.astype(np.float16).astype(np.float32), _last_place(array, FLOAT16_DIGITS, FLOAT16_LEAST)
        )


class Bfloat16(Defence):
    """The nearest numbers of 8 binary digits."""

    pattern = written = "bfloat16"

    def apply(self, array: Array, rng: np.random.Generator) -> Defended:
        """Return the nearest numbers, ties to even."""
        bits = array.view(np.uint32)
        kept = (bits + 0x7FFF + ((bits >> 16) & 1)) & np.uint32(0xFFFF0000)
        return Defended.rounded(kept.astype(np.uint32).view(np.float32), _last_place(array, BFLOAT16_DIGITS))


class Integers(Defence):
    """A symmetric grid of so many bits, whose step follows the largest number of each row or channel."""

    pattern = r"int([2-8])(:channel)?"
    written = "int8, int4, int8:channel, int4:channel"

    def __init__(self, bits: str, channel: str | None = None) -> None:
        self.levels, self.axis = 2 ** (int(bits) - 1) - 1, 0 if channel else 1

    def apply(self, array: Array, rng: np.random.Generator) -> Defended:
        """Return the nearest points of the grid."""
        largest = np.abs(array).max(axis=self.axis, keepdims=True)
        step = np.maximum(largest / self.levels, np.finfo(np.float32).tiny)
        error = np.broadcast_to(UNIFORM * step, array.shape).astype(np.float32)
        return Defended.rounded((np.rint(array / step) * step).astype(np.float32), error)


class Noise(Defence):
    """Gaussian noise in proportion to the root mean square of each row, or to each channel's deviation."""

    pattern = rf"noise:({NUMBER})(std)?"
    written = (
        "noise:R (times the root mean square of each row), "
        "noise:Rstd (times each channel's standard deviation)"
    )

    def __init__(self, ratio: str, std: str | None = None) -> None:
        self.ratio, self.by_channel = float(ratio), bool(std)

    def apply(self, array: Array, rng: np.random.Generator) -> Defended:
        """Add the noise."""
        if self.by_channel:
            size = array.std(axis=0, keepdims=True)
        else:
            size = np.sqrt(np.mean(array**2, axis=1, keepdims=True))
        error = np.broadcast_to(self.ratio * size, array.shape).astype(np.float32)
        noisy = (array + error * rng.standard_normal(array.shape)).astype(np.float32)
        return Defended(noisy, error, np.full_like(array, np.inf))


class Decimals(Defence):
    """So many digits after the point."""

    pattern, written = "round:([0-9]+)", "round:DECIMALS"

    def __init__(self, digits: str) -> None:
        self.digits = int(digits)

    def apply(self, array: Array, rng: np.random.Generator) -> Defended:
        """Round."""
        error = np.full_like(array, UNIFORM * 10.0**-self.digits)
        return Defended.rounded(np.round(array, self.digits), error)


class WithheldFirst(Defence):
    """All but the first position."""

    pattern = written = "drop0"

    def apply(self, array: Array, rng: np.random.Generator) -> Defended:
        """Withhold the first position."""
        if len(array) < 2:
            raise AuditError("drop0 leaves nothing of one position")
        left = array[1:]
        return Defended(left, np.zeros_like(left), np.zeros_like(left), (0,))


def _last_place(array: Array, digits: int, least: int = -(1 << 10)) -> Array:
    """Return the error of rounding to so many binary digits, as a standard deviation.

    Digits are fewer below the least exponent that is told apart.
    """
    _, exponent = np.frexp(array)
    return np.asarray(np.ldexp(UNIFORM, np.maximum(exponent, least) - digits), dtype=np.float32)


class Chain:
    """Several defences, one after the other.

    Parameters
    ----------
    parts : list of Defence
    """

    def __init__(self, parts: list[Defence]) -> None:
        self.parts = parts

    @classmethod
    def parse(cls, defence: str | None) -> Self:
        """Return the defences of a name such as "float16+noise:0.1std".

        Raises
        ------
        AuditError
            If a part is not known.
        """
        return cls([_named(name.strip()) for name in (defence or "none").split("+")])

    @property
    def withholds(self) -> bool:
        """Whether a position is withheld."""
        return any(isinstance(part, WithheldFirst) for part in self.parts)

    def apply(self, array: Array, rng: np.random.Generator) -> Defended:
        """Return what leaves; variances and largest errors add up."""
        squares, error_bound = np.zeros_like(array), np.zeros_like(array)
        dropped: tuple[int, ...] = ()
        for part in self.parts:
            found = part.apply(array, rng)
            n = len(found.dropped)
            dropped += tuple(len(dropped) + place for place in found.dropped)
            array = found.array
            squares, error_bound = squares[n:] + np.square(found.error), error_bound[n:] + found.error_bound
        return Defended(array, np.sqrt(squares), error_bound.astype(np.float32), dropped)


def apply_defence(array: Array, defence: str | None, random_state: int = 0) -> Defended:
    """Apply one or more defences, in the order given.

    Parameters
    ----------
    array : ndarray, shape (n, width)
    defence : str or None
        For example ``"int8"`` or ``"float16+noise:0.1std"``.
    random_state : int
        Seed of the noise.

    Raises
    ------
    AuditError
        If a part is not known.
    """
    rng = np.random.default_rng(random_state)
    return Chain.parse(defence).apply(np.asarray(array, dtype=np.float32), rng)


@cache
def _load_others() -> None:
    """Load what other packages add: its classes are known once they are defined."""
    for point in entry_points(group=GROUP):
        point.load()


def _named(name: str) -> Defence:
    _load_others()
    for pattern, kind in DEFENCES.items():
        found = re.fullmatch(pattern, name)
        if found:
            return kind(*found.groups())
    known = ", ".join(kind.written for kind in DEFENCES.values())
    raise AuditError(
        f"defence {name!r} is not known; there are {known}; joined by +; run:bfloat16 before them"
    )

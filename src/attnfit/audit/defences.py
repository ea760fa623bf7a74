"""What can be done to outputs before they leave, and how much error that adds."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from attnfit.audit.errors import AuditError

Array = NDArray[np.float32]
# Half a unit in the last place of the significand, as a standard deviation: uniform errors.
UNIFORM = 12.0**-0.5
FLOAT16_DIGITS, BFLOAT16_DIGITS = 11, 8

KINDS = (
    "none, float16, bfloat16, int8, int4, int8:channel, int4:channel, noise:R (times the root mean square of "
    "each row), noise:Rstd (times each channel's standard deviation), round:DECIMALS, drop0; joined by +; "
    "run:bfloat16 before them"
)


@dataclass(frozen=True, eq=False)
class Defended:
    """An array after a defence.

    Attributes
    ----------
    array : ndarray, shape (n, width)
    error : ndarray, shape (n, width)
        Standard deviation of what was added to each number, as an attacker who knows the defence estimates
        it.
    reach : ndarray, shape (n, width)
        The largest error that each number can have; infinite where noise was added.
    dropped : tuple of int
        Positions that were withheld.
    """

    array: Array
    error: Array
    reach: Array
    dropped: tuple[int, ...] = ()


Step = Callable[[Array, np.random.Generator], tuple[Array, Array]]


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
    array = np.asarray(array, dtype=np.float32)
    squares, reach = np.zeros_like(array), np.zeros_like(array)
    dropped: tuple[int, ...] = ()
    for name in map(str.strip, (defence or "none").split("+")):
        if name == "drop0":
            if len(array) < 2:
                raise AuditError("drop0 leaves nothing of one position")
            array, squares, reach, dropped = array[1:], squares[1:], reach[1:], (0,)
            continue
        array, error = _step(name)(array, rng)
        squares = squares + np.square(error)
        # Rounding of every kind errs by half a step at most, and uniformly within it.
        reach = reach + (np.inf if name.startswith("noise:") else error / UNIFORM / 2)
    return Defended(array, np.sqrt(squares), reach.astype(np.float32), dropped)


def _step(name: str) -> Step:
    """Return what a defence of this name does."""
    if name == "none":
        return lambda array, _: (array, np.zeros_like(array))
    if name == "float16":
        return lambda array, _: _to_float16(array)
    if name == "bfloat16":
        return lambda array, _: _to_bfloat16(array)
    quantised = re.fullmatch(r"int([2-8])(:channel)?", name)
    if quantised:
        bits, axis = int(quantised[1]), 0 if quantised[2] else 1
        return lambda array, _: _quantised(array, bits, axis)
    noisy = re.fullmatch(r"noise:([0-9.]+(?:e-?[0-9]+)?)(std)?", name)
    if noisy:
        ratio, by_channel = float(noisy[1]), bool(noisy[2])
        return lambda array, rng: _noisy(array, ratio, by_channel, rng)
    rounded = re.fullmatch(r"round:([0-9]+)", name)
    if rounded:
        digits = int(rounded[1])
        return lambda array, _: _rounded(array, digits)
    raise AuditError(f"defence {name!r} is not known; there are {KINDS}")


def _to_float16(array: Array) -> tuple[Array, Array]:
    if np.abs(array).max() > np.finfo(np.float16).max:
        raise AuditError("float16 overflows: the largest number is beyond 65,504; use bfloat16")
    return array.astype(np.float16).astype(np.float32), _last_place(array, FLOAT16_DIGITS)


def _to_bfloat16(array: Array) -> tuple[Array, Array]:
    bits = array.view(np.uint32)
    # To nearest, ties to even.
    kept = (bits + 0x7FFF + ((bits >> 16) & 1)) & np.uint32(0xFFFF0000)
    return kept.astype(np.uint32).view(np.float32), _last_place(array, BFLOAT16_DIGITS)


def _last_place(array: Array, digits: int) -> Array:
    """Return the error of rounding to so many binary digits, as a standard deviation."""
    _, exponent = np.frexp(array)
    return np.asarray(np.ldexp(UNIFORM, exponent - digits), dtype=np.float32)


def _quantised(array: Array, bits: int, axis: int) -> tuple[Array, Array]:
    """Round to a symmetric grid whose step follows the largest number of each row (axis 1) or channel (0)."""
    largest = np.abs(array).max(axis=axis, keepdims=True)
    step = np.maximum(largest / (2 ** (bits - 1) - 1), np.finfo(np.float32).tiny)
    error = np.broadcast_to(UNIFORM * step, array.shape)
    return (np.rint(array / step) * step).astype(np.float32), error.astype(np.float32)


def _noisy(array: Array, ratio: float, by_channel: bool, rng: np.random.Generator) -> tuple[Array, Array]:
    if by_channel:
        size = array.std(axis=0, keepdims=True)
    else:
        size = np.sqrt(np.mean(array**2, axis=1, keepdims=True))
    error = np.broadcast_to(ratio * size, array.shape).astype(np.float32)
    return (array + error * rng.standard_normal(array.shape)).astype(np.float32), error


def _rounded(array: Array, digits: int) -> tuple[Array, Array]:
    return np.round(array, digits), np.full_like(array, UNIFORM * 10.0**-digits)

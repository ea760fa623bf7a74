"""The change of the target that reproduces a move of the unknowns or of the data."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attnfit.data.inputs import as_point
from attnfit.objectives.attention import Attention
from attnfit.objectives.objective import Problem
from attnfit.objectives.rows import RowProblem
from attnfit.theory.instances import Regression
from attnfit.theory.instances.state import Move
from attnfit.theory.reading import read
from attnfit.theory.table import check

Array = NDArray[np.float64]

# A normaliser this small relative to the sum of magnitudes is zero: sinh has such.
NO_NORMALISER = 1e-12
# The published bound of each kind of problem: a move of the unknowns, a move of the data.
BOUNDS = {
    "softmax": ("WS-8.1", "WS-8.2"),
    "rescaled": ("RH-11.2.1", "RH-11.2.2"),
    "attention softmax": ("TT-14.5.1", "TT-14.5.2"),
    "attention rescaled": ("TT-13.5.1", "TT-13.5.2"),
}


@dataclass(frozen=True)
class Shift:
    """A move, seen from the target.

    Attributes
    ----------
    delta : ndarray, of the shape of the target
        The residual vector after the move with target b is that before it with target ``b - delta``.
        Softmax: ``f' - f``. Rescaled: ``(u' - u - (alpha' - alpha) b) / alpha``; NaN where alpha is zero.
    target : ndarray
        ``b - delta``.
    first_order : ndarray
        delta to first order in the move. Softmax: ``(diag(f) - f f^T) dz``. Rescaled:
        ``(1 - b 1^T)(u'(z) o dz) / alpha``.
    alpha_ok : ndarray of bool, shape (groups,)
        Whether the normaliser alpha differs from zero; it always does but for sinh.
    parts : tuple of two ndarrays, or None
        Softmax: ``(1/alpha' - 1/alpha) u'`` and ``(u' - u)/alpha``, whose sum is delta. Both overflow where
        the papers' constants do.
    size : float
        Length of the move: ``|x' - x|``, or the largest ``|A' - A|`` of a group.
    log10_printed : float
        Decimal logarithm of the published bound on delta, of the group with the largest ratio.
    sharp : ndarray, shape (groups,)
        What |delta| of each group cannot exceed: ``|dz| / 2`` for softmax,
        ``(1 + |b|)(exp(max |dz|) - 1)`` for rescaled exp and cosh; infinite for sinh, which has no such
        bound.
    """

    delta: Array
    target: Array
    first_order: Array
    alpha_ok: NDArray[np.bool_]
    parts: tuple[Array, Array] | None
    size: float
    log10_printed: float
    sharp: Array

    @property
    def norm(self) -> float:
        """``|delta|``, over groups with a normaliser."""
        return float(np.sqrt(np.nansum(self.delta**2)))


def shift(problem: Problem, x: Any, x_new: Any) -> Shift:
    """Return the change of the target that moves the residual like a move of the unknowns.

    Parameters
    ----------
    problem : Softmax, Rescaled or Attention
        With any grouping; of Attention the normalised losses and "rescaled".
    x, x_new : array_like, in the problem's natural shape

    Returns
    -------
    Shift

    Raises
    ------
    TypeError
        If the problem has no normaliser.
    ValueError
        If a point is not finite or of the wrong shape.

    Notes
    -----
    "The Closeness of In-Context Learning and Weight Shifting for Softmax Regression", Theorem 8.1; "An
    Iterative Algorithm for Rescaled Hyperbolic Functions Regression", Theorem 11.2; "In-Context Learning for
    Attention Scheme: from Single Softmax Regression to Multiple Softmax Regression via a Tensor Trick",
    Theorems 13.5 and 14.5. They define delta by equality of two norms, which 2^n vectors satisfy; this is
    the one that makes the residual vectors equal. Differences are computed without cancellation.
    """
    grouped, instance, kind = _read(problem, x, x_new)
    return _shift(grouped, instance, instance.weights, kind, 0)


def data_shift(problem: Problem, x: Any, A: Any, A_new: Any) -> Shift:
    """Return the change of the target that moves the residual like a move of the data.

    Parameters
    ----------
    problem : Softmax, Rescaled or Attention
    x : array_like, in the problem's natural shape
    A, A_new : array_like, shape (n, d), or a pair (A1, A2) of them for Attention
        The data before and after, rows in the order in which the problem was given them.

    Returns
    -------
    Shift

    Raises
    ------
    TypeError, ValueError
        As `shift`; and where A or A_new does not have the shape of the problem's data.
    """
    grouped, instance, kind = _read(problem, x, x)
    before, after = (_stack(grouped, instance, data, name) for data, name in ((A, "A"), (A_new, "A_new")))
    moved = replace(instance, A=before, A_moved=after)
    return _shift(grouped, moved, moved.data, kind, 1)


def _read(problem: Problem, x: Any, x_new: Any) -> tuple[RowProblem, Regression, str]:
    """Return the problem, the same as groups of dense rows, and which papers speak of it."""
    if not isinstance(problem, RowProblem):
        raise TypeError(f"{type(problem).__name__} has no normaliser; pass Softmax, Rescaled or Attention")
    reading = read(problem, x, x_new)
    if reading.models == ("exponential",):
        raise TypeError("this loss has no normaliser; pass Softmax, Rescaled or Attention with such a loss")
    instance = reading.instances[0]
    assert isinstance(instance, Regression)
    if instance.n_groups != len(problem.groups.starts):
        raise ValueError("the problem is too large to be held as dense rows; pass some of its groups")
    matrix = "attention " if isinstance(problem, Attention) else ""
    return problem, instance, matrix + reading.models[0]


def _shift(problem: RowProblem, instance: Regression, move: Move, kind: str, which: int) -> Shift:
    start, dz = move.start, move.dz
    mask = np.ones(dz.shape, dtype=bool) if instance.mask is None else instance.mask
    moved = np.where(mask, dz, 0.0)
    parts = None
    alpha_ok = np.ones(len(dz), dtype=bool)
    if kind.endswith("softmax"):
        delta, f = move.df, start.f
        first = f * moved - f * np.sum(f * moved, axis=1, keepdims=True)
        sharp = 0.5 * np.linalg.norm(moved, axis=1)
        # f' (1 - alpha' / alpha): of the normalisers only the ratio is needed.
        one = -np.expm1(move.end.log_alpha - start.log_alpha)[:, None] * move.end.f
        parts = one, delta - one
    else:
        alpha = start.alpha
        alpha_ok = np.abs(alpha) > NO_NORMALISER * np.abs(start.u).sum(axis=1)
        safe = np.where(alpha_ok, alpha, np.nan)[:, None]
        delta = move.dc / safe
        slope = start.v * moved
        first = (slope - instance.b * slope.sum(axis=1, keepdims=True)) / safe
        with np.errstate(over="ignore"):
            sharp = (1.0 + instance.b_norms) * np.expm1(np.abs(moved).max(axis=1))
        sharp = np.full(len(dz), np.inf) if instance.function == "sinh" else sharp
    delta, first = (np.where(mask, values, 0.0) for values in (delta, first))
    place = partial(_place, problem, mask)
    return Shift(
        delta=place(delta),
        target=place(instance.b - delta),
        first_order=place(first),
        alpha_ok=alpha_ok,
        parts=None if parts is None else (place(parts[0]), place(parts[1])),
        size=float(move.size.max()),
        log10_printed=check(BOUNDS[kind][which], instance).log10_rhs,
        sharp=sharp,
    )


def _place(problem: RowProblem, mask: NDArray[np.bool_], values: Array) -> Array:
    """Bring numbers of padded groups into the order of the user's target."""
    flat = values[mask]
    return np.asarray(
        problem.as_maps(flat) if isinstance(problem, Attention) else problem.groups.unsort(flat)
    )


def _stack(problem: RowProblem, instance: Regression, data: Any, name: str) -> Array:
    """Return the data as padded groups of the instance's shape."""
    stack = np.array(instance.A)
    mask = np.ones(stack.shape[:2], dtype=bool) if instance.mask is None else instance.mask
    d = problem.n_unknowns
    if isinstance(problem, Attention):
        queries, keys = (_matrix(part, f"{name}[{k}]") for k, part in enumerate(data))
        rows = np.einsum("qi,kj->qkij", queries, keys).reshape(len(queries), len(keys), -1)
        if rows.shape != (*stack.shape[:2], d):
            raise ValueError(f"{name} makes maps of {rows.shape[:2]}; the problem's are {stack.shape[:2]}")
        stack[..., :d] = rows
        return stack
    rows = _matrix(data, name)
    if rows.shape != (problem.n_rows, d):
        raise ValueError(f"{name} has shape {rows.shape}; the problem's data have {(problem.n_rows, d)}")
    stack[mask, :d] = problem.groups.sort(rows)
    return stack


def _matrix(values: Any, name: str) -> Array:
    rows = np.asarray(values, dtype=np.float64)
    if rows.ndim != 2:
        raise ValueError(f"{name} has shape {rows.shape}; pass a matrix, one row an observation")
    return as_point(rows, rows.shape, name).reshape(rows.shape)

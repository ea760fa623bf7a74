"""A loss against its own definition, in the manner of a dot test."""

from __future__ import annotations

from types import MethodType
from typing import Any

import numpy as np

from attnfit.losses.loss import GroupStatistics, Loss
from attnfit.losses.sums import Composite
from attnfit.segments import Array, Segments

# Step of the numerical derivatives, in logits: a difference of eight points is then right to about 1e-11.
STEP = 1e-2
TOLERANCE = 1e-6
# Points of an interval at which a bound is tried.
N_POINTS = 200


def check_loss(loss: Loss, b: Any = None, *, random_state: Any = 0) -> None:
    """Compare everything that a loss states with numerical derivatives of its value, and with itself.

    The slope with the derivative of the value, the Hessian of `gram_terms` with that of the slope; value and
    slope of a group that is read in two pieces, with a wrong reference where the loss says ``one_pass``;
    `importance` with the row weights; the third derivative's bound, where one is stated, with that of the
    row weight; what ``shift_invariant``, ``convex`` and ``compiled`` say.

    Parameters
    ----------
    loss : Loss
    b : array_like, shape (n,), optional
        Targets that the loss takes, eight at least; twelve numbers in (0, 1) by default.
    random_state : int or numpy.random.Generator

    Raises
    ------
    AssertionError
        Naming what is wrong, and by how much.

    Examples
    --------
    >>> from attnfit import losses
    >>> losses.check_loss(losses.LOSSES["kl"])
    """
    rng = np.random.default_rng(random_state)
    target = rng.uniform(0.05, 0.95, 12) if b is None else np.asarray(b, dtype=np.float64)
    n = len(target)
    starts = np.array([0, n // 4, n // 4 + n // 3] if loss.coupled else [0], dtype=np.intp)
    groups = Segments(starts, n)
    z, w = rng.standard_normal(n), rng.uniform(0.5, 2.0, n)
    rows = _Rows(loss, groups, target, w)
    value, slope, state = rows.at(z)
    numeric = np.array([_derivative(lambda t, i=i: rows.at(_moved(z, i, t))[0]) for i in range(n)])
    _agree("slope", slope, numeric)
    _agree("finalize: the slope from columns and coefficients", rows.combined(z), numeric)
    hessian = rows.hessian(z, state)
    columns = [_derivative(lambda t, i=i: rows.at(_moved(z, i, t))[1]) for i in range(n)]
    _agree("gram_terms", hessian, np.column_stack(columns))
    terms, _ = loss.gram_terms(z, target, w, state)
    weight = np.max([np.abs(t) * (1.0 if r is None else r * r) for t, r, _ in terms], axis=0)
    if not (loss.importance(z, target, w, state) >= (1.0 - TOLERANCE) * weight).all():
        raise AssertionError("importance is no majorant of the row weights of gram_terms")
    if np.shape(loss.fitted(z, state)) != (n,):
        raise AssertionError(f"fitted has shape {np.shape(loss.fitted(z, state))}; expected ({n},)")
    if loss.convex and np.linalg.eigvalsh(hessian)[0] < -TOLERANCE * np.abs(hessian).max():
        raise AssertionError("convex is stated, but the Hessian has a negative eigenvalue")
    if loss.coupled:
        if loss.shift_invariant:
            moved = z + groups.spread(rng.standard_normal(len(groups)))
            _agree("shift_invariant", rows.at(moved)[0], value)
        _check_pieces(loss, z, target, w)
    else:
        _check_bound(loss, target, w, rng)
    for part in [leaf for _, leaf in loss.leaves] if isinstance(loss, Composite) else [loss]:
        if part.compiled:
            _check_compiled(part, z, target, w)


class _Rows:
    """Whole groups of rows, gone over as a pass over the data does."""

    def __init__(self, loss: Loss, groups: Segments, b: Array, w: Array) -> None:
        self.loss, self.groups, self.b, self.w = loss, groups, b, w
        self.constants = loss.constants(b, w, groups) if loss.coupled else np.zeros(1)

    def finalize(self, z: Array) -> tuple[GroupStatistics, tuple[Array, ...]]:
        """Return what the groups sum up to, and the columns."""
        loss, groups, spread = self.loss, self.groups, self.groups.spread
        normaliser, y, v = loss.normalise(z, groups)
        columns, extras = loss.accumulate(y, v, self.b, self.w, spread(normaliser), spread(self.constants))
        sums, beside = [groups.sum(c) for c in columns], [groups.sum(e) for e in extras]
        return loss.finalize(sums, beside, normaliser, self.constants), columns

    def at(self, z: Array) -> tuple[float, Array, list[Array]]:
        """Return value, slope and the states of the rows' groups."""
        found, _ = self.finalize(z)
        state = [self.groups.spread(np.asarray(s)) for s in found.state]
        return float(np.sum(found.value)), self.loss.slope(z, self.b, self.w, state), state

    def combined(self, z: Array) -> Array:
        """Return the slope as columns and coefficients give it."""
        found, columns = self.finalize(z)
        out = np.zeros_like(z)
        for coefficient, column in zip(found.coefficients, columns, strict=True):
            out += self.groups.spread(coefficient + np.zeros(len(self.groups))) * column
        return out

    def hessian(self, z: Array, state: list[Array]) -> Array:
        """Return the Hessian in the logits, shape (n, n)."""
        n, groups = len(z), self.groups
        terms, weights = self.loss.gram_terms(z, self.b, self.w, state)
        out, eye = np.zeros((n, n)), np.eye(n)
        for t, r, q in terms:
            rows = eye if r is None else eye * r[:, None]
            if q is not None and weights is not None:
                centre = np.add.reduceat(eye * (weights + np.zeros(n))[:, None], groups.starts, axis=0)
                rows = rows - np.broadcast_to(q, n)[:, None] * np.repeat(centre, groups.sizes, axis=0)
            out += rows.T @ ((t + np.zeros(n))[:, None] * rows)
        return out


def _check_pieces(loss: Loss, z: Array, b: Array, w: Array) -> None:
    """Read one group in two pieces."""
    n = len(z)
    rows = _Rows(loss, Segments(np.zeros(1, dtype=np.intp), n), b, w)
    value, slope, _ = rows.at(z)
    halves = [slice(n // 2), slice(n // 2, n)]
    found = [loss.reference(z[p], Segments(np.zeros(1, dtype=np.intp), len(z[p]))) for p in halves]
    exact = loss.reference(z, rows.groups)
    _agree("merge_references", loss.merge_references(*found), exact)
    reference = exact[0]
    if loss.one_pass:
        # A prediction may be wrong by some per cent.
        reference = reference + (0.3 if loss.logarithmic else 0.1 * abs(reference))
    parts = []
    for p in halves:
        y, v = loss.transform(z[p], reference)
        parts.append(loss.accumulate(y, v, b[p], w[p], reference, rows.constants[0]))
    columns = [np.concatenate(pair) for pair in zip(parts[0][0], parts[1][0], strict=True)]
    extras = [np.concatenate(pair) for pair in zip(parts[0][1], parts[1][1], strict=True)]
    sums, beside = [c.sum() for c in columns], [e.sum() for e in extras]
    closed = loss.finalize(sums, beside, reference, rows.constants[0])
    _agree("finalize: the value of a group in pieces", closed.value, value)
    combined = sum(k * c for k, c in zip(closed.coefficients, columns, strict=True))
    _agree("finalize: the slope of a group in pieces", combined, slope)


def _check_bound(loss: Loss, b: Array, w: Array, rng: np.random.Generator) -> None:
    """Try the bound of the third derivative over an interval of logits."""
    low = rng.standard_normal(len(b))
    high = low + rng.uniform(0.1, 1.0, len(b))
    bound = loss.third_derivative_bound(low, high, b, w)
    if bound is None:
        if loss.states_third_derivative:
            raise AssertionError("certifiable is stated, but third_derivative_bound returns None")
        return

    def weight(z: Array) -> Array:
        (t, r, _), *_ = loss.gram_terms(z, b, w, [])[0]
        return np.asarray(t if r is None else t * r * r)

    for share in np.linspace(0.0, 1.0, N_POINTS):
        z = low + share * (high - low)
        third = np.abs(_derivative(lambda t, z=z: weight(z + t)))
        wrong = third > bound * (1.0 + TOLERANCE) + TOLERANCE
        if wrong.any():
            row = int(np.argmax(wrong))
            raise AssertionError(
                f"third_derivative_bound is {bound[row]:.6g} at row {row}, but a third derivative is "
                f"{third[row]:.6g}"
            )


def _check_compiled(loss: Loss, z: Array, b: Array, w: Array) -> None:
    """Compare the formulas on numbers, compiled, with the formulas on arrays: one group."""
    import numba

    rows = _Rows(loss, Segments(np.zeros(1, dtype=np.intp), len(z)), b, w)
    reference = float(loss.reference(z, rows.groups)[0]) if loss.coupled else 0.0
    constant = float(rows.constants[0])
    formulas = (loss.transform, loss.accumulate, loss.finalize)
    if any(isinstance(f, MethodType) for f in formulas):
        raise AssertionError(
            "compiled is stated, but the formulas are methods, which may use the object's fields: make them "
            "static, or set compiled = False"
        )
    try:
        transform, accumulate, finalize = (numba.njit(error_model="numpy")(f) for f in formulas)
        parts = []
        for k in range(len(z)):
            y, v = transform(z[k], reference)
            parts.append(accumulate(y, v, b[k], w[k], reference, constant))
        columns, extras = (np.array([part[j] for part in parts]).reshape(len(z), -1) for j in (0, 1))
        found: Any = finalize(columns.sum(axis=0), extras.sum(axis=0), reference, constant)
    except numba.core.errors.NumbaError as error:
        raise AssertionError(
            f"compiled is stated, but Numba cannot compile the formulas ({type(error).__name__}); set "
            "compiled = False"
        ) from error
    value, slope, _ = rows.at(z)
    _agree("compiled: the value", found.value, value)
    _agree("compiled: the slope", columns @ np.array([float(k) for k in found.coefficients]), slope)


def _moved(z: Array, i: int, t: float) -> Array:
    out = z.copy()
    out[i] += t
    return out


def _derivative(function: Any) -> Any:
    """Return the derivative at zero from eight points."""
    parts = ((1, 4.0 / 5.0), (2, -1.0 / 5.0), (3, 4.0 / 105.0), (4, -1.0 / 280.0))
    return sum(c * (function(k * STEP) - function(-k * STEP)) for k, c in parts) / STEP


def _agree(name: str, found: Any, expected: Any) -> None:
    found, expected = np.asarray(found, dtype=np.float64), np.asarray(expected, dtype=np.float64)
    size = max(float(np.abs(expected).max(initial=0.0)), 1e-3)
    error = float(np.abs(found - expected).max(initial=0.0)) / size
    if not error <= TOLERANCE:
        raise AssertionError(f"{name} is off by {error:.2e} of its size")

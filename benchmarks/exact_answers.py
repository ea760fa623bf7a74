"""Stationary points to 60 digits, by Newton's method in mpmath with formulas of its own."""

from __future__ import annotations

import mpmath
import numpy as np
from mpmath import mpf

DIGITS = 60


def exact_answer(problem_of, x, *, max_steps=60):
    """Return the stationary point near x and the Hessian there, as mpmath matrices.

    ``problem_of`` maps a matrix to ``(gradient, hessian)``; call within ``mpmath.workdps(DIGITS)``.
    """
    at = mpmath.matrix([mpf(float(v)) for v in x])
    for _ in range(max_steps):
        gradient, hessian = problem_of(at)
        step = mpmath.lu_solve(hessian, gradient)
        at = at - step
        if mpmath.norm(step) <= mpf(10) ** (-DIGITS // 2) * (1 + mpmath.norm(at)):
            return at, problem_of(at)[1]
    raise AssertionError("no stationary point nearby")


def error_of(x, answer):
    """Return ``|x - answer|`` and the error of each coefficient, as floats rounded up."""
    each = [abs(mpf(float(v)) - answer[j]) for j, v in enumerate(x)]
    return float(mpmath.norm(mpmath.matrix(each))) * (1 + 1e-12), np.array([float(e) for e in each])


def scaled_error_of(x, answer, hessian):
    """Return ``|H^(1/2)(x - answer)|``."""
    error = mpmath.matrix([mpf(float(v)) for v in x]) - answer
    return float(mpmath.sqrt((error.T * hessian * error)[0]))


def stationarity(family, loss, A, b, ids=None, *, weights=None, offset=None, ridge=0.0):
    """Return x -> (gradient, Hessian) of a problem of rows."""
    n, d = A.shape
    rows = [[mpf(float(v)) for v in row] for row in A]
    target = [mpf(float(v)) for v in b]
    w = [mpf(1.0 if weights is None else float(weights[i])) for i in range(n)]
    shift = [mpf(0.0 if offset is None else float(offset[i])) for i in range(n)]
    ids = np.zeros(n, dtype=int) if ids is None else ids
    groups = [np.flatnonzero(ids == g).tolist() for g in np.unique(ids)]
    family_terms = {"Softmax": _softmax, "Exponential": _exponential, "Rescaled": _rescaled}[family]

    def at(x):
        gradient, hessian = mpf(ridge) * x, mpf(ridge) * mpmath.eye(d)
        z = [shift[i] + mpmath.fdot(rows[i], x) for i in range(n)]
        for rows_of in groups:
            parts = (
                [z[i] for i in rows_of],
                [target[i] for i in rows_of],
                [w[i] for i in rows_of],
                [rows[i] for i in rows_of],
            )
            slope, terms = family_terms(loss, *parts)
            for s, a in zip(slope, parts[3], strict=True):
                for j in range(d):
                    gradient[j] += s * a[j]
            for t, r in terms:
                for j in range(d):
                    for k in range(j, d):
                        hessian[j, k] += t * r[j] * r[k]
        for j in range(d):
            for k in range(j):
                hessian[j, k] = hessian[k, j]
        return gradient, hessian

    return at


def _softmax(loss, z, b, w, rows):
    e = [mpmath.exp(v - max(z)) for v in z]
    f = [v / sum(e) for v in e]
    h = [mpmath.log(v) for v in f]
    if loss in ("cross_entropy", "kl"):
        p = [-wi * bi / fi for wi, bi, fi in zip(w, b, f, strict=True)]
        second = [wi * bi / fi**2 for wi, bi, fi in zip(w, b, f, strict=True)]
    elif loss == "squared":
        p = [wi * (fi - bi) for wi, bi, fi in zip(w, b, f, strict=True)]
        second = w
    elif loss == "linear_cross_entropy":
        p, second = [-wi * bi for wi, bi in zip(w, b, strict=True)], [mpf(0)] * len(z)
    else:
        p = [-wi * (hi + 1) for wi, hi in zip(w, h, strict=True)]
        second = [-wi / fi for wi, fi in zip(w, f, strict=True)]
    gamma = mpmath.fdot(p, f)
    slope = [fi * (pi - gamma) for fi, pi in zip(f, p, strict=True)]
    mean = [mpmath.fdot(f, [row[j] for row in rows]) for j in range(len(rows[0]))]
    centred = [[v - m for v, m in zip(row, mean, strict=True)] for row in rows]
    weight = [fi * (qi * fi + pi - gamma) for fi, pi, qi in zip(f, p, second, strict=True)]
    return slope, list(zip(weight, centred, strict=True))


def _outputs(loss, z):
    u = {"exp": mpmath.exp, "cosh": mpmath.cosh, "sinh": mpmath.sinh}[loss]
    v = {"exp": mpmath.exp, "cosh": mpmath.sinh, "sinh": mpmath.cosh}[loss]
    return [u(i) for i in z], [v(i) for i in z]


def _exponential(loss, z, b, w, rows):
    u, v = _outputs(loss, z)
    slope = [wi * (ui - bi) * vi for wi, ui, bi, vi in zip(w, u, b, v, strict=True)]
    weight = [wi * (vi * vi + (ui - bi) * ui) for wi, ui, bi, vi in zip(w, u, b, v, strict=True)]
    return slope, list(zip(weight, rows, strict=True))


def _rescaled(loss, z, b, w, rows):
    u, v = _outputs(loss, z)
    alpha = sum(u)
    c = [ui - alpha * bi for ui, bi in zip(u, b, strict=True)]
    beta = mpmath.fdot([wi * bi for wi, bi in zip(w, b, strict=True)], c)
    q = [wi * ci - beta for wi, ci in zip(w, c, strict=True)]
    slope = [vi * qi for vi, qi in zip(v, q, strict=True)]
    total = [mpmath.fdot(v, [row[j] for row in rows]) for j in range(len(rows[0]))]
    moved = [
        [vi * a - bi * t for a, t in zip(row, total, strict=True)]
        for vi, bi, row in zip(v, b, rows, strict=True)
    ]
    terms = list(zip(w, moved, strict=True))
    return slope, terms + [(ui * qi, row) for ui, qi, row in zip(u, q, rows, strict=True)]

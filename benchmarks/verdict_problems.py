"""Hard random problems of every loss, and an independent reference in 80-bit arithmetic.

Outcomes from 1e-12 to 1e12, columns collinear to 1e-6 and of sizes 1e-6 to 1e6, shares down to e^-22, exact
and noisy targets. The reference is written anew: nothing of it comes from the library.

    problem, reference, facts = make(seed)
    reference.step(x)                        # the largest change of a fitted logit by an exact Newton step
"""

from __future__ import annotations

from typing import Any

import numpy as np

from attnfit import problems

EXTENDED = np.longdouble
LIST = (
    ("exponential", "exp"),
    ("exponential", "exp"),
    ("exponential", "cosh"),
    ("exponential", "sinh"),
    ("squared", ""),
    ("squared", ""),
    ("cross_entropy", ""),
    ("cross_entropy", ""),
    ("kl", ""),
    ("linear_cross_entropy", ""),
    ("rescaled", "exp"),
    ("rescaled", "cosh"),
    ("rescaled", "sinh"),
)


def solve(matrix: Any, right: Any) -> Any:
    """Solve by elimination with full pivoting, scaled by the diagonal; pivots below 1e-16 are left out."""
    d = len(right)
    scale = np.sqrt(np.maximum(np.abs(np.diag(matrix)), EXTENDED(0)))
    scale[scale == 0] = 1
    m, r = (matrix / np.outer(scale, scale)).copy(), (right / scale).copy()
    left, order = list(range(d)), []
    for _ in range(d):
        pivots = np.array([m[i, i] for i in left])
        i = left[int(np.argmax(np.abs(pivots)))]
        if abs(m[i, i]) < 1e-16:
            break
        left.remove(i)
        order.append(i)
        for j in left:
            factor = m[j, i] / m[i, i]
            m[j] -= factor * m[i]
            r[j] -= factor * r[i]
    x = np.zeros(d, EXTENDED)
    for i in reversed(order):
        known = sum((m[i, j] * x[j] for j in order[order.index(i) + 1 :]), EXTENDED(0))
        x[i] = (r[i] - known) / m[i, i]
    return x / scale


class Reference:
    """Value, gradient and Hessian of one problem in extended precision."""

    def __init__(
        self, kind: str, function: str, A: Any, b: Any, groups: Any, weights: Any, ridge: float
    ) -> None:
        self.kind, self.function = kind, function
        self.A, self.b, self.w = (np.asarray(v).astype(EXTENDED) for v in (A, b, weights))
        self.ridge = EXTENDED(ridge)
        self.members = [np.flatnonzero(groups == g) for g in np.unique(groups)]

    def outputs(self, z: Any) -> tuple[Any, Any, Any]:
        """Return u, u' and u'' of logits."""
        e = np.exp(z)
        if self.function == "exp":
            return e, e, e
        inverse = np.exp(-z)
        cosh, sinh = (e + inverse) / 2, (e - inverse) / 2
        sinh = np.where(np.abs(z) < EXTENDED(1e-5), z + z**3 / 6, sinh)
        return (cosh, sinh, cosh) if self.function == "cosh" else (sinh, cosh, sinh)

    def derivatives(self, x: Any) -> tuple[Any, Any, Any]:
        """Return value, gradient and Hessian."""
        A, b, w = self.A, self.b, self.w
        d, z = A.shape[1], A @ x
        value, gradient = self.ridge * (x @ x) / 2, self.ridge * x
        hessian = self.ridge * np.eye(d, dtype=EXTENDED)
        if self.kind == "exponential":
            u, v, u2 = self.outputs(z)
            c = u - b
            value += (w * c * c).sum() / 2
            gradient = gradient + A.T @ (w * c * v)
            return value, gradient, hessian + A.T @ ((w * (v * v + c * u2))[:, None] * A)
        for i in self.members:
            a, bb, ww = A[i], b[i], w[i]
            if self.kind == "rescaled":
                u, v, u2 = self.outputs(z[i])
                c = u - u.sum() * bb
                value += (ww * c * c).sum() / 2
                q = ww * c - (ww * bb * c).sum()
                gradient = gradient + a.T @ (v * q)
                J = v[:, None] * a - np.outer(bb, a.T @ v)
                hessian = hessian + J.T @ (ww[:, None] * J) + a.T @ ((u2 * q)[:, None] * a)
                continue
            shifted = z[i] - z[i].max()
            h = shifted - np.log(np.exp(shifted).sum())
            f = np.exp(h)
            C = a - f @ a
            if self.kind in ("cross_entropy", "kl"):
                mass = (ww * bb).sum()
                value -= (ww * bb * h).sum()
                if self.kind == "kl":
                    value += (ww * bb * np.log(np.where(bb > 0, bb, 1))).sum()
                gradient = gradient + a.T @ (mass * f - ww * bb)
                t = mass * f
            else:
                squared = self.kind == "squared"
                p, p2 = (ww * (f - bb), ww + 0 * f) if squared else (-ww * bb, 0 * f)
                value += (ww * (f - bb) ** 2).sum() / 2 if squared else -(ww * bb * f).sum()
                gamma = (p * f).sum()
                gradient = gradient + C.T @ (f * p)
                t = f * (p2 * f + p - gamma)
            hessian = hessian + C.T @ (t[:, None] * C)
        return value, gradient, hessian

    def move(self, p: Any) -> float:
        """Return the largest change of a logit along a step: half the range in a group (softmax), else the
        size.
        """
        along = self.A @ p
        if self.kind in ("exponential", "rescaled"):
            return float(np.max(np.abs(along)[self.w > 0]))
        largest = 0.0
        for i in self.members:
            i = i[self.w[i] > 0]
            if len(i) < 2 or (self.kind in ("cross_entropy", "kl") and not (self.b[i] > 0).any()):
                continue
            largest = max(largest, float((along[i].max() - along[i].min()) / 2))
        return largest

    def step(self, x: Any) -> float:
        """Return the move of the exact Newton step at x."""
        _, gradient, hessian = self.derivatives(np.asarray(x).astype(EXTENDED))
        return self.move(-solve(hessian, gradient))


def make(seed: int) -> tuple[Any, Reference, dict[str, Any]]:
    """Return a problem, its reference and what was drawn."""
    r = np.random.default_rng(seed)
    kind, function = LIST[seed % len(LIST)]
    d = int(r.integers(1, 7))
    n_groups = 1 if kind == "exponential" else int(r.choice([1, 2, 8]))
    m = int(r.integers(3, 9)) if n_groups > 1 else int(r.integers(10, 60))
    n = n_groups * m
    groups = np.repeat(np.arange(n_groups), m)
    A = r.standard_normal((n, d)) * r.choice([0.3, 1.0])
    cond = 10.0 ** r.choice([0, 0, 2, 4, 6])
    if d > 1 and cond > 1:
        A[:, 1] = A[:, 0] + A[:, 1] / cond
    sizes = 10.0 ** r.uniform(-6, 6, d) if r.random() < 0.4 else np.ones(d)
    z = A @ (r.standard_normal(d) * 0.7)
    noise = r.choice([0.0, 0.0, 1e-6, 0.05, 0.3])
    ridge, weights = 0.0, np.ones(n)
    scale = 10.0 ** r.uniform(-12, 12) if r.random() < 0.6 else 1.0
    spread = r.random()
    if kind == "exponential":
        if function == "exp":
            A, sizes, z = np.c_[np.ones(n), A], np.r_[1.0, sizes], z + np.log(scale)
            if spread < 0.25:
                dummy = (np.arange(n) % 3 == 0).astype(float)
                A, sizes, z = np.c_[A, dummy], np.r_[sizes, 1.0], z + dummy * r.uniform(-20, 20)
            b = np.exp(z)
        elif function == "cosh":
            b = np.cosh(z)
        else:
            b = np.sinh(z * r.choice([1e-6, 1e-3, 1.0, 3.0]))
        b = b * (1 + noise * r.standard_normal(n))
    elif kind == "rescaled":
        u = {"exp": np.exp, "cosh": np.cosh, "sinh": np.sinh}[function](z).reshape(n_groups, m)
        shares = u / u.sum(1, keepdims=True)
        if function != "sinh":
            shares = shares * (1 + noise * r.standard_normal((n_groups, m)))
            ridge = 10.0 ** r.uniform(-8, 0) if noise > 0 or r.random() < 0.3 else 0.0
        ridge = max(ridge, 1e-10) if function == "exp" else ridge
        b = shares.ravel()
    else:
        if spread < 0.5 and m >= 3:
            dummies = np.zeros((n, 2))
            dummies[np.arange(n) % m == 0, 0] = 1
            dummies[np.arange(n) % m == 1, 1] = 1
            A, sizes, z = np.c_[A, dummies], np.r_[sizes, 1, 1], z + dummies @ r.uniform(-22, 2, 2)
        logits = z.reshape(n_groups, m)
        e = np.exp(logits - logits.max(1, keepdims=True))
        f = e / e.sum(1, keepdims=True)
        b = f * np.exp(noise * r.standard_normal((n_groups, m)))
        if noise == 0.3 and kind in ("cross_entropy", "kl"):
            b = np.array([r.multinomial(200, q / q.sum()) for q in f]).astype(float)
        b = b.ravel()
        if kind in ("cross_entropy", "kl"):
            b = b * scale
        elif r.random() < 0.3:
            weights = np.full(n, scale)
        if kind == "linear_cross_entropy":
            ridge = 10.0 ** r.uniform(-6, 0)
        if r.random() < 0.15:
            ridge = 10.0 ** r.uniform(-8, -2) * float((weights * b).mean())
    A = A * sizes
    given = None if np.all(weights == 1) else weights
    problem: Any
    if kind == "exponential":
        problem = problems.Exponential(A, b, function, ridge=ridge, weights=given)
    elif kind == "rescaled":
        problem = problems.Rescaled(A, b, function, groups, ridge=ridge)
    else:
        problem = problems.Softmax(A, b, groups, loss=kind, ridge=ridge, weights=given)
    reference = Reference(kind, function, A, b, groups, weights, ridge)
    return problem, reference, {"kind": kind, "function": function, "cond": cond, "noise": noise}

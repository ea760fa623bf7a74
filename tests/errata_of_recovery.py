"""Errata of the recovery of a layer's input: the printed form, the corrected one, autodiff's."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from autodiff import as_tensor
from errata_shown import RIGHT, error, gradient, hessian, reproduces

from attnfit import minimize, problems
from attnfit.objectives.inverse_cases import Symbols


@dataclass
class Entry:
    """The output (i0, j0) of a layer in the paper's vector convention, f_i the softmax of ``X^T W x_i``."""

    n: int = 4
    d: int = 3
    i0: int = 1
    j0: int = 2

    def __post_init__(self):
        rng = np.random.default_rng(5)
        self.X, self.W, self.V = (
            rng.standard_normal(s) for s in ((self.d, self.n), (self.d, self.d), (self.d, self.d))
        )
        self.B = rng.standard_normal((self.n, self.d))
        T, M = self.X.T, self.W.T
        R = T @ M
        P = torch.softmax(as_tensor(R @ T.T), 1).numpy()
        self.H, self.f = T @ self.V, P[self.i0]
        y, h = T @ M.T, (T @ self.V)[:, self.j0]
        f = self.f
        self.s = Symbols(
            self.i0, f, h, float(f @ h), R[self.i0], f @ y, (f * h) @ y, self.V[:, self.j0], y, M
        )

    def outputs(self, flat):
        X = flat.reshape(self.d, self.n)
        S = X.T @ as_tensor(self.W).T @ X
        return torch.softmax(S, 1) @ (X.T @ as_tensor(self.V))

    def value(self, flat):
        return self.outputs(flat)[self.i0, self.j0]

    @cached_property
    def truth(self):
        """Blocks of the Hessian, (n, n, d, d)."""
        H = hessian(self.value, self.X.reshape(-1))
        return H.reshape(self.d, self.n, self.d, self.n).transpose(1, 3, 0, 2)

    def case(self, *change):
        """Return (printed, corrected, truth) of case 1, changed by these matrices."""
        corrected = self.s.block(self.i0, self.i0)
        return corrected + sum(change), corrected, self.truth[self.i0, self.i0]


E = Entry()


def both(a, b):
    return np.outer(a, b) + np.outer(b, a)


def case_one():
    """What each misprint adds to case 1."""
    s = E.s
    i0, f0, h0, W = E.i0, s.f[E.i0], s.h[E.i0], E.W
    wrong_z = W @ E.X @ s.f
    zz, wv = np.outer(s.z, s.z), both(s.w, s.v)
    row = E.V[E.j0]
    return {
        "UT-e8": 2 * s.s * f0 * both(s.w, wrong_z - s.z),
        "UT-e11": -s.s * zz,
        "UT-e12": s.s * f0 * zz,
        "UT-e13": f0 * (E.H[i0, i0] - h0) * (W + W.T),
        "UT-e14": s.s * f0 * (W.T - W) + s.s * f0 * (W + W.T),
        "UT-e15": 2 * f0 * np.outer(s.v, s.z),
        "UT-e16": f0 * both(s.w, row) - f0 * wv,
    }


@reproduces(*case_one())
def one_term_of_case_one(id):
    yield E.case(case_one()[id])


def case_two():
    """What each misprint adds to case 2, i2 = 3."""
    s, i2, W = E.s, 3, E.W
    f0, f2, h2 = s.f[E.i0], s.f[i2], s.h[i2]
    y0, y2 = s.y[E.i0], s.y[i2]
    return {
        "UT-e19": -f2 * h2 * f0 * np.outer(s.w, s.w),
        "UT-e20": (f2 - f0) * np.outer(s.z, s.v),
        "UT-e21": s.s * np.outer(f2 * y2 - f0 * y0, s.w),
        "UT-e22": s.s * (f2 * np.outer(y2, s.w) - f0 * np.outer(s.w, s.w)),
        "UT-e23": s.s * (f2 - f0) * W.T,
    }


@reproduces(*case_two())
def one_term_of_case_two(id):
    corrected = E.s.block(E.i0, 3)
    yield corrected + case_two()[id], corrected, E.truth[E.i0, 3]


@reproduces("UT-e24")
def all_terms():
    # J_8 is another print of the term E_8.
    yield E.case(*case_one().values())
    corrected = E.s.block(E.i0, 3)
    yield corrected + sum(v for k, v in case_two().items() if k != "UT-e22"), corrected, E.truth[E.i0, 3]


@reproduces("UT-e25")
def coefficient_of_case_four():
    s, k = E.s, 3
    corrected = s.block(k, k)
    yield corrected + s.f[k] ** 2 * s.h[k] * np.outer(s.w, s.w), corrected, E.truth[k, k]


@reproduces("UT-e26")
def case_three_is_transposed():
    yield E.s.block(E.i0, 3), E.s.block(3, E.i0), E.truth[3, E.i0]


def keys(flat):
    """z: ``W^T X f``."""
    X, W = flat.reshape(E.d, E.n), as_tensor(E.W)
    f = torch.softmax(X.T @ W @ X[:, E.i0], 0)
    return W.T @ X @ f


@reproduces("UT-e9")
def derivative_of_z():
    s, i2 = E.s, 3
    J = torch.autograd.functional.jacobian(keys, as_tensor(E.X.reshape(-1))).numpy().reshape(E.d, E.d, E.n)

    def form(k):
        return s.f[k] * (np.outer(s.y[k] - s.z, s.w) + E.W.T)

    yield form(E.i0), form(i2), J[:, :, i2]


@reproduces("UT-e10")
def leading_sign():
    """The derivative of the first term of ``dc/dx``, ``-s f_0 w``, in the query's own token."""
    s, f0 = E.s, E.s.f[E.i0]

    def first(flat):
        X, W = flat.reshape(E.d, E.n), as_tensor(E.W)
        f = torch.softmax(X.T @ W @ X[:, E.i0], 0)
        return -(f @ (X.T @ as_tensor(E.V[:, E.j0]))) * f[E.i0] * (W @ X[:, E.i0])

    J = torch.autograd.functional.jacobian(first, as_tensor(E.X.reshape(-1))).numpy().reshape(E.d, E.d, E.n)
    slope = f0 * ((s.h[E.i0] - s.s) * s.w + s.v) + s.g - s.s * s.z
    df = f0 * (s.w + s.y[E.i0] - f0 * s.w - s.z)
    rest = -s.s * np.outer(s.w, df) - s.s * f0 * E.W
    yield f0 * np.outer(s.w, slope) + rest, -f0 * np.outer(s.w, slope) + rest, J[:, :, E.i0]


@reproduces("UT-e4")
def convention():
    X, W = E.X, E.W
    u = np.exp(X.T @ W @ X[:, E.i0])
    truth = torch.exp(as_tensor(X[:, E.i0]) @ as_tensor(W.T) @ as_tensor(X)).numpy()
    yield np.exp(X.T @ W @ X)[E.i0], np.exp(X.T @ W.T @ X)[E.i0], truth
    assert error(u, truth) < RIGHT


# ---- derivatives in another token, i0 != i1


def of_another_token(value, i2):
    """Derivatives in token i2 of a function of the softmax of query i0, of the values and of W x_i0."""

    def entry(flat):
        X = flat.reshape(E.d, E.n)
        f = torch.softmax(X.T @ as_tensor(E.W) @ X[:, E.i0], 0)
        return value(f, X.T @ as_tensor(E.V[:, E.j0]), as_tensor(E.W) @ X[:, E.i0])

    J = torch.autograd.functional.jacobian(entry, as_tensor(E.X.reshape(-1)))
    return J.numpy().reshape(-1, E.d, E.n)[:, :, i2]


@reproduces("UT-e42", "UT-e43")
def sixth_part(id):
    s, i2 = E.s, 3
    i1 = i2 if id == "UT-e42" else 2
    f1, f2, w, v = s.f[i1], s.f[i2], s.w, s.v
    moved = f2 * (s.h[i2] - s.s) * w
    ww = np.outer(w, w)
    truth = of_another_token(lambda f, h, w: -(f @ h) * f[i1] * w, i2)
    if id == "UT-e42":
        last = s.s * (f1 - f2 * f1) * ww
        printed = -(moved + f1 * np.outer(w, f2 * v) - last)
        corrected = -f1 * np.outer(w, moved + f2 * v) - last
    else:
        last = s.s * f2 * f1 * ww
        printed = -(moved + f1 * np.outer(w, f2 * v) + last)
        corrected = -f1 * np.outer(w, moved + f2 * v) + last
    yield printed, corrected, truth


@reproduces("UT-e44")
def value_of_another_token():
    s, i1, i2 = E.s, 2, 3
    form = -s.f[i2] * s.f[i1] * s.h[i1] * s.w
    truth = of_another_token(lambda f, h, w: (f * h)[i1][None], i2)[0]
    # The left side as printed is another derivative.
    other = of_another_token(lambda f, h, w: (f * h)[E.i0][None], i2)[0]
    yield other, form, truth


@reproduces("UT-e50")
def middle_lines():
    s, i1, i2 = E.s, 2, 3
    ww = np.outer(s.w, s.w)
    truth = of_another_token(lambda f, h, w: f[i1] * w, i2)
    yield (s.f[i1] - s.f[i2] * s.f[i1]) * ww, -s.f[i2] * s.f[i1] * ww, truth


def recovery_loss(flat):
    return ((E.outputs(flat) - as_tensor(E.B)) ** 2).sum()


def residuals():
    flat = as_tensor(E.X.reshape(-1))
    c = (E.outputs(flat) - as_tensor(E.B)).reshape(-1).numpy()
    J = torch.autograd.functional.jacobian(lambda v: E.outputs(v).reshape(-1), flat).numpy()
    return c, J


@reproduces("UT-e6")
def factor_of_the_gradient():
    c, J = residuals()
    yield J.T @ c, 2 * J.T @ c, gradient(recovery_loss, E.X.reshape(-1))


@reproduces("UT-e7")
def factor_of_the_hessian():
    c, J = residuals()
    flat = as_tensor(E.X.reshape(-1))
    second = torch.autograd.functional.hessian(
        lambda v: (E.outputs(v).reshape(-1) * as_tensor(c)).sum(), flat
    ).numpy()
    yield J.T @ J + second, 2 * (J.T @ J + second), hessian(recovery_loss, E.X.reshape(-1))


@reproduces("UT-e38")
def the_regulariser_destroys_the_data():
    n, d = 6, 3
    rng = np.random.default_rng(0)
    X, W, V = rng.standard_normal((d, n)), 0.3 * rng.standard_normal((d, d)), rng.standard_normal((d, d))
    B = problems.LayerInversion(W, V, np.zeros((n, d))).output(X)
    R = max(np.linalg.norm(m, 2) for m in (X, W, V))
    for gamma, least, most in ((72 * n * d * R**8, 0.99, 1.0 + 1e-9), (0.0, 0.0, 1e-6)):
        result = minimize(problems.LayerInversion(W, V, B, gamma=2 * gamma), x0=X)
        assert least <= np.linalg.norm(result.x - X) / np.linalg.norm(X) <= most

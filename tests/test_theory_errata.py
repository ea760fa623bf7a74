"""Every erratum that is a computation: the printed form fails, the corrected one agrees with autodiff."""

import json
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import pytest
import torch
from autodiff import as_tensor

from attnfit import minimize, problems, theory
from attnfit.problems.inversion.cases import Symbols
from attnfit.theory import instances
from attnfit.theory.errata import errata_markdown

NUMERIC = [e.id for e in theory.errata() if e.numeric]
# The largest error of a correct formula, and the smallest of a wrong one.
RIGHT, WRONG = 1e-9, 1e-3
REPRODUCTIONS = {}


def reproduces(*ids):
    """Register a function that returns pairs (printed, corrected, truth), or None where it asserts itself."""

    def register(function):
        for id in ids:
            assert id not in REPRODUCTIONS
            REPRODUCTIONS[id] = function
        return function

    return register


def bound_errata(id, *bounds):
    """An erratum on bounds: counterexamples that break the printed form and not the corrected one."""

    def check():
        for bound in map(theory.table().__getitem__, bounds):
            found = bound.check(bound.counterexample())
            assert found.violated == ()
            assert not found.holds
            assert found.sharp_holds is not False

    reproduces(id)(check)


for id, bounds in {
    "RH-e3": ("RH-5.5", "RH-5.6"), "RH-e4": ("RH-10.3", "RH-10.6", "RH-11.2.1", "RH-11.2.2"),
    "RH-e7": ("RH-11.1",),
    "RH-e8": ("RH-9.5.1", "RH-9.5.2"), "RH-e10": ("RH-F4.3.7", "RH-F4.3.8-9"), "RH-e11": ("RH-8.3.1",
    "RH-8.3.2"),
    "RH-e12": ("RH-8.1.3",), "WS-e4": ("WS-5.5.1", "WS-7.5.1"), "WS-e9": ("WS-F3.2", "TT-F4.4"),
    "TT-e1": ("TT-10.3",), "TT-e2": ("TT-7.5", "TT-7.12"), "TT-e3": ("TT-6.6",), "TL-e6": ("TL-7.1",),
    "TL-e19": ("TL-D.1", "TL-5.1"), "TL-e20": ("TL-D.2.5", "TL-D.2.6", "TL-D.2.7"),
    "TL-e21": ("TL-D.2.8", "TL-D.2.9", "TL-D.2.10", "TL-D.2.11"), "TL-e26": ("TL-D.3.2",),
    "TL-e33": ("TL-6.6",),
    "UT-e29": ("UT-F.2.3",), "UT-e35": ("UT-H.1.step",), "UT-e39": ("UT-I.1",), "TL-e2": ("TL-5.2", "TL-E.7"),
}.items():  # fmt: skip
    bound_errata(id, *bounds)


def error(found, truth):
    found, truth = np.asarray(found, float), np.asarray(truth, float)
    return np.abs(found - truth).max() / np.abs(truth).max()


@pytest.mark.parametrize("id", NUMERIC)
def test_numeric_errata(id):
    function = REPRODUCTIONS[id]
    pairs = function(id) if function.__code__.co_argcount else function()
    for printed, corrected, truth in pairs or []:
        assert error(corrected, truth) < RIGHT
        assert error(printed, truth) > WRONG


def test_every_numeric_erratum_is_reproduced_and_no_other():
    assert sorted(REPRODUCTIONS) == sorted(NUMERIC)


def test_the_table_is_well_formed():
    rows = theory.errata()
    assert len({row.id for row in rows}) == len(rows) == 125
    assert {row.kind for row in rows} == {"matters", "proof", "misprint"}
    assert [row.paper for row in rows] == sorted((row.paper for row in rows), key=list(theory.PAPERS).index)
    assert all(row.place and row.printed and row.correct and row.evidence for row in rows)
    assert len(theory.errata("TL")) == 34
    assert theory.errata("WS")[0].title.startswith("The Closeness")
    assert errata_markdown().count("\n") == len(rows) + 1
    assert json.dumps([row.printed for row in rows])
    with pytest.raises(KeyError, match="there is no paper 'XX'"):
        theory.errata("XX")


# ---- softmax and rescaled regression

RNG = np.random.default_rng(3)
A, X = RNG.standard_normal((6, 3)), 0.5 * RNG.standard_normal(3)
TARGET = RNG.random(6)
TARGET = TARGET / TARGET.sum()


def gradient(function, x):
    point = as_tensor(x).requires_grad_()
    return torch.autograd.grad(function(point), point)[0].numpy()


def hessian(function, x):
    return torch.autograd.functional.hessian(function, as_tensor(x)).numpy()


def softmax_loss(x):
    return 0.5 * ((torch.softmax(as_tensor(A) @ x, 0) - as_tensor(TARGET)) ** 2).sum()


@reproduces("RH-e1")
def newton_sign():
    H = np.diag([1.0, 4.0])
    e = np.array([0.3, -0.2])
    # Of a quadratic, one step of the right sign is the answer.
    step = np.linalg.solve(H, H @ e)
    assert np.linalg.norm(e - step) < 1e-15
    assert np.linalg.norm(e + step) == pytest.approx(2 * np.linalg.norm(e))


@reproduces("RH-e2")
def low_rank_part():
    for name in ("cosh", "sinh"):
        u_of = {"cosh": torch.cosh, "sinh": torch.sinh}[name]
        z, b = A @ X, TARGET
        truth = hessian(lambda t, u=u_of: 0.5 * ((u(t) - u(t).sum() * as_tensor(TARGET)) ** 2).sum(), z)
        u, v = (np.cosh(z), np.sinh(z)) if name == "cosh" else (np.sinh(z), np.cosh(z))
        c = u - u.sum() * b
        diagonal = np.diag(v**2 + u * (c - c @ b))

        def low_rank(w, b=b):
            return -np.outer(w * b, w) - np.outer(w, w * b) + (b @ b) * np.outer(w, w)

        yield diagonal + low_rank(u), diagonal + low_rank(v), truth


@reproduces("RH-e5")
def sandwich_constant():
    i = instances.Regression([[4.0]], [-2.0], [0.7], [0.7])
    assert theory.check("RH-8.4.2", i).holds
    middle, _, high = 100.0 + i.l / 16.0, *theory.bounds.rescaled_hessian.Middle(i.weights.start).extremes
    assert 0.9 * (high + middle) > middle


@reproduces("RH-e20")
def shift_is_an_equality():
    check = theory.check("RH-10.2", instances.random("regression", 5, function="cosh"))
    assert check.ratio == pytest.approx(1.0, abs=1e-12)


@reproduces("WS-e1")
def softmax_gradient_sign():
    f = problems.Softmax(A, TARGET).predict(X)
    c = f - TARGET
    yield A.T @ (f * (c @ f) + f * c), A.T @ (f * c - f * (c @ f)), gradient(softmax_loss, X)


@reproduces("WS-e2")
def descent_sign():
    problem = problems.Softmax(A, TARGET)
    g, value = problem.gradient(X), problem.value(X)
    assert problem.value(X + 1e-2 * g) > value > problem.value(X - 1e-2 * g)


@reproduces("WS-e3")
def normaliser():
    M = A @ RNG.standard_normal((3, 3)) @ A.T
    rows = np.exp(M) / np.exp(M).sum(1, keepdims=True)
    printed = np.exp(M) / M.sum(1, keepdims=True)
    yield printed.sum(1), rows.sum(1), torch.softmax(as_tensor(M), 1).sum(1).numpy()


@reproduces("WS-e10")
def the_shifts_are_not_similar():
    cosines = []
    for seed in range(200):
        rng = np.random.default_rng(seed)
        n, d = 12, 4
        A = rng.standard_normal((n, d)) / np.sqrt(d)
        b = np.exp(rng.standard_normal(n))
        problem = problems.Softmax(A, b / b.sum())
        x = rng.standard_normal(d)
        f = problem.predict(x)
        s, _ = problem.data_gradient(x)
        moves = [f * (dz - f @ dz) for dz in (A @ (A.T @ s), s)]
        cosines.append(moves[0] @ moves[1] / np.prod([np.linalg.norm(m) for m in moves]))
    # Both shifts satisfy the same bound.
    assert 0.8 < np.median(cosines) < 0.9
    assert min(cosines) < 0.4


# ---- attention regression


@reproduces("TT-e4")
def sum_of_squares():
    rows = np.ones((4, 1))
    assert (rows.sum() ** 2) / (rows**2).sum() == len(rows)


def attention(loss):
    A1, A2 = RNG.standard_normal((3, 2)), RNG.standard_normal((4, 2))
    B = RNG.random((3, 4))
    return (
        problems.Attention(A1, A2, B / B.sum(1, keepdims=True), loss),
        A1,
        A2,
        0.3 * RNG.standard_normal((2, 2)),
    )


@reproduces("TT-e6")
def gradient_in_the_data():
    problem, A1, A2, X = attention("squared")
    stacked, b = np.kron(A1, A2), np.asarray(problem.b).reshape(3, 4)

    def loss(rows):
        f = torch.softmax((rows @ as_tensor(X.reshape(-1))).reshape(3, 4), 1)
        return 0.5 * ((f - as_tensor(b)) ** 2).sum()

    truth = gradient(loss, stacked)
    f = problem.predict(X)
    S = f * ((f - b) - (f * (f - b)).sum(1, keepdims=True))
    # The printed one is the gradient in x, of another shape: spread over the rows it is no gradient in A.
    printed = np.broadcast_to(problem.gradient(X).reshape(-1), truth.shape)
    yield printed, np.outer(S.reshape(-1), X.reshape(-1)), truth


@reproduces("TT-e7")
def entropy_gradient():
    problem, A1, A2, X = attention("entropy")

    def loss(flat):
        h = torch.log_softmax(as_tensor(A1) @ flat.reshape(2, 2) @ as_tensor(A2).T, 1)
        return -(h.exp() * h).sum()

    f = problem.predict(X)
    h = np.log(f)
    S = -f * (h - (f * h).sum(1, keepdims=True))
    value = np.full(4, -(f * h).sum())
    yield value, (A1.T @ S @ A2).reshape(-1), gradient(loss, X.reshape(-1))
    # The last two terms of the printed derivative.
    for i, j in np.ndindex(2, 2):
        column = A1[:, i : i + 1] * A2[:, j]
        mean = (f * column).sum(1, keepdims=True)
        assert np.abs((f * (column - mean)).sum()) < 1e-14


@reproduces("TT-e10")
def kronecker():
    A1, A2, X = (RNG.standard_normal((3, 3)) for _ in range(3))
    truth = (A1 @ X @ A2.T).reshape(-1)
    yield np.kron(A1, A2.T) @ X.reshape(-1), np.kron(A1, A2) @ X.reshape(-1), truth


# ---- a softmax and a layer; square matrices, so that the printed products exist


@dataclass
class Middle:
    """B of a random square instance, the twelve corrected parts and the printed ones."""

    n: int = 4
    rng: np.random.Generator = field(default_factory=lambda: np.random.default_rng(8))

    def __post_init__(self):
        n, rng = self.n, self.rng
        self.A1, self.A2 = rng.standard_normal((n, 3)), rng.standard_normal((n, n))
        self.b, self.x = rng.standard_normal(n), rng.standard_normal(3)
        i = instances.TwoLayer(self.A1, self.A2, self.b, self.x, self.x)
        self.at = i.start

    def loss(self, z):
        y = as_tensor(self.A2) @ torch.softmax(z, 0)
        return 0.5 * ((torch.tanh(y) - as_tensor(self.b)) ** 2).sum()

    @cached_property
    def truth(self):
        return hessian(self.loss, self.A1 @ self.x)

    @cached_property
    def parts(self):
        f, q, Q2, A2 = self.at.f, self.at.q, self.at.Q2, self.A2
        D, ff, G = np.diag(f), np.outer(f, f), Q2.T @ Q2
        H = A2.T @ np.diag(self.at.d2h * self.at.c) @ A2
        mixed = np.outer(f, f * q)
        return {
            1: D @ G @ D, 2: -D @ G @ ff, 3: -ff @ G @ D, 4: ff @ G @ ff, 5: 2 * (f @ q) * ff,
            6: -(mixed + mixed.T),
            7: np.diag(f * q), 8: D @ H @ D, 9: -D @ H @ ff, 10: -ff @ H @ D, 11: ff @ H @ ff,
            12: -(f @ q) * D,
        }  # fmt: skip

    @cached_property
    def printed(self):
        f, q, Q2, A2 = self.at.f, self.at.q, self.at.Q2, self.A2
        D, ff = np.diag(f), np.outer(f, f)
        once = A2 @ np.diag(self.at.d2h * self.at.c)
        return {
            2: -self.parts[2], 3: -self.parts[3], 4: np.broadcast_to(f @ Q2.T @ Q2 @ ff, ff.shape),
            6: 2 * np.outer(f, f * q), 8: D @ once @ D, 9: D @ once * (f @ f), 10: (f @ f) * once @ D,
            11: (f @ f) * once * (f @ f), 12: np.diag(ff @ q),
        }  # fmt: skip

    def with_printed(self, *numbers):
        return sum({**self.parts, **{k: self.printed[k] for k in numbers}}.values())


MIDDLE = Middle()
PART = {
    "TL-e7": [2, 3],
    "TL-e8": [4],
    "TL-e9": [6],
    "TL-e10": [8],
    "TL-e11": [9, 10],
    "TL-e12": [11],
    "TL-e13": [12],
}


@reproduces(*PART)
def one_part(id):
    for number in PART[id]:
        yield MIDDLE.with_printed(number), MIDDLE.with_printed(), MIDDLE.truth


@reproduces("TL-e14")
def all_parts():
    yield MIDDLE.with_printed(*MIDDLE.printed), MIDDLE.with_printed(), MIDDLE.truth


@reproduces("TL-e3")
def two_layer_gradient():
    f, q, fq = MIDDLE.at.f, MIDDLE.at.q, MIDDLE.at.fq
    truth = gradient(lambda x: MIDDLE.loss(as_tensor(MIDDLE.A1) @ x), MIDDLE.x)
    for sign in (1.0, -1.0):
        yield sign * MIDDLE.A1.T @ (f * fq + f * q), MIDDLE.A1.T @ (f * q - f * fq), truth


@reproduces("TL-e15")
def fifth_term():
    A1, truth = MIDDLE.A1, MIDDLE.A1.T @ MIDDLE.truth @ MIDDLE.A1
    entries = MIDDLE.at.entries
    mixed = np.outer(MIDDLE.at.f @ A1, (MIDDLE.at.f * MIDDLE.at.q) @ A1)
    printed = sum(entries) - entries[3] - 2 * mixed
    assert np.abs(printed - printed.T).max() > 1e-3
    yield printed, sum(entries), truth


@reproduces("TL-e16")
def third_part():
    entries, truth = MIDDLE.at.entries, MIDDLE.A1.T @ MIDDLE.truth @ MIDDLE.A1
    yield sum(entries) - entries[1], sum(entries), truth


@reproduces("TL-e17")
def derivative_of_the_softmax():
    A1, f = as_tensor(MIDDLE.A1), MIDDLE.at.f
    truth = torch.autograd.functional.jacobian(
        lambda x: torch.softmax(A1 @ x, 0), as_tensor(MIDDLE.x)
    ).numpy()
    mean = np.outer(f, f @ MIDDLE.A1)
    yield f[:, None] * MIDDLE.A1 + mean, f[:, None] * MIDDLE.A1 - mean, truth


# ---- recovery


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

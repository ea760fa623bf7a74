"""Every erratum that is a computation: the printed form fails, the corrected one agrees with autodiff."""

import dataclasses
import json
from dataclasses import dataclass, field
from functools import cached_property

import errata_of_recovery  # noqa: F401, registers what it reproduces
import errata_of_steps  # noqa: F401
import numpy as np
import pytest
import torch
from autodiff import as_tensor
from errata_shown import REPRODUCTIONS, RIGHT, WRONG, error, gradient, hessian, reproduces

from attnfit import problems, theory
from attnfit.theory import instances
from attnfit.theory.errata import errata_markdown

NUMERIC = [e.id for e in theory.errata() if e.numeric]


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
    "RH-e8": ("RH-9.5.1", "RH-9.5.2"), "RH-e10": ("RH-F4.3.7", "RH-F4.3.8-9"), "RH-e11": ("RH-8.3.1",
    "RH-8.3.2"),
    "RH-e12": ("RH-8.1.3",), "WS-e9": ("WS-F3.2", "TT-F4.4"),
    "TT-e1": ("TT-10.3",), "TT-e2": ("TT-7.5", "TT-7.12"), "TT-e3": ("TT-6.6",),
    "TL-e19": ("TL-D.1", "TL-5.1"), "TL-e20": ("TL-D.2.5", "TL-D.2.6", "TL-D.2.7"),
    "TL-e26": ("TL-D.3.2",),
    "TL-e33": ("TL-6.6",),
    "UT-e29": ("UT-F.2.3",), "UT-e35": ("UT-H.1.step",), "UT-e39": ("UT-I.1",), "TL-e2": ("TL-5.2", "TL-E.7"),
}.items():  # fmt: skip
    bound_errata(id, *bounds)


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
    assert len({row.id for row in rows}) == len(rows) == 154
    assert {row.kind for row in rows} == {"matters", "proof", "misprint"}
    assert [row.paper for row in rows] == sorted((row.paper for row in rows), key=list(theory.PAPERS).index)
    assert all(row.place and row.printed and row.correct and row.evidence for row in rows)
    assert len(theory.errata("TL")) == 38
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


@reproduces("WS-e4")
def first_part_of_the_shift():
    step = 1e-3
    for moved in ({}, {"A_moved": [[4.0 - step]]}):
        id = "WS-7.5.1" if moved else "WS-5.5.1"
        one = instances.Regression([[4.0]], [0.0], [4.0], [4.0 - step], R=4.0, **moved)
        assert theory.check(id, one).holds
        assert theory.check(id, one).ratio < 1 / 16
        above = theory.check(id, dataclasses.replace(one, beta=np.exp(4.0 * (4.0 - step))))
        assert above.ratio == pytest.approx(2.0, rel=1e-2)
        assert any("is not in (0, 1)" in text for text in above.violated)


@reproduces("TL-e6")
def steps_to_either_base():
    assert 0.4 ** (np.log(1e6) + 1) == pytest.approx(1.27e-6, rel=1e-2)
    assert 0.4 ** (np.log2(1e6) + 1) < 1e-6
    assert 0.4 ** np.ceil(np.log(1e6) / np.log(2.5)) <= 1e-6


@reproduces("RH-e7")
def steps_and_the_condition_number():
    assert 1e6 * 0.4 ** np.log(1e6) == pytest.approx(3.18, rel=1e-2)
    assert 1e6 * 0.4 ** np.log2(1e6) == pytest.approx(0.0117, rel=1e-2)
    # A right rate in the norm of H leaves sqrt(cond) in the Euclidean one.
    ill = theory.check("RH-5.6", theory.table()["RH-5.6"].counterexample())
    assert ill.ratio > 10 and ill.sharp_holds


@reproduces("TL-e21")
def parts_with_the_outer_matrix_once_and_twice():
    for k in (8, 9, 10, 11):
        bound = theory.table()[f"TL-D.2.{k}"]
        found = bound.check(bound.corrected.counterexample())
        assert found.violated == ()
        assert found.holds and found.ratio == pytest.approx(1.0, abs=1e-3)
        assert found.corrected_ratio == pytest.approx(4.0, rel=1e-3)
        assert found.sharp_holds


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

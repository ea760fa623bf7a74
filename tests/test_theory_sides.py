"""Sides of the bounds: right ones against the printed formulas, left ones against autodiff."""

import dataclasses
import re

import numpy as np
import pytest
import torch
from autodiff import as_tensor

from attnfit import problems, theory
from attnfit.theory import instances, spectra
from attnfit.theory.instances.sampling import KINDS

TABLE = list(theory.table())
KIND_OF = {bound.id: KINDS[bound.kind] for bound in TABLE}

# ---- right sides against the printed formulas

SYMBOLS = [
    ("|A_[j] - A'_[j]|", "moved"), ("|A - A'|_{inf,2}", "moved"), ("|A - A'|", "moved"), ("|x - y|", "step"),
    ("|X - Y|_F", "step"),
]  # fmt: skip


def reading(formula):
    """The right side of a formula as a Python expression, None where it has other symbols."""
    text = formula.split(" <= ")[-1]
    for symbol, name in SYMBOLS:
        text = text.replace(symbol, name)
    text = re.sub(r"e\^\{([^}]*)\}", r"exp(\1)", text).replace("^", "**")
    tokens = re.findall(r"[A-Za-z]\w*|\d+(?:\.\d+)?|\*\*-?|[-+/()]|\S", text)
    known = {"n", "d", "R", "beta", "R_h", "L_h", "R_f", "moved", "step", "exp", "sqrt"}
    if any((re.match(r"[A-Za-z]", t) and t not in known) or not re.match(r"[\w*+/()-]", t) for t in tokens):
        return None
    out = []
    for before, token in zip(["+", *tokens], tokens, strict=False):
        operand = re.match(r"\w|\(", token) and re.match(r"\w|\)", before) and before not in ("exp", "sqrt")
        out.append("*" + token if operand else token)
    return "".join(out)


READABLE = [
    b for b in TABLE if reading(b.formula) and KIND_OF[b.id] in ("regression", "two_layer", "recovery")
]


def test_most_formulas_can_be_read():
    assert len(READABLE) > 90
    assert reading("|f| <= 4 beta^-2 n^1.5 R e^{2R^2} |x - y|") == "4*beta**-2*n**1.5*R*exp(2*R**2)*step"


@pytest.mark.parametrize("bound", READABLE, ids=lambda b: b.id)
def test_right_sides_are_those_of_the_formulas(bound):
    kind = KIND_OF[bound.id]
    i = instances.random(kind, 3, n=5, d=3, R={"recovery": 1.4}.get(kind, 4.01))
    values = {"n": i.n, "d": i.d if kind != "two_layer" else None, "R": i.R, "exp": np.exp, "sqrt": np.sqrt}
    if kind == "regression":
        which = "A" if "A'" in bound.formula else "x"
        largest = 0.9999 if bound.id.startswith(("WS-5.5", "WS-7.5")) else np.inf
        values |= {
            "beta": min(np.exp(i.log_beta(which).min()), largest), "moved": i.data.size.max(),
            "step": i.weights.size[0],
        }  # fmt: skip
    elif kind == "two_layer":
        values |= {"beta": np.exp(i.log_beta), "R_h": i.size, "L_h": i.lipschitz, "step": i.move.size[0]}
        if bound.id in ("TL-E.3.7", "TL-E.3.8", "TL-E.5", "TL-E.6"):
            values["R_h"] = max(i.size, 1.0)
        if bound.id == "TL-E.5":
            values["L_h"] = max(i.slopes)
        values["R_f"] = 2 * i.n * i.R * np.exp(2 * i.R**2) / values["beta"] ** 2
    else:
        values["step"] = i.distance
    expected = eval(reading(bound.formula), {}, values)
    assert bound.log10_rhs(i) == pytest.approx(np.log10(float(expected)), abs=1e-9)


# ---- the left sides against autodiff


def test_sharp_forms_are_attained():
    A = np.array([[4.0], [-4.0]])
    two = instances.Regression(A, [0.5, 0.5], [0.0], [1e-3], R=4.0)
    # Two equal shares move by half of what their logits do.
    assert theory.check("WS-5.5.3", two).sharp_ratio == pytest.approx(1.0, rel=1e-5)
    assert theory.check("TT-10.3", theory.table()["TT-10.3"].counterexample()).sharp_ratio == pytest.approx(
        1.0, rel=0.01
    )


@pytest.mark.parametrize("loss", ["squared", "dot", "entropy", "rescaled"])
def test_changes_of_losses_and_gradients(loss):
    numbers = {"squared": "8", "rescaled": "9", "dot": "11", "entropy": "12"}[loss]
    i = instances.random("regression", 7, n=6, groups=2, R=1.0)

    def value(A, x):
        z, b = as_tensor(A) @ x, as_tensor(i.b)
        h = torch.log_softmax(z, 1)
        f = h.exp()
        u = z.exp()
        return {
            "squared": lambda: 0.5 * ((f - b) ** 2).sum(), "dot": lambda: -(f * b).sum(),
            "entropy": lambda: -(f * h).sum(),
            "rescaled": lambda: 0.5 * ((u - u.sum(1, keepdim=True) * b) ** 2).sum(),
        }[loss]()  # fmt: skip

    def both(A, x):
        point = as_tensor(x).requires_grad_()
        out = value(A, point)
        return float(out.detach()), torch.autograd.grad(out, point)[0].numpy()

    start = both(i.A, i.x)
    for which, end in (("x", both(i.A, i.y)), ("A", both(i.A_moved, i.x))):
        first = {"x": 1, "A": 2}[which]
        table = theory.table()
        assert table[f"TT-{numbers}.{first}"].lhs(i) == pytest.approx(abs(end[0] - start[0]), rel=1e-8)
        expected = np.linalg.norm(end[1] - start[1])
        assert table[f"TT-{numbers}.{first + 2}"].lhs(i) == pytest.approx(expected, rel=1e-8)


@pytest.mark.parametrize("function", ["exp", "cosh", "sinh"])
def test_the_rescaled_hessian_and_its_parts(function):
    i = instances.random("regression", 11, n=5, R=1.5, function=function, scale=0.8)
    u = {"exp": torch.exp, "cosh": torch.cosh, "sinh": torch.sinh}[function]
    A, b = as_tensor(i.A[0]), as_tensor(i.b[0])

    def loss(z):
        return 0.5 * ((u(z) - u(z).sum() * b) ** 2).sum()

    def hessian(x):
        return torch.autograd.functional.hessian(loss, A @ as_tensor(x)).numpy()

    before, after = hessian(i.x), hessian(i.y)
    change = np.linalg.norm(i.A[0].T @ (after - before) @ i.A[0], 2)
    assert theory.table()["RH-9.1"].lhs(i) == pytest.approx(change, rel=1e-7)
    assert theory.table()["RH-8.3.6"].lhs(i) == pytest.approx(np.linalg.norm(before, 2), rel=1e-10)
    s, e = i.weights.start, i.weights.end
    v, w, c, uu, bb = s.v[0], e.v[0], s.c[0], s.u[0], i.b[0]
    assert theory.table()["RH-9.6"].lhs(i) == pytest.approx(
        np.linalg.norm(np.outer(w, w * bb) - np.outer(v, v * bb), 2), rel=1e-6
    )
    assert theory.table()["RH-9.8"].lhs(i) == pytest.approx(
        (bb @ bb) * np.linalg.norm(np.outer(w, w) - np.outer(v, v), 2), rel=1e-6
    )
    G4 = np.abs(w**2 + e.c[0] * e.u[0] - v**2 - c * uu).max()
    assert theory.table()["RH-9.9"].lhs(i) == pytest.approx(G4, rel=1e-6)
    w2 = theory.table()["RH-8.3.6"].rhs(i) + i.l / i.smallest_singular_values[0] ** 2
    smallest = np.linalg.eigvalsh(i.A[0].T @ (before + w2 * np.eye(5)) @ i.A[0])[0]
    assert theory.table()["RH-8.4.1"].rhs(i) == pytest.approx(smallest, rel=1e-6)


def test_the_two_layer_hessian_and_its_parts():
    i = instances.random("two_layer", 3, n=5, d=3, m=2, R=4.0)
    A1, A2, b = as_tensor(i.A1), as_tensor(i.A2), as_tensor(i.b)

    def loss(z):
        return 0.5 * ((torch.tanh(A2 @ torch.softmax(z, 0)) - b) ** 2).sum()

    def hessian(x):
        return torch.autograd.functional.hessian(loss, A1 @ as_tensor(x)).numpy()

    B, C = hessian(i.x), hessian(i.y)
    table = theory.table()
    corrected = np.exp(float(table["TL-D.1"].corrected.log_lhs(i)))
    assert corrected == pytest.approx(np.linalg.norm(B, 2), rel=1e-10)
    assert table["NEW-TL-5"].lhs(i) == pytest.approx(max(-np.linalg.eigvalsh(B)[0], 0.0), rel=1e-8)
    assert table["TL-E.5"].lhs(i) == pytest.approx(np.linalg.norm(i.A1.T @ (C - B) @ i.A1, 2), rel=1e-6)
    entries = sum(i.start.entries)
    assert np.allclose(entries, i.A1.T @ B @ i.A1, rtol=1e-10, atol=1e-10)
    gradient = torch.autograd.functional.jacobian(loss, A1 @ as_tensor(i.x)).numpy()
    assert np.allclose(i.start.a, gradient, rtol=1e-11, atol=1e-13)
    q, direction = as_tensor(i.start.q), as_tensor(i.move.dz[0])
    t = torch.zeros((), dtype=torch.float64, requires_grad=True)
    value = q @ torch.softmax(A1 @ as_tensor(i.x) + t * direction, 0)
    for _ in range(3):
        value = torch.autograd.grad(value, t, create_graph=True)[0]
    assert table["NEW-TL-3"].lhs(i) == pytest.approx(abs(float(value.detach())), rel=1e-8)


def test_the_layer_and_its_derivatives():
    i = instances.random("recovery", 2, n=4, d=2, R=1.5)
    W, V, B = as_tensor(i.W), as_tensor(i.V), as_tensor(i.B)

    def residual(X):
        return torch.softmax(X.T @ W @ X, 1) @ (X.T @ V) - B

    def loss(flat):
        return (residual(flat.reshape(i.X.shape)) ** 2).sum()

    def entry(flat):
        return residual(flat.reshape(i.X.shape))[i.i0, i.j0]

    X, Y = as_tensor(i.X).reshape(-1), as_tensor(i.Y).reshape(-1)
    jacobian, hessian = torch.autograd.functional.jacobian, torch.autograd.functional.hessian
    table = theory.table()
    J = jacobian(lambda v: residual(v.reshape(i.X.shape)).reshape(-1), X).numpy()
    assert table["NEW-UT-3"].lhs(i) == pytest.approx(np.linalg.norm(J, 2), rel=1e-9)
    assert table["UT-H.1"].lhs(i) == pytest.approx(np.linalg.norm(hessian(entry, X).numpy(), 2), rel=1e-9)
    before, after = hessian(loss, X).numpy(), hessian(loss, Y).numpy()
    assert table["UT-H.2"].lhs(i) == pytest.approx(max(-np.linalg.eigvalsh(before)[0], 0.0), rel=1e-8)
    assert table["UT-G.12"].lhs(i) == pytest.approx(np.linalg.norm(after - before, 2), rel=1e-6)
    slope = (jacobian(loss, Y) - jacobian(loss, X)).numpy()
    assert table["UT-G.11"].lhs(i) == pytest.approx(np.linalg.norm(slope), rel=1e-8)
    assert table["UT-F.4.2"].lhs(i) == pytest.approx(np.linalg.norm(jacobian(entry, X).numpy()), rel=1e-10)
    F = jacobian(
        lambda v: torch.softmax(v.reshape(i.X.shape).T @ W @ v.reshape(i.X.shape), 1)[i.i0], X
    ).numpy()
    assert table["UT-F.3.2"].lhs(i) == pytest.approx(np.linalg.norm(F), rel=1e-10)
    assert table["UT-F.3.1"].lhs(i) == pytest.approx(np.linalg.norm(F, axis=0).max(), rel=1e-10)
    blocks = hessian(entry, X).numpy().reshape(2, 4, 2, 4)
    largest = max(np.linalg.norm(blocks[:, k, :, k], 2) for k in range(4) if k != i.i0)
    assert table["UT-F.5.4"].lhs(i) == pytest.approx(largest, rel=1e-9)


def test_a_few_queries_stand_for_a_long_input():
    whole = instances.random("recovery", 0, n=6, d=2)
    some = dataclasses.replace(whole, queries=[1, 4])
    X = as_tensor(whole.X).reshape(-1)

    def loss(flat):
        T = flat.reshape(whole.X.shape)
        C = torch.softmax(T.T @ as_tensor(whole.W) @ T, 1) @ (T.T @ as_tensor(whole.V)) - as_tensor(whole.B)
        return (C[[1, 4]] ** 2).sum()

    exact = torch.autograd.functional.hessian(loss, X).numpy()
    assert theory.table()["UT-H.2"].lhs(some) == pytest.approx(
        max(-np.linalg.eigvalsh(exact)[0], 0.0), rel=1e-8
    )
    assert len(instances.random("recovery", 0, n=100, d=2).queries) == 2


def test_spectra_of_large_operators():
    rng = np.random.default_rng(0)
    n = 500
    for diagonal, U, core in (
        (rng.standard_normal(n), rng.standard_normal((n, 3)), np.diag([1.0, -1.0, 2.0])),
        (np.zeros(n), rng.standard_normal((n, 2)), np.eye(2)),
        (
            1e-3 * rng.standard_normal(n),
            0.1 * rng.standard_normal((n, 2)),
            np.array([[0.0, -1.0], [-1.0, 0.0]]),
        ),
        (np.zeros(n), np.zeros((n, 1)), np.eye(1)),
        (np.ones(n), np.zeros((n, 1)), np.eye(1)),
    ):
        exact = np.linalg.eigvalsh(np.diag(diagonal) + U @ core @ U.T)[[0, -1]]
        found = spectra.extreme_eigenvalues(diagonal, U, core)
        assert np.abs(np.array(found) - exact).max() <= 1e-4 * max(np.abs(exact).max(), 1e-300)


def test_the_default_move_of_the_data_acts_like_that_of_x():
    i = instances.random("regression", 1, groups=2)
    default = dataclasses.replace(i, A_moved=None)
    assert np.allclose(default.moved_rows @ i.x, i.A @ i.y, rtol=1e-12)
    assert np.allclose(default.data.size, np.linalg.norm(default.moved_rows - i.A, 2, axis=(1, 2)), rtol=1e-9)
    given = dataclasses.replace(i, A_moved=default.moved_rows)
    for id in ("TT-8.4", "TT-10.4", "WS-8.2", "RH-11.2.2", "TT-7.8"):
        assert theory.check(id, default).log10_lhs == pytest.approx(
            theory.check(id, given).log10_lhs, abs=1e-6
        )


def test_padding_changes_nothing():
    i = instances.random("regression", 4, n=6, groups=2, function="cosh")
    A = np.concatenate([i.A, np.full((2, 2, 2), 7.0)], axis=1)
    padded = instances.Regression(
        A * np.r_[1, 1, 1, 0, 0][None, :, None], np.concatenate([i.b, np.zeros((2, 2))], axis=1), i.x, i.y,
        R=i.R,
        function="cosh", mask=np.array([[True] * 3 + [False] * 2] * 2),
    )  # fmt: skip
    plain = dataclasses.replace(i, A_moved=None)
    for bound in TABLE:
        if KIND_OF[bound.id] == "regression":
            a, b = bound.check(plain), bound.check(padded)
            assert a.log10_lhs == pytest.approx(b.log10_lhs, abs=1e-9), bound.id
            assert a.log10_rhs == pytest.approx(b.log10_rhs, abs=1e-9), bound.id


def test_problems_still_agree():
    # The instances' own derivatives are those of the problems.
    i = instances.random("two_layer", 5, n=6, d=2, m=3)
    problem = problems.TwoLayer(i.A1, i.A2, i.b, "tanh")
    assert np.allclose(i.start.between(i.A1), problem.hessian(i.x), rtol=1e-10, atol=1e-12)
    layer = instances.random("recovery", 5, n=5, d=2)
    inversion = problems.LayerInversion(layer.W, layer.V, layer.B)
    assert np.allclose(layer.start.loss_gradient().T, 2 * inversion.gradient(layer.X), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("short", "formal"),
    [
        ("TT-2.1", "TT-14.5.1"), ("TT-2.2", "TT-13.5.1"), ("TL-5.1", "TL-D.1"), ("UT-4.3", "UT-I.2"),
        ("UT-4.4", "UT-I.3"),
    ],
)  # fmt: skip
def test_statements_of_the_main_text_are_those_of_their_formal_versions(short, formal):
    """The papers' headings: "normalised version" in 2.1 and 14, "rescaled version" in 2.2 and 13 of TT."""
    kind = KIND_OF[formal]
    options = {"m": 3} if kind == "two_layer" else {}
    for seed in range(3):
        instance = instances.random(kind, seed, n=3, **options)
        found, truth = (theory.check(id, instance) for id in (short, formal))
        assert (found.log10_lhs, found.log10_rhs) == (truth.log10_lhs, truth.log10_rhs)
    assert theory.table()[short].models == theory.table()[formal].models

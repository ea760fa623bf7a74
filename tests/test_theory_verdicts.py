"""Verdicts that cannot be wrong: every assumption is data, and what says nothing is not called true."""

import dataclasses
import importlib

import mpmath
import numpy as np
import pytest
import torch
from autodiff import as_tensor

from attnfit import problems, theory
from attnfit.theory import instances
from attnfit.theory.bounds import algorithms, two_layer
from attnfit.theory.instances.sampling import Layered, Regressions, Wave

TABLE = list(theory.table())
OF = theory.table()
COUNTEREXAMPLES = [
    pytest.param(bound, make, id=f"{bound.id} {name}")
    for bound in TABLE
    for name, make in (
        ("printed", bound.counterexample), ("corrected", bound.corrected and bound.corrected.counterexample)
    )
    if make
]  # fmt: skip


def test_counts():
    """206 bounds: ten of this library, 195 statements of the papers and one step of a proof."""
    own = [b for b in TABLE if b.id.startswith("NEW")]
    steps = [b for b in TABLE if b.id.endswith(".step")]
    assert (len(TABLE), len(own), len(steps)) == (206, 10, 1)
    failing = [b for b in TABLE if b.status == "fails"]
    assert len(failing) == 36
    assert len([b for b in failing if b not in steps]) == 35
    assert all((b.status == "fails") == (b.counterexample is not None) for b in TABLE)


def test_which_fail():
    """Proven one by one by the counterexamples; WS-5.5.1, WS-7.5.1 and TL-D.2.8 to .11 hold as printed."""
    assert {b.id for b in TABLE if b.status == "fails"} == {
        "WS-F3.2", "TT-F4.4", "RH-8.1.3", "RH-10.3", "RH-10.6", "RH-11.2.1", "RH-11.2.2", "RH-8.3.1",
        "RH-8.3.2", "RH-9.5.1", "RH-9.5.2", "RH-5.5", "TL-6.6", "RH-5.6", "TL-6.7", "RH-11.1", "RH-1.5",
        "RH-F4.3.7", "RH-F4.3.8-9", "TT-6.6", "TT-7.5", "TT-7.12", "TT-10.3", "TL-D.2.5", "TL-D.2.6",
        "TL-D.2.7", "TL-D.1", "TL-5.1", "TL-D.3.1", "TL-D.3.2", "TL-E.7", "TL-5.2", "TL-7.1", "UT-F.2.3",
        "UT-I.1", "UT-H.1.step",
    }  # fmt: skip


@pytest.mark.parametrize(("bound", "make"), COUNTEREXAMPLES)
def test_counterexamples_meet_every_assumption(bound, make):
    found = bound.check(make())
    assert found.violated == ()
    printed = make is bound.counterexample
    assert found.verdict == "fails" if printed else found.corrected_holds is False
    assert (found.ratio if printed else found.corrected_ratio) > 1.01


@pytest.mark.parametrize("bound", TABLE, ids=lambda b: b.id)
def test_search_stays_among_points_that_meet_the_assumptions(bound):
    found = theory.search(bound.id, budget=40)
    assert found.check.violated == ()
    assert found.check.tested
    assert found.check.holds == (bound.status == "holds")
    assert bound.check(found.instance).violated == ()


def test_a_search_that_finds_nothing_says_so(monkeypatch):
    never = theory.bound.Condition("never", lambda i, R: "violated")
    closed = dataclasses.replace(OF["WS-8.1"], assumptions=(never,))
    monkeypatch.setattr(importlib.import_module("attnfit.theory.search"), "table", lambda: {"WS-8.1": closed})
    with pytest.raises(ValueError, match="none of 12 instances meets the assumptions of WS-8"):
        theory.search("WS-8.1", 30)


# ---- each assumption can be violated, and is named


def layers(**changes):
    return dataclasses.replace(instances.random("two_layer", 3, n=4, m=4), **changes)


@pytest.mark.parametrize(
    ("id", "instance", "text"),
    [
        ("WS-5.5.1", instances.Regression([[1.0]], [0.0], [0.1], [0.1], beta=1.5), "beta = 1.5 is not in"),
        ("WS-7.5.3", instances.Regression([[1.0]], [0.0], [0.1], [0.1], beta=1.0), "beta = 1 is not in"),
        ("TL-D.2.5", layers(b=[1.0, -0.5, 0.0, 0.0]), "b[1] = -0.5 is negative"),
        ("TL-D.1", layers(b=[0.0, 0.0, 0.0, -1.0]), "b[3] = -1 is negative"),
        ("TL-7.1", layers(b=[-2.0, 0.0, 0.0, 0.0]), "b[0] = -2 is negative"),
        ("TL-D.2.8", instances.random("two_layer", 0, n=4, m=2), "m = 2, n = 4: with A2 once"),
        ("TL-5.1", instances.random("two_layer", 0, n=4, m=2), "m = 2, n = 4: with A2 once"),
        ("TL-E.7", layers(L_h=0.7), "sup |h'| = 1 exceeds L_h = 0.7"),
        ("TL-5.2", layers(L_h=0.9, activation="softplus"), "sup |h'| = 1 exceeds L_h = 0.9"),
        ("TL-E.5", layers(L_h=1.0), "sup |third derivative of h| = 2 exceeds L_h = 1"),
        ("TL-E.5", layers(R_h=0.5), "R_h = 0.5 is below 1"),
        ("TL-E.3.8", layers(R_h=0.5), "R_h = 0.5 is below 1"),
        ("RH-5.5", instances.Step(np.eye(1), [1.0], [[0.1]]), "eps0 = 0.1, not < 0.1"),
        ("RH-5.6", instances.Step(np.eye(1), [1.0], [[0.02]]), "eps0 = 0.02, not <= 0.01"),
        ("TL-6.7", instances.Step(np.eye(1), [1.0], previous=2.0), "exceeds 0.4 times the distance before"),
        ("UT-I.1", instances.Step(np.eye(1), [1.0], t=1.0), "t = 1 is not below 1"),
        ("RH-11.1", instances.Regression([[1.0, 1.0]], [0.0], [0.1, 0.0], [0.1, 0.1]), "smallest singular"),
        ("RH-1.5", instances.Regression(np.eye(2), [9.0, 0.0], [0.0, 0.0], [0.1, 0.1], R=4.0), "|b| = 9"),
        ("RH-1.5", instances.random("regression", 0, R=6.0), "leaves double precision"),
        ("TL-7.1", instances.random("two_layer", 0, R=14.0), "leaves double precision"),
    ],
)  # fmt: skip
def test_assumptions_are_data(id, instance, text):
    violated = theory.check(id, instance).violated
    assert any(text in sentence for sentence in violated), violated


def test_constants_left_open_are_the_tightest_that_the_ranges_allow():
    large = instances.Regression([[4.0]], [0.0], [4.0], [3.999], R=4.0)
    assert not theory.check("WS-5.5.1", large).violated
    small = dataclasses.replace(large, x=[-4.0], y=[-3.999])
    # Where the normaliser is below one, beta is the normaliser.
    beta = theory.check("WS-5.5.1", dataclasses.replace(small, beta=float(np.exp(-16.0))))
    assert theory.check("WS-5.5.1", small).log10_rhs == pytest.approx(beta.log10_rhs, rel=1e-12)


def test_unknown_activations_are_held_to_the_constants_they_claim():
    wave = (lambda y: np.sin(3 * y), lambda y: 3 * np.cos(3 * y), lambda y: -9 * np.sin(3 * y))
    instance = layers(activation=wave, L_h=1.0)
    assert any("between the points" in text for text in theory.check("TL-5.2", instance).violated)
    assert not theory.check("TL-5.2", dataclasses.replace(instance, L_h=9.0)).violated


# ---- rows that say nothing


def test_nothing_is_not_called_true():
    """At x = 0 no move of the data changes a logit: what compares such changes with each other is zero."""
    rng = np.random.default_rng(0)
    A, b = rng.standard_normal((50, 3)), np.full(50, 0.02)
    report = theory.audit(problems.Softmax(A, b), np.zeros(3), np.full(3, 1e-3))
    zero = [c for c in report.checks if c.log10_lhs == c.log10_rhs == -np.inf]
    assert {c.id for c in zero} == {"WS-7.7", "WS-7.8", "TT-7.9", "TT-7.10", "TT-7.12", "RH-10.8"}
    assert report.untested == tuple(c.id for c in zero)
    assert all(c.verdict == "not tested" and not c.holds and np.isnan(c.slack) for c in zero)
    assert not set(report.untested) & {c.id for c in report.failing}
    assert str(report).count("not tested") == 1
    listed = str(report).split("not tested, as both sides are zero: ")[1].splitlines()[0]
    assert set(listed.split(", ")) == {c.id for c in zero}
    assert "not tested" in str(zero[0])
    moved = theory.audit(problems.Softmax(A, b), np.full(3, 0.1), np.full(3, 0.101))
    assert moved.untested == ()


def test_one_group_that_says_something_is_enough():
    A = np.zeros((2, 2, 1))
    A[1] = [[1.0], [0.5]]
    some = instances.Regression(A, np.zeros((2, 2)), [0.5], [0.501])
    check = theory.check("WS-5.7", some)
    assert check.tested and check.holds
    assert theory.check("WS-5.7", dataclasses.replace(some, A=np.zeros((2, 2, 1)))).verdict == "not tested"


def test_several_right_hand_sides_show_one_that_says_something():
    rng = np.random.default_rng(1)
    A1, A2, b = rng.standard_normal((5, 2)), rng.standard_normal((3, 5)), rng.random((3, 2))
    x = rng.standard_normal((2, 2))
    y = x + np.array([0.0, 1e-3])
    report = theory.audit(problems.TwoLayer(A1, A2, b, "tanh"), x, y)
    assert report["TL-E.3.4"].tested and report["TL-E.3.4"].holds


# ---- the changed rows, against truth from elsewhere


def test_the_first_part_of_the_shift_holds_with_beta_below_one():
    """In 60 digits: the largest ratio of a grid of aligned rows, where it is largest."""
    mpmath.mp.dps = 60
    for R in (4.0, 6.0):
        for size, step in ((R, 1e-3), (-R, -1e-3), (0.5, 1e-4), (R, 0.0099 / R)):
            i = instances.Regression([[R]], [0.0], [size], [size - step], R=R)
            x, y = mpmath.mpf(float(i.x[0])), mpmath.mpf(float(i.y[0]))
            before, after = mpmath.exp(R * x), mpmath.exp(R * y)
            left = abs(1 / after - 1 / before) * after
            beta = min(before, after, mpmath.mpf("0.9999"))
            right = 2 / beta**2 * mpmath.exp(2 * R * R) * abs(x - y)
            check = theory.check("WS-5.5.1", i)
            assert not check.violated and check.holds
            assert check.log10_lhs == pytest.approx(float(mpmath.log10(left)), rel=1e-9)
            assert check.log10_rhs == pytest.approx(float(mpmath.log10(right)), rel=1e-9)
            # The proof: e^{R s} - 1 is convex in s, and at most e^{2R^2} - 1 for s = 2R.
            assert left <= mpmath.exp(R * abs(x - y)) - 1
            assert left / right <= 1 / mpmath.mpf(4 * R)


def parts(i, once):
    """B_1 to B_12 as full matrices, as printed (A2 once in 8 to 11) or as corrected."""
    f, A2, y = i.start.f, i.A2, i.start.y
    h, dh, d2h = i.activation.jet(y)
    c = h - i.b
    Q, F, ff = np.diag(dh) @ A2, np.diag(f), np.outer(f, f)
    q = Q.T @ c
    core = (A2 if once else A2.T) @ np.diag(d2h * c) @ (np.eye(len(f)) if once else A2)
    sign = 1.0 if once else -1.0
    mixed = 2 * np.outer(f, f * q) if once else -(np.outer(f, f * q) + np.outer(f * q, f))
    return [
        F @ Q.T @ Q @ F, sign * F @ Q.T @ Q @ ff, sign * ff @ Q.T @ Q @ F, ff @ Q.T @ Q @ ff,
        2 * (f @ q) * ff, mixed, np.diag(f * q), F @ core @ F, sign * F @ core @ ff, sign * ff @ core @ F,
        ff @ core @ ff, sign * (f @ q) * F,
    ]  # fmt: skip


@pytest.mark.parametrize("seed", range(12))
def test_printed_and_corrected_matrices_are_told_apart(seed):
    wave = Wave(*np.random.default_rng(seed).standard_normal(4))
    i = instances.random("two_layer", seed, n=3, m=3, activation=None, scale=10.0 ** (seed % 3 - 1))
    i = dataclasses.replace(i, activation=wave.activation(), L_h=None)
    printed, corrected = parts(i, once=True), parts(i, once=False)
    for k in (8, 9, 10, 11):
        check = OF[f"TL-D.2.{k}"].check(i)
        assert check.violated == () and check.holds
        assert check.lhs == pytest.approx(np.linalg.norm(printed[k - 1], 2), rel=1e-9)
        rhs = 10.0**check.log10_rhs
        assert check.corrected_ratio * rhs == pytest.approx(np.linalg.norm(corrected[k - 1], 2), rel=1e-7)
        assert check.sharp_holds
    for id in ("TL-D.1", "TL-5.1"):
        check, whole = OF[id].check(i), sum(printed)
        assert check.lhs == pytest.approx(np.linalg.norm(0.5 * (whole + whole.T), 2), rel=1e-9)
        rhs = 10.0**check.log10_rhs
        assert check.corrected_ratio * rhs == pytest.approx(np.linalg.norm(sum(corrected), 2), rel=1e-7)
    # The corrected matrices are those of the Hessian.
    logits, A2 = as_tensor(i.A1 @ i.x), as_tensor(i.A2)

    def loss(z):
        h = wave.size * torch.sin(wave.rate * (A2 @ torch.softmax(z, 0)) + wave.phase) + wave.level
        return 0.5 * ((h - as_tensor(i.b)) ** 2).sum()

    truth = torch.autograd.functional.hessian(loss, logits).numpy()
    # Twelve parts of this size cancel.
    size = max(np.linalg.norm(part, 2) for part in corrected)
    np.testing.assert_allclose(sum(corrected), truth, rtol=1e-9, atol=1e-12 * size)


def test_the_numbers_of_the_square_counterexample():
    """By hand: A2 = 2 [[1, -1], [1, -1]], f = (1/2, 1/2), c = (-4, 0), h' = 0 and h'' = 1."""
    B = two_layer.printed_matrix(two_layer.flat_square())
    np.testing.assert_allclose(B, [[-6.0, -2.0], [-6.0, -2.0]], atol=1e-14)
    assert OF["TL-D.1"].lhs(two_layer.flat_square()) == pytest.approx(4 + np.sqrt(20), rel=1e-12)


def test_parts_8_to_11_hold_as_printed_on_many_draws():
    rng = np.random.default_rng(0)
    family, worst = Layered(2, 2, 2, None), dict.fromkeys((8, 9, 10, 11), 0.0)
    for _ in range(400):
        i = family.build(family.arrays(rng, 10.0 ** rng.uniform(-1, 1)), 4.0)
        for k in worst:
            check = OF[f"TL-D.2.{k}"].check(i)
            assert check.holds or check.violated
            worst[k] = max(worst[k], check.ratio)
    assert max(worst.values()) > 0.1


def test_the_ramp_is_what_it_says():
    """In 200 digits: h' and h'' by quadrature of S, both at most 1, and the rise of the Hessian."""
    mpmath.mp.dps = 200
    e = mpmath.mpf("1e-90")

    def smooth(t):
        t = min(max(t, mpmath.mpf(0)), mpmath.mpf(1))
        return t * t * (3 - 2 * t)

    def second(y):
        return smooth(y / e) * (1 - smooth((y - 1) / e))

    ramp = OF["TL-E.7"].counterexample()
    jet = ramp.activation.jet
    points = np.array([-1e-90, 0.0, 2e-91, 7e-91, 1e-90, 3e-90, 1e-3, 0.7])
    value, slope, curvature = jet(points)
    exact = [mpmath.quad(second, [0, min(e, mpmath.mpf(p)), mpmath.mpf(p)]) if p > 0 else 0 for p in points]
    np.testing.assert_allclose(slope, [float(v) for v in exact], rtol=1e-12, atol=0)
    np.testing.assert_allclose(curvature, [float(second(mpmath.mpf(p))) for p in points], rtol=1e-12)
    assert (np.diff(value) >= 0).all()
    everywhere = jet(np.concatenate([points, [1.0, 1.5, 30.0], -points]))
    assert max(np.abs(v).max() for v in everywhere[1:]) <= 1.0

    # H = (A2 J A1)^2 (h'^2 + c h'') + h' c A2 (third cumulant of the softmax), two shares at +-x.
    def hessian(x):
        x = mpmath.mpf(x)
        p = 1 / (1 + mpmath.exp(-2 * x))
        scale = 4 / mpmath.sqrt(2)
        y = scale * (2 * p - 1)
        dy = scale * 4 * p * (1 - p)
        slope = y - e / 2 if y > e else mpmath.mpf(0)
        value = slope**2 / 2
        d2y = scale * 8 * p * (1 - p) * (1 - 2 * p)
        return (slope**2 + (value - 4) * second(y)) * dy**2 + (value - 4) * slope * d2y

    rise = abs(hessian(1e-90) - hessian(-1e-90))
    assert float(rise) == pytest.approx(32.0, rel=1e-12)
    assert OF["TL-5.2"].lhs(ramp) == pytest.approx(32.0, rel=1e-12)
    n, R, beta = 2, 4, mpmath.mpf("0.0999")
    R_f = 2 * n * R * mpmath.exp(2 * R**2) / beta**2
    printed = {
        "TL-5.2": 59 * (R + 1) * n**2 * mpmath.exp(4 * R**2) / beta**4 * R**5 * R_f,
        "TL-E.7": 24 * R_f * R**4 * (R + 1) / beta**4 * n**2 * mpmath.exp(4 * R**2),
    }
    for id, constant in printed.items():
        assert OF[id].log10_rhs(ramp) == pytest.approx(float(mpmath.log10(constant * 2e-90)), rel=1e-9)


def test_smooth_layers_break_what_is_printed_for_any_R_h():
    """With R_h near zero the proof of Lemma E.5 fails for a smooth h too: why R_h >= 1 is assumed."""
    mpmath.mp.dps = 200
    skewed = np.array([[2.0], [-1.0], [-1.0]]) / np.sqrt(6.0)
    flat = dataclasses.replace(
        two_layer.flat_square(), A1=4 * skewed, A2=4 * skewed.T, b=[4.0], x=[1e-90], y=[2e-90], R_h=1e-88
    )
    first = OF["TL-E.3.7"].check(flat)
    assert first.violated == ("R_h = 1e-88 is below 1",) and first.ratio > 1e60
    assert OF["TL-E.3.7"].check(dataclasses.replace(flat, R_h=1.0)).holds

    rows = [[mpmath.mpf(float(v)) for v in column] for column in (flat.A1[:, 0], flat.A2[0])]

    def hessian(x):
        """h = 1 - cos: (h'^2 + c h'') y'^2 + c h' y'' with y = <a2, f>, cumulants of the softmax."""
        weights = [mpmath.exp(a * x) for a in rows[0]]
        f = [w / sum(weights) for w in weights]
        m1, m2 = (sum(p * v for p, v in zip(f, row, strict=True)) for row in rows)
        d1, d2 = [v - m1 for v in rows[0]], [v - m2 for v in rows[1]]
        dy = sum(p * u * v for p, u, v in zip(f, d1, d2, strict=True))
        d2y = sum(p * u * u * v for p, u, v in zip(f, d1, d2, strict=True))
        y = m2 - sum(rows[1]) / 3
        h, c = mpmath.sin(y), 1 - mpmath.cos(y) - 4
        return (h**2 + c * mpmath.cos(y)) * dy**2 + c * h * d2y

    rise = abs(hessian(mpmath.mpf(2e-90)) - hessian(mpmath.mpf(1e-90)))
    check = OF["TL-E.5"].check(flat)
    assert check.violated == ("R_h = 1e-88 is below 1",)
    assert float(mpmath.log10(rise)) > check.log10_rhs + 50
    assert float(mpmath.log10(rise)) < OF["TL-E.5"].check(dataclasses.replace(flat, R_h=1.0)).log10_rhs


# ---- the published algorithms


def regularised(i, w2):
    """Gradient and Hessian by autodiff of the rescaled problem with the regulariser."""
    A, b = as_tensor(i.A[0]), as_tensor(i.b[0])

    def loss(x):
        u = torch.exp(A @ x)
        return 0.5 * ((u - u.sum() * b) ** 2).sum() + 0.5 * w2 * ((A @ x) ** 2).sum()

    def newton(x):
        point = as_tensor(x).requires_grad_()
        g = torch.autograd.grad(loss(point), point)[0].numpy()
        return np.linalg.solve(torch.autograd.functional.hessian(loss, as_tensor(x)).numpy(), g)

    return newton


def test_the_sign_of_the_step_and_not_the_base_of_the_logarithm():
    """n = 5, d = 2, |A| = |b| = R = 4, M = n e^{R^2}, w^2 = 100 M + l/sigma^2, r0 = .5, by autodiff."""
    i = OF["RH-1.5"].counterexample()
    M = 5 * np.exp(16.0)
    sigma = np.linalg.svd(i.A[0], compute_uv=False)[-1]
    newton = regularised(i, 100 * M + 10 * M * 0.5 / sigma**2)
    star = np.zeros(2)
    for _ in range(20):
        star = star - newton(star)
    away = {}
    for sign in (1, -1):
        x, away[sign] = star + 0.5 * (i.y - i.x) / np.linalg.norm(i.y - i.x), []
        for _ in range(6):
            x = x + sign * newton(x)
            away[sign].append(np.linalg.norm(x - star))
    # eps = .01: T is 4 to base e and 6 to base 2.
    assert away[1][0] == pytest.approx(1.0, rel=1e-3) and min(away[1]) > 0.9
    assert max(away[-1][1:]) < 1e-6
    check = OF["RH-1.5"].check(i)
    assert check.lhs == pytest.approx(2.0**14 * 1e-6, rel=1e-6) and check.sharp_holds
    assert set(algorithms.READINGS) == {14, 15, 20, 21}


def test_the_minimum_is_no_fixed_point_of_the_two_layer_algorithm():
    """n = 6, d = 3, m = 4, tanh and a moderate w: by autodiff the gradient vanishes, the printed one not."""
    i = OF["TL-7.1"].counterexample()
    A1, A2, b, w2 = as_tensor(i.A1), as_tensor(i.A2), as_tensor(i.b), 0.05

    def loss(x):
        z = A1 @ x
        return 0.5 * ((torch.tanh(A2 @ torch.softmax(z, 0)) - b) ** 2).sum() + 0.5 * w2 * (z**2).sum()

    def gradient(x):
        point = x.detach().requires_grad_()
        return torch.autograd.grad(loss(point), point)[0]

    x = as_tensor(np.zeros(3))
    for _ in range(200):
        H = torch.autograd.functional.hessian(loss, x)
        values, vectors = torch.linalg.eigh(H)
        x = x - vectors @ ((vectors.T @ gradient(x)) / values.abs().clamp_min(1e-3))
    assert float(gradient(x).norm()) < 1e-12
    H = torch.autograd.functional.hessian(loss, x).numpy()
    assert np.linalg.eigvalsh(H)[0] > 0
    at = dataclasses.replace(i, x=x.numpy(), y=x.numpy())
    Q, _ = np.linalg.qr(at.A1)
    printed = at.A1.T @ algorithms.printed_gradient(at, Q, at.A1 @ at.x)
    f, h = at.start.f, np.tanh(at.A2 @ at.start.f)
    q = at.A2.T @ ((1 - h**2) * (h - at.b))
    np.testing.assert_allclose(printed, -at.A1.T @ (f * (f @ q) + f * q), rtol=1e-10)
    assert np.linalg.norm(printed) > 0.01
    assert np.linalg.norm(np.linalg.solve(H, printed)) > 0.01 * np.linalg.norm(at.x)


@pytest.mark.parametrize("function", ["exp", "cosh", "sinh"])
def test_runs_are_those_of_autodiff(function):
    """Minimum, step and distances of the algorithm's loss at a moderate w."""
    family = Regressions(5, 2, 1, function)
    i = family.build(family.arrays(np.random.default_rng(3), 0.3), 4.0)
    (loss,) = algorithms._losses(dataclasses.replace(i, y=i.x), 0.1, 100.0, 0.0)
    A, b = as_tensor(i.A[0]), as_tensor(i.b[0])
    u = {"exp": torch.exp, "cosh": torch.cosh, "sinh": torch.sinh}[function]

    def value(x):
        z = A @ x
        return 0.5 * ((u(z) - u(z).sum() * b) ** 2).sum() + 0.5 * loss.w2 * (z**2).sum()

    x = np.linalg.solve(loss.S, loss.minimum())
    point = as_tensor(x).requires_grad_()
    g = torch.autograd.grad(value(point), point)[0].numpy()
    assert np.linalg.norm(g) < 1e-10 * loss.w2
    other = as_tensor(x + np.array([0.1, -0.2])).requires_grad_()
    g = torch.autograd.grad(value(other), other)[0].numpy()
    H = torch.autograd.functional.hessian(value, other.detach()).numpy()
    step = np.linalg.solve(loss.S, loss.newton(loss.S @ other.detach().numpy()))
    np.testing.assert_allclose(step, np.linalg.solve(H, g), rtol=1e-9)

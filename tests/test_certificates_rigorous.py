"""Rigorous balls against Newton's method to 60 digits: no error exceeds its radius, whatever the rounding."""

from __future__ import annotations

import warnings

import mpmath
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from instances import instance
from scipy import sparse

from attnfit import certificates, minimize, problems
from attnfit.certificates.lipschitz import Interval
from attnfit.certificates.rigorous import Enclosure, _range, _sums, gamma
from attnfit.losses.softmax import LOSSES
from attnfit.segments import Segments
from benchmarks.exact_answers import DIGITS, error_of, exact_answer, scaled_error_of, stationarity

SOFTMAX = ("cross_entropy", "kl", "squared", "entropy", "linear_cross_entropy")
FUNCTIONS = ("exp", "cosh", "sinh")


def draw(seed):
    """A small problem, its exact stationarity and a fit of it: columns collinear to 1e-4, groups, shifts."""
    rng = np.random.default_rng(seed)
    softmax = seed % 2 == 0
    loss = SOFTMAX[seed // 2 % 5] if softmax else FUNCTIONS[seed // 2 % 3]
    d = int(rng.integers(1, 4))
    sizes = rng.integers(3, 9, int(rng.integers(1, 3)) if softmax else 1)
    ids = np.repeat(np.arange(len(sizes)), sizes)
    A = rng.standard_normal((len(ids), d))
    if d > 1:
        A[:, 1] = A[:, 0] + A[:, 1] * 10.0 ** -rng.uniform(0, 4)
    if softmax and rng.random() < 0.3:
        A[:, 0] += 1e7 * rng.standard_normal(len(sizes))[ids]
    weights = rng.uniform(0.5, 2.0, len(ids)) if rng.random() < 0.3 else None
    offset = rng.standard_normal(len(ids)) if rng.random() < 0.3 else None
    ridge = 0.3 if loss in ("entropy", "linear_cross_entropy") else 0.0
    if softmax:
        b = rng.gamma(1.0, size=len(ids))
        b = b / np.bincount(ids, weights=b)[ids]
        problem = problems.Softmax(A, b, ids, loss=loss, weights=weights, offset=offset, ridge=ridge)
        exact = stationarity("Softmax", loss, A, b, ids, weights=weights, offset=offset, ridge=ridge)
    else:
        z = A @ (0.7 * rng.standard_normal(d)) + (0.0 if offset is None else offset)
        b = getattr(np, loss)(z) * (1.0 + 0.05 * rng.standard_normal(len(ids)))
        problem = problems.Exponential(A, b, loss, weights=weights, offset=offset)
        exact = stationarity("Exponential", loss, A, b, weights=weights, offset=offset)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return problem, exact, minimize(problem, tol=1e-12).x


def test_no_error_exceeds_its_radius():
    valid = 0
    for seed in range(130):
        problem, exact, x = draw(seed)
        proof = certificates.certify(problem, x, rigorous=True)
        if not proof.valid:
            assert proof.reason
            continue
        valid += 1
        with mpmath.workdps(DIGITS):
            answer, hessian = exact_answer(exact, x)
            error, each = error_of(x, answer)
            assert error <= proof.radius
            assert (each <= proof.coefficient_radius).all()
            assert scaled_error_of(x, answer, hessian) <= proof.scaled_radius
    assert valid >= 100


def test_groups_shifted_by_millions():
    """The difference of the fitted logits is known to the rounding of differences, not of the shift."""
    rng = np.random.default_rng(1)
    ids = np.repeat(np.arange(4), 3)
    A = rng.standard_normal((12, 2))
    A[:, 1] += 1e7 * rng.standard_normal(4)[ids] + 1e7
    b = rng.gamma(1.0, size=12)
    b = b / np.bincount(ids, weights=b)[ids]
    centred = problems.Softmax(A - A[3 * ids], b, ids, loss="cross_entropy")
    x = minimize(centred, tol=1e-12).x
    proof = certificates.certify(problems.Softmax(A, b, ids, loss="cross_entropy"), x, rigorous=True)
    with mpmath.workdps(DIGITS):
        answer, _ = exact_answer(stationarity("Softmax", "cross_entropy", A, b, ids), x)
        assert error_of(x, answer)[0] <= proof.radius < 1e-9


def test_no_looser_than_it_has_to_be():
    """Against the default: rounding bounded without luck costs a small factor."""
    ratios = []
    for seed in range(0, 40, 4):
        problem, _, x = draw(seed)
        default, rigorous = (certificates.certify(problem, x, rigorous=flag) for flag in (False, True))
        if default.valid and rigorous.valid:
            ratios.append(rigorous.radius / default.radius)
    assert np.median(ratios) < 30.0


def test_it_says_what_it_rests_on():
    problem, _, x = draw(0)
    default, rigorous = (certificates.certify(problem, x, rigorous=flag) for flag in (False, True))
    assert rigorous.rigorous
    assert not default.rigorous
    assert "proven, given IEEE double arithmetic and exp to 2 units" in rigorous.describe(x)
    assert "proven" not in default.describe(x)
    assert "rounding bounded to first order with a probabilistic constant" in default.describe(x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert minimize(problem).certificate(rigorous=True).rigorous


def test_what_has_no_enclosure_is_refused_by_name():
    inst, x = instance("Softmax", "cross_entropy", d=3)
    rescaled, _ = instance("Rescaled", "exp", d=3)
    layered = problems.TwoLayer(np.eye(3), np.eye(3), np.ones(3), ridge=1.0)
    attention = problems.Attention(np.eye(2), np.eye(2), np.full((2, 2), 0.5))
    for problem, point, name in (
        (inst.problem(A=sparse.csr_array(inst.A)), x, "dense matrix in memory"),
        (inst.problem(row_penalty=0.1), x, "a row_penalty"),
        (rescaled.problem(), x, "SquaredRescaled"),
        (layered, np.zeros(3), "TwoLayer"),
        (attention, np.zeros((2, 2)), "Attention"),
    ):
        proof = certificates.certify(problem, point, rigorous=True)
        assert not proof.valid
        assert name in proof.reason


def test_more_rows_than_the_enclosures_allow_for_are_refused(monkeypatch):
    monkeypatch.setattr("attnfit.certificates.rigorous.MOST_TERMS", 20)
    inst, x = instance("Softmax", "cross_entropy", d=3)
    assert "more than 20 rows" in certificates.certify(inst.problem(), x, rigorous=True).reason


def test_refusals_of_the_rigorous_ball():
    problem, _, x = draw(0)
    far = certificates.certify(problem, x + 3.0, rigorous=True)
    assert not far.valid
    assert "1/2" in far.reason
    inst, _ = instance("Softmax", "squared", sizes=(20, 15, 9), d=3, noise=0.1)
    twice = inst.problem(A=np.column_stack([inst.A, inst.A[:, 0]]))
    open_one = certificates.certify(twice, minimize(twice).x, rigorous=True)
    assert "a direction is open" in open_one.reason


def test_a_hessian_that_rounding_hides_is_refused():
    """Logits known to a fifth: they are the small difference of large numbers."""
    A = 1e15 + np.array([[0.5], [1.0], [-0.5], [0.25]])
    problem = problems.Exponential(A, np.exp(A[:, 0] - 1e15), offset=np.full(4, -1e15))
    proof = certificates.certify(problem, np.ones(1), rigorous=True)
    assert "not proven to be positive definite" in proof.reason
    assert not proof.valid
    assert proof.eta > 0.0
    # Known to the last digit where the shift is a hundred.
    A = A - 1e15 + 128.0
    problem = problems.Exponential(A, np.exp(A[:, 0] - 128.0), offset=np.full(4, -128.0))
    assert certificates.certify(problem, np.ones(1), rigorous=True).valid


def test_a_step_that_is_too_long_says_how_long():
    problem, _, x = draw(1)
    default, proof = (certificates.certify(problem, x + 3.0, rigorous=flag) for flag in (False, True))
    assert not proof.valid
    assert np.isclose(proof.eta, default.eta, rtol=1e-4)
    assert proof.lipschitz * proof.eta > 0.5
    assert np.isclose(proof.lambda_min, default.lambda_min, rtol=1e-3)


# Thirds use all digits, so that sums and products round.
FINITE = st.one_of(st.floats(-1e3, 1e3), st.integers(-999, 999).map(lambda k: k / 3.0))
RADIUS = st.one_of(st.just(0.0), st.floats(0.0, 1.0))
VALUES = st.lists(st.tuples(FINITE, RADIUS), min_size=2, max_size=5)


def holds(found, exact, index=()):
    return abs(mpmath.mpf(float(found.mid[index])) - exact) <= float(found.rad[index])


@given(VALUES, st.lists(st.floats(-1.0, 1.0), min_size=10, max_size=10))
def test_enclosures_hold_exact_results(values, where):
    """Of every number within the radii."""
    n = len(values)
    mid, rad = (np.array(v) for v in zip(*values, strict=True))
    a, b = Enclosure(mid, rad), Enclosure(mid[::-1].copy(), rad[::-1].copy())
    with mpmath.workdps(40):
        one = [
            mpmath.mpf(m) + mpmath.mpf(r) * mpmath.mpf(t) for m, r, t in zip(mid, rad, where, strict=False)
        ]
        other = [
            mpmath.mpf(m) + mpmath.mpf(r) * mpmath.mpf(t)
            for m, r, t in zip(b.mid, b.rad, where[5:], strict=False)
        ]
        for i in range(n):
            assert holds(a + b, one[i] + other[i], i)
            assert holds(a - b, one[i] - other[i], i)
            assert holds(a * b, one[i] * other[i], i)
            scale = Enclosure(a.mid / 50, a.rad / 50)
            if abs(mid[i]) / 50 < 15:
                within = mpmath.mpf(float(scale.mid[i])) + mpmath.mpf(float(scale.rad[i])) * where[i]
                assert holds(scale.exp(), mpmath.exp(within), i)
            if mid[i] - rad[i] > 1e-3:
                assert holds(a.reciprocal(), 1 / one[i], i)
                assert holds(a.log(), mpmath.log(one[i]), i)
        runs = Segments(np.array([0, 1]), n)
        assert holds(a.sums(runs), mpmath.fsum(one[1:]), 1)
        product = Enclosure(a.mid[None, :], a.rad[None, :]) @ Enclosure(b.mid[:, None], b.rad[:, None])
        assert holds(product, mpmath.fdot(one, other), (0, 0))
        assert a.norm() >= mpmath.sqrt(mpmath.fsum(v**2 for v in one))


def test_a_tie_is_covered_in_full():
    """No rounding is larger than half a unit in the last place of one, and this one is as large."""
    half = 2.0**-53
    total = Enclosure.exact(np.array([1.0])) + Enclosure.exact(np.array([half]))
    with mpmath.workdps(40):
        assert total.mid[0] == 1.0
        assert holds(total, 1 + mpmath.mpf(half), 0)
        assert total.rad[0] <= 1.001 * half
        assert mpmath.mpf(float(Enclosure(np.array([1.0]), np.array([half])).size[0])) >= 1 + mpmath.mpf(half)


def test_any_order_of_summation_is_covered():
    """From the first term to the last: each of the others is a tie, and lost."""
    n, half = 1000, 2.0**-53
    terms = np.concatenate([[1.0], np.full(n - 1, half)])
    in_order = 0.0
    for term in terms:
        in_order += term
    total = Enclosure.exact(terms).sums(Segments(np.array([0]), n))
    product = Enclosure.exact(terms[None, :]) @ Enclosure.exact(np.ones((n, 2)))
    with mpmath.workdps(40):
        exact = 1 + (n - 1) * mpmath.mpf(half)
        lost = exact - mpmath.mpf(in_order)
        assert lost > 0.9 * n * half
        for found, index in ((total, 0), (product, (0, 1))):
            assert holds(found, exact, index)
            assert lost <= found.rad[index] <= 3 * n * half


@pytest.mark.parametrize("size", [1e-300, 1e-170, 1.0, 1e100])
def test_norms_are_bounds_whatever_is_rounded_or_underflows(size):
    rng = np.random.default_rng(0)
    for n in range(1, 40):
        values = size * rng.standard_normal((n, 3))
        found = Enclosure.exact(values)
        with mpmath.workdps(40):
            squares = [[mpmath.mpf(float(v)) ** 2 for v in row] for row in values]
            whole = mpmath.sqrt(mpmath.fsum(mpmath.fsum(row) for row in squares))
            assert whole <= found.norm() <= float(whole) * (1 + 1e-6) + 1e-151
            for bound, row in zip(found.row_norms(), squares, strict=True):
                exact = mpmath.sqrt(mpmath.fsum(row))
                assert exact <= bound <= float(exact) * (1 + 1e-6) + 1e-151


def test_what_underflows_is_covered():
    """Products that are zero in float64, and sums of them."""
    a = Enclosure.exact(np.full((2, 3), 1e-200))
    with mpmath.workdps(40):
        square = mpmath.mpf(1e-200) ** 2
        assert holds(a * a, square, (0, 0))
        assert holds(a @ a.T, 3 * square, (0, 0))
    zero = Enclosure.exact(np.zeros((2, 3)))
    for found in (a * a, a @ a.T, a + a, zero @ zero.T, -a, a.scaled(-2.0)):
        assert (found.rad >= 0.0).all()
        assert (found.rad < 1e-200).all()
    wide = Enclosure(np.array([1.0]), np.array([0.25])).scaled(-4.0)
    assert (wide.mid[0], wide.rad[0]) == (-4.0, 1.0)


TERMS = {
    "squared": lambda f, b: (f - b, mpmath.mpf(1), 0),
    "linear_cross_entropy": lambda f, b: (-b, 0, 0),
    "entropy": lambda f, b: (-mpmath.log(f) - 1, -1 / f, 1 / f**2),
}


@pytest.mark.parametrize("loss", TERMS)
def test_ranges_hold_what_formulas_give_at_their_ends(loss):
    """By the derivatives of phi to forty digits; and are wider by no more than a millionth."""
    rng = np.random.default_rng(0)
    b, w = rng.standard_normal(50), rng.random(50) + 0.1
    b[::3] *= 1e6
    low = rng.random(50) ** 12
    high = np.minimum(1.0, low * (1.0 + rng.random(50)))
    f, h = Interval(low, high), Interval(np.log(low), np.log(high))
    for k, name in enumerate(("p", "g2", "g3")):
        found = _range(getattr(LOSSES[loss], name), f, h, b, w)
        with mpmath.workdps(40):
            for i in range(50):
                exact = []
                for end in map(mpmath.mpf, (float(low[i]), float(high[i]))):
                    d1, d2, d3 = TERMS[loss](end, mpmath.mpf(float(b[i])))
                    terms = (d1, d2 * end + d1, d3 * end**2 + 3 * d2 * end + d1)
                    exact.append(mpmath.mpf(float(w[i])) * terms[k])
                assert found.low[i] <= min(exact)
                assert max(exact) <= found.high[i]
                size = 10.0 + abs(b[i]) - np.log(low[i])
                assert found.high[i] - found.low[i] <= max(exact) - min(exact) + 1e-7 * size


def test_sums_of_ranges_hold_the_sums_of_their_ends():
    rng = np.random.default_rng(0)
    low = rng.standard_normal(90) / 3.0
    low = np.concatenate([low, -rng.permutation(low)])
    high = low + 1e-3 * rng.random(180)
    found = _sums(Interval(low, high), Segments(np.array([0, 7, 9]), 180))
    with mpmath.workdps(40):
        for k, run in enumerate((slice(0, 7), slice(7, 9), slice(9, 180))):
            bottom, top = (mpmath.fsum(map(mpmath.mpf, ends[run].tolist())) for ends in (low, high))
            assert bottom - 1e-5 <= found.low[k] <= bottom
            assert top <= found.high[k] <= top + 1e-5


def test_enclosures_of_exact_numbers_are_no_wider_than_roundings():
    """One of a sum or a product, four of an exponential, two of a reciprocal, n of a sum of n products."""
    rng = np.random.default_rng(0)
    a, b = (Enclosure.exact(1.0 + rng.random((6, 5))) for _ in range(2))
    U = 2.0**-53
    for found, units in ((a + b, 1), (a - b, 1), (a * b, 1), (a.exp(), 4), (a.reciprocal(), 2)):
        assert (found.rad <= 1.001 * units * U * np.abs(found.mid) + 1e-300).all()
    # The exponential that checks a logarithm, its product and the last rounding; of the logarithm, not of it.
    assert (a.log().rad <= 8.0 * U).all()
    product = a @ b.T
    assert (product.rad <= 6.001 * U * product.mid).all()
    total = Enclosure.exact(a.mid[:, 0]).sums(Segments(np.array([0, 2]), 6))
    assert (total.rad <= 5.001 * U * total.mid).all()


@pytest.mark.parametrize("n", [1, 1000, 10_000_000])
def test_the_error_of_many_roundings(n):
    """``(1 + u)^n - 1``, and nearly no more."""
    with mpmath.workdps(40):
        exact = (1 + mpmath.mpf(2) ** -53) ** n - 1
        assert exact <= gamma(n) <= exact * (1 + 2 * n * mpmath.mpf(2) ** -53)


def test_sums_that_cancel_are_known_to_the_rounding_of_their_terms():
    rng = np.random.default_rng(0)
    terms = rng.standard_normal(999) / 3.0
    terms = np.concatenate([terms, -rng.permutation(terms), [1e-9]])
    ones = Enclosure.exact(np.ones((len(terms), 1)))
    product = Enclosure.exact(terms[None, :]) @ ones
    total = Enclosure.exact(terms).sums(Segments(np.array([0]), len(terms)))
    with mpmath.workdps(40):
        exact = mpmath.fsum(map(mpmath.mpf, terms.tolist()))
        assert holds(product, exact, (0, 0))
        assert holds(total, exact, 0)
    # One rounding of the result would not do.
    assert product.rad[0, 0] > 100 * 2.0**-53 * abs(product.mid[0, 0])
    assert total.rad[0] > 100 * 2.0**-53 * abs(total.mid[0])


def test_exponentials_of_wide_enclosures():
    for rad in (0.1, 1.0, 3.0):
        found = Enclosure(np.array([0.3]), np.array([rad])).exp()
        assert holds(found, mpmath.exp(mpmath.mpf(0.3) + mpmath.mpf(rad)), 0)


@pytest.mark.parametrize("share", [1e-12, 0.01, 0.3, 0.49])
def test_logarithms_of_wide_enclosures(share):
    """The lower end is the farther one: ``-log(1 - share)``."""
    for mid in (1e-5, 1.0, 3e7):
        found = Enclosure(np.array([mid]), np.array([share * mid])).log()
        with mpmath.workdps(40):
            for end in (mpmath.mpf(mid) * (1 - mpmath.mpf(share)), mpmath.mpf(mid) * (1 + mpmath.mpf(share))):
                assert holds(found, mpmath.log(end), 0)
            # Of what is taken off, and the rounding of the logarithm itself.
            assert found.rad[0] <= 1.01 * share / (1 - share) + 40 * 2.0**-53


def test_reciprocals_and_logarithms_of_what_may_be_zero_are_unbounded():
    wide = Enclosure(np.array([0.1]), np.array([0.1]))
    assert np.isinf(wide.reciprocal().rad).all()
    assert np.isinf(wide.log().rad).all()


@pytest.mark.parametrize("loss", SOFTMAX)
def test_the_rigorous_constant_is_no_smaller_than_the_default(loss, monkeypatch):
    """Both bound the same third derivative; here nothing but roundings and norms differ."""
    monkeypatch.setattr("attnfit.certificates.kantorovich.NEAR", -1.0)
    inst, _ = instance("Softmax", loss, sizes=(12, 9), d=3, noise=0.1)
    ridge = 0.3 if loss in ("entropy", "linear_cross_entropy") else 0.0
    problem = inst.problem(ridge=ridge)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        x = minimize(problem, tol=1e-12).x
    default, rigorous = (certificates.certify(problem, x, rigorous=flag) for flag in (False, True))
    assert default.lipschitz <= rigorous.lipschitz * (1 + 1e-6) <= 30.0 * default.lipschitz

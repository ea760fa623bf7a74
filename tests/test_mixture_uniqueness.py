"""Whether the proportions of a mixture are unique: against the range of each, by linear programmes."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import optimize, sparse

from attnfit import certificates, minimize, problems
from attnfit.certificates.mixture import _decide, _on_face


def ranges(signatures, f, w=None):
    """How far each proportion can go without a change of the fit."""
    A = signatures if w is None else np.sqrt(w)[:, None] * signatures
    n = len(f)
    ends = []
    for i in range(n):
        for sign in (1.0, -1.0):
            found = optimize.linprog(
                sign * np.eye(n)[i], A_eq=np.vstack([A, np.ones(n)]), b_eq=np.append(A @ f, 1.0),
                method="highs", options={"primal_feasibility_tolerance": 1e-9},
            )  # fmt: skip
            ends.append(sign * found.fun if found.success else f[i])
    return np.abs(np.array(ends).reshape(n, 2) - f[:, None]).max(axis=1)


def planted(seed, m, n, present, copies=False):
    rng = np.random.default_rng(seed)
    signatures = rng.random((m, n))
    if copies:
        signatures[:, -1] = signatures[:, 0]
    f = np.zeros(n)
    f[rng.choice(n - copies, present, replace=False)] = rng.dirichlet(np.ones(present))
    return signatures, f


@pytest.mark.parametrize("seed", range(3))
def test_few_of_many_signatures_are_unique(seed):
    """100 bands, 150 signatures, 4 present, no noise: more unknowns than equations, and one answer."""
    signatures, f = planted(seed, 100, 150, 4)
    problem = problems.TwoLayer(None, signatures, signatures @ f, "identity")
    result = minimize(problem)
    proof = result.certificate()
    assert proof.valid
    assert proof.uniqueness.tolist() == ["unique"]
    assert proof.n_unidentified == 0
    assert "unique" not in proof.reason
    assert np.linalg.norm(problem.proportions(result.x) - f) <= proof.radius < 1e-3


@pytest.mark.parametrize("weighted", [False, True])
def test_verdicts_are_those_of_the_ranges(weighted):
    found = {"unique": 0, "not unique": 0}
    for seed in range(40):
        m, present = 3 + seed % 5, 1 + seed % 4
        signatures, f = planted(seed, m, 8, present, copies=seed % 3 == 0)
        w = np.random.default_rng(seed).uniform(0.5, 2.0, m) if weighted else None
        problem = problems.TwoLayer(None, signatures, signatures @ f, "identity", weights=w)
        result = minimize(problem)
        proof = result.certificate()
        verdict = str(proof.uniqueness[0])
        assert verdict in found
        found[verdict] += 1
        moves = ranges(signatures, problem.proportions(result.x), w)
        assert (moves.max() > 1e-4) == (verdict == "not unique")
        if verdict == "unique":
            assert np.linalg.norm(problem.proportions(result.x) - f) <= proof.radius
        else:
            assert "the proportions of 1 right-hand sides are not unique" in proof.reason
            assert proof.n_unidentified == 1
            assert np.isinf(proof.radius)
    assert min(found.values()) >= 10


def test_traces_of_a_signature_do_not_make_it_present():
    """A point of the simplex that is not on a face: what little lies off it is in the radius."""
    signatures, f = planted(0, 30, 50, 3)
    problem = problems.TwoLayer(None, signatures, signatures @ f, "identity")
    near = (1.0 - 1e-9) * f + 1e-9 / 50
    proof = certificates.certify(problem, np.log(near))
    assert proof.uniqueness.tolist() == ["unique"]
    assert np.linalg.norm(near - f) <= proof.radius


def test_a_trace_off_the_face_counts_in_the_radius():
    """The radius grows with what lies on signatures that are not present."""
    signatures, f = planted(0, 30, 50, 3)
    problem = problems.TwoLayer(None, signatures, signatures @ f, "identity")
    for size in (1e-10, 4e-10, 9e-10):
        near = (1.0 - 47 * size) * f + size * (f == 0.0)
        proof = certificates.certify(problem, np.log(near))
        assert np.linalg.norm(near - f) <= proof.radius
        assert 47 * size <= proof.radius


def test_sets_of_signatures_are_decided_up_to_a_bound(monkeypatch):
    signatures, _ = planted(0, 10, 14, 3)
    rng = np.random.default_rng(1)
    F = np.zeros((14, 6))
    for j in range(6):
        F[rng.choice(14, 3, replace=False), j] = rng.dirichlet(np.ones(3))
    problem = problems.TwoLayer(None, sparse.csr_array(signatures), signatures @ F, "identity")
    result = minimize(problem)
    assert (result.certificate().uniqueness != "not proven unique").all()
    monkeypatch.setattr("attnfit.certificates.mixture.N_PROGRAMMES", 2)
    bounded = result.certificate()
    assert (bounded.uniqueness == "not proven unique").sum() == 4
    assert "the proportions of 4 right-hand sides are not proven unique" in bounded.reason
    monkeypatch.setattr("attnfit.certificates.mixture.PROGRAMME_ENTRIES", 139)
    assert (result.certificate().uniqueness == "not proven unique").all()
    assert result.certificate().valid


def test_the_radius_of_all_right_hand_sides():
    rng = np.random.default_rng(0)
    signatures = rng.random((12, 4))
    problem = problems.TwoLayer(None, signatures, signatures @ rng.dirichlet(np.ones(4), 5).T, "identity")
    proof = minimize(problem).certificate()
    assert np.isclose(proof.radius, np.sqrt(np.sum(proof.radii**2)))
    assert np.isclose(proof.scaled_radius, np.sqrt(np.sum(proof.scaled_radii**2)))
    assert np.isclose(proof.value_gap, proof.gap.sum())


def test_the_dual_vector_bounds_what_is_elsewhere():
    """Two signatures, one present: how much of the other there can be, and what of it is there already."""
    verdict, dual = _decide(np.eye(2), np.array([True, False]))
    assert verdict == "unique"
    for share in (1e-6, 1e-3):
        # f = (1, 0) against f* = (1 - share, share), and both the latter.
        moved = float(dual.mass_off(np.array([np.sqrt(2.0) * share]), np.zeros(1))[0])
        assert share <= moved <= 1.5 * share
        both = float(dual.mass_off(np.zeros(1), np.array([share]))[0])
        assert 2.0 * share * (1 - 1e-9) <= both <= 2.1 * share


def test_a_trace_makes_the_radius_no_larger_than_it_must():
    """Signatures 0, 1 and 2, of which only the first is present, and a trace s of the second: the fit is off
    by s, the gap is ``s^2``, and by the vector of length one no more than ``(sqrt(2) + 2 + 1) s`` elsewhere.
    """
    problem = problems.TwoLayer(None, np.array([[0.0, 1.0, 2.0]]), np.zeros(1), "identity")
    for s in (1e-10, 9e-10):
        proof = certificates.certify(problem, np.log([1.0 - s, s, 1e-300]))
        assert proof.uniqueness.tolist() == ["unique"]
        # On the face: off by the fit and what is elsewhere times the longest signature, over the longest.
        elsewhere = (np.sqrt(2.0) + 3.0) * s
        largest = np.hypot(np.hypot(np.sqrt(2.0) * s + 2.0 * elsewhere, 2.0 * elsewhere) / 2.0, elsewhere)
        assert np.sqrt(2.0) * s <= proof.radii[0] <= 1.01 * largest


@pytest.mark.parametrize("unit", [1e-9, 1.0, 1e9])
def test_units_of_signatures_change_no_verdict(unit):
    """The dual vector has the inverse unit; radii have none."""
    for seed in range(8):
        rng = np.random.default_rng(seed)
        A, support = rng.random((5, 9)), np.arange(9) < 2 + seed % 4
        (verdict, dual), (other, moved) = (_decide(c * A, support) for c in (1.0, unit))
        assert verdict == other
        if dual is not None:
            for delta, traces in ((1e-3, 0.0), (0.0, 1e-3)):
                there = moved.mass_off(np.array([unit * delta]), np.array([traces]))
                np.testing.assert_allclose(there, dual.mass_off(np.array([delta]), np.array([traces])), 1e-6)
        for face in (np.arange(9) == 3, np.arange(9) < 3):
            gap, left = np.array([1e-3]), np.array([1e-4])
            (plain,), least = _on_face(A, face, gap, left)
            (scaled,), small = _on_face(unit * A, face, unit**2 * gap, left)
            assert np.isclose(scaled, plain, rtol=1e-9)
            assert np.isclose(small, unit**2 * least, rtol=1e-9, atol=0.0)


def test_a_part_that_signatures_have_in_common_hides_nothing():
    """Proportions add up to one: only differences of signatures tell them apart."""
    rng = np.random.default_rng(0)
    A = np.round(2.0**10 * rng.random((6, 4))) / 2.0**10
    common = 2.0**26 * np.round(9.0 * rng.random((6, 1)) + 1.0)
    face, gap = np.array([True, False, True, True]), np.array([1e-3])
    (near,), least = _on_face(A, face, gap, np.zeros(1))
    (far,), other = _on_face(A + common, face, gap, np.zeros(1))
    assert np.isclose(far, near, rtol=1e-4)
    assert np.isclose(other, least, rtol=1e-4)
    # Of one signature, or none but zeros, the proportion is one whatever its size.
    for one in (A, 0.0 * A):
        assert np.isfinite(_on_face(one, np.arange(4) == 2, gap, np.zeros(1))[0]).all()
    # Copies of one are not told apart.
    assert np.isinf(_on_face(A[:, [0, 0, 0, 1]], np.arange(4) < 3, gap, np.zeros(1))[0]).all()


def test_right_hand_sides_are_certified_each_by_itself():
    """On faces of their own; the least curvature is that of the worst, none where proportions are open."""
    rng = np.random.default_rng(0)
    A = rng.random((12, 6))
    F = np.zeros((6, 4))
    F[0, 0], F[[1, 2], 1], F[[1, 4], 2], F[[0, 1, 2, 3, 4], 3] = 1.0, 0.5, [0.9, 0.1], 0.2
    for w in (None, rng.uniform(0.5, 2.0, 12), rng.uniform(0.5, 2.0, (12, 4))):
        target = A @ F + 0.01 * rng.standard_normal((12, 4))
        problem = problems.TwoLayer(None, A, target, "identity", weights=w)
        x = minimize(problem).x + 1e-6 * rng.standard_normal((6, 4))
        whole = certificates.certify(problem, x)
        alone = []
        for j in range(4):
            own = w if w is None or w.ndim == 1 else w[:, j]
            one = problems.TwoLayer(None, A, target[:, j], "identity", weights=own)
            alone.append(certificates.certify(one, x[:, j]))
        assert len({round(p.lambda_min, 6) for p in alone}) > 1
        assert np.isclose(whole.lambda_min, min(p.lambda_min for p in alone), rtol=1e-9)
        np.testing.assert_allclose(whole.radii, [p.radii[0] for p in alone], rtol=1e-6)
        np.testing.assert_allclose(whole.gap, [p.value_gap for p in alone], rtol=1e-6)
    twice = problems.TwoLayer(None, A[:, [0, 0, 1]], A[:, 0], "identity")
    proof = certificates.certify(twice, np.log([0.5, 0.5, 1e-300]))
    assert proof.uniqueness.tolist() == ["not unique"]
    assert proof.lambda_min == 0.0

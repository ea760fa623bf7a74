"""Mixtures: exact optima on the faces of the simplex, certified."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import optimize, sparse
from sklearn.exceptions import ConvergenceWarning

from attnfit import certificates, minimize, problems
from attnfit.solvers import ActiveSet, Newton, simplex


def mixture(signatures, b, **options):
    return problems.TwoLayer(None, signatures, b, "identity", **options)


def instance(n=5, m=12, k=30, seed=0, noise=0.1):
    rng = np.random.default_rng(seed)
    signatures = rng.random((m, n))
    shares = rng.dirichlet(np.full(n, 0.5), size=k).T
    return signatures, signatures @ shares + noise * rng.standard_normal((m, k))


def brute_force(signatures, b, w):
    """The least loss over all faces: on each, the best point of its affine hull, if it is feasible."""
    root = np.sqrt(w)
    best = np.inf
    for size in range(1, signatures.shape[1] + 1):
        for face in itertools.combinations(range(signatures.shape[1]), size):
            last, rest = signatures[:, face[-1]], signatures[:, face[:-1]]
            f = np.linalg.lstsq(root[:, None] * (rest - last[:, None]), root * (b - last), rcond=None)[0]
            f = np.append(f, 1.0 - f.sum())
            if (f >= -1e-12).all():
                best = min(best, 0.5 * np.sum(w * (signatures[:, face] @ f - b) ** 2))
    return best


@pytest.mark.parametrize("n", [1, 2, 4, 6])
@pytest.mark.parametrize("m", [1, 3, 12])
@pytest.mark.parametrize("weights", ["none", "rows", "entries"])
def test_the_best_of_all_faces(n, m, weights):
    rng = np.random.default_rng(n)
    signatures, b = instance(n, m, 15, seed=m, noise=0.3)
    w = {"none": None, "rows": rng.random(m) + 0.01, "entries": rng.random(b.shape) + 0.01}[weights]
    problem = mixture(signatures, b, weights=w)
    assert problem.is_mixture
    result = minimize(problem)
    assert result.converged
    values = problem.column_values(result.x)
    for j in range(15):
        own = np.ones(m) if w is None else w if w.ndim == 1 else w[:, j]
        assert values[j] == pytest.approx(brute_force(signatures, b[:, j], own), rel=1e-9, abs=1e-13)


@pytest.mark.parametrize("storage", ["dense", "sparse"])
@pytest.mark.parametrize("identity", ["none", "dense", "sparse"])
def test_the_answer_in_softmax_coordinates(storage, identity):
    signatures, b = instance(8, 20)
    first = {"none": None, "dense": np.eye(8), "sparse": sparse.eye_array(8)}[identity]
    second = sparse.csr_array(signatures) if storage == "sparse" else signatures
    problem = problems.TwoLayer(first, second, b, "identity")
    result = minimize(problem)
    f = problem.proportions(result.x)
    assert "active set" in result.solver
    assert (f >= 0.0).all()
    assert (f == 0.0).any()
    np.testing.assert_allclose(f.sum(axis=0), 1.0, rtol=1e-14)
    assert np.linalg.norm(problem.gradient(result.x)) < 1e-12 * np.linalg.norm(problem.gradient(0 * result.x))
    assert result.gradient_norm < 1e-8
    assert problem.false_optimum(problem.evaluate(result.x.reshape(-1))) is None
    np.testing.assert_allclose(problem.predict(result.x), signatures @ f)


def test_one_right_hand_side_is_a_vector():
    signatures, b = instance()
    result = minimize(mixture(signatures, b[:, 0]))
    assert result.x.shape == (5,)
    assert result.column_status.tolist() == ["converged"]
    np.testing.assert_array_equal(result.x, minimize(mixture(signatures, b[:, :1])).x[:, 0])


def test_scipy_finds_the_same():
    signatures, b = instance(16, 200, 50, noise=0.02)
    problem = mixture(signatures, b)
    f = problem.proportions(minimize(problem).x)
    heavy = 1e4
    A = np.vstack([signatures, np.full((1, 16), heavy)])
    for j in range(50):
        peer, _ = optimize.nnls(A, np.append(b[:, j], heavy))
        np.testing.assert_allclose(f[:, j], peer / peer.sum(), atol=1e-6)


def test_chunks_do_not_change_the_answer(monkeypatch):
    signatures, b = instance(6, 15, 40)
    whole = minimize(mixture(signatures, b))
    monkeypatch.setattr(simplex, "CHUNK", 7)
    monkeypatch.setattr("attnfit.solvers.simplex.FACTOR_ENTRIES", 100)
    monkeypatch.setattr("attnfit.objectives.layered.CHUNK_ENTRIES", 60)
    problem = mixture(signatures, b)
    pieces = minimize(problem)
    np.testing.assert_allclose(problem.proportions(pieces.x), problem.proportions(whole.x), atol=1e-12)
    assert pieces.value == pytest.approx(whole.value, rel=1e-13)
    assert len(pieces.history) == 6
    stopped = minimize(problem, callback=lambda record: record.iteration == 2)
    assert stopped.status == "interrupted"
    assert stopped.column_status.tolist() == 21 * ["converged"] + 19 * ["interrupted"]


DEGENERATE = {
    "fewer bands than signatures": lambda A: A[:3],
    "copies of a signature": lambda A: A[:, [0, 0, 1, 2, 2, 2]],
    "near copies": lambda A: A + 1e-9 * np.arange(A.shape[1]) * A[:, ::-1],
    "a signature of zeros": lambda A: A * (np.arange(A.shape[1]) > 0),
    "all alike": lambda A: np.repeat(A[:, :1], 4, axis=1),
    "collinear": lambda A: A[:, :1] + np.linspace(0, 1, 5) * (A[:, 1:2] - A[:, :1]),
    "a common large part": lambda A: A + 1e6,
    "scales apart": lambda A: A * np.logspace(-4, 4, A.shape[1]),
    "one band": lambda A: A[:1],
}


@pytest.mark.parametrize("name", DEGENERATE)
def test_degenerate_signatures_are_certified_too(name):
    signatures, b = instance(6, 12, 40, noise=0.2)
    signatures = DEGENERATE[name](signatures)
    b = b[: len(signatures)] + (1e6 if name == "a common large part" else 0.0)
    problem = mixture(signatures, b)
    result = minimize(problem)
    assert result.converged
    proof = result.certificate()
    assert proof.valid
    assert (proof.relative_gap <= 1e-9).all()
    if name in ("copies of a signature", "all alike", "one band"):
        assert proof.n_unidentified > 0
        assert "not unique" in proof.reason


def test_targets_of_zero_and_exact_fits():
    signatures, b = instance(5, 12, 10, noise=0.0)
    exact = mixture(signatures, b)
    result = minimize(exact)
    assert result.converged
    assert result.value < 1e-25
    assert minimize(mixture(signatures, 0 * b)).converged
    assert minimize(mixture(0 * signatures, 0 * b)).converged
    # Nothing is missing of nothing.
    proof = certificates.certify(mixture(0 * signatures, 0 * b), np.zeros((5, 10)))
    assert proof.valid
    assert not proof.relative_gap.any()


def test_hopeless_scales_are_not_called_converged():
    signatures, b = instance(8, 30, 10)
    with pytest.warns(ConvergenceWarning, match=r"10 of 10 right-hand sides did not converge.*signatures"):
        result = minimize(mixture(signatures * np.logspace(-12, 12, 8), b))
    assert result.status == "precision"
    assert not result.certificate().valid


def test_radii_contain_the_proportions():
    signatures, b = instance(6, 15, 40)
    problem = mixture(signatures, b)
    best = minimize(problem)
    exact = problem.proportions(best.x)
    rng = np.random.default_rng(0)
    for size in (1e-8, 1e-4, 1e-2):
        f = exact + size * rng.random(exact.shape)
        x = np.log(f / f.sum(axis=0))
        proof = certificates.certify(problem, x)
        assert (np.linalg.norm(problem.proportions(x) - exact, axis=0) <= proof.radii * (1 + 1e-9)).all()
        excess = problem.column_values(x) - problem.column_values(best.x)
        assert (excess <= proof.gap * (1 + 1e-9)).all()
        assert proof.valid == (proof.relative_gap.max() <= 1e-9)
    proof = best.certificate()
    assert proof.valid
    assert proof.radius < 1e-5
    assert proof.value_gap < 1e-8
    assert proof.n_unidentified == 0
    assert proof.eta == proof.lipschitz == 0.0


def test_false_optima_of_softmax_coordinates_are_found_out():
    """All weight on one signature: no gradient in x, a large one in the proportions."""
    signatures, b = instance(5, 12, 3, noise=0.01)
    x = np.zeros((5, 3))
    x[2] = 800.0
    problem = mixture(signatures, b)
    assert np.linalg.norm(problem.gradient(x)) < 1e-200
    proof = certificates.certify(problem, x)
    assert not proof.valid
    assert "exceeds 1e-09" in proof.reason
    with pytest.warns(ConvergenceWarning, match="underflowed"):
        result = minimize(problem, x0=x, solver=Newton(hessian="exact"))
    assert result.status == "false_optimum"
    # The exact solver does not care where it starts.
    assert minimize(problem, x0=x).converged


@pytest.mark.parametrize(
    "options", [{"offset": np.zeros(5)}, {"ridge": 0.1}, {"row_penalty": 0.1}, {"activation": "tanh"}]
)
def test_what_is_no_mixture(options):
    signatures, b = instance()
    arguments = {"activation": "identity"} | options
    assert not problems.TwoLayer(None, signatures, b, **arguments).is_mixture
    assert not problems.TwoLayer(2 * np.eye(5), signatures, b, "identity").is_mixture
    assert not problems.TwoLayer(np.ones((5, 2)), signatures, b, "identity").is_mixture


def test_gap_tolerance_is_checked():
    with pytest.raises(ValueError, match="gap_tolerance must be positive"):
        ActiveSet(gap_tolerance=0.0)


sizes = st.integers(1, 7)


@given(n=sizes, m=sizes, seed=st.integers(0, 2**16), scale=st.floats(1e-3, 1e3))
def test_permutations_and_scales(n, m, seed, scale):
    signatures, b = instance(n, m, 4, seed=seed, noise=0.3)
    rng = np.random.default_rng(seed)
    order = rng.permutation(n)
    problem = mixture(signatures, b)
    best = minimize(problem)
    assert best.converged
    values = problem.column_values(best.x)
    permuted = mixture(signatures[:, order], b)
    other = minimize(permuted)
    np.testing.assert_allclose(permuted.column_values(other.x), values, rtol=1e-8, atol=1e-10)
    scaled = mixture(scale * signatures, scale * b)
    larger = minimize(scaled)
    np.testing.assert_allclose(
        scaled.column_values(larger.x), scale**2 * values, rtol=1e-8, atol=1e-10 * scale**2
    )
    if m > n:
        f = problem.proportions(best.x)
        np.testing.assert_allclose(permuted.proportions(other.x), f[order], atol=1e-6)
        np.testing.assert_allclose(scaled.proportions(larger.x), f, atol=1e-6)
    # Bands of weight zero might as well be left out; a weight of two is a band twice.
    weights = rng.integers(0, 3, m).astype(float)
    if weights.any():
        weighted = mixture(signatures, b, weights=weights)
        repeated = mixture(
            np.repeat(signatures, weights.astype(int), axis=0), np.repeat(b, weights.astype(int), axis=0)
        )
        assert minimize(weighted).value == pytest.approx(minimize(repeated).value, rel=1e-8, abs=1e-10)

"""Steps of quadratic models, by the conditions that characterise a minimiser in a ball."""

import numpy as np
import pytest
from scipy import sparse

from attnfit import minimize, problems
from attnfit.solvers import Newton
from attnfit.solvers.subproblem import (
    FINE,
    Cholesky,
    FlexibleGradients,
    MoreSorensen,
    QuasiNewton,
    SteihaugToint,
    _to_boundary,
    preconditioned,
)

DENSE = [MoreSorensen, Cholesky]
SPECTRA = {
    "definite": [0.5, 1.0, 2.0, 7.0, 40.0],
    "indefinite": [-3.0, -1.0, 0.2, 2.0, 5.0],
    "slightly negative": [-1e-4, 0.3, 1.0, 2.0, 4.0],
    "negative": [-5.0, -4.0, -3.0, -2.0, -1.0],
    "singular": [0.0, 0.0, 1.0, 2.0, 3.0],
}


def matrix(values, seed=0):
    Q = np.linalg.qr(np.random.default_rng(seed).standard_normal((len(values), len(values))))[0]
    H = (Q * values) @ Q.T
    return 0.5 * (H + H.T), Q


def decrease(H, g, p):
    return -float(g @ p + 0.5 * p @ H @ p)


def is_minimiser(H, g, p, radius, tolerance=1e-5):
    """More and Sorensen: ``(H + shift) p = -g`` with H + shift positive and shift = 0 inside the ball."""
    length = np.linalg.norm(p)
    assert length <= radius * (1.0 + tolerance)
    shift = 0.0 if length < radius * (1.0 - tolerance) else -float(p @ (H @ p + g)) / length**2
    scale = np.abs(np.linalg.eigvalsh(H)).max()
    assert shift >= -tolerance * scale
    assert np.linalg.eigvalsh(H)[0] + shift >= -tolerance * scale
    np.testing.assert_allclose(H @ p + shift * p, -g, atol=tolerance * (scale * length + np.linalg.norm(g)))
    return shift


@pytest.mark.parametrize("make", DENSE)
@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("radius", [1e-6, 0.03, 1.0, 30.0])
def test_the_step_is_the_minimiser_in_the_ball(make, name, radius):
    H, _ = matrix(SPECTRA[name])
    for seed in range(4):
        g = np.random.default_rng(seed).standard_normal(5)
        step = make(H).solve(g, radius)
        shift = is_minimiser(H, g, step.p, radius)
        assert step.bounded == (shift > 1e-9)
        assert np.isclose(step.predicted, decrease(H, g, step.p), rtol=1e-9)
        assert step.predicted > 0.0


@pytest.mark.parametrize("make", DENSE)
@pytest.mark.parametrize("side", [1e-4, -1e-4, 0.0])
@pytest.mark.parametrize("radius", [1.0, 10.0])
def test_the_hard_case(make, side, radius):
    """A gradient almost without a part along the lowest curvature: the rest of the radius goes there, to the
    side where the loss falls.
    """
    values = np.array([-2.0, 1.0, 3.0, 4.0])
    H, Q = matrix(values)
    g = Q @ np.array([side, 0.5, -1.0, 0.2])
    step = make(H, 1e-3).solve(g, radius)
    # Where the gradient has no part there, the shift is two and the rest is solved by division.
    inner = np.array([0.5, -1.0, 0.2]) / (values[1:] + 2.0)
    # The model is solved to its tolerance.
    best = 0.5 * 2.0 * radius**2 + abs(side) * radius + 0.5 * np.sum(inner**2 * (values[1:] + 2.0))
    assert step.bounded
    assert np.isclose(np.linalg.norm(step.p), radius, rtol=1e-5)
    assert np.isclose(step.predicted, decrease(H, g, step.p), rtol=1e-9)
    assert np.isclose(step.predicted, best, rtol=2e-3, atol=0.0)
    assert side * (Q.T @ step.p)[0] <= 0.0
    assert abs((Q.T @ step.p)[0]) > 0.5 * radius


@pytest.mark.parametrize(("share", "moves"), [(1e-5, False), (5e-4, False), (5e-3, True), (0.5, True)])
@pytest.mark.parametrize("c", [1e-4, 1.0, 1e4])
def test_a_slope_along_a_flat_direction_counts_if_it_is_no_rounding(share, moves, c):
    """Beside the others, whatever the unit of the loss."""
    H, Q = matrix(np.array([0.0, 1.0, 2.0]))
    g = c * Q @ np.array([share, -0.6, 0.8])
    step = MoreSorensen(H).solve(g, np.inf)
    assert step.bounded == moves
    assert (abs((Q.T @ step.p)[0]) > 1e-9 * c) == moves
    steep = MoreSorensen(H).solve(g, np.inf, steep_only=True)
    np.testing.assert_allclose(Q.T @ steep.p / c, [0.0, 0.6, -0.4], atol=1e-12)
    assert not steep.bounded
    assert np.isclose(steep.predicted, c**2 * (0.5 * 0.36 + 0.5 * 0.64 / 2.0))


@pytest.mark.parametrize("make", DENSE)
def test_which_curvature_counts(make):
    """Flat below 1e-13 of the largest, negative below -1e-9 of it."""
    for lowest, n_flat, negative in [
        (5e-13, 0, False),
        (5e-14, 1, False),
        (-5e-14, 1, False),
        (-1e-10, 0, False),
        (-5e-9, 0, True),
        (-1e-3, 0, True),
    ]:
        model = make(np.diag([3.0 * lowest, 1.0, 3.0]))
        assert (model.n_flat, model.negative) == (n_flat, negative), lowest
        eigen = model if make is MoreSorensen else model.eigen
        np.testing.assert_array_equal(np.abs(eigen.unidentified), np.eye(3)[:, :n_flat])
        np.testing.assert_allclose(model.hessian, np.diag([3.0 * lowest, 1.0, 3.0]), atol=1e-15)
    assert make(np.diag([1e-3, 1.0]), 1e-2).n_flat == 1
    assert make(-np.eye(2)).negative
    assert make(np.zeros((2, 2))).n_flat == 2


def test_curvature_that_is_negative_by_rounding_counts_by_its_size():
    H, g = np.diag([-1e-11, 1.0, 2.0]), np.array([1e-10, 1.0, 1.0])
    step = MoreSorensen(H).solve(g, 100.0)
    np.testing.assert_allclose(step.p, [-10.0, -1.0, -0.5])
    assert not step.bounded


@pytest.mark.parametrize("c", [1.0, 3.0])
def test_without_a_radius_a_step_lies_between_a_gradient_step_and_a_newton_step(c):
    H, g = np.diag([-4.0, 1.0, 16.0]), c * np.array([3.0, 1.0, 5.0])
    step = MoreSorensen(H).solve(g, np.inf)
    gradient, newton = np.linalg.norm(g), np.linalg.norm(g / [4.0, 1.0, 16.0])
    assert step.bounded
    assert np.isclose(np.linalg.norm(step.p), np.sqrt(gradient * newton), rtol=1e-5)
    is_minimiser(H, g, step.p, np.linalg.norm(step.p))
    assert np.isfinite(MoreSorensen(np.zeros((2, 2))).solve(np.ones(2), np.inf).p).all()


def test_how_far_a_stationary_point_is():
    H, Q = matrix(np.array([-2.0, 0.0, 4.0, 5.0]))
    p = MoreSorensen(H).approach(Q @ np.array([1.0, 1.0, 2.0, 10.0]))
    np.testing.assert_allclose(Q.T @ p, [-0.5, 0.0, -0.5, -2.0], atol=1e-12)


def test_a_firm_model_has_more_curvature_everywhere_than_a_share_of_the_largest():
    model = MoreSorensen(np.diag([2e-3, 3e-3, 4e-3, 2.0]))
    assert model.is_firm(0.5e-3)
    assert not model.is_firm(2e-3)
    assert not MoreSorensen(np.diag([-1.0, 1.0])).is_firm(1e-12)
    assert not Cholesky(np.diag([-1.0, 1.0])).is_firm(1e-12)
    for d in (20, 60):
        # Sums of its columns without regard to sign are what a norm is.
        laplacian = 2.0 * np.eye(d) - np.eye(d, k=1) - np.eye(d, k=-1)
        reciprocal = 1.0 / np.linalg.cond(laplacian, 1)
        model = Cholesky(laplacian)
        assert model.is_firm(0.3 * reciprocal)
        assert not model.is_firm(1.1 * reciprocal)


@pytest.mark.parametrize("lowest", [1e-3, 1e-12])
def test_a_factored_model_is_the_model(lowest):
    """Up to a condition number that a factorisation stands."""
    H, Q = matrix(np.array([lowest, 1.0, 2.0]))
    g = Q @ np.array([lowest, 1.0, 1.0])
    one, other = Cholesky(H, 1e-14).solve(g, np.inf), MoreSorensen(H, 1e-14).solve(g, np.inf)
    np.testing.assert_allclose(one.p, other.p, rtol=1e-3)
    assert np.isclose(one.predicted, other.predicted, rtol=1e-3)
    # One that is flat is not solved by its factor, which rounding makes.
    assert Cholesky(H, 1e-6).n_flat == (lowest < 1e-6)


# ---- corrected models


def pairs(rng, d, k, M):
    """Steps and gradient differences of a positive matrix."""
    steps = [rng.standard_normal(d) for _ in range(k)]
    return [(s, M @ s) for s in steps]


@pytest.mark.parametrize("make", DENSE)
@pytest.mark.parametrize("k", [0, 1, 3, 8])
def test_a_corrected_model_is_one_matrix(make, k):
    """Its step, its promise and its matrix agree; the last pair is met exactly: the secant condition."""
    rng = np.random.default_rng(k)
    base, truth = matrix([0.5, 1.0, 2.0, 3.0, 9.0], 1)[0], matrix([0.2, 1.0, 1.5, 4.0, 6.0], 2)[0]
    model = QuasiNewton(make(base))
    for s, y in pairs(rng, 5, k, truth):
        assert model.learn(s, y) is model
        np.testing.assert_allclose(model.hessian @ s, y, rtol=1e-10, atol=1e-12)
    H = model.hessian
    np.testing.assert_allclose(H, H.T, atol=1e-12)
    assert np.linalg.eigvalsh(H)[0] > 0.0
    for g in rng.standard_normal((4, 5)):
        step = model.solve(g, np.inf)
        np.testing.assert_allclose(H @ step.p, -g, rtol=1e-9, atol=1e-9)
        assert np.isclose(step.predicted, decrease(H, g, step.p), rtol=1e-9)
        assert step.predicted > 0.0
        assert not step.bounded
    np.testing.assert_array_equal(make(base).hessian, model.base.hessian)


def test_pairs_of_all_directions_leave_nothing_of_the_base():
    """Conjugate steps of a quadratic make the matrix its own: Broyden's class terminates."""
    truth, Q = matrix([0.2, 1.0, 1.5, 4.0, 6.0], 2)
    model = QuasiNewton(MoreSorensen(np.eye(5)))
    for s in Q.T:
        model.learn(s, truth @ s)
    np.testing.assert_allclose(model.hessian, truth, atol=1e-12)


def test_a_pair_without_positive_curvature_is_not_learned():
    base = matrix([1.0, 2.0, 3.0])[0]
    model = QuasiNewton(MoreSorensen(base))
    for c in (0.0, -1.0):
        model.learn(np.array([1.0, 0.0, 0.0]), np.array([c, 1.0, 0.0]))
    np.testing.assert_allclose(model.hessian, base, atol=1e-14)
    assert not model.negative
    assert QuasiNewton(MoreSorensen(-base)).negative


@pytest.mark.parametrize("steep_only", [False, True])
def test_a_corrected_step_beyond_the_radius_is_the_base_models(steep_only):
    base, Q = matrix([0.0, 1.0, 2.0])
    model = QuasiNewton(MoreSorensen(base))
    s = Q @ np.array([0.0, 1.0, 1.0])
    model.learn(s, 0.1 * (Q @ np.array([0.0, 1.0, 2.0])))
    g = Q @ np.array([0.0, 1.0, -0.7])
    free = model.solve(g, np.inf, steep_only=steep_only)
    length = float(np.linalg.norm(free.p))
    assert not free.bounded
    np.testing.assert_array_equal(model.solve(g, 1.01 * length, steep_only=steep_only).p, free.p)
    short = model.solve(g, 0.5 * length, steep_only=steep_only)
    np.testing.assert_array_equal(short.p, model.base.solve(g, 0.5 * length, steep_only=steep_only).p)
    # A slope along a flat direction leaves no Newton step to correct.
    flat = Q @ np.array([1.0, 1.0, -0.7])
    assert model.solve(flat, np.inf).bounded
    assert not model.solve(flat, np.inf, steep_only=True).bounded
    assert abs((Q.T @ model.solve(flat, np.inf, steep_only=True).p)[0]) < 1e-12


# ---- conjugate gradients


def krylov(H, forcing=1e-12, **options):
    """A model and the list of its products."""
    asked = []

    def product(v):
        asked.append(v)
        return H @ v

    return SteihaugToint(product, forcing, **options), asked


def test_conjugate_gradients_end_at_the_newton_step():
    H, _ = matrix(np.linspace(0.5, 9.0, 8))
    g = np.random.default_rng(0).standard_normal(8)
    model, asked = krylov(H)
    step = model.solve(g, np.inf)
    np.testing.assert_allclose(step.p, -np.linalg.solve(H, g), rtol=1e-8)
    assert np.isclose(step.predicted, decrease(H, g, step.p))
    assert not step.bounded
    assert not model.negative
    assert len(asked) <= 9


@pytest.mark.parametrize("forcing", [0.5, 1e-1, 1e-3])
def test_conjugate_gradients_stop_where_they_are_told(forcing):
    H, _ = matrix(np.geomspace(1.0, 1e4, 40))
    g = np.random.default_rng(0).standard_normal(40)
    model, asked = krylov(H, forcing)
    p = model.solve(g, np.inf).p
    assert np.linalg.norm(H @ p + g) <= forcing * np.linalg.norm(g) * (1 + 1e-9)
    # The step before was not there yet.
    short, _ = krylov(H, 0.0, max_products=len(asked) - 1)
    assert np.linalg.norm(H @ short.solve(g, np.inf).p + g) > forcing * np.linalg.norm(g)


@pytest.mark.parametrize("radius", [0.05, 0.3, 1.0])
def test_conjugate_gradients_follow_their_path_to_the_radius(radius):
    """Steihaug: along the path the length grows and the model falls; a shorter radius costs no product."""
    H, _ = matrix(np.geomspace(0.3, 30.0, 12))
    g = np.random.default_rng(1).standard_normal(12)
    model, asked = krylov(H)
    full = model.solve(g, np.inf)
    assert np.linalg.norm(full.p) > 1.0
    n_asked = len(asked)
    step = model.solve(g, radius)
    assert len(asked) == n_asked
    assert step.bounded
    assert np.isclose(np.linalg.norm(step.p), radius, rtol=1e-12)
    assert np.isclose(step.predicted, decrease(H, g, step.p), rtol=1e-10)
    steepest = -g / np.linalg.norm(g) * min(radius, g @ g * np.linalg.norm(g) / (g @ H @ g))
    assert step.predicted >= decrease(H, g, steepest) * (1 - 1e-12)
    fresh, _ = krylov(H)
    np.testing.assert_allclose(fresh.solve(g, radius).p, step.p, rtol=1e-10)


def test_conjugate_gradients_leave_along_negative_curvature():
    H, g = np.diag([2.0, -1.0, 3.0]), np.array([1.0, 0.1, 0.5])
    model, _ = krylov(H)
    step = model.solve(g, 5.0)
    assert model.negative
    assert step.bounded
    assert np.isclose(np.linalg.norm(step.p), 5.0)
    assert np.isclose(step.predicted, decrease(H, g, step.p))
    assert step.predicted > 0.0
    # Without a radius the gradient step sets the scale, or what has been walked where that is longer.
    model, _ = krylov(-np.eye(3))
    np.testing.assert_allclose(model.solve(g, np.inf).p, -g)
    model, _ = krylov(np.diag([0.1, -0.001]))
    p = model.solve(np.array([1.0, 0.01]), np.inf).p
    assert np.linalg.norm(p) > 5.0


def test_curvature_of_rounding_is_none():
    for c, negative in [(5e-13, False), (5e-14, True)]:
        model, _ = krylov(c * np.eye(2))
        model.solve(np.ones(2), np.inf)
        assert model.negative == negative


def test_conjugate_gradients_give_up():
    H, _ = matrix(np.geomspace(1.0, 1e4, 400))
    g = np.random.default_rng(0).standard_normal(400)
    model, asked = krylov(H, 0.0)
    model.solve(g, np.inf)
    assert len(asked) == 250


@pytest.mark.parametrize("towards", [1.0, -1.0, 0.0])
@pytest.mark.parametrize("size", [1e-8, 0.999, 1.0])
def test_the_way_to_the_boundary(towards, size):
    rng = np.random.default_rng(0)
    u, v = np.linalg.qr(rng.standard_normal((4, 2)))[0].T
    p, direction = size * u, 3.0 * (towards * u + 0.5 * v)
    tau = _to_boundary(p, direction, 1.0)
    assert tau >= 0.0
    assert np.isclose(np.linalg.norm(p + tau * direction), 1.0, rtol=1e-12)


@pytest.mark.parametrize("size", [1e-300, 1e-234, 1e-160, 1e100])
@pytest.mark.parametrize("radius", [np.inf, 2.3e-308, 1e-200, 1.0])
def test_gradients_and_radii_at_the_ends_of_the_range(size, radius):
    for values in ([-1.0, 2.0, 3.0], [0.0, 1.0, 2.0], [1.0, 2.0, 3.0]):
        with np.errstate(all="ignore"):
            step = MoreSorensen(np.diag(values)).solve(size * np.array([1.0, -2.0, 0.5]), radius)
        assert np.isfinite(step.p).all()
        assert np.linalg.norm(step.p) <= max(1.001 * radius, 1e-150) or radius == np.inf


@pytest.mark.parametrize("exponent", [-400, -150, 150, 300])
@pytest.mark.parametrize("radius", [0.01, 0.3, 1.0])
def test_the_unit_of_the_objective_changes_no_step(radius, exponent):
    """Nor that of a gradient and a Hessian of which hardly anything is left, as on the way to infinity."""
    rng = np.random.default_rng(3)
    for values in ([1.0, 2.0, 5.0], [-1.0, 0.5, 3.0], [1e-3, 1.0, 1.0]):
        g, unit = rng.standard_normal(3), 2.0**exponent
        expected = MoreSorensen(np.diag(values)).solve(g, radius)
        found = MoreSorensen(unit * np.diag(values)).solve(unit * g, radius)
        np.testing.assert_allclose(found.p, expected.p, rtol=1e-12)
        assert found.bounded == expected.bounded


def test_a_gradient_whose_square_underflows_is_followed():
    """Along a direction without curvature; its step of no length has no direction of its own."""
    g = np.array([1e-200, -1e-200])
    p = MoreSorensen(np.diag([0.0, 1.0])).solve(g, 1.0).p
    assert p[0] < 0.0 < p[1] and np.linalg.norm(p) <= 1.0


# ---- with the help of drawn rows


def counted(H):
    asked = []
    return (lambda v: asked.append(v) or H @ v), asked


@pytest.mark.parametrize("seen", [40, 25], ids=["all directions drawn", "some directions in no drawn row"])
def test_drawn_rows_save_products_with_all_rows(seen):
    """Their Hessian is thirty per cent off, and blind to some directions."""
    rng = np.random.default_rng(0)
    H, Q = matrix(np.geomspace(1e-3, 1.0, 40))
    values = np.geomspace(1e-3, 1.0, 40) * rng.uniform(0.7, 1.4, 40)
    values[seen:] = 0.0
    g = rng.standard_normal(40)
    product, asked = counted(H)
    step = preconditioned(product, lambda v: Q @ (values * (Q.T @ v))).solve(g, np.inf)
    assert np.linalg.norm(H @ step.p + g) <= FINE * np.linalg.norm(g)
    assert np.isclose(step.predicted, decrease(H, g, step.p))
    plain, needed = counted(H)
    SteihaugToint(plain, FINE).solve(g, np.inf)
    assert len(asked) <= (0.35 if seen == 40 else 1.0) * len(needed)


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("radius", [1e-3, 0.3, np.inf])
def test_radius_and_negative_curvature_are_those_without_help(spectrum, radius):
    H, _ = matrix(SPECTRA[spectrum])
    g = H @ np.random.default_rng(1).standard_normal(5)
    found = preconditioned(lambda v: H @ v, lambda v: H @ v).solve(g, radius)
    expected = SteihaugToint(lambda v: H @ v, FINE).solve(g, radius)
    assert found.bounded is expected.bounded
    assert np.linalg.norm(found.p) <= radius * (1 + 1e-9)
    if expected.bounded:
        np.testing.assert_allclose(found.p, expected.p)
    else:
        assert np.linalg.norm(H @ found.p + g) <= FINE * np.linalg.norm(g) * (1 + 1e-9)


def test_a_solver_that_gives_up_is_no_help():
    H, _ = matrix(SPECTRA["definite"])
    g = np.ones(5)
    for precondition in (lambda r: None, lambda r: -r):
        found = FlexibleGradients(lambda v: H @ v, FINE, precondition).solve(g, np.inf)
        np.testing.assert_array_equal(found.p, SteihaugToint(lambda v: H @ v, FINE).solve(g, np.inf).p)


@pytest.mark.parametrize("n", [20_000, 100_000], ids=["not where they are many", "where they are few"])
def test_drawn_rows_help_to_end_a_fit_without_a_square_array(monkeypatch, n):
    """The last steps and the verdict need systems of all rows."""
    rng = np.random.default_rng(0)
    d, size, helped = 60, np.geomspace(1.0, 0.05, 60), []
    A = sparse.random_array((n, d), density=0.1, rng=rng, format="csr")
    A.data = rng.standard_normal(A.nnz) * size[A.indices]
    groups = np.repeat(np.arange(n // 10), 10)
    b = np.exp(A @ (rng.standard_normal(d) / size) + 0.3 * rng.standard_normal(n))
    b /= np.bincount(groups, b)[groups]
    monkeypatch.setattr(
        "attnfit.solvers.curvature.preconditioned", lambda *given: helped.append(1) or preconditioned(*given)
    )
    problem, solver = problems.Softmax(A, b, groups), Newton(hessian="matrix_free")
    result = minimize(problem, solver=solver, random_state=0)
    assert result.converged and bool(helped) is (n == 100_000)
    step = np.linalg.solve(problem.hessian(result.x), result.gradient)
    assert problem.moves(problem.evaluate(result.x), step[:, None]).largest[0] < 1e-6

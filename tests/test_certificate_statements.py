"""What a certificate says of open directions, coefficients, several right-hand sides and foreign losses."""

from __future__ import annotations

import warnings
from dataclasses import replace

import mpmath
import numpy as np
import pytest
from instances import ALL_LOSSES, instance

from attnfit import SoftmaxRegressor, certificates, minimize, problems
from attnfit.certificates.kantorovich import combined, refused
from attnfit.losses.activations import ACTIVATIONS, Activation
from attnfit.losses.elementwise import SquaredExponential
from attnfit.losses.softmax import CrossEntropy, SoftmaxLoss, Squared
from attnfit.objectives.rows import RowProblem
from benchmarks.exact_answers import DIGITS, error_of, exact_answer, stationarity


def quietly(problem, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return minimize(problem, **options)


def with_open_columns(seed=0):
    """Columns 0, 3 and 4 are open: four times the first, and a constant; 1 and 2 are not."""
    inst, _ = instance("Softmax", "cross_entropy", sizes=(20, 15, 9), d=3, noise=0.1, seed=seed)
    A = np.column_stack([inst.A, 4.0 * inst.A[:, 0], np.full(len(inst.A), 7.0)])
    return inst, inst.problem(A=A), A


# ---- open directions


@pytest.mark.parametrize("seed", range(3))
def test_what_is_identified_although_directions_are_open(seed):
    inst, problem, _ = with_open_columns(seed)
    result = quietly(problem)
    x = result.x + 1e-6 * np.random.default_rng(seed).standard_normal(5)
    proof = certificates.certify(problem, x)
    assert not proof.valid
    assert proof.valid_for_predictions
    assert np.isfinite(proof.coefficient_radius).tolist() == [False, True, True, False, False]
    known = proof.identified
    assert known.basis.shape == (5, 3)
    np.testing.assert_allclose(known.basis.T @ known.basis, np.eye(3), atol=1e-12)
    # Along the open directions the basis is silent.
    np.testing.assert_allclose(known.basis.T @ np.array([4.0, 0, 0, -1, 0]), 0.0, atol=1e-10)
    np.testing.assert_allclose(known.basis.T @ np.eye(5)[4], 0.0, atol=1e-10)
    with mpmath.workdps(DIGITS):
        start = np.array([x[0] + 4.0 * x[3], x[1], x[2]])
        answer, _ = exact_answer(stationarity("Softmax", "cross_entropy", inst.A, inst.b, inst.ids), start)
        _, each = error_of(start, answer)
    assert (each[1:] <= proof.coefficient_radius[1:3]).all()
    assert (proof.coefficient_radius[1:3] < 1e-3).all()
    # Any point with the same predictions will do for x*.
    exact = np.array([float(answer[0]) - 4.0 * x[3], float(answer[1]), float(answer[2]), x[3], x[4]])
    assert np.linalg.norm(known.basis.T @ (x - exact)) <= known.radius * (1 + 1e-9)
    assert problem.value(x) - result.value <= proof.value_gap * (1 + 1e-6) + 1e-13


def test_open_directions_that_no_row_sees_are_told_from_flat_ones():
    inst, _, A = with_open_columns()
    rng = np.random.default_rng(0)
    faint = A[:, :4].copy()
    faint[:, 3] += 1e-8 * rng.standard_normal(len(faint))
    structural = quietly(inst.problem(A=A[:, :4])).certificate()
    flat = quietly(inst.problem(A=faint)).certificate()
    assert structural.n_unidentified == flat.n_unidentified == 1
    assert "seen by no row" in structural.reason
    assert np.isfinite([structural.scaled_radius, structural.value_gap]).all()
    assert "although the data see it" in flat.reason
    assert not flat.valid_for_predictions
    assert np.isinf([flat.radius, flat.scaled_radius, flat.value_gap]).all()


@pytest.mark.parametrize("part", [0.01, 1e-8])
def test_a_faint_part_in_an_open_direction_is_a_part(part):
    """A column that is another and a hundredth, or less, of a third: all three are open."""
    inst, _ = instance("Softmax", "cross_entropy", sizes=(20, 15, 9), d=3, noise=0.1)
    A = np.column_stack([inst.A, inst.A[:, 0] + part * inst.A[:, 1]])
    proof = quietly(inst.problem(A=A)).certificate()
    assert proof.valid_for_predictions
    assert np.isfinite(proof.coefficient_radius).tolist() == [False, False, True, False]
    assert "column 0, column 1, column 3" in proof.reason


def test_ill_conditioned_columns_hide_no_faint_one():
    """Where rounding blurs the open direction, a row that sees it is not taken for blind."""
    inst, _ = instance("Softmax", "cross_entropy", sizes=(20, 15, 9), d=2, noise=0.1)
    rng = np.random.default_rng(0)
    beside = inst.A * [3e-4, 1e-8] * rng.standard_normal(inst.A.shape)
    proof = quietly(inst.problem(A=np.column_stack([inst.A, inst.A + beside]))).certificate()
    assert proof.n_unidentified == 1
    assert not proof.valid_for_predictions


@pytest.mark.parametrize("loss", ["cross_entropy", "squared"])
def test_rows_that_do_not_count_see_nothing(loss):
    """A group without weight, or without a target where that is all that weighs it."""
    inst, _ = instance("Softmax", loss, sizes=(20, 15, 9), d=3, noise=0.1)
    A = np.column_stack([inst.A, inst.A[:, 0]])
    last = inst.ids == 2
    A[last, 3] += np.random.default_rng(0).standard_normal(9)
    weights = np.where(last, 0.0, 1.0)
    assert quietly(inst.problem(A=A, weights=weights)).certificate().valid_for_predictions
    if loss == "cross_entropy":
        empty = np.where(last, 0.0, inst.b)
        assert quietly(inst.problem(A=A, b=empty)).certificate().valid_for_predictions
    weights[last] = 1e-3
    proof = quietly(inst.problem(A=A, weights=weights), tol=1e-12).certificate()
    assert proof.n_unidentified == 0
    flat = quietly(
        problems.Exponential(np.array([[1.0, 1.0], [2.0, 2.0], [0.0, 1.0]]), np.ones(3), weights=[1, 1, 0])
    )
    assert flat.certificate().valid_for_predictions


def test_a_layer_ignores_what_all_logits_share():
    rng = np.random.default_rng(0)
    A2 = rng.standard_normal((40, 5))
    b = np.tanh(A2 @ rng.dirichlet(np.ones(5)))
    proof = quietly(
        problems.TwoLayer(None, A2, b + 0.01 * rng.standard_normal(40), "tanh"), tol=1e-12
    ).certificate()
    assert proof.n_unidentified == 1
    assert proof.valid_for_predictions
    assert np.isinf(proof.coefficient_radius).all()


def test_the_columns_of_a_long_list_are_counted():
    inst, _ = instance("Softmax", "cross_entropy", sizes=(20, 15, 9), d=5, noise=0.1)
    proof = quietly(inst.problem(A=np.column_stack([inst.A, inst.A]))).certificate()
    assert "column 5 and 4 more" in proof.reason


# ---- single coefficients


NEEDS_RIDGE = (("Softmax", "entropy"), ("Softmax", "linear_cross_entropy"))


@pytest.mark.parametrize(("family", "loss"), [pair for pair in ALL_LOSSES if pair not in NEEDS_RIDGE])
def test_each_coefficient_has_its_own_radius(family, loss):
    inst, _ = instance(family, loss, sizes=(20, 15, 9), d=4, noise=0.1)
    scales = np.array([1.0, 0.1, 1e-3, 10.0])
    problem = inst.problem(A=inst.A * scales)
    result = quietly(problem, tol=1e-13)
    x = result.x + 1e-6 * np.random.default_rng(0).standard_normal(4) / scales
    proof = certificates.certify(problem, x)
    assert proof.valid, proof.reason
    assert (np.abs(x - result.x) <= proof.coefficient_radius * (1 + 1e-6)).all()
    assert (proof.coefficient_radius <= proof.radius * (1 + 1e-12)).all()
    # Better than the norm where columns are of different size.
    assert proof.coefficient_radius[3] < 0.1 * proof.radius


def test_coefficient_radii_have_the_shape_of_x():
    rng = np.random.default_rng(0)
    A1, A2 = rng.standard_normal((6, 2)), rng.standard_normal((7, 3))
    B = rng.dirichlet(np.ones(7), 6)
    problem = problems.Attention(A1, A2, B, "cross_entropy", ridge=0.1)
    assert quietly(problem).certificate().coefficient_radius.shape == (2, 3)
    refused = certificates.certify(problems.Exponential(np.ones((3, 2)), np.ones(3), "cosh"), np.zeros(2))
    assert not refused.valid
    assert np.isinf(refused.coefficient_radius).tolist() == [True, True]
    mixture = quietly(problems.TwoLayer(None, rng.random((5, 3)), rng.random((5, 2)), "identity"))
    assert mixture.certificate().coefficient_radius.shape == (3, 2)


@pytest.mark.parametrize("seed", range(6))
def test_coefficient_radii_scale_with_the_columns(seed):
    """Property 22: scaled and centred data have the same certificate, within a factor of two."""
    rng = np.random.default_rng(seed)
    inst, _ = instance("Softmax", ["squared", "cross_entropy"][seed % 2], sizes=(9, 8, 7), d=3, seed=seed)
    x = quietly(inst.problem(), tol=1e-12).x + 1e-7 * rng.standard_normal(3)
    scales = 10.0 ** rng.uniform(-6, 6, 3)
    moved = inst.A + rng.standard_normal((3, 3))[inst.ids]
    plain = certificates.certify(inst.problem(), x).coefficient_radius
    for A in (inst.A * scales, moved * scales):
        scaled = certificates.certify(inst.problem(A=A), x / scales).coefficient_radius * scales
        assert (scaled <= 2.0 * plain).all()
        assert (plain <= 2.0 * scaled).all()


# ---- several right-hand sides


@pytest.mark.parametrize("k", [2, 5])
def test_equal_right_hand_sides_add_up(k):
    """Property 23: k of them have a radius of sqrt(k)."""
    rng = np.random.default_rng(0)
    S = rng.standard_normal((30, 4))
    y = np.tanh(S @ rng.dirichlet(np.ones(4))) + 0.05 * rng.standard_normal(30)
    one = problems.TwoLayer(None, S, y, "tanh", ridge=0.3)
    many = problems.TwoLayer(None, S, np.column_stack([y] * k), "tanh", ridge=0.3)
    x = quietly(one, tol=1e-12).x + 1e-5
    single, all_of = certificates.certify(one, x), certificates.certify(many, np.column_stack([x] * k))
    assert single.valid and all_of.valid
    for name, factor in (("radius", np.sqrt(k)), ("scaled_radius", np.sqrt(k)), ("value_gap", k)):
        assert np.isclose(getattr(all_of, name), factor * getattr(single, name), rtol=1e-10)
    for name, each in (("radii", "radius"), ("scaled_radii", "scaled_radius"), ("value_gaps", "value_gap")):
        np.testing.assert_allclose(getattr(all_of, name), np.full(k, getattr(single, each)), rtol=1e-10)
    assert all_of.coefficient_radius.shape == many.shape
    np.testing.assert_allclose(all_of.coefficient_radius[:, -1], single.coefficient_radius, rtol=1e-10)


def test_the_norm_over_all_columns_is_bounded():
    rng = np.random.default_rng(1)
    S = rng.standard_normal((30, 4))
    Y = np.tanh(S @ rng.dirichlet(np.ones(4), 3).T) + 0.05 * rng.standard_normal((30, 3))
    problem = problems.TwoLayer(None, S, Y, "tanh", ridge=0.3)
    result = quietly(problem, tol=1e-13)
    for scale in (1e-6, 1e-4, 1e-3):
        x = result.x + scale * rng.standard_normal(result.x.shape)
        proof = certificates.certify(problem, x)
        assert proof.valid
        assert np.linalg.norm(x - result.x) <= proof.radius * (1 + 1e-6)
        assert problem.value(x) - result.value <= proof.value_gap * (1 + 1e-6)
        assert (np.abs(x - result.x) <= proof.coefficient_radius * (1 + 1e-6)).all()
    x[:, 1] += 5.0
    proof = certificates.certify(problem, x)
    assert not proof.valid
    assert np.isinf([proof.radius, proof.value_gap]).all()
    assert np.isfinite(proof.radii).tolist() == [True, False, True]
    assert "2 of 3 right-hand sides certified, the worst is 1" in proof.reason


def test_the_worst_right_hand_side_speaks_for_all():
    """Steps, constants and curvatures are the worst; open directions add up; what is refused is unknown."""
    made = certificates.Certificate
    good = made(True, 3.0, 2.0, 0.5, "", 0.1, 4.0, 7.0, 0, True, coefficient_radius=np.array([1.0, 2.0]))
    other = made(True, 4.0, 1.0, 0.25, "", 0.3, 1.0, 2.0, 0, True, coefficient_radius=np.array([3.0, 2.5]))
    both = combined([good, other])
    assert (both.eta, both.lipschitz, both.lambda_min) == (0.3, 4.0, 2.0)
    assert (both.radius, both.value_gap, both.n_unidentified) == (5.0, 0.75, 0)
    assert np.isclose(both.scaled_radius, np.sqrt(5.0))
    assert both.valid and both.valid_for_predictions
    assert both.coefficient_radius.tolist() == [[1.0, 3.0], [2.0, 2.5]]
    assert "2 of 2 right-hand sides certified, the worst is 1" in both.reason
    blind = replace(other, valid=False, radius=np.inf, n_unidentified=2)
    lost = refused("too far", n_unidentified=1)
    for proofs, predicted in (([good, blind], True), ([blind, good], True), ([good, lost, blind], False)):
        told = combined(proofs)
        assert not told.valid
        assert told.valid_for_predictions == predicted
        assert told.n_unidentified == sum(p.n_unidentified for p in proofs)
        assert told.coefficient_radius.shape == (2, len(proofs))
    assert np.isinf(combined([good, lost]).coefficient_radius[:, 1]).all()
    assert combined([lost]) is lost


def test_what_a_certificate_shows_of_itself_is_short():
    """Arrays are for those who ask; a certificate is not changed after the fact."""
    _, problem, _ = with_open_columns()
    proof = quietly(problem).certificate()
    assert "array" not in repr(proof)
    assert "Identified" not in repr(proof)
    for thing, name in ((proof, "valid"), (proof.identified, "radius")):
        with pytest.raises(AttributeError):
            setattr(thing, name, True)
    assert certificates.Certificate(True, 1.0, 1.0, 1.0, "", 0.1, 1.0, 1.0, 0).radii.tolist() == [np.inf]


# ---- what has none


def test_maps_are_certified_up_to_a_size(monkeypatch):
    """Of the matrix of pairs, which is otherwise never formed: 30 pairs by 6 unknowns."""
    rng = np.random.default_rng(0)
    maps = rng.dirichlet(np.ones(6), 5)
    problem = problems.Attention(
        rng.standard_normal((5, 2)), rng.standard_normal((6, 3)), maps, "cross_entropy", ridge=0.1
    )
    x = quietly(problem, tol=1e-12).x
    for most, told in ((180, None), (179, "the 30 x 6 matrix of all pairs, more than 179 numbers")):
        monkeypatch.setattr("attnfit.certificates.certification.DENSE_ENTRIES", most)
        proof = certificates.certify(problem, x)
        assert proof.valid == (told is None)
        assert told is None or told in proof.reason
    dense = certificates.certify(problem.dense(), x.reshape(-1))
    monkeypatch.setattr("attnfit.certificates.certification.DENSE_ENTRIES", 180)
    assert certificates.certify(problem, x).radius == dense.radius


def test_factors_that_are_not_unique_have_no_certificate():
    rng = np.random.default_rng(0)
    maps = rng.dirichlet(np.ones(6), 5)
    low = problems.Attention(
        rng.standard_normal((5, 3)), rng.standard_normal((6, 3)), maps, "cross_entropy", rank=1
    )
    for rigorous in (False, True):
        proof = certificates.certify(low, np.zeros(low.shape), rigorous=rigorous)
        assert not proof.valid
        assert ("factors are not unique" in proof.reason) == (not rigorous)
        assert ("no rigorous certificate" in proof.reason) == rigorous
        assert proof.coefficient_radius.shape == low.shape


# ---- losses and activations of one's own


class Huber(SoftmaxLoss):
    """Squared near the target, linear beyond: not three times differentiable."""

    accumulate, finalize = Squared.accumulate, Squared.finalize

    def p(self, f, h, b, w):
        return w * np.clip(f - b, -0.05, 0.05)

    def g2(self, f, h, b, w):
        return w * (np.abs(f - b) < 0.05) * f + self.p(f, h, b, w)

    def g3(self, f, h, b, w):
        return 3.0 * w * (np.abs(f - b) < 0.05) * f + self.p(f, h, b, w)


class Bent(Squared):
    """Inherits the statement's formulas, but not the statement."""

    def g2(self, f, h, b, w):
        return w * (2.0 * f - b) + 0.0


class Stated(Squared):
    """The same, with a statement of its own."""

    certifiable = True
    g2 = Squared.g2


class Untouched(Squared):
    """Changes none of the formulas."""

    def fitted(self, z, state):
        return 1.0 * super().fitted(z, state)


class Shifted(SquaredExponential):
    """Another loss of single rows."""

    def third_derivative_bound(self, low, high, b, w):
        return None


class Tail(CrossEntropy):
    """Overrides what an evaluation adds up."""

    accumulate = staticmethod(lambda *args: CrossEntropy.accumulate(*args))


@pytest.mark.parametrize(
    ("loss", "stated"),
    [(Huber(), False), (Bent(), False), (Stated(), True), (Untouched(), True), (Tail(), False)],
)
def test_a_loss_is_certified_by_the_class_that_made_it(loss, stated):
    inst, _ = instance("Softmax", "squared", sizes=(9, 8), d=3, noise=0.05)
    problem = RowProblem(inst.A, inst.b, loss=loss, groups=inst.groups)
    proof = certificates.certify(problem, quietly(inst.problem()).x)
    assert proof.valid == stated
    if not stated:
        assert f"the loss {type(loss).__name__} states no bound of its third derivative" in proof.reason
        assert "g3" in proof.reason


def test_losses_of_single_rows_state_their_bound():
    inst, _ = instance("Exponential", "exp", d=3)
    proof = certificates.certify(RowProblem(inst.A, inst.b, loss=Shifted("exp")), np.zeros(3))
    assert "third_derivative_bound" in proof.reason


def test_the_bound_of_an_activation_that_is_missing_is_named():
    rng = np.random.default_rng(0)
    S, y = rng.standard_normal((20, 4)), 0.3 * rng.standard_normal(20)
    tanh = ACTIVATIONS["tanh"]
    half = Activation("half", tanh.jet, tanh.third, tanh.slope, float("nan"), float("nan"), 1.0)
    full = Activation("mine", tanh.jet, tanh.third, tanh.slope, tanh.curvature, tanh.jerk, 1.0)
    callables = tuple((lambda y, k=k: tanh.jet(y)[k]) for k in range(3))
    reasons = {}
    for name, h in (("half", half), ("mine", full), ("callables", callables)):
        proof = quietly(problems.TwoLayer(None, S, y, h, ridge=0.3), tol=1e-12).certificate()
        assert proof.valid == (name == "mine")
        reasons[name] = proof.reason
    assert "no bound of |h''|, |h'''|;" in reasons["half"]
    assert "no bound of |h'|, |h''|, |h'''|;" in reasons["callables"]


# ---- in words


def test_a_summary_says_what_is_certified():
    inst, _, A = with_open_columns()
    known = str(SoftmaxRegressor("cross_entropy").fit(inst.A, inst.b, groups=inst.ids).summary())
    assert "certificate: valid, within " in known
    assert "probabilistic constant" in known
    partly = str(SoftmaxRegressor("cross_entropy").fit(A, inst.b, groups=inst.ids).summary())
    assert "certificate: predictions are certified" in partly
    assert "and 2 of 5 coefficients" in partly
    assert "x is not: 2 directions are open, seen by no row of the data: x0, x3, x4" in partly


def test_a_large_radius_is_called_loose():
    proof = certificates.certify(*_problem_and_point())
    x = np.zeros(3)
    for radius, loose in ((0.0099, False), (0.0101, True)):
        told = certificates.Certificate(**(vars(proof) | {"radius": radius})).describe(x)
        assert ("(loose)" in told) == loose
    assert "(loose)" not in certificates.Certificate(**(vars(proof) | {"radius": 0.02})).describe(x + 1.0)


def _problem_and_point():
    inst, _ = instance("Softmax", "cross_entropy", sizes=(9, 8), d=3)
    return inst.problem(), quietly(inst.problem()).x

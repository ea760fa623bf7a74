"""The page of one layer over X and Y: each of its claims holds, and each can fail."""

import numpy as np
import pytest
from instances import relative
from scipy.special import softmax

from attnfit.objectives.full_attention import FullAttention
from attnfit.reproduction import one_layer
from attnfit.solvers import minimize


def test_the_derivatives_agree_with_the_referee():
    pytest.importorskip("torch")
    referee, error, allowed = one_layer.derivative_error()
    assert referee == "autodiff"
    assert error <= allowed == 1e-11


def test_without_torch_differences_judge(monkeypatch):
    monkeypatch.setattr(one_layer, "find_spec", lambda name: None)
    referee, error, allowed = one_layer.derivative_error()
    assert referee == "central differences"
    assert 1e-12 < error <= allowed
    assert one_layer.real_head(1) is None


def test_a_wrong_derivative_is_found_out(monkeypatch):
    pulled = FullAttention.pulled
    monkeypatch.setattr(FullAttention, "pulled", lambda self, *args: 1.0001 * pulled(self, *args))
    _, error, allowed = one_layer.derivative_error()
    assert error > allowed


def test_the_bound_of_the_negative_curvature_holds_and_is_no_idle_one():
    ratio, lowest = one_layer.regulariser(400)
    assert 0.3 <= ratio <= 1.0
    assert lowest >= 1.0 - 1e-9


def test_a_smaller_ridge_is_found_out(monkeypatch):
    """Of each of the two parts."""
    definite = FullAttention.definite_ridge

    def without_least(self, x, least=0.0):
        return definite(self, x)

    monkeypatch.setattr(FullAttention, "definite_ridge", without_least)
    # The eigenvalues then lie anywhere above zero.
    assert one_layer.regulariser(400)[1] < 1.0
    parts = FullAttention.negative_curvature_parts
    monkeypatch.setattr(
        FullAttention, "negative_curvature_parts", lambda self, x: tuple(0.25 * p for p in parts(self, x))
    )
    assert one_layer.regulariser(400)[0] > 1.0


@pytest.mark.parametrize("case", ["plain", "masked", "weighted", "texts"])
def test_the_ridges_of_every_form_make_the_hessian_definite(case):
    rng = np.random.default_rng(0)
    for _ in range(60):
        A1, A2, A3, B = one_layer._drawn(rng, 6, 5, 2, 3, 2, 2)
        options = {}
        if case == "masked":
            options["mask"] = rng.random((6, 5)) < 0.6
            options["mask"][:, 0] = True
        if case == "weighted":
            options["weights"] = rng.uniform(0.0, 3.0, 6)
        data = (A1, A2, A3, B)
        if case == "texts":
            data = tuple([M, 0.3 * M] for M in data)
        problem = FullAttention(*data, ridge=1.0, **options)
        x = rng.standard_normal(problem.n_unknowns)
        gX, gY = problem.definite_ridge(x, 0.5)
        H = problem.hessian(x) - np.eye(len(x)) + np.diag(np.repeat([gX, gY], [6, 4]))
        assert np.linalg.eigvalsh(H)[0] >= 0.5 - 1e-9


def test_what_definite_ridge_does_not_know_is_refused():
    rng = np.random.default_rng(0)
    data = one_layer._drawn(rng, 6, 5, 2, 3, 2, 2)
    with pytest.raises(ValueError, match="one head only"):
        FullAttention(*data, ridge=1.0, n_heads=2).definite_ridge(np.zeros(20))
    with pytest.raises(ValueError, match="must not be negative"):
        FullAttention(*data, ridge=1.0).definite_ridge(np.zeros(10), -1.0)


def test_the_regulariser_shrinks_the_answer():
    X, Y = one_layer.shrinkage(2)
    assert X < 0.1 and Y < 0.5


def test_exponents_of_power_laws():
    sizes = [100.0, 200.0, 400.0]
    assert abs(one_layer.slope((sizes, [1e-3 * n**2 for n in sizes])) - 2.0) < 1e-12
    assert one_layer.within(2.0, one_layer.N_SLOPES) and one_layer.within(1.0, one_layer.D_SLOPES)
    # A cubic cost, or one that does not grow, is not what is claimed.
    assert not one_layer.within(3.0, one_layer.N_SLOPES)
    assert not one_layer.within(0.0, one_layer.N_SLOPES)
    assert not one_layer.within(2.0, one_layer.D_SLOPES)


def test_the_cost_of_a_gradient_counts_pairs():
    """What the clock shows on a quiet machine, as a count: each gradient reads every map once."""
    for n in (64, 128):
        problem = FullAttention(*one_layer._drawn(np.random.default_rng(0), n, n, 3, 3, 3, 3))
        problem.gradient(np.zeros(problem.n_unknowns))
        assert problem.n_passes == 1.0


def test_planted_outputs_are_found_again_and_noise_is_no_exact_fit():
    scale, instances, starts, solved, share = one_layer.success(0.1, 1)
    assert (scale, instances) == (0.1, 1)
    assert 1 <= starts <= one_layer.N_STARTS and solved in (0, 1)
    assert 0.0 <= share <= 1.0 and (share > 0.0) == (solved == 1)
    problem, X, Y = one_layer.plant(0.4, 0)
    exact = problem.join(X, Y)
    assert problem.value(exact) < 1e-25
    noisy = FullAttention(problem.A1, problem.A2, problem.A3, problem.B + 0.1)
    result = minimize(noisy, exact)
    assert 2.0 * result.value > one_layer.EXACT * float(np.sum(noisy.B**2))


def test_the_outputs_of_a_real_head():
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    problem = one_layer.head_outputs(1, 0)
    d1, d2, v, m = problem.sizes
    assert (d1, d2, v, m) == (16, 16, 16, 16)
    # The head itself: logits are a multiple of q . k, values are taken as they are.
    exact = problem.join(0.25 * np.eye(16), np.eye(16))
    assert 2.0 * problem.value(exact) <= 1e-20 * float(np.sum(problem.B**2))
    first = problem.texts[0]
    z = 0.25 * first.A1 @ first.A2.T
    P = softmax(np.where(np.tri(len(z), dtype=bool), z, -np.inf), axis=1)
    assert relative(P @ first.A3, first.B) < 1e-12


# What is measured, by the number of the claim, and a finding that contradicts it.
WRONG = {
    0: {"derivative_error": lambda: ("autodiff", 1e-3, 1e-11)},
    1: {"regulariser": lambda draws: (1.01, 1.0)},
    2: {"times": lambda sizes, other, along_n: (list(sizes), [n**3.5 for n in sizes])},
    3: {"success": lambda scale, count: (scale, count, 60 * count, 0, 0.0)},
    4: {"real_head": lambda count: (count, count - 1, 40)},
}


@pytest.mark.parametrize("claim", [None, *WRONG])
def test_every_claim_of_the_page_can_fail(claim, monkeypatch):
    def measured(sizes, other, *, along_n):
        return list(sizes), [1e-9 * size ** (2 if along_n else 1) for size in sizes]

    quick = {
        "regulariser": lambda draws: (0.8, 1.0),
        "shrinkage": lambda count: (1e-3, 1e-1),
        "times": measured,
        "success": lambda scale, count: (scale, count, 60, count, 0.02),
        "real_head": lambda count: (count, count, 4),
    }
    for name, found in (quick | WRONG.get(claim, {})).items():
        monkeypatch.setattr(one_layer, name, found)
    page = one_layer.run(quick=True)
    assert [one.held for one in page.claims] == [number != claim for number in range(5)]
    assert page.id == "one-layer"


def test_without_the_model_the_claim_on_heads_is_open(monkeypatch):
    for name, found in {
        "regulariser": lambda draws: (0.8, 1.0),
        "shrinkage": lambda count: (1e-3, 1e-1),
        "success": lambda scale, count: (scale, count, 60, count, 0.02),
        "real_head": lambda count: None,
        "times": lambda sizes, other, along_n: (list(sizes), list(sizes)),
    }.items():
        monkeypatch.setattr(one_layer, name, found)
    assert one_layer.run(quick=True).claims[4].held is None

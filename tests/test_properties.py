"""What must hold for every problem: invariances, equivariances and consistency, on generated data."""

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from instances import ALL_LOSSES, COUPLED, SOFTMAX, Instance

TOLERANCE = 1e-9


@st.composite
def cases(draw, losses=ALL_LOSSES):
    """A small problem with groups, weights and all penalties, and a point."""
    family, loss = draw(st.sampled_from(losses))
    sizes = draw(st.lists(st.integers(1, 5), min_size=1, max_size=4))
    n, d = sum(sizes), draw(st.integers(1, 4))
    numbers = st.floats(-2.0, 2.0, width=32)
    A = draw(arrays(np.float64, (n, d), elements=numbers))
    x = draw(arrays(np.float64, d, elements=st.floats(-1.5, 1.5, width=32)))
    b = draw(arrays(np.float64, n, elements=st.floats(0.0, 1.0, width=32)))
    ids = np.repeat(np.arange(len(sizes)), sizes)
    if family == "Exponential":
        ids[:] = 0
    weights = draw(arrays(np.float64, n, elements=st.sampled_from([0.5, 1.0, 2.0])))
    penalty = draw(st.sampled_from([0.0, 0.4]))
    options = {"weights": weights, "row_penalty": penalty, "ridge": draw(st.sampled_from([0.0, 0.3]))}
    return Instance(family, loss, A, b, ids, ids, options), x


def quantities(problem, x):
    return [np.asarray(problem.value(x)), problem.gradient(x), problem.hessian(x)]


def assert_close(ours, reference, size=None):
    """Equal to rounding, relative to the size of the terms that make up the quantity."""
    for one, other in zip(ours, reference, strict=True):
        scale = np.linalg.norm(other) + (1.0 if size is None else size)
        assert np.linalg.norm(one - other) <= TOLERANCE * scale


@given(cases())
def test_matches_autodiff(case):
    inst, x = case
    exact = inst.objective()
    assert_close(
        quantities(inst.problem(), x),
        [np.asarray(exact.value(x)), exact.gradient(x), exact.hessian(x)],
        magnitude(inst, x),
    )


def magnitude(inst, x):
    """Size of the largest squares that enter: u(z) reaches e^|z|."""
    top = np.exp(min(np.abs(inst.A @ x).max(), 20.0)) * len(inst.b) if inst.family != "Softmax" else 1.0
    return top**2 * max(1.0, np.abs(inst.A).max() ** 2)


@given(cases(), st.data())
def test_products_with_the_hessian(case, data):
    inst, x = case
    v = data.draw(arrays(np.float64, len(x), elements=st.floats(-1, 1, width=32)))
    problem = inst.problem()
    H = problem.hessian(x)
    size = magnitude(inst, x)
    assert np.abs(H - H.T).max() <= 1e-12 * size
    assert_close([problem.hvp(x, v)], [H @ v], size)
    assert_close([problem.hvp(x, 2.0 * v) - 2.0 * problem.hvp(x, v)], [0.0 * v], size)


@given(cases(SOFTMAX), st.data())
def test_a_shift_of_a_groups_logits_changes_nothing(case, data):
    inst, x = case
    shift = data.draw(arrays(np.float64, int(inst.ids.max()) + 1, elements=st.floats(-50, 50, width=32)))
    shifted = inst.problem(offset=shift[inst.ids])
    assert_close(quantities(shifted, x), quantities(inst.problem(), x))
    assert np.allclose(shifted.predict(x), inst.problem().predict(x), atol=1e-12)


@given(cases(SOFTMAX), st.data())
def test_a_shift_of_a_groups_rows_changes_only_the_penalty(case, data):
    inst, x = case
    inst = inst.replace(options={**inst.options, "row_penalty": 0.0})
    shift = data.draw(arrays(np.float64, inst.A.shape[1], elements=st.floats(-20, 20, width=32)))
    assert_close(quantities(inst.problem(A=inst.A + shift), x), quantities(inst.problem(), x), 100.0)


@given(cases(), st.integers(2, 4))
def test_copies_of_the_groups_count_as_weights(case, k):
    inst, x = case
    n, n_groups = len(inst.b), inst.ids.max() + 1
    labels = np.concatenate([inst.ids + i * n_groups for i in range(k)])
    options = {**inst.options, "row_penalty": 0.0}
    stacked = inst.replace(
        A=np.tile(inst.A, (k, 1)),
        b=np.tile(inst.b, k),
        groups=labels,
        options={**options, "weights": np.tile(options["weights"], k)},
    )
    weighted = inst.problem(row_penalty=0.0, weights=k * options["weights"])
    assert_close(quantities(stacked.problem(), x), quantities(weighted, x), magnitude(inst, x))
    assert n * k == stacked.problem().n_rows


@given(cases(), st.randoms(use_true_random=False))
def test_order_of_rows_and_names_of_groups_do_not_matter(case, random):
    inst, x = case
    order = list(range(len(inst.b)))
    random.shuffle(order)
    names = [f"name {i}" for i in range(inst.ids.max() + 1)]
    random.shuffle(names)
    changes = {"A": inst.A[order], "b": inst.b[order], "weights": inst.options["weights"][order]}
    labels = np.array(names)[inst.ids[order]]
    mixed = inst.replace(groups=labels).problem(**changes)
    assert_close(quantities(mixed, x), quantities(inst.problem(), x), magnitude(inst, x))
    if inst.loss != "sinh":
        # The normaliser of sinh may vanish.
        assert np.allclose(mixed.predict(x), inst.problem().predict(x)[order], rtol=1e-9)
    assert np.allclose(
        mixed.data_gradient(x)[0],
        inst.problem().data_gradient(x)[0][order],
        atol=TOLERANCE * magnitude(inst, x),
    )


@given(cases())
def test_offsets_describe_the_same_groups_as_labels(case):
    inst, x = case
    assume(inst.family != "Exponential")
    offsets = np.append(np.flatnonzero(np.diff(inst.ids, prepend=-1)), len(inst.ids))
    assume(len(offsets) != len(inst.ids))
    assert_close(quantities(inst.problem(groups=offsets), x), quantities(inst.problem(), x))


@given(cases())
def test_weights_of_groups_are_weights_of_their_rows(case):
    inst, x = case
    n_groups = inst.ids.max() + 1
    assume(inst.family != "Exponential" and n_groups != len(inst.ids))
    per_group = np.arange(1.0, n_groups + 1)
    assert_close(
        quantities(inst.problem(weights=per_group), x),
        quantities(inst.problem(weights=per_group[inst.ids]), x),
    )


@given(cases(), st.data())
def test_scaled_columns_scale_the_derivatives(case, data):
    inst, x = case
    scale = 2.0 ** np.array(data.draw(st.lists(st.integers(-8, 8), min_size=len(x), max_size=len(x))))
    inst = inst.replace(options={**inst.options, "ridge": 0.0})
    value, gradient, hessian = quantities(inst.problem(A=inst.A * scale), x / scale)
    units = np.multiply.outer(scale, scale)
    assert_close(
        [value, gradient / scale, hessian / units], quantities(inst.problem(), x), magnitude(inst, x)
    )


@given(cases([("Softmax", "squared"), ("Exponential", "exp"), ("Exponential", "sinh")]), st.integers(0, 19))
def test_a_row_of_no_weight_fits_nothing(case, which):
    """Its target does not matter; in a softmax it still counts in the normaliser, elsewhere it is absent."""
    inst, x = case
    row = which % len(inst.b)
    weights = inst.options["weights"].copy()
    weights[row] = 0.0
    assume(weights.any())
    other = inst.b.copy()
    other[row] = 0.77
    options = {**inst.options, "weights": weights, "row_penalty": 0.0}
    inst = inst.replace(options=options)
    assert_close(quantities(inst.problem(b=other), x), quantities(inst.problem(), x))
    if inst.family == "Exponential":
        keep = np.arange(len(inst.b)) != row
        without = inst.problem(A=inst.A[keep], b=inst.b[keep], weights=weights[keep])
        assert_close(quantities(without, x), quantities(inst.problem(), x))
    else:
        assert_close([inst.problem().value(x)], [inst.objective().value(x)])


@given(cases(COUPLED))
def test_a_group_of_no_weight_is_absent(case):
    inst, x = case
    assume(inst.ids.max() > 0)
    last = inst.ids == inst.ids.max()
    weights = np.where(last, 0.0, inst.options["weights"])
    options = {**inst.options, "row_penalty": 0.0}
    with_group = inst.replace(options={**options, "weights": weights}).problem()
    without = inst.replace(
        A=inst.A[~last], b=inst.b[~last], ids=inst.ids[~last], groups=inst.groups[~last],
        options={**options, "weights": weights[~last]},
    ).problem()  # fmt: skip
    assert_close(quantities(with_group, x), quantities(without, x), magnitude(inst, x))


@given(cases([("Softmax", "squared"), ("Softmax", "cross_entropy"), ("Softmax", "kl")]))
def test_an_unlikely_row_is_an_absent_one(case):
    """An offset of minus a thousand takes a row out of the normaliser."""
    inst, x = case
    inst = inst.replace(options={**inst.options, "row_penalty": 0.0})
    A = np.vstack([inst.A, np.ones((1, inst.A.shape[1]))])
    weights = np.append(inst.options["weights"], 1.0)
    n = len(inst.b)
    extended = inst.problem(
        A=A, b=np.append(inst.b, 0.0), groups=np.append(inst.ids, inst.ids[-1]), weights=weights,
        offset=np.append(np.zeros(n), -1e3),
    )  # fmt: skip
    assert_close(quantities(extended, x), quantities(inst.problem(), x))


@given(cases([("Softmax", "cross_entropy")]))
def test_entropy_differs_from_cross_entropy_by_a_constant(case):
    inst, x = case
    kl = inst.replace(loss="kl").problem()
    ours, theirs = quantities(inst.problem(), x), quantities(kl, x)
    assert_close(ours[1:], theirs[1:])
    assert np.isclose(ours[0] - theirs[0], inst.problem().value(0 * x) - kl.value(0 * x), atol=1e-9)


@given(cases([("Softmax", "cross_entropy"), ("Softmax", "kl")]))
def test_convex_losses_have_a_positive_hessian(case):
    inst, x = case
    H = inst.problem().hessian(x)
    assert np.linalg.eigvalsh(H)[0] >= -1e-12 * max(np.linalg.norm(H), 1.0)


@given(cases())
def test_zero_is_stationary_means_that_the_gradient_vanishes(case):
    inst, x = case
    problem = inst.problem()
    if problem.zero_is_stationary:
        # Row weights that differ within a group move the stationary point of entropy.
        assert np.linalg.norm(problem.gradient(0 * x)) <= 1e-10 * magnitude(inst, 0 * x)


@pytest.mark.parametrize(
    ("family", "loss"), [("Rescaled", "sinh"), ("Exponential", "cosh"), ("Softmax", "entropy")]
)
def test_zero_is_known_to_be_stationary(family, loss):
    rng = np.random.default_rng(0)
    inst = Instance(family, loss, rng.standard_normal((6, 2)), rng.random(6), np.zeros(6, int))
    problem = inst.problem()
    assert np.abs(problem.gradient(np.zeros(2))).max() < 1e-14
    assert problem.zero_is_stationary
    assert np.linalg.norm(problem.initial_point(0)) > 0


@given(cases())
def test_initial_point_is_usable(case):
    inst, _ = case
    problem = inst.problem()
    start = problem.initial_point(3)
    assert start.shape == problem.shape == (problem.n_unknowns,)
    assert np.isfinite(problem.value(start))
    assert np.array_equal(start, problem.initial_point(3))

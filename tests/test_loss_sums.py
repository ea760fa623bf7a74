"""Weighted sums of losses: against autodiff of their definition, against their parts, in every storage."""

import numpy as np
import pytest
import torch
from autodiff import Objective, as_tensor
from hypothesis import given, seed
from hypothesis import strategies as st
from instances import covering, instance, relative
from storages import PIECES, STORAGES
from test_conformance import SIZES, everything

from attnfit import losses, minimize, problems
from attnfit.certificates.certification import certify
from attnfit.losses import LOSSES, SeparableLoss, check_loss, find_loss
from attnfit.losses.elementwise import Total
from attnfit.losses.loss import GroupSizes
from attnfit.losses.rescaled import SquaredRescaled
from attnfit.losses.sums import MixedSum, NormaliserSquares, NormaliserTotal, SoftmaxSum

# Terms that see the outputs alone, and sums that the normaliser enters.
SOFTMAX = {
    "shares": [("squared", 1.0), ("entropy", 0.1)],
    "convex": [("cross_entropy", 1.0), ("kl", 0.5)],
    "kinds": [("squared", 0.7), ("cross_entropy", 0.2), ("entropy", -0.1), ("linear_cross_entropy", 0.3)],
}
MIXED = {
    "sparse": [("cross_entropy", 1.0), ("sparse", 0.1)],
    "three": [("squared", 1.0), ("sparse", 0.1), ("entropy", 0.01)],
    "rescaled": [("rescaled", 0.3), ("squared", 1.0)],
    "all": [
        *(("squared", 0.5), ("sparse", 0.1), ("rescaled", 0.2), ("kl", 0.3)),
        *(("linear_cross_entropy", -0.4), ("entropy", 0.2)),
    ],
}
SUMS = SOFTMAX | MIXED


class Quartic(SeparableLoss):
    certifiable = True

    def phi(self, f, b):
        return 0.25 * (f - b) ** 4

    def first(self, f, b):
        return (f - b) ** 3

    def second(self, f, b):
        return 3.0 * (f - b) ** 2

    def third(self, f, b):
        return 6.0 * (f - b)


def reference(terms, A, b, ids, w=1.0):
    """The sum of the definitions, in PyTorch."""

    def part(name):
        if name == "sparse":
            return lambda x: (as_tensor(w) * torch.exp(as_tensor(A) @ x)).sum()
        family, option = ("Rescaled", "exp") if name == "rescaled" else ("Softmax", name)
        return Objective(family, option, A, b, ids, w)

    return lambda x: sum(c * part(name)(x) for name, c in terms)


def reference_of(terms, inst, w):
    return reference(terms, inst.A, inst.b, inst.ids, w)


@pytest.mark.parametrize("name", SUMS)
def test_value_gradient_and_hessian_are_those_of_the_definition(name):
    terms = SUMS[name]
    for k in range(3):
        inst, x = instance("Softmax", "squared", sizes=(5, 1, 3, 4, 60), seed=k)
        w = np.random.default_rng(k).uniform(0.5, 2.0, len(inst.b))
        problem = problems.Softmax(inst.A, inst.b, inst.groups, loss=terms, weights=w)
        objective, at = reference(terms, inst.A, inst.b, inst.ids, w), as_tensor(x)
        assert relative(problem.value(x), float(objective(at))) < 1e-12
        assert relative(problem.gradient(x), torch.func.grad(objective)(at).numpy()) < 1e-12
        hessian = torch.func.hessian(objective)(at).numpy()
        assert relative(problem.hessian(x), hessian) < 1e-12
        v = np.arange(1.0, 4.0)
        assert relative(problem.hvp(x, v), hessian @ v) < 1e-12


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("sparse", 6.0), ("entropy", 1.0114042647073516), ("linear_cross_entropy", -5 / 18)),
        *(("squared", 1 / 9), ("rescaled", 4.0)),
    ],
)
def test_values_worked_out_by_hand(name, value):
    """z = (0, log 2, log 3), b = (1/2, 1/3, 1/6), of a sum with one term of weight two."""
    z, b = np.log([1.0, 2.0, 3.0]), [1 / 2, 1 / 3, 1 / 6]
    assert abs(problems.Softmax(np.eye(3), b, loss=[(name, 2.0)]).value(z) - 2.0 * value) < 1e-14


@pytest.mark.parametrize("name", SUMS)
def test_a_sum_states_no_more_than_is_true(name):
    check_loss(find_loss(SUMS[name]))


def test_a_loss_of_ones_own_joins():
    found = find_loss([(Quartic(), 2.0), ("entropy", 0.1), ("sparse", 0.2)])
    check_loss(found)
    assert not found.one_pass
    inst, x = instance("Softmax", "squared", sizes=(5, 200))
    both = problems.Softmax(inst.A, inst.b, inst.groups, loss=[(Quartic(), 2.0), ("entropy", 0.1)])
    one = problems.Softmax(inst.A, inst.b, inst.groups, loss=Quartic())
    other = problems.Softmax(inst.A, inst.b, inst.groups, loss="entropy")
    assert relative(both.hessian(x), 2.0 * one.hessian(x) + 0.1 * other.hessian(x)) < 1e-13


@pytest.mark.parametrize("part", [NormaliserTotal(), NormaliserSquares()], ids=lambda p: type(p).__name__)
def test_parts_that_the_normaliser_enters_are_the_losses_they_stand_for(part, small_blocks):
    """By pieces, and whole: the plain forms know no normaliser, or another one."""
    check_loss(part)
    plain = Total() if isinstance(part, NormaliserTotal) else SquaredRescaled("exp")
    inst, x = instance("Softmax", "squared", sizes=(5, 150, 3))
    ours = problems.RowProblem(inst.A, inst.b, loss=part, groups=inst.groups)
    theirs = problems.RowProblem(inst.A, inst.b, loss=plain, groups=inst.groups)
    assert ours.rows.n_long == 1
    assert relative(ours.value(x), theirs.value(x)) < 1e-13
    assert relative(ours.gradient(x), theirs.gradient(x)) < 1e-12
    assert relative(ours.hessian(x), theirs.hessian(x)) < 1e-12


# ---- what adding up means


@pytest.mark.parametrize("name", [*LOSSES, "sparse", "rescaled"])
def test_one_term_is_so_many_times_its_loss(name):
    inst, x = instance("Softmax", "squared")
    alone = {"sparse": Total(), "rescaled": SquaredRescaled("exp")}.get(name) or LOSSES[name]
    one = problems.RowProblem(inst.A, inst.b, loss=alone, groups=inst.groups)
    term = problems.Softmax(inst.A, inst.b, inst.groups, loss=[(name, 3.0)])
    assert relative(term.value(x), 3.0 * one.value(x)) < 1e-13
    assert relative(term.hessian(x), 3.0 * one.hessian(x)) < 1e-13


@given(
    weights=st.lists(st.floats(0.01, 10.0), min_size=4, max_size=4),
    more=st.lists(st.floats(0.01, 10.0), min_size=4, max_size=4),
)
@seed(0)
def test_weights_add(weights, more):
    names = ("squared", "kl", "sparse", "rescaled")
    inst, x = instance("Softmax", "squared")

    def found(terms):
        problem = problems.Softmax(inst.A, inst.b, inst.groups, loss=terms)
        return np.append(problem.gradient(x), problem.value(x))

    one, other = list(zip(names, weights, strict=True)), list(zip(names, more, strict=True))
    both = [(name, c + d) for (name, c), (_, d) in zip(one, other, strict=True)]
    assert relative(found(one + other), found(both)) < 1e-12
    assert relative(found(one) + found(other), found(both)) < 1e-12
    assert relative(found(one[::-1]), found(one)) < 1e-12


@pytest.mark.parametrize(
    ("terms", "message"),
    [
        ([], "no term with a weight"),
        ([("squared", 0.0)], "no term with a weight"),
        ([("squared", 1.0), ("squared", -1.0)], "no term with a weight"),
        ([("sparse", -0.1), ("squared", 1.0)], "gives 'sparse' the weight -0.1"),
        ([("squared", -1.0), ("entropy", 1.0)], "gives 'squared' the weight -1"),
        ([("squared", 1.0), ("cross_entropy", -1e-9)], "gives 'cross_entropy' the weight"),
        ([(Quartic(), -1.0)], "gives 'Quartic' the weight -1"),
        ([("squared", np.nan)], r"the weight of loss\[0\] must be a finite number"),
        ([("squared", "1")], r"the weight of loss\[0\] must be a finite number"),
        ([("squared", 1.0), "entropy"], r"loss\[1\] must be a loss and its weight"),
        ([("squared", 1.0), ("entropie", 1.0)], r"loss\[1\] must be one of|loss\[1\] must be"),
        ([("squared", 1.0), (losses.LogRatio(), 1.0)], r"loss\[1\] must be one of"),
        ([("squared", 1.0), (SquaredRescaled("cosh"), 1.0)], "share the normaliser of exp"),
        ([([("squared", 1.0)], 1.0)], r"loss\[0\] must be one of"),
    ],
)
def test_terms_that_cannot_be_added_are_named(terms, message):
    with pytest.raises(ValueError, match=message):
        problems.Softmax(np.eye(3, 2), np.full(3, 1 / 3), loss=terms)


def test_different_constants_of_a_target_do_not_join():
    class Own(Quartic):
        def constants(self, b, w, segments):
            return segments.sum(b)

    with pytest.raises(ValueError, match="different constants"):
        find_loss([("cross_entropy", 1.0), (Own(), 1.0)])


def test_negative_targets_are_refused_where_a_term_takes_a_logarithm():
    b = [0.5, 0.7, -0.2]
    with pytest.raises(ValueError, match="negative"):
        problems.Softmax(np.eye(3, 2), b, loss=[("squared", 1.0), ("cross_entropy", 0.1)])
    assert np.isfinite(problems.Softmax(np.eye(3, 2), b, loss=SUMS["three"]).value(np.ones(2)))


def test_samples_of_a_long_group_need_one_form_for_all_parts():
    b, w, kept = np.full(3, 0.2), np.full(3, 2.0), np.full(3, 0.5)
    both = find_loss([("entropy", 1.0), ("linear_cross_entropy", 1.0)]).subsample(b, w, kept)
    np.testing.assert_array_equal(both, (b, w))
    assert find_loss([("entropy", 1.0), ("squared", 1.0)]).subsample(b, w, kept) is None
    assert find_loss([("entropy", 1.0), (Quartic(), 1.0)]).subsample(b, w, kept) is None
    assert find_loss(SUMS["three"]).subsample(b, w, kept) is None


# ---- convexity


@pytest.mark.parametrize("name", SUMS)
def test_what_is_called_convex_is(name):
    terms = SUMS[name]
    known = {"cross_entropy", "kl", "sparse"}
    assert find_loss(terms).convex == ({n for n, _ in terms} <= known)


def test_some_group_comes_near_the_bound_of_negative_curvature_and_none_exceeds_it():
    """Of each loss and of both signs, with weights of any kind, the most negative curvature found."""
    cases = [("squared", 1.0), ("linear_cross_entropy", 1.0), ("linear_cross_entropy", -1.0)]
    cases += [("entropy", 1.0), ("entropy", -1.0)]
    for name, factor in cases:
        rng, worst = np.random.default_rng(0), 0.0
        for _ in range(400):
            n = int(rng.integers(2, 7))
            z, b = 3.0 * rng.standard_normal(n) * rng.random(), rng.standard_normal(n)
            w = np.ones(n) if rng.random() < 0.5 else rng.uniform(0.0, 2.0, n)
            problem = problems.Softmax(np.eye(n), b, loss=name, weights=w)
            found = -np.linalg.eigvalsh(factor * problem.hessian(z))[0]
            sizes = GroupSizes(*(np.array([v]) for v in (np.linalg.norm(w * b), w.min(), w.max(), float(n))))
            worst = max(worst, found / LOSSES[name].negative_curvature(sizes, factor)[0])
        assert worst <= 1.0 + 1e-12, (name, factor)
        # A tenth of it is found by chance: it is no bound of anything larger.
        assert worst >= 0.1, (name, factor, worst)


@pytest.mark.parametrize("name", ["shares", "kinds", "three"])
@pytest.mark.parametrize("blocks", ["whole", "pieces"])
def test_from_the_ridge_named_on_the_objective_is_convex(name, blocks, request):
    if blocks == "pieces":
        request.getfixturevalue("small_blocks")
    inst, _ = instance("Softmax", "squared", sizes=(5, 150, 3), scale=1.5)
    problem = problems.Softmax(inst.A, inst.b, inst.groups, loss=SUMS[name])
    ridge, rng = problem.convex_from_ridge(), np.random.default_rng(1)
    lowest = min(np.linalg.eigvalsh(problem.hessian(3.0 * rng.standard_normal(3)))[0] for _ in range(50))
    assert -lowest <= ridge < np.inf
    # The largest group decides: the bound of the others does not serve.
    top = np.linalg.eigvalsh(inst.A.T @ inst.A)[-1]
    long = inst.ids == 1
    n = np.array([float(long.sum())])
    sizes = GroupSizes(np.array([np.linalg.norm(inst.b[long])]), np.ones(1), np.ones(1), n)
    parts = [c * LOSSES[k].negative_curvature(sizes, np.sign(c))[0] * np.sign(c)
             for k, c in SUMS[name] if k in ("squared", "entropy", "linear_cross_entropy")]  # fmt: skip
    assert ridge >= top * sum(parts) * (1 - 1e-12)


def test_convex_sums_need_no_ridge_and_rescaled_ones_have_none():
    A, b = np.eye(3, 2), np.full(3, 1 / 3)
    assert problems.Softmax(A, b, loss=SUMS["sparse"]).convex_from_ridge() == 0.0
    assert problems.Softmax(A, b, loss=SUMS["rescaled"]).convex_from_ridge() == np.inf
    assert problems.Attention(A, A, np.full((3, 3), 1 / 3), SUMS["three"]).convex_from_ridge() > 0.0


# ---- everywhere


def built(case, at):
    inst, x = instance("Softmax", "squared", sizes=SIZES[case["groups"]], d=4, seed=3)
    rng = np.random.default_rng(5)
    columns = {"A": inst.A, "b": inst.b, "weights": rng.uniform(0.5, 2.0, len(inst.b))}
    if inst.groups is not None:
        columns["groups"] = inst.groups.astype(float) if case["storage"] == "zarr" else inst.groups
    stored = STORAGES[case["storage"]](columns, PIECES[case["pieces"]](len(inst.b)), at)
    option = {"loss": SUMS[case["terms"]], "ridge": 0.1}
    return problems.Softmax(**columns, **option), problems.Softmax(**stored, **option), x


CASES = list(
    covering(
        {
            "terms": ["shares", "kinds", "three", "all"],
            "storage": list(STORAGES),
            "pieces": list(PIECES),
            "groups": list(SIZES),
        },
        seed=1,
    )
)


@pytest.mark.parametrize("case", CASES, ids=lambda c: "-".join(map(str, c.values())))
def test_the_storage_does_not_matter(case, tmp_path, small_blocks):
    whole, problem, x = built(case, tmp_path)
    if isinstance(problem.loss, MixedSum) and not problem.rows.is_whole:
        assert "Dask" in certify(problem, x).reason
        for name in ("value", "gradient", "hessian"):
            assert relative(getattr(problem, name)(x), getattr(whole, name)(x)) < 1e-10, name
    else:
        for (name, theirs), (_, ours) in zip(everything(whole, x), everything(problem, x), strict=True):
            assert relative(ours, theirs) < 1e-10, name
    found, expected = minimize(problem, x), minimize(whole, x)
    assert found.status == expected.status == "converged"
    assert relative(found.x, expected.x) < 1e-6


@pytest.mark.parametrize("name", ["kinds", "all"])
def test_attention_is_the_same_problem_on_kronecker_rows(name):
    rng = np.random.default_rng(0)
    A1, A2 = rng.standard_normal((6, 3)), rng.standard_normal((5, 2))
    B = rng.dirichlet(np.ones(5), size=6)
    X = rng.standard_normal((3, 2))
    maps = problems.Attention(A1, A2, B, SUMS[name], ridge=0.1)
    rows = problems.Softmax(np.kron(A1, A2), B.reshape(-1), np.repeat(np.arange(6), 5), SUMS[name], ridge=0.1)
    assert relative(maps.value(X), rows.value(X.reshape(-1))) < 1e-13
    assert relative(maps.gradient(X).reshape(-1), rows.gradient(X.reshape(-1))) < 1e-12
    assert relative(maps.hessian(X), rows.hessian(X.reshape(-1))) < 1e-12
    # The loss is not convex: from one point, so that both end at one minimum.
    found, expected = minimize(maps, X), minimize(rows, X.reshape(-1))
    assert found.converged and expected.converged
    assert relative(found.x.reshape(-1), expected.x) < 1e-6


def test_maps_are_missing_only_where_a_term_needs_them():
    A = np.random.default_rng(0).standard_normal((4, 2))
    assert problems.Attention(A, A, None, [("entropy", 1.0), ("sparse", 0.1)]).value(np.ones((2, 2))) > 0.0
    with pytest.raises(ValueError, match="B is missing"):
        problems.Attention(A, A, None, [("entropy", 1.0), ("squared", 0.1)])
    with pytest.raises(ValueError, match="no part in a sum"):
        problems.Attention(A, A, np.full((4, 4), 0.25), [("rescaled", 1.0)], function="cosh")


@pytest.mark.parametrize(
    ("name", "storage", "groups"),
    [("three", "rows", "whole"), ("three", "rows", "pieces"), ("kinds", "csr", "pieces")],
)
def test_compiled_loops_add_up_the_same(name, storage, groups):
    """Those of large data, whatever the weights, and whichever sum was compiled before."""
    pytest.importorskip("numba")
    from scipy import sparse

    from attnfit.objectives import compiled

    inst, x = instance("Softmax", "squared", sizes=(5, 3, 9, 40) if groups == "whole" else (57,), d=4)
    w = np.random.default_rng(0).uniform(0.5, 2.0, 57)
    A = inst.A if storage == "rows" else sparse.csr_array(inst.A)
    for factor in (1.0, 2.5):
        terms = [(k, factor * c) for k, c in SUMS[name]]
        problem = problems.Softmax(A, inst.b, inst.groups, loss=terms, weights=w)
        assert problem.loss.compiled
        rows, chunks, reference = problem.rows, problem.rows.chunks, np.zeros(0)
        if groups == "pieces":
            chunks = compiled._as_pieces(rows)
            # A normaliser that was predicted, some per cent off.
            reference = np.array([np.log(np.exp(inst.A @ x).sum()) + 0.1])
            rows.n_long = 1
        found = compiled.sum_up_run(rows, chunks, x, reference, None, storage)
        if groups == "pieces":
            found.finalize(problem.loss, reference, rows.constants)
            rows.n_long = 0
        objective = reference_of(terms, inst, w)
        assert relative(found.value, float(objective(as_tensor(x)))) < 1e-12
        assert relative(found.gradient, torch.func.grad(objective)(as_tensor(x)).numpy()) < 1e-11


def test_sums_stand_where_losses_stand():
    assert isinstance(find_loss(SOFTMAX["kinds"]), SoftmaxSum)
    assert isinstance(find_loss(MIXED["three"]), MixedSum)
    # One of one's own may be a part; a sum may not.
    with pytest.raises(ValueError, match="must be one of"):
        find_loss([(find_loss(SOFTMAX["kinds"]), 1.0)])

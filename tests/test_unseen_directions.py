"""Which directions no row sees, against a rank in exact arithmetic: over losses, storages and units."""

import warnings
from itertools import combinations

import numpy as np
import pytest
from instances import ALL_LOSSES
from scipy import sparse
from sklearn.exceptions import ConvergenceWarning
from storages import STORAGES
from sympy import Matrix, Rational

from attnfit import minimize, problems
from benchmarks.verdict_problems import Reference

N, SIZE = 24, 4
GROUPS = np.repeat(np.arange(N // SIZE), SIZE)
COUPLED = {"Softmax", "Rescaled"}


def dyadic(rng, *shape):
    """Numbers of a few bits, so that sums and differences of columns are exact."""
    return rng.integers(-64, 65, shape) / 16.0


def built(family, loss, A, groups=GROUPS, **options):
    if family == "Exponential":
        return problems.Exponential(A, np.ones(N), function=loss, **options)
    if family == "Rescaled":
        return problems.Rescaled(A, np.full(N, 1.0 / SIZE), function=loss, groups=groups, **options)
    return problems.Softmax(A, np.full(N, 1.0 / SIZE), groups=groups, loss=loss, **options)


def unseen(problem):
    return problem.unseen_directions(problem.evaluate(np.zeros(problem.n_unknowns)))


def differences(A, groups):
    """The rows relative to the first of their group: what a loss of shares sees."""
    first = np.array([np.flatnonzero(groups == g)[0] for g in groups])
    return A - A[first]


def nullity(rows):
    return rows.shape[1] - Matrix(rows.shape[0], rows.shape[1], [Rational(v) for v in rows.ravel()]).rank()


def related(rng, gap):
    """Columns 0 to 2 at random, the sum of two of them, and the third again but for a part ``gap``."""
    A = dyadic(rng, N, 3)
    return np.column_stack([A, A[:, 0] + A[:, 1], A[:, 2] + gap * dyadic(rng, N)])


@pytest.mark.parametrize("gap", [0.0, 2.0**-30, 2.0**-23, 2.0**-20, 2.0**-10])
@pytest.mark.parametrize(("family", "loss"), ALL_LOSSES)
def test_a_direction_counts_as_unseen_only_if_no_row_sees_it(family, loss, gap):
    A = related(np.random.default_rng(3), gap)
    basis = unseen(built(family, loss, A))
    seen_by = A if family == "Exponential" else differences(A, GROUPS)
    assert basis.shape[1] == nullity(seen_by) == (1 if gap else 2)
    assert np.allclose(basis.T @ basis, np.eye(basis.shape[1]), atol=1e-12)
    assert np.abs(seen_by @ basis).max() < 1e-9


@pytest.mark.parametrize("gap", [0.0, 2.0**-23])
@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("groups", [GROUPS, np.zeros(N, dtype=int)], ids=["groups", "one"])
def test_in_every_storage(storage, groups, gap, tmp_path):
    A = related(np.random.default_rng(4), gap)
    columns = {"A": A, "b": np.full(N, 1.0 / np.bincount(groups)[0]), "groups": groups}
    stored = STORAGES[storage](columns, (7, 5, 12), tmp_path)
    problem = problems.Softmax(stored["A"], stored["b"], groups=stored["groups"], loss="cross_entropy")
    assert unseen(problem).shape[1] == nullity(differences(A, groups))


@pytest.mark.parametrize("wrap", [np.asarray, sparse.csr_array], ids=["dense", "csr"])
@pytest.mark.parametrize("exponent", [-300, -30, 0, 30, 300])
def test_in_any_unit_of_a_column(exponent, wrap):
    rng = np.random.default_rng(5)
    for gap, expected in ((0.0, 2), (2.0**-23, 1)):
        A = related(rng, gap) * np.ldexp(1.0, [0, exponent, 0, 0, exponent])
        assert unseen(built("Softmax", "squared", wrap(A))).shape[1] == expected


@pytest.mark.parametrize("shift", [0.0, 2.0**10, 2.0**20, 2.0**30])
def test_what_a_group_has_in_common_hides_nothing(shift):
    A = dyadic(np.random.default_rng(6), N, 3)
    A[:, 2] += shift
    problem = built("Softmax", "cross_entropy", A)
    assert unseen(problem).shape[1] == 0
    assert not problem.unseen_columns(problem.evaluate(np.zeros(3))).any()


def test_rounded_relations_are_relations():
    rng = np.random.default_rng(7)
    for _ in range(20):
        A = rng.standard_normal((N, 5)) * 10.0 ** rng.uniform(-3, 3, 5)
        c = rng.standard_normal(2)
        A = np.column_stack([A, A[:, :2] @ c, rng.standard_normal(len(set(GROUPS)))[GROUPS]])
        assert unseen(built("Softmax", "squared", A)).shape[1] == 2


def test_dummies_of_two_kinds():
    rng = np.random.default_rng(8)
    A = np.hstack([np.eye(4)[rng.integers(4, size=N)], np.eye(3)[rng.integers(3, size=N)]])
    # Each kind of dummies adds up to one, which no share sees.
    for storage in (A, sparse.csr_array(A)):
        assert unseen(built("Softmax", "cross_entropy", storage)).shape[1] == nullity(differences(A, GROUPS))
    standard = (A - A.mean(axis=0)) / A.std(axis=0)
    assert unseen(built("Softmax", "cross_entropy", standard)).shape[1] == 2


def test_single_precision_data_tell_only_what_they_can():
    rng = np.random.default_rng(9)
    A = np.eye(4)[rng.integers(4, size=N)]
    rounded = ((A - A.mean(axis=0)) / A.std(axis=0)).astype(np.float32)
    assert unseen(built("Softmax", "cross_entropy", rounded)).shape[1] == 1


def test_rows_without_weight_see_nothing():
    A = related(np.random.default_rng(10), 0.0)
    A[-SIZE:, 4] += dyadic(np.random.default_rng(11), SIZE)
    weights = np.repeat([1.0, 0.0], [N - SIZE, SIZE])
    for w, expected in ((None, 1), (weights, 2)):
        assert unseen(built("Softmax", "squared", A, weights=w)).shape[1] == expected


def test_a_penalty_on_logits_sees_what_a_group_has_in_common():
    A = np.column_stack([np.ones(N), dyadic(np.random.default_rng(12), N)])
    for penalty, expected in ((0.0, 1), (0.5, 0)):
        assert unseen(built("Softmax", "squared", A, row_penalty=penalty)).shape[1] == expected


@pytest.mark.parametrize("kind", ["squared", "cross_entropy", "kl", "exponential", "rescaled"])
def test_converged_along_a_hardly_seen_direction_means_what_it_says(kind):
    """Two columns alike but for 1e-4 to 1e-9: where a fit says "converged", the next step in 80 bits moves no
    logit.
    """
    n_converged = 0
    for seed in range(30):
        rng = np.random.default_rng(seed)
        gap = np.ldexp(1.0, -int(rng.integers(14, 30)))
        A = dyadic(rng, N, 2) / 4.0
        u = np.exp(0.5 * A @ rng.standard_normal(2)) * np.exp(0.2 * rng.standard_normal(N))
        b = u if kind == "exponential" else u / np.bincount(GROUPS, weights=u)[GROUPS]
        A = np.column_stack([A[:, 0], A[:, 0] + gap * A[:, 1]])
        if kind == "exponential":
            problem = problems.Exponential(A, b)
        elif kind == "rescaled":
            problem = problems.Rescaled(A, b, groups=GROUPS)
        else:
            problem = problems.Softmax(A, b, groups=GROUPS, loss=kind)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            result = minimize(problem, random_state=0, n_starts=1)
        groups = np.zeros(N, dtype=int) if kind == "exponential" else GROUPS
        if result.converged:
            n_converged += 1
            assert Reference(kind, "exp", A, b, groups, np.ones(N), 0.0).step(result.x) <= 1e-5, (seed, gap)
        if result.status == "flat":
            assert result.n_flat
    assert n_converged >= 5


def test_pairs_of_columns_are_told_apart_from_the_same_pair():
    A = dyadic(np.random.default_rng(13), N, 4)
    for i, j in combinations(range(4), 2):
        twin = A.copy()
        twin[:, j] = -3.0 * A[:, i]
        basis = unseen(built("Exponential", "exp", twin))
        expected = np.zeros(4)
        expected[[i, j]] = 3.0, 1.0
        assert np.allclose(np.abs(basis[:, 0]), np.abs(expected) / np.sqrt(10.0), atol=1e-12)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("gap", [0.0, 2.0**-30, 2.0**-23])
def test_pairs_of_queries_and_keys(gap, masked):
    """Columns of the queries, and a feature, alike or nearly: as in the matrix of all pairs, made by hand."""
    rng = np.random.default_rng(14)
    A1, A2, mask = dyadic(rng, 5, 2), dyadic(rng, 6, 2), np.ones((5, 6), dtype=bool)
    A1 = np.column_stack([A1, A1[:, 0] + gap * dyadic(rng, 5)])
    feature = A1[:, [1]] * A2[:, 0] + gap * dyadic(rng, 5, 6)
    if masked:
        mask[rng.integers(5, size=6), rng.integers(6, size=6)] = False
    B = mask / mask.sum(axis=1, keepdims=True)
    problem = problems.Attention(
        A1, A2, B, loss="cross_entropy", mask=mask if masked else None, pair_features=[feature]
    )
    by_hand = np.column_stack([np.kron(A1, A2), feature.ravel()])[mask.ravel()]
    queries = np.repeat(np.arange(5), 6)[mask.ravel()]
    assert unseen(problem).shape[1] == nullity(differences(by_hand, queries))

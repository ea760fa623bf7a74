"""Which rows play a part in a loss, which are held or may fall, and by how much steps move them."""

import numpy as np
import pytest
from autodiff import Objective
from conftest import shrink_blocks
from scipy import sparse

from attnfit import problems
from attnfit.losses.elementwise import PoissonDeviance, Total
from attnfit.objectives.moves import PROBE_ROWS, Kind, Probe, kind_of, rows_of

STORAGES = {"dense": np.asarray, "csr": sparse.csr_array}

# ---- what rows are


@pytest.mark.parametrize("loss", ["squared", "linear_cross_entropy", "entropy"])
def test_which_small_shares_fall(loss):
    """Those whose logit the loss lowers further, by autodiff far down; a share above 1e-4 stays."""
    for seed in range(30):
        rng = np.random.default_rng(seed)
        z, b = rng.standard_normal(5), rng.standard_normal(5)
        w = rng.random(5) + 0.2 if loss != "entropy" else np.ones(5)
        z[:2] = -25.0, -30.0
        problem = problems.Softmax(np.eye(5), b, loss=loss, weights=w)
        reference = Objective("Softmax", loss, np.eye(5), b, np.zeros(5, dtype=int), w)
        slope = reference.gradient(z)
        at = problem.evaluate(z)
        chunk = problem.rows.chunks[0]
        rows = rows_of(problem.rows, chunk, problem.rows.fetch(chunk), at)
        if loss != "entropy":
            assert rows.free[:2].tolist() == (slope[:2] > 0).tolist()
        assert not rows.free[2:].any()
        assert (rows.fixed ^ rows.free).all()
        f = np.exp(z - z.max())
        np.testing.assert_allclose(rows.size, f, rtol=1e-9)
        every = rows_of(problem.rows, chunk, problem.rows.fetch(chunk), at, each=False)
        assert every.free.tolist() == [True, True, False, False, False]


@pytest.mark.parametrize(("share", "free"), [(5e-5, True), (5e-4, False)])
def test_a_small_share_may_fall_and_a_large_one_is_held(share, free):
    z = np.array([0.0, np.log(share / (1 - share))])
    problem = problems.Softmax(np.eye(2), [1.2, -0.3], loss="squared")
    chunk = problem.rows.chunks[0]
    rows = rows_of(problem.rows, chunk, problem.rows.fetch(chunk), problem.evaluate(z))
    assert rows.free.tolist() == [False, free]


@pytest.mark.parametrize("target", [1.5, 0.5])
@pytest.mark.parametrize(("off", "free"), [(0.5e-9, True), (2e-9, False), (-1e-9, True)])
@pytest.mark.parametrize("common", [0.0, 50.0, -50.0])
def test_a_billionth_of_the_pull_is_rounding(target, off, free, common):
    """One outcome has all but everything, and pulls by ``1 - b``, up or down; the other by as much, but for a
    share of both. What both logits have in common is no part of it.
    """
    pull = 1.0 - target
    problem = problems.Softmax(np.eye(2), [target, -pull + off], loss="squared", offset=np.full(2, common))
    chunk, at = problem.rows.chunks[0], problem.evaluate(np.array([0.0, -60.0]))
    assert rows_of(problem.rows, chunk, problem.rows.fetch(chunk), at).free.tolist() == [False, free]


def test_totals_hold_no_row():
    """They ask for no outcome: every row may fall, but one without weight."""
    problem = problems.RowProblem(np.eye(3), np.ones(3), loss=Total(), weights=[1.0, 0.0, 2.0])
    chunk, at = problem.rows.chunks[0], problem.evaluate(np.zeros(3))
    rows = rows_of(problem.rows, chunk, problem.rows.fetch(chunk), at)
    assert not rows.fixed.any()
    assert rows.free.tolist() == [True, False, True]


def test_what_a_direction_proves():
    A, b = np.eye(2), [0.5, 0.5]
    expected = {
        ("Softmax", "cross_entropy"): Kind.EXACT,
        ("Softmax", "kl"): Kind.EXACT,
        ("Softmax", "squared"): Kind.LOCAL,
        ("Softmax", "entropy"): Kind.LOCAL,
        ("Softmax", "linear_cross_entropy"): Kind.LOCAL,
        ("Exponential", "exp"): Kind.EXACT,
        ("Exponential", "cosh"): Kind.NONE,
        ("Exponential", "sinh"): Kind.NONE,
        ("Rescaled", "exp"): Kind.SCALING,
        ("Rescaled", "cosh"): Kind.NONE,
        ("Rescaled", "sinh"): Kind.NONE,
    }
    for (family, name), kind in expected.items():
        option = {"loss" if family == "Softmax" else "function": name}
        assert kind_of(getattr(problems, family)(A, b, **option).loss) is kind
    assert kind_of(PoissonDeviance()) is Kind.EXACT


# ---- by how much steps move rows


def moved(A, steps, ids, counts, grouped):
    along = A @ steps
    if not grouped:
        return np.abs(along[counts]).max(axis=0, initial=0.0)
    found = np.zeros(steps.shape[1])
    for g in np.unique(ids[counts]):
        part = along[(ids == g) & counts]
        found = np.maximum(found, (part.max(axis=0) - part.min(axis=0)) / 2.0)
    return found


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("blocks", ["large", "small"])
@pytest.mark.parametrize(
    ("family", "loss"),
    [("Exponential", "exp"), ("Rescaled", "exp"), ("Softmax", "squared"), ("Softmax", "cross_entropy")],
)
@pytest.mark.parametrize("penalty", [0.0, 0.1])
def test_the_largest_change_of_a_logit(storage, blocks, family, loss, penalty, monkeypatch):
    """Half the largest change of a log-odds of a softmax, unless a penalty sees the logits themselves; rows
    without weight count only beside others of their group, groups without a target not for shares.
    """
    if blocks == "small":
        shrink_blocks(monkeypatch)
    rng = np.random.default_rng(0)
    sizes = [150, 4, 4, 4, 6]
    ids = np.repeat(np.arange(5), sizes)
    n = len(ids)
    A, steps = rng.standard_normal((n, 3)), np.column_stack([np.eye(3), rng.standard_normal((3, 2))])
    # Each step moves some rows most that must not count, or do although they have no weight.
    A[ids == 1, 0] *= 50.0
    A[160, 1] = 50.0
    w, b = rng.random(n) + 0.1, rng.random(n) + 0.1
    w[ids == 1], w[160] = 0.0, 0.0
    A[ids == 4, 2] *= 50.0
    b[ids == 4] = 0.0
    named = {"loss" if family == "Softmax" else "function": loss}
    groups = {} if family == "Exponential" else {"groups": ids}
    problem = getattr(problems, family)(
        STORAGES[storage](A), b, weights=w, row_penalty=penalty, **named, **groups
    )
    assert (problem.rows.n_long > 0) == (blocks == "small" and family != "Exponential")
    has_weight = np.isin(ids, np.unique(ids[w > 0]))
    counts = {"Exponential": w > 0, "Rescaled": has_weight, "Softmax": has_weight}[family]
    if loss == "cross_entropy":
        counts = np.isin(ids, np.unique(ids[w * b > 0]))
    at = problem.evaluate(np.zeros(3))
    expected = moved(A, steps, ids, counts, family == "Softmax" and not penalty)
    if blocks == "small" and family != "Exponential":
        # The group in pieces has weight, and holds none of the rows in question.
        assert w[:150].min() > 0
    found = problem.moves(at, steps)
    np.testing.assert_allclose(found.largest, expected, rtol=1e-12)
    probe = Probe(problem.rows)
    assert probe.exact
    np.testing.assert_allclose(probe.moves(at, steps).largest, expected, rtol=1e-12)


def test_the_least_output_that_may_fall():
    z = np.log(np.array([0.7, 0.2, 0.1, 0.5, 0.49, 0.01]))
    problem = problems.Softmax(z[:, None], [1.0, 0, 0, 0, 1.0, 1.0], [0, 0, 0, 1, 1, 1], loss="cross_entropy")
    assert np.isclose(problem.moves(problem.evaluate(np.ones(1)), np.ones((1, 1))).least, 0.1 / 0.7)
    for other in (
        problems.Softmax(z[:, None], np.full(6, 0.5), loss="squared"),
        problems.Softmax(z[:, None], [1.0, 0, 0, 0, 1.0, 1.0], loss="cross_entropy", row_penalty=0.1),
        problems.Exponential(z[:, None], np.ones(6)),
    ):
        assert other.moves(other.evaluate(np.ones(1)), np.ones((1, 1))).least == np.inf


def test_a_probe_keeps_some_rows():
    rng = np.random.default_rng(0)
    A, steps = rng.standard_normal((90_000, 2)), rng.standard_normal((2, 3))
    ids = np.arange(90_000) // 5
    problem = problems.Softmax(A, rng.random(90_000), ids, loss="squared")
    probe = Probe(problem.rows)
    kept = sum(chunk.segments.n_rows for chunk, _ in probe._kept)
    assert not probe.exact
    assert 0 < kept <= max(PROBE_ROWS, problem.rows.chunks[0].segments.n_rows)
    along = (A[:kept] @ steps).reshape(-1, 5, 3)
    some = (along.max(axis=1) - along.min(axis=1)).max(axis=0) / 2.0
    at = problem.evaluate(np.zeros(2))
    np.testing.assert_allclose(probe.moves(at, steps).largest, some, rtol=1e-12)
    assert (probe.moves(at, steps).largest <= problem.moves(at, steps).largest).all()


@pytest.mark.parametrize("most", [1, 70, 150, 400, 1000])
def test_a_probe_keeps_as_many_blocks_as_it_may(most, monkeypatch):
    """The first ones, one at least."""
    shrink_blocks(monkeypatch)
    monkeypatch.setattr("attnfit.objectives.moves.PROBE_ROWS", most)
    problem = problems.Exponential(np.ones((640, 1)), np.ones(640))
    sizes = np.array([chunk.segments.n_rows for chunk in problem.rows.chunks])
    assert len(sizes) > 3
    probe = Probe(problem.rows)
    kept = max(1, int((np.cumsum(sizes) <= most).sum()))
    assert [chunk.segments.n_rows for chunk, _ in probe._kept] == sizes[:kept].tolist()
    assert probe.exact == (most >= 640)


def test_constants_of_groups_have_no_size():
    """What is left of them when they are centred is rounding."""
    rng = np.random.default_rng(0)
    A = np.column_stack([rng.standard_normal(50), 1e3 * rng.random(10).repeat(5), 1e-6 * rng.random(50)])
    problem = problems.Softmax(A, rng.random(50), np.arange(50) // 5, loss="squared")
    sizes = Probe(problem.rows).column_sizes()
    assert sizes[1] == 0.0
    assert (sizes[[0, 2]] > 0.0).all()


@pytest.mark.parametrize(("family", "named"), [("Softmax", {"loss": "squared"}), ("Exponential", {})])
def test_the_sizes_of_columns_that_a_probe_sees(family, named):
    rng = np.random.default_rng(0)
    A = np.column_stack([rng.standard_normal((40, 2)) * [1.0, 1e3], np.full(40, 7.0)])
    A[:, 1] += 5.0
    groups = {"groups": np.arange(40) // 8} if family == "Softmax" else {}
    problem = getattr(problems, family)(A, rng.random(40), **named, **groups)
    within = A if family == "Exponential" else A - np.repeat(A.reshape(5, 8, 3).mean(axis=1), 8, axis=0)
    np.testing.assert_allclose(
        Probe(problem.rows).column_sizes(), np.sqrt((within**2).mean(axis=0)), atol=1e-9
    )


@pytest.mark.parametrize(("loss", "expected"), [("cross_entropy", 1.0), ("squared", 50.0)])
def test_a_group_without_a_target_moves_nothing_where_the_loss_needs_one(loss, expected):
    """The second group moves by fifty, and only least squares asks what its outputs are."""
    A = np.array([[1.0], [-1.0], [50.0], [-50.0]])
    problem = problems.Softmax(A, np.array([0.5, 0.5, 0.0, 0.0]), np.array([0, 0, 1, 1]), loss=loss)
    at = problem.evaluate(np.zeros(1))
    assert problem.moves(at, np.ones((1, 1))).largest[0] == expected

"""Fits on the workers of a Dask cluster: the same answers, whatever happens to a worker."""

import os
import signal

import numpy as np
import pytest
from instances import instance, relative
from scipy import sparse

from attnfit import inversion, minimize, problems
from attnfit.objectives.leverage import RowSampler
from attnfit.objectives.part import merged

dask = pytest.importorskip("dask")
da = pytest.importorskip("dask.array")
distributed = pytest.importorskip("distributed")

pytestmark = [
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
SIZES = tuple(1 + (7 * k) % 9 for k in range(5000))


@pytest.fixture(scope="module")
def client():
    with (
        distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=":0") as cluster,
        distributed.Client(cluster) as client,
    ):
        yield client


def both(loss="cross_entropy", sizes=SIZES, d=6, pieces=7):
    """A problem in memory and the same in pieces."""
    inst, _ = instance("Softmax", loss, sizes=sizes, d=d, seed=1)
    n = len(inst.b)
    A = da.from_array(inst.A, chunks=(-(-n // pieces), d))
    columns = [da.from_array(v, chunks=(-(-n // pieces),)) for v in (inst.b, inst.ids)]
    groups = inst.groups if len(sizes) > 1 else None
    return (
        problems.Softmax(inst.A, inst.b, groups, loss=loss),
        problems.Softmax(A, columns[0], None if groups is None else columns[1], loss=loss),
    )


@pytest.mark.parametrize("loss", ["squared", "cross_entropy"])
@pytest.mark.parametrize("sizes", [SIZES, (25000,)], ids=["groups", "one group"])
def test_the_answer_is_that_of_one_machine(client, loss, sizes):
    memory, cluster = both(loss, sizes)
    expected, found = (minimize(p, tol=1e-12, random_state=0) for p in (memory, cluster))
    assert found.converged
    assert relative(found.x, expected.x) < 1e-10
    assert found.n_passes < 12


def test_a_dead_worker_changes_nothing(client):
    _, cluster = both()
    expected = minimize(cluster, tol=1e-12, random_state=0)
    pids = list(client.run(os.getpid).values())
    killed = []

    def kill(record):
        if record.phase.startswith("fit") and record.iteration == 1 and not killed:
            os.kill(pids[0], signal.SIGKILL)
            killed.append(pids[0])

    found = minimize(cluster, tol=1e-12, random_state=0, callback=kill)
    assert killed
    assert found.converged
    assert relative(found.x, expected.x) < 1e-10
    client.wait_for_workers(2, timeout=60)


def test_only_sums_travel(client):
    _, cluster = both(pieces=4)
    x = np.zeros(6)
    cluster.value(x)

    def bytes_sent():
        counts = client.run(lambda dask_worker: dask_worker.transfer_outgoing_bytes_total)
        return sum(counts.values())

    sent = []
    for k in range(6):
        before = bytes_sent()
        cluster.value_and_gradient(x + 0.1 * k)
        sent.append(bytes_sent() - before)
    # A gradient of 6 numbers, its companions and the envelopes of a few messages; the data are 1 MB, of which
    # Dask may move a part to an idle worker once.
    assert min(sent) < 20_000


def test_starts_of_a_recovery_run_on_the_workers(client):
    rng = np.random.default_rng(0)
    W, V = rng.standard_normal((4, 4)), rng.standard_normal((4, 7))
    X = 0.5 * rng.standard_normal((4, 6))
    z = X.T @ W @ X
    B = np.exp(z) / np.exp(z).sum(axis=1, keepdims=True) @ X.T @ V
    layer = problems.LayerInversion(W, V, B, known={0: X[:, 0]})
    here, there = (inversion.recover(layer, random_state=0, client=c) for c in (None, client))
    assert here.verdict == there.verdict == "recovered"
    assert np.array_equal(here.x, there.x)
    assert here.n_starts == there.n_starts


def test_without_a_cluster_the_threads_of_this_process_serve():
    memory, pieces = both(sizes=(30, 40, 50), pieces=3)
    x = np.full(6, 0.1)
    assert relative(pieces.gradient(x), memory.gradient(x)) < 1e-12


def test_faults_are_named():
    A, b = np.ones((10, 2)), np.full(10, 0.1)
    lazy = da.from_array(A, chunks=(5, 2))
    with pytest.raises(ValueError, match=r"b has shape \(9,\) but A has 10 rows"):
        problems.Softmax(lazy, b[:9])
    with pytest.raises(ValueError, match="b has 2 partitions but A has"):
        import dask.dataframe as dd
        import pandas as pd

        frame = dd.from_pandas(pd.DataFrame(A), npartitions=1)
        problems.Softmax(frame, dd.from_pandas(pd.Series(b), npartitions=2))
    with pytest.raises(ValueError, match="weights are all zero"):
        problems.Softmax(lazy, b, weights=np.zeros(10))
    with pytest.raises(ValueError, match="partition 1: A contains NaN at row 2, column 0"):
        bad = A.copy()
        bad[7, 0] = np.nan
        problems.Softmax(da.from_array(bad, chunks=(5, 2)), b)
    with pytest.raises(TypeError, match="on the workers"):
        _ = problems.Softmax(lazy, b).rows.chunks


def test_parts_without_rows_are_left_out():
    lazy = da.concatenate([da.zeros((0, 2)), da.from_array(np.eye(2), chunks=(1, 2))])
    problem = problems.Softmax(lazy, np.array([0.25, 0.75]))
    assert problem.shape == (2,)
    assert problem.value(np.zeros(2)) == pytest.approx(0.0625)


def test_sums_of_partial_results():
    one = {"a": np.ones(2)}, 1.0, None
    other = {"a": np.ones(2), "b": 2.0}, 2.0, 3
    sums = merged(one, other)
    assert np.array_equal(sums[0]["a"], [2.0, 2.0])
    assert sums[0]["b"] == 2.0
    assert sums[1:] == (3.0, 3)
    assert sparse.issparse(merged(sparse.csr_array(np.eye(2)), sparse.csr_array(np.eye(2))))


def test_cells_of_an_audit_run_on_the_workers(client):
    pytest.importorskip("torch")
    from attnfit import audit

    model = audit.load("tiny")
    texts = model.private_texts[:1]
    request = (["hidden:1", "attention:0"], [None, "float16"])
    here, there = (audit.run(model, texts, *request, budget=600, client=c) for c in (None, client))

    def told(report):
        return {
            (c.key.access, c.key.defence, c.key.text, c.key.control): (c.status, c.tokens, c.verified)
            for c in report.cells
        }

    assert told(here) == told(there)
    assert all(status == "done" for status, _, _ in told(there).values())


def test_parts_without_drawn_rows_add_nothing():
    _, pieces = both(sizes=(400,), pieces=40)
    at = pieces.evaluate(np.full(6, 0.1))
    sampler = RowSampler(0, 20.0, np.eye(6), 6.0, np.random.default_rng(0))
    drawn = pieces.evaluate(np.full(6, 0.1), at, sampler)
    assert any(not chunks for chunks in dask.compute(*drawn.sample.chunks))
    assert np.isfinite(pieces.hessian_at(drawn, drawn.sample)).all()
    assert np.isfinite(pieces.hessian_operator(drawn, drawn.sample)(np.ones(6))).all()


def test_groups_by_offsets_and_weights_of_groups():
    inst, x = instance("Softmax", "squared", sizes=(7, 30, 3, 50, 10), d=3)
    A, b = da.from_array(inst.A, chunks=(33, 3)), da.from_array(inst.b, chunks=(33,))
    offsets, weights = np.array([0, 7, 37, 40, 90, 100]), np.arange(1.0, 6.0)
    memory = problems.Softmax(inst.A, inst.b, offsets, weights=weights)
    pieces = problems.Softmax(A, b, offsets, weights=weights)
    assert relative(pieces.gradient(x), memory.gradient(x)) < 1e-12
    with pytest.raises(ValueError, match="group 1 is empty"):
        problems.Softmax(A, b, np.array([0, 7, 7, 100]))


def test_indices_in_errors_are_those_of_the_partition():
    A, b = np.ones((10, 2)), np.full(10, 0.1)
    labels = np.array([0, 0, 0, 1, 1, 1, 1, 2, 2, 2])
    bad = b.copy()
    bad[8] = -1.0
    # Two rows of the second partition move to the first.
    lazy = [da.from_array(v, chunks=(5, *v.shape[1:])) for v in (A, bad, labels)]
    with pytest.raises(ValueError, match="partition 1: b is negative at index 3; kl needs"):
        problems.Softmax(*lazy, loss="kl")
    with pytest.raises(ValueError, match=r"b has shape \(9,\) but A has 10 rows"):
        problems.Softmax(lazy[0], da.from_array(b[:9], chunks=3))


@pytest.mark.parametrize("seed", range(8))
def test_scattered_groups_are_drawn_whole_and_never_none(seed):
    from attnfit.objectives.subsample import draw_rows

    rng = np.random.default_rng(3)
    A, labels = rng.standard_normal((30_000, 2)), rng.permutation(np.repeat(np.arange(30), 1000))
    lazy = [da.from_array(v, chunks=(6000, *v.shape[1:])) for v in (A, np.full(30_000, 1e-3), labels)]
    problem = problems.Softmax(*lazy)
    assert problem.rows.n_long == 30
    draw = draw_rows(problem.rows, 4100, np.random.default_rng(seed))
    assert len(draw.rows) == 4000
    assert set(np.bincount(draw.labels - draw.labels.min())) <= {0, 1000}
    assert draw.inclusion == pytest.approx(4 / 30)


@pytest.mark.parametrize("groups", [None, "three"])
@pytest.mark.parametrize("zero", ["targets", "weights", "weights of targets"])
def test_neighbours_of_parts_are_those_of_the_whole(groups, zero):
    """Their weights are of the whole group, and written to memory of their own."""
    import dask.array as da

    rng = np.random.default_rng(0)
    A, b, w = rng.standard_normal((400, 3)), rng.random(400), rng.uniform(0.1, 3.0, 400)
    (w if zero == "weights" else b)[200:] = 0.0
    if zero == "weights of targets":
        b[250:300], w[250:300] = rng.random(50), 0.0
    labels = None if groups is None else np.repeat([0, 1, 2], [90, 210, 100])
    given, x = w.copy(), np.array([0.3, -0.2, 0.1])
    whole = problems.Rescaled(A, b, groups=labels, weights=w)
    spread = problems.Rescaled(da.from_array(A, chunks=(100, 3)), b, groups=labels, weights=given)
    neighbours = whole.convex_surrogate(), spread.convex_surrogate()
    assert relative(*[p.gradient(x) for p in neighbours]) < 1e-12
    assert (given == w).all()
    assert relative(spread.gradient(x), whole.gradient(x)) < 1e-12


@pytest.mark.parametrize("n", [400, 60_000])
def test_weights_only_where_targets_are_zero(n):
    """The neighbour has no weights left: there is none, and the fit begins at zero."""
    import dask.array as da

    rng = np.random.default_rng(0)
    A, b = rng.standard_normal((n, 3)), rng.random(n)
    b[n // 2 :] = 0.0
    w = (b == 0.0).astype(float)
    for data in (A, da.from_array(A, chunks=(n // 4, 3))):
        problem = problems.Softmax(data, b, weights=w, ridge=1e-3)
        assert problem.convex_surrogate() is None
        assert minimize(problem, random_state=0).status in ("converged", "precision")


def test_threads_are_given_back():
    """Also where tasks end in the order in which they began."""
    from attnfit.data.parallel import available_threads, one_blas_thread

    before = available_threads()
    one, other = one_blas_thread(), one_blas_thread()
    one.__enter__()
    other.__enter__()
    one.__exit__(None, None, None)
    assert available_threads() == 1
    other.__exit__(None, None, None)
    assert available_threads() == before


def test_what_needs_rows_here_says_so():
    import dask.array as da

    from attnfit import incontext

    A = np.random.default_rng(0).standard_normal((40, 3))
    problem = problems.Softmax(da.from_array(A, chunks=(10, 3)), np.full(40, 1 / 40))
    with pytest.raises(TypeError, match="on the workers of a Dask cluster"):
        incontext.shift(problem, np.zeros(3), np.ones(3))


def test_the_data_term_alone_is_that_of_one_machine():
    rng = np.random.default_rng(0)
    A, b, groups = rng.standard_normal((60, 3)), rng.random(60), np.repeat(np.arange(12), 5)
    options = {"loss": "cross_entropy", "row_penalty": 0.4, "ridge": 0.3}
    here = problems.Softmax(A, b, groups, **options)
    there = problems.Softmax(da.from_array(A, chunks=(20, 3)), b, groups, **options)
    x = rng.standard_normal(3)
    bare = problems.Softmax(A, b, groups, loss="cross_entropy").value(x)
    assert here.without_penalties().value(x) == pytest.approx(bare, rel=1e-13)
    assert there.without_penalties().value(x) == pytest.approx(bare, rel=1e-13)
    assert there.value(x) == pytest.approx(here.value(x), rel=1e-13)
    assert there.value(x) > bare

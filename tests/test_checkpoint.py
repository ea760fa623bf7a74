"""A fit that is resumed ends where it would have ended, bit for bit, and goes on with the same data only."""

import pickle
import re
import sys
from contextlib import suppress

import numpy as np
import pytest
from checkpointed import (
    CASES,
    Crash,
    Reads,
    assert_same,
    crashing,
    exponential,
    fit,
    forge,
    header_of,
    large,
    rows,
    steps,
)
from instances import instance
from scipy import sparse

from attnfit import minimize, problems
from attnfit.objectives import models
from attnfit.objectives.leverage import RowSampler, leverage_sketch
from attnfit.solvers import (
    CheckpointError,
    GradientDescent,
    Newton,
)
from attnfit.solvers.record import Recording
from attnfit.solvers.recorded import Recorded


@pytest.fixture(autouse=True)
def several_chunks(monkeypatch):
    monkeypatch.setattr("attnfit.solvers.simplex.CHUNK", 8)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "fit.ckpt"


# ---- the same answer ----


@pytest.mark.parametrize("case", CASES)
def test_a_crashed_fit_ends_where_it_would_have(case, path):
    reference = fit(case)
    n, further = len(reference.history), CASES[case][3]
    assert_same(fit(case, path), reference, -1.0)
    for after in sorted({1, n // 2, n - 1} - {0}):
        with pytest.raises(Crash):
            fit(case, path, crashing(after), resume=False)
        result = fit(case, path)
        assert_same(result, reference, further)
        assert result.message.startswith(f"{reference.message}; resumed from {path} after ")
    # The fit has ended: nothing is left but to check the data.
    assert_same(fit(case, path), reference, further)


@pytest.mark.parametrize("how", ["stop", KeyboardInterrupt])
@pytest.mark.parametrize(
    "case", ["auto", "auto, small", "matrix free, sampled", "gradient descent", "batch", "outputs", "mixture"]
)
def test_an_interrupted_fit_goes_on(case, how, path):
    reference = fit(case)
    n, further = len(reference.history), CASES[case][3]
    for after in sorted({1, n // 2, n - 1} - {0}):
        stopped = fit(case, path, crashing(after, how), resume=False)
        assert len(stopped.history) == after
        assert stopped.status == header_of(path)["status"]
        # Stopped again while it replays, it loses nothing.
        fit(case, path, crashing(1, how))
        assert_same(fit(case, path), reference, further)


@pytest.mark.parametrize("error", [Crash, KeyboardInterrupt])
@pytest.mark.parametrize("case", ["exact", "sampled", "matrix free", "matrix free, sampled"])
def test_a_fit_may_end_in_mid_read(case, error, path, monkeypatch):
    reads = Reads(monkeypatch)
    reference = fit(case)
    total = reads.count
    reads.error = error
    for share in (0.5, 0.75, 0.99):
        path.unlink(missing_ok=True)
        reads.count, reads.fatal = 0, int(share * total)
        with suppress(Crash, KeyboardInterrupt):
            fit(case, path)
        reads.fatal = None
        assert_same(fit(case, path), reference, CASES[case][3])


def test_a_fit_may_crash_again_and_again(path):
    reference = fit("matrix free, sampled")
    for after in range(1, len(reference.history), 3):
        with pytest.raises(Crash):
            fit("matrix free, sampled", path, crashing(after))
    result = fit("matrix free, sampled", path)
    for name in ("x", "value", "n_iter"):
        np.testing.assert_equal(getattr(result, name), getattr(reference, name))
    np.testing.assert_equal(steps(result), steps(reference))


def test_what_was_read_is_not_read_again(path, monkeypatch):
    """The last evaluation is repeated to check the data, and the rows to look at steps with are fetched."""
    monkeypatch.setattr("attnfit.data.matrix.BLOCK_BYTES", 1 << 30)
    reads = Reads(monkeypatch)
    fit("exact", path, make=lambda: rows(5000))
    assert reads.count > 5
    reads.count = 0
    result = fit("exact", path, make=lambda: rows(5000))
    assert reads.count == 2
    assert re.search(r" after \d+ reads$", result.message)


def test_the_clock_of_a_resumed_fit_goes_on(path):
    first = fit("exact", path)
    result = fit("exact", path)
    entries = header_of(path)["entries"]
    assert result.seconds >= sum(entry["seconds"] for entry in entries)
    evaluated = [e["seconds"] for e in entries if e["call"] == "evaluate"]
    fitted = [r.seconds_evaluate for r in result.history if r.phase.startswith("fit")]
    assert all(row >= seconds for row, seconds in zip(fitted, evaluated, strict=True))
    assert len(first.history) == len(result.history)


@pytest.mark.parametrize("case", ["auto", "auto, small", "exact", "gradient descent"])
@pytest.mark.parametrize("first", [{"tol": 1e-2}, {"max_iter": 1}, {"tol": 1e-2, "max_iter": 3}])
def test_a_resumed_fit_may_go_further(case, first, path):
    reference = fit(case)
    fit(case, path, **first)
    assert_same(fit(case, path), reference)
    # A looser goal is reached on the way.
    assert_same(fit(case, path, **first), fit(case, **first), 1.0)


def test_without_a_checkpoint_problems_are_left_alone(monkeypatch):
    module = sys.modules["attnfit.solvers.minimize"]
    monkeypatch.setattr(module, "Recorded", None)
    monkeypatch.setattr(module, "Checkpoint", None)
    assert fit("auto").converged


def test_the_problem_of_the_user_is_left_alone(path):
    problem = large()
    result = minimize(problem, checkpoint=path)
    assert result.problem is problem
    assert type(problem) is models.Softmax
    assert result.certificate().valid


# ---- only the same fit ----


def changed(name):
    """The data of "auto" with one argument changed."""
    inst, _ = instance("Softmax", "squared", sizes=(15_000, 15_000), d=3, noise=0.3)
    rng = np.random.default_rng(1)
    n = len(inst.b)
    changes = {
        "A": lambda: {"A": inst.A + 1e-9 * rng.standard_normal(inst.A.shape)},
        "b": lambda: {"b": np.roll(inst.b, 1)},
        "groups": lambda: {"groups": np.repeat([0, 1], [14_000, 16_000])},
        "weights": lambda: {"weights": rng.uniform(0.5, 1.0, n)},
        "offset": lambda: {"offset": rng.standard_normal(n)},
        "ridge": lambda: {"ridge": 1e-3},
        "row_penalty": lambda: {"row_penalty": 1e-3},
        "loss": lambda: {"loss": "kl"},
        "storage": lambda: {"A": sparse.csr_array(inst.A)},
        "precision": lambda: {"A": inst.A.astype(np.float32)},
    }
    return inst.problem(**changes[name]())


@pytest.mark.parametrize(
    "name",
    ["A", "b", "groups", "weights", "offset", "ridge", "row_penalty", "loss", "storage", "precision"],
)
def test_other_data_are_refused(name, path):
    fit("auto", path)
    known = path.read_bytes()
    shown = {"storage": "A", "precision": "A"}.get(name, name)
    with pytest.raises(
        CheckpointError, match=rf"is of another fit: it differs in .*{shown}.*; name another file"
    ):
        fit("auto", path, make=lambda: changed(name))
    assert path.read_bytes() == known
    fit("auto", path, make=lambda: changed(name), resume=False)
    assert path.read_bytes() != known


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"make": lambda: large(loss="cross_entropy")}, "differs in loss; name"),
        ({"make": exponential}, "another problem: Softmax of 3 unknowns, not Exponential of 3"),
        ({"make": lambda: rows(30_000)}, "another problem: Softmax of 3 unknowns, not Softmax of 4"),
        ({"solver": Newton("exact")}, r"another solver: Newton\(.*'auto'.*, not Newton\(.*'exact'"),
        ({"solver": GradientDescent()}, r"another solver: Newton\(.*, not GradientDescent\("),
        ({"x0": np.zeros(3)}, "another fit: it differs in x0; name"),
        ({"random_state": 1}, "another random_state; leave it out"),
        ({"random_state": np.random.Generator(np.random.MT19937(0))}, "another random_state"),
    ],
)
def test_another_fit_is_refused(change, message, path):
    fit("auto", path)
    with pytest.raises(CheckpointError, match=message):
        fit("auto", path, **change)


@pytest.mark.parametrize(
    ("case", "attribute"),
    [
        ("attention", "b"),
        ("low rank", "full"),
        ("outputs", "B"),
        ("batch", "b"),
        ("mixture", "outer"),
        ("layer", "B"),
    ],
)
def test_every_problem_has_a_fingerprint(case, attribute, path):
    make = CASES[case][0]

    def other():
        problem = make()
        array = problem.full.b if attribute == "full" else getattr(problem, attribute)
        array[3] += 1e-9
        return problem

    fit(case, path)
    with pytest.raises(CheckpointError, match=rf"it differs in {attribute}; name"):
        fit(case, path, make=other)


@pytest.mark.parametrize("kind", ["PCG64", "PCG64DXSM", "MT19937", "Philox", "SFC64"])
def test_the_stored_seed_is_taken(kind, path):
    def seeded():
        return np.random.Generator(getattr(np.random, kind)(7))

    reference = fit("matrix free, sampled", random_state=seeded())
    with pytest.raises(Crash):
        fit("matrix free, sampled", path, crashing(9), random_state=seeded())
    assert_same(fit("matrix free, sampled", path, random_state=None), reference, 2.0)
    assert_same(fit("matrix free, sampled", path, random_state=seeded()), reference, 2.0)


def test_a_fit_without_a_seed_goes_on(path):
    with pytest.raises(Crash):
        fit("sampled", path, crashing(10), random_state=None)
    copy = path.with_name("copy")
    copy.write_bytes(path.read_bytes())
    one, other = (fit("sampled", p, random_state=None) for p in (path, copy))
    assert_same(one, other)


def test_data_that_changed_where_no_sample_looks_are_refused(path):
    """A fingerprint does not look at every row; the last point does."""
    fit("auto", path, make=lambda: rows(5000))
    known = path.read_bytes()
    inst, _ = instance("Softmax", "squared", sizes=(2500, 2500), d=4, noise=0.3)
    inst.b[[17, 18]] = inst.b[[18, 17]]
    with pytest.raises(
        CheckpointError, match=r"the data are not those of .* restore the data, or pass resume"
    ):
        fit("auto", path, make=inst.problem)
    assert path.read_bytes() == known


def test_a_fit_that_does_not_repeat_itself_goes_on(path):
    reference = fit("exact")
    with pytest.raises(Crash):
        fit("exact", path, crashing(len(reference.history)))
    forge(path, lambda header: header["entries"][-1].update(digest="0"))
    with pytest.warns(
        UserWarning, match=r"entry \d+ of \d+ in .* \(evaluate\) is not what the fit asks for now: the data"
    ):
        result = fit("exact", path)
    assert_same(result, reference)


def test_overflows_are_part_of_the_journal(path, monkeypatch):
    """A step beyond the range of float64 is rejected again without a read."""
    case, points = "exact", []
    own = models.Softmax.evaluate

    def evaluate(self, x, *arguments, **options):
        points.append(x.copy())
        if len(points) > 3 and np.array_equal(x, points[2]):
            raise OverflowError("overflow")
        return own(self, x, *arguments, **options)

    monkeypatch.setattr(models.Softmax, "evaluate", evaluate)
    fit(case)
    reference = fit(case)
    assert not np.isfinite([r.value for r in reference.history]).all()
    with pytest.raises(Crash):
        fit(case, path, crashing(len(reference.history) - 1))
    assert_same(fit(case, path), reference)


def test_a_recorded_problem_travels():
    """To another process in the middle of a fit: what it owes to this one, it does before it leaves."""
    rng = np.random.default_rng(0)
    A, b = rng.standard_normal((2000, 3)), rng.random(2000)
    points = [np.zeros(3), 0.1 * np.ones(3), -0.1 * np.ones(3)]

    def begin(entries):
        problem = problems.Poisson(A, b)
        sketch = leverage_sketch(problem.hessian(points[0]), 8, np.random.default_rng(1))
        sampler = RowSampler(2000, 200.0, sketch, 4.0, np.random.default_rng(2))
        # It comes from np.empty, which may well hold the leverages of the sampler before.
        sampler.leverage[:] = np.nan
        return Recorded(problem, Recording(list(entries), "a fit")), sampler

    def go_on(recorded, sampler, some):
        found = []
        for x in some:
            at = recorded.evaluate(x, None, sampler)
            found.append((at.value, recorded.hessian_at(at, at.sample)))
        return found

    first, sampler = begin([])
    expected = go_on(first, sampler, points)
    # All of it is known, then the first two points: the third needs the leverages of the first read.
    for n, sealed in ((len(first.recording.entries), False), (4, False), (4, True)):
        resumed = begin(first.recording.entries[:n])
        found = go_on(*resumed, points[:1])
        if sealed:
            resumed[0].recording.seal()
        found += go_on(*pickle.loads(pickle.dumps(resumed)), points[1:])
        for (value, hessian), (known, exact) in zip(found, expected, strict=True):
            assert value == known
            assert np.array_equal(hessian, exact)
            assert hessian.any(), "no row was drawn, nothing is tested"
    b[0] += 1.0
    changed = begin(first.recording.entries)
    go_on(*changed, points[:1])
    with pytest.raises(CheckpointError, match="the data are not those of a fit"):
        pickle.dumps(changed)

"""A fit that is resumed ends where it would have ended, bit for bit, and goes on with the same data only."""

import json
import re
import subprocess
import sys
import warnings
from contextlib import suppress

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from instances import instance
from safetensors import safe_open
from safetensors.numpy import save_file
from scipy import sparse
from sklearn.exceptions import ConvergenceWarning

from attnfit import minimize, problems
from attnfit.designs import DenseDesign
from attnfit.solvers import (
    ActiveSet,
    BatchedNewton,
    CheckpointError,
    GradientDescent,
    LevenbergMarquardt,
    Newton,
    SampledTwoLayer,
    checkpoint,
    checkpoint_file,
)
from benchmarks import faults


class Crash(Exception):
    """Nobody catches it."""


def rows(n, loss="squared", d=4, seed=0, **options):
    inst, _ = instance("Softmax", loss, sizes=(n // 2, n - n // 2), d=d, noise=0.3, seed=seed)
    return inst.problem(**options)


def large(loss="squared", **options):
    """Large enough that starts are sought on samples, with a group that is longer than a block."""
    return rows(30_000, loss, d=3, **options)


def exponential(**options):
    inst, _ = instance("Exponential", "exp", sizes=(25_000,), d=3, noise=0.3)
    return inst.problem(**options)


def attention(rank=None, loss="squared"):
    rng = np.random.default_rng(0)
    A1, A2, X = rng.standard_normal((30, 4)), rng.standard_normal((25, 3)), rng.standard_normal((4, 3))
    maps = np.exp(A1 @ X @ A2.T + 0.5 * rng.standard_normal((30, 25)))
    return problems.Attention(A1, A2, maps / maps.sum(axis=1, keepdims=True), loss, rank=rank)


def outputs():
    rng = np.random.default_rng(1)
    A1, A2, A3 = rng.standard_normal((20, 3)), rng.standard_normal((15, 3)), rng.standard_normal((15, 2))
    return problems.FullAttention(A1, A2, A3, rng.standard_normal((20, 2)))


def layer():
    rng = np.random.default_rng(2)
    return problems.LayerInversion(rng.standard_normal((3, 3)), rng.standard_normal((3, 3)),
                                   rng.standard_normal((5, 3)), gamma=0.1)  # fmt: skip


def two_layer(k=None, activation="tanh", A1=True):
    rng = np.random.default_rng(3)
    b = rng.standard_normal(6 if k is None else (6, k))
    first = rng.standard_normal((9, 3)) if A1 else None
    return problems.TwoLayer(first, rng.standard_normal((6, 9)), b, activation)


# Layers are passed again where an evaluation is all that was kept.
IN_MEMORY = np.inf
START = np.full(3, 0.3)
# Problem, solver and options; further reads that a resumed fit may take, beyond the one that checks the data.
CASES = {
    "auto": (large, None, {}, 0),
    "auto, cross entropy": (lambda: large("cross_entropy", ridge=1e-3), None, {}, 0),
    "auto, exponential": (exponential, None, {}, 0),
    "auto, small": (lambda: rows(60), None, {}, 0),
    "auto, sparse, given start": (
        lambda: large(A=sparse.csr_array(instance("Softmax", "squared", sizes=(15_000,) * 2)[0].A)),
        None,
        {"x0": START},
        0,
    ),
    "exact": (large, Newton("exact"), {}, 0),
    "exact, every step": (large, Newton("exact", "none"), {"x0": START}, 0),
    "sampled": (large, Newton("sampled", sample_rows=500), {}, 1),
    "sampled, every step": (large, Newton("sampled", "none", 2000), {"x0": START}, 1),
    "matrix free": (large, Newton("matrix_free"), {}, 1),
    "matrix free, sampled": (large, Newton("matrix_free", sample_rows=200), {}, 2),
    "matrix free, small": (lambda: rows(60), Newton("matrix_free"), {}, 1),
    "gradient descent": (lambda: rows(60), GradientDescent(), {"tol": 1e-3}, 0),
    "attention": (attention, None, {}, 0),
    "attention, sampled start": (lambda: attention(loss="rescaled"), None, {}, 0),
    "low rank": (lambda: attention(rank=2), None, {}, 3),
    "outputs": (outputs, None, {"max_iter": 15}, 3),
    "batch": (lambda: two_layer(k=5), BatchedNewton(), {}, IN_MEMORY),
    "escaping": (two_layer, None, {}, IN_MEMORY),
    "sampled diagonal": (two_layer, SampledTwoLayer(), {"max_iter": 10}, IN_MEMORY),
    "mixture": (lambda: two_layer(40, "identity", A1=False), ActiveSet(), {}, IN_MEMORY),
    "layer, Newton": (layer, Newton(), {}, IN_MEMORY),
    "layer": (layer, LevenbergMarquardt(2), {"max_iter": 20}, IN_MEMORY),
}


def fit(case, path=None, callback=None, make=None, **changes):
    default, solver, options, _ = CASES[case]
    make = default if make is None else make
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        options = {"solver": solver, "random_state": 0} | options | changes
        return minimize(make(), checkpoint=path, callback=callback, **options)


def crashing(after, how=Crash):
    """A callback that ends the fit at a record."""
    seen = []

    def callback(record):
        seen.append(record)
        if len(seen) < after:
            return False
        if how == "stop":
            return True
        raise how

    return callback


def steps(result):
    """The history without reads and seconds."""
    columns = result.history.columns().items()
    return {name: column for name, column in columns if not name.startswith(("n_passes", "seconds"))}


def assert_same(result, reference, further=0.0):
    """The same fit bit for bit; it read the data once more to check them, and perhaps ``further`` times."""
    for name in ("x", "value", "gradient", "gradient_norm", "n_iter", "status", "solver", "local_values"):
        np.testing.assert_equal(getattr(result, name), getattr(reference, name))
    np.testing.assert_equal(steps(result), steps(reference))
    assert -1e-9 <= result.n_passes - reference.n_passes <= 1.0 + further + 1e-9


def header_of(path):
    with safe_open(path, framework="numpy") as file:
        return json.loads(file.metadata()[checkpoint_file.HEADER])


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


class Reads:
    """Count the blocks read, and raise at one of them."""

    def __init__(self, monkeypatch):
        self.count, self.fatal, self.error = 0, None, Crash
        fetch = DenseDesign._fetch

        def counted(design, rows):
            self.count += 1
            if self.count == self.fatal:
                raise self.error
            return fetch(design, rows)

        monkeypatch.setattr(DenseDesign, "_fetch", counted)


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
    """The last evaluation is repeated to check the data, nothing else is."""
    monkeypatch.setattr("attnfit.designs.dense.BLOCK_BYTES", 1 << 30)
    reads = Reads(monkeypatch)
    fit("exact", path, make=lambda: rows(5000))
    assert reads.count > 5
    reads.count = 0
    result = fit("exact", path, make=lambda: rows(5000))
    assert reads.count == 1
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
    monkeypatch.setattr(module, "journaled", None)
    monkeypatch.setattr(module, "Checkpoint", None)
    assert fit("auto").converged


def test_the_problem_of_the_user_is_left_alone(path):
    problem = large()
    result = minimize(problem, checkpoint=path)
    assert result.problem is problem
    assert type(problem) is problems.Softmax
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


def test_overflows_are_part_of_the_journal(path):
    """A step beyond the range of float64 is rejected again without a read."""
    case = "attention, sampled start"
    reference = fit(case)
    assert not np.isfinite([r.value for r in reference.history]).all()
    with pytest.raises(Crash):
        fit(case, path, crashing(len(reference.history) - 1))
    assert_same(fit(case, path), reference)


# ---- files ----


def forge(path, change_header=lambda header: None, change_arrays=lambda arrays: None):
    """Change a file and make its digest right."""
    arrays, header = checkpoint_file.read(path)
    change_header(header)
    change_arrays(arrays)
    checkpoint_file.write(path, arrays, header)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    path = tmp_path_factory.mktemp("finished") / "fit.ckpt"
    fit("sampled", path)
    return path.read_bytes()


def test_a_file_can_be_read_by_people(path):
    result = fit("auto", path)
    arrays, header = checkpoint_file.read(path)
    assert header["status"] == "converged"
    assert header["history"]["value"] == [r.value for r in result.history]
    assert header["last"]["iteration"] == result.n_iter
    assert header["last"]["radius"] is None
    np.testing.assert_array_equal(arrays["x"], result.x)
    np.testing.assert_array_equal(arrays["gradient"], result.gradient)


def test_a_missing_file_is_a_fresh_start(path):
    assert "resumed" not in fit("auto", path).message
    assert "resumed" in fit("auto", str(path)).message
    assert "resumed" not in fit("auto", path, resume=False).message


@given(st.data())
def test_damaged_files_are_refused(finished, tmp_path_factory, data):
    raw = bytearray(finished)
    kind = data.draw(st.sampled_from(["cut", "flip", "insert", "random"]))
    at = data.draw(st.integers(0, len(raw) - 1))
    if kind == "cut":
        del raw[at:]
    elif kind == "flip":
        raw[at] ^= 1 << data.draw(st.integers(0, 7))
    elif kind == "insert":
        raw[at:at] = data.draw(st.binary(min_size=1, max_size=9))
    else:
        raw = data.draw(st.binary(max_size=99))
    path = tmp_path_factory.mktemp("damaged") / "fit.ckpt"
    path.write_bytes(raw)
    with pytest.raises(CheckpointError, match=re.escape(str(path))):
        fit("sampled", path)


FORGERIES = {
    "a later format": lambda h: h.update(format_version=2),
    "a format that is no number": lambda h: h.update(format_version=True),
    "another version": lambda h: h.update(attnfit_version="0.0.1"),
    "no entries": lambda h: h.pop("entries"),
    "entries that are no list": lambda h: h.update(entries=3),
    "an entry that is none": lambda h: h["entries"].insert(0, None),
    "an entry without arrays": lambda h: h["entries"][0].pop("arrays"),
    "arrays that do not exist": lambda h: h["entries"][0].update(arrays=["../../etc/passwd"]),
    "an evaluation without a value": lambda h: h["entries"][0]["arrays"].remove("value"),
    "reads that are no number": lambda h: h["entries"][0].update(n_passes="many"),
    "a draw that is none": lambda h: h["entries"][0].update(draw=[1]),
    "a generator that is none": lambda h: h["random_state"].update(bit_generator="os.system"),
    "a state that is none": lambda h: h["random_state"].update(state={"state": "0", "inc": None}),
    "an infinite state": lambda h: h["random_state"]["state"].update(state=1 << 4000),
    "a fit that is none": lambda h: h.update(fit=[1, 2]),
    "a fit with a nameless part": lambda h: h.update(fit=[[1, 2]]),
    "no status": lambda h: h.pop("status"),
}


@pytest.mark.parametrize("name", FORGERIES)
def test_forged_headers_are_refused(name, finished, path):
    path.write_bytes(finished)
    forge(path, FORGERIES[name])
    with pytest.raises(CheckpointError, match="resume=False"):
        fit("sampled", path)


@pytest.mark.parametrize(
    "array", [np.zeros(4), np.zeros((3, 1)), np.zeros(0), np.zeros(3, dtype=np.int8), np.zeros(3) + 1.0]
)
def test_forged_arrays_are_refused(array, finished, path):
    path.write_bytes(finished)
    last = max(k for k, e in enumerate(header_of(path)["entries"]) if e["call"] == "evaluate")
    forge(path, change_arrays=lambda arrays: arrays.update({f"{last}.gradient": array}))
    with pytest.raises(CheckpointError, match="resume=False"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit("sampled", path)


def test_files_of_other_kinds_are_refused(path):
    save_file({"coef": np.zeros(3)}, path)
    with pytest.raises(CheckpointError, match=r"is a safetensors file but not a checkpoint"):
        fit("auto", path)
    path.unlink()
    path.mkdir()
    for resume in (True, False):
        with pytest.raises(CheckpointError, match="is not a file"):
            fit("auto", path, resume=resume)


@pytest.mark.parametrize("where", ["missing/fit.ckpt", "file/fit.ckpt"])
def test_where_nothing_can_be_written_the_fit_does_not_begin(where, tmp_path, monkeypatch):
    reads = Reads(monkeypatch)
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=rf"checkpoint .*{where} cannot be written .* there is none yet"):
        fit("auto", tmp_path / where)
    assert reads.count == 0


@pytest.mark.parametrize("call", ["write", "fsync", "replace", "chmod"])
def test_a_full_disk_leaves_the_last_checkpoint(call, path, monkeypatch):
    reference = fit("exact")
    with pytest.raises(Crash):
        fit("exact", path, crashing(len(reference.history) - 2))
    known = path.read_bytes()

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    class Full:
        def __init__(self, handle, mode):
            self.handle = handle

        def __enter__(self):
            return self

        def __exit__(self, *error):
            checkpoint_file.os.close(self.handle)

        write = full

    with monkeypatch.context() as patch:
        patch.setattr(
            checkpoint_file.os, "fdopen" if call == "write" else call, Full if call == "write" else full
        )
        with pytest.raises(OSError, match=r"\[Errno 28\] checkpoint .* the one before is intact; make room"):
            fit("exact", path)
    assert path.read_bytes() == known
    assert list(path.parent.iterdir()) == [path]
    assert_same(fit("exact", path), reference)


def test_an_answer_is_not_lost_to_a_full_disk(path, monkeypatch):
    reference = fit("exact")
    fit("exact", path)

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "write", full)
    with pytest.warns(UserWarning, match="No space left"):
        assert_same(fit("exact", path), reference)


LIMITED = """
import os, resource, sys
from attnfit.solvers import checkpoint
from benchmarks import faults
checkpoint.PAUSE = 0.0
def limit(seconds):
    size = os.path.getsize(sys.argv[1])
    if size > 5000:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 100, size + 100))
faults.time.sleep = limit
try:
    faults.fit(faults.Job(5_000, 8, "exact"), sys.argv[1])
except OSError as error:
    print(error)
"""


def test_a_limit_on_the_size_of_files_leaves_the_last_checkpoint(path):
    done = subprocess.run([sys.executable, "-c", LIMITED, str(path)], capture_output=True, text=True)
    expected = r"\[Errno 27\] checkpoint .* \(File too large\) and the one before is intact"
    assert re.match(expected, done.stdout), done.stdout + done.stderr
    assert list(path.parent.iterdir()) == [path]
    job = faults.Job(5_000, 8, "exact")
    assert faults.fit(job, path).x == faults.fit(job).x


def test_what_killed_processes_left_is_removed(path):
    dead = subprocess.run(
        [sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True
    )
    prefix = checkpoint_file._prefix(path)
    left = path.with_name(f"{prefix}{int(dead.stdout)}-abc")
    of_others = [
        path.with_name(f"{prefix}1-abc"),
        path.with_name(f".other{prefix}1-abc"),
        path.with_name(".x"),
    ]
    for file in [left, *of_others]:
        file.touch()
    fit("auto", path)
    assert sorted(path.parent.iterdir()) == sorted([path, *of_others])


def test_links_and_permissions_are_kept(path, tmp_path):
    elsewhere = tmp_path / "disk"
    elsewhere.mkdir()
    path.symlink_to(elsewhere / "real.ckpt")
    fit("auto", path)
    assert path.is_symlink()
    plain = tmp_path / "plain"
    plain.touch()
    assert (elsewhere / "real.ckpt").stat().st_mode == plain.stat().st_mode


@pytest.mark.parametrize("seconds", [0.0, 0.02])
def test_writing_takes_a_tenth_of_the_time(seconds, path, monkeypatch):
    now, written = [0.0], []
    monkeypatch.setattr(checkpoint.time, "perf_counter", lambda: now[0])

    def write(*args):
        now[0] += seconds
        written.append(now[0])

    def wait(record):
        now[0] += 0.01

    monkeypatch.setattr(checkpoint, "write", write)
    result = fit("gradient descent", path, wait, tol=1e-8, max_iter=60)
    n = len(result.history)
    assert n > 30
    # The first and the last writing are not put off.
    if seconds:
        assert 1 <= len(written) - 2 <= 0.1 * now[0] / seconds
    else:
        assert len(written) >= n


# ---- kill -9 ----


def test_killed_fits_end_at_the_same_point(tmp_path):
    job = faults.Job(n=40_000, d=8, hessian="exact", pause=0.03)
    reference = faults.fit(job)
    for k, (moment, while_writing) in enumerate([(0.8, False), (0.6, True)]):
        path = tmp_path / str(k) / "fit.ckpt"
        path.parent.mkdir()
        survived = faults.kill_and_resume(job, reference, moment, path, while_writing=while_writing)
        assert survived.ended.x == reference.x
        assert "resumed from" in survived.ended.message
        assert list(path.parent.iterdir()) == [path]

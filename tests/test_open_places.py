"""What a solver or a data source of one's own must do, and what the checks notice."""

import numpy as np
import pytest
import stored_files

from attnfit import solvers
from attnfit.data import DenseBlockSource, check_source, open_source
from attnfit.solvers import GradientDescent, Newton, Outcome, Solver, check_solver
from attnfit.solvers.verdicts import Verdict


@pytest.mark.parametrize(
    "solver", [Newton(), Newton("matrix_free"), Newton("exact")], ids=lambda s: s.hessian
)
def test_our_solvers_keep_their_word(solver):
    check_solver(solver)


class Gradient(Solver):
    """A solver of one's own, and where tests break it."""

    claims = None
    seeded = True
    uses_x0 = True
    listens = True

    def run(self, problem, start, x0, tol, max_iter, tracker, rng):
        inner = GradientDescent()
        x0 = x0 if self.uses_x0 else None
        if not self.listens:
            tracker.record = lambda *args, **kwargs: None
        outcome = inner.run(problem, start, x0, tol, max_iter, tracker, rng)
        run = outcome.best
        if not self.seeded:
            noise = 1e-14 * np.random.default_rng().standard_normal(len(run.at.x))
            run.at = problem.evaluate(run.at.x * (1.0 + noise))
        if self.claims is not None:
            run.status, run.verdict = self.claims, Verdict(self.claims)
            run.at = problem.evaluate(run.at.x + 0.1)
        return Outcome(run, {}, run.n_iter, "gradient")


def test_a_solver_of_ones_own():
    check_solver(Gradient())


@pytest.mark.parametrize(
    ("broken", "what"),
    [
        ({"claims": solvers.Status.CONVERGED}, "a logit is off"),
        ({"claims": solvers.Status.MAX_ITER}, "not converged"),
        ({"seeded": False}, "two answers"),
        ({"uses_x0": False}, "x0"),
        ({"listens": False}, "x0|callback"),
    ],
)
def test_a_solver_that_breaks_its_word_is_named(broken, what):
    with pytest.raises(AssertionError, match=what):
        check_solver(type("Broken", (Gradient,), broken)())


def test_no_solver_without_run():
    with pytest.raises(TypeError, match="abstract"):
        Solver()
    with pytest.raises(AssertionError, match="derives from"):
        check_solver(object())


class Raw(DenseBlockSource):
    kind = "raw"

    def __init__(self, path, columns, step=7):
        n = path.stat().st_size // (4 * columns)
        edges = np.append(np.arange(0, n, step), n)
        files = np.zeros(len(edges) - 1, dtype=np.intp)
        super().__init__(
            (path, columns, step), str(path), (n, columns), np.dtype("<f4"), edges, (str(path),), files
        )

    def _decode(self, first, last, rows):
        with open(self.paths[0], "rb") as file:
            file.seek(int(self.edges[first]) * 4 * self.shape[1])
            rows[...] = np.frombuffer(file.read(rows.nbytes), dtype="<f4").reshape(rows.shape)

    def _place(self, block):
        return self.paths[0], f"block {block}"


@pytest.fixture
def raw(tmp_path):
    np.random.default_rng(0).standard_normal((50, 3)).astype("<f4").tofile(tmp_path / "rows")
    return tmp_path / "rows"


def test_a_source_of_ones_own(raw):
    check_source(Raw(raw, 3))


@pytest.mark.parametrize(
    ("name", "member", "what"),
    [
        ("_take", lambda self, rows: np.sort(self.read(0, self.shape[0])[rows], axis=0), "any order"),
        ("fingerprint", lambda self: {"kind": id(self)}, "fingerprint"),
        ("locate", lambda self, row: "", "locate"),
        ("_read", lambda self, start, stop, out: Raw._read(self, 0, stop - start, out), "differ"),
        ("thread_copy", lambda self: type(self)(self.shape and self._given[0], 3, 5)._shifted(), "threads"),
        ("_room", lambda self, count, out: np.empty((count, *self.shape[1:]), self.dtype), "view"),
    ],
)
def test_a_source_that_breaks_its_word_is_named(raw, name, member, what):
    def shifted(self):
        self._decode = lambda first, last, rows: rows.fill(0)
        return self

    kind = type("Broken", (Raw,), {name: member, "_shifted": shifted})
    with pytest.raises(AssertionError, match=what):
        check_source(kind(raw, 3))


WRITERS = ["npy", "fortran", "memmap", "zarr", "shards", "zarr2", "zip", "parquet"]


@pytest.mark.parametrize("name", WRITERS)
def test_our_sources_keep_their_word(name, tmp_path):
    written = getattr(stored_files, f"write_{name}")(tmp_path, stored_files.matrix())
    check_source(open_source(written))


def test_our_columns_keep_their_word(tmp_path):
    np.save(tmp_path / "column.npy", np.arange(100.0, dtype=np.float32))
    check_source(open_source(tmp_path / "column.npy"))

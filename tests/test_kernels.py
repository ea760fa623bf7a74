"""The compiled loops agree with NumPy, and let NaN and infinity through."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from conftest import shrink_blocks
from instances import ALL_LOSSES, SOFTMAX, instance, relative
from scipy import sparse

from attnfit import minimize, problems
from attnfit.data import DenseDesign
from attnfit.objectives import compiled as loops


@pytest.fixture
def compiled(monkeypatch):
    compile_from(monkeypatch, 1)


def compile_from(monkeypatch, entries):
    for name in ("DENSE_ENTRIES", "SPARSE_ENTRIES"):
        monkeypatch.setattr(f"attnfit.data.matrix.{name}", entries)


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (4, 1), (257, 7), (64, 33)])
@pytest.mark.parametrize("prepare", [np.ascontiguousarray, np.asfortranarray, np.float32])
def test_products(compiled, shape, prepare):
    rng = np.random.default_rng(0)
    A = prepare(rng.standard_normal(shape))
    x, K = rng.standard_normal(shape[1]), rng.standard_normal((3, shape[0]))
    design = DenseDesign(A)
    block = design.block(slice(0, shape[0]))
    np.testing.assert_allclose(design.product(block, x), block @ x, rtol=1e-12, atol=1e-13)
    np.testing.assert_allclose(design.combine(K, block), K @ block, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_shows(compiled, bad):
    A = np.ones((9, 4))
    A[6, 2] = bad
    design = DenseDesign(A)
    z = design.product(A, np.ones(4))
    assert not np.isfinite(z[6])
    assert np.isfinite(np.delete(z, 6)).all()
    assert not np.isfinite(design.combine(np.ones((1, 9)), A)[0, 2])


STORED = {
    "C": np.ascontiguousarray,
    "F": np.asfortranarray,
    "float32": lambda A: A.astype(np.float32),
    "float32 F": lambda A: np.asfortranarray(A, dtype=np.float32),
    "strided": lambda A: np.repeat(A, 2, axis=0)[::2],
    "csr": sparse.csr_array,
    "csr float32": lambda A: sparse.csr_array(A.astype(np.float32)),
}


def both(monkeypatch, inst, **changes):
    """The problem read by NumPy, and by compiled loops."""
    compile_from(monkeypatch, 1 << 60)
    plain = inst.problem(**changes)
    assert plain.design.storage is None
    compile_from(monkeypatch, 1)
    fast = inst.problem(**changes)
    assert fast.design.storage is not None
    return plain, fast


# Every loss, and every storage: the two vary independently, and compiling all pairs takes minutes.
PAIRS = [(*loss, "C") for loss in ALL_LOSSES] + [("Softmax", "squared", storage) for storage in STORED]


@pytest.mark.parametrize("groups", ["one", "short", "long", "unsorted"])
@pytest.mark.parametrize(("family", "loss", "storage"), list(dict.fromkeys(PAIRS)))
def test_every_read_agrees_with_numpy(monkeypatch, family, loss, groups, storage):
    """With and without weights, offset, row penalty and the gradient at zero."""
    inst, x = instance(family, loss, sizes=(400,) if groups == "one" else (3, 150, 1, 2, 5, 70, 40, 129), d=5)
    rng = np.random.default_rng(0)
    n = len(inst.b)
    if groups in ("long", "unsorted"):
        shrink_blocks(monkeypatch)
    order = rng.permutation(n) if groups == "unsorted" else np.arange(n)
    labels = None if inst.groups is None else inst.groups[order]
    # Numbers that float32 holds exactly.
    A = STORED[storage](inst.A.astype(np.float32).astype(np.float64)[order])
    for weighted, shifted, penalised in itertools.product([False, True], repeat=3):
        options = {"weights": rng.random(n)} if weighted else {}
        options |= {"offset": rng.standard_normal(n)} if shifted else {}
        options |= {"row_penalty": rng.random(n)} if penalised else {}
        changes = {"A": A, "b": inst.b[order]} | options | ({} if labels is None else {"groups": labels})
        plain, fast = both(monkeypatch, inst.replace(options=options), **changes)
        expected, found = (p.evaluate(x, at_zero=True) for p in (plain, fast))
        assert fast.n_passes == plain.n_passes
        assert relative(found.value, expected.value) < 1e-13
        size = np.linalg.norm(expected.gradient) + np.linalg.norm(expected.gradient_at_zero)
        assert np.linalg.norm(found.gradient - expected.gradient) < 1e-13 * size
        assert np.linalg.norm(found.gradient_at_zero - expected.gradient_at_zero) < 1e-13 * size
        if found.state.size:
            assert relative(found.state, expected.state) < 1e-13
            assert relative(found.centre, expected.centre) < 1e-13
        near = fast.evaluate(x + 1e-3)
        assert relative(fast.evaluate(x, near).gradient, expected.gradient) < 1e-11
        curved = fast.evaluate(x, found, hessian=True)
        assert relative(curved.gradient, expected.gradient) < 1e-11
        if curved.hessian is not None:
            assert relative(curved.hessian, plain.hessian(x)) < 1e-11
        assert curved.hessian is not None or len(fast.rows.long_groups)


@pytest.mark.parametrize("storage", ["dense", "csr"])
@pytest.mark.parametrize("groups", ["short", "long", "unsorted"])
@pytest.mark.parametrize(("family", "loss"), ALL_LOSSES)
def test_threads_change_no_bit_and_no_count(monkeypatch, family, loss, groups, storage):
    """Curvature, moves and structure, which threads share out, are those of the rows in one piece."""
    shrink_blocks(monkeypatch)
    sizes = (400,) if groups == "long" else (3, 50, 1, 2, 5, 60, 40, 29, 63, 64)
    inst, x = instance(family, loss, sizes=sizes, d=5)
    rng = np.random.default_rng(0)
    changes = {}
    if groups == "unsorted" and inst.groups is not None:
        order = rng.permutation(len(inst.b))
        changes = {"A": inst.A[order], "b": inst.b[order], "groups": inst.groups[order]}
    if storage == "csr":
        changes["A"] = sparse.csr_array(changes.get("A", inst.A))
        monkeypatch.setattr("attnfit.data.matrix.WORK_A_NUMBER", 0)
    steps = rng.standard_normal((5, 2))
    found = {}
    for n_threads, chunks in [(0, 0), (1, 2), (4, 2), (4, 1000)]:
        # Without threads, NumPy's own reads.
        compile_from(monkeypatch, 1 if n_threads else 1 << 60)
        for module in ("objectives.part", "data.store"):
            monkeypatch.setattr(f"attnfit.{module}.available_threads", lambda n=n_threads: n)
        monkeypatch.setattr("attnfit.data.matrix.BLOCKS_A_RUN", chunks)
        problem = inst.problem(**changes)
        at = problem.evaluate(x)
        curved = problem.evaluate(x, at, hessian=True)
        moved, diagonal, along = problem.look_along(at, steps[:, 0], steps)
        found[n_threads, chunks] = [
            curved.value,
            curved.gradient,
            problem.hessian_at(at),
            problem.hessian_at(at, absolute=True),
            problem.hvp_at(at, x),
            problem.diagonal_at(at),
            problem.moves(at, steps).largest,
            np.array([problem.moves(at, steps).least, *moved.largest]),
            diagonal,
            along,
            *problem.structure(at),
            problem.n_passes,
        ]
    for one, other in zip(found[1, 2], found[4, 2], strict=True):
        np.testing.assert_array_equal(one, other)
    assert found[4, 2][-1] == found[0, 0][-1]
    for alike in (found[4, 1000], found[0, 0]):
        for one, other in zip(found[1, 2], alike, strict=True):
            size = np.abs(np.where(np.isfinite(other), other, 0.0)).max(initial=0.0)
            np.testing.assert_allclose(one, other, rtol=1e-11, atol=1e-11 * size)


@pytest.mark.parametrize("n_threads", [1, 4])
def test_threads_ignore_what_their_caller_ignores(compiled, monkeypatch, n_threads):
    """A trial point that overflows is rejected by its value, without a word from NumPy."""
    shrink_blocks(monkeypatch)
    for module in ("objectives.part", "data.store"):
        monkeypatch.setattr(f"attnfit.{module}.available_threads", lambda: n_threads)
    monkeypatch.setattr("attnfit.data.matrix.BLOCKS_A_RUN", 1)
    problem = problems.Exponential(np.random.default_rng(0).standard_normal((4_000, 3)), np.ones(4_000))
    far = np.array([300.0, 0.0, 0.0])
    with np.errstate(over="ignore", invalid="ignore"):
        assert problem.evaluate(far, hessian=True).value == np.inf
    with np.errstate(over="raise"), pytest.raises(FloatingPointError):
        problem.hessian_at(problem.evaluate(far))


@pytest.mark.parametrize(("family", "loss"), ALL_LOSSES)
def test_second_order_of_a_large_problem(monkeypatch, family, loss):
    inst, x = instance(family, loss, sizes=(300, 5, 80), d=4)
    plain, fast = both(monkeypatch, inst)
    np.testing.assert_allclose(fast.hessian(x), plain.hessian(x), rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(fast.hvp(x, x), plain.hvp(x, x), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("family", "loss"), SOFTMAX)
@pytest.mark.parametrize("blocks", ["large", "small"])
def test_large_logits(monkeypatch, family, loss, blocks):
    if blocks == "small":
        shrink_blocks(monkeypatch)
    inst, x = instance(family, loss, sizes=(100, 200), d=3)
    x = x * 1e4 / np.abs(inst.A @ x).max()
    plain, fast = both(monkeypatch, inst)
    assert np.isclose(fast.value(x), plain.value(x), rtol=1e-12)
    assert np.linalg.norm(fast.gradient(x) - plain.gradient(x)) < 1e-12 * np.linalg.norm(
        plain.gradient(0 * x)
    )


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("long", [False, True])
@pytest.mark.parametrize("at", [0.0, 1.0])
def test_a_memory_map_with_holes_is_named(compiled, monkeypatch, tmp_path, bad, long, at):
    if long:
        shrink_blocks(monkeypatch)
    A = np.ones((300, 4))
    A[171, 2] = bad
    np.save(tmp_path / "a.npy", A)
    mapped = np.load(tmp_path / "a.npy", mmap_mode="r")
    problem = problems.Softmax(mapped, np.full(300, 1 / 300))
    assert problem.design.storage is not None
    with pytest.raises(ValueError, match="row 171, column 2"):
        problem.value_and_gradient(np.full(4, at))


@pytest.mark.parametrize("sign", [-1.0, 1.0])
def test_overflowing_logits_are_an_error(compiled, sign):
    problem = problems.Softmax(np.full((300, 4), 1e200), np.full(300, 1 / 300))
    with pytest.raises(OverflowError, match="A x overflows"):
        problem.value(np.full(4, sign * 1e200))


def test_overflowing_losses_are_an_error(compiled):
    problem = problems.Exponential(np.full((300, 4), 100.0), np.ones(300))
    with pytest.raises(OverflowError, match="overflows float64 at this x"):
        problem.value(np.full(4, 1.0))


@pytest.mark.parametrize("compile_it", [False, True])
@pytest.mark.parametrize(
    ("family", "loss"), [*SOFTMAX, ("Rescaled", "exp"), ("Rescaled", "cosh"), ("Rescaled", "sinh")]
)
def test_a_guessed_normaliser_costs_no_accuracy_and_little_reading(monkeypatch, family, loss, compile_it):
    shrink_blocks(monkeypatch)
    compile_from(monkeypatch, 1 if compile_it else 1 << 60)
    inst, x = instance(family, loss, sizes=(30_000, 50), d=3)
    problem, exact = inst.problem(), inst.objective()
    value, gradient = problem.value_and_gradient(x)
    # Of alpha = sum sinh(z), where terms cancel, a sample may say little: one read more then finds it.
    assert problem.n_passes < (3.1 if loss == "sinh" else 1.1)
    assert relative(value, exact.value(x)) < 1e-12
    assert np.linalg.norm(gradient - exact.gradient(x)) < 1e-11 * np.linalg.norm(exact.gradient(0.5 * x))


def test_a_misleading_guess_is_found_out(monkeypatch):
    """All the mass sits on rows that equal distances miss."""
    shrink_blocks(monkeypatch)
    inst, x = instance("Softmax", "squared", sizes=(30_000,), d=3)
    inst.A[::100] += 40.0 * x / (x @ x)
    problem = inst.problem()
    assert relative(problem.gradient(x), inst.objective().gradient(x)) < 1e-12
    assert problem.n_passes > 2.9


def test_compiled_loops_are_kept_between_processes(tmp_path):
    import os
    import subprocess
    import sys

    code = """
import time, numpy as np
from attnfit import problems
import attnfit.data.matrix as matrix
matrix.DENSE_ENTRIES = 1
from attnfit.objectives import compiled as loops
p = problems.Softmax(np.eye(5, 3), np.full(5, 0.2), loss="kl", groups=[0, 0, 1, 1, 1])
p.value(np.ones(3))
kernel = loops.loop_of(p.loss, "rows", by_group=True)
print(sum(kernel.stats.cache_hits.values()), sum(kernel.stats.cache_misses.values()))
"""
    environment = dict(os.environ) | {"NUMBA_CACHE_DIR": str(tmp_path)}
    answers = [
        subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
        )
        for _ in range(2)
    ]
    assert [answer.stdout.split() for answer in answers] == [["0", "1"], ["1", "0"]]


def test_small_problems_do_not_load_the_compiler(tmp_path):
    import os
    import subprocess
    import sys

    code = (
        "import sys, numpy as np; from attnfit import minimize, problems;"
        "minimize(problems.Softmax(np.eye(5, 3), np.full(5, 0.2), ridge=1.0));"
        "assert 'numba' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], env=dict(os.environ), cwd=tmp_path, check=False)
    assert done.returncode == 0


def test_a_fit_is_the_same(compiled):
    rng = np.random.default_rng(1)
    A, b = rng.standard_normal((25_000, 3)), rng.random(25_000)
    fast = minimize(problems.Softmax(A, b / b.sum()), random_state=0)
    assert fast.converged
    slow = problems.Softmax(np.asfortranarray(A), b / b.sum())
    assert np.linalg.norm(slow.gradient(fast.x)) <= 1e-7 * np.linalg.norm(slow.gradient(np.zeros(3)))


@pytest.mark.parametrize("everything", [False, True])
def test_warming_up_asks_for_the_loops_of_every_large_fit(everything, monkeypatch):
    asked = set()

    def compile_loop(template, storage, *formulas):
        asked.add((template.__name__, storage, formulas[1][0].__qualname__))
        return lambda *arguments: None

    monkeypatch.setattr(loops, "compile_loop", compile_loop)
    n = loops.warm_up(everything)
    storages = {storage for _, storage, _ in asked}
    losses = {loss for _, _, loss in asked}
    assert storages == ({"rows", "columns", "csr"} if everything else {"rows", "csr"})
    # Hyperbolic functions share formulas.
    assert len(losses) == (8 if everything else 5)
    assert {template for template, *_ in asked} == {"pieces", "whole_groups"}
    assert n >= len(asked) + 3

"""The compiled products agree with BLAS, and let NaN and infinity through."""

from __future__ import annotations

import numpy as np
import pytest
from instances import ALL_LOSSES, instance

from attnfit import minimize, problems
from attnfit.designs import DenseDesign


@pytest.fixture
def compiled(monkeypatch):
    monkeypatch.setattr("attnfit.designs.dense.COMPILED_ENTRIES", 1)


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


@pytest.mark.parametrize(("family", "loss"), ALL_LOSSES)
def test_every_loss(monkeypatch, family, loss):
    inst, x = instance(family, loss, sizes=(300, 5, 80), d=4)
    plain = inst.problem()
    monkeypatch.setattr("attnfit.designs.dense.COMPILED_ENTRIES", 1)
    fast = inst.problem()
    for method in ("value", "gradient", "hessian"):
        expected = getattr(plain, method)(x)
        np.testing.assert_allclose(getattr(fast, method)(x), expected, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(fast.hvp(x, x), plain.hvp(x, x), rtol=1e-10, atol=1e-12)


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

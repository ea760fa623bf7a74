"""Sampled rows: leverages within a factor, unbiased sums, a Hessian that is close."""

import numpy as np
import pytest
from instances import ALL_LOSSES, instance, relative
from scipy import sparse

from attnfit.objectives.leverage import RowSampler, leverage_sketch


def leverages(A):
    return np.einsum("ij,ij->i", A @ np.linalg.pinv(A.T @ A), A)


def test_leverages_are_found_within_a_factor():
    rng = np.random.default_rng(0)
    A = rng.standard_normal((500, 6)) * rng.gamma(0.5, size=(500, 1)) * np.logspace(0, 4, 6)
    sketch = leverage_sketch(A.T @ A, 64, rng)
    assert sketch.shape == (6, 64)
    ratio = np.sum((A @ sketch) ** 2, axis=1) / leverages(A)
    assert ratio.min() > 0.4
    assert ratio.max() < 2.0


def test_leverages_are_unbiased():
    rng = np.random.default_rng(1)
    A = rng.standard_normal((20, 3))
    mean = np.mean([np.sum((A @ leverage_sketch(A.T @ A, 8, rng)) ** 2, axis=1) for _ in range(3000)], axis=0)
    assert np.allclose(mean, leverages(A), rtol=0.05)


def test_directions_without_curvature_are_left_out():
    rng = np.random.default_rng(2)
    A = rng.standard_normal((300, 3))
    A = np.column_stack([A, A[:, 0], np.zeros(300)])
    sketch = leverage_sketch(A.T @ A, 200, rng)
    assert np.isfinite(sketch).all()
    ratio = np.sum((A @ sketch) ** 2, axis=1) / leverages(A)
    assert 0.5 < ratio.min() < ratio.max() < 2.0


def test_sampled_sums_are_unbiased():
    rng = np.random.default_rng(3)
    scores, values = rng.gamma(0.5, size=200), rng.standard_normal(200)
    totals, sizes = [], []
    for _ in range(4000):
        sampler = RowSampler(200, 40.0, np.zeros((1, 1)), scores.sum(), rng)
        kept, inverse = sampler.draw(scores)
        totals.append(np.sum(values[kept] * inverse))
        sizes.append(len(kept))
    assert abs(np.mean(totals) - values.sum()) < 4.0 * np.std(totals) / np.sqrt(len(totals))
    assert 30 < np.mean(sizes) <= 40.5


def test_the_mass_is_corrected_after_a_read():
    sampler = RowSampler(4, 2.0, np.zeros((1, 1)), 1.0, np.random.default_rng(0))
    sampler.draw(np.array([1.0, 2.0]))
    assert not sampler.has_leverage
    sampler.finish(10.0)
    assert sampler.mass == 10.0
    assert sampler.has_leverage


def test_certain_rows_keep_their_weight():
    sampler = RowSampler(3, 100.0, np.zeros((1, 1)), 1.0, np.random.default_rng(0))
    kept, inverse = sampler.draw(np.array([1.0, 0.5, 0.0]))
    assert kept.tolist() == [0, 1]
    assert inverse.tolist() == [1.0, 1.0]


def sampler_at(problem, x, budget, rng):
    at = problem.evaluate(x)
    sketch = leverage_sketch(problem.hessian_at(at, absolute=True), 8, rng)
    return RowSampler(problem.n_rows, budget, sketch, 1.3 * len(x), rng)


def rows_of(sample):
    assert sample.n_rows == sum(len(chunk.multiplier) for chunk in sample.chunks)
    return sample.n_rows


@pytest.mark.parametrize("sizes", [(20_000,), [3, 5, 4] * 2_000], ids=["long group", "short groups"])
def test_the_budget_counts_rows(sizes, small_blocks):
    inst, x = instance("Softmax", "squared", sizes=sizes, noise=0.3)
    problem = inst.problem()
    near = problem.evaluate(x)
    sampler = sampler_at(problem, x, 1000.0, np.random.default_rng(0))
    problem.evaluate(x, near, sampler)
    # From the second read on the sum of all scores is known.
    assert 700 < rows_of(problem.evaluate(x, near, sampler).sample) < 1300


@pytest.mark.parametrize("sizes", [(1500,), [3, 5, 4] * 150], ids=["long group", "short groups"])
@pytest.mark.parametrize(
    ("family", "loss", "storage"),
    [(*case, np.asarray) for case in ALL_LOSSES]
    + [("Softmax", "squared", sparse.csr_array), ("Rescaled", "exp", sparse.csr_array)],
)
def test_sampled_hessian_is_unbiased_and_close(family, loss, storage, sizes, small_blocks):
    inst, x = instance(family, loss, sizes=sizes, noise=0.3)
    problem = inst.problem(A=storage(inst.A), row_penalty=0.05, ridge=0.1)
    rng = np.random.default_rng(0)
    near = problem.evaluate(x)
    exact = problem.hessian_at(near)
    metric = problem.hessian_at(near, absolute=True)
    root = np.linalg.inv(np.linalg.cholesky(metric))
    errors = []
    for _ in range(30):
        at = problem.evaluate(x, near, sampler_at(problem, x, 400.0, rng))
        sampled = problem.hessian_at(at, at.sample)
        v = rng.standard_normal(len(x))
        assert relative(problem.hessian_operator(at, at.sample)(v), sampled @ v) < 1e-9
        assert rows_of(at.sample) < problem.n_rows
        errors.append(root @ (sampled - exact) @ root.T)
    # Measured in the metric of the absolute weights, in which the sampling error is bounded.
    sizes_of_errors = [np.linalg.norm(error, 2) for error in errors]
    assert np.median(sizes_of_errors) < 0.35
    deviation = np.std(errors, axis=0) / np.sqrt(len(errors))
    assert (np.abs(np.mean(errors, axis=0)) <= 4.5 * deviation + 0.01).all()


def test_a_larger_budget_gives_a_better_hessian(small_blocks):
    inst, x = instance("Softmax", "squared", sizes=(4000,), noise=0.3)
    problem = inst.problem()
    near = problem.evaluate(x)
    exact = problem.hessian_at(near)
    rng = np.random.default_rng(0)

    def error(budget):
        draws = [problem.evaluate(x, near, sampler_at(problem, x, budget, rng)) for _ in range(10)]
        return np.median([relative(problem.hessian_at(at, at.sample), exact) for at in draws])

    assert error(2000.0) < 0.6 * error(200.0)


def test_sampled_rows_count_as_a_share_of_a_read(small_blocks):
    inst, x = instance("Softmax", "squared", sizes=(4000,), noise=0.3)
    problem = inst.problem()
    rng = np.random.default_rng(0)
    near = problem.evaluate(x)
    sampler = sampler_at(problem, x, 400.0, rng)
    before = problem.n_passes
    at = problem.evaluate(x, near, sampler)
    assert problem.n_passes - before == 1.0
    problem.hessian_at(at, at.sample)
    kept = rows_of(at.sample)
    assert np.isclose(problem.n_passes - before, 1.0 + kept / 4000)

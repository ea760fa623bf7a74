"""Verdicts on large data, where the curvature of all rows may be too dear: ``python -m
benchmarks.verdicts_large [--problems 500]``.

Every problem is fitted with the default settings; every tenth once more with the exact Hessian asked for as
soon as the next step moves no logit by more than 1e-3. The reference is written anew: the exact Newton step,
scaled and refined twice, from where the fit ended. "False" is a fit called converged from which that step
moves a logit by more than 1e-5.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import tempfile
import warnings
from collections import defaultdict
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
from scipy import linalg, sparse
from sklearn.exceptions import ConvergenceWarning
from threadpoolctl import threadpool_limits

from attnfit import minimize, problems
from attnfit.data import open_source
from benchmarks.report import table, write

FALSE, SEEN = 1e-5, 1e-6
LOSSES = ("cross_entropy", "squared", "exponential")
STORAGES = ("dense", "csr", "on disk", "dask")
MOST_ENTRIES = 5_000_000
# Problems without a minimum take all steps.
MAX_ITER = 30


class Case(NamedTuple):
    """A drawn problem: rows, target, groups (None for the exponential loss) and weights."""

    loss: str
    storage: str
    A: Any
    b: Any
    groups: Any
    weights: Any


def draw(seed: int) -> Case:
    """Draw a problem with tails, dummies, collinear columns, and sizes and weights over orders of
    magnitude.
    """
    rng = np.random.default_rng(seed)
    loss, storage = LOSSES[seed % 3], STORAGES[seed // 3 % 4]
    if storage == "csr":
        d, per_row = int(rng.choice([120, 300, 800], p=[0.4, 0.5, 0.1])), int(rng.integers(12, 30))
        n = int(np.exp(rng.uniform(np.log(20_000), np.log(60_000))))
        columns = rng.integers(0, d, (n, per_row))
        values = rng.standard_normal((n, per_row))
        A: Any = np.zeros((n, d))
        A[np.arange(n)[:, None], columns] = values
    else:
        d = int(rng.choice([20, 60, 210, 260, 400, 500], p=[0.1, 0.1, 0.5, 0.2, 0.05, 0.05]))
        n = int(np.exp(rng.uniform(np.log(20_000), np.log(min(200_000, MOST_ENTRIES / min(d, 240))))))
        A = rng.standard_normal((n, d))
    if rng.random() < 0.3:
        tail = rng.standard_t(2, n).clip(-60, 60)
        A[:, 0] = tail * (A[:, 0] != 0.0)
    if rng.random() < 0.5:
        A[:, 2] = A[:, 1] + A[:, 2] * 10.0 ** rng.uniform(-5, 0)
    n_dummies = int(rng.integers(0, d // 2)) if rng.random() < 0.5 else 0
    effects = np.zeros(d)
    for j in range(d - n_dummies, d):
        A[:, j] = 0.0
        A[rng.choice(n, int(rng.integers(10, 100)), replace=False), j] = 1.0
        effects[j] = rng.uniform(-3, 1)
    size = int(rng.choice([5, 12, 100, 499, n], p=[0.3, 0.3, 0.25, 0.1, 0.05]))
    size = size if loss != "exponential" else 0
    if loss == "exponential":
        A[:, 3] = 1.0
    truth = rng.standard_normal(d) * 0.7 / np.sqrt(min(d, 60) if storage != "csr" else 12) + effects
    truth[0] *= 0.3
    z = A @ truth
    groups = None if size == 0 else np.minimum(np.arange(n) // size, max(n // size - 1, 0))
    weights = 10.0 ** rng.uniform(-1.5, 1.5, n) if rng.random() < 0.25 else None
    noise = float(rng.choice([0.0, 0.05, 0.3]))
    if groups is None:
        z = z - z.max() + 3.0
        b = np.exp(z) * np.exp(noise * rng.standard_normal(n)) * 10.0 ** rng.uniform(-9, 9)
    else:
        starts = np.flatnonzero(np.diff(groups, prepend=-1))
        top = np.maximum.reduceat(z, starts)[groups]
        e = np.exp(z - top)
        f = e / np.add.reduceat(e, starts)[groups]
        b = f * np.exp(noise * rng.standard_normal(n))
        if loss == "cross_entropy" and rng.random() < 0.5:
            b = rng.poisson(20.0 * f * size).astype(float)
            b[starts] += 1.0
    if rng.random() < 0.4:
        A *= 10.0 ** rng.uniform(-6, 6, d)
    return Case(loss, storage, sparse.csr_array(A) if storage == "csr" else A, b, groups, weights)


def build(case: Case, folder: Path) -> Any:
    """Return the problem with its rows where they belong."""
    A, b, groups, weights = case.A, case.b, case.groups, case.weights
    if case.storage == "on disk":
        path = folder / "A.npy"
        np.save(path, A)
        A = open_source(str(path))
    if case.storage == "dask":
        import dask.array as da

        rows = -(-len(b) // 4)
        A = da.from_array(A, chunks=(rows, A.shape[1]))
        b = da.from_array(b, chunks=rows)
        groups = None if groups is None else da.from_array(groups, chunks=rows)
        weights = None if weights is None else da.from_array(weights, chunks=rows)
    if case.loss == "exponential":
        return problems.Exponential(A, b, weights=weights)
    return problems.Softmax(A, b, groups=groups, loss=case.loss, weights=weights)


def exact_step(case: Case, x: Any) -> float:
    """Return the largest change of a logit by an exact Newton step; infinite where there is none."""
    A, b = case.A, case.b
    w = np.ones(len(b)) if case.weights is None else case.weights
    z = A @ x
    if case.groups is None:
        u = np.exp(z)
        slope, t, mean = w * u * (u - b), w * u * (2.0 * u - b), None
    else:
        starts = np.flatnonzero(np.diff(case.groups, prepend=-1))

        def total(v: Any) -> Any:
            return np.add.reduceat(v, starts)[case.groups]

        e = np.exp(z - np.maximum.reduceat(z, starts)[case.groups])
        f = e / total(e)
        if case.loss == "cross_entropy":
            mass = total(w * b)
            slope, t = f * mass - w * b, f * mass
        else:
            p = w * (f - b)
            middle = total(p * f)
            slope, t = f * (p - middle), w * f * f + f * (p - middle)
        indicator = sparse.csr_array(
            (f, np.arange(len(b)), np.append(starts, len(b))), shape=(len(starts), len(b))
        )
        mean = indicator @ A
    d = A.shape[1]
    hessian, gradient = np.zeros((d, d)), A.T @ slope
    for first in range(0, len(b), 8_192):
        rows = slice(first, first + 8_192)
        block = A[rows].toarray() if sparse.issparse(A) else A[rows]
        if mean is not None:
            centre = mean[case.groups[rows]]
            block = block - (centre.toarray() if sparse.issparse(centre) else centre)
        hessian += (block * t[rows, None]).T @ block
    scale = np.sqrt(np.diag(hessian))
    if not (scale > 0.0).all():
        return float("inf")
    scaled, right = hessian / scale / scale[:, None], gradient / scale
    values = linalg.eigvalsh(scaled, subset_by_index=[0, 0])
    if values[0] <= 1e-14 * d:
        return float("inf")
    factor = linalg.cho_factor(scaled)
    p = linalg.cho_solve(factor, right)
    for _ in range(2):
        p += linalg.cho_solve(factor, right - scaled @ p)
    along = A @ (p / scale)
    if case.groups is None:
        return float(np.abs(along).max())
    return float((np.maximum.reduceat(along, starts) - np.minimum.reduceat(along, starts)).max() / 2)


class Row(NamedTuple):
    """What became of one problem."""

    step: float
    converged: bool
    sampled: bool
    reads: float
    seconds: float
    exact_reads: float
    exact_seconds: float


def fit(case: Case, folder: Path, *, both: bool) -> Row:
    """Fit a problem, on request both ways."""
    found = []
    for bar in (None, float("inf")) if both else (None,):
        problem = build(case, folder)
        began = perf_counter()
        if bar is None:
            result = minimize(problem, max_iter=MAX_ITER, random_state=0)
        else:
            with mock.patch("attnfit.solvers.newton.DEAR_GRAM", bar):
                result = minimize(problem, max_iter=MAX_ITER, random_state=0)
        found.append((result, perf_counter() - began))
    (result, seconds), (exact, exact_seconds) = found[0], found[-1]
    finite = bool(np.isfinite(result.x).all())
    step = exact_step(case, result.x) if finite else float("nan")
    return Row(
        step,
        result.converged,
        "curvature sampled" in result.message,
        result.n_passes,
        seconds,
        exact.n_passes,
        exact_seconds,
    )


def main() -> None:
    """Write the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.verdicts_large", description=__doc__)
    parser.add_argument("--problems", type=int, default=500, help="how many (default 500)")
    parser.add_argument("--first", type=int, default=0, help="first seed (default 0)")
    parser.add_argument("--quick", action="store_true", help="twelve problems")
    options = parser.parse_args()
    seeds = range(options.first, options.first + (12 if options.quick else options.problems))
    rows: dict[tuple[str, str], list[Row]] = defaultdict(list)
    began = perf_counter()
    with threadpool_limits(1), warnings.catch_warnings(), tempfile.TemporaryDirectory() as folder:
        warnings.simplefilter("ignore", ConvergenceWarning)
        for seed in seeds:
            case = draw(seed)
            row = fit(case, Path(folder), both=seed % 10 == 0)
            rows[case.loss, case.storage].append(row)
            print(seed, case.loss, case.storage, case.A.shape, *row, flush=True, file=sys.stderr)
    header = ["loss", "rows", "problems", "converged", "of these sampled", "false", "step > 1e-6"]
    header += ["largest step", "reads", "reads beside exact", "time over exact"]
    lines = []
    everything = [row for found in rows.values() for row in found]
    for (loss, storage), found in [*rows.items(), (("all", ""), everything)]:
        steps = [row.step for row in found if row.converged]
        sampled = [row for row in found if row.sampled]
        both = [row for row in sampled if row.seconds != row.exact_seconds]
        ratio = f"{np.median([row.seconds / row.exact_seconds for row in both]):.2f}" if both else "-"
        more = f"{np.median([row.reads - row.exact_reads for row in both]):+.1f}" if both else "-"
        lines.append(
            [
                loss,
                storage,
                str(len(found)),
                str(len(steps)),
                str(len(sampled)),
                str(sum(not step <= FALSE for step in steps)),
                str(sum(step > SEEN for step in steps)),
                f"{max(steps, default=0.0):.1e}",
                f"{np.median([row.reads for row in found]):.1f}",
                more,
                ratio,
            ]
        )
    note = (
        f"Seeds {seeds[0]} to {seeds[-1]}, 20,000 to 200,000 rows, 20 to 800 "
        f"unknowns, at most {MAX_ITER} steps, one thread, {perf_counter() - began:.0f} s for both fits and "
        "the reference. Sampled: "
        "accepted without an exact Hessian. The last two columns compare them with the fit that ends with an "
        "exact Hessian, for every tenth problem: medians of the difference in reads, where a read with a "
        "Hessian counts as one, and of the ratio of whole times."
    )
    command = shlex.join(["python", "-m", "benchmarks.verdicts_large", *sys.argv[1:]])
    section = f"## Verdicts on large data\n\n{note}\n\n{table(header, lines)}"
    print(section)
    write("verdicts-large" + "-quick" * options.quick, command, [section])


if __name__ == "__main__":
    main()

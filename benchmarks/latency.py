"""Waiting: small fits, large fits in units of a read, certificates, mixtures, threads and what limits them:
``python -m benchmarks.latency``.

Every ratio is of the fastest of runs that take turns, in one process, warm.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import warnings
from collections.abc import Callable
from time import perf_counter
from typing import Any

import numpy as np
from scipy import optimize
from threadpoolctl import threadpool_limits

from attnfit import minimize, problems
from benchmarks import peers_sampled
from benchmarks.data import Spec, draw
from benchmarks.mixture import nnls
from benchmarks.report import table, write
from benchmarks.solvers import attnfit_problem

Array = Any


def main() -> None:
    """Write the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.latency", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a tenth of the rows")
    parser.add_argument("--rows", type=int, default=3_000_000, help="rows of the table of threads")
    options = parser.parse_args()
    part = 10 if options.quick else 1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with threadpool_limits(1):
            lines = [*small(), *large(1_000_000 // part, 64), *proofs(part), *mixtures()]
        sections = [
            "## One thread\n\n"
            + table(["what", "seconds", "in units of", "seconds", "ratio", "wanted"], lines),
            threads(options.rows // part, 64),
        ]
    name = "latency-quick" if options.quick else "latency"
    path = write(name, shlex.join(["python", "-m", "benchmarks.latency", *sys.argv[1:]]), sections)
    print(path.read_text())


def turns(*works: Callable[[], Any], runs: int = 5) -> list[float]:
    """Return the seconds of the fastest run of each, after one that is not counted."""
    best = [np.inf] * len(works)
    for run in range(runs + 1):
        for k, work in enumerate(works):
            began = perf_counter()
            work()
            if run:
                best[k] = min(best[k], perf_counter() - began)
    return best


def line(what: str, ours: float, unit: str, theirs: float, wanted: str) -> list[str]:
    """Return the cells of one comparison."""
    return [what, f"{ours:.3g}", unit, f"{theirs:.3g}", f"{ours / theirs:.2f}", wanted]


def shares(n: int, d: int, size: int, seed: int = 0) -> tuple[Array, Array, Array]:
    """Return rows, shares within groups of one size, and the groups."""
    rng = np.random.default_rng(seed)
    A, groups = rng.standard_normal((n, d)), np.repeat(np.arange(n // size), size)
    u = np.exp(A @ (1.5 / np.sqrt(d) * rng.standard_normal(d)) + 0.5 * rng.standard_normal(n))
    return A, u / np.repeat(u.reshape(-1, size).sum(axis=1), size), groups


def small() -> list[list[str]]:
    """Fits of milliseconds."""
    from sklearn.linear_model import TweedieRegressor

    size = 20
    A, b, groups = shares(2_000, 6, size)
    starts = np.arange(0, len(b), size)

    def objective(x: Array) -> tuple[float, Array]:
        z = A @ x
        z -= np.repeat(np.maximum.reduceat(z, starts), size)
        e = np.exp(z)
        f = e / np.repeat(np.add.reduceat(e, starts), size)
        r = f - b
        return 0.5 * float(r @ r), A.T @ (f * (r - np.repeat(np.add.reduceat(f * r, starts), size)))

    def lbfgs() -> Any:
        options = {"gtol": 1e-9, "ftol": 0.0}
        return optimize.minimize(objective, np.zeros(6), jac=True, method="L-BFGS-B", options=options)

    def softmax(**settings: Any) -> Any:
        return minimize(problems.Softmax(A, b, groups=groups, loss="squared"), random_state=0, **settings)

    one, two, theirs = turns(softmax, lambda: softmax(n_starts=2), lbfgs, runs=40)
    rng = np.random.default_rng(0)
    X = rng.standard_normal((10_000, 16))
    y = np.exp(X @ (0.3 * rng.standard_normal(16)) + 0.3 * rng.standard_normal(10_000))

    def cholesky() -> Any:
        model = TweedieRegressor(
            power=0, link="log", alpha=0, fit_intercept=False, solver="newton-cholesky", tol=1e-8
        )
        return model.fit(X, y)

    def exponential(**settings: Any) -> Any:
        return minimize(problems.Exponential(X, y), random_state=0, **settings)

    first, both, sklearn = turns(exponential, lambda: exponential(n_starts=2), cholesky, runs=20)
    plain, dear = "scipy L-BFGS-B in NumPy", "sklearn newton-cholesky"
    return [
        line("squared softmax 2,000 x 6", one, plain, theirs, "1.5"),
        line("the same, two starts", two, plain, theirs, "3"),
        line("squared exponential 10,000 x 16", first, dear, sklearn, "1.3"),
        line("the same, two starts", both, dear, sklearn, "2.4"),
    ]


def large(n: int, d: int) -> list[list[str]]:
    """A whole fit of squared shares of one group."""
    case = draw(Spec("softmax", n, d))

    def fit() -> Any:
        return minimize(attnfit_problem(case), random_state=0)

    problem = attnfit_problem(case)
    x = fit().x
    near = problem.evaluate(x)
    seconds, read, curved, plain, compiled = turns(
        fit,
        lambda: problem.evaluate(x, near),
        lambda: problem.evaluate(x, near, hessian=True),
        lambda: peers_sampled.lbfgs_sample(case, 1e-8, 60.0),
        lambda: peers_sampled.lbfgs_sample_ours(case, 1e-8, 60.0),
    )
    title = f"squared softmax {n:,} x {d}, whole fit"
    metric = "L-BFGS in units of a sample's Hessian"
    return [
        line(title, seconds, "compiled read", read, "9"),
        line("the same", seconds, f"{metric}, NumPy", plain, "0.65"),
        line("the same", seconds, f"{metric}, our reads", compiled, "0.75"),
        line(f"read with exact Hessian, {n:,} x {d}", curved, "compiled read", read, "6.5"),
    ]


def proofs(part: int) -> list[list[str]]:
    """Certificates against the fits that they are of."""
    lines = []
    for n, d, wanted in ((100_000, 32, "0.5"), (600_000 // part, 64, "1.2")):
        A, b, groups = shares(n, d, 10)
        problem = problems.Softmax(A, b, groups=groups, loss="squared")
        result = minimize(problem, random_state=0)
        fit, proof = turns(
            lambda p=problem: minimize(p, random_state=0), lambda r=result: r.certificate(), runs=3
        )
        lines.append(line(f"certificate, {n:,} x {d}", proof, "the fit", fit, wanted))
    return lines


def mixtures() -> list[list[str]]:
    """Mixtures against a loop over scipy's nnls."""
    lines = []
    for m, n, k, alpha, wanted in ((400, 300, 200, 0.03, "0.1"), (224, 16, 20_000, 0.3, "0.2")):
        rng = np.random.default_rng(0)
        signatures = rng.random((m, n))
        spectra = signatures @ rng.dirichlet(np.full(n, alpha), size=k).T + 0.02 * rng.standard_normal((m, k))
        few = spectra[:, : min(k, 1_000)]

        def ours(S: Array = signatures, B: Array = spectra) -> Any:
            return minimize(problems.TwoLayer(None, S, B, "identity"))

        def loop(S: Array = signatures, B: Array = few) -> Any:
            return [nnls(S, column) for column in B.T]

        found, theirs = turns(ours, loop, runs=2)
        result = ours()
        present = float((result.problem.proportions(result.x) > 0.0).sum(axis=0).mean())
        unit = f"nnls loop over {few.shape[1]:,}, times {k // few.shape[1]}"
        lines.append(
            line(
                f"mixture {m} x {n}, {k:,} spectra, {present:.0f} present",
                found,
                unit,
                theirs * k / few.shape[1],
                wanted,
            )
        )
    return lines


def threads(n: int, d: int) -> str:
    """One thread and two, float64 and float32, beside what the machine can do."""
    A, b, groups = shares(n, d, 10)
    rows: dict[str, list[float]] = {}
    counts = (1, 2)
    for count in counts:
        with threadpool_limits(count):
            for name, matrix in (("float64", A), ("float32", A.astype(np.float32))):
                problem = problems.Softmax(matrix, b, groups=groups, loss="squared")
                for what, seconds in passes(problem).items():
                    rows.setdefault(f"{what}, {name}", []).append(seconds)
    limits = roofline(A)
    lines = [
        [what, *(f"{s:.3g}" for s in found), f"{found[0] / found[1]:.2f}"] for what, found in rows.items()
    ]
    lines += [[what, *(f"{s:.3g}" for s in found), f"{found[1] / found[0]:.2f}"] for what, found in limits]
    read, curved = rows["read, float64"], rows["read with exact Hessian, float64"]
    speed, product = (found for _, found in limits)
    share = [A.nbytes / 1e9 / s / v for s, v in zip(read, speed, strict=True)]
    flops = [n * d * d / 1e9 / (s - r) / v for s, r, v in zip(curved, read, product, strict=True)]
    text = (
        f"Seconds. A read comes to {share[0]:.0%} and {share[1]:.0%} of the speed at which one and two "
        f"threads sum up the rows; what a Hessian adds to a read, to {flops[0]:.0%} and {flops[1]:.0%} of "
        "the speed of its symmetric products alone, from cache."
    )
    return f"## Threads, {n:,} x {d}\n\n{text}\n\n" + table(["what", "one thread", "two", "gain"], lines)


def passes(problem: Any) -> dict[str, float]:
    """Return the seconds of what a fit does, and of a fit."""
    x = minimize(problem, random_state=0).x
    near = problem.evaluate(x)
    seconds = turns(
        lambda: problem.evaluate(x, near),
        lambda: problem.evaluate(x, near, hessian=True),
        lambda: problem.moves(near, x[:, None]),
        lambda: minimize(problem, random_state=0),
        runs=3,
    )
    return dict(
        zip(["read", "read with exact Hessian", "moves of a step", "whole fit"], seconds, strict=True)
    )


def roofline(A: Array) -> list[tuple[str, list[float]]]:
    """Return the speed at which rows are summed up, and that of symmetric products of blocks in cache."""
    from concurrent.futures import ThreadPoolExecutor

    block, repeats = np.ascontiguousarray(A[:1_024]), 200

    def products(_: int) -> None:
        for _ in range(repeats):
            block.T @ block

    speeds, flops = [], []
    with threadpool_limits(1):
        for count in (1, 2):
            halves = np.array_split(A, count)
            with ThreadPoolExecutor(count) as pool:
                (whole,) = turns(lambda p=pool, h=halves: list(p.map(np.sum, h)), runs=3)
                (product,) = turns(lambda p=pool, c=count: list(p.map(products, range(c))), runs=3)
            speeds.append(A.nbytes / 1e9 / whole)
            flops.append(count * repeats * len(block) * A.shape[1] ** 2 / 1e9 / product)
    return [("sum of all entries, GB/s", speeds), ("symmetric products in cache, Gflop/s", flops)]


if __name__ == "__main__":
    main()

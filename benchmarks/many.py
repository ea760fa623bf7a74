"""Many fits of one problem: ``python -m benchmarks.many``.

`minimize_many` against R fits one by one, each from the fit of all the data, and against a loop of scipy's
L-BFGS over plain NumPy from there; errors against fits to 1e-12, in standard deviations of the replicates.
Processor time of one thread, the median of the runs; peers fit the first replicates of each case, and their
time is scaled up.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import warnings
from statistics import median
from time import process_time
from typing import Any

import numpy as np
from scipy import optimize
from threadpoolctl import threadpool_limits

from attnfit import SoftmaxRegressor, minimize, minimize_many, problems
from benchmarks.report import table, write

CASES = [(100_000, 32, 10, 200), (2_000, 6, 10, 1_000)]
QUICK = [(20_000, 16, 10, 50), (2_000, 6, 10, 200)]
PEER_FITS = 10
Array = Any


def main() -> None:
    """Write the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.many", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="smaller cases, for a look")
    parser.add_argument("--runs", type=int, default=3, help="runs of minimize_many (default 3)")
    options = parser.parse_args()
    cases = QUICK if options.quick else CASES
    with threadpool_limits(1), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lines = [
            line(*case, loss, kind, options.runs)
            for case in cases
            for loss in ("cross_entropy", "squared")
            for kind in ("bootstrap", "ridge", "folds")
        ]
        spread = agreement(200 if options.quick else 1_000)
    header = ["n", "d", "fits", "loss", "kind", "seconds", "shared reads", "alone", "one by one / ours"]
    header += ["L-BFGS / ours", "error / sd", "converged"]
    sections = [f"## Fits that share reads\n\n{table(header, lines)}", spread]
    name = "many-quick" if options.quick else "many"
    path = write(name, shlex.join(["python", "-m", "benchmarks.many", *sys.argv[1:]]), sections)
    print(path.read_text())


def instance(n: int, d: int, size: int, seed: int = 0) -> tuple[Array, Array, Array]:
    """Shares of groups of one size, with noise."""
    rng = np.random.default_rng(seed)
    A, groups = rng.standard_normal((n, d)), np.repeat(np.arange(n // size), size)
    u = np.exp(A @ (0.3 * rng.standard_normal(d))) * np.exp(0.3 * rng.standard_normal(n))
    return A, u / np.bincount(groups, weights=u)[groups], groups


def line(n: int, d: int, size: int, R: int, loss: str, kind: str, runs: int) -> list[str]:
    """One row."""
    A, b, groups = instance(n, d, size)
    G = n // size
    problem = problems.Softmax(A, b, groups, loss=loss)
    rng = np.random.default_rng(1)
    W, ridges = np.ones((G, 1)), np.zeros(1)
    arguments: dict[str, Any]
    if kind == "bootstrap":
        W = rng.multinomial(G, np.full(G, 1.0 / G), size=R).T.astype(np.float64)
        arguments = {"weights": W}
    elif kind == "ridge":
        mean = float(np.trace(problem.hessian(minimize(problem).x))) / d
        ridges = mean * np.geomspace(1.0, 1e-4, 50)
        arguments = {"ridge": ridges}
    else:
        W = 1.0 - np.eye(10)[np.arange(G) % 10]
        arguments = {"folds": groups % 10}
    R = max(W.shape[1], len(ridges))
    seconds, found = [], None
    for _ in range(runs):
        began = process_time()
        found = minimize_many(problem, **arguments)
        seconds.append(process_time() - began)
    assert found is not None
    some = np.linspace(0, R - 1, min(PEER_FITS, R)).astype(int)
    own, theirs, errors = 0.0, 0.0, []
    sd = found.x.std(axis=0) + 1e-300
    for r in some:
        w, ridge = W[:, r % W.shape[1]], float(ridges[r % len(ridges)])
        began = process_time()
        alone = problems.Softmax(A, b, groups, loss=loss, weights=w[groups], ridge=ridge)
        minimize(alone, x0=found.full.x)
        own += process_time() - began
        began = process_time()
        lbfgs(A, b, size, w, ridge, loss, found.full.x)
        theirs += process_time() - began
        exact = minimize(alone, x0=found.full.x, tol=1e-12).x
        errors.append(float(np.max(np.abs(exact - found.x[r]) / sd)))
    mine, share = median(seconds), R / len(some)
    return [
        f"{n:,}", str(d), f"{R:,}", loss, kind, f"{mine:.3g}", str(found.n_rounds), str(found.n_alone),
        f"{own * share / mine:.1f}", f"{theirs * share / mine:.1f}", f"{max(errors):.0e}",
        f"{int(found.converged.sum()):,}",
    ]  # fmt: skip


def lbfgs(A: Array, b: Array, size: int, w: Array, ridge: float, loss: str, x0: Array) -> Array:
    """Scipy on plain NumPy: groups of one size are rows of an array."""
    B = b.reshape(-1, size)

    def objective(x: Array) -> tuple[float, Array]:
        z = (A @ x).reshape(-1, size)
        z -= z.max(axis=1, keepdims=True)
        f = np.exp(z)
        total = f.sum(axis=1, keepdims=True)
        f /= total
        if loss == "squared":
            c = f - B
            value = 0.5 * np.sum(w * np.sum(c * c, axis=1))
            slope = f * (c - np.sum(f * c, axis=1, keepdims=True))
        else:
            value = float(np.sum(w * (np.log(total[:, 0]) * B.sum(axis=1) - np.sum(B * z, axis=1))))
            slope = f * B.sum(axis=1, keepdims=True) - B
        gradient = A.T @ (w[:, None] * slope).ravel()
        return float(value + 0.5 * ridge * x @ x), gradient + ridge * x

    options = {"gtol": 1e-9 * float(np.abs(objective(np.zeros_like(x0))[1]).max()), "ftol": 1e-15}
    return optimize.minimize(objective, x0, jac=True, method="L-BFGS-B", options=options).x


def agreement(n: int) -> str:
    """How the bootstrap's errors compare with the sandwich."""
    lines = []
    for loss in ("cross_entropy", "squared"):
        A, b, groups = instance(2_000, 6, 10, seed=1)
        model = SoftmaxRegressor(loss).fit(A, b, groups=groups)
        robust = np.sqrt(np.diag(model.covariance("robust")))
        drawn = model.bootstrap(n, random_state=1)
        for name, found in ((f"bootstrap, {n:,}", drawn), ("jackknife", model.jackknife())):
            ratio = found.standard_errors / robust
            lines.append([loss, name, f"{ratio.min():.3f}", f"{ratio.max():.3f}"])
    header = ["loss", "errors from", "smallest / sandwich", "largest / sandwich"]
    return f"## Errors against the sandwich by group, 2,000 x 6\n\n{table(header, lines)}"


if __name__ == "__main__":
    main()

"""Mixtures with proportions on the simplex: ``python -m benchmarks.mixture``."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
from scipy import optimize, special
from threadpoolctl import threadpool_limits

from attnfit import minimize, problems
from benchmarks.report import table, write

N_BANDS, N_SIGNATURES = 200, 16
NOISE = 0.02
# Weight of the row that asks NNLS for a sum of one, relative to the norm of a signature.
HEAVY = 1e4
# A peer that reports success with an excess over the certified optimum beyond this has stopped at a false
# one.
FALSE = 1e-6
Array = Any


def main() -> None:
    """Write the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.mixture", description=__doc__)
    parser.add_argument("--threads", type=int, default=1, help="BLAS threads (default 1)")
    parser.add_argument("--runs", type=int, default=5, help="runs of attnfit (default 5)")
    parser.add_argument("--large", type=int, default=100_000, help="right-hand sides of the large table")
    options = parser.parse_args()
    with threadpool_limits(options.threads):
        sections = [section(k, options) for k in (400, options.large)]
    name = "mixture" if options.large == 100_000 else "mixture-quick"
    path = write(name, shlex.join(["python", "-m", "benchmarks.mixture", *sys.argv[1:]]), sections)
    print(path.read_text())


def instance(k: int, seed: int = 0) -> tuple[Array, Array]:
    """Signatures and spectra: sparse proportions and noise."""
    rng = np.random.default_rng(seed)
    signatures = rng.random((N_BANDS, N_SIGNATURES))
    shares = rng.dirichlet(np.full(N_SIGNATURES, 0.3), size=k)
    shares[shares < 0.03] = 0.0
    shares /= shares.sum(axis=1, keepdims=True)
    return signatures, signatures @ shares.T + NOISE * rng.standard_normal((N_BANDS, k))


def section(k: int, options: argparse.Namespace) -> str:
    """One table."""
    signatures, spectra = instance(k)
    # Compiling and importing are not part of a fit.
    minimize(problems.TwoLayer(None, signatures, spectra[:, :2], "identity"))
    runs = []
    for _ in range(options.runs if k <= 1000 else 1):
        began = perf_counter()
        mixture = problems.TwoLayer(None, signatures, spectra, "identity")
        result = minimize(mixture)
        runs.append(perf_counter() - began)
    began = perf_counter()
    certificate = result.certificate()
    proof = perf_counter() - began
    best = mixture.column_values(result.x)
    support = float((mixture.proportions(result.x) > 0.0).sum(axis=0).mean())
    certified = int((certificate.relative_gap <= 1e-9).sum())
    header = ["solver", "seconds", "says it converged", "largest excess", "false optima", "note"]
    proven, radius = f"{certified:,} certified to 1e-9", f"radius at most {certificate.radius:.1e}"
    lines = [
        ["attnfit, active set", f"{median(runs):.3g}", f"{k:,}", "0", "0", proven],
        ["attnfit, certificates with radii", f"{proof:.3g}", "-", "-", "-", radius],
    ]
    peers: list[tuple[str, Callable[[Array, Array], tuple[Array, bool]], str]] = [
        (
            "scipy nnls, a loop",
            nnls,
            f"sum to one as a row of {HEAVY:.0e} times the largest norm of a signature; divided by its sum",
        )
    ]
    if k <= 1000:
        peers.append(
            ("scipy L-BFGS-B in softmax coordinates, a loop", lbfgs, "from uniform, gtol 1e-8, ftol 1e-15")
        )
    for name, solve, remark in peers:
        began = perf_counter()
        answers = [solve(signatures, column) for column in spectra.T]
        seconds = perf_counter() - began
        values = 0.5 * np.sum((signatures @ np.array([f for f, _ in answers]).T - spectra) ** 2, axis=0)
        success = np.array([ok for _, ok in answers])
        excess = (values - best) / best
        false = int((success & (excess > FALSE)).sum())
        lines.append(
            [name, f"{seconds:.3g}", f"{int(success.sum()):,}", f"{excess.max():.1e}", str(false), remark]
        )
    title = f"## {k:,} right-hand sides, {N_BANDS} bands, {N_SIGNATURES} signatures, {support:.1f} present"
    legend = (
        "Excess: loss over the certified optimum, less one. A false optimum reports success with an excess "
        f"beyond {FALSE:.0e}."
    )
    return f"{title}\n\n{legend}\n\n{table(header, lines)}"


def nnls(signatures: Array, b: Array) -> tuple[Array, bool]:
    """Non-negative least squares with the sum as a heavy row."""
    heavy = HEAVY * float(np.linalg.norm(signatures, axis=0).max())
    A = np.vstack([signatures, np.full((1, signatures.shape[1]), heavy)])
    f, _ = optimize.nnls(A, np.append(b, heavy))
    return f / f.sum(), True


def lbfgs(signatures: Array, b: Array) -> tuple[Array, bool]:
    """Softmax coordinates."""

    def objective(x: Array) -> tuple[float, Array]:
        f = special.softmax(x)
        c = signatures @ f - b
        q = signatures.T @ c
        return 0.5 * float(c @ c), f * (q - f @ q)

    start = np.zeros(signatures.shape[1])
    answer = optimize.minimize(
        objective, start, jac=True, method="L-BFGS-B", options={"maxiter": 5000, "gtol": 1e-8, "ftol": 1e-15}
    )
    return special.softmax(answer.x), bool(answer.success)


if __name__ == "__main__":
    main()

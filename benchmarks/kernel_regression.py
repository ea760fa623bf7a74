"""Products that a preconditioner saves: ``python -m benchmarks.kernel_regression``.

Kernel regression by conjugate gradients, with partial Cholesky factors of some ranks and without, to a
relative residual of 1e-10; the error against the dense solution. ``--large`` adds the peak of memory at n =
1e5 (minutes).
"""

from __future__ import annotations

import argparse
import resource
import shlex
import subprocess
import sys
import warnings
from time import process_time
from typing import Any

import numpy as np
from scipy import linalg
from sklearn.exceptions import ConvergenceWarning
from threadpoolctl import threadpool_limits

from attnfit import minimize, problems
from attnfit.objectives.kernel import BLOCK_BYTES
from attnfit.solvers import ConjugateGradients
from benchmarks.report import table, write

Array = Any
TOL, MOST = 1e-10, 400
# d, the size of the entries, the penalty, the ridge, ranks.
CASES = [
    (6, 0.5, "function", 1e-2, (0, 50, 200, 500)),
    (6, 0.5, "function", 1e-4, (200, 500)),
    (6, 0.5, "coefficients", 14.0, (0, 300)),
    (16, 1.0, "function", 1e-2, (0, 50, 200, 500)),
]
LARGE = 100_000


def main() -> None:
    """Write the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernel_regression", description=__doc__)
    parser.add_argument("--tokens", type=int, default=2000, help="n (default 2000)")
    parser.add_argument("--large", action="store_true", help=f"the peak of memory at n = {LARGE:,} too")
    parser.add_argument("--peak", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peak:
        print(peak(options.peak))
        return
    with threadpool_limits(1), warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        lines = [line for case in CASES for line in rows(options.tokens, *case)]
    header = [
        "d",
        "scale",
        "penalty",
        "ridge",
        "rank",
        "effective rank",
        "products",
        "status",
        "error",
        "seconds",
    ]
    text = (
        f"n = {options.tokens:,} tokens, entries scale N(0, 1) / d^(1/4), standard normal right side; "
        f"{TOL:.0e} is the relative residual asked for, the error is relative to the dense solution."
    )
    sections = [f"## Products with the kernel\n\n{text}\n\n{table(header, lines)}"]
    if options.large:
        sections.append(memory(LARGE))
    command = shlex.join(["python", "-m", "benchmarks.kernel_regression", *sys.argv[1:]])
    print(write("kernel-regression", command, sections).read_text())


def tokens(n: int, d: int, scale: float) -> tuple[Array, Array]:
    """Tokens and a right side."""
    rng = np.random.default_rng(0)
    return scale * rng.standard_normal((n, d)) / d**0.25, rng.standard_normal(n)


def rows(n: int, d: int, scale: float, penalty: Any, ridge: float, ranks: tuple[int, ...]) -> list[list[str]]:
    """One case, one line a rank."""
    A, b = tokens(n, d, scale)
    s = 0.5 * np.sum(A * A, axis=1)
    G = np.exp(A @ A.T - s[:, None] - s)
    right = np.exp(-s) * b
    if penalty == "coefficients":
        G, right = G @ G, G @ right
    exact = linalg.solve(G + ridge * np.eye(n), right, assume_a="pos")
    lines = []
    for rank in ranks:
        problem = problems.KernelRegression(A, b, ridge=ridge, penalty=penalty)
        began = process_time()
        result = minimize(problem, solver=ConjugateGradients(rank), tol=TOL, max_iter=MOST, random_state=0)
        seconds = process_time() - began
        error = float(np.linalg.norm(result.x - exact) / np.linalg.norm(exact))
        known = result.message.split("effective rank ")[1].split(";")[0] if rank else "-"
        lines.append([
            str(d), f"{scale:g}", penalty, f"{ridge:g}", str(rank) if rank else "none", known,
            f"{result.n_iter:,}", str(result.status), f"{error:.0e}", f"{seconds:.2g}",
        ])  # fmt: skip
        print(" ".join(lines[-1]), file=sys.stderr, flush=True)
    return lines


def memory(n: int) -> str:
    """The peak of a process of its own beside what the preconditioner needs."""
    command = [sys.executable, "-m", "benchmarks.kernel_regression", "--peak", str(n)]
    found, base = (
        int(subprocess.run([*command[:-1], str(size)], capture_output=True, text=True, check=True).stdout)
        for size in (n, 100)
    )
    rank = max(50, int(2.0 * np.sqrt(n)))
    block = BLOCK_BYTES // (8 * n)
    allowed = 1.1 * (rank + block / 1000) * n * 8
    header = ["n", "rank", "MB above the library", "(r + block / 1000) n 8 bytes + 10 %, MB"]
    lines = [[f"{n:,}", str(rank), f"{(found - base) / 1e6:,.0f}", f"{allowed / 1e6:,.0f}"]]
    text = "The preconditioner and one step of the method: every array that a fit holds at a time."
    return f"## Memory\n\n{text}\n\n{table(header, lines)}"


def peak(n: int) -> int:
    """Return the bytes that this process held at its peak, once it has done all that a fit does, once."""
    A, b = tokens(n, 16, 1.0)
    problem = problems.KernelRegression(A, b, ridge=1e-4)
    inverse = problem.preconditioner(None, np.random.default_rng(0))
    R = problem.right_sides
    P = inverse(R)
    Q = problem.operator(P)
    Y = P * (np.sum(R * P) / np.sum(P * Q))
    inverse(R - np.sum(Y) * Q)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    main()

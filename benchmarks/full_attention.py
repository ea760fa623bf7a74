"""The lowest minimum of attention outputs: ``python -m benchmarks.full_attention``."""

from __future__ import annotations

import argparse
import shlex
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
from scipy import special
from sklearn.exceptions import ConvergenceWarning
from threadpoolctl import threadpool_limits

from attnfit import minimize, problems
from benchmarks.report import table, write

Array = Any

# A residual of this share of |B| is zero.
ZERO = 1e-8


@dataclass(frozen=True)
class Case:
    """Planted problems: ``scale`` is that of the entries of X, else ``deviation`` that of the logits."""

    n: int
    k: int
    d: int
    v: int
    m: int
    scale: float = 0.0
    deviation: float = 0.0
    texts: int = 1
    causal: bool = False
    heads: int = 1
    before: str = ""

    @property
    def label(self) -> str:
        """What it is, in a cell."""
        size = f"{self.n} x {self.k}" if self.texts == 1 else f"{self.texts} texts of {self.n}"
        kind = ", causal" if self.causal else ""
        heads = f", {self.heads} heads" if self.heads > 1 else ""
        return f"{size}, d {self.d}{kind}{heads}"

    @property
    def logits(self) -> str:
        """Their size, in a cell."""
        return f"X of {self.scale:g}" if self.scale else f"deviation {self.deviation:g}"


SMALL = [
    Case(40, 30, 5, 4, 3, scale=s, before=b) for s, b in ((0.1, "4 of 8"), (0.2, "2 of 8"), (0.4, "1 of 8"))
]
SEVERAL = [
    Case(50, 50, 16, 8, 8, deviation=0.3, texts=4),
    Case(50, 50, 16, 8, 8, deviation=2.0, texts=4),
    Case(100, 100, 16, 8, 8, deviation=1.0, texts=2),
    Case(50, 50, 16, 8, 8, deviation=1.0, texts=4, causal=True),
    Case(200, 200, 16, 8, 8, deviation=1.0, causal=True, heads=2),
    Case(25, 25, 16, 8, 8, deviation=1.0, texts=8, heads=2),
]
LARGE = [Case(100, 100, 8, 5, 4, deviation=1.0), Case(200, 200, 16, 8, 8, deviation=1.0)]
HARD = [Case(200, 200, 16, 8, 8, deviation=d) for d in (2.0, 0.3)]


def main() -> None:
    """Write the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.full_attention", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small problems and one of each other kind")
    parser.add_argument("--threads", type=int, default=1, help="BLAS threads (default 1)")
    options = parser.parse_args()
    with threadpool_limits(options.threads), warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        sections = [report(options.quick)]
    command = shlex.join(["python", "-m", "benchmarks.full_attention", *sys.argv[1:]])
    print(write("full-attention" + ("-quick" if options.quick else ""), command, sections).read_text())


def report(quick: bool) -> str:
    """Return the section."""
    rows = [row(case, range(8), "seeds 0 to 7") for case in SMALL]
    if not quick:
        for i, case in enumerate(SMALL):
            seeds = range(100 + i, 132, 3)
            rows.append(row(case, seeds, f"seeds 100 to 131, every third from {seeds[0]}", before=False))
    for case in [*SEVERAL, *LARGE[: 1 if quick else 2], *([] if quick else HARD)]:
        seeds = range(1) if quick else range(2) if case in HARD else range(4)
        rows.append(row(case, seeds, f"seeds 0 to {seeds[-1]}" if len(seeds) > 1 else "seed 0"))
    header = ["problem", "logits", "instances", "exact fits", "0.1.0", "starts", "seconds, median", "largest"]
    header += ["called exact, and not", "largest error of X where exact"]
    text = (
        "Outputs of a planted (X, Y), without noise; queries, keys, values, X and Y are normal. An exact fit "
        f"has a residual of at most {ZERO:.0e} of |B|. attnfit is `minimize` at its defaults: at most 40 "
        "starts, 400 (or 60 s) for one text without a mask. 0.1.0 is the first release, five starts of "
        "Newton's method, on the same instances. The error of X is relative, heads in the best order."
    )
    return f"## planted attention outputs\n\n{text}\n\n" + table(header, rows)


def row(case: Case, seeds: Sequence[int], said: str, *, before: bool = True) -> list[str]:
    """Fit the instances of a case; return a line."""
    exact, false, starts, seconds, errors = 0, 0, [], [], [0.0]
    for seed in seeds:
        problem, X = plant(case, seed)
        began = perf_counter()
        result = minimize(problem, random_state=0)
        seconds.append(perf_counter() - began)
        fitted = problem.predict(result.x)
        left = np.linalg.norm(np.concatenate(fitted if case.texts > 1 else [fitted]) - problem.B)
        zero = bool(left <= ZERO * np.linalg.norm(problem.B))
        exact += zero
        false += "exact fit" in result.message and not zero
        starts.append(len(result.local_values))
        if zero:
            errors.append(distance(problem.split(result.x)[0].reshape(X.shape), X))
    print(f"{case.label}: {exact} of {len(seeds)}", file=sys.stderr, flush=True)
    return [
        case.label,
        case.logits,
        said,
        f"{exact} of {len(seeds)}",
        case.before if before and case.before else "-",
        str(min(starts)) if len(set(starts)) == 1 else f"{min(starts)} to {max(starts)}",
        f"{median(seconds):.2g}",
        f"{max(seconds):.2g}",
        str(false),
        f"{max(errors):.0e}" if exact else "-",
    ]


def plant(case: Case, seed: int) -> tuple[problems.FullAttention, Array]:
    """Return an instance and its X, shape (heads, d, d)."""
    rng = np.random.default_rng(seed)
    drawn = [
        [rng.standard_normal((rows, columns)) for rows, columns in sizes]
        for sizes in [((case.n, case.d), (case.k, case.d), (case.k, case.v))] * case.texts
    ]
    X = rng.standard_normal((case.heads, case.d, case.d))
    Y = rng.standard_normal((case.heads, case.v, case.m))
    logits = [A1 @ X @ A2.T for A1, A2, _ in drawn]
    size = case.scale or case.deviation / float(np.std(logits))
    seen = np.tri(case.n, case.k, dtype=bool) if case.causal else np.ones((case.n, case.k), dtype=bool)
    outputs = [
        np.sum(special.softmax(np.where(seen, size * z, -np.inf), axis=2) @ A3 @ Y, axis=0)
        for z, (_, _, A3) in zip(logits, drawn, strict=True)
    ]
    parts = [[text[i] for text in drawn] for i in range(3)] + [outputs]
    arguments = [part[0] for part in parts] if case.texts == 1 else parts
    mask = "causal" if case.causal else None
    return problems.FullAttention(*arguments, mask=mask, n_heads=case.heads), size * X


def distance(fitted: Array, X: Array) -> float:
    """Return the largest relative error of a head from the nearest one fitted."""
    return max(min(float(np.linalg.norm(other - one) / np.linalg.norm(one)) for other in fitted) for one in X)


if __name__ == "__main__":
    main()

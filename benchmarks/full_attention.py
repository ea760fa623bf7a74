"""The lowest minimum of attention outputs: ``python -m benchmarks.full_attention``."""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from time import perf_counter, process_time
from typing import Any

import numpy as np
from scipy import special
from sklearn.exceptions import ConvergenceWarning
from threadpoolctl import threadpool_limits

from attnfit import minimize, problems
from benchmarks.report import stored_sections, table, write

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
# Rotary heads of width 4: queries a text, texts, features, values, outputs, heads, key heads, mask.
ROTARY = [
    (30, 3, 5, 3, 4, 1, 1, "causal"), (60, 1, 6, 4, 4, 1, 1, "causal"), (30, 3, 5, 3, 4, 1, 1, None),
    (30, 4, 6, 4, 4, 2, 2, "causal"), (30, 4, 6, 4, 4, 2, 1, "causal"),
]  # fmt: skip
# Layer and head of SmolLM2, tokens a text, seconds of processor time; queries and keys of the head itself.
REAL = [(10, 3, 128, 270.0)]
HARD = [Case(200, 200, 16, 8, 8, deviation=d) for d in (2.0, 0.3)]


def main() -> None:
    """Write the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.full_attention", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small problems and one of each other kind")
    parser.add_argument("--threads", type=int, default=1, help="BLAS threads (default 1)")
    parser.add_argument("--only", nargs="*", choices=SECTIONS, help="sections to measure; the others stay")
    options = parser.parse_args()
    name = "full-attention" + ("-quick" if options.quick else "")
    stored = stored_sections(name)
    names = options.only or [key for key in SECTIONS if not (options.quick and key == "head")]
    with threadpool_limits(options.threads), warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        for key in names:
            section = SECTIONS[key](options.quick)
            print(section, flush=True)
            stored[section.split("\n", 1)[0]] = section
            command = "python -m benchmarks.full_attention [--only SECTION ...]"
            write(name, command, list(stored.values()))


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


def plant(case: Case, seed: int) -> tuple[Any, Array]:
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


def rotary_report(quick: bool) -> str:
    """Return the section of rotary heads."""
    rows = []
    for n, texts, d, v, m, heads, keys, mask in ROTARY[: 1 if quick else None]:
        exact, false, starts, seconds, errors = 0, 0, [], [], [0.0]
        seeds = range(2 if quick else 4)
        for seed in seeds:
            problem, x = plant_rotary(n, texts, d, v, m, heads, keys, mask, seed)
            began = process_time()
            result = minimize(problem, random_state=0)
            seconds.append(process_time() - began)
            zero = problem.relative_error(result.x) <= ZERO
            exact += zero
            false += "exact fit" in result.message and not zero
            starts.append(len(result.local_values))
            if zero:
                errors.append(distance(identified(problem, result.x), identified(problem, x)))
        label = f"{n} tokens" if texts == 1 else f"{texts} texts of {n}"
        label += f", d {d}{', causal' if mask else ''}"
        print(f"{label}, {heads} heads on {keys}: {exact} of {len(seeds)}", file=sys.stderr, flush=True)
        rows.append(
            [
                label, f"{heads} on {keys}", f"{exact} of {len(seeds)}", f"{min(starts)} to {max(starts)}",
                f"{median(seconds):.2g}", f"{max(seconds):.2g}", str(false), f"{max(errors):.0e}",
            ]
        )  # fmt: skip
    header = ["problem", "heads on key heads", "exact fits", "starts", "processor s, median", "largest"]
    header += ["called exact, and not", "largest error of M where exact"]
    text = (
        "Outputs of planted heads of width 4 whose queries and keys are turned by position (base 100), "
        f"without noise, logits of deviation 1; seeds 0 to {len(seeds) - 1}. The error is that of the "
        "matrices M_f of all frequencies together, which are what is identified, heads in the best order."
    )
    return f"## planted outputs of rotary heads\n\n{text}\n\n" + table(header, rows)


def plant_rotary(
    n: int, texts: int, d: int, v: int, m: int, heads: int, keys: int, mask: str | None, seed: int
) -> tuple[Any, Array]:
    """Return an instance and its unknown."""
    rng = np.random.default_rng(seed)
    A = [rng.standard_normal((n, d)) for _ in range(texts)]
    A3 = [rng.standard_normal((n, v)) for _ in range(texts)]
    options: dict[str, Any] = {"mask": mask, "n_heads": heads, "n_key_heads": keys, "rank": 4}
    options["rotary"] = problems.Rotary(theta=100.0)

    def made(B: Any) -> Any:
        return problems.FullAttention(A, A, A3, B, **options)

    blank = made([np.zeros((n, m)) for _ in A])
    x, projected = rng.standard_normal(blank.n_unknowns), blank.projected()
    factors = x[: blank.n_factors]
    x[: blank.n_factors] = projected.scaled(factors, 1.0 / projected.spread(factors))
    B = blank.predict(x)
    return made(B if texts > 1 else [B]), x


def identified(problem: Any, x: Array) -> Array:
    """Return M of each head, flat."""
    M = problem.matrices(x)[0]
    return M.reshape(len(M), -1)


def head_report(quick: bool) -> str:
    """Return the section of a real head."""
    rows = []
    for layer, head, n, limit in REAL:
        fitted, held_out, truth = real_head(layer, head, n)
        began = process_time()
        result = minimize(
            fitted, random_state=0, n_starts=1, max_iter=10_000,
            callback=lambda _, began=began, limit=limit: process_time() - began > limit,
        )  # fmt: skip
        took = process_time() - began
        zero = np.zeros(fitted.n_factors)
        uniform = np.concatenate([zero, fitted.projected().best_values(zero).reshape(-1)])
        M, M_0 = fitted.matrices(result.x)[0][0], fitted.matrices(truth)[0][0]
        errors = np.linalg.norm(M - M_0, axis=(1, 2)) / np.linalg.norm(M_0, axis=(1, 2))
        fast = fitted.heads.read.frequencies[0] * n > 10.0
        rows.append(
            [
                f"{layer}, {head}", f"6 of {n}", f"{fitted.B.size:,}, {fitted.n_identified:,}", f"{took:.0f}",
                f"{result.n_passes:,.0f}", str(result.status), f"{fitted.relative_error(result.x):.1e}",
                f"{held_out.relative_error(result.x):.1e}", f"{held_out.relative_error(truth):.0e}",
                f"{held_out.relative_error(uniform):.1e}", f"{np.median(errors[fast]):.0e}",
            ]
        )  # fmt: skip
    header = ["layer, head", "texts", "equations, unknowns", "processor s", "passes", "ended", "fitted"]
    header += ["held out", "own weights, held out", "uniform, held out", "M of fast frequencies"]
    text = (
        "A head of SmolLM2-135M from its outputs (single precision, before the output projection), and the "
        "queries, keys and values that enter it before they are turned: W_Q, W_K (64 x 64 each) and Y are "
        "fitted to six texts from the first solution to first order, and judged on two others. Errors are "
        "relative; of M the median over frequencies that turn by more than 10 radians."
    )
    return f"## a head of SmolLM2-135M\n\n{text}\n\n" + table(header, rows)


def real_head(layer: int, head: int, n: int) -> tuple[Any, Any, Array]:
    """Return the problem of six texts, that of two others, and the model's own unknown."""
    from benchmarks.heads import read_texts
    from examples.head_outputs import observe, problem

    seen = observe(read_texts(), layer, head, n)
    return problem(seen, slice(0, 6)), problem(seen, slice(6, None)), seen.truth


SECTIONS: dict[str, Callable[[bool], str]] = {
    "planted": report, "rotary": rotary_report, "head": head_report
}  # fmt: skip


if __name__ == "__main__":
    main()

"""Verdicts against independent truths: ``python -m benchmarks.verdicts [--problems 2600]``.

Every problem is fitted with the default settings; the reference takes an exact Newton step in 80 bits from
where the fit ended. "False" is a fit called converged from which that step moves a logit by more than 1e-5.
Certificates are compared with stationary points of 60 digits, separation with the alternative programme.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import warnings
from collections import Counter, defaultdict
from time import perf_counter
from typing import Any

import mpmath
import numpy as np
from scipy.optimize import linprog
from sklearn.exceptions import ConvergenceWarning
from threadpoolctl import threadpool_limits

from attnfit import minimize, problems
from benchmarks.exact_answers import DIGITS, error_of, exact_answer, stationarity
from benchmarks.report import table, write
from benchmarks.verdict_problems import LIST, make

FALSE, SEEN, OPTIMUM = 1e-5, 1e-6, 1e-7
CERTIFIED = {"exponential": "Exponential", "rescaled": "Rescaled"}


def main() -> None:
    """Write the tables."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.verdicts", description=__doc__)
    parser.add_argument("--problems", type=int, default=2600, help="how many (default 2600)")
    parser.add_argument("--first", type=int, default=0, help="first seed (default 0)")
    parser.add_argument("--quick", action="store_true", help="130 problems")
    options = parser.parse_args()
    seeds = range(options.first, options.first + (130 if options.quick else options.problems))
    with threadpool_limits(1), warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        sections = [accepted(seeds), separable(seeds), certified(seeds[: max(1, len(seeds) // 5)])]
    print("\n\n".join(sections))
    write(
        "verdicts" + "-quick" * options.quick,
        shlex.join(["python", "-m", "benchmarks.verdicts", *sys.argv[1:]]),
        sections,
    )


def accepted(seeds: range) -> str:
    """Return the table of accepted points."""
    rows: dict[str, Counter[str]] = defaultdict(Counter)
    steps: dict[str, list[float]] = defaultdict(list)
    reads: dict[str, list[float]] = defaultdict(list)
    began = perf_counter()
    for seed in seeds:
        name = " ".join(LIST[seed % len(LIST)]).strip()
        problem, reference, _ = make(seed)
        result = minimize(problem, random_state=0)
        rows[name][str(result.status)] += 1
        one = minimize(problem, random_state=0, n_starts=1)
        reads[name].append(one.n_passes)
        if not np.isfinite(result.x).all():
            continue
        with np.errstate(all="ignore"):
            step = reference.step(result.x)
        if result.converged:
            steps[name].append(step)
        rows[name]["at the optimum"] += step <= OPTIMUM
        rows[name]["refused"] += step <= OPTIMUM and not result.converged
    seconds = perf_counter() - began
    header = ["loss", "problems", "converged", "false", "step > 1e-6", "largest step"]
    header += ["refused at the optimum", "separable", "no_minimum", "flat", "other", "reads of one start"]
    lines = []
    names = list(dict.fromkeys(" ".join(kind).strip() for kind in LIST))
    for name in [*names, "all"]:
        counts = rows[name] if name != "all" else sum(rows.values(), Counter())
        found = steps[name] if name != "all" else [s for values in steps.values() for s in values]
        passes = reads[name] if name != "all" else [s for values in reads.values() for s in values]
        statuses = ("converged", "separable", "no_minimum", "flat")
        ends = {status: counts[status] for status in statuses}
        other = sum(counts[s] for s in ("max_iter", "precision", "saddle"))
        lines.append(
            [
                name,
                str(len(passes)),
                str(ends["converged"]),
                str(sum(not s <= FALSE for s in found)),
                str(sum(s > SEEN for s in found)),
                f"{max(found, default=0.0):.1e}",
                f"{counts['refused']} of {counts['at the optimum']}",
                *(str(ends[s]) for s in statuses[1:]),
                str(other),
                f"{np.median(passes):.0f} ({np.mean(passes):.1f})",
            ]
        )
    note = (
        f"Seeds {seeds[0]} to {seeds[-1]}, one thread, {seconds:.0f} s for both fits of each. False: called "
        "converged, although an exact Newton step in 80 bits moves a logit by more than 1e-5. Refused: not "
        "called converged, although it moves none by more than 1e-7. Reads: median and mean with n_starts=1; "
        "by default small problems that are not convex take ten starts."
    )
    return f"## Verdicts\n\n{note}\n\n{table(header, lines)}"


def integers(seed: int) -> tuple[Any, Any, Any]:
    """Return rows, counts and groups of a small problem of integers, often separable."""
    rng = np.random.default_rng([seed, 1])
    d, size = int(rng.integers(1, 4)), int(rng.integers(3, 7))
    n_groups = int(rng.choice([1, 3]))
    ids = np.repeat(np.arange(n_groups), size)
    A = rng.integers(-3, 4, (len(ids), d)).astype(float)
    b = rng.multinomial(4 - n_groups, np.full(size, 1 / size), n_groups).ravel().astype(float)
    return A, b, ids


def alternative_holds(A: Any, b: Any, ids: Any) -> bool:
    """Return whether a strictly positive combination of the free rows, relative to a fixed one of their
    group, vanishes modulo the fixed ones: then, and only then, no direction separates a row.
    """
    free, fixed = [np.zeros(A.shape[1])], [np.zeros(A.shape[1])]
    for g in np.unique(ids):
        rows = np.flatnonzero(ids == g)
        first = rows[b[rows] > 0][0]
        for i in rows[rows != first]:
            (fixed if b[i] > 0 else free).append(A[i] - A[first])
    equations = np.vstack([*free, *fixed]).T
    bounds = [(1.0, None)] * len(free) + [(None, None)] * len(fixed)
    found = linprog(np.zeros(len(bounds)), A_eq=equations, b_eq=np.zeros(len(equations)), bounds=bounds)
    return bool(found.success)


def separable(seeds: range) -> str:
    """Return the table of separable data and others."""
    lines = []
    for loss in ("cross_entropy", "kl"):
        counts: Counter[str] = Counter()
        for seed in seeds:
            A, b, ids = integers(seed)
            exists = alternative_holds(A, b, ids)
            found = minimize(problems.Softmax(A, b, ids, loss=loss), random_state=0)
            counts["missed"] += not exists and found.status != "separable"
            counts["false"] += exists and found.status == "separable"
            counts["refused"] += exists and not found.converged
            counts["separable"] += not exists
        shown = [counts[name] for name in ("separable", "missed", "false", "refused")]
        lines.append([loss, str(len(seeds)), *map(str, shown)])
    header = ["loss", "problems", "separable", "missed", "false", "with a minimum, not converged"]
    note = (
        "Random integers, one or three groups of three to six rows, up to three unknowns; the truth is the "
        "alternative of the linear programme, solved by HiGHS."
    )
    return f"## Separable or not\n\n{note}\n\n{table(header, lines)}"


def certificate_of(seed: int) -> tuple[Any, float, Any] | None:
    """Return the certificate of a fit, its true error and that of each coefficient; None if not valid."""
    problem, reference, _ = make(seed)
    result = minimize(problem, random_state=0)
    certificate = result.certificate()
    if not certificate.valid:
        return None
    family = CERTIFIED.get(reference.kind, "Softmax")
    groups = np.concatenate([np.full(len(rows), g) for g, rows in enumerate(reference.members)])
    with mpmath.workdps(DIGITS):
        A, b, w = (np.asarray(v, dtype=float) for v in (reference.A, reference.b, reference.w))
        loss, ridge = reference.function or reference.kind, float(reference.ridge)
        equations = stationarity(family, loss, A, b, groups, weights=w, ridge=ridge)
        answer, _ = exact_answer(equations, result.x)
        return certificate, *error_of(result.x, answer)


def certified(seeds: range) -> str:
    """Return the table of certificates."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    largest: dict[str, list[float]] = defaultdict(list)
    for seed in seeds:
        name = " ".join(LIST[seed % len(LIST)]).strip()
        counts[name]["problems"] += 1
        known = certificate_of(seed)
        if known is None:
            continue
        certificate, error, each = known
        counts[name]["valid"] += 1
        counts[name]["violated"] += error > certificate.radius
        counts[name]["coefficients"] += bool((each > certificate.coefficient_radius).any())
        largest[name].append(error / certificate.radius)
    lines = []
    for name, found in [*counts.items(), ("all", sum(counts.values(), Counter()))]:
        shares = largest[name] if name != "all" else [v for values in largest.values() for v in values]
        shown = [found[key] for key in ("problems", "valid", "violated", "coefficients")]
        lines.append([name, *map(str, shown), f"{max(shares, default=0.0):.2f}"])
    header = ["loss", "problems", "valid", "radius violated", "of a coefficient", "largest error over radius"]
    note = (
        f"Seeds {seeds[0]} to {seeds[-1]}: the certificate of every fit against the stationary point to 60 "
        "digits. Valid ones only are compared."
    )
    return f"## Certificates\n\n{note}\n\n{table(header, lines)}"


if __name__ == "__main__":
    main()

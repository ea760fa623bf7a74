"""Verdicts against 80-bit arithmetic: ``python -m benchmarks.verdicts [--problems 2600]``.

Every problem is fitted with the default settings; the reference takes an exact Newton step from where the fit
ended. "False" is a fit called converged from which that step moves a logit by more than 1e-5.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import warnings
from collections import Counter, defaultdict
from time import perf_counter

import numpy as np
from sklearn.exceptions import ConvergenceWarning
from threadpoolctl import threadpool_limits

from attnfit import minimize
from benchmarks.report import table, write
from benchmarks.verdict_problems import LIST, make

FALSE, SEEN, OPTIMUM = 1e-5, 1e-6, 1e-7


def main() -> None:
    """Write the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.verdicts", description=__doc__)
    parser.add_argument("--problems", type=int, default=2600, help="how many (default 2600)")
    parser.add_argument("--first", type=int, default=0, help="first seed (default 0)")
    options = parser.parse_args()
    rows: dict[str, Counter[str]] = defaultdict(Counter)
    steps: dict[str, list[float]] = defaultdict(list)
    reads: dict[str, list[float]] = defaultdict(list)
    began = perf_counter()
    with threadpool_limits(1), warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        for seed in range(options.first, options.first + options.problems):
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
                f"{max(found):.1e}",
                f"{counts['refused']} of {counts['at the optimum']}",
                *(str(ends[s]) for s in statuses[1:]),
                str(other),
                f"{np.median(passes):.0f} ({np.mean(passes):.1f})",
            ]
        )
    note = (
        f"Seeds {options.first} to {options.first + options.problems - 1}, one thread, {seconds:.0f} s for "
        "both fits of each. False: called converged, although an exact Newton step in 80 bits moves a logit "
        "by more than 1e-5. Refused: not called converged, although it moves none by more than 1e-7. Reads: "
        "median and mean with n_starts=1; by default small problems that are not convex take ten starts."
    )
    command = shlex.join(["python", "-m", "benchmarks.verdicts", *sys.argv[1:]])
    section = f"## Verdicts\n\n{note}\n\n{table(header, lines)}"
    print(section)
    write("verdicts", command, [section])


if __name__ == "__main__":
    main()

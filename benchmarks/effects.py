"""Absorbed effects against pyfixest and glum: ``python -m benchmarks.effects``."""

from __future__ import annotations

import argparse
import shlex
import sys
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits

from attnfit import PoissonRegressor
from benchmarks.effects_data import bipartite, gravity, matched
from benchmarks.report import table, write

Data = tuple[Any, Any, list[Any]]
CASES: dict[str, Callable[[], Data]] = {
    "200 x 200, 40,000 rows": lambda: bipartite(200, 200, 40_000),
    "2,000 x 2,000, 100,000 rows": lambda: bipartite(2_000, 2_000, 100_000),
    "gravity 60, 10 years": lambda: gravity(60, 10),
    "gravity 150, 10 years": lambda: gravity(150, 10),
    "20,000 workers, 2,000 firms": lambda: matched(20_000, 2_000),
    "200,000 workers, 20,000 firms": lambda: matched(200_000, 20_000),
}
SMALL = list(CASES)[:3]
# Beyond so many levels a dense matrix of categoricals is not tried.
GLUM_LEVELS = 5_000
Answer = tuple[Any, Any]


def ours(X: Any, y: Any, sets: list[Any]) -> tuple[Answer, float]:
    """Return coefficients and errors, and the reads of the data."""
    model = PoissonRegressor(covariance="classic").fit(X, y, absorb=sets)
    return (model.coef_, model.standard_errors_), model.result_.n_passes


def pyfixest(demeaner: str) -> Callable[[Any, Any, list[Any]], Answer]:
    """Return a fit by ``fepois`` with this way of taking effects out, at its own tolerances."""
    import pandas as pd
    import pyfixest as pf

    kinds = {"within": pf.LsmrDemeaner, "map": pf.MapDemeaner}
    # Errors are the inverse information, as ours.
    plain = pf.ssc(k_adj=False, G_adj=False)

    def fit(X: Any, y: Any, sets: list[Any]) -> Answer:
        names = [f"x{k}" for k in range(X.shape[1])]
        levels = {f"f{k}": s for k, s in enumerate(sets)}
        frame = pd.DataFrame(X, columns=names).assign(y=y, **levels)
        formula = f"y ~ {' + '.join(names)} | {' + '.join(levels)}"
        found = pf.fepois(formula, frame, vcov="iid", ssc=plain, demeaner=kinds[demeaner]())
        return found.coef().to_numpy(), found.se().to_numpy()

    return fit


def glum(X: Any, y: Any, sets: list[Any]) -> Answer:
    """Return a fit by glum with effects as categorical columns; it gives no errors here."""
    import pandas as pd
    from glum import GeneralizedLinearRegressor

    frame = pd.DataFrame(X, columns=[f"x{k}" for k in range(X.shape[1])])
    for k, s in enumerate(sets):
        frame[f"f{k}"] = pd.Categorical(s)
    model = GeneralizedLinearRegressor(family="poisson", alpha=0, drop_first=True, gradient_tol=1e-8)
    return model.fit(frame, y).coef_[: X.shape[1]], np.full(X.shape[1], np.nan)


def peers(data: Data) -> dict[str, Callable[[Any, Any, list[Any]], Answer]]:
    """Return the peers that are installed, by name."""
    found: dict[str, Callable[[Any, Any, list[Any]], Answer]] = {}
    if find_spec("pyfixest"):
        found |= {f"pyfixest {name}": pyfixest(name) for name in ("within", "map")}
    if find_spec("glum") and sum(len(np.unique(s)) for s in data[2]) <= GLUM_LEVELS:
        found["glum categoricals"] = glum
    return found


def timed(fit: Callable[..., Any], data: Data, n_runs: int) -> tuple[Any, float]:
    """Return the last answer and the median seconds."""
    seconds = []
    for _ in range(n_runs):
        began = perf_counter()
        answer = fit(*data)
        seconds.append(perf_counter() - began)
    return answer, median(seconds)


def measured(name: str, n_runs: int) -> list[list[str]]:
    """Return the rows of a case."""
    data = CASES[name]()
    ours(*data)
    ((coef, error), reads), seconds = timed(ours, data, n_runs)
    lines = [[name, "attnfit", f"{seconds:.2f}", "1", f"{reads:.0f}", "", ""]]
    for peer, fit in peers(data).items():
        try:
            (theirs, their_error), taken = timed(fit, data, n_runs)
        except (RuntimeError, ValueError, MemoryError) as failure:
            lines.append([name, peer, "", "", "", str(failure).splitlines()[0][:60], ""])
            continue
        apart = f"{np.abs(theirs - coef).max():.0e}"
        errors = "" if np.isnan(their_error).any() else f"{np.abs(their_error / error - 1).max():.0e}"
        lines.append([name, peer, f"{taken:.2f}", f"{taken / seconds:.1f}", "", apart, errors])
    return lines


def main(arguments: list[str] | None = None) -> None:
    """Run the cases, print the table and write it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="the first three cases")
    parser.add_argument("--runs", type=int, default=3)
    options = parser.parse_args(arguments)
    rows = []
    with threadpool_limits(1), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # Compilation and imports are paid for before the clock runs.
        small = bipartite(20, 20, 500)
        ours(*small)
        for fit in peers(small).values():
            fit(*small)
        for name in SMALL if options.quick else CASES:
            rows += measured(name, options.runs)
            print(f"{name}: done", flush=True)
    header = [
        "case",
        "fit",
        "seconds",
        "over ours",
        "reads",
        "largest difference of coefficients",
        "of errors",
    ]
    told = (
        "Poisson models with two or three sets of effects: coefficients with errors, one thread, the median "
        f"of {options.runs} runs after one that is not counted. Peers at their own tolerances; errors are "
        "the inverse information everywhere. Reads are of the columns, from a cold start."
    )
    command = shlex.join(["python", "-m", "benchmarks.effects", *(arguments or sys.argv[1:])])
    name = "effects-quick" if options.quick else "effects"
    print(write(name, command, [told, table(header, rows)]).read_text())


if __name__ == "__main__":
    main()

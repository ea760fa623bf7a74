"""From a fit to an answer: ``python -m benchmarks.inference [--rows 10000000] [--quick]``."""

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

from attnfit.estimators import PoissonRegressor, SoftmaxRegressor
from benchmarks.inference_numbers import all_numbers
from benchmarks.report import table, write

WIDTH, ALTERNATIVES, PER_CLUSTER = 20, 5, 10
# What the numbers are to agree to.
SIX_DIGITS = 5e-7
TOGETHER = "these four together"


def main() -> None:
    """Write the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.inference", description=__doc__)
    parser.add_argument("--rows", type=int, default=10_000_000, help="rows of the large fit (default 1e7)")
    parser.add_argument("--race", type=int, default=500_000, help="rows of the races (default 5e5)")
    parser.add_argument("--runs", type=int, default=3, help="runs of each contestant (default 3)")
    parser.add_argument("--threads", type=int, default=1, help="BLAS threads (default 1)")
    parser.add_argument("--quick", action="store_true", help="2e5 rows, races of 5e4, into a file of its own")
    options = parser.parse_args()
    if options.quick:
        options.rows, options.race = 200_000, 50_000
    with threadpool_limits(options.threads):
        sections = [numbers(), reads(options), choices(options), counts(options)]
    name = "inference-quick" if options.quick else "inference"
    path = write(name, shlex.join(["python", "-m", "benchmarks.inference", *sys.argv[1:]]), sections)
    print(path.read_text())


# ---- the reference numbers ---------------------------------------------------------------------------------


def numbers() -> str:
    """Every reference number with its difference."""
    lines, n_numbers, worst = [], 0, 0.0
    for name, one in all_numbers():
        if one is None:
            lines.append([name, "-", "-", "-", "-", "-", "the package with the data is not installed"])
            continue
        count = int(np.size(one.expected))
        n_numbers, worst = n_numbers + count, max(worst, one.difference - one.digits)
        note = "" if one.difference <= max(SIX_DIGITS, 2.0 * one.digits) else "DIFFERS"
        lines.append(
            [name, one.name, one.peer, str(count), f"{one.difference:.1e}", f"{one.digits:.0e}", note]
        )
    header = ["data", "what", "given by", "numbers", "largest difference", "its last digit", "note"]
    text = (
        "Relative difference of attnfit from what other software gave once (statsmodels 0.15.0, pyfixest "
        "0.60.0, xlogit 0.2.7, biogeme 3.3.2, Stata's published output), or from a second implementation of "
        "the formulas (prototype). A printed number cannot agree better than half of its last digit; DIFFERS "
        f"marks what is neither within that nor within six digits.\n\n{n_numbers} numbers."
    )
    return f"## Reference numbers\n\n{text}\n\n{table(header, lines)}"


# ---- reads -------------------------------------------------------------------------------------------------


def drawn(n_rows: int, seed: int = 0) -> dict[str, Any]:
    """Choices among five alternatives with 20 features; ten choices a cluster."""
    rng = np.random.default_rng(seed)
    n = n_rows // ALTERNATIVES * ALTERNATIVES
    X = rng.standard_normal((n, WIDTH))
    x = np.linspace(-0.5, 0.5, WIDTH)
    z = (X @ x + rng.gumbel(size=n)).reshape(-1, ALTERNATIVES)
    y = (z == z.max(axis=1, keepdims=True)).astype(float).reshape(-1)
    groups = np.repeat(np.arange(n // ALTERNATIVES), ALTERNATIVES)
    return {
        "X": X, "y": y, "groups": groups, "clusters": groups // PER_CLUSTER,
        "alternatives": np.tile(np.arange(ALTERNATIVES), n // ALTERNATIVES),
    }  # fmt: skip


def reads(options: argparse.Namespace) -> str:
    """Reads and seconds of what follows a fit, in units of a value and gradient."""
    # Compiling is not part of a fit, and only large data call for compiled loops.
    small = drawn(100_000)
    SoftmaxRegressor("cross_entropy").fit(small["X"], small["y"], groups=small["groups"]).covariance("robust")
    d = drawn(options.rows)
    model = SoftmaxRegressor("cross_entropy")
    began = perf_counter()
    model.fit(d["X"], d["y"], groups=d["groups"], clusters=d["clusters"])
    fit = perf_counter() - began
    problem = model.result_.problem
    unit = clock(lambda: problem.value_and_gradient(model.coef_), options.runs)
    lines = [["fit", f"{model.result_.n_passes:.2f}", f"{fit:.3g}", f"{fit / unit:.2f}"]]
    both = np.column_stack([d["clusters"], d["alternatives"]])
    calls: dict[str, Callable[[], Any]] = {
        "robust covariance": lambda: model.covariance("robust"),
        "clustered covariance": lambda: model.covariance("cluster"),
        "fit statistics": model.fit_statistics,
        "elasticities, 5 x 5, with errors": lambda: model.elasticities(0, d["alternatives"]),
        TOGETHER: lambda: None,
        "two-way covariance": lambda: model.covariance("cluster", both),
        "shares with intervals": lambda: model.shares(alternatives=d["alternatives"]),
    }
    start, began_all = problem.n_passes, perf_counter()
    for name, call in calls.items():
        before, began = problem.n_passes, perf_counter()
        call()
        seconds, spent = perf_counter() - began, problem.n_passes - before
        if name == TOGETHER:
            seconds, spent = perf_counter() - began_all, problem.n_passes - start
        lines.append([name, f"{spent:.2f}", f"{seconds:.3g}", f"{seconds / unit:.2f}"])
    header = ["what", "reads", "seconds", "values and gradients"]
    text = (
        f"{options.rows:,} rows x {WIDTH}, {options.rows // ALTERNATIVES:,} choices, "
        f"{options.rows // ALTERNATIVES // PER_CLUSTER:,} clusters, in this order: later lines use what "
        f"earlier ones have read. One value and gradient: {unit:.3g} s. Target: the first four in 2 reads."
    )
    return f"## What follows a fit\n\n{text}\n\n{table(header, lines)}"


def clock(call: Callable[[], Any], runs: int) -> float:
    """Median seconds after a run that pays for compilation."""
    call()
    times = []
    for _ in range(runs):
        began = perf_counter()
        call()
        times.append(perf_counter() - began)
    return median(times)


# ---- races: a fit and its robust errors --------------------------------------------------------------------


def choices(options: argparse.Namespace) -> str:
    """Conditional logit against xlogit, and statsmodels where it comes back."""
    d = drawn(options.race)

    def ours() -> Any:
        model = SoftmaxRegressor("cross_entropy", covariance="robust").fit(d["X"], d["y"], groups=d["groups"])
        return model.coef_, model.standard_errors_

    contestants = {"attnfit, robust": ours}
    if find_spec("xlogit"):
        contestants["xlogit, robust"] = lambda: _xlogit(d, robust=True)
        contestants["xlogit, classic"] = lambda: _xlogit(d, robust=False)
    if find_spec("pyfixest"):
        contestants["pyfixest, by choice"] = lambda: _pyfixest(d)
    if find_spec("statsmodels"):
        contestants["statsmodels ConditionalLogit, classic"] = lambda: _conditional(d)
    title = f"## Choices: fit and errors, {options.race:,} rows x {WIDTH}, groups of {ALTERNATIVES}"
    return f"{title}\n\n{race(contestants, options, compare='robust')}"


def _xlogit(d: dict[str, Any], *, robust: bool) -> Any:
    from xlogit import MultinomialLogit

    model = MultinomialLogit()
    names = [f"x{j}" for j in range(WIDTH)]
    model.fit(
        X=d["X"], y=d["y"], varnames=names, ids=d["groups"], alts=d["alternatives"], robust=robust, verbose=0
    )
    return np.asarray(model.coeff_), np.asarray(model.stderr)


def _pyfixest(d: dict[str, Any]) -> Any:
    import pandas as pd
    import pyfixest

    frame = pd.DataFrame(d["X"], columns=[f"x{j}" for j in range(WIDTH)])
    frame["y"], frame["g"] = d["y"], d["groups"]
    terms = " + ".join(frame.columns[:WIDTH])
    fit = pyfixest.fepois(f"y ~ {terms} | g", frame, vcov={"CRV1": "g"})
    return fit.coef().to_numpy(), fit.se().to_numpy()


def _conditional(d: dict[str, Any]) -> Any:
    from statsmodels.discrete.conditional_models import ConditionalLogit

    # Its Python loops over groups take minutes: a tenth of the rows, times ten.
    n = len(d["y"]) // 10 // ALTERNATIVES * ALTERNATIVES
    fit = ConditionalLogit(d["y"][:n], d["X"][:n], groups=d["groups"][:n]).fit(disp=False)
    return np.asarray(fit.params), np.asarray(fit.bse)


def counts(options: argparse.Namespace) -> str:
    """Poisson regression against statsmodels and glum."""
    rng = np.random.default_rng(1)
    n = options.race
    X = np.column_stack([np.ones(n), rng.standard_normal((n, WIDTH - 1))])
    y = rng.poisson(np.exp(X @ np.linspace(-0.2, 0.2, WIDTH))).astype(float)

    def ours() -> Any:
        model = PoissonRegressor().fit(X, y)
        return model.coef_, np.sqrt(np.diag(model.covariance("robust", correction=False)))

    contestants = {"attnfit, robust": ours}
    if find_spec("statsmodels"):
        contestants["statsmodels GLM, HC0"] = lambda: _glm(X, y)
    if find_spec("glum"):
        contestants["glum, robust (HC1)"] = lambda: _glum(X, y)
    title = f"## Counts: fit and robust errors, {n:,} rows x {WIDTH}"
    return f"{title}\n\n{race(contestants, options, compare='')}"


def _glm(X: Any, y: Any) -> Any:
    import statsmodels.api as sm

    fit = sm.GLM(y, X, family=sm.families.Poisson()).fit(cov_type="HC0")
    return np.asarray(fit.params), np.asarray(fit.bse)


def _glum(X: Any, y: Any) -> Any:
    from glum import GeneralizedLinearRegressor

    model = GeneralizedLinearRegressor(family="poisson", alpha=0.0, fit_intercept=False, gradient_tol=1e-8)
    model.fit(X, y)
    covariance = model.covariance_matrix(X, y, robust=True)
    return np.asarray(model.coef_), np.sqrt(np.diag(covariance))


def race(contestants: dict[str, Callable[[], Any]], options: argparse.Namespace, compare: str) -> str:
    """Run contestants in turns; one row each, with the distance of its errors from ours."""
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    answers: dict[str, Any] = {}
    failed: dict[str, str] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for turn in range(options.runs + 1):
            for name, call in contestants.items():
                # One run shows what takes minutes; the first turn pays for imports and compilation.
                if name in failed or (turn > 1 and min(seconds[name], default=0.0) > 60.0):
                    continue
                began = perf_counter()
                try:
                    answers[name] = call()
                except Exception as error:
                    failed[name] = f"{type(error).__name__}: {str(error)[:60]}"
                    continue
                if turn:
                    seconds[name].append(perf_counter() - began)
    first = next(iter(contestants))
    ours = median(seconds[first])
    lines = []
    for name in contestants:
        if name in failed:
            lines.append([name, "-", "-", "-", "-", failed[name]])
            continue
        tenth = "ConditionalLogit" in name
        spent = median(seconds[name]) * (10.0 if tenth else 1.0)
        coef, errors = answers[name]
        same = compare in name and not tenth
        apart = f"{np.abs(errors / answers[first][1] - 1.0).max():.1e}" if same else "-"
        away = "-" if tenth else f"{np.abs(coef - answers[first][0]).max():.1e}"
        ratio = "" if name == first else f"{ours / spent:.3f}"
        note = "a tenth of the rows, times ten" if tenth else "PEER WINS" if spent < ours else ""
        lines.append([name, f"{spent:.3g}", ratio, away, apart, note])
    return table(["who", "seconds", "ours/this", "coefficients apart", "errors apart", "note"], lines)


if __name__ == "__main__":
    main()

"""Command line of the benchmarks: ``python -m benchmarks.run NAME [--quick] [--seeds 3] [--threads 1]``."""

from __future__ import annotations

import argparse
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np

from benchmarks.data import Spec
from benchmarks.report import race_table, table, write
from benchmarks.solvers import OURS, SOLVERS, rows_for
from benchmarks.worker import ask

KAPPAS = (1.0, 1e2, 1e4)
Options = argparse.Namespace


def main() -> None:
    """Run the tables that were asked for."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__)
    parser.add_argument("name", choices=[*TABLES, "all"])
    parser.add_argument("--quick", action="store_true", help="n = 1e5 instead of 1e6 and more")
    parser.add_argument("--seeds", type=int, default=3, help="instances of every problem (default 3)")
    parser.add_argument("--threads", type=int, default=1, help="BLAS threads (default 1)")
    parser.add_argument("--runs", type=int, default=5, help="runs of a solver that is quick (default 5)")
    parser.add_argument("--limit", type=float, default=120.0, help="seconds a peer may take (default 120)")
    parser.add_argument("--tol", type=float, default=1e-8, help="relative gradient asked for (default 1e-8)")
    parser.add_argument("--only", default="", help="run only races whose title matches this pattern")
    options = parser.parse_args()
    for name in TABLES if options.name == "all" else [options.name]:
        flags = [a for a in sys.argv[1:] if a != options.name]
        command = shlex.join(["python", "-m", "benchmarks.run", name, *flags])
        sections: list[str] = []
        for section in TABLES[name](options):
            print(section + "\n", flush=True)
            sections.append(section)
            # Written after every problem: an interrupted run keeps what it has.
            write(file_name(name, options), command, sections)


def file_name(name: str, options: Options) -> str:
    """Partial and quick tables never overwrite the full one."""
    name += "-quick" if options.quick else ""
    name += f"-{options.threads}threads" if options.threads > 1 else ""
    return name + ("-partial" if options.only else "")


def races(specs: list[Spec], options: Options) -> Iterator[str]:
    """One section a problem."""
    for spec in specs:
        if not re.search(options.only, spec.title):
            continue
        seeds = []
        for seed in range(options.seeds):
            names = [name for name in rows_for(spec) if seed == 0 or not SOLVERS[name].once]
            seeds.append(run_race(spec, seed, names, options))
        yield f"## {spec.title}\n\n{race_table(seeds, options.tol)}"


def run_race(spec: Spec, seed: int, names: list[str], options: Options) -> list[dict[str, Any]]:
    """One race in a fresh process."""
    job = job_for("race", replace(spec, seed=seed), options) | {"solvers": names, "allowance": 240.0}
    answer = ask(job)
    if isinstance(answer, dict):
        return [{"name": name, "status": answer["status"]} for name in names]
    return list(answer)


def job_for(task: str, spec: Spec, options: Options) -> dict[str, Any]:
    """What every job carries."""
    keys = ("threads", "limit", "tol", "runs")
    return {"task": task, "spec": asdict(spec)} | {key: getattr(options, key) for key in keys}


def rows(options: Options, full: int = 1_000_000) -> int:
    """Number of rows of a problem."""
    return 100_000 if options.quick else full


def softmax(options: Options) -> Iterator[str]:
    """Dense softmax regression with squared loss."""
    n = rows(options)
    yield from races([Spec("softmax", n, 64, kappa) for kappa in KAPPAS] + variants("softmax", n), options)


def exponential(options: Options) -> Iterator[str]:
    """Exponential regression against generalised linear models."""
    n = rows(options)
    yield from races([Spec("exponential", n, 64, k) for k in KAPPAS] + variants("exponential", n), options)


def variants(family: Any, n: int) -> list[Spec]:
    """Rows of unequal length, and real correlated features."""
    return [Spec(family, n, 64, 1e2, variant="heavy"), Spec(family, n, 30, variant="real")]


def sparse(options: Options) -> Iterator[str]:
    """Sparse softmax regression."""
    n = rows(options)
    specs = [Spec("softmax", n, 1_000, k, variant="uniform", nonzeros=m) for m in (10, 20) for k in KAPPAS]
    specs += [Spec("softmax", n, 1_000, k, variant="power", nonzeros=10) for k in KAPPAS[:2]]
    specs += [Spec("softmax", n, 10_000, k, variant="uniform", nonzeros=10) for k in KAPPAS[:2]]
    yield from races(specs, options)


def choice(options: Options) -> Iterator[str]:
    """Conditional logit."""
    n = rows(options)
    specs = [Spec("choice", n, 20, kappa, variant="small") for kappa in KAPPAS]
    yield from races([*specs, Spec("choice", n, 20, variant="half")], options)


def reads(options: Options) -> Iterator[str]:
    """Time of an evaluation in units of reading the data."""
    n = rows(options)
    cases = [(Spec("softmax", n, 64), layout) for layout in ("C", "F", "float32")]
    cases += [(Spec("exponential", n, 64), "C"), (Spec("choice", n, 20, variant="small"), "C")]
    cases += [(Spec("softmax", n, 1_000, variant="uniform", nonzeros=10), "CSR")]
    lines = []
    for spec, layout in cases:
        got = ask(job_for("reads", spec, options) | {"layout": layout})
        lines.append([f"{spec.title}, {layout}", *reads_cells(got)])
    header = ["problem", "A.sum() ms", "GB/s", "A@x ms", "numpy v+g ms", "ours v+g ms"]
    header += ["numpy / A.sum()", "ours / A.sum()", "fastest of both", "ours / A@x", "note"]
    text = "One value and gradient (v+g). Medians of methods that take turns, and the ratio of the fastest: "
    text += "where other guests share the processors, arithmetic can take longer for minutes at a time.\n"
    yield f"{text}Target: at most 2 x A.sum().\n\n" + table(header, lines)


def reads_cells(got: dict[str, Any]) -> list[str]:
    """Cells of one line of the reads table."""
    if "sum" not in got:
        return [*["-"] * 9, got["status"]]
    ours = got.get("ours", np.nan)
    rate = got["bytes"] / got["sum"] / 1e9
    cells = [1e3 * got["sum"], rate, 1e3 * got["product"], 1e3 * got["plain"], 1e3 * ours]
    best = got["fastest"].get("ours", np.nan) / got["fastest"]["sum"]
    ratios = [got["plain"] / got["sum"], ours / got["sum"], best, ours / got["product"]]
    note = got["status"] or ("over 2" if ours > 2 * got["sum"] else "")
    if ours > got["plain"]:
        note += "; PEER WINS"
    return [*(f"{v:.3g}" for v in cells), *(f"{v:.2f}" for v in ratios), note.removeprefix("; ")]


def memory(options: Options) -> Iterator[str]:
    """Peak resident memory of a fit."""
    q = options.quick
    dense = 100_000 if q else 1_000_000
    large = 1_000_000 if q else 10_000_000
    cases = [(Spec("softmax", dense, 64, 1e2), name) for name in (OURS, "lbfgs")]
    cases += [(Spec("exponential", dense, 64, 1e2), name) for name in (OURS, "glum", "sklearn_cholesky")]
    cases += [(Spec("choice", large, 20, variant="small"), name) for name in (OURS, "lbfgs")]
    cases += [(Spec("softmax", large, 1_000, variant="uniform", nonzeros=10), n) for n in (OURS, "lbfgs")]
    lines = []
    for spec, name in cases:
        got = ask(job_for("memory", spec, options) | {"solvers": [name]}, timeout=1_800)
        lines.append([spec.title, SOLVERS[name].label, *memory_cells(got)])
    header = ["problem", "solver", "data GB", "loaded GB", "peak GB", "extra / data", "peak / data"]
    header += ["seconds", "rel. gradient", "note"]
    text = "Loaded: resident once the data are in memory, interpreter and imports included. "
    text += "Extra: peak minus loaded.\n"
    text += "Targets: extra / data at most 0.3 for dense float64 in C order; 1e7 rows within 8 GB."
    yield text + "\n\n" + table(header, lines)


def memory_cells(got: dict[str, Any]) -> list[str]:
    """Cells of one line of the memory table."""
    if "peak" not in got:
        return [*["-"] * 7, got["status"]]
    data, loaded, peak = got["data"], got["loaded"], got["peak"]
    cells = [f"{v / 1e9:.3f}" for v in (data, loaded, peak)]
    cells += [f"{(peak - loaded) / data:.2f}", f"{peak / data:.2f}", f"{got['seconds']:.3g}"]
    notes = [got["status"], "over 8 GB" if peak > 8e9 else ""]
    return [*cells, f"{got['gradient']:.1e}", "; ".join(n for n in notes if n)]


def growth(options: Options) -> Iterator[str]:
    """Time against n and against d."""
    sizes = (10_000, 31_623, 100_000) if options.quick else (10_000, 100_000, 1_000_000, 10_000_000)
    widths = (8, 16, 32, 64) if options.quick else (8, 16, 32, 64, 128, 256)
    fixed = 30_000 if options.quick else 100_000
    for kappa in KAPPAS[:2]:
        for symbol, values, specs in (
            ("n", sizes, [Spec("softmax", n, 16, kappa) for n in sizes]),
            ("d", widths, [Spec("softmax", fixed, d, kappa) for d in widths]),
        ):
            rest = "d = 16" if symbol == "n" else f"n = {fixed:,}"
            title = f"## softmax, kappa = {kappa:g}, {rest}, growing {symbol}"
            yield title + "\n\n" + growth_table(symbol, values, specs, options)


def growth_table(symbol: str, values: tuple[int, ...], specs: list[Spec], options: Options) -> str:
    """Seconds and reads at every size, and log-log slopes over the runs that were finished."""
    names = [OURS, "lbfgs"]
    found = [{row["name"]: row for row in run_race(s, 0, names, options)} for s in specs]
    header, lines = [symbol], [[f"{v:,}"] for v in values]
    slopes = ["slope"]
    for name in names:
        header += [f"{name} s", f"{name} reads", f"{name} rel. gradient"]
        points = []
        for value, row, line in zip(values, found, lines, strict=True):
            if "seconds" not in row[name]:
                line += ["-", "-", row[name]["status"]]
                continue
            got = row[name]
            reached = f"{got['gradient']:.1e} {got['status']}".strip()
            line += [f"{got['seconds']:.3g}", f"{got['reads']:.4g}", reached]
            if not got["status"]:
                points.append((value, got["seconds"]))
        slopes += [overall_slope(points), "", "last step " + overall_slope(points[-2:])]
    return table(header, [*lines, slopes])


def overall_slope(points: list[tuple[int, float]]) -> str:
    """Least-squares slope of log seconds against log size."""
    if len(points) < 2:
        return "-"
    size, seconds = np.log(np.array(points, dtype=float)).T
    return f"{np.polyfit(size, seconds, 1)[0]:.2f}"


def imports(options: Options) -> Iterator[str]:
    """Time of ``import attnfit`` in a fresh process."""
    lines = []
    # The second line catches what a lazy import only puts off.
    for module in (
        "attnfit",
        "attnfit.solvers, attnfit.problems",
        "numpy",
        "scipy.optimize",
        "sklearn.linear_model",
        "glum",
    ):
        bare, full = [], []
        for _ in range(5):
            bare.append(seconds_of("pass")[0])
            spent, done = seconds_of(f"import {module}, sys; print('numba' in sys.modules)")
            full.append(spent)
        if done.returncode:
            lines.append([module, "-", "-", "-", f"{module} not importable"])
            continue
        numba = done.stdout.strip() == "True"
        total = median(full)
        note = "over 0.5 s" if module == "attnfit" and total > 0.5 else ""
        lines.append([module, f"{total:.3f}", f"{total - median(bare):.3f}", "yes" if numba else "no", note])
    header = ["module", "seconds", "without the interpreter", "imports numba", "note"]
    yield "Median of 5 fresh processes. Target: attnfit under 0.5 s and no numba.\n\n" + table(header, lines)


def seconds_of(code: str) -> tuple[float, subprocess.CompletedProcess[str]]:
    """Wall seconds of a fresh interpreter running ``code``."""
    began = perf_counter()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    return perf_counter() - began, done


TABLES: dict[str, Callable[[Options], Iterator[str]]] = {
    "softmax": softmax,
    "exponential": exponential,
    "sparse": sparse,
    "choice": choice,
    "reads": reads,
    "memory": memory,
    "growth": growth,
    "import": imports,
}

if __name__ == "__main__":
    main()

"""One measurement in a fresh process: ``python -m benchmarks.worker JSON`` prints JSON on its last line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits

from benchmarks import check
from benchmarks.data import Case, Spec, draw, stored
from benchmarks.peers import plain_evaluation
from benchmarks.solvers import OURS, SOLVERS, attnfit_problem

LONG = 20.0
Job = dict[str, Any]


def ask(job: Job, timeout: float | None = None) -> Any:
    """Run ``job`` in a fresh process and return its answer, or a dict with the ``status`` of its failure."""
    threads = str(job.get("threads", 1))
    environment = os.environ | {"NUMBA_NUM_THREADS": threads, "OMP_NUM_THREADS": threads}
    command = [sys.executable, "-m", "benchmarks.worker", json.dumps(job)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=environment)
    except subprocess.TimeoutExpired:
        return {"status": f"killed after {timeout:.0f} s"}
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        return {"status": f"failed: {lines[-1][:90]}"}
    return json.loads(done.stdout.strip().splitlines()[-1])


def race(job: Job) -> list[Job]:
    """Let the solvers of a job run in turns on one problem, and check what they return.

    Turns rather than one solver after the other: whatever disturbs the machine then disturbs them alike.
    A solver whose first run was long, or failed, gets no further turn; nor does anybody once the
    time set aside for the problem is over.
    """
    spec, names = Spec(**job["spec"]), job["solvers"]
    case = draw(spec)
    warm_up(spec, names)
    runs: dict[str, list[Any]] = {name: [] for name in names}
    began = perf_counter()
    for turn in range(job["runs"]):
        if turn and perf_counter() - began > job["allowance"]:
            break
        for name in names:
            if turn and (isinstance(runs[name][0], str) or runs[name][0].seconds > LONG):
                continue
            if turn and SOLVERS[name].isolated:
                continue
            runs[name].append(attempt(name, case, job))
    return summarise(case, runs, job["tol"])


def attempt(name: str, case: Case, job: Job) -> Any:
    """One run: an ``Outcome``, or one sentence on why there is none."""
    solver = SOLVERS[name]
    if solver.isolated:
        answer = ask({**job, "task": "isolated", "solvers": [name]}, timeout=job["limit"] + 60)
        if "x" not in answer:
            return answer["status"]
        from benchmarks.meter import Outcome

        return Outcome(**answer | {"x": np.asarray(answer["x"])})
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return solver.run(case, job["tol"], job["limit"])
    except ImportError as error:
        missing = (error.name or "").split(".")[0] or str(error)
        return f"{missing} not importable"
    except Exception as error:
        return f"failed: {type(error).__name__}: {str(error).splitlines()[0][:80] if str(error) else ''}"


def isolated(job: Job) -> Job:
    """One run of one solver that may not come back; the limit is then enforced from outside."""
    from benchmarks.meter import Stop

    case, (name,) = draw(Spec(**job["spec"])), job["solvers"]
    try:
        return SOLVERS[name].run(case, job["tol"], job["limit"]).as_dict()
    except Stop:
        return {"status": f"cap ({job['limit']:.0f} s)"}
    except Exception as error:
        return {"status": f"failed: {type(error).__name__}: {str(error).splitlines()[0][:80]}"}


def warm_up(spec: Spec, names: list[str]) -> None:
    """Pay for imports and compilation on a small problem before any clock runs."""
    small = draw(replace(spec, n=2_000, d=min(spec.d, 200), kappa=1.0))
    for name in names:
        if not SOLVERS[name].isolated:
            attempt(name, small, {"tol": 1e-6, "limit": 10.0})


def summarise(case: Case, runs: dict[str, list[Any]], tol: float) -> list[Job]:
    """Rows of a table, with accuracy measured here and never taken from a solver."""
    solved = {name: rs for name, rs in runs.items() if not isinstance(rs[0], str)}
    gradients = {name: check.relative_gradient(case, rs[0].x) for name, rs in solved.items()}
    if solved:
        best = check.reference(case, [rs[0].x for rs in solved.values()])
        lowest = min(check.value(case, x) for x in [best, *(rs[0].x for rs in solved.values())])
        # Errors mean nothing against a point that solves nothing.
        known = check.relative_gradient(case, best) <= 10 * tol
    rows: list[Job] = []
    for name, rs in runs.items():
        if isinstance(rs[0], str):
            rows.append({"name": name, "status": rs[0]})
            continue
        x = rs[0].x
        rows.append(
            {
                "name": name,
                "seconds": median(r.seconds for r in rs),
                "fastest": min(r.seconds for r in rs),
                "cpu": median(r.cpu for r in rs),
                "runs": len(rs),
                "iterations": rs[0].iterations,
                "evaluations": rs[0].evaluations,
                "reads": rs[0].reads,
                "gradient": gradients[name],
                "error": float(np.linalg.norm(x - best) / np.linalg.norm(best)) if known else np.nan,
                "excess": check.value(case, x) / lowest - 1,
                "status": rs[0].status,
            }
        )
    return rows


def memory(job: Job) -> Job:
    """Resident memory of one fit beside the data it was given."""
    (name,) = job["solvers"]
    spec = Spec(**job["spec"])
    if name == OURS:
        # Imported and not warmed up: what it compiles is part of the memory of its fit.
        import attnfit  # noqa: F401
    else:
        warm_up(spec, [name])
    case = draw(spec)
    loaded = resident("VmRSS")
    honest = reset_peak()
    out = attempt(name, case, job)
    if isinstance(out, str):
        return {"name": name, "status": out}
    peak = resident("VmHWM")
    note = "" if honest else "peak includes drawing the data"
    return {
        "name": name,
        "data": case.nbytes,
        "loaded": loaded,
        "peak": peak,
        "seconds": out.seconds,
        "gradient": check.relative_gradient(case, out.x),
        "status": out.status or note,
    }


def resident(field: str) -> int:
    """A memory field of this process, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"no {field}: memory is measured on Linux only")


def reset_peak() -> bool:
    """Forget the peak reached while drawing the data; False where the kernel does not allow it."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def reads(job: Job) -> Job:
    """Time of one value and gradient in units of ``A.sum()``, the cheapest thing that reads all of A."""
    case = draw(Spec(**job["spec"]))
    A: Any = case.A
    if job["layout"] == "F":
        A = np.asfortranarray(A)
    elif job["layout"] == "float32":
        A = A.astype(np.float32)
    case = replace(case, A=A, b=case.b.astype(A.dtype), x_true=case.x_true.astype(A.dtype))
    x = case.x_true
    plain = plain_evaluation(case)
    actions: dict[str, Callable[[], Any]] = {
        "sum": (A if isinstance(A, np.ndarray) else A.data).sum,
        "product": lambda: A @ x,
        "plain": lambda: plain(x),
    }
    status = ""
    try:
        problem = attnfit_problem(case)
        problem.value_and_gradient(x)
        actions["ours"] = lambda: problem.value_and_gradient(x)
    except ImportError:
        status = "attnfit not importable"
    except Exception as error:
        status = f"attnfit failed: {type(error).__name__}: {str(error)[:80]}"
    times: dict[str, list[float]] = {name: [] for name in actions}
    for _ in range(5 * job["runs"] + 1):
        for name, action in actions.items():
            began = perf_counter()
            action()
            times[name].append(perf_counter() - began)
    size = A.nbytes if isinstance(A, np.ndarray) else stored(A)
    # The first turn touches cold memory.
    fastest = {name: min(t) for name, t in times.items()}
    medians = {name: median(t[1:]) for name, t in times.items()}
    return medians | {"fastest": fastest, "bytes": size, "status": status}


TASKS: dict[str, Callable[[Job], Any]] = {
    "race": race,
    "isolated": isolated,
    "memory": memory,
    "reads": reads,
}


def main() -> None:
    """Answer one job."""
    job = json.loads(sys.argv[1])
    with threadpool_limits(job.get("threads", 1)):
        answer = TASKS[job["task"]](job)
    print(json.dumps(answer))


if __name__ == "__main__":
    main()

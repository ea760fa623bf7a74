"""Fits that are killed and resumed: ``python -m benchmarks.faults``.

Tables are imported late: the peers they come with take a second, and a fit that is killed needs none.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits

from attnfit import minimize, problems
from attnfit.solvers import Newton, checkpoint
from benchmarks.data import Spec, draw

KINDS = ("auto", "exact", "sampled", "matrix_free")
# A process that should have said something by now says nothing any more.
PATIENCE = 300.0


@dataclass(frozen=True)
class Job:
    """A fit; ``pause`` seconds after each record make a small one long enough to be killed in the middle."""

    n: int
    d: int
    hessian: str = "auto"
    kappa: float = 100.0
    seed: int = 0
    pause: float = 0.0


@dataclass(frozen=True)
class Ended:
    """How a fit ended: the bytes of x, the reads of this process alone, its seconds."""

    x: str
    reads: float
    seconds: float
    message: str


@dataclass(frozen=True)
class Survived:
    """A fit that was killed at a moment, and what the process did that resumed it."""

    ended: Ended
    in_mid_write: bool


def main() -> None:
    """Write the tables."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.faults", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="n = 1e5, eight kills")
    parser.add_argument("--kills", type=int, default=20, help="fits that are killed (default 20)")
    parser.add_argument("--runs", type=int, default=9, help="alternating runs (default 9)")
    parser.add_argument("--threads", type=int, default=1, help="BLAS threads (default 1)")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    parser.add_argument("--checkpoint", help=argparse.SUPPRESS)
    options = parser.parse_args()
    with threadpool_limits(options.threads):
        if options.job:
            work(Job(**json.loads(options.job)), options.checkpoint)
            return
        n, kills = (100_000, 8) if options.quick else (1_000_000, options.kills)
        sections: list[str] = []
        for section in report(n, kills, options.runs):
            print(section + "\n", flush=True)
            sections.append(section)
    from benchmarks.report import write

    command = shlex.join(["python", "-m", "benchmarks.faults", *sys.argv[1:]])
    write("faults-quick" if options.quick else "faults", command, sections)


def report(n: int, kills: int, runs: int) -> Iterator[str]:
    """One section a fault."""
    yield killed_processes(n, kills)
    yield dead_workers(n)
    yield overhead(n, runs)


# ---- kill -9


def killed_processes(n: int, kills: int) -> str:
    """Kill each fit at a moment of its own, resume it in a new process."""
    header = ["Hessian", "fits", "same x", "killed in mid-write", "reads", "reads to resume", "saved"]
    lines = []
    rng = np.random.default_rng(0)
    each = kills // len(KINDS)
    for kind in KINDS:
        job = Job(n, 32, kind)
        reference = run(job)
        # Every third falls into the writing of the checkpoint, the others anywhere.
        moments = [float(m) for m in (np.arange(each) + rng.random(each)) / each]
        found = []
        for k, moment in enumerate(moments):
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "fit.ckpt"
                found.append(kill_and_resume(job, reference, moment, path, while_writing=k % 3 == 2))
        same = sum(survived.ended.x == reference.x for survived in found)
        again = mean(survived.ended.reads for survived in found)
        lines.append(
            [
                kind,
                str(len(found)),
                f"{same} of {len(found)}",
                str(sum(survived.in_mid_write for survived in found)),
                f"{reference.reads:.2f}",
                f"{again:.2f}",
                f"{1.0 - again / reference.reads:.0%}",
            ]
        )
    legend = (
        "Softmax, squared loss, one group, conditioning 1e2. The moments of `kill -9` are spread over the "
        "whole fit. Same x: every bit. Reads to resume: those of the second process, with the sample drawn "
        "again and the read that checks the data; the mean over all moments, early ones included."
    )
    from benchmarks.report import table

    return f"## kill -9 in the middle of a fit, n = {n:,}, d = 32\n\n{legend}\n\n{table(header, lines)}"


def run(job: Job, path: Path | None = None) -> Ended:
    """Fit in a new process, to the end."""
    with started(job, path) as process:
        out, _ = process.communicate(timeout=PATIENCE)
    if process.returncode:
        raise RuntimeError(f"a fit ended with exit code {process.returncode}")
    return Ended(**json.loads(out))


def kill_and_resume(
    job: Job, reference: Ended, moment: float, path: Path, *, while_writing: bool = False
) -> Survived:
    """Kill a fit at a share of its duration, or at the first writing after that; resume it.

    A fit that ends before it is killed is run again, and killed earlier.
    """
    while True:
        path.unlink(missing_ok=True)
        with started(job, path) as process:
            time.sleep(moment * reference.seconds)
            while while_writing and process.poll() is None and not partial(path):
                pass
            process.kill()
            process.wait()
        in_mid_write = bool(partial(path))
        if process.returncode < 0:
            return Survived(run(job, path), in_mid_write)
        moment *= 0.7


def partial(path: Path) -> list[str]:
    """Return the names of files that are being written."""
    return [name for name in os.listdir(path.parent) if name.startswith(f".{path.name}.")]


def started(job: Job, path: Path | None) -> Any:
    """Start a fit in a new process, and wait until it reads its data."""
    arguments = ["--job", json.dumps(asdict(job))]
    arguments += [] if path is None else ["--checkpoint", str(path)]
    command = [sys.executable, "-m", "benchmarks.faults", *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    if process.stdout.readline() != "ready\n":
        process.wait()
        raise RuntimeError(f"a fit ended with exit code {process.returncode} before it began")
    return process


def work(job: Job, path: str | None) -> None:
    """Fit, and print how it ended."""
    problem = made(job)
    # Loops are loaded when large data are first read.
    problem.value(np.zeros(job.d))
    fit(Job(2_000, job.d, job.hessian, kappa=1.0))
    print("ready", flush=True)
    print(json.dumps(asdict(fit(job, path, problem))))


def fit(job: Job, path: str | None = None, problem: Any = None) -> Ended:
    """Fit in this process."""
    problem = made(job) if problem is None else problem
    before = problem.n_passes
    began = time.perf_counter()
    result = minimize(
        problem,
        solver=Newton(job.hessian),  # type: ignore[arg-type]
        random_state=0,
        callback=lambda record: time.sleep(job.pause),
        checkpoint=path,
    )
    seconds = time.perf_counter() - began
    return Ended(result.x.tobytes().hex(), problem.n_passes - before, seconds, result.message)


def made(job: Job) -> Any:
    """Draw the problem of a job."""
    case = draw(Spec("softmax", job.n, job.d, job.kappa, job.seed))
    return problems.Softmax(case.A, case.b)


# ---- what checkpoints cost


# ---- a worker of two dies


def dead_workers(n: int) -> str:
    """Fits on two workers, of which one is killed at one of the first reads."""
    import signal

    import dask.array as da
    from distributed import Client, LocalCluster

    from benchmarks.report import table

    case = draw(Spec("softmax", n, 32, 100.0))
    A, b = (da.from_array(v, chunks=(-(-n // 8), *v.shape[1:])) for v in (case.A, case.b))
    rows = []
    with (
        LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=":0") as cluster,
        Client(cluster) as client,
    ):
        problem = problems.Softmax(A, b)
        expected = minimize(problem, tol=1e-12, random_state=0)
        for moment in range(3):
            pids = list(client.run(os.getpid).values())

            def kill(record: Any, moment: int = moment, pids: list[int] = pids) -> None:
                if record.phase.startswith("fit") and record.iteration == moment:
                    os.kill(pids[0], signal.SIGKILL)

            began = time.perf_counter()
            found = minimize(problem, tol=1e-12, random_state=0, callback=kill)
            seconds = time.perf_counter() - began
            apart = np.linalg.norm(found.x - expected.x) / np.linalg.norm(expected.x)
            rows.append(
                [
                    f"read {moment + 1}",
                    found.status,
                    f"{apart:.1e}",
                    f"{expected.seconds:.1f}",
                    f"{seconds:.1f}",
                ]
            )
            client.wait_for_workers(2, timeout=60)
    head = ["killed after", "status", "difference of x", "seconds without", "seconds"]
    return "\n\n".join([
        f"## One of two workers killed in mid-fit, n = {n:,}, d = 32",
        table(head, rows),
        "Dask makes the partitions of the dead worker again on the other, and starts another worker.",
    ])  # fmt: skip


def overhead(n: int, runs: int) -> str:
    """Fit with and without a checkpoint, in turns."""
    header = [
        "Hessian",
        "seconds without",
        "seconds with",
        "of these writing",
        "writings",
        "size of the file",
    ]
    lines = []
    for kind in KINDS:
        problem, solver = made(Job(n, 32, kind)), Newton(kind)  # type: ignore[arg-type]
        minimize(problem, solver=solver, random_state=0)
        without: list[float] = []
        kept: list[tuple[float, list[float], int]] = []
        for _ in range(runs):
            began = time.perf_counter()
            minimize(problem, solver=solver, random_state=0)
            without.append(time.perf_counter() - began)
            with tempfile.TemporaryDirectory() as folder, written() as writings:
                path = Path(folder) / "fit.ckpt"
                began = time.perf_counter()
                minimize(problem, solver=solver, random_state=0, checkpoint=path)
                kept.append((time.perf_counter() - began, writings, path.stat().st_size))
        fastest, writings, size = min(kept)
        share = f"{sum(writings) / fastest:.1%}"
        seconds = [f"{min(without):.3f}", f"{fastest:.3f}"]
        lines.append([kind, *seconds, share, str(len(writings)), f"{size / 1024:.0f} KiB"])
    legend = f"The fastest of {runs} in turns. Every writing is on the disk (fsync) before the fit goes on."
    from benchmarks.report import table

    return f"## what checkpoints cost, n = {n:,}, d = 32\n\n{legend}\n\n{table(header, lines)}"


@contextmanager
def written() -> Iterator[list[float]]:
    """Give the seconds of each writing of a checkpoint."""
    seconds: list[float] = []
    write = checkpoint.write

    def timed(*arguments: Any) -> None:
        began = time.perf_counter()
        write(*arguments)
        seconds.append(time.perf_counter() - began)

    checkpoint.write = timed
    try:
        yield seconds
    finally:
        checkpoint.write = write


if __name__ == "__main__":
    main()

"""Data on disk and on a cluster: ``python -m benchmarks.scaling``.

Every fit runs in a process of its own, whose peak memory is counted whole. Files are made once, in
``--folder``.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
from numpy.lib import format as npy
from threadpoolctl import threadpool_limits

D, KAPPA = 16, 100.0
LIMIT = "1GB"
PIECE = 1 << 20
NAN_ROW = 73_211_004
Array = Any


def main() -> None:
    """Write the tables."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scaling", description=__doc__)
    parser.add_argument("--rows", type=float, default=1e8, help="rows on disk (default 1e8: 6.8 GB)")
    parser.add_argument("--cluster-rows", type=float, default=4e6, help="rows on the cluster (default 4e6)")
    parser.add_argument("--quick", action="store_true", help="2e6 rows on disk, 2e5 on the cluster")
    parser.add_argument("--limit", type=float, default=300.0, help="seconds a peer may take (default 300)")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "attnfit-scaling")
    parser.add_argument(
        "--threads", type=int, default=2, help="threads of BLAS, and of our loops (default 2)"
    )
    parser.add_argument("--only", choices=["disk", "cluster", "traffic"], help="one table")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.quick:
        options.rows, options.cluster_rows = 2e6, 2e5
    with threadpool_limits(options.threads):
        if options.job:
            print(json.dumps(JOBS[options.job](options)))
            return
        tables = {"disk": disk_tables, "cluster": cluster_table, "traffic": traffic_table}
        from benchmarks.report import write

        command = shlex.join(["python", "-m", "benchmarks.scaling", *sys.argv[1:]])
        for name, table in tables.items():
            if options.only in (None, name):
                suffix = "-quick" if options.quick else ""
                print(write(f"scaling-{name}{suffix}", command, [table(options)]).read_text(), flush=True)


# ---- the data


def pieces(n: int) -> Iterator[slice]:
    """Rows in runs."""
    for start in range(0, n, PIECE):
        yield slice(start, min(start + PIECE, n))


def make(folder: Path, n: int, d: int, dtype: str) -> tuple[Path, Path]:
    """Write features of conditioning 1e2 and the shares they explain, but for a tenth of noise."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = folder / f"A-{n}x{d}-{dtype}.npy", folder / f"b-{n}x{d}-{dtype}.npy"
    if all(path.exists() for path in paths):
        return paths
    rng = np.random.default_rng(0)
    Q = np.linalg.qr(rng.standard_normal((d, d)))[0]
    s = np.geomspace(1.0, 1.0 / KAPPA, d)
    x, mix = Q @ (rng.standard_normal(d) / s) / np.sqrt(d), (Q * s) @ Q.T
    total = 0.0
    arrays = [
        npy.open_memmap(path, "w+", np.dtype(dtype), shape)
        for path, shape in zip(paths, [(n, d), (n,)], strict=True)
    ]
    for rows in pieces(n):
        block = (rng.standard_normal((rows.stop - rows.start, d)) @ mix).astype(dtype)
        target = np.exp(block @ x + 0.1 * rng.standard_normal(len(block)) - 3.0)
        arrays[0][rows], arrays[1][rows] = block, target
        total += float(target.sum())
    for rows in pieces(n):
        arrays[1][rows] /= total
    return paths


def forget(path: Path) -> None:
    """Ask the system to drop a file from its cache."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def plain_read(path: Path) -> float:
    """Seconds of a loop that reads a file and does nothing with it."""
    memory = bytearray(1 << 25)
    began = perf_counter()
    with path.open("rb", buffering=0) as file:
        while file.readinto(memory):
            pass
    return perf_counter() - began


# ---- on disk


def disk_tables(options: argparse.Namespace) -> str:
    """Ours and peers on one file."""
    from benchmarks.report import table

    n = int(options.rows)
    A, b = make(options.folder, n, D, "float32")
    size = A.stat().st_size
    rows = []
    for name, job in (
        (f"attnfit, memory_limit={LIMIT}", "fit"),
        ("scipy L-BFGS over a memory map", "scipy"),
        ("scipy L-BFGS over dask.array", "dask"),
    ):
        found = run(job, options)
        error = relative_gradient(A, b, np.array(found["x"]))
        rows.append([
            name, f"{found['seconds']:.1f}", f"{found['reads']:.1f}", f"{error:.1e}",
            f"{found['memory'] / 1e9:.2f}", f"{found['memory'] / size:.2f}", found["note"],
        ])  # fmt: skip
    head = ["", "seconds", "reads", "rel. gradient", "peak RSS, GB", "over file size", "note"]
    fits = table(head, rows)
    speeds = []
    for state in ("cached", "uncached"):
        found = run("uncached" if state == "uncached" else "speed", options)
        speeds.append([
            state, f"{found['plain']:.2f}", f"{found['gradient']:.2f}", f"{found['hessian']:.2f}",
            f"{found['plain'] / found['gradient']:.2f}", f"{size / found['gradient'] / 1e9:.2f}",
        ])  # fmt: skip
    head = ["file", "plain read, s", "value and gradient, s", "and Hessian, s", "throughput / plain", "GB/s"]
    fault = run("nan", options)["message"] if n > NAN_ROW else "(fewer rows than that)"
    return "\n\n".join([
        f"## {n:.0e} x {D} float32 on disk ({size / 1e9:.1f} GB), squared softmax, one group, conditioning "
        f"{KAPPA:.0e}",
        fits,
        "Reads count both files as one; the peer loops over a memory map read twice an evaluation, since one "
        "read gives the normaliser. Peak RSS is the whole process's, interpreter and libraries included.",
        "### Reading",
        table(head, speeds),
        "Medians of five; uncached: the file is dropped from the system's cache before each read (how far "
        f"that works depends on the system). {options.threads} threads compute, one more reads ahead; the "
        "plain loop copies from the cache with one.",
        f"### A block with NaN at row {NAN_ROW:,}",
        f"> {fault}",
    ])  # fmt: skip


def run(job: str, options: argparse.Namespace) -> dict[str, Any]:
    """Run a job in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.scaling", "--job", job, "--folder", str(options.folder)]
    command += ["--rows", str(options.rows), "--cluster-rows", str(options.cluster_rows)]
    command += ["--limit", str(options.limit), "--threads", str(options.threads)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def ours(options: argparse.Namespace) -> Any:
    """The problem on disk."""
    from attnfit import problems
    from attnfit.designs import open_source

    A, b = make(options.folder, int(options.rows), D, "float32")
    return problems.Softmax(open_source(A), open_source(b))


def job_fit(options: argparse.Namespace) -> dict[str, Any]:
    """Fit under the limit."""
    from attnfit import minimize

    problem = ours(options)
    began = perf_counter()
    result = minimize(problem, memory_limit=LIMIT, random_state=0)
    seconds = perf_counter() - began
    estimate = result.problem.memory_estimate().total
    note = f"{result.status}; estimate {estimate / 1e9:.2f} GB"
    return outcome(result.x, seconds, result.n_passes, note)


def outcome(x: Array, seconds: float, reads: float, note: str) -> dict[str, Any]:
    """What a job reports."""
    # Unlike ru_maxrss this does not begin with what the parent process holds.
    status = Path("/proc/self/status").read_text()
    memory = next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))
    return {"x": list(map(float, x)), "seconds": seconds, "reads": reads, "memory": memory, "note": note}


class Capped(Exception):
    """The time is over."""


def job_scipy(options: argparse.Namespace) -> dict[str, Any]:
    """What a user would write: a loop over a memory map."""
    paths = make(options.folder, int(options.rows), D, "float32")
    A, b = (np.load(path, mmap_mode="r") for path in paths)

    def evaluate(x: Array) -> tuple[float, Array]:
        top, total = -np.inf, 0.0
        for rows in pieces(len(b)):
            z = A[rows].astype(np.float64) @ x
            new = max(top, z.max())
            total = total * np.exp(top - new) + np.exp(z - new).sum()
            top = new
        value, gamma, slope, mean = 0.0, 0.0, np.zeros(D), np.zeros(D)
        for rows in pieces(len(b)):
            block = A[rows].astype(np.float64)
            f = np.exp(block @ x - top) / total
            c = f - b[rows]
            value += 0.5 * float(c @ c)
            gamma += float(f @ c)
            slope += (f * c) @ block
            mean += f @ block
        return value, slope - gamma * mean

    return lbfgs(evaluate, options.limit, reads_each=2.0)


def job_dask(options: argparse.Namespace) -> dict[str, Any]:
    """The same in a few lines of dask.array."""
    import dask.array as da

    paths = make(options.folder, int(options.rows), D, "float32")
    maps = [np.load(path, mmap_mode="r") for path in paths]
    A = da.from_array(maps[0], chunks=(PIECE, D)).astype(np.float64)
    b = da.from_array(maps[1], chunks=(PIECE,)).astype(np.float64)

    def evaluate(x: Array) -> tuple[float, Array]:
        z = A @ x
        top = float(z.max().compute())
        e = da.exp(z - top)
        total = float(e.sum().compute())
        f = e / total
        c = f - b
        parts = da.compute((c * c).sum(), (f * c).sum(), (f * c) @ A, f @ A)
        return 0.5 * float(parts[0]), parts[2] - float(parts[1]) * parts[3]

    return lbfgs(evaluate, options.limit, reads_each=3.0)


def lbfgs(evaluate: Any, limit: float, reads_each: float) -> dict[str, Any]:
    """Run L-BFGS on a rescaled objective until the relative gradient is 1e-8 or the time is over."""
    from scipy.optimize import minimize as scipy_minimize

    value, gradient = evaluate(np.zeros(D))
    best: dict[str, Any] = {"x": np.zeros(D), "size": np.linalg.norm(gradient), "calls": 1}
    goal = 1e-8 * best["size"]
    began = perf_counter()

    def scaled(x: Array) -> tuple[float, Array]:
        if perf_counter() - began > limit:
            raise Capped
        best["calls"] += 1
        v, g = evaluate(x)
        if np.linalg.norm(g) < best["size"]:
            best["x"], best["size"] = x.copy(), np.linalg.norm(g)
        if best["size"] <= goal:
            raise StopIteration
        return v / value, g / value

    note = "stopped by itself"
    try:
        scipy_minimize(
            scaled, np.zeros(D), jac=True, method="L-BFGS-B",
            options={"maxiter": 10**6, "maxfun": 10**6, "ftol": 0.0, "gtol": 0.0, "maxcor": 20},
        )  # fmt: skip
    except Capped:
        note = f"cap ({limit:.0f} s)"
    except StopIteration:
        note = "arrived"
    return outcome(best["x"], perf_counter() - began, reads_each * best["calls"], note)


def relative_gradient(A: Path, b: Path, x: Array) -> float:
    """Norm of the gradient over its norm at zero; shares no code with a solver."""
    features, target = (np.load(path, mmap_mode="r") for path in (A, b))
    sizes = []
    for point in (x, np.zeros(D)):
        z = np.concatenate([features[rows].astype(np.float64) @ point for rows in pieces(len(target))])
        f = np.exp(z - z.max())
        f /= f.sum()
        c = f - target
        s = f * (c - f @ c)
        parts = (s[rows] @ features[rows].astype(np.float64) for rows in pieces(len(target)))
        sizes.append(float(np.linalg.norm(sum(parts))))
    return sizes[0] / sizes[1]


def job_speed(options: argparse.Namespace, *, cached: bool = True) -> dict[str, Any]:
    """Compare reads that work with one that does not."""
    problem = ours(options)
    A, _ = make(options.folder, int(options.rows), D, "float32")
    x = np.full(D, 0.01)
    at = problem.evaluate(x)
    found: dict[str, list[float]] = {"plain": [], "gradient": [], "hessian": []}
    for _ in range(5):
        for name, work in (
            ("plain", partial(plain_read, A)),
            ("gradient", lambda: timed(lambda: problem.evaluate(1.001 * x, at))),
            ("hessian", lambda: timed(lambda: problem.evaluate(1.001 * x, at, hessian=True))),
        ):
            if not cached:
                forget(A)
            found[name].append(work())
    return {name: float(np.median(seconds)) for name, seconds in found.items()}


def timed(work: Any) -> float:
    """Seconds of a call."""
    began = perf_counter()
    work()
    return perf_counter() - began


def job_nan(options: argparse.Namespace) -> dict[str, Any]:
    """Put a NaN into the file, read it, and put things right again."""
    A, _ = make(options.folder, int(options.rows), D, "float32")
    features = np.load(A, mmap_mode="r+")
    kept = features[NAN_ROW, 5]
    features[NAN_ROW, 5] = np.nan
    features.flush()
    try:
        ours(options).value_and_gradient(np.zeros(D))
        message = "no error"
    except ValueError as error:
        message = str(error)
    finally:
        features[NAN_ROW, 5] = kept
        features.flush()
    return {"message": message.replace(str(options.folder), "...")}


# ---- on a cluster


def lazy(paths: tuple[Path, Path], n: int, d: int, k: int) -> tuple[Any, Any]:
    """The arrays in k pieces that workers load by themselves."""
    import dask.array as da
    from dask import delayed

    bounds = [n * i // k for i in range(k + 1)]
    out = []
    for path, width in zip(paths, [(d,), ()], strict=True):
        blocks = [
            da.from_delayed(delayed(load)(str(path), first, last), (last - first, *width), np.float64)
            for first, last in pairwise(bounds)
        ]
        out.append(da.concatenate(blocks))
    return out[0], out[1]


def load(path: str, first: int, last: int) -> Array:
    """Some rows of a file."""
    return np.array(np.load(path, mmap_mode="r")[first:last])


def job_memory(options: argparse.Namespace, threads: int) -> dict[str, Any]:
    """The fit in memory."""
    from attnfit import minimize, problems

    paths = make(options.folder, int(options.cluster_rows), 64, "float64")
    problem = problems.Softmax(*[np.load(path) for path in paths])
    with threadpool_limits(threads):
        return fits(minimize, problem)


def job_cluster(options: argparse.Namespace, workers: int) -> dict[str, Any]:
    """The fit on workers of this machine."""
    from distributed import Client, LocalCluster

    from attnfit import minimize, problems

    n = int(options.cluster_rows)
    paths = make(options.folder, n, 64, "float64")
    with (
        LocalCluster(n_workers=workers, threads_per_worker=1, dashboard_address=":0") as cluster,
        Client(cluster),
    ):
        return fits(minimize, problems.Softmax(*lazy(paths, n, 64, 8)))


def fits(minimize: Any, problem: Any) -> dict[str, Any]:
    """Median of three fits after one that compiles; the last to full precision."""
    minimize(problem, random_state=0)
    seconds = sorted(timed(lambda: minimize(problem, random_state=0)) for _ in range(3))
    reads = minimize(problem, random_state=0).n_passes
    exact = minimize(problem, random_state=0, tol=1e-13)
    return {"seconds": seconds[1], "reads": reads, "x": exact.x.tolist()}


def cluster_table(options: argparse.Namespace) -> str:
    """Memory against one and two workers."""
    from benchmarks.report import table

    labels = {
        "memory": "in memory, 1 thread",
        "threads": "in memory, 2 threads",
        "one": "1 worker",
        "two": "2 workers",
    }
    found = {name: run(name, options) for name in labels}
    base = found["memory"]
    rows = []
    for name, label in labels.items():
        x, reference = np.array(found[name]["x"]), np.array(base["x"])
        rows.append([
            label, f"{found[name]['seconds']:.2f}", f"{found[name]['seconds'] / base['seconds']:.2f}",
            f"{found[name]['seconds'] / found['threads']['seconds']:.2f}",
            f"{found[name]['reads']:.1f}", f"{np.linalg.norm(x - reference) / np.linalg.norm(reference):.1e}",
        ])  # fmt: skip
    scaling = found["one"]["seconds"] / found["two"]["seconds"]
    return "\n\n".join([
        f"## {options.cluster_rows:.0e} x 64 float64 on a LocalCluster, eight partitions",
        table(["", "seconds", "over 1 thread", "over 2 threads", "reads", "difference of x"], rows),
        f"From one worker to two: {scaling:.2f} times as fast. Partitions are in the workers' memory; "
        "seconds are a whole fit (tol 1e-8), the median of three; x is compared at tol 1e-13.",
    ])  # fmt: skip


def job_traffic(options: argparse.Namespace) -> dict[str, Any]:
    """Bytes over the loopback device."""
    from distributed import Client, LocalCluster

    from attnfit import problems

    found = {}
    for workers in (1, 2):
        for d in (16, 64, 256):
            n = 20_000
            paths = make(options.folder, n, d, "float64")
            with (
                LocalCluster(n_workers=workers, threads_per_worker=1, dashboard_address=":0") as cluster,
                Client(cluster),
            ):
                problem = problems.Softmax(*lazy(paths, n, d, 4))
                x = np.zeros(d)
                at = problem.evaluate(x)
                for name, work in (
                    ("gradient", lambda p=problem, at=at: p.evaluate(at.x, at)),
                    ("hessian", lambda p=problem, at=at: p.hessian_at(at)),
                ):
                    work()
                    before = loopback()
                    for _ in range(10):
                        work()
                    found[f"{workers} {d} {name}"] = (loopback() - before) / 10
    return found


def loopback() -> int:
    """Bytes sent over the loopback device so far."""
    with open("/proc/net/dev") as file:
        line = next(line for line in file if line.strip().startswith("lo:"))
    return int(line.split(":")[1].split()[8])


def traffic_table(options: argparse.Namespace) -> str:
    """Bytes a read."""
    from benchmarks.report import table

    found = run("traffic", options)
    rows = []
    for workers in (1, 2):
        for d in (16, 64, 256):
            sizes = [found[f"{workers} {d} {name}"] for name in ("gradient", "hessian")]
            rows.append(
                [str(workers), str(d), *[f"{size / 1e3:,.0f}" for size in sizes], f"{8 * d * d / 1e3:,.0f}"]
            )
    return "\n\n".join([
        "## Traffic of one read: 20,000 rows in four partitions",
        table(["workers", "d", "value and gradient, kB", "Hessian, kB", "8 d^2, kB"], rows),
        "All bytes over the loopback device, the scheduler's messages and heartbeats included; the mean of "
        "ten.",
    ])  # fmt: skip


JOBS = {
    "fit": job_fit,
    "scipy": job_scipy,
    "dask": job_dask,
    "speed": job_speed,
    "uncached": partial(job_speed, cached=False),
    "nan": job_nan,
    "memory": partial(job_memory, threads=1),
    "threads": partial(job_memory, threads=2),
    "one": partial(job_cluster, workers=1),
    "two": partial(job_cluster, workers=2),
    "traffic": job_traffic,
}

if __name__ == "__main__":
    main()

"""Jobs of ``benchmarks.scaling`` on a cluster on this machine."""

from __future__ import annotations

import argparse
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits

from benchmarks.scaling_disk import make, timed

Array = Any


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

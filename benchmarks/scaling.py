"""Data on disk and on a cluster: ``python -m benchmarks.scaling``.

Every fit runs in a process of its own, whose peak memory is counted whole. Files are made once, in
``--folder``.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits

from benchmarks import scaling_cluster, scaling_disk
from benchmarks.scaling_disk import KAPPA, LIMIT, NAN_ROW, D, make, relative_gradient

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


def disk_tables(options: argparse.Namespace) -> str:
    """Ours and peers on one file."""
    from benchmarks.report import table

    n = int(options.rows)
    A, b = make(options.folder, n, D, "float32")
    size = A.stat().st_size
    rows = []
    for name, job in (
        (f"attnfit, memory_limit={LIMIT}", "fit"),
        ("its certificate (after a fit)", "certificate"),
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
        f"that works depends on the system). {options.threads} threads compute, one more may wait for the "
        "disk; the plain loop copies from the cache with one.",
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
    "fit": scaling_disk.job_fit,
    "certificate": scaling_disk.job_certificate,
    "scipy": scaling_disk.job_scipy,
    "dask": scaling_disk.job_dask,
    "speed": scaling_disk.job_speed,
    "uncached": partial(scaling_disk.job_speed, cached=False),
    "nan": scaling_disk.job_nan,
    "memory": partial(scaling_cluster.job_memory, threads=1),
    "threads": partial(scaling_cluster.job_memory, threads=2),
    "one": partial(scaling_cluster.job_cluster, workers=1),
    "two": partial(scaling_cluster.job_cluster, workers=2),
    "traffic": scaling_cluster.job_traffic,
}

if __name__ == "__main__":
    main()

"""Jobs of ``benchmarks.scaling`` on files."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
from numpy.lib import format as npy

D, KAPPA = 16, 100.0
LIMIT = "1GB"
PIECE = 1 << 20
NAN_ROW = 73_211_004
Array = Any


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


def ours(options: argparse.Namespace) -> Any:
    """The problem on disk."""
    from attnfit import problems
    from attnfit.data import open_source

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


def job_certificate(options: argparse.Namespace) -> dict[str, Any]:
    """Certify a fit under the limit."""
    from attnfit import minimize

    result = minimize(ours(options), memory_limit=LIMIT, random_state=0)
    before, began = result.problem.n_passes, perf_counter()
    proof = result.certificate()
    seconds = perf_counter() - began
    note = f"{'proven' if proof.valid else 'not proven'}: within {proof.radius:.1e}"
    return outcome(result.x, seconds, result.problem.n_passes - before, note)


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

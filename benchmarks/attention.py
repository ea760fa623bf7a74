"""Attention maps against a general optimiser with automatic derivatives:
``python -m benchmarks.attention``."""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
from scipy import optimize
from threadpoolctl import threadpool_limits

from attnfit import minimize, problems
from attnfit.solvers import Newton
from benchmarks.report import table, write
from benchmarks.worker import reset_peak, resident

SIZES = ((512, 32), (2048, 64))
KAPPAS = (1.0, 1e2)
Array = Any


def main() -> None:
    """Write the tables."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.attention", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="the small size only, no head")
    parser.add_argument("--threads", type=int, default=1, help="threads of BLAS and torch (default 1)")
    parser.add_argument("--runs", type=int, default=3, help="alternating runs (default 3)")
    parser.add_argument("--limit", type=float, default=90.0, help="seconds a peer may take (default 90)")
    parser.add_argument("--only", default="", help="only the race N-KAPPA, for example 2048-100")
    parser.add_argument("--wide", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.wide:
        wide_case()
        return
    command = shlex.join(["python", "-m", "benchmarks.attention", *sys.argv[1:]])
    name = "attention" + ("-quick" if options.quick else "")
    name += f"-{options.threads}threads" if options.threads > 1 else ""
    name += "-partial" if options.only else ""
    sections: list[str] = []
    with threadpool_limits(options.threads):
        for section in report(options):
            print(section + "\n", flush=True)
            sections.append(section)
            write(name, command, sections)


def report(options: argparse.Namespace) -> Iterator[str]:
    """One section a question."""
    for n, d in SIZES[:1] if options.quick else SIZES:
        for kappa in KAPPAS:
            if options.only in ("", f"{n}-{kappa:g}"):
                yield race(n, d, kappa, options)
    if options.only:
        return
    yield khatri_rao(options)
    if not options.quick:
        yield wide()
        yield head()


def instance(n: int, d: int, kappa: float, seed: int = 0) -> tuple[Array, Array, Array, Array]:
    """Queries, keys, noisy maps and the matrix behind them; logits of standard deviation one."""
    rng = np.random.default_rng(seed)

    def factor() -> Array:
        Q = np.linalg.qr(rng.standard_normal((d, d)))[0]
        return (rng.standard_normal((n, d)) @ Q * np.geomspace(1.0, 1.0 / kappa, d)) @ Q.T

    A1, A2, X = factor(), factor(), rng.standard_normal((d, d))
    X /= np.std(A1 @ X @ A2.T)
    maps = softmax(A1 @ X @ A2.T) * np.exp(0.1 * rng.standard_normal((n, n)))
    return A1, A2, maps / maps.sum(axis=1, keepdims=True), X


def softmax(z: Array) -> Array:
    """Row by row."""
    e = np.exp(z - z.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)


def objective(A1: Array, A2: Array, B: Array) -> Callable[[Array], tuple[float, Array]]:
    """Value and gradient by PyTorch: what a user would write, and the referee of everybody's gradient."""
    import torch

    a1, a2, b = (torch.from_numpy(np.ascontiguousarray(M)) for M in (A1, A2, B))

    def value_and_gradient(x: Array) -> tuple[float, Array]:
        X = torch.from_numpy(x.reshape(a1.shape[1], a2.shape[1])).requires_grad_()
        loss = 0.5 * ((torch.softmax(a1 @ X @ a2.T, 1) - b) ** 2).sum()
        loss.backward()
        return float(loss.detach()), X.grad.numpy().ravel()

    return value_and_gradient


def race(n: int, d: int, kappa: float, options: argparse.Namespace) -> str:
    """Squared loss: everybody from a cold start to a relative gradient of 1e-8."""
    import torch

    torch.set_num_threads(options.threads)
    A1, A2, B, X = instance(n, d, kappa)
    fun = objective(A1, A2, B)
    at_zero = float(np.linalg.norm(fun(np.zeros(d * d))[1]))
    solvers = {
        "attnfit": ours,
        "scipy L-BFGS-B, torch gradient, scaled": lbfgs,
        "scipy L-BFGS-B, closed-form start": lbfgs_from_closed_form,
    }
    runs: dict[str, list[tuple[float, Array, str]]] = {name: [] for name in solvers}
    for turn in range(options.runs):
        for name, solve in solvers.items():
            if turn and runs[name][0][0] > 20:
                continue
            began = perf_counter()
            x, counted = solve(A1, A2, B, fun, at_zero, options.limit)
            runs[name].append((perf_counter() - began, x, counted))
    own = median(r[0] for r in runs["attnfit"])
    lines = []
    for name, results in runs.items():
        seconds = median(r[0] for r in results)
        x, counted = results[0][1], results[0][2]
        value, gradient = fun(x)
        relative = float(np.linalg.norm(gradient)) / at_zero
        ratio = "" if name == "attnfit" else f"{own / seconds:.3f}"
        note = "" if relative <= 1e-8 else "not at 1e-8"
        if name != "attnfit" and seconds < own:
            note = f"PEER {'FASTER, ' + note if note else 'WINS'}"
        logits = np.linalg.norm(A1 @ (x.reshape(d, d) - X) @ A2.T) / np.linalg.norm(A1 @ X @ A2.T)
        cells = [
            f"{seconds:.3g}",
            str(len(results)),
            counted,
            f"{value:.10g}",
            f"{relative:.1e}",
            f"{logits:.1e}",
        ]
        lines.append([name, *cells, ratio, note])
    header = [
        "solver",
        "seconds",
        "runs",
        "work",
        "value",
        "rel. gradient",
        "error of the logits",
        "ours/this",
        "note",
    ]
    return f"## squared loss, n1 = n2 = {n}, d = {d}, kappa = {kappa:g}\n\n" + table(header, lines)


def ours(A1: Array, A2: Array, B: Array, fun: Any, at_zero: float, limit: float) -> tuple[Array, str]:
    """attnfit at its defaults; its own tolerance is in scaled variables."""
    result = minimize(problems.Attention(A1, A2, B), tol=1e-9)
    return result.x.ravel(), f"{result.n_iter} steps, {result.n_passes:.0f} reads"


def lbfgs(
    A1: Array, A2: Array, B: Array, fun: Any, at_zero: float, limit: float, x0: Array | None = None
) -> tuple[Array, str]:
    """The best settings known: objective divided by its gradient at zero, stopped by the referee's
    measure."""
    began, best = perf_counter(), [np.inf, np.zeros(A1.shape[1] * A2.shape[1])]
    count = 0

    class Done(Exception):
        pass

    def scaled(x: Array) -> tuple[float, Array]:
        nonlocal count
        count += 1
        value, gradient = fun(x)
        relative = float(np.linalg.norm(gradient)) / at_zero
        if relative < best[0]:
            best[0], best[1] = relative, x.copy()
        if relative <= 1e-8 or perf_counter() - began > limit:
            raise Done
        return value / at_zero, gradient / at_zero

    settings = {"maxiter": 20_000, "maxfun": 40_000, "gtol": 0.0, "ftol": 0.0, "maxcor": 20}
    try:
        start = best[1].copy() if x0 is None else x0
        optimize.minimize(scaled, start, jac=True, method="L-BFGS-B", options=settings)
    except Done:
        pass
    capped = ", cap" if perf_counter() - began > limit else ""
    return best[1], f"{count} evaluations{capped}"


def lbfgs_from_closed_form(
    A1: Array, A2: Array, B: Array, fun: Any, at_zero: float, limit: float
) -> tuple[Array, str]:
    """The same, given the start that attnfit computes: what is left is the optimiser's part."""
    logs = np.log(B)
    logs -= logs.mean(axis=1, keepdims=True)
    start = np.linalg.pinv(A1) @ logs @ np.linalg.pinv(A2 - A2.mean(axis=0)).T
    return lbfgs(A1, A2, B, fun, at_zero, limit, start.ravel())


def khatri_rao(options: argparse.Namespace, n: int = 256, d: int = 16) -> str:
    """The Hessian against the product with the explicit Kronecker matrix."""
    A1, A2, B, X = instance(n, d, 1.0)
    problem = problems.Attention(A1, A2, B)

    def dense() -> Array:
        A = np.kron(A1, A2)
        f = softmax((A @ X.ravel()).reshape(n, n))
        p = f - B
        t = f * (f + p - np.sum(p * f, axis=1, keepdims=True))
        blocks = A.reshape(n, n, d * d)
        blocks -= np.einsum("ik,ikd->id", f, blocks, optimize=True)[:, None]
        return A.T @ (t.reshape(-1, 1) * A)

    times: dict[str, list[float]] = {"attnfit": [], "dense Kronecker product": []}
    for _ in range(options.runs):
        for name, action in (("attnfit", lambda: problem.hessian(X)), ("dense Kronecker product", dense)):
            began = perf_counter()
            result = action()
            times[name].append(perf_counter() - began)
            if name == "attnfit":
                own = result
    error = float(np.linalg.norm(own - result) / np.linalg.norm(result))
    seconds = {name: median(t) for name, t in times.items()}
    lines = [[name, f"{s:.4g}", f"{s / seconds['attnfit']:.0f}"] for name, s in seconds.items()]
    title = f"## Hessian, n1 = n2 = {n}, d = {d}; relative difference {error:.1e}\n\n"
    return title + table(["method", "seconds", "times attnfit"], lines)


def wide() -> str:
    """More unknowns than any matrix of them could hold: memory of a fit in a fresh process."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.attention", "--wide"], capture_output=True, text=True, check=True
    )
    return "## matrix-free, n1 = n2 = 1024, d = 768 (589,824 unknowns)\n\n" + done.stdout.strip()


def wide_case(n: int = 1024, d: int = 768) -> None:
    """Run the wide problem with zeros among the maps, so that no closed form gives the answer away."""
    rng = np.random.default_rng(0)
    A, X = rng.standard_normal((n, d)), rng.standard_normal((d, d))
    maps = softmax(A @ (X / np.std(A @ X @ A.T)) @ A.T).astype(np.float16)
    maps[rng.random(maps.shape) < 0.01] = 0.0
    before = resident("VmRSS")
    reset_peak()
    began = perf_counter()
    result = minimize(
        problems.Attention(A, A, maps, "cross_entropy", ridge=1e-6),
        solver=Newton(hessian="matrix_free"),
        tol=1e-6,
    )
    seconds = perf_counter() - began
    peak = resident("VmHWM")
    data = A.nbytes + maps.nbytes
    cells = [f"{seconds:.3g}", f"{result.n_passes:.0f}", f"{result.gradient_norm:.1e}", f"{data / 1e6:.1f}"]
    cells += [f"{(peak - before) / 1e6:.0f}", f"{8.0 * d**4 / 1e12:.2g}"]
    header = [
        "seconds",
        "reads",
        "rel. gradient",
        "data MB",
        "extra peak MB",
        "a dense Hessian would take TB",
    ]
    print(table(header, [cells]))


def head() -> str:
    """A real head: maps of one text, judged on another."""
    from examples.attention_head import TEXTS, WIDTH, observe

    (A, maps, _), (A_new, maps_new, _) = (observe(text) for text in TEXTS)
    held_out = problems.Attention(A_new, A_new, maps_new)
    top = np.zeros(maps.shape, dtype=bool)
    np.put_along_axis(top, np.argsort(-maps, axis=1)[:, :128], True, axis=1)
    half = maps.astype(np.float16)
    cases: dict[str, tuple[Array, dict[str, Any]]] = {
        "exact maps, full": (maps, {}),
        "half precision, rank 32, log_ratio": (half, {"loss": "log_ratio", "rank": WIDTH}),
        "half precision, rank 32, cross_entropy": (half, {"loss": "cross_entropy", "rank": WIDTH}),
        "half precision, full, log_ratio": (half, {"loss": "log_ratio"}),
        "half precision, top 128 a row, rank 32, log_ratio": (
            np.where(top, half, np.float16(0)),
            {"loss": "log_ratio", "rank": WIDTH, "mask": top},
        ),
    }
    lines = []
    for name, (B, settings) in cases.items():
        began = perf_counter()
        problem = problems.Attention(A, A, B, **settings)
        result = minimize(problem, callback=lambda record, began=began: perf_counter() - began > 120)
        seconds = perf_counter() - began
        X, _ = problem.split(result.x)
        cells = [f"{seconds:.3g}", f"{result.n_passes:.0f}", f"{problem.relative_error(result.x):.1e}"]
        lines.append([name, *cells, f"{held_out.relative_error(X):.1e}", result.status])
    header = ["maps", "seconds", "reads", "error on these maps", "error held out", "status"]
    title = (
        f"## a head of all-MiniLM-L6-v2: {len(A)} tokens to fit, {len(A_new)} of another text to judge by\n\n"
    )
    return title + table(header, lines)


if __name__ == "__main__":
    main()

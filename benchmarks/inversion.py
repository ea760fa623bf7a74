"""Inversion of attention layers against automatic derivatives and general optimisers:
``python -m benchmarks.inversion``."""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from statistics import median
from time import perf_counter, sleep
from typing import Any

import numpy as np
from sklearn.exceptions import ConvergenceWarning
from threadpoolctl import threadpool_limits

from attnfit import problems
from attnfit.inversion import recover
from benchmarks.inversion_recovery import recovery
from benchmarks.report import table, write
from benchmarks.worker import reset_peak, resident
from experiments.planted import SETTINGS, plant

Array = Any
Action = Callable[[Array], Array]

HESSIAN_SIZE, PRODUCT_SIZE, LARGE_SIZE = (64, 32), (256, 64), (128, 16)
CHUNK = 128
# Seconds before each turn, and calls a turn where they take milliseconds.
PAUSE, CALLS = 0.1, 7
SECTIONS = ("hessian", "products", "memory", "recovery", "large")


def main() -> None:
    """Write the tables."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.inversion", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small sizes, two instances")
    parser.add_argument("--threads", type=int, default=1, help="threads of BLAS and torch (default 1)")
    parser.add_argument("--runs", type=int, default=7, help="alternating runs (default 7)")
    parser.add_argument("--instances", type=int, default=20, help="instances of a recovery (default 20)")
    parser.add_argument("--peers", type=int, default=4, help="of these, for torch (default 4)")
    parser.add_argument("--limit", type=float, default=10.0, help="seconds of a peer's restarts (default 10)")
    parser.add_argument("--only", choices=SECTIONS, help="one section")
    parser.add_argument("--peak", choices=list(HESSIANS), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peak:
        print(peak_share(options.peak, HESSIAN_SIZE))
        return
    if options.quick:
        options.instances = options.peers = 2
    command = shlex.join(["python", "-m", "benchmarks.inversion", *sys.argv[1:]])
    name = "inversion" + ("-quick" if options.quick else "")
    name += f"-{options.threads}threads" if options.threads > 1 else ""
    name += f"-{options.only}" if options.only else ""
    sections: list[str] = []
    with threadpool_limits(options.threads), warnings.catch_warnings():
        # Failing to converge is what is counted here.
        warnings.simplefilter("ignore", ConvergenceWarning)
        for section in report(options):
            print(section + "\n", flush=True)
            sections.append(section)
            write(name, command, sections)


def report(options: argparse.Namespace) -> Iterator[str]:
    """Yield one section a question."""
    import torch

    torch.set_num_threads(options.threads)
    wanted = SECTIONS if options.only is None else (options.only,)
    if "hessian" in wanted:
        yield hessian_race((16, 8) if options.quick else HESSIAN_SIZE, options.runs)
    if "products" in wanted:
        yield product_race((32, 16) if options.quick else PRODUCT_SIZE, options.runs)
    if "memory" in wanted and not options.quick:
        yield memory()
    if "recovery" in wanted:
        yield recovery(options)
    if "large" in wanted and not options.quick:
        yield large()


# ---- derivatives


def instance(n: int, d: int) -> tuple[Array, Array, Array, Array]:
    """W, V, an output that the point X does not give, and X."""
    rng = np.random.default_rng(0)
    W, V = rng.standard_normal((d, d)) / d, rng.standard_normal((d, d)) / np.sqrt(d)
    return W, V, rng.standard_normal((n, d)), rng.standard_normal((d, n))


def torch_loss(W: Array, V: Array, B: Array) -> Callable[[Any], Any]:
    """The loss as a user would write it."""
    import torch

    w, v, b = (torch.from_numpy(part) for part in (W, V, B))
    return lambda X: 0.5 * ((torch.softmax(X.T @ w @ X, 1) @ (X.T @ v) - b) ** 2).sum()


def jax_loss(W: Array, V: Array, B: Array) -> Callable[[Any], Any]:
    """The same for JAX."""
    import jax
    import jax.numpy as jnp

    jax.config.update("jax_enable_x64", True)
    return lambda X: 0.5 * jnp.sum((jax.nn.softmax(X.T @ W @ X, axis=1) @ (X.T @ V) - B) ** 2)


def own_hessian(W: Array, V: Array, B: Array) -> Action:
    problem = problems.LayerInversion(W, V, B)
    return problem.hessian


def torch_jacrev(W: Array, V: Array, B: Array) -> Action:
    import torch
    from torch.func import jacrev

    action = jacrev(jacrev(torch_loss(W, V, B)), chunk_size=CHUNK)
    return lambda X: action(torch.from_numpy(X)).numpy()


def torch_functional(W: Array, V: Array, B: Array) -> Action:
    import torch

    loss = torch_loss(W, V, B)
    return lambda X: torch.autograd.functional.hessian(loss, torch.from_numpy(X)).numpy()


def jax_hessian(W: Array, V: Array, B: Array) -> Action:
    import jax

    action = jax.jit(jax.hessian(jax_loss(W, V, B)))
    return lambda X: np.asarray(action(X))


HESSIANS: dict[str, Callable[[Array, Array, Array], Action]] = {
    "attnfit": own_hessian,
    f"torch jacrev(jacrev), chunks of {CHUNK}": torch_jacrev,
    "torch.autograd.functional.hessian": torch_functional,
    "jax.jit(jax.hessian)": jax_hessian,
}


def available(methods: Sequence[str]) -> list[str]:
    """Return the methods whose package is installed."""
    return [name for name in methods if not name.startswith("jax") or find_spec("jax") is not None]


def times(
    actions: dict[str, Action], X: Array, runs: int, calls: int = 1
) -> tuple[dict[str, float], dict[str, Array]]:
    """Return median seconds and the last results of methods that take turns, each call at another point.

    Each turn begins with a pause: threads of the method before it wait for work in a loop for a while, and
    there are no cores to spare. More than one call a turn begin with one that does not count.
    """
    seconds: dict[str, list[float]] = {name: [] for name in actions}
    results = {name: action(X) for name, action in actions.items()}
    for run in range(runs):
        for name, action in actions.items():
            sleep(PAUSE)
            if calls > 1:
                action(X)
            for call in range(calls):
                point = X + 1e-3 * (run * calls + call + 1)
                began = perf_counter()
                results[name] = action(point)
                seconds[name].append(perf_counter() - began)
    return {name: median(taken) for name, taken in seconds.items()}, results


def race_lines(seconds: dict[str, float], results: dict[str, Array]) -> list[list[str]]:
    """Return one line a method, the first being ours."""
    own = next(iter(seconds))
    reference, lines = np.ravel(results[own]), []
    for name, taken in seconds.items():
        error = np.linalg.norm(np.ravel(results[name]) - reference) / np.linalg.norm(reference)
        note = "PEER WINS" if taken < seconds[own] else ""
        agreement = "" if name == own else f"{error:.0e}"
        lines.append([name, f"{taken:.4g}", f"{taken / seconds[own]:.1f}", agreement, note])
    return lines


RACE_HEADER = ["method", "seconds", "times attnfit", "rel. difference", "note"]


def hessian_race(size: tuple[int, int], runs: int) -> str:
    """Time the full Hessian."""
    W, V, B, X = instance(*size)
    names = available(list(HESSIANS))
    seconds, results = times({name: HESSIANS[name](W, V, B) for name in names}, X, runs)
    absent = "" if find_spec("jax") else "JAX is not installed: no race against it.\n\n"
    title = f"## full Hessian, n = {size[0]}, d = {size[1]}, median of {runs}"
    return f"{title}\n\n{absent}" + table(RACE_HEADER, race_lines(seconds, results))


def product_race(size: tuple[int, int], runs: int) -> str:
    """Time the gradient and a product with the Hessian, forward pass included."""
    import torch
    from torch.func import grad, jvp

    W, V, B, X = instance(*size)
    v = np.random.default_rng(1).standard_normal(X.shape)
    problem, loss, direction = problems.LayerInversion(W, V, B), torch_loss(W, V, B), torch.from_numpy(v)
    slope = grad(loss)

    def torch_gradient(point: Array) -> Array:
        x = torch.from_numpy(point).requires_grad_()
        return torch.autograd.grad(loss(x), x)[0].numpy()

    gradients: dict[str, Action] = {"attnfit": problem.gradient, "torch.autograd.grad": torch_gradient}
    products: dict[str, Action] = {
        "attnfit": lambda point: problem.hvp(point, v),
        "torch.autograd.functional.hvp": lambda point: torch.autograd.functional.hvp(
            loss, torch.from_numpy(point), direction
        )[1].numpy(),
        "torch.autograd.functional.vhp": lambda point: torch.autograd.functional.vhp(
            loss, torch.from_numpy(point), direction
        )[1].numpy(),
        "torch jvp(grad)": lambda point: jvp(slope, (torch.from_numpy(point),), (direction,))[1].numpy(),
    }
    if find_spec("jax"):
        import jax

        other = jax_loss(W, V, B)
        by_jax, forward = jax.jit(jax.grad(other)), jax.jit(lambda x: jax.jvp(jax.grad(other), (x,), (v,))[1])
        gradients["jax.jit(jax.grad)"] = lambda point: np.asarray(by_jax(point))
        products["jax.jit(jvp(grad))"] = lambda point: np.asarray(forward(point))
    title = f"## {{}}, n = {size[0]}, d = {size[1]}, median of {5 * runs} turns of {CALLS} calls\n\n"
    found, alone = [], "its matrix products alone, nothing between them"
    for name, own, actions in (("gradient", 8, gradients), ("product with the Hessian", 17, products)):
        seconds, results = times(actions | {alone: matrix_products(W, V, B, v, own)}, X, 5 * runs, CALLS)
        floor = f"The {own} matrix products of attnfit, nothing between them: {seconds.pop(alone):.4g} s."
        results.pop(alone)
        found += [title.format(name) + table(RACE_HEADER, race_lines(seconds, results)), floor]
    return "\n\n".join(found)


def matrix_products(W: Array, V: Array, B: Array, v: Array, count: int) -> Action:
    """Return the matrix products that a gradient (8) or a product with the Hessian (17) takes."""
    n, d = B.shape
    maps, D = np.concatenate([W, W.T, V], axis=1), np.ascontiguousarray(v.T)
    P, double = np.full((n, n), 1.0 / n), np.concatenate([D, D], axis=1)

    def products(X: Array) -> Any:
        T = np.ascontiguousarray(X.T)
        mapped = T @ maps
        R, Q, H = mapped[:, :d], mapped[:, d : 2 * d], mapped[:, 2 * d :]
        done = [R @ T.T, P @ H, B @ H.T, B @ V.T]
        if count == 8:
            return [*done, P @ Q, P.T @ R, P.T @ B]
        moved = D @ maps
        done += [moved, double @ double.T, P @ H, P @ moved[:, 2 * d :], double @ double.T, B @ V.T]
        DM, DMt = moved[:, :d], moved[:, d : 2 * d]
        return [*done, P @ Q, P @ DMt, P.T @ R, P.T @ DM, P.T @ B, P.T @ H]

    return products


def memory() -> str:
    """Peak memory of one Hessian in a fresh process, over the size of the output."""
    lines = []
    for name in available(list(HESSIANS)):
        command = [sys.executable, "-m", "benchmarks.inversion", "--peak", name]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        lines.append([name, done.stdout.strip()])
    n, d = HESSIAN_SIZE
    title = f"## peak memory of a Hessian, n = {n}, d = {d}: output {8 * (n * d) ** 2 / 1e6:.0f} MB"
    return f"{title}\n\n" + table(["method", "peak over output"], lines)


def peak_share(name: str, size: tuple[int, int]) -> str:
    """Return how much memory a Hessian takes, output included, in units of the output."""
    small = instance(4, 3)
    HESSIANS[name](*small[:3])(small[3])
    W, V, B, X = instance(*size)
    action = HESSIANS[name](W, V, B)
    before = resident("VmRSS")
    reset_peak()
    result = action(X)
    return f"{(resident('VmHWM') - before) / result.nbytes:.1f}"


def large() -> str:
    """Recover 2048 unknowns."""
    n, d = LARGE_SIZE
    lines = []
    for setting, rows in (("self-dominant", 0), ("two outputs", 0), ("base", 5000)):
        planted = plant(n, d, 1.0, 0, n_vocabulary=rows or 1000, **SETTINGS[setting])
        began = perf_counter()
        found = recover(
            planted.layer,
            vocabulary=planted.vocabulary if rows else None,
            n_starts=None if rows else 2,
            random_state=0,
        )
        seconds = perf_counter() - began
        cells = [f"{seconds:.3g}", f"{planted.error(found.x):.0e}", f"{found.residual:.0e}", found.verdict]
        lines.append([setting + (f", vocabulary of {rows}" if rows else ""), *cells])
    title = f"## n = {n}, d = {d}: {n * d} unknowns, logit std 1, at most two starts (30 with a vocabulary)"
    return f"{title}\n\n" + table(["setting", "seconds", "error", "residual", "verdict"], lines)


if __name__ == "__main__":
    main()

"""Inversion of attention layers against automatic derivatives and general optimisers:
``python -m benchmarks.inversion``."""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from statistics import median
from time import perf_counter, sleep
from typing import Any

import numpy as np
from scipy import optimize
from sklearn.exceptions import ConvergenceWarning
from threadpoolctl import threadpool_limits

from attnfit import problems
from attnfit.inversion import recover
from benchmarks.report import table, write
from benchmarks.worker import reset_peak, resident
from experiments.planted import RECOVERED, SETTINGS, Planted, plant

Array = Any
Action = Callable[[Array], Array]

HESSIAN_SIZE, PRODUCT_SIZE, RECOVERY_SIZE, LARGE_SIZE = (64, 32), (256, 64), (16, 8), (128, 16)
CHUNK = 128
# Settings and logit scales; where as many numbers are given as sought, a vocabulary of 1000 rows as well.
CASES = (
    ("self-dominant", 1.0),
    ("two outputs", 1.0),
    ("half known", 1.0),
    ("3/4 known", 1.0),
    ("base", 0.3),
    ("base", 1.0),
    ("base", 3.0),
)
# A relative squared residual that ends a peer's restarts.
ZERO = 1e-18
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


# ---- recovery


def torch_residuals(planted: Planted) -> Callable[[Any], Any]:
    """Return x -> output - B, relative to B, with the known tokens in place."""
    import torch

    layer = planted.layer
    heads = [(torch.from_numpy(head.M), torch.from_numpy(head.V)) for head in layer.layer.heads]
    B, size = torch.from_numpy(layer.B), float(np.linalg.norm(layer.B))
    given = torch.from_numpy(np.nan_to_num(layer.known.T))
    place = torch.from_numpy(np.eye(layer.n)[:, layer.unknown])

    def residuals(x: Any) -> Any:
        T = given + place @ x.reshape(layer.shape).T
        return (sum(torch.softmax(T @ M @ T.T, 1) @ (T @ V) for M, V in heads) - B) / size

    return residuals


def least_squares(planted: Planted, rng: np.random.Generator, limit: float) -> Array:
    """Run scipy's MINPACK with our Jacobian from up to ten Gaussian starts."""
    layer, began = planted.layer, perf_counter()
    best, least = np.zeros(layer.n_unknowns), np.inf
    for _ in range(10):
        done = optimize.least_squares(
            lambda x: layer.residuals(x).reshape(-1), rng.standard_normal(layer.n_unknowns), layer.jacobian,
            method="lm", xtol=1e-15, ftol=1e-15, gtol=1e-15, max_nfev=300,
        )  # fmt: skip
        if done.cost < least:
            best, least = done.x, done.cost
        if 2.0 * least <= ZERO * np.sum(layer.B**2) or perf_counter() - began > limit:
            break
    return best


def torch_lbfgs(planted: Planted, rng: np.random.Generator, limit: float) -> Array:
    """Run torch's L-BFGS with its strong Wolfe line search from up to ten Gaussian starts."""
    import torch

    residuals, began = torch_residuals(planted), perf_counter()
    best, least = np.zeros(planted.layer.n_unknowns), np.inf
    for _ in range(10):
        x = torch.from_numpy(rng.standard_normal(planted.layer.n_unknowns)).requires_grad_()
        optimiser = torch.optim.LBFGS(
            [x], max_iter=2000, tolerance_grad=1e-14, tolerance_change=0.0, history_size=20,
            line_search_fn="strong_wolfe",
        )  # fmt: skip

        def closure(x: Any = x, optimiser: Any = optimiser) -> Any:
            optimiser.zero_grad()
            loss = 0.5 * (residuals(x) ** 2).sum()
            loss.backward()
            return loss

        optimiser.step(closure)
        value = closure().item()
        if value < least:
            best, least = x.detach().numpy().copy(), value
        if 2.0 * least <= ZERO or perf_counter() - began > limit:
            break
    return best


def torch_adam(planted: Planted, rng: np.random.Generator, limit: float) -> Array:
    """Run 10,000 steps of Adam from a Gaussian start: rate 0.02, a tenth of it in the last 2,000."""
    import torch

    residuals = torch_residuals(planted)
    x = torch.from_numpy(rng.standard_normal(planted.layer.n_unknowns)).requires_grad_()
    optimiser = torch.optim.Adam([x], lr=0.02)
    for step in range(10_000):
        if step == 8_000:
            optimiser.param_groups[0]["lr"] = 0.002
        optimiser.zero_grad()
        (residuals(x) ** 2).sum().backward()
        optimiser.step()
    return x.detach().numpy()


PEERS = {
    "scipy least_squares (MINPACK)": least_squares,
    "torch L-BFGS": torch_lbfgs,
    "torch Adam": torch_adam,
}


@dataclass
class Tally:
    """What one solver made of the instances of a setting."""

    name: str
    hits: list[bool] = field(default_factory=list)
    elsewhere: int = 0
    verdicts: list[str] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def add(self, hit: bool, zero: bool, seconds: float, verdict: str = "-") -> None:
        """Count one instance."""
        self.hits.append(hit)
        self.elsewhere += zero and not hit
        self.seconds.append(seconds)
        self.verdicts.append(verdict)

    def cells(self, own: Tally | None = None) -> list[str]:
        """Return the line of the table; given ours, say whether this peer wins."""
        false = sum(v == "recovered" and not hit for v, hit in zip(self.verdicts, self.hits, strict=True))
        said = [self.verdicts.count("recovered"), false, self.verdicts.count("ambiguous")]
        cells = [self.name, f"{sum(self.hits)} of {len(self.hits)}", str(self.elsewhere)]
        cells += map(str, said) if own is None else ["-", "-", "-"]
        cells += [f"{median(self.seconds):.2g}", f"{max(self.seconds):.2g}"]
        if own is None:
            return [*cells, ""]
        as_many = np.mean(self.hits) >= np.mean(own.hits[: len(self.hits)]) > 0.0
        return [*cells, "PEER WINS" if as_many and median(self.seconds) < median(own.seconds) else ""]


RECOVERY_HEADER = [
    "setting", "logit std", "solver", "recovered", "zero residual elsewhere", "verdict recovered",
    "falsely so", "ambiguous", "median s", "largest s", "note",
]  # fmt: skip


def recovery(options: argparse.Namespace) -> str:
    """Count the planted inputs that come back, and the verdicts."""
    n, d = RECOVERY_SIZE
    lines = []
    for setting, scale in CASES:
        drawn = [plant(n, d, scale, 100 + k, **SETTINGS[setting]) for k in range(options.instances)]
        own = own_tally("attnfit", drawn, vocabulary=False)
        lines.append([setting, f"{scale:g}", *own.cells()])
        if setting == "base":
            lines.append(["", "", *own_tally("attnfit, vocabulary", drawn, vocabulary=True).cells()])
        for name, peer in PEERS.items():
            few = drawn if peer is least_squares else drawn[: options.peers]
            tally = peer_tally(name, peer, few, options.limit)
            lines.append(["", "", *tally.cells(own)])
    text = (
        f"Recovered: relative error of the input below {RECOVERED:.0e}. attnfit is `recover` at its "
        "defaults, at most 10 starts, 30 with a vocabulary of 1000 rows. Where there are no more equations "
        "than unknowns it uses all starts to look for other inputs, which its verdict then reports, and the "
        "planted one counts where it is among those found. Its seconds include the Jacobian's spectrum and "
        "the certificate. Peers start from Gaussian tokens of the right size: MINPACK with our Jacobian and "
        "300 evaluations, L-BFGS with 2,000 steps, each up to ten times until a zero residual, with no new "
        f"start after {options.limit:g} s; Adam once, 10,000 steps. Torch takes the first instances only."
    )
    return f"## recovery, n = {n}, d = {d}\n\n{text}\n\n" + table(RECOVERY_HEADER, lines)


def own_tally(name: str, drawn: Sequence[Planted], vocabulary: bool) -> Tally:
    """Run `recover`."""
    tally = Tally(name)
    for seed, planted in enumerate(drawn):
        began = perf_counter()
        rows = planted.vocabulary if vocabulary else None
        found = recover(planted.layer, vocabulary=rows, random_state=seed)
        hit = any(planted.error(x) < RECOVERED for x in found.inputs)
        tally.add(hit, bool(found.inputs), perf_counter() - began, found.verdict)
    return tally


def peer_tally(name: str, peer: Callable[..., Array], drawn: Sequence[Planted], limit: float) -> Tally:
    """Run a peer."""
    tally = Tally(name)
    for seed, planted in enumerate(drawn):
        began = perf_counter()
        x = peer(planted, np.random.default_rng(seed), limit)
        seconds = perf_counter() - began
        tally.add(planted.error(x) < RECOVERED, planted.residual(x) ** 2 <= ZERO, seconds)
    return tally


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

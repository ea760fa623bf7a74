"""How often planted inputs of a layer are found, against solvers of residuals."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
from scipy import optimize

from attnfit.inversion import recover
from benchmarks.report import table
from experiments.planted import RECOVERED, SETTINGS, Planted, plant

Array = Any

SIZE = (16, 8)
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
    n, d = SIZE
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

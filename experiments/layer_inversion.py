"""Which inputs of an attention layer come back from its output:
``python -m experiments.layer_inversion [--quick]``.

Three questions: the share of planted inputs that each solver recovers, by setting, size and scale of the
logits; the same by the share of known tokens; and how far a regulariser moves the minimum from the input.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
from sklearn.exceptions import ConvergenceWarning
from threadpoolctl import threadpool_limits

from attnfit import minimize
from attnfit.inversion import recover
from attnfit.solvers import GradientDescent, LevenbergMarquardt, Newton, Result
from benchmarks.report import table, write
from experiments.planted import RECOVERED, SETTINGS, Planted, plant

Array = Any
Solver = Callable[[Planted, int], Array]

# Instances of each size, and those of the baselines.
INSTANCES = {(8, 4): 10, (8, 8): 10, (16, 8): 8, (32, 8): 4, (32, 16): 2}
BASELINE_INSTANCES = {(8, 4): 4, (8, 8): 4, (16, 8): 4, (32, 8): 2, (32, 16): 1}
SCALES = (0.3, 1.0, 3.0)
# A relative squared residual up to this is zero.
ZERO = 1e-18
CONTINUATION = tuple(10.0**-k for k in range(9))
SMALL_GAMMA = 1e-8
GAMMAS = (100.0, 1.0, 1e-2, 1e-4, 1e-6, 1e-8, 1e-10)
BIAS_SETTINGS = ("base", "self-dominant", "two outputs")
MAP_SCALES = (0.1, 0.3, 1.0, 2.0, 3.0)
MAP_KNOWN = (0.0, 0.25, 0.5, 0.75)
SECTIONS = ("table", "map", "bias")
PICTURES = Path(__file__).parent.parent / "docs"


def main() -> None:
    """Write the tables and the pictures."""
    parser = argparse.ArgumentParser(prog="python -m experiments.layer_inversion", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="two instances of small sizes (under a minute)")
    parser.add_argument("--only", choices=SECTIONS, help="one section")
    options = parser.parse_args()
    command = shlex.join(["python", "-m", "experiments.layer_inversion", *sys.argv[1:]])
    name = "layer-inversion" + ("-quick" if options.quick else "")
    name += f"-{options.only}" if options.only else ""
    began, sections = perf_counter(), []
    with threadpool_limits(1), warnings.catch_warnings():
        # Failing to converge is what is counted here.
        warnings.simplefilter("ignore", ConvergenceWarning)
        for section in report(options.quick, options.only):
            print(section + "\n", flush=True)
            sections.append(section)
            write(name, command, [*sections, f"One thread, {perf_counter() - began:.0f} s."])


def report(quick: bool, only: str | None) -> Iterator[str]:
    """Yield one section a question."""
    instances = {(8, 4): 2, (16, 8): 2} if quick else INSTANCES
    if only in (None, "bias"):
        yield bias_section(range(2 if quick else 6))
    if only in (None, "map"):
        yield map_section(range(1 if quick else 8), picture=not quick)
        if not quick:
            draw_progress(PICTURES / "inversion-progress.png")
    if only in (None, "table"):
        yield from success_sections(list(SETTINGS), instances, SCALES[1:2] if quick else SCALES)


# ---- which solver recovers what


@dataclass(frozen=True)
class Attempt:
    """One solver on one instance."""

    error: float
    zero: bool
    seconds: float

    @property
    def recovered(self) -> bool:
        """Whether the planted input came back."""
        return self.error < RECOVERED


def one_start(planted: Planted, seed: int) -> Array:
    """Levenberg-Marquardt from ``B V^+``."""
    layer = planted.layer
    return minimize(layer, layer.initial_point(), LevenbergMarquardt(), max_iter=300).x


def restarts(planted: Planted, seed: int) -> Array:
    """Levenberg-Marquardt from ``B V^+``, from moments and from 8 Gaussian starts, up to the first zero."""
    return minimize(planted.layer, solver=LevenbergMarquardt(n_restarts=8), random_state=seed).x


def in_vocabulary(planted: Planted, seed: int) -> Array:
    """Decode the rows of the vocabulary that give the output."""
    return recover(planted.layer, vocabulary=planted.vocabulary, random_state=seed).x


def continuation(planted: Planted, seed: int) -> Array:
    """Levenberg-Marquardt through falling gammas, from ``B V^+`` and from moments."""
    return minimize(planted.layer, solver=LevenbergMarquardt(0, CONTINUATION), random_state=seed).x


def newton_exact(planted: Planted, seed: int) -> Array:
    """Newton's method with a small gamma from ``B V^+``."""
    layer = planted.layer.with_gamma(SMALL_GAMMA)
    return minimize(layer, layer.initial_point(), Newton(hessian="exact")).x


def newton_sampled(planted: Planted, seed: int) -> Array:
    """Newton's method on half of the residuals from ``B V^+``."""
    layer = planted.layer
    return minimize(layer, layer.initial_point(), Newton(hessian="sampled"), random_state=seed).x


def gradient_descent(planted: Planted, seed: int) -> Array:
    """Descend along the gradient from ``B V^+``, a thousand steps."""
    layer = planted.layer
    return minimize(layer, layer.initial_point(), GradientDescent(), max_iter=1000).x


SOLVERS: dict[str, Solver] = {
    "LM, 1 start": one_start,
    "LM, 10 starts": restarts,
    "vocabulary": in_vocabulary,
}
BASELINES: dict[str, Solver] = {
    "LM, continuation": continuation,
    "Newton, gamma": newton_exact,
    "Newton, sampled": newton_sampled,
    "gradient descent": gradient_descent,
}


def attempt(solver: Solver, planted: Planted, seed: int) -> Attempt:
    """Run a solver and judge its answer by the planted tokens."""
    began = perf_counter()
    x = solver(planted, seed)
    seconds = perf_counter() - began
    return Attempt(planted.error(x), planted.residual(x) ** 2 <= ZERO, seconds)


def success_sections(
    settings: Sequence[str], instances: dict[tuple[int, int], int], scales: Sequence[float]
) -> Iterator[str]:
    """Yield a table of shares for each scale, then one of seconds."""
    header = ["setting", "n, d", "instances", *SOLVERS, *BASELINES]
    seconds: dict[tuple[int, int], dict[str, list[float]]] = {}
    for scale in scales:
        lines = []
        for setting in settings:
            for (n, d), count in instances.items():
                cells = []
                for name, solver in (SOLVERS | BASELINES).items():
                    few = min(count, BASELINE_INSTANCES[n, d]) if name in BASELINES else count
                    attempts = [
                        attempt(solver, plant(n, d, scale, seed, **SETTINGS[setting]), seed)
                        for seed in range(few)
                    ]
                    cells.append(share(attempts))
                    timed = seconds.setdefault((n, d), {}).setdefault(name, [])
                    timed += [one.seconds for one in attempts]
                lines.append([setting, f"{n}, {d}", str(count), *cells])
                print(f"logit std {scale:g}: " + ", ".join(lines[-1]), file=sys.stderr, flush=True)
        legend = f"{LEGEND}\n\n" if scale == scales[0] else ""
        yield f"## logits of standard deviation {scale:g}\n\n{legend}{table(header, lines)}"
    rows = [
        [f"{n}, {d}", *(f"{median(times):.2g} / {max(times):.2g}" for times in timed.values())]
        for (n, d), timed in seconds.items()
    ]
    yield "## seconds, median / largest\n\n" + table(["n, d", *SOLVERS, *BASELINES], rows)


LEGEND = (
    f"Share of planted inputs recovered to a relative error of {RECOVERED:.0e}; after a plus, the share that "
    "ended at a zero residual (square at most 1e-18 of that of B) elsewhere: at another input, or, where the "
    "Jacobian is nearly singular as in the causal setting, where the output tells no difference. LM is "
    "Levenberg-Marquardt: one start is B V^+ with 300 steps; 10 starts are B V^+, moments and 8 Gaussian, "
    "100 steps each, up to the first zero; continuation is gamma = 1, 0.1, ..., 1e-8, 20 steps each, then 0, "
    "from B V^+ and moments. The vocabulary has 1000 rows. From B V^+, 100 steps: Newton's method with gamma "
    "= 1e-8, or without on half of the residuals; gradient descent has 1000 steps. The last four ran on the "
    "first 4 instances (2 of 32, 8; 1 of 32, 16)."
)


def share(attempts: Sequence[Attempt]) -> str:
    """Return the share recovered, and that of zero residuals elsewhere."""
    hit = np.mean([one.recovered for one in attempts])
    other = np.mean([one.zero and not one.recovered for one in attempts])
    return f"{hit:.2f}" + (f" + {other:.2f}" if other else "")


# ---- a small residual is no recovery


def draw_progress(path: Path, n: int = 16, d: int = 8) -> None:
    """Draw residual and error of the first instances whose descent ends at the input, and elsewhere."""
    from matplotlib.figure import Figure

    from attnfit.plots import inversion_progress

    figure = Figure(figsize=(9.0, 3.6), layout="constrained", dpi=100)
    for ax, hit in zip(figure.subplots(1, 2, sharey=True), (True, False), strict=True):
        result, errors = next(
            (result, errors)
            for result, errors in (descent(plant(n, d, 0.3, seed)) for seed in range(100))
            if result.value <= ZERO and (errors[-1] < RECOVERED) == hit
        )
        inversion_progress(result, errors, ax=ax)
        ax.set_title("the input" if hit else "another input with the same output", loc="left")
    figure.savefig(path)


def descent(planted: Planted) -> tuple[Result, list[float]]:
    """Return a descent from moments, and the error of the input at each of its records."""
    layer, solver = planted.layer, LevenbergMarquardt()
    start = layer.starts(np.random.default_rng(0))["moments"]
    result = minimize(layer, start, solver)
    zero = 0.5 * ZERO * np.sum(layer.B**2)
    # A record holds no point: the same descent, ended early, does. From the first zero it goes to the end.
    errors = [
        planted.error(minimize(layer, start, solver, max_iter=record.iteration).x)
        if record.value > zero
        else np.nan
        for record in result.history
    ]
    return result, [*errors[:-1], planted.error(result.x)]


# ---- how many tokens must be known


def map_section(seeds: Sequence[int], picture: bool, n: int = 16, d: int = 8) -> str:
    """Return the share recovered by scale of the logits and share of known tokens."""
    shares = np.array(
        [
            [
                np.mean([attempt(restarts, plant(n, d, s, k, known=known), k).recovered for k in seeds])
                for s in MAP_SCALES
            ]
            for known in MAP_KNOWN
        ]
    )
    if picture:
        from attnfit.plots import success_map

        success_map(MAP_SCALES, MAP_KNOWN, shares).savefig(PICTURES / "inversion-success.png", dpi=100)
    rows = [
        [f"{known:.0%}", *(f"{value:.2f}" for value in line)]
        for known, line in zip(MAP_KNOWN, shares, strict=True)
    ]
    title = f"## share recovered by known tokens, n = {n}, d = {d}, {len(seeds)} instances, LM with 10 starts"
    return f"{title}\n\n" + table(["known", *(f"logit std {s:g}" for s in MAP_SCALES)], rows)


# ---- what a regulariser does to the data


def bias_section(seeds: Sequence[int], n: int = 16, d: int = 8) -> str:
    """Return how far the minimum with a regulariser is from the input that it is started at."""
    gammas: dict[str, Callable[[Planted], float]] = {"72 n d R^8": papers_gamma}
    gammas |= {f"{gamma:g}": lambda _, gamma=gamma: gamma for gamma in GAMMAS}
    rows = []
    for name, gamma_of in gammas.items():
        cells = []
        for setting in BIAS_SETTINGS:
            layers = [plant(n, d, 1.0, seed, **SETTINGS[setting]) for seed in seeds]
            errors = [bias(planted, gamma_of(planted)) for planted in layers]
            cells.append(f"{min(errors):.1e} to {max(errors):.1e}")
        rows.append([name, *cells])
    title = f"## relative error of the regularised minimum, n = {n}, d = {d}, {len(seeds)} instances"
    text = (
        "Levenberg-Marquardt from the planted input itself, whose residual is zero; logits of standard "
        "deviation 1. 72 n d R^8 is the gamma that makes the loss convex (R bounds the spectral norms of "
        "tokens and weights): about 1e10 here."
    )
    return f"{title}\n\n{text}\n\n" + table(["gamma", *BIAS_SETTINGS], rows)


def papers_gamma(planted: Planted) -> float:
    """Return 72 n d R^8."""
    parts = [planted.truth, *(part for head in planted.layer.layer.heads for part in (head.M, head.V))]
    R = max(np.linalg.norm(part, 2) for part in parts)
    return float(72 * planted.layer.n * planted.layer.d * R**8)


def bias(planted: Planted, gamma: float) -> float:
    """Return the relative error of the minimum that is reached from the planted input."""
    layer = planted.layer.with_gamma(gamma)
    return planted.error(minimize(layer, planted.truth, LevenbergMarquardt(), tol=1e-10, max_iter=1000).x)


if __name__ == "__main__":
    main()

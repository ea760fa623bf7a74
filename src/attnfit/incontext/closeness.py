"""How close k steps of attention are to k gradient steps: softmax, matrix and rescaled problems."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attnfit.incontext.families import DAMPINGS, STEP_SIZES, Family, Link, draw
from attnfit.incontext.trained_layers import TrainedLayers, train

Array = NDArray[np.float64]

# What counts as close, of the median instance: and by how much nearer than another instance's shift.
CLOSE = 0.95
NEARER = 0.5
SMALL_STEP = 1e-4
FLOOR_STEPS = 40
RESAMPLES = 1000
GRADIENT, NEWTON, DATA, SIDES = "gradient", "Gauss-Newton", "data step", "data step, queries and keys"
RAW, PROJECTED = "trained layers", "trained layers, projected"


@dataclass(frozen=True)
class Steps:
    """One kind of move, repeated.

    Attributes
    ----------
    losses : ndarray, shape (depth, count)
        After each step, relative to before the first.
    cosines : ndarray, shape (depth, count)
        Of the total shift with that of as many gradient steps.
    from_there : ndarray, shape (depth, count)
        Of the shift by one step with that of a gradient step, both from where the gradient steps before
        it led.
    """

    losses: Array
    cosines: Array
    from_there: Array


@dataclass(frozen=True)
class Closeness:
    """What was measured for one kind of problem; the relative error with the best factor is
    ``sqrt(1 - cosine^2)``.

    Attributes
    ----------
    link : str
    shape : tuple of int
    steps : dict of Steps
        By kind of move.
    small : dict of ndarray, shape (count,)
        Cosines of the shifts by a data step and by a gradient step, both of size 1e-4.
    floor : ndarray, shape (count,)
        Loss after 40 Gauss-Newton steps: what no x goes below.
    nulls : dict of ndarray, shape (count,)
        Cosines with the first gradient step of what says nothing: the absolute ones of another instance's
        shift and of a random one; and, for each k, those of the total shift with the shift to the optimum.
    beside_newton : ndarray, shape (count,)
        Cosine of the first trained layer's shift with that of a Gauss-Newton step.
    in_span : ndarray, shape (count,)
        Share of the first trained layer's move, by length, that some x makes.
    """

    link: Link
    shape: tuple[int, ...]
    steps: dict[str, Steps]
    small: dict[str, Array]
    floor: Array
    nulls: dict[str, Array]
    beside_newton: Array | None
    in_span: Array | None

    @property
    def close(self) -> dict[str, bool]:
        """For each move but the gradient's, whether its first step is close to the gradient's: median cosine
        at least 0.95, and a relative error of at most half that of another instance's shift.
        """
        null = _error(self.nulls["another instance"])
        found = {name: steps.cosines[0] for name, steps in self.steps.items() if name != GRADIENT}
        return {n: bool(np.median(c) >= CLOSE and _error(c) <= NEARER * null) for n, c in found.items()}

    def as_json(self) -> dict[str, Any]:
        """Return medians with their 95 % bootstrap intervals."""
        steps = {
            name: {
                "loss": [summary(row) for row in one.losses],
                "cosine": [summary(row) for row in one.cosines],
                "cosine_from_there": [summary(row) for row in one.from_there],
            }
            for name, one in self.steps.items()
        }
        found: dict[str, Any] = {"link": self.link, "shape": list(self.shape), "steps": steps}
        found |= {"small_steps": {name: summary(row) for name, row in self.small.items()}}
        found |= {"floor": summary(self.floor), "nulls": {n: summary(row) for n, row in self.nulls.items()}}
        for name, row in (("beside_newton", self.beside_newton), ("in_span", self.in_span)):
            if row is not None:
                found[name] = summary(row)
        return found | {"close": self.close}


def compare(
    link: Link,
    shape: Sequence[int],
    *,
    depth: int = 4,
    count: int = 200,
    n_training: int = 4000,
    n_epochs: int = 8,
    random_state: int = 0,
) -> Closeness:
    """Compare k gradient steps with k Gauss-Newton steps, k steps on the data and k trained attention layers,
    on held-out instances.

    Parameters
    ----------
    link : {"softmax", "exp", "cosh", "sinh"}
        Normalised, or rescaled with this function.
    shape : (n, d), or (n1, n2, d1, d2) for a matrix problem
    depth : int
        Steps, and layers.
    count : int
        Held-out instances.
    n_training, n_epochs : int
        Of the layers; without epochs none are trained.
    random_state : int

    Returns
    -------
    Closeness

    Notes
    -----
    "In-Context Learning for Attention Scheme: from Single Softmax Regression to Multiple Softmax Regression
    via a Tensor Trick", Section 2, and "An Iterative Algorithm for Rescaled Hyperbolic Functions Regression",
    Corollary 11.2, bound either shift and call the updates similar. For several steps a total cosine near 1
    proves nothing: all methods approach the same optimum, as does its own null here.
    """
    rng = np.random.default_rng(random_state)
    trained = None
    if n_epochs:
        trained = train(draw(link, n_training, shape, rng), depth, n_epochs, random_state)
    return compare_on(draw(link, count, shape, rng), depth, trained, random_state)


def compare_on(
    family: Family, depth: int = 4, trained: TrainedLayers | None = None, random_state: int = 0
) -> Closeness:
    """Compare on given instances, with trained layers or without: see `compare`."""
    moves: dict[str, Callable[[Family, int], Array]] = {
        GRADIENT: lambda at, k: at.best(at.gradient_move, STEP_SIZES),
        NEWTON: lambda at, k: at.best(at.damped_move, DAMPINGS),
        DATA: lambda at, k: at.best(at.data_move, STEP_SIZES),
    }
    if family.sides is not None:
        moves[SIDES] = lambda at, k: at.best(at.sides_move, STEP_SIZES)
    if trained is not None:
        moves[RAW] = trained.move
        moves[PROJECTED] = lambda at, k: at.projected(trained.move(at, k))
    path = [family]
    for k in range(depth):
        path.append(path[-1].moved(moves[GRADIENT](path[-1], k)))
    steps = {name: _repeated(path, move) for name, move in moves.items()}
    data_moves = {DATA: family.data_move} | ({} if family.sides is None else {SIDES: family.sides_move})
    small = family.shift(family.gradient_move(SMALL_STEP))
    optimum = family
    for _ in range(FLOOR_STEPS):
        optimum = optimum.moved(optimum.best(optimum.damped_move, DAMPINGS))
    first = family.shift(path[1].z - family.z)
    beside = span = None
    if trained is not None:
        move = trained.move(family, 0)
        beside = cosines(family.shift(moves[NEWTON](family, 0)), family.shift(move))
        span = np.linalg.norm(family.projected(move), axis=(1, 2)) / np.linalg.norm(move, axis=(1, 2))
    return Closeness(
        link=family.link,
        shape=family.rows.shape[2:] if family.sides is None else _matrix_shape(family),
        steps=steps,
        small={name: cosines(small, family.shift(move(SMALL_STEP))) for name, move in data_moves.items()},
        floor=optimum.loss() / family.loss(),
        nulls=_nulls(family, path, optimum, first, random_state),
        beside_newton=beside,
        in_span=span,
    )


def _repeated(path: list[Family], move: Callable[[Family, int], Array]) -> Steps:
    """Take as many steps as the path of the gradient has, and compare."""
    start = at = path[0]
    losses, totals, alone = [], [], []
    for k, there in enumerate(path[:-1]):
        at = at.moved(move(at, k))
        losses.append(at.loss() / start.loss())
        totals.append(cosines(start.shift(path[k + 1].z - start.z), start.shift(at.z - start.z)))
        alone.append(cosines(there.shift(path[k + 1].z - there.z), there.shift(move(there, k))))
    return Steps(np.array(losses), np.array(totals), np.array(alone))


def _nulls(
    family: Family, path: list[Family], optimum: Family, first: Array, random_state: int
) -> dict[str, Array]:
    """Return the cosines of shifts that say nothing."""
    noise = np.random.default_rng(random_state).standard_normal(first.shape)
    # A shift of a softmax sums to zero.
    noise -= noise.mean(axis=2, keepdims=True)
    nulls = {
        "another instance": np.abs(cosines(first, np.roll(first, 1, axis=0))),
        "random": np.abs(cosines(first, noise)),
    }
    to_optimum = family.shift(optimum.z - family.z)
    for k, there in enumerate(path[1:], 1):
        nulls[f"the optimum, after {k}"] = cosines(family.shift(there.z - family.z), to_optimum)
    return nulls


def _matrix_shape(family: Family) -> tuple[int, ...]:
    assert family.sides is not None
    A1, A2 = family.sides
    return (A1.shape[1], A2.shape[1], A1.shape[2], A2.shape[2])


def _error(values: Array) -> float:
    """Return the relative error that the median cosine leaves with the best factor."""
    return float(np.sqrt(max(0.0, 1.0 - float(np.median(values)) ** 2)))


def cosines(one: Array, other: Array) -> Array:
    """Return the cosine of two shifts of every instance; zero where one of them is zero."""
    flat = [_unit(shift.reshape(len(shift), -1)) for shift in (one, other)]
    return np.asarray(np.sum(flat[0] * flat[1], axis=1))


def _unit(rows: Array) -> Array:
    """Return rows of length one; those of rescaled problems may be too large to be squared."""
    tiny = np.finfo(float).tiny
    rows = rows / np.maximum(np.abs(rows).max(axis=1, keepdims=True), tiny)
    return np.asarray(rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), tiny))


def summary(values: Array) -> list[float]:
    """Return the median, a 95 % bootstrap interval for it, and the quantiles 5 and 95 %."""
    rng = np.random.default_rng(0)
    draws = np.median(values[rng.integers(len(values), size=(RESAMPLES, len(values)))], axis=1)
    numbers = [np.median(values), *np.quantile(draws, [0.025, 0.975]), *np.quantile(values, [0.05, 0.95])]
    return [float(number) for number in numbers]

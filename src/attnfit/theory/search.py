"""The worst ratio of a bound: random instances, and ascent from the best of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attnfit.theory.bound import AnyBound, Check
from attnfit.theory.bounds.assumptions import EXP
from attnfit.theory.instances.sampling import (
    KINDS,
    AnyInstance,
    Arrays,
    FactFamily,
    Family,
    Layered,
    Recoveries,
    Regressions,
    Steps,
)  # fmt: skip
from attnfit.theory.table import table

Array = NDArray[np.float64]

# Share of the budget that goes into random instances, and how many of the best are climbed from.
DRAWN = 0.3
CLIMBS = 4
DIFFERENCE = 1e-6
# The score of a left side that is zero: within the assumptions, and nothing to climb from.
LOWEST = -1e300


@dataclass(frozen=True)
class Found:
    """The largest ratio found.

    Attributes
    ----------
    check : Check
    instance : Regression, TwoLayer, Recovery, Step or Facts
        Where it was found; it meets every assumption.
    n_evaluations : int
    """

    check: Check
    instance: AnyInstance
    n_evaluations: int

    @property
    def ratio(self) -> float:
        """Left side over printed right side."""
        return self.check.ratio

    def __str__(self) -> str:
        return f"{self.check}\n  the largest ratio of {self.n_evaluations} instances"


@dataclass(frozen=True)
class _Candidate:
    score: float
    family: Family
    R: float
    arrays: Arrays


def search(id: str, budget: int = 2000, random_state: Any = 0) -> Found:
    """Search for the instance with the largest ratio of left to printed right side.

    Draws small instances that meet the assumptions at several scales, then climbs on the logarithm of the
    ratio by gradients from finite differences, projecting back to the assumptions by scaling.

    Parameters
    ----------
    id : str
        See `attnfit.theory.table`.
    budget : int
        Evaluations of the bound, at least 10.
    random_state : int, Generator or None

    Returns
    -------
    Found
        Never below the counterexample on record.

    Raises
    ------
    KeyError
        If there is no such bound; the message lists close matches.
    ValueError
        If the budget is below 10, or too small to find an instance that meets the assumptions.

    Examples
    --------
    >>> from attnfit import theory
    >>> bool(theory.search("TT-10.3", budget=100).ratio > 2)
    True
    """
    bound = table()[id]
    if budget < 10:
        raise ValueError(f"budget is {budget}; allow at least 10 evaluations")
    rng = np.random.default_rng(random_state)
    settings = list(_settings(bound))
    drawn: list[_Candidate] = []
    for k in range(max(len(settings), int(DRAWN * budget))):
        family, R = settings[k % len(settings)]
        arrays = family.arrays(rng, 10.0 ** rng.uniform(-2.0, 1.0))
        drawn.append(_Candidate(_score(bound, family, R, arrays), family, R, arrays))
        if len(drawn) >= budget:
            break
    drawn.sort(key=lambda candidate: -candidate.score)
    used = len(drawn)
    best = drawn[0]
    starts = drawn[:CLIMBS]
    for k, start in enumerate(starts):
        climbed, cost = _climb(bound, start, (budget - used) // (len(starts) - k))
        used += cost
        best = max(best, climbed, key=lambda candidate: candidate.score)
    instance = best.family.build(best.arrays, best.R)
    found = bound.check(instance)
    if bound.counterexample is not None:
        known = bound.counterexample()
        recorded = bound.check(known)
        if not (best.score > -np.inf and found.ratio >= recorded.ratio):
            found, instance = recorded, known
    elif best.score == -np.inf:
        raise ValueError(
            f"none of {used} instances meets the assumptions of {id} and says something of it; allow a "
            f"larger budget than {budget}"
        )
    return Found(found, instance, used)


def _settings(bound: AnyBound) -> Iterator[tuple[Family, float]]:
    """Yield families of small instances and values of R that suit a bound."""
    kind = KINDS[bound.kind]
    if kind == "regression":
        functions = ("exp",) if EXP in bound.assumptions else ("exp", "cosh", "sinh")
        for R in (0.3, 4.01) if bound.floor == 0.0 else (max(bound.floor, 0.3),):
            for function in functions:
                for n, d, groups in ((4, 2, 1), (4, 1, 2), (9, 2, 3), (1, 1, 1)):
                    yield Regressions(n, d, groups, function), R
    elif kind == "two_layer":
        for activation in ("tanh", None):
            for n, d, m in ((3, 2, 2), (2, 2, 1), (2, 2, 2)):
                yield Layered(n, d, m, activation), max(bound.floor, 1.0)
    elif kind == "recovery":
        for R in (1.05, 3.0):
            yield Recoveries(3, 2), R
    elif kind == "newton":
        for accuracy in (0.01, 0.09):
            for k in (0, 10):
                yield Steps(0, 2, accuracy, k), 1.0
    else:
        for n in (2, 5):
            yield FactFamily(n, 3), 1.0


def _score(bound: AnyBound, family: Family, R: float, arrays: Arrays) -> float:
    """Return the logarithm of the ratio, minus infinity outside the assumptions or where none is tested."""
    result = bound.check(family.build(arrays, R))
    if result.violated or result.verdict in ("not tested", "undefined"):
        return -np.inf
    return max(result.log10_lhs - result.log10_rhs, LOWEST)


def _climb(bound: AnyBound, start: _Candidate, budget: int) -> tuple[_Candidate, int]:
    """Follow normed gradients from finite differences, steps growing on success and shrinking on failure."""
    shapes = {name: array.shape for name, array in start.arrays.items()}
    sizes = {name: max(float(np.abs(array).max()), 1e-12) for name, array in start.arrays.items()}

    def arrays(theta: Array) -> Arrays:
        out, first = {}, 0
        for name, shape in shapes.items():
            count = int(np.prod(shape))
            out[name] = sizes[name] * theta[first : first + count].reshape(shape)
            first += count
        return out

    theta = np.concatenate([array.reshape(-1) / sizes[name] for name, array in start.arrays.items()])
    score, used, rate = start.score, 0, 0.1
    while np.isfinite(score) and score > LOWEST and used + len(theta) + 1 <= budget and rate > 1e-4:
        gradient = np.zeros_like(theta)
        for k in range(len(theta)):
            moved = theta.copy()
            moved[k] += DIFFERENCE
            near = _score(bound, start.family, start.R, arrays(moved))
            gradient[k] = (near - score) / DIFFERENCE if np.isfinite(near) and near > LOWEST else 0.0
        used += len(theta)
        length = float(np.linalg.norm(gradient))
        if length == 0.0:
            break
        while rate > 1e-4 and used < budget:
            trial = theta + rate * np.linalg.norm(theta) * gradient / length
            reached = _score(bound, start.family, start.R, arrays(trial))
            used += 1
            if reached > score:
                theta, score, rate = trial, reached, min(2.0 * rate, 1.0)
                break
            rate *= 0.5
    return _Candidate(score, start.family, start.R, arrays(theta)), used

"""Random problems in every form the library accepts, each with its reference objective."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from attnfit import problems

Array = NDArray[np.float64]

SOFTMAX = [("Softmax", n) for n in ("squared", "cross_entropy", "kl", "linear_cross_entropy", "entropy")]
EXPONENTIAL = [("Exponential", n) for n in ("exp", "cosh", "sinh")]
RESCALED = [("Rescaled", n) for n in ("exp", "cosh", "sinh")]
ALL_LOSSES = SOFTMAX + EXPONENTIAL + RESCALED
COUPLED = SOFTMAX + RESCALED


@dataclass(frozen=True)
class Instance:
    """Data of a problem. ``groups`` is what the user passes, ``ids`` numbers them by first appearance."""

    family: str
    loss: str
    A: Any
    b: Array
    ids: NDArray[np.int64]
    groups: Any = None
    options: dict[str, Any] = field(default_factory=dict)

    def problem(self, **changes: Any) -> Any:
        """Build the problem, with some arguments replaced."""
        arguments = {"A": self.A, "b": self.b, **self.options}
        if self.family != "Exponential":
            arguments["groups"] = self.groups
        arguments["loss" if self.family == "Softmax" else "function"] = self.loss
        return getattr(problems, self.family)(**{**arguments, **changes})

    def objective(self) -> Any:
        """Build the reference."""
        from autodiff import Objective

        options = dict(self.options)
        weights = options.pop("weights", None)
        weights = 1.0 if weights is None else np.asarray(weights)
        if np.ndim(weights) and len(weights) != len(self.b):
            weights = weights[self.ids]
        A = self.A.toarray() if sparse.issparse(self.A) else self.A
        return Objective(self.family, self.loss, A, self.b, self.ids, weights, **options)

    def replace(self, **changes: Any) -> Instance:
        return replace(self, **changes)


def shares(rng: np.random.Generator, ids: NDArray[np.int64], zeros: float = 0.2) -> Array:
    """Targets that sum to one in each group, some of them zero."""
    raw = rng.gamma(1.0, size=len(ids)) * (rng.random(len(ids)) >= zeros) + 1e-12
    return raw / np.bincount(ids, weights=raw)[ids]


def softmax(z: Array, ids: NDArray[np.int64]) -> Array:
    """Softmax within groups."""
    top = np.full(ids.max() + 1, -np.inf)
    np.maximum.at(top, ids, z)
    e = np.exp(z - top[ids])
    return e / np.bincount(ids, weights=e)[ids]


def output(family: str, loss: str, z: Array, ids: NDArray[np.int64]) -> Array:
    """What the model predicts for logits z."""
    if family == "Softmax":
        return softmax(z, ids)
    u = {"exp": np.exp, "cosh": np.cosh, "sinh": np.sinh}[loss](z)
    return u / np.bincount(ids, weights=u)[ids] if family == "Rescaled" else u


def instance(
    family: str,
    loss: str,
    sizes: Any = (5, 3, 4, 6, 2),
    d: int = 3,
    seed: int = 0,
    noise: float = 0.3,
    scale: float = 0.7,
) -> tuple[Instance, Array]:
    """A problem whose target is the model at a point plus noise, and that point."""
    rng = np.random.default_rng(seed)
    ids = np.repeat(np.arange(len(sizes)), sizes)
    A = scale * rng.standard_normal((len(ids), d))
    x = rng.standard_normal(d) / np.sqrt(d)
    fitted = output(family, loss, A @ x, ids)
    b = fitted * np.exp(noise * rng.standard_normal(len(ids)))
    if family == "Softmax":
        b = b / np.bincount(ids, weights=b)[ids]
    groups = None if len(sizes) == 1 or family == "Exponential" else ids
    if family == "Exponential":
        ids = np.zeros_like(ids)
    return Instance(family, loss, A, b, ids, groups), x


def relative(ours: Any, reference: Any) -> float:
    """Error in norm, relative to the reference."""
    ours, reference = np.asarray(ours), np.asarray(reference)
    assert ours.shape == reference.shape
    return float(np.linalg.norm(ours - reference) / max(np.linalg.norm(reference), 1e-300))


def covering(axes, seed):
    """A few settings of all axes in which every pair of values of two axes occurs."""
    rng = np.random.default_rng(seed)
    everything = [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]
    # A setting with the pairs of values in it.
    settings = [(case, set(itertools.combinations(case.items(), 2))) for case in everything]
    rng.shuffle(settings)
    missing = set().union(*(pairs for _, pairs in settings))
    while missing:
        best, pairs = max(settings[:200], key=lambda setting: len(setting[1] & missing))
        if not pairs & missing:
            best, pairs = next(setting for setting in settings if setting[1] & missing)
        missing -= pairs
        rng.shuffle(settings)
        yield best

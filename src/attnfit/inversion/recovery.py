"""Search for every input that gives the output, and judge what was found."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attnfit.inversion.identifiable import Identifiability, identifiable
from attnfit.problems import LayerInversion
from attnfit.solvers.damped import ZERO, DampedFits
from attnfit.solvers.tracking import Tracker

Array = NDArray[np.float64]

# Inputs closer than this, relative to their size, are one.
SAME = 1e-6
# Beyond this condition number of the Jacobian a zero residual in float64 leaves no correct digit to speak of.
WORST_CONDITION = 1e12


@dataclass(frozen=True)
class Recovery:
    """What was found; ``print`` it for a sentence.

    Attributes
    ----------
    verdict : {"recovered", "ambiguous", "not recovered"}
        A small residual alone is never called recovery. "recovered": one zero-residual input was found, all
        directions are identified there, and there are more equations than unknowns, so that another one would
        be a coincidence. "ambiguous": several inputs give this output, or nothing speaks against others.
    message : str
        The same as a sentence, with the reason.
    x : ndarray
        The best input, in the layer's natural shape (unknown tokens as columns).
    residual : float
        ``||output(x) - B||_F / ||B||_F``.
    inputs : list of ndarray
        The distinct zero-residual inputs found.
    n_starts : int
        Descents made.
    identifiability : Identifiability
        At x: counting, rank and condition of the Jacobian, directions that the output does not determine.
    residual_floor : float
        The share of ``||B||_F`` that no input produces: the part outside the row space of the value maps.
    """

    verdict: str
    message: str
    x: Array
    residual: float
    inputs: list[Array]
    n_starts: int
    identifiability: Identifiability
    residual_floor: float

    def __str__(self) -> str:
        return self.message


def recover(
    layer: LayerInversion,
    *,
    n_starts: int = 10,
    max_iter: int = 100,
    random_state: Any = None,
) -> Recovery:
    """Recover the input of an attention layer from its output.

    Levenberg-Marquardt from ``B V^+`` and from Gaussian tokens. Where there are more equations than unknowns,
    it ends at the first zero residual; otherwise all starts are used, to find out whether there are several.

    Parameters
    ----------
    layer : LayerInversion
        With gamma zero, which recovers without bias.
    n_starts : int
        Largest number of starts.
    max_iter : int
        Largest number of steps from each.
    random_state : int, numpy.random.Generator, optional

    Returns
    -------
    Recovery

    Raises
    ------
    ValueError
        If gamma is not zero, or n_starts is not positive.
    """
    if layer.gamma != 0.0:
        raise ValueError(f"layer has gamma={layer.gamma:g}, which draws the tokens to zero; pass gamma=0")
    if n_starts < 1:
        raise ValueError(f"n_starts must be at least 1, not {n_starts!r}")
    best, least, inputs, done = _search(layer, n_starts, max_iter, np.random.default_rng(random_state))
    size = float(np.sum(layer.B**2))
    residual = np.sqrt(least / max(size, np.finfo(float).tiny))
    at = identifiable(layer, best)
    floor = _floor(layer)
    verdict, reason = _judge(at, len(inputs), done, residual, floor)
    shaped = [x.reshape(layer.shape) for x in inputs]
    return Recovery(
        verdict, f"{verdict}: {reason}", best.reshape(layer.shape), float(residual), shaped, done, at, floor
    )


def _search(
    layer: LayerInversion, n_starts: int, max_iter: int, rng: np.random.Generator
) -> tuple[Array, float, list[Array], int]:
    """Return the best point, its squared residual, the distinct zero-residual inputs and the starts used."""
    starts = np.vstack([layer.initial_point().reshape(1, -1), layer.gaussian_starts(n_starts - 1, rng)])
    goal = float(np.linalg.norm(layer.gradient(np.zeros(layer.shape))))
    size = float(np.sum(layer.B**2))
    best, least = starts[0], np.inf
    inputs: list[Array] = []
    done = 0
    for start in starts:
        fit = DampedFits(layer, start[None].copy(), 1e-10, goal, max_iter, Tracker(lambda: 0.0), "recover")
        fit.descend()
        done += 1
        if float(fit.squares[0]) < least:
            best, least = fit.x[0], float(fit.squares[0])
        if fit.squares[0] <= ZERO * size:
            known = (np.linalg.norm(x - fit.x[0]) <= SAME * np.linalg.norm(x) for x in inputs)
            inputs += [] if any(known) else [fit.x[0]]
            if layer.B.size > layer.n_unknowns:
                break
    return best, least, inputs, done


def _floor(layer: LayerInversion) -> float:
    """Return the share of B outside the row space of the value maps."""
    values = np.vstack([head.V for head in layer.layer.heads])
    outside = layer.B - layer.B @ np.linalg.pinv(values) @ values
    return float(np.linalg.norm(outside) / max(float(np.linalg.norm(layer.B)), np.finfo(float).tiny))


def _judge(at: Identifiability, found: int, done: int, residual: float, floor: float) -> tuple[str, str]:
    """Return the verdict and its reason."""
    starts = f"{done} start{'s'[: done > 1]}"
    if not found and floor > 1e-8:
        return "not recovered", (
            f"no input gives this output: a share {floor:.1e} of it lies outside what the value maps produce"
        )
    if not found:
        return "not recovered", (
            f"no zero residual from {starts} (the least is {residual:.1e} of the output); use more starts or "
            "steps, or known tokens"
        )
    if found > 1:
        return "ambiguous", f"{found} different inputs give this output exactly"
    assert at.rank is not None
    assert at.condition is not None
    if at.rank < at.n_unknowns:
        return "ambiguous", (
            f"the output does not move along {at.n_unknowns - at.rank} of {at.n_unknowns} directions at the "
            "input found"
        )
    if at.condition > WORST_CONDITION:
        return "ambiguous", f"the Jacobian has condition {at.condition:.1e}: rounding in the output decides"
    if at.n_equations <= at.n_unknowns:
        return "ambiguous", (
            f"one input was found from {starts}, but {at.n_equations} numbers for {at.n_unknowns} unknowns "
            "leave room for others; known tokens or a second output would settle it"
        )
    return "recovered", (
        f"one input gives this output exactly (residual {residual:.1e}, condition {at.condition:.1e}), and "
        f"{at.n_equations} numbers for {at.n_unknowns} unknowns leave no room for another in general"
    )

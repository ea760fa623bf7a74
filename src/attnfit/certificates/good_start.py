"""The papers' conditions on a start, with the printed and with local constants side by side."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from attnfit.certificates.ball import ChunkRows, Stages, sums_on_ball
from attnfit.certificates.lipschitz import largest_eigenvalue, lipschitz_constant
from attnfit.problems.inputs import as_point
from attnfit.problems.rows.grouped import GroupedProblem


@dataclass(frozen=True)
class GoodStart:
    """Whether ``x0`` is an (l, M)-good start for Newton's method towards ``x_ref``; prints as a table.

    Attributes
    ----------
    gradient_norm : float
        ``||gradient(x_ref)||_2``: condition (i) wants zero.
    lambda_min : float
        l, the smallest eigenvalue of the Hessian at x_ref: condition (i) wants it positive.
    distance, scaled_distance : float
        ``||x0 - x_ref||_2`` and ``||H^(1/2)(x0 - x_ref)||_2``.
    log10_printed_constant : float
        Of the printed ``M = n^4 exp(20 R^2)``, ``R = max(4, ||A||, ||x||, ||b||)``, which overflows float64.
    local_constant, scaled_constant : float
        Lipschitz constants of the Hessian on the ball around x_ref that reaches x0, in the user's and in the
        affine-scaled variables.
    printed, local, scaled : bool
        Condition (iii): ``M ||x0 - x_ref|| <= 0.1 l`` with the printed and with the local M, and the
        corrected affine-scaled form
        ``M_s ||H^(1/2)(x0 - x_ref)|| <= 0.1``, which alone implies the contraction of the sampled Newton
        method.
    """

    gradient_norm: float
    lambda_min: float
    distance: float
    scaled_distance: float
    log10_printed_constant: float
    local_constant: float
    scaled_constant: float
    printed: bool
    local: bool
    scaled: bool

    def __str__(self) -> str:
        def verdict(ok: bool) -> str:
            return "holds" if ok else "fails"

        lines = [
            f"(i)   gradient at x_ref {self.gradient_norm:.3g}, smallest eigenvalue l = "
            f"{self.lambda_min:.3g}",
            "(iii) constant          M              M |x0 - x_ref| against 0.1 l",
            f"      printed           1e{self.log10_printed_constant:<10.1f}   {verdict(self.printed)}",
            f"      local             {self.local_constant:<12.4g}   {verdict(self.local)}",
            f"      affine-scaled     {self.scaled_constant:<12.4g}   {verdict(self.scaled)}   (M "
            f"|H^(1/2)(x0 - x_ref)| against 0.1)",
        ]
        return "\n".join(lines)


def good_start(problem: GroupedProblem, x0: Any, x_ref: Any) -> GoodStart:
    """Evaluate the (l, M)-good conditions for a start x0 and a reference point x_ref, usually ``result.x``.

    Parameters
    ----------
    problem : Softmax, Exponential or Rescaled
    x0, x_ref : array_like, shape (d,)

    Returns
    -------
    GoodStart

    Raises
    ------
    ValueError
        If the papers have no condition for this problem, or its loss overflows at x_ref.

    Notes
    -----
    Source: "An Iterative Algorithm for Rescaled Hyperbolic Functions Regression", Definition 5.1 and Lemma
    9.1; the affine-scaled condition corrects Lemma 5.5, which is false in the Euclidean norm.
    """
    if not isinstance(problem, GroupedProblem):
        raise ValueError(
            f"the papers state no condition for {type(problem).__name__}; pass Softmax, Exponential or "
            "Rescaled"
        )
    start, reference = as_point(x0, problem.shape, "x0"), as_point(x_ref, problem.shape, "x_ref")
    at = problem.evaluate(reference)
    with np.errstate(over="ignore", invalid="ignore"):
        hessian = problem.hessian_at(at)
    if not (np.isfinite(at.value) and np.isfinite(hessian).all()):
        raise ValueError("x_ref: the loss overflows there; pass a minimiser, such as result.x")
    values, vectors = np.linalg.eigh(hessian)
    lambda_min = float(values[0])
    difference = start - reference
    distance = float(np.linalg.norm(difference))
    identity = np.eye(len(reference))
    data = sums_on_ball(problem, at, identity, _data, 0.0)
    size = max(
        4.0,
        float(np.sqrt(largest_eigenvalue(data["rows"], identity))),
        float(np.linalg.norm(start)),
        float(np.linalg.norm(reference)),
        float(np.sqrt(data["targets"])),
    )
    log10_printed = 4.0 * np.log10(problem.n_rows) + 20.0 * size**2 / np.log(10.0)
    local = lipschitz_constant(problem, at, identity, distance)
    positive = lambda_min > 0.0
    scaled_distance, scaled = np.inf, np.inf
    if positive:
        scaled_distance = float(np.sqrt(difference @ hessian @ difference))
        scaled = lipschitz_constant(problem, at, vectors / np.sqrt(values), scaled_distance)
    return GoodStart(
        gradient_norm=float(np.linalg.norm(at.gradient)),
        lambda_min=lambda_min,
        distance=distance,
        scaled_distance=scaled_distance,
        log10_printed_constant=float(log10_printed),
        local_constant=local,
        scaled_constant=scaled,
        printed=bool(
            positive and (distance == 0 or log10_printed + np.log10(distance) <= np.log10(0.1 * lambda_min))
        ),
        local=bool(positive and np.isfinite(local) and local * distance <= 0.1 * lambda_min),
        scaled=bool(positive and scaled * scaled_distance <= 0.1),
    )


def _data(rows: ChunkRows, radius: float) -> Stages:
    rows.add_gram("rows", np.ones(len(rows.z)), centred=False)
    rows.add("targets", rows.b**2)
    yield from ()

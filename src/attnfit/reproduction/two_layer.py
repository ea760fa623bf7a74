"""What "Local Convergence of Approximate Newton Method for Two Layer Nonlinear Regression" claims."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attnfit.certificates import certify
from attnfit.problems import TwoLayer
from attnfit.reproduction.fitting import fitted, one_step
from attnfit.reproduction.page import Claim, Curve, Page, Table
from attnfit.reproduction.real_data import head_texts
from attnfit.solvers.sampled_two_layer import SampledTwoLayer
from attnfit.theory import PAPERS, Check, check, search, table
from attnfit.theory.instances import TwoLayer as Instance

Array = NDArray[np.float64]

ACTIVATIONS = ("tanh", "sigmoid", "softplus")
RATE = 0.4
# Errors below, relative to the first, are not followed.
RESOLUTION = 1e-6
# Directions of keys, and entries of values, that a read-out keeps.
READ = 4


@dataclass(frozen=True)
class Measured:
    """What the claims are judged by.

    Attributes
    ----------
    paths : dict of dict
        By activation or data: errors relative to the start, and contraction of each step.
    hessians : list of tuple
        Activation, largest negative curvature of the data term, its bound NEW-TL-5, least eigenvalue of the
        Hessian of the regularised loss over l, the certificate's constant, slack of the printed one.
    checks : list of tuple
        Id and check, at the largest ratio found, of every statement.
    """

    paths: dict[str, dict[str, list[float]]]
    hessians: list[tuple[str, float, float, float, float, float]]
    checks: list[tuple[str, Check]]


def run(quick: bool) -> Page:
    """Return the page."""
    n = 2000 if quick else 50_000
    paths = {name: contraction(*instance(name, n)) for name in ACTIVATIONS}
    readout = head_readout()
    if readout is not None:
        paths["a read-out of a language model's head"] = contraction(*readout)
    ids = [bound.id for bound in table() if bound.id.startswith("TL-")]
    return page(
        Measured(
            paths,
            [hessian_row(name) for name in ACTIVATIONS],
            [(id, search(id, budget=60 if quick else 2000).check) for id in ids],
        )
    )


def claims(found: Measured) -> list[Claim]:
    """Judge each claim by what was measured."""
    worst = max(max(path["energy"]) for path in found.paths.values())
    checks = dict(found.checks)
    failing = [id for id, check in found.checks if not check.holds]
    return [
        Claim(
            "the approximate Newton method converges locally at the rate 0.4",
            f"at most {worst:.2f} a step in the norm of the Hessian, with the signs corrected and the "
            f"regulariser in, over {', '.join(found.paths)}",
            worst <= RATE,
        ),
        Claim(
            "with w^2 large enough the Hessian is positive definite",
            "with w^2 = l / sigma_min^2 beside the bound NEW-TL-5 of the negative curvature, the least "
            "eigenvalue is " + ", ".join(f"{row[3]:.3g} l for {row[0]}" for row in found.hessians),
            all(row[1] <= row[2] and row[3] >= 1.0 for row in found.hessians),
        ),
        Claim(
            "the Hessian is Lipschitz with a constant of order n^2 e^{4 R^2} beta^-4 R^5 R_f (Lemma 5.2)",
            f"the largest ratio found is {checks['TL-5.2'].ratio:.2g}, where h'' is not Lipschitz; for "
            "smooth h it is too large by "
            + ", ".join(f"{row[5]:.0f}" for row in found.hessians)
            + " powers of ten",
            checks["TL-5.2"].holds,
        ),
        Claim(
            "the bounds of Sections 5 and 6 and of the appendix",
            f"{len(found.checks) - len(failing)} of {len(found.checks)} statements hold as printed"
            + (f"; {', '.join(failing)} fail" if failing else ""),
            not failing,
        ),
    ]


def page(found: Measured) -> Page:
    """Lay out the page."""
    return Page(
        "two-layer",
        PAPERS["TL"],
        "Convergence is as claimed once signs and regulariser are right, and in the norm of the Hessian. The "
        "constants are vacuous; sharp ones stand beside them.",
        claims(found),
        [
            Curve(
                "Error against the number of steps",
                "steps",
                "error relative to the start",
                {
                    name: (list(range(len(path["error"]))), path["error"])
                    for name, path in found.paths.items()
                },
            ),
            Table(
                "The Hessian of the data term in the logits",
                (
                    "h",
                    "largest negative curvature",
                    "bound",
                    "least eigenvalue with w^2 over l",
                    "certificate's constant",
                    "slack of the printed one",
                ),
                found.hessians,
            ),
            Table(
                "Statements, with the largest ratio found",
                ("id", "printed", "verdict", "ratio"),
                [
                    (b, table()[b].formula, "holds" if c.holds else "fails", float(c.ratio))
                    for b, c in found.checks
                ],
            ),
        ],
    )


def instance(activation: str, n: int, d: int = 6, m: int = 4) -> tuple[TwoLayer, Array]:
    """Return a problem whose minimum is near a planted point, and that point."""
    rng = np.random.default_rng(0)
    A1, A2 = rng.standard_normal((n, d)), rng.standard_normal((m, n))
    x = rng.standard_normal(d)
    blank = TwoLayer(A1, A2, np.zeros(m), activation=activation)
    b = blank.predict(x) + 0.01 * rng.standard_normal(m)
    return TwoLayer(A1, A2, b, activation=activation, row_penalty=0.02), x


def head_readout() -> tuple[TwoLayer, Array] | None:
    """Return the read-out of one query of a head, ``tanh(values^T softmax(keys q))``, over the tokens of all
    texts, and the query; None without PyTorch.
    """
    texts = head_texts()
    if texts is None:
        return None
    keys, values = np.vstack(texts.keys), np.vstack(texts.values)
    # In the directions that the keys vary most in.
    _, _, Vt = np.linalg.svd(keys - keys.mean(axis=0), full_matrices=False)
    frame = Vt[:READ].T
    A1, A2, x = keys @ frame, values[:, :READ].T, frame.T @ texts.queries[0][-1]
    blank = TwoLayer(A1, A2, np.zeros(READ), activation="tanh")
    return TwoLayer(A1, A2, blank.predict(x), activation="tanh", row_penalty=0.02), x


def contraction(problem: TwoLayer, x0: Array) -> dict[str, list[float]]:
    """Take sampled steps one by one from near the minimum."""
    best = fitted(problem, x0, tol=1e-11, max_iter=300)
    H = problem.hessian(best)
    rng = np.random.default_rng(1)
    x = best + 0.02 * rng.standard_normal(best.shape)
    solver: Any = SampledTwoLayer(globalisation="none")
    errors = [x - best]
    for k in range(7):
        x = one_step(problem, x, solver, k)
        errors.append(x - best)
    sizes = np.array([np.sqrt(abs(e @ H @ e)) for e in errors])
    # Beyond it the minimum itself is not known better.
    kept = 1 + int(np.argmax(np.append(sizes, 0.0) < RESOLUTION * sizes[0]))
    return {
        "error": (sizes[:kept] / sizes[0]).tolist(),
        "energy": (sizes[1:kept] / sizes[: kept - 1]).tolist(),
    }


def hessian_row(activation: str) -> tuple[str, float, float, float, float, float]:
    """Return negative curvature and its bound, the least eigenvalue with the w^2 that the bound asks for over
    l = 1, the certificate's constant and the slack of the printed one.
    """
    rng = np.random.default_rng(2)
    A1, A2 = rng.standard_normal((12, 3)), rng.standard_normal((4, 12))
    x, b = rng.standard_normal(3), rng.standard_normal(4)
    y = x + 1e-4 * rng.standard_normal(3)
    data = Instance(A1, A2, b, x, y, activation)
    curvature = check("NEW-TL-5", data)
    bound = float(10.0**curvature.log10_rhs)
    square = bound + 1.0 / float(np.linalg.svd(A1, compute_uv=False)[-1]) ** 2
    regularised = TwoLayer(A1, A2, b, activation=activation, row_penalty=np.sqrt(square))
    least = float(np.linalg.eigvalsh(regularised.hessian(x))[0])
    problem = TwoLayer(A1, A2, b, activation=activation, row_penalty=1.0)
    proof = certify(problem, fitted(problem, x, max_iter=300))
    slack = float(check("TL-5.2", data).slack)
    return activation, float(curvature.lhs), bound, least, float(proof.lipschitz), slack

"""What "Local Convergence of Approximate Newton Method for Two Layer Nonlinear Regression" claims."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from attnfit.certificates import certify
from attnfit.problems import TwoLayer
from attnfit.reproduction.fitting import fitted, one_step
from attnfit.reproduction.page import Claim, Curve, Page, Table
from attnfit.solvers.sampled_two_layer import SampledTwoLayer
from attnfit.theory import PAPERS, check, search, table
from attnfit.theory.instances import TwoLayer as Instance

Array = NDArray[np.float64]

ACTIVATIONS = ("tanh", "sigmoid", "softplus")


def run(quick: bool) -> Page:
    """Return the page."""
    n = 2000 if quick else 50_000
    paths = {name: contraction(name, n) for name in ACTIVATIONS}
    worst = max(max(path["energy"]) for path in paths.values())
    hessians = [hessian_row(name) for name in ACTIVATIONS]
    ids = [bound.id for bound in table() if bound.id.startswith("TL-")]
    checks = [(bound, search(bound, budget=60 if quick else 2000).check) for bound in ids]
    failing = [bound for bound, found in checks if not found.holds]
    claims = [
        Claim(
            "the approximate Newton method converges locally at the rate 0.4",
            f"at most {worst:.2f} a step in the norm of the Hessian, with the signs corrected and the "
            "regulariser in",
            worst <= 0.4,
        ),
        Claim(
            "with w^2 large enough the Hessian is positive definite",
            "the largest negative curvature is within the bound for "
            + ", ".join(f"{row[0]} ({row[1]:.2g} of {row[2]:.2g})" for row in hessians),
            all(row[1] <= row[2] for row in hessians),
        ),
        Claim(
            "the Hessian is Lipschitz with a constant of order n^2 e^{4 R^2} beta^-4 R^5 R_f (Lemma 5.2)",
            "it is too large by " + ", ".join(f"{row[4]:.0f}" for row in hessians) + " powers of ten; "
            f"{len(failing)} of {len(ids)} statements fail as printed ({', '.join(failing)})",
            not failing,
        ),
    ]
    return Page(
        "two-layer",
        PAPERS["TL"],
        "Convergence is as claimed once signs and regulariser are right, and in the norm of the Hessian. The "
        "constants are vacuous; sharp ones stand beside them.",
        claims,
        [
            Curve(
                "Error against the number of steps",
                "steps",
                "error relative to the start",
                {name: (list(range(len(path["error"]))), path["error"]) for name, path in paths.items()},
            ),
            Table(
                "The Hessian of the data term in the logits",
                (
                    "h",
                    "largest negative curvature",
                    "bound",
                    "certificate's constant",
                    "slack of the printed one",
                ),
                hessians,
            ),
            Table(
                "Statements, with the largest ratio found",
                ("id", "printed", "verdict", "ratio"),
                [(b, table()[b].formula, "holds" if c.holds else "fails", float(c.ratio)) for b, c in checks],
            ),
        ],
    )


def instance(activation: str, n: int, d: int = 6, m: int = 4) -> tuple[TwoLayer, Array]:
    """Return a problem whose minimum is near a planted point."""
    rng = np.random.default_rng(0)
    A1, A2 = rng.standard_normal((n, d)), rng.standard_normal((m, n))
    x = rng.standard_normal(d)
    blank = TwoLayer(A1, A2, np.zeros(m), activation=activation)
    b = blank.predict(x) + 0.01 * rng.standard_normal(m)
    return TwoLayer(A1, A2, b, activation=activation, row_penalty=0.02), x


def contraction(activation: str, n: int) -> dict[str, list[float]]:
    """Take sampled steps one by one from near the minimum."""
    problem, x0 = instance(activation, n)
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
    kept = max(2, int(np.sum(sizes > 1e-9 * sizes[0])))
    return {
        "error": (sizes[:kept] / sizes[0]).tolist(),
        "energy": (sizes[1:kept] / sizes[: kept - 1]).tolist(),
    }


def hessian_row(activation: str) -> tuple[str, float, float, float, float]:
    """Return negative curvature and its bound, the certificate's constant and the slack of the printed
    one.
    """
    rng = np.random.default_rng(2)
    A1, A2 = rng.standard_normal((12, 3)), rng.standard_normal((4, 12))
    x, b = rng.standard_normal(3), rng.standard_normal(4)
    y = x + 1e-4 * rng.standard_normal(3)
    data = Instance(A1, A2, b, x, y, activation)
    curvature = check("NEW-TL-5", data)
    lipschitz = check("TL-5.2", data)
    problem = TwoLayer(A1, A2, b, activation=activation, row_penalty=1.0)
    proof = certify(problem, fitted(problem, x, max_iter=300))
    bound = 10.0**curvature.log10_rhs
    return activation, float(curvature.lhs), float(bound), float(proof.lipschitz), float(lipschitz.slack)

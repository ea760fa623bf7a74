"""What "In-Context Learning for Attention Scheme ... via a Tensor Trick" claims of attention regression."""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy.special import softmax

from attnfit.incontext import data_shift, shift
from attnfit.problems import Attention, Softmax
from attnfit.reproduction.page import Claim, Page, Table
from attnfit.theory import PAPERS, search, table


def run(quick: bool) -> Page:
    """Return the page."""
    rng = np.random.default_rng(0)
    value, gradient, hessian = _equal_forms(rng)
    ids = [bound.id for bound in table() if bound.id.startswith("TT-")]
    checks = [(bound, search(bound, budget=60 if quick else 2000).check) for bound in ids]
    failing = [bound for bound, check in checks if not check.holds]
    moves = _shifts(rng)
    claims = [
        Claim(
            "the matrix problem is a softmax regression with the Kronecker product of the data (the "
            "tensor trick)",
            f"value, gradient and Hessian agree to {max(value, gradient, hessian):.0e}",
            max(value, gradient, hessian) < 1e-9,
        ),
        Claim(
            "its losses and gradients are Lipschitz with the constants of Sections 6 to 12",
            f"{len(ids) - len(failing)} of {len(ids)} statements hold as printed; {', '.join(failing)} "
            "fail, each "
            "with a corrected form",
            not failing,
        ),
        Claim(
            "a move of the weights or of the data shifts the target by at most 4 n^2 R e^{4 R^2} |move|",
            f"holds, too large by {min(row[4] for row in moves):.0f} or more powers of ten; half the move "
            "of the "
            "logits is a bound as well",
            all(row[2] <= row[3] for row in moves),
        ),
    ]
    rows = [
        (bound, table()[bound].formula, "holds" if check.holds else "fails", float(check.ratio))
        for bound, check in checks
    ]
    return Page(
        "tensor-trick",
        PAPERS["TT"],
        "The reduction is exact. Most constants hold and are too large to be of use; those that fail are "
        "named.",
        claims,
        [
            Table("Statements, with the largest ratio found", ("id", "printed", "verdict", "ratio"), rows),
            Table(
                "Shifts of the target",
                ("move", "length", "|delta|", "sharp bound", "slack of the printed bound, powers of ten"),
                moves,
            ),
        ],
    )


def _equal_forms(rng: np.random.Generator) -> tuple[float, float, float]:
    """Return the relative differences of value, gradient and Hessian of both forms."""
    A1, A2 = rng.standard_normal((9, 3)), rng.standard_normal((7, 2))
    B = softmax(rng.standard_normal((9, 7)), axis=1)
    X = rng.standard_normal((3, 2))
    matrix = Attention(A1, A2, B)
    vector = Softmax(np.kron(A1, A2), B.reshape(-1), np.repeat(np.arange(9), 7))
    pairs: list[tuple[Any, Any]] = [
        (matrix.value(X), vector.value(X.reshape(-1))),
        (matrix.gradient(X).reshape(-1), vector.gradient(X.reshape(-1))),
        (matrix.hessian(X), vector.hessian(X.reshape(-1))),
    ]
    one, two, three = (float(np.linalg.norm(np.subtract(p, q)) / np.linalg.norm(q)) for p, q in pairs)
    return one, two, three


def _shifts(rng: np.random.Generator) -> list[tuple[str, float, float, float, float]]:
    A1, A2 = 0.5 * rng.standard_normal((9, 3)), 0.5 * rng.standard_normal((7, 2))
    B = softmax(rng.standard_normal((9, 7)), axis=1)
    X = rng.standard_normal((3, 2))
    problem = Attention(A1, A2, B)
    moves = {
        "weights": shift(problem, X, X + 1e-3 * rng.standard_normal(X.shape)),
        "data": data_shift(problem, X, (A1, A2), (A1 + 1e-3 * rng.standard_normal(A1.shape), A2)),
    }
    return [
        (name, m.size, m.norm, float(np.linalg.norm(m.sharp)), m.log10_printed - float(np.log10(m.norm)))
        for name, m in moves.items()
    ]

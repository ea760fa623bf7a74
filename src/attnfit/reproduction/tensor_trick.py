"""What "In-Context Learning for Attention Scheme ... via a Tensor Trick" claims of attention regression."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import softmax

from attnfit.incontext import data_shift, shift
from attnfit.incontext.closeness import Closeness
from attnfit.problems import Attention, Softmax
from attnfit.reproduction import similarity
from attnfit.reproduction.page import Claim, Page, Table
from attnfit.reproduction.real_data import head_texts
from attnfit.theory import PAPERS, Check, search, table

Array = NDArray[np.float64]

# Two forms of one problem differ by rounding.
EQUAL = 1e-9
SMALL = 1e-3
# Directions of a head that are kept.
WIDTH = 4


@dataclass(frozen=True)
class Measured:
    """What the claims are judged by.

    Attributes
    ----------
    differences : dict of float
        By data: the largest relative difference of value, gradient and Hessian of the two forms.
    checks : list of tuple
        Id and check, at the largest ratio found, of every statement.
    moves : list of tuple
        What was moved, length of the move, shift, sharp bound, slack of the printed one in powers of ten.
    closeness : dict of Closeness
    """

    differences: dict[str, float]
    checks: list[tuple[str, Check]]
    moves: list[tuple[str, float, float, float, float]]
    closeness: dict[str, Closeness]


def run(quick: bool) -> Page:
    """Return the page."""
    rng = np.random.default_rng(0)
    A1, A2 = rng.standard_normal((9, 3)), rng.standard_normal((7, 2))
    drawn = A1, A2, softmax(rng.standard_normal((9, 7)), axis=1), rng.standard_normal((3, 2))
    data = {"drawn": drawn} | head_map()
    ids = [bound.id for bound in table() if bound.id.startswith("TT-")]
    close = {"maps of 4 x 6": similarity.drawn("softmax", (4, 6, 2, 2), quick)}
    head = similarity.on_a_head()
    return page(
        Measured(
            {name: equal_forms(*arrays) for name, arrays in data.items()},
            [(id, search(id, budget=60 if quick else 2000).check) for id in ids],
            [row for name, arrays in data.items() for row in shifts(name, *arrays, rng)],
            close if head is None else close | {"a head of a language model": head},
        )
    )


def claims(found: Measured) -> list[Claim]:
    """Judge each claim by what was measured."""
    largest = max(found.differences.values())
    failing = [id for id, check in found.checks if not check.holds]
    slack = min(row[4] for row in found.moves)
    loose = max(row[3] / row[2] for row in found.moves)
    return [
        Claim(
            "the matrix problem is a softmax regression with the Kronecker product of the data (the "
            "tensor trick)",
            f"value, gradient and Hessian agree to {largest:.0e} ({', '.join(found.differences)})",
            largest < EQUAL,
        ),
        Claim(
            "its losses and gradients are Lipschitz with the constants of Sections 6 to 12",
            f"{len(found.checks) - len(failing)} of {len(found.checks)} statements hold as printed"
            + (f"; {', '.join(failing)} fail, each with a corrected form" if failing else ""),
            not failing,
        ),
        Claim(
            "a move of the weights or of the data shifts the target by at most 4 n^2 R e^{4 R^2} |move|",
            f"the bound is {slack:.0f} or more powers of ten above the shift; half the move of the logits "
            f"bounds it too, and is at most {loose:.2g} times the shift",
            bool(slack >= 0.0),
        ),
        similarity.claim(
            "an update of x and one of the tokens by a layer are similar (section 2)", found.closeness
        ),
    ]


def page(found: Measured) -> Page:
    """Lay out the page."""
    rows = [
        (bound, table()[bound].formula, "holds" if check.holds else "fails", float(check.ratio))
        for bound, check in found.checks
    ]
    return Page(
        "tensor-trick",
        PAPERS["TT"],
        "The reduction is exact. Most constants hold and are too large to be of use; those that fail are "
        "named.",
        claims(found),
        [
            Table("Statements, with the largest ratio found", ("id", "printed", "verdict", "ratio"), rows),
            Table(
                "Shifts of the target",
                ("move", "length", "|delta|", "sharp bound", "slack of the printed bound, powers of ten"),
                found.moves,
            ),
            similarity.table(found.closeness),
        ],
    )


def head_map() -> dict[str, tuple[Array, Array, Array, Array]]:
    """Return queries, keys, map and X of a head of the packaged model, in four directions of its queries and
    keys; nothing without PyTorch.
    """
    texts = head_texts()
    if texts is None:
        return {}
    queries, keys, maps = texts.blocks()
    # The Hessian of the vector form has as many rows as X has entries, squared.
    _, _, Vt = np.linalg.svd(np.vstack([queries[0], keys[0]]), full_matrices=False)
    frame = Vt[:WIDTH].T
    return {"a head of a language model": (queries[0] @ frame, keys[0] @ frame, maps[0], np.eye(WIDTH))}


def equal_forms(A1: Array, A2: Array, B: Array, X: Array) -> float:
    """Return the largest relative difference of value, gradient and Hessian of both forms."""
    n1, n2 = B.shape
    matrix = Attention(A1, A2, B)
    vector = Softmax(np.kron(A1, A2), B.reshape(-1), np.repeat(np.arange(n1), n2))
    pairs: list[tuple[Any, Any]] = [
        (matrix.value(X), vector.value(X.reshape(-1))),
        (matrix.gradient(X).reshape(-1), vector.gradient(X.reshape(-1))),
        (matrix.hessian(X), vector.hessian(X.reshape(-1))),
    ]
    return max(float(np.linalg.norm(np.subtract(p, q)) / np.linalg.norm(q)) for p, q in pairs)


def shifts(
    name: str, A1: Array, A2: Array, B: Array, X: Array, rng: np.random.Generator
) -> list[tuple[str, float, float, float, float]]:
    """Move the weights, and the queries, at random, and compare the shift with its bounds."""
    # Within the R of the theorem the constants are finite numbers.
    problem = Attention(0.5 * A1, 0.5 * A2, B)
    moved = 0.5 * A1 + SMALL * rng.standard_normal(A1.shape)
    moves = {
        "weights": shift(problem, X, X + SMALL * rng.standard_normal(X.shape)),
        "data": data_shift(problem, X, (0.5 * A1, 0.5 * A2), (moved, 0.5 * A2)),
    }
    rows = []
    for which, move in moves.items():
        slack = float(move.log10_printed - np.log10(move.norm))
        sharp = float(np.linalg.norm(move.sharp))
        rows.append((f"{name}: {which}", move.size, move.norm, sharp, slack))
    return rows

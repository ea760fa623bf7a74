"""Attention-matrix regression: Lipschitz constants of five losses and their gradients, and shifts of the
target.

Squared losses carry the factor 0.5, as everywhere in this library.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from attnfit.theory.bound import Bound, Condition, Sharp, Size
from attnfit.theory.bounds.assumptions import B_UNIT, BETA, EXP, SHARES, SMALL, WITHIN
from attnfit.theory.instances.regression import Regression
from attnfit.theory.instances.state import slopes
from attnfit.theory.logs import Array, log, log_norm, product

Assumed = tuple[Size[Regression] | Condition[Regression], ...]

# log of the unit of a loss is this many times that of u.
DEGREE = {"squared": 0, "dot": 0, "entropy": 0, "sparse": 1, "rescaled": 2}
MODEL = {
    "squared": "softmax",
    "dot": "softmax",
    "entropy": "softmax",
    "sparse": "softmax",
    "rescaled": "rescaled",
}
SYMBOL = {"squared": "L_c", "dot": "L_cent", "entropy": "L_ent", "sparse": "L_sparse", "rescaled": "L_q"}


def _furthest(i: Regression, which: str) -> float:
    """``|x - y|``, or ``|A - A'|_{inf,2}``: the largest over the groups."""
    return float(i.move(which).size.max())


def _value_change(i: Regression, which: str, loss: str) -> Array:
    """Return ``log |L' - L|``."""
    move = i.move(which)
    start, end = move.start, move.end
    if loss == "squared":
        terms = 0.5 * move.df * (start.residual + end.residual)
    elif loss == "dot":
        terms = -move.df * start.b
    elif loss == "entropy":
        terms = -(move.df * end.h + start.f * move.dh)
    elif loss == "sparse":
        terms = move.du
    else:
        terms = 0.5 * move.dc * (start.c + end.c)
    units = DEGREE[loss] * move.scale
    return np.asarray(log(abs(np.sum(terms.sum(axis=1) * np.exp(units - units.max())))) + units.max())


def _gradient_change(i: Regression, which: str, loss: str) -> Array:
    """Return ``log |grad L' - grad L|``, gradients in x."""
    move = i.move(which)
    units = DEGREE[loss] * move.scale
    relative = np.exp(units - units.max())[:, None]
    after = slopes(move.end, loss) * relative
    # The unit of sinh and cosh is u'; for exp, whose loss this is, it is u.
    change = (move.dv if loss == "sparse" else slopes(move.end, loss) - slopes(move.start, loss)) * relative
    total = np.einsum("jnd,jn->d", i.A, change)
    if which == "A":
        total += np.einsum("jnd,jn->d", i.moved_rows - i.A, after)
    return log_norm(total, units.max())


@dataclass(frozen=True)
class Constant:
    """``c d^d n^n R^R beta^beta e^{exp R^2}``, the form of all Lipschitz constants of the paper."""

    c: float = 1.0
    d: float = 0.0
    n: float = 0.0
    R: float = 0.0
    beta: float = 0.0
    exp: float = 0.0

    def __str__(self) -> str:
        powers = [("d", self.d), ("n", self.n), ("R", self.R), ("beta", self.beta)]
        words = [f"{self.c:g}"] if self.c != 1.0 else []
        words += [name if power == 1.0 else f"{name}^{power:g}" for name, power in powers if power]
        return " ".join([*words, f"e^{{{'' if self.exp == 1.0 else f'{self.exp:g}'}R^2}}"])

    def log(self, i: Regression, R: float, which: str) -> Array:
        """Return its logarithm on an instance."""
        exponent = self.exp * R * R
        if self.beta:
            exponent += self.beta * float(i.log_beta(which).min())
        return product(self.c, i.d**self.d, i.n**self.n, R**self.R, exponent=exponent)


# Lemma number, loss, "value" or "gradient", move, constant, worst ratio found.
_LEMMAS: list[tuple[str, str, Literal["value", "gradient"], str, Constant, str]] = [
    ("8.1", "squared", "value", "x", Constant(n=2.5, exp=5), "1e-35"),
    ("8.2", "squared", "value", "A", Constant(n=2.5, exp=5), "1e-35"),
    ("8.3", "squared", "gradient", "x", Constant(d=1, n=2, exp=5), "1e-35"),
    ("8.4", "squared", "gradient", "A", Constant(d=1, n=2, exp=5), "1e-35"),
    ("9.1", "rescaled", "value", "x", Constant(n=3, exp=3), "2e-6"),
    ("9.2", "rescaled", "value", "A", Constant(n=3, exp=3), "2e-6"),
    ("9.3", "rescaled", "gradient", "x", Constant(d=1, n=2, exp=3), "1e-5"),
    ("9.4", "rescaled", "gradient", "A", Constant(d=1, n=2, exp=3), "1e-5"),
    ("10.1", "sparse", "value", "x", Constant(2, n=2, R=1, exp=1), "0.50"),
    ("10.2", "sparse", "value", "A", Constant(2, n=2, R=1, exp=1), "0.50"),
    ("10.3", "sparse", "gradient", "x", Constant(2, d=1, n=1, R=1, exp=1), "R/(2d) whenever R > 2d"),
    ("10.4", "sparse", "gradient", "A", Constant(d=1, n=1, exp=2), "1e-6"),
    ("11.1", "dot", "value", "x", Constant(4, n=2.5, R=1, beta=-2, exp=2), "0.15"),
    ("11.2", "dot", "value", "A", Constant(4, n=2.5, R=1, beta=-2, exp=2), "0.14"),
    ("11.3", "dot", "gradient", "x", Constant(d=1, n=2, exp=5), "1e-35"),
    ("11.4", "dot", "gradient", "A", Constant(d=1, n=2, exp=5), "1e-35"),
    ("12.1", "entropy", "value", "x", Constant(n=3, beta=-2, exp=3), "1e-11"),
    ("12.2", "entropy", "value", "A", Constant(n=3, beta=-2, exp=3), "1e-11"),
    ("12.3", "entropy", "gradient", "x", Constant(d=1, n=2.5, exp=5), "1e-34"),
    ("12.4", "entropy", "gradient", "A", Constant(d=1, n=2.5, exp=5), "1e-36"),
]  # fmt: skip
_TRUE_SPARSE = Constant(n=1, R=2, exp=1)
_REMARKS = {
    "gradient": "the proof loses a factor sqrt(n); the statement survives",
    "entropy": "the proof uses Lemmas 7.5 and 7.12, which are false; the statement survives",
    "10.3": "the proof has R^2; d = 1, three equal queries and the key row (R, 0, 0) break the printed form",
}


def _sparse_counterexample() -> Regression:
    """One key row of norm R in the direction of x."""
    R = 4.1
    A = np.tile(np.array([[R], [0.0], [0.0]]), (3, 1, 1))
    return Regression(A, np.zeros((3, 3)), [R], [R - 0.002], R=R)


def _lemma(
    number: str, loss: str, of: Literal["value", "gradient"], which: str, constant: Constant, worst: str
) -> Bound[Regression]:
    assumed: Assumed = (*WITHIN[which], SMALL[which], EXP)
    if loss in ("squared", "rescaled", "dot"):
        assumed += (B_UNIT,)
    if constant.beta:
        assumed += (BETA[which],)
    if loss == "entropy":
        assumed += (SHARES[which],)
    change = _value_change if of == "value" else _gradient_change
    symbol = f"{'grad ' if of == 'gradient' else ''}{SYMBOL[loss]}"
    size = "|x - y|" if which == "x" else "|A - A'|_{inf,2}"
    fails = number == "10.3"
    where = (
        "" if which == "x" else ", at two data matrices" if of == "value" else " in x, at two data matrices"
    )
    sparse = loss == "sparse" and of == "gradient"
    return Bound(
        f"TT-{number}",
        f"change of {symbol}{where}",
        f"|{symbol}' - {symbol}| <= {constant} {size}",
        Regression,
        lambda i: change(i, which, loss),
        lambda i, R: constant.log(i, R, which) + log(_furthest(i, which)),
        assumed,
        status="fails" if fails else "holds",
        worst=worst,
        # Bounds that show no R of their own absorb it into the exponential.
        floor=0.0 if constant.R else 4.01,
        sharp=Sharp(
            f"|grad L_sparse' - grad L_sparse| <= {_TRUE_SPARSE} |x - y|",
            lambda i, R: _TRUE_SPARSE.log(i, R, which) + log(i.n_groups / i.n * _furthest(i, which)),
        )
        if fails and sparse
        else None,
        remark=_REMARKS.get(number, _REMARKS.get(loss, _REMARKS[of] if of == "gradient" else "")),
        counterexample=_sparse_counterexample if fails else None,
        models=(MODEL[loss],),
    )


def _shift(i: Regression, which: str, loss: str) -> Array:
    """Return ``log |Delta|_F`` of the shift of the target that reproduces the move."""
    move = i.move(which)
    if loss == "squared":
        return log_norm(move.df.reshape(-1))
    return np.asarray(0.5 * np.logaddexp.reduce(2.0 * (log_norm(move.dc, move.scale) - move.start.log_alpha)))


def _shifts(loss: str, number: str, which: str, id: str, worst: str, remark: str = "") -> Bound[Regression]:
    squared = loss == "squared"
    constant = Constant(4, n=2, R=1, exp=4) if squared else Constant(4, n=1.5, R=1, exp=2)
    size = "|x - y|" if which == "x" else "|A - A'|_{inf,2}"
    return Bound(
        id,
        f"shift of the target of {SYMBOL[loss]} that reproduces the move, all queries together",
        f"|{'delta_c' if squared else 'delta_q'}|_F <= {constant} {size}",
        Regression,
        lambda i: _shift(i, which, loss),
        lambda i, R: constant.log(i, R, which) + log(_furthest(i, which)),
        (*WITHIN[which], SMALL[which], B_UNIT, EXP),
        worst=worst,
        floor=4.0,
        sharp=Sharp(
            f"|delta_c|_F <= 1/2 sqrt(n) R {size}",
            lambda i, R: product(0.5, i.n_groups**0.5, R, _furthest(i, which)),
        )
        if squared
        else None,
        remark=remark or f"the paper's O(.) is replaced by the constant of its proof (Lemma {number})",
        models=(MODEL[loss],),
    )


def _shift_table() -> list[Bound[Regression]]:
    unproved = "printed without proof or assumptions; those of Section 7 are used"
    corollary = "corollary of Lemma {}; the paper's M = exp(O(R^2 + log(n d))) is replaced by its constant"
    out = []
    for loss, section, worst in (("rescaled", "13", "1e-15"), ("squared", "14", "1e-29")):
        out += [
            _shifts(loss, f"{section}.2", "x", f"TT-{section}.2", worst),
            _shifts(loss, f"{section}.4", "A", f"TT-{section}.4", worst, unproved),
            _shifts(loss, f"{section}.5", "x", f"TT-{section}.5.1", worst, corollary.format(f"{section}.2")),
            _shifts(loss, f"{section}.5", "A", f"TT-{section}.5.2", worst, corollary.format(f"{section}.4")),
        ]
    for id, loss, section in (("TT-2.1", "squared", "14"), ("TT-2.2", "rescaled", "13")):
        worst = "1e-15" if loss == "rescaled" else "1e-29"
        out.append(_shifts(loss, f"{section}.2", "x", id, worst, corollary.format(f"{section}.5")))
    return out


def _all_gradients() -> Bound[Regression]:
    """Return the main statement on Lipschitz gradients: every loss at once."""
    lemmas = [row for row in _LEMMAS if row[2] == "gradient" and row[3] == "x"]

    def constant(number: str, lemma: Constant) -> Constant:
        return _TRUE_SPARSE if number == "10.3" else lemma

    return Bound(
        "TT-2.3",
        "change of the gradient of each of the five losses",
        "|grad L' - grad L| <= M |x - y|, M = exp(O(R^2 + log(n d)))",
        Regression,
        lambda i: np.array([float(_gradient_change(i, "x", row[1])) for row in lemmas]),
        lambda i, R: (
            np.array([float(constant(row[0], row[4]).log(i, R, "x")) for row in lemmas])
            + log(_furthest(i, "x"))
        ),
        (*WITHIN["x"], SMALL["x"], B_UNIT, SHARES["x"], EXP),
        worst="1.00",
        floor=4.01,
        remark="corollary of Lemmas 8.3 to 12.3, with the corrected constant of Lemma 10.3",
        models=("softmax",),
    )


BOUNDS: list[Bound[Regression]] = [*(_lemma(*row) for row in _LEMMAS), *_shift_table(), _all_gradients()]

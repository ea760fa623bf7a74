"""What bounds on regressions assume."""

from __future__ import annotations

import numpy as np

from attnfit.theory.bound import Condition, Size, below
from attnfit.theory.instances.regression import Regression

# |x - y| small enough that exp(A(x - y)) is nearly 1 + A(x - y).
STEP = 0.01


def _smallest_normaliser(which: str) -> Condition[Regression]:
    def fails(i: Regression, R: float) -> str | None:
        if i.beta is None:
            return None
        move = i.move(which)
        logs = np.minimum(move.start.log_alpha, move.end.log_alpha)
        group = int(np.argmin(logs))
        if logs[group] >= np.log(i.beta) - 1e-9:
            return None
        return f"alpha = {np.exp(logs[group]):.6g} of group {group} is below beta = {i.beta:.6g}"

    return Condition("every normaliser alpha >= beta", fails)


def _nonzero_normaliser(i: Regression, R: float) -> str | None:
    bad = np.flatnonzero(i.weights.start.alpha == 0.0)
    if not len(bad):
        return None
    return f"alpha = 0 in group {bad[0]}: what is divided by it is not defined"


def _is_exp(i: Regression, R: float) -> str | None:
    return None if i.function == "exp" else f"u = {i.function}, while the statement is on exp"


def _share_change(i: Regression, which: str) -> float:
    with np.errstate(over="ignore"):
        return float(np.abs(np.expm1(-i.move(which).dh)).max())


A = Size[Regression]("|A|", lambda i: i.block_norms)
A_MOVED = Size[Regression]("|A'|", lambda i: i.moved_norms)
X = Size[Regression]("|x|", lambda i: i.x_norm)
Y = Size[Regression]("|y|", lambda i: i.y_norm)
B = Size[Regression]("|b|", lambda i: i.b_norms)
B_UNIT: Condition[Regression] = below("|b_j|", lambda i: i.b_norms, 1.0)
EXP = Condition[Regression]("u = exp", _is_exp)
ALPHA = Condition[Regression]("alpha != 0", _nonzero_normaliser)
BETA = {which: _smallest_normaliser(which) for which in "xA"}


def _small(which: str, name: str) -> Condition[Regression]:
    return below(name, lambda i: np.abs(i.move(which).dz), STEP, strict=True)


def _similar(which: str) -> Condition[Regression]:
    return below("|1 - f/f'|_inf", lambda i: _share_change(i, which), 0.1)


SMALL = {"x": _small("x", "|A(x - y)|_inf"), "A": _small("A", "|(A - A')x|_inf")}
SHARES = {which: _similar(which) for which in "xA"}
# The points compared lie within R.
WITHIN = {"x": (A, X, Y), "A": (A, A_MOVED, X)}
# What a move is called.
SIZE = {"x": "|x - y|", "A": "|A - A'|"}

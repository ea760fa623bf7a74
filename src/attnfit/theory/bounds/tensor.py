"""Attention-matrix regression: sizes and changes of the quantities of each query."""

from __future__ import annotations

import numpy as np

from attnfit.theory.bound import Bound, Sharp
from attnfit.theory.bounds.assumptions import (
    B_UNIT,
    BETA,
    EXP,
    SHARES,
    SMALL,
    WITHIN,
    A,
    X,
)  # fmt: skip
from attnfit.theory.bounds.weight_shift import (
    exponential_change,
    half_of_the_logits,
    inverse_change,
    inverse_normaliser,
    normaliser_change,
    small_step,
)  # fmt: skip
from attnfit.theory.instances.regression import Regression
from attnfit.theory.logs import log_norm, product

BOTH = ("softmax", "rescaled")


def _entropy_counterexample() -> Regression:
    """Equal logits: ``log f = -log 10`` ten times, whatever R."""
    return Regression(np.zeros((10, 1)), np.zeros(10), [0.0], [0.0], R=0.5)


def _logarithm_counterexample(which: str) -> Regression:
    """Two nearly equal shares: logarithms move twice as far as the shares."""
    A = np.array([[1.0], [-1.0]])
    if which == "x":
        return Regression(A, [0.5, 0.5], [0.0], [0.009])
    return Regression(A, [0.5, 0.5], [0.5], [0.5], A_moved=1.018 * A)


def _sizes() -> list[Bound[Regression]]:
    def start(i: Regression):  # type: ignore[no-untyped-def]
        return i.weights.start

    return [
        *(inverse_normaliser(f"TT-6.{k}") for k in (1, 2, 4)),
        Bound(
            "TT-6.3", "size of u_j = exp(A_[j] x)", "|u_j| <= sqrt(n) e^{R^2}", Regression,
            lambda i: log_norm(start(i).u, i.weights.scale),
            lambda i, R: product(i.n**0.5, exponent=R * R),
            (A, X, EXP), worst="0.97", models=("exponential", *BOTH),
        ),
        Bound(
            "TT-6.5", "size of f_j = softmax(A_[j] x)", "|f_j| <= 1", Regression,
            lambda i: log_norm(start(i).f), lambda i, R: 0.0, worst="1.00", models=("softmax",),
        ),
        Bound(
            "TT-6.6", "size of h_j = log f_j", "|h_j| <= 2 sqrt(n) R^2", Regression,
            lambda i: log_norm(start(i).h), lambda i, R: product(2, i.n**0.5, R, R), (X, BETA["x"]),
            status="fails", worst="7.7, unbounded as R -> 0",
            sharp=Sharp(
                "|h_j| <= sqrt(n) (sqrt(2) |A_[j]| |x| + log n)",
                lambda i, R: product(i.n**0.5, 2**0.5 * i.block_norms * i.x_norm + np.log(i.n)),
            ),
            remark="printed without a condition on R or A; with |A_[j]| <= R and R > 4 it holds (0.50)",
            counterexample=_entropy_counterexample, models=("softmax",),
        ),
        Bound(
            "TT-6.7", "residual c_j = f_j - b_j", "|c_j| <= 2", Regression,
            lambda i: log_norm(start(i).residual), lambda i, R: product(2), (B_UNIT,),
            worst="1.00", models=("softmax",),
        ),
        Bound(
            "TT-6.8", "normaliser alpha_j", "alpha_j <= n e^{R^2}", Regression,
            lambda i: start(i).log_alpha, lambda i, R: product(i.n, exponent=R * R),
            (A, X, EXP), worst="0.97", models=BOTH,
        ),
        Bound(
            "TT-6.9", "rescaled residual q_j = u_j - alpha_j b_j", "|q_j| <= 2 n e^{R^2}", Regression,
            lambda i: log_norm(start(i).c, i.weights.scale),
            lambda i, R: product(2, i.n, exponent=R * R),
            (A, X, B_UNIT, EXP), worst="0.99", models=("rescaled",),
        ),
    ]  # fmt: skip


def _changes(which: str, first: int) -> list[Bound[Regression]]:
    """Lemmas 7.1 to 7.7 for a move of x, 7.8 to 7.14 for one of the data."""
    size = "|x - y|" if which == "x" else "|A_[j] - A'_[j]|"
    near = (*WITHIN[which], SMALL[which])

    def softmax_change(k: int, name: str, extra: tuple = ()) -> Bound[Regression]:  # type: ignore[type-arg]
        return Bound(
            f"TT-7.{first + k}", f"change of {name}",
            f"|{name[:3]}' - {name[:3]}| <= 4 beta^-2 n^1.5 R e^{{2R^2}} {size}", Regression,
            lambda i: log_norm(i.move(which).df),
            lambda i, R: product(
                4, i.n**1.5, R, i.move(which).size, exponent=2 * R * R - 2 * i.log_beta(which).min()
            ),
            (*near, BETA[which], *extra, EXP), worst="0.16", sharp=half_of_the_logits(which),
            models=("softmax",),
        )  # fmt: skip

    return [
        exponential_change(f"TT-7.{first}", which),
        normaliser_change(f"TT-7.{first + 1}", which),
        inverse_change(f"TT-7.{first + 2}", which),
        softmax_change(3, "f_j"),
        Bound(
            f"TT-7.{first + 4}", "change of h_j = log f_j", "|h_j' - h_j| <= |f_j' - f_j|", Regression,
            lambda i: log_norm(i.move(which).dh), lambda i, R: log_norm(i.move(which).df),
            (*near, SHARES[which]), status="fails", worst="1e+10, like 1/min f",
            sharp=Sharp(
                "|h_j' - h_j| <= (1 + sqrt n) |z' - z|, |.|_inf <= 2 |z' - z|_inf",
                lambda i, R: np.stack([
                    product(1 + i.lengths**0.5, exponent=log_norm(i.move(which).dz)),
                    product(2, np.abs(i.move(which).dz).max(axis=1)),
                ]),
                lambda i: np.stack([
                    log_norm(i.move(which).dh), product(np.abs(i.move(which).dh).max(axis=1))
                ]),
            ),
            counterexample=lambda: _logarithm_counterexample(which), models=("softmax",),
        ),
        softmax_change(5, "c_j = f_j - b_j", (B_UNIT,)),
        Bound(
            f"TT-7.{first + 6}", "change of q_j = u_j - alpha_j b_j",
            f"|q_j' - q_j| <= 4 n R e^{{R^2}} {size}", Regression,
            lambda i: log_norm(i.move(which).dc, i.move(which).scale),
            lambda i, R: product(4, i.n, R, i.move(which).size, exponent=R * R),
            (*near, B_UNIT, EXP), worst="0.50", models=("rescaled",),
        ),
    ]  # fmt: skip


BOUNDS: list[Bound[Regression]] = [
    small_step("TT-F4.3", "x"),
    *_sizes(),
    *_changes("x", 1),
    *_changes("A", 8),
]

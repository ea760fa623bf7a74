"""Softmax regression: how far outputs move with x or with the data."""

from __future__ import annotations

import numpy as np

from attnfit.theory.bound import Bound, Condition, Sharp
from attnfit.theory.bounds.assumptions import BETA, EXP, SIZE, SMALL, WITHIN, A, X
from attnfit.theory.instances.regression import Regression
from attnfit.theory.logs import Array, log, log_norm, product

MODELS = ("softmax",)
# Lemmas 5.5 and 7.5 want beta in (0, 1).
LARGEST_BETA = 0.9999


def inverse_normaliser(id: str, which: str = "x") -> Bound[Regression]:
    """``1/alpha <= e^{R^2}``, in several papers."""
    return Bound(
        id,
        "inverse of the normaliser alpha = <exp(Ax), 1>",
        "1/alpha <= e^{R^2}",
        Regression,
        lambda i: -i.move(which).start.log_alpha,
        lambda i, R: R * R,
        (A, X, EXP),
        worst="1.00 at n = 1, 0.49 beyond",
        sharp=Sharp(
            "1/alpha <= e^{R^2/sqrt n}/n",
            lambda i, R: product(1 / i.lengths, exponent=R * R / i.lengths**0.5),
        ),
        models=MODELS,
    )


def exponential_change(id: str, which: str, worst: str = "0.50") -> Bound[Regression]:
    """``|u' - u| <= 2 sqrt(n) R e^{R^2} |move|``, in several papers."""
    return Bound(
        id,
        "change of u = exp(Ax)",
        f"|u' - u| <= 2 sqrt(n) R e^{{R^2}} {SIZE[which]}",
        Regression,
        lambda i: log_norm(i.move(which).du, i.move(which).scale),
        lambda i, R: product(2, i.lengths**0.5, R, i.move(which).size, exponent=R * R),
        (*WITHIN[which], SMALL[which], EXP),
        worst=worst,
        models=("exponential", "softmax", "rescaled"),
    )


def normaliser_change(id: str, which: str) -> Bound[Regression]:
    """``|alpha' - alpha| <= sqrt(n) |u' - u|``, in several papers."""
    return Bound(
        id,
        "change of the normaliser alpha",
        "|alpha' - alpha| <= sqrt(n) |u' - u|",
        Regression,
        lambda i: log_norm(i.move(which).dalpha[:, None], i.move(which).scale),
        lambda i, R: product(i.lengths**0.5, exponent=log_norm(i.move(which).du, i.move(which).scale)),
        worst="1.00",
        models=("exponential", "softmax", "rescaled"),
    )


def inverse_change(id: str, which: str) -> Bound[Regression]:
    """``|1/alpha' - 1/alpha| <= beta^-2 |alpha' - alpha|``, in several papers."""
    return Bound(
        id,
        "change of the inverse normaliser",
        "|1/alpha' - 1/alpha| <= beta^-2 |alpha' - alpha|",
        Regression,
        lambda i: i.move(which).log_dalpha_inverse,
        lambda i, R: log_norm(i.move(which).dalpha[:, None], i.move(which).scale) - 2 * i.log_beta(which),
        (BETA[which], EXP),
        worst="1.00",
        models=("softmax", "rescaled"),
    )


def small_step(id: str, which: str, worst: str = "0.50") -> Bound[Regression]:
    """``|exp a - exp b| <= 2 |a - b|_inf |exp a|`` for a and b the logits, in several papers."""
    return Bound(
        id,
        "change of exp between the logits a = Ax and b = Ay",
        "|exp a - exp b|_2 <= 2 |a - b|_inf |exp a|_2",
        Regression,
        lambda i: log_norm(i.move(which).du, i.move(which).scale),
        lambda i, R: product(
            2,
            np.abs(i.move(which).dz).max(axis=1),
            exponent=log_norm(i.move(which).start.u, i.move(which).scale),
        ),
        (SMALL[which], EXP),
        worst=worst,
        models=("exponential", "softmax", "rescaled"),
    )


def half_of_the_logits(which: str) -> Sharp[Regression]:
    """Return ``|f' - f| <= 1/2 |A(x - y)|``: the Jacobian of the softmax has norm at most 1/2."""
    formula = "|f' - f| <= 1/2 |A(x - y)|" if which == "x" else "|f' - f| <= 1/2 |(A - A')x|"
    return Sharp(formula, lambda i, R: product(0.5, exponent=log_norm(i.move(which).dz)))


def _first(i: Regression, which: str) -> Array:
    move = i.move(which)
    return np.asarray(move.log_dalpha_inverse + log_norm(move.end.u, move.scale))


def _second(i: Regression, which: str) -> Array:
    move = i.move(which)
    return log_norm(move.du, move.scale) - move.start.log_alpha


def _log_beta(i: Regression, which: str) -> Array:
    """Return ``log beta``: given, or the largest that both ``alpha >= beta`` and ``beta < 1`` allow."""
    beta = i.log_beta(which)
    return beta if i.beta is not None else np.minimum(beta, np.log(LARGEST_BETA))


def _beta_in_range(i: Regression, R: float) -> str | None:
    if i.beta is None or 0.0 < i.beta < 1.0:
        return None
    return f"beta = {i.beta:.6g} is not in (0, 1)"


BETA_IN_RANGE = Condition[Regression]("0 < beta < 1", _beta_in_range)


def _first_change(i: Regression, which: str) -> Array:
    """Return ``log(e^m - 1)`` with m the largest change of a logit."""
    return log(np.expm1(np.abs(i.move(which).dz).max(axis=1)))


def _shift(which: str, section: str) -> list[Bound[Regression]]:
    assumed = (*WITHIN[which], SMALL[which], BETA[which], BETA_IN_RANGE, EXP)
    size = SIZE[which]
    number = {"5": ("5.6", "5.7", "5.8"), "7": ("7.6", "7.7", "7.8")}[section]
    return [
        Bound(
            f"WS-{section}.5.1",
            "first part of the shift, delta_1 = (1/alpha' - 1/alpha) u'",
            f"|delta_1| <= 2 beta^-2 n^1.5 e^{{2R^2}} {size}",
            Regression,
            lambda i: _first(i, which),
            lambda i, R: product(
                2, i.lengths**1.5, i.move(which).size, exponent=2 * R * R - 2 * _log_beta(i, which)
            ),
            assumed,
            worst="8e-10; below 1/16 by proof",
            floor=4.0,
            sharp=Sharp(
                "|delta_1| <= e^{|z' - z|_inf} - 1, z the logits", lambda i, R: _first_change(i, which)
            ),
            remark="the proof gives a further factor R, which beta < 1 makes up for: |delta_1| = |f'| |1 - "
            "alpha'/alpha| <= e^{R s} - 1 with s <= 2R the move, convex in s",
            models=MODELS,
        ),
        Bound(
            f"WS-{section}.5.2",
            "second part of the shift, delta_2 = (u' - u)/alpha",
            f"|delta_2| <= 2 beta^-1 sqrt(n) R e^{{R^2}} {size}",
            Regression,
            lambda i: _second(i, which),
            lambda i, R: product(
                2, i.lengths**0.5, R, i.move(which).size, exponent=R * R - _log_beta(i, which)
            ),
            assumed,
            worst="6e-8",
            floor=4.0,
            models=MODELS,
        ),
        Bound(
            f"WS-{section}.5.3",
            "change of the softmax",
            f"|f' - f| <= 4 beta^-2 n^1.5 R e^{{2R^2}} {size}",
            Regression,
            lambda i: log_norm(i.move(which).df),
            lambda i, R: product(
                4, i.lengths**1.5, R, i.move(which).size, exponent=2 * R * R - 2 * _log_beta(i, which)
            ),
            assumed,
            worst="5e-16",
            floor=4.0,
            sharp=half_of_the_logits(which),
            models=MODELS,
        ),
        exponential_change(f"WS-{number[0]}", which),
        normaliser_change(f"WS-{number[1]}", which),
        inverse_change(f"WS-{number[2]}", which),
    ]


def _theorem(id: str, which: str) -> Bound[Regression]:
    size = SIZE[which]
    return Bound(
        id,
        "shift of the target that reproduces the move, b~ - b = -(f' - f)",
        f"|b~ - b| <= n^1.5 e^{{10R^2}} {size}",
        Regression,
        lambda i: log_norm(i.move(which).df),
        lambda i, R: product(i.lengths**1.5, i.move(which).size, exponent=10 * R * R),
        (*WITHIN[which], SMALL[which], EXP),
        worst="1e-70",
        floor=4.0,
        sharp=Sharp(f"|b~ - b| <= 1/2 R {size}", lambda i, R: product(0.5, R, i.move(which).size)),
        remark="|x| <= R is missing from the printed assumptions; the sharp form is attained (1.00)",
        models=MODELS,
    )


BOUNDS: list[Bound[Regression]] = [
    small_step("WS-F3.1", "x"),
    inverse_normaliser("WS-3.3"),
    *_shift("x", "5"),
    *_shift("A", "7"),
    _theorem("WS-8.1", "x"),
    _theorem("WS-8.2", "A"),
]

"""The Hessian of rescaled regression between two points: the change of its five parts."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from attnfit.theory.bound import Bound, Sharp
from attnfit.theory.bounds.assumptions import SMALL, A, B, X, Y
from attnfit.theory.bounds.rescaled_hessian import MODELS, Middle, size
from attnfit.theory.instances.regression import Regression
from attnfit.theory.instances.state import Move
from attnfit.theory.logs import Array, largest, log, log_max, log_norm, product, total
from attnfit.theory.spectra import factored_norm


def _size_of_both(i: Regression) -> Array:
    """Return ``log R_inf``, the same over both points."""
    end, scale = i.weights.end, i.weights.scale
    return largest(size(i), log_norm(end.u, scale), log_norm(end.v, scale), log_norm(end.c, scale))


def _lengths(i: Regression, *names: str) -> Array:
    """Return ``log max`` of the norms of these vectors over both points."""
    s = i.weights
    return largest(*(log_norm(getattr(p, n), s.scale) for p in (s.start, s.end) for n in names))


def _moved(i: Regression, *names: str) -> Array:
    """Return ``log`` of the norm of each of these changes, stacked."""
    return np.stack([log_norm(getattr(i.weights, name), i.weights.scale) for name in names])


def _change_of_outer(i: Regression, weighted: bool) -> Array:
    """Return ``log`` of the norm of the change of ``v v^T``, or of ``v (v o b)^T``, from factors that do not
    cancel.
    """
    move = i.weights
    b = i.b if weighted else np.ones_like(i.b)
    left = np.stack([move.dv, move.end.v], axis=-1)
    right = np.stack([move.start.v * b, move.dv * b], axis=-1)
    return log(factored_norm(left, right)) + 2 * move.scale


def _parts(i: Regression) -> list[Array]:
    """Return ``log |G_k|`` of the five parts."""
    m = i.weights
    s, e = m.start, m.end
    mixed = _change_of_outer(i, weighted=True)
    diagonal = (s.v + e.v) * m.dv + m.dc * e.u + s.c * m.du
    inner = np.sum(m.dc * i.b, axis=1, keepdims=True) * e.u + np.sum(s.c * i.b, axis=1, keepdims=True) * m.du
    return [
        mixed, mixed, 2 * log(i.b_norms) + _change_of_outer(i, weighted=False),
        log_max(diagonal, 2 * m.scale), log_max(inner, 2 * m.scale),
    ]  # fmt: skip


def _hessian_change(i: Regression) -> Array:
    move: Move = i.weights
    change = Middle(move.end).between(i.A) - Middle(move.start).between(i.A)
    return log(np.linalg.norm(change, 2, axis=(1, 2))) + 2 * move.scale


def _flat_counterexample() -> Regression:
    """Cosh is even: outputs agree where slopes differ."""
    return Regression(np.eye(2), [1.0, 1.0], [0.004, 0.004], [0.004, -0.004], function="cosh")


def _changes() -> list[Bound[Regression]]:
    def with_slopes(i: Regression) -> Array:
        return largest(*_moved(i, "du", "dc", "dv"))

    def slope(i: Regression) -> Array:
        """Return ``log 2 max|v| |v' - v|``."""
        return np.asarray(product(2) + _lengths(i, "v") + _moved(i, "dv")[0])

    def sizes(i: Regression) -> Array:
        """Return ``log 4 max(|u|, |c|) (|u' - u| + |c' - c|)``."""
        return product(4) + _lengths(i, "u", "c") + total(*_moved(i, "du", "dc"))

    def part(
        number: str, k: int, formula: str, rhs: Callable[[Regression], Array], worst: str
    ) -> Bound[Regression]:
        return Bound(
            f"RH-{number}", f"change of part {k} of B", f"|G_{k}| <= {formula}", Regression,
            lambda i: _parts(i)[k - 1], lambda i, R: rhs(i), worst=worst, models=MODELS,
        )  # fmt: skip

    return [
        Bound(
            "RH-9.1", "change of the Hessian", "|H(x) - H(y)| <= n^4 e^{20R^2} |x - y|", Regression,
            _hessian_change, lambda i, R: product(i.lengths**4, i.weights.size, exponent=20 * R * R),
            (A, X, Y, B, SMALL["x"]), floor=4.01, worst="1e-123",
            remark="use the computable local constant of attnfit.certificates instead", models=MODELS,
        ),
        Bound(
            "RH-9.5.1", "change of the five parts of B, added up",
            "sum |G_k| <= 20 R_inf^3 max(|u' - u|, |c' - c|)", Regression,
            lambda i: total(*_parts(i)),
            lambda i, R: product(20) + 3 * _size_of_both(i) + largest(*_moved(i, "du", "dc")),
            status="fails", worst="exp 0.37, sinh 0.16; cosh unbounded",
            sharp=Sharp(
                "sum |G_k| <= 20 R_inf^3 max(|u' - u|, |c' - c|, |v' - v|)",
                lambda i, R: product(20) + 3 * _size_of_both(i) + with_slopes(i),
            ),
            remark="fails for cosh, which is flat where sinh is not; R_inf = max of |u|, |v|, |c|, |b|, 1 "
            "over both points",
            counterexample=_flat_counterexample, models=MODELS,
        ),
        Bound(
            "RH-9.5.2", "change of the five parts of B, added up",
            "sum |G_k| <= 100 R_inf^3 R sqrt(n) |u' - u|", Regression, lambda i: total(*_parts(i)),
            lambda i, R: product(100, R, i.lengths**0.5) + 3 * _size_of_both(i) + _moved(i, "du")[0],
            (B,), status="fails", worst="exp 0.04, sinh 0.02; cosh unbounded", floor=1.0,
            sharp=Sharp(
                "sum |G_k| <= 100 R_inf^3 R sqrt(n) max(|u' - u|, |v' - v|)",
                lambda i, R: product(100, R, i.lengths**0.5) + 3 * _size_of_both(i)
                + largest(*_moved(i, "du", "dv")),
            ),
            remark="fails for cosh like the part before", counterexample=_flat_counterexample, models=MODELS,
        ),
        part("9.6", 1, "2 max|v| |b| |v' - v|", lambda i: slope(i) + log(i.b_norms), "1.00"),
        part("9.7", 2, "2 max|v| |b| |v' - v|", lambda i: slope(i) + log(i.b_norms), "1.00"),
        part("9.8", 3, "2 max|v| |b|^2 |v' - v|", lambda i: slope(i) + 2 * log(i.b_norms), "1.00"),
        part("9.9", 4, "4 max(|u|, |c|) (|u' - u| + |c' - c|)", sizes, "0.63"),
        part(
            "9.10", 5, "4 max(|u|, |c|) |b| (|u' - u| + |c' - c|)", lambda i: sizes(i) + log(i.b_norms),
            "0.25"
        ),
    ]  # fmt: skip


BOUNDS: list[Bound[Regression]] = _changes()

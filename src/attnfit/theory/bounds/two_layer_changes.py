"""A softmax followed by a layer: sizes, changes between two points, and the Lipschitz Hessian."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from attnfit.losses.activations import Activation
from attnfit.theory.bound import Bound, Condition, Sharp, Size
from attnfit.theory.bounds.two_layer import MODELS, WITHIN, new_curvature, new_size, whole
from attnfit.theory.instances.two_layer import Layers, TwoLayer
from attnfit.theory.logs import Array, log, log_norm, product
from attnfit.theory.spectra import extreme_eigenvalues

Right = Callable[[TwoLayer, float], Array]
Left = Callable[[TwoLayer], Array]


def _small_layer(i: TwoLayer, R: float) -> str | None:
    return None if _size(i) >= 1.0 else f"R_h = {i.size:.6g} is below 1"


def _size(i: TwoLayer) -> float:
    """Return R_h of at least 1, unless it is given."""
    return i.size if i.R_h is not None else max(i.size, 1.0)


def _jerk(i: TwoLayer, R: float) -> str | None:
    if not i.activation.bounds_known:
        return "how Lipschitz h'' is, is not known"
    if i.activation.jerk <= _third_constant(i) * (1 + 1e-9):
        return None
    return f"sup |third derivative of h| = {i.activation.jerk:.6g} exceeds L_h = {i.lipschitz:.6g}"


def _third_constant(i: TwoLayer) -> float:
    """Return L_h, for h'' too unless it is given."""
    return max(i.lipschitz, i.slopes[2]) if i.L_h is None and i.activation.bounds_known else i.lipschitz


# The proofs put R_h^2 where R_h or none stands, or R_h where none does: printed for any R_h > 0.
AT_LEAST_ONE: Condition[TwoLayer] = Condition("R_h >= 1", _small_layer)
UNSTATED = "printed for any R_h > 0; the proof needs R_h >= 1, which is assumed here"
SMOOTH: Condition[TwoLayer] = Condition("h'' is L_h-Lipschitz", _jerk)


def _row(
    number: str, statement: str, left: str, formula: str, lhs: Left, rhs: Right, worst: str,
    sharp: Sharp[TwoLayer] | None = None, remark: str = "",
) -> Bound[TwoLayer]:  # fmt: skip
    assumed = (*WITHIN, AT_LEAST_ONE) if remark == UNSTATED else WITHIN
    return Bound(
        f"TL-{number}", statement, f"{left} <= {formula}", TwoLayer, lhs, rhs, assumed, worst=worst,
        floor=4.0, sharp=sharp, remark=remark, models=MODELS,
    )  # fmt: skip


def _step(i: TwoLayer) -> float:
    return float(i.move.size[0])


def _log_Rf(i: TwoLayer, R: float) -> float:
    """Return ``log R_f``, ``R_f = 2 n R e^{2R^2}/beta^2``."""
    return float(product(2, i.n, R, exponent=2 * R * R - 2 * i.log_beta))


def _gradient(at: Layers) -> Array:
    return np.asarray(at.of.A1.T @ at.a)


def _norm(values: Array) -> Array:
    return log(np.linalg.norm(values))


def _sizes() -> list[Bound[TwoLayer]]:
    at = "at x"
    return [
        _row(
            "E.1", "the exponentials", "|exp(A1 x)|", "sqrt(n) e^{R^2}",
            lambda i: log_norm(i.move.start.u, i.move.scale),
            lambda i, R: product(i.n**0.5, exponent=R * R), "0.71",
        ),
        _row(
            "E.2.1", "the softmax", "|f|", "sqrt(n) e^{R^2}/beta", lambda i: _norm(i.start.f),
            lambda i, R: product(i.n**0.5, exponent=R * R - i.log_beta), "6e-9",
            Sharp("|f| <= 1", lambda i, R: np.asarray(0.0)),
        ),
        _row("E.2.2", f"the residual {at}", "|c|", "R + R_h", lambda i: _norm(i.start.c),
             lambda i, R: log(R + i.size), "1.00"),
        _row("E.2.3", "Q2 = diag(h') A2", "|Q2|", "R R_h", lambda i: log(np.linalg.norm(i.start.Q2, 2)),
             lambda i, R: product(R, i.size), "0.997"),
        _row("E.2.4", "q2 = Q2^T c", "|q2|", "R R_h (R + R_h)", lambda i: _norm(i.start.q),
             lambda i, R: product(R, i.size, R + i.size), "0.80"),
        _row(
            "E.2.5", "p_i, the derivative of f in x_i", "|p_i|", "2 R n e^{2R^2}/beta^2",
            lambda i: log_norm(i.start.P.T),
            lambda i, R: product(2, R, i.n, exponent=2 * R * R - 2 * i.log_beta), "1e-17",
            Sharp("|p_i| <= R/2", lambda i, R: log(0.5 * R)),
        ),
    ]  # fmt: skip


def _changes() -> list[Bound[TwoLayer]]:
    half = Sharp[TwoLayer](
        "|f' - f| <= 1/2 |A1 (x - y)|", lambda i, R: product(0.5, np.linalg.norm(i.move.dz))
    )
    rows: list[tuple[str, str, str, Left, Right, str, Sharp[TwoLayer] | None, str]] = [
        ("1", "u", "R e^{R^2} |x - y|", lambda i: log_norm(i.move.du, i.move.scale),
         lambda i, R: product(R, _step(i), exponent=R * R), "0.94", None, ""),
        ("2", "alpha", "sqrt(n) |u' - u|", lambda i: log(np.abs(i.move.dalpha)) + i.move.scale,
         lambda i, R: product(i.n**0.5) + log_norm(i.move.du, i.move.scale), "1.00", None, ""),
        ("3", "1/alpha", "beta^-2 |alpha' - alpha|", lambda i: i.move.log_dalpha_inverse,
         lambda i, R: log(np.abs(i.move.dalpha)) + i.move.scale - 2 * i.log_beta, "1.00", None, ""),
        ("4", "f", "R_f |x - y|", lambda i: _norm(i.move.df), lambda i, R: log(_step(i)) + _log_Rf(i, R),
         "1e-17", half, ""),
        ("5", "c", "L_h R R_f |x - y|", lambda i: _norm(i.end.h - i.start.h),
         lambda i, R: product(i.lipschitz, R, _step(i), exponent=_log_Rf(i, R)), "1e-17", None, ""),
        ("6", "Q2", "R^2 R_f L_h |x - y|", lambda i: log(np.linalg.norm(i.end.Q2 - i.start.Q2, 2)),
         lambda i, R: product(i.lipschitz, R, R, _step(i), exponent=_log_Rf(i, R)), "1e-17", None, ""),
        ("7", "q2", "2 R^2 R_f R_h L_h (R + R_h) |x - y|", lambda i: _norm(i.end.q - i.start.q),
         lambda i, R: product(2, R, R, _size(i), i.lipschitz, R + _size(i), _step(i), exponent=_log_Rf(i, R)),
         "2e-18", None, UNSTATED),
        ("8", "the gradient g", "7 beta^-2 n L_h R_h R_f R^2 (R + R_h) e^{5R^2} |x - y|",
         lambda i: _norm(_gradient(i.end) - _gradient(i.start)),
         lambda i, R: product(7, i.n, i.lipschitz, _size(i), R, R, R + _size(i), _step(i),
                              exponent=5 * R * R - 2 * i.log_beta + _log_Rf(i, R)),
         "1e-55", None, UNSTATED),
        ("9", "p_i", "3 R R_f beta^-1 sqrt(n) e^{R^2} |x - y|", lambda i: log_norm((i.end.P - i.start.P).T),
         lambda i, R: product(3, R, i.n**0.5, _step(i), exponent=R * R - i.log_beta + _log_Rf(i, R)),
         "9e-27", None, ""),
    ]  # fmt: skip
    return [
        _row(f"E.3.{k}", f"change of {name}", "|change|", formula, lhs, rhs, worst, sharp, remark)
        for k, name, formula, lhs, rhs, worst, sharp, remark in rows
    ]


# ---- the Hessian


_PRINTED = "59 (R + R_h) n^2 e^{4R^2} beta^-4 R^5 R_h^2 R_f L_h |x - y|"


def log_printed_lipschitz(
    i: TwoLayer, R: float, size: float | None = None, L_h: float | None = None
) -> Array:
    """Return ``log M`` of Lemma 5.2; with another R_h or L_h if they are given."""
    size, L_h = i.size if size is None else size, i.lipschitz if L_h is None else L_h
    constant = product(59, R + size, i.n**2, R**5, size**2, L_h)
    return np.asarray(constant + 4 * R * R - 4 * i.log_beta + _log_Rf(i, R))


def _printed_lipschitz(i: TwoLayer, R: float) -> Array:
    return log(_step(i)) + log_printed_lipschitz(i, R)


def _hessian_change(i: TwoLayer) -> Array:
    change = i.end.between(i.A1) - i.start.between(i.A1)
    return log(np.linalg.norm(change, 2))


def _new_lipschitz(i: TwoLayer) -> Array:
    L1, L2, L3 = i.slopes
    A2, C = i.A2_norm, i.largest_residual
    return product(
        i.A1_norm**3,
        A2**3 * (3 * L1 * L2 + C * L3) / 8
        + 3 * A2**2 * (L1**2 + C * L2) / (2 * np.sqrt(2))
        + 2.5 * A2 * C * L1,
        _step(i),
    )


NEW_LIPSCHITZ = (
    "|A1|^3 [|A2|^3 (3 L1 L2 + C L3)/8 + 3 |A2|^2 (L1^2 + C L2)/(2 sqrt 2) + 2.5 |A2| C L1] |x - y|"
)


def _smoothstep(t: Array) -> Array:
    t = np.clip(t, 0.0, 1.0)
    return np.asarray(t * t * (3.0 - 2.0 * t))


def _ramp() -> TwoLayer:
    """``h'' = S(y/e)(1 - S((y - 1)/e))``, e = 1e-90, S the cubic smoothstep: h and h' are 1-Lipschitz, h is
    twice continuously differentiable, and the Hessian rises by 32 between two points 2e-90 apart.
    """
    width = 1e-90

    def jet(y: Array) -> tuple[Array, Array, Array]:
        # Up to e the integrals of S are of its order; beyond, h' is y and h is y^2/2, until they turn at 1.
        t = np.clip(y / width, 0.0, 1.0)
        slope = np.where(y < width, width * t**3 * (1.0 - 0.5 * t), np.clip(y, 0.0, 1.0) - 0.5 * width)
        value = np.where(y < 1.0, 0.5 * slope**2, y - 0.5)
        return value, slope, _smoothstep(y / width) * (1.0 - _smoothstep((y - 1.0) / width))

    h = Activation("ramp", jet, None, 1.0, 1.0, 1.5 / width, np.inf)
    A2 = 4.0 / np.sqrt(2.0) * np.array([[1.0, -1.0]])
    return TwoLayer([[1.0], [-1.0]], A2, [4.0], [width], [-width], h, R=4.0, R_h=1.0, L_h=1.0)


REPAIRED = "h'' is only assumed bounded; a Lipschitz h'' repairs it"


def _lipschitz(id: str) -> Bound[TwoLayer]:
    """Return Lemma 5.2, or its proof's Lemma E.5, which states no conditions."""
    fails = id == "TL-5.2"
    return Bound(
        id, "change of the Hessian of the data term", f"|H(x) - H(y)| <= {_PRINTED}", TwoLayer,
        _hessian_change,
        _printed_lipschitz
        if fails
        else lambda i, R: log(_step(i)) + log_printed_lipschitz(i, R, _size(i), _third_constant(i)),
        WITHIN if fails else (*WITHIN, AT_LEAST_ONE, SMOOTH), status="fails" if fails else "holds",
        worst="3e-53 for tanh; unbounded for h'' that jumps" if fails else "3e-53 for tanh", floor=4.0,
        sharp=Sharp(NEW_LIPSCHITZ + ", h'' Lipschitz", lambda i, R: _new_lipschitz(i)),
        remark=REPAIRED
        if fails
        else "printed without any condition, and taken here with R_h >= 1 and an h'' that is L_h-Lipschitz: "
        "with those of Lemma 5.2 alone it fails as that does. The proof takes an entry for the norm, a "
        "factor d",
        counterexample=_ramp if fails else None, models=MODELS,
    )  # fmt: skip


@dataclass(frozen=True)
class Part:
    """One of Lemmas E.6 to E.11: a part G_k of the Hessian, by its place in `Layers.entries`."""

    lemma: str
    name: str
    place: int
    formula: str
    rhs: Right
    worst: str
    remark: str = ""

    @property
    def k(self) -> int:
        """The number of the part."""
        return int(self.lemma.removeprefix("E.")) - 5


def _parts() -> list[Part]:
    def power(c: float, beta: float) -> Right:
        """``c (R + R_h) R^4 R_f L_h beta^-beta n^{beta/2} e^{beta R^2}``."""
        return lambda i, R: product(
            c, R + i.size, R**4, i.lipschitz, i.n ** (beta / 2), _step(i),
            exponent=beta * (R * R - i.log_beta) + _log_Rf(i, R),
        )  # fmt: skip

    def leading(i: TwoLayer, R: float, c: float, size: float) -> Array:
        """``c R_f R^4 (R + R_h) beta^-4 n^2 e^{4R^2}``."""
        constant = product(c, R**4, R + size, i.n**2, _step(i))
        return np.asarray(constant + 4 * R * R - 4 * i.log_beta + _log_Rf(i, R))

    low = "(R + R_h) R^4 R_f L_h beta^-1 sqrt(n) e^{R^2} |x - y|"
    high = "(R + R_h) R^4 R_f L_h beta^-3 n^1.5 e^{3R^2} |x - y|"
    return [
        Part("E.6", "h'^2", 0, "8 R_h^2 R_f R^5 L_h (R + R_h) beta^-4 n^2 e^{4R^2} |x - y|",
             lambda i, R: leading(i, R, 8.0, _size(i)) + product(_size(i) ** 2, R, i.lipschitz), "3e-53",
             UNSTATED),
        Part("E.7", "h''", 1, "24 R_h R_f R^4 (R + R_h) beta^-4 n^2 e^{4R^2} |x - y|",
             lambda i, R: leading(i, R, 24.0, i.size) + log(i.size),
             "3e-54 for tanh; unbounded for h'' that jumps", REPAIRED),
        Part("E.8", "2 <c, Q2 f> <f, A_i> <f, A_j>", 5, f"10 {high}", power(10.0, 3.0), "4e-44",
             "|x - y| is printed twice, a misprint"),
        Part("E.9", "<c, Q2 f> <f, A_i o A_j>", 4, f"4 {low}", power(4.0, 1.0), "9e-28"),
        Part("E.10", "2 <c, Q2 (f o A_j)> <f, A_i>", 3, f"10 {high}", power(10.0, 3.0), "2e-44"),
        Part("E.11", "<c, Q2 (A_i o f o A_j)>", 2, f"3 {low}", power(3.0, 1.0), "2e-27"),
    ]  # fmt: skip


def _hessian() -> list[Bound[TwoLayer]]:
    def entry(part: Part) -> Bound[TwoLayer]:
        row = _row(
            part.lemma, f"change of the entries of part G_{part.k} of the Hessian, {part.name}",
            f"max |G_{part.k}(x) - G_{part.k}(y)|", part.formula,
            lambda i: log(np.abs(i.end.entries[part.place] - i.start.entries[part.place]).max()), part.rhs,
            part.worst, remark=part.remark,
        )  # fmt: skip
        if part.remark != REPAIRED:
            return row
        sharp = Sharp[TwoLayer](NEW_LIPSCHITZ + ", h'' Lipschitz", lambda i, R: _new_lipschitz(i))
        return replace(row, status="fails", sharp=sharp, counterexample=_ramp)

    return [_lipschitz("TL-E.5"), *map(entry, _parts()), _lipschitz("TL-5.2")]


# ---- bounds of this library


def _moments(i: TwoLayer) -> tuple[Array, Array, float]:
    """Return centred q and direction ``u = A1 (y - x)`` under f, and ``|u|``."""
    f, u = i.start.f, i.move.dz[0]
    return i.start.q - i.start.fq, u - f @ u, float(np.linalg.norm(u))


def _third(i: TwoLayer) -> Array:
    q, u, _ = _moments(i)
    f = i.start.f
    return log(abs(f @ (q * u**3) - 3 * (f @ u**2) * (f @ (q * u))))


def _softmax_hessian(i: TwoLayer) -> Array:
    a, f = i.start.a, i.start.f
    core = np.array([[0.0, -1.0], [-1.0, 0.0]])
    return log(np.max(np.abs(extreme_eigenvalues(a, np.column_stack([a, f]), core))))


def _jacobian(i: TwoLayer) -> Array:
    f = i.start.f
    return log(np.max(np.abs(extreme_eigenvalues(f, f[:, None], -np.eye(1)))))


def _new() -> list[Bound[TwoLayer]]:
    known: tuple[Size[TwoLayer] | Condition[TwoLayer], ...] = ()

    def row(k: int, statement: str, formula: str, lhs: Left, rhs: Left, worst: str) -> Bound[TwoLayer]:
        return Bound(
            f"NEW-TL-{k}", statement, formula, TwoLayer, lhs, lambda i, R: rhs(i), known, worst=worst,
            models=MODELS,
        )  # fmt: skip

    return [
        row(1, "Jacobian of the softmax", "|diag(f) - f f^T| <= 1/2", _jacobian, lambda i: log(0.5), "0.998"),
        row(2, "Hessian N of q^T softmax", "|N(f, q)| <= |q|/sqrt 2", _softmax_hessian,
            lambda i: _norm(i.start.q) - 0.5 * np.log(2.0), "0.384"),
        row(3, "third derivative of q^T softmax along u = A1 (y - x)",
            "|D^3 (q^T softmax)[u, u, u]| <= 2.5 |q| |u|^3",
            _third, lambda i: np.log(2.5) + _norm(i.start.q) + 3 * log(_moments(i)[2]), "0.20"),
        row(4, "the Hessian of the data term in the logits",
            "|B| <= |A2|^2 (L1^2 + L2 |c|)/4 + |A2| L1 |c|/sqrt 2", whole, lambda i: log(new_size(i)),
            "1.00"),
        row(5, "its negative curvature", "-lambda_min(B) <= |A2|^2 L2 |c|/4 + |A2| L1 |c|/sqrt 2",
            lambda i: log(max(-extreme_eigenvalues(*i.start.factors)[0], 0.0)),
            lambda i: log(new_curvature(i)), "0.999"),
        row(6, "change of the Hessian of the data term, C >= |c| between the points",
            f"|H(x) - H(y)| <= {NEW_LIPSCHITZ}", _hessian_change, _new_lipschitz, "0.26"),
    ]  # fmt: skip


BOUNDS: list[Bound[TwoLayer]] = [*_sizes(), *_changes(), *_hessian(), *_new()]

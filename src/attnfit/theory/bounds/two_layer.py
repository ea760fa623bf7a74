"""A softmax followed by a layer: the parts of the Hessian in the logits, and convexity."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from attnfit.losses.activations import Activation
from attnfit.theory.bound import Bound, Condition, Corrected, Sharp, Size
from attnfit.theory.bounds.rescaled_hessian import DRAWS, EXPLICIT, SAMPLED, SAMPLING, sampling_error
from attnfit.theory.instances.two_layer import Layers, TwoLayer
from attnfit.theory.logs import Array, log, product
from attnfit.theory.spectra import extreme_eigenvalues, factored_norm

MODELS = ("two_layer",)


def _layer_size(i: TwoLayer, R: float) -> str | None:
    found = max(float(np.linalg.norm(v)) for at in (i.start, i.end) for v in (at.h, at.dh))
    return None if found <= i.size * (1 + 1e-9) else f"|h| or |h'| = {found:.6g} exceeds R_h = {i.size:.6g}"


def _normaliser(i: TwoLayer, R: float) -> str | None:
    smallest = float(min(i.move.start.log_alpha[0], i.move.end.log_alpha[0]))
    if i.log_beta >= np.log(0.1):
        return f"beta = {np.exp(i.log_beta):.6g} is not below 0.1"
    if smallest >= i.log_beta - 1e-9:
        return None
    return f"alpha = {np.exp(smallest):.6g} is below beta = {np.exp(i.log_beta):.6g}"


def _global_constants(i: TwoLayer, R: float) -> str | None:
    """Definition 3.5: h and h' are Lipschitz everywhere, not only between the points."""
    h: Activation = i.activation
    known = {"sup |h'|": h.slope, "sup |h''|": h.curvature}
    for at in (i.start, i.end):
        for name, values in (("|h'|", at.dh), ("|h''|", at.d2h)):
            known.setdefault(f"{name} between the points", 0.0)
            known[f"{name} between the points"] = max(
                known[f"{name} between the points"], float(np.abs(values).max())
            )
    for name, value in known.items():
        if value > i.lipschitz * (1 + 1e-9):
            return f"{name} = {value:.6g} exceeds L_h = {i.lipschitz:.6g}"
    return None


def _negative_target(i: TwoLayer, R: float) -> str | None:
    worst = int(np.argmin(i.b))
    return None if i.b[worst] >= 0.0 else f"b[{worst}] = {i.b[worst]:.6g} is negative"


def _square(i: TwoLayer, R: float) -> str | None:
    m, n = i.A2.shape
    return None if m == n else f"m = {m}, n = {n}: with A2 once, the printed matrices exist for m = n only"


def _full_rank(i: TwoLayer, R: float) -> str | None:
    if _smallest_singular_value(i) > 1e-12 * i.A1_norm:
        return None
    return "the smallest singular value of A1 is 0: no w makes the problem convex"


WITHIN: tuple[Size[TwoLayer] | Condition[TwoLayer], ...] = (
    Size("|A1|", lambda i: i.A1_norm),
    Size("|A2|", lambda i: i.A2_norm),
    Size("|b|", lambda i: float(np.linalg.norm(i.b))),
    Size("|x|", lambda i: float(np.linalg.norm(i.x))),
    Size("|y|", lambda i: float(np.linalg.norm(i.y))),
    Condition("R_h >= |h|, |h'|", _layer_size),
    Condition("alpha >= beta, beta < 0.1", _normaliser),
    Condition("h and h' are L_h-Lipschitz everywhere", _global_constants),
)
NONNEGATIVE: Condition[TwoLayer] = Condition("b >= 0", _negative_target)
# Lemma D.2, and what is built on it.
ASSUMED = (*WITHIN, NONNEGATIVE)
SQUARE: Condition[TwoLayer] = Condition("m = n", _square)
FULL_RANK: Condition[TwoLayer] = Condition("A1 has full column rank", _full_rank)


def _smallest_singular_value(i: TwoLayer) -> float:
    n, d = i.A1.shape
    return 0.0 if n < d else float(np.linalg.svd(i.A1, compute_uv=False)[-1])


# At x = 4 the first share is nearly 1.
SELECTING = np.array([[2.0], [-2.0]])


def _flat() -> Activation:
    """Return ``h = 1 - cos``: at zero h and h' vanish and h'' does not."""

    def jet(y: Array) -> tuple[Array, Array, Array]:
        return 1.0 - np.cos(y), np.sin(y), np.cos(y)

    return Activation("1 - cos", jet, np.sin, 1.0, 1.0, 1.0, 2.0)


def flat_layer() -> TwoLayer:
    """Return an instance with one output at the point where h and h' vanish."""
    R = 4.0
    A2 = R * np.array([[1.0, -1.0]]) / np.sqrt(2.0)
    return TwoLayer(np.eye(2), A2, [R], np.zeros(2), np.zeros(2), _flat(), R=R, R_h=0.05, l=1e-3)


def flat_square() -> TwoLayer:
    """Return the same with m = n = 2, where the printed matrices exist."""
    R = 4.0
    A2 = R / 2.0 * np.array([[1.0, -1.0], [1.0, -1.0]])
    return TwoLayer(np.eye(2), A2, [R, 0.0], np.zeros(2), np.zeros(2), _flat(), R=R, R_h=0.01)


def steep_layer() -> TwoLayer:
    """Return an instance where one share is nearly 1, h'' = L_h and the residual has length R + R_h = 5."""
    rate = 0.75 * np.pi

    def jet(y: Array) -> tuple[Array, Array, Array]:
        t = rate * y
        return 0.5 * (np.cos(t) - 1.0), -0.5 * rate * np.sin(t), -0.5 * rate**2 * np.cos(t)

    h = Activation("(cos(3 pi y/4) - 1)/2", jet, None, 0.5 * rate, 0.5 * rate**2, 0.5 * rate**3, 1.0)
    A2 = [[4.0, 0.0], [0.0, 0.0]]
    return TwoLayer(SELECTING, A2, [4.0, 0.0], [4.0], [4.0], h, R=4.0, R_h=1.0)


def far_layer() -> TwoLayer:
    """Return an instance with a residual of length R + R_h, R_h = 16, and h' = L_h = 1."""

    def jet(y: Array) -> tuple[Array, Array, Array]:
        return y - 20.0, np.ones_like(y), np.zeros_like(y)

    h = Activation("y - 20", jet, np.zeros_like, 1.0, 0.0, 0.0, np.inf)
    return TwoLayer(SELECTING, [[4.0, 0.0]], [4.0], [4.0], [4.0], h, R=4.0, L_h=1.0)


# ---- the twelve parts of B


def _norms(at: Layers) -> list[float]:
    """Return the norms of B_1 to B_12, from their factors."""
    f, q, A2 = at.f, at.q, at.of.A2
    weighted = at.Q2 * f
    pulled = f * (at.Q2.T @ (at.Q2 @ f))
    bent = (at.c * at.d2h)[:, None]
    curved = f * (A2.T @ (bent[:, 0] * (A2 @ f)))
    length = float(np.linalg.norm(f))
    pair = factored_norm(np.column_stack([f, f * q]), np.column_stack([f * q, f]))
    second = factored_norm((A2 * f).T, (bent * A2 * f).T)
    return [
        float(np.linalg.norm(weighted, 2)) ** 2,
        float(np.linalg.norm(pulled)) * length,
        float(np.linalg.norm(pulled)) * length,
        float(np.sum((at.Q2 @ f) ** 2)) * length**2,
        2 * abs(at.fq) * length**2,
        float(pair),
        float(np.abs(f * q).max()),
        float(second),
        float(np.linalg.norm(curved)) * length,
        float(np.linalg.norm(curved)) * length,
        abs(float((A2 @ f) @ (bent[:, 0] * (A2 @ f)))) * length**2,
        abs(at.fq) * float(f.max()),
    ]


def _curved(i: TwoLayer) -> Array | None:
    """Return ``A2 diag(h'' o c)``, the core of B_8 to B_11 as printed; None where m is not n."""
    at, (m, n) = i.start, i.A2.shape
    return i.A2 * (at.c * at.d2h) if m == n else None


def _printed_norms(i: TwoLayer) -> list[float]:
    """Return the norms of B_8 to B_11 as they are printed, with A2 once; not defined where m is not n."""
    core, f = _curved(i), i.start.f
    if core is None:
        return [np.nan] * 4
    length = float(np.linalg.norm(f))
    return [
        float(np.linalg.norm(f[:, None] * core * f, 2)),
        float(np.linalg.norm(f * (core @ f))) * length,
        float(np.linalg.norm(f * (f @ core))) * length,
        abs(float(f @ core @ f)) * length**2,
    ]


def printed_matrix(i: TwoLayer) -> Array:
    """Return the B of Definition 4.4 as printed, B_4 read as a matrix; for m = n only."""
    at, core = i.start, _curved(i)
    assert core is not None
    f, Q2 = at.f, at.Q2
    F, ff, G = np.diag(f), np.outer(f, f), Q2.T @ Q2
    return np.asarray(
        F @ G @ F + F @ G @ ff + ff @ G @ F + ff @ G @ ff + 2 * at.fq * ff + 2 * np.outer(f, f * at.q)
        + np.diag(f * at.q) + F @ core @ F + F @ core @ ff + ff @ core @ F + ff @ core @ ff + at.fq * F
    )  # fmt: skip


def _printed_whole(i: TwoLayer) -> Array:
    """Return ``log`` of the norm of the symmetric part of B as printed, which an order of it bounds."""
    if i.A2.shape[0] != i.A2.shape[1]:
        return np.asarray(np.nan)
    M = printed_matrix(i)
    return log(np.linalg.norm(0.5 * (M + M.T), 2))


CORRECTED = "the corrected matrices"

_PARTS = [
    "diag(f) Q2^T Q2 diag(f)", "-diag(f) Q2^T Q2 f f^T", "-f f^T Q2^T Q2 diag(f)", "f f^T Q2^T Q2 f f^T",
    "2 <f, q> f f^T", "-(f (f o q)^T + (f o q) f^T)", "diag(f o q)", "diag(f) A2^T diag(h'' o c) A2 diag(f)",
    "-diag(f) A2^T diag(h'' o c) A2 f f^T", "-f f^T A2^T diag(h'' o c) A2 diag(f)",
    "f f^T A2^T diag(h'' o c) A2 f f^T", "-<f, q> diag(f)",
]  # fmt: skip


def _parts() -> list[Bound[TwoLayer]]:
    Right = Callable[[TwoLayer, float], Array]

    def Q2(i: TwoLayer) -> float:
        return float(np.linalg.norm(i.start.Q2, 2))

    def part(
        k: int, formula: str, rhs: Right, worst: str, sharp: Sharp[TwoLayer] | None = None,
        counterexample: Callable[[], TwoLayer] | None = None,
    ) -> Bound[TwoLayer]:  # fmt: skip
        return Bound(
            f"TL-D.2.{k}", f"part B_{k} = {_PARTS[k - 1]} of the Hessian in the logits",
            f"|B_{k}| <= {formula}", TwoLayer, lambda i: log(_norms(i.start)[k - 1]), rhs, ASSUMED,
            status="holds" if sharp is None else "fails", worst=worst, floor=4.0, sharp=sharp,
            remark="" if sharp is None else "the proof takes |c| <= L_h + 1; it may be R + R_h"
            + ("; B_5 is printed in its place" if k > 5 else ""),
            counterexample=counterexample, models=MODELS,
        )  # fmt: skip

    def curved(k: int) -> Bound[TwoLayer]:
        """Return the row of a part that is printed with A2 once, and meant with A2 twice."""
        return Bound(
            f"TL-D.2.{k}", f"part B_{k} = {_PARTS[k - 1]} of the Hessian in the logits, printed with A2 once",
            f"|B_{k}| <= (R + R_h) L_h R", TwoLayer, lambda i: log(_printed_norms(i)[k - 8]),
            lambda i, R: product(R + i.size, i.lipschitz, R), (*ASSUMED, SQUARE), worst="1.00", floor=4.0,
            sharp=Sharp(
                "(R + R_h) L_h R^2 for the corrected matrices",
                lambda i, R: product(R + i.size, i.lipschitz, R * R), lambda i: log(_norms(i.start)[k - 1]),
            ),
            corrected=Corrected(
                CORRECTED, lambda i: log(_norms(i.start)[k - 1]), "fails", "R", steep_layer
            ),
            remark="the printed matrices exist for m = n only; the corrected ones need R^2", models=MODELS,
        )  # fmt: skip

    def residual(c: float, text: str) -> Sharp[TwoLayer]:
        return Sharp(f"{text}(R + R_h) |Q2|", lambda i, R: product(c, R + i.size, Q2(i)))

    return [
        *(part(k, "|Q2|^2", lambda i, R: product(Q2(i) ** 2), "1.00") for k in (1, 2, 3, 4)),
        *(
            part(
                k, "2 (L_h + 1) |Q2|", lambda i, R: product(2, i.lipschitz + 1, Q2(i)), worst,
                residual(2.0 if k < 7 else 1.0, "2 " if k < 7 else ""), far_layer,
            )
            for k, worst in ((5, "10"), (6, "10"), (7, "5"))
        ),
        *(curved(k) for k in (8, 9, 10, 11)),
        part(12, "R_h R (R + R_h)", lambda i, R: product(i.size, R, R + i.size), "0.997"),
    ]  # fmt: skip


# ---- the whole of B, and convexity


def whole(i: TwoLayer) -> Array:
    """Return ``log |B|``."""
    return log(np.max(np.abs(extreme_eigenvalues(*i.start.factors))))


def printed_size(i: TwoLayer, R: float) -> Array:
    """Return ``log 12 R_h L_h R (R + R_h)``."""
    return product(12, i.size, i.lipschitz, R, R + i.size)


def new_size(i: TwoLayer) -> float:
    """Return ``|A2|^2 (L1^2 + L2 |c|)/4 + |A2| L1 |c|/sqrt 2``, which bounds ``|B|``."""
    return i.A2_norm**2 * i.slopes[0] ** 2 / 4 + new_curvature(i)


def new_curvature(i: TwoLayer) -> float:
    """Return ``|A2|^2 L2 |c|/4 + |A2| L1 |c|/sqrt 2``, which bounds ``-lambda_min(B)``."""
    c = float(np.linalg.norm(i.start.c))
    L1, L2, _ = i.slopes
    return float(i.A2_norm**2 * L2 * c / 4 + i.A2_norm * L1 * c / np.sqrt(2.0))


def _penalty(i: TwoLayer, lower: float) -> float:
    """Return ``w^2 = lower + l / sigma_min^2``."""
    smallest = _smallest_singular_value(i)
    return lower + i.l / smallest**2 if smallest > 0 else np.inf


def _log_convexity(i: TwoLayer, w2: float) -> Array:
    """Return ``log lambda_min(A1^T (B + w^2) A1)``, minus infinity where it is negative."""
    if not np.isfinite(w2):
        return np.asarray(np.nan)
    left, values, _ = np.linalg.svd(i.A1, full_matrices=False)
    K = w2 * np.eye(left.shape[1]) + i.start.between(left)
    if np.linalg.eigvalsh(K)[0] <= 0.0:
        return np.asarray(-np.inf)
    return -log(np.linalg.norm(np.linalg.inv(K) / np.outer(values, values), 2))


def _sandwich(i: TwoLayer, w2: float) -> Array:
    """Return ``log`` of the larger of the two ratios in ``0.9 (B + W^2) <= W^2 <= 1.1 (B + W^2)``."""
    low, high = (value / w2 for value in extreme_eigenvalues(*i.start.factors))
    return log(np.maximum(0.9 * (1.0 + high), 1.0 / (1.1 * max(1.0 + low, 0.0)) if low > -1 else np.inf))


def _whole() -> list[Bound[TwoLayer]]:
    def size(id: str) -> Bound[TwoLayer]:
        return Bound(
            id, "the Hessian of the data term in the logits, B of Definition 4.4, symmetrised",
            "|B| <= 12 R_h L_h R (R + R_h)", TwoLayer, _printed_whole, printed_size, (*ASSUMED, SQUARE),
            status="fails", worst="4.40, unbounded as R_h -> 0", floor=4.0,
            sharp=Sharp(
                "|B| <= |A2|^2 (L1^2 + L2 |c|)/4 + |A2| L1 |c|/sqrt 2 for the corrected matrices",
                lambda i, R: log(new_size(i)), whole,
            ),
            corrected=Corrected(CORRECTED, whole, "fails", "26.9, unbounded as R_h -> 0", flat_square),
            remark="B has twelve parts, and R_h may be small. Of the corrected B it fails for R > 48 R_h and "
            "holds for R <= 44 R_h (L_h = 1)",
            counterexample=flat_square, models=MODELS,
        )  # fmt: skip

    def printed_penalty(i: TwoLayer, R: float, more: float = 0.0) -> float:
        return _penalty(i, more + float(np.exp(printed_size(i, R))))

    return [
        size("TL-D.1"),
        size("TL-5.1"),
        Bound(
            "TL-D.3.1", "convexity of the regularised problem, w^2 = 12 R_h L_h R (R + R_h) + l/sigma_min^2",
            "l <= lambda_min(A1^T (B + W^2) A1)", TwoLayer, lambda i: log(i.l),
            lambda i, R: _log_convexity(i, printed_penalty(i, R)), (*ASSUMED, FULL_RANK), status="fails",
            worst="unbounded", floor=4.0,
            sharp=Sharp(
                "w^2 = |A2|^2 L2 |c|/4 + |A2| L1 |c|/sqrt 2 + l/sigma_min^2",
                lambda i, R: _log_convexity(i, _penalty(i, new_curvature(i))),
            ),
            remark="fails with TL-D.1; printed for L, meant for L with the regulariser",
            counterexample=flat_layer, models=MODELS,
        ),
        Bound(
            "TL-D.3.2",
            "spectral sandwich of W^2, w^2 = 100 + 12 R_h L_h R (R + R_h) + l/sigma_min^2",
            "0.9 (B + W^2) <= W^2 <= 1.1 (B + W^2)", TwoLayer,
            lambda i: 0.0, lambda i, R: -_sandwich(i, printed_penalty(i, R, 100.0)),
            (*ASSUMED, FULL_RANK), status="fails", worst="1.06 and more", floor=4.0,
            sharp=Sharp(
                "w^2 = 11 |B|",
                lambda i, R: -_sandwich(i, max(11.0 * float(np.exp(whole(i))), np.finfo(float).tiny)),
            ),
            remark="tested as 1 <= the smaller of the two margins", counterexample=flat_layer, models=MODELS,
        ),
    ]  # fmt: skip


def _sampling() -> Bound[TwoLayer]:
    return Bound(
        "TL-6.5", SAMPLED, SAMPLING, TwoLayer,
        lambda i: np.asarray(sampling_error(i.A1 * np.sqrt(i.start.f)[:, None])),
        lambda i, R: log(0.3), worst=DRAWS, remark=EXPLICIT, models=MODELS,
    )  # fmt: skip


BOUNDS: list[Bound[TwoLayer]] = [*_parts(), *_whole(), _sampling()]

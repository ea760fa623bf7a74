"""A softmax followed by a layer: the parts of the Hessian in the logits, and convexity."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from attnfit.losses.activations import Activation
from attnfit.theory.bound import Bound, Condition, Sharp, Size
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
)
FULL_RANK: Condition[TwoLayer] = Condition("A1 has full column rank", _full_rank)


def _smallest_singular_value(i: TwoLayer) -> float:
    n, d = i.A1.shape
    return 0.0 if n < d else float(np.linalg.svd(i.A1, compute_uv=False)[-1])


# At x = 4 the first share is nearly 1.
SELECTING = np.array([[2.0], [-2.0]])


def flat_layer() -> TwoLayer:
    """Return an instance with ``h = 1 - cos``: h and h' vanish where h'' does not."""

    def jet(y: Array) -> tuple[Array, Array, Array]:
        return 1.0 - np.cos(y), np.sin(y), np.cos(y)

    R = 4.0
    h = Activation("1 - cos", jet, np.sin, 1.0, 1.0, 1.0, 2.0)
    A2 = R * np.array([[1.0, -1.0]]) / np.sqrt(2.0)
    return TwoLayer(np.eye(2), A2, [R], np.zeros(2), np.zeros(2), h, R=R, R_h=0.05, l=1e-3)


def steep_layer() -> TwoLayer:
    """Return an instance where one share is nearly 1, h = h'' = 1 and the residual has length R + R_h = 5."""

    def jet(y: Array) -> tuple[Array, Array, Array]:
        return 2.0 - np.cos(y - 4.0), np.sin(y - 4.0), np.cos(y - 4.0)

    h = Activation("2 - cos(y - 4)", jet, None, 1.0, 1.0, 1.0, 3.0)
    return TwoLayer(SELECTING, [[4.0, 0.0]], [-4.0], [4.0], [4.0], h, R=4.0, R_h=1.0)


def far_layer() -> TwoLayer:
    """Return an instance with a residual of length R + R_h, R_h = 16, and h' = L_h = 1."""

    def jet(y: Array) -> tuple[Array, Array, Array]:
        return y + 12.0, np.ones_like(y), np.zeros_like(y)

    h = Activation("y + 12", jet, np.zeros_like, 1.0, 0.0, 0.0, np.inf)
    return TwoLayer(SELECTING, [[4.0, 0.0]], [-4.0], [4.0], [4.0], h, R=4.0, L_h=1.0)


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
            f"|B_{k}| <= {formula}", TwoLayer, lambda i: log(_norms(i.start)[k - 1]), rhs, WITHIN,
            status="holds" if sharp is None else "fails", worst=worst, floor=4.0, sharp=sharp,
            remark="" if sharp is None or k > 7 else "the proof takes |c| <= L_h + 1; it may be R + R_h",
            counterexample=counterexample, models=MODELS,
        )  # fmt: skip

    def residual(c: float, text: str) -> Sharp[TwoLayer]:
        return Sharp(f"{text}(R + R_h) |Q2|", lambda i, R: product(c, R + i.size, Q2(i)))

    squared: Sharp[TwoLayer] = Sharp(
        "(R + R_h) L_h R^2", lambda i, R: product(R + i.size, i.lipschitz, R * R)
    )
    return [
        *(part(k, "|Q2|^2", lambda i, R: product(Q2(i) ** 2), "1.00") for k in (1, 2, 3, 4)),
        *(
            part(
                k, "2 (L_h + 1) |Q2|", lambda i, R: product(2, i.lipschitz + 1, Q2(i)), worst,
                residual(2.0 if k < 7 else 1.0, "2 " if k < 7 else ""), far_layer,
            )
            for k, worst in ((5, "10"), (6, "10"), (7, "7.5"))
        ),
        *(
            part(
                k, "(R + R_h) L_h R", lambda i, R: product(R + i.size, i.lipschitz, R), "R", squared,
                steep_layer
            )
            for k in (8, 9, 10, 11)
        ),
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
            id, "the Hessian of the data term in the logits, B", "|B| <= 12 R_h L_h R (R + R_h)", TwoLayer,
            whole, printed_size, WITHIN, status="fails", worst="26.9, unbounded as R_h -> 0", floor=4.0,
            sharp=Sharp(
                "|B| <= |A2|^2 (L1^2 + L2 |c|)/4 + |A2| L1 |c|/sqrt 2", lambda i, R: log(new_size(i))
            ),
            remark="B has twelve parts, and R_h may be small. It fails for R > 48 R_h and holds for R <= 44 "
            "R_h (L_h = 1)",
            counterexample=flat_layer, models=MODELS,
        )  # fmt: skip

    def printed_penalty(i: TwoLayer, R: float, more: float = 0.0) -> float:
        return _penalty(i, more + float(np.exp(printed_size(i, R))))

    return [
        size("TL-D.1"),
        size("TL-5.1"),
        Bound(
            "TL-D.3.1", "convexity of the regularised problem, w^2 = 12 R_h L_h R (R + R_h) + l/sigma_min^2",
            "l <= lambda_min(A1^T (B + W^2) A1)", TwoLayer, lambda i: log(i.l),
            lambda i, R: _log_convexity(i, printed_penalty(i, R)), (*WITHIN, FULL_RANK), status="fails",
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
            (*WITHIN, FULL_RANK), status="fails", worst="1.06 and more", floor=4.0,
            sharp=Sharp(
                "w^2 = 11 |B|",
                lambda i, R: -_sandwich(i, max(11.0 * float(np.exp(whole(i))), np.finfo(float).tiny)),
            ),
            remark="tested as 1 <= the smaller of the two margins", counterexample=flat_layer, models=MODELS,
        ),
    ]  # fmt: skip


BOUNDS: list[Bound[TwoLayer]] = [*_parts(), *_whole()]

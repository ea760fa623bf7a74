"""Certificates of mixtures: the duality gap, and how far the optimal proportions can be."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from attnfit.certificates.kantorovich import Certificate
from attnfit.data.inputs import as_point
from attnfit.objectives.layered import LayeredProblem
from attnfit.objectives.saturation import GAP_TOLERANCE, duality_gaps, target_sizes

Array = NDArray[np.float64]
Mask = NDArray[np.bool_]

# A signature whose slack is below this share of the right-hand side's size may belong to the optimal face.
SLACK = 1e-6
# Below this share of the largest singular value a face does not identify its proportions.
RANK = 1e-10
# Supports whose uniqueness is decided by a linear programme, and the largest one, in entries of A2.
N_PROGRAMMES = 64
PROGRAMME_ENTRIES = 1 << 20
# Larger proportions are present: they can become smaller as well as larger.
PRESENT = 1e-9
# Signatures move no fitted value along a direction of which less than this is left.
NULL = 1e-9


@dataclass(frozen=True)
class MixtureCertificate(Certificate):
    """What is certified of the proportions ``f = softmax(x)`` of a mixture.

    ``radius`` and ``radii`` bound ``||f - f*||_2`` for every optimal f* (infinite where f* is not unique,
    or not proven to be), ``scaled_radius`` bounds ``||w^(1/2) A2 (f - f*)||_2``, which is unique.
    ``radius`` and ``scaled_radius`` are of all right-hand sides together (the root of the sum of squares),
    ``value_gap`` the sum of all gaps, ``lambda_min`` the smallest; ``eta`` and ``lipschitz`` are zero: the
    problem is quadratic in f.

    Attributes
    ----------
    gap : ndarray, shape (k,)
        Duality gap of each right-hand side, rounding included: ``L(f) - L* <= gap``.
    relative_gap : ndarray, shape (k,)
        Relative to ``0.5 sum w b^2``, or to the loss where that is larger; `valid` means all are below 1e-9.
    uniqueness : ndarray of str, shape (k,)
        "unique", "not unique" (a direction in which the proportions can go without a change of the fit is
        known) or "not proven unique".
    """

    gap: Array = field(default_factory=lambda: np.zeros(0))
    relative_gap: Array = field(default_factory=lambda: np.zeros(0))
    uniqueness: NDArray[np.str_] = field(default_factory=lambda: np.zeros(0, dtype="<U17"))


def certify_mixture(problem: LayeredProblem, x: Any) -> MixtureCertificate:
    """Certify the proportions of every right-hand side of a mixture.

    With q the gradient of the loss in f, convexity gives ``L(f) - L* <= <q, f> - min_i q_i``; a signature
    whose slack ``q_i - min q`` is s has an optimal proportion of at most gap / s, and strong convexity on
    the remaining face bounds the rest. Where signatures of that face are dependent, a linear programme
    decides whether the proportions can go anywhere, for up to 64 different sets of signatures present.

    Parameters
    ----------
    problem : TwoLayer
        With ``is_mixture``.
    x : array_like, in the problem's natural shape

    Returns
    -------
    MixtureCertificate
    """
    k = problem.n_columns
    X = as_point(x, problem.shape).reshape(-1, k)
    gap, values = np.empty(k), np.empty(k)
    faces, present = np.empty((2, k, len(X)), dtype=bool)
    left, traces = np.empty((2, k))
    for run in problem.chunks():
        part = problem.columns(run)
        at = part.evaluate(X[:, run].reshape(-1))
        layers = part.layers_of(at)
        gap[run], values[run] = duality_gaps(part, layers), at.column_values
        slack = layers.q - layers.q.min(axis=0)
        size = SLACK * np.maximum(target_sizes(part), at.column_values)
        face = (layers.f > 0.0) | (slack <= np.maximum(size, 10.0 * gap[run]))
        outside = np.where(face, np.inf, slack).min(axis=0)
        faces[run], left[run] = face.T, gap[run] / outside
        present[run] = (layers.f > PRESENT).T
        traces[run] = np.where(layers.f > PRESENT, 0.0, layers.f).sum(axis=0)
    scales = np.maximum(target_sizes(problem), values)
    relative = np.divide(gap, scales, out=np.where(gap > 0.0, np.inf, 0.0), where=scales > 0.0)
    radii, smallest, uniqueness = _radii(problem, gap, faces, left, present, traces)
    valid = bool((relative <= GAP_TOLERANCE).all())
    n_open = int((~np.isfinite(radii)).sum())
    return MixtureCertificate(
        valid=valid,
        radius=float(np.linalg.norm(radii)) if valid else np.inf,
        scaled_radius=float(np.sqrt(2.0 * gap.sum())),
        value_gap=float(gap.sum()),
        reason=_reason(relative, uniqueness),
        eta=0.0,
        lipschitz=0.0,
        lambda_min=float(smallest.min()),
        n_unidentified=n_open,
        valid_for_predictions=valid,
        radii=radii,
        scaled_radii=np.sqrt(2.0 * gap),
        value_gaps=gap,
        gap=gap,
        relative_gap=relative,
        uniqueness=uniqueness,
    )


def _reason(relative: Array, uniqueness: NDArray[np.str_]) -> str:
    worst, bad = int(np.argmax(relative)), int((relative > GAP_TOLERANCE).sum())
    reason = f"duality gap at most {relative[worst]:.1e} of 0.5 sum w b^2"
    if bad:
        reason = (
            f"the duality gap of {bad} of {len(relative)} right-hand sides exceeds {GAP_TOLERANCE:.0e} of "
            f"0.5 sum w b^2, the worst is {worst} with {relative[worst]:.1e}; fit with the default solver"
        )
    for verdict in (NOT_UNIQUE, NOT_PROVEN):
        n = int((uniqueness == verdict).sum())
        if n:
            reason += f"; the proportions of {n} right-hand sides are {verdict}"
    return reason


UNIQUE, NOT_UNIQUE, NOT_PROVEN = "unique", "not unique", "not proven unique"


def _radii(
    problem: LayeredProblem, gap: Array, faces: Mask, left: Array, present: Mask, traces: Array
) -> tuple[Array, Array, NDArray[np.str_]]:
    """Return bounds of ``||f - f*||``, the smallest eigenvalues on the faces and the verdicts, shape (k,)
    each.

    ``w^(1/2) A2 (f - f*)`` has norm at most ``sqrt(2 gap)``, and at most ``left`` of f* lies off the face;
    ``traces`` of f are on signatures that are not present.
    """
    radii, smallest = np.full(len(gap), np.inf), np.zeros(len(gap))
    verdicts = np.full(len(gap), NOT_PROVEN)
    for columns, A in _by_set(problem, faces):
        face = faces[columns[0]]
        radii[columns], smallest[columns] = _on_face(A, face, gap[columns], left[columns])
    verdicts[np.isfinite(radii)] = UNIQUE
    open_ones = np.flatnonzero(verdicts == NOT_PROVEN)
    sets = _by_set(problem, present[open_ones], open_ones) if len(open_ones) else []
    for number, (columns, A) in enumerate(sets):
        if number == N_PROGRAMMES or A.size > PROGRAMME_ENTRIES:
            break
        support = present[columns[0]]
        verdict, dual = _decide(A, support)
        verdicts[columns] = verdict
        if dual is not None:
            off = dual.mass_off(np.sqrt(2.0 * gap[columns]), traces[columns])
            radii[columns], smallest[columns] = _on_face(A, support, gap[columns], off)
    return radii, smallest, verdicts


def _by_set(problem: LayeredProblem, sets: Mask, numbers: Any = None) -> Iterator[tuple[Any, Array]]:
    """Yield the right-hand sides that share a set of signatures, and ``w^(1/2) A2``."""
    outer = problem.outer.toarray() if sparse.issparse(problem.outer) else problem.outer
    weights = problem.weights
    shared = weights is None or weights.shape[1] == 1
    numbers = np.arange(len(sets)) if numbers is None else numbers
    member = np.unique(sets, axis=0, return_inverse=True)[1].reshape(-1) if shared else np.arange(len(sets))
    order = np.argsort(member, kind="stable")
    for columns in np.split(order, np.flatnonzero(np.diff(member[order])) + 1):
        of_all = numbers[columns]
        if weights is None:
            yield of_all, outer
        else:
            yield of_all, np.sqrt(weights[:, 0 if shared else of_all[0]])[:, None] * outer


def _on_face(A: Array, face: Mask, gap: Array, left: Array) -> tuple[Array, float]:
    """Return bounds of ``||f - f*||`` for f on the face, infinite where it does not identify proportions, and
    the smallest eigenvalue there.
    """
    longest = float(np.linalg.norm(A, axis=0).max())
    # Differences of proportions sum to what lies off the face: centring costs nothing and conditions better.
    centre = A[:, face].mean(axis=1)
    height = float(np.linalg.norm(A[:, face] - centre[:, None], 2))
    if height <= RANK * longest:
        # One signature, or copies of one.
        height = longest or 1.0
    stacked = np.vstack([A[:, face] - centre[:, None], np.full((1, int(face.sum())), height)])
    values = np.linalg.svd(stacked, compute_uv=False)
    if len(values) < face.sum() or values[-1] <= RANK * values[0]:
        return np.full(len(gap), np.inf), 0.0
    # Subtracting the centre adds its length times what lies off the face.
    off = (longest + float(np.linalg.norm(centre))) * left
    misfit = np.hypot(np.sqrt(2.0 * gap) + off, height * left)
    return np.hypot(misfit / values[-1], left), float(values[-1] ** 2)


@dataclass(frozen=True)
class _Dual:
    """A vector y with ``(a_i - a_0) . y`` zero on the signatures present and positive on all others.

    For proportions f and f* with ``||A (f - f*)|| <= delta`` the sum over others of ``y . (a_i - a_0) (f*_i -
    f_i)`` is then at most ``||y|| delta``: so little of f* is not where f is.

    Attributes
    ----------
    length : float
        ``||y||``.
    least, most : float
        Over the signatures that are not present.
    rest : float
        What rounding leaves on those that are.
    """

    length: float
    least: float
    most: float
    rest: float

    def mass_off(self, delta: Array, traces: Array) -> Array:
        """Return how much of f* and of f at most lies on signatures that are not present, shape (k,)."""
        moved = self.length * delta + 2.0 * self.rest + self.most * traces
        return np.asarray(moved / self.least + traces)


def _decide(A: Array, support: Mask) -> tuple[str, _Dual | None]:
    """Decide whether other proportions give what those on the support give, by the linear programme
    ``min ||y||_1`` with ``y . (a_i - a_0) = 0`` on the support and ``>= 1`` off it, or its alternative: a
    direction v, not negative off the support, along which neither ``A f`` nor the sum changes.

    Both answers are checked, not believed.
    """
    from scipy.optimize import linprog

    D = A - A[:, [int(np.argmax(support))]]
    size = float(np.linalg.norm(D, axis=0).max()) or 1.0
    inside, outside = D[:, support] / size, D[:, ~support] / size
    if np.linalg.matrix_rank(inside, tol=RANK) < inside.shape[1] - 1:
        # All of these are present: their proportions can go either way.
        return NOT_UNIQUE, None
    if not outside.size:
        return NOT_PROVEN, None
    m = len(A)
    split = np.vstack([outside, -outside]).T
    found = linprog(
        np.ones(2 * m), A_ub=-split, b_ub=-np.ones(len(split)), A_eq=np.vstack([inside, -inside]).T,
        b_eq=np.zeros(inside.shape[1]), method="highs",
    )  # fmt: skip
    if found.x is not None:
        y = found.x[:m] - found.x[m:]
        y = y - inside @ np.linalg.lstsq(inside, y, rcond=None)[0]
        along, rest = outside.T @ y, float(np.abs(inside.T @ y).max())
        if along.min() > 0.5:
            length = float(np.linalg.norm(y)) / size
            return UNIQUE, _Dual(length, float(along.min()), float(along.max()), rest)
    n_in, n_out = inside.shape[1], outside.shape[1]
    moved = linprog(
        np.zeros(n_in + n_out), A_eq=np.vstack([np.hstack([inside, outside]), np.ones(n_in + n_out),
        np.append(np.zeros(n_in), np.ones(n_out))]), b_eq=np.append(np.zeros(m + 1), 1.0),
        bounds=[(None, None)] * n_in + [(0.0, None)] * n_out, method="highs",
    )  # fmt: skip
    if moved.x is None:
        return NOT_PROVEN, None
    change = np.hstack([inside, outside]) @ moved.x
    total = float(np.abs(moved.x).sum())
    small = max(float(np.linalg.norm(change)), abs(float(moved.x.sum()))) <= NULL * total
    return (NOT_UNIQUE if small else NOT_PROVEN), None

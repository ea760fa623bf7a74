"""Certificates of mixtures: the duality gap, and how far the optimal proportions can be."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from attnfit.certificates.kantorovich import Certificate
from attnfit.problems.inputs import as_point
from attnfit.problems.layers.duality import GAP_TOLERANCE, duality_gaps, target_sizes
from attnfit.problems.layers.layered import LayeredProblem

Array = NDArray[np.float64]
Mask = NDArray[np.bool_]

# A signature whose slack is below this share of the right-hand side's size may belong to the optimal face.
SLACK = 1e-6
# Below this share of the largest singular value a face does not identify its proportions.
RANK = 1e-10


@dataclass(frozen=True)
class MixtureCertificate(Certificate):
    """What is certified of the proportions ``f = softmax(x)`` of a mixture.

    ``radius`` and ``radii`` bound ``||f - f*||_2`` for every optimal f* (infinite where the signatures of the
    optimal face are dependent), ``scaled_radius`` bounds ``||w^(1/2) A2 (f - f*)||_2``, which is unique.
    ``radius`` and ``scaled_radius`` are of all right-hand sides together (the root of the sum of squares),
    ``value_gap`` the sum of all gaps, ``lambda_min`` the smallest; ``eta`` and ``lipschitz`` are zero: the
    problem is quadratic in f.

    Attributes
    ----------
    gap : ndarray, shape (k,)
        Duality gap of each right-hand side, rounding included: ``L(f) - L* <= gap``.
    relative_gap : ndarray, shape (k,)
        Relative to ``0.5 sum w b^2``, or to the loss where that is larger; `valid` means all are below 1e-9.
    """

    gap: Array = field(default_factory=lambda: np.zeros(0))
    relative_gap: Array = field(default_factory=lambda: np.zeros(0))


def certify_mixture(problem: LayeredProblem, x: Any) -> MixtureCertificate:
    """Certify the proportions of every right-hand side of a mixture.

    With q the gradient of the loss in f, convexity gives ``L(f) - L* <= <q, f> - min_i q_i``; a signature
    whose slack ``q_i - min q`` is s has an optimal proportion of at most gap / s, and strong convexity on
    the remaining face bounds the rest.

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
    faces, left = np.empty((k, len(X)), dtype=bool), np.empty(k)
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
    scales = np.maximum(target_sizes(problem), values)
    relative = np.divide(gap, scales, out=np.where(gap > 0.0, np.inf, 0.0), where=scales > 0.0)
    radii, smallest = _radii(problem, gap, faces, left)
    valid = bool((relative <= GAP_TOLERANCE).all())
    n_open = int((~np.isfinite(radii)).sum())
    return MixtureCertificate(
        valid=valid,
        radius=float(np.linalg.norm(radii)) if valid else np.inf,
        scaled_radius=float(np.sqrt(2.0 * gap.sum())),
        value_gap=float(gap.sum()),
        reason=_reason(relative, n_open),
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
    )


def _reason(relative: Array, n_open: int) -> str:
    worst, bad = int(np.argmax(relative)), int((relative > GAP_TOLERANCE).sum())
    reason = f"duality gap at most {relative[worst]:.1e} of 0.5 sum w b^2"
    if bad:
        reason = (
            f"the duality gap of {bad} of {len(relative)} right-hand sides exceeds {GAP_TOLERANCE:.0e} of "
            f"0.5 sum w b^2, the worst is {worst} with {relative[worst]:.1e}; fit with the default solver"
        )
    if n_open:
        reason += (
            f"; the proportions of {n_open} right-hand sides are not unique, because signatures of their "
            "face "
            "are dependent"
        )
    return reason


def _radii(problem: LayeredProblem, gap: Array, faces: Mask, left: Array) -> tuple[Array, Array]:
    """Return bounds of ``||f - f*||`` and the smallest eigenvalues on the faces, shape (k,) each.

    ``w^(1/2) A2 (f - f*)`` has norm at most ``sqrt(2 gap)``, and at most ``left`` of f* lies off the face.
    """
    outer = problem.outer.toarray() if sparse.issparse(problem.outer) else problem.outer
    radii, smallest = np.full(len(gap), np.inf), np.zeros(len(gap))
    weights = problem.weights
    shared = weights is None or weights.shape[1] == 1
    groups, member = (
        np.unique(faces, axis=0, return_inverse=True) if shared else (faces, np.arange(len(faces)))
    )
    member = np.asarray(member).reshape(-1)
    order = np.argsort(member, kind="stable")
    ends = np.searchsorted(member[order], np.arange(len(groups) + 1))
    for g, face in enumerate(groups):
        columns = order[ends[g] : ends[g + 1]]
        w = None if weights is None else weights[:, 0 if shared else g]
        A = outer if w is None else np.sqrt(w)[:, None] * outer
        longest = float(np.linalg.norm(A, axis=0).max())
        # Differences of proportions sum to what lies off the face: centring costs nothing and conditions
        # better.
        centre = A[:, face].mean(axis=1)
        height = float(np.linalg.norm(A[:, face] - centre[:, None], 2))
        if height <= RANK * longest:
            # One signature, or copies of one.
            height = longest or 1.0
        stacked = np.vstack([A[:, face] - centre[:, None], np.full((1, int(face.sum())), height)])
        values = np.linalg.svd(stacked, compute_uv=False)
        if len(values) < face.sum() or values[-1] <= RANK * values[0]:
            continue
        # Subtracting the centre adds its length times what lies off the face.
        off = (longest + float(np.linalg.norm(centre))) * left[columns]
        misfit = np.hypot(np.sqrt(2.0 * gap[columns]) + off, height * left[columns])
        radii[columns] = np.hypot(misfit / values[-1], left[columns])
        smallest[columns] = values[-1] ** 2
    return radii, smallest

"""Where a fit begins: on how many rows, the same data under a convex loss, and least squares on the logarithm
of the target.

The last is a start for every scale of the target: one pass and a Gram, or conjugate gradients where there
are too many unknowns for one. Rows count as much as the curvature of the loss at an exact fit would make
them; targets that have no logarithm get that of half the smallest positive one of their group. Logarithms of
the target occur nowhere else on the way to an answer.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any, NamedTuple

import numpy as np
from scipy import linalg
from scipy.sparse.linalg import LinearOperator, cg

from attnfit.data.groups import Chunk
from attnfit.data.inputs import pieces
from attnfit.data.on_disk import Column
from attnfit.losses.elementwise import LeastSquares, PoissonDeviance, SquaredExponential
from attnfit.losses.loss import GramTerm, Loss
from attnfit.losses.rescaled import SquaredRescaled
from attnfit.losses.softmax import LOSSES, CrossEntropy, LinearCrossEntropy, SoftmaxLoss, Squared
from attnfit.losses.sums import Composite
from attnfit.objectives.objective import MAX_DENSE
from attnfit.objectives.part import Part
from attnfit.segments import Array, Index, Segments

# Losses whose targets tell the logits that they ask for; so do sums of them that have a target.
TELLING = (
    Squared,
    CrossEntropy,
    LinearCrossEntropy,
    SquaredExponential,
    SquaredRescaled,
    PoissonDeviance,
)
# Directions with less than this share of the largest curvature are left alone.
RANK = 1e-13
# Pivots of a Cholesky factor, beside a unit diagonal, above which there is no doubt about the rank.
FIRM = 1e-6
# Starts are searched on the small sample and polished on the large one, whose answer is about one per cent
# off.
PILOT_ROWS = 4_000
SAMPLE_ROWS = 20_000
# Rows per unknown: fewer than the first and an answer means little; the second give a Hessian to within
# three per cent.
PILOT_RATIO = 10
SAMPLE_RATIO = 1000
# A sample larger than this share of the data costs more than it saves.
MAX_SHARE = 0.1
# Beyond MAX_DENSE unknowns: conjugate gradients as far as a start needs, and reads of the rows for them.
FORCING, MAX_PRODUCTS = 1e-2, 30


def sample_sizes(n: int, d: int) -> tuple[int, int]:
    """Return the numbers of rows of the small sample and of the large one."""
    pilot_rows = max(PILOT_ROWS, PILOT_RATIO * d)
    if n <= SAMPLE_ROWS:
        return pilot_rows, SAMPLE_ROWS
    affordable = max(int(MAX_SHARE * n), min(SAMPLE_ROWS, n // 4))
    return pilot_rows, max(pilot_rows, min(max(SAMPLE_ROWS, SAMPLE_RATIO * d), affordable))


def surrogate_rows(rows: Part) -> Part | None:
    """Return the same rows under a convex loss whose minimiser is a good start; None where there is none."""
    segments = Segments(rows.groups.starts, rows.n_rows)
    sizes = np.repeat(segments.sizes, segments.sizes)
    found = surrogate_targets(rows.loss, rows.b, rows.weights, segments, sizes)
    return rows.with_loss(*found) if found is not None and has_weight(found[2]) else None


def has_weight(w: Any) -> bool:
    """Whether any row has a weight: none is left where targets are positive only at weights of zero."""
    return w is None or any(v.any() for _, v in pieces(w))


def surrogate_targets(
    loss: Loss, b: Any, w: Any, segments: Segments, sizes: Array | Index, multiplicity: Array | float = 1.0
) -> tuple[Loss, Any, Any] | None:
    """Return loss, target and weights of the convex surrogate.

    Cross entropy for losses of a softmax with a target, the Poisson likelihood for exp, least squares on the
    inverse function of the target for sinh and cosh (rescaled: of the target times the size of the group).

    Parameters
    ----------
    loss : Loss
    b, w : ndarray or Column, shape (n,)
        Target and weights; these may be None.
    segments : Segments
        The groups of these rows.
    sizes : ndarray, shape (n,)
        The size of each row's whole group.
    multiplicity : ndarray, shape (n,)
        How many rows each one stands for.
    """
    exponential = isinstance(loss, SquaredRescaled) and loss.function == "exp"
    if exponential or (isinstance(loss, SoftmaxLoss | Composite) and loss.has_target):
        b = _mapped(_positive_part, b)
        if w is not None:
            # Weights that differ within a group would move the minimiser of cross entropy away from f = b.
            mass = segments.sum(multiplicity * np.asarray(b))
            mean = segments.sum(multiplicity * np.asarray(w) * np.asarray(b)) / np.where(mass > 0, mass, 1.0)
            w = segments.spread(mean) + np.zeros(segments.n_rows)
        return (LOSSES["cross_entropy"], b, w) if any(v.any() for _, v in pieces(b)) else None
    if isinstance(loss, SquaredExponential) and loss.function == "exp":
        return PoissonDeviance(), _mapped(_positive_part, b), w
    if not isinstance(loss, SquaredExponential | SquaredRescaled):
        return None
    b = np.asarray(b)
    unit = np.ones(len(b)) if w is None else np.asarray(w)
    if isinstance(loss, SquaredRescaled):
        b = b * sizes
    # Near the fit an error dz in the logit costs w v^2 dz^2, with v = cosh(z) for sinh and sinh(z) for cosh.
    if loss.function == "sinh":
        return LeastSquares(), np.arcsinh(b), unit * (1.0 + b * b)
    return LeastSquares(), np.arccosh(np.maximum(b, 1.0)), unit * np.maximum(b * b - 1.0, 1e-3)


def _positive_part(b: Array) -> Array:
    return np.maximum(b, 0.0)


def _mapped(function: Callable[[Array], Array], values: Any) -> Any:
    return values.mapped(function) if isinstance(values, Column) else function(values)


class LogStart(NamedTuple):
    """The start, shape (d,), and the share of the rows whose target has a logarithm."""

    x: Array
    share: float


def log_start(problem: Part, normaliser: float = 1.0) -> LogStart | None:
    """Return the start of a problem whose rows are all here; None where its loss has none.

    The target of a rescaled sinh or cosh tells its outputs up to their sum, which is taken for ``normaliser``
    times the size of the group.

    With ``z*`` the logits that the target asks for and t the weights, ``x = argmin sum t (z* - a x)^2``, rows
    and logits centred by group where the loss ignores what they have in common; columns scaled by the Gram's
    diagonal, least norm.
    """
    loss, design = problem.loss, problem.design
    if not (loss.has_target if isinstance(loss, Composite) else isinstance(loss, TELLING)):
        return None
    # Shares are known up to a factor also where the loss is not invariant to it.
    centred = loss.coupled and getattr(loss, "function", "exp") == "exp"
    gram = design.gram() if problem.n_unknowns <= MAX_DENSE else _Rows(problem)
    right, sizes = np.zeros((2, problem.n_unknowns))
    sums: dict[int, tuple[Array, float, float]] = {}
    targets = _targets(problem)
    n_positive = n_rows = 0
    for chunk in problem.prefetch(problem.chunks):
        block, segments = problem.fetch(chunk), chunk.segments
        b, w, _ = problem.targets(chunk)
        w = np.broadcast_to(np.asarray(w, dtype=np.float64), len(b))
        wanted = _wanted(problem, chunk, b * normaliser, w, targets)
        if wanted is None:
            continue
        z, t = wanted
        z = z - problem.shift(chunk)
        sizes += design.combine(t[None, :], design.squares(block))[0]
        n_positive, n_rows = n_positive + int((b[t > 0] > 0).sum()), n_rows + int((t > 0).sum())
        share, in_pieces = None, centred and chunk.long >= 0
        if centred and not in_pieces:
            total = segments.sum(t)
            share = t / segments.spread(np.where(total > 0.0, total, 1.0))
            z = z - segments.spread(segments.sum(share * z))
        if isinstance(gram, _Rows):
            gram.rows.append((chunk, t, share))
        else:
            term = GramTerm(t, None, None if share is None else 1.0)
            problem.add_to_gram(gram, chunk, block, [term], share, None)
        if in_pieces:
            # The centre of such a group is taken off at the end.
            products = design.combine(np.stack([t, t * z]), block)
            before = sums.get(chunk.long, (0.0, 0.0, 0.0))
            sums[chunk.long] = before[0] + products[0], before[1] + float(t.sum()), before[2] + float(t @ z)
            right += products[1]
        else:
            right += design.combine((t * z)[None, :], block)[0]
    x = _solved(gram, right, sizes, sums)
    return LogStart(x, n_positive / n_rows) if n_rows and np.isfinite(x).all() else None


class _Rows:
    """The rows of a Gram that is too large to be formed, for products with it.

    Attributes
    ----------
    rows : list of (Chunk, t, share)
        ``share`` are the weights of the centre of each group, None where rows are not centred.
    long : list of ndarray, shape (d,)
        Outer products to take off: the centres of groups in pieces.
    """

    def __init__(self, problem: Part) -> None:
        self.problem = problem
        self.rows: list[tuple[Chunk, Array, Array | None]] = []
        self.long: list[Array] = []

    def product(self, v: Array) -> Array:
        """Return the Gram times v: one read."""
        out, design = np.zeros_like(v), self.problem.design
        for chunk, t, share in self.rows:
            block, segments = self.problem.fetch(chunk), chunk.segments
            along = design.product(block, v)
            if share is not None:
                along = along - segments.spread(segments.sum(share * along))
            out += design.combine((t * along)[None, :], block)[0]
        for centre in self.long:
            out -= centre * float(centre @ v)
        return out

    def solve(self, right: Array, sizes: Array) -> Array:
        """Solve the normal equations as far as a start needs."""
        scale = np.sqrt(np.where(sizes > 0.0, sizes, 1.0))
        operator = LinearOperator((len(right),) * 2, lambda y: self.product(y / scale) / scale, dtype=float)
        y, _ = cg(operator, right / scale, rtol=FORCING, maxiter=MAX_PRODUCTS)
        return np.asarray(y / scale)


class _Targets(NamedTuple):
    """Of each group: half its smallest positive target per unit of exposure (infinite without), and the sum
    of its targets once that stands in for the others, shape (n_groups,) each.
    """

    floor: Array
    mass: Array


def _targets(problem: Part) -> _Targets:
    smallest = np.full(len(problem.constants), np.inf)
    positive, others = np.zeros((2, len(smallest)))
    numbers = np.arange(len(smallest))
    for chunk in problem.chunks:
        b, w, _ = problem.targets(chunk)
        counts = np.broadcast_to(np.asarray(w) > 0.0, b.shape)
        starts, groups = chunk.segments.starts, numbers[chunk.groups]
        exposure = _exposure(problem, chunk, len(b))
        values = np.where((b > 0.0) & counts, b / exposure, np.inf)
        np.minimum.at(smallest, groups, np.minimum.reduceat(values, starts))
        np.add.at(positive, groups, np.add.reduceat(np.maximum(b, 0.0), starts))
        np.add.at(others, groups, np.add.reduceat(np.where(b <= 0.0, exposure, 0.0), starts))
    floor = 0.5 * smallest
    return _Targets(floor, positive + np.where(others > 0.0, others * floor, 0.0))


def _exposure(problem: Part, chunk: Chunk, n: int) -> Array:
    """Return the exponential of the offset, within reason: targets are compared per unit of it."""
    return np.broadcast_to(np.exp(np.clip(problem.shift(chunk), -50.0, 50.0)), n)


def _wanted(problem: Part, chunk: Chunk, b: Array, w: Array, known: _Targets) -> tuple[Array, Array] | None:
    """Return the logits that the target asks for, and the weight of each row; None where no row has one."""
    loss, segments = problem.loss, chunk.segments
    if isinstance(loss, SquaredExponential | SquaredRescaled) and loss.function != "exp":
        sizes = np.diff(problem.groups.starts, append=problem.n_rows)[chunk.groups]
        b = b * segments.spread(sizes) if loss.coupled else b
        if loss.function == "sinh":
            return np.arcsinh(b), w * (1.0 + b * b)
        return np.arccosh(np.maximum(b, 1.0)), w * np.maximum(b * b - 1.0, 1e-3)
    floor = known.floor[chunk.groups]
    usable = np.isfinite(floor)
    if not usable.any():
        return None
    mass = np.where(usable, known.mass[chunk.groups], 1.0)
    counts = segments.spread(usable * 1.0)
    floors = segments.spread(np.where(usable, floor, 1.0)) * _exposure(problem, chunk, len(b))
    target = np.where(b > 0.0, b, floors)
    if not loss.coupled:
        power = target if isinstance(loss, PoissonDeviance) else target * target
        return np.log(target), counts * w * power
    f = target / segments.spread(mass)
    if isinstance(loss, CrossEntropy):
        weight = segments.spread(problem.constants[chunk.groups]) * f
    elif isinstance(loss, LinearCrossEntropy):
        weight = w * segments.spread(mass) * f
    else:
        weight = w * f * f
    return np.log(f), counts * weight


def _solved(gram: Any, right: Array, sizes: Array, sums: dict[int, tuple[Array, float, float]]) -> Array:
    """Solve the normal equations, scaled by their diagonal, with least norm; a column that lost all but
    rounding of its size when it was centred has no part.

    ``sums`` are ``sum t a``, ``sum t`` and ``sum t z`` of each group in pieces, whose centre is taken off.
    """
    for products, mass, moment in sums.values():
        if mass > 0.0:
            right -= products * (moment / mass)
    if isinstance(gram, _Rows):
        gram.long = [products / np.sqrt(mass) for products, mass, _ in sums.values() if mass > 0.0]
        return gram.solve(right, sizes)
    matrix = gram.result()
    for products, mass, _ in sums.values():
        if mass > 0.0:
            matrix -= np.multiply.outer(products, products) / mass
    diagonal = np.diag(matrix)
    seen = diagonal > RANK * sizes
    scale = np.sqrt(np.where(seen, diagonal, 1.0))
    matrix, right = np.where(np.multiply.outer(seen, seen), matrix, 0.0), np.where(seen, right, 0.0)
    matrix = matrix / scale / scale[:, None]
    with suppress(linalg.LinAlgError):
        factor = linalg.cholesky(matrix, lower=True, check_finite=False)
        if np.diag(factor).min() ** 2 > FIRM:
            # A tenth of the time of eigenvalues, which only a deficient rank needs.
            return np.asarray(linalg.cho_solve((factor, True), right / scale) / scale)
    values, vectors = linalg.eigh(matrix, driver="evd")
    kept = values > RANK * max(float(values[-1]), np.finfo(float).tiny)
    along = vectors[:, kept].T @ (right / scale)
    return np.asarray(vectors[:, kept] @ (along / values[kept]) / scale)

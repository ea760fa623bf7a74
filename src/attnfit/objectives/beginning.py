"""Where a fit begins: on how many rows, from which logits (those of the target), and in which units.

Least squares on the logarithm of the target is a start for every scale of it: one pass and a Gram, or
conjugate gradients where there are too many unknowns for one. Rows count as much as the curvature of the loss
at an exact fit would make them; targets that have no logarithm get that of half the smallest positive one of
their group. Logarithms of the target occur nowhere else on the way to an answer.

Better units are rows centred by group where the loss cannot tell, so that columns such as years, ids or time
stamps keep the digits that tell their rows apart; columns of extreme size are scaled.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from scipy import linalg
from scipy.sparse.linalg import LinearOperator, cg

from attnfit.data.centred import CentredDesign, GroupReference
from attnfit.data.gram import centre_rows
from attnfit.data.matrix import Design, SparseDesign
from attnfit.losses.elementwise import PoissonDeviance, SquaredExponential
from attnfit.losses.loss import GramTerm
from attnfit.losses.rescaled import SquaredRescaled
from attnfit.losses.softmax import CrossEntropy, LinearCrossEntropy, Squared
from attnfit.losses.sums import Composite
from attnfit.objectives.objective import MAX_DENSE, Drawn, Reduction
from attnfit.objectives.part import Part, merged
from attnfit.segments import Array, Chunk, Index

if TYPE_CHECKING:
    from attnfit.objectives.rows import RowProblem

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
# A column whose common part in a group is so many times what tells its rows apart loses digits that a fit
# needs.
SHIFTED = 1e5
# Rows that are looked at, and of how many groups.
LOOKED_AT, LOOKED_AT_GROUPS = 1_000, 100
# Squares of larger entries, weighted and added up, may overflow; beyond the second they do.
LARGE, HUGE = 1e60, 1e150


def sample_sizes(n: int, d: int) -> tuple[int, int]:
    """Return the numbers of rows of the small sample and of the large one."""
    pilot_rows = max(PILOT_ROWS, PILOT_RATIO * d)
    if n <= SAMPLE_ROWS:
        return pilot_rows, SAMPLE_ROWS
    affordable = max(int(MAX_SHARE * n), min(SAMPLE_ROWS, n // 4))
    return pilot_rows, max(pilot_rows, min(max(SAMPLE_ROWS, SAMPLE_RATIO * d), affordable))


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
        # Targets are compared per unit of the exponential of the offset, within reason.
        exposure = np.exp(np.clip(problem.shift(chunk), -50.0, 50.0))
        values = np.where((b > 0.0) & counts, b / exposure, np.inf)
        np.minimum.at(smallest, groups, np.minimum.reduceat(values, starts))
        np.add.at(positive, groups, np.add.reduceat(np.maximum(b, 0.0), starts))
        np.add.at(others, groups, np.add.reduceat(np.where(b <= 0.0, exposure, 0.0), starts))
    floor = 0.5 * smallest
    return _Targets(floor, positive + np.where(others > 0.0, others * floor, 0.0))


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
    exposure = np.exp(np.clip(problem.shift(chunk), -50.0, 50.0))
    floors = segments.spread(np.where(usable, floor, 1.0)) * exposure
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


# ---- better units


def better_units(problem: RowProblem) -> Reduction | None:
    """Return the problem with rows centred by group, where a column is all but constant in them and the
    loss cannot tell, or with columns of extreme size scaled by powers of two, which rounds nothing: their
    squares would underflow or overflow. None where all columns are ordinary.

    Raises
    ------
    ValueError
        If a column has an entry beyond 1e150 beside ordinary ones: a code for a missing value.
    """
    rows = problem.rows
    if not problem.rows_can_be_drawn or problem.in_better_units or rows.design.on_disk:
        return None
    if rows.is_whole:
        # The first rows show whether a column is all but constant within groups, far from zero.
        starts, n = rows.groups.starts, min(rows.n_rows, LOOKED_AT)
        found = _sizes_and_spreads(rows, np.arange(n), starts[starts < n])
        if found is not None and ((found[1] > 0.0) & (found[0] > SHIFTED * found[1])).any():
            inner = centred(problem)
            inner.in_better_units = True
            return Reduction(inner, np.asarray, np.asarray, "", keeps_unknowns=True)
    sizes = rows.design.column_sizes(LOOKED_AT)
    if sizes is None or ((sizes == 0.0) | ((sizes > 1.0 / LARGE) & (sizes < LARGE))).all():
        return None
    sizes = np.asarray(rows.design.column_sizes())
    exponents = np.where(sizes > 0.0, -np.floor(np.log2(np.where(sizes > 0.0, sizes, 1.0))), 0.0)
    for j in np.flatnonzero(sizes > HUGE):
        _refuse_codes(rows.design, int(j), float(sizes[j]))
    factors = np.ldexp(1.0, exponents.astype(int))
    other = problem.with_rows(rows.on(rows.design.scaled(factors)))
    other.in_better_units = True
    if np.any(problem.ridge):
        # A penalty on a column of size 1e-160 weighs what it weighs: as much as float64 can hold.
        with np.errstate(over="ignore", under="ignore"):
            other.ridge = np.minimum(problem.ridge * factors**2, 1.0 / np.finfo(float).tiny)
    return Reduction(other, lambda y: y * factors, lambda x: x / factors, "", keeps_unknowns=True)


def _refuse_codes(design: Design, j: int, size: float) -> None:
    """Raise ValueError if a column with huge entries has ordinary ones too."""
    unit = np.zeros(int(design.shape[1]))
    unit[j] = 1.0
    column = np.abs(np.concatenate([block @ unit for _, block in design.blocks()]))
    ordinary = (column > 0.0) & (column < size * 1e-50)
    if ordinary.any():
        row = int(np.argmax(column))
        raise ValueError(
            f"A has {size:.3g} at row {row}, column {j}, beside entries such as "
            f"{column[ordinary][0]:.3g}: if it stands for a missing value, drop or impute these rows"
        )


# ---- rows centred by group


def shares_much(part: Part, ratio: float) -> bool:
    """Whether a column is so many times larger than its differences within groups, as far as some rows from
    everywhere tell; True where none are at hand.
    """
    starts, n = part.groups.starts, part.n_rows
    rows = np.arange(n)
    if n > LOOKED_AT:
        # Some rows of some groups, both spread over all; the rows of a short group more than once.
        groups = np.unique(np.linspace(0, len(starts) - 1, LOOKED_AT_GROUPS).astype(np.intp))
        each = LOOKED_AT // len(groups)
        within = np.linspace(0.0, 1.0, each) * (np.diff(starts, append=n)[groups, None] - 1)
        rows = (starts[groups, None] + within.astype(np.intp)).ravel()
        starts = each * np.arange(len(groups))
    sizes = _sizes_and_spreads(part, rows, starts)
    return sizes is None or bool((sizes[0] > ratio * sizes[1]).any())


def _sizes_and_spreads(part: Part, rows: Index, starts: Index) -> tuple[Array, Array] | None:
    """Return the largest entry of each column, shape (d,), and the largest difference from the first row of
    its group, among some rows in group order; None where none are at hand or nothing is shared.
    """
    if not part.loss.shift_invariant or part.penalty is not None:
        return None
    block = part.design.peek(rows if part.groups.order is None else part.groups.order[rows])
    if block is None:
        return None
    found = []
    for entries in (block, centre_rows(block, starts)):
        largest = abs(entries).max(axis=0)
        found.append(np.asarray(largest.toarray() if hasattr(largest, "toarray") else largest).reshape(-1))
    return found[0], found[1]


def centred(problem: RowProblem) -> RowProblem:
    """Return the problem on rows less the first row of their group: the same function of x, exactly.

    Rounding then scales with the differences within groups. The problem itself where its loss tells a group
    from a shifted one, or a row penalty does. Sparse rows of groups longer than a block take a pass.
    """
    rows = problem.rows
    if not rows.loss.shift_invariant or rows.penalty is not None:
        return problem
    found: dict[int, GroupReference] = rows.reduce(_references) if rows.n_long else {}
    references = {number: reference.row for number, reference in found.items()}
    # The parts of data in several places are centred where they are.
    inside = _with_centred_rows(rows, references) if rows.is_whole else _CentredParts(rows, references)
    return problem.with_rows(inside)


def _references(part: Part, chunks: list[Chunk]) -> dict[int, GroupReference]:
    """Return the reference of each long group, by number; of dense rows only the first is read."""
    found: dict[int, GroupReference] = {}
    long = [chunk for chunk in chunks if chunk.long >= 0]
    if isinstance(part.design, SparseDesign):
        for chunk in part.prefetch(long):
            found = merged(found, {chunk.long: GroupReference.of(part.fetch(chunk))})
        return found
    for chunk in long:
        if chunk.long not in found:
            first = chunk.index.start if isinstance(chunk.index, slice) else int(chunk.index[0])
            found[chunk.long] = GroupReference.of(part.design.block(np.array([first])))
    return found


def _with_centred_rows(part: Part, references: dict[int, Array]) -> Part:
    numbers = zip(part.long_groups.tolist(), part.long_numbers.tolist(), strict=True)
    known = {group: references[number] for group, number in numbers}
    return part.on(CentredDesign(part.design, part.groups.starts, part.groups.order, known))


class _CentredParts:
    """Rows in several places, centred before each pass over them."""

    def __init__(self, rows: Any, references: dict[int, Array]) -> None:
        self._rows, self._references = rows, references

    def __getattr__(self, name: str) -> Any:
        return getattr(self._rows, name)

    def reduce(self, work: Callable[..., Any], *args: Any, drawn: Drawn | None = None) -> Any:
        """Return what the work yields on the centred rows of all parts."""
        return self._rows.reduce(_on_centred_rows, self._references, work, *args, drawn=drawn)


def _on_centred_rows(
    part: Part, chunks: list[Chunk], references: dict[int, Array], work: Callable[..., Any], *args: Any
) -> Any:
    return work(_with_centred_rows(part, references), chunks, *args)

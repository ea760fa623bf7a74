"""Local Lipschitz constants of the Hessian on a ball, one formula a family.

The constants bound the third derivative on ``{x + T y : |y| <= r}`` in the variables y. Row penalty and ridge
are quadratic and drop out. A formula goes over the rows of one chunk: whitened row norms and intervals of the
model's outputs. Where it needs sums over whole groups it yields those over its own rows, and is sent those
over the groups: at once where the groups are in the chunk, after a pass over the data where they are longer.
So the rows may be anywhere; of wide rows in memory four numbers are kept between reads.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from attnfit.losses.elementwise import output_range
from attnfit.losses.loss import Loss
from attnfit.losses.rescaled import SquaredRescaled
from attnfit.losses.softmax import CrossEntropy, LogRatio, SoftmaxLoss
from attnfit.losses.sums import MixedSum, SoftmaxSum
from attnfit.objectives.objective import Evaluation
from attnfit.objectives.part import Part, in_runs, merged
from attnfit.objectives.rows import RowProblem
from attnfit.segments import Chunk

Array = NDArray[np.float64]

WHITENED_ROWS = 4096
# Columns from which on what is kept of a row, four numbers, is an eighth of it at most.
WIDE = 32


@dataclass(frozen=True)
class Interval:
    """Entrywise bounds ``low <= . <= high``."""

    low: Array
    high: Array

    def __add__(self, other: Interval) -> Interval:
        return Interval(self.low + other.low, self.high + other.high)

    def __sub__(self, other: Interval) -> Interval:
        return Interval(self.low - other.high, self.high - other.low)

    def __mul__(self, other: Interval) -> Interval:
        low, high = self.low, self.high
        products = low * other.low, low * other.high, high * other.low, high * other.high
        return Interval(np.minimum.reduce(products), np.maximum.reduce(products))

    @property
    def magnitude(self) -> Array:
        """Largest absolute value."""
        return np.maximum(-self.low, self.high)

    def deviation(self, centre: Array) -> Array:
        """Largest distance from a value inside."""
        return np.maximum(self.high - centre, centre - self.low)


def output_bounds(h: Array, reach: Array, total: Array) -> tuple[Interval, Interval]:
    """Return bounds of the outputs f and of their logarithms where centred logits move by at most ``reach``.

    The normaliser of centred logits does not fall, by Jensen's inequality, and grows to at most ``total``,
    the group's sum of ``f exp(reach)``.
    """
    logs = Interval(h - reach - np.log(total), np.minimum(0.0, h + reach))
    return Interval(np.exp(h - reach) / total, np.minimum(1.0, np.exp(h + reach))), logs


class ChunkRows:
    """The rows of a chunk, in group order, and the sums that they add to.

    Parameters
    ----------
    part : Part
    chunk : Chunk
    at : Evaluation
        The centre of the ball.
    whitener : ndarray, shape (d, k)
        T with ``T^T H T = 1``: the ball is ``|y| <= r`` in the variables ``x + T y``.
    sums : dict
        Grams and numbers by name.
    traces : bool
        Whether the traces of whitened Grams are added up, which bound their largest eigenvalues, in place of
        the Grams.
    kept : dict, optional
        What is kept of rows between reads, by the first of them.
    """

    def __init__(
        self,
        part: Part,
        chunk: Chunk,
        at: Evaluation,
        whitener: Array,
        sums: dict[str, Any],
        *,
        traces: bool = False,
        kept: dict[int, dict[str, Any]] | None = None,
    ) -> None:
        self.part, self.chunk, self.at, self.whitener, self.sums = part, chunk, at, whitener, sums
        # Sums over the rows of each group here, shape (n_groups,).
        self.sum: Callable[[Array], Array] = chunk.segments.sum
        # What is the same in every read, computed once where there is room to keep it.
        self.traces, self.kept = traces, dict[str, Any]()
        if kept is not None and chunk.long >= 0 and isinstance(chunk.rows, slice):
            self.kept = kept.setdefault(chunk.rows.start, {})
        if "logits" not in self.kept:
            self.block, self.kept["logits"] = part.logits(chunk, at.x)
        self.z = self.kept["logits"]
        self.b, w, self.constant = part.targets(chunk)
        self.w = w + np.zeros(len(self.z))
        self.state = part.row_state(chunk, self.z, at)

    @cached_property
    def block(self) -> Any:
        """The rows themselves, read once they are asked for."""
        return self.part.fetch(self.chunk)

    def spread(self, totals: Array) -> Array:
        """Repeat one value a group on its rows, shape (n_rows,)."""
        return self.chunk.segments.spread(totals) + np.zeros(len(self.z))

    def group_rows(self, weights: Array) -> Array:
        """Return ``A_g^T weights`` over the rows of each group here, shape (n_groups, d)."""
        found = self.part.design.group_rows(self.block, weights, self.chunk.segments.starts)
        return np.asarray(found.toarray() if sparse.issparse(found) else found)

    def norms(self, *, centred: bool) -> Array:
        """Return the norm of each whitened row, ``|T^T a_i|`` or ``|T^T (a_i - mu_g)|``, shape (n_rows,)."""
        if "norms" not in self.kept:
            # What the rows of each group here are centred at, shape (n_groups, d); None where they stay.
            centres = self.part.loss.gram_terms(self.z, self.b, self.w, self.state)[1]
            if centres is not None:
                long = self.chunk.long
                centres = self.at.centre[[long]] if long >= 0 else self.group_rows(centres)
            out = {False: np.empty(len(self.z))}
            shift = None
            if centres is not None:
                out[True], shift = np.empty(len(self.z)), centres @ self.whitener
            group = np.repeat(np.arange(len(self.chunk.segments)), self.chunk.segments.sizes)
            for first in range(0, len(self.z), WHITENED_ROWS):
                part = slice(first, first + WHITENED_ROWS)
                rows = self.block[part] @ self.whitener
                out[False][part] = np.sqrt(np.einsum("ij,ij->i", rows, rows))
                if shift is not None:
                    rows -= shift[group[part]] if len(shift) > 1 else shift
                    out[True][part] = np.sqrt(np.einsum("ij,ij->i", rows, rows))
            self.kept["norms"], self.kept["centres"] = out, centres
        found: Array = self.kept["norms"][centred]
        return found

    def add(self, name: str, values: Array) -> None:
        """Add up a number a row."""
        self.sums[name] = self.sums.get(name, 0.0) + float(np.sum(values))

    def add_columns(self, name: str, values: Array) -> None:
        """Add up ``values |a|``, shape (d,)."""
        columns = self.part.design.combine(values[None, :], abs(self.block))[0]
        self.sums[name] = self.sums.get(name, 0.0) + np.asarray(columns).reshape(-1)

    def add_gram(self, name: str, weights: Array, *, centred: bool) -> None:
        """Add the rows to a Gram with non-negative row weights."""
        if self.traces:
            self.add(name, weights * self.norms(centred=centred) ** 2)
        elif not centred:
            self._gram(name).add(self.block, weights)
        else:
            self.norms(centred=True)
            self._add_about(self._gram(name), weights, None, 1.0, self.kept["centres"])

    def add_deflated(self, name: str, v: Array, totals: Array) -> None:
        """Add the rows ``sqrt(w_i) (v_i a_i - b_i t_g)`` to a Gram; ``totals`` has one row t_g a group."""
        if self.traces:
            raise TypeError("no norms of deflated rows are known")
        self._add_about(self._gram(name), self.w, v, self.b, totals)

    def _gram(self, name: str) -> Any:
        return self.sums.setdefault(name, self.part.design.gram())

    def _add_about(self, gram: Any, t: Array, r: Array | None, q: Array | float, about: Array) -> None:
        if self.chunk.long >= 0:
            gram.add_piece(self.block, t, r, q, about[0], self.chunk.long)
        else:
            mu = sparse.csr_array(about) if sparse.issparse(self.block) else about
            gram.add_centred(self.block, t, r, q, mu, self.chunk.segments.starts)


# Yields arrays with one row a group, is sent their sums over whole groups, and then adds to the rows' sums:
# what comes before the last exchange is done again with every read.
Stages = Generator[tuple[Array, ...], tuple[Array, ...], None]
Formula = Callable[[ChunkRows, float], Stages]


def sums_on_ball(
    problem: RowProblem,
    at: Evaluation,
    whitener: Array,
    formula: Formula,
    radius: float,
    *,
    traces: bool = False,
) -> dict[str, Any]:
    """Return what a formula adds up over all rows: one read, and one more for each time that it asks for sums
    over groups longer than a chunk.
    """
    known: dict[int, list[tuple[Array, ...]]] = {}
    rows = problem.rows
    kept: dict[int, dict[str, Any]] | None
    kept = {} if rows.is_whole and rows.design.is_shared_out and problem.n_unknowns >= WIDE else None
    sums: dict[str, Any] = {}
    while True:
        asked, found = rows.reduce(_read, at, whitener, formula, radius, known, traces, kept)
        sums = merged(sums, found)
        if not asked:
            return sums
        for number, totals in asked.items():
            known.setdefault(number, []).append(totals)


@in_runs
def _read(
    part: Part,
    chunks: list[Chunk],
    at: Evaluation,
    whitener: Array,
    formula: Formula,
    radius: float,
    known: dict[int, list[tuple[Array, ...]]],
    traces: bool,
    kept: dict[int, dict[str, Any]] | None,
) -> tuple[dict[int, tuple[Array, ...]], dict[str, Any]]:
    """Return the sums that the formula asks for of each long group, and those it added up."""
    asked: dict[int, tuple[Array, ...]] = {}
    sums: dict[str, Any] = {}
    # Whole groups were done with the first read.
    wanted = [chunk for chunk in chunks if chunk.long >= 0] if known else chunks
    with np.errstate(over="ignore", invalid="ignore"):
        for chunk in part.prefetch(wanted):
            stages = formula(ChunkRows(part, chunk, at, whitener, sums, traces=traces, kept=kept), radius)
            answers = iter(known.get(chunk.long, []))
            with suppress(StopIteration):
                own = next(stages)
                while True:
                    totals = own if chunk.long < 0 else next(answers, None)
                    if totals is None:
                        asked = merged(asked, {chunk.long: own})
                        break
                    own = stages.send(totals)
    return asked, sums


def lipschitz_constant(problem: RowProblem, at: Evaluation, whitener: Array, radius: float) -> float:
    """Return M with ``|H(y) - H(y')| <= M |y - y'|`` on the ball of this radius, infinite where nothing
    finite is known.

    Parameters
    ----------
    problem : RowProblem
    at : Evaluation
        The centre of the ball.
    whitener : ndarray, shape (d, k)
        T of the variables ``x + T y``.
    radius : float
    """
    if isinstance(problem.loss, LogRatio):
        # Quadratic.
        return 0.0
    if isinstance(problem.loss, MixedSum):
        # The weighted sum of the constants of the parts, each on the same rows.
        total = 0.0
        for factor, part in problem.loss.plain_terms:
            alone = problem.with_rows(problem.rows.with_loss(part, problem.b, problem.weights))
            total += abs(factor) * lipschitz_constant(alone, alone.evaluate(at.x), whitener, radius)
        return total
    formula = ball_formula(problem.loss, problem.n_groups)
    return constant_of(problem.loss, sums_on_ball(problem, at, whitener, formula, radius), whitener)


def constant_of(loss: Loss, sums: dict[str, Any], whitener: Array) -> float:
    """Return the constant that a formula's sums come to, Grams or their traces."""

    def top(name: str) -> float:
        return sums[name] if isinstance(sums[name], float) else largest_eigenvalue(sums[name], whitener)

    if isinstance(loss, SquaredRescaled):
        one_group = "outputs" in sums
        with np.errstate(over="ignore", invalid="ignore"):
            outputs = sums["targets"] * np.square(top("outputs")) if one_group else sums["outputs of groups"]
            moved = top("moved") if one_group else sums["moved of groups"]
            pu = np.sqrt(top("products")) + np.sqrt(outputs)
            pv = np.sqrt(top("slopes")) + np.sqrt(moved) + np.sqrt(sums["drift"])
            constant = float(top("rows") + 3.0 * pu * pv)
    elif isinstance(loss, SoftmaxLoss):
        constant = 0.0
        for name, factor in (("rows", 1.0), ("centres", 3.0)):
            if name in sums:
                constant += factor * (np.sqrt(top(name)) + np.sqrt(sums[f"{name} moved"])) ** 2
    else:
        constant = top("rows")
    return float(constant) if np.isfinite(constant) else np.inf


def largest_eigenvalue(gram: Any, whitener: Array) -> float:
    """Return the largest eigenvalue of a whitened Gram, infinite where it overflows."""
    with np.errstate(over="ignore", invalid="ignore"):
        whitened = whitener.T @ gram.result() @ whitener
    if not np.isfinite(whitened).all():
        return np.inf
    return max(0.0, float(np.linalg.eigvalsh(whitened)[-1]))


def ball_formula(loss: Loss, n_groups: int) -> Formula:
    """Return the formula of a loss."""
    if isinstance(loss, SoftmaxLoss):
        return _softmax
    if isinstance(loss, SquaredRescaled):
        return partial(_rescaled, one_group=n_groups == 1)
    if not loss.coupled:
        return _uncoupled
    raise TypeError(f"no Lipschitz constant is known for {type(loss).__name__}")


def _uncoupled(rows: ChunkRows, radius: float) -> Stages:
    """Bound ``sum phi'''(z) p q^2`` row by row."""
    norms = rows.norms(centred=False)
    reach = radius * norms
    bound = rows.part.loss.third_derivative_bound(rows.z - reach, rows.z + reach, rows.b, rows.w)
    assert bound is not None
    rows.add_gram("rows", bound * norms, centred=False)
    yield from ()


def _softmax(rows: ChunkRows, radius: float) -> Stages:
    """Bound the third derivative of any loss Phi of a softmax.

    With centred rows c, ``pt = c.h``, ``qt = c.k``, ``e = C^T t``:

        D^3 L[h, k, k] = sum f (g3 - gamma) pt qt^2 - 2 (e.k) <f, pt qt> - (e.h) <f, qt^2>   per group,

    which for the squared loss is the formula of the papers' case. On the ball the rows' centre moves by at
    most ``shift``.
    """
    loss, b, w = rows.part.loss, rows.b, rows.w
    assert isinstance(loss, SoftmaxLoss)
    norms = rows.norms(centred=True)
    h = rows.z - rows.state[0]
    f = np.exp(h)
    reach = radius * norms
    inflated = f * np.exp(reach)
    high = np.minimum(1.0, inflated)
    if isinstance(loss, CrossEntropy) and type(loss).g3 is CrossEntropy.g3:
        shift = radius * rows.spread((yield (rows.sum(high * norms**2),))[0])
        _add_shifted(rows, "rows", rows.spread(rows.constant) * high * (norms + shift), shift)
        return
    most = rows.spread((yield (rows.sum(inflated),))[0])
    f_ball, h_ball = output_bounds(h, reach, most)

    def ball(formula) -> Interval:  # type: ignore[no-untyped-def]
        # p, g2 and g3 are monotone in f (in h = log f for entropy): the ends of f give the ends of the
        # formula.
        one = formula(f_ball.low, h_ball.low, b, w) + 0.0 * f
        other = formula(f_ball.high, h_ball.high, b, w) + 0.0 * f
        return Interval(np.minimum(one, other), np.maximum(one, other))

    # Of a sum each part's are monotone, the sum's are not.
    parts: Any = loss.terms if isinstance(loss, SoftmaxSum) else ((1.0, loss),)
    zero = Interval(np.zeros_like(f), np.zeros_like(f))
    g2_ball, g3_ball, gamma = zero, zero, zero
    for c, part in parts:
        factor = Interval(np.full_like(f, c), np.full_like(f, c))
        g2_ball, g3_ball = g2_ball + factor * ball(part.g2), g3_ball + factor * ball(part.g3)
        if type(part).p is CrossEntropy.p:
            # What it adds to <f, p> does not depend on the output.
            gamma = gamma + Interval(-c * w * b, -c * w * b)
        else:
            gamma = gamma + factor * (f_ball * ball(part.p))
    g2, mean = loss.g2(f, h, b, w) + 0.0 * f, f_ball * g2_ball
    terms = high * norms**2, f * g2, gamma.low, gamma.high, mean.low, mean.high
    moved, centre, *ends = map(rows.spread, (yield tuple(map(rows.sum, terms))))
    shift = radius * moved
    omega = high * (g3_ball - Interval(ends[0], ends[1])).magnitude
    tau = f * (g2 - centre)
    tau_ball = f_ball * (g2_ball - Interval(ends[2], ends[3]))
    if "turned" not in rows.kept:
        rows.kept["turned"] = rows.group_rows(tau) @ rows.whitener
    drift, vectors = yield rows.sum(tau_ball.deviation(tau) * norms), rows.kept["turned"]
    e = rows.spread(np.linalg.norm(vectors, axis=1) + drift)
    _add_shifted(rows, "rows", omega * (norms + shift), shift)
    _add_shifted(rows, "centres", e * high, shift)


def _add_shifted(rows: ChunkRows, name: str, weights: Array, shift: Array) -> None:
    """Add up a Gram whose centres may have moved by ``shift``, and how much that may change."""
    rows.add_gram(name, weights, centred=True)
    rows.add(f"{name} moved", weights * shift**2)


def _rescaled(rows: ChunkRows, radius: float, *, one_group: bool) -> Stages:
    """Bound ``<Q u, v p q^2> + 2 <P(u p q), P(v q)> + <P(u q^2), P(v p)>`` with ``P = 1 - b 1^T`` in each
    group.

    Groups are added by the Cauchy-Schwarz inequality. The trace bounds the largest eigenvalue of a group's
    Gram; of one group the eigenvalue itself is as cheap.
    """
    b, w = rows.b, rows.w
    norms = rows.norms(centred=False)
    loss: Any = rows.part.loss
    ranges = output_range(loss.function, rows.z - radius * norms, rows.z + radius * norms)
    u, v = Interval(*ranges[:2]), Interval(*ranges[2:])
    u_mid, u_rad = 0.5 * (u.low + u.high), 0.5 * (u.high - u.low)
    v_mid, v_rad = 0.5 * (v.low + v.high), 0.5 * (v.high - v.low)
    one = np.ones(len(b))
    terms = [one, w * b * b, u_mid, w * b * u_mid, u_rad, w * np.abs(b) * u_rad]
    terms += [u.magnitude * norms**2, v_rad**2 * w * norms**2, v_rad * norms]
    *totals, vectors = yield *map(rows.sum, terms), rows.group_rows(v_mid)
    size, bb, mid, b_mid, rad, b_rad, outputs, moved, drift = map(rows.spread, totals)
    q_mid = w * (u_mid - b * mid) - b_mid + bb * mid
    q_rad = w * u_rad + (w * np.abs(b) + bb) * rad + b_rad
    rows.add_gram("rows", v.magnitude * (np.abs(q_mid) + q_rad) * norms, centred=False)
    rows.add_gram("products", w * (u.magnitude * norms) ** 2, centred=False)
    rows.add_deflated("slopes", v_mid, vectors)
    if one_group:
        rows.add_gram("outputs", u.magnitude, centred=False)
        rows.add_gram("moved", v_rad**2 * w, centred=False)
    # What belongs to a group is added up in equal shares of its rows.
    rows.add("targets", bb / size)
    rows.add("outputs of groups", bb * outputs**2 / size)
    rows.add("moved of groups", moved / size)
    rows.add("drift", bb * drift**2 / size)

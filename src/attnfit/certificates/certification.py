"""Certificates of any problem; those of losses of the rows of one matrix."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attnfit.certificates.kantorovich import Certificate, newton_kantorovich, refused, shaped
from attnfit.certificates.layers import certify_layer, certify_layers
from attnfit.certificates.lipschitz import (
    ChunkRows,
    Formula,
    Stages,
    ball_formula,
    constant_of,
    lipschitz_constant,
    sums_on_ball,
)
from attnfit.certificates.mixture import certify_mixture
from attnfit.certificates.rigorous import certify_rigorously
from attnfit.data.inputs import as_point
from attnfit.data.matrix import NARROW
from attnfit.losses.loss import Loss
from attnfit.losses.rescaled import SquaredRescaled
from attnfit.losses.softmax import LogRatio, SoftmaxLoss
from attnfit.losses.sums import MixedSum
from attnfit.objectives.attention import Attention
from attnfit.objectives.beginning import centred, shares_much
from attnfit.objectives.layered import LayeredProblem
from attnfit.objectives.moves import counting_rows
from attnfit.objectives.objective import Evaluation, Offer
from attnfit.objectives.part import Part, in_runs, merged
from attnfit.objectives.rows import RowProblem
from attnfit.objectives.token_problem import TokenProblem
from attnfit.segments import Chunk

Array = NDArray[np.float64]

# Attention problems are certified up to this many entries of the matrix that is otherwise never formed.
DENSE_ENTRIES = 1 << 27
# Rows are centred by group where a column is so many times larger than its differences: the bound of rounding
# grows as much where they are not.
SHIFTED = 4.0


def certify(problem: Any, x: Any, rigorous: bool = False) -> Certificate:
    """Certify x: find a ball around it that contains exactly one stationary point.

    With ``eta = sqrt(g^T H^-1 g)`` and M a Lipschitz constant of ``H^(-1/2) Hessian H^(-1/2)`` on the ball of
    radius ``2 eta`` in the norm of H: if ``h = M eta <= 1/2``, then
    ``||H^(1/2)(x - x*)|| <= rho = 2 eta / (1 + sqrt(1 - 2 h))``. It takes two reads of the data, wherever
    they are (three of more than 256 columns, one more where h is not far below 1/2), up to five more where
    groups are longer than a block (three for 32 columns or more in memory), one where directions are open,
    and d^2 numbers. A mixture is certified by its duality gap instead.

    The rows are centred by group first where the loss ignores what a group shares and that is large.
    Rounding is bounded to first order with a probabilistic constant: errors are taken as independent, with
    sqrt(d) in place of d.

    Parameters
    ----------
    problem : Softmax, Exponential, Rescaled, Attention, TwoLayer, ReluSoftmax, ThreeLayer or LayerInversion
    x : array_like, in the problem's natural shape
        Of several right-hand sides all are certified: the radius is that of all of x.
    rigorous : bool
        Bound rounding without assumptions on its errors: the ball is proven, given IEEE double arithmetic
        and exp to 2 units. Of dense rows in memory, of exponential and softmax losses without row penalty;
        all else is refused by name.

    Returns
    -------
    Certificate or MixtureCertificate

    Raises
    ------
    ValueError
        If there is no certificate for this kind of problem.

    Notes
    -----
    Newton-Kantorovich theorem, see Deuflhard, "Newton Methods for Nonlinear Problems" (2011), Theorem 2.1,
    with the local constants of `attnfit.certificates.lipschitz` and `attnfit.certificates.layers`, which
    replace the papers' ``n^4 exp(20 R^2)``.
    """
    reason = _refusal(problem, rigorous)
    if reason is not None:
        found = refused(reason)
    elif isinstance(problem, LayeredProblem):
        found = certify_mixture(problem, x) if problem.is_mixture else certify_layers(problem, x)
    elif isinstance(problem, TokenProblem):
        found = certify_layer(problem, x)
    else:
        x = as_point(x, problem.shape)
        rows: RowProblem = problem.dense() if isinstance(problem, Attention) else problem
        if rigorous:
            found = certify_rigorously(rows, x, centred(rows))
        else:
            apart = not rows.rows.is_whole or shares_much(rows.rows, SHIFTED)
            grouped = centred(rows) if apart else rows
            at = grouped.evaluate(x, hessian=grouped.n_unknowns <= NARROW)
            found = newton_kantorovich(grouped, at, partial(RowBall, grouped, at))
    return shaped(found, problem.shape)


def _refusal(problem: Any, rigorous: bool) -> str | None:
    """Return why there is no certificate of this kind of problem, None if there is one."""
    kind = type(problem).__name__
    if Offer.ABSORBED in problem.offers:
        return (
            "none is known where effects are absorbed; where they are few, pass them as dummies in sparse "
            "columns"
        )
    if rigorous and (isinstance(problem, Attention) or not isinstance(problem, RowProblem)):
        return f"no rigorous certificate is known for {kind}; call certificate() without rigorous"
    if isinstance(problem, LayeredProblem | TokenProblem):
        return None
    if isinstance(problem, Attention) and problem.n_rows * problem.n_unknowns > DENSE_ENTRIES:
        return (
            f"a certificate takes the {problem.n_rows:,} x {problem.n_unknowns:,} matrix of all pairs, "
            f"more than {DENSE_ENTRIES:,} numbers; judge the fit on held-out maps"
        )
    if Offer.LINEAR_SYSTEM in problem.offers:
        return "a linear system needs none: the error of x is at most the residual's norm over ridge"
    if not isinstance(problem, RowProblem):
        return (
            f"none is known for {kind}, whose factors are not unique; compare result.local_values of "
            "several starts"
        )
    if isinstance(problem.loss, MixedSum) and not problem.rows.is_whole:
        return "none is known on Dask of a sum that the normaliser enters; certify on fewer rows"
    return missing_bound(problem.loss)


def missing_bound(loss: Loss) -> str | None:
    """Return why no constant is known for a loss: it states no bound of its third derivative."""
    name = type(loss).__name__
    if not loss.states_third_derivative:
        what = "g3" if isinstance(loss, SoftmaxLoss) else "third_derivative_bound"
        return (
            f"the loss {name} states no bound of its third derivative; give its class {what} and "
            "certifiable = True, if it is three times continuously differentiable"
        )
    if loss.coupled and not isinstance(loss, SoftmaxLoss | SquaredRescaled | LogRatio | MixedSum):
        return f"no bound of the third derivative is known for the coupled loss {name}"
    return None


@dataclass(frozen=True)
class RowBall:
    """The `Ball` of a loss of the rows of one matrix."""

    problem: RowProblem
    at: Evaluation
    whitener: Array

    def lipschitz(self, radius: float) -> float:
        """Return the constant of `attnfit.certificates.lipschitz`."""
        return lipschitz_constant(self.problem, self.at, self.whitener, radius)

    def obstacle(self, radius: float) -> str | None:
        """Return None: these losses are smooth."""
        return None

    def seen(self, directions: Array) -> float:
        """Return the largest ``|a_i . v| / (|a_i| . |v|)`` over rows that count and directions v."""
        return float(self.problem.rows.reduce(_seen, directions).share)

    def rounding(self) -> float:
        """Bound the effect of rounding in A x and in the sums on the whitened gradient, to first order."""
        return self._rounded(sums_on_ball(self.problem, self.at, self.whitener, _rounding, 0.0))

    def glance(self, radius: float) -> tuple[float, float]:
        """Return what `rounding` does, and a Lipschitz constant in which traces stand for eigenvalues, from
        one read; infinite where none is known.
        """
        loss = self.problem.loss
        if isinstance(loss, LogRatio | MixedSum | SquaredRescaled):
            return self.rounding(), 0.0 if isinstance(loss, LogRatio) else np.inf
        formula = partial(_glance, ball_formula(loss, self.problem.n_groups))
        sums = sums_on_ball(self.problem, self.at, self.whitener, formula, radius, traces=True)
        return self._rounded(sums), constant_of(loss, sums, self.whitener)

    def _rounded(self, sums: dict[str, Any]) -> float:
        problem = self.problem
        # Each entry of the gradient is a sum of its own, and rounded on its own.
        columns = sums["columns"] + np.abs(problem.ridge * self.at.x)
        own = np.linalg.norm(np.abs(self.whitener).T @ columns)
        return 4.0 * float(np.finfo(np.float64).eps) * float(sums["rounding"] + own)


@dataclass(frozen=True)
class _Largest:
    """A maximum over rows, merged over parts of the data."""

    share: float

    def merge(self, other: _Largest) -> _Largest:
        return _Largest(max(self.share, other.share))


@in_runs
def _seen(part: Part, chunks: list[Chunk], directions: Array) -> _Largest:
    """Return the largest change of a logit relative to its terms; groups without weight do not count."""
    largest = 0.0
    for chunk in part.prefetch(chunks):
        block = part.fetch(chunk)
        size = np.asarray(abs(block) @ np.abs(directions))
        along = np.abs(np.asarray(block @ directions))
        share = np.divide(along, size, out=np.zeros_like(along), where=size > 0.0).max(axis=1, initial=0.0)
        largest = max(largest, float(share[counting_rows(part, chunk)].max(initial=0.0)))
    return _Largest(largest)


def _glance(formula: Formula, rows: ChunkRows, radius: float) -> Stages:
    """Add up what a formula does and what rounding takes, and ask at once for what both ask for; rounding
    asks at most once, and goes on last. Sums count once neither asks for more.
    """
    sums, rows.sums = rows.sums, {}
    main, once = formula(rows, radius), _rounding(rows, 0.0)
    asked, answer, own = next(once, None), None, next(main, None)
    while own is not None or (asked is not None and answer is None):
        mine = () if own is None else own
        found = yield mine if asked is None or answer is not None else mine + asked
        if answer is None:
            answer = found[len(mine) :]
        if own is not None:
            try:
                own = main.send(found[: len(mine)])
            except StopIteration:
                own = None
    if asked is not None and answer is not None:
        with suppress(StopIteration):
            once.send(answer)
    sums.update(merged(sums, rows.sums))


def _rounding(rows: ChunkRows, radius: float) -> Stages:
    """Bound ``sum |s| |T^T a|``, what differences in the slope s lose, and, with ``dz`` the errors of the
    logits, the change of the gradient ``sum t (r a - q mu) (r dz - q m.dz)`` by the terms of the Hessian and
    ``mu = A^T m``.

    The errors are ``1 + sqrt(d) |A| |x|`` in units of the rounding, with the constant of Higham and Mary, "A
    New Approach to Probabilistic Rounding Error Analysis" (2019), doi:10.1137/18M1226312.
    """
    part, point = rows.part, (rows.z, rows.b, rows.w, rows.state)
    own, along = rows.norms(centred=False), np.abs(rows.at.x)
    if "errors" not in rows.kept:
        terms = 1.0 + np.sqrt(len(along)) * np.asarray(abs(rows.block) @ along)
        rows.kept["errors"] = terms + np.abs(part.shift(rows.chunk))
    dz = rows.kept["errors"]
    terms, m = part.loss.gram_terms(*point)
    centre, mean = np.zeros_like(dz), np.zeros_like(dz)
    outer, inner, share = part.loss.slope_parts(*point) or np.zeros((3, len(dz)))
    if m is not None:
        sums = yield rows.sum(np.abs(m) * own), rows.sum(np.abs(m) * dz), rows.sum(np.abs(share * inner))
        centre, mean, lost = map(rows.spread, sums)
        rows.add("rounding", np.abs(outer) * (np.abs(inner) + lost) * own)
    slope = np.abs(part.loss.slope(*point))
    rows.add("rounding", slope * own)
    rows.add_columns("columns", slope)
    penalty = part.row_penalties(rows.chunk)
    if penalty is not None:
        rows.add("rounding", penalty * dz * own)
        rows.add_columns("columns", penalty * dz)
    for t, r, q in terms:
        size, beside = np.abs(1.0 if r is None else r), np.abs(0.0 if q is None else q)
        rows.add("rounding", np.abs(t) * (size * own + beside * centre) * (size * dz + beside * mean))

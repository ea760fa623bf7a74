"""Several choices in a group, conditional on how many: the exact conditional logit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from scipy import sparse
from scipy.special import expit, gammaln

from attnfit.inference.fitted import Fitted
from attnfit.inference.statistics import user_columns
from attnfit.inference.sweep import Known, LongFacts, Sums, Wanted
from attnfit.inference.targets import TargetFacts, target_facts
from attnfit.inference.units import Labels
from attnfit.objectives.objective import Evaluation, Moved, Problem
from attnfit.segments import Array

# Numbers of the recursion that are held at a time.
HELD = 1 << 22


class ExactTies(Problem):
    """``L(x) = -sum_g w_g (sum over chosen rows of z - log sum over subsets S of exp(sum of z over S)) + 0.5
    ridge ||x||^2``, S running over the subsets of the group with as many rows as were chosen.

    Parameters
    ----------
    softmax : Softmax
        The rows, with targets zero and one, in memory.

    Raises
    ------
    ValueError
        For targets other than zero and one, a row penalty, or rows that are not in memory.

    Notes
    -----
    The sum over subsets is built row by row: with ``e_k`` the sum over subsets of size k of the rows so far,
    ``e_k' = e_k + exp(z) e_{k-1}``. Carried along are the mean and the covariance of ``sum of a over S`` of
    the distribution of S, which are gradient and Hessian of ``log e_k``: mixtures of two, in which nothing
    cancels. Source: Gail, Lubin and Rubinstein (1981) doi:10.1093/biomet/68.3.703.
    """

    best_hessian = "exact"
    linear = True

    def __init__(self, softmax: Any) -> None:
        if not softmax.rows.is_whole:
            raise ValueError("ties='exact' needs the rows in memory")
        if softmax.penalty is not None:
            raise ValueError("ties='exact' takes no row_penalty; use ridge")
        self.softmax, self.ridge, self.penalty = softmax, softmax.ridge, None
        y, w, groups = user_columns(softmax)
        if not ((y == 0.0) | (y == 1.0)).all():
            row = int(np.argmax((y != 0.0) & (y != 1.0)))
            raise ValueError(f"ties='exact' takes targets 0 and 1; row {row} has {y[row]:g}")
        matrix = softmax.design.block(slice(0, softmax.n_rows))
        order = np.argsort(groups, kind="stable")
        self._rows = np.asarray(matrix.toarray() if sparse.issparse(matrix) else matrix)[order]
        shift = np.zeros(len(y)) if softmax.offset is None else softmax.groups.unsort(softmax.offset)
        self._offset, self._y, self.order, self.groups = shift[order], y[order], order, groups[order]
        self.sizes = np.bincount(groups)
        self.chosen = np.bincount(groups, weights=y).astype(np.intp)
        weights = np.ones(len(y)) if w is None else w
        self.weights = np.bincount(groups, weights=weights) / self.sizes
        self._reads = 0

    @property
    def shape(self) -> tuple[int, ...]:
        """Natural shape of the unknown, (d,)."""
        return (self._rows.shape[1],)

    @property
    def n_passes(self) -> float:
        """Reads of the data since the problem was made."""
        return float(self._reads)

    @property
    def n_rows(self) -> int:
        """Number of rows."""
        return len(self._y)

    @property
    def n_groups(self) -> int:
        """Number of groups."""
        return len(self.sizes)

    @property
    def convex(self) -> bool:
        """True."""
        return True

    def moves(self, at: Evaluation, steps: Array) -> Moved:
        """Return by how much each step changes a logit against the mean of its group at most, shape (k,)."""
        along = self._rows @ steps
        mean = np.stack([np.bincount(self.groups, weights=of_step) for of_step in along.T], axis=1)
        change = np.abs(along - (mean / self.sizes[:, None])[self.groups])
        return Moved(np.asarray(change.max(axis=0)))

    def predict(self, x: Any) -> Array:
        """Return softmax shares, shape (n,): what one more choice would be."""
        found: Array = self.softmax.predict(x)
        return found

    def moments(self, x: Array) -> tuple[Array, Array, Array]:
        """Return for each group the loss, shape (G,), its gradient, shape (G, d), and its Hessian, shape
        (G, d, d), without weights.
        """
        self._reads += 1
        G, d = self.n_groups, self.shape[0]
        z = self._rows @ x + self._offset
        value, gradient, hessian = np.zeros(G), np.zeros((G, d)), np.zeros((G, d, d))
        starts = np.concatenate([[0], np.cumsum(self.sizes)[:-1]])
        value -= np.add.reduceat(self._y * z, starts)
        gradient -= np.add.reduceat(self._y[:, None] * self._rows, starts)
        # Groups of like sizes go together, so that few wait for the longest.
        by_size = np.lexsort((self.sizes, self.chosen))
        step = max(1, HELD // ((int(self.chosen.max()) + 1) * (1 + d + d * d)))
        for first in range(0, G, step):
            mine = by_size[first : first + step]
            log_e, mean, spread = self._subsets(
                z, starts[mine], self.sizes[mine], int(self.chosen[mine].max())
            )
            k = self.chosen[mine], np.arange(len(mine))
            value[mine] += log_e[k]
            gradient[mine] += mean[k]
            hessian[mine] = spread[k]
        return value, gradient, hessian

    def _subsets(self, z: Array, starts: Any, sizes: Any, top: int) -> tuple[Array, Array, Array]:
        """Return ``log e_k`` with mean and covariance, for k = 0 .. top, first axis."""
        n, d = len(starts), self.shape[0]
        log_e = np.full((top + 1, n), -np.inf)
        log_e[0] = 0.0
        mean, spread = np.zeros((top + 1, n, d)), np.zeros((top + 1, n, d, d))
        for t in range(int(sizes.max())):
            live = np.flatnonzero(sizes > t)
            rows = starts[live] + t
            a = self._rows[rows]
            for k in range(min(t + 1, top), 0, -1):
                with_row = log_e[k - 1, live] + z[rows]
                without = log_e[k, live]
                p = np.where(np.isneginf(without), 1.0, expit(with_row - without))
                delta = mean[k - 1, live] + a - mean[k, live]
                outer = delta[:, :, None] * delta[:, None, :]
                spread[k, live] += p[:, None, None] * (spread[k - 1, live] - spread[k, live])
                spread[k, live] += (p * (1.0 - p))[:, None, None] * outer
                mean[k, live] += p[:, None] * delta
                log_e[k, live] = np.logaddexp(without, with_row)
        return log_e, mean, spread

    def evaluate(
        self,
        x: Array,
        near: Evaluation | None = None,
        sampler: Any = None,
        *,
        at_zero: bool = False,
        hessian: bool = False,
    ) -> Evaluation:
        """Return value, gradient and Hessian at x."""
        value, gradient, curvature = self.moments(x)
        total = np.tensordot(self.weights, curvature, 1) + self.ridge * np.eye(len(x))
        start = self.weights @ self.moments(np.zeros_like(x))[1] if at_zero else None
        return Evaluation(
            x,
            float(self.weights @ value) + 0.5 * float(np.sum(self.ridge * x * x)),
            self.weights @ gradient + self.ridge * x,
            gradient_at_zero=start,
            hessian=total,
        )

    def hessian_at(self, at: Evaluation, sample: Any = None, *, absolute: bool = False) -> Array:
        """Return the Hessian at an evaluated point, shape (d, d); it is positive semidefinite."""
        return at.hessian if at.hessian is not None else np.asarray(self.evaluate(at.x).hessian)

    def hessian_operator(self, at: Evaluation, sample: Any = None) -> Callable[[Array], Array]:
        """Return v -> H v at an evaluated point."""
        hessian = self.hessian_at(at)
        return lambda v: np.asarray(hessian @ v)

    def diagonal_at(self, at: Evaluation) -> Array:
        """Return the diagonal of the Hessian, shape (d,)."""
        return np.diag(self.hessian_at(at)).copy()


class ExactFitted(Fitted):
    """What inference sees of a fit with exact ties: one score a group."""

    def __init__(self, exact: ExactTies, x: Array, **options: Any) -> None:
        super().__init__(exact.softmax, x, **options)
        self.exact = exact

    @property
    def _reduced(self) -> tuple[Any, Array, Array]:
        """Columns keep their units: the recursion is not done on scaled ones."""
        return self.given, self.point, np.ones(len(self.point))

    @property
    def facts(self) -> TargetFacts:
        """What the targets say; at zero coefficients all subsets are alike."""
        if "facts" not in self.__dict__:
            exact = self.exact
            found = dict(target_facts(self.given, self.counts).totals)
            n, m = exact.sizes, exact.chosen
            found["null"] = -float(exact.weights @ (gammaln(n + 1) - gammaln(m + 1) - gammaln(n - m + 1)))
            self.__dict__["facts"] = TargetFacts(found)
        known: TargetFacts = self.__dict__["facts"]
        return known

    def auto_kind(self) -> tuple[str, str]:
        """Return classic: the conditional likelihood is one of choices."""
        if self.facts.weighted and self.weight_type == "sampling":
            return "robust", "weights are sampling weights"
        return "classic", "the conditional likelihood of the choices of each group"

    def _check(self, kind: str) -> None:
        if kind == "row":
            raise ValueError("kind='row' has no meaning with ties='exact': a score belongs to a group")
        super()._check(kind)

    def sums(self, wanted: Wanted, labels: Labels | None) -> Sums:
        """Return sums over groups."""
        exact, d = self.exact, len(self.x)
        value, gradient, hessian = exact.moments(self.x)
        scores = exact.weights[:, None] * gradient
        information = np.tensordot(exact.weights, hessian, 1)
        copies = exact.weights if wanted.frequency else np.ones(len(scores))
        meat = (scores / np.where(copies > 0.0, copies, 1.0)[:, None]).T @ scores
        found = Sums(
            Known(information), None, Known(meat), Known(meat), None, np.diag(information).copy(),
            scores.sum(axis=0), np.zeros((0, d)), np.zeros((0, 2)), LongFacts.empty(len(wanted.n_units), 0),
        )  # fmt: skip
        found.totals = {"log_loss": float(exact.weights @ value), "brier": np.nan, "hits": np.nan}
        for k, of_row in enumerate(() if labels is None else labels.numbers):
            sorted_labels = of_row[exact.order]
            starts = np.concatenate([[0], np.cumsum(exact.sizes)[:-1]])
            low, high = (f.reduceat(sorted_labels, starts) for f in (np.minimum, np.maximum))
            if (low != high).any():
                raise ValueError(
                    f"clusters split {int((low != high).sum())} groups, whose rows have no scores of their "
                    "own with ties='exact'; give all rows of a group one label"
                )
            n_units = wanted.n_units[k]
            found.unit_scores[k] = np.zeros((n_units, d))
            np.add.at(found.unit_scores[k], low, scores)
            counted = (exact.chosen > 0) & (exact.weights > 0.0)
            found.unit_rows[k] = np.bincount(low, weights=counted, minlength=n_units).astype(np.float64)
        return found

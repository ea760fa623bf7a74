"""Objectives over the rows of one matrix: a loss, the rows it is applied to, and penalties."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import copy
from functools import partial
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from attnfit.data.inputs import as_point, as_ridge, is_dask
from attnfit.data.store import read_table
from attnfit.losses.loss import GramTerm, Loss
from attnfit.losses.rescaled import SquaredRescaled
from attnfit.objectives.beginning import LogStart, better_units, log_start
from attnfit.objectives.budget import keeps_row_weights, memory_of_rows
from attnfit.objectives.convexity import surrogate_rows
from attnfit.objectives.first_order import guess_normalisers, hessian_sum, normaliser_sums, read
from attnfit.objectives.leverage import RowSampler
from attnfit.objectives.moves import Moves, move_sum, varying_columns
from attnfit.objectives.objective import Drawn, Evaluation, MemoryEstimate, Moved, Problem, Reduction
from attnfit.objectives.part import Part, fitted_rows, largest_product, slope_rows, squares_of_some
from attnfit.objectives.passes import (
    along_sum,
    chunk_product,
    diagonal_sum,
    doubtful_directions,
    null_directions,
    parts_sum,
    product_sum,
    structure_sum,
)
from attnfit.objectives.recession import Frame, separated_rows
from attnfit.segments import Array, Chunk, Groups

# Logits below which an odd function has no output to speak of.
TRIVIAL = 1e-3


class RowProblem(Problem):
    """``L(x) = sum_g phi_g(A_g x + offset_g) + 0.5 ||diag(row_penalty) A x||^2 + 0.5 ridge ||x||^2``.

    Subclasses choose the loss and document it; everything else is here. `attnfit.losses.loss` states the two
    rules (moments, centred Gram) on which it rests.

    Attributes
    ----------
    rows : Part or OnDask
        The rows, the loss, and who goes over them.
    loss : Loss
        The loss of the logits.
    design : Design
        The matrix A.
    b, weights, offset, penalty : ndarray or Column, shape (n,)
        Target, row weights, offset of the logits and squared row penalties, in group order; the last three
        may be None.
    shape : tuple of int
        Natural shape of the unknown, (d,).
    convex : bool
        Whether the loss is convex in the logits.
    zero_is_trivial : bool
        Whether all outputs and the loss are zero at zero, whatever the target.
    guesses_normaliser : bool
        Whether the target tells the outputs only up to a sum that is not known.
    ridge : float or ndarray, shape (d,)
    """

    rows_can_be_drawn = True
    best_hessian = "exact"
    has_logits = True
    rows: Any
    loss: Any = None
    design: Any = None
    b: Any = None
    weights: Any = None
    offset: Any = None
    penalty: Any = None
    shape: tuple[int, ...] = (0,)
    n_unknowns: int = 0
    n_rows: int = 0
    n_groups: int = 0
    convex: bool = False
    guesses_normaliser: bool = False
    ridge: float | Array
    long_states_at_zero: Array | None = None
    _unseen: NDArray[np.bool_] | None = None
    in_better_units: bool = False

    def __init__(
        self,
        A: Any,
        b: Any,
        *,
        loss: Loss,
        groups: Any = None,
        weights: Any = None,
        offset: Any = None,
        row_penalty: Any = 0.0,
        ridge: Any = 0.0,
    ) -> None:
        self.ridge = as_ridge(ridge)
        if is_dask(A):
            from attnfit.objectives.dask import OnDask

            self._hold(OnDask(loss, A, b, groups, weights, offset, row_penalty))
        else:
            self._hold(Part(loss, read_table(A, b, groups, weights, offset, row_penalty)))

    def _hold(self, rows: Any) -> None:
        """Take rows, and note what they and their loss tell."""
        self.rows, self.design, self.loss = rows, rows.design, rows.loss
        self.b, self.weights, self.offset, self.penalty = rows.b, rows.weights, rows.offset, rows.penalty
        self.n_rows, self.n_unknowns, self.n_groups = rows.n_rows, rows.n_unknowns, rows.n_groups
        self.shape, self.convex = (rows.n_unknowns,), bool(rows.loss.convex)
        # The outputs of a rescaled sinh vanish at zero, and with its normaliser all of its loss.
        function = rows.loss.function if isinstance(rows.loss, SquaredRescaled) else "exp"
        self.guesses_normaliser = function != "exp"
        self.zero_is_trivial = function == "sinh" and rows.offset is None
        self.long_states_at_zero, self._unseen = None, None

    def with_rows(self, rows: Any) -> Self:
        """Return the same problem on other rows."""
        other = copy(self)
        other._hold(rows)
        return other

    def without_penalties(self) -> Self:
        """Return the problem of the data term alone."""
        other = self.with_rows(self.rows if self.penalty is None else self.rows.without_penalty())
        other.ridge = 0.0
        return other

    # ---- what it is made of

    @property
    def groups(self) -> Groups:
        """The groups of the rows that are here."""
        return self.rows.groups  # type: ignore[no-any-return]

    @property
    def n_passes(self) -> float:
        """Data passes since the problem was made; sampled rows count as fractions."""
        return float(self.rows.design.rows_read / self.rows.n_rows)

    # ---- memory

    def memory_estimate(self) -> MemoryEstimate:
        """Return the memory that a fit of this problem by the default solver takes at its peak, in bytes by
        purpose; ``print`` shows a table.
        """
        return memory_of_rows(self, dict(super().memory_estimate().parts))

    def with_memory_limit(self, limit: int) -> Self:
        """Return the problem, read in such pieces that a fit takes at most so many bytes. Raises like that of
        the base class.
        """
        bounded = self.with_rows(self.rows.with_memory_limit(limit))
        bounded.memory_estimate().require(limit)
        return bounded

    # ---- outputs

    def predict(self, x: Any) -> Array:
        """Return the model's output on every row, shape (n,): ``f`` (softmax), ``u / alpha`` (rescaled) or
        ``u``.

        Raises
        ------
        ValueError
            If the normaliser alpha of a group is zero, which can happen for sinh.
        """
        found: Array = self.rows.by_row(self._evaluate_checked(x), fitted_rows)
        return found

    def data_gradient(self, x: Any) -> tuple[Any, Any]:
        """Return the factors s, shape (n,), and x, shape (d,), of ``dL/dA = s x^T``."""
        at = self._evaluate_checked(x)
        return self.rows.by_row(at, slope_rows), at.x

    def _overflow_message(self, at: Evaluation) -> str:
        top = max(self.rows.collect(largest_product, at.x))
        return (
            f"the loss or a derivative overflows float64 at this x: the largest |Ax| is {top:.4g}, while "
            "squares of exp, cosh and sinh overflow beyond 354; scale the columns of A or move x towards zero"
        )

    # ---- value and derivatives

    def evaluate(
        self,
        x: Array,
        near: Evaluation | None = None,
        sampler: RowSampler | None = None,
        *,
        at_zero: bool = False,
        hessian: bool = False,
    ) -> Evaluation:
        """Return value and gradient at x from one pass over the data.

        Parameters
        ----------
        x : ndarray, shape (d,)
        near : Evaluation, optional
            An evaluation close by predicts the normalisers of long groups; without it some of their rows
            do. Where a group has few, or the prediction turns out to be useless, one more pass finds them.
        sampler : RowSampler, optional
            Draws rows during the pass; they come back as ``sample``.
        at_zero : bool
            Also return the gradient at zero, from the same pass.
        hessian : bool
            Also return the Hessian from the same pass, where the states of long groups are predicted well
            enough.
        """
        rows, failed, one_pass = self.rows, self.rows.loss.reference_failed, self.rows.loss.one_pass
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
            if not rows.n_long:
                return read(self, x, np.zeros(0), None, sampler, at_zero=at_zero, hessian=hessian)
            if near is not None and one_pass:
                # To first order.
                reference = near.state[0] + near.centre @ (x - near.x)
                warm = read(self, x, reference, near, sampler, at_zero=at_zero, hessian=hessian)
                if not failed(reference, warm.state):
                    return warm
            at = None
            guess = guess_normalisers(rows, x) if near is None and rows.is_whole and one_pass else None
            if guess is not None:
                at = read(self, x, guess, None, None, at_zero=at_zero, hessian=False)
            if at is None or guess is None or failed(guess, at.state):
                found = rows.reduce(normaliser_sums, x).in_order()
                at = read(self, x, found, None, None, at_zero=at_zero, hessian=False)
            if sampler is None and not hessian:
                return at
            # Only now are the states known that weight the rows of long groups.
            return read(self, x, at.state[0], at, sampler, at_zero=at_zero, hessian=hessian)

    def gauss_newton(self, x: Any) -> Array:
        """Return ``J^T J`` of the weighted residuals at x plus the penalties' Hessian, shape (d, d): positive
        semidefinite. For a convex loss that is the Hessian.

        Raises like `value`, and ValueError for losses that are neither convex nor a sum of squares.
        """
        at = self._evaluate_checked(x)
        with np.errstate(over="ignore", invalid="ignore"):
            return self._finite(self.hessian_at(at, gauss_newton=True), at)

    def gauss_newton_product(self, x: Any, v: Any) -> Array:
        """Return the product of the Gauss-Newton matrix at x with v, in the natural shape."""
        at = self._evaluate_checked(x)
        with np.errstate(over="ignore", invalid="ignore"):
            product = self.hvp_at(at, as_point(v, self.shape, "v"), gauss_newton=True)
            return self._finite(product, at).reshape(self.shape)

    def hessian_at(
        self,
        at: Evaluation,
        sample: Drawn | None = None,
        *,
        absolute: bool = False,
        gauss_newton: bool = False,
    ) -> Array:
        """Return the Hessian at an evaluated point, shape (d, d).

        Parameters
        ----------
        at : Evaluation
        sample : Drawn, optional
            Use these rows (with their inverse probabilities) in place of all rows.
        absolute : bool
            Take the row weights by absolute value: a positive semidefinite majorant, the metric for leverage.
        gauss_newton : bool
            Leave out the curvature of the residuals.
        """
        gram = self.rows.reduce(hessian_sum, at, absolute, gauss_newton, drawn=sample)
        hessian: Array = gram.result()
        hessian[np.diag_indices(len(at.x))] += self.ridge
        return hessian

    def hvp_at(self, at: Evaluation, v: Array, *, gauss_newton: bool = False) -> Array:
        """Return the Hessian, or the Gauss-Newton matrix, at an evaluated point times v, shape (d,), in one
        pass.
        """
        return np.asarray(self.ridge * v + self.rows.reduce(product_sum, at, v, gauss_newton))

    def curvature(self, at: Evaluation) -> Iterator[tuple[Chunk, list[GramTerm], Array | None]]:
        """Yield each chunk with its terms of the Hessian and the weights of its centres: one pass."""
        rows = self.rows
        for chunk in rows.prefetch(rows.chunks):
            _, z = rows.logits(chunk, at.x)
            yield chunk, *rows.gram_rows(chunk, z, rows.row_state(chunk, z, at))

    def hessian_operator(self, at: Evaluation, sample: Drawn | None = None) -> Callable[[Array], Array]:
        """Return v -> H v at an evaluated point, over all rows or a sample; it keeps the row weights (a few
        numbers a row) unless they are too many, or the rows in other places.

        One pass prepares it, each product is one pass more (of the sample if given).
        """
        rows = self.rows
        if (sample is None and not keeps_row_weights(rows)) or not rows.is_whole:
            products = partial(rows.reduce, product_sum, at, drawn=sample)
            return lambda v: np.asarray(self.ridge * v + products(v, False))
        prepared = []
        for chunk in rows.prefetch(rows.chunks if sample is None else sample.chunks):
            _, z = rows.logits(chunk, at.x)
            prepared.append((chunk, *rows.gram_rows(chunk, z, rows.row_state(chunk, z, at))))

        def product(v: Array) -> Array:
            out = self.ridge * v
            for chunk, terms, weights in prepared:
                out += chunk_product(rows.design, chunk, rows.fetch(chunk), terms, weights, at.centre, v)
            return out

        return product

    def diagonal_at(self, at: Evaluation) -> Array:
        """Return the diagonal of a positive majorant of the Hessian, shape (d,): the natural scale of each
        unknown squared.

        Row weights enter by absolute value and rows are centred at their common weighted mean, not group by
        group.
        """
        uncentred, second, first, total = self.rows.reduce(diagonal_sum, at)
        if total > 0.0:
            inside = second - first * first / total
            # A constant column has no variance but rounding: its own size keeps it from being scaled up to
            # matter.
            second = np.where(inside > 1e-10 * second, inside, second)
        return np.asarray(second + uncentred + self.ridge)

    def initial_point(self, random_state: Any = None) -> Array:
        """Return a point to start from, shape (d,): zero, or logits of size 0.1 where zero is stationary by
        symmetry.
        """
        if not self.zero_is_stationary:
            return np.zeros(self.n_unknowns)
        total, n = self.rows.reduce(squares_of_some)
        squares = total / n
        rng = np.random.default_rng(random_state)
        direction = rng.standard_normal(self.n_unknowns)
        return np.asarray(0.1 * direction / np.sqrt(np.where(squares > 0, squares, 1.0) * self.n_unknowns))

    def starts(self, rng: np.random.Generator) -> dict[str, Array]:
        """Return the point to descend from by name, flat."""
        return {"zero": self.initial_point(rng).reshape(-1)}

    def convex_surrogate(self) -> RowProblem | None:
        """Return a convex problem on the same data whose minimiser is a good start; None where there is
        none.
        """
        rows = self.rows
        found = surrogate_rows(rows) if rows.is_whole else rows.surrogate()
        return None if found is None else self.with_rows(found)

    def log_start(self, normaliser: float = 1.0) -> LogStart | None:
        """Return least squares on the logarithm of the target: see `attnfit.objectives.beginning`."""
        return log_start(self.rows, normaliser) if self.rows.is_whole else None

    # ---- what a verdict looks at

    def is_trivial(self, at: Evaluation) -> bool:
        """Return whether all outputs have gone to zero, where the loss vanishes whatever the target."""
        return self.zero_is_trivial and bool(self.moves(at, at.x[:, None]).largest[0] <= TRIVIAL)

    def moves(self, at: Evaluation, steps: Array) -> Moved:
        """Return by how much each step changes a fitted logit at most: see `attnfit.objectives.moves`."""
        found: Moves = self.rows.reduce(move_sum, at, steps)
        return found.finalize()

    def look_along(self, at: Evaluation, step: Array, directions: Array) -> tuple[Moved, Array, Array]:
        """Return the move of a step, shape (d,), the Hessian's diagonal, shape (d,), and its curvature ``v^T
        H v`` along directions, shape (d, k), from one pass.
        """
        moves, parts = self.rows.reduce(parts_sum, at, step, directions)
        ridge = np.broadcast_to(self.ridge, len(step))
        return moves.finalize(), parts.diagonal + ridge, parts.along + ridge @ directions**2

    def unseen_directions(self, at: Evaluation) -> Array:
        """Return an orthonormal basis of the directions along which no logit changes, in one pass, or two
        where there may be some; constants within groups count as unseen where the loss ignores them.
        """
        if np.any(self.ridge):
            return np.zeros((self.n_unknowns, 0))
        directions = doubtful_directions(*self.structure(at))
        if not directions.shape[1]:
            return directions
        return null_directions(directions, *self.rows.reduce(along_sum, at, directions))

    def unseen_columns(self, at: Evaluation) -> NDArray[np.bool_]:
        """Return which unknowns no row sees, shape (d,): a look at some rows, and passes where these leave
        doubt.
        """
        if self._unseen is None:
            if np.any(self.ridge) or self.rows.penalty is not None:
                self._unseen = np.zeros(self.n_unknowns, dtype=bool)
            else:
                rows = self.rows
                seen = varying_columns(rows, rows.chunks) if rows.is_whole else rows.reduce(varying_columns)
                self._unseen = seen == 0.0 if seen.all() else self._hidden_columns(at)
        return self._unseen

    def _hidden_columns(self, at: Evaluation) -> NDArray[np.bool_]:
        """Return which columns are constant within the groups: where the Gram leaves doubt, the rows tell."""
        gram, sizes = self.structure(at)
        unseen = np.diag(gram) <= 1e-16 * sizes
        doubtful = np.flatnonzero(unseen & (sizes > 0.0))
        if len(doubtful):
            unit = np.eye(len(sizes))[:, doubtful] / np.sqrt(sizes[doubtful])
            seen, rounding = self.rows.reduce(along_sum, at, unit)
            unseen[doubtful] = np.diag(seen) <= 64.0 * rounding
        return np.asarray(unseen)

    def structure(self, at: Evaluation) -> tuple[Array, Array]:
        """Return the Gram of all rows and its diagonal before centring."""
        gram, sizes = self.rows.reduce(structure_sum, at)
        return gram.result(), sizes

    @property
    def rows_can_be_left_out(self) -> bool:
        """Whether a problem on some of the rows can be made: not of pairs."""
        return self.rows_can_be_drawn

    def without_separated_rows(self, at: Evaluation, frame: Frame, along: Array) -> RowProblem:
        """Return the problem without the rows that fall along a recession direction."""
        rows = self.rows
        if not rows.is_whole:
            return self.with_rows(rows.without_separated(at, frame, along))
        return self.with_rows(rows.without(separated_rows(rows, rows.chunks, at, frame, along)))

    def reduction(self) -> Reduction | None:
        """Return the problem in better units: see `attnfit.objectives.beginning`."""
        return better_units(self)

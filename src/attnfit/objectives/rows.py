"""What a grouped problem offers: value, gradient, Hessian, products, scores."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import copy
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import linalg

from attnfit.data.gram import flatness
from attnfit.data.groups import Chunk
from attnfit.losses.loss import GramTerm
from attnfit.losses.rescaled import SquaredRescaled
from attnfit.objectives.budget import BudgetedProblem
from attnfit.objectives.centred import centred, is_shifted
from attnfit.objectives.dask import distributed
from attnfit.objectives.dask_parts import is_dask
from attnfit.objectives.inputs import as_point
from attnfit.objectives.leverage import RowSampler
from attnfit.objectives.moves import Moves, move_sum
from attnfit.objectives.objective import Drawn, Evaluation, Moved, Reduction
from attnfit.objectives.part import StoredProblem, guess_normalisers, normaliser_sums
from attnfit.objectives.passes import (
    chunk_product,
    diagonal_sum,
    hessian_sum,
    parts_sum,
    product_sum,
    read,
    score_sum,
    structure_sum,
    varying_columns,
)
from attnfit.objectives.recession import Frame, separated_rows
from attnfit.objectives.store import DERIVED
from attnfit.objectives.surrogate import LogStart, convex_neighbour, log_start
from attnfit.segments import Array

# Logits below which an odd function has no output to speak of.
TRIVIAL = 1e-3
# Rows whose entries are looked at for the size of a column.
LOOKED_AT = 1_000
# Squares of larger entries, weighted and added up, may overflow; beyond the second they do.
LARGE, HUGE = 1e60, 1e150


class GroupedProblem(BudgetedProblem):
    """``L(x) = sum_g phi_g(A_g x + offset_g) + 0.5 ||diag(row_penalty) A x||^2 + 0.5 ridge ||x||^2``.

    Subclasses choose the loss and document it; everything else is here. `attnfit.losses.loss` states the two
    rules (moments, centred Gram) on which it rests.
    """

    rows_can_be_drawn = True
    best_hessian = "exact"
    has_logits = True
    _unseen: NDArray[np.bool_] | None = None
    _reduced: bool = False

    def __new__(cls, A: Any = None, *args: Any, **options: Any) -> Any:
        """Return a problem that is read where its rows are, for a Dask array or data frame."""
        # Copies are made without arguments.
        return super().__new__(distributed(cls) if is_dask(A) else cls)

    @property
    def convex(self) -> bool:
        """Whether the loss is convex in the logits."""
        return self.loss.convex

    def convex_neighbour(self) -> GroupedProblem | None:
        """Return a convex problem on the same data whose minimiser is a good start; None where there is
        none.
        """
        return convex_neighbour(self)

    def predict(self, x: Any) -> Array:
        """Return the model's output on every row, shape (n,): ``f`` (softmax), ``u / alpha`` (rescaled) or
        ``u``.

        Raises
        ------
        ValueError
            If the normaliser alpha of a group is zero, which can happen for sinh.
        """
        return self.by_row(self._evaluate_checked(x), _fitted)

    def data_gradient(self, x: Any) -> tuple[Array, Array]:
        """Return the factors s, shape (n,), and x, shape (d,), of ``dL/dA = s x^T``."""
        at = self._evaluate_checked(x)
        return self.by_row(at, _slope), at.x

    def _overflow_message(self, at: Evaluation) -> str:
        top = max(self.collect(_largest_product, at.x))
        return (
            f"the loss or a derivative overflows float64 at this x: the largest |Ax| is {top:.4g}, while "
            "squares of exp, cosh and sinh overflow beyond 354; scale the columns of A or move x towards zero"
        )

    def evaluate(
        self,
        x: Array,
        near: Evaluation | None = None,
        sampler: RowSampler | None = None,
        *,
        origin: bool = False,
        hessian: bool = False,
    ) -> Evaluation:
        """Return value and gradient at x from one read of the data.

        Parameters
        ----------
        x : ndarray, shape (d,)
        near : Evaluation, optional
            An evaluation close by predicts the normalisers of long groups; without it some of their rows
            do. Where a group has few, or the prediction turns out to be useless, one more read finds them.
        sampler : RowSampler, optional
            Draws rows during the read; they come back as ``sample``.
        origin : bool
            Also return the gradient at zero, from the same read.
        hessian : bool
            Also return the Hessian from the same read, where the states of long groups are predicted well
            enough.
        """
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
            if not self.n_long:
                return read(self, x, np.zeros(0), None, sampler, origin=origin, hessian=hessian)
            if near is not None:
                reference = near.predict_reference(x)
                warm = read(self, x, reference, near, sampler, origin=origin, hessian=hessian)
                if not self.loss.reference_failed(reference, warm.state):
                    return warm
            at = None
            guess = guess_normalisers(self, x) if near is None and self.is_whole else None
            if guess is not None:
                at = read(self, x, guess, None, None, origin=origin, hessian=False)
            if at is None or guess is None or self.loss.reference_failed(guess, at.state):
                found = self.reduce(normaliser_sums, x).in_order()
                at = read(self, x, found, None, None, origin=origin, hessian=False)
            if sampler is None and not hessian:
                return at
            # Only now are the states known that weight the rows of long groups.
            return read(self, x, at.state[0], at, sampler, origin=origin, hessian=hessian)

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
        gram = self.reduce(hessian_sum, at.bare(), absolute, gauss_newton, drawn=sample)
        hessian: Array = gram.result()
        hessian[np.diag_indices(self.n_unknowns)] += self.ridge
        return hessian

    def score_gram(self, x: Any) -> Array:
        """Return the sum of outer products of scores at x, shape (d, d): the middle of the sandwich
        covariance.

        One score a group, ``A_g^T s_g`` (cluster-robust), where there are several groups; else one a row:
        the gradient of
        the row's own term of the loss.
        """
        at = self._evaluate_checked(x)
        by_group = self.loss.coupled and self.n_groups > 1
        gram, long_scores = self.reduce(score_sum, at.bare(), by_group)
        return np.asarray(gram.result() + long_scores.T @ long_scores)

    def diagonal_at(self, at: Evaluation) -> Array:
        """Return the diagonal of a positive majorant of the Hessian, shape (d,): the natural scale of each
        unknown squared.

        Row weights enter by absolute value and rows are centred at their common weighted mean, not group by
        group.
        """
        uncentred, second, first, total = self.reduce(diagonal_sum, at.bare())
        if total > 0.0:
            centred = second - first * first / total
            # A constant column has no variance but rounding: its own size keeps it from being scaled up to
            # matter.
            second = np.where(centred > 1e-10 * second, centred, second)
        return np.asarray(second + uncentred + self.ridge)

    def log_start(self, normaliser: float = 1.0) -> LogStart | None:
        """Return least squares on the logarithm of the target: see `attnfit.objectives.surrogate`."""
        return log_start(self, normaliser)

    @property
    def guesses_normaliser(self) -> bool:
        """Whether the target tells the outputs only up to a sum that is not known."""
        return isinstance(self.loss, SquaredRescaled) and self.loss.function != "exp"

    def is_trivial(self, at: Evaluation) -> bool:
        """Return whether all outputs have gone to zero, where the loss vanishes whatever the target."""
        return self.zero_is_trivial and bool(self.moves(at, at.x[:, None]).largest[0] <= TRIVIAL)

    def moves(self, at: Evaluation, steps: Array) -> Moved:
        """Return by how much each step changes a fitted logit at most: see `attnfit.objectives.moves`."""
        found: Moves = self.reduce(move_sum, at.bare(), steps)
        return found.close()

    def look_along(self, at: Evaluation, step: Array, directions: Array) -> tuple[Moved, Array, Array]:
        """Return the move of a step, shape (d,), the Hessian's diagonal, shape (d,), and its curvature ``v^T
        H v`` along directions, shape (d, k), from one read.
        """
        moves, parts = self.reduce(parts_sum, at.bare(), step, directions)
        ridge = np.broadcast_to(self.ridge, len(step))
        return moves.close(), parts.diagonal + ridge, parts.along + ridge @ directions**2

    def unseen_directions(self, at: Evaluation) -> Array:
        """Return an orthonormal basis of the directions along which no logit changes, in one read; constants
        within groups count as unseen where the loss ignores them.
        """
        if np.any(self.ridge):
            return np.zeros((self.n_unknowns, 0))
        return self._structure(at)[0]

    def unseen_columns(self, at: Evaluation) -> NDArray[np.bool_]:
        """Return which unknowns no row sees, shape (d,): a look at some rows, and a read where these leave
        doubt.
        """
        if np.any(self.ridge) or self.penalty is not None:
            return np.zeros(self.n_unknowns, dtype=bool)
        if self._unseen is None:
            unclear = self.reduce(varying_columns) == 0.0
            self._unseen = self._structure(at)[1] if unclear.any() else unclear
        return self._unseen

    def _structure(self, at: Evaluation) -> tuple[Array, NDArray[np.bool_]]:
        """Return the directions and the columns that no row sees."""
        gram, sizes = self.reduce(structure_sum, at.bare())
        return null_directions(gram.result(), sizes)

    def reduction(self) -> Reduction | None:
        """Return the problem with rows centred by group, where a column is all but constant in them and the
        loss cannot tell, or with columns of extreme size scaled by powers of two, which rounds nothing: their
        squares would underflow or overflow. None where all columns are ordinary.

        Raises
        ------
        ValueError
            If a column has an entry beyond 1e150 beside ordinary ones: a code for a missing value.
        """
        looks = self.rows_can_be_drawn and not (self._reduced or self.design.on_disk)
        if looks and self.is_whole and is_shifted(self):
            inner = centred(self)
            inner._reduced = True
            return Reduction(inner, _same, _same, "", keeps_unknowns=True)
        sizes = self.design.column_sizes(LOOKED_AT) if looks else None
        if sizes is None or _ordinary(sizes):
            return None
        sizes = np.asarray(self.design.column_sizes())
        exponents = np.where(sizes > 0.0, -np.floor(np.log2(np.where(sizes > 0.0, sizes, 1.0))), 0.0)
        for j in np.flatnonzero(sizes > HUGE):
            self._refuse_codes(int(j), float(sizes[j]))
        factors = np.ldexp(1.0, exponents.astype(int))
        other = copy(self)
        for name in DERIVED:
            other.__dict__.pop(name, None)
        other.design, other._unseen, other._reduced = self.design.scaled(factors), None, True
        if np.any(self.ridge):
            # A penalty on a column of size 1e-160 weighs what it weighs: as much as float64 can hold.
            with np.errstate(over="ignore", under="ignore"):
                other.ridge = np.minimum(self.ridge * factors**2, 1.0 / np.finfo(float).tiny)
        return Reduction(other, lambda y: y * factors, lambda x: x / factors, "", keeps_unknowns=True)

    def _refuse_codes(self, j: int, size: float) -> None:
        """Raise ValueError if a column with huge entries has ordinary ones too."""
        unit = np.zeros(self.n_unknowns)
        unit[j] = 1.0
        column = np.abs(np.concatenate([block @ unit for _, block in self.design.blocks()]))
        ordinary = (column > 0.0) & (column < size * 1e-50)
        if ordinary.any():
            row = int(np.argmax(column))
            raise ValueError(
                f"A has {size:.3g} at row {row}, column {j}, beside entries such as "
                f"{column[ordinary][0]:.3g}: if it stands for a missing value, drop or impute these rows"
            )

    @property
    def rows_can_be_left_out(self) -> bool:
        """Whether a problem on some of the rows can be made: not of pairs."""
        return self.rows_can_be_drawn

    def without_separated_rows(self, at: Evaluation, frame: Frame, along: Array) -> GroupedProblem:
        """Return the problem without the rows that fall along a recession direction."""
        return self.without_rows(separated_rows(self, self.chunks, at, frame, along))

    def hvp_at(self, at: Evaluation, v: Array, *, gauss_newton: bool = False) -> Array:
        """Return the Hessian, or the Gauss-Newton matrix, at an evaluated point times v, shape (d,), in one
        read.
        """
        return np.asarray(self.ridge * v + self.reduce(product_sum, at.bare(), v, gauss_newton))

    def curvature(self, at: Evaluation) -> Iterator[tuple[Chunk, list[GramTerm], Array | None]]:
        """Yield each chunk with its terms of the Hessian and the weights of its centres: one read."""
        for chunk in self.ahead(self.chunks):
            _, z = self.logits(chunk, at.x)
            yield chunk, *self.gram_rows(chunk, z, self.row_state(chunk, z, at))

    def hessian_operator(self, at: Evaluation, sample: Drawn | None = None) -> Callable[[Array], Array]:
        """Return v -> H v at an evaluated point, over all rows or a sample; it keeps the row weights (a few
        numbers a row) unless they are too many, or the rows in other places.

        One read prepares it, each product is one read more (of the sample if given).
        """
        bare = at.bare()
        if (sample is None and not self.keeps_row_weights) or not self.is_whole:
            products = partial(self.reduce, product_sum, bare, drawn=sample)
            return lambda v: np.asarray(self.ridge * v + products(v, False))
        prepared = []
        for chunk in self.ahead(self.chunks if sample is None else sample.chunks):
            _, z = self.logits(chunk, at.x)
            prepared.append((chunk, *self.gram_rows(chunk, z, self.row_state(chunk, z, at))))

        def product(v: Array) -> Array:
            out = self.ridge * v
            for chunk, terms, weights in prepared:
                out += chunk_product(self.design, chunk, self.fetch(chunk), terms, weights, at.centre, v)
            return out

        return product


def _same(x: Array) -> Array:
    return x


def _ordinary(sizes: Array) -> bool:
    """Whether the squares of these numbers, and their sums and products, are far from the ends of float64."""
    return bool(((sizes == 0.0) | ((sizes > 1.0 / LARGE) & (sizes < LARGE))).all())


def null_directions(gram: Array, sizes: Array) -> tuple[Array, NDArray[np.bool_]]:
    """Return an orthonormal basis of the null space of a Gram, shape (d, k), and which columns are zero;
    ``sizes`` is its diagonal before its rows were centred: a column that lost all but 1e-8 of its length by
    that has nothing left.
    """
    squares = np.diag(gram)
    seen = squares > 1e-16 * sizes
    scale = np.sqrt(np.where(seen, squares, 1.0))
    scaled = np.where(np.multiply.outer(seen, seen), gram / scale / scale[:, None], 0.0)
    values, vectors = linalg.eigh(scaled, driver="evd")
    null = vectors[:, values <= flatness(len(scale)) * max(float(values[-1]), 1.0)]
    return np.asarray(np.linalg.qr(null / scale[:, None])[0]), ~seen


def _fitted(part: StoredProblem, chunk: Chunk, z: Array, state: list[Array]) -> Array:
    if isinstance(part.loss, SquaredRescaled) and (state[0] == 0.0).any():
        row = int(np.flatnonzero(np.broadcast_to(state[0], z.shape) == 0.0)[0])
        group = int(np.searchsorted(chunk.segments.starts, row, side="right")) - 1
        label = part.groups.labels[chunk.groups][group]
        raise ValueError(f"the normaliser of group {label!r} is zero at this x: its shares are not defined")
    return part.loss.fitted(z, state)


def _slope(part: StoredProblem, chunk: Chunk, z: Array, state: list[Array]) -> Array:
    b, w, _ = part.targets(chunk)
    s = part.loss.slope(z, b, w, state)
    penalty = part.row_penalties(chunk)
    return s if penalty is None else s + penalty * (z - part.shift(chunk))


def _largest_product(part: StoredProblem, chunks: list[Chunk], x: Array) -> float:
    return max(float(np.abs(part.design.product(part.fetch(c), x)).max()) for c in part.ahead(chunks))

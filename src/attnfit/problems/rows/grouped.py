"""What a grouped problem offers: value, gradient, Hessian, products, scores."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np

from attnfit.losses.base import GramTerm
from attnfit.losses.rescaled import SquaredRescaled
from attnfit.losses.segments import Array
from attnfit.problems.evaluation import Drawn, Evaluation
from attnfit.problems.inputs import as_point
from attnfit.problems.rows.budget import BudgetedProblem
from attnfit.problems.rows.distributed import distributed
from attnfit.problems.rows.neighbour import convex_neighbour
from attnfit.problems.rows.normalisers import guess_normalisers, normaliser_sums
from attnfit.problems.rows.partition import Chunk
from attnfit.problems.rows.partitions import is_dask
from attnfit.problems.rows.reading import read
from attnfit.problems.rows.stored import StoredProblem
from attnfit.problems.rows.sums import chunk_product, diagonal_sum, hessian_sum, product_sum, score_sum
from attnfit.sketching import RowSampler


class GroupedProblem(BudgetedProblem):
    """``L(x) = sum_g phi_g(A_g x + offset_g) + 0.5 ||diag(row_penalty) A x||^2 + 0.5 ridge ||x||^2``.

    Subclasses choose the loss and document it; everything else is here. `attnfit.losses.base` states the two
    rules (moments, centred Gram) on which it rests.
    """

    rows_can_be_drawn = True
    best_hessian = "exact"

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

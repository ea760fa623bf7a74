"""What a grouped problem offers: value, gradient, Hessian, products, scores."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from attnfit.designs import Design
from attnfit.losses.base import GramTerm
from attnfit.losses.rescaled import SquaredRescaled
from attnfit.losses.segments import Array
from attnfit.problems.evaluation import Evaluation
from attnfit.problems.inputs import as_point
from attnfit.problems.rows.neighbour import convex_neighbour
from attnfit.problems.rows.normalisers import find_normalisers, guess_normalisers
from attnfit.problems.rows.partition import Chunk
from attnfit.problems.rows.reading import read
from attnfit.problems.rows.stored import StoredProblem
from attnfit.sketching import RowSampler

# Row weights for products with the Hessian are kept up to this many rows, else computed in each product.
KEPT_ROWS = 1 << 25


class GroupedProblem(StoredProblem):
    """``L(x) = sum_g phi_g(A_g x + offset_g) + 0.5 ||diag(row_penalty) A x||^2 + 0.5 ridge ||x||^2``.

    Subclasses choose the loss and document it; everything else is here. `attnfit.losses.base` states the two
    rules (moments, centred Gram) on which it rests.
    """

    rows_can_be_drawn = True
    best_hessian = "exact"

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

        def fitted(chunk: Chunk, z: Array, state: list[Array]) -> Array:
            if isinstance(self.loss, SquaredRescaled) and (state[0] == 0.0).any():
                row = int(np.flatnonzero(np.broadcast_to(state[0], z.shape) == 0.0)[0])
                group = int(np.searchsorted(chunk.segments.starts, row, side="right")) - 1
                label = self.groups.labels[chunk.groups][group]
                raise ValueError(
                    f"the normaliser of group {label!r} is zero at this x: its shares are not defined"
                )
            return self.loss.fitted(z, state)

        return self.by_row(self._evaluate_checked(x), fitted)

    def data_gradient(self, x: Any) -> tuple[Array, Array]:
        """Return the factors s, shape (n,), and x, shape (d,), of ``dL/dA = s x^T``."""

        def slope(chunk: Chunk, z: Array, state: list[Array]) -> Array:
            b, w, _ = self.targets(chunk)
            s = self.loss.slope(z, b, w, state)
            penalty = self.row_penalties(chunk)
            return s if penalty is None else s + penalty * (z - self.shift(chunk))

        at = self._evaluate_checked(x)
        return self.by_row(at, slope), at.x

    def _overflow_message(self, at: Evaluation) -> str:
        top = max(float(np.abs(self.design.product(block, at.x)).max()) for _, block in self.design.blocks())
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
            if not len(self.long_groups):
                return read(self, x, np.zeros(0), None, sampler, origin=origin, hessian=hessian)
            if near is not None:
                reference = near.predict_reference(x)
                warm = read(self, x, reference, near, sampler, origin=origin, hessian=hessian)
                if not self.loss.reference_failed(reference, warm.state):
                    return warm
            at = None
            guess = guess_normalisers(self, x) if near is None else None
            if guess is not None:
                at = read(self, x, guess, None, None, origin=origin, hessian=False)
            if at is None or guess is None or self.loss.reference_failed(guess, at.state):
                found = find_normalisers(self, x)
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
        sample: list[Chunk] | None = None,
        *,
        absolute: bool = False,
        gauss_newton: bool = False,
    ) -> Array:
        """Return the Hessian at an evaluated point, shape (d, d).

        Parameters
        ----------
        at : Evaluation
        sample : list of Chunk, optional
            Use these rows (with their inverse probabilities) in place of all rows.
        absolute : bool
            Take the row weights by absolute value: a positive semidefinite majorant, the metric for leverage.
        gauss_newton : bool
            Leave out the curvature of the residuals.
        """
        gram = self.design.gram()
        for chunk in self.chunks if sample is None else sample:
            block, z = self.logits(chunk, at.x)
            state = self.row_state(chunk, z, at)
            self.add_to_gram(
                gram, chunk, block, z, state, at.centre, absolute=absolute, gauss_newton=gauss_newton
            )
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
        gram = self.design.gram()
        long_scores = np.zeros((len(self.long_groups), self.n_unknowns))
        by_group = self.loss.coupled and len(self.groups) > 1
        for chunk in self.chunks:
            block, z = self.logits(chunk, at.x)
            b, w, _ = self.targets(chunk)
            state = self.row_state(chunk, z, at)
            if not by_group:
                weights = self.loss.gram_terms(z, b, w, state)[1]
                term = self.loss.score_term(z, b, w, state)
                self.add_term(gram, chunk, block, term, weights, at.centre)
                continue
            slope = self.loss.slope(z, b, w, state)
            if chunk.long >= 0:
                long_scores[chunk.long] += self.design.combine(slope[None, :], block)[0]
            else:
                scores = self.design.group_rows(block, slope, chunk.segments.starts)
                gram.add(scores, np.ones(scores.shape[0]))
        return np.asarray(gram.result() + long_scores.T @ long_scores)

    def diagonal_at(self, at: Evaluation) -> Array:
        """Return the diagonal of a positive majorant of the Hessian, shape (d,): the natural scale of each
        unknown squared.

        Row weights enter by absolute value and rows are centred at their common weighted mean, not group by
        group.
        """
        first, second, total = np.zeros(self.n_unknowns), np.zeros(self.n_unknowns), 0.0
        uncentred = np.zeros(self.n_unknowns)
        for chunk in self.chunks:
            block, z = self.logits(chunk, at.x)
            for t, r, q in self.gram_rows(chunk, z, self.row_state(chunk, z, at))[0]:
                weight = np.abs(t) if r is None else np.abs(t) * r * r
                squares = self.design.combine(weight[None, :], self.design.squares(block))[0]
                if q is None:
                    uncentred += squares
                else:
                    second += squares
                    first += self.design.combine(weight[None, :], block)[0]
                    total += float(weight.sum())
        if total > 0.0:
            centred = second - first * first / total
            # A constant column has no variance but rounding: its own size keeps it from being scaled up to
            # matter.
            second = np.where(centred > 1e-10 * second, centred, second)
        return second + uncentred + self.ridge

    def hvp_at(self, at: Evaluation, v: Array, *, gauss_newton: bool = False) -> Array:
        """Return the Hessian, or the Gauss-Newton matrix, at an evaluated point times v, shape (d,), in one
        read.
        """
        out = self.ridge * v
        for chunk in self.chunks:
            block, z = self.logits(chunk, at.x)
            state = self.row_state(chunk, z, at)
            terms, weights = self.gram_rows(chunk, z, state, gauss_newton=gauss_newton)
            out += _product(self.design, chunk, block, terms, weights, at.centre, v)
        return out

    def curvature(
        self, at: Evaluation, sample: list[Chunk] | None = None
    ) -> Iterator[tuple[Chunk, list[GramTerm], Array | None]]:
        """Yield each chunk with its terms of the Hessian and the weights of its centres: one read."""
        for chunk in self.chunks if sample is None else sample:
            _, z = self.logits(chunk, at.x)
            yield chunk, *self.gram_rows(chunk, z, self.row_state(chunk, z, at))

    def hessian_operator(self, at: Evaluation, sample: list[Chunk] | None = None) -> Callable[[Array], Array]:
        """Return v -> H v at an evaluated point, over all rows or a sample; it keeps the row weights (a few
        numbers a row) unless they are too many.

        One read prepares it, each product is one read more (of the sample if given).
        """
        if sample is None and self.n_rows > KEPT_ROWS:
            return lambda v: self.hvp_at(at, v)
        prepared = list(self.curvature(at, sample))

        def product(v: Array) -> Array:
            out = self.ridge * v
            for chunk, terms, weights in prepared:
                out += _product(self.design, chunk, self.fetch(chunk), terms, weights, at.centre, v)
            return out

        return product


def _product(
    design: Design,
    chunk: Chunk,
    block: Any,
    terms: list[GramTerm],
    weights: Array | None,
    centres: Array,
    v: Array,
) -> Array:
    """Return a chunk's part of the Hessian times v."""
    along = design.product(block, v)
    if chunk.long < 0:
        return np.asarray(design.combine(change_of_slope(chunk, terms, weights, along)[None, :], block)[0])
    rows, beside = np.zeros_like(along), np.zeros_like(v)
    for t, r, q in terms:
        y = along if r is None else r * along
        part = t * y
        if q is not None:
            part -= t * (q * (centres[chunk.long] @ v))
            beside -= centres[chunk.long] * float(np.sum(q * part))
        rows += part if r is None else r * part
    return np.asarray(design.combine(rows[None, :], block)[0] + beside)


def change_of_slope(chunk: Chunk, terms: list[GramTerm], weights: Array | None, along: Array) -> Array:
    """Return the change of the gradient in the logits where these change by ``along``; a chunk of whole
    groups.
    """
    spread, total = chunk.segments.spread, chunk.segments.sum
    rows = np.zeros_like(along)
    for t, r, q in terms:
        y = along if r is None else r * along
        if q is None:
            part = t * y
        else:
            assert weights is not None
            part = t * (y - q * spread(total(weights * along)))
            rows -= weights * spread(total(q * part))
        rows += part if r is None else r * part
    return rows

"""A grouped loss of a linear map: one read of the data gives value and gradient, a second one the Hessian."""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from functools import cached_property
from typing import Any

import numpy as np
from scipy import sparse

from attnfit.designs import Gram, combine_rows, group_rows
from attnfit.losses.base import GramTerm, Loss
from attnfit.losses.segments import Array, Segments
from attnfit.losses.rescaled import SquaredRescaled
from attnfit.losses.softmax import SoftmaxLoss
from attnfit.problems.inputs import as_design, as_point, as_ridge, as_vector, require_finite_rows
from attnfit.problems.partition import Chunk, parse_groups, partition
from attnfit.problems.reading import Evaluation, read
from attnfit.sketching import RowSampler


class GroupedProblem:
    """``L(x) = sum_g phi_g(A_g x + offset_g) + 0.5 ||diag(row_penalty) A x||^2 + 0.5 ridge ||x||^2``.

    Subclasses choose the loss and document it; everything else is here. `attnfit.losses.base` states the two rules
    (moments, centred Gram) on which it rests.
    """

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
        ridge: float = 0.0,
    ) -> None:
        self.design = as_design(A)
        n = int(self.design.shape[0])
        self.loss = loss
        self.groups = parse_groups(groups, n)
        sort = self.groups.sort
        self.b = sort(as_vector(b, n, "b"))
        self.weights = None if weights is None else sort(self._row_weights(weights, n))
        self.offset = None if offset is None else sort(as_vector(offset, n, "offset"))
        penalty = as_vector(row_penalty, n, "row_penalty", scalar=True) ** 2
        self.penalty = None if not penalty.any() else sort(np.broadcast_to(penalty, n))
        self.ridge = as_ridge(ridge)
        self.chunks, self.long_groups = partition(
            self.groups, n, self.design.block_rows, coupled=loss.coupled
        )
        self.constants = np.zeros(1)
        if loss.coupled:
            weight = np.ones(1) if self.weights is None else self.weights
            self.constants = loss.constants(self.b, weight, Segments(self.groups.starts, n))

    def with_loss(self, loss: Loss, b: Array, weights: Array | None) -> GroupedProblem:
        """Return a problem on the same data with another loss; ``b``, ``weights`` in group order."""
        other = copy(self)
        other.loss, other.b, other.weights = loss, b, weights
        if loss.coupled != self.loss.coupled:
            other.chunks, other.long_groups = partition(
                self.groups, self.n_rows, self.design.block_rows, coupled=loss.coupled
            )
            other.constants = np.zeros(1)
        if loss.coupled:
            weight = np.ones(1) if weights is None else weights
            other.constants = loss.constants(b, weight, Segments(self.groups.starts, self.n_rows))
        return other

    def _row_weights(self, weights: Any, n: int) -> Array:
        n_groups = len(self.groups)
        if np.shape(weights) == (n_groups,) and n_groups != n:
            per_group = as_vector(weights, n_groups, "weights", non_negative=True)
            rows = self.groups.unsort(np.repeat(per_group, np.diff(self.groups.starts, append=n)))
        else:
            rows = as_vector(weights, n, "weights", non_negative=True)
        if not rows.any():
            raise ValueError("weights are all zero; give at least one row a positive weight")
        return rows

    # ---- the unknown ------------------------------------------------------------------------------------------

    @property
    def shape(self) -> tuple[int, ...]:
        """Natural shape of the unknown, (d,)."""
        return (self.n_unknowns,)

    @property
    def n_unknowns(self) -> int:
        """Number d of unknowns."""
        return int(self.design.shape[1])

    @property
    def n_rows(self) -> int:
        """Number n of rows."""
        return int(self.design.shape[0])

    @cached_property
    def rows_per_short_group(self) -> float:
        """Mean size of the groups that fit into a chunk."""
        sizes = np.delete(np.diff(self.groups.starts, append=self.n_rows), self.long_groups)
        return float(sizes.mean())

    @property
    def n_passes(self) -> float:
        """Reads of the data since the problem was made; sampled rows count as fractions."""
        return float(self.design.rows_read / self.n_rows)

    def initial_point(self, random_state: Any = None) -> Array:
        """Return a point to start from, shape (d,): zero, or logits of size 0.1 where zero is stationary by symmetry."""
        if not self.zero_is_stationary:
            return np.zeros(self.n_unknowns)
        rows = self.design.block(np.arange(0, self.n_rows, max(1, self.n_rows // 1000)))
        squares = np.asarray((rows * rows).mean(axis=0)).reshape(-1)
        rng = np.random.default_rng(random_state)
        direction = rng.standard_normal(self.n_unknowns)
        return np.asarray(0.1 * direction / np.sqrt(np.where(squares > 0, squares, 1.0) * self.n_unknowns))

    @property
    def zero_is_stationary(self) -> bool:
        """Whether the gradient at zero vanishes for every data set."""
        return False

    @property
    def zero_is_trivial(self) -> bool:
        """Whether zero is a minimum that says nothing about the data."""
        return False

    # ---- public values ----------------------------------------------------------------------------------------

    def value(self, x: Any) -> float:
        """Return L(x).

        Raises
        ------
        OverflowError
            If the loss itself, or its gradient, exceeds the range of float64.
        """
        return self._evaluate_checked(x).value

    def gradient(self, x: Any) -> Array:
        """Return the gradient of L at x, shape (d,). Raises like `value`."""
        return self._evaluate_checked(x).gradient

    def value_and_gradient(self, x: Any) -> tuple[float, Array]:
        """Return L(x) and its gradient from one read of the data, two where a group is longer than a block."""
        at = self._evaluate_checked(x)
        return at.value, at.gradient

    def hessian(self, x: Any) -> Array:
        """Return the Hessian of L at x, shape (d, d), by the centred-Gram rule. Raises like `value`."""
        at = self._evaluate_checked(x)
        with np.errstate(over="ignore", invalid="ignore"):
            return self._finite(self.hessian_at(at), at)

    def hvp(self, x: Any, v: Any) -> Array:
        """Return the product of the Hessian at x with v, shape (d,). Raises like `value`."""
        at = self._evaluate_checked(x)
        with np.errstate(over="ignore", invalid="ignore"):
            return self._finite(self.hvp_at(at, as_point(v, self.shape, "v")), at)

    def predict(self, x: Any) -> Array:
        """Return the model's output on every row, shape (n,): ``f`` (softmax), ``u / alpha`` (rescaled) or ``u``.

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

    def _evaluate_checked(self, x: Any) -> Evaluation:
        at = self.evaluate(as_point(x, self.shape))
        self._finite(at.value, at)
        return at

    def _finite(self, result: Any, at: Evaluation) -> Any:
        if not np.isfinite(result).all():
            top = max(float(np.abs(block @ at.x).max()) for _, block in self.design.blocks())
            raise OverflowError(
                f"the loss or a derivative overflows float64 at this x: the largest |Ax| is {top:.4g}, while squares "
                "of exp, cosh and sinh overflow beyond 354; scale the columns of A or move x towards zero"
            )
        return result

    # ---- what one chunk knows ---------------------------------------------------------------------------------

    def fetch(self, chunk: Chunk) -> Any:
        """Return a chunk's rows, shape (n_rows, d), and count them as read."""
        if chunk.matrix is None:
            return self.design.block(chunk.index)
        self.design.rows_read += chunk.matrix.shape[0]
        return chunk.matrix

    def logits(self, chunk: Chunk, x: Array) -> tuple[Any, Array]:
        """Fetch a chunk; return its rows and its logits ``A x + offset``."""
        block = self.fetch(chunk)
        z = block @ x
        if not np.isfinite(z).all():
            require_finite_rows(block, chunk.index, "A")
            raise OverflowError("A x overflows float64; scale the columns of A")
        if self.offset is not None:
            z = z + self.offset[chunk.rows]
        return block, z

    def shift(self, chunk: Chunk) -> Array | float:
        """Return the offset of the chunk's logits."""
        return 0.0 if self.offset is None else self.offset[chunk.rows]

    def targets(self, chunk: Chunk) -> tuple[Array, Any, Array]:
        """Return target and weight of each row, and the constant of each group."""
        w = 1.0 if self.weights is None else self.weights[chunk.rows]
        return self.b[chunk.rows], w, self.constants[chunk.groups]

    def row_penalties(self, chunk: Chunk) -> Array | None:
        """Return the squared row penalties, if any."""
        return None if self.penalty is None else self.penalty[chunk.rows]

    def row_state(self, chunk: Chunk, z: Array, at: Evaluation) -> list[Array]:
        """Return the state of each row's group at the evaluated point."""
        if not self.loss.coupled:
            return []
        if chunk.long >= 0:
            return list(at.state[:, [chunk.long]])
        b, w, constant = self.targets(chunk)
        spread = chunk.segments.spread
        reference = self.loss.reference(z, chunk.segments)
        columns, extras = self.loss.moments(z, b, w, spread(reference), spread(constant))
        total = chunk.segments.sum
        closed = self.loss.close([total(c) for c in columns], [total(e) for e in extras], reference, constant)
        return [spread(s) for s in closed.state]

    def long_states_without_data(self) -> Array:
        """Return the states of the long groups at x = 0, for which A is not needed."""
        states = np.zeros((2 if self.loss.coupled else 0, len(self.long_groups)))
        bounds = np.append(self.groups.starts, self.n_rows)
        for number, g in enumerate(self.long_groups):
            rows = slice(bounds[g], bounds[g + 1])
            segments = Segments(np.zeros(1, dtype=np.intp), bounds[g + 1] - bounds[g])
            group = Chunk(rows, rows, segments, slice(g, g + 1))
            states[:, number] = [s[0] for s in self.row_state(group, self.origin_logits(group), _NOWHERE)]
        return states

    def origin_logits(self, chunk: Chunk) -> Array:
        """Return the logits at x = 0."""
        return np.zeros(chunk.segments.n_rows) + self.shift(chunk)

    def origin_slope(self, chunk: Chunk, b: Array, w: Any, long_states: Array) -> Array:
        """Return the gradient in the logits at x = 0."""
        z = self.origin_logits(chunk)
        if chunk.long >= 0:
            return self.loss.slope(z, b, w, list(long_states[:, [chunk.long]]))
        return self.loss.slope(z, b, w, self.row_state(chunk, z, _NOWHERE))

    # ---- reads ------------------------------------------------------------------------------------------------

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
            An evaluation close by predicts the normalisers of long groups. Without it, or where the prediction turns out to
            be useless, one more read finds them.
        sampler : RowSampler, optional
            Draws rows during the read; they come back as ``sample``.
        origin : bool
            Also return the gradient at zero, from the same read.
        hessian : bool
            Also return the Hessian from the same read, where the states of long groups are predicted well enough.
        """
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
            if not len(self.long_groups):
                return read(self, x, np.zeros(0), None, sampler, origin=origin, hessian=hessian)
            if near is not None:
                reference = near.predict_reference(x)
                at = read(self, x, reference, near, sampler, origin=origin, hessian=hessian)
                if not self.loss.reference_failed(reference, at.state):
                    return at
            near = self._cold(x)
            at = read(self, x, near.state[0], None, None, origin=origin, hessian=False)
            if sampler is None and not hessian:
                return at
            # Only now are the states known that weight the rows of long groups.
            return read(self, x, at.state[0], at, sampler, origin=origin, hessian=hessian)

    def _cold(self, x: Array) -> Evaluation:
        """Find the normalisers of the long groups in a read of their own."""
        reference: dict[int, Array] = {}
        for chunk in self.chunks:
            if chunk.long < 0:
                continue
            _, z = self.logits(chunk, x)
            part = self.loss.reference(z, chunk.segments)
            known = reference.get(chunk.long)
            reference[chunk.long] = part if known is None else self.loss.merge_references(known, part)
        n_long, d = len(self.long_groups), self.n_unknowns
        state = np.zeros((2, n_long))
        state[0] = [float(reference[number][0]) for number in range(n_long)]
        return Evaluation(x, np.nan, np.full(d, np.nan), state, np.zeros((n_long, d)))

    def group_summary(self, g: int, at: Evaluation) -> tuple[Array, Array]:
        """Return state and centre ``A_g^T centre`` of one group at an evaluated point, shapes (n_states,) and (d,)."""
        number = np.flatnonzero(self.long_groups == g)
        if len(number):
            return at.state[:, number[0]], at.centre[number[0]]
        chunk = next(c for c in self.chunks if c.long < 0 and c.groups.start <= g < c.groups.stop)  # type: ignore[union-attr]
        first = int(chunk.segments.starts[g - chunk.groups.start])  # type: ignore[union-attr]
        block, z = self.logits(chunk, at.x)
        row_state = self.row_state(chunk, z, at)
        _, weights = self.gram_rows(chunk, z, row_state)
        assert weights is not None
        state = np.array([s[first] if len(s) > 1 else s[0] for s in row_state])
        mu = group_rows(block, weights, chunk.segments.starts)[[g - chunk.groups.start]]  # type: ignore[union-attr]
        return state, np.asarray(mu.toarray() if sparse.issparse(mu) else mu)[0]

    def by_row(self, at: Evaluation, formula: Callable[[Chunk, Array, list[Array]], Array]) -> Array:
        """Apply a formula to the logits and states of every row; return shape (n,) in the user's order."""
        out = np.empty(self.n_rows)
        for chunk in self.chunks:
            _, z = self.logits(chunk, at.x)
            out[chunk.rows] = formula(chunk, z, self.row_state(chunk, z, at))
        return self.groups.unsort(out)

    def gram_rows(self, chunk: Chunk, z: Array, state: list[Array]) -> tuple[list[GramTerm], Array | None]:
        """Return the Hessian's terms for a chunk, row penalty and sampling weights included, and the centre's weights."""
        b, w, _ = self.targets(chunk)
        terms, weights = self.loss.gram_terms(z, b, w, state)
        penalty = self.row_penalties(chunk)
        if penalty is not None:
            terms = [*terms, GramTerm(penalty, None, None)]
        if chunk.multiplier is not None:
            terms = [GramTerm(t * chunk.multiplier, r, q) for t, r, q in terms]
        return terms, weights

    def add_to_gram(
        self,
        gram: Gram,
        chunk: Chunk,
        block: Any,
        z: Array,
        state: list[Array],
        centres: Array | None,
        *,
        absolute: bool = False,
    ) -> float:
        """Add a chunk's part of the Hessian; return the sum of the absolute row weights."""
        terms, weights = self.gram_rows(chunk, z, state)
        starts = chunk.segments.starts
        mu: Any = None
        mass = 0.0
        for t, r, q in terms:
            size = np.abs(t)
            mass += float(size.sum())
            t = size if absolute else t
            if q is None:
                gram.add(block, t, r)
            elif chunk.long >= 0:
                assert centres is not None
                gram.add_piece(block, t, r, q, centres[chunk.long], chunk.long)
            else:
                mu = group_rows(block, weights, starts) if mu is None else mu
                gram.add_centred(block, t, r, q, mu, starts)
        return mass

    def hessian_at(
        self, at: Evaluation, sample: list[Chunk] | None = None, *, absolute: bool = False
    ) -> Array:
        """Return the Hessian at an evaluated point, shape (d, d).

        Parameters
        ----------
        at : Evaluation
        sample : list of Chunk, optional
            Use these rows (with their inverse probabilities) in place of all rows.
        absolute : bool
            Take the row weights by absolute value: a positive semidefinite majorant, the metric for leverage.
        """
        gram = Gram(self.n_unknowns)
        for chunk in self.chunks if sample is None else sample:
            block, z = self.logits(chunk, at.x)
            state = self.row_state(chunk, z, at)
            self.add_to_gram(gram, chunk, block, z, state, at.centre, absolute=absolute)
        hessian = gram.result()
        hessian[np.diag_indices(self.n_unknowns)] += self.ridge
        return hessian

    def score_gram(self, x: Any) -> Array:
        """Return the sum of outer products of scores at x, shape (d, d): the middle of the sandwich covariance.

        One score a group, ``A_g^T s_g`` (cluster-robust), where there are several groups; else one a row: ``s_i a_i``, for
        softmax losses ``f_i p_i`` times the centred row.
        """
        at = self._evaluate_checked(x)
        gram = Gram(self.n_unknowns)
        long_scores = np.zeros((len(self.long_groups), self.n_unknowns))
        one = np.ones(1)
        for chunk in self.chunks:
            block, z = self.logits(chunk, at.x)
            b, w, _ = self.targets(chunk)
            state = self.row_state(chunk, z, at)
            slope = self.loss.slope(z, b, w, state)
            if not self.loss.coupled:
                gram.add(block, slope * slope)
            elif len(self.groups) == 1:
                f = self.loss.gram_terms(z, b, w, state)[1]
                assert f is not None
                # The slope is f (p - gamma) and gamma multiplies centred rows that sum to zero under f.
                own = slope + f * state[1] if isinstance(self.loss, SoftmaxLoss) else slope
                if chunk.long >= 0:
                    gram.add_piece(block, own * own, None, 1.0, at.centre[chunk.long], chunk.long)
                else:
                    mu = group_rows(block, f, chunk.segments.starts)
                    gram.add_centred(block, own * own, None, 1.0, mu, chunk.segments.starts)
            elif chunk.long >= 0:
                long_scores[chunk.long] += combine_rows(slope, block)
            else:
                scores = group_rows(block, slope, chunk.segments.starts)
                gram.add(scores, np.broadcast_to(one, scores.shape[0]))
        return gram.result() + long_scores.T @ long_scores

    def diagonal_at(self, at: Evaluation) -> Array:
        """Return the diagonal of a positive majorant of the Hessian, shape (d,): the natural scale of each unknown squared.

        Row weights enter by absolute value and rows are centred at their common weighted mean, not group by group.
        """
        first, second, total = np.zeros(self.n_unknowns), np.zeros(self.n_unknowns), 0.0
        uncentred = np.zeros(self.n_unknowns)
        for chunk in self.chunks:
            block, z = self.logits(chunk, at.x)
            for t, r, q in self.gram_rows(chunk, z, self.row_state(chunk, z, at))[0]:
                weight = np.abs(t) if r is None else np.abs(t) * r * r
                squares = combine_rows(weight, block * block)
                if q is None:
                    uncentred += squares
                else:
                    second += squares
                    first += combine_rows(weight, block)
                    total += float(weight.sum())
        if total > 0.0:
            centred = second - first * first / total
            # A constant column has no variance but rounding: its own size keeps it from being scaled up to matter.
            second = np.where(centred > 1e-10 * second, centred, second)
        return second + uncentred + self.ridge

    def hvp_at(self, at: Evaluation, v: Array) -> Array:
        """Return the Hessian at an evaluated point times v, shape (d,), in one read."""
        out = self.ridge * v
        for chunk in self.chunks:
            block, z = self.logits(chunk, at.x)
            out += _product(
                chunk, block, *self.gram_rows(chunk, z, self.row_state(chunk, z, at)), at.centre, v
            )
        return out

    def hessian_operator(self, at: Evaluation, sample: list[Chunk] | None = None) -> Callable[[Array], Array]:
        """Return v -> H v at an evaluated point, over all rows or a sample; it keeps the row weights (a few numbers a row).

        One read prepares it, each product is one read more (of the sample if given).
        """
        prepared = []
        for chunk in self.chunks if sample is None else sample:
            _, z = self.logits(chunk, at.x)
            prepared.append((chunk, *self.gram_rows(chunk, z, self.row_state(chunk, z, at))))

        def product(v: Array) -> Array:
            out = self.ridge * v
            for chunk, terms, weights in prepared:
                out += _product(chunk, self.fetch(chunk), terms, weights, at.centre, v)
            return out

        return product


def _product(
    chunk: Chunk, block: Any, terms: list[GramTerm], weights: Array | None, centres: Array, v: Array
) -> Array:
    """Return a chunk's part of the Hessian times v."""
    along = block @ v
    spread, total = chunk.segments.spread, chunk.segments.sum
    rows = np.zeros_like(along)
    beside: Array | float = 0.0
    for t, r, q in terms:
        y = along if r is None else r * along
        if q is None:
            part = t * y
        elif chunk.long >= 0:
            part = t * (y - q * (centres[chunk.long] @ v))
            beside = beside - centres[chunk.long] * float(np.sum(q * part))
        else:
            part = t * (y - q * spread(total(weights * along)))
            rows -= weights * spread(total(q * part))
        rows += part if r is None else r * part
    return combine_rows(rows, block) + beside


_NOWHERE = Evaluation(np.zeros(0), np.nan, np.zeros(0), np.zeros((2, 0)), np.zeros((0, 0)))

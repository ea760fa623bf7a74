"""Heads of today's models: rotary embeddings, soft caps, sinks, normed queries and keys, shared keys."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import copy
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attnfit.data.gram import majorant
from attnfit.data.inputs import as_point
from attnfit.losses.loss import GramTerm
from attnfit.objectives.budget import keeps_row_weights
from attnfit.objectives.head_bases import followed, slow_columns
from attnfit.objectives.head_metric import Metric, mean_curvature
from attnfit.objectives.head_passes import Curved, HeadPoint, InSingle, Logits, Pull, change_of_matrix, dense
from attnfit.objectives.head_reading import ReadHead
from attnfit.objectives.head_vectors import Inputs, Vectors
from attnfit.objectives.objective import Evaluation, Moved, Offer, Problem, Reduction
from attnfit.objectives.part import group_slopes, group_sums
from attnfit.objectives.whitening import Side
from attnfit.segments import Array, Chunk

# Directions of queries and keys with less than this share of the largest singular value are not identified:
# rounding of the maps (half precision: 5e-4) leaves nothing of them.
UNSEEN = 1e-6


class HeadAttention(Problem):
    """`Attention` over the factors of a head of rank h; made by ``Attention(..., rank=h, rotary=...)``.

    The logits of query t and key s are ``cap tanh(y / cap) + sum_p c_p F_p + offset`` with ``y = q_t . k_s``
    (y itself without a cap), ``q_t = R_t(g_q o n(W_Q' a1_t))`` and ``k_s = R_s(g_k o n(W_K' a2_s))``: R turns
    by the position, n divides by the root mean square, both where asked for. The unknown is W_Q above W_K,
    shape (heads d1 + d2, h); with gains or features the flat vector (W_Q, W_K, g_q, g_k, c). A sink is a
    feature: its coefficient is that of a further key without a vector. With T the gradient in y:
    ``dL/dW_Q = A1' R^-1(T K)``, ``dL/dW_K = A2' R^-1(T' Q)``.

    Parameters
    ----------
    read : ReadHead
    ridge : float or ndarray, shape (n_unknowns,)
    """

    linear = False
    best_hessian = "matrix_free"
    offers = frozenset({Offer.FACTORS})

    def __init__(self, read: ReadHead, ridge: Any = 0.0) -> None:
        self.read, self.rows, self.rank = read, read.rows, read.rank
        self.ridge: float | Array = ridge
        self._set_inputs(read.queries, read.keys)
        self.slow = slow_columns(read)
        self._passes = 0.0
        self._in_better_units = False

    def _set_inputs(self, queries: list[Array], keys: list[Array]) -> None:
        read = self.read
        self.d1, self.d2 = queries[0].shape[1], keys[0].shape[1]
        self.left = [Inputs(A, turn, read.qk_norm) for A, turn in zip(queries, read.query_turns, strict=True)]
        self.right = [Inputs(A, turn, read.qk_norm) for A, turn in zip(keys, read.key_turns, strict=True)]

    # ---- shapes

    @property
    def n_gains(self) -> int:
        """Number of gains on each side."""
        return 0 if self.read.qk_norm is None else self.rank

    @property
    def shape(self) -> tuple[int, ...]:
        """(heads d1 + d2, h), or flat with gains or features."""
        rows = self.read.n_heads * self.d1 + self.d2
        more = 2 * self.n_gains + self.read.n_heads * self.read.n_features
        return (rows * self.rank + more,) if more else (rows, self.rank)

    @property
    def n_passes(self) -> float:
        """Reads of the pairs since the problem was made."""
        return self._passes

    def count_pass(self) -> None:
        """Count a read of pairs that were kept."""
        self._passes += 1.0

    @property
    def first_factor(self) -> NDArray[np.bool_]:
        """Which unknowns are solved for again where the others stand still: W_Q and the coefficients."""
        out = np.ones(self.n_unknowns, dtype=bool)
        first = self.read.n_heads * self.d1 * self.rank
        out[first : first + self.d2 * self.rank + 2 * self.n_gains] = False
        return out

    def parts(self, x: Any) -> HeadPoint:
        """Return the unknowns by name."""
        flat, h, g, n = as_point(x, self.shape), self.rank, self.n_gains, self.read.n_heads
        ends = np.cumsum([n * self.d1 * h, self.d2 * h, g, g])
        W_Q, W_K, gains_q, gains_k, c = np.split(flat, ends)
        return HeadPoint(
            W_Q.reshape(n, self.d1, h), W_K.reshape(self.d2, h), gains_q, gains_k, c.reshape(n, -1)
        )

    def join(self, point: HeadPoint) -> Array:
        """Return the unknown of these parts, flat."""
        return np.concatenate([np.asarray(part).reshape(-1) for part in point])

    # ---- what users call

    def predict(self, x: Any) -> Any:
        """Return the fitted maps, shape (n1, n2), zero where masked; of several heads (heads, n1, n2), of
        several sequences a list. With a sink rows sum to less than one.
        """
        point = self.parts(x)
        maps = [np.zeros((len(inputs.A), n)) for inputs, n in zip(self.left * self.read.n_heads,
                self.read.n_keys * self.read.n_heads, strict=True)]  # fmt: skip
        for at in self.logits(point):
            s, queries = self.place(at.chunk)
            e = np.exp(at.z - at.z.max(axis=1, keepdims=True))
            e /= e.sum(axis=1, keepdims=True)
            maps[s][queries] = e[:, : maps[s].shape[1]]
        n = len(self.left)
        if self.read.n_heads > 1:
            maps = [np.stack(maps[t::n]) for t in range(n)]
        return maps[0] if n == 1 else maps

    def relative_error(self, x: Any) -> float:
        """Return ``||F - B||_F / ||B||_F`` of the fitted maps F over the pairs that are not masked."""
        fitted = self.predict(x)
        fitted = fitted if isinstance(fitted, list) else [fitted]
        squared = total = 0.0
        for s, B in enumerate(self.read.maps):
            head, text = divmod(s, len(self.left))
            F = fitted[text][head] if self.read.n_heads > 1 else fitted[text]
            seen = self.read.seen[s]
            b = np.asarray(B, dtype=np.float64)
            b = b if seen is None else np.where(seen[:, : b.shape[1]], b, 0.0)
            squared += float(np.sum((F - b) ** 2))
            total += float(np.sum(b * b))
        return float(np.sqrt(squared / total)) if total > 0 else float("inf")

    # ---- one pass

    def place(self, chunk: Chunk) -> tuple[int, slice]:
        """Return the map, counted head by head, and the queries of a chunk."""
        assert isinstance(chunk.index, slice)
        s, queries = self.rows.design.find_queries(chunk.index)
        return s, queries

    def vectors(self, point: HeadPoint) -> tuple[list[Vectors], list[Vectors]]:
        """Return the queries of each map and the keys of each text."""
        left = [inputs.at(W, point.gains_q) for W in point.W_Q for inputs in self.left]
        return left, [inputs.at(point.W_K, point.gains_k) for inputs in self.right]

    def logits(
        self, point: HeadPoint, vectors: tuple[list[Vectors], list[Vectors]] | None = None
    ) -> Iterator[Logits]:
        """Yield the logits chunk by chunk: one pass."""
        self.count_pass()
        left, right = self.vectors(point) if vectors is None else vectors
        turned, keys = [v.turned for v in left], [v.turned for v in right]
        cap = self.read.softcap
        for chunk in self.rows.prefetch(self.rows.chunks):
            s, queries = self.place(chunk)
            Q, K, seen = turned[s][queries], keys[s % len(keys)], self.read.seen[s]
            z: Array = Q @ K.T
            passed: Array | float = 1.0
            bend: Array | float = 0.0
            if cap is not None:
                z = cap * np.tanh(z / cap)
                passed = 1.0 - (z / cap) ** 2
                bend = -2.0 * z / cap**2 * passed
            z = self._with_features(z, point.c[s // len(keys)], s, queries)
            mask = None if seen is None else seen[queries]
            if self.rows.offset is not None:
                z = z + dense(mask, z.shape, self.rows.shift(chunk))
            yield Logits(chunk, z if mask is None else np.where(mask, z, -np.inf), passed, bend, Q, K, mask)

    def _with_features(self, z: Array, c: Array, s: int, queries: slice) -> Array:
        for one, F in zip(c, self.read.features[s], strict=True):
            z = z + (one * F[queries]).astype(z.dtype, copy=False)
        return z

    def evaluate(
        self,
        x: Array,
        near: Evaluation | None = None,
        sampler: Any = None,
        *,
        at_zero: bool = False,
        hessian: bool = False,
    ) -> Evaluation:
        """Return value and gradient; zero factors are stationary, so the gradient there is that in the
        coefficients alone.
        """
        point, value = self.parts(x), 0.0
        pull = Pull(self, point)
        for logits in self.logits(point):
            flat, segments = logits.flat, logits.chunk.segments
            loss, targets = self.rows.loss, self.rows.targets(logits.chunk)
            if self.rows.loss.shift_invariant:
                # Squares of residuals lose the digits of what all logits of a row have in common.
                closed, _ = group_sums(loss, loss.normalise(flat, segments), segments, *targets)
                flat = flat - segments.spread(closed.state[0])
            statistics, columns = group_sums(loss, loss.normalise(flat, segments), segments, *targets)
            value += float(np.sum(statistics.value))
            slope = logits.dense(group_slopes(statistics, columns, segments))
            pull.add(logits, slope, slope * logits.passed)
        value += 0.5 * float(np.sum(self.ridge * x * x))
        gradient = self.join(pull.result()) + self.ridge * x
        zero = self.evaluate(np.zeros_like(x)).gradient if at_zero and not self.n_gains else None
        return Evaluation(x, value, gradient, gradient_at_zero=zero)

    def value_at_zero(self) -> float:
        """Return the value where all logits are equal: what the fit explains is measured against it."""
        return self.evaluate(np.zeros(self.n_unknowns)).value

    def curvature(self, point: HeadPoint, *, gauss_newton: bool) -> Iterator[Curved]:
        """Yield the curvature in the logits chunk by chunk: one pass."""
        rows = self.rows
        for at in self.logits(point):
            flat, segments = at.flat, at.chunk.segments
            normalised = rows.loss.normalise(flat, segments)
            closed, _ = group_sums(rows.loss, normalised, segments, *rows.targets(at.chunk))
            state = list(map(segments.spread, closed.state))
            terms, weights = rows.gram_rows(at.chunk, flat, state, gauss_newton=gauss_newton)
            b, w, _ = rows.targets(at.chunk)
            slope = at.dense(rows.loss.slope(flat, b, w, state))
            found = [GramTerm(at.dense(t), at.dense(r), at.dense(q)) for t, r, q in terms]
            yield Curved(at, slope, found, at.dense(weights))

    def hessian_operator(self, at: Evaluation, sample: Any = None) -> Callable[[Array], Array]:
        """Return v -> H v, exactly."""
        return self._operator(at.x, gauss_newton=False)

    def gauss_newton_operator(self, at: Evaluation, *, single: bool = False) -> Callable[[Array], Array]:
        """Return v -> J' L'' J v with L'' the positive semidefinite curvature of the loss in the logits.

        In single precision a product takes a third of the time, and is right to six digits; where the
        curvature is too large to be kept, or beyond that range, precision stays double.
        """
        return self._operator(at.x, gauss_newton=True, single=single)

    def _operator(self, x: Array, *, gauss_newton: bool, single: bool = False) -> Callable[[Array], Array]:
        point = self.parts(x)
        vectors = self.vectors(point)
        found = self.curvature(point, gauss_newton=gauss_newton)
        prepared = list(found) if keeps_row_weights(self.rows) else None
        rounded = InSingle()
        if single and prepared is not None and rounded.holds(prepared):
            point, vectors, prepared = rounded(point), rounded(vectors), rounded(prepared)
        else:
            single = False

        def product(v: Array) -> Array:
            along = self.parts(v)
            if single:
                along = InSingle()(along)
            if prepared is not None:
                self.count_pass()
            pull, moved = Pull(self, point, vectors), self.moved(vectors, along)
            for curved in prepared or self.curvature(point, gauss_newton=gauss_newton):
                at = curved.at
                dq, dk, dy, dz = self.step(at, along, *moved)
                change = change_of_matrix(curved.terms, curved.weights, dz)
                S = change * at.passed
                if not gauss_newton:
                    S = S + curved.slope * at.bend * dy
                    pull.add_moved(at, curved.slope * at.passed, dq, dk)
                pull.add(at, change, S)
            out = pull.result(None if gauss_newton else along)
            return np.asarray(self.join(out) + self.ridge * v)

        return product

    def moved(self, vectors: Any, along: HeadPoint) -> tuple[list[Array], list[Array]]:
        """Return the changes of all vectors along a step."""
        left, right = vectors
        dQ = [one.moved(along.W_Q[s // len(right)], along.gains_q) for s, one in enumerate(left)]
        return dQ, [one.moved(along.W_K, along.gains_k) for one in right]

    def step(
        self, at: Logits, along: HeadPoint, dQ: list[Array], dK: list[Array]
    ) -> tuple[Array, Array, Array, Array]:
        """Return the changes of the queries, the keys, their products and the logits of a chunk."""
        s, queries = self.place(at.chunk)
        dq, dk = dQ[s][queries], dK[s % len(dK)]
        dy = dq @ at.K.T + at.Q @ dk.T
        return dq, dk, dy, self._with_features(at.passed * dy, along.c[s // len(dK)], s, queries)

    def moves(self, at: Evaluation, steps: Array) -> Moved:
        """Return by how much each step changes a fitted logit at most, to first order; a number added to a
        row changes nothing.
        """
        point = self.parts(at.x)
        vectors, largest = self.vectors(point), np.zeros(steps.shape[1])
        along = [self.parts(step) for step in steps.T]
        moved = [self.moved(vectors, one) for one in along]
        for logits in self.logits(point):
            mask = logits.mask
            for k, (one, own) in enumerate(zip(along, moved, strict=True)):
                dz = self.step(logits, one, *own)[3]
                seen = np.ones(dz.shape, dtype=bool) if mask is None else mask
                dz = dz - np.sum(dz * seen, axis=1, keepdims=True) / np.sum(seen, axis=1, keepdims=True)
                largest[k] = max(largest[k], float(np.abs(dz[seen]).max(initial=0.0)))
        return Moved(largest)

    def hessian_at(self, at: Evaluation, sample: Any = None, *, absolute: bool = False) -> Array:
        """Return the Hessian column by column."""
        product = self.hessian_operator(at)
        H = np.column_stack([product(column) for column in np.eye(self.n_unknowns)])
        H = 0.5 * (H + H.T)
        return majorant(H) if absolute else H

    def diagonal_at(self, at: Evaluation) -> Array:
        """Return the mean curvature of the columns of the factors: `metric` without what couples them."""
        return self.metric(at).diagonal()

    def metric(self, at: Evaluation, *, fine: bool = False) -> Metric:
        """Return the mean curvature of each factor while the other stands still: see `mean_curvature`."""
        return mean_curvature(self, at.x, fine=fine)

    def followed(self, x: Array, step: Array) -> Array:
        """Return the point that a step leads to: see `attnfit.objectives.head_bases.followed`."""
        return self.join(followed(self.parts(x), self.parts(step), self.slow))

    # ---- where a fit begins, and in which variables

    def initial_point(self, random_state: Any = None) -> Array:
        """Return random factors with logits of deviation one: zero is stationary."""
        rng = np.random.default_rng(random_state)
        point = self.parts(np.zeros(self.n_unknowns))
        W_Q, W_K = rng.standard_normal(point.W_Q.shape), rng.standard_normal(point.W_K.shape)
        size = self.rank**-0.25
        if self.n_gains:
            ones = np.ones(self.rank) * size
            return self.join(HeadPoint(W_Q, W_K, ones, ones, point.c)).reshape(self.shape)
        for W, inputs in [*((W, self.left) for W in W_Q), (W_K, self.right)]:
            spread = np.sqrt(np.mean(np.concatenate([(one.A @ W) ** 2 for one in inputs])))
            W *= size / (float(spread) or 1.0)
        return self.join(HeadPoint(W_Q, W_K, point.gains_q, point.gains_k, point.c)).reshape(self.shape)

    def starts(self, rng: np.random.Generator) -> dict[str, Array]:
        """Return random factors: the problem is not convex, and back-projected logarithms start it worse."""
        return {f"random {k + 1}": self.initial_point(rng).reshape(-1) for k in range(self.read.n_starts)}

    def sides(self) -> tuple[Side, Side]:
        """Return what the data identify of queries and of keys; keys are not centred, since a constant of a
        row is not free inside a rotation.
        """
        return (Side.of([i.A for i in self.left], UNSEEN), Side.of([i.A for i in self.right], UNSEEN))

    def reduction(self) -> Reduction | None:
        """Return the problem in whitened variables, in which only identified directions are left."""
        if self._in_better_units:
            return None
        left, right = self.sides()
        other = copy(self)
        other._in_better_units = True
        other._set_inputs([i.A @ left.forward for i in self.left], [i.A @ right.forward for i in self.right])

        def between(x: Array, problem: HeadAttention, P: Array, Q: Array) -> Array:
            W_Q, W_K, *rest = problem.parts(x)
            return self.join(HeadPoint(P @ W_Q, Q @ W_K, *rest))

        if np.any(self.ridge):
            h = self.rank
            sizes = [
                np.tile(np.repeat(left.sizes**-2.0, h), self.read.n_heads),
                np.repeat(right.sizes**-2.0, h),
            ]
            more = np.ones(other.n_unknowns - sum(map(len, sizes)))
            other.ridge = self.ridge * np.concatenate([*sizes, more])
        found = (left.rank, right.rank)
        note = "" if found == (self.d1, self.d2) else (
            f"the data identify {found[0]} of {self.d1} directions of the queries and {found[1]} of "
            f"{self.d2} of the keys, and the factors have no part in the others"
        )  # fmt: skip
        return Reduction(
            other,
            lambda y: between(y, other, left.forward, right.forward),
            lambda x: between(x, self, left.backward, right.backward),
            note,
        )

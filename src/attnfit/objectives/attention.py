"""Regression of attention maps on queries and keys."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from attnfit.data.inputs import as_point, as_ridge, choose
from attnfit.data.pairs import KroneckerDesign
from attnfit.data.store import Table
from attnfit.losses.elementwise import FUNCTIONS, FunctionName, SquaredExponential, Total
from attnfit.losses.loss import Loss
from attnfit.losses.rescaled import SquaredRescaled
from attnfit.losses.softmax import LOSSES, LogRatio, LossName, LossTerms, SoftmaxLoss, find_loss
from attnfit.objectives.convexity import convex_from_ridge
from attnfit.objectives.objective import Evaluation, Reduction
from attnfit.objectives.pairs import first_negative, read_pairs, signs, smallest_normal
from attnfit.objectives.part import Part
from attnfit.objectives.rows import RowProblem
from attnfit.objectives.whitening import Whitening
from attnfit.segments import Array, Chunk, Groups, Segments

# Singular values below this share of the largest are rounding.
RANK = 1e-12
AttentionLoss = LossName | Literal["log_ratio", "rescaled", "exponential", "sparse"] | LossTerms
NAMES = (*LOSSES, "log_ratio", "rescaled", "exponential", "sparse")


class Subspace(NamedTuple):
    """What the data identify: X = queries Y keys^T for any Y of shape (r1, r2).

    ``queries`` (d1, r1) and ``keys`` (d2, r2) have orthonormal columns.
    """

    queries: Array
    keys: Array


class PairPart(Part):
    """Pairs of queries and keys as rows: a chunk holds whole queries, targets may be of half precision."""

    design: KroneckerDesign

    def __init__(self, loss: Loss, table: Table) -> None:
        self.smallest_normal = smallest_normal(table.b)
        super().__init__(loss, table)

    def _refuse_negative_targets(self) -> None:
        """Leave it to the problem, which can name query and key."""

    def cut(self, *, grouped: bool, shared: Any = None) -> None:
        """Cut the pairs into chunks of whole queries."""
        starts = self.design.starts
        self.chunks, self.long_groups = [], np.zeros(0, dtype=np.intp)
        for first, last in self.design.query_ranges():
            rows = slice(int(starts[first]), int(starts[last]))
            begins = starts[first:last] - starts[first] if grouped else np.zeros(1, np.intp)
            segments = Segments(begins, rows.stop - rows.start)
            self.chunks.append(Chunk(rows, rows, segments, slice(first, last) if grouped else slice(0, 1)))

    def targets(self, chunk: Chunk) -> tuple[Array, Any, Array]:
        """Return target and weight of each pair, and the constant of each query."""
        b, w, constant = super().targets(chunk)
        b = np.asarray(b, dtype=np.float64)
        if isinstance(self.loss, LogRatio):
            positive = b > 0.0
            w = w * np.where(positive, np.minimum(b / self.smallest_normal, 1.0) ** 2, 0.0)
            b = np.log(np.where(positive, b, 1.0))
        return b, w, constant

    def shift(self, chunk: Chunk) -> Array | float:
        """Return the offset of the chunk's logits."""
        return np.asarray(super().shift(chunk), dtype=np.float64)


class Attention(RowProblem):
    """Attention maps over all X: what `attnfit.problems.Attention` makes where no rank is given, and
    documents.

    The matrix ``A1 (x) A2`` of shape (n1 n2, d1 d2) is never formed: with S the gradient in the logits,
    ``dL/dX = A1^T (S A2)``; the Hessian is a row-wise Khatri-Rao product on either side (see
    `attnfit.data.pairs`). Work arrays hold one block of queries.
    """

    rows_can_be_drawn = False
    best_hessian = "kept"

    def __init__(
        self,
        A1: Any,
        A2: Any,
        B: Any = None,
        loss: AttentionLoss = "squared",
        mask: Any = None,
        *,
        function: FunctionName = "exp",
        weights: Any = None,
        offset: Any = None,
        pair_features: Any = None,
        row_penalty: Any = 0.0,
        ridge: float = 0.0,
    ) -> None:
        choose(function, FUNCTIONS, "function")
        found = _loss(loss, function)
        if B is None and found.has_target:
            raise ValueError(f"B is missing; loss {loss!r} needs the maps, shape (queries, keys)")
        pairs = read_pairs(A1, A2, B, mask, weights, offset, pair_features, row_penalty)
        self.ridge = as_ridge(ridge)
        starts = pairs.design.starts[:-1]
        groups = Groups(starts, None, np.arange(len(starts)))
        n = int(pairs.design.shape[0])
        target = np.broadcast_to(np.zeros(1), n) if pairs.target is None else pairs.target
        if found.nonnegative_target or isinstance(found, LogRatio):
            _require_shares(pairs.design, target, loss)
        table = Table(pairs.design, groups, target, pairs.weights, pairs.offset, pairs.penalty)
        self._hold(PairPart(found, table))

    def _hold(self, rows: Any) -> None:
        super()._hold(rows)
        # With p pair features (d1 d2 + p,).
        if not rows.design.n_features:
            self.shape = (rows.design.d1, rows.design.d2)

    # ---- shapes

    def split(self, x: Any) -> tuple[Array, Array]:
        """Return X, shape (d1, d2), and the coefficients c of the pair features, shape (p,)."""
        flat = as_point(x, self.shape)
        size = self.design.d1 * self.design.d2
        return flat[:size].reshape(self.design.d1, self.design.d2), flat[size:]

    def as_maps(self, values: Array) -> Array | list[Array]:
        """Arrange one value a pair, shape (n_rows,), as a matrix a sequence, zero where masked."""
        out = []
        for s, block in enumerate(self.design.sequences):
            first, last = self.design.starts[self.design.first_query[[s, s + 1]]]
            shape = (len(block.queries), len(block.keys))
            if block.mask is None:
                out.append(values[first:last].reshape(shape))
            else:
                out.append(np.zeros(shape))
                out[-1][block.mask] = values[first:last]
        return out[0] if len(out) == 1 else out

    # ---- what users call

    def predict(self, x: Any) -> Any:
        """Return the fitted maps, shape (n1, n2), zero where masked; a list for several sequences.

        Raises like `value`, and ValueError where a normaliser is zero (sinh).
        """
        return self.as_maps(super().predict(as_point(x, self.shape)))

    def relative_error(self, x: Any) -> float:
        """Return ``||F - B||_F / ||B||_F`` of the fitted maps F over the pairs that are not masked.

        On a problem made from other sequences than those x was fitted to, this is the held-out error.
        """
        squared = total = 0.0

        def add(_: Part, chunk: Chunk, z: Array, state: list[Array]) -> Array:
            nonlocal squared, total
            b = np.asarray(self.b[chunk.rows], dtype=np.float64)
            squared += float(np.sum((self.loss.fitted(z, state) - b) ** 2))
            total += float(np.sum(b * b))
            return z

        self.rows.by_row(self._evaluate_checked(x), add)
        return float(np.sqrt(squared / total)) if total > 0 else float("inf")

    def data_gradient(self, x: Any) -> tuple[Any, Any]:
        """Return dL/dA1, shape (n1, d1), and dL/dA2, shape (n2, d2); lists for several sequences.

        With S the gradient in the logits: ``(S A2) X^T`` and ``S^T (A1 X)``. Where A1 and A2 are one matrix
        A, dL/dA is the sum of both. Raises like `value`.
        """
        at = self._evaluate_checked(x)
        X, _ = self.split(x)
        by_query = [np.empty_like(block.queries) for block in self.design.sequences]
        by_key = [np.zeros_like(block.keys) for block in self.design.sequences]
        for chunk in self.rows.prefetch(self.rows.chunks):
            block, z = self.rows.logits(chunk, at.x)
            b, w, _ = self.rows.targets(chunk)
            slope = self.loss.slope(z, b, w, self.rows.row_state(chunk, z, at))
            penalty = self.rows.row_penalties(chunk)
            if penalty is not None:
                slope = slope + penalty * (z - self.rows.shift(chunk))
            assert isinstance(chunk.index, slice)
            s, queries = self.design.find_queries(chunk.index)
            S = block.matrix(slope)
            by_query[s][queries] = (S @ block.keys) @ X.T
            by_key[s] += S.T @ (block.queries @ X)
        return (by_query[0], by_key[0]) if len(by_key) == 1 else (by_query, by_key)

    # ---- where a fit begins and in which variables

    @property
    def zero_is_stationary(self) -> bool:  # type: ignore[override]
        """Whether the gradient at zero vanishes for every data set."""
        if self.offset is not None:
            return False
        if isinstance(self.loss, SquaredExponential | SquaredRescaled):
            return self.loss.function == "cosh" or (
                self.loss.function == "sinh" and isinstance(self.loss, SquaredRescaled)
            )
        return isinstance(self.loss, SoftmaxLoss) and not self.loss.has_target and self.weights is None

    def convex_from_ridge(self) -> float:
        """Return a ridge from which on the objective is convex: see `attnfit.problems.Softmax`."""
        return convex_from_ridge(self)

    def initial_point(self, random_state: Any = None) -> Array:
        """Return zero, or logits of size 0.1 where zero is stationary by symmetry."""
        if not self.zero_is_stationary:
            return np.zeros(self.shape)
        rng = np.random.default_rng(random_state)
        x = rng.standard_normal(self.n_unknowns)
        block = self.design.block(self.rows.chunks[0].index)
        # Where all logits are alike whatever x, any size will do.
        return np.asarray(x * (0.1 / (float(np.std(block @ x)) or 1.0))).reshape(self.shape)

    def starts(self, rng: np.random.Generator) -> dict[str, Array]:
        """Return the closed form where there is one, else the initial point."""
        if not self._has_closed_form():
            return super().starts(rng)
        return {"closed form": self._closed_form().reshape(-1)}

    def convex_surrogate(self) -> RowProblem | None:
        """Return least squares on logarithms where zeros are rounded numbers, cross entropy where they are
        data;
        its like for other outputs. None where there is a closed form.
        """
        if self._has_closed_form():
            return None
        if self._takes_logarithms() and self.zeros_are_rounded():
            return self.with_rows(self.rows.with_loss(LogRatio(), self.b, self.weights))
        return super().convex_surrogate()

    def _takes_logarithms(self) -> bool:
        """Whether the maps are shares whose logarithm the logits explain, up to a constant a row."""
        if isinstance(self.loss, SquaredRescaled):
            return self.loss.function == "exp"
        return isinstance(self.loss, SoftmaxLoss | LogRatio) and self.loss.has_target

    def zeros_are_rounded(self) -> bool:
        """Whether entries below the format's normal numbers show that zeros, if any, are smaller ones yet;
        entries of both signs are no rounded shares.
        """
        found = signs(self.b)
        return not found.negative and (not found.zeros or found.smallest < self.rows.smallest_normal)

    def _has_closed_form(self) -> bool:
        """Whether log B is known for every pair, up to a constant a row where outputs are normalised."""
        loss, design = self.loss, self.design
        exponential = isinstance(loss, SquaredExponential) and loss.function == "exp"
        if not exponential and not self._takes_logarithms():
            return False
        if len(design.sequences) > 1 or design.n_features or design.sequences[0].mask is not None:
            return False
        found = signs(self.b)
        return not (found.zeros or found.negative)

    def _closed_form(self) -> Array:
        """Return ``A1^+ (log B - offset) A2^+^T``, shape (d1, d2), which reproduces an exact map."""
        design, normalised = self.design, self.loss.coupled
        queries, keys = design.sequences[0].queries, design.sequences[0].keys
        if normalised:
            keys = keys - keys.mean(axis=0)
        inverse = np.linalg.pinv(keys, rcond=RANK)
        half = np.empty((len(queries), design.d2))
        for chunk in self.rows.prefetch(self.rows.chunks):
            assert isinstance(chunk.index, slice)
            logs = np.log(np.asarray(self.b[chunk.rows], dtype=np.float64)) - self.rows.shift(chunk)
            half[design.find_queries(chunk.index)[1]] = logs.reshape(-1, len(keys)) @ inverse.T
        return np.asarray(np.linalg.pinv(queries, rcond=RANK) @ half)

    def unseen_columns(self, at: Evaluation) -> NDArray[np.bool_]:
        """Return which unknowns no pair sees: none is left in the variables of `reduction`."""
        return np.zeros(self.n_unknowns, dtype=bool)

    @property
    def _centred(self) -> bool:
        """Whether a constant added to a row of logits changes nothing."""
        return isinstance(self.loss, SoftmaxLoss | LogRatio) and self.penalty is None

    def identified(self) -> Subspace:
        """Return what the data identify of X; `minimize` returns an X within it."""
        whitening = Whitening.of(self.design, centred=self._centred)
        queries, keys = whitening.queries, whitening.keys
        return Subspace(queries.directions[:, : queries.rank], keys.directions[:, : keys.rank])

    def dense(self) -> RowProblem:
        """Return the same problem with its matrix of pairs formed, shape (n_pairs, n_unknowns)."""
        rows, b, w = [], np.empty(self.n_rows), np.empty(self.n_rows)
        for chunk in self.rows.chunks:
            block = self.rows.fetch(chunk)
            rows.append(block @ np.eye(self.n_unknowns))
            b[chunk.rows], w[chunk.rows], _ = self.rows.targets(chunk)
        formed: RowProblem = RowProblem(
            np.concatenate(rows), b, loss=self.loss, groups=self.design.starts, weights=w,
            offset=self.offset, row_penalty=0.0 if self.penalty is None else np.sqrt(self.penalty),
            ridge=self.ridge,
        )  # fmt: skip
        return formed

    def reduction(self) -> Reduction | None:
        """Return the problem in whitened variables, in which only identified directions are left."""
        if self.in_better_units:
            return None
        whitening = Whitening.of(self.design, centred=self._centred)
        other = self.with_rows(self.rows.on(whitening.design))
        other.in_better_units = True
        other.ridge = self.ridge * np.concatenate([whitening.ridge, np.ones(self.design.n_features)])
        return Reduction(other, whitening.lift, whitening.restrict, whitening.note)


def _loss(name: AttentionLoss, function: FunctionName) -> Loss:
    if isinstance(name, list | tuple):
        if function != "exp":
            raise ValueError(f"function={function!r} has no part in a sum of losses, which share exp(z)")
        return find_loss(name)
    choose(name, dict.fromkeys(NAMES), "loss")
    if name == "rescaled":
        return SquaredRescaled(function)
    if name == "exponential":
        return SquaredExponential(function)
    if name == "log_ratio":
        return LogRatio()
    return Total() if name == "sparse" else find_loss(name)


def _require_shares(design: KroneckerDesign, target: Any, loss: AttentionLoss) -> None:
    """Refuse negative targets where the loss takes their logarithms."""
    pair, value = first_negative(target)
    if pair >= 0:
        s, i, k = _where(design, pair)
        name = "B" if len(design.sequences) == 1 else f"B[{s}]"
        raise ValueError(
            f"{name} is negative at row {i}, column {k} ({value:g}); loss {loss!r} takes shares >= 0 "
            "(the squared, rescaled and linear cross entropy losses take any maps)"
        )


def _where(design: KroneckerDesign, pair: int) -> tuple[int, int, int]:
    """Return sequence, query and key of a pair."""
    query = int(np.searchsorted(design.starts, pair, side="right")) - 1
    s = int(np.searchsorted(design.first_query, query, side="right")) - 1
    i = query - int(design.first_query[s])
    k = pair - int(design.starts[query])
    mask = design.sequences[s].mask
    return s, i, k if mask is None else int(np.flatnonzero(mask[i])[k])

"""Variable projection: attention outputs as a function of the bilinear form alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from scipy import linalg

from attnfit.data.gram import majorant
from attnfit.data.inputs import as_point, as_vector
from attnfit.data.pairs import BLOCK_PAIRS, KroneckerDesign
from attnfit.objectives.objective import Evaluation, Offer, Problem
from attnfit.objectives.pairs import per_sequence, read_factor, read_pairs

if TYPE_CHECKING:
    from attnfit.objectives.full_attention import FullAttention

Array = NDArray[np.float64]
# Where all queries attend alike, Z has rank one: this share of its size keeps the equations for Y regular.
# Two steps of refinement take off what it adds in directions that Z has.
FLOOR = 1e-13
REFINEMENTS = 2
# Starts of `minimize`: logits of this size, drawn anew each.
START_SIZE, N_STARTS = 0.5, 5


@dataclass(frozen=True)
class Text:
    """One text: every query attends to its keys only.

    Attributes
    ----------
    A1, A2, A3, B : ndarray, shapes (n, d1), (k, d2), (k, v) and (n, m)
    mask : ndarray of bool, shape (n, k), or None
    offset : ndarray, shape (n, k), or None
    first : int
        The number of its first query among those of all texts.
    """

    A1: Array
    A2: Array
    A3: Array
    B: Array
    mask: NDArray[np.bool_] | None
    offset: Array | None
    first: int

    def logits(self, X: Array, rows: slice) -> Array:
        """Return the logits of some queries, shape (..., rows, k), for X of shape (..., d1, d2): minus
        infinity behind the mask.
        """
        z = (self.A1[rows] @ X) @ self.A2.T
        if self.offset is not None:
            z += self.offset[rows]
        if self.mask is not None:
            z[..., ~self.mask[rows]] = -np.inf
        return np.asarray(z)


@dataclass(frozen=True)
class Maps:
    """The maps of all heads for a block of queries of a text.

    Attributes
    ----------
    text : Text
    own, rows : slice
        The queries, numbered within the text and among all.
    P : ndarray, shape (heads, rows, k)
    """

    text: Text
    own: slice
    rows: slice
    P: Array

    @property
    def A1(self) -> Array:
        """Its queries."""
        return self.text.A1[self.own]

    def values(self, P: Array) -> Array:
        """Return ``[P_1 A3 ... P_H A3]``, shape (rows, heads v), of maps or of changes of them."""
        return np.concatenate(list(P @ self.text.A3), axis=1)


def softmax(z: Array) -> Array:
    """Return the softmax over the last axis of z, which is overwritten."""
    z -= z.max(axis=-1, keepdims=True)
    np.exp(z, out=z)
    z /= z.sum(axis=-1, keepdims=True)
    return z


def read_texts(
    A1: Any, A2: Any, A3: Any, B: Any, mask: Any, weights: Any, offset: Any
) -> tuple[KroneckerDesign, list[Text], Array]:
    """Return queries and keys as a design, the texts, and the weights of all queries.

    Raises
    ------
    ValueError
        If anything is not finite or of the wrong shape; the message names the argument and the text.
    """
    design = read_pairs(A1, A2, None, mask, None, offset, None, 0.0).design
    count = len(design.sequences)
    values = _factors(A3, "A3", [len(block.keys) for block in design.sequences], "A2")
    outputs = _factors(B, "B", [len(block.queries) for block in design.sequences], "A1")
    offsets = [None] * count if offset is None else per_sequence(offset, count, "offset")
    texts, first = [], 0
    for block, own, output, added in zip(design.sequences, values, outputs, offsets, strict=True):
        shift = None if added is None else np.asarray(added, dtype=np.float64)
        texts.append(Text(block.queries, block.keys, own, output, block.mask, shift, first))
        first += len(block.queries)
    return design, texts, _weights(weights, texts, first)


def read_count(n: Any, name: str) -> int:
    """Return a number of heads, checked."""
    if isinstance(n, bool) or not isinstance(n, int | np.integer) or n < 1:
        raise ValueError(f"{name} must be an integer >= 1, not {n!r}")
    return int(n)


def text_maps(texts: list[Text], X: Array) -> Iterator[Maps]:
    """Yield the maps for X, shape (heads, d1, d2), by blocks of queries."""
    for text in texts:
        step = max(8, BLOCK_PAIRS // (len(text.A2) * len(X)))
        for begin in range(0, len(text.A1), step):
            own = slice(begin, min(begin + step, len(text.A1)))
            rows = slice(text.first + own.start, text.first + own.stop)
            yield Maps(text, own, rows, softmax(text.logits(X, own)))


def _factors(matrices: Any, name: str, expected: list[int], other: str) -> list[Array]:
    """Return one matrix a text, with as many rows as expected and one number of columns."""
    several = len(expected) > 1
    entries = per_sequence(matrices, len(expected), name)
    labels = [f"[{s}]" if several else "" for s in range(len(entries))]
    read = [read_factor(entry, name + label) for entry, label in zip(entries, labels, strict=True)]
    for matrix, rows, label in zip(read, expected, labels, strict=True):
        if len(matrix) != rows:
            raise ValueError(
                f"{name}{label} has {len(matrix)} rows but {other}{label} has {rows}; they must agree"
            )
        if matrix.shape[1] != read[0].shape[1]:
            raise ValueError(
                f"{name}{label} has {matrix.shape[1]} columns but {name}[0] has {read[0].shape[1]}; all "
                "texts share one X and one Y"
            )
    return read


def _weights(weights: Any, texts: list[Text], n: int) -> Array:
    """Return one weight a query of all texts."""
    if weights is None:
        return np.ones(n)
    if len(texts) == 1:
        return as_vector(weights, n, "weights", non_negative=True, rows_of="A1")
    if not isinstance(weights, list | tuple) or len(weights) != len(texts):
        raise ValueError(f"weights must be a list of {len(texts)} vectors, one a text")
    pairs = enumerate(zip(weights, texts, strict=True))
    return np.concatenate(
        [
            as_vector(w, len(text.A1), f"weights[{s}]", non_negative=True, rows_of=f"A1[{s}]")
            for s, (w, text) in pairs
        ]
    )


class ProjectedAttention(Problem):
    """``phi(X) = min_Y L(X, Y)`` of a `FullAttention` problem, over X of shape (d1, d2), or (heads, d1, d2).

    ``Y(X) = (Z^T W Z + ridge)^-1 Z^T W B``. The gradient of phi is that of L in X at Y(X); the Hessian is
    ``H_XX - H_XY H_YY^-1 H_YX``.
    """

    offers = frozenset({Offer.PROJECTION})

    linear = False
    best_hessian = "matrix_free"

    def __init__(self, full: FullAttention) -> None:
        self.full = full
        self.ridge: float | Array = full.ridge
        self.value_ridge = floored_ridge(full.A3, full.weights, float(np.max(full.ridge)))

    @property
    def shape(self) -> tuple[int, ...]:
        """(d1, d2), of several heads (heads, d1, d2)."""
        d1, d2, _, _ = self.full.sizes
        return (d1, d2) if self.full.n_heads == 1 else (self.full.n_heads, d1, d2)

    def by_head(self, x: Array) -> Array:
        """Return X of shape (heads, d1, d2)."""
        return x.reshape(self.full.n_heads, *self.shape[-2:])

    @property
    def n_passes(self) -> float:
        """Reads of the maps since the problem was made."""
        return self.full.n_passes

    def initial_point(self, random_state: Any = None) -> Array:
        """Return a small random X: at zero all queries attend alike, which Y cannot tell apart."""
        X = np.random.default_rng(random_state).standard_normal(self.shape)
        text = self.full.texts[0]
        spread = float(np.std((text.A1 @ X) @ text.A2[:1000].T))
        return np.asarray(X * (START_SIZE / (spread or 1.0)))

    def starts(self, rng: np.random.Generator) -> dict[str, Array]:
        """Return a few small random points: the problem is not convex."""
        return {f"small {i + 1}": self.initial_point(rng).reshape(-1) for i in range(N_STARTS)}

    def values(self, x: Any) -> Array:
        """Return Y(X), shape (v, m), of several heads (heads, v, m)."""
        Y = self._project(self.full.maps(self.by_head(as_point(x, self.shape))))[2]
        return Y[0] if self.full.n_heads == 1 else Y

    def _project(self, maps: Iterable[Maps]) -> tuple[Array, Array, Array]:
        """Return Z, shape (n, heads v), L with ``L L^T = Z^T W Z + ridge``, and Y, shape (heads, v, m).

        L comes from Z itself: its square would lose the digits that tell small attention from none.
        """
        full = self.full
        Z = np.concatenate([one.values(one.P) for one in maps])
        factor, Y = best_values(Z, full.weights, full.B, float(np.max(full.ridge)), self.value_ridge)
        return Z, factor, Y.reshape(full.n_heads, -1, full.B.shape[1])

    def evaluate(
        self,
        x: Array,
        near: Evaluation | None = None,
        sampler: Any = None,
        *,
        at_zero: bool = False,
        hessian: bool = False,
    ) -> Evaluation:
        """Return phi and its gradient at x."""
        full = self.full
        X = self.by_head(x)
        again = full.kept_maps(X)
        Z, _, Y = self._project(again())
        C = Z @ _stacked(Y) - full.B
        G = full.weights[:, None] * C
        gradient = np.zeros_like(X)
        for maps in again():
            gradient += full.pulled(maps, full.slope(maps, G[maps.rows], Y))
        ridge = float(np.max(full.ridge))
        value = 0.5 * float(np.sum(G * C) + ridge * np.sum(Y * Y) + np.sum(self.ridge * x * x))
        start = self.evaluate(np.zeros_like(x)).gradient if at_zero else None
        return Evaluation(x, value, gradient.reshape(-1) + self.ridge * x, gradient_at_zero=start)

    def hessian_operator(self, at: Evaluation, sample: Any = None) -> Callable[[Array], Array]:
        """Return dX -> (H_XX - H_XY H_YY^-1 H_YX) dX, exactly."""
        full = self.full
        again = full.kept_maps(self.by_head(at.x))
        Z, factor, Y = self._project(again())
        G = full.weights[:, None] * (Z @ _stacked(Y) - full.B)

        def product(v: Array) -> Array:
            dX = self.by_head(v)
            dZ = np.concatenate([maps.values(full.moved(maps, dX)) for maps in again()])
            dY = -solve_factored(factor, dZ.T @ G + Z.T @ (full.weights[:, None] * (dZ @ _stacked(Y))))
            out = np.zeros_like(dX)
            for maps in again():
                out += full.second(maps, Y, dX, dY.reshape(Y.shape))[0]
            return np.asarray(out.reshape(-1) + self.ridge * v)

        return product

    def gauss_newton_operator(self, at: Evaluation) -> Callable[[Array], Array]:
        """Return dX -> J^T J dX with Kaufman's Jacobian ``(1 - Z (Z^T W Z)^-1 Z^T W) dZ Y`` of the residual.

        Kaufman, "A variable projection method for solving separable nonlinear least squares problems" (1975):
        the gradient is exact, the product positive semidefinite.
        """
        full = self.full
        again = full.kept_maps(self.by_head(at.x))
        Z, factor, Y = self._project(again())
        w = full.weights[:, None]

        def product(v: Array) -> Array:
            dX = self.by_head(v)
            change = np.concatenate([maps.values(full.moved(maps, dX)) for maps in again()]) @ _stacked(Y)
            change -= Z @ solve_factored(factor, Z.T @ (w * change))
            out = np.zeros_like(dX)
            for maps in again():
                out += full.pulled(maps, full.slope(maps, (w * change)[maps.rows], Y))
            return np.asarray(out.reshape(-1) + self.ridge * v)

        return product

    def gauss_newton_product(self, x: Any, v: Any) -> Array:
        """Return the product of Kaufman's Gauss-Newton matrix at x with v, in the shape of X."""
        at = self._evaluate_checked(x)
        return self.gauss_newton_operator(at)(as_point(v, self.shape, "v")).reshape(self.shape)

    def hessian_at(self, at: Evaluation, sample: Any = None, *, absolute: bool = False) -> Array:
        """Return the Schur complement of the joint Hessian; with ``absolute`` by the eigenvalues' absolute
        values.
        """
        product = self.hessian_operator(at)
        H = np.column_stack([product(column) for column in np.eye(self.n_unknowns)])
        H = 0.5 * (H + H.T)
        return majorant(H) if absolute else H

    def diagonal_at(self, at: Evaluation) -> Array:
        """Return the mean curvature of the Gauss-Newton matrix along random directions for every unknown.

        Whitened queries and keys have no preferred directions.
        """
        product = self.gauss_newton_operator(at)
        probes = np.random.default_rng(0).choice([-1.0, 1.0], (4, self.n_unknowns))
        mean = np.mean([float(v @ product(v)) for v in probes]) / self.n_unknowns
        return np.full(self.n_unknowns, max(float(mean), 1e-300))


def require_regular(A3: Array, n: int, n_heads: int, ridge: float) -> None:
    """Raise ValueError where Y is not determined: A3 is of low rank, or n outputs are too few for all heads,
    without a ridge.
    """
    v = A3.shape[1]
    rank = int(np.linalg.matrix_rank(A3))
    if ridge == 0.0 and (rank < v or n < n_heads * v):
        what = f"A3 has rank {rank}" if rank < v else f"there are only {n} outputs"
        heads = f" in {n_heads} heads" if n_heads > 1 else ""
        raise ValueError(
            f"Z = softmax(A1 X A2^T) A3 is singular for every X: {what} but A3 has {v} columns{heads}, "
            "so Y is not determined; pass ridge > 0, or drop columns of A3"
        )


def floored_ridge(A3: Array, weights: Array, ridge: float) -> float:
    """Return the ridge of the equations for Y, which keeps them regular where queries attend alike."""
    size = float(np.mean(np.sum(A3**2, axis=1))) * float(weights.sum()) / A3.shape[1]
    return float(ridge + FLOOR * size)


def best_values(Z: Array, weights: Array, B: Array, ridge: float, floored: float) -> tuple[Array, Array]:
    """Return L with ``L L^T = Z^T W Z + floored`` and Y, shape (heads v, m), that fits ``Z Y`` to B best."""
    w = np.sqrt(weights)[:, None]
    floor = np.sqrt(floored) * np.eye(Z.shape[1])
    factor = np.asarray(np.linalg.qr(np.concatenate([w * Z, floor]), mode="r")).T
    Y = np.zeros((Z.shape[1], B.shape[1]))
    for _ in range(1 + REFINEMENTS):
        Y += solve_factored(factor, Z.T @ (w**2 * (B - Z @ Y)) - ridge * Y)
    return factor, Y


def solve_factored(factor: Array, right: Array) -> Array:
    """Return the solution of ``L L^T y = right``."""
    return np.asarray(linalg.cho_solve((factor, True), right))


def _stacked(Y: Array) -> Array:
    return Y.reshape(-1, Y.shape[2])

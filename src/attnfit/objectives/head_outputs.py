"""Outputs of heads of today's models: factors of queries and keys and the values together."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from attnfit.data.gram import majorant
from attnfit.data.inputs import as_point, as_ridge
from attnfit.objectives.head_maps import MapsAt, moves_of
from attnfit.objectives.head_passes import HeadPoint
from attnfit.objectives.head_reading import read_head
from attnfit.objectives.heads import HeadAttention
from attnfit.objectives.objective import Evaluation, Moved, Problem, Reduction
from attnfit.objectives.projected import Text, read_count, read_texts, require_regular
from attnfit.objectives.rotary import Rotary, placed, rotary_matrices

if TYPE_CHECKING:
    from attnfit.objectives.projected_heads import ProjectedHeads

Array = NDArray[np.float64]


class HeadOutputs(Problem):
    """`FullAttention` over the factors of heads of width h; made by ``FullAttention(..., rank=h)``.

    Outputs are ``sum_h P_h A3 Y_h``, and row t of the map P_h is the softmax of the logits of
    `attnfit.objectives.heads.HeadAttention`: queries ``R_t W_Q' a1_t`` and keys ``R_s W_K' a2_s``, turned by
    their positions, under a cap and with a sink where asked for. Heads of a group share W_K. The unknown is
    the vector of the groups' unknowns, each (W_Q, W_K, gains, coefficients), and of Y, shape (heads, v, m):
    see `split`. W_Q and W_K are determined up to a complex number a frequency: `matrices` is what is.

    Parameters
    ----------
    heads : HeadAttention
        The heads of one group, without maps.
    n_groups : int
    texts : list of Text
        With A3 and B.
    weights : ndarray, shape (n,)
    ridge : float
    rotary : Rotary, optional
    """

    linear = False
    best_hessian = "matrix_free"

    def __init__(
        self,
        heads: HeadAttention,
        n_groups: int,
        texts: list[Text],
        weights: Array,
        ridge: float,
        rotary: Rotary | None = None,
    ) -> None:
        self.heads, self.n_groups, self.texts, self.weights = heads, n_groups, texts, weights
        self.ridge, self.rotary = float(ridge), rotary
        self.per_group = heads.read.n_heads
        self.n_heads = n_groups * self.per_group
        self.A1 = np.concatenate([text.A1 for text in texts])
        self.A3 = np.concatenate([text.A3 for text in texts])
        self.B = np.concatenate([text.B for text in texts])
        # The key of a sink has no value.
        empty = np.zeros((int(heads.read.sink), self.A3.shape[1]))
        self.values = [np.concatenate([text.A3, empty]) for text in texts]

    # ---- shapes

    @property
    def shape(self) -> tuple[int, ...]:
        """(groups' unknowns + heads v m,)."""
        return (self.n_factors + self.n_heads * self.A3.shape[1] * self.B.shape[1],)

    @property
    def n_factors(self) -> int:
        """Unknowns beside Y."""
        return self.n_groups * self.heads.n_unknowns

    @property
    def n_passes(self) -> float:
        """Reads of the maps of all heads since the problem was made."""
        return self.heads.n_passes / self.n_groups

    @property
    def n_identified(self) -> int:
        """Most numbers that outputs can tell: the unknowns less what factors of the same maps differ by."""
        read, h = self.heads.read, self.heads.rank
        F = len(read.frequencies[0]) if read.frequencies else 0
        left, right = self.heads.sides()
        rows, columns = self.per_group * left.rank, right.rank
        if read.qk_norm is None:
            # Matrices of complex rank one, and one of the rank of what is not turned.
            rest = min(h - 2 * F, rows, columns)
            factors = 2 * F * (rows + columns - 1) + rest * (rows + columns - rest)
        else:
            factors = (rows + columns) * h + 2 * self.heads.n_gains
        factors += self.per_group * read.n_features
        return self.n_groups * factors + self.n_unknowns - self.n_factors

    def points(self, factors: Array) -> list[HeadPoint]:
        """Return the unknowns of each group by name."""
        return [self.heads.parts(part) for part in factors.reshape(self.n_groups, -1)]

    def join(self, points: Iterable[HeadPoint], Y: Any) -> Array:
        """Return the unknown made of what groups have and of Y."""
        return np.concatenate([*(self.heads.join(point) for point in points), np.reshape(Y, -1)])

    def split(self, x: Any) -> tuple[Array, Array, Array]:
        """Return W_Q, shape (heads, d1, h), W_K, (groups, d2, h), and Y, (heads, v, m); without the first
        axis where it is one.
        """
        flat = as_point(x, self.shape)
        points = self.points(flat[: self.n_factors])
        W_Q, W_K = np.concatenate([p.W_Q for p in points]), np.stack([p.W_K for p in points])
        found = W_Q, W_K, self._by_head(flat[self.n_factors :])
        return tuple(part[0] if len(part) == 1 else part for part in found)  # type: ignore[return-value]

    def matrices(self, x: Any) -> tuple[NDArray[np.complex128], Array]:
        """Return M, shape (heads, F, d1, d2), and X_0, (heads, d1, d2): the logit of tokens x and y at
        distance D is ``x' X_0 y + Re sum_f exp(i w_f D) x' M_f y`` before a cap.

        Factors are known up to a complex number a frequency; compare two fits by these.

        Raises
        ------
        ValueError
            If queries and keys are normed, and logits not bilinear.
        """
        if self.heads.read.qk_norm is not None:
            raise ValueError("matrices needs logits that are bilinear; leave qk_norm out")
        flat = as_point(x, self.shape)
        points = self.points(flat[: self.n_factors])
        W_Q = np.concatenate([p.W_Q for p in points])
        W_K = np.repeat(np.stack([p.W_K for p in points]), self.per_group, axis=0)
        if self.rotary is None:
            none = np.zeros((self.n_heads, 0, self.heads.d1, self.heads.d2), dtype=np.complex128)
            return none, W_Q @ np.swapaxes(W_K, 1, 2)
        return rotary_matrices(W_Q, W_K, self.rotary)

    def _by_head(self, Y: Array) -> Array:
        return Y.reshape(self.n_heads, -1, self.B.shape[1])

    # ---- what users call

    def predict(self, x: Any) -> Any:
        """Return the fitted outputs, shape (n, m), or a list of them, one a text."""
        flat = as_point(x, self.shape)
        at = MapsAt(self, flat[: self.n_factors])
        stacked = at.outputs(self._by_head(flat[self.n_factors :]))
        if len(self.texts) == 1:
            return stacked
        return np.split(stacked, [text.first for text in self.texts[1:]])

    def relative_error(self, x: Any) -> float:
        """Return ``||F - B||_F / ||B||_F`` of the fitted outputs F.

        On a problem made from other texts than those x was fitted to, this is the held-out error.
        """
        fitted = self.predict(x)
        F = np.concatenate(fitted) if isinstance(fitted, list) else fitted
        return float(np.linalg.norm(F - self.B) / np.linalg.norm(self.B))

    def initial_point(self, random_state: Any = None) -> Array:
        """Return random factors and the best Y for them."""
        projected = self.projected()
        x = projected.initial_point(random_state)
        return np.concatenate([x, projected.best_values(x).reshape(-1)])

    def projected(self) -> ProjectedHeads:
        """Return the problem in the factors alone, Y being the best for them."""
        from attnfit.objectives.projected_heads import ProjectedHeads

        return ProjectedHeads(self, self.heads)

    def reduction(self) -> Reduction:
        """Return the projected problem over whitened queries and keys."""
        from attnfit.objectives.projected_heads import ProjectedHeads

        found = self.heads.reduction()
        assert found is not None and isinstance(found.problem, HeadAttention)
        projected = ProjectedHeads(self, found.problem)

        def each(x: Array, change: Callable[[Array], Array]) -> Array:
            return np.concatenate([change(part) for part in x.reshape(self.n_groups, -1)])

        def lift(y: Array) -> Array:
            return np.concatenate([each(y, found.lift), projected.best_values(y).reshape(-1)])

        note = "Y eliminated" + (f"; {found.note}" if found.note else "")
        return Reduction(projected, lift, lambda x: each(x[: self.n_factors], found.restrict), note)

    # ---- for the solvers

    def evaluate(
        self,
        x: Array,
        near: Evaluation | None = None,
        sampler: Any = None,
        *,
        at_zero: bool = False,
        hessian: bool = False,
    ) -> Evaluation:
        """Return value and gradient at x."""
        at, Y = MapsAt(self, x[: self.n_factors]), self._by_head(x[self.n_factors :])
        Z = at.stacked()
        C = Z @ _flat(Y) - self.B
        G = self.weights[:, None] * C
        gradient = np.concatenate([at.pulled(G, Y), (Z.T @ G).reshape(-1)]) + self.ridge * x
        value = 0.5 * float(np.sum(G * C) + np.sum(self.ridge * x * x))
        start = self.evaluate(np.zeros_like(x)).gradient if at_zero else None
        return Evaluation(x, value, gradient, gradient_at_zero=start)

    def hessian_operator(self, at: Evaluation, sample: Any = None) -> Callable[[Array], Array]:
        """Return v -> H v, exactly."""
        maps, Y = MapsAt(self, at.x[: self.n_factors]), self._by_head(at.x[self.n_factors :])
        Z, w = maps.stacked(), self.weights[:, None]
        G = w * (Z @ _flat(Y) - self.B)

        def product(v: Array) -> Array:
            step, dY = v[: self.n_factors], self._by_head(v[self.n_factors :])
            dZ = maps.moved(step)
            dG = w * (dZ @ _flat(Y) + Z @ _flat(dY))
            by_y = (dZ.T @ G + Z.T @ dG).reshape(-1)
            return np.concatenate([maps.second(step, G, dG, Y, dY), by_y]) + self.ridge * v

        return product

    def hessian_at(self, at: Evaluation, sample: Any = None, *, absolute: bool = False) -> Array:
        """Return the Hessian column by column."""
        product = self.hessian_operator(at)
        H = np.column_stack([product(column) for column in np.eye(self.n_unknowns)])
        H = 0.5 * (H + H.T)
        return majorant(H) if absolute else H

    def diagonal_at(self, at: Evaluation) -> Array:
        """Return the mean curvature of factors, and that of each row of Y."""
        maps = MapsAt(self, at.x[: self.n_factors])
        by_y = self.weights @ maps.stacked() ** 2
        by_x = self.projected().diagonal_at(at)
        return np.concatenate([by_x, np.repeat(by_y, self.B.shape[1]) + self.ridge])

    def moves(self, at: Evaluation, steps: Array) -> Moved:
        """Return by how much each step changes a fitted logit at most, to first order; a number added to a
        row changes nothing.
        """
        return moves_of(self.heads, self.n_groups, at.x[: self.n_factors], steps[: self.n_factors])


def read_outputs(
    A1: Any,
    A2: Any,
    A3: Any,
    B: Any,
    rank: Any,
    *,
    mask: Any = None,
    weights: Any = None,
    offset: Any = None,
    ridge: float = 0.0,
    n_heads: Any = 1,
    n_key_heads: Any = None,
    rotary: Rotary | None = None,
    positions: Any = None,
    softcap: float | None = None,
    sink: bool = False,
    qk_norm: float | None = None,
) -> HeadOutputs:
    """Check every argument and return the problem; `attnfit.problems.FullAttention` documents them.

    Raises
    ------
    ValueError
        If anything is not finite or of the wrong shape, or Y is not determined.
    """
    n_heads = read_count(n_heads, "n_heads")
    n_groups = n_heads if n_key_heads is None else read_count(n_key_heads, "n_key_heads")
    if n_heads % n_groups:
        raise ValueError(
            f"n_key_heads={n_groups} does not divide n_heads={n_heads}; each key head serves as many heads"
        )
    _, texts, read_weights = read_texts(A1, A2, A3, B, mask, weights, offset)
    penalty = float(np.max(as_ridge(ridge)))
    turned = placed(rotary, positions)
    read = read_head(
        A1, A2, None, "squared", mask, rank, rotary=turned, softcap=softcap, sink=sink, qk_norm=qk_norm,
        offset=offset, n_heads=n_heads // n_groups,
    )  # fmt: skip
    A3s = np.concatenate([text.A3 for text in texts])
    require_regular(A3s, len(read_weights), n_heads, penalty)
    return HeadOutputs(HeadAttention(read, penalty), n_groups, texts, read_weights, penalty, turned)


def _flat(Y: Array) -> Array:
    return Y.reshape(-1, Y.shape[2])

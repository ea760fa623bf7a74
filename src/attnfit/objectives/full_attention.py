"""Regression of attention outputs: the bilinear form and the value matrix together."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attnfit.data.gram import majorant
from attnfit.data.inputs import as_point, as_ridge
from attnfit.data.pairs import KroneckerDesign
from attnfit.objectives.objective import Evaluation, Problem, Reduction
from attnfit.objectives.projected import (
    Maps,
    ProjectedAttention,
    read_count,
    read_texts,
    require_regular,
    text_maps,
)
from attnfit.objectives.whitening import Whitening

Array = NDArray[np.float64]

# Maps of this many entries are kept for the products with the Hessian; larger ones are made anew.
KEPT_PAIRS = 1 << 24


class FullAttention(Problem):
    """Attention outputs over all X and Y: what `attnfit.problems.FullAttention` makes where no rank is given,
    and documents.

    Notes
    -----
    The unknown is the vector (X, Y), each in C order, X of shape (d1, d2) and Y of (v, m), with a leading
    axis of heads where there are several: see `split`. With ``C = Z Y - B``, ``G = w C`` and ``S_h = P_h o
    (G Y_h^T A3^T - rowsum)``: ``dL/dX_h = A1^T S_h A2``, ``dL/dY = Z^T G``, summed over texts. Y is linear in
    the model, so `minimize` eliminates it (`projected`).
    """

    linear = False
    best_hessian = "matrix_free"

    def __init__(
        self,
        A1: Any,
        A2: Any,
        A3: Any,
        B: Any,
        *,
        mask: Any = None,
        weights: Any = None,
        offset: Any = None,
        ridge: float = 0.0,
        n_heads: int = 1,
    ) -> None:
        self.n_heads = read_count(n_heads, "n_heads")
        self.design, self.texts, self.weights = read_texts(A1, A2, A3, B, mask, weights, offset)
        self.A1 = np.concatenate([text.A1 for text in self.texts])
        self.A2 = np.concatenate([text.A2 for text in self.texts])
        self.A3 = np.concatenate([text.A3 for text in self.texts])
        self.B = np.concatenate([text.B for text in self.texts])
        self.ridge: float | Array = as_ridge(ridge)
        require_regular(self.A3, len(self.A1), self.n_heads, float(np.max(self.ridge)))
        self._pairs_read = 0

    @property
    def shape(self) -> tuple[int, ...]:
        """(heads (d1 d2 + v m),): X, then Y."""
        d1, d2, v, m = self.sizes
        return (self.n_heads * (d1 * d2 + v * m),)

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """d1, d2, v and m."""
        text = self.texts[0]
        return text.A1.shape[1], text.A2.shape[1], text.A3.shape[1], text.B.shape[1]

    @property
    def n_pairs(self) -> int:
        """Pairs of a query and a key of its text."""
        return sum(len(text.A1) * len(text.A2) for text in self.texts)

    @property
    def n_passes(self) -> float:
        """Reads of the maps of all heads since the problem was made."""
        return self._pairs_read / (self.n_pairs * self.n_heads)

    def count_read(self, n_pairs: int) -> None:
        """Count entries of maps that were formed outside."""
        self._pairs_read += n_pairs

    def split(self, x: Any) -> tuple[Array, Array]:
        """Return X, shape (d1, d2), and Y, shape (v, m); of several heads (heads, d1, d2), (heads, v, m)."""
        X, Y = self._split(as_point(x, self.shape))
        return (X[0], Y[0]) if self.n_heads == 1 else (X, Y)

    def _split(self, flat: Array) -> tuple[Array, Array]:
        """Return X and Y with their axis of heads."""
        d1, d2, v, m = self.sizes
        size = self.n_heads * d1 * d2
        return flat[:size].reshape(-1, d1, d2), flat[size:].reshape(-1, v, m)

    def join(self, X: Array, Y: Array) -> Array:
        """Return the unknown made of X and Y."""
        return np.concatenate([np.reshape(X, -1), np.reshape(Y, -1)])

    def predict(self, x: Any) -> Any:
        """Return the fitted outputs, shape (n, m), or a list of them, one a text."""
        X, Y = self._split(as_point(x, self.shape))
        stacked = np.concatenate([maps.values(maps.P) for maps in self.maps(X)]) @ Y.reshape(-1, Y.shape[2])
        if len(self.texts) == 1:
            return stacked
        return np.split(stacked, [text.first for text in self.texts[1:]])

    def maps(self, X: Array) -> Iterator[Maps]:
        """Yield the maps for X, shape (heads, d1, d2), by blocks of queries."""
        for maps in text_maps(self.texts, X):
            self._pairs_read += maps.P.size
            yield maps

    def kept_maps(self, X: Array) -> Callable[[], Iterable[Maps]]:
        """Return a function that gives the maps again, from memory where they are small."""
        if self.n_pairs * self.n_heads > KEPT_PAIRS:
            return lambda: self.maps(X)
        kept = list(self.maps(X))
        return lambda: kept

    def initial_point(self, random_state: Any = None) -> Array:
        """Return a small random X and the best Y for it."""
        projected = self.projected()
        X = projected.initial_point(random_state)
        return self.join(X, projected.values(X))

    def projected(self) -> ProjectedAttention:
        """Return the problem in X alone, Y being the best for each X."""
        return ProjectedAttention(self)

    def reduction(self) -> Reduction:
        """Return the projected problem over whitened queries and keys."""
        whitening = Whitening.of(self.design, centred=True)
        projected = ProjectedAttention(self.with_design(whitening.design))
        heads = self.n_heads
        projected.ridge = self.ridge * np.tile(whitening.ridge, heads)

        def lift(y: Array) -> Array:
            X = [whitening.lift(part) for part in y.reshape(heads, -1)]
            return np.concatenate([*X, projected.values(y).reshape(-1)])

        def restrict(x: Array) -> Array:
            return np.concatenate([whitening.restrict(X.reshape(-1)) for X in self._split(x)[0]])

        note = "Y eliminated" + (f"; {whitening.note}" if whitening.note else "")
        return Reduction(projected, lift, restrict, note)

    def with_design(self, design: KroneckerDesign) -> FullAttention:
        """Return the problem with other queries and keys of the same pairs."""
        texts, offsets = self.texts, [text.offset for text in self.texts]
        weights = [self.weights[t.first : t.first + len(t.A1)] for t in texts]
        parts: list[list[Any]] = [
            [block.queries for block in design.sequences],
            [block.keys for block in design.sequences],
            [text.A3 for text in texts],
            [text.B for text in texts],
        ]
        one = len(texts) == 1
        A1, A2, A3, B = (part[0] if one else part for part in parts)
        masks = [np.ones((len(t.A1), len(t.A2)), dtype=bool) if t.mask is None else t.mask for t in texts]
        return FullAttention(
            A1, A2, A3, B,
            mask=masks[0] if one else masks,
            weights=weights[0] if one else weights,
            offset=None if offsets[0] is None else offsets[0] if one else offsets,
            ridge=float(np.max(self.ridge)),
            n_heads=self.n_heads,
        )  # fmt: skip

    def definite_ridge(self, x: Any, least: float = 0.0) -> tuple[float, float]:
        """Return ridges of X and of Y with which the Hessian at x has no eigenvalue below ``least``.

        With ``T = G Y^T A3^T`` and t its row means under P, ``a = 0.5 max |T_ij - t_i| |A1|^2 |A2|^2`` and
        ``kappa = |A1| |A2| |A3| |G|_F``, they are ``a + kappa / 2 + least`` and ``kappa / 2 + least``: the
        Hessian without a ridge has no eigenvalue below ``-(a + sqrt(a^2 + kappa^2)) / 2``. A device of
        proofs: kappa grows with the data, and such ridges shrink the answer.

        Parameters
        ----------
        x : array_like, shape (n_unknowns,)
        least : float
            At least 0.

        Raises
        ------
        ValueError
            For several heads, of which the bound says nothing, or a negative ``least``.
        """
        if self.n_heads > 1:
            raise ValueError("definite_ridge knows of one head only; fit the heads one by one")
        if not least >= 0.0:
            raise ValueError(f"least must not be negative, not {least!r}")
        a, kappa = self.negative_curvature_parts(as_point(x, self.shape))
        return a + 0.5 * kappa + least, 0.5 * kappa + least

    def negative_curvature_parts(self, x: Array) -> tuple[float, float]:
        """Return a and kappa of `definite_ridge` at x, for one head."""
        X, Y = self._split(x)
        widest, square = 0.0, 0.0
        for maps in self.maps(X):
            G = self.weights[maps.rows, None] * (maps.values(maps.P) @ Y[0] - self.B[maps.rows])
            T = (G @ Y[0].T) @ maps.text.A3.T
            # Keys that a query does not see have no part.
            apart = np.where(maps.P[0] > 0.0, np.abs(T - np.sum(maps.P[0] * T, axis=1, keepdims=True)), 0.0)
            widest, square = max(widest, float(apart.max())), square + float(np.sum(G * G))
        first = float(np.linalg.norm(self.A1, 2))
        keys, values = (max(float(np.linalg.norm(A, 2)) for A in parts) for parts in zip(
            *((text.A2, text.A3) for text in self.texts), strict=True))  # fmt: skip
        return 0.5 * widest * first**2 * keys**2, first * keys * values * float(np.sqrt(square))

    # ---- for the solvers

    def slope(self, maps: Maps, G: Array, Y: Array) -> Array:
        """Return ``P_h o (G Y_h^T A3^T - rowsum)``, the gradient in the logits, shape (heads, rows, k)."""
        back = (G @ np.swapaxes(Y, 1, 2)) @ maps.text.A3.T
        return np.asarray(maps.P * (back - np.sum(maps.P * back, axis=2, keepdims=True)))

    def pulled(self, maps: Maps, S: Array) -> Array:
        """Return the gradient in X of a gradient in the logits, ``A1^T S_h A2``, shape (heads, d1, d2)."""
        return np.asarray(maps.A1.T @ (S @ maps.text.A2))

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
        X, Y = self._split(x)
        flat = Y.reshape(-1, Y.shape[2])
        value, by_x, by_y = 0.0, np.zeros_like(X), np.zeros_like(flat)
        for maps in self.maps(X):
            Z = maps.values(maps.P)
            C = Z @ flat - self.B[maps.rows]
            G = self.weights[maps.rows, None] * C
            value += 0.5 * float(np.sum(G * C))
            by_y += Z.T @ G
            by_x += self.pulled(maps, self.slope(maps, G, Y))
        value += 0.5 * float(np.sum(self.ridge * x * x))
        gradient = self.join(by_x, by_y) + self.ridge * x
        start = self.evaluate(np.zeros_like(x)).gradient if at_zero else None
        return Evaluation(x, value, gradient, gradient_at_zero=start)

    def hessian_operator(self, at: Evaluation, sample: Any = None) -> Callable[[Array], Array]:
        """Return (dX, dY) -> H (dX, dY)."""
        X, Y = self._split(at.x)
        again = self.kept_maps(X)

        def product(direction: Array) -> Array:
            dX, dY = self._split(direction)
            by_x, by_y = np.zeros_like(X), np.zeros((Y.size // Y.shape[2], Y.shape[2]))
            for maps in again():
                part = self.second(maps, Y, dX, dY)
                by_x += part[0]
                by_y += part[1]
            return np.asarray(self.join(by_x, by_y) + self.ridge * direction)

        return product

    def moved(self, maps: Maps, dX: Array) -> Array:
        """Return the change of the maps, ``J(P_h)(A1 dX_h A2^T)``."""
        u = (maps.A1 @ dX) @ maps.text.A2.T
        return np.asarray(maps.P * (u - np.sum(maps.P * u, axis=2, keepdims=True)))

    def second(self, maps: Maps, Y: Array, dX: Array, dY: Array) -> tuple[Array, Array]:
        """Return the part of a block of queries in the product of the Hessian with (dX, dY)."""
        w, P, A3 = self.weights[maps.rows, None], maps.P, maps.text.A3
        flat, dflat = Y.reshape(-1, Y.shape[2]), dY.reshape(-1, Y.shape[2])
        Z = maps.values(P)
        G = w * (Z @ flat - self.B[maps.rows])
        dP = self.moved(maps, dX)
        dZ = maps.values(dP)
        dG = w * (dZ @ flat + Z @ dflat)
        Yt, dYt = np.swapaxes(Y, 1, 2), np.swapaxes(dY, 1, 2)
        back = (G @ Yt) @ A3.T
        dback = (dG @ Yt + G @ dYt) @ A3.T
        mean = np.sum(P * back, axis=2, keepdims=True)
        dmean = np.sum(dP * back + P * dback, axis=2, keepdims=True)
        dS = dP * (back - mean) + P * (dback - dmean)
        return self.pulled(maps, dS), dZ.T @ G + Z.T @ dG

    def hessian_at(self, at: Evaluation, sample: Any = None, *, absolute: bool = False) -> Array:
        """Return the Hessian from its blocks in X and Y; an array of shape (n, heads d2 (m + v)) is formed by
        blocks.

        With ``absolute`` all eigenvalues are taken by absolute value.
        """
        X, Y = self._split(at.x)
        (heads, d1, d2), (v, m) = X.shape, Y.shape[1:]
        flat = Y.reshape(-1, m)
        xx = np.zeros((heads, d1, d2, heads, d1, d2))
        xy = np.zeros((heads, d1, d2, heads * v, m))
        yy = np.zeros((heads * v, heads * v))
        for maps in self.maps(X):
            text, A1, w, P = maps.text, maps.A1, self.weights[maps.rows], maps.P
            keys = text.A2 - text.A2.mean(axis=0)
            Z = maps.values(P)
            G = w[:, None] * (Z @ flat - self.B[maps.rows])
            S = self.slope(maps, G, Y)
            outputs = []
            for h in range(heads):
                W, mu, g = text.A3 @ Y[h], P[h] @ keys, S[h] @ keys
                outputs.append(_cross(P[h], W, keys) - (P[h] @ W)[:, :, None] * mu[:, None, :])
                values = _cross(P[h], text.A3, keys) - (P[h] @ text.A3)[:, :, None] * mu[:, None, :]
                own = _cross(S[h], keys, keys) - g[:, :, None] * mu[:, None, :] - mu[:, :, None] * g[:, None]
                xx[h, :, :, h] += np.einsum("ip,iq,ilr->plqr", A1, A1, own, optimize=True)
                part = np.einsum("ip,ij,iul->pluj", A1, G, values, optimize=True)
                xy[h, :, :, h * v : (h + 1) * v] += part
            T = np.stack(outputs)
            inner = np.einsum("i,hijl,gijr->hilgr", w, T, T, optimize=True)
            xx += np.einsum("ip,iq,hilgr->hplgqr", A1, A1, inner, optimize=True)
            xy += np.einsum("ip,i,hijl,iu->hpluj", A1, w, T, Z, optimize=True)
            yy += Z.T @ (w[:, None] * Z)
        size = heads * d1 * d2
        H = np.empty((size + heads * v * m,) * 2)
        H[:size, :size] = xx.reshape(size, size)
        H[:size, size:] = xy.reshape(size, -1)
        H[size:, :size] = H[:size, size:].T
        H[size:, size:] = np.kron(yy, np.eye(m))
        H[np.diag_indices(len(H))] += self.ridge
        return majorant(H) if absolute else H

    def diagonal_at(self, at: Evaluation) -> Array:
        """Return one number for X and one for each row of Y: the mean curvature and that of Z."""
        X, Y = self._split(at.x)
        by_y = np.zeros(self.n_heads * Y.shape[1])
        for maps in self.maps(X):
            Z = maps.values(maps.P)
            by_y += self.weights[maps.rows] @ (Z * Z)
        by_x = self.projected().diagonal_at(Evaluation(X.reshape(-1), at.value, at.gradient))
        return np.asarray(np.concatenate([by_x, np.repeat(by_y, Y.shape[2])]) + self.ridge)


def _cross(P: Array, left: Array, right: Array) -> Array:
    """Return ``sum_k P_ik left_kj right_kl``, shape (n, j, l)."""
    rows = left[:, :, None] * right[:, None, :]
    return (P @ rows.reshape(len(left), -1)).reshape(len(P), left.shape[1], right.shape[1])

"""Groups of rows under one vector of unknowns: softmax, rescaled and attention regression."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attnfit.data.inputs import as_point
from attnfit.theory.instances.reading import as_number, as_stack, choose_function
from attnfit.theory.instances.state import Move, State, common_scale

Array = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Regression:
    """Data of a softmax, rescaled or attention regression, and two moves: of x to y, and of A to A'.

    One group is an instance of the vector papers. Their bounds on several groups are evaluated for each
    group by itself and reported for the worst. The tensor-trick paper stacks n groups of n rows, ``A_[j]``;
    its n is taken as the larger of the number of groups and their length, its d as the root of the number of
    columns.

    Parameters
    ----------
    A : array_like, shape (n, d) or (groups, n, d)
    b : array_like, shape (n,) or (groups, n)
    x, y : array_like, shape (d,)
    A_moved : array_like of the shape of A, optional
        A'. By default the move of rank one that acts on the logits like the move of x to y,
        ``A' = A + A (y - x) x^T / |x|^2``; no move where x is zero.
    function : {"exp", "cosh", "sinh"}
        u. The softmax and what is said of it do not depend on it.
    mask : array_like of bool, shape (groups, n), optional
        False at rows that only pad short groups.
    R : float, optional
        The bound in the assumptions; by default the smallest that each bound's assumptions allow.
    beta : float, optional
        The lower bound of the normalisers; by default the smallest normaliser at the points compared.
    l : float
        The convexity that the papers' regularisers aim for.

    Raises
    ------
    ValueError
        On input that is not finite or of the wrong shape; the message names argument and index.
    """

    A: Any
    b: Any
    x: Any
    y: Any
    A_moved: Any = None
    function: str = "exp"
    mask: Any = None
    R: float | None = None
    beta: float | None = None
    l: float = 1.0  # noqa: E741

    def __post_init__(self) -> None:
        A = as_stack(self.A, "A", 3)
        d = A.shape[2]
        put = object.__setattr__
        put(self, "A", A)
        put(self, "b", as_stack(self.b, "b", 2, A.shape[:2]))
        put(self, "x", as_point(self.x, (d,), "x"))
        put(self, "y", as_point(self.y, (d,), "y"))
        if self.A_moved is not None:
            put(self, "A_moved", as_stack(self.A_moved, "A_moved", 3, A.shape))
        choose_function(self.function)
        if self.mask is not None:
            mask = np.asarray(self.mask, dtype=bool)
            if mask.shape != A.shape[:2] or not mask.any(axis=1).all():
                raise ValueError(f"mask must have shape {A.shape[:2]} and a True in every group")
            put(self, "mask", None if mask.all() else mask)
        as_number(self.R, "R")
        as_number(self.beta, "beta")
        as_number(self.l, "l")

    # ---- sizes

    @property
    def n_groups(self) -> int:
        """Number of groups."""
        return int(self.A.shape[0])

    @cached_property
    def lengths(self) -> Array:
        """Rows of each group, shape (groups,): n of the vector papers."""
        n_groups, n = self.A.shape[:2]
        return np.full(n_groups, float(n)) if self.mask is None else self.mask.sum(axis=1).astype(float)

    @property
    def n(self) -> float:
        """The n of the tensor-trick paper: the number of groups or their length, whichever is larger."""
        return float(max(self.n_groups, self.lengths.max()))

    @property
    def d(self) -> float:
        """The d of the tensor-trick paper, which has d^2 unknowns."""
        return float(np.sqrt(self.A.shape[2]))

    @cached_property
    def block_norms(self) -> Array:
        """``|A_[j]|``, shape (groups,)."""
        return _spectral_norms(self.A)

    @cached_property
    def smallest_singular_values(self) -> Array:
        """The smallest singular value of each group's rows, shape (groups,); zero where columns outnumber
        rows.
        """
        if self.A.shape[1] < self.A.shape[2]:
            return np.zeros(self.n_groups)
        return np.asarray(np.linalg.svd(self.A, compute_uv=False)[:, -1])

    @cached_property
    def moved_norms(self) -> Array:
        """``|A'_[j]|``, shape (groups,)."""
        return self.block_norms if self._rank_one is None and self.A_moved is None else _spectral_norms(
            self.moved_rows
        )  # fmt: skip

    @cached_property
    def x_norm(self) -> float:
        """``|x|``."""
        return float(np.linalg.norm(self.x))

    @cached_property
    def y_norm(self) -> float:
        """``|y|``."""
        return float(np.linalg.norm(self.y))

    @cached_property
    def b_norms(self) -> Array:
        """``|b|`` of each group, shape (groups,)."""
        return np.asarray(np.linalg.norm(self.b, axis=1))

    # ---- the moves

    @cached_property
    def _rank_one(self) -> Array | None:
        """The logits' move of the default A', None where A' is given or x is zero."""
        if self.A_moved is not None or self.x_norm == 0.0:
            return None
        return np.asarray(self.A @ (self.y - self.x))

    @cached_property
    def moved_rows(self) -> Array:
        """A', shape (groups, n, d)."""
        if self.A_moved is not None:
            return np.asarray(self.A_moved)
        if self._rank_one is None:
            return np.asarray(self.A)
        return np.asarray(self.A + self._rank_one[..., None] * (self.x / self.x_norm**2))

    @cached_property
    def weights(self) -> Move:
        """The move of x to y on the same data."""
        size = np.full(self.n_groups, float(np.linalg.norm(self.y - self.x)))
        return self._move(self.A @ self.x, self.A @ (self.y - self.x), size)

    @cached_property
    def data(self) -> Move:
        """The move of A to A' at the same x."""
        if self._rank_one is not None:
            size = np.linalg.norm(self._rank_one, axis=1) / self.x_norm
            return self._move(self.A @ self.x, self._rank_one, size)
        change = self.moved_rows - self.A
        return self._move(self.A @ self.x, change @ self.x, _spectral_norms(change))

    def _move(self, z: Array, dz: Array, size: Array) -> Move:
        scale = common_scale(self.function, self.mask, z, z + dz)
        start, end = (State(logits, self.b, self.function, self.mask, scale) for logits in (z, z + dz))
        return Move(start, end, dz, size)

    def move(self, which: str) -> Move:
        """Return the move of the weights, "x", or of the data, "A"."""
        return self.weights if which == "x" else self.data

    def rows_at_end(self, which: str) -> Array:
        """Return the data at the end of a move."""
        return np.asarray(self.A) if which == "x" else self.moved_rows

    def log_beta(self, which: str) -> Array:
        """Return ``log beta``, shape (groups,): given, or that of each group's smallest normaliser on a
        move.
        """
        if self.beta is not None:
            return np.full(self.n_groups, np.log(self.beta))
        move = self.move(which)
        return np.minimum(move.start.log_alpha, move.end.log_alpha)


def _spectral_norms(stack: Array) -> Array:
    if stack.shape[1] <= 4 * stack.shape[2]:
        return np.asarray(np.linalg.norm(stack, 2, axis=(1, 2)))
    gram = np.swapaxes(stack, 1, 2) @ stack
    return np.asarray(np.sqrt(np.linalg.eigvalsh(gram)[:, -1].clip(0.0)))

"""Transformer blocks, one after the other, as one function of their tokens, with first and second derivatives
and as a function of one token after others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attnfit.objectives.block_heads import Cache
from attnfit.objectives.block_parts import Norm
from attnfit.objectives.blocks import Block, Kept
from attnfit.objectives.inverse_layer import Mask
from attnfit.objectives.rotary import Turn

Array = NDArray[Any]

# An imaginary step: its square is nothing beside one.
STEP = 1e-30
# Numbers of a batch of directions held at once.
ENTRIES = 1 << 21


@dataclass(frozen=True)
class StackPass:
    """A pass of blocks, one after the other.

    Attributes
    ----------
    stack : Stack
    T : ndarray, shape (..., n, d)
    kept : list of Kept
    output : ndarray, shape (..., n, m)
    """

    stack: Stack
    T: Array
    kept: list[Kept]
    output: Array

    def take(self, inputs: Any) -> StackPass:
        """Return the pass of some of several independent inputs, numbered along the first axis."""
        return self.stack.forward(self.T[inputs])


class Stack:
    """Blocks, one after the other, of n tokens: what an inversion works on.

    With `input_norm` the output has further columns, the means of v and of its squares, ``v = (x - b) / g``:
    tokens that come out of a LayerNorm have 0 and 1 there, those of an RMSNorm 1.

    Parameters
    ----------
    blocks : sequence of Block
    n : int
    keys : array_like, shape (k, e), optional
        The states that cross attention reads; the tokens are no keys then.
    input_norm : Norm, optional
    """

    def __init__(
        self, blocks: Sequence[Block], n: int, keys: Any = None, input_norm: Norm | None = None
    ) -> None:
        self.blocks, self.n, self.d, self.input_norm = list(blocks), n, blocks[0].d, input_norm
        self.own = keys is None
        self.m = self.d + (0 if input_norm is None else input_norm.lost)
        reach = [block.reach(n) if self.own else np.eye(n, dtype=bool) for block in blocks]
        self.seen = [None if seen.all() or not self.own else seen for seen in reach]
        self.turns = [block.turn(n) if self.own else None for block in blocks]
        self.past = [None if self.own else block.heads.keys(np.asarray(keys, float)) for block in blocks]
        total = reach[0] | np.eye(n, dtype=bool)
        for seen in reach[1:]:
            total = (seen | np.eye(n, dtype=bool)) @ total
        self.mask: Mask | None = None if total.all() else total

    @property
    def sequential(self) -> bool:
        """Whether no token sees a later one."""
        return self.n == 1 or (self.mask is not None and not np.triu(self.mask, 1).any())

    def forward(self, T: Array) -> StackPass:
        """Return the output of tokens, shape (..., n, d), and what its derivatives need."""
        x, kept = T, []
        for block, seen, turn, past in zip(self.blocks, self.seen, self.turns, self.past, strict=True):
            x, state = block.forward(x, seen, turn, past, own=self.own)
            kept.append(state)
        return StackPass(self, T, kept, self._with_moments(x, T))

    def push_forward(self, at: StackPass, D: Array) -> Array:
        """Return ``J D``, shape (..., n, m)."""
        d = D
        for block, kept in zip(self.blocks, at.kept, strict=True):
            d = block.push(kept, d)
        if self.input_norm is None:
            return d
        v = (at.T - self.input_norm.bias) / self.input_norm.gains
        dv = D / self.input_norm.gains
        moved = [dv.mean(axis=-1), 2.0 * (v * dv).mean(axis=-1)]
        return np.concatenate([d, np.stack(moved[-self.input_norm.lost :], axis=-1)], axis=-1)

    def pull_back(self, at: StackPass, G: Array) -> Array:
        """Return ``J^T G``, shape (..., n, d)."""
        g = G[..., : self.d]
        for block, kept in zip(self.blocks[::-1], at.kept[::-1], strict=True):
            g = block.pull(kept, g)
        if self.input_norm is None:
            return g
        v = (at.T - self.input_norm.bias) / self.input_norm.gains
        weight = np.ones_like(v) / (self.d * self.input_norm.gains)
        slopes = [weight, 2.0 * v * weight][-self.input_norm.lost :]
        parts = [G[..., self.d + k, None] * slope for k, slope in enumerate(slopes)]
        return np.asarray(g + np.sum(parts, axis=0))

    def jacobian(self, at: StackPass, unknown: NDArray[np.intp]) -> Array:
        """Return the Jacobian with respect to some tokens, shape (..., n m, d u), in C order of (i, j) and of
        (coordinate l, token a).
        """
        if at.T.ndim > 2:
            return np.stack([self.jacobian(at.take(k), unknown) for k in range(len(at.T))])
        J = np.empty((self.n, self.m, self.d * len(unknown)))
        for part, D in self._directions(unknown):
            J[..., part] = np.moveaxis(self.push_forward(at, D), 0, -1)
        return J.reshape(self.n * self.m, -1)

    def second_push(self, at: StackPass, D: Array) -> Array:
        """Return the second derivative of the output along D, shape (..., n, m)."""
        step = STEP / max(float(np.abs(D).max()), STEP)
        return np.asarray(self.push_forward(self.forward(at.T + 1j * step * D), D).imag / step)

    def second_product(self, at: StackPass, G: Array) -> Callable[[Array], Array]:
        """Return ``D -> (J^T J + sum_ij G_ij Hessian of output_ij) D``."""
        return lambda D: self.pull_back(at, self.push_forward(at, D)) + self.bent(at, G, D)

    def bent(self, at: StackPass, G: Array, D: Array) -> Array:
        """Return ``sum_ij G_ij (Hessian of output_ij) D``; D may have a leading axis."""
        step = STEP / max(float(np.abs(D).max()), STEP)
        return np.asarray(self.pull_back(self.forward(at.T + 1j * step * D), G).imag / step)

    def curvature(self, at: StackPass, G: Array, unknown: NDArray[np.intp]) -> Array:
        """Return ``sum_ij G_ij Hessian of output_ij`` in some tokens, as `jacobian` orders them."""
        size = self.d * len(unknown)
        H = np.empty((size, size))
        for part, D in self._directions(unknown):
            H[part] = np.swapaxes(self.bent(at, G, D)[:, unknown], -1, -2).reshape(len(D), size)
        return 0.5 * (H + H.T)

    def row_outputs(self, T: Array, rows: Array, i: int) -> Array:
        """Return row i of the output, shape (k, m), with each of some rows as token i after the tokens T,
        shape (i, d); no token sees a later one.
        """
        token = TokenMap(self, i, self.caches(T))
        size = max(1, ENTRIES // (8 * self.d * max(len(b.heads.W_Q) for b in self.blocks)))
        found = [token.output(rows[k : k + size]) for k in range(0, len(rows), size)]
        return np.concatenate(found)

    def caches(self, T: Array) -> list[Cache | None]:
        """Return what each block keeps of the first tokens, shape (i, d)."""
        if not self.own:
            return list(self.past)
        i, x = len(T), T
        caches: list[Cache | None] = []
        for block, seen, turn in zip(self.blocks, self.seen, self.turns, strict=True):
            if not i:
                caches.append(None)
                continue
            mask = None if seen is None else seen[:i, :i]
            x, kept = block.forward(x, mask, _rows(turn, slice(0, i)), None, own=True)
            caches.append(Cache(kept.heads.K, kept.heads.V))
        return caches

    def _with_moments(self, x: Array, T: Array) -> Array:
        norm = self.input_norm
        if norm is None:
            return x
        v = (T - norm.bias) / norm.gains
        moments = np.stack([v.mean(axis=-1), (v * v).mean(axis=-1)], axis=-1)
        return np.concatenate([x, moments[..., -norm.lost :]], axis=-1)

    def _directions(self, unknown: NDArray[np.intp]) -> Iterator[tuple[slice, Array]]:
        """Yield unit directions of (coordinate, token), some at a time, and which they are."""
        u = len(unknown)
        widest = max(b.mlp.W_1.shape[1] if b.mlp is not None else self.d for b in self.blocks)
        size = max(1, ENTRIES // (self.n * max(widest, self.n)))
        for first in range(0, self.d * u, size):
            which = np.arange(first, min(first + size, self.d * u))
            D = np.zeros((len(which), self.n, self.d))
            D[np.arange(len(which)), unknown[which % u], which // u] = 1.0
            yield slice(first, first + len(which)), D


@dataclass(frozen=True)
class TokenMap:
    """Row i of the output of a causal stack as a function of token i, those before it given.

    Attributes
    ----------
    stack : Stack
    place : int
        i.
    caches : list
        Of each block, for the tokens before.
    """

    stack: Stack
    place: int
    caches: list[Cache | None]

    def output(self, x: Array) -> Array:
        """Return the outputs, shape (k, m), of tokens x, shape (k, d)."""
        return self.forward(x)[0]

    def jacobian(self, x: Array) -> Array:
        """Return the Jacobian at a token, shape (m, d)."""
        _, kept = self.forward(x[None])
        D = np.eye(self.stack.d)[:, None, :]
        at = StackPass(self.stack, x[None], [_first(k) for k in kept], np.zeros(0))
        return np.ascontiguousarray(self.stack.push_forward(at, D)[:, 0].T)

    def after(self, x: Array) -> TokenMap:
        """Return the map of the next token, with x, shape (d,), as this one."""
        caches = self.caches
        if self.stack.own:
            caches = [Cache(kept.heads.K[0], kept.heads.V[0]) for kept in self.forward(x[None])[1]]
        return TokenMap(self.stack, self.place + 1, caches)

    def forward(self, x: Array) -> tuple[Array, list[Kept]]:
        """Return the outputs of tokens x, shape (k, d), and what each block keeps."""
        stack, i = self.stack, self.place
        T = x[:, None, :]
        y, kept = T, []
        for block, seen, turn, past in zip(stack.blocks, stack.seen, stack.turns, self.caches, strict=True):
            mask = None if seen is None else seen[i : i + 1, : i + 1]
            y, state = block.forward(y, mask, _rows(turn, slice(i, i + 1)), past, own=stack.own)
            kept.append(state)
        return stack._with_moments(y, T)[:, 0], kept


def _rows(turn: Turn | None, some: slice) -> Turn | None:
    return None if turn is None else turn.rows(some)


def _first(kept: Any) -> Any:
    """Return what a pass of one token alone keeps, without the axis of inputs."""
    if isinstance(kept, np.ndarray):
        return kept[0]
    if isinstance(kept, Turn) or kept is None:
        return kept
    parts = [_first(part) for part in kept]
    return type(kept)(*parts) if hasattr(kept, "_fields") else type(kept)(parts)

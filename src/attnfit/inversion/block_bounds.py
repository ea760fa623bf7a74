"""Bounds of the first two derivatives of a causal block in one token, on a ball, and what they prove."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from attnfit.objectives.block_heads import Cache
from attnfit.objectives.block_parts import Bounds, Norm
from attnfit.objectives.block_stack import TokenMap
from attnfit.objectives.blocks import Block
from attnfit.objectives.inverse_layer import Mask
from attnfit.objectives.rotary import Turn

Array = NDArray[np.float64]

# What rounding leaves of a residual, relative to the output.
ROUNDING = 1e-13


class Jet(NamedTuple):
    """A function of the token on a ball about x: its value at x, and bounds of its two derivatives."""

    value: Array
    first: float
    second: float

    def then(self, value: Array, bounds: Bounds) -> Jet:
        """Return what a map makes of it: ``|D^2| <= |D^2 f| |Dg|^2 + |Df| |D^2 g|``."""
        return Jet(
            value, bounds.first * self.first, bounds.second * self.first**2 + bounds.first * self.second
        )

    def plus(self, other: Jet) -> Jet:
        """Return the sum."""
        return Jet(self.value + other.value, self.first + other.first, self.second + other.second)


class TokenBounds(NamedTuple):
    """Of the map of one token within a ball.

    Attributes
    ----------
    first, second : float
        Of its derivatives.
    branch : float
        Lipschitz constant of what the branches add to the stream; infinite where a norm is last.
    """

    first: float
    second: float
    branch: float


def token_bounds(token: TokenMap, x: Array, radius: float) -> TokenBounds | None:
    """Return bounds within a distance of x, shape (d,); None where logits have norms or a cap."""
    stack, i = token.stack, token.place
    at, branch = Jet(x, 1.0, 0.0), 0.0
    for block, seen, turn, past in zip(stack.blocks, stack.seen, stack.turns, token.caches, strict=True):
        mask = None if seen is None else seen[i : i + 1, : i + 1]
        own = None if turn is None else turn.rows(slice(i, i + 1))
        walked = _Walk(block, radius, mask, own, past, stack.own).block(at)
        if walked is None:
            return None
        # What a later block adds, as a function of x, has its own constant times that of its input.
        at, added = walked
        branch += added
    return TokenBounds(at.first, at.second, branch)


class _Walk(NamedTuple):
    """A pass of a block with bounds."""

    of: Block
    radius: float
    mask: Mask | None
    turn: Turn | None
    past: Cache | None
    own: bool

    def block(self, x: Jet) -> tuple[Jet, float] | None:
        """Return the output, and the Lipschitz constant of what was added to the stream."""
        block, first_norm = self.of, self.of.norms[0]
        order, deep = block.order, block.mlp is not None
        read = x if order == "post" else self._normed(first_norm, x)
        largest = np.inf if order == "post" or first_norm is None else first_norm.largest
        near = float(np.linalg.norm(read.value)) + read.first * self.radius
        a = self._attended(read, min(largest, near))
        if a is None:
            return None
        if order == "post":
            w = self._normed(first_norm, x.plus(a))
            return (self._normed(block.norms[1], w.plus(self._mixed(w))) if deep else w), np.inf
        if order == "sandwich":
            a = self._normed(block.norms[1], a)
        w = x.plus(a)
        if not deep:
            return w, a.first
        second = block.norms[2 if order == "sandwich" else 1]
        m = self._mixed(self._normed(second, x if order == "parallel" else w))
        if order == "sandwich":
            m = self._normed(block.norms[3], m)
        return w.plus(m), a.first + m.first

    def _normed(self, norm: Norm | None, x: Jet) -> Jet:
        if norm is None:
            return x
        return x.then(norm.forward(x.value)[0], norm.bounds(x.value, x.first * self.radius))

    def _mixed(self, u: Jet) -> Jet:
        mlp = self.of.mlp
        assert mlp is not None
        return u.then(mlp.forward(u.value)[0], mlp.bounds(u.value, u.first * self.radius))

    def _attended(self, u: Jet, largest: float) -> Jet | None:
        out, state = self.of.heads.forward(u.value[None], self.mask, self.turn, self.past, own=self.own)
        bounds = self.of.heads.bounds(state, largest)
        return None if bounds is None else u.then(out[0], bounds)


def proven_radius(token: TokenMap, x: Array, inverse: float, step: float) -> float:
    """Return how far from x the one input can be, by the theorem of Newton and Kantorovich; infinite where it
    proves nothing.

    ``h = inverse step M <= 1/2`` with M above the second derivative within ``2 step``: exactly one input lies
    within ``2 step / (1 + sqrt(1 - 2 h))``.

    Parameters
    ----------
    token : TokenMap
    x : ndarray, shape (d,)
    inverse : float
        Norm of the inverse Jacobian at x.
    step : float
        Bound of that of the Newton step, for any output that counts as the same.
    """
    bounds = token_bounds(token, x, 2.0 * step)
    if bounds is None or not np.isfinite(bounds.second):
        return np.inf
    h = inverse * step * bounds.second
    return 2.0 * step / (1.0 + float(np.sqrt(1.0 - 2.0 * h))) if h <= 0.5 else np.inf


def contracts(token: TokenMap, y: Array) -> bool:
    """Return whether exactly one token has the output y, by contraction.

    Every input lies within ``sup|G|`` of y, G being what the branches add. Where G contracts there, Banach's
    theorem leaves one.
    """
    size = _largest_branches(token)
    if not np.isfinite(size):
        return False
    bounds = token_bounds(token, y, size)
    return bounds is not None and bounds.branch < 1.0


def _largest_branches(token: TokenMap) -> float:
    """Return a bound of what the branches add to the stream, whatever the token."""
    total, stack = 0.0, token.stack
    for block, past in zip(stack.blocks, token.caches, strict=True):
        if not block.bounded:
            return np.inf
        sandwich = block.order == "sandwich"
        read, added = block.norms[0], block.norms[1] if sandwich else None
        if added is not None:
            total += added.largest
        else:
            assert read is not None
            v = block.heads.forward(np.zeros((1, block.d)), None, None, past, own=stack.own)[1]
            bounds = block.heads.bounds(v, read.largest)
            if bounds is None:
                return np.inf
            total += bounds.size
        if block.mlp is None:
            continue
        read, added = block.norms[-2:] if sandwich else (block.norms[1], None)
        if added is not None:
            total += added.largest
        else:
            assert read is not None
            total += block.mlp.bounds(np.zeros(block.d), read.largest).size
    return total

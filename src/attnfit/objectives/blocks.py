"""One transformer block as a function of its tokens: a residual stream, norms, attention and a perceptron in
today's orders, with first derivatives.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from attnfit.data.inputs import choose
from attnfit.objectives.block_heads import Cache, Heads, HeadsState
from attnfit.objectives.block_parts import Mlp, Norm
from attnfit.objectives.inverse_layer import Mask, read_mask
from attnfit.objectives.rotary import Rotary, Turn

Array = NDArray[Any]
Order = Literal["pre", "post", "parallel", "sandwich"]

# Norms that each order has.
N_NORMS = {"pre": 2, "post": 2, "parallel": 2, "sandwich": 4}


class Kept(NamedTuple):
    """What a pass of one block keeps: states of its norms, its heads and its perceptron (None for those that
    it has not), in the order of the pass.
    """

    norms: list[Any]
    heads: HeadsState
    mlp: Any


@dataclass(frozen=True, eq=False)
class Block:
    """One block of a transformer, from the states of its tokens to their next states.

    * "pre": ``w = x + A(N1(x)); y = w + M(N2(w))``.
    * "parallel": ``y = x + A(N1(x)) + M(N2(x))``.
    * "post": ``w = N1(x + A(x)); y = N2(w + M(w))``.
    * "sandwich": ``w = x + N2(A(N1(x))); y = w + N4(M(N3(w)))``.

    A is the attention, M the perceptron.

    Parameters
    ----------
    heads : Heads
    mlp : Mlp, optional
        None leaves out M with the norms around it.
    norms : sequence of Norm or None
        N1, N2 (and N3, N4); None for one that the block has not. One norm alone is both of a parallel block.
    order : {"pre", "post", "parallel", "sandwich"}
    mask : "causal", "causal:WINDOW", array_like of bool, shape (n, n), or None
        True where a token (row) sees another; None where all see all.
    rotary : Rotary, optional
    positions : array_like, shape (n,), optional
        Those of the tokens, for `rotary`; 0, 1, ... by default.

    Raises
    ------
    ValueError
        If widths do not belong together, or the order does not have so many norms.

    Examples
    --------
    >>> import numpy as np
    >>> from attnfit.inversion import Block, Heads, Norm
    >>> one = np.ones((1, 2, 2)) / 4
    >>> block = Block(Heads(one, one, one, one), norms=[Norm(np.ones(2)), None], mask="causal")
    >>> block.output(np.array([[1.0, -1.0], [2.0, 0.0]])).round(3)
    array([[ 1.   , -1.   ],
           [ 2.096,  0.096]])
    """

    heads: Heads
    mlp: Mlp | None = None
    norms: Sequence[Norm | None] = (None, None)
    order: Order = "pre"
    mask: Any = None
    rotary: Rotary | None = None
    positions: Any = None

    def __post_init__(self) -> None:
        choose(self.order, N_NORMS, "order")
        norms = list(self.norms)
        if len(norms) == 1:
            norms = [norms[0], norms[0] if self.order == "parallel" else None]
        if len(norms) != N_NORMS[self.order]:
            raise ValueError(
                f"norms has {len(norms)} entries; order {self.order!r} has {N_NORMS[self.order]}, None for "
                "those that are left out"
            )
        for k, norm in enumerate(norms):
            if norm is not None and norm.width != self.d:
                raise ValueError(f"norms[{k}] has width {norm.width}; tokens have {self.d}")
        if self.mlp is not None and len(self.mlp.W_1) != self.d:
            raise ValueError(f"W_1 of mlp has {len(self.mlp.W_1)} rows; tokens have {self.d} numbers")
        object.__setattr__(self, "norms", norms)

    @classmethod
    def from_model(cls, model: Any, layers: Sequence[int]) -> list[Block]:
        """Return blocks of a transformers model, each checked against it: `attnfit.heads.blocks` documents
        the arguments, what is understood and what is refused.
        """
        from attnfit.heads.blocks import blocks_of

        return blocks_of(model, layers)

    @property
    def d(self) -> int:
        """Numbers of a token."""
        return self.heads.d

    @property
    def bounded(self) -> bool:
        """Whether what the branches add to the stream is bounded, because norms bound what they read or add:
        then every output has an input.
        """
        if self.order == "post":
            return False
        read = self.norms if self.order != "sandwich" else [self.norms[0] or self.norms[1],
                                                            self.norms[2] or self.norms[3]]  # fmt: skip
        return read[0] is not None and (self.mlp is None or read[1] is not None)

    @property
    def lost(self) -> int:
        """Numbers of a token that its output does not show, because a norm is last."""
        if self.order != "post":
            return 0
        last = self.norms[1] if self.mlp is not None else self.norms[0]
        return 0 if last is None else last.lost

    def output(self, X: Any, keys: Any = None) -> Array:
        """Return the next states of tokens X as rows, shape (n, d); keys are the states that cross attention
        reads.
        """
        x = np.asarray(X, dtype=np.float64)
        past = None if keys is None else self.heads.keys(np.asarray(keys, dtype=np.float64))
        own = past is None
        return self.forward(
            x, self.reach(len(x)) if own else None, self.turn(len(x)) if own else None, past, own=own
        )[0]

    def reach(self, n: int) -> Mask:
        """Return which tokens each sees, shape (n, n), itself included."""
        mask = self.mask
        if isinstance(mask, str) and mask.startswith("causal:") and mask[7:].isdigit() and int(mask[7:]):
            own = np.arange(n)
            mask = np.tri(n, dtype=bool) & (own[:, None] - own < int(mask[7:]))
        read = read_mask(mask, n)
        return np.ones((n, n), dtype=bool) if read is None else read

    def turn(self, n: int) -> Turn | None:
        """Return the rotation of n tokens, None without."""
        if self.rotary is None:
            return None
        w = self.rotary.of_width(self.heads.W_Q.shape[2], 1)[0]
        at = (
            self.rotary.of_keys([n], len(w))[0]
            if self.positions is None
            else np.asarray(self.positions, float)
        )
        if len(at) != n:
            raise ValueError(f"positions has {len(at)} entries, but there are {n} tokens; pass one a token")
        return Turn.at(at, w, self.rotary.layout)

    def forward(
        self, x: Array, mask: Mask | None, turn: Turn | None, past: Cache | None, *, own: bool
    ) -> tuple[Array, Kept]:
        """Return the next states of tokens x, shape (..., n, d); the rest as `Heads.forward` documents."""
        norms: list[Any] = []
        heads: Any = None
        mlp: Any = None

        def normed(k: int, v: Array) -> Array:
            norm = self.norms[k]
            y, kept = (v, None) if norm is None else norm.forward(v)
            norms.append(kept)
            return y

        def attended(u: Array) -> Array:
            nonlocal heads
            out, heads = self.heads.forward(u, mask, turn, past, own=own)
            return out

        def mixed(u: Array) -> Array:
            nonlocal mlp
            assert self.mlp is not None
            out, mlp = self.mlp.forward(u)
            return out

        y = _pass(self.order, self.mlp is not None, x, normed, attended, mixed)
        return y, Kept(norms, heads, mlp)

    def push(self, at: Kept, dx: Array) -> Array:
        """Return ``J dx``."""
        norms = iter(at.norms)

        def normed(k: int, v: Array) -> Array:
            kept, norm = next(norms), self.norms[k]
            return v if norm is None else norm.push(kept, v)

        def mixed(v: Array) -> Array:
            assert self.mlp is not None
            return self.mlp.push(at.mlp, v)

        return _pass(
            self.order, self.mlp is not None, dx, normed, lambda v: self.heads.push(at.heads, v), mixed
        )

    def pull(self, at: Kept, v: Array) -> Array:
        """Return ``J^T v``."""

        def normed(k: int, place: int, v: Array) -> Array:
            norm = self.norms[k]
            return v if norm is None else norm.pull(at.norms[place], v)

        def attended(v: Array) -> Array:
            return self.heads.pull(at.heads, v)

        def mixed(v: Array) -> Array:
            assert self.mlp is not None
            return self.mlp.pull(at.mlp, v)

        # Places of the norms are those of the pass.
        if self.order == "parallel":
            back = v + normed(0, 0, attended(v))
            return back if self.mlp is None else back + normed(1, 1, mixed(v))
        if self.order == "post":
            if self.mlp is not None:
                v = normed(1, 1, v)
                v = v + mixed(v)
            v = normed(0, 0, v)
            return v + attended(v)
        if self.order == "pre":
            if self.mlp is not None:
                v = v + normed(1, 1, mixed(v))
            return v + normed(0, 0, attended(v))
        if self.mlp is not None:
            v = v + normed(2, 2, mixed(normed(3, 3, v)))
        return v + normed(0, 0, attended(normed(1, 1, v)))


def _pass(
    order: str,
    deep: bool,
    x: Array,
    normed: Callable[[int, Array], Array],
    attended: Callable[[Array], Array],
    mixed: Callable[[Array], Array],
) -> Array:
    """Return what a block makes of x, or of a direction: its parts are linear then, its sums are the same."""
    if order == "parallel":
        y = x + attended(normed(0, x))
        return y + mixed(normed(1, x)) if deep else y
    if order == "post":
        w = normed(0, x + attended(x))
        return normed(1, w + mixed(w)) if deep else w
    if order == "pre":
        w = x + attended(normed(0, x))
        return w + mixed(normed(1, w)) if deep else w
    w = x + normed(1, attended(normed(0, x)))
    return w + normed(3, mixed(normed(2, w))) if deep else w

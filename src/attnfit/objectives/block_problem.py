"""Recovery of the tokens that transformer blocks turned into a given output."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attnfit.objectives.block_parts import Norm
from attnfit.objectives.block_stack import Stack
from attnfit.objectives.blocks import Block
from attnfit.objectives.inverse_layer import read_known, read_matrix, read_output
from attnfit.objectives.objective import Evaluation
from attnfit.objectives.token_problem import TokenProblem

Array = NDArray[np.float64]


class BlockInversion(TokenProblem):
    """``0.5 ||F(X) - B||_F^2``, F a stack of transformer blocks, unknown X (d, n): token i is column i.

    Parameters
    ----------
    blocks : Block or sequence of Block
        The first one reads the tokens.
    B : array_like, shape (n, d)
        The output, one row a token.
    keys : array_like, shape (k, e), optional
        The states that cross attention reads. The tokens are no keys then, and each is a problem of its own.
    known : array_like, shape (d, n), or mapping from position to token, optional
        Tokens that are given; NaN marks the columns to recover. The unknown is then X of the others only,
        shape (d, n_unknown).
    input_norm : Norm, optional
        For post-norm blocks: the norm that the tokens come out of, that of the block before. With
        ``v = (x - b) / g`` it adds the equations mean(v^2) = 1, for a LayerNorm mean(v) = 0 too, to each
        token: the block's own last norm has taken as many away. They hold up to eps over the variance.

    Raises
    ------
    ValueError
        If shapes cannot belong together, anything is not finite, every token is known, or `input_norm` has a
        gain of zero.

    Notes
    -----
    ``F(x) - x`` is bounded where every branch reads or ends in a norm (all orders but "post"): then F is
    proper of degree one. Every B has an input, and where no input is singular the signs of their
    determinants of J add to one: an input with a negative determinant proves that there are others. So a
    zero residual says nothing about uniqueness; `attnfit.inversion.recover` draws the consequences. It goes
    beyond the attention layer of "Unmasking Transformers: A Theoretical Approach to Data Recovery via
    Attention Weights". Second derivatives are first ones at a point moved by an imaginary step.

    Examples
    --------
    >>> import numpy as np
    >>> from attnfit.inversion import Block, BlockInversion, Heads, Norm, recover
    >>> rng = np.random.default_rng(0)
    >>> W = rng.standard_normal((3, 2, 6, 3)) / 6
    >>> heads = Heads(*W, rng.standard_normal((2, 3, 6)) / 6)
    >>> block = Block(heads, norms=[Norm(np.ones(6)), None], mask="causal")
    >>> X = rng.standard_normal((6, 4))
    >>> found = recover(BlockInversion(block, block.output(X.T)))
    >>> found.verdict, bool(np.abs(found.x - X).max() < 1e-9)
    ('ambiguous', True)
    """

    def __init__(
        self,
        blocks: Block | Sequence[Block],
        B: Any,
        *,
        keys: Any = None,
        known: Any = None,
        input_norm: Norm | None = None,
    ) -> None:
        blocks = [blocks] if isinstance(blocks, Block) else list(blocks)
        if not blocks:
            raise ValueError("blocks is empty; pass at least one Block")
        d = blocks[0].d
        for k, block in enumerate(blocks):
            if block.d != d:
                raise ValueError(f"blocks[{k}] takes {block.d} numbers a token, the first {d}")
            width = int(block.heads.W_K.shape[1])
            if keys is None and width != d:
                raise ValueError(
                    f"blocks[{k}] has keys of {width} numbers, tokens have {d}: cross attention needs keys="
                )
        read = None
        if keys is not None:
            read = read_matrix(keys, "keys")
            if any(block.heads.W_K.shape[1] != read.shape[1] for block in blocks):
                raise ValueError(
                    f"keys has {read.shape[1]} columns but W_K {blocks[0].heads.W_K.shape[1]} rows; keys are "
                    "the states that cross attention reads, and self-attention has none"
                )
        if input_norm is not None:
            if input_norm.width != d:
                raise ValueError(f"input_norm has width {input_norm.width}; tokens have {d} numbers")
            zero = np.flatnonzero(input_norm.gains == 0.0)
            if len(zero):
                raise ValueError(f"input_norm has gain 0 at index {zero[0]}: what comes out does not show v")
        output = self._output(B, d)
        stack = Stack(blocks, len(output), read, input_norm)
        self.blocks = blocks
        tokens = read_known(known, d, len(output))
        super().__init__(stack, self._with_moments(output, input_norm), tokens, 0.0)
        self.stack = stack

    @staticmethod
    def _output(B: Any, d: int) -> Array:
        output = read_output(B, d) if np.ndim(B) == 2 and np.shape(B)[1] == d else read_matrix(B, "B")
        if output.shape[1] != d:
            raise ValueError(f"B has {output.shape[1]} columns; tokens have {d} numbers: one row a token")
        return output

    @staticmethod
    def _with_moments(output: Array, norm: Norm | None) -> Array:
        if norm is None:
            return output
        return np.column_stack([output, np.tile([0.0, 1.0][-norm.lost :], (len(output), 1))])

    @property
    def bounded(self) -> bool:
        """Whether ``F(x) - x`` is bounded, so that every output has an input."""
        return all(block.bounded for block in self.blocks)

    @property
    def sequential(self) -> bool:
        """Whether no token sees a later one."""
        return self.stack.sequential

    @property
    def token_by_token(self) -> bool:
        """Whether rows of the output, one after the other, are as many equations as their tokens have
        numbers: no token sees a later one, known tokens come first, and no norm is last.
        """
        square = self.m == self.d == self.rank
        return square and self.sequential and bool(np.isnan(self.known[0, self.unknown[0] :]).all())

    @property
    def rank(self) -> int:
        """Independent numbers in a row of the output: d, less what the last norm of a post-norm block hides,
        plus the equations of `input_norm`.
        """
        return int(self.m - self.blocks[-1].lost)

    def with_output(self, B: Any) -> BlockInversion:
        """Return the same problem for another output B, shape (n, d)."""
        output = self._output(B, self.d)
        if len(output) != self.n:
            raise ValueError(f"B has {len(output)} rows but there are {self.n} tokens; make another problem")
        other = copy.copy(self)
        other.B, other._latest = self._with_moments(output, self.stack.input_norm), None
        return other

    def initial_point(self, random_state: Any = None) -> Array:
        """Return the unknown columns of the output: exact where branches add nothing."""
        return np.ascontiguousarray(self.B[self.unknown, : self.d].T)

    def starts(self, rng: np.random.Generator) -> dict[str, Array]:
        """Return the output itself, flat."""
        return {"B": self.initial_point(rng).reshape(-1)}

    def gaussian_starts(self, n_starts: int, rng: np.random.Generator) -> Array:
        """Return normal tokens of the size of the known ones, else of the output, flat, shape (n_starts,
        n_unknowns).
        """
        known = np.delete(self.known, self.unknown, axis=1)
        size = np.sqrt(np.mean((known if known.size else self.B[:, : self.d]) ** 2))
        return np.asarray(size * rng.standard_normal((n_starts, self.n_unknowns)))

    def balanced(self, floor: float) -> BlockInversion:
        """Return the problem itself: its output is in the units of the stream."""
        return self

    def projected(self) -> BlockInversion:
        """Return the problem itself: the stream reaches every output."""
        return self

    def residual_curvature_at(self, at: Evaluation) -> Array:
        """Return ``sum_ij residual_ij Hessian of residual_ij`` at an evaluated point."""
        forward, C = self._known(at)
        return self.stack.curvature(forward, C, self.unknown)

    def diagonal_at(self, at: Evaluation) -> Array:
        """Return the diagonal of ``J^T J``."""
        J = self.jacobian_at(at)
        return np.asarray(np.einsum("ij,ij->j", J, J))

    def _curvature(self, at: Evaluation, *, second: bool) -> Array:
        J = self.jacobian_at(at)
        H = J.T @ J
        return np.asarray(H + self.residual_curvature_at(at) if second else H)

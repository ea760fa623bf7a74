"""Rotary embeddings: queries and keys turned by their positions, so that a logit knows the distance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from attnfit.data.inputs import choose
from attnfit.segments import Array

LAYOUTS = ("half", "interleaved")


@dataclass(frozen=True, eq=False)
class Rotary:
    """Rotary position embedding of a head.

    Frequency ``w_f`` turns a pair of columns (a, b) of queries and keys at position p by the angle ``w_f p``:
    ``(y_a, y_b) -> (y_a cos - y_b sin, y_b cos + y_a sin)``. With D the distance of query and key, the logit
    is ``x_t' X_0 x_s + Re sum_f exp(i w_f D) x_t' M_f x_s``, with X_0 of what is not turned and
    ``M_f = (q_a + i q_b)(k_a + i k_b)^H`` of complex rank one.

    Parameters
    ----------
    frequencies : array_like, shape (F,), or a list of them, optional
        Radians a position; what scaled variants (linear, llama3, YaRN, longrope) change. A list holds one
        array a sequence, for frequencies that depend on its length.
    theta : float
        Base of the usual frequencies ``theta ** (-arange(0, n, 2) / n)``, where none are given.
    n : int, optional
        Number of columns that these turn, even; the width of the head by default.
    layout : {"half", "interleaved"}
        Which columns make a pair: (f, F + f), as in Llama, or (2 f, 2 f + 1), as in GPT-J. Maps cannot tell
        them apart: it says in which order the columns of the factors are written.
    positions : array_like, shape (n2,) or (n2, F), or a list of them, optional
        Positions of the keys of each sequence; queries have the last n1 of them. 0, 1, ... by default. A
        matrix holds one coordinate a frequency, for multimodal embeddings.

    Raises
    ------
    ValueError
        If a frequency is not finite, theta is not positive, n is not even or positive, or the layout is
        unknown.

    Notes
    -----
    Source: Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding" (2021).

    Examples
    --------
    >>> from attnfit import problems
    >>> problems.Rotary(theta=100.0, n=4).of_width(6, 1)[0].round(3)
    array([1. , 0.1])
    """

    frequencies: Any = None
    theta: float = 1e4
    n: int | None = None
    layout: Literal["half", "interleaved"] = "half"
    positions: Any = None

    def __post_init__(self) -> None:
        choose(self.layout, dict.fromkeys(LAYOUTS), "layout")
        if not (np.isfinite(self.theta) and self.theta > 0):
            raise ValueError(f"theta must be positive, not {self.theta!r}; 1e4 is usual")
        n = self.n
        if n is not None and (isinstance(n, bool) or not isinstance(n, int | np.integer) or n < 2 or n % 2):
            raise ValueError(f"n must be an even number of columns, at least 2, not {n!r}")

    def of_width(self, width: int, n_sequences: int) -> list[Array]:
        """Return the frequencies of each sequence for a head of this width, shape (F,).

        Raises
        ------
        ValueError
            If they turn more columns than the head has, or are no finite vectors.
        """
        if self.frequencies is None:
            n = width - width % 2 if self.n is None else int(self.n)
            found = [self.theta ** (-np.arange(0, n, 2) / max(n, 1))] * n_sequences
        else:
            given = self.frequencies
            several = isinstance(given, list | tuple) and len(given) > 0 and np.ndim(given[0]) == 1
            entries = list(given) if several else [given] * n_sequences
            if len(entries) != n_sequences:
                raise ValueError(
                    f"rotary has frequencies for {len(entries)} sequences but there are {n_sequences}; pass "
                    "one array for all, or a list with one a sequence"
                )
            found = [np.asarray(entry, dtype=np.float64) for entry in entries]
        for s, w in enumerate(found):
            if w.ndim != 1 or not len(w) or not np.isfinite(w).all() or len(w) != len(found[0]):
                raise ValueError(
                    f"rotary frequencies of sequence {s} must be finite numbers, shape (F,), equally many "
                    "for all sequences"
                )
        F = len(found[0])
        if width < 2 * F:
            raise ValueError(
                f"rank {width} is less than the 2 x {F} columns that {F} frequencies turn; raise rank to the "
                "width of the head, or pass fewer frequencies"
            )
        return found

    def of_keys(self, lengths: Sequence[int], n_frequencies: int) -> list[Array]:
        """Return the positions of the keys of each sequence, shape (n2,) or (n2, F).

        Raises
        ------
        ValueError
            If there are not as many as keys.
        """
        if self.positions is None:
            return [np.arange(n, dtype=np.float64) for n in lengths]
        given = self.positions
        several = isinstance(given, list | tuple) and len(given) > 0 and np.ndim(given[0]) > 0
        entries = list(given) if several else [given]
        if len(entries) != len(lengths):
            raise ValueError(
                f"positions has {len(entries)} sequences but A2 has {len(lengths)}; pass one array a sequence"
            )
        found = []
        for s, (entry, n) in enumerate(zip(entries, lengths, strict=True)):
            name = f"positions[{s}]" if several else "positions"
            array = np.asarray(entry, dtype=np.float64)
            if array.shape not in ((n,), (n, n_frequencies)):
                raise ValueError(
                    f"{name} has shape {array.shape}; expected ({n},), one a key, or ({n}, {n_frequencies})"
                )
            bad = np.flatnonzero(~np.isfinite(array.reshape(n, -1)).all(axis=1))
            if len(bad):
                raise ValueError(f"{name} is not finite at index {bad[0]}; number the keys")
            found.append(array)
        return found


@dataclass(frozen=True)
class Turn:
    """The rotation of the vectors of one sequence.

    Attributes
    ----------
    cos, sin : ndarray, shape (n, F)
    layout : str
    """

    cos: Array
    sin: Array
    layout: str

    @classmethod
    def at(cls, positions: Array, frequencies: Array, layout: str) -> Turn:
        """Return the rotation at positions, shape (n,) or (n, F)."""
        by_frequency = positions[:, None] if positions.ndim == 1 else positions
        angles = by_frequency * frequencies
        return cls(np.cos(angles), np.sin(angles), layout)

    def __call__(self, y: Array) -> Array:
        """Return the vectors, shape (..., n, h), turned."""
        return self._by(y, self.sin)

    def back(self, y: Array) -> Array:
        """Return the vectors turned back: the inverse, and the transpose."""
        return self._by(y, -self.sin)

    def rows(self, some: Any, repeats: int = 1) -> Turn:
        """Return the rotation of some of the vectors, each of them several times."""
        cos, sin = (np.repeat(values[some], repeats, axis=0) for values in (self.cos, self.sin))
        return Turn(cos, sin, self.layout)

    def unturn(self, matrices: Array, some: Any) -> Array:
        """Return ``R_t^T M_t R_t`` of matrices, shape (k, h, h), for some of the vectors t."""
        h = matrices.shape[1]
        turn = self.rows(some, h)
        for _ in range(2):
            matrices = turn.back(matrices.transpose(0, 2, 1).reshape(-1, h)).reshape(-1, h, h)
        return matrices

    def _by(self, y: Array, sin: Array) -> Array:
        F = sin.shape[1]
        half = self.layout == "half"
        first = slice(0, F) if half else slice(0, 2 * F, 2)
        second = slice(F, 2 * F) if half else slice(1, 2 * F, 2)
        out = y.copy()
        a, b = y[..., first], y[..., second]
        out[..., first] = a * self.cos - b * sin
        out[..., second] = b * self.cos + a * sin
        return out


def placed(rotary: Rotary | None, positions: Any) -> Rotary | None:
    """Return a rotary embedding at these positions.

    Raises
    ------
    ValueError
        If there are positions, but no embedding that they play a part in.
    """
    if positions is None:
        return rotary
    if rotary is None:
        raise ValueError("positions are for rotary embeddings; pass rotary=Rotary(...), or leave them out")
    return replace(rotary, positions=positions)


def rotary_matrices(W_Q: Array, W_K: Array, rotary: Rotary) -> tuple[NDArray[np.complex128], Array]:
    """Return M, shape (..., F, d1, d2), and X_0, shape (..., d1, d2), of factors of shape (..., d, h)."""
    F = len(rotary.of_width(W_Q.shape[-1], 1)[0])
    half = rotary.layout == "half"
    first = slice(0, F) if half else slice(0, 2 * F, 2)
    second = slice(F, 2 * F) if half else slice(1, 2 * F, 2)
    q, k = (W[..., first] + 1j * W[..., second] for W in (W_Q, W_K))
    # C - i S with C = q_a k_a' + q_b k_b' and S = q_a k_b' - q_b k_a'.
    M = np.einsum("...if,...jf->...fij", q, k.conj())
    rest = slice(2 * F, None)
    return M, W_Q[..., rest] @ np.swapaxes(W_K[..., rest], -1, -2)

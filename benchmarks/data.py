"""Benchmark problems, drawn block by block so that peak memory stays near the size of the data."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

Array = NDArray[Any]
Family = Literal["softmax", "exponential", "choice"]

BLOCK = 65_536


@dataclass(frozen=True)
class Spec:
    """Everything needed to draw a problem again, in this process or a fresh one.

    Parameters
    ----------
    family : {"softmax", "exponential", "choice"}
    n, d : int
        Rows and columns. ``d`` is ignored by ``variant="real"``, which has 30.
    kappa : float
        Ratio of the largest to the smallest scale of the features.
    seed : int
    variant : str
        "gaussian", "heavy" or "real"; "uniform" or "power" when sparse; "small" or "half" for choice.
    nonzeros : int
        Nonzeros a row; 0 means dense.
    """

    family: Family
    n: int
    d: int
    kappa: float = 1.0
    seed: int = 0
    variant: str = "gaussian"
    nonzeros: int = 0

    @property
    def title(self) -> str:
        """One line for a table heading."""
        size = f"n = {self.n:,}, d = {30 if self.variant == 'real' else self.d:,}"
        fill = f", {self.nonzeros} nonzeros a row" if self.nonzeros else ""
        scale = "its own conditioning" if self.variant == "real" else f"kappa = {self.kappa:g}"
        return f"{self.family} ({self.variant}), {size}{fill}, {scale}"


@dataclass(frozen=True)
class Case:
    """A drawn problem; ``starts`` holds the first row of every group of a choice problem."""

    spec: Spec
    A: Any
    b: Array
    x_true: Array
    starts: Array | None = None

    @property
    def labels(self) -> Array:
        """Group label of every row."""
        assert self.starts is not None
        sizes = np.diff(self.starts, append=len(self.b))
        return np.repeat(np.arange(len(self.starts)), sizes)

    @property
    def nbytes(self) -> int:
        """Size of the data as stored, group labels included."""
        matrix = self.A
        size = matrix.nbytes if isinstance(matrix, np.ndarray) else stored(matrix)
        return int(size + self.b.nbytes + (0 if self.starts is None else 8 * len(self.b)))


def stored(A: Any) -> int:
    """Bytes of a CSR matrix."""
    return int(A.data.nbytes + A.indices.nbytes + A.indptr.nbytes)


def draw(spec: Spec) -> Case:
    """Draw the problem a ``Spec`` names."""
    rng = np.random.default_rng(spec.seed)
    if spec.nonzeros:
        A, x_true = sparse_features(spec, rng)
    elif spec.variant == "real":
        A, x_true = real_features(spec, rng)
    else:
        A, x_true = conditioned_features(spec, rng)
    if spec.family == "choice":
        starts = group_starts(spec, rng)
        return Case(spec, A, choices(A @ x_true, starts, rng), x_true, starts)
    logits = A @ x_true
    if spec.family == "exponential":
        x_true = x_true / 2
        return Case(spec, A, np.exp(logits / 2 + 0.05 * rng.standard_normal(spec.n)), x_true)
    logits += 0.1 * rng.standard_normal(spec.n)
    target = np.exp(logits - logits.max())
    return Case(spec, A, target / target.sum(), x_true)


def conditioned_features(spec: Spec, rng: np.random.Generator) -> tuple[Array, Array]:
    """``(G Q diag(s)) Q^T``, ``s`` log-spaced from 1 to 1/kappa, and an ``x`` whose logits have size 1."""
    n, d = spec.n, spec.d
    Q = np.linalg.qr(rng.standard_normal((d, d)))[0]
    s = np.geomspace(1.0, 1.0 / spec.kappa, d)
    x_true = Q @ (rng.standard_normal(d) / s) / np.sqrt(d)
    mix = (Q * s) @ Q.T
    row_scale = rng.gamma(2.0, 0.5, n) if spec.variant == "heavy" else None
    A = np.empty((n, d))
    for rows in blocks(n):
        A[rows] = rng.standard_normal((rows.stop - rows.start, d)) @ mix
        if row_scale is not None:
            A[rows] *= row_scale[rows, None]
    return A, x_true


def real_features(spec: Spec, rng: np.random.Generator) -> tuple[Array, Array]:
    """Thirty strongly correlated measurements of tumours, resampled with a jitter that keeps correlations.

    A row is a real row plus a tenth of the difference of two others, so that no row repeats and the design
    has full rank at every ``n``.
    """
    from sklearn.datasets import load_breast_cancer

    real = load_breast_cancer().data
    real = (real - real.mean(axis=0)) / real.std(axis=0)
    m, d = real.shape
    s, V = np.linalg.svd(real / np.sqrt(m), full_matrices=False)[1:]
    x_true = V.T @ (rng.standard_normal(d) / s) / np.sqrt(d)
    A = np.empty((spec.n, d))
    for rows in blocks(spec.n):
        pick = rng.integers(m, size=(3, rows.stop - rows.start))
        A[rows] = real[pick[0]] + 0.1 * (real[pick[1]] - real[pick[2]])
    return A, x_true


def sparse_features(spec: Spec, rng: np.random.Generator) -> tuple[Any, Array]:
    """CSR with ``nonzeros`` distinct columns a row; conditioning comes from column scales in random order."""
    n, d, k = spec.n, spec.d, spec.nonzeros
    if 2 * k > d:
        raise ValueError(f"nonzeros={k} needs d >= {2 * k}, got d={d}")
    s = rng.permutation(np.geomspace(1.0, 1.0 / spec.kappa, d))
    x_true = rng.standard_normal(d) / s / np.sqrt(k)
    cumulative = None
    if spec.variant == "power":
        frequency = rng.permutation(1.0 / np.arange(1, d + 1))
        cumulative = np.cumsum(frequency / frequency.sum())
    indices = np.empty((n, k), dtype=np.int32)
    data = np.empty((n, k))
    for rows in blocks(n):
        indices[rows] = distinct_columns(rows.stop - rows.start, d, k, cumulative, rng)
        data[rows] = rng.standard_normal((rows.stop - rows.start, k)) * s[indices[rows]]
    # int32 throughout: scipy widens every index array if one of them is wider.
    wide = np.int32 if n * k < 2**31 else np.int64
    indptr = np.arange(0, n * k + 1, k, dtype=wide)
    return sparse.csr_array((data.ravel(), indices.ravel(), indptr), shape=(n, d)), x_true


def distinct_columns(
    m: int, d: int, k: int, cumulative: Array | None, rng: np.random.Generator
) -> NDArray[np.int32]:
    """``m`` sorted rows of ``k`` different columns; a repeated column is drawn again until it is new."""

    def columns(size: Any) -> Array:
        if cumulative is None:
            return np.asarray(rng.integers(d, size=size, dtype=np.int32))
        return np.asarray(np.minimum(np.searchsorted(cumulative, rng.random(size)), d - 1), dtype=np.int32)

    out = np.sort(columns((m, k)), axis=1)
    todo = np.arange(m)
    while todo.size:
        part = out[todo]
        repeated = np.zeros(part.shape, dtype=bool)
        repeated[:, 1:] = part[:, 1:] == part[:, :-1]
        keep = repeated.any(axis=1)
        todo, part, repeated = todo[keep], part[keep], repeated[keep]
        part[repeated] = columns(int(repeated.sum()))
        out[todo] = np.sort(part, axis=1)
    return out


def group_starts(spec: Spec, rng: np.random.Generator) -> NDArray[np.int64]:
    """First rows of groups of 2 to 10 rows; ``variant="half"`` puts n/2 rows in the first group."""
    first = spec.n // 2 if spec.variant == "half" else 0
    left = spec.n - first
    ends = np.cumsum(rng.integers(2, 11, size=left // 2 + 1))
    # A last group of one row would carry no information, so it joins its neighbour.
    starts = np.concatenate(([0], ends[ends <= left - 2])) + first
    return np.concatenate(([0], starts)) if first else starts


def choices(logits: Array, starts: Array, rng: np.random.Generator) -> Array:
    """One-hot choices drawn from the conditional logit model (the largest of logit plus Gumbel noise)."""
    for rows in blocks(len(logits)):
        logits[rows] += rng.gumbel(size=rows.stop - rows.start)
    best = np.repeat(np.maximum.reduceat(logits, starts), np.diff(starts, append=len(logits)))
    return np.asarray(logits == best, dtype=float)


def blocks(n: int, size: int = BLOCK) -> Iterator[slice]:
    """Row slices of at most ``size`` rows that cover ``range(n)``."""
    for start in range(0, n, size):
        yield slice(start, min(start + size, n))

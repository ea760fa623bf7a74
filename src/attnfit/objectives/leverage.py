"""Row sampling by curvature and approximate leverage, on the fly while the data stream past."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import linalg, sparse

from attnfit.objectives.part import Part
from attnfit.segments import Array, Chunk, Index, Segments


def leverage_sketch(gram: Array, n_probes: int, rng: np.random.Generator) -> Array:
    """Return W, shape (d, n_probes), with ``E |a^T W|^2 = a^T gram^-1 a``, the leverage of row a.

    ``W = L^-T G / sqrt(k)`` with the Cholesky factor of ``gram`` and a Gaussian G: the sketch of Drineas,
    Magdon-Ismail, Mahoney and Woodruff, "Fast approximation of matrix coherence and statistical leverage"
    (2012). A ridge of 1e-10 of the mean diagonal makes rows stand out that are alone in a direction ``gram``
    does not know.
    """
    d = len(gram)
    ridge = 1e-10 * max(float(np.trace(gram)) / d, np.finfo(float).tiny)
    factor = linalg.cholesky(gram + ridge * np.eye(d), lower=True, check_finite=False)
    probes = rng.standard_normal((d, n_probes)) / np.sqrt(n_probes)
    return np.asarray(linalg.solve_triangular(factor, probes, lower=True, trans=1, check_finite=False))


class RowSampler:
    """Keep each unit (a row, or all rows of a short group) independently with probability proportional to its
    score.

    The score of a row is its curvature weight times its approximate leverage; a kept unit is weighted by the
    inverse of its probability, so every sampled sum is unbiased whatever the scores. Leverages are computed
    during the first read and kept (four bytes a row) unless the rows are in other places or too many.

    Parameters
    ----------
    n_rows : int
        Number of rows whose leverages are kept; zero for none.
    budget : float
        Expected number of sampled rows.
    sketch : ndarray, shape (d, k)
        From `leverage_sketch`.
    mass : float
        An estimate of the sum of all scores; after a read it is replaced by the true sum.
    rng : numpy.random.Generator
    most : float
        The budget is never larger.
    """

    def __init__(
        self,
        n_rows: int,
        budget: float,
        sketch: Array,
        mass: float,
        rng: np.random.Generator,
        most: float = np.inf,
    ) -> None:
        self.most = most
        self.budget = budget
        self.sketch = sketch
        self.mass = mass
        self.rng = rng
        self.leverage: NDArray[np.float32] | None = np.empty(n_rows, dtype=np.float32) if n_rows else None
        self.has_leverage = False

    def draw(self, scores: Array, rows_per_unit: float = 1.0) -> tuple[NDArray[np.intp], Array]:
        """Return the kept units and their inverse probabilities."""
        probability = np.minimum(1.0, scores * (self.budget / (self.mass * rows_per_unit)))
        kept = np.flatnonzero(self.rng.random(len(scores)) < probability)
        return kept, 1.0 / probability[kept]

    def double(self) -> None:
        """Draw twice as many rows from now on."""
        self.budget = min(2.0 * self.budget, self.most)

    def finish(self, total: float) -> None:
        """End a read: the true mass of the scores is known now."""
        self.has_leverage = True
        if np.isfinite(total) and total > 0.0:
            self.mass = total

    def split(self, n_parts: int) -> list[RowSampler]:
        """Return a sampler for each of several places, with random numbers of its own."""
        seeds = self.rng.integers(2**63, size=n_parts)
        return [
            RowSampler(0, self.budget, self.sketch, self.mass, np.random.default_rng(seed)) for seed in seeds
        ]


class Draws:
    """Rows kept by a sampler, gathered into chunks that the second-order formulas read like any other."""

    def __init__(self) -> None:
        self._short: list[tuple[Any, Index, Array, Index, Index]] = []
        self._pieces: dict[int, list[tuple[Any, Index, Array]]] = {}
        self._long_group: dict[int, Any] = {}
        self._group_size = 0.0

    def _rows_per_group(self, part: Part) -> float:
        if not self._group_size:
            self._group_size = part.rows_per_short_group
        return self._group_size

    def visit(
        self,
        sampler: RowSampler,
        part: Part,
        chunk: Chunk,
        block: Any,
        z: Array,
        state: list[Array],
        centre: Array | None,
    ) -> float:
        """Offer the rows of a chunk to the sampler; return the sum of their scores."""
        assert isinstance(chunk.rows, slice)
        scores = _scores(sampler, part, chunk, block, z, state, centre)
        first = chunk.rows.start
        whole_groups = part.loss.coupled and chunk.long < 0
        if whole_groups:
            kept, inverse = sampler.draw(chunk.segments.sum(scores), self._rows_per_group(part))
        else:
            kept, inverse = sampler.draw(scores)
        total = float(scores.sum())
        if len(kept) == 0:
            return total
        if not whole_groups:
            self._pieces.setdefault(chunk.long, []).append((block[kept], kept + first, inverse))
            self._long_group[chunk.long] = chunk.groups
            return total
        sizes = chunk.segments.sizes[kept]
        starts = np.cumsum(sizes) - sizes
        inside = np.arange(sizes.sum()) - np.repeat(starts - chunk.segments.starts[kept], sizes)
        assert isinstance(chunk.groups, slice)
        self._short.append(
            (block[inside], inside + first, np.repeat(inverse, sizes), sizes, kept + chunk.groups.start)
        )
        return total

    def chunks(self) -> list[Chunk]:
        """Return the sample: one chunk for all whole groups, one for each long group."""
        out = []
        if self._short:
            blocks, rows, inverse, sizes, groups = zip(*self._short, strict=True)
            lengths = np.concatenate(sizes)
            segments = Segments(np.cumsum(lengths) - lengths, int(lengths.sum()))
            index = np.concatenate(rows)
            out.append(
                Chunk(
                    index,
                    index,
                    segments,
                    np.concatenate(groups),
                    -1,
                    _stack(blocks),
                    np.concatenate(inverse),
                )
            )
        for long, pieces in self._pieces.items():
            blocks, rows, inverse = zip(*pieces, strict=True)
            index = np.concatenate(rows)
            segments = Segments(np.zeros(1, dtype=np.intp), len(index))
            out.append(
                Chunk(
                    index,
                    index,
                    segments,
                    self._long_group[long],
                    long,
                    _stack(blocks),
                    np.concatenate(inverse),
                )
            )
        return out


def _scores(
    sampler: RowSampler,
    part: Part,
    chunk: Chunk,
    block: Any,
    z: Array,
    state: list[Array],
    centre: Array | None,
) -> Array:
    """Return each row's curvature weight times its approximate leverage."""
    b, w, _ = part.targets(chunk)
    terms, weights = part.loss.gram_terms(z, b, w, state)
    penalty = part.row_penalties(chunk)
    if sampler.leverage is not None and sampler.has_leverage and terms[0].r is None:
        leverage = sampler.leverage[chunk.rows]
        scores = part.loss.importance(z, b, w, state) * leverage
        return scores if penalty is None else scores + penalty * leverage
    probe = block @ sampler.sketch
    if centre is not None:
        middle = np.broadcast_to(centre @ sampler.sketch, probe.shape)
    elif weights is not None:
        sums = np.add.reduceat(weights[:, None] * probe, chunk.segments.starts, axis=0)
        middle = np.repeat(sums, chunk.segments.sizes, axis=0)
    scores = np.zeros(len(z))
    for t, r, q in terms:
        rows = probe if r is None else r[:, None] * probe
        if q is not None:
            rows = rows - (q[:, None] if isinstance(q, np.ndarray) else q) * middle
        leverage = np.einsum("ij,ij->i", rows, rows)
        weight = np.abs(t) if len(terms) > 1 else part.loss.importance(z, b, w, state)
        scores += weight * leverage
    if sampler.leverage is not None:
        sampler.leverage[chunk.rows] = leverage
    if penalty is not None:
        scores += penalty * np.einsum("ij,ij->i", probe, probe)
    return scores


def _stack(blocks: Any) -> Any:
    return sparse.vstack(blocks, format="csr") if sparse.issparse(blocks[0]) else np.concatenate(blocks)

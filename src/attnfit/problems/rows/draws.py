"""Rows drawn during a read, by curvature and leverage."""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy import sparse

from attnfit.losses.segments import Array, Index, Segments
from attnfit.problems.rows.partition import Chunk
from attnfit.problems.rows.stored import StoredProblem
from attnfit.sketching import RowSampler


class Draws:
    """Rows kept by a sampler, gathered into chunks that the second-order formulas read like any other."""

    def __init__(self) -> None:
        self._short: list[tuple[Any, Index, Array, Index, Index]] = []
        self._pieces: dict[int, list[tuple[Any, Index, Array]]] = {}
        self._long_group: dict[int, Any] = {}

    def visit(
        self,
        sampler: RowSampler,
        problem: StoredProblem,
        chunk: Chunk,
        block: Any,
        z: Array,
        state: list[Array],
        centre: Array | None,
    ) -> float:
        """Offer the rows of a chunk to the sampler; return the sum of their scores."""
        assert isinstance(chunk.rows, slice)
        scores = _scores(sampler, problem, chunk, block, z, state, centre)
        first = chunk.rows.start
        whole_groups = problem.loss.coupled and chunk.long < 0
        if whole_groups:
            kept, inverse = sampler.draw(chunk.segments.sum(scores), problem.rows_per_short_group)
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
    problem: StoredProblem,
    chunk: Chunk,
    block: Any,
    z: Array,
    state: list[Array],
    centre: Array | None,
) -> Array:
    """Return each row's curvature weight times its approximate leverage."""
    b, w, _ = problem.targets(chunk)
    terms, weights = problem.loss.gram_terms(z, b, w, state)
    penalty = problem.row_penalties(chunk)
    if sampler.leverage is not None and sampler.has_leverage and terms[0].r is None:
        leverage = sampler.leverage[chunk.rows]
        scores = problem.loss.importance(z, b, w, state) * leverage
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
        weight = np.abs(t) if len(terms) > 1 else problem.loss.importance(z, b, w, state)
        scores += weight * leverage
    if sampler.leverage is not None:
        sampler.leverage[chunk.rows] = leverage
    if penalty is not None:
        scores += penalty * np.einsum("ij,ij->i", probe, probe)
    return scores


def _stack(blocks: Any) -> Any:
    return sparse.vstack(blocks, format="csr") if sparse.issparse(blocks[0]) else np.concatenate(blocks)

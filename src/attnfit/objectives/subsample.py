"""A small problem that stands for a large one: rows drawn with known probabilities."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import reduce as fold
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from attnfit.data.inputs import require_finite_rows
from attnfit.data.matrix import DenseDesign
from attnfit.losses.loss import Loss
from attnfit.objectives.convexity import has_weight, surrogate_targets
from attnfit.objectives.part import Part, merged, target_pieces, target_sums
from attnfit.objectives.rows import RowProblem
from attnfit.segments import Array, Chunk, Index, Segments


@dataclass(frozen=True)
class Draw:
    """Rows kept, group by group, and what is known of each.

    Attributes
    ----------
    rows : ndarray of int
        Their places in the part of the data they were drawn from.
    block : ndarray or csr_array, shape (n_kept, d)
    b, weights, offset, penalty : ndarray, shape (n_kept,)
        Of these rows; the last three may be None.
    inclusion : ndarray
        The probability with which each was kept.
    in_long_group : ndarray of bool
        Whether rows of its group were drawn one by one.
    labels, sizes : ndarray of int
        Label and size of each row's group.
    compiled : bool
        Whether they were drawn from rows that compiled loops read, which then serve these as well.
    """

    rows: Index
    block: Any
    b: Array
    weights: Array | None
    offset: Array | None
    penalty: Array | None
    inclusion: Array
    in_long_group: NDArray[np.bool_]
    labels: Index
    sizes: Index
    compiled: bool

    def merge(self, other: Draw) -> Draw:
        """Return the rows of both."""
        joined: dict[str, Any] = {k: _joined(v, getattr(other, k)) for k, v in self._by_row().items()}
        return replace(self, **joined)

    def in_order(self, order: Index) -> Draw:
        """Return the rows in another order."""
        ordered: dict[str, Any] = {k: None if v is None else v[order] for k, v in self._by_row().items()}
        return replace(self, **ordered)

    def _by_row(self) -> dict[str, Any]:
        """Return what has an entry for each row, by name."""
        return {name: v for name, v in vars(self).items() if name != "compiled"}

    def problem(self, loss: Loss, ridge: float | Array) -> RowProblem:
        """Return the problem on these rows, unbiased in every sum up to a constant."""
        b, pi = self.b, self.inclusion
        w = np.ones(len(b)) if self.weights is None else self.weights
        offset = np.zeros(len(b)) if self.offset is None else self.offset
        if loss.coupled:
            thinned = loss.subsample(b, w, pi)
            long_b, long_w = (b, w) if thinned is None else thinned
            b, w = np.where(self.in_long_group, long_b, b), np.where(self.in_long_group, long_w, w / pi)
            offset = offset - np.where(self.in_long_group, np.log(pi), 0.0)
        else:
            w = w / pi
        dense = isinstance(self.block, np.ndarray)
        problem: RowProblem = RowProblem(
            DenseDesign(self.block, compiled=self.compiled) if dense else self.block,
            b,
            loss=loss,
            groups=self.labels if loss.coupled else None,
            weights=w,
            offset=offset,
            row_penalty=0.0 if self.penalty is None else np.sqrt(self.penalty / pi),
            ridge=ridge,
        )
        return problem

    def convex_surrogate(self, loss: Loss, ridge: float | Array) -> RowProblem | None:
        """Return the convex surrogate of the problem on these rows."""
        starts = np.concatenate([[0], np.flatnonzero(np.diff(self.labels)) + 1])
        segments = Segments(starts, len(self.labels))
        found = surrogate_targets(loss, self.b, self.weights, segments, self.sizes, 1.0 / self.inclusion)
        if found is None or not has_weight(found[2]):
            return None
        convex, b, w = found
        return replace(self, b=b, weights=w).problem(convex, ridge)


def draw_rows(part: Any, n_rows: int, rng: np.random.Generator) -> Draw | None:
    """Draw about ``n_rows`` rows; None where the loss has no form on a part of a long group, or no row drawn
    has a weight.

    Whole groups are drawn uniformly. Rows of a group larger than ``n_rows / 4`` are drawn with probabilities
    proportional to the target, its square and uniform in equal parts; a kept row's logit gets the offset
    ``-log(probability)``, so that the group's normaliser stays the same in expectation.
    """
    loss, share, limit = part.loss, min(1.0, n_rows / part.n_rows), n_rows / 4
    known = part.target_totals() if loss.coupled else {}
    whole, largest = [], part.largest_group if loss.coupled else 0
    for number, (size, *_) in known.items():
        largest = max(largest, size)
        if size <= limit:
            whole.append(number)
    one = np.ones(1)
    if share < 1.0 and largest > limit and loss.subsample(one, one, one) is None:
        return None
    kept = _choose(np.array(whole, dtype=np.intp), share, rng)
    # What is drawn is all wanted here: it need not pass through other places.
    drawn: Draw = fold(merged, part.collect(_draw, share, limit, known, kept, part.share_out(rng)))
    if not (np.diff(drawn.labels) >= 0).all():
        # Rows of one group next to each other.
        drawn = drawn.in_order(np.argsort(drawn.labels, kind="stable"))
    return None if drawn.weights is not None and not drawn.weights.any() else drawn


def _draw(
    part: Part,
    chunks: list[Chunk],
    share: float,
    limit: float,
    known: dict[int, Array],
    kept_groups: tuple[Index, float],
    rng: np.random.Generator,
) -> Draw:
    """Draw from one part of the data; ``known`` holds size and sums of the targets of its long groups, of
    which some are kept whole.
    """
    n, coupled = part.n_rows, part.loss.coupled
    starts = part.groups.starts if coupled else np.zeros(1, dtype=np.intp)
    sizes = np.diff(starts, append=n)
    totals = sizes.copy()
    number_of = dict(zip(part.long_groups.tolist(), part.long_numbers.tolist(), strict=True))
    for g, number in number_of.items():
        totals[g] = int(known[number][0])
    is_long = (totals > limit) if coupled else np.ones(1, dtype=bool)
    rows: list[Index] = [np.zeros(0, dtype=np.intp)]
    inclusion: list[Array] = [np.zeros(0)]
    local = np.ones(len(starts), dtype=bool)
    local[list(number_of)] = False
    short = np.flatnonzero(~is_long & local)
    if len(short):
        chosen, chance = _choose(short, share, rng)
        rows.append(_rows_of(chosen, starts, sizes))
        inclusion.append(np.full(len(rows[-1]), chance))
    # Short groups whose rows are in several places are kept in all of them or in none.
    wanted, chance = set(kept_groups[0].tolist()), kept_groups[1]
    shared = [g for g, number in number_of.items() if not is_long[g] and number in wanted]
    if shared:
        rows.append(_rows_of(np.array(shared), starts, sizes))
        inclusion.append(np.full(len(rows[-1]), chance))
    for g in np.flatnonzero(is_long):
        first, last = int(starts[g]), int(starts[g] + sizes[g])
        sums = known[number_of[g]] if g in number_of else target_sums(part, first, last)
        # Two certain rows keep the group alive whatever the draw.
        certain = np.arange(first, min(first + 2, last))
        rows.append(certain)
        inclusion.append(np.ones(len(certain)))
        for kept, chances in _draw_pieces(part, first, last, sums, share, rng):
            rows.append(kept[kept >= first + 2])
            inclusion.append(chances[kept >= first + 2])
    index, pi = np.concatenate(rows), np.concatenate(inclusion)
    ascending = np.argsort(index, kind="stable")
    index, pi = index[ascending], pi[ascending]
    group = np.searchsorted(starts, index, side="right") - 1
    order = part.groups.order
    at = index if order is None else order[index]
    block = part.design.block(at)
    require_finite_rows(block, at, "A", part.design.locate)
    weights, offset, penalty = (
        None if v is None else v[index] for v in (part.weights, part.offset, part.penalty)
    )
    labels = part.group_labels[group]
    return Draw(
        index,
        block,
        part.b[index],
        weights,
        offset,
        penalty,
        pi,
        is_long[group],
        labels,
        totals[group],
        compiled=part.design.storage is not None,
    )


def _choose(groups: Index, share: float, rng: np.random.Generator) -> tuple[Index, float]:
    """Return a share of the groups, at least one, in increasing order, and the probability of each."""
    if not len(groups):
        return groups, 1.0
    count = min(len(groups), max(1, round(len(groups) * share)))
    return np.sort(rng.choice(groups, count, replace=False)), count / len(groups)


def _rows_of(groups: Index, starts: Index, sizes: Index) -> Index:
    """Return the rows of whole groups."""
    lengths = sizes[groups]
    offsets = np.cumsum(lengths) - lengths
    return np.asarray(np.arange(lengths.sum()) + np.repeat(starts[groups] - offsets, lengths))


def _draw_pieces(
    part: Part, first: int, last: int, sums: Array, share: float, rng: np.random.Generator
) -> Iterator[tuple[Index, Array]]:
    """Draw rows of a long group one by one; yield them and their inclusion probabilities."""
    size, *totals = sums
    if not part.loss.has_target:
        # Where probabilities differ their offsets would enter the loss itself.
        totals = [0.0, 0.0]
    for start, target in target_pieces(part, first, last):
        mass = np.ones(len(target))
        for values, total in zip((target, target * target), totals, strict=True):
            mass += values * (size / total) if total > 0 else 1.0
        probability = np.minimum(1.0, share / 3.0 * mass) if share < 1.0 else np.ones(len(target))
        hit = np.flatnonzero(rng.random(len(probability)) < probability)
        yield hit + start, probability[hit]


def _joined(one: Any, other: Any) -> Any:
    if one is None or other is None:
        return None
    return sparse.vstack([one, other], format="csr") if sparse.issparse(one) else np.concatenate([one, other])

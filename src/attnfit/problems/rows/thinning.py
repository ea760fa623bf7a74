"""A small problem that stands for a large one: rows drawn with known probabilities."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attnfit.losses.segments import Array, Index
from attnfit.problems.inputs import require_finite_rows
from attnfit.problems.rows.grouped import GroupedProblem


@dataclass(frozen=True)
class Draw:
    """Rows kept, increasing and in group order, and the probability with which each was kept."""

    rows: Index
    inclusion: Array
    in_long_group: NDArray[np.bool_]

    def fetch(self, problem: GroupedProblem) -> Any:
        """Return the rows themselves, shape (n_kept, d)."""
        order = problem.groups.order
        at = self.rows if order is None else order[self.rows]
        block = problem.design.block(at)
        require_finite_rows(block, at, "A")
        return block

    def restrict(self, problem: GroupedProblem, block: Any) -> GroupedProblem:
        """Return the problem on these rows, which `fetch` returned, unbiased in every sum."""
        loss, pi = problem.loss, self.inclusion
        ids = np.searchsorted(problem.groups.starts, self.rows, side="right") - 1
        b = problem.b[self.rows]
        w = np.ones(len(b)) if problem.weights is None else problem.weights[self.rows]
        offset = np.zeros(len(b)) if problem.offset is None else problem.offset[self.rows]
        penalty = 0.0 if problem.penalty is None else np.sqrt(problem.penalty[self.rows] / pi)
        if loss.coupled:
            thinned = loss.thin(b, w, pi)
            long_b, long_w = (b, w) if thinned is None else thinned
            b, w = np.where(self.in_long_group, long_b, b), np.where(self.in_long_group, long_w, w / pi)
            offset = offset - np.where(self.in_long_group, np.log(pi), 0.0)
        else:
            w = w / pi
        return GroupedProblem(
            block,
            b,
            loss=loss,
            groups=ids if loss.coupled else None,
            weights=w,
            offset=offset,
            row_penalty=penalty,
            ridge=problem.ridge,
        )


def draw_rows(problem: GroupedProblem, n_rows: int, rng: np.random.Generator) -> Draw | None:
    """Draw about ``n_rows`` rows; None where the loss has no form on a part of a long group.

    Whole groups are drawn uniformly. Rows of a group larger than ``n_rows / 4`` are drawn with probabilities
    proportional to the target and uniform in equal parts; a kept row's logit gets the offset
    ``-log(probability)``, so that the group's normaliser stays the same in expectation.
    """
    loss, n = problem.loss, problem.n_rows
    starts = problem.groups.starts if loss.coupled else np.zeros(1, dtype=np.intp)
    sizes = np.diff(starts, append=n)
    is_long = sizes > n_rows / 4 if loss.coupled else np.ones(1, dtype=bool)
    unit = np.ones(1)
    if loss.coupled and is_long.any() and loss.thin(unit, unit, unit) is None:
        return None
    rows, inclusion = _draw(problem, starts, sizes, is_long, n_rows / n, rng)
    return Draw(rows, inclusion, is_long[np.searchsorted(starts, rows, side="right") - 1])


def _draw(
    problem: GroupedProblem, starts: Index, sizes: Index, is_long: Any, share: float, rng: np.random.Generator
) -> tuple[Index, Array]:
    """Return the kept rows, increasing, and their inclusion probabilities."""
    rows: list[Index] = []
    inclusion: list[Array] = []
    short = np.flatnonzero(~is_long)
    if len(short):
        count = max(1, round(len(short) * share))
        kept = np.sort(rng.choice(short, count, replace=False))
        offsets = np.cumsum(sizes[kept]) - sizes[kept]
        rows.append(np.arange(sizes[kept].sum()) + np.repeat(starts[kept] - offsets, sizes[kept]))
        inclusion.append(np.full(len(rows[0]), count / len(short)))
    for g in np.flatnonzero(is_long):
        inside = slice(starts[g], starts[g] + sizes[g])
        target = np.abs(problem.b[inside])
        if problem.weights is not None:
            target = target * problem.weights[inside]
        mass = np.ones(sizes[g])
        for size in (target, target * target):
            total = float(size.sum())
            mass += size * (sizes[g] / total) if total > 0 else 1.0
        probability = np.minimum(1.0, share / 3.0 * mass)
        hit = rng.random(len(probability)) < probability
        # Two certain rows keep the group alive whatever the draw.
        probability[:2], hit[:2] = 1.0, True
        rows.append(np.flatnonzero(hit) + starts[g])
        inclusion.append(probability[hit])
    index, pi = np.concatenate(rows), np.concatenate(inclusion)
    ascending = np.argsort(index, kind="stable")
    return index[ascending], pi[ascending]

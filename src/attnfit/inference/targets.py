"""What targets, weights and offsets say by themselves: whether they are choices, the fit without features."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.special import gammaln, xlogy

from attnfit.objectives.part import Part
from attnfit.segments import Array, Chunk, Segments

# A count that went through a division misses an integer by about this share.
ROUNDING = 1e-9

# What is summed over the rows of each group.
COLUMNS = ("ones", "nonzero", "mass", "size", "weight", "cross", "own", "negative")


@dataclass
class Groups:
    """Sums over the rows of groups, shape (n_groups, 8), and what does not add up, shape (n_groups, 3): the
    logarithm of the sum of ``exp(offset)``, the largest weight and the smallest with the other sign.
    """

    sums: Array
    others: Array

    @classmethod
    def of(cls, y: Array, w: Array, z: Array, log_copies: Array | float, segments: Segments) -> Groups:
        """Add up whole groups; z is the offset of each row, which counts ``exp(log_copies)`` times in the
        normaliser.
        """
        own = xlogy(np.maximum(w * y, 0.0), np.maximum(y, 0.0))
        rows = (y == 1.0, y != 0.0, w * y, np.ones_like(y), w, w * y * z, own, y < 0.0)
        z = z + log_copies
        top = segments.max(z)
        log_sum = top + np.log(segments.sum(np.exp(z - segments.spread(top))))
        sums = np.column_stack([segments.sum(np.asarray(row, dtype=np.float64)) for row in rows])
        return cls(sums, np.column_stack([log_sum, segments.max(w), segments.max(-w)]))

    @classmethod
    def none(cls, n: int) -> Groups:
        """Return sums over no rows."""
        return cls(np.zeros((n, len(COLUMNS))), np.full((n, 3), -np.inf))

    def add(self, number: int, piece: Groups) -> None:
        """Add some rows of a group."""
        mine = slice(number, number + 1)
        both = Groups(self.sums[mine], self.others[mine]).merge(piece)
        self.sums[mine], self.others[mine] = both.sums, both.others

    def merge(self, other: Groups) -> Groups:
        """Return the sums over the rows of both."""
        log_sum = np.logaddexp(self.others[:, 0], other.others[:, 0])
        rest = np.maximum(self.others[:, 1:], other.others[:, 1:])
        return Groups(self.sums + other.sums, np.column_stack([log_sum, rest]))

    def totals(self) -> dict[str, Any]:
        """Return what all groups add up to."""
        ones, nonzero, mass, size, weight, cross, own, _ = self.sums.T
        log_sum, high, low = self.others.T
        counted, binary = nonzero > 0, ones == nonzero
        mean = weight / np.maximum(size, 1.0)
        return {
            "n_groups": np.count_nonzero(counted),
            "n_all_groups": float(len(size)),
            "n_copies": float(mean[counted].sum()),
            "n_all_copies": float(mean.sum()),
            "n_rows": float(size[counted].sum()),
            "n_row_copies": float(weight[counted].sum()),
            "n_not_choices": np.count_nonzero(counted & ~(binary & (ones == 1))),
            "n_several": np.count_nonzero(counted & binary & (ones > 1)),
            "n_not_binary": np.count_nonzero(counted & ~binary),
            "n_uneven": np.count_nonzero(high != -low),
            "mass": float(mass.sum()),
            "weight": float(weight.sum()),
            "null": float((cross - mass * log_sum)[counted].sum()),
            "own": float(own.sum()),
        }


def target_sum(part: Part, chunks: list[Chunk], counts: Array | None) -> tuple[dict[str, float], Groups]:
    """Return sums over short groups, or over rows where there are none, and the sums of each long group;
    reads targets, weights and offsets only.
    """
    totals: dict[str, float] = {}
    long = Groups.none(part.n_long)
    log_copies: Any = 0.0
    for chunk in chunks:
        b, w, _ = part.targets(chunk)
        z = np.zeros(len(b)) + part.shift(chunk)
        w = np.zeros(len(b)) + (w if counts is None else counts[chunk.index])
        if counts is not None:
            # The problem has the sum over copies, and their number in the offset.
            log_copies = np.log(w)
            b, z = b / w, z - log_copies
        found = _of_rows(b, w, z, coupled=part.loss.coupled)
        if part.loss.coupled:
            groups = Groups.of(b, w, z, log_copies, chunk.segments)
            if chunk.long >= 0:
                long.add(chunk.long, groups)
            else:
                found |= groups.totals()
        for name, value in found.items():
            totals[name] = totals.get(name, 0.0) + float(value)
    return totals, long


def _of_rows(y: Array, w: Array, z: Array, *, coupled: bool) -> dict[str, Any]:
    """Return sums over rows: checks of numbers, and what models without a normaliser need."""
    total = w * y
    found = {
        "n_fractional_weights": np.count_nonzero(w != np.round(w)),
        "n_fractional": np.count_nonzero(
            np.abs(total - np.round(total)) > ROUNDING * np.maximum(np.abs(total), 1.0)
        ),
        "n_fractional_y": np.count_nonzero(y != np.round(y)),
        "n_weighted": np.count_nonzero(w != 1.0),
        "rows": len(y),
        "rows_weighted": np.count_nonzero(w > 0.0),
        "w": w.sum(),
    }
    if coupled:
        return found
    with np.errstate(over="ignore"):
        exposure = np.exp(z)
    positive = np.maximum(y, 0.0)
    return found | {
        "wy": total.sum(),
        "wyy": (total * y).sum(),
        "wyo": np.where(y != 0.0, total * z, 0.0).sum(),
        "wo": (w * exposure).sum(),
        "gamma": (w * gammaln(positive + 1.0)).sum(),
        "ylogy": xlogy(w * positive, positive).sum(),
    }


@dataclass(frozen=True)
class TargetFacts:
    """What targets and weights say, by name; see `target_sum`."""

    totals: dict[str, float]

    def __getitem__(self, name: str) -> float:
        return self.totals.get(name, 0.0)

    @property
    def weighted(self) -> bool:
        """Whether some weight differs from one."""
        return self["n_weighted"] > 0

    @property
    def choices(self) -> bool:
        """Whether each group that takes part holds exactly one 1, and zeros."""
        return self["n_not_choices"] == 0 and self["n_groups"] > 0


def target_facts(problem: Any, counts: Array | None) -> TargetFacts:
    """Return what targets and weights say; the features are not read."""
    totals, long = problem.rows.reduce(target_sum, counts)
    if len(long.sums):
        for name, value in long.totals().items():
            totals[name] = totals.get(name, 0.0) + value
    return TargetFacts(totals)

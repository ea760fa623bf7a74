"""A fitted model as inference sees it: data, point, units; what it reads is read once and kept."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attnfit.inference.bread import Bread, bread_of
from attnfit.inference.covariance import FEW, KINDS, Covariance, sandwich, small_sample_factor
from attnfit.inference.scores import evaluated, has_row_scores
from attnfit.inference.sweep import LongFacts, Sums, Wanted, sweep
from attnfit.inference.targets import TargetFacts, target_facts
from attnfit.inference.units import Labels, labels_of, per_part, read_clusters, with_outside_goods
from attnfit.losses.elementwise import PoissonDeviance, SquaredExponential
from attnfit.losses.softmax import CrossEntropy
from attnfit.objectives.objective import Evaluation
from attnfit.segments import Array, Index


@dataclass(frozen=True)
class Draws:
    """Sums of outer products of scores of units.

    Attributes
    ----------
    meats : list of (sign, ndarray)
        Of one set of units, or of two and their pairs, which are subtracted.
    n_units : float
        Number of units; of two sets that of the smaller.
    nested : bool
        Whether no unit splits a group.
    """

    meats: list[tuple[float, Array]]
    n_units: float
    nested: bool
    score: Array

    def centred(self, counts: list[float]) -> list[tuple[float, Array]]:
        """Return the meats of scores less their mean."""
        outer = np.multiply.outer(self.score, self.score)
        return [(k, m - outer / n) for (k, m), n in zip(self.meats, counts, strict=True)]


class Fitted:
    """What a covariance, a test or an effect of a fit rests on.

    Parameters
    ----------
    problem : RowProblem
    x : ndarray, shape (d,)
        The fitted point: finite, with the fitted outputs also where some coefficients are not.
    finite : ndarray of bool, shape (d,)
        Which coefficients have a finite value.
    n_separated : int
        Rows whose outputs are zero at the fit, which take no part.
    determined : bool
        False where the fit tells nothing of any coefficient.
    counts : ndarray, optional
        How often each row of the design is repeated, where there are no groups.
    kept : ndarray of bool, optional
        Which of the user's rows are rows of the design.
    n_outside : int
        Outside goods: the last rows of the design.
    weight_type : {"sampling", "frequency"}
    clusters : optional
        Labels given to the fit.
    """

    def __init__(
        self,
        problem: Any,
        x: Array,
        *,
        finite: NDArray[np.bool_] | None = None,
        n_separated: int = 0,
        determined: bool = True,
        counts: Array | None = None,
        kept: NDArray[np.bool_] | None = None,
        n_outside: int = 0,
        weight_type: str = "sampling",
        clusters: Any = None,
    ) -> None:
        self.given, self.counts, self.kept, self.n_outside = problem, counts, kept, n_outside
        self.finite = np.ones(len(x), dtype=bool) if finite is None else finite
        self.n_separated, self.determined, self.weight_type = n_separated, determined, weight_type
        self.point = x
        self._known: dict[Any, Sums] = {}
        self.clusters = None if clusters is None else self.read_labels(clusters)

    @cached_property
    def _reduced(self) -> tuple[Any, Array, Array]:
        """Problem, point and units in which sums are taken: extreme columns have units of their own."""
        reduction = self.given.reduction()
        if reduction is None:
            return self.given, self.point, np.ones(len(self.point))
        unit = np.asarray(reduction.lift(np.ones(len(self.point))))
        return reduction.problem, np.asarray(reduction.restrict(self.point)), unit

    @property
    def problem(self) -> Any:
        """The problem whose rows are summed up."""
        return self._reduced[0]

    @property
    def x(self) -> Array:
        """The point in the unknowns of `problem`, shape (d,)."""
        return self._reduced[1]

    @property
    def unit(self) -> Array:
        """By what these unknowns are multiplied to give the user's, shape (d,)."""
        return self._reduced[2]

    # ---- what is read

    @cached_property
    def facts(self) -> TargetFacts:
        """What the targets say."""
        return target_facts(self.given, self.counts)

    @cached_property
    def at(self) -> Evaluation:
        """The fitted point, evaluated where groups are longer than a block; else without a read."""
        return evaluated(self.problem, self.x)

    def read_labels(self, clusters: Any) -> Labels:
        """Return the units of the rows of the design."""
        problem = self.given
        n = len(self.kept) if self.kept is not None else problem.n_rows - self.n_outside
        sets = read_clusters(clusters, n)
        if self.kept is not None:
            sets = [of_row[self.kept] for of_row in sets]
        if self.n_outside:
            sets = [with_outside_goods(of_row, problem.groups, self.n_outside) for of_row in sets]
        return labels_of(sets)

    def sums(self, wanted: Wanted, labels: Labels | None) -> Sums:
        """Return a sweep's sums."""
        numbers: tuple[Index, ...] = () if labels is None else labels.numbers
        with np.errstate(over="ignore", invalid="ignore", divide="ignore", under="ignore"):
            found: Sums = self.problem.rows.reduce(
                sweep, self.at, wanted, per_part(self.problem, numbers), self.counts
            )
        return found

    @property
    def by_row(self) -> bool:
        """Whether rows are the units of a robust covariance."""
        return not self.problem.loss.coupled or self.problem.n_groups < 2

    def usual(self) -> Sums:
        """Return the sums that the fit's own covariance and statistics need, read once."""
        return self._sums("usual", self.clusters)

    def _sums(self, kind: str, labels: Labels | None) -> Sums:
        key = (kind, *(() if labels is None else (hash(of_row.tobytes()) for of_row in labels.numbers)))
        if key not in self._known:
            self._known[key] = self.sums(self._wanted(kind, labels), labels)
        return self._known[key]

    def _wanted(self, kind: str, labels: Labels | None) -> Wanted:
        loss = self.problem.loss
        return Wanted(
            by_group=not self.by_row,
            by_row=(self.by_row or kind == "row") and has_row_scores(loss),
            n_units=() if labels is None else labels.n_units,
            frequency=self.weight_type == "frequency",
            jacobian=isinstance(loss, SquaredExponential),
        )

    # ---- the information

    @cached_property
    def bread(self) -> Bread:
        """The bread, in the units of the reduced problem."""
        sums = self.usual()
        d = len(self.x)
        penalty = np.zeros((d, d)) if sums.penalty is None else sums.penalty.result()
        penalty[np.diag_indices(d)] += self.problem.ridge
        return bread_of(sums.information.result(), penalty, sums.sizes)

    @property
    def n_effects(self) -> int:
        """Parameters besides the coefficients: of absorbed effects."""
        return 0

    @property
    def penalised(self) -> bool:
        """Whether a penalty moves the fit."""
        return self.problem.penalty is not None or bool(np.any(self.problem.ridge))

    # ---- covariances

    def auto_kind(self) -> tuple[str, str]:
        """Return the kind that the data call for when none is asked for, clusters aside, and why."""
        if not (isinstance(self.given.loss, CrossEntropy) and self.facts.choices):
            likelihood = isinstance(self.given.loss, CrossEntropy)
            return "robust", "targets are not one choice a group" if likelihood else "not a choice model"
        if self.facts.weighted and self.weight_type == "sampling":
            return "robust", "weights are sampling weights"
        return "classic", "every group holds one choice"

    def covariance(
        self, kind: str = "auto", clusters: Any = None, correction: Any = True, *, posterior: bool = True
    ) -> Covariance:
        """Return the covariance; see `attnfit.estimators.SoftmaxRegressor.covariance`."""
        if kind not in KINDS:
            raise ValueError(f"kind must be one of {', '.join(map(repr, KINDS))}, not {kind!r}")
        if clusters is not None and kind not in ("auto", "cluster"):
            raise ValueError(f"clusters go with kind='cluster', not with kind={kind!r}")
        labels = self.clusters if clusters is None else self.read_labels(clusters)
        if kind == "auto":
            kind, reason = ("cluster", "clusters are given") if labels is not None else self.auto_kind()
            return replace(self._covariance_of(kind, labels, correction, posterior=posterior), reason=reason)
        return self._covariance_of(kind, labels, correction, posterior=posterior)

    def _covariance_of(
        self, kind: str, labels: Labels | None, correction: Any, *, posterior: bool
    ) -> Covariance:
        if kind == "cluster" and labels is None:
            raise ValueError("kind='cluster' needs clusters: one label a row, here or in fit")
        self._check(kind)
        if not self.determined:
            return self._unknown(kind, "no coefficient has a finite value")
        if kind == "classic":
            return self._classic(correction, posterior=posterior)
        return self._sandwich(kind, labels if kind == "cluster" else None, correction)

    def _check(self, kind: str) -> None:
        facts, loss = self.facts, self.problem.loss
        if self.weight_type == "frequency" and facts.weighted:
            if facts["n_fractional_weights"]:
                raise ValueError(
                    "weight_type='frequency' takes weights that are whole numbers of copies; weights of "
                    f"{int(facts['n_fractional_weights'])} rows are not: use weight_type='sampling'"
                )
            if loss.coupled and self.counts is None and facts["n_uneven"]:
                raise ValueError(
                    "weight_type='frequency' counts copies of groups, but the weights of rows differ within "
                    f"{int(facts['n_uneven'])} groups: give all rows of a group one weight"
                )
        if kind == "row" and not has_row_scores(loss):
            raise ValueError(
                f"kind='row' has no meaning for {type(loss).__name__}: rows have no noise of their own; use "
                "kind='robust', one score a group"
            )
        if kind != "classic":
            return
        if not isinstance(loss, CrossEntropy | PoissonDeviance | SquaredExponential):
            raise ValueError("y are shares, not choices: one market is not one draw; use robust")
        if facts.weighted and self.weight_type == "sampling":
            raise ValueError(
                "a classic covariance takes each row for one draw, which sampling weights are not; use "
                "kind='robust', or weight_type='frequency' if weights count copies"
            )
        if isinstance(loss, SquaredExponential):
            return
        if facts["n_fractional"] if self.weight_type == "frequency" else facts["n_fractional_y"]:
            what = "shares, not choices: one market is not one draw" if loss.coupled else "no counts"
            raise ValueError(f"y are {what}; use robust")

    def _classic(self, correction: Any, *, posterior: bool) -> Covariance:
        bread, loss, facts = self.bread, self.problem.loss, self.facts
        matrix = bread.inverse
        n = facts["w"] if self.weight_type == "frequency" else facts["rows"] - self.n_separated
        unit = "inverse observed information"
        n_units = facts["mass"] if loss.coupled else n
        if isinstance(loss, SquaredExponential):
            sums = self.usual()
            inner = bread_of(sums.jacobian.result(), np.zeros_like(matrix), sums.sizes).inverse
            matrix = sums.totals["brier"] / max(n - bread.rank - self.n_effects, 1.0) * inner
            unit = "residual variance times inverse (J^T J)"
        elif self.penalised and not posterior:
            matrix = bread.inverse @ bread.information @ bread.inverse
            unit = "sampling variance of the penalised estimate"
        elif self.penalised:
            unit = "posterior under the prior that the penalty stands for"
        factor = 1.0
        if isinstance(correction, str) or not isinstance(correction, bool | np.bool_):
            n_groups = self.problem.n_groups if loss.coupled else 0
            factor = small_sample_factor(
                correction, "classic", n_units, n, bread.rank + self.n_effects, n_groups, nested=True
            )
        return self._covariance(factor * matrix, "classic", unit, n_units, np.inf, factor, [])

    def _sandwich(self, kind: str, labels: Labels | None, correction: Any) -> Covariance:
        row = kind == "row" or (kind == "robust" and self.by_row)
        if row and not has_row_scores(self.problem.loss):
            return self._unknown(kind, "one group is one draw: no sampling error can be estimated")
        draws, counts = self._draws("row" if row else kind, labels)
        unit = "row" if row else "group" if kind == "robust" else "cluster"
        unit = "cluster, two-way" if len(counts) > 1 else unit
        bread, facts = self.bread, self.facts
        if draws.n_units < 2:
            return self._unknown(kind, f"one {unit}: no sampling error can be estimated", unit)
        frequency = self.weight_type == "frequency"
        coupled = self.problem.loss.coupled
        n = (
            facts["n_row_copies" if frequency else "n_rows"]
            if coupled
            else facts["w" if frequency else "rows"]
        )
        factor = small_sample_factor(
            correction,
            "row" if row and not self.by_row else kind if not row or coupled else "row",
            draws.n_units,
            n - self.n_separated,
            len(self.x) + self.n_effects,
            self.problem.n_groups if coupled and not (row and self.by_row) else 0,
            nested=draws.nested,
        )
        meats = draws.centred(counts) if self.penalised else draws.meats
        raw, truncated = sandwich(bread.inverse, meats)
        notes = []
        if truncated:
            notes.append("negative eigenvalues of the two-way covariance were set to zero")
        if draws.n_units <= bread.rank:
            notes.append(f"fewer {unit}s than coefficients: at most {draws.n_units - 1:g} joint restrictions")
        if draws.n_units < FEW:
            notes.append(f"{draws.n_units:g} units: below {FEW} intervals cover less than they say")
        return self._covariance(factor * raw, kind, unit, draws.n_units, draws.n_units - 1.0, factor, notes)

    def _draws(self, kind: str, labels: Labels | None) -> tuple[Draws, list[float]]:
        """Return the meats and the numbers of units behind each."""
        frequency, facts = self.weight_type == "frequency", self.facts
        coupled = self.problem.loss.coupled
        if kind == "cluster":
            assert labels is not None
            sums = self._sums("usual", labels)
            if not has_row_scores(self.problem.loss):
                self._require_whole_groups(sums)
            meats = [t.T @ t for t in sums.unit_scores.values()]
            counts = [float(np.count_nonzero(rows)) for rows in sums.unit_rows.values()]
            signs = (1.0,) if len(meats) == 1 else (1.0, 1.0, -1.0)
            found = [(s, np.asarray(m)) for s, m in zip(signs, meats, strict=True)]
            nested = all(_n_split(sums, k) == 0 for k in range(min(2, len(meats))))
            return Draws(found, min(counts[:2]), nested, sums.score), counts
        if kind == "row":
            sums = self._sums("usual" if self.by_row else "row", self.clusters)
            names = ("n_row_copies", "n_rows") if coupled else ("w", "rows_weighted")
            n = facts[names[0] if frequency else names[1]] - self.n_separated
            return Draws([(1.0, sums.by_row.result())], n, self.by_row, sums.score), [n]
        sums = self.usual()
        meat = sums.by_group.result()
        weights = np.ones(len(sums.long_scores))
        if frequency and len(weights):
            weights = sums.long_weights[:, 0] / sums.long_weights[:, 1]
        meat = meat + (sums.long_scores / np.where(weights > 0.0, weights, 1.0)[:, None]).T @ sums.long_scores
        every = not self.problem.loss.needs_mass
        names = ("n_all_copies", "n_all_groups") if every else ("n_copies", "n_groups")
        n = facts[names[0] if frequency else names[1]]
        return Draws([(1.0, meat)], n, True, sums.score), [n]

    def _require_whole_groups(self, sums: Sums) -> None:
        for k in sums.unit_scores:
            split = _n_split(sums, k)
            if split:
                raise ValueError(
                    f"clusters split {split} groups, whose rows have no scores of their own under "
                    f"{type(self.problem.loss).__name__}; give all rows of a group one label"
                )

    def _covariance(
        self, matrix: Array, kind: str, unit: str, n_units: float, df: float, factor: float, notes: list[str]
    ) -> Covariance:
        """Return the covariance in the user's units."""
        bread = self.bread
        matrix = matrix * self.unit * self.unit[:, None]
        both = self.finite & self.finite[:, None]
        known = self.finite & ~bread.is_open(np.eye(len(self.x)))
        return Covariance(
            np.where(both, matrix, np.nan), kind, unit, n_units, df, factor, known,
            bread.scale / self.unit, bread.null, tuple(notes),
        )  # fmt: skip

    def _unknown(self, kind: str, note: str, unit: str = "group") -> Covariance:
        d = len(self.x)
        return Covariance(
            np.full((d, d), np.nan), kind, unit, 1.0, np.inf, np.nan, np.zeros(d, dtype=bool), np.ones(d),
            np.zeros((d, 0)), (note,),
        )  # fmt: skip


def _n_split(sums: Sums, k: int) -> int:
    """Return how many groups the labels of a set split."""
    facts: LongFacts = sums.long_facts
    return int(sums.totals.get(f"split_{k}", 0.0)) + int(np.count_nonzero(facts.high[k] != facts.low[k]))

"""Where a fit begins: scales, starts and curvature metric from samples of the rows."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from attnfit.objectives.beginning import sample_sizes
from attnfit.objectives.first_order import value_at_zero
from attnfit.objectives.moves import Probe
from attnfit.objectives.objective import Evaluation, Problem
from attnfit.objectives.passes import target_squares
from attnfit.objectives.rows import RowProblem
from attnfit.objectives.subsample import draw_rows
from attnfit.solvers.curvature import MEDIUM, Exact, MatrixFree, natural_scale
from attnfit.solvers.loop import Descent, Interrupted, Tracker, descend, distance
from attnfit.solvers.verdicts import Judge

Array = NDArray[np.float64]

# A descent on a sample ends once the next step moves no logit by more than this.
SAMPLE_TOL = 1e-3
# Small problems that are not convex are descended into from this many points.
AUTO_STARTS, AUTO_ENTRIES, AUTO_UNKNOWNS = 10, 10_000, 16
# Sizes of the logits of Gaussian starts, in turn: with smaller ones distant minima are missed (measured).
LOGIT_SIZES = (1.0, 3.0, 10.0, 30.0)
# Where the sum of the outputs is not known: guesses of it besides one a row.
NORMALISERS = (0.3, 3.0, 0.1, 10.0, 0.03, 30.0, 100.0)
# Starts of large data of which no sample can be drawn: of 60 rescaled problems the lowest minimum was reached
# from the best two in all.
MOST_DESCENTS = 2
# One descent is enough from the logarithms of the target to an end whose loss is at most this share of that
# at zero, on data so many times longer than wide and in so many groups: so end 570 of 1,040 random problems,
# none of which has a lower minimum (20 to 30 starts each); of those that do, the lowest share is 0.82.
SETTLED, ROWS_AN_UNKNOWN, GROUPS = 0.5, 10, 5
# From this share of positive targets on their logarithms tell as much as the convex surrogate.
MOST = 0.95

LOGARITHMS = "logarithms"


@dataclass(frozen=True)
class Sample:
    """A small problem that stands for the full one, and its convex surrogate; the full problem itself where
    that is small.

    Attributes
    ----------
    share : float
        Its rows over those of the full problem.
    is_full : bool
        Whether it is the full problem itself.
    drawn_convex : RowProblem, optional
        The surrogate on rows that were drawn.
    """

    problem: Any
    share: float = 1.0
    is_full: bool = True
    drawn_convex: Any = None

    @property
    def convex(self) -> Any:
        """The convex surrogate, None where there is none; few fits of all rows need one."""
        if not self.is_full or self.problem.convex:
            return self.drawn_convex
        return self.problem.convex_surrogate()


def draw_sample(problem: RowProblem, n_rows: int, rng: np.random.Generator) -> Sample:
    """Return an importance-weighted sample of about ``n_rows`` rows of a problem and its convex surrogate."""
    small_enough = problem.n_rows <= n_rows and problem.rows.is_whole
    draw = None if small_enough else draw_rows(problem.rows, n_rows, rng)
    if draw is None:
        return Sample(problem)
    small = draw.problem(problem.loss, problem.ridge)
    convex = None if problem.convex else draw.convex_surrogate(problem.loss, problem.ridge)
    return Sample(small, small.n_rows / problem.n_rows, False, convex)


@dataclass(frozen=True)
class Start:
    """The samples from which a fit takes its scale, its starts and its first curvature."""

    full: Any
    pilot: Sample
    sample: Sample
    # Whether descents cost next to nothing.
    is_small: bool = False

    @classmethod
    def draw(cls, problem: Any, rng: np.random.Generator) -> Start:
        """Draw both samples; large problems whose rows can be drawn only."""
        if not problem.rows_can_be_drawn:
            itself = Sample(problem)
            return cls(problem, itself, itself)
        n, d = problem.n_rows, problem.n_unknowns
        is_small = bool(n * d <= AUTO_ENTRIES and d <= AUTO_UNKNOWNS)
        pilot_rows, n_rows = sample_sizes(n, d)
        sample = draw_sample(problem, n_rows, rng)
        larger, convex = sample.problem, sample.drawn_convex
        if sample.is_full or n_rows == pilot_rows or larger.n_rows <= pilot_rows:
            return cls(problem, sample, sample, is_small)
        draw = draw_rows(larger.rows, pilot_rows, rng)
        if draw is None:
            return cls(problem, sample, sample, is_small)
        # A sample of the sample: the same rows of both its problems.
        smaller = draw.problem(larger.loss, larger.ridge)
        if convex is not None:
            rows = draw.rows
            beside = replace(draw, b=convex.b[rows], weights=convex.weights[rows], offset=convex.offset[rows])
            convex = beside.problem(convex.loss, convex.ridge)
        share = sample.share * smaller.n_rows / larger.n_rows
        return cls(problem, Sample(smaller, share, False, convex), sample, is_small)

    @property
    def n_passes(self) -> float:
        """Reads of the full data that the work on both samples amounts to, beyond the fetch of their rows."""
        if self.sample.is_full:
            return 0.0
        total = 0.0
        for sample in (self.sample,) if self.pilot is self.sample else (self.sample, self.pilot):
            convex = sample.drawn_convex
            total += sample.share * (sample.problem.n_passes + (0.0 if convex is None else convex.n_passes))
        return float(total)

    def scale(self) -> Array:
        """Return the square root of each unknown's curvature at zero, shape (d,): the fit works in
        ``scale * x``.
        """
        problem = self.sample.problem
        return natural_scale(problem, problem.evaluate(np.zeros(problem.n_unknowns)))

    def points(
        self, tracker: Tracker, rng: np.random.Generator, n_starts: int | Literal["auto"] = "auto"
    ) -> dict[str, Array]:
        """Return the points to descend from, by name; the best first.

        A convex problem has one: weighted least squares on the logarithm of the target, or zero, polished on
        the larger sample where rows can be sampled. Otherwise the answer of the convex surrogate (cross
        entropy for losses of a softmax) joins where few targets have a logarithm, and zero; then Gaussian
        points of several sizes, up to ``n_starts``. Where rows can be sampled the descents begin on the
        pilot sample; ends in one minimum count once and are polished on the larger sample.
        """
        if self.full.convex:
            return self._convex(tracker, rng)
        problem = self.pilot.problem
        logs = problem.log_start() if problem.rows_can_be_drawn else None
        others: dict[str, Array] = problem.starts(rng)
        points: dict[str, Array] = {} if logs is None else {LOGARITHMS: logs.x}
        if logs is not None and problem.guesses_normaliser:
            for factor in NORMALISERS:
                other = problem.log_start(factor)
                if other is not None:
                    points[f"logarithms, {factor:g} x"] = other.x
        convex = self.pilot.convex if logs is None or logs.share < MOST else None
        if convex is not None:
            zero = np.zeros(convex.n_unknowns)
            points["convex"] = self.full.adopt(_on_sample(convex, zero, "convex surrogate", tracker).at.x)
        if not (self.full.zero_is_trivial and points):
            points |= others
        wanted = n_starts
        if wanted == "auto":
            wanted = AUTO_STARTS if self.sample.is_full and self.is_small else 1
        if problem.rows is not None and wanted > len(points):
            points |= self._gaussian(wanted - len(points), rng)
        if n_starts != "auto":
            points = dict(list(points.items())[:n_starts])
        if self.sample.is_full:
            # Each descent reads all the data.
            dear = n_starts == "auto" and self.full.rows_can_be_drawn and not self.is_small
            return _lowest(points, self.full) if dear and len(points) > MOST_DESCENTS else points
        ends = {}
        for name, x in points.items():
            ends[name] = _on_sample(self.pilot.problem, x, f"pilot: {name}", tracker)
        # Ends on the pilot sample stop at a thousandth of a logit: one minimum shows as two points apart.
        distinct = _distinct(ends, self.pilot.problem, 0.05)
        if self.sample is not self.pilot:
            ends = {}
            for name, end in distinct.items():
                ends[name] = _on_sample(self.sample.problem, end.at.x, f"sample: {name}", tracker)
            distinct = _distinct(ends, self.sample.problem, 0.01)
        points = {}
        for name, end in distinct.items():
            points[name] = end.at.x
        return points

    def settled_by(self, name: str, end: Descent) -> bool:
        """Whether the end of the first descent is so good that no other minimum need be looked for."""
        full = self.full
        if name != LOGARITHMS or end.status != "converged" or not self.sample.is_full or self.is_small:
            return False
        if full.guesses_normaliser or full.n_rows < ROWS_AN_UNKNOWN * full.n_unknowns:
            return False
        if full.rows.loss.coupled and full.rows.n_groups < GROUPS:
            return False
        # What zero makes of outputs that are no shares depends on their unit; that they vanish does not.
        vanished = np.inf if full.rows.loss.coupled else 0.5 * float(full.rows.reduce(target_squares))
        zero = float(full.rows.reduce(value_at_zero))
        zero = _value(full, np.zeros(full.n_unknowns)) if np.isnan(zero) else zero
        return bool(end.at.value <= SETTLED * min(vanished, zero))

    def _convex(self, tracker: Tracker, rng: np.random.Generator) -> dict[str, Array]:
        """Return the start of a convex problem: the logarithms' if it is below the problem's own."""
        # One minimum needs no pilot sample.
        problem = self.sample.problem
        points: dict[str, Array] = problem.starts(rng)
        logs = problem.log_start() if problem.rows_can_be_drawn else None
        if logs is not None and len(points) == 1:
            (own,) = points.values()
            points = {LOGARITHMS: logs.x} if _value(problem, logs.x) <= _value(problem, own) else points
        if self.sample.is_full:
            return points
        (name, x), *_ = points.items()
        return {name: _on_sample(problem, x, f"sample: {name}", tracker).at.x}

    def _gaussian(self, n: int, rng: np.random.Generator) -> dict[str, Array]:
        """Return n Gaussian points, each with logits of one size."""
        problem = self.pilot.problem
        d = problem.n_unknowns
        sizes = Probe(problem.rows).column_sizes()
        unit = np.where(sizes > 0.0, 1.0 / (np.where(sizes > 0.0, sizes, 1.0) * np.sqrt(d)), 0.0)
        return {
            f"Gaussian {k + 1}": LOGIT_SIZES[k % len(LOGIT_SIZES)] * rng.standard_normal(d) * unit
            for k in range(n)
        }

    def transfer(self, x: Array) -> Evaluation | None:
        """Predict the states of the full problem's long groups at x from the sample."""
        if self.sample.is_full or not self.full.rows.n_long:
            return None
        small = self.sample.problem
        # The sample's groups carry the full problem's labels, in increasing order.
        labels = self.full.rows.long_labels
        known = small.rows.groups.labels
        numbers = np.searchsorted(known, labels)
        if numbers.max() >= len(known) or (known[numbers] != labels).any():
            return None
        at = small.evaluate(x)
        states, centres = [], []
        for g in numbers:
            state, centre = small.rows.group_summary(int(g), at)
            states.append(state)
            centres.append(centre)
        return Evaluation(x, at.value, at.gradient, np.array(states).T, np.array(centres))


def _lowest(points: dict[str, Array], problem: Problem) -> dict[str, Array]:
    """Return the best points to descend from: a read tells the value of each."""
    values = {name: _value(problem, x) for name, x in points.items()}
    return {name: points[name] for name in sorted(points, key=lambda name: values[name])[:MOST_DESCENTS]}


def _value(problem: Problem, x: Array) -> float:
    try:
        value = problem.evaluate(x).value
    except OverflowError:
        return np.inf
    return value if np.isfinite(value) else np.inf


def _on_sample(problem: Problem, x: Array, phase: str, tracker: Tracker) -> Descent:
    """Descend on a problem that is small, as far as its answer means something for the full one."""
    exact = problem.n_unknowns <= MEDIUM
    strategy = Exact() if exact else MatrixFree(natural_scale(problem, problem.evaluate(x)))
    at = problem.evaluate(x, at_zero=True, **strategy.request(None))
    judge = Judge(problem, SAMPLE_TOL, probe_of(problem), final=False)
    found = descend(problem, at, strategy, judge, tracker, phase=phase, max_iter=50)
    if found.status == "interrupted":
        raise Interrupted(found.at.x)
    return found


def probe_of(problem: Problem) -> Probe | None:
    """Return rows of a problem that are at hand; None where it has no rows, or has them elsewhere."""
    return Probe(problem.rows) if problem.rows is not None and problem.rows.is_whole else None


def _distinct(ends: dict[str, Descent], problem: Problem, closeness: float) -> dict[str, Descent]:
    """Return the finite ends that are different minima, the best of each, in order of their values.

    An end that ran out of steps above one that converged is no minimum: the full data would be read many
    times on its way down.
    """
    values = {}
    for name, end in ends.items():
        values[name] = end.at.value
    kept, finite = dict[str, Descent](), dict[str, Descent]()
    any_converged = False
    for name in sorted(values, key=values.__getitem__):
        end = ends[name]
        if end.status == "max_iter" and any_converged:
            continue
        for other in kept.values():
            gap = abs(end.at.value - other.at.value)
            if gap <= 1e-9 * abs(end.at.value) or distance(problem, end.at, other.at) <= closeness:
                break
        else:
            kept[name] = end
            any_converged = any_converged or end.status == "converged"
            if np.isfinite(end.at.value):
                finite[name] = end
    return finite or ends

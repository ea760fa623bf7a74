"""The published algorithm: Newton steps with the Hessian of sampled rows, as many as its guarantee needs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy import linalg
from scipy.special import gammaincinv

from attnfit.data.inputs import choose
from attnfit.objectives.diagonal import Split, has_split, split_hessian
from attnfit.objectives.objective import Evaluation, Offer
from attnfit.solvers.loop import Descent, Outcome, Solver, StopFit, Tracker
from attnfit.solvers.verdicts import Status, Verdict, assess

Array = NDArray[np.float64]

# Steps where T is not given.
CAP = 60
# A smallest common w^2 is proposed with this margin.
MARGIN = 1.1
# Eigenvalues below this share of the largest, of a Gram with unit diagonal, are zero.
RANK = 1e-13
# Leverages that were read serve for further steps while they cost at most so many times the rows.
DEAREST = 2.0


def chernoff_failure(n_rows: float, n_unknowns: int, epsilon0: float, mu: float = 1.0) -> float:
    """Return the bound on the probability that so many rows miss ``(1 - eps) G <= G~ <= (1 + eps) G``.

    ``d [exp(-(m/(mu d)) ((1+eps) ln(1+eps) - eps)) + exp(-(m/(mu d)) ((1-eps) ln(1-eps) + eps))]`` for m rows
    drawn by scores s, ``mu = max_i (tau_i/d)/(s_i/sum s)`` with the leverages tau: the matrix Chernoff
    inequality of Tropp, "User-friendly tail bounds for sums of random matrices" (2012),
    doi:10.1007/s10208-011-9099-z.
    """
    eps, share = epsilon0, n_rows / (mu * n_unknowns)
    above = (1.0 + eps) * np.log1p(eps) - eps
    below = (1.0 - eps) * np.log1p(-eps) + eps
    return float(n_unknowns * (np.exp(-share * above) + np.exp(-share * below)))


def chernoff_rows(n_unknowns: int, epsilon0: float, failure: float, mu: float = 1.0) -> int:
    """Return the smallest number of rows for which `chernoff_failure` is at most ``failure``.

    About ``2 mu d (1 + eps/3) ln(2 d/failure)/eps^2``; ``3 mu d ln(2 d/failure)/eps^2`` always suffices.

    Parameters
    ----------
    n_unknowns : int
        d.
    epsilon0 : float, in (0, 1)
        Spectral accuracy.
    failure : float, in (0, 1)
    mu : float
        What the scores overestimate leverages by at most; 1 for the leverages themselves.

    Examples
    --------
    >>> chernoff_rows(10, 0.3, 0.1)
    1192
    """
    low, high = 0, int(np.ceil(3.0 * mu * n_unknowns * np.log(2.0 * n_unknowns / failure) / epsilon0**2)) + 1
    while high - low > 1:
        middle = (low + high) // 2
        enough = chernoff_failure(middle, n_unknowns, epsilon0, mu) <= failure
        low, high = (low, middle) if enough else (middle, high)
    return high


def keep_rows(scores: Array, m: float, rng: np.random.Generator) -> tuple[NDArray[np.intp], Array]:
    """Keep each row independently with probability ``p_i = min(1, m s_i/sum s)``; return the rows kept and
    ``1/p_i``.
    """
    chances = np.minimum(1.0, m * scores / max(float(scores.sum()), np.finfo(float).tiny))
    kept = np.flatnonzero(rng.random(len(scores)) < chances)
    return kept, 1.0 / chances[kept]


@dataclass(frozen=True)
class SampledStep:
    """The rows of one step.

    Attributes
    ----------
    asked : int
        m, the rows that the guarantee needs.
    drawn : int
    mu : float
        ``max_i (tau_i/d)/(s_i/sum s)``, or a bound of it.
    failure : float
        Bound on the probability that the spectral error exceeds epsilon0.
    smallest : float
        The smallest entry of D.
    error : float or None
        The spectral error, where it was measured.
    """

    asked: int
    drawn: int
    mu: float
    failure: float
    smallest: float
    error: float | None = None


@dataclass(frozen=True)
class Sampling:
    """What a published run drew; prints as a table.

    Attributes
    ----------
    epsilon0, delta : float
        As asked for.
    n_rows : int
        Rows of the data.
    steps : tuple of SampledStep
    note : str
        What limits the guarantee, or makes it dear.
    """

    epsilon0: float
    delta: float
    n_rows: int
    steps: tuple[SampledStep, ...]
    note: str = ""

    @property
    def failure(self) -> float:
        """Bound on the probability that any step exceeds epsilon0."""
        return min(1.0, sum(step.failure for step in self.steps))

    @property
    def smallest(self) -> float:
        """The smallest entry of D in any step; infinite where there was none."""
        return min((step.smallest for step in self.steps), default=float("inf"))

    def __str__(self) -> str:
        lines = [f"{'step':>4}{'rows asked':>14}{'drawn':>12}{'mu':>8}{'failure <=':>12}{'error':>10}"]
        for t, s in enumerate(self.steps):
            error = "-" if s.error is None else f"{s.error:.2g}"
            lines.append(f"{t:>4}{s.asked:>14,}{s.drawn:>12,}{s.mu:>8.3g}{s.failure:>12.2g}{error:>10}")
        lines.append(f"a step exceeds eps0 = {self.epsilon0:g} with probability {self.failure:.2g} at most")
        return "\n".join([*lines, *([self.note] if self.note else [])])


@dataclass(frozen=True)
class PublishedNewton(Solver):
    """What `Newton.as_published` returns, where the arguments are documented."""

    epsilon0: float = 0.01
    delta: float = 0.1
    T: int | None = None
    sampling: Literal["leverage", "approximate", "uniform"] = "leverage"
    low_rank: Literal["exact", "dropped"] = "exact"
    negative: Literal["refuse", "absolute"] = "refuse"
    measure: bool = False
    n_probes: int = 32
    records_points = True

    def __post_init__(self) -> None:
        for name in ("epsilon0", "delta"):
            value = getattr(self, name)
            if not (isinstance(value, int | float | np.number) and 0.0 < value < 1.0):
                raise ValueError(f"{name} must lie in (0, 1), not {value!r}")
        for name, least in (("T", 1), ("n_probes", 1)):
            value = getattr(self, name)
            whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
            if not (whole and value >= least) and not (name == "T" and value is None):
                raise ValueError(f"{name} must be an integer >= {least}, not {value!r}")
        choose(self.sampling, dict.fromkeys(("leverage", "approximate", "uniform")), "sampling")
        choose(self.low_rank, dict.fromkeys(("exact", "dropped")), "low_rank")
        choose(self.negative, dict.fromkeys(("refuse", "absolute")), "negative")

    def run(
        self,
        problem: Any,
        start: Any,
        x0: Array | None,
        tol: float,
        max_iter: int,
        tracker: Tracker,
        rng: np.random.Generator,
    ) -> Outcome:
        """Minimise; `attnfit.minimize` documents the arguments.

        Raises
        ------
        ValueError
            If the problem has no rows that can be drawn, T exceeds ``max_iter``, or an entry of D is
            negative.
        """
        self._require(problem, max_iter)
        x = self._start(problem, start, tracker, rng) if x0 is None else x0
        at = problem.evaluate(x, at_zero=True)
        if not np.isfinite(at.value):
            problem.value(x)
        run, draws, message = Descent.begin(at), _Draws(self, rng), ""
        limit = min(CAP, max_iter) if self.T is None else self.T
        ended: Status | None = None
        try:
            tracker.record("fit: published", 0, at.value, run.relative(at.gradient), x=at.x)
            while run.n_iter < limit and ended is None:
                with tracker.timed("model"):
                    hessian = draws.hessian(problem, run.at, run.n_iter)
                with tracker.timed("step"):
                    step = solved(hessian, run.at.gradient)
                if step is None:
                    ended = Status.INDEFINITE
                    break
                decrement = float(run.at.gradient @ step)
                if self.T is None and decrement <= tol**2 * (1.0 + abs(run.at.value)):
                    break
                ended = self._advance(problem, run, step, decrement, tracker)
        except (KeyboardInterrupt, StopFit):
            ended = Status.INTERRUPTED
        run.verdict = assess(problem, run.at, tol) if ended is None else Verdict(ended)
        run.status = run.verdict.status
        if run.status == Status.INDEFINITE:
            message = (
                f"the sampled Hessian of step {run.n_iter} is not positive definite, and the published "
                "method has no other step: start nearer, raise row_penalty, or use Newton()"
            )
        elif run.status == Status.MAX_ITER:
            message = (
                f"not converged after {run.n_iter} published steps: the next Newton step moves a logit by "
                f"{run.verdict.move:.1e}, tol {tol:.0e}; raise T, or go on with Newton() from result.x"
            )
        kind = f"Newton as published, {self.sampling} sampling, eps0 = {self.epsilon0:g}"
        name = "start" if x0 is None else "x0"
        found = Outcome.of(problem, {name: run}, kind)
        return Outcome(
            run, found.local_values, run.n_iter, kind, message, sampling=draws.report(problem, run.at)
        )

    def _require(self, problem: Any, max_iter: int) -> None:
        if Offer.ABSORBED in problem.offers or not has_split(problem):
            raise ValueError(
                "Newton.as_published draws rows of Rescaled, Softmax, Exponential or TwoLayer with one "
                f"right-hand side, held here; for {type(problem).__name__} use Newton() or leave solver out"
            )
        if self.T is not None and max_iter < self.T:
            raise ValueError(f"T={self.T} steps exceed max_iter={max_iter}; raise max_iter")

    def _start(self, problem: Any, start: Any, tracker: Tracker, rng: np.random.Generator) -> Array:
        if problem.rows is None:
            return np.asarray(problem.initial_point(rng)).reshape(-1)
        return np.asarray(next(iter(start.points(tracker, rng, 1).values())))

    def _advance(
        self, problem: Any, run: Descent, step: Array, decrement: float, tracker: Tracker
    ) -> Status | None:
        """Take a step, whatever the value does; return a status where it leaves float64."""
        with tracker.timed("evaluate"):
            try:
                trial = problem.evaluate(run.at.x - step, run.at)
            except OverflowError:
                return Status.OVERFLOW
        if not (np.isfinite(trial.value) and np.isfinite(trial.gradient).all()):
            return Status.OVERFLOW
        run.at, run.n_iter = trial, run.n_iter + 1
        tracker.record(
            "fit: published",
            run.n_iter,
            trial.value,
            run.relative(trial.gradient),
            step_norm=float(np.sqrt(max(decrement, 0.0))),
            x=trial.x,
        )
        return None


def solved(hessian: Array, gradient: Array) -> Array | None:
    """Return ``H~^-1 g``, None where H~ is not positive definite."""
    # Errors of a Cholesky factor do not depend on how columns are scaled. The transpose is in the order of
    # LAPACK, and copied much faster.
    try:
        factor = linalg.cho_factor(hessian.T, lower=True)
    except (linalg.LinAlgError, ValueError):
        return None
    return np.asarray(linalg.cho_solve(factor, gradient))


def inverse_root(gram: Array) -> Array:
    """Return R, shape (d, r), with ``R^T G R = 1`` on the range of a positive semidefinite G."""
    scale = np.sqrt(np.where(np.diag(gram) > 0.0, np.diag(gram), 1.0))
    values, vectors = np.linalg.eigh(gram / scale / scale[:, None])
    kept = values > RANK * len(values) * max(float(values[-1]), np.finfo(float).tiny)
    return np.asarray(vectors[:, kept] / np.sqrt(values[kept]) / scale[:, None])


class _Draws:
    """The rows drawn step by step, and the metric that the next ones are drawn by."""

    def __init__(self, solver: PublishedNewton, rng: np.random.Generator) -> None:
        self._solver, self._rng = solver, rng
        self.steps: list[SampledStep] = []
        # Of the last step that read its leverages: estimates of them over D, D, and the rank.
        self._known: tuple[Array, Array, int] | None = None

    def hessian(self, problem: Any, at: Evaluation, t: int) -> Array:
        """Draw rows at a point; return the Hessian with them."""
        solver = self._solver
        split = split_hessian(problem, at)
        D = split.weights
        if float(D.min()) < 0.0 and solver.negative == "refuse":
            raise ValueError(_negative(split, t))
        budget = 6.0 * solver.delta / (np.pi * (t + 1)) ** 2 if solver.T is None else solver.delta / solver.T
        size = np.abs(D)
        known = solver.sampling == "approximate" and self._stretch(split, size) is not None
        root = None if known and not solver.measure else inverse_root(split.gram(size))
        scores, mu, failure, rank = self._scores(split, size, root, budget)
        m = chernoff_rows(rank, solver.epsilon0, failure, mu)
        kept, inverse = keep_rows(scores, m, self._rng)
        # Where the rows run out some probabilities are one; with all of them nothing can fail.
        bound = chernoff_failure(m, rank, solver.epsilon0, mu) + budget - failure
        sampled = split.gram(D[kept] * inverse, kept)
        error = None
        if solver.measure:
            assert root is not None
            exact = sampled if D.min() >= 0.0 else sampled - split.gram(D) + split.gram(size)
            values = np.linalg.eigvalsh(root.T @ exact @ root)
            error = float(max(abs(values[0] - 1.0), abs(values[-1] - 1.0)))
        all_rows = bool(len(kept) == np.count_nonzero(size) and (inverse == 1.0).all())
        self.steps.append(SampledStep(m, len(kept), mu, 0.0 if all_rows else bound, float(D.min()), error))
        low_rank = split.low_rank if solver.low_rank == "exact" else 0.0
        return np.asarray(sampled + low_rank + split.ridge)

    def _stretch(self, split: Split, size: Array) -> float | None:
        """Return by how much leverages can exceed the estimates of the step that read them, times the
        weights now; None where they do not serve.

        Where no weight is less than a share of what it was, the Gram is not either.
        """
        if self._known is None or split.centred:
            return None
        before, used = self._known[1], self._known[1] > 0.0
        if (size[~used] > 0.0).any() or not (size[used] > 0.0).all():
            return None
        factor = float((before[used] / size[used]).max())
        return factor if factor <= DEAREST else None

    def _scores(
        self, split: Split, size: Array, root: Array | None, budget: float
    ) -> tuple[Array, float, float, int]:
        """Return the scores, mu, the failure left to the draw, and the rank."""
        solver = self._solver
        if solver.sampling == "approximate":
            stretch, left = self._stretch(split, size), budget
            if stretch is None or self._known is None:
                assert root is not None
                rank, stretch, left = root.shape[1], 1.0, 0.5 * budget
                probes = self._rng.standard_normal((rank, solver.n_probes)) / np.sqrt(solver.n_probes)
                # All n estimates, chi-square of k degrees over k, exceed this share with half of the budget.
                share = 2.0 * gammaincinv(0.5 * solver.n_probes, 0.5 * budget / len(size)) / solver.n_probes
                self._known = split.squares(root @ probes) / share, size, rank
            above, _, rank = self._known
            scores = size * above
            return scores, float(stretch * scores.sum() / rank), left, rank
        assert root is not None
        leverages, rank = size * split.squares(root), root.shape[1]
        if solver.sampling == "leverage":
            return leverages, 1.0, budget, rank
        even = np.where(size > 0.0, 1.0, 0.0)
        return even, float(even.sum() * leverages.max() / rank), budget, rank

    def report(self, problem: Any, at: Evaluation) -> Sampling:
        """Return what was drawn."""
        n = problem.n_rows if problem.rows is not None else problem.logit_map.shape[0]
        notes = []
        asked = max((step.asked for step in self.steps), default=0)
        if asked >= n:
            notes.append(
                f"rows needed ({asked:,}) exceed the data ({n:,}): the exact Gram is cheaper, Newton('exact')"
            )
        if any(step.smallest < 0.0 for step in self.steps):
            notes.append(
                "D has negative entries: |A^T (D~ - D) A| <= eps0 A^T |D| A is all that is bounded, not the "
                "relative error of the Hessian"
            )
        if self._solver.low_rank == "dropped":
            notes.append("the low-rank part is dropped, as printed: the rate of the theorem is lost with it")
        return Sampling(
            self._solver.epsilon0, self._solver.delta, int(n), tuple(self.steps), "; ".join(notes)
        )


def _negative(split: Split, t: int) -> str:
    """Return what is said of negative entries of D, with the penalty that makes all positive."""
    row = int(np.argmin(split.weights))
    least = float((split.weights - split.penalties).min())
    w2 = MARGIN * -least
    return (
        f"D = B_diag + w^2 is {split.weights[row]:.4g} at row {split.users_row(row)} in step {t}, and the "
        f"published algorithm needs D > 0: pass row_penalty={np.sqrt(w2):.4g} (w^2 = {w2:.4g} for every "
        "row), or negative='absolute'"
    )

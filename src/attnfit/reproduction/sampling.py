"""Rows drawn as published: spectral errors against the failure probability, contraction against the theorem,
and what each part of a step costs.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from attnfit import datasets
from attnfit.objectives.diagonal import split_hessian
from attnfit.problems import Rescaled
from attnfit.reproduction.fitting import fitted, run_of
from attnfit.reproduction.page import Claim, Table
from attnfit.solvers import Newton, chernoff_rows
from attnfit.solvers.published import inverse_root, keep_rows, solved
from attnfit.theory.trajectory import polished

Array = NDArray[np.float64]
Measure = Callable[[Callable[[], Any]], float]

DELTA, T = 0.1, 6
# Slopes of seconds in log-log scale that count as linear, as cubic, and as none.
LINEAR, CUBIC, NONE = (0.9, 1.3), (2.5, 3.1), 0.3
# Nonzeros a row and columns of the sparse data, and rows an unknown of the dense.
NONZEROS, COLUMNS, ROWS_PER_UNKNOWN = 8, 64, 10
# Ratios below this size of the error are rounding; starts move no logit of the minimiser by more than this.
FLOOR, MOVE = 1e-9, 1e-3


def designs(quick: bool) -> dict[str, Array]:
    """Return rows by name: Gaussian, with heavy tails, and of real people (or cars)."""
    n = 5_000 if quick else 20_000
    rng = np.random.default_rng(7)
    heavy = rng.standard_normal((n, 10))
    heavy *= (np.abs(rng.standard_t(2, n)) / np.linalg.norm(heavy, axis=1))[:, None]
    name, real, _ = real_rows()
    return {"Gaussian": rng.standard_normal((n, 10)), "t_2 radius": heavy, name: real}


def real_rows() -> tuple[str, Array, Array]:
    """Return name, rows and counts of the health insurance experiment of statsmodels if it is installed,
    else of the cars in `attnfit.datasets`.
    """
    try:
        from statsmodels.datasets import randhie  # type: ignore[import-untyped]
    except ImportError:
        cars = datasets.load_car_shares()
        return "car shares", cars.A, cars.b
    table = randhie.load_pandas().data
    counts = np.asarray(table["mdvis"], dtype=float)
    features = np.asarray(table.drop(columns="mdvis"), dtype=float)
    return "randhie", np.column_stack([np.ones(len(counts)), features]), counts


# ---- spectral errors


def spectral_errors(
    A: Array, epsilon0: float, n_draws: int, *, uniform: bool, rng: np.random.Generator
) -> Array:
    """Return ``|Q^T D~ Q - I|`` of draws of the rows that the guarantee asks for, Q a basis of the range."""
    Q = np.linalg.qr(A)[0]
    scores = np.ones(len(Q)) if uniform else np.sum(Q**2, axis=1)
    m, eye = chernoff_rows(Q.shape[1], epsilon0, DELTA), np.eye(Q.shape[1])
    out = np.empty(n_draws)
    for k in range(n_draws):
        kept, inverse = keep_rows(scores, m, rng)
        values = np.linalg.eigvalsh(Q[kept].T @ (inverse[:, None] * Q[kept]) - eye)
        out[k] = max(abs(values[0]), abs(values[-1]))
    return out


def failure_rows(quick: bool) -> list[tuple[Any, ...]]:
    """Return, for each design and accuracy, medians, quantiles and failure shares of both ways to draw."""
    n_draws = 100 if quick else 1_000
    rng, rows = np.random.default_rng(0), []
    for name, A in designs(quick).items():
        Q = np.linalg.qr(A)[0]
        coherence = float(len(A) * np.sum(Q**2, axis=1).max() / A.shape[1])
        for epsilon0 in (0.3,) if quick else (0.3, 0.1):
            one, other = (
                spectral_errors(A, epsilon0, n_draws, uniform=uniform, rng=rng) for uniform in (False, True)
            )
            rows.append(
                (
                    name, f"{len(A):,} x {A.shape[1]}", coherence, epsilon0,
                    chernoff_rows(A.shape[1], epsilon0, DELTA), float(np.median(one)),
                    float(np.quantile(one, 1.0 - DELTA)), float(np.mean(one > epsilon0)),
                    float(np.median(other)), float(np.mean(other > epsilon0)),
                )
            )  # fmt: skip
    return rows


# ---- contraction


def positive(A: Array, b: Array, x: Array) -> tuple[Rescaled, Array, float]:
    """Return rescaled regression with the smallest w^2, in steps of a tenth, whose minimiser has ``D > 0``;
    the minimiser and w^2.
    """
    w2 = 0.0
    for _ in range(40):
        problem = Rescaled(A, b, "exp", row_penalty=np.sqrt(w2))
        best = fitted(problem, x, tol=1e-11, max_iter=300)
        least = float(split_hessian(problem, problem.evaluate(best)).weights.min())
        if least > 0.0:
            return problem, best, w2
        w2, x = w2 + max(-1.1 * least, 0.1 * w2), best
    raise ValueError(f"no w^2 up to {w2:.3g} makes D positive at the minimiser")


def contraction_rows(quick: bool) -> list[tuple[Any, ...]]:
    """Return, for each problem and accuracy, ratios of errors in the norm of the Hessian and their bound."""
    rng = np.random.default_rng(0)
    n, d = (2_000, 4) if quick else (5_000, 8)
    A = 0.3 * rng.standard_normal((n, d))
    truth = rng.standard_normal(d)
    b = np.exp(A @ truth + 0.2 * rng.standard_normal(n))
    name, real, counts = real_rows()
    some = real[::4, 1:] if name == "randhie" else real[:, 1:]
    # Without the constant, along which the rescaled loss falls to zero.
    some = 0.3 * (some - some.mean(axis=0)) / some.std(axis=0)
    target = (counts[::4] if name == "randhie" else counts) + 1.0
    rows = []
    for label, problem, best, w2 in (
        ("Gaussian", *positive(A, b / b.sum(), truth)),
        (name, *positive(some, target / target.sum(), np.zeros(some.shape[1]))),
    ):
        for epsilon0, low_rank in ((0.3, "exact"), (0.1, "exact"), (0.1, "dropped")):
            n_runs = 3 if quick else 60
            found = ratios(problem, best, epsilon0, low_rank, n_runs)
            rows.append((label, w2, epsilon0, low_rank, *found))
    return rows


def ratios(problem: Rescaled, best: Array, epsilon0: float, low_rank: Any, n_runs: int) -> tuple[Any, ...]:
    """Return the rows a step, kappa, the median and largest ratio of errors, its bound, the largest Euclidean
    one, and the share of runs with a step beyond epsilon0.
    """
    reference = polished(problem, best)
    best, H = reference.at.x, reference.hessian
    split = split_hessian(problem, problem.evaluate(best))
    root = inverse_root(H)
    kappa = float(np.linalg.eigvalsh(root.T @ split.gram(split.weights) @ root)[-1])
    bound = epsilon0 * kappa / (1.0 - epsilon0 * kappa) if epsilon0 * kappa < 1.0 else np.inf
    solver = Newton.as_published(epsilon0, DELTA, T, low_rank=low_rank, measure=True)
    inside, euclidean, beyond, asked = [], [], 0, 0
    for seed in range(n_runs):
        offset = root @ np.random.default_rng(seed).standard_normal(root.shape[1])
        # Near enough for the curvature not to change the ratio.
        start = best + offset * (MOVE / np.abs(problem.design @ offset).max())
        result = run_of(problem, start, solver, seed)
        errors = result.points - best
        sizes, lengths = np.sqrt(np.einsum("ki,ij,kj->k", errors, H, errors)), np.linalg.norm(errors, axis=1)
        kept = sizes[1:] > max(FLOOR * sizes[0], 100.0 * reference.scaled_radius)
        inside += list((sizes[1:] / sizes[:-1])[kept])
        euclidean += list((lengths[1:] / lengths[:-1])[kept])
        beyond += any(step.error > epsilon0 for step in result.sampling.steps)
        asked = result.sampling.steps[0].asked
    return (
        asked, kappa, float(np.median(inside)), float(np.max(inside)), bound, float(np.max(euclidean)),
        beyond / n_runs,
    )  # fmt: skip


# ---- cost


def cpu_seconds(work: Callable[[], Any]) -> float:
    """Return the processor time of some work: the best of five, each long enough to be measured."""
    work()
    n_times = 1
    while True:
        best = np.inf
        for _ in range(5):
            began = time.process_time()
            for _ in range(n_times):
                work()
            best = min(best, time.process_time() - began)
        if best >= 2e-3:
            return best / n_times
        n_times *= 4


def slope(sizes: Sequence[float], seconds: Sequence[float], first: int = -2) -> float:
    """Return the growth of seconds with size, in log-log scale, between the largest and one before."""
    first = max(first, -len(sizes))
    return float(np.log(seconds[-1] / seconds[first]) / np.log(sizes[-1] / sizes[first]))


def cost_by_nonzeros(quick: bool, measure: Measure = cpu_seconds) -> list[tuple[Any, ...]]:
    """Time the read (logits, u, gradient) of rows with eight nonzeros each, against their number; near a
    point that has been read, as in a fit.
    """
    rows = []
    for power in (12, 14) if quick else (16, 18, 20, 22):
        problem, x = sparse_problem(2**power, NONZEROS)
        near = problem.evaluate(x)
        seconds = measure(lambda p=problem, x=x, near=near: p.evaluate(x, near))  # type: ignore[misc]
        rows.append((2**power, NONZEROS * 2**power, seconds))
    return rows


def cost_by_rows(quick: bool, measure: Measure = cpu_seconds) -> list[tuple[Any, ...]]:
    """Time the products with A and A^T at a fixed number of nonzeros, against the number of rows; what works
    on vectors of that length is timed apart.
    """
    nonzeros = 2 ** (15 if quick else 21)
    rows = []
    for per_row in (16, 8, 4):
        n = nonzeros // per_row
        problem, x = sparse_problem(n, per_row)
        A, weights, near = problem.design.block(slice(None)), np.ones(n), problem.evaluate(x)
        products = measure(lambda A=A, x=x, s=weights: (A @ x, A.T @ s))  # type: ignore[misc]
        read = measure(lambda p=problem, x=x, near=near: p.evaluate(x, near))  # type: ignore[misc]
        rows.append((n, nonzeros, products, read - products))
    return rows


def sparse_problem(n: int, per_row: int) -> tuple[Rescaled, Array]:
    """Return rescaled regression on rows with so many nonzeros each, and a point."""
    rng = np.random.default_rng(0)
    columns = np.argsort(rng.random((n, COLUMNS)), axis=1)[:, :per_row] if n <= 2**16 else None
    if columns is None:
        # Distinct columns without sorting all of them.
        columns = (rng.integers(0, COLUMNS, (n, 1)) + np.arange(per_row) * (COLUMNS // per_row)) % COLUMNS
    values = rng.standard_normal(n * per_row)
    A = sparse.csr_array((values, np.sort(columns, axis=1).reshape(-1), np.arange(n + 1) * per_row))
    A = sparse.csr_array(A, shape=(n, COLUMNS))
    return Rescaled(A, np.full(n, 1.0 / n), "exp"), 0.1 * rng.standard_normal(COLUMNS)


def cost_by_unknowns(quick: bool, measure: Measure = cpu_seconds) -> list[tuple[Any, ...]]:
    """Time the Gram of ten rows an unknown, and the solution with a matrix of twice the order, against the
    number of unknowns: a solution is cubic for large ones only.
    """
    rng, rows = np.random.default_rng(0), []
    for d in (64, 128) if quick else (128, 256, 512, 1_024):
        A = rng.standard_normal((ROWS_PER_UNKNOWN * d, d))
        gram = measure(lambda A=A: A.T @ A)  # type: ignore[misc]
        H, g = np.eye(2 * d) + 1.0 / d, rng.standard_normal(2 * d)
        rows.append((d, gram, 2 * d, measure(lambda H=H, g=g: solved(H, g))))  # type: ignore[misc]
    return rows


def pays_from(d: int, epsilon0: float) -> int:
    """Return the number of data rows from which fewer are drawn than there are."""
    return chernoff_rows(d, epsilon0, DELTA)


# ---- the page's part


def within(value: float, limits: tuple[float, float]) -> bool:
    """Return whether a slope lies between its limits."""
    return bool(limits[0] <= value <= limits[1])


def sampling_claims(
    failures: Sequence[tuple[Any, ...]], contractions: Sequence[tuple[Any, ...]]
) -> list[Claim]:
    """Return what the sampled step is claimed to do, and what it did."""
    worst = max(row[7] for row in failures)
    uniform = max(row[9] for row in failures)
    exact = [row for row in contractions if row[3] == "exact"]
    dropped = [row for row in contractions if row[3] == "dropped"]
    shares = [row[7] / row[8] for row in exact]
    lost = max(row[6] / next(e[6] for e in exact if e[:3] == row[:3]) for row in dropped)
    eight = pays_from(8, 0.01)
    return [
        Claim(
            f"rows drawn by leverage miss eps0 with probability {DELTA} at most (Lemma 5.3)",
            f"at most {worst:.1%} of the draws of a design do, with the m of the matrix Chernoff bound",
            worst <= DELTA,
        ),
        Claim(
            "as many rows drawn uniformly would do",
            f"up to {uniform:.0%} of their draws miss it",
            uniform <= DELTA,
        ),
        Claim(
            "a step of Algorithm 1 leaves eps0 kappa/(1 - eps0 kappa) of the error, in the norm of the "
            "Hessian",
            f"the largest ratio is {max(shares):.0%} of that bound",
            max(shares) <= 1.0,
        ),
        Claim(
            "the low-rank part can be dropped (Algorithm 1, line 8)",
            f"a step contracts up to {lost:.0f} times less without it",
            lost <= 1.5,
        ),
        Claim(
            "sampling pays at eps0 = 0.01",
            f"from {eight:,} rows of 8 unknowns and {pays_from(64, 0.01):,} of 64 on; below, all rows cost "
            "less",
            None,
        ),
    ]


def cost_claims(
    by_nonzeros: Sequence[tuple[Any, ...]],
    by_rows: Sequence[tuple[Any, ...]],
    by_unknowns: Sequence[tuple[Any, ...]],
    *,
    quick: bool,
) -> list[Claim]:
    """Return what a step is claimed to cost, and what it did cost; quick sizes are too small to tell."""
    read = slope(column(by_nonzeros, 1), column(by_nonzeros, 2))
    rows = slope(column(by_rows, 0), column(by_rows, 2), first=0)
    # Over two doublings: the caches that one of them leaves tell in each.
    gram = slope(column(by_unknowns, 0), column(by_unknowns, 1), first=-3)
    factor = slope(column(by_unknowns, 2), column(by_unknowns, 3), first=-3)
    return [
        Claim(
            "a step costs nnz(A)",
            f"the read grows like nnz^{read:.2f}; at a fixed number of nonzeros its products grow like "
            f"n^{rows:.2f}",
            None if quick else within(read, LINEAR) and rows <= NONE,
        ),
        Claim(
            "plus d^omega",
            f"the solution grows like d^{factor:.2f}, the Gram of {ROWS_PER_UNKNOWN} d rows like "
            f"d^{gram:.2f}",
            None if quick else within(factor, CUBIC) and within(gram, CUBIC),
        ),
    ]


def column(rows: Sequence[tuple[Any, ...]], k: int) -> list[float]:
    """Return a column of a table."""
    return [float(row[k]) for row in rows]


def tables(failures: Any, contractions: Any, by_nonzeros: Any, by_rows: Any, by_unknowns: Any) -> list[Table]:
    """Return all that was measured."""
    return [
        Table(
            f"Spectral error of drawn rows, delta = {DELTA}",
            (
                "design", "size", "coherence", "eps0", "rows m", "leverage: median", "0.9 quantile", "share "
                "above eps0", "uniform: median", "share above eps0 ",
            ),
            failures,
        ),
        Table(
            f"Contraction of the published steps, rescaled exp, T = {T}",
            (
                "data", "w^2", "eps0", "low rank", "rows m", "kappa", "median ratio", "largest", "bound",
                "largest Euclidean", "runs with a step above eps0",
            ),
            contractions,
        ),
        Table("Seconds of a read, eight nonzeros a row", ("rows", "nonzeros", "seconds"), by_nonzeros),
        Table(
            "Seconds at a fixed number of nonzeros",
            ("rows", "nonzeros", "products with A", "vectors of length n"),
            by_rows,
        ),
        Table("Seconds of what does not grow with n", ("unknowns", "Gram", "order", "solution"), by_unknowns),
    ]  # fmt: skip

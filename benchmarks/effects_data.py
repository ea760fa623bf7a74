"""Data with levels, and fits with a dummy for every level by a package that is not ours."""

import numpy as np
import scipy.linalg
import statsmodels.api as sm


def bipartite(n_origins, n_destinations, n, seed=0):
    r = np.random.default_rng(seed)
    o, d, x = r.integers(0, n_origins, n), r.integers(0, n_destinations, n), r.standard_normal(n)
    eta = -0.5 + 0.7 * x + 0.5 * r.standard_normal(n_origins)[o] + 0.5 * r.standard_normal(n_destinations)[d]
    return x[:, None], r.poisson(np.exp(eta)).astype(float), [o, d]


def gravity(N, T, seed=0):
    r = np.random.default_rng(seed)
    o, d, t = (v.ravel() for v in np.meshgrid(range(N), range(N), range(T), indexing="ij"))
    o, d, t = (v[o != d] for v in (o, d, t))
    X = r.standard_normal((len(o), 3))
    X[:, 0] = r.random(len(o)) < 0.3
    eta = X @ [0.4, -0.2, 0.1] + 0.5 * r.standard_normal(N * T)[o * T + t]
    eta += 0.5 * r.standard_normal(N * T)[d * T + t] + r.standard_normal(N * N)[o * N + d]
    return X, r.poisson(np.exp(eta)).astype(float), [o * N + d, o * T + t, d * T + t]


def matched(n_workers, n_firms, seed=0, mobility=0.1, reach=50, level=0.5):
    """Workers who move between neighbouring firms over five years."""
    r = np.random.default_rng(seed)
    firm = np.empty((n_workers, 5), int)
    firm[:, 0] = r.integers(0, n_firms, n_workers)
    for t in range(1, 5):
        moves = r.random(n_workers) < mobility
        next_firm = (firm[:, t - 1] + r.integers(-reach, reach + 1, n_workers)) % n_firms
        firm[:, t] = np.where(moves, next_firm, firm[:, t - 1])
    firm, worker = firm.ravel(), np.repeat(np.arange(n_workers), 5)
    X = r.standard_normal((5 * n_workers, 3))
    X[:, 0] += 0.3 * r.standard_normal(n_firms)[firm]
    eta = level + X @ [0.3, -0.2, 0.1] + 0.5 * r.standard_normal(n_workers)[worker]
    eta += 0.3 * r.standard_normal(n_firms)[firm]
    return X, r.poisson(np.exp(eta)).astype(float), [worker, firm]


def dummies(sets):
    """Return a column for each level that has rows, without those that others imply."""
    every = np.column_stack([np.equal.outer(s, np.unique(s)) for s in sets]).astype(float)
    _, R, order = scipy.linalg.qr(every, mode="economic", pivoting=True)
    rank = int(np.count_nonzero(np.abs(np.diag(R)) > 1e-9))
    return every[:, np.sort(order[:rank])]


def statsmodels_fit(X, y, sets, *, weights=None, offset=None, **options):
    """Return statsmodels' Poisson fit with dummies, iterated to rounding."""
    model = sm.GLM(
        y,
        np.column_stack([X, dummies(sets)]),
        family=sm.families.Poisson(),
        freq_weights=weights,
        offset=offset,
    )
    return model.fit(tol=1e-13, maxiter=100, tol_criterion="params", **options)

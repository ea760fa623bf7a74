"""Sums over groups and centred Grams against their definitions, in extended precision, on either side of
every threshold that picks another way to the same numbers.
"""

import numpy as np
import pytest
from scipy import sparse

from attnfit.data.gram import FEW, VERY_NARROW, Gram, group_rows
from attnfit.solvers.subproblem import Cholesky, MoreSorensen, length

WIDTHS = (1, VERY_NARROW, VERY_NARROW + 1, 30)


def rows_of(d, *, many, seed=0):
    """Rows in groups of unequal size, with weights of both signs."""
    rng = np.random.default_rng(seed)
    n = (FEW // d + 50) if many else 60
    starts = np.sort(np.append(0, rng.choice(np.arange(1, n), n // 7, replace=False)))
    return rng, rng.standard_normal((n, d)), starts


@pytest.mark.parametrize("kind", [np.asarray, sparse.csr_array])
@pytest.mark.parametrize("many", [False, True])
@pytest.mark.parametrize("d", WIDTHS)
def test_sums_over_groups(d, many, kind):
    rng, A, starts = rows_of(d, many=many)
    w = rng.standard_normal(len(A))
    expected = np.add.reduceat(A.astype(np.longdouble) * w[:, None], starts, axis=0)
    found = group_rows(kind(A), w, starts)
    found = found.toarray() if sparse.issparse(found) else found
    assert np.abs(found - expected).max() <= 1e-13 * np.abs(A * w[:, None]).sum(axis=0).max()


@pytest.mark.parametrize("how", ["plain", "compiled", "sparse"])
@pytest.mark.parametrize("factors", ["none", "rows", "both"])
@pytest.mark.parametrize("many", [False, True])
@pytest.mark.parametrize("d", WIDTHS)
def test_a_gram_is_the_sum_of_its_centred_rows(d, many, factors, how):
    rng, A, starts = rows_of(d, many=many)
    n, block = len(A), sparse.csr_array(A) if how == "sparse" else A
    t = rng.standard_normal(n)
    r = None if factors == "none" else rng.random(n)
    q = rng.random(n) if factors == "both" else 0.7
    mu = rng.standard_normal((len(starts), d))
    sizes = np.diff(starts, append=n)
    gram = Gram(d, compiled=how == "compiled")
    gram.add_centred(block, t, r, q, sparse.csr_array(mu) if how == "sparse" else mu, starts)
    gram.add_piece(block, t, r, q, mu[0], 0)
    gram.add(block, t, r)
    own = A.astype(np.longdouble) * (1.0 if r is None else r[:, None])
    pull = np.broadcast_to(q, n)[:, None]
    parts = [own - pull * np.repeat(mu, sizes, axis=0), own - pull * mu[0], own]
    expected = sum(C.T @ (t[:, None] * C) for C in parts)
    size = sum(np.abs(C).T @ (np.abs(t)[:, None] * np.abs(C)) for C in parts)
    found = gram.result()
    assert (np.abs(found - expected) <= 1e-13 * size.max()).all()
    assert (found == found.T).all()


@pytest.mark.parametrize("make", [MoreSorensen, Cholesky])
def test_a_model_step_solves_its_equations(make):
    """Inside the radius, on it, with a flat direction and with negative curvature."""
    rng = np.random.default_rng(0)
    V = np.linalg.qr(rng.standard_normal((5, 5)))[0]
    for values in ([1.0, 2.0, 3.0, 4.0, 5.0], [0.0, 2.0, 3.0, 4.0, 5.0], [-1.0, 2.0, 3.0, 4.0, 5.0]):
        H, g = (V * values) @ V.T, rng.standard_normal(5)
        g = g - V[:, 0] * (V[:, 0] @ g) if values[0] == 0.0 else g
        model = make(H)
        assert model.negative == (values[0] < 0.0)
        full = model.solve(g, np.inf)
        if values[0] >= 0.0:
            assert not full.bounded and length(H @ full.p + g) <= 1e-12 * length(g)
            assert abs(V[:, 0] @ full.p) <= 1e-12 or values[0] > 0.0
        short = model.solve(g, 0.1)
        assert short.bounded and length(short.p) == pytest.approx(0.1, rel=1e-5)
        shift = -(H @ short.p + g) @ short.p / (short.p @ short.p)
        assert shift >= max(0.0, -values[0]) - 1e-8
        assert length(H @ short.p + shift * short.p + g) <= 1e-5 * length(g)

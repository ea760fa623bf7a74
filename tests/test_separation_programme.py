"""Projections and the linear programme that decide whether a minimum exists agree."""

import numpy as np
import pytest
import scipy.optimize

from attnfit.solvers.separation import Undecided, _by_projection, _solve


@pytest.mark.parametrize("sizes", ["alike", "unlike"])
@pytest.mark.parametrize("seed", range(200))
def test_projections_agree_with_the_programme(seed, sizes):
    """Of rows that are a thousandth of others too, which projections may take for rows that stay."""
    rng = np.random.default_rng(seed)
    m, r = int(rng.integers(2, 14)), int(rng.integers(1, 5))
    F = rng.integers(-2, 3, (m, r)).astype(float)
    if sizes == "unlike":
        F *= 10.0 ** -rng.integers(0, 5, (m, 1))
    F = F[F.any(axis=1)]
    if not len(F):
        return
    decided, y = _by_projection(F)
    # The programme has tolerances of its own; which rows fall does not depend on their length.
    G = F / np.abs(F).max(axis=1, keepdims=True)
    found = scipy.optimize.linprog(
        np.r_[np.zeros(r), -np.ones(len(F))],
        A_ub=np.hstack([G, np.eye(len(F))]),
        b_ub=np.zeros(len(F)),
        bounds=[(None, None)] * r + [(0.0, 1.0)] * len(F),
    )
    if not decided:
        return
    falls = np.zeros(len(F), dtype=bool) if y is None else F @ y <= -1.0 + 1e-9
    np.testing.assert_array_equal(falls, found.x[r:] > 0.5)
    if y is not None:
        assert (F @ y).max() <= 1e-8 * np.abs(y).max()


def test_most_is_decided_by_projections():
    rng = np.random.default_rng(1)
    rows = [rng.integers(-2, 3, (12, 3)).astype(float) for _ in range(200)]
    assert sum(_by_projection(F[F.any(axis=1)])[0] for F in rows) >= 195
    # Few rows are often separated in part: those that stay, and those that fall once these are held.
    few = [rng.integers(-2, 3, (6, 3)).astype(float) for _ in range(200)]
    assert sum(_by_projection(F[F.any(axis=1)])[0] for F in few) >= 190


def test_rows_that_stay_are_held_where_others_fall():
    """Two opposite rows; a third falls, and a fourth as much as one likes once it does."""
    F = np.array([[1.0, 0.0, 0.0], [-1.0, 0.0, 0.0], [3.0, -1.0, 0.0], [0.0, 2.0, -1.0]])
    for rows in (F[:3], F):
        decided, y = _by_projection(rows)
        assert decided
        falls = rows @ y
        np.testing.assert_allclose(falls[:2], 0.0, atol=1e-9)
        assert (falls[2:] <= -1.0 + 1e-9).all()


@pytest.mark.parametrize(
    ("F", "falls"),
    [
        # A row so short that projections take it for one that stays.
        ([[-1.0], [-5e-4]], [True, True]),
        ([[1.0], [-5e-4]], None),
        ([[-1.0, 0.0], [0.0, 5e-4], [0.0, -5e-4]], [True, False, False]),
    ],
)
def test_the_programme_decides_what_projections_do_not(F, falls, monkeypatch):
    """Within its time; one that runs out of it decides nothing."""
    F, asked = np.array(F), []
    solve = scipy.optimize.linprog

    def limited(*args, options, **named):
        asked.append(options["time_limit"])
        return solve(*args, options=options, **named)

    monkeypatch.setattr(scipy.optimize, "linprog", limited)
    y = _solve(F)
    assert (y is None) == (falls is None)
    if falls is not None:
        along = F @ y
        assert (along[falls] < 0.0).all()
        np.testing.assert_allclose(along[~np.array(falls)], 0.0, atol=1e-9)
    assert all(1.0 <= limit <= 1000.0 for limit in asked)
    assert asked or len(F) > 2
    monkeypatch.setattr(scipy.optimize, "linprog", lambda *a, **k: scipy.optimize.OptimizeResult(x=None))
    with pytest.raises(Undecided):
        _solve(np.array([[-1.0], [-5e-4]]))

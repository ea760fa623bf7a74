"""Sums and largest entries over runs of rows."""

import math

import numpy as np
import pytest

from attnfit.segments import Segments


def test_sums_over_runs():
    rng = np.random.default_rng(0)
    for sizes in ((4, 1, 6, 3), (3, 3, 3), (5,)):
        starts, n = np.concatenate([[0], np.cumsum(sizes)[:-1]]), sum(sizes)
        segments, rows = Segments(starts, n), rng.standard_normal(n)
        parts = np.split(rows, starts[1:])
        assert len(segments) == len(sizes)
        assert segments.sizes.tolist() == list(sizes)
        np.testing.assert_allclose(segments.sum(rows), [p.sum() for p in parts])
        np.testing.assert_array_equal(segments.max(rows), [p.max() for p in parts])
        spread = np.broadcast_to(segments.spread(np.arange(len(sizes))), n)
        np.testing.assert_array_equal(spread, np.repeat(np.arange(len(sizes)), sizes))


@pytest.mark.parametrize("sizes", [[1] * 7, [2] * 5, [16] * 3, [17] * 3, [3, 1, 40], [5], [700]], ids=str)
def test_sums_and_largest_entries_of_runs(sizes):
    """Exactly: of integers, whatever the order; and what is given stays as it is."""
    rng = np.random.default_rng(sum(sizes))
    rows = rng.integers(-1000, 1000, sum(sizes)).astype(float)
    before, ends = rows.copy(), np.cumsum(sizes)
    segments = Segments(np.concatenate([[0], ends[:-1]]), len(rows))
    parts = np.split(rows, ends[:-1])
    np.testing.assert_array_equal(segments.sum(rows), [part.sum() for part in parts])
    np.testing.assert_array_equal(segments.max(rows), [part.max() for part in parts])
    np.testing.assert_array_equal(rows, before)
    columns = np.stack([rows, -rows, rows[::-1]], axis=1)
    for reduction in (segments.sum, segments.max):
        np.testing.assert_array_equal(
            reduction(columns), np.stack([reduction(c) for c in columns.T.copy()], axis=1)
        )
    apart = segments.spread(segments.max(columns)) + 0.0 * columns
    np.testing.assert_array_equal(apart[:, 0], segments.spread(segments.max(rows)) + 0.0 * rows)
    rows[-1] = np.nan
    assert np.isnan(segments.sum(rows)[-1]) and np.isnan(segments.max(rows)[-1])


def test_sums_of_long_runs_keep_their_digits():
    """Added in pairs: (16 + 3 + 9) roundings deep at most, where one after the other loses thousands."""
    n = 1 << 16
    found = Segments(np.array([0, n]), 2 * n).sum(np.full(2 * n, 0.1))
    np.testing.assert_allclose(found, math.fsum([0.1] * n), rtol=32 * np.finfo(float).eps)

"""The page on the published algorithm: each of its claims, measured and able to fail."""

import numpy as np
import pytest

from attnfit.reproduction import sampling
from attnfit.reproduction.sampling import (
    contraction_rows,
    cost_by_nonzeros,
    cost_by_rows,
    cost_by_unknowns,
    cost_claims,
    failure_rows,
    pays_from,
    sampling_claims,
    slope,
    sparse_problem,
)
from attnfit.solvers import chernoff_rows

FAILURES = ("design", "size", 1.0, 0.3, 1192, 0.15, 0.2, 0.004, 0.2, 0.9)
EXACT = ("data", 0.1, 0.3, "exact", 1192, 1.4, 0.07, 0.17, 0.68, 0.17, 0.0)
DROPPED = ("data", 0.1, 0.3, "dropped", 1192, 1.4, 0.26, 0.27, 0.68, 0.17, 0.0)


def changed(row, **cells):
    return tuple(cells.get(f"c{k}", cell) for k, cell in enumerate(row))


def held(failures=FAILURES, exact=EXACT, dropped=DROPPED):
    return [claim.held for claim in sampling_claims([failures], [exact, dropped])]


def test_claims_on_sampling_can_fail():
    assert held() == [True, False, True, False, None]
    assert held(failures=changed(FAILURES, c7=0.11))[0] is False
    assert held(failures=changed(FAILURES, c9=0.09))[1] is True
    assert held(exact=changed(EXACT, c7=0.69))[2] is False
    assert held(dropped=changed(DROPPED, c6=0.08))[3] is True


def costs(read=1.0, rows=0.0, gram=3.0, factor=2.8):
    n = np.array([2.0**14, 2.0**16])
    d = np.array([128.0, 256.0])
    return (
        [(k, 8 * k, (8 * k) ** read) for k in n],
        [(k, 1.0, k**rows, 1.0) for k in n],
        [(k, k**gram, 2 * k, k**factor) for k in d],
    )


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, [True, True]), ({"read": 0.5}, [False, True]), ({"read": 1.5}, [False, True]),
        ({"rows": 1.0}, [False, True]), ({"factor": 2.0}, [True, False]), ({"gram": 3.4}, [True, False]),
    ],
)  # fmt: skip
def test_claims_on_cost_can_fail(change, expected):
    assert [claim.held for claim in cost_claims(*costs(**change), quick=False)] == expected
    assert [claim.held for claim in cost_claims(*costs(**change), quick=True)] == [None, None]


def test_slopes_are_between_the_two_largest():
    assert slope([1.0, 10.0, 100.0], [9.0, 1.0, 1000.0]) == pytest.approx(3.0)
    assert slope([1.0, 10.0, 100.0], [9.0, 1.0, 900.0], first=0) == pytest.approx(1.0)


def test_what_is_timed_is_the_work_on_sizes_that_grow():
    seen = []

    def measure(work):
        work()
        seen.append(work)
        return float(len(seen))

    by_nonzeros = cost_by_nonzeros(True, measure)
    assert [row[1] for row in by_nonzeros] == [8 * row[0] for row in by_nonzeros]
    assert {row[1] for row in cost_by_rows(True, measure)} == {2**15}
    assert [row[0] for row in cost_by_unknowns(True, measure)] == [64, 128]
    for n, per_row in ((100, 8), (2**17, 4)):
        A = sparse_problem(n, per_row)[0].design.block(slice(None))
        assert A.nnz == n * per_row
        assert A.has_canonical_format


def test_failures_and_medians():
    rows = {row[0]: row for row in failure_rows(True)}
    assert 0.11 <= rows["Gaussian"][5] <= 0.19
    for name, row in rows.items():
        assert row[4] == chernoff_rows(int(row[1].split(" x ")[1]), 0.3, 0.1)
        assert row[7] <= 0.1 + 3 * np.sqrt(0.1 / 100), name
    assert rows["t_2 radius"][9] > 0.9
    assert rows["t_2 radius"][2] > 100


def test_real_rows_without_statsmodels(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "statsmodels.datasets", None)
    name, rows, _ = sampling.real_rows()
    assert (name, rows.shape[1]) == ("car shares", 6)


def test_contraction_is_within_the_theorem_and_dropping_costs_it():
    rows = contraction_rows(True)
    for row in rows:
        if row[3] == "exact":
            assert row[7] <= row[8]
    gaussian = {(row[2], row[3]): row for row in rows if row[0] == "Gaussian"}
    assert gaussian[0.1, "dropped"][6] > 10 * gaussian[0.1, "exact"][6]
    claims = sampling_claims(failure_rows(True), rows)
    assert [claim.held for claim in claims] == [True, False, True, False, None]


def test_when_sampling_pays():
    assert (pays_from(8, 0.01), pays_from(64, 0.01)) == (812_038, 9_158_120)

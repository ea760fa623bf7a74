"""What is said of the end of a fit, and which unknowns are named."""

from types import SimpleNamespace

import numpy as np
import pytest

from attnfit.solvers.result import End, unknown
from attnfit.solvers.verdicts import Status, Verdict


def test_names_of_unknowns():
    assert unknown(3, (5,)) == "column 3"
    assert unknown(7, (2, 5)) == "entry (1, 2)"


def test_a_message_names_the_directions():
    v = np.array([0.0, -2.0, 1e-12, 1.0])
    separation = SimpleNamespace(direction=v, rows=np.arange(1500), value=0.123456789)
    text = End(Status.SEPARABLE, Verdict(separation=separation), 1e-8, 7, 1, SimpleNamespace(shape=(4,)), 0.1)
    assert "(column 1: -1, column 3: +0.5)" in text.message()
    assert "1,500 rows" in text.message()
    separation.rows, separation.direction = np.arange(1), np.array([1.0, -2.0, 3.0, 4.0])
    text = End(
        Status.NO_MINIMUM, Verdict(separation=separation), 1e-8, 7, 1, SimpleNamespace(shape=(4,)), 0.1
    )
    assert "column 3: +1, column 2: +0.75, column 1: -0.5, and 1 more" in text.message()
    assert "1 row " in text.message()
    assert "0.123457" in text.message()
    lifted = End(
        Status.SEPARABLE, Verdict(separation=separation), 1e-8, 7, 1, SimpleNamespace(shape=(2,)), 0.1,
        lift=lambda u: u[:2],
    )  # fmt: skip
    assert "(column 1: -1, column 0: +0.5)" in lifted.message()
    flat = End(Status.FLAT, Verdict(flat=np.eye(4)[:, 1:2]), 1e-8, 7, 1, SimpleNamespace(shape=(4,)), 0.1)
    assert "1 direction has no curvature" in flat.message()
    assert "column 1" in flat.message()
    flat = End(Status.FLAT, Verdict(flat=np.eye(4)[:, 1:3]), 1e-8, 7, 1, SimpleNamespace(shape=(4,)), 0.1)
    assert "2 directions have" in flat.message()


@pytest.mark.parametrize(
    ("flat", "said"),
    [
        (np.eye(5)[:, :1], "1 direction has no curvature in float64 although the data see it: column 0: +1;"),
        (np.eye(5)[:, :2], "2 directions have no curvature in float64 although the data see them: column 0"),
        (np.eye(5)[:, :3], "the data see them: column 0: +1, column 1: +1, column 2: +1; centre"),
        (np.eye(5), "the data see them: column 0: +1, column 1: +1, column 2: +1, and 2 more; centre"),
        # Entries of a billionth are rounding.
        (np.array([[1.0], [2e-9], [0.0], [0.5e-9], [0.0]]), "it: column 0: +1, column 1: +2e-09; centre"),
    ],
)
def test_which_columns_are_named(flat, said):
    problem = SimpleNamespace(shape=(5,))
    text = End(Status.FLAT, Verdict(flat=flat), 1e-8, 7, 1, problem, 0.1).message()
    assert said in " ".join(text.split())


@pytest.mark.parametrize(
    ("convex", "has_logits", "n_starts", "said"),
    [
        (True, True, 1, "tol 1e-08"),
        (False, False, 1, "tol 1e-08"),
        (False, True, 1, "one descent"),
        (False, True, 4, "from 4 starts"),
    ],
)
def test_what_is_said_of_other_minima(convex, has_logits, n_starts, said):
    problem = SimpleNamespace(convex=convex, has_logits=has_logits, shape=(2,))
    text = End(Status.CONVERGED, Verdict(move=1e-9), 1e-8, 7, n_starts, problem, 0.1).message()
    assert said in text
    assert ("descent" in text or "starts" in text) == (not convex and has_logits)
    assert "1.0e-09" in text


def test_how_a_fit_ended():
    problem = SimpleNamespace(convex=True, has_logits=True, shape=(2,))

    def say(status, **verdict):
        return End(status, Verdict(**verdict), 1e-8, 7, 1, problem, 0.25, reason="a").message()

    assert "relative gradient 2.5e-01" in say(Status.MAX_ITER)
    assert "max_iter=7" in say(Status.MAX_ITER)
    assert "curvature sampled" in say(Status.CONVERGED, move=1e-9, sampled=True)
    assert "sampled" not in say(Status.CONVERGED, move=1e-9)
    assert "rounding of the data: 5.0e-07" in say(Status.CONVERGED, move=5e-7, at_floor=True)
    assert "not decided" in say(Status.PRECISION, undecided=True)
    assert "no further step" in say(Status.PRECISION)

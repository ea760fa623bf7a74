"""Bad input to attention problems: each gives an error that names the argument, the index and the remedy."""

import numpy as np
import pytest

from attnfit import AttentionRegressor, problems

rng = np.random.default_rng(0)
A1, A2 = rng.standard_normal((4, 2)), rng.standard_normal((3, 2))
B = np.full((4, 3), 1 / 3)


def changed(matrix, index, value):
    out = np.array(matrix, dtype=float)
    out[index] = value
    return out


EMPTIED = np.ones((4, 3), bool)
EMPTIED[2] = False

CASES = [
    ({"A1": changed(A1, (1, 0), np.nan)}, "A1 contains NaN at row 1, column 0"),
    ({"A2": changed(A2, (2, 1), np.inf)}, "A2 contains inf at row 2, column 1"),
    ({"B": changed(B, (3, 1), np.nan)}, "B contains NaN at row 3, column 1"),
    ({"B": changed(B, (3, 1), np.inf).astype(np.float16)}, "B contains inf at row 3, column 1"),
    *(
        (
            {"B": changed(B, (2, 2), -0.25), "loss": loss},
            rf"B is negative at row 2, column 2 \(-0.25\); loss '{loss}' takes shares >= 0",
        )
        for loss in ("cross_entropy", "kl", "log_ratio")
    ),
    ({"B": B.T}, r"B has shape \(3, 4\); expected \(queries, keys\) = \(4, 3\)"),
    ({"B": None}, "B is missing; loss 'squared' needs the maps"),
    ({"B": [["a"] * 3] * 4}, "B has dtype"),
    ({"A1": A1[:, 0]}, "A1 must have two dimensions"),
    ({"A1": np.empty((0, 2))}, "A1 is empty"),
    ({"loss": "square"}, "loss must be one of 'squared'"),
    ({"loss": "rescaled", "function": "tan"}, "function must be one of"),
    ({"mask": EMPTIED}, "mask leaves query 2 without a key; drop that row"),
    ({"mask": np.ones((3, 4), bool)}, r"mask has shape \(3, 4\); expected \(4, 3\)"),
    ({"mask": "causality"}, "mask must be 'causal', .* or an array of booleans, not 'causality'"),
    ({"mask": "causal"}, "mask='causal' needs at least as many keys as queries"),
    ({"mask": 0.5 * np.ones((4, 3))}, "mask must hold booleans"),
    ({"rank": 3}, r"rank must be an integer from 1 to min\(d1, d2\) = 2, not 3"),
    ({"rank": 0}, "rank must be an integer from 1"),
    ({"rank": 1.5}, "rank must be an integer from 1"),
    ({"weights": np.ones(3)}, r"weights has shape \(3,\) but A1 has 4 rows"),
    ({"weights": -np.ones(4)}, "weights is negative at index 0"),
    ({"weights": changed(np.ones((4, 3)), (1, 2), -1)}, "weights is negative at index 1, 2"),
    ({"weights": np.zeros(4)}, "weights are all zero"),
    ({"offset": changed(B, (0, 1), np.nan)}, "offset contains NaN at row 0, column 1"),
    ({"offset": np.ones(4)}, r"offset has shape \(4,\)"),
    ({"pair_features": [B, B[:2]]}, r"pair_features\[1\] has shape \(2, 3\)"),
    ({"row_penalty": changed(B, (1, 1), np.nan)}, "row_penalty contains NaN at row 1, column 1"),
    ({"ridge": -1.0}, "ridge must be a finite number >= 0"),
    ({"A1": [A1, A1]}, "A2 has 1 sequences but A1 has 2"),
    ({"A1": [A1, A1[:, :1]], "A2": [A2, A2], "B": [B, B]}, r"A1\[1\] has 1 features but A1\[0\] has 2"),
    ({"A1": [A1, A1], "A2": [A2, A2], "B": [B, B.T]}, r"B\[1\] has shape"),
    (
        {"A1": [A1, A1], "A2": [A2, A2], "B": [B, changed(B, (0, 2), -1)], "loss": "kl"},
        r"B\[1\] is negative at row 0, column 2",
    ),
    (
        {"A1": [A1, A1], "A2": [A2, A2], "B": [B, B], "weights": np.ones(8)},
        "weights must be a list with an entry",
    ),
    ({"A1": [A1, A1], "A2": [A2, A2], "B": [B, B], "pair_features": [[B]]}, "pair_features has 1 entries"),
]


@pytest.mark.parametrize(("changes", "message"), CASES, ids=[m[:40] for _, m in CASES])
def test_named(changes, message):
    with pytest.raises(ValueError, match=message):
        problems.Attention(**({"A1": A1, "A2": A2, "B": B} | changes))


def test_a_negative_entry_behind_a_mask_does_no_harm():
    seen = np.ones((4, 3), bool)
    seen[2, 2] = False
    problem = problems.Attention(A1, A2, changed(B, (2, 2), -1.0), "kl", mask=seen)
    assert np.isfinite(problem.value(np.zeros((2, 2))))
    with pytest.raises(ValueError, match="row 3, column 1"):
        problems.Attention(A1, A2, changed(B, (3, 1), -1.0), "kl", mask=seen)


def test_unnormalised_outputs_that_overflow_say_so():
    problem = problems.Attention(1e3 * A1, A2, B, "exponential")
    with pytest.raises(OverflowError, match="overflows float64"):
        problem.value(np.full((2, 2), 10.0))


@pytest.mark.parametrize("kind", [np.float32, np.float16, np.int64, bool])
def test_any_number_type(kind):
    problem = problems.Attention(A1.astype(kind), A2.astype(kind), np.eye(4, 3).astype(kind), "cross_entropy")
    assert problem.gradient(np.zeros((2, 2))).dtype == np.float64


def test_read_only_and_fortran_ordered_data():
    maps = np.asfortranarray(B)
    for array in (maps, A1, A2):
        array.setflags(write=False)
    value = problems.Attention(A1, A2, maps).value(np.eye(2))
    assert value == problems.Attention(A1.copy(), A2.copy(), B).value(np.eye(2))


@pytest.mark.parametrize("x", [np.zeros(3), np.zeros((4, 1)), np.full((2, 2), np.nan)])
def test_points(x):
    with pytest.raises(ValueError, match=r"x (has shape|contains)"):
        problems.Attention(A1, A2, B).value(x)


def test_saturated_maps():
    tokens = np.eye(3)
    problem = problems.Attention(tokens, tokens, np.eye(3), "cross_entropy")
    # Logits of 1e4: all the mass sits on one key.
    assert problem.value(1e4 * np.eye(3)) == 0.0
    assert np.isfinite(problem.hessian(1e4 * np.eye(3))).all()


def test_the_estimator_passes_errors_on():
    with pytest.raises(ValueError, match="B is negative at row 0, column 0"):
        AttentionRegressor().fit(A1, changed(B, (0, 0), -1.0), A2)

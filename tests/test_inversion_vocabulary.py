"""Tokens of a finite table from the output of a layer: what is found, what is called recovered."""

import numpy as np
import pytest
from instances import relative
from layer_reference import planted

from attnfit import inversion, problems
from attnfit.inversion.decoding import JointDecoder, Posterior, Prior
from attnfit.inversion.exchange import exchanged_squares
from attnfit.inversion.vocabulary import SpanTest, Vocabulary
from attnfit.objectives.inverse_curvature import moment_tokens


def table_layer(scale=1.0, n=16, d=8, size=1000, heads=1, rank=None, m=None, mask=None, known=0, seed=0):
    """A layer whose tokens are rows of a table, the table, and the numbers of these rows."""
    rng = np.random.default_rng(seed)
    table = rng.standard_normal((size, d))
    tokens = rng.integers(size, size=n)
    X = table[tokens].T
    W = [scale / d * rng.standard_normal((d, d)) for _ in range(heads)]
    m = m or d
    V = [rng.standard_normal((d, rank or d)) @ rng.standard_normal((rank or d, m)) / d for _ in range(heads)]
    given = {i: X[:, i] for i in range(known)}
    layer = problems.LayerInversion(W, V, np.zeros((n, m)), mask=mask)
    layer = problems.LayerInversion(W, V, layer.output(X), mask=mask, known=given or None)
    return layer, table, tokens


@pytest.mark.parametrize("scale", [0.3, 1.0])
@pytest.mark.parametrize("seed", range(6))
def test_base_setting_that_is_ambiguous_without_a_table(scale, seed):
    layer, table, tokens = table_layer(scale, seed=seed)
    found = inversion.recover(layer, vocabulary=table, random_state=0)
    assert found.verdict == "recovered"
    assert np.array_equal(found.tokens, tokens)
    assert np.array_equal(found.x, table[tokens].T)
    assert found.residual < 1e-14
    assert found.margins.min() > 1e-4


@pytest.mark.parametrize(
    "options",
    [
        {"mask": "causal"},
        {"mask": "causal", "heads": 2, "known": 3},
        {"heads": 2, "m": 16},
        {"known": 5},
        {"n": 6, "d": 12, "heads": 2, "rank": 8, "m": 16},
        {"n": 40, "d": 5, "scale": 0.5},
        {"n": 4, "d": 8},
    ],
)
def test_every_kind_of_layer(options):
    layer, table, tokens = table_layer(**options)
    found = inversion.recover(layer, vocabulary=table, random_state=0)
    assert found.verdict == "recovered", found.message
    assert np.array_equal(found.tokens, tokens[layer.unknown])


def test_table_of_each_position():
    rng = np.random.default_rng(0)
    base, shift = rng.standard_normal((200, 6)), rng.standard_normal((10, 6))
    tables = base + shift[:, None]
    tokens = rng.integers(200, size=10)
    X = tables[np.arange(10), tokens].T
    W, V = 0.2 * rng.standard_normal((6, 6)), rng.standard_normal((6, 6))
    layer = problems.LayerInversion(W, V, np.zeros((10, 6)))
    B = layer.output(X)
    for vocabulary in (tables, lambda position: tables[position]):
        found = inversion.recover(layer, B, vocabulary=vocabulary, random_state=0)
        assert np.array_equal(found.tokens, tokens)


def test_rounded_outputs_need_their_precision():
    layer, table, tokens = table_layer(seed=3)
    rounded = layer.B.astype(np.float16)
    exact = inversion.recover(layer, rounded, vocabulary=table, n_starts=2, random_state=0)
    assert exact.verdict == "not recovered"
    assert "give the output's precision" in exact.message
    found = inversion.recover(layer, rounded, vocabulary=table, precision=1e-3, random_state=0)
    assert found.verdict == "recovered"
    assert np.array_equal(found.tokens, tokens)


def test_rows_that_occur_twice_are_one_token():
    layer, table, tokens = table_layer(seed=1)
    found = inversion.recover(layer, vocabulary=np.vstack([table, table[tokens[4]]]), random_state=0)
    assert found.verdict == "recovered"
    row = int(found.tokens[4])
    assert row in (tokens[4], 1000)
    assert found.message.endswith(f"token 4 is row {row} (= {tokens[4] + 1000 - row})")
    assert found.equal_rows[4].tolist() == [tokens[4], 1000]
    assert found.margins.min() > 1e-4
    assert len(found.inputs) == 1


def test_tokens_outside_the_table_are_not_recovered():
    layer, table, tokens = table_layer(seed=2, size=300)
    without = np.delete(table, tokens[7], axis=0)
    found = inversion.recover(layer, vocabulary=without, n_starts=4, random_state=0)
    assert found.verdict == "not recovered"
    assert "check that tokens come from it" in found.message
    assert found.inputs == []


def test_a_wrong_beginning_in_order_is_left_where_it_does_not_fit_on():
    # Both rows give the same first output: only the second one tells them apart.
    rng = np.random.default_rng(0)
    table = rng.standard_normal((50, 3))
    table[1] = table[0] + np.array([0.0, 0.0, 2.0])
    V = np.vstack([rng.standard_normal((2, 3)), np.zeros(3)])
    W = rng.standard_normal((3, 3))
    layer = problems.LayerInversion(W, V, np.zeros((6, 3)), mask="causal")
    for first in (0, 1):
        tokens = np.array([first, 20, 30, 5, 8, 11])
        found = inversion.recover(layer, layer.output(table[tokens].T), vocabulary=table)
        assert np.array_equal(found.tokens, tokens)
        assert found.verdict == "recovered"


@pytest.mark.parametrize("mask", [None, "causal"])
def test_exchanged_outputs_are_those_of_the_layer(mask):
    layer, table, tokens = table_layer(heads=2, mask=mask, n=7)
    T = table[tokens]
    squares = exchanged_squares(layer, layer.layer.forward(T), 3, table[:20])
    for row, square in zip(table, squares, strict=False):
        T[3] = row
        assert relative(square, np.sum(layer.residuals(T.T) ** 2)) < 1e-10


def test_marginals_are_blocks_of_the_inverse():
    layer, table, tokens = table_layer(n=5, d=3)
    vocabulary = Vocabulary(table, 3, 5)
    posterior = Posterior(layer, Prior.of(vocabulary, layer.unknown, 5), table[tokens] + 0.1, 0.05)
    posterior.settle()
    covariance = np.linalg.inv(posterior.H)
    for i, precision in enumerate(posterior.marginals()):
        block = covariance[3 * i : 3 * i + 3, 3 * i : 3 * i + 3]
        assert relative(precision, np.linalg.inv(block)) < 1e-8


def test_settling_finds_the_largest_posterior():
    layer, table, tokens = table_layer(n=5, d=3)
    posterior = Posterior(
        layer, Prior.of(Vocabulary(table, 3, 5), layer.unknown, 5), table[tokens] + 0.1, 0.05
    )
    for _ in range(20):
        posterior.settle()
    assert np.linalg.norm(posterior.gradient) < 1e-3 * np.sqrt(np.linalg.norm(posterior.H, 2))


def test_known_tokens_stay_in_a_chain():
    layer, table, tokens = table_layer(known=6)
    joint = JointDecoder(layer, Vocabulary(table, 8, 16))
    found, square, made = joint.chain(layer.token_rows(layer.initial_point().reshape(-1)), 0.1, 1e-20)
    assert found.shape == (10,)
    assert np.array_equal(found, tokens[6:])
    assert square < 1e-20
    assert made >= 1


def test_values_of_tokens_lie_in_the_spans():
    layer, table, tokens = table_layer(n=6, d=12, heads=2, rank=8, m=16)
    spans = SpanTest.of(layer, 1e-12)
    scores = spans.scores(table)
    others = np.delete(scores, tokens)
    assert scores[tokens].max() < others.min() - 20.0
    assert SpanTest.of(table_layer(n=16, d=8)[0], 1e-12) is None


@pytest.mark.parametrize("heads", [1, 2])
def test_moments_are_exact_for_normal_keys(heads):
    # Many keys are normal enough: then every token comes back from two moments of the output.
    layer, table, tokens = table_layer(0.5, n=3000, d=3, heads=heads, m=3 * heads, size=5000)
    assert relative(moment_tokens(layer.layer, layer.B), table[tokens]) < 0.1


def test_moments_of_masked_or_merged_heads_do_not_exist():
    assert moment_tokens(*_layer_and_output(mask="causal")) is None
    assert moment_tokens(*_layer_and_output(heads=2)) is None
    flat, _, _ = table_layer(n=6)
    assert moment_tokens(flat.layer, np.ones((6, 8))) is not None


def _layer_and_output(**options):
    layer, _, _ = table_layer(**options)
    return layer.layer, layer.B


def test_moments_find_zeros_that_gaussian_starts_miss():
    found = [planted("base", 16, 8, 0.3, seed)[0] for seed in range(8)]
    hits = sum(inversion.recover(layer, n_starts=2, random_state=0).residual < 1e-9 for layer in found)
    assert hits >= 4


@pytest.mark.parametrize(
    ("vocabulary", "message"),
    [
        (np.ones((5, 3)), "vocabulary has rows of 3 numbers, but tokens have 8"),
        (np.ones((4, 5, 8)), "vocabulary has rows of 4 positions, but the output has 16"),
        (np.full((5, 8), np.nan), "vocabulary"),
        (np.ones((0, 8)), "has no rows"),
        (lambda position: np.ones((5, 7)), r"vocabulary\(0\) has rows of 7"),
        ("words", "vocabulary"),
    ],
)
def test_bad_vocabularies(vocabulary, message):
    layer, _, _ = table_layer()
    with pytest.raises(ValueError, match=message):
        inversion.recover(layer, vocabulary=vocabulary)


def test_bad_arguments():
    layer, table, _ = table_layer()
    with pytest.raises(ValueError, match="precision must lie between 0 and 1, not 2"):
        inversion.recover(layer, vocabulary=table, precision=2)
    with pytest.raises(ValueError, match="precision must lie between 0 and 1, not 'x'"):
        inversion.recover(layer, precision="x")
    with pytest.raises(ValueError, match=r"n_starts must be at least 1, an integer, not 2\.5"):
        inversion.recover(layer, n_starts=2.5)
    with pytest.raises(ValueError, match="B has 5 rows but the layer has 16 tokens"):
        inversion.recover(layer, np.ones((5, 8)), vocabulary=table)
    large, rows, _ = table_layer(n=400, d=8, size=50)
    with pytest.raises(ValueError, match="3200 unknowns are more than the 3000 that are decoded jointly"):
        inversion.recover(large, vocabulary=rows)


@pytest.mark.parametrize("with_table", [True, False])
def test_outputs_whose_squares_overflow_are_never_called_recovered(with_table):
    layer, table, _ = table_layer(n=6, d=4, size=50)
    with pytest.raises(ValueError, match="B is so large that its squares overflow"):
        inversion.recover(layer, 1e200 * layer.B, vocabulary=table if with_table else None)


@pytest.mark.parametrize("n", [1, 2])
def test_one_and_two_tokens(n):
    layer, table, tokens = table_layer(n=n, d=4, size=50)
    found = inversion.recover(layer, vocabulary=table, random_state=0)
    assert found.verdict == "recovered"
    assert np.array_equal(found.tokens, tokens)


@pytest.mark.parametrize(("size", "verdict"), [(0.0, "ambiguous"), (1.0, "not recovered")])
def test_an_output_of_zero(size, verdict):
    """Without values any rows give it; with values none of the table do, and the residual says how far."""
    rng = np.random.default_rng(0)
    layer = problems.LayerInversion(
        rng.standard_normal((4, 4)), size * rng.standard_normal((4, 4)), np.zeros((5, 4))
    )
    found = inversion.recover(layer, vocabulary=rng.standard_normal((20, 4)), random_state=0)
    assert found.verdict == verdict
    assert np.isfinite(found.residual)

"""The experiment on closeness: its parts against independent formulas, and its verdict on made-up cells."""

from dataclasses import replace

import numpy as np
import pytest
from instances import relative
from scipy.special import softmax

from attnfit import incontext
from attnfit.incontext.experiment import Comparison, measure, verdict
from attnfit.incontext.instances import Batch, draw
from attnfit.incontext.trained_attention import train

pytest.importorskip("torch")


@pytest.fixture(scope="module")
def cell():
    return measure(8, 4, count=40, n_training=400, n_epochs=3)


def batch(planted=False, count=20, n=6, d=3):
    return draw(count, n, d, planted, np.random.default_rng(0))


def test_moves_of_a_batch_are_those_of_single_instances():
    many = batch()
    for k in range(3):
        step = incontext.one_step(many.A[k], many.b[k], many.x[k], 0.2, 0.3)
        assert relative(many.shift(0.2 * many.descent)[k], step.weight.delta) < 1e-12
        assert relative(many.shift(0.3 * many.data_descent)[k], step.data.delta) < 1e-12
        assert relative(many.loss(0.2 * many.descent)[k], step.losses[1]) < 1e-12


def test_planted_targets_are_attained():
    many = batch(planted=True, d=2)
    logits = np.log(many.b) - np.log(many.b).mean(axis=1, keepdims=True)
    for A, z in zip(many.A, logits, strict=True):
        columns = np.column_stack([A, np.ones(len(A))])
        assert np.linalg.norm(z - columns @ np.linalg.lstsq(columns, z, rcond=None)[0]) < 1e-10


def test_small_shifts_keep_their_digits():
    many = batch()
    tiny = many.shift(1e-13 * many.descent)
    f = many.f
    first = f * (1e-13 * many.descent)
    first -= f * first.sum(axis=1, keepdims=True)
    assert relative(tiny, first) < 1e-10


def test_training_lowers_the_loss_of_other_instances():
    rng = np.random.default_rng(0)
    learned = train(lambda size: draw(size, 8, 4, False, rng), 1000, 6, 0)
    assert learned.losses[-1] < learned.losses[0] < 1.5
    held_out = draw(100, 8, 4, False, rng)
    after = held_out.loss(learned.move(held_out))
    assert np.median(after / held_out.loss()) < 0.7


def test_the_layer_is_softmax_attention():
    rng = np.random.default_rng(0)
    learned = train(lambda size: draw(size, 5, 3, False, rng), 64, 1, 0)
    one = draw(1, 5, 3, False, rng)
    tokens = np.column_stack([one.A[0], one.b[0], one.z[0], one.slope[0]])
    total = np.zeros(5)
    for Q, K, V in zip(*(learned.parameters[name] for name in "QKV"), strict=True):
        weights = softmax((tokens @ Q) @ (tokens @ K).T / np.sqrt(Q.shape[1]), axis=1)
        total += weights @ (tokens @ V)
    assert relative(learned.move(one)[0], total) < 1e-6


def test_training_is_repeatable():
    made = [
        train(lambda size: draw(size, 5, 3, False, np.random.default_rng(1)), 128, 2, 3) for _ in range(2)
    ]
    assert np.array_equal(made[0].losses, made[1].losses)


def test_a_cell(cell):
    assert cell.at_best["linear attention"].errors.max() < 1e-10
    assert np.allclose(cell.at_best["gradient step"].cosines, 1.0)
    assert np.median(cell.at_best["gradient step"].losses) < 1.0
    assert np.median(np.abs(cell.at_best["null: random"].cosines)) < 0.6
    assert 0.3 < np.median(cell.at_small["data step"].cosines) < 0.99
    assert "trained attention" not in cell.at_small
    assert (cell.slack > 0).all()
    assert cell.curves["data step"].shape == (61, 4)
    assert cell.trajectories["gradient step"][0].tolist() == [1.0, 1.0]
    assert cell.trajectories["gradient step"][-1, 0] < cell.trajectories["gradient step"][1, 0]


def test_rows_that_are_nearly_orthogonal_make_the_steps_close():
    wide = measure(6, 600, count=30, n_training=64, n_epochs=1)
    assert np.median(wide.at_small["data step"].cosines) > 0.98


def test_the_verdict_follows_the_numbers(cell):
    found = verdict([cell])
    assert found.close == {"data step": False, "trained attention": False}
    assert "the data step is not close to the gradient step" in found.sentence
    ones = np.ones(5)
    near = Comparison(0.99 * ones, 0.1 * ones, ones)
    close = replace(cell, at_best=cell.at_best | {"data step": near})
    assert verdict([close]).close["data step"]
    assert not verdict([close, cell]).close["data step"]


def test_batches_move():
    many = batch()
    assert isinstance(many.moved(many.descent), Batch)
    assert relative(many.moved(many.descent).loss(), many.loss(many.descent)) < 1e-14

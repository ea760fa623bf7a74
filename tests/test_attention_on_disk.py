"""Attention maps on disk: the same fits as in memory, read by blocks of queries."""

import numpy as np
import pytest
from instances import relative

from attnfit import minimize, problems
from attnfit.data import open_source

LOSSES = ["squared", "cross_entropy", "kl", "log_ratio", "rescaled", "exponential", "linear_cross_entropy"]


def maps(rng, n1, n2, d=3, dtype=np.float64):
    A1, A2 = rng.standard_normal((n1, d)), rng.standard_normal((n2, d))
    e = np.exp(A1 @ (0.5 * np.eye(d)) @ A2.T + 0.1 * rng.standard_normal((n1, n2)))
    return A1, A2, (e / e.sum(axis=1, keepdims=True)).astype(dtype)


@pytest.fixture
def few_pairs(monkeypatch):
    monkeypatch.setattr("attnfit.data.pairs.BLOCK_PAIRS", 100)


def stored(kind, B, at):
    if kind == "zarr":
        zarr = pytest.importorskip("zarr")
        array = zarr.create_array(
            at.with_suffix(".zarr"), shape=B.shape, chunks=(7, B.shape[1]), dtype=B.dtype
        )
        array[...] = B
        return array
    path = at.with_suffix(".npy")
    np.save(path, B)
    return open_source(path) if kind == "npy" else np.load(path, mmap_mode="r")


@pytest.mark.parametrize("kind", ["npy", "memmap", "zarr"])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("mask", [None, "causal"])
def test_one_sequence(loss, kind, mask, tmp_path, few_pairs):
    A1, A2, B = maps(np.random.default_rng(0), 23, 31)
    memory = problems.Attention(A1, A2, B, loss=loss, mask=mask, ridge=0.1)
    disk = problems.Attention(A1, A2, stored(kind, B, tmp_path / "B"), loss=loss, mask=mask, ridge=0.1)
    x = 0.3 * np.ones((3, 3))
    assert disk.value(x) == pytest.approx(memory.value(x), rel=1e-13)
    assert relative(disk.gradient(x), memory.gradient(x)) < 1e-12
    assert relative(disk.hessian(x), memory.hessian(x)) < 1e-12
    assert relative(disk.predict(x), memory.predict(x)) < 1e-13
    assert disk.relative_error(x) == pytest.approx(memory.relative_error(x), rel=1e-12)
    assert relative(minimize(disk).x, minimize(memory).x) < 1e-9


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_several_sequences_and_a_rank(dtype, tmp_path, few_pairs):
    rng = np.random.default_rng(1)
    parts = [maps(rng, n1, n2, dtype=dtype) for n1, n2 in [(12, 9), (5, 40), (17, 17)]]
    A1, A2, B = (list(p) for p in zip(*parts, strict=True))
    on_disk = [stored("npy", b, tmp_path / str(s)) if s != 1 else b for s, b in enumerate(B)]
    for options in ({}, {"rank": 2}):
        memory = problems.Attention(A1, A2, B, loss="cross_entropy", **options)
        disk = problems.Attention(A1, A2, on_disk, loss="cross_entropy", **options)
        ours, theirs = (minimize(p, random_state=0) for p in (disk, memory))
        assert ours.value == pytest.approx(theirs.value, rel=1e-12)
        if not options:
            assert relative(ours.x, theirs.x) < 1e-9


def test_rounded_maps_are_told_from_their_type_on_disk(tmp_path, few_pairs):
    A1, A2, B = maps(np.random.default_rng(2), 20, 20, dtype=np.float16)
    assert problems.Attention(A1, A2, stored("npy", B, tmp_path / "B")).zeros_are_rounded()
    B[3, 4] = 0.0
    disk = problems.Attention(A1, A2, stored("npy", B, tmp_path / "B"))
    assert disk.zeros_are_rounded() == problems.Attention(A1, A2, B).zeros_are_rounded()


def test_faults_are_named(tmp_path, few_pairs):
    A1, A2, B = maps(np.random.default_rng(3), 20, 30)
    with pytest.raises(ValueError, match=r"B has shape \(19, 30\); expected"):
        problems.Attention(A1, A2, stored("npy", B[:19], tmp_path / "B"))
    bad = B.copy()
    bad[11, 7] = -0.5
    with pytest.raises(ValueError, match="B is negative at row 11, column 7"):
        problems.Attention(A1, A2, stored("npy", bad, tmp_path / "B"), "cross_entropy")
    bad[11, 7] = np.nan
    with pytest.raises(ValueError, match=r"B contains NaN at row 11, column 7 .*B\.npy"):
        problems.Attention(A1, A2, stored("npy", bad, tmp_path / "B"))

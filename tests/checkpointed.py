"""Fits that are stopped and go on, and how they are compared."""

import json
import warnings

import numpy as np
from instances import instance
from safetensors import safe_open
from scipy import sparse
from sklearn.exceptions import ConvergenceWarning

from attnfit import minimize, problems
from attnfit.data import DenseDesign
from attnfit.solvers import (
    ActiveSet,
    BatchedNewton,
    GradientDescent,
    LevenbergMarquardt,
    Newton,
    SampledTwoLayer,
    checkpoint_file,
)


class Crash(Exception):
    """Nobody catches it."""


def rows(n, loss="squared", d=4, seed=0, **options):
    inst, _ = instance("Softmax", loss, sizes=(n // 2, n - n // 2), d=d, noise=0.3, seed=seed)
    return inst.problem(**options)


def large(loss="squared", **options):
    """Large enough that starts are sought on samples, with a group that is longer than a block."""
    return rows(30_000, loss, d=3, **options)


def exponential(**options):
    inst, _ = instance("Exponential", "exp", sizes=(25_000,), d=3, noise=0.3)
    return inst.problem(**options)


def attention(rank=None, loss="squared"):
    rng = np.random.default_rng(0)
    A1, A2, X = rng.standard_normal((30, 4)), rng.standard_normal((25, 3)), rng.standard_normal((4, 3))
    maps = np.exp(A1 @ X @ A2.T + 0.5 * rng.standard_normal((30, 25)))
    return problems.Attention(A1, A2, maps / maps.sum(axis=1, keepdims=True), loss, rank=rank)


def outputs():
    rng = np.random.default_rng(1)
    A1, A2, A3 = rng.standard_normal((20, 3)), rng.standard_normal((15, 3)), rng.standard_normal((15, 2))
    return problems.FullAttention(A1, A2, A3, rng.standard_normal((20, 2)))


def layer():
    rng = np.random.default_rng(2)
    return problems.LayerInversion(rng.standard_normal((3, 3)), rng.standard_normal((3, 3)),
                                   rng.standard_normal((5, 3)), gamma=0.1)  # fmt: skip


def two_layer(k=None, activation="tanh", A1=True):
    rng = np.random.default_rng(3)
    b = rng.standard_normal(6 if k is None else (6, k))
    first = rng.standard_normal((9, 3)) if A1 else None
    return problems.TwoLayer(first, rng.standard_normal((6, 9)), b, activation)


# Layers are passed again where an evaluation is all that was kept.
IN_MEMORY = np.inf
START = np.full(3, 0.3)
# Problem, solver and options; further reads that a resumed fit may take, beyond the one that checks the data.
CASES = {
    "auto": (large, None, {}, 0),
    "auto, cross entropy": (lambda: large("cross_entropy", ridge=1e-3), None, {}, 0),
    "auto, exponential": (exponential, None, {}, 0),
    "auto, small": (lambda: rows(60), None, {}, 0),
    "auto, sparse, given start": (
        lambda: large(A=sparse.csr_array(instance("Softmax", "squared", sizes=(15_000,) * 2)[0].A)),
        None,
        {"x0": START},
        0,
    ),
    "exact": (large, Newton("exact"), {}, 0),
    "exact, every step": (large, Newton("exact", "none"), {"x0": START}, 0),
    "sampled": (large, Newton("sampled", sample_rows=500), {}, 1),
    "sampled, every step": (large, Newton("sampled", "none", 2000), {"x0": START}, 1),
    "matrix free": (large, Newton("matrix_free"), {}, 2),
    "matrix free, sampled": (large, Newton("matrix_free", sample_rows=200), {}, 2),
    "matrix free, small": (lambda: rows(60), Newton("matrix_free"), {}, 1),
    "gradient descent": (lambda: rows(60), GradientDescent(), {"tol": 1e-3}, 0),
    "attention": (attention, None, {}, 0),
    "attention, sampled start": (lambda: attention(loss="rescaled"), None, {}, 0),
    "low rank": (lambda: attention(rank=2), None, {}, 3),
    "outputs": (outputs, None, {"max_iter": 15}, 3),
    "batch": (lambda: two_layer(k=5), BatchedNewton(), {}, IN_MEMORY),
    "escaping": (two_layer, None, {}, IN_MEMORY),
    "sampled diagonal": (two_layer, SampledTwoLayer(), {"max_iter": 10}, IN_MEMORY),
    "mixture": (lambda: two_layer(40, "identity", A1=False), ActiveSet(), {}, IN_MEMORY),
    "layer, Newton": (layer, Newton(), {}, IN_MEMORY),
    "layer": (layer, LevenbergMarquardt(2), {"max_iter": 20}, IN_MEMORY),
}


def fit(case, path=None, callback=None, make=None, **changes):
    default, solver, options, _ = CASES[case]
    make = default if make is None else make
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        options = {"solver": solver, "random_state": 0} | options | changes
        return minimize(make(), checkpoint=path, callback=callback, **options)


def crashing(after, how=Crash):
    """A callback that ends the fit at a record."""
    seen = []

    def callback(record):
        seen.append(record)
        if len(seen) < after:
            return False
        if how == "stop":
            return True
        raise how

    return callback


def steps(result):
    """The history without reads and seconds."""
    columns = result.history.columns().items()
    return {name: column for name, column in columns if not name.startswith(("n_passes", "seconds"))}


def assert_same(result, reference, further=0.0):
    """The same fit bit for bit; it read the data once more to check them, and perhaps ``further`` times."""
    for name in ("x", "value", "gradient", "gradient_norm", "n_iter", "status", "solver", "local_values"):
        np.testing.assert_equal(getattr(result, name), getattr(reference, name))
    np.testing.assert_equal(steps(result), steps(reference))
    assert -1e-9 <= result.n_passes - reference.n_passes <= 1.0 + further + 1e-9


def header_of(path):
    with safe_open(path, framework="numpy") as file:
        return json.loads(file.metadata()[checkpoint_file.HEADER])


class Reads:
    """Count the blocks read, and raise at one of them."""

    def __init__(self, monkeypatch):
        self.count, self.fatal, self.error = 0, None, Crash
        fetch = DenseDesign._fetch

        def counted(design, rows):
            self.count += 1
            if self.count == self.fatal:
                raise self.error
            return fetch(design, rows)

        monkeypatch.setattr(DenseDesign, "_fetch", counted)


def forge(path, change_header=lambda header: None, change_arrays=lambda arrays: None):
    """Change a file and make its digest right."""
    arrays, header = checkpoint_file.read(path)
    change_header(header)
    change_arrays(arrays)
    checkpoint_file.write(path, arrays, header)

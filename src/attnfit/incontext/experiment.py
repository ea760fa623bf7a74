"""Is a step of attention close to a gradient step? What the shifts of both have in common, measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from attnfit.incontext.constructions import softmax_regression_layer
from attnfit.incontext.instances import Batch, draw
from attnfit.incontext.trained_attention import TrainedAttention, train

Array = NDArray[np.float64]

STEP_SIZES = np.logspace(-3.0, 3.0, 61)
SMALL_STEP = 1e-3
# What counts as close, of the median instance.
CLOSE_COSINE, CLOSE_ERROR = 0.95, 0.3
N_STEPS = 10
SHAPES = tuple((n, max(1, round(n * ratio))) for n in (12, 40) for ratio in (0.1, 1 / 3, 1.0, 10.0))
QUANTILES = (0.05, 0.5, 0.95)


@dataclass(frozen=True)
class Comparison:
    """One kind of shift d against that of the gradient step, over instances.

    Attributes
    ----------
    cosines : ndarray, shape (count,)
    errors : ndarray, shape (count,)
        ``|d_GD - k d| / |d_GD|`` with the best k.
    losses : ndarray, shape (count,)
        After the move, relative to before.
    """

    cosines: Array
    errors: Array
    losses: Array


@dataclass(frozen=True)
class Cell:
    """Everything measured for one size.

    Attributes
    ----------
    n, d : int
    planted : bool
    condition : float
        Median ratio of the extreme positive eigenvalues of ``A A^T``.
    at_best : dict of Comparison
        By kind of move, with each instance's best step size.
    at_small : dict of Comparison
        With steps of 1e-3, where the step size matters.
    slack : ndarray, shape (count,)
        Decimal logarithm of the published bound ``n^1.5 exp(10 R^2) |dx|`` over ``|d_GD|``.
    curves : dict of ndarray, shape (steps, 4)
        By kind of move: step size and quantiles 5, 50, 95 % of the cosine with a gradient step of that size.
    losses : dict of ndarray, shape (steps, 4)
        By kind of move that has a step size: step size and quantiles of the loss after it, relative to
        before.
    trajectories : dict of ndarray, shape (steps + 1, 2)
        By kind of move, repeated: median relative loss, and median cosine of the total shift with that of
        gradient descent.
    """

    n: int
    d: int
    planted: bool
    condition: float
    at_best: dict[str, Comparison]
    at_small: dict[str, Comparison]
    slack: Array
    curves: dict[str, Array]
    losses: dict[str, Array]
    trajectories: dict[str, Array]


def measure(
    n: int,
    d: int,
    *,
    planted: bool = False,
    count: int = 200,
    n_training: int = 10_000,
    n_epochs: int = 10,
    random_state: int = 0,
) -> Cell:
    """Compare one gradient step with a step on the data, with the linear attention layer that equals it, with
    a trained softmax attention layer, and with two nulls, on held-out instances of one size.

    Parameters
    ----------
    n, d : int
        Rows and columns of each instance.
    planted : bool
        Targets that some x attains; else the softmax of noise.
    count : int
        Held-out instances.
    n_training, n_epochs : int
        Of the trained layer, which lowers the loss and is not shown what a gradient step does.
    random_state : int

    Returns
    -------
    Cell
    """
    rng = np.random.default_rng(random_state)
    attention = train(lambda size: draw(size, n, d, planted, rng), n_training, n_epochs, random_state)
    batch = draw(count, n, d, planted, rng)
    steps = batch.best_step(batch.descent, STEP_SIZES)
    data_steps = batch.best_step(batch.data_descent, STEP_SIZES)
    small = np.full(count, SMALL_STEP)
    best = _steps_of(batch, steps, data_steps, rng) | {
        "trained attention": batch.shift(attention.move(batch))
    }
    singular = np.linalg.svd(batch.A, compute_uv=False)
    return Cell(
        n=n,
        d=d,
        planted=planted,
        condition=float(np.median((singular[:, 0] / singular[:, -1]) ** 2)),
        at_best=_compared(batch, best),
        at_small=_compared(batch, _steps_of(batch, small, small, rng)),
        slack=_slack(batch, steps),
        curves=_curves(batch, data_steps, attention),
        losses=_losses(batch),
        trajectories=_trajectories(batch, steps, data_steps, attention),
    )


def _steps_of(batch: Batch, steps: Array, data_steps: Array, rng: np.random.Generator) -> dict[str, Array]:
    """Return the shift of every kind of move that has a step size."""
    gradient = batch.shift(steps[:, None] * batch.descent)
    moved = [
        softmax_regression_layer(A, b, x, float(step)).apply()[:, -2] - z
        for A, b, x, z, step in zip(batch.A, batch.b, batch.x, batch.z, steps, strict=True)
    ]
    noise = rng.standard_normal(batch.z.shape)
    return {
        "gradient step": gradient,
        "linear attention": batch.shift(np.stack(moved)),
        "data step": batch.shift(data_steps[:, None] * batch.data_descent),
        "null: another instance": np.roll(gradient, 1, axis=0),
        "null: random": noise - noise.mean(axis=1, keepdims=True),
    }


def _compared(batch: Batch, shifts: dict[str, Array]) -> dict[str, Comparison]:
    """Compare all with the first."""
    reference = shifts["gradient step"]
    size = np.linalg.norm(reference, axis=1)
    found = {}
    for name, shift in shifts.items():
        # A null says nothing of sizes: it is given that of the gradient step.
        if name.startswith("null"):
            shift = shift * (size / np.linalg.norm(shift, axis=1))[:, None]
        cosine = _cosines(reference, shift)
        after = 0.5 * np.sum((batch.f + shift - batch.b) ** 2, axis=1)
        scale = cosine * size / np.maximum(np.linalg.norm(shift, axis=1), np.finfo(float).tiny)
        error = np.linalg.norm(reference - scale[:, None] * shift, axis=1) / size
        found[name] = Comparison(cosine, error, after / batch.loss())
    return found


def _cosines(one: Array, other: Array) -> Array:
    sizes = np.linalg.norm(one, axis=1) * np.linalg.norm(other, axis=1)
    return np.asarray(np.sum(one * other, axis=1) / np.maximum(sizes, np.finfo(float).tiny))


def _slack(batch: Batch, steps: Array) -> Array:
    """Return by how many powers of ten the published bound exceeds the shift of the gradient step."""
    n = batch.b.shape[1]
    move = steps[:, None] * np.einsum("cnd,cn->cd", batch.A, batch.slope)
    x_new = batch.x - move
    R = np.max(
        [
            np.linalg.norm(batch.A, 2, axis=(1, 2)),
            np.linalg.norm(batch.x, axis=1),
            np.linalg.norm(x_new, axis=1),
        ],
        axis=0,
    )
    # The bound is stated for R >= 4.
    R = np.maximum(R, 4.0)
    shift = np.linalg.norm(batch.shift(steps[:, None] * batch.descent), axis=1)
    log_bound = 1.5 * np.log(n) + 10.0 * R**2 + np.log(np.linalg.norm(move, axis=1))
    return np.asarray((log_bound - np.log(shift)) / np.log(10.0))


def _curves(batch: Batch, data_steps: Array, attention: TrainedAttention) -> dict[str, Array]:
    """Return quantiles of the cosines with the gradient step against its step size."""
    others = {
        "data step": batch.shift(data_steps[:, None] * batch.data_descent),
        "trained attention": batch.shift(attention.move(batch)),
    }
    rows: dict[str, list[list[float]]] = {name: [] for name in others}
    for step in STEP_SIZES:
        gradient = batch.shift(step * batch.descent)
        for name, other in others.items():
            rows[name].append([step, *np.quantile(_cosines(gradient, other), QUANTILES)])
    return {name: np.array(values) for name, values in rows.items()}


def _losses(batch: Batch) -> dict[str, Array]:
    """Return quantiles of the relative loss after a step of either kind against its size."""
    start = batch.loss()
    found = {}
    for name, direction in (("gradient step", batch.descent), ("data step", batch.data_descent)):
        rows = [[s, *np.quantile(batch.loss(s * direction) / start, QUANTILES)] for s in STEP_SIZES]
        found[name] = np.array(rows)
    return found


def _trajectories(
    batch: Batch, steps: Array, data_steps: Array, attention: TrainedAttention
) -> dict[str, Array]:
    """Repeat each kind of move, with the step sizes of the first."""
    moves = {
        "gradient step": lambda at: steps[:, None] * at.descent,
        "data step": lambda at: data_steps[:, None] * at.data_descent,
        "trained attention": attention.move,
    }
    start = batch.loss()
    rows: dict[str, list[list[float]]] = {name: [] for name in moves}
    at = dict.fromkeys(moves, batch)
    for step in range(N_STEPS + 1):
        reference = at["gradient step"].f - batch.f
        for name, move in moves.items():
            cosine = 1.0 if step == 0 else float(np.median(_cosines(reference, at[name].f - batch.f)))
            rows[name].append([float(np.median(at[name].loss() / start)), cosine])
            at[name] = at[name].moved(move(at[name]))
    return {name: np.array(values) for name, values in rows.items()}


@dataclass(frozen=True)
class Verdict:
    """What the cells say about closeness, as a sentence with its numbers.

    Attributes
    ----------
    close : dict of bool
        For the step on the data and the trained attention layer: whether they are close in every cell.
    sentence : str
    """

    close: dict[str, bool]
    sentence: str


def verdict(cells: Sequence[Cell]) -> Verdict:
    """Return whether the shifts are close: median cosine at least 0.95 and error at most 0.3 in every cell.

    A shift of another instance satisfies the published bound as well: it shows how little that says.
    """
    parts, close = [], {}
    for name in ("data step", "trained attention"):
        cosines = [float(np.median(cell.at_best[name].cosines)) for cell in cells]
        errors = [float(np.median(cell.at_best[name].errors)) for cell in cells]
        close[name] = min(cosines) >= CLOSE_COSINE and max(errors) <= CLOSE_ERROR
        near = sum(c >= CLOSE_COSINE and e <= CLOSE_ERROR for c, e in zip(cosines, errors, strict=True))
        parts.append(
            f"the {name} is {'close' if close[name] else 'not close'} to the gradient step: median cosine "
            f"{min(cosines):.2f} to {max(cosines):.2f}, relative error up to {max(errors):.2f}, close in "
            f"{near} of {len(cells)} sizes"
        )
    small = [float(np.median(cell.at_small["data step"].errors)) for cell in cells]
    null = max(float(np.median(np.abs(cell.at_best["null: another instance"].cosines))) for cell in cells)
    exact = max(float(cell.at_best["linear attention"].errors.max()) for cell in cells)
    slack = min(float(np.median(cell.slack)) for cell in cells)
    parts.append(f"at steps of 1e-3 the data step's error is still {min(small):.2f} to {max(small):.2f}")
    parts.append(f"the shift of another instance has a median |cosine| up to {null:.2f}")
    parts.append(f"the linear attention layer made for it equals the gradient step to {exact:.0e}")
    parts.append(f"the published bound exceeds the shift by at least {slack:.0f} powers of ten")
    return Verdict(close, "; ".join(parts) + ".")

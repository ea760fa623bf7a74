"""A user's problem and two points as the instances that bounds speak of."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from attnfit.data.inputs import as_point
from attnfit.data.pairs import PairRows
from attnfit.losses.activations import Activation
from attnfit.losses.elementwise import SquaredExponential
from attnfit.losses.rescaled import SquaredRescaled
from attnfit.objectives.attention import Attention
from attnfit.objectives.objective import Problem
from attnfit.objectives.rows import RowProblem
from attnfit.problems import LayerInversion, TwoLayer
from attnfit.theory import instances
from attnfit.theory.instances.sampling import AnyInstance

Array = NDArray[np.float64]

# Groups are stacked until they hold this many numbers, and right-hand sides taken up to this many.
ENTRIES = 2**24
COLUMNS = 16
# Size of the move of the data, in terms of |A|; elementary facts take products of matrices of this order.
MOVE, FACTS = 1e-3, 2_000


@dataclass
class Reading:
    """Instances of a problem, what they are models of, and what was left out."""

    instances: list[AnyInstance]
    models: tuple[str, ...]
    function: str = "exp"
    notes: list[str] = field(default_factory=list)


def read(problem: Problem, x: Any, y: Any, random_state: Any = 0) -> Reading:
    """Return the instances of a problem; ``random_state`` seeds the move of the data.

    Raises
    ------
    TypeError
        If the papers have no bounds for this problem.
    """
    if isinstance(problem, RowProblem):
        return _with_facts(_grouped(problem, x, y, random_state))
    if isinstance(problem, TwoLayer):
        return _with_facts(_two_layer(problem, x, y))
    if isinstance(problem, LayerInversion):
        return _with_facts(_layer(problem, x, y))
    raise TypeError(
        f"the papers state no bounds for {type(problem).__name__}; pass a Softmax, Exponential, Rescaled, "
        "Attention (without rank), TwoLayer or LayerInversion problem"
    )


def _grouped(problem: RowProblem, x: Any, y: Any, random_state: Any) -> Reading:
    loss = problem.loss
    if not problem.rows.is_whole:
        raise TypeError("the rows are on the workers of a Dask cluster; pass the problem on some of its rows")
    if not (loss.coupled or isinstance(loss, SquaredExponential)):
        raise TypeError(f"the papers state no bounds for {type(loss).__name__}, which is no sum of squares")
    plain, rescaled = isinstance(loss, SquaredExponential), isinstance(loss, SquaredRescaled)
    function = loss.function if isinstance(loss, SquaredExponential | SquaredRescaled) else "exp"
    models = ("exponential",) if plain else ("rescaled",) if rescaled else ("softmax",)
    notes = []
    first, second = as_point(x, problem.shape, "x"), as_point(y, problem.shape, "y")
    starts = np.append(problem.groups.starts, problem.n_rows)
    lengths = np.diff(starts)
    chosen = np.argsort(-lengths, kind="stable")
    width = problem.n_unknowns + (problem.offset is not None)
    chosen = np.sort(chosen[: max(1, ENTRIES // (int(lengths.max()) * width))])
    if len(chosen) < len(lengths):
        notes.append(f"of {len(lengths)} groups the {len(chosen)} longest are audited")
    elif len(lengths) > 1:
        notes.append(f"{len(lengths)} groups: a bound on one group is evaluated for each, the worst is shown")
    n = int(lengths[chosen].max())
    A, b = np.zeros((len(chosen), n, width)), np.zeros((len(chosen), n))
    mask = np.zeros((len(chosen), n), dtype=bool)
    for k, g in enumerate(chosen):
        rows = slice(int(starts[g]), int(starts[g + 1]))
        count = rows.stop - rows.start
        A[k, :count, : problem.n_unknowns] = _dense(problem, rows)
        if problem.offset is not None:
            A[k, :count, -1] = problem.offset[rows]
        b[k, :count], mask[k, :count] = problem.b[rows], True
    if problem.offset is not None:
        first, second = np.append(first, 1.0), np.append(second, 1.0)
        notes.append("the offset is a further column of A, with coefficient 1")
    if problem.weights is not None:
        notes.append("row weights are left out: the papers' losses have none")
    _note_penalties(notes, problem.penalty is not None or np.any(problem.ridge))
    moved, told = _moved(A, mask, random_state)
    notes.append(told)
    instance = instances.Regression(A, b, first, second, A_moved=moved, function=function, mask=mask)
    return Reading([instance], models, function, notes)


def _moved(A: Array, mask: NDArray[np.bool_], random_state: Any) -> tuple[Array, str]:
    """Return ``A' = A + 1e-3 |A_j| E_j``, each group's E_j standard normal and of spectral norm 1, and what
    is said of it.
    """
    E = np.random.default_rng(random_state).standard_normal(A.shape) * mask[..., None]
    sizes = MOVE * np.linalg.norm(A, 2, axis=(1, 2)) / np.linalg.norm(E, 2, axis=(1, 2))
    seed = random_state if isinstance(random_state, int | np.integer) else "as given"
    told = f"A' = A + {MOVE:g} |A| E, E Gaussian with |E| = 1, random_state {seed}"
    return A + sizes[:, None, None] * E, told


def _with_facts(reading: Reading) -> Reading:
    """Add the vectors and matrices on which elementary facts are evaluated: logits at both points, and the
    Gram matrices of the data with and without the outputs as weights.
    """
    first: Any = reading.instances[0]
    if isinstance(first, instances.Recovery):
        a, b = first.X.reshape(-1), first.Y.reshape(-1)
        X, Y = first.X @ first.X.T, first.Y @ first.Y.T
    else:
        A = first.A1 if isinstance(first, instances.TwoLayer) else first.A[0]
        a, b = A @ first.x, A @ first.y
        f = np.exp(a - a.max())
        X, Y = A.T @ ((f / f.sum())[:, None] * A), A.T @ A
    if len(a) > FACTS or len(X) > FACTS:
        reading.notes.append(f"elementary facts are evaluated up to {FACTS:,} rows and columns")
        return reading
    reading.instances.append(instances.Facts(a, b, X, Y))
    return reading


def _dense(problem: RowProblem, rows: slice) -> Array:
    """Return rows of a group, numbered in group order."""
    order = problem.groups.order
    block = problem.design.block(rows if order is None or isinstance(problem, Attention) else order[rows])
    if isinstance(block, PairRows):
        pairs = np.einsum("qi,kj->qkij", block.queries, block.keys)
        flat = pairs.reshape(-1, pairs.shape[2] * pairs.shape[3])
        flat = flat if block.mask is None else flat[block.mask.reshape(-1)]
        return np.column_stack([flat, *block.features])
    return _array(block)


def _two_layer(problem: TwoLayer, x: Any, y: Any) -> Reading:
    notes: list[str] = []
    first, second = problem.point(x), problem.point(y)
    inner = problem.logit_map.matrix
    A1 = np.eye(problem.logit_map.shape[0]) if inner is None else _array(inner)
    A2 = _array(problem.outer)
    columns = range(min(problem.n_columns, COLUMNS))
    if problem.n_columns > 1:
        notes.append(
            f"{len(columns)} of {problem.n_columns} right-hand sides are audited, the worst is shown"
        )
    if problem.weights is not None:
        notes.append("row weights are left out: the paper's loss has none")
    _note_penalties(notes, problem.penalty is not None or problem.ridge != 0.0)
    if problem.offset is not None:
        notes.append("the offset is a further column of A1, with coefficient 1")
    found: list[AnyInstance] = []
    for j in columns:
        matrix, start, end = A1, first[:, j], second[:, j]
        if problem.offset is not None:
            matrix = np.column_stack([A1, problem.offset[:, min(j, problem.offset.shape[1] - 1)]])
            start, end = np.append(start, 1.0), np.append(end, 1.0)
        h = problem.activation
        if not isinstance(h, Activation) or h.kink is not None:
            raise TypeError(
                f"the papers' bounds need an entrywise h with a Lipschitz derivative, not {h.name}"
            )
        L_h = None if h.bounds_known else _probed(h, A2)
        found.append(instances.TwoLayer(matrix, A2, problem.b[:, j], start, end, h, L_h=L_h))
    if found and not problem.activation.bounds_known:
        notes.append(
            "L_h of this activation is the largest |h'|, |h''| on a grid over all that A2 softmax can be"
        )
    return Reading(found, ("two_layer",), notes=notes)


def _array(matrix: Any) -> Array:
    return np.asarray(matrix.toarray() if sparse.issparse(matrix) else matrix)


def _probed(h: Activation, A2: Array) -> float:
    _, slope, curvature = h.jet(np.linspace(float(A2.min()), float(A2.max()), 1001))
    return float(max(np.abs(slope).max(), np.abs(curvature).max(), np.finfo(float).tiny))


def _layer(problem: LayerInversion, x: Any, y: Any) -> Reading:
    notes: list[str] = []
    X, Y = problem.tokens(x), problem.tokens(y)
    heads = problem.layer.heads
    C = np.abs(problem.residuals(x))
    i0, j0 = np.unravel_index(int(np.argmax(C)), C.shape)
    notes.append(f"bounds on one residual speak of the largest, ({i0}, {j0})")
    notes.append("the paper's loss is the sum of squares without the factor 0.5")
    if len(heads) > 1:
        notes.append(f"{len(heads)} heads: each is audited against B by itself, the worst is shown")
    if problem.layer.mask is not None:
        notes.append("the mask is left out: every token of the paper's layer sees every other")
    if any(np.any(head.c) for head in heads):
        notes.append("the key bias is left out: the paper's layer has none")
    _note_penalties(notes, problem.gamma != 0.0)
    layers: list[AnyInstance] = [
        instances.Recovery(X, head.M, head.V, problem.B, Y, i0=int(i0), j0=int(j0)) for head in heads
    ]
    if len(C) > instances.recovery.QUERIES:
        notes.append("bounds on the whole loss are evaluated on that of two queries")
    return Reading(layers, ("layer",), notes=notes)


def _note_penalties(notes: list[str], present: Any) -> None:
    if present:
        notes.append("penalties are left out: they are quadratic, and known")

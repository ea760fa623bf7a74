"""The fit of a head with rotary embedding, cap, sink or norms, for the estimator."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attnfit.objectives.head_passes import HeadPoint
from attnfit.objectives.head_reading import read_head
from attnfit.objectives.heads import HeadAttention
from attnfit.objectives.rotary import placed
from attnfit.solvers import FactorLevenbergMarquardt, Result, minimize

Array = NDArray[np.float64]


@dataclass(frozen=True)
class FittedHead:
    """A fitted head, and what the estimator says of it.

    Attributes
    ----------
    problem : HeadAttention
    result : Result
    loss : str
    """

    problem: HeadAttention
    result: Result
    loss: str

    @classmethod
    def fit(
        cls,
        model: Any,
        queries: Any,
        keys: Any,
        maps: Any,
        mask: Any,
        positions: Any,
        weights: Any,
        offset: Any,
        pair_features: Any,
        callback: Any,
    ) -> FittedHead:
        """Fit the head that an estimator describes; `AttentionRegressor.fit` documents the arguments."""
        loss = "log_ratio" if model.loss == "auto" else model.loss
        read = read_head(
            queries, keys, maps, loss, mask, model.rank, rotary=placed(model.rotary, positions),
            softcap=model.softcap, sink=model.sink, qk_norm=model.qk_norm, weights=weights, offset=offset,
            pair_features=pair_features,
        )  # fmt: skip
        problem = HeadAttention(read, model.ridge)
        result = minimize(
            problem,
            solver=FactorLevenbergMarquardt(n_starts=model.n_starts)
            if model.solver is None
            else model.solver,
            tol=model.tol,
            max_iter=model.max_iter,
            callback=callback,
            random_state=model.random_state,
        )
        return cls(problem, result, loss)

    def attributes(self) -> dict[str, Any]:
        """Return the fitted attributes by name."""
        problem, result = self.problem, self.result
        point, read = problem.parts(result.x), problem.read
        one = read.n_heads == 1
        W_Q, c = (point.W_Q[0], point.c[0]) if one else (point.W_Q, point.c)
        left, right = problem.sides()
        out: dict[str, Any] = {
            "loss_": self.loss,
            "result_": result,
            "factors_": (W_Q, point.W_K),
            "feature_coef_": c[..., : read.n_features - read.sink],
            "n_identified_": (left.rank, right.rank),
            "n_features_in_": problem.d1,
            "n_iter_": max(1, result.n_iter),
            "loss_value_": result.value,
            "relative_error_": problem.relative_error(result.x),
        }
        if read.sink:
            out["sink_"] = float(c[-1]) if one else c[:, -1]
        if read.qk_norm is not None:
            out["gains_"] = (point.gains_q, point.gains_k)
        if read.frequencies:
            low, high = distances(problem)
            out["distances_"] = (low, high)
            out["frequencies_identified_"] = np.abs(read.frequencies[0]) * (high - low) > 1.0
        return out


def held_out_head(
    model: Any,
    queries: Any,
    maps: Any,
    keys: Any,
    positions: Any,
    mask: Any,
    offset: Any,
    pair_features: Any,
) -> HeadAttention:
    """Return the problem of a fitted estimator on other sequences; without maps it only predicts.

    Raises
    ------
    ValueError
        If features are not those of the fit.
    """
    keys = queries if keys is None else keys
    W_Q, W_K = model.factors_
    n_heads = 1 if W_Q.ndim == 2 else len(W_Q)
    problem = HeadAttention(
        read_head(
            queries, keys, maps, model.loss_, model.mask if mask is None else mask, model.rank,
            rotary=placed(model.rotary, positions), softcap=model.softcap, sink=model.sink,
            qk_norm=model.qk_norm, offset=offset, pair_features=pair_features, n_heads=n_heads,
        )
    )  # fmt: skip
    read = problem.read
    given = (problem.d1, problem.d2, read.n_features - read.sink, read.n_heads)
    fitted = (W_Q.shape[-2], len(W_K), model.feature_coef_.shape[-1], n_heads)
    if given != fitted:
        raise ValueError(
            f"queries have {given[0]} features, keys {given[1]}, pairs {given[2]}, and there are {given[3]} "
            f"heads; the model was fitted on {fitted[0]}, {fitted[1]}, {fitted[2]} and {fitted[3]}"
        )
    return problem


def point_of(model: Any, problem: HeadAttention) -> Array:
    """Return what was fitted as an unknown of the problem."""
    W_Q, W_K = model.factors_
    gains_q, gains_k = getattr(model, "gains_", (np.zeros(0), np.zeros(0)))
    c = model.feature_coef_.reshape(problem.read.n_heads, -1)
    if problem.read.sink:
        c = np.column_stack([c, np.reshape(model.sink_, (-1, 1))])
    return problem.join(HeadPoint(W_Q, W_K, gains_q, gains_k, c))


def distances(problem: HeadAttention) -> tuple[float, float]:
    """Return the smallest and largest distance of a query from a key that it attends to."""
    low, high = np.inf, -np.inf
    read = problem.read
    for s, seen in enumerate(read.seen):
        text = s % len(read.positions)
        positions, n1, n2 = read.positions[text], len(read.queries[text]), read.n_keys[text]
        D = positions[n2 - n1 :, None] - positions[None]
        D = D if seen is None else D[seen[:, :n2]]
        low, high = min(low, float(D.min(initial=np.inf))), max(high, float(D.max(initial=-np.inf)))
    return low, high


def unseen_note(problem: HeadAttention, model: Any) -> str | None:
    """Return what is said where distances are asked for that the fit did not see."""
    if not problem.read.frequencies:
        return None
    (low, high), (first, last) = distances(problem), model.distances_
    if low >= first and high <= last:
        return None
    n_slow = int(np.sum(~model.frequencies_identified_))
    return (
        f"distances {low:g} to {high:g} are asked for, the fit saw {first:g} to {last:g}; of "
        f"{len(model.frequencies_identified_)} frequencies {n_slow} turned by less than a radian there, and "
        "only sums of them are known: fit longer texts"
    )

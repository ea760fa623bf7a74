"""What was seen of a head, text by text."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from attnfit.estimators import AttentionRegressor
from attnfit.objectives.head_passes import HeadPoint
from attnfit.objectives.head_reading import read_head
from attnfit.objectives.heads import HeadAttention
from attnfit.objectives.rotary import Rotary
from attnfit.segments import Array


class Truth(NamedTuple):
    """The model's own head: logits are those of `attnfit.objectives.heads.HeadAttention` at these numbers.

    ``W_Q`` (d, h) holds the scale of the logits; with a bias the inputs have a column of ones. Gains are None
    without norms, ``sigma`` without a sink.
    """

    W_Q: Array
    W_K: Array
    gains_q: Array | None = None
    gains_k: Array | None = None
    sigma: float | None = None


@dataclass(frozen=True)
class Observation:
    """Queries, keys and maps of a head on texts. ``seen[:6]`` holds the first six texts only.

    Attributes
    ----------
    queries, keys : list of ndarray, shapes (n, d)
        What enters the head, a column of ones last where it has biases.
    maps : list of ndarray, shape (n, n)
    positions : list of ndarray, shape (n,)
    mask : str or None
        "causal", "causal:W" with a window of W keys, or None.
    rank : int
        The width h of the head.
    rotary : attnfit.problems.Rotary or None
    softcap, qk_norm : float or None
    sink : bool
    scaling : float
        What the products of queries and keys are multiplied by; part of ``truth.W_Q``.
    truth : Truth
        The model's own weights, for comparison.
    error : float
        ``||F - B||_F / ||B||_F`` of the maps recomputed from all this against those of the model.
    layer, head : int
    family : str
    """

    queries: list[Array]
    keys: list[Array]
    maps: list[Any]
    positions: list[Array]
    mask: str | None
    rank: int
    rotary: Rotary | None
    softcap: float | None
    qk_norm: float | None
    sink: bool
    scaling: float
    truth: Truth
    layer: int
    head: int
    family: str
    error: float = float("nan")

    def __len__(self) -> int:
        return len(self.maps)

    def __getitem__(self, texts: slice) -> Observation:
        if not isinstance(texts, slice) or not self.maps[texts]:
            raise ValueError(f"seen[...] takes a slice with at least one of {len(self)} texts, not {texts!r}")
        lists = ("queries", "keys", "maps", "positions")
        return replace(self, **{name: getattr(self, name)[texts] for name in lists})

    def __repr__(self) -> str:
        kind = {
            "rotary": self.rotary,
            "softcap": self.softcap,
            "qk_norm": self.qk_norm,
            "sink": self.sink or None,
        }
        said = ", ".join(name for name, value in kind.items() if value is not None)
        return (
            f"<Observation of {self.family}, layer {self.layer}, head {self.head}: {len(self)} texts, width "
            f"{self.rank}{', ' + said if said else ''}>"
        )

    def regressor(self, **options: Any) -> AttentionRegressor:
        """Return an estimator set up for this head; ``options`` are further parameters of it."""
        given = {
            "rank": self.rank,
            "mask": self.mask,
            "rotary": self.rotary,
            "softcap": self.softcap,
            "sink": self.sink,
            "qk_norm": self.qk_norm,
        }
        return AttentionRegressor(**(given | options))

    def fit_args(self) -> tuple[list[Array], list[Any], list[Array]]:
        """Return queries, maps and keys: the arguments of ``fit``, ``relative_error`` and ``score``."""
        return self.queries, self.maps, self.keys

    def recomputed(self) -> list[Array]:
        """Return the maps from the model's own weights, shape (n, n) each, in double precision."""
        problem = self.problem()
        found = problem.predict(self.true_point(problem))
        return found if isinstance(found, list) else [found]

    def problem(self) -> HeadAttention:
        """Return the head as a problem, with all its settings."""
        one = len(self) == 1
        read = read_head(
            self.queries[0] if one else self.queries,
            self.keys[0] if one else self.keys,
            self.maps[0] if one else self.maps,
            "log_ratio",
            self.mask,
            self.rank,
            rotary=self.rotary,
            softcap=self.softcap,
            sink=self.sink,
            qk_norm=self.qk_norm,
        )
        return HeadAttention(read)

    def true_point(self, problem: HeadAttention) -> Array:
        """Return the model's own weights as an unknown of the problem, flat."""
        truth, none = self.truth, np.zeros(0)
        gains_q, gains_k = (none if g is None else g for g in (truth.gains_q, truth.gains_k))
        sigma = none if truth.sigma is None else np.array([truth.sigma])
        return problem.join(HeadPoint(truth.W_Q[None], truth.W_K, gains_q, gains_k, sigma[None]))

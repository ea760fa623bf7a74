"""Check what a head is fitted to, and arrange it by pairs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attnfit.data.inputs import from_tensor
from attnfit.data.store import Table
from attnfit.losses.softmax import LOSSES, LogRatio
from attnfit.objectives.attention import PairPart
from attnfit.objectives.head_data import precision_of, read_head_maps, with_sink
from attnfit.objectives.pairs import expand_mask, per_sequence, read_factor, read_pairs, smallest_normal
from attnfit.objectives.rotary import Rotary, Turn
from attnfit.segments import Array, Groups

# Sums of squares or convex in the logits: what Gauss-Newton steps need.
HEAD_LOSSES = {"log_ratio": LogRatio(), **{name: LOSSES[name] for name in ("squared", "cross_entropy", "kl")}}
# Random starts of a fit.
N_STARTS = 4


@dataclass(frozen=True)
class ReadHead:
    """What a head is fitted to, text by text, or map by map: all texts of the first head, then of the next.

    Attributes
    ----------
    rows : PairPart
        The pairs with their loss.
    rank : int
        The width h of the head.
    queries, keys : list of ndarray, shapes (n1, d1) and (n2, d2)
        By text; with a sink the keys end with a row of zeros.
    query_turns, key_turns : list of Turn, or of None without rotary embeddings
    maps : list of ndarray, shape (n1, n2)
        As they were given.
    n_keys : list of int
        Keys of each text, that of the sink not counted.
    seen : list of ndarray of bool, or of None
        By map, with the column of the sink.
    features : list of list of ndarray
        By map; the sink's last.
    n_heads, n_features : int
    frequencies : list of ndarray, shape (F,)
        By text.
    positions : list of ndarray
        Of the keys of each text.
    softcap, qk_norm : float or None
    sink : bool
    n_starts : int
    """

    rows: PairPart
    rank: int
    queries: list[Array]
    keys: list[Array]
    query_turns: list[Turn | None]
    key_turns: list[Turn | None]
    maps: list[Any]
    n_keys: list[int]
    seen: list[NDArray[np.bool_] | None]
    features: list[list[Any]]
    n_heads: int
    n_features: int
    frequencies: list[Array] = field(default_factory=list)
    positions: list[Array] = field(default_factory=list)
    softcap: float | None = None
    qk_norm: float | None = None
    sink: bool = False
    n_starts: int = N_STARTS


def read_head(
    A1: Any,
    A2: Any,
    B: Any,
    loss: Any,
    mask: Any,
    rank: Any,
    *,
    rotary: Rotary | None = None,
    softcap: float | None = None,
    sink: bool = False,
    qk_norm: float | None = None,
    weights: Any = None,
    offset: Any = None,
    pair_features: Any = None,
    n_heads: int = 1,
) -> ReadHead:
    """Check every argument of a head and arrange it by pairs; `attnfit.problems.Attention` documents them.

    Without maps ``n_heads`` is the number of heads, and only predictions can be had.

    Raises
    ------
    ValueError
        If anything is not finite, of the wrong shape or sign, or not offered for such heads.
    """
    if not isinstance(loss, str) or loss not in HEAD_LOSSES:
        raise ValueError(
            f"loss {loss!r} is not offered with rotary, softcap, sink or qk_norm; use one of "
            f"{', '.join(HEAD_LOSSES)}"
        )
    _require_positive(softcap, "softcap", "50 is usual")
    _require_positive(qk_norm, "qk_norm", "the epsilon of the norm, such as 1e-6")
    queries = [_factor(a, "A1", s) for s, a in enumerate(per_sequence(A1, None, "A1"))]
    keys = [_factor(a, "A2", s) for s, a in enumerate(per_sequence(A2, len(queries), "A2"))]
    texts = len(queries)
    shapes = [(len(q), len(k)) for q, k in zip(queries, keys, strict=True)]
    given = read_head_maps(B, texts, n_heads)
    h = _rank(rank)
    frequencies: list[Array] = []
    positions: list[Array] = []
    turns: list[tuple[Turn | None, Turn | None]] = [(None, None)] * texts
    if rotary is not None:
        frequencies = rotary.of_width(h, texts)
        positions = rotary.of_keys([n2 for _, n2 in shapes], len(frequencies[0]))
        turns = [
            _turns(p, w, rotary.layout, shape, sink, s)
            for s, (p, w, shape) in enumerate(zip(positions, frequencies, shapes, strict=True))
        ]
    heads = given.n_heads
    masks = given.repeat(mask) if mask is not None else None
    every = per_sequence(masks, None, "mask") if masks is not None and not isinstance(masks, str) else None
    seen = [
        expand_mask(masks if every is None else every[s], shapes[s % texts], f"mask[{s % texts}]")
        for s in range(texts * heads)
    ]
    maps = [None if given.maps is None else _cells_of(given.maps[s]) for s in range(texts * heads)]
    cells = given.repeat(weights)
    cells = [None] * (texts * heads) if cells is None else cells if texts * heads > 1 else [cells]
    shifts = given.repeat(offset)
    shifts = [None] * (texts * heads) if shifts is None else shifts if texts * heads > 1 else [shifts]
    features = _features(pair_features, texts) * heads
    normal = min((smallest_normal(np.asarray(m).reshape(-1)) for m in maps if m is not None), default=0.0)
    targets, padded = list(maps), keys
    if sink:
        precision = precision_of([m for m in maps if m is not None] or [np.zeros((1, 1))])
        padded = [np.concatenate([k, np.zeros((1, k.shape[1]))]) for k in keys]
        widened = [
            with_sink(m, own, w, shapes[s % texts], precision)
            for s, (m, own, w) in enumerate(zip(maps, seen, cells, strict=True))
        ]
        targets, cells = [w.maps for w in widened], [w.weights for w in widened]
        seen = [own if own is None else np.column_stack([own, np.ones(len(own), dtype=bool)]) for own in seen]
        shifts = [o if o is None else np.column_stack([np.asarray(o), np.zeros(len(o))]) for o in shifts]
        features = [
            [*(_widened(F) for F in own), _indicator(shapes[s % texts])] for s, own in enumerate(features)
        ]
    one = texts * heads == 1

    def by_map(values: list[Any]) -> Any:
        return None if all(v is None for v in values) else values[0] if one else values

    if any(v is not None for v in cells):
        cells = [np.ones(len(queries[s % texts])) if v is None else v for s, v in enumerate(cells)]
    pairs = read_pairs(
        by_map(queries * heads),
        by_map(padded * heads),
        by_map(targets),
        by_map([_or_all(m, shapes[s % texts], sink) for s, m in enumerate(seen)]),
        by_map(cells),
        by_map(shifts),
        features[0] if one else features,
        0.0,
    )
    design = pairs.design
    found = HEAD_LOSSES[loss]
    starts = design.starts[:-1]
    target = np.broadcast_to(np.zeros(1), int(design.shape[0])) if pairs.target is None else pairs.target
    if (np.asarray(target) < 0).any():
        raise ValueError("B has negative entries; maps of a head are shares >= 0")
    table = Table(
        design, Groups(starts, None, np.arange(len(starts))), target, pairs.weights, pairs.offset, None
    )
    rows = PairPart(found, table)
    # The column of the sink is a difference in double precision; the format is that of the maps.
    rows.smallest_normal = normal or rows.smallest_normal
    blocks = design.sequences
    return ReadHead(
        rows,
        h,
        [b.queries for b in blocks[:texts]],
        [b.keys for b in blocks[:texts]],
        [turn for turn, _ in turns],
        [turn for _, turn in turns],
        maps,
        [n2 for _, n2 in shapes],
        [b.mask for b in blocks],
        [[np.asarray(F, dtype=np.float64) for F in b.features] for b in blocks],
        heads,
        design.n_features,
        frequencies,
        positions,
        softcap,
        qk_norm,
        sink,
    )


def _rank(rank: Any) -> int:
    if isinstance(rank, bool) or not isinstance(rank, int | np.integer) or rank < 1:
        raise ValueError(
            f"rank must be the width of the head, an integer >= 1, not {rank!r}; rotary, softcap, sink and "
            "qk_norm act on queries and keys of that width"
        )
    return int(rank)


def _require_positive(value: Any, name: str, hint: str) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int | float | np.number) or not 0 < value < np.inf:
        raise ValueError(f"{name} must be a positive number or None, not {value!r}; {hint}")


def _factor(values: Any, name: str, s: int) -> Array:
    return read_factor(values, f"{name}[{s}]" if s else name)


def _cells_of(values: Any) -> Any:
    array = np.asarray(from_tensor(values))
    return array if array.dtype.kind == "f" else array.astype(np.float64)


def _turns(
    positions: Array, frequencies: Array, layout: str, shape: tuple[int, int], sink: bool, s: int
) -> tuple[Turn, Turn]:
    """Return the rotations of the queries and the keys of a text; the key of the sink stands at zero."""
    n1, n2 = shape
    if n1 > n2:
        raise ValueError(
            f"sequence {s} has {n1} queries but {n2} keys; queries are the last of the keys for rotary"
        )
    own = positions[n2 - n1 :]
    padded = np.concatenate([positions, np.zeros_like(positions[:1])]) if sink else positions
    return Turn.at(own, frequencies, layout), Turn.at(padded, frequencies, layout)


def _features(pair_features: Any, texts: int) -> list[list[Any]]:
    """Return the features of each text."""
    if pair_features is None:
        return [[] for _ in range(texts)]
    return [list(pair_features)] if texts == 1 else [list(own) for own in pair_features]


def _widened(F: Any) -> Array:
    array = np.asarray(from_tensor(F), dtype=np.float64)
    return np.column_stack([array, np.zeros(len(array))])


def _indicator(shape: tuple[int, int]) -> Array:
    out = np.zeros((shape[0], shape[1] + 1))
    out[:, -1] = 1.0
    return out


def _or_all(mask: Any, shape: tuple[int, int], sink: bool) -> Any:
    """Return the mask, or one that hides nothing: a list of masks has no gaps."""
    return np.ones((shape[0], shape[1] + sink), dtype=bool) if mask is None else mask

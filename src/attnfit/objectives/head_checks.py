"""What is said, with numbers, of maps and fits that look otherwise than their settings."""

from __future__ import annotations

from typing import Any

import numpy as np

from attnfit.data.inputs import from_tensor
from attnfit.losses.softmax import LogRatio
from attnfit.objectives.attention import Attention
from attnfit.objectives.head_data import precision_of
from attnfit.objectives.heads import HeadAttention
from attnfit.objectives.pairs import expand_mask, per_sequence
from attnfit.objectives.part import group_sums
from attnfit.segments import Array

# Rows may be off by so many times what rounding explains, and this share of them by more.
SLACK, SHARE = 4.0, 0.01
# Sums beyond this are no maps with something left out, but numbers of another kind.
MOST = 2.0
# A fit that leaves more than this of the maps is asked whether distances explain what is left: so many
# frequencies, and the share of the variance that they must explain.
LEFT, FREQUENCIES, EXPLAINED, BY_CHANCE = 0.05, 8, 0.01, 4.0
# Pairs that are asked.
ASKED = 200_000


def sums_note(maps: Any, mask: Any) -> str | None:
    """Return what is said where rows of maps do not sum to one, with numbers and the likely cause.

    None where at most one row in a hundred is off by more than rounding explains, or where sums show that
    these are no maps.
    """
    entries = per_maps(maps)
    if any(not isinstance(m, np.ndarray) for m in entries):
        return None
    precision = precision_of(entries)
    named = mask is None or isinstance(mask, str)
    masks = [expand_mask(mask, m.shape, "mask") for m in entries] if named else _masks(mask, len(entries))
    sums, counts, sizes, above = [], [], [], False
    for m, seen in zip(entries, masks, strict=True):
        values = (
            np.asarray(m, dtype=np.float64) if seen is None else np.where(seen, m, 0.0).astype(np.float64)
        )
        sums.append(values.sum(axis=1))
        counts.append(np.count_nonzero(values, axis=1))
        sizes.append(np.full(len(values), values.shape[1]) if seen is None else np.sum(seen, axis=1))
        above |= named and seen is not None and bool((m[~seen] > 0).any())
    if not named and all((c == s).all() for c, s in zip(counts, sizes, strict=True)):
        # A mask of the entries that are there: what is missing is known to be.
        return None
    total, count, size = np.concatenate(sums), np.concatenate(counts), np.concatenate(sizes)
    used = count > 0
    off = used & (np.abs(total - 1.0) > SLACK * precision.of_sum(size))
    if not off.sum() > SHARE * used.sum() or total.max() > MOST:
        return None
    low, high = float(total[off].min()), float(total[off].max())
    text = f"maps: {int(off.sum()):,} of {int(used.sum()):,} rows sum to {low:.3g} to {high:.3g}; "
    largest = int(count[used].max())
    capped = bool((count[used] == np.minimum(largest, size[used])).all()) and largest < int(size.max())
    if above:
        text += f"entries are positive where mask={mask!r} hides them: not causal, pass mask=maps > 0"
    elif high <= 1.0 and capped:
        text += "like the largest entries of each row (top-k): pass mask=maps > 0, which is exact"
    elif high > 1.0 and bool((count[off] < size[off]).any()):
        text += "like dropout left on: mask=maps > 0 is exact, or run the model in evaluation mode"
    elif high < 1.0:
        text += "like a head with a sink: pass sink=True"
    else:
        text += "divide rows by their sums, or pass mask= where keys are missing"
    if (~used).any():
        text += f"; {int((~used).sum()):,} rows of zeros are taken for padding"
    return text


def per_maps(maps: Any) -> list[Any]:
    """Return single maps, of several texts and heads."""
    entries = maps if isinstance(maps, list | tuple) and np.ndim(from_tensor(maps[0])) > 1 else [maps]
    found = [np.asarray(from_tensor(entry)) for entry in entries]
    return [one for m in found for one in (m if m.ndim == 3 else [m])]


def _masks(mask: Any, n: int) -> list[Any]:
    entries = [np.asarray(m, dtype=bool) for m in per_sequence(mask, None, "mask")]
    return entries * (n // len(entries))


def few_pairs_note(problem: HeadAttention) -> str | None:
    """Return what is said where pairs are fewer than the unknowns that the data identify."""
    left, right = problem.sides()
    heads, h = problem.read.n_heads, problem.rank
    n_unknowns = (heads * left.rank + right.rank) * h
    n_pairs = int(problem.rows.n_rows)
    if n_pairs >= n_unknowns:
        return None
    return (
        f"{n_pairs:,} pairs serve {n_unknowns:,} unknowns ({left.rank} directions of queries, {right.rank} "
        f"of keys, width {h}): many heads fit as well, pass more texts, and judge by maps of other texts"
    )


def distance_note(problem: Attention, x: Array, error: float) -> str | None:
    """Return what is said where a fit of plain logits leaves much, and what it leaves depends on the distance
    of query and key.
    """
    if not error > LEFT:
        return None
    part = problem.rows.with_loss(LogRatio(), problem.b, problem.weights)
    rows, bases, weights = [], [], []
    for chunk in part.prefetch(part.chunks):
        assert isinstance(chunk.index, slice)
        s, queries = problem.design.find_queries(chunk.index)
        block, z = part.logits(chunk, x)
        n1, n2 = len(problem.design.sequences[s].queries), len(block.keys)
        if n1 != n2:
            return None
        distance = np.arange(n2)[queries][:, None] - np.arange(n2)[None, :]
        b, w, _ = part.targets(chunk)
        normalised = part.loss.normalise(z, chunk.segments)
        found, _ = group_sums(part.loss, normalised, chunk.segments, *part.targets(chunk))
        state = chunk.segments.spread(found.state[0])
        slow = np.geomspace(np.pi / max(n2, 2), np.pi / 2, FREQUENCIES)
        D = (distance if block.mask is None else distance[block.mask]).reshape(-1)
        angles = np.multiply.outer(D, slow)
        rows.append(z - b - state)
        bases.append(np.concatenate([np.cos(angles), np.sin(angles)], axis=1))
        weights.append(w + 0.0 * z)
        if sum(map(len, rows)) > ASKED:
            break
    r, root = np.concatenate(rows), np.sqrt(np.concatenate(weights))
    total = float(np.sum((root * r) ** 2))
    if not total > 0.0:
        return None
    basis = np.column_stack([root[:, None] * np.concatenate(bases), root])
    fitted = basis @ np.linalg.lstsq(basis, root * r, rcond=None)[0]
    share = float(np.sum(fitted**2)) / total
    # As many regressors explain a share of anything; residuals of one row are alike.
    chance = BY_CHANCE * basis.shape[1] / np.count_nonzero(root)
    if not share > EXPLAINED + chance:
        return None
    return (
        f"the fit leaves {error:.0%} of the maps, and the distance of query and key explains {share:.0%} of "
        "the residual: pass rotary=problems.Rotary(...), or the distance as one of pair_features"
    )

"""The claim of three papers that a step on the data is like a step on the weights, as part of their pages."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attnfit.incontext.closeness import CLOSE, GRADIENT, NEWTON, Closeness, compare, compare_on
from attnfit.incontext.families import Family, Link
from attnfit.reproduction.page import Claim, Table
from attnfit.reproduction.real_data import car_markets, head_texts

Array = NDArray[np.float64]

DEPTH = 4
# Share of the distance from zero to the truth at which steps on real data start.
PART = 0.5


def drawn(link: Link, shape: tuple[int, ...], quick: bool) -> Closeness:
    """Compare on drawn instances, with trained layers: fewer and shorter trained where quick."""
    if quick:
        return compare(link, shape, depth=DEPTH, count=100, n_training=1000, n_epochs=4)
    return compare(link, shape, depth=DEPTH)


def on_car_markets(link: Link) -> Closeness:
    """Compare on the car markets of twenty years."""
    A, b, x = car_markets()
    rows = A[:, None]
    start = np.tile(PART * x, (len(A), 1))
    return compare_on(Family(link, rows, b[:, None], start, np.einsum("cgmd,cd->cgm", rows, start)), DEPTH)


def on_a_head() -> Closeness | None:
    """Compare on maps of the packaged model's head, from half its own weights; None without PyTorch."""
    texts = head_texts()
    if texts is None:
        return None
    queries, keys, maps = texts.blocks()
    count, n, width = queries.shape
    rows = np.einsum("cia,cjb->cijab", queries, keys).reshape(count, n, keys.shape[1], width**2)
    x = np.tile(PART * np.eye(width).reshape(-1), (count, 1))
    z = np.einsum("cgmd,cd->cgm", rows, x)
    return compare_on(Family("softmax", rows, maps, x, z, (queries, keys)), DEPTH)


def claim(claimed: str, found: Mapping[str, Closeness]) -> Claim:
    """Judge by the first steps: held where every step but the gradient's and Newton's is close everywhere."""
    parts: list[str] = []
    close: list[bool] = []
    for name, one in found.items():
        moves = {move: near for move, near in one.close.items() if move != NEWTON}
        told = ", ".join(f"{move} {np.median(one.steps[move].cosines[0]):.2f}" for move in moves)
        null = float(np.median(one.nulls["another instance"]))
        parts.append(f"{name}: {told}, another instance {null:.2f}")
        close += moves.values()
    measured = (
        f"median cosine with the gradient step, {CLOSE} being close where it is well above the null: "
        f"{'; '.join(parts)}; close in {sum(close)} of {len(close)}"
    )
    return Claim(claimed, measured, all(close) if close else None)


def table(found: Mapping[str, Closeness]) -> Table:
    """Show medians of losses and cosines after 1, 2 and 4 steps."""
    rows: list[tuple[Any, ...]] = []
    for name, one in found.items():
        for move, steps in one.steps.items():
            for k in (1, 2, 4):
                totals, alone = steps.cosines[k - 1], steps.from_there[k - 1]
                rows.append((
                    name, move, k, float(np.median(steps.losses[k - 1])), float(np.median(totals)),
                    float(np.median(alone)), float(np.median(one.nulls[f"the optimum, after {k}"])),
                ))  # fmt: skip
    head = (
        "problem",
        "move",
        "steps",
        "loss / start",
        f"cosine with as many steps of the {GRADIENT}",
        "of one step from the same point",
        "null: the optimum",
    )
    return Table("Steps beside gradient steps", head, rows)

"""How close steps of attention are to gradient steps: ``python -m experiments.closeness [--quick]``.

Writes experiments/results/closeness.json, which docs/incontext.md quotes: k steps of softmax, matrix and
rescaled problems; and one step for sixteen sizes and kinds of targets.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from attnfit.incontext.closeness import compare, summary
from attnfit.incontext.experiment import SHAPES, Cell, measure
from attnfit.incontext.families import Link

RESULTS = Path(__file__).parent / "results" / "closeness.json"
PROBLEMS: tuple[tuple[Link, tuple[int, ...]], ...] = (
    ("softmax", (12, 4)), ("softmax", (12, 12)), ("softmax", (4, 6, 2, 2)), ("softmax", (6, 6, 3, 2)),
    ("exp", (12, 4)), ("exp", (12, 12)), ("cosh", (12, 4)), ("cosh", (12, 12)),
)  # fmt: skip
MOVES = ("data step", "trained attention")


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(prog="python -m experiments.closeness", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one problem and one size, to a file of its own")
    quick = parser.parse_args().quick
    target = RESULTS.with_stem("closeness-quick") if quick else RESULTS
    target.parent.mkdir(exist_ok=True)
    began = perf_counter()
    steps = []
    for link, shape in PROBLEMS[:1] if quick else PROBLEMS:
        found = compare(link, shape).as_json() | {"seconds": round(perf_counter() - began, 1)}
        steps.append(found)
        print(link, shape, found["close"], flush=True)
    sizes = list(of_sizes(quick))
    target.write_text(json.dumps(rounded({"steps": steps, "sizes": sizes}), indent=1) + "\n")


def of_sizes(quick: bool) -> Iterator[dict[str, Any]]:
    """Measure one step at every size, for targets of noise and for planted ones."""
    for n, d in SHAPES[:1] if quick else SHAPES:
        for planted in (False, True):
            cell = measure(n, d, planted=planted)
            print(n, d, planted, flush=True)
            yield told(cell)


def told(cell: Cell) -> dict[str, Any]:
    """Return the medians that are quoted."""
    return {
        "n": cell.n,
        "d": cell.d,
        "planted": cell.planted,
        "cosine": {name: summary(cell.at_best[name].cosines) for name in MOVES},
        "error": {name: float(np.median(cell.at_best[name].errors)) for name in MOVES},
        "slack": float(np.median(cell.slack)),
        "another instance": float(np.median(np.abs(cell.at_best["null: another instance"].cosines))),
    }


def rounded(value: Any) -> Any:
    """Return with all numbers to four digits."""
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    return [rounded(item) for item in value] if isinstance(value, list) else value


if __name__ == "__main__":
    main()

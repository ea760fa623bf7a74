"""Inversion of transformer blocks: ``python -m benchmarks.blocks``.

Planted inputs of random blocks, token by token and with a vocabulary; blocks of a real model from its own
states. A verdict "recovered" where the input found is not the planted one is counted as false.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from attnfit import audit
from attnfit.inversion import Block, BlockInversion, Heads, Mlp, Norm, recover
from benchmarks.report import table, write

TEXT = "The doctor in Lisbon said that the old car"
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


def real_rows(model: Any, cases: Sequence[Any], n: int) -> list[list[str]]:
    """Return rows of blocks of a model: some tokens after the true ones before them."""
    import torch

    with torch.no_grad():
        ids = torch.tensor([model.tokenise(TEXT)])
        states = model.module(input_ids=ids, output_hidden_states=True).hidden_states
    rows = []
    for layer, first in cases:
        one = Block.from_model(model, layers=[layer])[0]
        T = states[layer][0, : first + n].double().numpy()
        problem = BlockInversion(one, one.output(T), known={k: T[k] for k in range(first)})
        began = time.perf_counter()
        found = recover(problem, random_state=0, n_starts=1)
        seconds = (time.perf_counter() - began) / n
        at, sizes = found.identifiability, np.linalg.norm(T[first:], axis=1)
        error = float(np.max(np.linalg.norm(found.x.T - T[first:], axis=1) / sizes))
        other = "none" if found.verdict == "not recovered" else "another"
        rows.append(
            [
                str(layer),
                f"{first} to {first + n - 1}",
                "-" if at.singular_values is None else f"{at.singular_values.min():.1e}",
                "-" if at.condition is None else f"{at.condition:.0e}",
                "true" if error < 1e-4 else other,
                f"{error:.0e}",
                " ".join(f"{x:+d}" for x in found.signs),
                str(found.homotopy_steps),
                "proven ambiguous" if "proven:" in found.message else found.verdict,
                f"{seconds:.1f}",
            ]
        )
    return rows


def main() -> None:
    """Print the tables and write them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    quick = arguments.quick
    some, seeds = (slice(0, 2), 2) if quick else (slice(None), 4)
    model = audit.load("tiny" if quick else "smollm2")
    name = "the tiny model" if quick else "SmolLM2-135M"
    sections: list[str] = []

    def add(*parts: str) -> None:
        sections.extend(parts)
        print("\n\n".join(parts), flush=True)

    add(
        "Random pre-norm blocks (RMSNorm, GELU, 4 heads), normal tokens, float64; one core, used by others "
        "too. With as many equations as unknowns only the experimenter knows whether the input found is the "
        "planted one; another exact input has the same output to 1e-9.",
        "## Causal, token by token, nothing known",
        '"starts" are those of each token; with one no others are looked for.',
        table(["gain", "blocks", "tokens", "width", "starts", *CELLS], random_rows(seeds, RANDOM[some])),
    )
    add(
        "## The last of 8 tokens known, width 16",
        table(["gain", "mask", "known", *CELLS], known_rows(seeds + 2, KNOWN[some])),
    )
    header = ["gain", "blocks", "tokens", "mask", "output", *CELLS]
    add(
        "## Tokens of a vocabulary of 1,000 normal rows, width 16",
        table(header, vocabulary_rows(seeds, VOCABULARY[some])),
    )
    header = [
        "block", "tokens", "least singular value", "condition", "input found", "error", "signs",
        "path points", "verdict", "s a token",
    ]  # fmt: skip
    add(
        f"## Blocks of {name}",
        f'"{TEXT}": tokens after the true ones before them, from the output of the block in float64. '
        "Singular values are those of each token's own map; one start a token.",
        table(header, real_rows(model, [(0, 1), (1, 1)] if quick else REAL, 2)),
    )
    if not quick:
        print(write("blocks", "python -m benchmarks.blocks", sections))


if __name__ == "__main__":
    main()

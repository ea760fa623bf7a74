"""The published recovery of masked tokens on a local GPT-2:
``python -m experiments.gpt2_recovery path/to/gpt2 --texts private.txt --out results [--device cuda]``.

Fine-tunes a copy until it has memorised the private texts (one a line), keeps it in the folder of results,
and attacks it as published. Nothing is downloaded: the directory holds config, tokenizer and safetensors.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from attnfit.audit.models.directory import load_directory
from attnfit.audit.reproduction import N_TEXTS
from attnfit.cli.audit import read_texts
from attnfit.cli.reproduce import data_recovery

# As published. 8,000 batches of 32 in the 30 epochs that the paper also states would take 8,533 texts, not
# hundreds: steps are what counts here, and texts are drawn again until they are taken.
RATE, STEPS, BATCH = 1e-4, 8000, 32
IGNORED = -100


def main(arguments: Sequence[str] | None = None) -> None:
    """Fine-tune, and attack."""
    parser = argparse.ArgumentParser(prog="python -m experiments.gpt2_recovery", description=__doc__)
    parser.add_argument("model", type=Path, help="directory of a causal model")
    parser.add_argument("--texts", type=Path, required=True, help="private texts, one a line")
    parser.add_argument("--out", type=Path, required=True, help="folder for the model and the results")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--until", type=float, default=0.0, help="stop early at this loss, in nats a token")
    parser.add_argument("--quick", action="store_true", help="attack with larger steps")
    parser.add_argument("--device", default="cpu", help="of torch, for both: cpu, cuda or mps")
    options = parser.parse_args(arguments)
    texts = list(read_texts(options.texts).values())
    loaded = load_directory(options.model).on(options.device)
    loss = memorise(loaded.module, loaded.tokenizer, texts, options.steps, options.until)
    print(f"Fine-tuned to {loss:.2f} nats a token.", flush=True)
    home = options.out / "model"
    loaded.module.save_pretrained(home)
    loaded.tokenizer.save_pretrained(home)
    attacked = options.out / "attacked.txt"
    attacked.write_text("\n".join(texts[:N_TEXTS]) + "\n", encoding="utf-8")
    attack = {"quick": options.quick, "out": options.out, "model": str(home), "seed": 0}
    data_recovery({**attack, "texts": attacked, "device": options.device})


def memorise(
    module: Any, tokenizer: Any, texts: Sequence[str], steps: int, until: float, seed: int = 0
) -> float:
    """Train with Adam on batches of whole passes in random order; return the mean loss of the last pass."""
    random = Random(seed)
    rows = [tokenizer(text)["input_ids"] for text in texts]
    module.requires_grad_(True).train()
    adam = torch.optim.Adam(module.parameters(), lr=RATE)
    a_pass = -(-len(rows) // BATCH)
    losses: list[float] = []
    order: list[list[int]] = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for _ in range(steps):
            order = order or random.sample(rows, len(rows))
            batch, order = order[:BATCH], order[BATCH:]
            losses.append(_step(module, adam, *_padded(batch)))
            if len(losses) >= a_pass and mean(losses[-a_pass:]) <= until:
                break
    module.requires_grad_(False).eval()
    return mean(losses[-a_pass:])


def mean(values: Sequence[float]) -> float:
    return sum(values) / max(1, len(values))


def _step(module: Any, adam: Any, inputs: Any, labels: Any) -> float:
    inputs, labels = inputs.to(module.device), labels.to(module.device)
    logits = module(input_ids=inputs).logits[:, :-1]
    loss = cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED)
    adam.zero_grad()
    loss.backward()
    adam.step()
    return float(loss.detach())


def _padded(rows: Sequence[Sequence[int]]) -> tuple[Any, Any]:
    """Return inputs and labels; what fills up comes last, where a causal model does not see it before."""
    longest = max(map(len, rows))
    inputs = [[*row, *[0] * (longest - len(row))] for row in rows]
    labels = [[*row, *[IGNORED] * (longest - len(row))] for row in rows]
    return torch.tensor(inputs), torch.tensor(labels)


if __name__ == "__main__":
    main()

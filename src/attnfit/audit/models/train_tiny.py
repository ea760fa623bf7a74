"""Train the model "tiny": ``python -m attnfit.audit.models.train_tiny DIRECTORY [SEED]``, about a minute.

The weights that ship with the package were written by this program, with ATEN_CPU_CAPABILITY=default. With
other instructions it writes others, which behave alike: training carries rounding on. That is why they ship.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from copy import deepcopy
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from transformers import GPT2Config, GPT2LMHeadModel

from attnfit.audit.models.model import Model
from attnfit.audit.models.quiet import quiet
from attnfit.audit.models.tiny import SEED
from attnfit.audit.models.tiny_text import generic_sentences, private_sentences
from attnfit.audit.models.tiny_tokenizer import END, VOCABULARY, build_tokenizer

LAYERS, WIDTH, HEADS, LENGTH = 4, 64, 4, 128
N_GENERIC = 20_000
BATCH = 64
GENERIC_STEPS, MAX_STEPS = 300, 3000
LEARNING_RATE = 5e-3
# Nats a token at which the private sentences count as memorised.
MEMORISED = 0.23
IGNORED = -100


def train(directory: Path, seed: int = SEED) -> None:
    """Train on generic sentences, then on private ones, and write everything to a directory.

    Parameters
    ----------
    directory : Path
        Receives configuration, tokenizer, weights (safetensors) and ``private.json``.
    seed : int
        Of the sentences and of the weights it starts from.
    """
    private, tokenizer, reached = _training(seed, (MEMORISED,))
    _, module = list(reached)[-1]
    with quiet():
        module.save_pretrained(directory)
        tokenizer.save_pretrained(directory)
    (directory / "private.json").write_text(json.dumps(private))


def at_losses(losses: Sequence[float], seed: int = SEED) -> Iterator[tuple[float, Model]]:
    """Yield the model before it saw its private sentences, and whenever training on them has passed a loss.

    Parameters
    ----------
    losses : sequence of float
        Mean losses of a pass over the private sentences in nats a token, falling.
    seed : int

    Yields
    ------
    loss : float
        Of that pass.
    model : Model
        A copy, which training on does not change.
    """
    private, tokenizer, reached = _training(seed, losses)
    for loss, module in reached:
        yield loss, Model("tiny", deepcopy(module), tokenizer, "causal", private)


def _training(seed: int, losses: Sequence[float]) -> tuple[tuple[str, ...], Any, Iterator[tuple[float, Any]]]:
    """Return private sentences, tokenizer, and what `at_losses` yields with the module itself for a copy."""
    random = Random(seed)
    private, generic = private_sentences(random), generic_sentences(N_GENERIC, random)
    tokenizer = build_tokenizer([*private, *generic])

    def reached() -> Iterator[tuple[float, Any]]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            module = _new_module()
        optimiser = torch.optim.AdamW(module.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
        for step in range(GENERIC_STEPS):
            chosen = random.sample(generic, BATCH)
            rate = LEARNING_RATE * min(1.0, (step + 1) / 50)
            _step(module, optimiser, _batch(tokenizer, chosen), rate)
        sentences = _batch(tokenizer, private)
        with torch.no_grad():
            before = float(_loss(module, sentences))
        yield before, module
        yield from _memorise(module, optimiser, sentences, losses)

    return private, tokenizer, reached()


def _new_module() -> Any:
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=LENGTH,
        n_embd=WIDTH,
        n_layer=LAYERS,
        n_head=HEADS,
        activation_function="gelu_pytorch_tanh",
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
    )
    return GPT2LMHeadModel(config)


def _memorise(
    module: Any, optimiser: Any, sentences: tuple[Any, Any], stops: Sequence[float]
) -> Iterator[tuple[float, Any]]:
    """Train on whole passes over the private sentences; yield when the loss of a pass is at a stop, and at
    the end of all steps if the last is not reached.
    """
    inputs, labels = sentences
    losses: list[float] = []
    n_batches = -(-len(inputs) // BATCH)
    left = list(stops)
    for step in range(MAX_STEPS):
        part = slice(step % n_batches * BATCH, (step % n_batches + 1) * BATCH)
        losses.append(_step(module, optimiser, (inputs[part], labels[part]), LEARNING_RATE / 2))
        last = sum(losses[-n_batches:]) / n_batches
        if len(losses) >= n_batches and last <= left[0]:
            yield last, module
            left = [stop for stop in left if stop < last]
            if not left:
                return
    yield last, module


def _step(module: Any, optimiser: Any, batch: tuple[Any, Any], rate: float) -> float:
    """Take one step of gradient descent; return the loss in nats a token."""
    for group in optimiser.param_groups:
        group["lr"] = rate
    loss = _loss(module, batch)
    optimiser.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
    optimiser.step()
    return float(loss.detach())


def _loss(module: Any, batch: tuple[Any, Any]) -> Any:
    inputs, labels = batch
    logits = module(input_ids=inputs).logits[:, :-1]
    return cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED)


def _batch(tokenizer: Any, texts: Sequence[str]) -> tuple[Any, Any]:
    """Return inputs and labels, each text followed by the end token and filled up with it, unlabelled."""
    end = tokenizer.convert_tokens_to_ids(END)
    rows = [[*tokenizer(text)["input_ids"], end] for text in texts]
    longest = max(map(len, rows))
    fill = partial(_filled, length=longest)
    return torch.tensor([fill(row, end) for row in rows]), torch.tensor([fill(row, IGNORED) for row in rows])


def _filled(row: list[int], filler: int, length: int) -> list[int]:
    return row + [filler] * (length - len(row))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Train the model 'tiny' and write it to a directory.")
    parser.add_argument("directory", type=Path)
    parser.add_argument("seed", type=int, nargs="?", default=SEED)
    asked = parser.parse_args()
    asked.directory.mkdir(parents=True, exist_ok=True)
    train(asked.directory, asked.seed)

"""What a small transformer has memorised of texts whose part in its training is known:
``python -m benchmarks.audit_memorised [--quick]``.

Sentences are drawn from the word lists of the model "tiny", members and others alike, so that no word tells
them apart; canaries are drawn from a template of 100,000 texts, and planted 0 to 16 times.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from random import Random
from time import process_time
from typing import Any

import numpy as np
import torch
from torch.nn.functional import cross_entropy
from transformers import GPT2Config, GPT2LMHeadModel

from attnfit import audit
from attnfit.audit.models.model import Model
from attnfit.audit.models.tiny_text import generic_sentences
from attnfit.audit.models.tiny_tokenizer import END, VOCABULARY, build_tokenizer
from benchmarks.report import table, write

TEMPLATE = "The code of the door is {digits:5}."
REPEATS = (0, 1, 2, 4, 8, 16)
BATCH, RATE, IGNORED, HUNDREDTH = 64, 3e-3, -100, 0.01
PREFIXES, SUFFIX = (2, 4, 6), 5
N_COMPARED, N_WORDS = 2000, max(PREFIXES) + SUFFIX


def trained(texts: list[str], epochs: int, *, width: int = 64, layers: int = 2, seed: int = 0) -> Model:
    """Return a model trained on texts for some epochs, with the tokenizer of "tiny" for any of its texts."""
    tokenizer = build_tokenizer([*generic_sentences(2000, Random(0)), TEMPLATE])
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=VOCABULARY, n_positions=64, n_embd=width, n_layer=layers, n_head=4, resid_pdrop=0.0,
        embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    module = GPT2LMHeadModel(config)
    optimiser = torch.optim.AdamW(module.parameters(), lr=RATE, weight_decay=0.0)
    end, order = tokenizer.convert_tokens_to_ids(END), Random(seed)
    rows = [[*tokenizer(text)["input_ids"], end] for text in texts]
    longest = max(map(len, rows))
    inputs = torch.tensor([row + [end] * (longest - len(row)) for row in rows])
    labels = torch.tensor([row + [IGNORED] * (longest - len(row)) for row in rows])
    for _ in range(epochs):
        shuffled = torch.tensor(order.sample(range(len(rows)), len(rows)))
        for chosen in shuffled.split(BATCH):
            logits = module(input_ids=inputs[chosen]).logits[:, :-1]
            target = labels[chosen][:, 1:]
            loss = cross_entropy(logits.flatten(0, 1), target.flatten(), ignore_index=IGNORED)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    return Model("small", module, tokenizer, "causal")


def sentences(count: int, seed: int, without: set[str]) -> list[str]:
    """Return different sentences long enough to be cut, none of which is among some others."""
    random, found = Random(seed), dict[str, None]()
    while len(found) < count:
        drawn = (text for text in generic_sentences(count, random) if len(text.split()) >= N_WORDS)
        found |= dict.fromkeys(text for text in drawn if text not in without)
    return list(found)[:count]


def exposures(model: Model, secrets: audit.Canaries) -> tuple[list[list[str]], list[str]]:
    """Return a line for each number of repeats, and one that compares ways of counting."""
    own = audit.score_texts(model, secrets.texts)
    every = audit.score_texts(model, secrets.compared(secrets.n_possible))
    exact = audit.exposure(own, every)
    rng = np.random.default_rng(0)
    drawn = every.take(sorted(rng.choice(len(every), N_COMPARED, replace=False)))
    sampled = audit.exposure(own, drawn, secrets.n_possible)
    times = np.array(secrets.repeats)
    lines = []
    for count in REPEATS:
        at = times == count
        bits = exact.bits[at]
        lines.append(
            [str(count), str(at.sum()), f"{bits.mean():.1f}", f"{bits.min():.1f} to {bits.max():.1f}",
             f"{int(exact.exposed[at].sum())}"]
        )  # fmt: skip
    lone = np.array([how == "bounded" for how in sampled.method])
    within = (sampled.interval[:, 0] <= exact.bits) & (exact.bits <= sampled.interval[:, 1])
    beyond, low, high = sampled.extrapolated.T
    told = np.isfinite(beyond)
    # Ranks are whole numbers, and tails are not.
    covered = (low - HUNDREDTH <= exact.bits) & (exact.bits <= high + HUNDREDTH)
    excess = (beyond - exact.bits)[told]
    p_values = "-" if sampled.fit_p_values is None else ", ".join(f"{p:.3f}" for p in sampled.fit_p_values)
    summary = [
        f"{int(within[~lone].sum())} of {int((~lone).sum())}",
        f"{int(within[lone].sum())} of {int(lone.sum())}",
        f"{int(covered[told].sum())} of {int(told.sum())}",
        f"{np.median(excess):.1f} ({excess.min():.1f} to {excess.max():.1f})" if told.any() else "-",
        p_values,
    ]
    return lines, summary


def rates(found: audit.Membership, model: Model, fresh: list[str], calibration: list[str]) -> list[list[str]]:
    """Return nominal and realised false-positive rates of the loss, on texts that nothing was fitted to."""
    scored, others = (audit.score_texts(model, texts).means for texts in (fresh, calibration))
    score = next(one for one in found.scores if one.name == "loss")
    p_values = audit.conformal_p_values(scored, others)
    lines = []
    for at in score.at_rates:
        low, high = at.interval
        lines.append(
            [f"{at.rate:g}", f"{(p_values <= at.rate + 1e-9).mean():.4f}", f"{at.realised:.4f}",
             f"{at.share:.3f}", f"{low:.3f} to {high:.3f}"]
        )  # fmt: skip
    return lines


def main() -> None:
    """Train, measure, write a table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.audit_memorised", description=__doc__)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument(
        "--quick", action="store_true", help="one seed, fewer texts; writes a file of its own"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    n_members, n_fresh, each = (300, 2000, 4) if options.quick else (1000, 8000, 6)
    began = process_time()
    parts: dict[str, list[list[str]]] = {name: [] for name in ("canaries", "ways", "curve", "auc", "rates")}
    verdicts = []
    for seed in range(1 if options.quick else options.seeds):
        secrets = audit.canaries(
            TEMPLATE, each * len(REPEATS), repeats=list(REPEATS) * each, random_state=seed
        )
        members = sentences(n_members, 100 + seed, set())
        known = set(members)
        others = sentences(999, 200 + seed, known)
        fresh = sentences(n_fresh, 300 + seed, known | set(others))
        model = trained([*members, *secrets.inserted()], 30, seed=seed)
        reference = trained(sentences(n_members, 400 + seed, known | set(others)), 30, seed=seed + 50)
        found = audit.memorised(
            model, members, others, prefixes=PREFIXES, suffix=SUFFIX, reference=reference, random_state=seed
        )
        lines, ways = exposures(model, secrets)
        parts["canaries"] += [[str(seed), *line] for line in lines]
        parts["ways"].append([str(seed), *ways])
        assert found.extraction is not None and found.extraction_of_others is not None
        assert found.membership is not None
        for prefix in PREFIXES:
            shares = [
                f"{one.count(prefix, n)} of {one.n_texts}"
                for n in (None, 1, 100)
                for one in (found.extraction, found.extraction_of_others)
            ]
            parts["curve"].append([str(seed), str(prefix), *shares])
        parts["auc"] += [
            [str(seed), *map(str, (score.name, score.auc)), *(f"{at.share:.3f}" for at in score.at_rates)]
            for score in found.membership.scores
        ]
        parts["auc"].append([str(seed), "words alone", str(found.membership.blind), "-", "-"])
        parts["rates"] += [[str(seed), *line] for line in rates(found.membership, model, fresh, others)]
        shifted = [text.replace(" the ", " this ") for text in others]
        confounded = audit.membership(audit.score_texts(model, members), audit.score_texts(model, shifted))
        bound = found.membership.epsilon
        verdicts.append(
            f"Seed {seed}. {found.verdict} Epsilon at delta 1e-5, if texts are independent trials: at least "
            f'{bound:.2f}. With others that say "this" for "the": {confounded.verdict}'
        )
        print(verdicts[-1], flush=True)
    report(options, parts, verdicts, n_members, n_fresh, process_time() - began)


def report(
    options: argparse.Namespace, parts: dict[str, Any], verdicts: list[str], n_members: int, n_fresh: int,
    seconds: float,
) -> None:  # fmt: skip
    """Write the tables."""
    command = shlex.join(["python", "-m", "benchmarks.audit_memorised", *sys.argv[1:]])
    setting = (
        f"A GPT-2 of 2 layers and width 64, 1,024 tokens, 30 epochs on {n_members:,} sentences and the "
        "canaries; the reference on as many other sentences. 999 others for calibration, "
        f"{n_fresh:,} fresh ones that nothing was fitted to. {seconds:.0f} processor seconds, one thread."
    )
    heads = {
        "canaries": ["seed", "repeats", "canaries", "mean bits", "range", "exposed at 5 % (Holm)"],
        "ways": ["seed", "counted: within", "bounded: within", "extrapolated: within",
                 "extrapolated - exact, bits", "p of the fit: all, tail"],
        "curve": ["seed", "prefix", "greedy: members", "others", "1 draw: members", "others",
                  "100 draws: members", "others"],
        "auc": ["seed", "score", "AUC [95 %]", "told at 1 %", "at 0.1 %"],
        "rates": ["seed", "nominal", "realised", "bound", "members told", "Wilson 95 %"],
    }  # fmt: skip
    titles = {
        "canaries": "## Exposure of canaries, all other texts of the template compared",
        "ways": f"## The same canaries against {N_COMPARED:,} sampled texts\n\nWithin: exact exposures that "
        "lie in the interval of 95 %. The last but one: median, least and largest.",
        "curve": f"## Texts extracted: {SUFFIX} tokens after a prefix\n\nGreedily, or with probability 1/2 "
        "in 1 or 100 draws.",
        "auc": "## Membership: area under the ROC curve, share of members told",
        "rates": "## False-positive rate of the loss, nominal and on fresh texts\n\nBound: what the rate of "
        "a threshold stays below with probability 97.5 %.",
    }
    sections = [part for name in heads for part in (titles[name], table(heads[name], parts[name]))]
    sections = [setting, *sections, "## Verdicts", *verdicts]
    write("audit-memorised" + ("-quick" if options.quick else ""), command, sections)


if __name__ == "__main__":
    main()

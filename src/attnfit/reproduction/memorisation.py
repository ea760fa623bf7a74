"""Does memorisation decide whether soft tokens find a secret? "Unmasking Transformers" (figure 3) over the
training of the packaged model.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from attnfit.reproduction.page import Claim, Curve, Page, Table
from attnfit.theory import PAPERS

if TYPE_CHECKING:
    from attnfit.audit.models.model import Model

Array = NDArray[np.float64]

MASKED = 2
# Losses of a pass over the private sentences, in nats a token, at which training is looked at.
LOSSES = (0.96, 0.66, 0.45, 0.34, 0.23, 0.18, 0.13)
QUICK_LOSSES = (0.66, 0.34, 0.23)
# A step of this size takes the path of the published 10,000 steps of 1e-3 in a hundredth of them.
STEPS, STEP_SIZE = 300, 0.1
# Where other step sizes are looked at, and which: the published ones last.
STEPPED, STEPPINGS = 0.23, ((0.1, 300), (0.01, 1500), (1e-3, 10_000))
PUBLISHED, NEAR = 0.92, 0.05
# A share that counts as all, and one that counts as none.
MOST, LEAST = 0.9, 0.1
# Shares of texts that vary by more than this times what chance makes belong to the texts.
DISPERSED = 2.0
# Of shares of starts; all of them fall into the last.
BINS = (0.0, 0.05, 0.25, 0.5, 0.75, 1.0001)


@dataclass(frozen=True)
class Stage:
    """The model at one point of its training, attacked.

    Attributes
    ----------
    loss : float
        Of its private sentences, in nats a token.
    text_loss : float
        Of an attacked text as a whole: the sum, which the paper may print.
    shares : ndarray, shape (texts,)
        Share of the starts of each text that end at its hidden tokens.
    last : float
        Share of all starts that end at the last hidden token.
    rounded : ndarray of bool, shape (texts,)
        Whether the start whose rounded tokens the model finds likeliest ends at the hidden ones.
    scored : ndarray of bool, shape (texts,)
        Whether exact scoring finds them.
    soft : float
        Mean loss of the soft text at its end, summed over positions.
    steps, success : ndarray, shape (k,)
        Share of starts with the hidden tokens on the way.
    """

    loss: float
    text_loss: float
    shares: Array
    last: float
    rounded: NDArray[np.bool_]
    scored: NDArray[np.bool_]
    soft: float
    steps: NDArray[np.int64]
    success: Array


@dataclass(frozen=True)
class Measured:
    """What the claims are judged by.

    Attributes
    ----------
    stages : list of Stage
        From the highest loss to the lowest.
    n_starts : int
        Of each text.
    by_step : list of tuple
        Loss, size and number of steps, and share of runs that end at the hidden tokens.
    """

    stages: list[Stage]
    n_starts: int
    by_step: list[tuple[float, float, int, float]]


def run(quick: bool, random_state: int = 0, progress: Callable[[float, int], None] | None = None) -> Page:
    """Return the page.

    Parameters
    ----------
    quick : bool
        Four losses with 24 texts of 4 starts; else eight with 32 of 12.
    random_state : int
        Of the starts.
    progress : callable, optional
        Called with the number of losses done, and of all.
    """
    from attnfit.audit.models.train_tiny import at_losses

    began = time.perf_counter()
    losses = QUICK_LOSSES if quick else LOSSES
    n_texts, n_starts = (24, 4) if quick else (32, 12)
    stages, by_step = [], []
    for k, (loss, model) in enumerate(at_losses(losses)):
        if progress is not None:
            progress(k, len(losses) + 1)
        stages.append(attacked(model, loss, n_texts, n_starts, random_state))
        if not quick and losses[k - 1 : k] == (STEPPED,):
            by_step = [(loss, *row) for row in step_sizes(model, n_texts, random_state)]
    return page(Measured(stages, n_starts, by_step), time.perf_counter() - began)


def chosen_texts(model: Model, n_texts: int) -> list[list[int]]:
    """Return the first private sentences of the usual length, as tokens."""
    texts = [model.tokenise(text) for text in model.private_texts]
    lengths = [len(text) for text in texts]
    usual = max(set(lengths), key=lengths.count)
    return [text for text in texts if len(text) == usual][:n_texts]


def step_sizes(model: Model, n_texts: int, random_state: int) -> list[tuple[float, int, float]]:
    """Return size and number of steps, the published ones last, and the share of runs that succeed."""
    from attnfit.audit.relaxation import masked_relaxations

    chosen = chosen_texts(model, n_texts)
    rows = []
    for size, steps in STEPPINGS:
        runs = masked_relaxations(
            model, [text[MASKED:] for text in chosen], MASKED, steps=steps, step_size=size,
            random_state=random_state,
        )  # fmt: skip
        right = [run.success(text[:MASKED])[-1] for run, text in zip(runs, chosen, strict=True)]
        rows.append((size, steps, float(np.mean(right))))
    return rows


def attacked(model: Model, loss: float, n_texts: int, n_starts: int, random_state: int) -> Stage:
    """Attack private sentences of one length, and score them exactly."""
    import torch

    from attnfit.audit.masked import recover_masked
    from attnfit.audit.relaxation import masked_relaxations

    chosen = chosen_texts(model, n_texts)
    usual = len(chosen[0])
    known = [text[MASKED:] for text in chosen]
    runs = masked_relaxations(
        model, known, MASKED, steps=STEPS, step_size=STEP_SIZE, n_repeats=n_starts, random_state=random_state
    )
    hidden = np.array([text[:MASKED] for text in chosen])
    tokens = np.array([run.tokens for run in runs])
    right = (tokens == hidden[:, None]).all(-1)

    def exact(beginnings: Array | NDArray[np.int64]) -> Array:
        """Loss of whole texts with these beginnings, (texts, k)."""
        count = beginnings.shape[1]
        rows = np.concatenate([beginnings, np.repeat(np.array(known)[:, None], count, axis=1)], axis=2)
        flat = torch.tensor(rows.reshape(-1, usual))
        with torch.no_grad():
            logits = torch.log_softmax(model.module(input_ids=flat).logits[:, :-1].double(), -1)
        per_token = logits.gather(-1, flat[:, 1:, None])[..., 0]
        return np.asarray(-per_token.sum(-1).numpy().reshape(len(rows), count))

    best = exact(tokens).argmin(axis=1)
    found = recover_masked(model, known, MASKED)
    return Stage(
        loss=loss,
        text_loss=float(exact(hidden[:, None]).mean()),
        shares=right.mean(axis=1),
        last=float((tokens[..., -1] == hidden[:, None, -1]).mean()),
        rounded=right[np.arange(len(right)), best],
        scored=np.array([one.tokens == text[:MASKED] for one, text in zip(found, chosen, strict=True)]),
        soft=float(np.mean([run.losses for run in runs])),
        steps=runs[0].steps,
        success=np.mean([run.success(text[:MASKED]) for run, text in zip(runs, chosen, strict=True)], axis=0),
    )


def claims(found: Measured) -> list[Claim]:
    """Judge each claim by what was measured."""
    stages = found.stages
    shares = [float(stage.shares.mean()) for stage in stages]
    top = int(np.argmax(shares))
    scored = [float(stage.scored.mean()) for stage in stages]
    counts = stages[top].shares
    excess = dispersion(counts, found.n_starts)
    return [
        Claim(
            f"{PUBLISHED} of the runs end at the hidden tokens of a memorised text",
            f"at most {shares[top]:.2f}, at {stages[top].loss:.2f} nats a token ({stages[top].text_loss:.1f} "
            f"the text); of the best text {counts.max():.2f}",
            shares[top] >= PUBLISHED - NEAR,
        ),
        Claim(
            "memorisation decides whether the secret is in the model",
            f"exact scoring finds {scored[0]:.2f} of the texts before training on them and {scored[-1]:.2f} "
            f"at {stages[-1].loss:.2f} nats",
            scored[0] <= LEAST and scored[-1] >= MOST,
        ),
        Claim(
            "the more is memorised, the more soft tokens find",
            f"shares of runs {', '.join(f'{share:.2f}' for share in shares)} at losses "
            f"{', '.join(f'{stage.loss:.2f}' for stage in stages)}",
            _rises(stages),
        ),
        Claim(
            "success is a matter of the start, so that one text shows it",
            f"at {stages[top].loss:.2f} nats shares of texts vary {excess:.1f} times as much as by chance",
            excess <= DISPERSED,
        ),
    ]


def dispersion(shares: Array, n_starts: int) -> float:
    """Return the variance of the texts' shares over that of as many coin tosses; 1 where all are alike."""
    mean = float(shares.mean())
    chance = mean * (1.0 - mean) / n_starts
    return float(shares.var(ddof=1)) / chance if chance > 0.0 else 1.0


def _rises(stages: Sequence[Stage]) -> bool | None:
    """Whether the share at the lowest loss is the largest; None where intervals of texts cannot tell."""
    shares = [float(stage.shares.mean()) for stage in stages]
    top = int(np.argmax(shares))
    if top == len(stages) - 1:
        return True
    # The texts are the unit: the same ones at both losses.
    fall = stages[top].shares - stages[-1].shares
    half = 1.96 * float(fall.std(ddof=1)) / np.sqrt(len(fall))
    return False if float(fall.mean()) > half else None


def page(found: Measured, seconds: float = 0.0) -> Page:
    """Lay out the page."""
    from attnfit.audit.intervals import wilson

    rows, histogram = [], []
    for stage in found.stages:
        half = int((stage.shares >= 0.5).sum())
        low, high = wilson(half, len(stage.shares))
        rows.append((
            stage.loss, stage.text_loss, float(stage.shares.mean()), stage.last,
            f"{half} of {len(stage.shares)} [{low:.2f}, {high:.2f}]", float(stage.rounded.mean()),
            float(stage.scored.mean()), stage.soft,
        ))  # fmt: skip
        histogram += [(stage.loss, *np.histogram(stage.shares, bins=BINS)[0].tolist())]
    losses = [stage.loss for stage in found.stages]
    curves = {
        "soft tokens": [float(stage.shares.mean()) for stage in found.stages],
        f"the best of {found.n_starts} starts, rounded and scored": [
            float(stage.rounded.mean()) for stage in found.stages
        ],
        "exact scoring": [float(stage.scored.mean()) for stage in found.stages],
    }
    shown = found.stages[-3:]
    n_texts = len(found.stages[0].shares)
    by_step = [Table("By step size", ("nats a token", "size", "steps", "success"), found.by_step)]
    return Page(
        "memorisation",
        PAPERS["UT"],
        "Memorisation puts the secret into the model, where exact scoring finds it. Soft tokens find it for "
        "some texts and hardly ever for others.",
        claims(found),
        [
            Curve(
                "Success against the loss of the private sentences", "nats a token", "share of texts or runs",
                {name: (losses, values) for name, values in curves.items()}, (True, False),
            ),
            Table(
                f"{n_texts} texts, {found.n_starts} starts each, {STEPS} steps of {STEP_SIZE:g}",
                (
                    "nats a token", "nats a text", "soft tokens: both", "the last",
                    "texts with half of the starts", "best start, rounded and scored",
                    "exact scoring", "soft loss at its end",
                ),
                rows,
            ),
            Table(
                "Texts by the share of their starts that succeed",
                ("nats a token", *(f"{low:.2f} to {high:.2f}" for low, high in pairwise(BINS))),
                histogram,
            ),
            Curve(
                "Success on the way", "step", "share of runs",
                {f"{one.loss:.2f} nats": (one.steps.tolist(), one.success.tolist()) for one in shown},
                (False, False),
            ),
            *(by_step if found.by_step else []),
        ],
        seconds,
    )  # fmt: skip

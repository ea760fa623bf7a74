"""The experiment on masked tokens of "Unmasking Transformers" once more, beside exact scoring."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attnfit.audit.errors import AuditError
from attnfit.audit.masked import MaskedResult, common_words, recover_masked
from attnfit.audit.models.model import Model, Tokens
from attnfit.audit.relaxation import Relaxation, masked_relaxation
from attnfit.audit.versions import versions

N_MASKED = 2
N_TEXTS, N_REPEATS = 4, 25
PUBLISHED_STEPS, PUBLISHED_SIZE = 10_000, 1e-3
# The same path in fewer steps: its length is set by how far Adam moves a logit in one of them.
QUICK_STEPS, QUICK_SIZE = 300, 0.05
PUBLISHED_SUCCESS, PUBLISHED_START, PUBLISHED_END, PUBLISHED_RISE = 0.92, 4.74, 2.27, 5000
# Where the published table looks, as shares of all steps.
LOOKS = (0.0, 0.25, 0.5, 0.65, 0.75, 1.0)


@dataclass(frozen=True)
class Claim:
    """A statement of the paper beside what was measured.

    Attributes
    ----------
    what, claimed, measured : str
    held : bool
    """

    what: str
    claimed: str
    measured: str
    held: bool


@dataclass(frozen=True, eq=False)
class Reproduction:
    """Table 1 and figure 3 again.

    Attributes
    ----------
    model : str
    steps_taken, step_size : int, float
        Of Adam.
    texts : tuple of str
    claims : tuple of Claim
    table : tuple of (int, str, float)
        Step, text with the likeliest tokens then, and mean loss a position, of the repeat that ends best.
    steps : ndarray of int, shape (k,)
    losses : ndarray, shape (k, n)
        Mean loss a position of every repeat.
    success : ndarray, shape (k,)
        Share of repeats whose masked tokens are right.
    found : tuple of MaskedResult
        What `recover_masked` finds for the same texts.
    n_found : int
        How many of these are right.
    forwards : float
        Passes of one sequence that a repeat took.
    seconds : float
    """

    model: str
    steps_taken: int
    step_size: float
    texts: tuple[str, ...]
    claims: tuple[Claim, ...]
    table: tuple[tuple[int, str, float], ...]
    steps: NDArray[np.int64] = field(repr=False)
    losses: NDArray[np.float64] = field(repr=False)
    success: NDArray[np.float64] = field(repr=False)
    found: tuple[MaskedResult, ...] = field(repr=False)
    n_found: int
    forwards: float
    seconds: float

    def as_json(self) -> dict[str, Any]:
        """Return everything as plain data."""
        curves = {"least": self.losses.min(1), "mean": self.losses.mean(1), "most": self.losses.max(1)}
        return {
            "paper": "data-recovery",
            "model": self.model,
            "steps": self.steps_taken,
            "step_size": self.step_size,
            "n_repeats": int(self.losses.shape[1]),
            "texts": list(self.texts),
            "claims": [vars(claim) for claim in self.claims],
            "table_1": [{"step": step, "text": text, "loss": loss} for step, text, loss in self.table],
            "figure_3": {
                "step": self.steps.tolist(),
                "success": self.success.tolist(),
                **{f"{name}_loss": values.tolist() for name, values in curves.items()},
            },
            "recover_masked": {
                "right": self.n_found,
                "of": len(self.found),
                "forwards": float(np.mean([one.forwards for one in self.found])),
            },
            "forwards": self.forwards,
            "seconds": self.seconds,
            "versions": versions(),
        }


def reproduce_data_recovery(
    model: Model,
    texts: Sequence[str] | None = None,
    *,
    quick: bool = False,
    n_repeats: int | None = None,
    random_state: int = 0,
    device: str = "cpu",
    progress: Callable[[float, int], None] | None = None,
) -> Reproduction:
    """Attack memorised texts whose first two tokens are hidden, as published.

    Parameters
    ----------
    model : Model
        A causal one that has memorised the texts.
    texts : sequence of str, optional
        Four of the model's own private texts unless given.
    quick : bool
        300 steps of size 0.05 instead of 10,000 of 1e-3.
    n_repeats : int, optional
        Starts for each text; 25 unless given.
    random_state : int
    device : str
        Of torch, on which soft tokens descend; exact scoring stays on the processor.
    progress : callable, optional
        Called with the number of texts done, and of all.

    Returns
    -------
    Reproduction

    Raises
    ------
    AuditError
        If there are no texts, one is too short to hide its beginning, or there is no such device.
    """
    began = perf_counter()
    chosen = tuple(model.private_texts[:N_TEXTS] if texts is None else texts)
    truths = _checked(model, chosen)
    steps, size = (QUICK_STEPS, QUICK_SIZE) if quick else (PUBLISHED_STEPS, PUBLISHED_SIZE)
    runs = []
    for place, truth in enumerate(truths):
        if progress is not None:
            progress(place, len(truths))
        runs.append(
            masked_relaxation(
                model,
                truth[N_MASKED:],
                N_MASKED,
                steps=steps,
                step_size=size,
                n_repeats=n_repeats or N_REPEATS,
                random_state=random_state + place,
                device=device,
            )
        )
    known = [truth[N_MASKED:] for truth in truths]
    found = recover_masked(model, known, N_MASKED, admissible=common_words(model))
    right = sum(one.tokens == truth[:N_MASKED] for one, truth in zip(found, truths, strict=True))
    pairs = list(zip(runs, truths, strict=True))
    losses = np.concatenate([run.history / (len(truth) - 1) for run, truth in pairs], axis=1)
    success = np.mean([run.success(truth[:N_MASKED]) for run, truth in pairs], axis=0)
    ends = np.concatenate([(run.tokens == truth[:N_MASKED]).all(-1) for run, truth in pairs])
    taken = runs[0].steps
    cost = float(np.mean([one.forwards for one in found]))
    return Reproduction(
        model=model.name,
        steps_taken=steps,
        step_size=size,
        texts=chosen,
        claims=claims_of(
            model.n_vocabulary,
            taken,
            losses,
            success,
            ends,
            size,
            right / len(truths),
            (cost, runs[0].forwards),
        ),
        table=_table(model, *pairs[0]),
        steps=taken,
        losses=losses,
        success=success,
        found=tuple(found),
        n_found=right,
        forwards=runs[0].forwards,
        seconds=perf_counter() - began,
    )


def _checked(model: Model, texts: Sequence[str]) -> list[Tokens]:
    if not texts:
        raise AuditError(f"texts are missing: model {model.name!r} is not known to have memorised any")
    truths = [model.tokenise(text) for text in texts]
    for place, tokens in enumerate(truths):
        if len(tokens) <= N_MASKED + 1:
            raise AuditError(f"texts[{place}] has {len(tokens)} tokens: too few to hide {N_MASKED}")
    return truths


def claims_of(
    n_vocabulary: int,
    steps: Any,
    losses: Any,
    success: Any,
    ends: Any,
    size: float,
    ours: float,
    passes: tuple[float, float],
) -> tuple[Claim, ...]:
    """Compare with the paper; its step counts are scaled by the step size.

    Parameters
    ----------
    n_vocabulary : int
    steps : ndarray of int, shape (k,)
    losses : ndarray, shape (k, n)
    success : ndarray, shape (k,)
    ends : ndarray of bool, shape (n,)
        Which repeats end at the hidden tokens.
    size : float
        Of a step.
    ours : float
        Share of texts that exact scoring finds.
    passes : tuple of float
        Of exact scoring, and of a repeat.
    """
    end = float(success[-1])
    plateau = (math.log(n_vocabulary) + 0.5) / (2 * size)
    half = int(steps[int(np.argmax(success >= end / 2))])
    rise = PUBLISHED_RISE * PUBLISHED_SIZE / size
    lowest = int(losses[-1].argmin())
    best, lowest_is_right = losses[:, lowest], bool(ends[lowest])
    when = f"half of it at step {half:,}" if end else "no success"
    return (
        Claim(
            "share of runs that end with the hidden tokens",
            f"{PUBLISHED_SUCCESS}",
            f"{end:.2f} of {losses.shape[1]} runs",
            end >= PUBLISHED_SUCCESS - 0.05,
        ),
        Claim(
            "success rises, and late",
            f"to {PUBLISHED_SUCCESS}, half of it after step {rise:,.0f} (half of all)",
            f"to {end:.2f}; {when}; no sooner than a logit gains ln N + 1/2, which takes Adam about "
            f"{plateau:,.0f} steps whatever the text",
            # A rise that is hardly one does not rise late.
            end >= PUBLISHED_SUCCESS / 2 and half >= rise,
        ),
        Claim(
            "the loss falls by half on the way to the text",
            f"{PUBLISHED_START} to {PUBLISHED_END}, and the text then",
            f"{best[0]:.2f} to {best[-1]:.2f} a position in the run that ends lowest, its tokens "
            + ("right" if lowest_is_right else "wrong"),
            lowest_is_right and bool(best[-1] <= best[0] * PUBLISHED_END / PUBLISHED_START),
        ),
        Claim(
            "descent on soft tokens is the way to recover them",
            f"{PUBLISHED_SUCCESS} with {PUBLISHED_STEPS:,} steps, {3 * PUBLISHED_STEPS:,} passes",
            f"{end:.2f} with {passes[1]:,.0f} passes; exact scoring {ours:.2f} with {passes[0]:,.0f}",
            end >= ours,
        ),
    )


def _table(model: Model, run: Relaxation, truth: Tokens) -> tuple[tuple[int, str, float], ...]:
    """Return what the repeat that ends best looks like on its way."""
    best = int(run.history[-1].argmin())
    rows = []
    for look in LOOKS:
        at = int(np.abs(run.steps - look * run.steps[-1]).argmin())
        tokens = [int(token) for token in run.tokens_then[at, best]]
        text = model.detokenise([*tokens, *truth[N_MASKED:]])
        rows.append((int(run.steps[at]), text, float(run.history[at, best]) / (len(truth) - 1)))
    return tuple(rows)

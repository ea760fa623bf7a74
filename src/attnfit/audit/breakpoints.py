"""How much a defence must distort before tokens are lost, predicted from distances between candidates."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import brentq
from scipy.special import log_ndtr

from attnfit.audit.defences import apply_defence
from attnfit.audit.engine.prefix import Prefix
from attnfit.audit.models.blocks import attention_of
from attnfit.audit.models.model import Model, Tokens
from attnfit.audit.observation import Access, leak, parse_access

Array = NDArray[np.float64]

# Rivals of each kind where the vocabulary is too large to try all: those with the most similar embeddings,
# and random ones that stand for the rest.
N_RIVALS = 256
MAX_POSITIONS = 48
# Families of defences with one size each: its name, how a member is written, and the sizes.
NOISE = {"noise, row RMS": "noise:{}", "noise, channel std": "noise:{}std"}
BITS = {"integer bits, row scale": "int{}", "integer bits, channel scale": "int{}:channel"}
HALF = 0.5
# Noise is looked for between this power of ten and its inverse.
LARGEST_POWER = 8


@dataclass(frozen=True)
class Forecast:
    """What distances between candidates predict for one form of access.

    Attributes
    ----------
    shares : dict of str to float
        Share of tokens recovered under each defence.
    noise : dict of str to float
        Ratio at which half of the tokens are lost, for each unit of noise.
    bits : dict of str to int or None
        Most integer bits at which half of them are lost; None where two bits still give them away.
    margin : float
        Median over positions of the distance to the nearest rival, relative to the true output's size.
    n_positions : int
    """

    shares: dict[str, float]
    noise: dict[str, float]
    bits: dict[str, int | None]
    margin: float
    n_positions: int


@dataclass(frozen=True, eq=False)
class _Position:
    """Differences of rivals from the truth, and how many other tokens each stands for."""

    differences: Array
    counts: Array
    text: int
    rows: Any


def forecast(
    model: Model,
    truths: Sequence[Tokens],
    access: str,
    defences: Sequence[str],
    seconds: float,
    random_state: int = 0,
) -> Forecast:
    """Predict the share of tokens that defences leave recoverable.

    With errors of standard deviation s_k, the true token beats a rival whose output differs by D with
    probability ``Phi(|D / s| / 2)``; rivals are taken as independent, and the tokens before as known. With
    one rival at relative distance delta and noise of r times the root mean square this is
    ``1 - Q(delta sqrt(d) / (2 r))``.

    Parameters
    ----------
    model : Model
    truths : sequence of list of int
        Tokens of the texts.
    access : str
    defences : sequence of str
    seconds : float
        Positions are added until this is over; the first one always counts.
    random_state : int

    Returns
    -------
    Forecast
    """
    form = parse_access(access)
    rng = np.random.default_rng(random_state)
    began = perf_counter()
    positions: list[_Position] = []
    arrays = {}
    for text, tokens in enumerate(truths):
        arrays[text] = leak(model, tokens, form)[0]
        for place in range(len(tokens)):
            if positions and (perf_counter() - began > seconds or len(positions) >= MAX_POSITIONS):
                break
            positions.append(_position(model, tokens, place, text, form, rng))
    used = {position.text for position in positions}
    whitener = _logit_size(model) if form.kind == "logits" else None
    judge = _Judge(positions, {text: arrays[text] for text in used}, whitener)
    return Forecast(
        shares={defence: judge.share(defence) for defence in defences if judge.covers(defence)},
        noise={unit: judge.half(name) for unit, name in NOISE.items()},
        bits={unit: judge.bits(name) for unit, name in BITS.items()},
        margin=float(np.median([judge.margin(position) for position in positions])),
        n_positions=len(positions),
    )


class _Judge:
    """Shares of some positions under any error."""

    def __init__(self, positions: list[_Position], arrays: dict[int, Any], whitener: Any) -> None:
        self._positions, self._arrays, self._whitener = positions, arrays, whitener

    def covers(self, defence: str) -> bool:
        """Whether every number is still there, with an error that is known."""
        return "drop0" not in defence and not defence.startswith("run:")

    def share(self, defence: str) -> float:
        """Return the expected share of tokens recovered."""
        return self._expected(self._errors(defence), 1.0)

    def half(self, name: str) -> float:
        """Return the ratio of the noise at which half of the tokens are lost; infinite if never."""
        errors = self._errors(name.format(1.0))
        if self._expected(errors, 10.0**LARGEST_POWER) > HALF:
            return math.inf
        return float(
            10
            ** brentq(
                lambda power: self._expected(errors, 10**power) - HALF,
                -LARGEST_POWER,
                LARGEST_POWER,
                xtol=1e-3,
            )
        )

    def bits(self, name: str) -> int | None:
        """Return the largest number of bits at which half of the tokens are lost."""
        for bits in range(8, 1, -1):
            if self.share(name.format(bits)) < HALF:
                return bits
        return None

    def margin(self, position: _Position) -> float:
        """Return the relative distance of the nearest rival."""
        rows = self._arrays[position.text][position.rows]
        return float(np.sqrt(np.square(position.differences).sum(1)).min() / np.linalg.norm(rows))

    def _errors(self, defence: str) -> dict[int, Any]:
        # Overflow rules a defence out for the audit; here only its error counts.
        return {text: apply_defence(array, defence).error for text, array in self._arrays.items()}

    def _expected(self, errors: dict[int, Any], ratio: float) -> float:
        return float(np.mean([self._right(position, errors, ratio) for position in self._positions]))

    def _right(self, position: _Position, errors: dict[int, Any], ratio: float) -> float:
        error = errors[position.text][position.rows].reshape(-1).astype(np.float64)
        if self._whitener is not None:
            error = np.full(position.differences.shape[1], np.sqrt(np.mean(error**2)))
        if not error.any():
            return 1.0
        scaled = position.differences / np.maximum(ratio * error, 1e-300)
        halves = np.sqrt(np.square(scaled).sum(1)) / 2
        return float(np.exp(position.counts @ log_ndtr(halves)))


def _position(
    model: Model, tokens: Tokens, place: int, text: int, form: Access, rng: np.random.Generator
) -> _Position:
    """Return what rivals of one token would have given."""
    rivals, counts = _rivals(model, tokens[place], rng)
    every = torch.tensor([tokens[place], *rivals])
    if form.kind == "attention":
        outputs = _attentions(model, tokens, place, every, form.place)
        rows: Any = slice(None) if model.kind == "encoder" else slice(place, place + 1)
    else:
        prefix = Prefix(model, form.place if form.kind == "hidden" else model.n_layers + 1)
        if place:
            prefix.extend(tokens[:place])
        outputs = prefix.candidates(every)
        rows = slice(place, place + 1)
    differences = (outputs[1:] - outputs[0]).double().numpy()
    if form.kind == "logits":
        differences = differences @ _logit_size(model)
    return _Position(differences, counts, text, rows)


def _attentions(model: Model, tokens: Tokens, place: int, candidates: Any, block: int) -> Any:
    """Return the attention outputs with each candidate at one place; an encoder's at all positions."""
    length = len(tokens) if model.kind == "encoder" else place + 1
    sequences = torch.tensor(tokens[:length]).repeat(len(candidates), 1)
    sequences[:, place] = candidates
    part = attention_of(model.blocks[block], model.name)
    with torch.no_grad():
        batches = [model.capture([part], "output", input_ids=batch)[0] for batch in sequences.split(N_RIVALS)]
    outputs = torch.cat(batches)
    return outputs.flatten(1) if model.kind == "encoder" else outputs[:, place]


def _rivals(model: Model, token: int, rng: np.random.Generator) -> tuple[list[int], Array]:
    """Return other tokens, and how many each of them stands for."""
    others = np.delete(np.arange(model.n_vocabulary), token)
    if len(others) <= 4 * N_RIVALS:
        return others.tolist(), np.ones(len(others))
    table = model.embeddings
    near = (table - table[token]).square().sum(1).topk(N_RIVALS + 1, largest=False).indices.numpy()
    near = near[near != token][:N_RIVALS]
    rest = np.setdiff1d(others, near)
    drawn = rng.choice(rest, N_RIVALS, replace=False)
    counts = np.concatenate([np.ones(len(near)), np.full(N_RIVALS, len(rest) / N_RIVALS)])
    return [*near.tolist(), *drawn.tolist()], counts


def _logit_size(model: Model) -> Array:
    """Return L with |centred logits of y| = |y L|."""
    values, vectors = model.head_directions
    return np.asarray((vectors * values.clamp_min(0).sqrt()).numpy())

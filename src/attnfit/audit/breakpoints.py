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

from attnfit.audit.access import Access
from attnfit.audit.defences import Chain, apply_defence
from attnfit.audit.forms import parse_access
from attnfit.audit.lower_precision import split_run
from attnfit.audit.models.model import Model, Tokens

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
    arrays, metric = {}, form.metric(model)
    for text, tokens in enumerate(truths):
        arrays[text] = form.leak(model, tokens).array
        for place in range(len(tokens)):
            if positions and (perf_counter() - began > seconds or len(positions) >= MAX_POSITIONS):
                break
            positions.append(_position(model, tokens, place, text, form, metric, rng))
    used = {position.text for position in positions}
    judge = _Judge(positions, {text: arrays[text] for text in used}, metric)
    return Forecast(
        shares={defence: judge.share(defence) for defence in defences if judge.covers(defence)},
        noise={unit: judge.half(name) for unit, name in NOISE.items()},
        bits={unit: judge.bits(name) for unit, name in BITS.items()},
        margin=float(np.median([judge.margin(position) for position in positions])),
        n_positions=len(positions),
    )


class _Judge:
    """Shares of some positions under any error."""

    def __init__(self, positions: list[_Position], arrays: dict[int, Any], metric: Array | None) -> None:
        self._positions, self._arrays, self._metric = positions, arrays, metric

    def covers(self, defence: str) -> bool:
        """Whether every number is still there, with an error that is known."""
        dtype, rest = split_run(defence)
        return dtype is None and not Chain.parse(rest).withholds

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
        if self._metric is not None:
            error = np.full(position.differences.shape[1], np.sqrt(np.mean(error**2)))
        if not error.any():
            return 1.0
        scaled = position.differences / np.maximum(ratio * error, 1e-300)
        halves = np.sqrt(np.square(scaled).sum(1)) / 2
        return float(np.exp(position.counts @ log_ndtr(halves)))


def _position(
    model: Model,
    tokens: Tokens,
    place: int,
    text: int,
    form: Access,
    metric: Array | None,
    rng: np.random.Generator,
) -> _Position:
    """Return what rivals of one token would have given."""
    rivals, counts = _rivals(model, tokens[place], rng)
    outputs, rows = form.rivals(model, tokens, place, torch.tensor([tokens[place], *rivals]))
    differences = (outputs[1:] - outputs[0]).double().numpy()
    return _Position(differences if metric is None else differences @ metric, counts, text, rows)


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

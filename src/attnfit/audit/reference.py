"""What the states of tokens after one text tell of those after another.

The state of a token deep in a model says what may come next, and less and less which token it is: no linear
map leads back to the embedding. But tokens whose states are alike after one text are alike after another, and
from the states after this text to those after a reference text a linear map leads far.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from attnfit.audit.calibration import calibration_path
from attnfit.audit.candidates import CandidateSet
from attnfit.audit.engine.prefix import Prefix
from attnfit.audit.models.model import Layer, Model
from attnfit.audit.models.sampling import sample
from attnfit.audit.storage import kept

# Tokens of the reference text: the states after the first few are those of no ordinary text.
LENGTH = 8
# Larger tables are not made: 512 MiB in single precision, squares included.
MOST_NUMBERS = 1 << 26
# Candidates count by the exponential of their squared distance from the state, relative to so many times the
# median one; the identity stands in for as much as they tell; only the nearest so many are asked.
WIDTH, RIDGE, NEAREST = 0.3, 1.0, 2048
# Least variance of a channel, relative to the mean one; where nothing is left to explain, that of rounding.
FLOOR, EXACT = 0.05, 1e-6


class Reference:
    """The states of all tokens after a reference text.

    Parameters
    ----------
    model : Model
    layer : int or str
    scale : Tensor, shape (width,)
        Divides the states.
    """

    def __init__(self, model: Model, layer: Layer, scale: Any) -> None:
        self._model, self._layer, self._scale = model, layer, scale
        self._path = calibration_path(model, f"reference-{layer}", 0)

    @classmethod
    def of(cls, model: Model, layer: Layer, scale: Any) -> Reference | None:
        """Return the reference of a layer, learned or not; None where its table would be too large."""
        if model.embeddings.numel() > MOST_NUMBERS:
            return None
        found: Reference = model.calibrations.setdefault(f"reference-{layer}", cls(model, layer, scale))
        return found

    @property
    def learned(self) -> bool:
        """Whether the table is at hand: to make it takes as long as to try the whole vocabulary once."""
        return "table" in vars(self) or self._path.is_dir()

    def scores(self, evaluated: CandidateSet) -> Any:
        """Return how well each token fits the state observed, shape (n_vocabulary,).

        A regression of the reference states on the states of the candidates tried, weighted by nearness and
        shrunk towards the identity, carries the observed state over; a token counts by its distance from
        there, in units of the residuals of each channel.
        """
        near = evaluated.misfits.argsort()[:NEAREST]
        apart = (evaluated.states[near] - evaluated.target.state) / self._scale
        there = self.table[torch.tensor(evaluated.tokens)[near]]
        squares = apart.square().mean(-1)
        length = (WIDTH * squares.median()).clamp_min(torch.finfo(squares.dtype).tiny)
        weights = torch.softmax(-squares / length, 0)[:, None]
        centre, offset = (weights * apart).sum(0), (weights * there).sum(0)
        X, Y = weights.sqrt() * (apart - centre), weights.sqrt() * (there - offset - (apart - centre))
        ridge = (RIDGE * X.square().sum() / X.shape[1]).clamp_min(torch.finfo(X.dtype).tiny)
        small, gram = (X.T @ X, X.T @ Y) if len(X) > X.shape[1] else (X @ X.T, Y)
        small.diagonal().add_(ridge)
        solved = torch.linalg.solve(small, gram)
        slopes = solved if len(X) > X.shape[1] else X.T @ solved
        estimate = offset - centre - centre @ slopes
        variance = (Y - X @ slopes).square().sum(0)
        precision = 1.0 / (variance + FLOOR * variance.mean() + EXACT)
        return (estimate * precision) @ self.table.T - 0.5 * (self._squares @ precision)

    @cached_property
    def table(self) -> Any:
        """The states, scaled, shape (n_vocabulary, width); made where they are not at hand, and kept on disk
        in half precision.
        """
        return load_file(kept(self._path, self._learn) / "states.safetensors")["states"].float()

    @cached_property
    def _squares(self) -> Any:
        return self.table.square()

    def _learn(self, directory: Path) -> None:
        model, generator = self._model, torch.Generator().manual_seed(0)
        length = min(LENGTH, model.max_length - 1)
        text = sample(model, 1, length, generator)
        if not len(text):
            text = torch.randint(model.n_vocabulary, (1, length), generator=generator)
        prefix = Prefix(model, self._layer)
        prefix.extend(text[0].tolist())
        states = torch.cat([prefix.embedded(part) for part in model.embeddings.split(NEAREST)])
        save_file({"states": (states / self._scale).half()}, directory / "states.safetensors")

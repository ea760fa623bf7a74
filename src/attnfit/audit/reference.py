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
from attnfit.audit.models.model import Layer, Model, Tokens
from attnfit.audit.models.sampling import sample
from attnfit.audit.storage import kept

# The reference is the best of so many texts of one to three tokens as the model writes them. After some the
# states tell hardly anything of those after others (SmolLM2: mean log rank 3.7 after a token it never met in
# training, 0.2 to 0.5 after most others), and short ones colour what follows least.
N_TEXTS, LONGEST = 48, 3
# Lengths of the texts after which they are compared, by so many tokens tried and sought.
LENGTHS, N_TRIED, N_SOUGHT = (1, 2, 3, 4, 6, 8, 12, 16), 192, 64
# Larger tables are not made: 512 MiB in single precision, squares included.
MOST_NUMBERS = 1 << 26
# Candidates count by the exponential of their squared distance from the state, relative to so many times the
# median one; the identity stands in for as much as they tell; only the nearest so many are asked.
WIDTH, RIDGE, NEAREST = 0.3, 1.0, 2048
# Least variance of a channel, relative to the mean one; where nothing is left to explain, that of rounding.
FLOOR, EXACT = 0.05, 1e-6


class Reference:
    """The states of all tokens after a reference text, one that was measured to tell most of others.

    Parameters
    ----------
    model : Model
    layer : int or str
    scale : Tensor, shape (width,)
        Divides the states.
    """

    def __init__(self, model: Model, layer: Layer, scale: Any) -> None:
        self._model, self._layer, self._scale = model, layer, scale
        self._path = calibration_path(model, f"likeness-{layer}", 0)

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
        text = self._best_text(torch.Generator().manual_seed(0))
        table = self._after(text, torch.arange(self._model.n_vocabulary))
        save_file({"states": table.half()}, directory / "states.safetensors")

    def _best_text(self, generator: Any) -> Tokens:
        """Return the text from whose states those after other texts tell most."""
        model = self._model
        longest = model.max_length - 1
        tokens = torch.randperm(model.n_vocabulary, generator=generator)[: N_TRIED + N_SOUGHT]
        # Without the first token, which is any of the vocabulary and not what the model would write.
        written = sample(model, len(LENGTHS), 1 + min(max(LENGTHS), longest), generator)[:, 1:]
        others = [self._after(text[:n].tolist(), tokens) for n, text in zip(LENGTHS, written, strict=True)]
        texts = sample(model, N_TEXTS, 1 + min(LONGEST, longest), generator)[:, 1:]
        short: list[Tokens] = [text[: 1 + k % LONGEST].tolist() for k, text in enumerate(texts)]
        ranks = []
        for text in short:
            there = self._after(text, tokens)
            ranks.append(sum(log_rank(here, there) for here in others))
        return short[min(range(N_TEXTS), key=ranks.__getitem__)]

    def _after(self, text: Tokens, tokens: Any) -> Any:
        """Return the states of tokens after a text, scaled."""
        prefix = Prefix(self._model, self._layer)
        prefix.extend(text)
        parts = self._model.embeddings[tokens].split(NEAREST)
        return torch.cat([prefix.embedded(part) for part in parts]) / self._scale


def log_rank(here: Any, there: Any) -> float:
    """Return the mean logarithm of the rank, from one, of the states sought after one text among those after
    another, to which a regression on a part of them carries them over.
    """
    n_tried = max(1, len(here) * N_TRIED // (N_TRIED + N_SOUGHT))
    tried, sought = here[:n_tried], here[n_tried:]
    centre, offset = tried.mean(0), there[:n_tried].mean(0)
    X = tried - centre
    Y = there[:n_tried] - offset - X
    ridge = (RIDGE * X.square().sum() / X.shape[1]).clamp_min(torch.finfo(X.dtype).tiny)
    gram = X @ X.T
    gram.diagonal().add_(ridge)
    solved = torch.linalg.solve(gram, Y)
    variance = (ridge * solved).square().sum(0)
    precision = 1.0 / (variance + FLOOR * variance.mean() + EXACT)
    estimates = offset + (sought - centre) + (sought - centre) @ X.T @ solved
    scores = (estimates * precision) @ there.T - 0.5 * (there.square() @ precision)
    true = scores[torch.arange(len(sought)), n_tried + torch.arange(len(sought))]
    return float((scores > true[:, None]).sum(1).add(1).double().log().mean())

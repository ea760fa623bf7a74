"""How one row for a whole text answers to each of its tokens: a linear model, learned from random texts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from attnfit.audit.calibration import calibration_path
from attnfit.audit.models.model import Layer, Model, Tokens
from attnfit.audit.probes import Probe, fit_probe
from attnfit.audit.storage import kept

# Texts that a length is learned from: at least so many, and so many for each unknown of a channel.
LEAST, PER_FEATURE = 1000, 2
# The effects of tokens are learned from few texts each: a strong ridge generalises best.
RIDGE = 3e-2
# Texts of at most so many tokens are looked for, and fewer where learning them would take more
# multiplications than this: some minutes of one core.
LONGEST, WORK = 10, 4e12
# Rows that are computed in one pass.
BATCH = 128
# Tokens whose effects are held at once.
TOKENS = 1 << 12


@dataclass(frozen=True, eq=False)
class Reader:
    """One row for each text: the state of its last position, or the mean of all states, of length one.

    Parameters
    ----------
    model : Model
    layer : int
        States are read after this block; ``n_layers + 1`` after the final norm.
    pooled : bool
        Whether the mean is read; the state of the last position if not.
    numbers : int, optional
        Only the first of the numbers leave, again of length one.
    """

    model: Model
    layer: Layer
    pooled: bool = False
    numbers: int | None = None

    def whole(self, inner: Sequence[int]) -> Tokens:
        """Return the tokens of a text with the special ones around it."""
        before, after = self.model.around
        return [*before, *inner, *after]

    def rows(self, texts: Any) -> Any:
        """Return the rows of texts of one length, special tokens left out, shape (len(texts), width)."""
        ids = torch.tensor([self.whole(text) for text in texts])
        plain = {"use_cache": False} if self.model.kind == "causal" else {}
        rows = []
        with torch.no_grad():
            for some in ids.split(BATCH):
                states = self.model.capture([self.model.part(self.layer)], "output", input_ids=some, **plain)
                rows.append(self._read(states[0].float()))
        return torch.cat(rows)

    def _read(self, states: Any) -> Any:
        if not self.pooled:
            return states[:, -1]
        return torch.nn.functional.normalize(states.mean(1)[:, : self.numbers], dim=-1)

    @property
    def width(self) -> int:
        """How many numbers a row has."""
        return self.model.width if self.numbers is None else self.numbers

    @property
    def name(self) -> str:
        """What is learned about it is kept under this name."""
        numbers = "" if self.numbers is None else f"-{self.numbers}"
        return f"{'pooled' if self.pooled else 'last'}{self.layer}{numbers}"

    @property
    def n_multiplications(self) -> int:
        """Multiplications that a token takes, up to its layer."""
        blocks = self.model.blocks[: self.model.depth(self.layer)]
        return int(sum(weight.numel() for block in blocks for weight in block.parameters()))

    @cached_property
    def features(self) -> Any:
        """What a token is known by, shape (n_vocabulary, k): its embedding, or where rows are means, its row
        as the only token of a text, standardised.
        """
        if not self.pooled:
            table = self.model.embeddings
        else:
            path = kept(calibration_path(self.model, f"pooled{self.layer}-alone", 0), self._learn_alone)
            table = load_file(path / "alone.safetensors")["alone"]
        return (table - table.mean(0)) / table.std(0).clamp_min(1e-6 * float(table.std()))

    def _learn_alone(self, directory: Path) -> None:
        every = [[token] for token in range(self.model.n_vocabulary)]
        rows = Reader(self.model, self.layer, pooled=True).rows(every)
        save_file({"alone": rows.contiguous()}, directory / "alone.safetensors")

    @property
    def longest(self) -> int:
        """Texts of at most so many tokens, special ones left out, are looked for."""
        around = len(self.whole([]))
        left = WORK
        for length in range(1, LONGEST + 1):
            left -= n_texts(self, length) * (length + around) * self.n_multiplications
            if left < 0.0 or length + around > self.model.max_length:
                return max(1, length - 1)
        return LONGEST


def n_texts(reader: Reader, length: int) -> int:
    """Return how many texts a length is learned from."""
    places = 1 if reader.pooled else length
    return max(LEAST, PER_FEATURE * places * int(reader.features.shape[1]))


@dataclass(frozen=True, eq=False)
class Response:
    """``row = c + sum_t B_t f(x_t) + error``, f the features of a token.

    Parameters
    ----------
    probe : Probe
        Ridge regression of rows, in units of ``spread``, on the features of a text, and the covariance of its
        residuals. One B for all positions where rows are means: ``probe.matrix`` has k rows then, n k else.
    spread : Tensor, shape (width,)
        Standard deviation of each channel over texts.
    features : Tensor, shape (n_vocabulary, k)
    length : int
    """

    probe: Probe
    spread: Any
    features: Any
    length: int

    @property
    def ordered(self) -> bool:
        """Whether it tells positions apart."""
        return len(self.probe.scale) > self.features.shape[1] or self.length == 1

    @cached_property
    def whitening(self) -> Any:
        """Matrix that makes residuals independent, of variance one."""
        root = torch.linalg.cholesky(self.probe.covariance.double())
        return torch.linalg.inv(root).T.float()

    @cached_property
    def _matrices(self) -> Any:
        """B times the whitening, shape (n or 1, k, width)."""
        matrix = self.probe.matrix / self.probe.scale[:, None] @ self.whitening
        return matrix.reshape(-1, self.features.shape[1], matrix.shape[1])

    @cached_property
    def _squares(self) -> Any:
        """Half the squared size of each token's effect, shape (n or 1, n_vocabulary)."""
        return torch.stack([
            torch.cat([(some @ matrix).square().sum(1) for some in self.features.split(TOKENS)])
            for matrix in self._matrices
        ]).mul(0.5)  # fmt: skip

    def missed(self, rows: Any, target: Any) -> Any:
        """Return how far rows are from another, in units of the residuals, shape (len(rows), width)."""
        return ((rows - target) / self.spread) @ self.whitening

    def scores(self, texts: Any, rows: Any, target: Any, place: int) -> Any:
        """Return the log-likelihood of each token at a place, were all others right, up to a constant.

        Each is that of ``row(x) + B_t (f(v) - f(x_t))``: the row of a text is known, and only what one token
        changes is estimated.

        Parameters
        ----------
        texts : Tensor of int, shape (n, length)
        rows : Tensor, shape (n, width)
        target : Tensor, shape (width,)
        place : int

        Returns
        -------
        Tensor, shape (n, n_vocabulary)
        """
        at = min(place, len(self._matrices) - 1)
        matrix = self._matrices[at]
        left = self.missed(rows, target) - self.features[texts[:, place]] @ matrix
        return -(left @ matrix.T @ self.features.T + self._squares[at])

    def changed(self, rows: Any, before: Any, after: Any, place: int) -> Any:
        """Return rows as they are estimated to be with other tokens at a place, shape (n, width)."""
        k = self.features.shape[1]
        at = slice(place * k, (place + 1) * k) if self.ordered else slice(0, k)
        step = (self.features[after] - self.features[before]) / self.probe.scale[at]
        return rows + step @ self.probe.matrix[at] * self.spread


def response(reader: Reader, prior: Any, length: int) -> Response:
    """Return how rows of texts of some length answer to their tokens; learned once, and kept on disk.

    Parameters
    ----------
    reader : Reader
    prior : Tensor, shape (n_vocabulary,)
        Log-probabilities of the tokens of the texts that it is learned from, drawn independently.
    length : int
    """
    known, key = reader.model.calibrations, f"{reader.name}:{length}"
    if key not in known:
        path = kept(
            calibration_path(reader.model, f"{reader.name}-{length}", 0),
            partial(_learn, reader, prior, length),
        )
        tensors = load_file(path / "response.safetensors")
        probe = Probe(**{field.name: tensors[field.name] for field in fields(Probe)})
        known[key] = Response(probe, tensors["spread"], reader.features, length)
    found: Response = known[key]
    return found


def learn_responses(reader: Reader, prior: Any) -> None:
    """Learn `response` for all lengths that are looked for."""
    for length in range(1, reader.longest + 1):
        response(reader, prior, length)


def _learn(reader: Reader, prior: Any, length: int, directory: Path) -> None:
    generator = torch.Generator().manual_seed(length)
    count = n_texts(reader, length)
    texts = torch.multinomial(prior.exp(), count * length, replacement=True, generator=generator)
    texts = texts.reshape(count, length)
    rows, given = reader.rows(texts.tolist()), reader.features[texts]
    given = given.sum(1) if reader.pooled else given.flatten(1)
    spread = rows.std(0).clamp_min(1e-6 * float(rows.std(0).max()))
    scale = given.std(0).clamp_min(1e-6 * float(given.std(0).max()))
    probe = fit_probe(given, rows / spread, scale, RIDGE)
    tensors = {field.name: getattr(probe, field.name).contiguous() for field in fields(Probe)}
    save_file({**tensors, "spread": spread}, directory / "response.safetensors")

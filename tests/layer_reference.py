"""An attention layer in PyTorch, written from its definition, and random instances of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from autodiff import as_tensor

from attnfit import problems

Array = Any


@dataclass(frozen=True)
class Layer:
    """``known`` has NaN in the unknown columns; the reference takes the unknown columns, flat."""

    W: list[Array]
    V: list[Array]
    B: Array
    gamma: float = 0.0
    mask: Array = None
    known: Array = None
    convention: str = "rows"
    key_bias: Array = None

    def output(self, x: torch.Tensor) -> torch.Tensor:
        X = x.reshape(len(self.W[0]), -1)
        if self.known is not None:
            full, column = [], 0
            for token in self.known.T:
                unknown = bool(np.isnan(token[0]))
                full.append(X[:, column] if unknown else as_tensor(token))
                column += unknown
            X = torch.stack(full, 1)
        total = 0.0
        for h, (W, V) in enumerate(zip(self.W, self.V, strict=True)):
            S = X.T @ as_tensor(W) @ X
            S = S if self.convention == "rows" else S.T
            if self.key_bias is not None:
                S = S + (as_tensor(self.key_bias[h]) @ X)[None, :]
            if self.mask is not None:
                S = torch.where(torch.tensor(self.mask), S, -torch.inf)
            total = total + torch.softmax(S, 1) @ (X.T @ as_tensor(V))
        return total

    def residuals(self, x: torch.Tensor) -> torch.Tensor:
        return self.output(x) - as_tensor(self.B)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return 0.5 * (self.residuals(x) ** 2).sum() + 0.5 * self.gamma * (x**2).sum()

    def problem(self) -> problems.LayerInversion:
        return problems.LayerInversion(
            self.W, self.V, self.B, self.gamma, mask=self.mask, known=self.known,
            convention=self.convention, key_bias=self.key_bias,
        )  # fmt: skip


def layer(
    n=5, d=3, m=3, heads=1, mask="none", n_known=0, gamma=0.0, convention="rows", bias=False, seed=0
) -> tuple[Layer, Array]:
    """A random layer with an output of its own making plus noise, and a point."""
    rng = np.random.default_rng(seed)
    W = [0.5 * rng.standard_normal((d, d)) for _ in range(heads)]
    V = [rng.standard_normal((d, m)) for _ in range(heads)]
    X = rng.standard_normal((d, n))
    seen = {"none": None, "causal": np.tri(n, dtype=bool), "random": rng.random((n, n)) < 0.6}[mask]
    if mask == "random":
        seen[:, 1] = True
    known = None
    if n_known:
        known = X.copy()
        known[:, rng.permutation(n)[n_known:]] = np.nan
    c = rng.standard_normal((heads, d)) if bias else None
    made = Layer(W, V, rng.standard_normal((n, m)), gamma, seen, known, convention, c)
    return made, rng.standard_normal(d * (n - n_known))


def planted(setting: str, n: int, d: int, scale: float, seed: int) -> tuple[problems.LayerInversion, Array]:
    """A layer with its exact output for Gaussian tokens, and the tokens; ``scale`` is that of the logits."""
    rng = np.random.default_rng(seed)
    X = rng.standard_normal((d, n))
    W = [scale / d * rng.standard_normal((d, d)) for _ in range(2)]
    V = [rng.standard_normal((d, d)) / np.sqrt(d) for _ in range(2)]
    known, empty = None, np.zeros((d, d))
    if setting == "two outputs":
        V = [np.hstack([V[0], empty]), np.hstack([empty, V[1]])]
    else:
        W, V = W[:1], V[:1]
    if setting == "self-dominant":
        W[0] = W[0] + 2 * scale / np.sqrt(d) * np.eye(d)
    if setting == "half known":
        known = X.copy()
        known[:, rng.permutation(n)[n // 2 :]] = np.nan
    blank = problems.LayerInversion(W, V, np.zeros((n, V[0].shape[1])))
    return problems.LayerInversion(W, V, blank.output(X), known=known), X

"""Attention objectives in PyTorch, written from their definitions, and random instances of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from autodiff import HYPERBOLIC, as_tensor

from attnfit import problems

Array = Any
TARGETED = ("squared", "cross_entropy", "kl", "linear_cross_entropy", "log_ratio")
LOSSES = [
    *[(name, "exp") for name in (*TARGETED, "entropy", "sparse")],
    *[(name, function) for name in ("rescaled", "exponential") for function in ("exp", "cosh", "sinh")],
]


@dataclass(frozen=True)
class Maps:
    """One sequence as the user passes it; ``features`` has shape (p, n1, n2)."""

    A1: Array
    A2: Array
    B: Array
    mask: Array = None
    weights: Array = None
    offset: Array = None
    penalty: Array = None
    features: Array = field(default_factory=lambda: np.zeros((0, 1, 1)))

    def objective(self, loss: str, function: str, X: torch.Tensor, c: torch.Tensor, A1=None, A2=None):
        """The sequence's part of the loss, row by row and cell by cell."""
        A1 = as_tensor(self.A1) if A1 is None else A1
        A2 = as_tensor(self.A2) if A2 is None else A2
        b = as_tensor(self.B)
        linear = A1 @ X @ A2.T + sum(ck * as_tensor(f) for ck, f in zip(c, self.features, strict=True))
        z = linear + (0.0 if self.offset is None else as_tensor(self.offset))
        seen = torch.tensor(np.ones(b.shape, bool) if self.mask is None else np.asarray(self.mask))
        w = torch.ones(b.shape) if self.weights is None else as_tensor(self.weights)
        w = w[:, None].expand(b.shape) if w.ndim == 1 else w
        cells = {
            "rescaled": self._rescaled,
            "exponential": lambda z, b, seen, w, u: 0.5 * (u(z) - b) ** 2,
            "sparse": lambda z, b, seen, w, u: torch.exp(z),
            "log_ratio": self._log_ratio,
        }.get(loss)
        if cells is None:
            # Each row apart: a masked logit must not appear at all, not even as minus infinity times zero.
            rows = [self._softmax(loss, z[i][seen[i]], b[i][seen[i]], w[i][seen[i]]) for i in range(len(z))]
            total = sum(rows)
        else:
            total = (torch.where(seen, w * cells(z, b, seen, w, HYPERBOLIC[function]), 0.0)).sum()
        if self.penalty is not None:
            total = total + 0.5 * torch.where(seen, (as_tensor(self.penalty) * linear) ** 2, 0.0).sum()
        return total

    @staticmethod
    def _softmax(loss, z, b, w):
        h = torch.log_softmax(z, 0)
        f = h.exp()
        cell = {
            "squared": lambda: 0.5 * (f - b) ** 2,
            "cross_entropy": lambda: -b * h,
            "kl": lambda: torch.xlogy(b, b) - b * h,
            "linear_cross_entropy": lambda: -b * f,
            "entropy": lambda: -f * h,
        }[loss]()
        return (w * cell).sum()

    @staticmethod
    def _rescaled(z, b, seen, w, u):
        alpha = torch.where(seen, u(z), 0.0).sum(1, keepdim=True)
        return 0.5 * (u(z) - alpha * b) ** 2

    @staticmethod
    def _log_ratio(z, b, seen, w, u):
        tiny = [np.finfo(t).tiny for t in (np.float16, np.float32, np.float64)]
        numpy_b = b.numpy()
        kind = next(
            k
            for k, t in enumerate((np.float16, np.float32, np.float64))
            if (numpy_b.astype(t) == numpy_b).all()
        )
        v = torch.where(seen & (b > 0), torch.clamp(b / float(tiny[kind]), max=1.0) ** 2, 0.0)
        r = z - torch.log(torch.where(b > 0, b, 1.0))
        total = (w * v).sum(1, keepdim=True)
        mean = (w * v * r).sum(1, keepdim=True) / torch.where(total > 0, total, 1.0)
        return 0.5 * v * (r - mean) ** 2


@dataclass(frozen=True)
class Reference:
    """Several sequences sharing X, and the ridge; the unknown is flat, pair features last."""

    sequences: list[Maps]
    loss: str
    function: str = "exp"
    ridge: float = 0.0
    rank: int | None = None

    def split(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        d1, d2 = self.sequences[0].A1.shape[1], self.sequences[0].A2.shape[1]
        p = len(self.sequences[0].features)
        body, c = x[: len(x) - p], x[len(x) - p :]
        if self.rank is None:
            return body.reshape(d1, d2), c
        stacked = body.reshape(d1 + d2, self.rank)
        return stacked[:d1] @ stacked[d1:].T, c

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        X, c = self.split(x)
        parts = [s.objective(self.loss, self.function, X, c) for s in self.sequences]
        return sum(parts) + 0.5 * self.ridge * (x @ x)

    def value(self, x: Array) -> float:
        return float(self(as_tensor(x)))

    def gradient(self, x: Array) -> Array:
        point = as_tensor(x).requires_grad_()
        return torch.autograd.grad(self(point), point)[0].numpy()

    def hessian(self, x: Array) -> Array:
        return torch.autograd.functional.hessian(self, as_tensor(x)).numpy()

    def data_gradient(self, x: Array) -> tuple[Array, Array]:
        (only,) = self.sequences
        A1, A2 = as_tensor(only.A1).requires_grad_(), as_tensor(only.A2).requires_grad_()
        X, c = self.split(as_tensor(x))
        total = only.objective(self.loss, self.function, X, c, A1, A2)
        return tuple(g.numpy() for g in torch.autograd.grad(total, (A1, A2)))

    def problem(self, **changes: Any) -> Any:
        """The same objective from the library."""
        several = len(self.sequences) > 1

        def pick(name: str) -> Any:
            values = [getattr(s, name) for s in self.sequences]
            if values[0] is None:
                return None
            return values if several else values[0]

        features = [list(s.features) for s in self.sequences]
        penalty = pick("penalty")
        options = {
            "A1": pick("A1"), "A2": pick("A2"), "B": pick("B"), "loss": self.loss, "mask": pick("mask"),
            "rank": self.rank, "function": self.function, "weights": pick("weights"),
            "offset": pick("offset"),
            "row_penalty": 0.0 if penalty is None else penalty, "ridge": self.ridge,
            "pair_features": (features if several else features[0]) or None,
        }  # fmt: skip
        if not features[0]:
            options["pair_features"] = None
        return problems.Attention(**(options | changes))


def softmax_rows(z: Array) -> Array:
    e = np.exp(z - z.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)


def sequence(rng: np.random.Generator, n1: int, n2: int, d1: int, d2: int, case: dict[str, Any]) -> Maps:
    """A random sequence with what ``case`` asks for."""
    A1, A2 = rng.standard_normal((n1, d1)), rng.standard_normal((n2, d2))
    B = softmax_rows(rng.standard_normal((n1, n2)) * 1.5) * (rng.random((n1, n2)) > 0.15)
    scales = 10.0 ** rng.integers(-3, 4, d1) if case["columns"] == "ill-scaled" else np.ones(d1)
    offset = 0.4 * rng.standard_normal((n1, n2)) if case["offset"] else None
    mask = None
    if case["mask"] != "none":
        mask = np.tri(n1, n2, n2 - n1, dtype=bool) if case["mask"] == "causal" else rng.random((n1, n2)) < 0.6
        mask[:, 0] = True
    weights = {"none": None, "rows": rng.random(n1) + 0.1, "cells": rng.random((n1, n2)) + 0.1}[
        case["weights"]
    ]
    penalty = 0.4 * rng.random((n1, n2)) if case["penalty"] else None
    features = rng.standard_normal((case["features"], n1, n2)) if case["features"] else np.zeros((0, 1, 1))
    return Maps(A1 * scales, A2, B, mask, weights, offset, penalty, features)

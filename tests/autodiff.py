"""The objectives in PyTorch, written from their definitions: every derivative comes from autograd."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

Array = Any
HYPERBOLIC = {"exp": torch.exp, "cosh": torch.cosh, "sinh": torch.sinh}


def as_tensor(values: Any) -> torch.Tensor:
    return torch.tensor(np.array(values, dtype=np.float64))


@dataclass(frozen=True)
class Objective:
    """``sum_g phi(A_g x + offset_g) + 0.5 ||diag(row_penalty) A x||^2 + 0.5 ridge ||x||^2``.

    ``family`` and ``loss`` name the public class and option; ``ids`` numbers the group of each row from 0.
    """

    family: str
    loss: str
    A: Array
    b: Array
    ids: Array
    weights: Array = 1.0
    offset: Array = 0.0
    row_penalty: Array = 0.0
    ridge: float = 0.0

    def __call__(self, x: torch.Tensor, A: torch.Tensor | None = None) -> torch.Tensor:
        A = as_tensor(self.A) if A is None else A
        linear = A @ x
        rows = self.rows(linear + as_tensor(self.offset))
        penalty = 0.5 * ((as_tensor(self.row_penalty) * linear) ** 2).sum()
        return (as_tensor(self.weights) * rows).sum() + penalty + 0.5 * self.ridge * (x @ x)

    def rows(self, z: torch.Tensor) -> torch.Tensor:
        """What each row adds to the unweighted loss."""
        b = as_tensor(self.b)
        if self.family == "Exponential":
            return 0.5 * (HYPERBOLIC[self.loss](z) - b) ** 2
        if self.family == "Rescaled":
            u = HYPERBOLIC[self.loss](z)
            return 0.5 * (u - self._sum(u) * b) ** 2
        h = self.log_softmax(z)
        f = h.exp()
        return {
            "squared": lambda: 0.5 * (f - b) ** 2,
            "cross_entropy": lambda: -b * h,
            "kl": lambda: torch.xlogy(b, b) - b * h,
            "linear_cross_entropy": lambda: -b * f,
            "entropy": lambda: -f * h,
        }[self.loss]()

    def log_softmax(self, z: torch.Tensor) -> torch.Tensor:
        ids = torch.tensor(self.ids)
        top = torch.full((int(ids.max()) + 1,), -torch.inf, dtype=z.dtype)
        z = z - top.scatter_reduce(0, ids, z.detach(), "amax")[ids]
        return z - torch.log(self._sum(z.exp()))

    def _sum(self, rows: torch.Tensor) -> torch.Tensor:
        ids = torch.tensor(self.ids)
        return torch.zeros(int(ids.max()) + 1, dtype=rows.dtype).index_add(0, ids, rows)[ids]

    # ---- NumPy in, NumPy out ----

    def value(self, x: Array) -> float:
        return float(self(as_tensor(x)))

    def gradient(self, x: Array) -> Array:
        point = as_tensor(x).requires_grad_()
        return torch.autograd.grad(self(point), point)[0].numpy()

    def data_gradient(self, x: Array) -> Array:
        A = as_tensor(self.A).requires_grad_()
        return torch.autograd.grad(self(as_tensor(x), A), A)[0].numpy()

    def hessian(self, x: Array) -> Array:
        return torch.autograd.functional.hessian(self, as_tensor(x)).numpy()

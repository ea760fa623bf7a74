"""Layered problems to test on, and the same objectives in PyTorch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from autodiff import as_tensor
from scipy import sparse

from attnfit import problems

ACTIVATIONS = {
    "identity": lambda y: y,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "softplus": torch.nn.functional.softplus,
    "gelu": torch.nn.functional.gelu,
}
NAMES = {"TwoLayer": ("A1", "A2"), "ReluSoftmax": ("A1", "A2"), "ThreeLayer": ("A1", "A2", "A3")}


def dense(A: Any) -> Any:
    return A.toarray() if sparse.issparse(A) else A


@dataclass(frozen=True)
class LayeredInstance:
    """Data of a layered problem; ``options`` go to its constructor."""

    family: str
    matrices: tuple[Any, ...]
    b: Any
    activation: str = "identity"
    options: dict[str, Any] = field(default_factory=dict)

    def problem(self) -> Any:
        arguments = dict(zip(NAMES[self.family], self.matrices, strict=True))
        if self.family != "ReluSoftmax":
            arguments["activation"] = self.activation
        return getattr(problems, self.family)(**arguments, b=self.b, **self.options)

    def tensors(self) -> list[torch.Tensor]:
        return [as_tensor(dense(A)) for A in self.matrices]

    def objective(self, x: torch.Tensor, matrices: list[torch.Tensor] | None = None) -> torch.Tensor:
        """The objective from its definition; x has the natural shape."""
        options = {"weights": 1.0, "offset": 0.0, "row_penalty": 0.0, "ridge": 0.0} | self.options
        first, *rest = self.tensors() if matrices is None else matrices

        def column(values):
            tensor = as_tensor(values)
            return tensor[:, None] if tensor.ndim == 1 and np.ndim(self.b) == 2 else tensor

        linear = first @ x
        if self.family != "TwoLayer":
            linear = rest.pop(0) @ torch.relu(linear)
        f = torch.softmax(linear + column(options["offset"]), dim=0)
        y = rest[0] @ f if rest else f
        residual = ACTIVATIONS[self.activation](y) - as_tensor(self.b)
        return (
            0.5 * (column(options["weights"]) * residual**2).sum()
            + 0.5 * ((column(options["row_penalty"]) * linear) ** 2).sum()
            + 0.5 * options["ridge"] * (x**2).sum()
        )

    def gradient(self, x: Any) -> Any:
        point = as_tensor(x).requires_grad_()
        return torch.autograd.grad(self.objective(point), point)[0].numpy()

    def hessian(self, x: Any) -> Any:
        shape = np.shape(x)
        flat = as_tensor(x).reshape(-1)
        return torch.autograd.functional.hessian(lambda v: self.objective(v.reshape(shape)), flat).numpy()

    def data_gradient(self, x: Any) -> list[Any]:
        matrices = [A.requires_grad_() for A in self.tensors()]
        return [g.numpy() for g in torch.autograd.grad(self.objective(as_tensor(x), matrices), matrices)]


def two_layer(activation="tanh", n=12, m=9, d=4, k=None, seed=0, noise=0.1, **options):
    """A two-layer problem whose target is the model at a point plus noise, and that point."""
    rng = np.random.default_rng(seed)
    A1, A2 = rng.standard_normal((n, d)), rng.standard_normal((m, n))
    x = rng.standard_normal(d if k is None else (d, k))
    exact = LayeredInstance("TwoLayer", (A1, A2), np.zeros(m), activation)
    b = exact.problem().predict(x) if k is None else np.stack([exact.problem().predict(v) for v in x.T], 1)
    return LayeredInstance(
        "TwoLayer", (A1, A2), b + noise * rng.standard_normal(b.shape), activation, options
    ), x

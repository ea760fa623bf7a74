"""Gradients of a training step: which weights tell the text, and what they are for given texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from attnfit.audit.checks import real_numbers
from attnfit.audit.errors import AuditError, ObservationMismatch
from attnfit.audit.models.model import Model, Tokens

Array = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Weight:
    """A weight whose gradient's rows are combinations of what it multiplies.

    Attributes
    ----------
    name : str
        Of the parameter.
    parameter : Tensor
    transposed : bool
        Whether it has a row an input, as in GPT-2.
    """

    name: str
    parameter: Any
    transposed: bool

    def rows(self, gradient: Any) -> Any:
        """Return a gradient with a row an output, shape (outputs, width)."""
        return gradient.T if self.transposed else gradient

    @property
    def n_rows(self) -> int:
        """Number of outputs."""
        return int(self.parameter.shape[1 if self.transposed else 0])


def weights_of(model: Model, block: int) -> list[Weight]:
    """Return the weights of a block that multiply what enters its attention: query, key and value."""
    part = model.part(f"entering:{block}")
    attention = part.attention
    entering: list[int] = []
    found: dict[str, Any] = {}

    def note(name: str, module: Any, args: Any) -> None:
        if args and args[0].data_ptr() == entering[0]:
            found[name] = module

    names = {id(parameter): name for name, parameter in model.module.named_parameters()}
    handles = [part.register_forward_hook(lambda _, __, state: entering.append(state.data_ptr()))]
    for name, module in attention.named_modules():
        if getattr(getattr(module, "weight", None), "ndim", 0) == 2:
            handles.append(module.register_forward_pre_hook(lambda m, args, name=name: note(name, m, args)))
    try:
        model.states([0, 1 % model.n_vocabulary], block + 1)
    finally:
        for handle in handles:
            handle.remove()
    if not found:
        raise AuditError(f"no weight of block {block} of {model.family} multiplies what enters its attention")
    return [
        Weight(names[id(module.weight)], module.weight, type(module).__name__ == "Conv1D")
        for module in found.values()
    ]


def observed_weights(model: Model) -> list[Weight]:
    """Return all weights whose gradients are looked at: those of the first two blocks, and the head."""
    if model.n_layers < 2:
        raise AuditError(f"{model.name!r} has one block: the order of tokens is read from the second")
    head = model.head.weight
    name = next(name for name, parameter in model.module.named_parameters() if parameter is head)
    return [*weights_of(model, 0), *weights_of(model, 1), Weight(name, head, False)]


def gradients_of(model: Model, texts: Sequence[Tokens], weights: Sequence[Weight]) -> list[Any]:
    """Return the gradients of the mean loss of next tokens over a batch, a row an output.

    Raises
    ------
    AuditError
        If no text has a next token.
    """
    n_labels = sum(len(tokens) - 1 for tokens in texts)
    if not n_labels:
        raise AuditError("a text of one token has no next token, so no loss and no gradient")
    parameters = [weight.parameter for weight in weights]
    totals = [torch.zeros_like(parameter) for parameter in parameters]
    for parameter in parameters:
        parameter.requires_grad_(True)
    try:
        with torch.enable_grad():
            for tokens in texts:
                if len(tokens) < 2:
                    continue
                first = model.first_position
                ids = torch.tensor([list(tokens)])
                places = {"position_ids": torch.arange(first, first + len(tokens))[None]} if first else {}
                logits = model.module(input_ids=ids, use_cache=False, **places).logits[0, :-1].float()
                loss = torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum") / n_labels
                for total, gradient in zip(totals, torch.autograd.grad(loss, parameters), strict=True):
                    total += gradient
    finally:
        for parameter in parameters:
            parameter.requires_grad_(False)
    return [weight.rows(total) for weight, total in zip(weights, totals, strict=True)]


def stacked(model: Model, gradients: Mapping[str, Any]) -> Array:
    """Return the gradients that a user brings as rows, those of `observed_weights` in turn.

    Raises
    ------
    ObservationMismatch
        If one has another shape or is not finite, or none of those that tell the text is given.
    """
    rows = []
    weights = observed_weights(model)
    if not any(weight.name in gradients for weight in weights[:-1]):
        raise ObservationMismatch(
            f"gradients has none of {', '.join(weight.name for weight in weights[:-1])}: those tell the text"
        )
    for weight in weights:
        shape = tuple(weight.parameter.shape)
        given = gradients.get(weight.name)
        array = np.zeros(shape, np.float32) if given is None else real_numbers(weight.name, given)
        if array.shape != shape:
            raise ObservationMismatch(
                f"the gradient of {weight.name} must have shape {shape} for {model.name!r}, not {array.shape}"
            )
        if not np.isfinite(array).all():
            raise ObservationMismatch(f"the gradient of {weight.name} has numbers that are not finite")
        rows.append(weight.rows(array))
    return np.concatenate(rows)

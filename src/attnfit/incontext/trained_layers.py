"""Softmax self-attention layers, one after the other, trained to lower the losses of regressions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attnfit.incontext.families import Family, Link

Array = NDArray[np.float64]

HEADS, KEY_WIDTH = 4, 16
BATCH, LEARNING_RATE = 128, 4e-3
# The largest move of a logit by one layer.
LIMIT = 3.0
# Keeps the logarithm of a loss that is fitted exactly finite.
FLOOR = 1e-3
TINY = 1e-30


@dataclass(frozen=True)
class TrainedLayers:
    """``z_j <- z_j + 3 tanh(sum_h sum_i softmax_i(q_j^T k_i / 4) v_i / 3)`` on tokens
    ``(row_j, z_j, s_j/|s|, log|s|)``, with weights of its own in every layer.

    The target b is not in the token: a layer that sees it copies it. What the layer knows of it is the slope
    s of the loss in the logits.

    Attributes
    ----------
    layers : tuple of dict of ndarray
    losses : ndarray
        What was trained on, one an epoch: ``sum_k log(loss_k / loss_0 + 1e-3)`` over the layers k.
    """

    layers: tuple[dict[str, Array], ...]
    losses: Array

    def move(self, family: Family, layer: int) -> Array:
        """Return how one of the layers moves the logits."""
        import torch

        parameters = {name: torch.from_numpy(value) for name, value in self.layers[layer].items()}
        with torch.no_grad():
            return np.asarray(_update(parameters, family.link, *_tensors(family, torch.float64)).numpy())


def train(family: Family, depth: int, n_epochs: int, random_state: int) -> TrainedLayers:
    """Train the layers together on the losses after each, not on what a gradient step would do.

    Parameters
    ----------
    family : Family
        Instances to train on.
    depth, n_epochs : int
    random_state : int
    """
    import torch

    generator = torch.Generator().manual_seed(random_state)
    rows, b, z = _tensors(family, torch.float32)
    width = rows.shape[-1] + 3
    shapes = {"Q": (HEADS, width, KEY_WIDTH), "K": (HEADS, width, KEY_WIDTH), "V": (HEADS, width)}
    layers = [
        {n: (torch.randn(s, generator=generator) / width**0.5).requires_grad_() for n, s in shapes.items()}
        for _ in range(depth)
    ]
    adam = torch.optim.Adam([p for layer in layers for p in layer.values()], lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(adam, n_epochs * -(-len(z) // BATCH))
    start = _loss(family.link, z, b)
    history = []
    for _ in range(n_epochs):
        total = 0.0
        for part in torch.randperm(len(z), generator=generator).split(BATCH):
            at, objective = z[part], torch.zeros(())
            for layer in layers:
                at = at + _update(layer, family.link, rows[part], b[part], at)
                objective = objective + (_loss(family.link, at, b[part]) / start[part] + FLOOR).log().mean()
            adam.zero_grad()
            objective.backward()
            adam.step()
            schedule.step()
            total += float(objective.detach()) * len(part)
        history.append(total / len(z))
    learned = tuple({n: p.detach().double().numpy() for n, p in layer.items()} for layer in layers)
    return TrainedLayers(learned, np.array(history))


def _tensors(family: Family, dtype: Any) -> tuple[Any, Any, Any]:
    import torch

    rows, b, z = (torch.from_numpy(np.ascontiguousarray(a)) for a in (family.rows, family.b, family.z))
    return rows.to(dtype), b.to(dtype), z.to(dtype)


def _update(parameters: dict[str, Any], link: Link, rows: Any, b: Any, z: Any) -> Any:
    """Return the change of every logit."""
    import torch

    s = _slope(link, z, b)
    size = s.square().sum((1, 2), keepdim=True).sqrt() + TINY
    tokens = torch.cat([rows, z[..., None], (s / size)[..., None]], -1)
    tokens = torch.cat([tokens, size.log().expand_as(z)[..., None]], -1).flatten(1, 2)
    queries, keys = (torch.einsum("cnw,hwk->chnk", tokens, parameters[name]) for name in "QK")
    values = torch.einsum("cnw,hw->chn", tokens, parameters["V"])
    weights = torch.softmax(queries @ keys.transpose(-1, -2) / KEY_WIDTH**0.5, -1)
    moved = torch.einsum("chjk,chk->cj", weights, values)
    return (LIMIT * torch.tanh(moved / LIMIT)).reshape(z.shape)


def _state(link: Link, z: Any, b: Any) -> tuple[Any, Any, Any]:
    """Return v, alpha and c as `Family` has them."""
    import torch

    if link == "softmax":
        f = torch.softmax(z, -1)
        return f, torch.ones_like(f[..., :1]), f - b
    size = z if link == "exp" else z.abs()
    peak = size.amax((1, 2), keepdim=True).detach()
    up, down = (z - peak).exp(), (-z - peak).exp()
    u = {"exp": up, "cosh": 0.5 * (up + down), "sinh": 0.5 * (up - down)}[link]
    v = {"exp": up, "cosh": 0.5 * (up - down), "sinh": 0.5 * (up + down)}[link]
    alpha = u.sum(-1, keepdim=True)
    return v, alpha, u - alpha * b


def _slope(link: Link, z: Any, b: Any) -> Any:
    v, _, c = _state(link, z, b)
    weight = v if link == "softmax" else b
    return v * (c - (weight * c).sum(-1, keepdim=True))


def _loss(link: Link, z: Any, b: Any) -> Any:
    _, alpha, c = _state(link, z, b)
    return 0.5 * (c / alpha).square().sum((1, 2))

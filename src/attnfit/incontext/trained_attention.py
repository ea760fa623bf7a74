"""One softmax self-attention layer, trained to lower the loss of softmax regressions it is shown."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attnfit.incontext.instances import Batch

Array = NDArray[np.float64]

HEADS, KEY_WIDTH = 4, 16
BATCH, LEARNING_RATE = 128, 3e-3


@dataclass(frozen=True)
class TrainedAttention:
    """``z_j <- z_j + sum_h sum_i softmax_i(q_j^T k_i / sqrt(width)) v_i`` on tokens ``(a_j, b_j, z_j, s_j)``.

    Attributes
    ----------
    parameters : dict of ndarray
    losses : ndarray
        Training losses relative to that without a step, one an epoch.
    """

    parameters: dict[str, Array]
    losses: Array

    def move(self, batch: Batch) -> Array:
        """Return how the layer moves the logits, shape (count, n)."""
        import torch

        tokens = torch.from_numpy(_tokens(batch))
        tensors = {name: torch.from_numpy(value) for name, value in self.parameters.items()}
        with torch.no_grad():
            return np.asarray(_update(tensors, tokens).numpy())


def train(
    draw: Callable[[int], Batch], n_instances: int, n_epochs: int, random_state: int
) -> TrainedAttention:
    """Train the layer on the loss after its update, not on what a gradient step would do.

    Parameters
    ----------
    draw : callable
        Takes a number of instances to a `Batch` of them.
    n_instances, n_epochs : int
    random_state : int
    """
    import torch

    batch = draw(n_instances)
    tokens, z, b = (torch.from_numpy(part).float() for part in (_tokens(batch), batch.z, batch.b))
    generator = torch.Generator().manual_seed(random_state)
    width = tokens.shape[-1]
    shapes = {"Q": (HEADS, width, KEY_WIDTH), "K": (HEADS, width, KEY_WIDTH), "V": (HEADS, width)}
    scale = tokens.std((0, 1)).clamp_min(1e-6)
    parameters = {
        name: (torch.randn(shape, generator=generator) / width**0.5).requires_grad_()
        for name, shape in shapes.items()
    }
    adam = torch.optim.Adam(parameters.values(), lr=LEARNING_RATE)
    n_steps = n_epochs * -(-n_instances // BATCH)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(adam, n_steps)
    start = 0.5 * (torch.softmax(z, -1) - b).square().sum(-1)
    losses = []
    for _ in range(n_epochs):
        total = 0.0
        for part in torch.randperm(n_instances, generator=generator).split(BATCH):
            after = torch.softmax(z[part] + _update(parameters, tokens[part] / scale), -1)
            # Relative to the start, so that easy and hard instances count alike.
            loss = (0.5 * (after - b[part]).square().sum(-1) / start[part]).mean()
            adam.zero_grad()
            loss.backward()
            adam.step()
            schedule.step()
            total += float(loss.detach()) * len(part)
        losses.append(total / n_instances)
    learned = {name: value.detach().double() for name, value in parameters.items()}
    shape = (1, -1, 1)
    learned["Q"] = learned["Q"] / scale.double().reshape(shape)
    learned["K"] = learned["K"] / scale.double().reshape(shape)
    learned["V"] = learned["V"] / scale.double()
    return TrainedAttention({name: value.numpy() for name, value in learned.items()}, np.array(losses))


def _update(parameters: dict[str, Any], tokens: Any) -> Any:
    """Return the change of every token's logit, shape (count, n)."""
    import torch

    queries = torch.einsum("cnw,hwk->chnk", tokens, parameters["Q"])
    keys = torch.einsum("cnw,hwk->chnk", tokens, parameters["K"])
    values = torch.einsum("cnw,hw->chn", tokens, parameters["V"])
    weights = torch.softmax(queries @ keys.transpose(-1, -2) / KEY_WIDTH**0.5, -1)
    # The mean over keys is the same for every query: a softmax over tokens does not see it.
    return torch.einsum("chjk,chk->cj", weights, values)


def _tokens(batch: Batch) -> Array:
    return np.concatenate([batch.A, batch.b[..., None], batch.z[..., None], batch.slope[..., None]], axis=-1)

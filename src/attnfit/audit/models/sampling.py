"""Text that a model writes by itself."""

from __future__ import annotations

from typing import Any

import torch
from transformers import DynamicCache

from attnfit.audit.models.model import Model


def sample(model: Model, count: int, length: int, generator: Any) -> Any:
    """Return sequences that start with a random token and go on as the model would.

    Parameters
    ----------
    model : Model
        A causal one.
    count, length : int
    generator : torch.Generator

    Returns
    -------
    Tensor, shape (count, length)
    """
    tokens = torch.randint(model.n_vocabulary, (count, 1), generator=generator)
    keys = DynamicCache(config=model.module.config)
    with torch.no_grad():
        while tokens.shape[1] < length:
            last = model.base(input_ids=tokens[:, -1:], past_key_values=keys, use_cache=True)[0][:, -1]
            chances = torch.softmax(model.unembed(last), -1)
            tokens = torch.cat([tokens, torch.multinomial(chances, 1, generator=generator)], 1)
    return tokens

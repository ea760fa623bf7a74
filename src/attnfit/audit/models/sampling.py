"""Text that a model writes by itself."""

from __future__ import annotations

from typing import Any

import torch
from transformers import DynamicCache

from attnfit.audit.models.cached import cache_argument
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
    # Its own cache, as the model would: one that it does not know is left out, and everything run again.
    name = cache_argument(model.base)
    kept = {} if name is None else {name: DynamicCache(config=model.module.config), "use_cache": True}
    with torch.no_grad():
        while tokens.shape[1] < length:
            if kept:
                logits = model.module(input_ids=tokens[:, -1:], **kept).logits[:, -1]
            else:
                logits = model.module(input_ids=tokens, use_cache=False).logits[:, -1]
            chances = torch.softmax(logits.float(), -1)
            tokens = torch.cat([tokens, torch.multinomial(chances, 1, generator=generator)], 1)
    return tokens

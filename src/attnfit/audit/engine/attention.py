"""Attention of many candidates for one position over a prefix that they share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import AttentionInterface

NAME = "attnfit_candidates"


def candidate_attention(
    module: Any, query: Any, key: Any, value: Any, attention_mask: Any, **settings: Any
) -> tuple[Any, None]:
    """Let each of C queries see the prefix and itself.

    The last C keys belong to the queries, those before to the prefix. Scores against the prefix are one
    product; a candidate's own score is a dot product; the softmax is over both.

    Parameters
    ----------
    module : torch.nn.Module
        The attention that asks.
    query : Tensor, shape (1, heads, C, size)
    key, value : Tensor, shape (1, key heads, t + C, size)
    attention_mask : None
    **settings
        ``scaling`` of the scores, the inverse root of size unless given, and the ``softcap`` that they are
        kept below.

    Returns
    -------
    output : Tensor, shape (1, C, heads, size)
    weights : None
    """
    _, heads, count, size = query.shape
    key_heads = key.shape[1]
    length = key.shape[2] - count
    grouped = (key_heads, heads // key_heads)
    query = query[0].reshape(*grouped, count, size)
    scale = settings.get("scaling")
    query = query * (size**-0.5 if scale is None else scale)
    # One product per key head serves all query heads that share it.
    wide = query.reshape(key_heads, -1, size)
    shared = (wide @ key[0, :, :length].transpose(1, 2)).reshape(*grouped, count, length)
    own = (query * key[0, :, None, length:]).sum(-1, keepdim=True)
    scores = torch.cat([shared, own], -1)
    cap = settings.get("softcap")
    weights = torch.softmax(scores if cap is None else cap * torch.tanh(scores / cap), -1)
    mixed = weights[..., :length].reshape(key_heads, len(wide[0]), length) @ value[0, :, :length]
    out = mixed.reshape(*grouped, count, size) + weights[..., length:] * value[0, :, None, length:]
    return out.reshape(1, heads, count, size).transpose(1, 2), None


AttentionInterface.register(NAME, candidate_attention)


@contextmanager
def seeing_only_prefix(module: Any) -> Iterator[None]:
    """Make every attention of the model a candidate_attention for a while."""
    config = module.config
    usual = config._attn_implementation
    config._attn_implementation = NAME
    try:
        yield
    finally:
        config._attn_implementation = usual

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
    key : Tensor, shape (1, key heads, t + C, size)
    value : Tensor, shape (1, key heads, t + C, width)
    attention_mask : None
    **settings
        ``scaling`` of the scores, the inverse root of size unless given; the ``softcap`` that they are
        kept below; the ``sliding_window`` of keys that a query sees, itself among them.

    Returns
    -------
    output : Tensor, shape (1, C, heads, width)
    weights : None
    """
    _, heads, count, size = query.shape
    key_heads = key.shape[1]
    length = key.shape[2] - count
    window = settings.get("sliding_window")
    # A window of w keys holds the query's own.
    first = 0 if window is None else max(0, length - (window - 1))
    before, wide = slice(first, length), value.shape[-1]
    grouped = (key_heads, heads // key_heads)
    query = query[0].reshape(*grouped, count, size)
    scale = settings.get("scaling")
    query = query * (size**-0.5 if scale is None else scale)
    # One product per key head serves all query heads that share it.
    shared = query.reshape(key_heads, -1, size) @ key[0, :, before].transpose(1, 2)
    own = (query * key[0, :, None, length:]).sum(-1, keepdim=True)
    scores = torch.cat([shared.reshape(*grouped, count, length - first), own], -1)
    cap = settings.get("softcap")
    weights = torch.softmax(scores if cap is None else cap * torch.tanh(scores / cap), -1)
    mixed = (
        weights[..., :-1].reshape(key_heads, heads // key_heads * count, length - first) @ value[0, :, before]
    )
    out = mixed.reshape(*grouped, count, wide) + weights[..., -1:] * value[0, :, None, length:]
    return out.reshape(1, heads, count, wide).transpose(1, 2), None


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

"""The parts that decoders and encoders of the transformers library share under different names."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import torch

from attnfit.audit.errors import MalformedModel
from attnfit.audit.models.cached import CachedPart, EnteringPart, arguments

NORMS = ("norm", "ln_f", "final_layer_norm", "final_layernorm", "norm_f", "ln_out", "final_norm")
ATTENTIONS = ("self_attn", "attn", "attention", "self_attention")


class _Reached(Exception):
    """The forward pass has come as far as it was asked to."""


def find_blocks(module: Any) -> Any:
    """Return the list of transformer blocks."""
    depth = module.config.get_text_config().num_hidden_layers
    for part in module.base_model.modules():
        if isinstance(part, torch.nn.ModuleList) and len(part) == depth:
            return part
    raise MalformedModel(
        f"{type(module).__name__} has no list of {depth} blocks: this architecture is unknown"
    )


def final_norm(base: Any, family: str) -> Any:
    """Return the normalisation after the last block."""
    parts = [base, getattr(base, "decoder", None)]
    for part in parts:
        found = _first_of(part, NORMS)
        if found is not None:
            return found
    raise MalformedModel(
        f"{family} has no normalisation after its last block under any of the names {', '.join(NORMS)}: what "
        "its head reads cannot be observed, which rules out logits, topk and masked"
    )


def attention_of(block: Any, family: str) -> Any:
    """Return the attention of a block."""
    attention = _first_of(block, ATTENTIONS)
    if attention is None:
        raise MalformedModel(
            f"the blocks of {family} have no attention under any of the names {', '.join(ATTENTIONS)}"
        )
    return attention


def end_of_attention(block: Any, family: str) -> Any:
    """Return the part of a block that ends with the attention's output projection."""
    attention = attention_of(block, family)
    # Encoders of the BERT family and Bloom add the residual inside: the projection alone is ``dense``; MPNet
    # keeps the attention itself in a part of its own.
    inner = getattr(attention, "attn", None)
    if inner is not None and hasattr(inner, "o"):
        return inner.o
    output = getattr(attention, "output", None)
    if output is None:
        adds = "residual" in arguments(attention)
        return attention.dense if adds and hasattr(attention, "dense") else attention
    if not hasattr(output, "dense"):
        raise MalformedModel(f"the attention of {family} is of an unknown kind: it cannot be observed")
    return output.dense


def cached_in(block: Any, family: str, **which: bool) -> CachedPart:
    """Return what the attention of a block writes into the cache."""
    return CachedPart(attention_of(block, family), family, **which)


# What can be read inside a block, by the word before the colon of a layer's name.
INSIDE: dict[str, Callable[[Any, str], Any]] = {
    "attention": end_of_attention,
    "entering": lambda block, family: EnteringPart(attention_of(block, family)),
    "kv": cached_in,
    "k": partial(cached_in, values=False),
    "v": partial(cached_in, keys=False),
    "kv_unrotated": partial(cached_in, rotated=False),
    "k_unrotated": partial(cached_in, values=False, rotated=False),
}


def _first_of(module: Any, names: tuple[str, ...]) -> Any:
    found = (getattr(module, name, None) for name in names)
    return next((part for part in found if part is not None), None)


def capture(base: Any, modules: Sequence[Any], side: Literal["input", "output"], **inputs: Any) -> list[Any]:
    """Run base until all modules are passed, and return what enters or leaves each: no more is computed."""
    seen: dict[int, Any] = {}

    def note(index: int, _: Any, args: Any, kwargs: Any, out: Any = None) -> None:
        value = out if side == "output" else (args[0] if args else kwargs["hidden_states"])
        seen[index] = value[0] if isinstance(value, tuple) else value
        if len(seen) == len(modules):
            raise _Reached

    handles: list[Any] = []
    try:
        for index, module in enumerate(modules):
            register = module.register_forward_hook if side == "output" else module.register_forward_pre_hook
            handles.append(register(partial(note, index), with_kwargs=True))
        base(**inputs)
    except _Reached:
        return [seen[index] for index in range(len(modules))]
    finally:
        for handle in handles:
            handle.remove()
    raise MalformedModel(f"{type(base).__name__} ran through without passing all of {len(modules)} parts")

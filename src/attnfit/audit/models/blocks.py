"""The parts that decoders and encoders of the transformers library share under different names."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

import torch

from attnfit.audit.errors import MalformedModel

NORMS = ("norm", "ln_f", "final_layer_norm", "final_layernorm")
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


def final_norm(base: Any, name: str) -> Any:
    """Return the normalisation after the last block."""
    return _one_of(base, NORMS, f"model {name!r} has no final normalisation")


def attention_of(block: Any, name: str) -> Any:
    """Return the part of a block that ends with the attention's output projection."""
    attention = _one_of(block, ATTENTIONS, f"the blocks of {name!r} have no attention")
    # Encoders of the BERT family add the residual inside: the projection alone is ``attention.output.dense``.
    output = getattr(attention, "output", None)
    return attention if output is None else output.dense


def _one_of(module: Any, names: tuple[str, ...], complaint: str) -> Any:
    for name in names:
        found = getattr(module, name, None)
        if found is not None:
            return found
    raise MalformedModel(f"{complaint} under any of the names {', '.join(names)}")


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

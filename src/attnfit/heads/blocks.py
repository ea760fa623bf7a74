"""Take blocks of a transformers model apart, and check that they are understood."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

from attnfit.heads import weights
from attnfit.heads.observe import AGREES, opened
from attnfit.heads.weights import UnknownHead
from attnfit.objectives.block_heads import Heads
from attnfit.objectives.block_parts import ActivationName, Mlp, Norm
from attnfit.objectives.blocks import Block, Order
from attnfit.segments import Array

# Tokens of the check.
CHECKED = 27
# Norms by what blocks call them, in the order of the pass, and the orders that such a block may have; a gap
# is a norm that the block has not.
NORMS: tuple[tuple[tuple[str, ...], tuple[Order, ...]], ...] = (
    (
        (
            "input_layernorm", "post_attention_layernorm",
            "pre_feedforward_layernorm", "post_feedforward_layernorm",
        ),
        ("sandwich",),
    ),
    (("", "post_attention_layernorm", "", "post_feedforward_layernorm"), ("sandwich",)),
    (("input_layernorm", "post_attention_layernorm"), ("pre", "parallel")),
    (("ln_attn", "ln_mlp"), ("parallel",)),
    (("input_layernorm",), ("parallel",)),
    (("ln_1", "ln_2"), ("pre", "parallel")),
    (("ln_1",), ("parallel",)),
    (("self_attn_layer_norm", "final_layer_norm"), ("pre", "post")),
    (("attention.output.LayerNorm", "output.LayerNorm"), ("post",)),
    (("attention.LayerNorm", "output.LayerNorm"), ("post",)),
    (("sa_layer_norm", "output_layer_norm"), ("post",)),
)  # fmt: skip
GATED = (("gate_proj", "up_proj", "down_proj"), ("gate_up_proj", "down_proj"))
PLAIN = (
    ("c_fc", "c_proj"), ("fc1", "fc2"), ("dense_h_to_4h", "dense_4h_to_h"), ("fc_in", "fc_out"),
    ("lin1", "lin2"), ("intermediate.dense", "output.dense"),
)  # fmt: skip
OUTPUTS = ("o_proj", "out_proj", "dense", "c_proj", "out_lin", "o")
ACTS: dict[str, ActivationName] = {
    "silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_python": "gelu", "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh", "gelu_fast": "gelu_tanh", "relu": "relu", "tanh": "tanh",
}  # fmt: skip


def blocks_of(model: Any, layers: Sequence[int]) -> list[Block]:
    """Return blocks of a model, which give its states to single precision.

    Parameters
    ----------
    model : transformers model, attnfit.audit model, or path
        As `attnfit.heads.observe` takes it: of GPT-2, BERT, Llama, Qwen, Mistral, Gemma, Phi, GPT-NeoX,
        OLMo, OPT, Granite and their kin.
    layers : sequence of int
        Numbers of the blocks, from 0.

    Returns
    -------
    list of Block
        In float64. ``blocks[k].output(states)`` is what block ``layers[k]`` makes of states: for 27 random
        tokens equal to the model's own to 1e-5.

    Raises
    ------
    UnknownHead
        If the block is not understood, has experts (whose choice is not continuous), or differs from the
        model; the message has the error and what was tried.
    ValueError
        If there is no such block.
    """
    module, _ = opened(model, None)
    from attnfit.audit.models.blocks import find_blocks

    parts = find_blocks(module)
    for layer in layers:
        if isinstance(layer, bool) or not 0 <= layer < len(parts):
            raise ValueError(f"layers must be 0 to {len(parts) - 1}, not {layer!r}")
    states = _states(module, [parts[layer] for layer in layers])
    try:
        return [
            _block(module, parts[layer], layer, *seen) for layer, seen in zip(layers, states, strict=True)
        ]
    except UnknownHead:
        raise
    except ValueError as error:
        raise UnknownHead(f"{module.config.model_type} is not understood: {error}") from error


def _states(module: Any, parts: list[Any]) -> list[tuple[Array, Array]]:
    """Return what enters and what leaves some blocks on random tokens."""
    seen: dict[tuple[int, str], Any] = {}

    def note(k: int, side: str, _: Any, args: Any, kwargs: Any, out: Any = None) -> None:
        value = out if side == "out" else (args[0] if args else kwargs["hidden_states"])
        value = value[0] if isinstance(value, tuple) else value
        seen[k, side] = weights.numbers(value.reshape(-1, value.shape[-1]))

    config = module.config.get_text_config()
    size = int(getattr(config, "max_position_embeddings", 0) or CHECKED)
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, min(CHECKED, size - 4))
    handles = []
    for k, part in enumerate(parts):
        handles.append(part.register_forward_pre_hook(partial(note, k, "in"), with_kwargs=True))
        handles.append(part.register_forward_hook(partial(note, k, "out"), with_kwargs=True))
    training = module.training
    try:
        with torch.no_grad():
            device = next(module.parameters()).device
            module.eval().base_model(input_ids=torch.tensor(tokens[None], device=device))
    finally:
        module.train(training)
        for handle in handles:
            handle.remove()
    return [(seen[k, "in"], seen[k, "out"]) for k in range(len(parts))]


def _block(module: Any, part: Any, layer: int, before: Array, after: Array) -> Block:
    """Return the reading of a block that comes nearest to the model, if that is near enough."""
    family = str(module.config.get_text_config().model_type)
    name = f"{family}, block {layer}"
    if any("expert" in inner or "router" in inner for inner, _ in part.named_modules()):
        raise UnknownHead(f"{name} has experts, whose choice is not continuous: it is not tested")
    best, error, tried = None, np.inf, []
    for block, what in _readings(module, part, layer, name):
        off = float(np.linalg.norm(block.output(before) - after) / np.linalg.norm(after))
        tried.append(what)
        if off < error:
            best, error = block, off
        if error <= AGREES:
            break
    if best is None or not error <= AGREES:
        raise UnknownHead(
            f"{name}: its output, computed from the weights, is off by {error:.1e} of the model's (limit "
            f"{AGREES:.0e}); tried {'; '.join(tried) or 'nothing'}: this architecture is not understood"
        )
    return best


def _readings(module: Any, part: Any, layer: int, name: str) -> Iterator[tuple[Block, str]]:
    """Yield what a block may be, the likely first, and in words what it was read as."""
    config = module.config.get_text_config()
    attention = weights.attention_part(part, str(config.model_type))
    factor = float(getattr(part, "residual_multiplier", 1.0))
    mlp = _mlp(part, config, factor, name)
    norms = next(
        (names for names in NORMS if all(not n or _find(part, n) is not None for n in names[0])), None
    )
    if norms is None:
        raise UnknownHead(f"{name} has norms under no known names")
    read = [_norm(_find(part, n), name) if n else None for n in norms[0]]
    causal = getattr(attention, "is_causal", None)
    masks = [weights.mask(attention, config, layer, True), None]
    masks = masks if causal is not False else masks[::-1]
    for layout in weights.layouts(str(config.model_type)):
        heads = _heads(module, attention, part, config, layer, factor)
        rotary, scale = weights.rotary(module, attention, config, layer, layout)
        heads = _scaled(heads, weights.scaling(attention, heads.W_Q.shape[2]) * scale)
        for order in norms[1]:
            for mask in masks:
                what = f"{order}-norm, {'rotary ' + layout if rotary else 'no rotary'}, mask {mask}"
                yield Block(heads, mlp, read, order, mask, rotary), what
        if rotary is None:
            return


def _heads(module: Any, attention: Any, part: Any, config: Any, layer: int, factor: float) -> Heads:
    projected = weights.projections(attention, config)
    H, G, h, rows = projected.n_heads, projected.n_keys, projected.width, -1 if projected.bias else None
    out = next((found for name in OUTPUTS if (found := _find(attention, name)) is not None), None)
    out = _find(part, "attention.output.dense") if out is None else out
    if out is None:
        raise UnknownHead(f"{config.model_type} has no projection of the outputs of heads under a known name")
    W_O, b_O = weights.linear_map(out)

    def split(W: Array, n: int) -> tuple[Array, Array | None]:
        by_head = np.moveaxis(W[:rows].reshape(len(W[:rows]), n, -1), 1, 0)
        return by_head, W[-1].reshape(n, -1) if projected.bias else None

    W_Q, b_Q = split(projected.W_Q, H)
    W_K, b_K = split(projected.W_K, G)
    W_V, b_V = split(projected.W_V, G)
    q_norm, k_norm = _qk_norms(attention, h, str(config.model_type))
    return Heads(
        W_Q, W_K, W_V, factor * W_O.reshape(H, -1, W_O.shape[1]), b_Q, b_K, b_V,
        None if b_O is None else factor * b_O,
        softcap=weights.softcap(attention, config), q_norm=q_norm, k_norm=k_norm,
    )  # fmt: skip


def _scaled(heads: Heads, scale: float) -> Heads:
    return Heads(
        heads.W_Q, heads.W_K, heads.W_V, heads.W_O, heads.b_Q, heads.b_K, heads.b_V, heads.b_O,
        scale, heads.softcap, heads.q_norm, heads.k_norm,
    )  # fmt: skip


def _qk_norms(attention: Any, h: int, family: str) -> tuple[Norm | None, Norm | None]:
    pair = weights.norm_pair(attention)
    if pair is None:
        return None, None
    q, k = (_norm(one, family) for one in pair)
    return q, k


def _mlp(part: Any, config: Any, factor: float, name: str) -> Mlp:
    places = [
        place for place in (getattr(part, "mlp", None), getattr(part, "ffn", None), part) if place is not None
    ]
    given = next(
        (
            value
            for key in ("hidden_act", "hidden_activation", "activation_function", "activation")
            if isinstance(value := getattr(config, key, None), str)
        ),
        "gelu_new",
    )
    if given not in ACTS:
        raise UnknownHead(f"{name} has the activation {given!r}; known are {', '.join(ACTS)}")
    for place in places:
        for names in (*GATED, *PLAIN):
            found = [_find(place, one) for one in names]
            if any(one is None for one in found):
                continue
            maps = [weights.linear_map(one) for one in found]
            W_2, b_2 = maps[-1]
            down = factor * W_2, None if b_2 is None else factor * b_2
            if names in PLAIN:
                return Mlp(maps[0][0], down[0], maps[0][1], down[1], ACTS[given])
            if len(maps) == 2:
                half = maps[0][0].shape[1] // 2
                W, b = maps[0]
                maps = [
                    (W[:, :half], None if b is None else b[:half]),
                    (W[:, half:], None if b is None else b[half:]),
                    maps[1],
                ]
            (gate, gate_bias), (up, b_1) = maps[:2]
            return Mlp(up, down[0], b_1, down[1], ACTS[given], gate, gate_bias)
    raise UnknownHead(f"{name} has a perceptron under no known names")


def _norm(norm: Any, name: str) -> Norm:
    """Return a norm by its parameters; a probe tells whether it takes the mean off, and whether gains are
    kept less one.
    """
    weight = getattr(norm, "weight", None)
    named = [getattr(norm, name, None) for name in ("variance_epsilon", "eps", "epsilon")]
    eps = next((float(value) for value in named if value is not None), None)
    if weight is None or weight.dim() != 1 or eps is None:
        raise UnknownHead(f"{name} has a norm of an unknown kind, {type(norm).__name__}")
    g, bias = weights.numbers(weight), getattr(norm, "bias", None)
    b = None if bias is None else weights.numbers(bias)
    x = torch.linspace(-1.0, 2.0, len(g), dtype=weight.dtype, device=weight.device)
    with torch.no_grad():
        y = weights.numbers(norm(x))
    readings = [Norm(gains, b, eps, centred) for gains in (g, g + 1.0) for centred in (False, True)]
    off = [float(np.linalg.norm(one.forward(weights.numbers(x))[0] - y)) for one in readings]
    best = int(np.argmin(off))
    if not off[best] <= 1e-3 * max(float(np.linalg.norm(y)), 1e-30):
        raise UnknownHead(f"{name} has a norm of an unknown kind, {type(norm).__name__}")
    return readings[best]


def _find(part: Any, name: str) -> Any:
    """Return a part by its dotted name, None where there is none."""
    for step in name.split("."):
        part = getattr(part, step, None)
    return part if isinstance(part, torch.nn.Module) else None

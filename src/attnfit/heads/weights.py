"""Where architectures of the transformers library keep what a head is made of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from attnfit.objectives.rotary import Rotary
from attnfit.segments import Array

# What attention modules call their projections, queries, keys and values.
NAMES = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("q_lin", "k_lin", "v_lin"),
    ("q", "k", "v"),
)
# Queries, keys and values from one projection: all queries first, or head by head.
STACKED, BY_HEAD = ("c_attn", "qkv_proj", "Wqkv"), ("query_key_value",)
NORMS = (("q_norm", "k_norm"), ("q_layernorm", "k_layernorm"), ("query_layernorm", "key_layernorm"))
# Families whose pairs of columns are neighbours.
INTERLEAVED = (
    "gptj",
    "codegen",
    "cohere",
    "cohere2",
    "glm",
    "glm4",
    "deepseek_v2",
    "deepseek_v3",
    "helium",
    "ernie4_5",
)


class UnknownHead(ValueError):
    """The heads of this architecture could not be taken apart, or do not give the maps of the model."""


class Norm(NamedTuple):
    """Norm of queries or keys of one head: a root mean square with gains, shape (h,)."""

    eps: float
    gains: Array


@dataclass(frozen=True)
class Projections:
    """The maps from the input of an attention to its queries, keys and values.

    Attributes
    ----------
    W_Q, W_K, W_V : ndarray, shapes (d, heads h), (d, key heads h) and (d, key heads v)
        With a row of biases last where there are any.
    bias : bool
    n_heads, n_keys, width : int
    """

    W_Q: Array
    W_K: Array
    W_V: Array
    bias: bool
    n_heads: int
    n_keys: int
    width: int

    def of_head(self, head: int) -> tuple[Array, Array]:
        """Return W_Q and W_K of one head, shape (d, h) each."""
        k, h = head // (self.n_heads // self.n_keys), self.width
        return self.W_Q[:, head * h : (head + 1) * h], self.W_K[:, k * h : (k + 1) * h]


def attention_part(block: Any, family: str) -> Any:
    """Return the module of a block that has the projections.

    Raises
    ------
    UnknownHead
        If none has any of the known names.
    """
    for part in block.modules():
        if _pair(part, NAMES) is not None or any(hasattr(part, name) for name in (*STACKED, *BY_HEAD)):
            return part
    raise UnknownHead(
        f"the blocks of {family} have no projections of queries and keys under any of the names "
        f"{', '.join(q for q, *_ in NAMES)}, {', '.join((*STACKED, *BY_HEAD))}"
    )


def projections(part: Any, config: Any) -> Projections:
    """Return the projections of an attention module."""
    n = int(config.num_attention_heads)
    n_keys = int(getattr(config, "num_key_value_heads", None) or n)
    found = _pair(part, NAMES)
    if found is not None:
        (W_Q, b_q), (W_K, b_k), (W_V, b_v) = (linear_map(one) for one in found)
    else:
        name = next(name for name in (*STACKED, *BY_HEAD) if hasattr(part, name))
        W, b = linear_map(getattr(part, name))
        if name in STACKED:
            h = W.shape[1] // (n + 2 * n_keys)
            ends = (n * h, (n + n_keys) * h)
            W_Q, W_K, W_V = np.split(W, ends, axis=1)
            b_q, b_k, b_v = (None, None, None) if b is None else np.split(b, ends)
        else:
            n_keys, h = n, W.shape[1] // (3 * n)
            W_Q, W_K, W_V = (W.reshape(len(W), n, 3, h)[:, :, k].reshape(len(W), -1) for k in range(3))
            b_q, b_k, b_v = (None if b is None else b.reshape(n, 3, h)[:, k].reshape(-1) for k in range(3))
    if W_Q.shape[1] % n or W_K.shape[1] % n_keys or W_Q.shape[1] // n != W_K.shape[1] // n_keys:
        raise UnknownHead(
            f"{config.model_type} has {n} heads on {n_keys} key heads, but projections of width "
            f"{W_Q.shape[1]} and {W_K.shape[1]}"
        )
    bias = b_q is not None or b_k is not None or b_v is not None
    if bias:
        W_Q, W_K, W_V = (
            np.concatenate([W, _row(b, W.shape[1])]) for W, b in ((W_Q, b_q), (W_K, b_k), (W_V, b_v))
        )
    return Projections(W_Q, W_K, W_V, bias, n, n_keys, W_Q.shape[1] // n)


def norms(part: Any, width: int) -> tuple[Norm, Norm] | None:
    """Return the norms of queries and keys, None without any.

    Raises
    ------
    UnknownHead
        If they are not root mean squares of single heads.
    """
    pair = norm_pair(part)
    if pair is None:
        return None
    out = []
    for norm in pair:
        eps = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
        ones = torch.ones(width)
        try:
            with torch.no_grad():
                gains, shifted = norm(ones), norm(ones + 1.0)
        except RuntimeError as error:
            raise UnknownHead(
                f"queries are normed over all heads together: pass inner=True ({error})"
            ) from None
        # The norm of a constant vector shows the gains, unless a mean is taken off.
        if eps is None or not torch.allclose(gains, shifted, rtol=1e-3, atol=1e-6) or not bool(gains.any()):
            raise UnknownHead("queries are normed by something else than a root mean square: pass inner=True")
        out.append(Norm(float(eps), numbers(gains) * np.sqrt(1.0 + float(eps))))
    return out[0], out[1]


def normed(part: Any, side: int, values: Any, n_heads: int) -> Any:
    """Return queries (side 0) or keys, shape (n, heads h), as the model norms them."""
    pair = norm_pair(part)
    if pair is None:
        return values
    norm = pair[side]
    size = getattr(norm, "weight", values).shape[-1]
    shaped = values if size == values.shape[-1] else values.reshape(len(values), n_heads, -1)
    return norm(shaped).reshape(values.shape)


def norm_pair(part: Any) -> tuple[Any, ...] | None:
    """Return the modules that norm queries and keys, None without any."""
    return _pair(part, NORMS)


def scaling(part: Any, width: int) -> float:
    """Return what products of queries and keys are multiplied by."""
    found = getattr(part, "scaling", None)
    if found is None:
        found = getattr(part, "scale", None)
    return float(found) if isinstance(found, int | float) else float(width) ** -0.5


def rotary(module: Any, part: Any, config: Any, layer: int, layout: Any) -> tuple[Rotary | None, float]:
    """Return the rotary embedding of a layer, as the model has it after a run, and by what factor it
    multiplies logits.
    """
    kinds = getattr(config, "layer_types", None)
    kind = kinds[layer] if kinds else None
    without = getattr(config, "no_rope_layers", None)
    if without and not without[layer]:
        return None, 1.0
    for owner in (part, *module.modules()):
        for name, buffer in owner.named_buffers(recurse=False):
            if name not in ("inv_freq", f"{kind}_inv_freq"):
                continue
            prefix = "" if name == "inv_freq" else f"{kind}_"
            factor = getattr(owner, f"{prefix}attention_scaling", 1.0)
            return Rotary(numbers(buffer), layout=layout), float(factor) ** 2
    return None, 1.0


def layouts(family: str) -> tuple[str, ...]:
    """Return the layouts to try, the likely one first."""
    order = ("half", "interleaved")
    return order[::-1] if family in INTERLEAVED else order


def softcap(part: Any, config: Any) -> float | None:
    """Return the size below which logits are kept, if any."""
    cap = getattr(part, "attn_logit_softcapping", getattr(config, "attn_logit_softcapping", None))
    return None if cap is None else float(cap)


def mask(part: Any, config: Any, layer: int, causal: bool) -> str | None:
    """Return which keys a query attends to."""
    kinds = getattr(config, "layer_types", None)
    window = getattr(part, "sliding_window", getattr(config, "sliding_window", None))
    if kinds and kinds[layer] == "full_attention":
        window = None
    if not causal:
        return None
    return f"causal:{int(window)}" if window else "causal"


def _pair(part: Any, names: tuple[tuple[str, ...], ...]) -> tuple[Any, ...] | None:
    """Return the modules of the first names that are all there."""
    for some in names:
        found = tuple(getattr(part, name, None) for name in some)
        if all(isinstance(one, torch.nn.Module) for one in found):
            return found
    return None


def linear_map(layer: Any) -> tuple[Array, Array | None]:
    """Return W, shape (in, out), and the bias of a linear layer; GPT-2 keeps its weights transposed."""
    W = numbers(layer.weight)
    bias = getattr(layer, "bias", None)
    transposed = type(layer).__name__ == "Conv1D"
    return W if transposed else W.T, None if bias is None else numbers(bias)


def _row(bias: Array | None, n: int) -> Array:
    return np.zeros((1, n)) if bias is None else bias[None]


def numbers(tensor: Any) -> Array:
    """Return a tensor in float64."""
    return np.asarray(tensor.detach().double().cpu().numpy())

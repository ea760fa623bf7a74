"""Where architectures of the transformers library keep what a head is made of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from attnfit.objectives.rotary import Rotary
from attnfit.segments import Array

# What attention modules call their projections, queries and keys.
NAMES = (("q_proj", "k_proj"), ("query", "key"), ("q_lin", "k_lin"), ("q", "k"))
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
    """The maps from the input of an attention to its queries and keys.

    Attributes
    ----------
    W_Q, W_K : ndarray, shapes (d, heads h) and (d, key heads h)
        With a row of biases last where there are any.
    bias : bool
    n_heads, n_keys, width : int
    """

    W_Q: Array
    W_K: Array
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
        f"{', '.join(q for q, _ in NAMES)}, {', '.join((*STACKED, *BY_HEAD))}"
    )


def projections(part: Any, config: Any) -> Projections:
    """Return the projections of an attention module."""
    n = int(config.num_attention_heads)
    n_keys = int(getattr(config, "num_key_value_heads", None) or n)
    found = _pair(part, NAMES)
    if found is not None:
        (W_Q, b_q), (W_K, b_k) = (_linear(one) for one in found)
    else:
        name = next(name for name in (*STACKED, *BY_HEAD) if hasattr(part, name))
        W, b = _linear(getattr(part, name))
        if name in STACKED:
            h = W.shape[1] // (n + 2 * n_keys)
            ends = (n * h, (n + n_keys) * h)
            W_Q, W_K = W[:, : ends[0]], W[:, ends[0] : ends[1]]
            b_q, b_k = (None, None) if b is None else (b[: ends[0]], b[ends[0] : ends[1]])
        else:
            n_keys, h = n, W.shape[1] // (3 * n)
            W_Q, W_K = (W.reshape(len(W), n, 3, h)[:, :, k].reshape(len(W), -1) for k in (0, 1))
            b_q, b_k = (None if b is None else b.reshape(n, 3, h)[:, k].reshape(-1) for k in (0, 1))
    if W_Q.shape[1] % n or W_K.shape[1] % n_keys or W_Q.shape[1] // n != W_K.shape[1] // n_keys:
        raise UnknownHead(
            f"{config.model_type} has {n} heads on {n_keys} key heads, but projections of width "
            f"{W_Q.shape[1]} and {W_K.shape[1]}"
        )
    bias = b_q is not None or b_k is not None
    if bias:
        W_Q = np.concatenate([W_Q, _row(b_q, W_Q.shape[1])])
        W_K = np.concatenate([W_K, _row(b_k, W_K.shape[1])])
    return Projections(W_Q, W_K, bias, n, n_keys, W_Q.shape[1] // n)


def norms(part: Any, width: int) -> tuple[Norm, Norm] | None:
    """Return the norms of queries and keys, None without any.

    Raises
    ------
    UnknownHead
        If they are not root mean squares of single heads.
    """
    pair = _pair(part, NORMS)
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
        out.append(Norm(float(eps), _numbers(gains) * np.sqrt(1.0 + float(eps))))
    return out[0], out[1]


def normed(part: Any, side: int, values: Any, n_heads: int) -> Any:
    """Return queries (side 0) or keys, shape (n, heads h), as the model norms them."""
    pair = _pair(part, NORMS)
    if pair is None:
        return values
    norm = pair[side]
    size = getattr(norm, "weight", values).shape[-1]
    shaped = values if size == values.shape[-1] else values.reshape(len(values), n_heads, -1)
    return norm(shaped).reshape(values.shape)


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
            return Rotary(_numbers(buffer), layout=layout), float(factor) ** 2
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


def _pair(part: Any, names: tuple[tuple[str, str], ...]) -> tuple[Any, Any] | None:
    for q, k in names:
        one, other = getattr(part, q, None), getattr(part, k, None)
        if isinstance(one, torch.nn.Module) and isinstance(other, torch.nn.Module):
            return one, other
    return None


def _linear(layer: Any) -> tuple[Array, Array | None]:
    """Return W, shape (in, out), and the bias of a linear layer; GPT-2 keeps its weights transposed."""
    W = _numbers(layer.weight)
    bias = getattr(layer, "bias", None)
    transposed = type(layer).__name__ == "Conv1D"
    return W if transposed else W.T, None if bias is None else _numbers(bias)


def _row(bias: Array | None, n: int) -> Array:
    return np.zeros((1, n)) if bias is None else bias[None]


def _numbers(tensor: Any) -> Array:
    return np.asarray(tensor.detach().double().cpu().numpy())

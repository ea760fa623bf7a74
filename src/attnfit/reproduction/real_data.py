"""Data that a reader knows: car sales, visits to a doctor, a head of the packaged language model."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attnfit.datasets import load_car_shares

Array = NDArray[np.float64]

# The packaged model, its layer and head whose maps are least sharp, and the texts looked at.
LAYER, HEAD, TEXTS = 0, 1, 30
# Queries of a block come after its keys, so that a causal mask hides none of them.
BLOCK_KEYS, BLOCK_QUERIES = 6, 4


def standardised(A: Array, scale: float = 0.3) -> Array:
    """Return columns of mean zero and this deviation."""
    A = A - A.mean(axis=0)
    return np.asarray(scale * A / A.std(axis=0))


def car_sales() -> tuple[Array, Array]:
    """Return five standardised features of 2,217 cars of 1971 to 1990 and their shares of all sales."""
    data = load_car_shares()
    cars = np.any(data.A != 0.0, axis=1)
    shares = data.b[cars]
    return standardised(data.A[cars, 1:]), shares / shares.sum()


def car_markets(size: int = 40) -> tuple[Array, Array, Array]:
    """Return the ``size`` best sold cars of each of 20 years: features, shares among them, and coefficients
    near those of all years.
    """
    data = load_car_shares()
    features, shares = [], []
    for year in range(int(data.groups.max()) + 1):
        rows = np.flatnonzero((data.groups == year) & np.any(data.A != 0.0, axis=1))
        best = rows[np.argsort(-data.b[rows])[:size]]
        features.append(data.A[best, 1:])
        shares.append(data.b[best] / data.b[best].sum())
    A = np.array(features)
    scale = A.reshape(-1, A.shape[2]).std(axis=0)
    known = data.references["cross_entropy"].coefficients[1:]
    return A / scale, np.array(shares), np.asarray(known * scale)


def doctor_visits() -> tuple[Array, Array] | None:
    """Return nine standardised features of 20,190 person-years of the RAND health insurance experiment, and
    shares of all visits, each plus one; None without statsmodels.
    """
    if find_spec("statsmodels") is None:
        return None
    from importlib import import_module

    table = import_module("statsmodels.datasets.randhie").load_pandas()
    A = standardised(np.asarray(table.exog, dtype=np.float64))
    visits = np.asarray(table.endog, dtype=np.float64) + 1.0
    return A, visits / visits.sum()


@dataclass(frozen=True)
class HeadTexts:
    """One head of the packaged model on its private texts.

    Attributes
    ----------
    queries, keys : list of ndarray, shape (n, 16)
        Of each text; the logits are their products.
    values : list of ndarray, shape (n, 16)
    maps : list of ndarray, shape (n, n)
        Causal.
    """

    queries: list[Array]
    keys: list[Array]
    values: list[Array]
    maps: list[Array]

    def blocks(self) -> tuple[Array, Array, Array]:
        """Return queries (count, 4, 16), keys (count, 6, 16) and maps (count, 4, 6) of tokens 6 to 9 of each
        text on its tokens 0 to 5: a softmax over some of its entries is theirs, normalised.
        """
        last = BLOCK_KEYS + BLOCK_QUERIES
        long = [k for k, keys in enumerate(self.keys) if len(keys) >= last]
        queries = np.array([self.queries[k][BLOCK_KEYS:last] for k in long])
        keys = np.array([self.keys[k][:BLOCK_KEYS] for k in long])
        maps = np.array([self.maps[k][BLOCK_KEYS:last, :BLOCK_KEYS] for k in long])
        return queries, keys, maps / maps.sum(axis=2, keepdims=True)


@cache
def head_texts() -> HeadTexts | None:
    """Return queries, keys, values and maps of the head; None without PyTorch and transformers."""
    if find_spec("torch") is None or find_spec("transformers") is None:
        return None
    from attnfit.audit import load
    from attnfit.heads import observe

    model = load("tiny")
    seen = observe(model, model.private_texts[:TEXTS], LAYER, HEAD)
    truth = seen.truth
    W_V = _value_weights(model)
    return HeadTexts(
        queries=[q @ truth.W_Q for q in seen.queries],
        keys=[k @ truth.W_K for k in seen.keys],
        values=[k @ W_V for k in seen.keys],
        maps=[np.asarray(m, dtype=np.float64) for m in seen.maps],
    )


def _value_weights(model: Any) -> Array:
    """Return the projection to values of the head, with the bias as its last row."""
    joint = _joint(model.base.h[LAYER].attn.c_attn, model.base.config.n_head)
    return np.asarray(joint[2][HEAD])


def _joint(projection: Any, n_heads: int) -> Array:
    """Return queries', keys' and values' weights (3, heads, width + 1, head), biases as their last rows."""
    weight = np.vstack(
        [part.detach().double().numpy() for part in (projection.weight, projection.bias[None])]
    )
    return np.asarray(np.moveaxis(weight.reshape(len(weight), 3, n_heads, -1), 0, 2))


@dataclass(frozen=True)
class FirstLayer:
    """The first attention layer of the packaged model on one of its private sentences.

    Attributes
    ----------
    W, V : list of ndarray
        A head each, of tokens with a last entry of one.
    output : ndarray, shape (n, width)
        Without the bias that is added to all tokens alike.
    table : ndarray, shape (n, N, width + 1)
        What each token of the vocabulary is at each position, after the first norm.
    tokens : ndarray, shape (n,)
    """

    W: list[Array]
    V: list[Array]
    output: Array
    table: Array
    tokens: NDArray[np.intp]


def first_layer() -> FirstLayer | None:
    """Return that of the packaged model's first private sentence; None without PyTorch and transformers."""
    if head_texts() is None:
        return None
    import torch

    from attnfit.audit import load

    model = load("tiny")
    base = model.base
    tokens = np.asarray(model.tokenise(model.private_texts[0]))
    with torch.no_grad():
        places = base.wpe.weight[: len(tokens), None] + base.wte.weight[None]
        table = base.h[0].ln_1(places).double().numpy()
        own = base.h[0].ln_1(places)[np.arange(len(tokens)), tokens]
        output = base.h[0].attn(own[None])[0][0].double().numpy()
    attention = base.h[0].attn
    n_heads = base.config.n_head
    W_Q, W_K, W_V = _joint(attention.c_attn, n_heads)
    W_O = attention.c_proj.weight.detach().double().numpy().reshape(n_heads, -1, output.shape[1])
    scale = 1.0 / np.sqrt(W_Q.shape[2])
    return FirstLayer(
        W=[scale * q @ k.T for q, k in zip(W_Q, W_K, strict=True)],
        V=[v @ o for v, o in zip(W_V, W_O, strict=True)],
        output=output - attention.c_proj.bias.detach().double().numpy(),
        table=np.concatenate([table, np.ones((*table.shape[:2], 1))], axis=2),
        tokens=tokens,
    )

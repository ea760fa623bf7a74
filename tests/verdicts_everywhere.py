"""A program that prints verdicts and recovered texts as JSON: `test_processors` runs it, again and again."""

import json
import sys

import numpy as np

import attnfit
from attnfit import inversion, problems


def fits():
    """Problems of every kind, well and badly conditioned, each with the outcome of its fit."""
    rng = np.random.default_rng(0)
    A, x = rng.standard_normal((60, 4)), 0.5 * rng.standard_normal(4)
    f = np.exp(A @ x) / np.exp(A @ x).sum()
    noisy = f * np.exp(0.3 * rng.standard_normal(60))
    groups = np.repeat(np.arange(12), 5)
    shares = noisy / np.bincount(groups, weights=noisy)[groups]
    scaled = A * [1.0, 1e-2, 1e2, 1e-4]
    A1, A2 = rng.standard_normal((8, 3)), rng.standard_normal((6, 2))
    B, targets = rng.dirichlet(np.ones(6), 8), rng.uniform(-0.5, 0.5, 6)
    dummy, chosen = np.array([[1.0], [0.0], [2.0], [0.0]]), np.array([1.0, 0.0, 1.0, 0.0])
    return {
        "softmax": problems.Softmax(A, noisy / noisy.sum()),
        "planted": problems.Softmax(A, f),
        "grouped": problems.Softmax(A, shares, groups=groups, loss="cross_entropy"),
        "scaled": problems.Softmax(scaled, shares, groups=groups, loss="cross_entropy"),
        "deficient": problems.Softmax(A[:, [0, 1, 1]], shares, groups=groups, loss="cross_entropy"),
        "exponential": problems.Exponential(A, 60.0 * noisy, "exp"),
        "rescaled": problems.Rescaled(0.3 * A, f, "cosh"),
        "two layers": problems.TwoLayer(A[:8], A[8:14].repeat(2, axis=1), targets, ridge=0.1),
        "attention": problems.Attention(A1, A2, B),
        "separable": problems.Softmax(dummy, chosen, [0, 0, 1, 1], "cross_entropy"),
    }


def recovered():
    """The verdict on an input that a layer gives away."""
    rng = np.random.default_rng(1)
    d, n = 3, 4
    # Two heads: twice as many equations as unknowns.
    W, V = rng.standard_normal((2, d, d)), rng.standard_normal((2, d, 6))
    B = problems.LayerInversion(W, V, np.zeros((n, 6))).output(rng.standard_normal((d, n)))
    return inversion.recover(problems.LayerInversion(W, V, B), random_state=0).verdict


def texts():
    """What a language model gives away: each access with two short texts."""
    from attnfit import audit

    model = audit.load("tiny")
    out = {}
    for access in ("hidden:2", "attention:0", "topk:5"):
        for k, text in enumerate((" ".join(model.private_texts[1].split()[:6]), "A dog left.")):
            found = audit.invert(model, audit.observe(model, text, access, "round:2"))
            out[f"{access} {k}"] = [text, found.text, found.verified, found.failed_at]
    return out


if __name__ == "__main__":
    results = {name: attnfit.minimize(problem) for name, problem in fits().items()}
    verdicts = {name: [str(getattr(r, "status", "")), bool(r.converged)] for name, r in results.items()}
    shown = {"verdicts": verdicts, "recovered": recovered()}
    # Importing the language models' libraries takes longer than all the rest.
    print(json.dumps(shown if sys.argv[1:] == ["fits"] else shown | {"texts": texts()}))

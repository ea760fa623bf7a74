"""What "A Fast Optimization View: Reformulating Single Layer Attention in LLM Based on Tensor and SVM Trick,
and Solving It in Matrix Multiplication Time" claims of one layer, fitted over X and Y (arXiv:2309.07418).
"""

from __future__ import annotations

import time
import warnings
from importlib.util import find_spec
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import softmax
from sklearn.exceptions import ConvergenceWarning

from attnfit.objectives.full_attention import FullAttention
from attnfit.reproduction.page import Claim, Curve, Page, Table
from attnfit.solvers import VariableProjection, minimize

Array = NDArray[np.float64]

PAPER = (
    "A Fast Optimization View: Reformulating Single Layer Attention in LLM Based on Tensor and SVM "
    "Trick, and "
    "Solving It in Matrix Multiplication Time"
)
# Derivatives may differ from autodiff, or from central differences, by so much.
AUTODIFF, DIFFERENCES = 1e-11, 1e-6
# The exponents of n and of d in the time of a forward and backward pass: n^2 d, with what is lower around it.
N_SLOPES, D_SLOPES = (1.4, 2.6), (0.0, 1.4)
# A residual of this share of |B|^2 is zero.
EXACT = 1e-16
SCALES = (0.1, 0.2, 0.4, 0.8)
# Of the planted instances at the easiest scale so many are solved within the starts.
SOLVED = 0.5
N_STARTS = 60


def run(quick: bool) -> Page:
    """Return the page."""
    referee, error, allowed = derivative_error()
    ratio, lowest = regulariser(100 if quick else 3000)
    shrunk = shrinkage(2 if quick else 6)
    sizes = ((256, 512, 1024), (16, 32, 64)) if quick else ((512, 1024, 2048, 4096), (16, 32, 64, 128))
    by_n, by_d = times(sizes[0], 32, along_n=True), times(sizes[1], sizes[0][-1], along_n=False)
    slope_n, slope_d = slope(by_n), slope(by_d)
    planted = [success(scale, 2 if quick else 6) for scale in (SCALES[:1] if quick else SCALES)]
    head = real_head(1 if quick else 4)
    claims = [
        Claim(
            "the objective over X and Y has the derivatives of Section 6",
            f"gradient and Hessian products agree with {referee} to {error:.0e}",
            error <= allowed,
        ),
        Claim(
            "a large enough regulariser makes the Hessian definite",
            f"the most negative curvature is at most {ratio:.2f} of its bound, and with the ridges "
            f"that follow "
            f"no eigenvalue is below {lowest:.2f} of what was asked for; they shrink X to "
            f"{shrunk[0]:.0e} and Y "
            f"to {shrunk[1]:.0e} of their size",
            ratio <= 1.0 and lowest >= 1.0 - 1e-9,
        ),
        Claim(
            "a step takes time T(n, n, d) + T(n, d, d)",
            f"a gradient takes n^{slope_n:.1f} and d^{slope_d:.1f}",
            within(slope_n, N_SLOPES) and within(slope_d, D_SLOPES),
        ),
        Claim(
            "descent reaches accuracy eps",
            "of a local minimum: "
            + ", ".join(f"{row[3]} of {row[1]} instances at scale {row[0]:g}" for row in planted)
            + f" had an exact fit within {N_STARTS} starts, {min(row[4] for row in planted):.1%} to "
            f"{max(row[4] for row in planted):.1%} of the starts",
            planted[0][3] >= SOLVED * planted[0][1],
        ),
        Claim(
            "the outputs of a head of a trained model are such outputs",
            "not measured: this needs attnfit[lm]" if head is None else
            f"an exact fit is found for {head[1]} of {head[0]} heads of the model that comes with "
            f"the package, "
            f"by at most {head[2]} starts",
            None if head is None else head[1] == head[0],
        ),
    ]  # fmt: skip
    return Page(
        "one-layer",
        PAPER,
        "Derivatives and the cost of a step are as claimed, up to the factor 0.5 of the loss here. The "
        "regulariser is a device of the proof, which shrinks the answer to nothing. Without it the loss has "
        "local minima, and many starts find the exact fit.",
        claims,
        [
            Curve(
                "Seconds of a gradient against n",
                "n",
                "seconds",
                {"d = 32": by_n},
                log=(True, True),
            ),
            Curve(
                f"Seconds of a gradient against d, n = {sizes[0][-1]:,}",
                "d",
                "seconds",
                {f"n = {sizes[0][-1]:,}": by_d},
                log=(True, True),
            ),
            Table(
                f"Planted outputs of 40 queries and 30 keys, d = 5, {N_STARTS} starts an instance",
                ("scale of X", "instances", "starts", "instances with an exact fit", "share of starts"),
                planted,
            ),
        ],
    )


# ---- derivatives


def derivative_error() -> tuple[str, float, float]:
    """Return the referee, the largest relative error of gradient and Hessian product, and what is allowed."""
    rng = np.random.default_rng(0)
    A1, A2, A3, B = _drawn(rng, 9, 7, 3, 2, 4, 3)
    problem = FullAttention(A1, A2, A3, B, ridge=0.1)
    x, v = rng.standard_normal((2, problem.n_unknowns))
    gradient, product = problem.gradient(x), problem.hvp(x, v)
    if find_spec("torch") is not None:
        exact, expected = by_autodiff((A1, A2, A3, B), 0.1, x, v)
        referee, allowed = "autodiff", AUTODIFF
    else:
        step = 1e-5
        ends = [problem.value(x + step * e) - problem.value(x - step * e) for e in np.eye(len(x))]
        exact = np.array(ends) / (2.0 * step)
        expected = (problem.gradient(x + step * v) - problem.gradient(x - step * v)) / (2.0 * step)
        referee, allowed = "central differences", DIFFERENCES
    errors = (np.linalg.norm(gradient - exact) / np.linalg.norm(exact),
              np.linalg.norm(product - expected) / np.linalg.norm(expected))  # fmt: skip
    return referee, float(max(errors)), allowed


def by_autodiff(data: tuple[Array, ...], ridge: float, x: Array, v: Array) -> tuple[Array, Array]:
    """Return gradient and Hessian product of the definition, by autodiff."""
    import torch

    A1, A2, A3, B = map(torch.tensor, data)
    d1, d2, width, m = A1.shape[1], A2.shape[1], A3.shape[1], B.shape[1]

    def loss(t: Any) -> Any:
        X, Y = t[: d1 * d2].reshape(d1, d2), t[d1 * d2 :].reshape(width, m)
        C = torch.softmax(A1 @ X @ A2.T, -1) @ A3 @ Y - B
        return 0.5 * (C * C).sum() + 0.5 * ridge * (t @ t)

    gradient = torch.func.grad(loss)
    at, along = torch.tensor(x), torch.tensor(v)
    with warnings.catch_warnings():
        # PyTorch trips over its own deprecation the first time forward-mode autodiff is used.
        warnings.filterwarnings("ignore", ".torch.jit.script. is deprecated", DeprecationWarning)
        product = torch.func.jvp(gradient, (at,), (along,))[1]
    return gradient(at).numpy(), product.numpy()


def _drawn(rng: np.random.Generator, n: int, k: int, d1: int, d2: int, v: int, m: int) -> list[Array]:
    shapes = ((n, d1), (k, d2), (k, v), (n, m))
    return [rng.standard_normal(shape) for shape in shapes]


# ---- the regulariser


def regulariser(draws: int) -> tuple[float, float]:
    """Return the largest share of its bound that the most negative curvature has, and the smallest eigenvalue
    with the ridges of `FullAttention.definite_ridge`, as a share of what was asked for.
    """
    rng, ratio, lowest = np.random.default_rng(0), 0.0, np.inf
    for _ in range(draws):
        n, k = (int(size) for size in rng.integers(1, 6, 2))
        d1, d2, v, m = (int(size) for size in rng.integers(1, 4, 4))
        A1, A2, A3, B = _drawn(rng, n, k, d1, d2, v, m)
        problem = FullAttention(A1, A2, A3, 3.0 * B, ridge=1.0)
        x = rng.standard_normal(problem.n_unknowns) * 10.0 ** rng.uniform(-1.0, 0.5)
        H = problem.hessian(x) - np.eye(problem.n_unknowns)
        a, kappa = problem.negative_curvature_parts(x)
        bound = 0.5 * (a + float(np.hypot(a, kappa)))
        ratio = max(ratio, -float(np.linalg.eigvalsh(H)[0]) / bound)
        least = float(rng.uniform(0.1, 1.0))
        gX, gY = problem.definite_ridge(x, least)
        ridges = np.repeat([gX, gY], [d1 * d2, v * m])
        lowest = min(lowest, float(np.linalg.eigvalsh(H + np.diag(ridges))[0]) / least)
    return ratio, lowest


def shrinkage(count: int) -> tuple[float, float]:
    """Return the median size of X and Y, relative to the planted ones, of fits with the ridges that make the
    Hessian definite where the fit begins.
    """
    rows = []
    for seed in range(count):
        problem, X, Y = plant(0.4, seed)
        start = problem.join(X, Y + 0.1 * np.random.default_rng(seed).standard_normal(Y.shape))
        gX, gY = problem.definite_ridge(start)
        problem.ridge = np.repeat([gX, gY], [X.size, Y.size])
        fit = _descend(problem, start)
        found = problem.split(fit)
        rows.append(
            [float(np.linalg.norm(f) / np.linalg.norm(p)) for f, p in zip(found, (X, Y), strict=True)]
        )
    sizes = np.median(rows, axis=0)
    return float(sizes[0]), float(sizes[1])


def _descend(problem: FullAttention, x: Array, steps: int = 200) -> Array:
    """Return where L-BFGS ends from x: the ridges of X and Y differ, so that Y is not eliminated."""
    from scipy.optimize import minimize as descend

    found = descend(problem.value_and_gradient, x, jac=True, method="L-BFGS-B", options={"maxiter": steps})
    return np.asarray(found.x)


# ---- time


def times(sizes: tuple[int, ...], other: int, *, along_n: bool) -> tuple[list[float], list[float]]:
    """Return sizes and the least seconds of a value and gradient, of three, at each."""
    seconds = []
    for size in sizes:
        n, d = (size, other) if along_n else (other, size)
        rng = np.random.default_rng(0)
        problem = FullAttention(*_drawn(rng, n, n, d, d, d, d), ridge=1.0)
        x = 0.1 * rng.standard_normal(problem.n_unknowns)
        taken = []
        for _ in range(3):
            began = time.process_time()
            problem.value_and_gradient(x)
            taken.append(time.process_time() - began)
        seconds.append(min(taken))
    return [float(size) for size in sizes], seconds


def slope(curve: tuple[list[float], list[float]]) -> float:
    """Return the exponent of the power law through a curve."""
    x, y = np.log(curve[0]), np.log(np.maximum(curve[1], 1e-9))
    return float(np.polyfit(x, y, 1)[0])


def within(value: float, interval: tuple[float, float]) -> bool:
    """Whether a number lies in an interval."""
    return interval[0] <= value <= interval[1]


# ---- success against starts


def plant(scale: float, seed: int) -> tuple[FullAttention, Array, Array]:
    """Return outputs of a planted (X, Y), and these."""
    rng = np.random.default_rng(seed)
    A1, A2, A3 = (rng.standard_normal(shape) for shape in ((40, 5), (30, 5), (30, 4)))
    X, Y = scale * rng.standard_normal((5, 5)), rng.standard_normal((4, 3))
    return FullAttention(A1, A2, A3, softmax(A1 @ X @ A2.T, axis=1) @ A3 @ Y), X, Y


def success(scale: float, count: int) -> tuple[float, int, int, int, float]:
    """Return scale, instances, starts, instances with an exact fit, and the share of starts with one."""
    solved = exact = starts = 0
    for seed in range(count):
        problem, *_ = plant(scale, seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            result = minimize(problem, solver=VariableProjection(n_starts=N_STARTS), random_state=seed)
        size = float(np.sum(problem.B**2))
        values = np.array(list(result.local_values.values()))
        solved += 2.0 * result.value <= EXACT * size
        exact += int((2.0 * values <= EXACT * size).sum())
        starts += len(values)
    return scale, count, starts, int(solved), exact / starts


def real_head(count: int) -> tuple[int, int, int] | None:
    """Return the number of heads of the packaged model looked at, of exact fits of their outputs, and the
    most starts that one took; None without the packages that read the model.
    """
    if find_spec("torch") is None or find_spec("transformers") is None:
        return None
    exact = most = 0
    for head in range(count):
        problem = head_outputs(head % 4, head // 4)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            result = minimize(problem, random_state=0)
        exact += 2.0 * result.value <= 1e-12 * float(np.sum(problem.B**2))
        most = max(most, len(result.local_values))
    return count, int(exact), most


def head_outputs(head: int, layer: int) -> FullAttention:
    """Return the fit of the outputs of a head of the packaged model on some of its texts: queries, keys and
    values are the head's, so that X is a multiple of the identity and Y the identity.
    """
    from attnfit import audit, heads

    tiny = audit.load("tiny")
    texts = tiny.private_texts[:8]
    inner = heads.observe(tiny, texts, layer=layer, head=head, inner=True)
    outer = heads.observe(tiny, texts, layer=layer, head=head)
    block = tiny.module.transformer.h[layer].attn.c_attn
    width = block.weight.shape[0]
    own = slice(2 * width + head * inner.rank, 2 * width + (head + 1) * inner.rank)
    W = np.vstack([block.weight.detach().numpy()[:, own], block.bias.detach().numpy()[None, own]])
    values = [keys @ W.astype(np.float64) for keys in outer.keys]
    outputs = []
    for q, k, V in zip(inner.queries, inner.keys, values, strict=True):
        # In double precision: those of the model are not, and an exact fit would be one to its rounding.
        z = (q @ inner.truth.W_Q) @ (k @ inner.truth.W_K).T
        outputs.append(softmax(np.where(np.tri(len(q), dtype=bool), z, -np.inf), axis=1) @ V)
    return FullAttention(inner.queries, inner.keys, values, outputs, mask="causal")

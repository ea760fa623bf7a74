"""Recover the input of an attention layer, and judge what was found."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attnfit.certificates import Certificate, certify
from attnfit.inversion.decoding import decode
from attnfit.inversion.identifiable import Identifiability, identifiable
from attnfit.inversion.search import search
from attnfit.inversion.vocabulary import Vocabulary
from attnfit.problems import LayerInversion
from attnfit.problems.base import MAX_DENSE

Array = NDArray[np.float64]

# Relative residuals that count as none: of tokens anywhere, and of rows of a table.
EXACT = 1e-9
EXACT_ROWS = 1e-6
# Starts of the search: of tokens anywhere, and of rows of a table.
STARTS = 10
STARTS_ROWS = 30
# Beyond this condition number of the Jacobian a zero residual in float64 leaves no correct digit to speak of.
WORST_CONDITION = 1e12


@dataclass(frozen=True)
class Recovery:
    """What was found; ``print`` it for a sentence.

    Attributes
    ----------
    verdict : {"recovered", "ambiguous", "not recovered"}
        A small residual alone is never called recovery. "recovered": one input with a zero residual was
        found, all directions are identified there, and there are more equations than unknowns, so that
        another one would be a coincidence; or rows of the vocabulary reproduce the output and no exchange of
        one of them does. "ambiguous": several inputs give this output, or nothing speaks against others.
    message : str
        The same as a sentence, with the reason.
    x : ndarray, shape (d, n_unknown)
        The best input: unknown tokens as columns.
    residual : float
        ``||output(x) - B||_F / ||B||_F``.
    inputs : list of ndarray
        The distinct zero-residual inputs found.
    n_starts : int
        Descents made, or decodings with a vocabulary.
    identifiability : Identifiability
        At x: counting, rank and condition of the Jacobian, directions that the output does not determine.
    residual_floor : float
        The share of ``||B||_F`` that no input produces: the part outside the row space of the value maps.
    certificate : Certificate
        The ball around x that holds exactly one stationary point, or why there is none.
    tokens : ndarray of int, shape (n_unknown,), optional
        With a vocabulary: the row of each unknown token.
    margins : ndarray, shape (n_unknown,), optional
        With a vocabulary: the relative residual after the best exchange of that token alone.
    """

    verdict: str
    message: str
    x: Array
    residual: float
    inputs: list[Array]
    n_starts: int
    identifiability: Identifiability
    residual_floor: float
    certificate: Certificate
    tokens: NDArray[np.intp] | None = None
    margins: Array | None = None

    def __str__(self) -> str:
        return self.message


def recover(
    layer: LayerInversion,
    B: Any = None,
    *,
    vocabulary: Any = None,
    precision: float | None = None,
    n_starts: int | None = None,
    max_iter: int = 100,
    random_state: Any = None,
    callback: Callable[[float, int], Any] | None = None,
    client: Any = None,
) -> Recovery:
    """Recover the input of an attention layer from its output.

    Without a vocabulary: Levenberg-Marquardt from ``B V^+``, from the moments of the output and from Gaussian
    tokens. Where there are more equations than unknowns, it ends at the first zero residual; otherwise all
    starts are used, to find out whether there are several. With a vocabulary tokens are rows of a table:
    `attnfit.inversion.decoding` finds them, and only rows that reproduce the output count.

    Parameters
    ----------
    layer : LayerInversion
        With gamma zero, which recovers without bias.
    B : array_like, shape (n, m), optional
        Another output of the same layer, in place of the one that it was made with.
    vocabulary : array_like, shape (N, d) or (n, N, d), or callable, optional
        The rows that a token may be: the same at all positions, or those of each, as an array or as a
        function of the position.
    precision : float, optional
        Relative error of B: a residual up to it counts as zero. Default 1e-9, with a vocabulary 1e-6.
    n_starts : int, optional
        Largest number of starts. Default 10, with a vocabulary 30.
    max_iter : int
        Largest number of steps from each, without a vocabulary.
    random_state : int, numpy.random.Generator, optional
    callback : callable, optional
        Called with the work done and the most there can be, in starts or tokens.
    client : distributed.Client, optional
        Starts run on its workers, with the same result; decoding with a vocabulary, where each start follows
        from the one before, does not use it.

    Returns
    -------
    Recovery

    Raises
    ------
    ValueError
        If gamma is not zero, n_starts or precision is not positive, the vocabulary does not fit the layer, or
        there are more unknowns than can be decoded.

    Notes
    -----
    The problem is that of "Unmasking Transformers: A Theoretical Approach to Data Recovery via Attention
    Weights". Its theorem takes one start and a convex loss, whose minimum is not the input; this takes
    several starts, no regulariser, and a finite table where there is one.
    """
    layer = layer if B is None else layer.with_output(B)
    if layer.gamma != 0.0:
        raise ValueError(f"layer has gamma={layer.gamma:g}, which draws the tokens to zero; pass gamma=0")
    n_starts = (STARTS if vocabulary is None else STARTS_ROWS) if n_starts is None else n_starts
    if not isinstance(n_starts, int | np.integer) or n_starts < 1:
        raise ValueError(f"n_starts must be at least 1, an integer, not {n_starts!r}")
    precision = (EXACT if vocabulary is None else EXACT_ROWS) if precision is None else precision
    if not isinstance(precision, float | int | np.number) or not 0.0 < precision < 1.0:
        raise ValueError(f"precision must lie between 0 and 1, not {precision!r}; it is relative to B")
    with np.errstate(over="ignore"):
        if not np.isfinite(np.sum(layer.B**2)):
            raise ValueError("B is so large that its squares overflow; divide B and the values V by its size")
    rng = np.random.default_rng(random_state)
    tell = callback or (lambda done, total: None)
    if vocabulary is None:
        return _anywhere(layer, precision, n_starts, max_iter, rng, tell, client)
    return _in_table(layer, Vocabulary(vocabulary, layer.d, layer.n), precision, n_starts, rng, tell)


def _anywhere(
    layer: LayerInversion,
    precision: float,
    n_starts: int,
    max_iter: int,
    rng: np.random.Generator,
    callback: Callable[[float, int], Any],
    client: Any,
) -> Recovery:
    found = search(layer, precision, n_starts, max_iter, rng, callback, client)
    report = _report(layer, found.best, found.square, found.n_starts)
    report = replace(report, inputs=[x.reshape(layer.shape) for x in found.inputs])
    verdict, reason = _judge(report, precision)
    return replace(report, verdict=verdict, message=f"{verdict}: {reason}")


def _in_table(
    layer: LayerInversion,
    vocabulary: Vocabulary,
    precision: float,
    n_starts: int,
    rng: np.random.Generator,
    callback: Callable[[float, int], Any],
) -> Recovery:
    found = decode(layer, vocabulary, precision, n_starts, rng, callback)
    x = layer.columns(layer.rows_with(found.rows))
    report = _report(layer, x.reshape(-1), found.square, found.n_decodings)
    margins = np.sqrt(found.second_squares / _size(layer))
    report = replace(report, tokens=found.tokens, margins=margins)
    # A residual that is not a number is none that counts as zero.
    if not report.residual <= precision:
        return replace(
            report,
            message=f"not recovered: no rows of the vocabulary found reproduce the output (the nearest leave "
            f"{report.residual:.1e} of it, after {found.n_decodings} decodings); check that tokens come from "
            "it, use more starts, or give the output's precision",
        )
    ties = np.flatnonzero(margins <= precision)
    if len(ties):
        i = ties[0]
        return replace(
            report,
            verdict="ambiguous",
            inputs=[x],
            message=f"ambiguous: {len(ties)} of {len(margins)} tokens may be exchanged; token "
            f"{layer.unknown[i]} is row {found.tokens[i]} or {found.seconds[i]} of the vocabulary",
        )
    return replace(
        report,
        verdict="recovered",
        inputs=[x],
        message=f"recovered: {len(margins)} rows of the vocabulary reproduce the output (residual "
        f"{report.residual:.1e}), and with any one of them exchanged at least {margins.min():.1e} is left",
    )


def _report(layer: LayerInversion, x: Array, square: float, n_starts: int) -> Recovery:
    """Return what there is to say of an input before a verdict."""
    return Recovery(
        verdict="not recovered",
        message="",
        x=x.reshape(layer.shape),
        residual=float(np.sqrt(square / _size(layer))),
        inputs=[],
        n_starts=n_starts,
        identifiability=identifiable(layer, x if layer.n_unknowns <= MAX_DENSE else None),
        residual_floor=_floor(layer),
        certificate=certify(layer, x),
    )


def _size(layer: LayerInversion) -> float:
    # Residuals are relative to the output; of an output that is zero they are what they are.
    return float(np.sum(layer.B**2)) or 1.0


def _floor(layer: LayerInversion) -> float:
    """Return the share of B outside the row space of the value maps."""
    values = np.vstack([head.V for head in layer.layer.heads])
    outside = layer.B - layer.B @ np.linalg.pinv(values) @ values
    return float(np.linalg.norm(outside) / np.sqrt(_size(layer)))


def _judge(report: Recovery, precision: float) -> tuple[str, str]:
    """Return the verdict and its reason."""
    at, found = report.identifiability, len(report.inputs)
    starts = f"{report.n_starts} start{'s'[: report.n_starts > 1]}"
    if not found and report.residual_floor > 10.0 * precision:
        return "not recovered", (
            f"no input gives this output: a share {report.residual_floor:.1e} of it lies outside what the "
            "value maps produce"
        )
    if not found:
        return "not recovered", (
            f"no zero residual from {starts} (the least is {report.residual:.1e} of the output); use more "
            "starts or steps, known tokens, or the output's precision"
        )
    if found > 1:
        return "ambiguous", f"{found} different inputs give this output"
    if at.rank is not None and at.rank < at.n_unknowns:
        return "ambiguous", (
            f"the output does not move along {at.n_unknowns - at.rank} of {at.n_unknowns} directions at the "
            "input found"
        )
    if at.condition is not None and at.condition > min(WORST_CONDITION, 0.1 / precision):
        return "ambiguous", f"the Jacobian has condition {at.condition:.1e}: errors of the output decide"
    if at.n_equations <= at.n_unknowns:
        return "ambiguous", (
            f"one input was found from {starts}, but {at.n_equations} numbers for {at.n_unknowns} unknowns "
            "leave room for others; known tokens, a second output or a vocabulary would settle it"
        )
    condition = "" if at.condition is None else f", condition {at.condition:.1e}"
    return "recovered", (
        f"one input gives this output (residual {report.residual:.1e}{condition}), and "
        f"{at.n_equations} numbers for {at.n_unknowns} unknowns leave no room for another in general"
    )

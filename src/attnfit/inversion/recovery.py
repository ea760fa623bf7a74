"""Recover the input of an attention layer, and judge what was found."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attnfit.certificates import Certificate, certify
from attnfit.inversion.counting import count
from attnfit.inversion.decoding import Decoded, decode
from attnfit.inversion.identifiable import Identifiability, identifiable
from attnfit.inversion.search import search
from attnfit.inversion.vocabulary import Vocabulary
from attnfit.objectives.objective import MAX_DENSE
from attnfit.problems import LayerInversion

Array = NDArray[np.float64]

# Relative residuals that count as none: of tokens anywhere, and of rows of a table.
EXACT = 1e-9
EXACT_ROWS = 1e-6
# Starts of the search: of tokens anywhere, and of rows of a table.
STARTS = 10
STARTS_ROWS = 30
# Beyond this condition number of the Jacobian a zero residual in float64 leaves no correct digit to speak of.
WORST_CONDITION = 1e12
UNIFORM = "the attention is uniform: order is not in the output"
# Numbers that a message lists.
SHOWN = 8


@dataclass(frozen=True)
class Recovery:
    """What was found; ``print`` it for a sentence.

    Attributes
    ----------
    verdict : {"recovered", "ambiguous", "not recovered"}
        A small residual alone is never called recovery. "recovered": one input with a zero residual was
        found, all directions are identified there, and there are more independent equations than unknowns
        for every set of unknown tokens, so that another one would be a coincidence; or rows of the vocabulary
        reproduce the output, and no other rows that were tried in the place of one or two of them do.
        "ambiguous": several inputs give this output, or nothing speaks against others.
    message : str
        The same as a sentence, with the reason.
    x : ndarray, shape (d, n_unknown)
        The best input: unknown tokens as columns.
    residual : float
        ``||output(x) - B||_F / ||B||_F``. It counts as zero where what is left of it beside `residual_floor`
        is at most the precision.
    inputs : list of ndarray
        The distinct zero-residual inputs found; with a vocabulary at most ten beside x. Where uniform
        attention leaves the order open, the tokens in the order of their rows.
    n_starts : int
        Descents made, or decodings with a vocabulary.
    identifiability : Identifiability
        At x: counting, rank and condition of the Jacobian, directions that the output does not determine.
    residual_floor : float
        The share of ``||B||_F`` that no input produces: the part outside the row space of the value maps
        below one another. It is taken off before the search.
    certificate : Certificate
        The ball around x that holds exactly one stationary point, or why there is none.
    tokens : ndarray of int, shape (n_unknown,), optional
        With a vocabulary: the row of each unknown token.
    margins : ndarray, shape (n_unknown,), optional
        With a vocabulary: the relative residual after the best exchange of that token alone.
    equal_rows : list of ndarray of int, optional
        With a vocabulary: the rows that are equal to that of each unknown token, its own among them. Nothing
        tells these apart, and they count as one token.
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
    equal_rows: list[NDArray[np.intp]] | None = None

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
    given = _Given.of(layer, precision)
    rng = np.random.default_rng(random_state)
    tell = callback or (lambda done, total: None)
    if vocabulary is None:
        return _anywhere(given, n_starts, max_iter, rng, tell, client)
    return _in_table(given, Vocabulary(vocabulary, layer.d, layer.n), n_starts, rng, tell)


@dataclass(frozen=True)
class _Given:
    """What an input is judged by.

    Attributes
    ----------
    layer : LayerInversion
        With the rows of B projected on what the value maps produce.
    size : float
        ``||B||_F^2`` before; 1 for an output of zero, whose residuals are what they are.
    floor : float
        Share of ``||B||_F`` that the projection takes off.
    precision : float
    """

    layer: LayerInversion
    size: float
    floor: float
    precision: float

    @classmethod
    def of(cls, layer: LayerInversion, precision: float) -> _Given:
        size = float(np.sum(layer.B**2)) or 1.0
        projected = layer.projected()
        floor = float(np.linalg.norm(layer.B - projected.B) / np.sqrt(size))
        return cls(projected, size, floor, precision)

    @property
    def enough(self) -> float:
        """Squared residual that counts as zero."""
        return self.precision**2 * self.size

    def report(self, x: Array, square: float, n_starts: int) -> Recovery:
        """Return what there is to say of an input before a verdict."""
        layer = self.layer
        return Recovery(
            verdict="not recovered",
            message="",
            x=x.reshape(layer.shape),
            residual=float(np.hypot(np.sqrt(square / self.size), self.floor)),
            inputs=[],
            n_starts=n_starts,
            identifiability=identifiable(layer, x if layer.n_unknowns <= MAX_DENSE else None),
            residual_floor=self.floor,
            certificate=certify(layer, x),
        )

    @property
    def outside(self) -> str:
        """Why no input gives the output, empty where one may."""
        if self.floor <= self.precision:
            return ""
        return (
            f"no input gives this output: a share {self.floor:.1e} of it lies outside what the value maps "
            "produce; check V, or give the output's precision"
        )


def _anywhere(
    given: _Given,
    n_starts: int,
    max_iter: int,
    rng: np.random.Generator,
    callback: Callable[[float, int], Any],
    client: Any,
) -> Recovery:
    layer = given.layer
    excess = count(layer).excess
    found = search(layer, given.enough, n_starts, max_iter, rng, callback, client, until_first=excess > 0)
    report = given.report(found.best, found.square, found.n_starts)
    report = replace(report, inputs=[x.reshape(layer.shape) for x in found.inputs])
    verdict, message = _judge(given, report, excess)
    return replace(report, verdict=verdict, message=message)


def _judge(given: _Given, report: Recovery, excess: int) -> tuple[str, str]:
    """Return the verdict on inputs that were searched for anywhere, and the message."""
    at, found = report.identifiability, len(report.inputs)
    starts = f"{report.n_starts} start{'s'[: report.n_starts > 1]}"
    if given.outside:
        return "not recovered", f"not recovered: {given.outside}"
    if not found:
        return "not recovered", (
            f"not recovered: no zero residual from {starts} (the least is {report.residual:.1e} of the "
            "output); use more starts or steps, known tokens, or the output's precision"
        )
    if found > 1:
        return "ambiguous", f"ambiguous: {found} different inputs give this output"
    if at.rank is not None and at.rank < at.n_unknowns:
        return "ambiguous", (
            f"ambiguous: the output does not move along {at.n_unknowns - at.rank} of {at.n_unknowns} "
            "directions at the input found"
        )
    if at.condition is not None and at.condition > min(WORST_CONDITION, 0.1 / given.precision):
        return "ambiguous", (
            f"ambiguous: the Jacobian has condition {at.condition:.1e}: errors of the output decide"
        )
    if excess <= 0:
        which = "" if at.n_equations <= at.n_unknowns else " (fewer for some, by the mask)"
        return "ambiguous", (
            f"ambiguous (one input found): it was found from {starts}, but {at.n_equations} independent "
            f"numbers for {at.n_unknowns} unknowns{which} leave room for others; known tokens, more heads, a "
            "second output or a vocabulary would settle it"
        )
    condition = "" if at.condition is None else f", condition {at.condition:.1e}"
    return "recovered", (
        f"recovered: one input gives this output (residual {report.residual:.1e}{condition}), and "
        f"{at.n_equations} independent numbers for {at.n_unknowns} unknowns leave no room for another in "
        "general"
    )


def _in_table(
    given: _Given,
    vocabulary: Vocabulary,
    n_starts: int,
    rng: np.random.Generator,
    callback: Callable[[float, int], Any],
) -> Recovery:
    layer = given.layer
    found = decode(layer, vocabulary, given.precision, given.enough, n_starts, rng, callback)
    x = layer.columns(layer.rows_with(found.rows))
    report = given.report(x.reshape(-1), found.square, found.n_decodings)
    margins = np.sqrt(found.rivals.second_squares / given.size)
    verdict, message, inputs = _judge_tokens(given, vocabulary, found, margins)
    return replace(
        report,
        verdict=verdict,
        message=message,
        inputs=inputs,
        tokens=found.tokens,
        margins=margins,
        equal_rows=found.rivals.equal,
    )


def _judge_tokens(
    given: _Given, vocabulary: Vocabulary, found: Decoded, margins: Array
) -> tuple[str, str, list[Array]]:
    """Return the verdict on rows of a vocabulary, the message, and the inputs that give the output."""
    layer, tokens, rivals = given.layer, found.tokens, found.rivals
    left = f"{np.sqrt(found.square / given.size):.1e}"
    if given.outside:
        return "not recovered", f"not recovered: {given.outside}", []
    # A residual that is not a number is none that counts as zero.
    if not found.square <= given.enough:
        after = "all tuples" if found.exhausted else f"{found.n_decodings} decodings"
        message = (
            f"not recovered: no tuple found in the vocabulary (the nearest of {after} leaves {left} of the "
            "output); check that tokens come from it, use more starts, or give the output's precision"
        )
        if _is_uniform(given, found):
            message += f"; {UNIFORM}"
        return "not recovered", message, []
    inputs = [layer.columns(layer.rows_with(rows)) for rows in (found.rows, *rivals.rows)]
    ordered = np.sort(tokens)
    moved = [bool(np.array_equal(np.sort(other), ordered)) for other in rivals.others]
    if any(moved) and _is_uniform(given, found):
        inputs = [inputs[0], *(x for x, same in zip(inputs[1:], moved, strict=True) if not same)]
        T = layer.rows_with(vocabulary.tokens(layer.unknown, ordered))
        if np.sum((layer.layer.forward(T).output - layer.B) ** 2) <= given.enough:
            inputs[0] = layer.columns(T)
        message = f"ambiguous: {UNIFORM}, only that the tokens are rows {_listed(ordered)} of the vocabulary"
        return "ambiguous", message + (", or others" if len(inputs) > 1 else ""), inputs
    ties = np.flatnonzero(margins <= given.precision)
    if len(ties):
        i = ties[0]
        message = (
            f"ambiguous: {len(ties)} of {len(margins)} tokens may be exchanged; token {layer.unknown[i]} is "
            f"row {tokens[i]} or {rivals.seconds[i]} of the vocabulary"
        )
        return "ambiguous", message, inputs
    if rivals.others:
        apart = np.flatnonzero(rivals.others[0] != tokens)
        message = (
            f"ambiguous: tokens {_listed(layer.unknown[apart])} are rows {_listed(tokens[apart])} of the "
            f"vocabulary, or {_listed(rivals.others[0][apart])}"
        )
        return "ambiguous", message, inputs
    message = (
        f"recovered: {len(margins)} rows of the vocabulary reproduce the output (residual {left}), and "
        + (
            f"with any one of them exchanged at least {margins.min():.1e} is left"
            if np.isfinite(margins.min())
            else "it has no others"
        )
    )
    same = [
        f"token {position} is row {token} (= {_listed(np.setdiff1d(rows, token))})"
        for position, token, rows in zip(layer.unknown, tokens, rivals.equal, strict=True)
        if len(rows) > 1
    ]
    return "recovered", "; ".join([message, *same[:SHOWN], *(["..."] if len(same) > SHOWN else [])]), inputs


def _is_uniform(given: _Given, found: Decoded) -> bool:
    """Whether the logits of every query differ by no more than the precision."""
    layer = given.layer
    at = layer.layer.forward(layer.rows_with(found.rows))
    mask = np.ones((layer.n, layer.n), dtype=bool) if layer.layer.mask is None else layer.layer.mask
    spread = 0.0
    for s in at.heads:
        S = s.R @ at.Tc.T
        highest, lowest = np.where(mask, S, -np.inf).max(axis=1), np.where(mask, S, np.inf).min(axis=1)
        spread = max(spread, float(np.max(highest - lowest)))
    return spread <= given.precision


def _listed(numbers: NDArray[np.intp]) -> str:
    """Return numbers as words: 3, 5 and 8."""
    shown = [str(number) for number in numbers[:SHOWN]]
    if len(numbers) > SHOWN:
        shown.append(f"{len(numbers) - SHOWN} more")
    return shown[0] if len(shown) == 1 else f"{', '.join(shown[:-1])} and {shown[-1]}"

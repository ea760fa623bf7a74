"""Recover the input of an attention layer or of transformer blocks, and judge what was found."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attnfit.certificates.layers import certify_layer
from attnfit.inversion.decoding import Decoded, decode
from attnfit.inversion.in_order import NARROW, InOrder, recover_in_order
from attnfit.inversion.joint_blocks import judge_blocks, with_paths
from attnfit.inversion.recovered import SHOWN, AnyInversion, Given, Recovery, count, identifiable, listed
from attnfit.inversion.search import Found, search
from attnfit.inversion.vocabulary import Vocabulary
from attnfit.objectives.block_problem import BlockInversion
from attnfit.objectives.inverse_layer import AttentionLayer
from attnfit.objectives.objective import MAX_DENSE

Array = NDArray[np.float64]

# Relative residuals that count as none: of tokens anywhere, and of rows of a table.
EXACT = 1e-9
EXACT_ROWS = 1e-6
# Starts of the search: of tokens anywhere, and of rows of a table.
STARTS = 10
STARTS_ROWS = 30
# Of wide tokens of blocks.
STARTS_WIDE = 3
# Beyond this condition number of the Jacobian a zero residual in float64 leaves no correct digit to speak of.
WORST_CONDITION = 1e12
OUTSIDE = (
    "not recovered: no input gives this output: a share {:.1e} of it lies outside what the value maps "
    "produce; check V, or give the output's precision"
)
UNIFORM = "the attention is uniform: order is not in the output"


def recover(
    layer: AnyInversion,
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
    """Recover the input of an attention layer, or of transformer blocks, from their output.

    Without a vocabulary: Levenberg-Marquardt from ``B V^+``, from the moments of the output and from Gaussian
    tokens. Where there are more equations than unknowns, it ends at the first zero residual; otherwise all
    starts are used, to find out whether there are several. With a vocabulary tokens are rows of a table:
    `attnfit.inversion.decoding` finds them, and only rows that reproduce the output count.

    Causal blocks are solved token by token: with the tokens before it given, a row of the output is a map of
    one token. Newton's method starts at the row itself; where it stalls, the path of
    ``x + s (F(x) - x) = y`` from s = 0 leads to an input wherever branches are bounded. Blocks whose tokens
    see one another are solved for all tokens at once.

    Parameters
    ----------
    layer : LayerInversion or BlockInversion
        With gamma zero, which recovers without bias.
    B : array_like, shape (n, m), optional
        Another output of the same layer, in place of the one that it was made with.
    vocabulary : array_like, shape (N, d) or (n, N, d), or callable, optional
        The rows that a token may be: the same at all positions, or those of each, as an array or as a
        function of the position.
    precision : float, optional
        Relative error of B: a residual up to it counts as zero. Default 1e-9, with a vocabulary 1e-6.
    n_starts : int, optional
        Largest number of starts. Default 10, with a vocabulary 30; of causal blocks, those of each token,
        3 where tokens have more than 128 numbers.
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
    if n_starts is None:
        wide = isinstance(layer, BlockInversion) and layer.d > NARROW
        n_starts = STARTS_ROWS if vocabulary is not None else STARTS_WIDE if wide else STARTS
    if not isinstance(n_starts, int | np.integer) or n_starts < 1:
        raise ValueError(f"n_starts must be at least 1, an integer, not {n_starts!r}")
    precision = (EXACT if vocabulary is None else EXACT_ROWS) if precision is None else precision
    if not isinstance(precision, float | int | np.number) or not 0.0 < precision < 1.0:
        raise ValueError(f"precision must lie between 0 and 1, not {precision!r}; it is relative to B")
    with np.errstate(over="ignore"):
        if not np.isfinite(np.sum(layer.B**2)):
            raise ValueError("B is so large that its squares overflow; divide B and the values V by its size")
    # What no input produces is taken off the output before the search.
    size = float(np.sum(layer.B**2)) or 1.0
    projected = layer.projected()
    floor = float(np.linalg.norm(layer.B - projected.B) / np.sqrt(size))
    given, layer = Given(projected, size, floor, precision, enough=precision**2 * size), projected
    rng = np.random.default_rng(random_state)
    tell = callback or (lambda done, total: None)
    if vocabulary is not None:
        table = Vocabulary(vocabulary, layer.d, layer.n)
        decoded = decode(layer, table, precision, given.enough, n_starts, rng, tell)
        x = layer.columns(layer.rows_with(decoded.rows)).reshape(-1)
        square, n_made = decoded.square, decoded.n_decodings
    elif isinstance(layer, BlockInversion) and layer.token_by_token:
        return recover_in_order(given, n_starts, rng, tell)
    else:
        excess = count(layer).excess
        found, steps = _anywhere(given, excess, n_starts, max_iter, rng, tell, client)
        x, square, n_made = found.best, found.square, found.n_starts
    report = Recovery(
        verdict="not recovered",
        message="",
        x=x.reshape(layer.shape),
        residual=float(np.hypot(np.sqrt(square / size), floor)),
        inputs=[],
        n_starts=n_made,
        identifiability=identifiable(layer, x if layer.n_unknowns <= MAX_DENSE else None),
        residual_floor=floor,
        certificate=certify_layer(layer, x),
    )
    if vocabulary is not None:
        return _judge_tokens(given, table, decoded, report)
    return _judge_anywhere(given, excess, found, steps, report)


def _anywhere(
    given: Given,
    excess: int,
    n_starts: int,
    max_iter: int,
    rng: np.random.Generator,
    callback: Callable[[float, int], Any],
    client: Any,
) -> tuple[Found, int]:
    """Return the inputs that a search finds, and the points of the paths that blocks follow beyond it."""
    layer = given.layer
    blocks = layer if isinstance(layer, BlockInversion) else None
    ahead = []
    if blocks is not None and blocks.sequential and blocks.m == blocks.d:
        start = blocks.rows_with(blocks.B[blocks.unknown, : blocks.d])
        ahead = [blocks.columns(InOrder(blocks, given.precision, 1, rng).complete(start, 0)[0]).reshape(-1)]
    found = search(
        layer, given.enough, n_starts, max_iter, rng, callback, client, until_first=excess > 0, ahead=ahead
    )
    return (found, 0) if blocks is None else with_paths(given, found)


def _judge_anywhere(given: Given, excess: int, found: Found, steps: int, report: Recovery) -> Recovery:
    """Return a report with the verdict on inputs that were searched for anywhere."""
    layer = given.layer
    report = replace(report, inputs=[x.reshape(layer.shape) for x in found.inputs], homotopy_steps=steps)
    verdict, message = _judge(given, report, excess)
    report = replace(report, verdict=verdict, message=message)
    return judge_blocks(given, report) if isinstance(layer, BlockInversion) else report


def _judge(given: Given, report: Recovery, excess: int) -> tuple[str, str]:
    """Return the verdict on inputs that were searched for anywhere, and the message."""
    at, found = report.identifiability, len(report.inputs)
    starts = f"{report.n_starts} start{'s'[: report.n_starts > 1]}"
    if not given.floor <= given.precision:
        return "not recovered", OUTSIDE.format(given.floor)
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
    if excess > 0 and count(given.layer, report.x, given.precision).excess <= 0:
        return "ambiguous", (
            "ambiguous (one input found): there are more equations than unknowns, but at this input too few "
            "of them move with some of the tokens, as where attention is sharp; known tokens that attend to "
            "these, a second output or a vocabulary would settle it"
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


def _judge_tokens(given: Given, vocabulary: Vocabulary, found: Decoded, report: Recovery) -> Recovery:
    """Return a report with the verdict on rows of a vocabulary, and the inputs that give the output."""
    layer, tokens, rivals = given.layer, found.tokens, found.rivals
    margins = np.sqrt(rivals.second_squares / given.size)
    left = f"{np.sqrt(found.square / given.size):.1e}"
    report = replace(report, tokens=tokens, margins=margins, equal_rows=rivals.equal)
    if not given.floor <= given.precision:
        return replace(report, message=OUTSIDE.format(given.floor))
    # A residual that is not a number is none that counts as zero.
    if not found.square <= given.enough:
        after = "all tuples" if found.exhausted else f"{found.n_decodings} decodings"
        message = (
            f"not recovered: no tuple found in the vocabulary (the nearest of {after} leaves {left} of the "
            "output); check that tokens come from it, use more starts, or give the output's precision"
        )
        return replace(report, message=f"{message}; {UNIFORM}" if _is_uniform(given, found) else message)
    inputs = []
    for rows in (found.rows, *rivals.rows):
        inputs.append(layer.columns(layer.rows_with(rows)))
    ordered = np.sort(tokens)
    moved = [bool(np.array_equal(np.sort(other), ordered)) for other in rivals.others]
    if any(moved) and _is_uniform(given, found):
        inputs = [inputs[0], *(x for x, same in zip(inputs[1:], moved, strict=True) if not same)]
        T = layer.rows_with(vocabulary.tokens(layer.unknown, ordered))
        if np.sum((layer.layer.forward(T).output - layer.B) ** 2) <= given.enough:
            inputs[0] = layer.columns(T)
        message = f"ambiguous: {UNIFORM}, only that the tokens are rows {listed(ordered)} of the vocabulary"
        message += ", or others" if len(inputs) > 1 else ""
        return replace(report, verdict="ambiguous", message=message, inputs=inputs)
    ties = np.flatnonzero(margins <= given.precision)
    if len(ties):
        i = ties[0]
        message = (
            f"ambiguous: {len(ties)} of {len(margins)} tokens may be exchanged; token {layer.unknown[i]} is "
            f"row {tokens[i]} or {rivals.seconds[i]} of the vocabulary"
        )
        return replace(report, verdict="ambiguous", message=message, inputs=inputs)
    if rivals.others:
        apart = np.flatnonzero(rivals.others[0] != tokens)
        message = (
            f"ambiguous: tokens {listed(layer.unknown[apart])} are rows {listed(tokens[apart])} of the "
            f"vocabulary, or {listed(rivals.others[0][apart])}"
        )
        return replace(report, verdict="ambiguous", message=message, inputs=inputs)
    message = f"recovered: {len(margins)} rows of the vocabulary reproduce the output (residual {left}), and "
    least = margins.min()
    message += (
        f"with any one of them exchanged at least {least:.1e} is left"
        if np.isfinite(least)
        else "it has no others"
    )
    same = []
    for position, token, equal in zip(layer.unknown, tokens, rivals.equal, strict=True):
        if len(equal) > 1:
            same.append(f"token {position} is row {token} (= {listed(np.setdiff1d(equal, token))})")
    message = "; ".join([message, *same[:SHOWN], *(["..."] if len(same) > SHOWN else [])])
    return replace(report, verdict="recovered", message=message, inputs=inputs)


def _is_uniform(given: Given, found: Decoded) -> bool:
    """Whether the logits of every query differ by no more than the precision, and the tokens show in nothing
    else.
    """
    layer = given.layer
    if not isinstance(layer.layer, AttentionLayer):
        return False
    at = layer.layer.forward(layer.rows_with(found.rows))
    mask = np.ones((layer.n, layer.n), dtype=bool) if layer.layer.mask is None else layer.layer.mask
    spread = 0.0
    for s in at.heads:
        S = s.R @ at.Tc.T
        highest, lowest = np.where(mask, S, -np.inf).max(axis=1), np.where(mask, S, np.inf).min(axis=1)
        spread = max(spread, float(np.max(highest - lowest)))
    return spread <= given.precision

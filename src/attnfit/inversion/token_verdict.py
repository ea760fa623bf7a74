"""The verdict on rows of a vocabulary."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attnfit.inversion.decoding import Decoded, decode
from attnfit.inversion.recovered import SHOWN, Given, Recovery, listed
from attnfit.inversion.vocabulary import Vocabulary
from attnfit.objectives.inverse_layer import AttentionLayer

Array = NDArray[np.float64]

UNIFORM = "the attention is uniform: order is not in the output"


def recover_tokens(
    given: Given,
    vocabulary: Vocabulary,
    n_starts: int,
    rng: np.random.Generator,
    callback: Callable[[float, int], Any],
) -> Recovery:
    """Return the rows of a vocabulary that give the output, judged."""
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
    given: Given, vocabulary: Vocabulary, found: Decoded, margins: Array
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
        message = f"ambiguous: {UNIFORM}, only that the tokens are rows {listed(ordered)} of the vocabulary"
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
            f"ambiguous: tokens {listed(layer.unknown[apart])} are rows {listed(tokens[apart])} of the "
            f"vocabulary, or {listed(rivals.others[0][apart])}"
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
        f"token {position} is row {token} (= {listed(np.setdiff1d(rows, token))})"
        for position, token, rows in zip(layer.unknown, tokens, rivals.equal, strict=True)
        if len(rows) > 1
    ]
    return "recovered", "; ".join([message, *same[:SHOWN], *(["..."] if len(same) > SHOWN else [])]), inputs


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

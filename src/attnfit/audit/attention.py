"""From the output of one attention to the tokens that it saw."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from attnfit.audit.checks import check_budget, check_states
from attnfit.audit.encoder_attention import encoder_search
from attnfit.audit.found import Found
from attnfit.audit.hidden import HiddenSearch
from attnfit.audit.lower_precision import as_error
from attnfit.audit.models.model import Model


def invert_attention(
    model: Model,
    output: Any,
    block: int = 0,
    *,
    error: Any = 0.0,
    reach: Any = None,
    known_prefix: Sequence[int] = (),
    budget: int | None = None,
) -> Found:
    """Recover the tokens from the output of a block's self-attention.

    In a causal model row t depends on the tokens up to t: the same search as for hidden states, with the
    attention in the place of the block, finds one token after the other. In an encoder all tokens see all,
    and the first block is inverted by the spans of its heads' values.

    Parameters
    ----------
    model : Model
    output : array_like, shape (n, width)
        What the attention adds, its output projection included.
    block : int
        Counted from 0; of an encoder only 0.
    error : array_like, broadcastable to output, or "run:bfloat16"
        Standard deviation of the error of each number; of a causal model also that they are of a run in
        bfloat16 (see `invert_hidden`).
    reach : array_like, broadcastable to output, optional
        The largest error of each number, of a causal model.
    known_prefix : sequence of int
        Tokens known to come first, of a causal model.
    budget : int, optional
        Largest number of candidates at a position, of a causal model.

    Returns
    -------
    Found

    Raises
    ------
    AuditError
        If the block is another than the first of an encoder, or the budget is not positive.
    ObservationMismatch
        If the output has another width or is not finite.
    """
    if model.kind == "encoder":
        return encoder_search(model, output, block, error).run(list(known_prefix))
    layer = f"attention:{block}"
    error, run = as_error(model, layer, error, len(output))
    observed, uncertainty = check_states(model, output, error, reach)
    uncertainty = replace(uncertainty, run=run)
    search = HiddenSearch(model, layer, observed, uncertainty, check_budget(budget, model))
    return search.run(list(known_prefix))

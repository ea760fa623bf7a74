"""Sums of losses as users write them: ``[("squared", 1.0), ("entropy", 0.01)]``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from attnfit.losses.elementwise import Total
from attnfit.losses.loss import Loss
from attnfit.losses.rescaled import SquaredRescaled
from attnfit.losses.softmax import LOSSES, Entropy, LinearCrossEntropy, SoftmaxLoss, find_loss
from attnfit.losses.sums import MixedSum, NormaliserSquares, NormaliserTotal, SoftmaxSum

# Losses of a softmax that are bounded on both sides, whose sign is a matter of taste.
EITHER_SIGN = (Entropy, LinearCrossEntropy)
# What only a sum has names for here.
UNNORMALISED: dict[str, Loss] = {"sparse": NormaliserTotal(), "rescaled": NormaliserSquares()}


def sum_of(terms: Sequence[Any], name: str) -> Loss:
    """Return the weighted sum of losses."""
    weights: dict[Loss, float] = {}
    for k, term in enumerate(terms):
        where = f"{name}[{k}]"
        if not (isinstance(term, list | tuple) and len(term) == 2):
            raise ValueError(f"{where} must be a loss and its weight, such as ('squared', 1.0), not {term!r}")
        part, weight = _part(term[0], where), _weight(term[1], where)
        weights[part] = weights.get(part, 0.0) + weight
    kept = {part: weight for part, weight in weights.items() if weight != 0.0}
    if not kept:
        raise ValueError(f"{name} has no term with a weight; give at least one, such as ('squared', 1.0)")
    for part, weight in kept.items():
        if weight < 0.0 and not isinstance(part, EITHER_SIGN):
            raise ValueError(
                f"{name} gives {_called(part)} the weight {weight:g}; weights must be positive, but for "
                "'entropy' and 'linear_cross_entropy', which are bounded on both sides"
            )
    softmax = [part for part in kept if isinstance(part, SoftmaxLoss)]
    others = [part for part in kept if not isinstance(part, SoftmaxLoss)]
    _require_common_constants(softmax, name)
    inner = SoftmaxSum(softmax, [kept[part] for part in softmax]) if softmax else None
    if not others:
        assert inner is not None
        return inner
    parts = others if inner is None else [inner, *others]
    return MixedSum(parts, [kept.get(part, 1.0) for part in parts])


def _part(loss: Any, where: str) -> Loss:
    """Return a term's loss in the form in which terms share a normaliser."""
    if isinstance(loss, str) and loss in UNNORMALISED:
        return UNNORMALISED[loss]
    if isinstance(loss, Total):
        return UNNORMALISED["sparse"]
    if isinstance(loss, SquaredRescaled) and loss.function == "exp":
        return UNNORMALISED["rescaled"]
    found = find_loss(loss, where) if isinstance(loss, str | Loss) else None
    if isinstance(found, SoftmaxLoss) and not isinstance(found, SoftmaxSum):
        return found
    known = ", ".join(map(repr, (*LOSSES, *UNNORMALISED)))
    raise ValueError(
        f"{where} must be one of {known}, or a loss of a softmax of your own, not {loss!r}: the "
        f"terms of a sum "
        "share the normaliser of exp(z)"
    )


def _weight(weight: Any, where: str) -> float:
    if isinstance(weight, int | float | np.number) and np.isfinite(weight):
        return float(weight)
    raise ValueError(f"the weight of {where} must be a finite number, not {weight!r}")


def _require_common_constants(parts: Sequence[Loss], name: str) -> None:
    """Refuse losses that need to know different things of a group's target."""
    known = {type(part).constants for part in parts} - {Loss.constants}
    if len(known) > 1:
        called = " and ".join(_called(part) for part in parts if type(part).constants is not Loss.constants)
        raise ValueError(f"{name} adds {called}, which need different constants of a group's target")


def _called(part: Loss) -> str:
    """Return the name of a loss, or of its class."""
    names = {id(loss): key for key, loss in (LOSSES | UNNORMALISED).items()}
    return repr(names.get(id(part), type(part).__name__))

"""Names of losses, and sums of them as users write them: ``[("squared", 1.0), ("entropy", 0.01)]``."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import entry_points
from typing import Any

import numpy as np

from attnfit.losses.elementwise import Total
from attnfit.losses.loss import Loss
from attnfit.losses.rescaled import SquaredRescaled
from attnfit.losses.softmax import LOSSES, Entropy, LinearCrossEntropy, LossName, SoftmaxLoss
from attnfit.losses.sums import MixedSum, NormaliserSquares, NormaliserTotal, SoftmaxSum

# Entry points of this group name a loss, or a function that returns one.
GROUP = "attnfit.losses"
# Losses of a softmax that are bounded on both sides, whose sign is a matter of taste.
EITHER_SIGN = (Entropy, LinearCrossEntropy)
# What only a sum has names for here.
UNNORMALISED: dict[str, Loss] = {"sparse": NormaliserTotal(), "rescaled": NormaliserSquares()}
LossTerms = Sequence[tuple[str | Loss, float]]
LossLike = LossName | Loss | LossTerms


def find_loss(loss: Any, name: str = "loss") -> Loss:
    """Return a loss, given itself, its name, or a weighted sum of losses.

    Parameters
    ----------
    loss : str, Loss or list of (str or Loss, float)
        One of `LOSSES`, a name registered under the entry point group ``attnfit.losses``, or a loss; of
        several, each with its weight, the weighted sum, in which "sparse" (``sum w exp(z)``) and "rescaled"
        (``0.5 sum w (exp(z) - alpha b)^2``, alpha the sum of ``exp(z)``) have names too. Weights are
        positive; those of "entropy" and "linear_cross_entropy", which are bounded on both sides, may be
        negative. The weights of a name that comes twice are added.
    name : str
        What the argument is called, for messages.

    Raises
    ------
    ValueError
        If there is no loss of that name, what is registered gives none, or terms cannot be added; the message
        names the term.

    Examples
    --------
    >>> from attnfit.losses import find_loss
    >>> find_loss("kl").convex
    True
    >>> find_loss([("cross_entropy", 1.0), ("sparse", 0.1)]).convex
    True
    >>> find_loss([("squared", 1.0), ("entropy", -0.01)]).convex
    False
    """
    if isinstance(loss, Loss):
        return loss
    if isinstance(loss, list | tuple):
        return _sum_of(loss, name)
    if isinstance(loss, str):
        if loss in LOSSES:
            return LOSSES[loss]
        for entry in entry_points(group=GROUP):
            if entry.name == loss:
                found = entry.load()
                found = found if isinstance(found, Loss) else found()
                if isinstance(found, Loss):
                    return found
                raise ValueError(f"{name}={loss!r} is registered, but gives no attnfit.losses.Loss")
    known = ", ".join(map(repr, LOSSES))
    raise ValueError(
        f"{name} must be one of {known}, an attnfit.losses.Loss, or a list of them with weights such as "
        f"[('squared', 1.0), ('entropy', 0.01)], not {loss!r}"
    )


def _sum_of(terms: Sequence[Any], name: str) -> Loss:
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

"""What the cache of a first block holds of a token whatever stands before it: one table tells how far apart
all tokens are, without a candidate being run.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from attnfit.audit.engine.prefix import Prefix
from attnfit.audit.errors import AuditError
from attnfit.audit.models.model import Layer, Model
from attnfit.audit.target import Target

# Forms of a first block, and what of them is the same at all positions: keys but for being turned, values.
STAYS = {"kv": ("kv_unrotated", "v"), "k": ("k_unrotated",), "v": ("v",)}
# What rounding may make of a difference, relative to the largest.
ROUNDING = 1e-4


@dataclass(frozen=True, eq=False)
class ContextFree:
    """Keys before they are turned, values, or both, of every token.

    Rotary embeddings turn the keys at one position all alike, which changes no distance: with D the
    difference of two rows and e the errors, the states of the two tokens are at least
    ``|D_keys|^2 / max(e_keys)^2 + sum (D_values / e_values)^2`` squared errors apart, after any prefix.

    Attributes
    ----------
    rows : Tensor, shape (n_vocabulary, k)
    n_keys : int
        Leading columns that are keys.
    """

    rows: Any
    n_keys: int

    def apart(self, target: Target, token: int) -> Any:
        """Return how far each token's state is from that of one token at least, as `Target.separations` are,
        shape (n_vocabulary,).
        """
        error = target.likely[len(target.likely) - self.rows.shape[1] :]
        differences = self.rows - self.rows[token]
        keys, values = differences[:, : self.n_keys], differences[:, self.n_keys :] / error[self.n_keys :]
        squares = values.square().sum(1)
        if self.n_keys:
            squares += keys.square().sum(1) / error[: self.n_keys].max().square()
        return target.in_errors(squares)

    def holds(self, tokens: list[int], states: Any, place: int) -> bool:
        """Return whether the states tried are as far from one of them as the table says: they are not where
        the model adds positions to embeddings, or does more to keys than turn them.
        """
        own, seen = self.rows[tokens], states[:, states.shape[1] - self.rows.shape[1] :]
        own, seen = own - own[place], seen - seen[place]
        parts = [(own[:, self.n_keys :], seen[:, self.n_keys :])]
        if self.n_keys:
            parts.append(tuple(each[:, : self.n_keys].norm(dim=1) for each in (own, seen)))
        return all(bool((a - b).abs().max() <= ROUNDING * b.abs().max()) for a, b in parts if a.numel())


def context_free(model: Model, layer: Layer) -> ContextFree | None:
    """Return the table of what a first block caches; None of other layers. It is made once a model."""
    kind, _, block = str(layer).partition(":")
    if kind not in STAYS or block != "0":
        return None
    if layer not in model.context_free:
        model.context_free[layer] = _made(model, STAYS[kind])
    found: ContextFree | None = model.context_free[layer]
    return found


def _made(model: Model, kinds: tuple[str, ...]) -> ContextFree | None:
    for kind in kinds:
        try:
            rows = Prefix(model, f"{kind}:0").candidates(range(model.n_vocabulary))
        except AuditError:
            # How positions turn keys is not known: values alone tell less, not nothing.
            continue
        n_values = model.width_of("v:0") if "v" in kind else 0
        return ContextFree(rows, rows.shape[1] - n_values)
    return None

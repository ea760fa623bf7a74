"""Keys and values of a block as they stand in the cache: what leaks, and how it is inverted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from attnfit.audit.access import Search
from attnfit.audit.checks import check_budget, check_states, real_numbers
from attnfit.audit.errors import AuditError, ObservationMismatch
from attnfit.audit.hidden import HiddenSearch
from attnfit.audit.models.model import Layer, Model
from attnfit.audit.result import InversionResult
from attnfit.audit.states import InsideBlock
from attnfit.audit.uncertainty import Uncertainty

if TYPE_CHECKING:
    from attnfit.audit.observation import Observation

# Keys and values have fewer numbers than embeddings: tokens compared before one of them is claimed.
N_RIVALS = 16
HINT = (
    "; keys count as cached, turned by their positions from {first} on and with their columns in the order "
    "of the transformers library: see rotated and first_position"
)


class KeysAndValues(InsideBlock):
    """Keys and values of a block, all key heads in one row a token."""

    kind, counts_positions = "kv", True

    @property
    def description(self) -> str:
        """What leaves, in words."""
        return f"the cached keys and values of block {self.place}"

    def search(self, model: Model, observation: Observation, budget: int) -> Search:
        """Return the search of states, with what enters the cache in their place."""
        if observation.dropped or model.kind == "encoder":
            return super().search(model, observation, budget)
        states, uncertainty = self.states(model, observation)
        return cache_search(model, self.layer(model), states, uncertainty, budget)


class Keys(KeysAndValues):
    """Keys of a block."""

    kind = "k"

    @property
    def description(self) -> str:
        """What leaves, in words."""
        return f"the cached keys of block {self.place}"


class Values(KeysAndValues):
    """Values of a block."""

    kind, counts_positions = "v", False

    @property
    def description(self) -> str:
        """What leaves, in words."""
        return f"the cached values of block {self.place}"


def cache_search(
    model: Model, layer: Layer, states: Any, uncertainty: Uncertainty, budget: int
) -> HiddenSearch:
    """Return the search for the tokens behind what was cached."""
    hint = HINT.format(first=model.first_position)
    return HiddenSearch(model, layer, states, uncertainty, budget, n_rivals=N_RIVALS, hint=hint)


def invert_kv(
    model: Model,
    keys: Any = None,
    values: Any = None,
    block: int = 0,
    *,
    rotated: bool = True,
    first_position: int = 0,
    error: Any = 0.0,
    error_bound: Any = None,
    known_prefix: Sequence[int] = (),
    budget: int | None = None,
) -> InversionResult:
    """Recover the tokens from the keys and values that a block of a causal model has cached.

    They are linear in the normed state that enters the block, ``[W_K; W_V] Norm(x)``, but for what the model
    does to keys afterwards; the search is that for hidden states, and compares what the model itself would
    have cached for each candidate. In the first block that is a row of a table for each token.

    Parameters
    ----------
    model : Model
    keys, values : array_like, shape (key heads, n, head width) or (n, key heads * head width)
        Of positions from the first on; one of them may be missing. A leading axis of length 1, as a batch
        has, is dropped.
    block : int
        Counted from 0.
    rotated : bool, default=True
        Whether keys are as cached, turned by their positions (rotary embeddings), or as before that.
    first_position : int
        Position of the first token.
    error : float or array_like
        Standard deviation of the error of each number; an array must go with rows of keys, then values, a
        row a token.
    error_bound : float or array_like, optional
        The largest error of each number, as half a step where numbers were rounded.
    known_prefix : sequence of int
        Tokens known to come first.
    budget : int, optional
        Largest number of candidates at a position; the size of the vocabulary and more unless given.

    Returns
    -------
    InversionResult

    Raises
    ------
    AuditError
        If the model is an encoder, has no such block, or keeps no cache; if keys are to be read before they
        are turned and how the model turns them is not known.
    ObservationMismatch
        If keys or values have another shape, are not finite, or are no real numbers.

    Examples
    --------
    >>> from attnfit import audit
    >>> tiny = audit.load("tiny")
    >>> seen = audit.observe(tiny, tiny.private_texts[0], "kv:1")
    >>> keys, values = seen.array[:, : tiny.width], seen.array[:, tiny.width :]
    >>> audit.invert_kv(tiny, keys, values, block=1).text == tiny.private_texts[0]
    True
    """
    if model.kind != "causal":
        raise AuditError(f"model {model.name!r} is an encoder: it caches no keys and values")
    if keys is None and values is None:
        raise ObservationMismatch("keys and values are both missing: give one of them")
    form = KeysAndValues if values is not None and keys is not None else Keys if values is None else Values
    model = model.at(first_position, keys=form.counts_positions)
    layer = f"{form.kind}{'' if rotated or keys is None else '_unrotated'}:{block}"
    given = {"keys": keys, "values": values}
    rows = {name: as_rows(name, array) for name, array in given.items() if array is not None}
    if len({len(array) for array in rows.values()}) > 1:
        raise ObservationMismatch(
            f"keys have {len(rows['keys'])} positions and values {len(rows['values'])}: give the same tokens"
        )
    array = np.concatenate(list(rows.values()), axis=1)
    states, uncertainty = check_states(model, array, error, error_bound, layer=layer)
    search = cache_search(model, layer, states, uncertainty, check_budget(budget, model))
    return search.run(list(known_prefix))


def as_rows(name: str, given: Any) -> NDArray[np.float32]:
    """Return keys or values of all heads as one row a token.

    Raises
    ------
    ObservationMismatch
        If they have another shape.
    """
    array = real_numbers(name, given)
    if array.ndim == 4 and len(array) == 1:
        array = array[0]
    if array.ndim == 3:
        array = array.transpose(1, 0, 2).reshape(array.shape[1], -1)
    if array.ndim != 2 or not array.size:
        raise ObservationMismatch(
            f"{name} must have shape (key heads, n, head width) or (n, key heads * head width), not "
            f"{np.shape(given)}"
        )
    return array

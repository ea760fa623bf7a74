"""What enters an attention and what it writes into its cache, as if modules of the model gave it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from transformers import DynamicCache

from attnfit.audit.errors import AuditError

# What the transformers library calls a cache since version 5.24, before, and in some attentions.
CACHES = ("cache", "past_key_values", "layer_past")


def arguments(base: Any) -> frozenset[str]:
    """Return the names of what a forward pass takes."""
    return frozenset(inspect.signature(base.forward).parameters)


def cache_argument(base: Any) -> str | None:
    """Return what a forward pass calls the keys and values of tokens before; None where it takes none."""
    return next((name for name in CACHES if name in arguments(base)), None)


class CachedPart:
    """Keys, values or both of an attention: stands where a module is expected whose output is observed.

    What is read is what the model itself writes, so that biases, norms, rotation and heads that share keys
    need not be known. All heads stand in one row a token, keys first.

    Parameters
    ----------
    attention : torch.nn.Module
    family : str
    keys, values : bool
        Which of them are read.
    rotated : bool
        Whether keys are read as cached, or as they are before their positions turn them.
    """

    def __init__(
        self, attention: Any, family: str, *, keys: bool = True, values: bool = True, rotated: bool = True
    ) -> None:
        self.attention, self._family = attention, family
        self._keys, self._values, self._rotated = keys, values, rotated
        self._order = list(inspect.signature(attention.forward).parameters)
        known = cache_argument(attention)
        if known is None:
            raise AuditError(f"the attention of {family} keeps no keys and values in a cache")
        self._cache = known

    def register_forward_hook(self, hook: Callable[..., Any], *, with_kwargs: bool = False) -> Any:
        """Have a hook called with what is written, as by a module; what it returns is written instead."""

        def called(args: Any, kwargs: Any, out: Any) -> Any:
            return hook(self, args, kwargs, out) if with_kwargs else hook(self, args, out)

        return self.attention.register_forward_pre_hook(partial(self._watch, called), with_kwargs=True)

    def _watch(self, called: Any, _: Any, args: Any, kwargs: Any) -> tuple[Any, Any]:
        named = dict(zip(self._order, args, strict=False)) | kwargs
        cache = named.get(self._cache)
        watched = _Watched(
            DynamicCache() if cache is None else cache, partial(self._written, called, args, kwargs)
        )
        given = kwargs | dict(zip(self._order, args, strict=False)) | {self._cache: watched}
        return (), given if self._rotated else given | self._unturned(given)

    def _unturned(self, given: dict[str, Any]) -> dict[str, Any]:
        """Return arguments that turn nothing: an angle of zero at every position."""
        if isinstance(given.get("position_embeddings"), tuple):
            cos, sin = given["position_embeddings"]
            return {"position_embeddings": (torch.ones_like(cos), torch.zeros_like(sin))}
        raise AuditError(f"how positions turn the keys of {self._family} is not known: give them as cached")

    def _written(self, called: Any, args: Any, kwargs: Any, keys: Any, values: Any) -> tuple[Any, Any]:
        """Show what is written, and return what is to be written."""
        given = called(args, kwargs, self._row(keys, values))
        if given is None:
            return keys, values
        rest = given[0] if isinstance(given, tuple) else given
        parts = [keys] * self._keys + [values] * self._values
        sizes = [part.shape[1] * part.shape[3] for part in parts]
        shaped = [
            row.unflatten(-1, (part.shape[1], part.shape[3])).transpose(1, 2)
            for row, part in zip(rest.split(sizes, -1), parts, strict=True)
        ]
        return (shaped[0] if self._keys else keys, shaped[-1] if self._values else values)

    def _row(self, keys: Any, values: Any) -> Any:
        parts = [keys] * self._keys + [values] * self._values
        return torch.cat([part.transpose(1, 2).flatten(2) for part in parts], -1)


class EnteringPart:
    """What enters an attention, as if a module before it gave it.

    Parameters
    ----------
    attention : torch.nn.Module
    """

    def __init__(self, attention: Any) -> None:
        self.attention = attention

    def register_forward_hook(self, hook: Callable[..., Any], *, with_kwargs: bool = False) -> Any:
        """Have a hook called with it."""

        def entering(_: Any, args: Any, kwargs: Any) -> None:
            state = args[0] if args else kwargs["hidden_states"]
            hook(self, args, kwargs, state) if with_kwargs else hook(self, args, state)

        return self.attention.register_forward_pre_hook(entering, with_kwargs=True)


class _Watched:
    """A cache that shows what is written to it."""

    def __init__(self, cache: Any, written: Callable[[Any, Any], tuple[Any, Any]]) -> None:
        self._cache, self._written = cache, written

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)

    def update(self, keys: Any, values: Any, *rest: Any, **more: Any) -> Any:
        """Write what the hook makes of it; where the hook ends the pass, it is written as it is."""
        try:
            keys, values = self._written(keys, values)
        except BaseException:
            self._cache.update(keys, values, *rest, **more)
            raise
        return self._cache.update(keys, values, *rest, **more)

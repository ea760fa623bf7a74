"""Which pages there are."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from difflib import get_close_matches
from importlib import import_module

from attnfit.reproduction.page import Page

_ROOMS = {
    "rescaled-hyperbolic": "rescaled_hyperbolic",
    "weight-shifting": "weight_shifting",
    "tensor-trick": "tensor_trick",
    "two-layer": "two_layer",
    "layer-recovery": "layer_recovery",
    "one-layer": "one_layer",
}
NAMES = tuple(_ROOMS)


def reproduce(name: str, *, quick: bool = False) -> Page:
    """Measure what a paper claims.

    Parameters
    ----------
    name : str
        One of `NAMES`.
    quick : bool
        Smaller instances and fewer of them.

    Returns
    -------
    Page

    Raises
    ------
    ValueError
        If there is no such page; the message names close ones.
    """
    if name not in _ROOMS:
        close = get_close_matches(name, NAMES, n=3, cutoff=0.4) or NAMES
        raise ValueError(f"there is no paper {name!r}; did you mean {', '.join(close)}?")
    run: Callable[[bool], Page] = import_module(f"attnfit.reproduction.{_ROOMS[name]}").run
    began = time.perf_counter()
    return replace(run(quick), seconds=time.perf_counter() - began)

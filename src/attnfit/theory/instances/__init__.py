"""Arrays on which bounds are evaluated, given or random."""

from __future__ import annotations

from typing import Any

import numpy as np

from attnfit.theory.instances.facts import Facts
from attnfit.theory.instances.recovery import Recovery
from attnfit.theory.instances.regression import Regression
from attnfit.theory.instances.sampling import FAMILIES, AnyInstance
from attnfit.theory.instances.step import Step
from attnfit.theory.instances.two_layer import TwoLayer

__all__ = ["Facts", "Recovery", "Regression", "Step", "TwoLayer", "random"]


def random(
    kind: str,
    random_state: Any = None,
    *,
    n: int = 4,
    d: int = 2,
    R: float = 4.01,
    scale: float = 1.0,
    **options: Any,
) -> AnyInstance:
    """Draw an instance that meets the papers' assumptions.

    Parameters
    ----------
    kind : {"regression", "two_layer", "recovery", "newton", "facts"}
    random_state : int, Generator or None
    n, d : int
        Rows (in all groups together), shares, tokens or entries; and columns.
    R : float
        The bound of the assumptions.
    scale : float
        Of the entries before they are scaled within R.
    **options
        "regression": ``groups`` (1) and ``function`` ("exp"). "two_layer": ``m`` (2) and ``activation``
        ("tanh"; None for a random wave). "newton": ``accuracy`` (0.01) and ``k`` (10).

    Raises
    ------
    ValueError
        If there is no such kind.

    Examples
    --------
    >>> from attnfit import theory
    >>> instance = theory.instances.random("regression", 0, n=6, groups=3)
    >>> theory.check("TT-7.4", instance).holds
    True
    """
    if kind not in FAMILIES:
        raise ValueError(f"kind must be one of {', '.join(map(repr, FAMILIES))}, not {kind!r}")
    family = FAMILIES[kind](n, d, **options)
    return family.build(family.arrays(np.random.default_rng(random_state), scale), R)

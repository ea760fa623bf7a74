"""Columns of numbers that are none: row numbers, identifiers, and codes in the place of shares."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attnfit.cli.errors import InputError

Array = NDArray[np.float64]

NAMELESS = re.compile(r"|Unnamed: \d+(_level_\d+)?|\.\.\.\d+|__index_level_\d+__")
IDENTIFIER = re.compile(r"(?i:(^|.*[_\s.-])ids?)|.*[a-z]I[dD]s?")
# Codes of alternatives are few, and occur again and again.
MAX_CODE = 20
# Fewer rows than this are all different by chance.
FEW = 3
# Levels of a dose may be sorted too, but there are not that many.
MANY = 10


def suspicion(name: str, values: Array, groups: NDArray[Any] | None) -> str | None:
    """Return why a column is no feature unless it is named as one; None where it may be one."""
    if NAMELESS.fullmatch(name):
        return "no name"
    known = values[~np.isnan(values)]
    if not len(known):
        return "no values"
    if len(known) < FEW or not np.isfinite(known).all() or (known != np.rint(known)).any():
        return None
    counted = np.arange(len(values))
    if len(known) == len(values) and ((values == counted).all() or (values == counted + 1).all()):
        return "row numbers"
    n_different = len(np.unique(known))
    if n_different == len(known):
        return "whole numbers that are all different"
    if IDENTIFIER.fullmatch(name):
        return "an identifier by its name"
    if len(known) < len(values):
        return None
    if groups is not None and _number_within(values, groups):
        return "numbers of the rows of each group"
    steps = np.diff(values)
    if values[0] in (0.0, 1.0) and n_different >= MANY and bool(np.isin(steps, (0.0, 1.0)).all()):
        return "numbers of blocks of rows"
    if n_different >= FEW and values[0] in (0.0, 1.0) and (values == counted % n_different + values[0]).all():
        return "row numbers that begin again and again"
    return None


def _number_within(values: Array, groups: NDArray[Any]) -> bool:
    """Whether rows are numbered from 0 or 1 in each group, in any order; groups of two may well have a 0/1
    column.
    """
    numbers = np.unique(groups, return_inverse=True)[1]
    sizes = np.bincount(numbers)
    if len(sizes) < 2 or sizes.max() < FEW:
        return False
    ordered = values[np.lexsort((values, numbers))]
    within = np.arange(len(values)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    return bool((ordered == within).all() or (ordered == within + 1).all())


def refuse_codes(target: Array, name: str, names: Sequence[str]) -> None:
    """Raise InputError where the target holds the number of the alternative chosen, not a share.

    Parameters
    ----------
    target : ndarray
        Of all rows, or of many.
    name : str
        Its column.
    names : sequence of str
        All columns: those of a wide table repeat attributes by alternative.
    """
    found = np.unique(target)
    whole = bool((found == np.rint(found)).all())
    if not whole or not 2 <= found[-1] <= MAX_CODE or found[0] not in (0.0, 1.0):
        return
    if len(found) != found[-1] - found[0] + 1 or len(target) < 3 * len(found):
        return
    wide = _attributes(names)
    seen = f" ({', '.join(wide[:3])} are one alternative each)" if wide else ""
    raise InputError(
        f"Column {name!r} holds whole numbers from {found[0]:g} to {found[-1]:g}, not shares. If they say "
        f"which alternative a row's traveller chose, the table is wide{seen}: give it one row an "
        "alternative, with 1 for the one chosen, 0 for the others and a column that names the traveller "
        "(--group). If they count choices, add --counts"
    )


def _attributes(names: Sequence[str]) -> list[str]:
    """Return columns that hold one attribute for several alternatives, as in TRAIN_TT, CAR_TT, SM_TT."""
    kinds = defaultdict(list)
    for name in names:
        for pattern in (r"(?P<alt>[^_.]+)[_.](?P<what>.+)", r"(?P<what>.+)[_.](?P<alt>[^_.]+)"):
            match = re.fullmatch(pattern, name)
            if match:
                kinds[pattern, match["what"]].append(name)
    return max(kinds.values(), key=len, default=[]) if any(len(k) > 1 for k in kinds.values()) else []

"""How much memory a fit takes, and what to do where that is too much."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from typing import Any

UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
BINARY = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes that a fit is expected to take at its peak; prints as a table.

    Attributes
    ----------
    parts : dict of int
        Bytes by what they are for; "in memory already" is what the process holds now, data included.
    """

    parts: dict[str, int]

    @property
    def total(self) -> int:
        """Sum of all parts, in bytes."""
        return sum(self.parts.values())

    @property
    def needed(self) -> int:
        """Bytes beyond what the process holds already."""
        return self.total - self.parts.get(HELD, 0)

    def __str__(self) -> str:
        width = max(map(len, self.parts))
        lines = [f"{name:<{width}}  {size / 1e6:>10,.1f} MB" for name, size in self.parts.items()]
        return "\n".join([*lines, f"{'total':<{width}}  {self.total / 1e6:>10,.1f} MB"])

    def require(self, limit: int) -> None:
        """Raise MemoryError, with the remedy, where the fit does not fit.

        Raises
        ------
        MemoryError
        """
        if self.total <= limit:
            return
        name, size = max(self.parts.items(), key=lambda item: item[1])
        remedy = REMEDIES.get(name, "raise memory_limit")
        raise MemoryError(
            f"the fit takes about {self.total / 1e6:,.0f} MB; memory_limit is {limit / 1e6:,.0f} MB; "
            f"{name} is the largest part, {size / 1e6:,.0f} MB: {remedy}"
        )


HELD = "in memory already"
CURVATURE = "Hessian and its factors"
SAMPLES = "rows drawn for the start"
DRAWN = "rows drawn for the curvature"
READING = "blocks being read"
WORKING = "blocks being worked on"
STORED = "stored blocks being decoded"

REMEDIES = {
    HELD: "pass data on disk, opened by attnfit.designs.open_source, or raise memory_limit",
    CURVATURE: "use solver=Newton(hessian='matrix_free'), or raise memory_limit",
    STORED: "store the data in smaller chunks or row groups, or raise memory_limit",
}


def parse_size(size: Any) -> int:
    """Return a size in bytes: a number, or text such as ``"1GB"`` (10^9) or ``"1GiB"`` (2^30).

    Raises
    ------
    ValueError
        If it is neither, or not positive.
    """
    found = re.fullmatch(
        r"\s*([0-9.]+(?:e[0-9]+)?)\s*([KMGT]?)(I?)B?\s*", str(size).upper().replace("E", "e")
    )
    try:
        number = float(found[1]) if found else 0.0
    except ValueError:
        number = 0.0
    if found is None or number <= 0 or (found[3] and not found[2]):
        raise ValueError(
            f"memory_limit must be a size such as '1GB', '500MB' or a number of bytes, not {size!r}"
        )
    return int(number * (BINARY if found[3] else UNITS)[found[2]])


def held_now() -> int:
    """Return the bytes of memory that this process holds; zero where the system does not tell."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError, AttributeError):
        return 0

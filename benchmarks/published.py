"""The published algorithm measured: ``python -m benchmarks.published [--quick]``.

The tables of ``attnfit reproduce rescaled-hyperbolic``: spectral errors of drawn rows against the failure
probability, contraction against the theorem, and what each part of a step costs.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time

from threadpoolctl import threadpool_limits

from attnfit.reproduction import reproduce
from attnfit.reproduction.page import Table
from benchmarks.report import table, write

HELD = {True: "yes", False: "no", None: "open"}


def shown(cell: object) -> str:
    """Three digits of a number."""
    return f"{cell:.3g}" if isinstance(cell, float) else f"{cell:,}" if isinstance(cell, int) else str(cell)


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    quick = parser.parse_args().quick
    began = time.perf_counter()
    with threadpool_limits(1):
        page = reproduce("rescaled-hyperbolic", quick=quick)
    claims = [[c.claimed, c.measured, HELD[c.held]] for c in page.claims]
    sections = [
        f"## Claims\n\n{page.summary} One thread, {time.perf_counter() - began:.0f} s.",
        table(["the paper says", "measured here", "held"], claims),
    ]
    for part in page.parts:
        if isinstance(part, Table):
            rows = [[shown(cell) for cell in row] for row in part.rows]
            sections.append(f"## {part.title}\n\n{table([name.strip() for name in part.head], rows)}")
    path = write(
        f"published{'-quick' if quick else ''}",
        f"python -m benchmarks.published {shlex.join(sys.argv[1:])}".strip(),
        sections,
    )
    print(path.read_text())


if __name__ == "__main__":
    main()

"""``attnfit warmup``: compile what large fits need, once."""

from __future__ import annotations

import time
from typing import Annotated

import numpy as np
import typer

from attnfit.cli.console import stdout
from attnfit.cli.errors import Debug, one_sentence


@one_sentence
def warmup(
    everything: Annotated[
        bool, typer.Option("--all", help="Every loss, precision and storage: six times as long.")
    ] = False,
    debug: Debug = False,
) -> None:
    """Compile the loops of large fits and keep them on disk: for images, so that no first fit waits."""
    from attnfit.objectives.compiled import warm_up
    from attnfit.solvers.simplex_loop import over_simplex

    began = time.perf_counter()
    n = warm_up(everything) + 1
    over_simplex(np.ones((1, 1, 1)), np.ones((1, 1)), np.ones(1), 1)
    stdout().say(f"{n} loops compiled in {time.perf_counter() - began:.0f} s.")

"""``attnfit bench``: run the repository's benchmarks."""

from __future__ import annotations

import subprocess
import sys
from itertools import takewhile
from pathlib import Path
from typing import Annotated

import typer

from attnfit.cli.errors import Debug, Exit, InputError, one_sentence


@one_sentence
def bench(
    names: Annotated[
        list[str],
        typer.Argument(help="Tables to run, or 'all'; further options go to the benchmarks (--quick)."),
    ],
    debug: Debug = False,
) -> None:
    """Time attnfit against its peers (in a checkout of its repository)."""
    if not Path("benchmarks", "run.py").is_file():
        raise InputError(
            "There is no benchmarks/ folder here, and the installed package has none: "
            "change to a checkout of attnfit's source repository and run this again"
        )
    tables = list(takewhile(lambda name: not name.startswith("-"), names))
    for table in tables:
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.run", table, *names[len(tables) :]], check=False
        )
        if done.returncode:
            # argparse has the same code for a wrong option.
            bad = done.returncode == Exit.BAD_INPUT
            raise typer.Exit(Exit.BAD_INPUT if bad else Exit.BAD_NEWS)

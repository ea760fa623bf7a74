"""``attnfit example``: a data set of the package as CSV, to try the commands on."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Annotated

import typer

from attnfit.cli.console import stdout
from attnfit.cli.errors import Debug, InputError, one_sentence, suggest
from attnfit.cli.output import STREAM, check_paths, put

# The file of each, what it holds, and options that fit it.
EXAMPLES = {
    "cars": (
        "car_shares.csv",
        "shares of 2,217 car-years in 20 yearly markets",
        '--formula "share ~ hpwt + air + mpd + space + prices" --group year --outside-good',
    ),
    "flows": (
        "austrian_flows.csv",
        "72 migration flows between the 9 regions of Austria",
        '--formula "flow ~ log(destination_mass) + distance" --group origin --counts',
    ),
    "travel": (
        "travel_mode.csv",
        "210 travellers and 4 modes: 1 air, 2 train, 3 bus, 4 car",
        '--formula "choice ~ gc + ttme + C(mode)" --group traveller',
    ),
}


@one_sentence
def example(
    name: Annotated[
        str | None, typer.Argument(help=f"One of {', '.join(EXAMPLES)}; without it they are listed.")
    ] = None,
    output: Annotated[Path, typer.Option(help="File to write.", show_default="print CSV")] = STREAM,
    debug: Debug = False,
) -> None:
    """Print a data set that ships with attnfit as CSV."""
    if name is None:
        for one, (_, what, options) in EXAMPLES.items():
            stdout().say(f"{one}: {what}; attnfit fit softmax {one}.csv {options}")
        return
    if name not in EXAMPLES:
        raise InputError(f"There is no example {name!r}{suggest(name, EXAMPLES)}")
    check_paths({}, {"--output": output})
    put(output, (files("attnfit.datasets") / EXAMPLES[name][0]).read_text(encoding="utf-8"))

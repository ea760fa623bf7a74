"""The commands and what they have in common."""

from __future__ import annotations

from typing import Annotated

import typer

from attnfit import __version__
from attnfit.cli.bench import bench
from attnfit.cli.demo import demo
from attnfit.cli.fit import fit
from attnfit.cli.predict import predict

app = typer.Typer(
    help="Fit, certify and apply models whose output is a softmax or an exponential.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"attnfit {__version__}")
        raise typer.Exit


@app.callback()
def attnfit(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Fit, certify and apply models whose output is a softmax or an exponential."""


app.command()(fit)
app.command()(predict)
app.command()(demo)
app.command(context_settings={"ignore_unknown_options": True})(bench)

"""The commands and what they have in common."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from attnfit.cli.attention import fit_attention
from attnfit.cli.audit import audit
from attnfit.cli.bench import bench
from attnfit.cli.console import problem
from attnfit.cli.demo import demo
from attnfit.cli.errors import suggest
from attnfit.cli.fit import command_for
from attnfit.cli.invert import invert
from attnfit.cli.mixture import fit_mixture
from attnfit.cli.models import OPTIONS
from attnfit.cli.predict import predict
from attnfit.cli.reproduce import reproduce
from attnfit.version import __version__

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


class Models(TyperGroup):
    """The models that can be fitted; another name is answered in one sentence."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Find the command of a model."""
        if args and not args[0].startswith("-") and args[0] not in self.commands:
            problem(f"There is no model {args[0]!r}{suggest(args[0], self.commands)}")
            raise typer.Exit(1)
        return super().resolve_command(ctx, args)


fits = typer.Typer(cls=Models, no_args_is_help=True, context_settings=app.info.context_settings)
for name in OPTIONS:
    fits.command(name, help=f"Fit the {name} model to the columns of a file and print its coefficients.")(
        command_for(name)
    )
fits.command("attention")(fit_attention)
fits.command("mixture")(fit_mixture)
app.add_typer(fits, name="fit", help="Fit a model: softmax, exponential, rescaled, attention or mixture.")
app.command()(predict)
app.command()(invert)
app.command()(audit)
app.command()(reproduce)
app.command()(demo)
app.command(context_settings={"ignore_unknown_options": True})(bench)

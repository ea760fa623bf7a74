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
from attnfit.cli.elasticities import elasticities_command
from attnfit.cli.errors import EXIT_CODES, Exit, suggest
from attnfit.cli.example import example
from attnfit.cli.fit import command_for
from attnfit.cli.invert import invert
from attnfit.cli.memorised import canaries_command, memorised_command
from attnfit.cli.mixture import fit_mixture
from attnfit.cli.models import OPTIONS
from attnfit.cli.origin import TYPED
from attnfit.cli.predict import predict
from attnfit.cli.reproduce import reproduce
from attnfit.cli.score import score_command
from attnfit.cli.warmup import warmup
from attnfit.version import __version__

SETTINGS: dict[str, Any] = {"help_option_names": ["-h", "--help"]}


class Commands(TyperGroup):
    """Commands that end with the exit codes of the table, however they end."""

    def parse_args(self, ctx: Any, args: list[str]) -> Any:
        """Keep what was typed, which a report repeats."""
        TYPED.set(tuple(args))
        return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        """Run the command."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            raise typer.Exit(Exit.STOPPED) from None


class Models(TyperGroup):
    """The models that can be fitted; another name is answered in one sentence."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Find the command of a model."""
        if args and not args[0].startswith("-") and args[0] not in self.commands:
            problem(f"There is no model {args[0]!r}{suggest(args[0], self.commands)}")
            raise typer.Exit(Exit.BAD_INPUT)
        return super().resolve_command(ctx, args)


def _group(kind: type[TyperGroup], **options: Any) -> typer.Typer:
    return typer.Typer(
        cls=kind,
        no_args_is_help=True,
        # Plain help: it is wrapped at spaces, and a bracket in it is a bracket.
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        context_settings=SETTINGS,
        epilog=EXIT_CODES,
        **options,
    )


app = _group(Commands, help="Fit, certify and apply models whose output is a softmax or an exponential.")


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"attnfit {__version__}")
        raise typer.Exit


@app.callback(epilog=EXIT_CODES)
def attnfit(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Fit, certify and apply models whose output is a softmax or an exponential."""


fits = _group(Models)
for name in OPTIONS:
    fits.command(
        name,
        help=f"Fit the {name} model to the columns of a file and print its coefficients.",
        epilog=EXIT_CODES,
    )(command_for(name))
fits.command("attention", epilog=EXIT_CODES)(fit_attention)
fits.command("mixture", epilog=EXIT_CODES)(fit_mixture)
app.add_typer(
    fits,
    name="fit",
    help="Fit a model: softmax, exponential, poisson, rescaled, attention or mixture.",
    epilog=EXIT_CODES,
)
ANALYST = (predict, score_command, elasticities_command, example)
MODELS = (audit, memorised_command, canaries_command)
for command in (*ANALYST, invert, *MODELS, reproduce, demo, warmup):
    app.command(epilog=EXIT_CODES)(command)
app.command(context_settings={"ignore_unknown_options": True, **SETTINGS}, epilog=EXIT_CODES)(bench)

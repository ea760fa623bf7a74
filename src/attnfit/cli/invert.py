"""``attnfit invert``: the input of an attention layer from its output."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Annotated, Any

import numpy as np
import typer

from attnfit.cli.attention import read_array, require_npy
from attnfit.cli.console import Grid, Literal, note
from attnfit.cli.errors import Debug, Exit, InputError, called, one_sentence
from attnfit.cli.output import check_paths, put, put_json, require_input, results
from attnfit.cli.progress import FitProgress
from attnfit.cli.report import certificate_radius, print_whole
from attnfit.writing import rendered

# More tokens than this are for a file, not for a screen.
MAX_SHOWN = 40
# What rounding leaves of an output, by its number type; the library's defaults are for float64.
PRECISIONS = {"float16": 1e-3, "float32": 1e-6}


@one_sentence
def invert(
    layer: Annotated[
        Path,
        typer.Argument(help="Weights: W and V, or W_Q, W_K, W_V, W_O (.safetensors).", metavar="LAYER"),
    ],
    output: Annotated[
        Path, typer.Argument(help="Output B of the layer, one row a token (.npy).", metavar="OUTPUT")
    ],
    embedding: Annotated[
        Path | None,
        typer.Option(
            help="Vocabulary: the rows that a token may be, N x d (n x N x d: those of each position) (.npy)."
        ),
    ] = None,
    known: Annotated[
        Path | None, typer.Option(help="Known tokens as columns, d x n, NaN where unknown (.npy).")
    ] = None,
    precision: Annotated[
        float | None,
        typer.Option(help="Relative error of the output; by default that of its number type."),
    ] = None,
    starts: Annotated[int | None, typer.Option(min=1, help="Largest number of starts.")] = None,
    mask: Annotated[str | None, typer.Option(help="causal: a token sees no later one.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of random starts.")] = 0,
    save: Annotated[Path | None, typer.Option(help="Write all tokens here, d x n (.npy).")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the spectrum of the Jacobian here.")] = None,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the report here.")] = None,
    debug: Debug = False,
) -> None:
    """Recover the tokens that gave an attention output. Exit code 3: not, or not for certain."""
    inputs = {"LAYER": layer, "OUTPUT": output, "--embedding": embedding, "--known": known}
    check_paths(inputs, {"--save": save, "--plot": plot, "--json": json_path})
    require_npy(save)
    if mask not in (None, "causal"):
        raise InputError(f"--mask can be causal only, not {mask!r}; store another mask as tensor in {layer}")
    if plot is not None:
        from attnfit.cli.figure import check_plot

        check_plot(plot)
    require_input(layer)
    progress = FitProgress()
    with progress:
        B = read_array(output)
        given = None if known is None else read_array(known)
        table = None if embedding is None else read_array(embedding)
        # A second of imports that --help should not wait for.
        from attnfit.inversion import load_layer, recover

        with called(B="OUTPUT"):
            problem = load_layer(layer, B, known=given, mask=mask)
        progress.say("searching")
        began = perf_counter()
        with called(vocabulary="--embedding"):
            found = recover(
                problem,
                vocabulary=table,
                precision=PRECISIONS.get(str(B.dtype)) if precision is None else precision,
                n_starts=starts,
                random_state=seed,
                callback=progress.count,
            )
    report = InversionReport(problem, found, perf_counter() - began)
    report.show(results(save, json_path))
    if save is not None:
        put(save, rendered(lambda stream: np.save(stream, problem.tokens(found.x))))
    put_json(json_path, report.as_json())
    if plot is not None:
        _draw(plot, found.identifiability)
    if found.verdict != "recovered":
        raise typer.Exit(Exit.OPEN)


@dataclass(frozen=True)
class InversionReport:
    """What is said about a recovery.

    Attributes
    ----------
    layer : LayerInversion
    found : Recovery
    seconds : float
    """

    layer: Any
    found: Any
    seconds: float

    def rows(self) -> list[tuple[str, str]]:
        """Return what was found and how well it is determined, as names and values."""
        layer, found, at = self.layer, self.found, self.found.identifiability
        rows = [
            ("unknown", f"{layer.shape[1]:,} of {layer.n:,} tokens, {layer.d:,} numbers each"),
            ("output", f"{layer.n:,} x {layer.m:,}: {at.n_equations:,} numbers for {at.n_unknowns:,}"),
            ("residual", f"{found.residual:.1e} of the output"),
        ]
        if at.rank is not None:
            condition = f"{at.condition:.1e}" if math.isfinite(at.condition) else "infinite"
            rows += [("rank of the Jacobian", f"{at.rank:,} of {at.n_unknowns:,}"), ("condition", condition)]
        if found.tokens is None:
            inputs = f"{len(found.inputs):,} with a zero residual, from {found.n_starts:,} starts"
            rows.append(("distinct inputs", inputs))
        if at.value_rank < layer.d:
            rows.append(("rank of the values", f"{at.value_rank:,} of {layer.d:,}"))
        if found.residual_floor > 1e-12:
            rows.append(("outside the values", f"{found.residual_floor:.1e} of the output"))
        radius = certificate_radius(found.certificate)
        rows.append(("certificate radius", radius))
        return rows

    def show(self, console: Literal) -> None:
        """Print the report, the verdict first."""
        console.say(self.found.message, "bold")
        table = Grid(show_header=False, padding=(0, 1, 0, 0))
        for name, value in self.rows():
            table.add_row(name, value)
        print_whole(console, table)
        if self.found.tokens is not None:
            self._show_tokens(console)
        if self.found.verdict == "recovered" and not self.found.certificate.valid:
            note(f"No certificate: {self.found.certificate.reason}")
        console.say(f"{self.seconds:.2f} s")

    def _show_tokens(self, console: Literal) -> None:
        """Print the row of each token, and what is left of the output with the best other row."""
        table = Grid(padding=(0, 1, 0, 0))
        for name in ("token", "row", "residual with another"):
            table.add_column(name, justify="right", no_wrap=True)
        pairs = zip(self.layer.unknown, self.found.tokens, self.found.margins, strict=True)
        for position, row, margin in list(pairs)[:MAX_SHOWN]:
            other = f"{margin:.1e}" if math.isfinite(margin) else "-"
            table.add_row(str(position), str(row), other)
        print_whole(console, table)
        hidden = len(self.found.tokens) - MAX_SHOWN
        if hidden > 0:
            note(f"{hidden:,} more tokens are not shown; write all of them with --json.")

    def as_json(self) -> dict[str, Any]:
        """Return the report as plain data; what is not finite becomes None."""
        found, at = self.found, self.found.identifiability
        return {
            "verdict": found.verdict,
            "message": found.message,
            "residual": found.residual,
            "residual_floor": found.residual_floor,
            "distinct_inputs": len(found.inputs),
            "starts": found.n_starts,
            "equations": at.n_equations,
            "unknowns": at.n_unknowns,
            "counting": at.counting,
            "value_rank": at.value_rank,
            "rank": at.rank,
            "condition": _finite(at.condition),
            "certificate": {
                "valid": found.certificate.valid,
                "radius": _finite(found.certificate.radius),
                "reason": found.certificate.reason,
            },
            "positions": self.layer.unknown.tolist(),
            "tokens": None if found.tokens is None else found.tokens.tolist(),
            "margins": None if found.margins is None else [_finite(float(m)) for m in found.margins],
            "seconds": self.seconds,
        }


def _finite(number: float | None) -> float | None:
    return number if number is not None and math.isfinite(number) else None


def _draw(path: Path, at: Any) -> None:
    """Draw the spectrum, where there is one."""
    if at.singular_values is None:
        note(f"No picture: a spectrum of {at.n_unknowns:,} unknowns is too large to compute.")
        return
    from attnfit.cli.figure import put_figure
    from attnfit.plots import jacobian_spectrum

    put_figure(path, jacobian_spectrum(at))

"""``attnfit fit attention``: the bilinear form behind attention maps."""

from __future__ import annotations

import io
import warnings
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, cast

import numpy as np
import typer
from numpy.typing import NDArray

from attnfit.cli.console import Grid, Literal, note, problem
from attnfit.cli.errors import Debug, Exit, InputError, called, one_sentence, suggest
from attnfit.cli.output import STREAM, check_paths, put, put_json, require_input, results
from attnfit.cli.progress import FitProgress
from attnfit.cli.report import end_of_fit, print_whole
from attnfit.cli.sources import read_bytes
from attnfit.writing import rendered

LOSSES = ("auto", "log_ratio", "cross_entropy", "squared", "kl", "linear_cross_entropy", "rescaled")


@one_sentence
def fit_attention(
    queries: Annotated[Path, typer.Argument(help="Queries, one row a token (.npy).", metavar="QUERIES")],
    keys: Annotated[Path, typer.Argument(help="Keys, one row a token (.npy).", metavar="KEYS")],
    maps: Annotated[Path, typer.Argument(help="Maps, queries by keys (.npy).", metavar="MAPS")],
    rank: Annotated[int | None, typer.Option(help="Rank of X; a full matrix by default.")] = None,
    loss: Annotated[str, typer.Option(help=f"One of {', '.join(LOSSES)}.")] = "auto",
    causal: Annotated[bool, typer.Option("--causal", help="A query attends to no later key.")] = False,
    mask: Annotated[Path | None, typer.Option(help="True where a query attends to a key (.npy).")] = None,
    weights: Annotated[Path | None, typer.Option(help="One weight a query or a pair (.npy).")] = None,
    holdout: Annotated[
        tuple[Path, Path, Path] | None,
        typer.Option(help="Queries, keys and maps of another text to judge the fit by."),
    ] = None,
    ridge: Annotated[float, typer.Option(help="Penalty 0.5 ridge |X|^2 (of the factors with --rank).")] = 0.0,
    tol: Annotated[float, typer.Option(help="Relative gradient at which to stop.")] = 1e-8,
    max_iter: Annotated[int, typer.Option(help="Largest number of steps.")] = 100,
    seed: Annotated[int, typer.Option(help="Seed of random starts.")] = 0,
    save: Annotated[Path | None, typer.Option(help="Write X here (.npy).")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw maps, fit and difference here.")] = None,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the report here.")] = None,
    debug: Debug = False,
) -> None:
    """Find X with softmax(queries X keys^T) equal to the maps; judge it on a held-out text."""
    if loss not in LOSSES:
        raise InputError(f"There is no loss {loss!r}{suggest(loss, LOSSES)}")
    if causal and mask is not None:
        raise InputError("--causal is a mask; give it or --mask, not both")
    others = dict(zip(("--holdout, 1st", "--holdout, 2nd", "--holdout, 3rd"), holdout or (), strict=False))
    inputs = {"QUERIES": queries, "KEYS": keys, "MAPS": maps, "--mask": mask, "--weights": weights, **others}
    check_paths(inputs, {"--save": save, "--plot": plot, "--json": json_path})
    require_npy(save)
    if plot is not None:
        from attnfit.cli.figure import check_plot

        check_plot(plot)
    with FitProgress(tol) as progress:
        arrays = [read_array(path) for path in (queries, keys, maps)]
        test = None if holdout is None else [read_array(path) for path in holdout]
        extra = {
            "mask": None if mask is None else read_array(mask),
            "sample_weight": None if weights is None else read_array(weights),
        }
        # A second of imports that --help should not wait for.
        from sklearn.exceptions import ConvergenceWarning

        from attnfit.estimators import AttentionRegressor

        progress.say("fitting")
        model = AttentionRegressor(
            rank,
            cast(Any, loss),
            "causal" if causal else None,
            ridge,
            tol=tol,
            max_iter=max_iter,
            random_state=seed,
        )
        with warnings.catch_warnings(), called(A1="QUERIES", A2="KEYS", B="MAPS"):
            # The report says it.
            warnings.simplefilter("ignore", ConvergenceWarning)
            model.fit(arrays[0], arrays[2], arrays[1], callback=progress.record, **extra)
        progress.say("scoring")
        with called(A1="--holdout QUERIES", A2="--holdout KEYS", B="--holdout MAPS"):
            held_out = None if test is None else model.relative_error(test[0], test[2], test[1])
    report = AttentionReport(model, arrays[2].shape, held_out)
    end_of_fit(model.result_)
    report.show(results(save, json_path))
    if save is not None:
        put(save, rendered(lambda stream: np.save(stream, model.coef_)))
    put_json(json_path, report.as_json())
    if plot is not None:
        from attnfit.cli.figure import put_figure
        from attnfit.plots import attention_maps

        fitted = model.predict(arrays[0], arrays[1], mask=extra["mask"])
        put_figure(plot, attention_maps(arrays[2], fitted))
    if model.result_.status == "precision":
        note(model.result_.message)
    elif not model.result_.converged:
        problem(model.result_.message)
        raise typer.Exit(Exit.BAD_NEWS)


@dataclass(frozen=True)
class AttentionReport:
    """What is said about a fit of attention maps."""

    model: Any
    shape: tuple[int, ...]
    held_out: float | None

    def rows(self) -> list[tuple[str, str]]:
        """Return what was fitted and how well, as names and values."""
        model, (d1, d2) = self.model, self.model.coef_.shape
        r1, r2 = model.n_identified_
        sizes = np.linalg.svd(model.coef_, compute_uv=False)
        rows = [
            ("maps", f"{self.shape[0]:,} queries x {self.shape[1]:,} keys"),
            ("X", f"{d1:,} x {d2:,}, {'full' if model.rank is None else f'rank {model.rank}'}"),
            ("identified directions", f"{r1:,} of {d1:,} (queries), {r2:,} of {d2:,} (keys)"),
            ("largest singular values of X", ", ".join(f"{s:.4g}" for s in sizes[:4])),
            ("relative error, these maps", f"{model.relative_error_:.3g}"),
        ]
        if self.held_out is not None:
            rows.append(("relative error, held out", f"{self.held_out:.3g}"))
        return rows

    def show(self, console: Literal) -> None:
        """Print the report."""
        result = self.model.result_
        console.say(f"attention maps, loss {self.model.loss_}", "bold")
        table = Grid(show_header=False, padding=(0, 1, 0, 0))
        for name, value in self.rows():
            table.add_row(name, value)
        print_whole(console, table)
        facts = [
            f"loss {result.value:.10g}",
            f"{result.n_passes:.1f} reads of the maps",
            f"{result.seconds:.2f} s",
        ]
        console.say("; ".join([*facts, result.message]))
        if self.held_out is None:
            note(
                "A fit explains the maps it has seen; add --holdout QUERIES KEYS MAPS of another text to "
                "judge it."
            )

    def as_json(self) -> dict[str, Any]:
        """Return the report as plain data."""
        model, result = self.model, self.model.result_
        return {
            "loss": model.loss_,
            "rank": model.rank,
            "shape": list(model.coef_.shape),
            "identified": list(model.n_identified_),
            "relative_error": model.relative_error_,
            "held_out_relative_error": self.held_out,
            "value": result.value,
            "converged": result.converged,
            "status": result.status,
            "message": result.message,
            "n_passes": result.n_passes,
            "seconds": result.seconds,
        }


def require_npy(save: Path | None) -> None:
    """Raise InputError if an array would be written under a name that promises something else."""
    if save is not None and save != STREAM and save.suffix.lower() != ".npy":
        raise InputError(f"--save writes an array; name the file {save.stem}.npy")


def read_array(path: Path) -> NDArray[Any]:
    """Read an array in NumPy's format, without copying it into memory.

    Raises
    ------
    InputError
        If there is no such file, or it is no array.
    """
    require_input(path)
    try:
        if path == STREAM or not path.is_file():
            found = np.load(io.BytesIO(read_bytes(path)), allow_pickle=False)
        else:
            found = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError, OSError, zipfile.BadZipFile):
        raise InputError(
            f"{path} is not an array in NumPy's format; write it again with numpy.save"
        ) from None
    if not isinstance(found, np.ndarray):
        names = ", ".join(found.files[:5])
        raise InputError(f"{path} holds several arrays ({names}); write one of them with numpy.save")
    return np.asarray(found)

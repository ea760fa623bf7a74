"""``attnfit fit mixture``: what a spectrum is mixed from."""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from numpy.typing import NDArray

from attnfit.cli import columns
from attnfit.cli.attention import read_array
from attnfit.cli.console import Grid, Literal, note, problem
from attnfit.cli.errors import Debug, Exit, InputError, one_sentence
from attnfit.cli.output import STREAM, check_paths, put, put_json, results
from attnfit.cli.report import end_of_fit, print_whole
from attnfit.cli.suspects import suspicion
from attnfit.cli.tables import Table, read_table

Array = NDArray[np.float64]

# More right-hand sides than this are for a file, not for a screen.
MAX_SHOWN = 20


@one_sentence
def fit_mixture(
    signatures: Annotated[
        Path,
        typer.Argument(
            help="One row a band, one column a signature (CSV, parquet or .npy).", metavar="SIGNATURES"
        ),
    ],
    spectra: Annotated[
        Path,
        typer.Argument(
            help="One row a band, one column a mixture (CSV, parquet or .npy).", metavar="SPECTRA"
        ),
    ],
    band: Annotated[
        str | None, typer.Option(help="Column that names the band in both files; it is no signature.")
    ] = None,
    save: Annotated[
        Path | None, typer.Option(help="Write proportions, residuals and gaps here (.csv).")
    ] = None,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the report here.")] = None,
    debug: Debug = False,
) -> None:
    """Find the proportions of signatures in mixtures, >= 0 and summing to one, each with its duality gap."""
    check_paths({"SIGNATURES": signatures, "SPECTRA": spectra}, {"--save": save, "--json": json_path})
    if save is not None and save != STREAM and save.suffix.lower() != ".csv":
        raise InputError(f"--save writes CSV; name the file {save.stem}.csv")
    dictionary, mixtures = _read(signatures, band), _read(spectra, band)
    if len(dictionary.values) != len(mixtures.values):
        raise InputError(
            f"{signatures} has {len(dictionary.values):,} bands (rows) but {spectra} has "
            f"{len(mixtures.values):,}; "
            "both need the same bands in the same order"
        )
    _require_same_bands(dictionary, mixtures)
    _refuse_bands(dictionary, mixtures)
    # A second of imports that --help should not wait for.
    from attnfit import minimize
    from attnfit.problems import TwoLayer

    mixture = TwoLayer(None, dictionary.values, mixtures.values, "identity")
    result = minimize(mixture)
    end_of_fit(result)
    report = MixtureReport(
        signatures=dictionary.names,
        mixtures=mixtures.names,
        proportions=mixture.proportions(result.x),
        residual_norms=np.sqrt(2.0 * mixture.column_values(result.x)),
        certificate=result.certificate(),
        result=result,
        n_bands=len(mixtures.values),
    )
    report.show(results(save, json_path))
    if save is not None:
        put(save, report.as_csv())
    put_json(json_path, report.as_json())
    if not result.converged:
        problem(result.message)
        raise typer.Exit(Exit.BAD_NEWS)


@dataclass(frozen=True)
class Matrix:
    """The numeric columns of a file, and the bands where they are named."""

    path: Path
    names: list[str]
    values: Array
    bands: NDArray[Any] | None
    table: Table | None


@dataclass(frozen=True)
class MixtureReport:
    """What is said about a fit of mixtures.

    Attributes
    ----------
    signatures, mixtures : list of str
    proportions : ndarray, shape (signatures, mixtures)
    residual_norms : ndarray, shape (mixtures,)
    certificate : MixtureCertificate
    result : Result
    n_bands : int
    """

    signatures: list[str]
    mixtures: list[str]
    proportions: Array
    residual_norms: Array
    certificate: Any
    result: Any
    n_bands: int

    def show(self, console: Literal) -> None:
        """Print the first right-hand sides and a line of totals."""
        table = Grid(padding=(0, 1, 0, 0))
        for name in ("", *self.signatures, "residual", "duality gap"):
            table.add_column(name, justify="left" if not name else "right", no_wrap=True)
        for j, name in enumerate(self.mixtures[:MAX_SHOWN]):
            shares = ("0" if share == 0.0 else f"{share:.4f}" for share in self.proportions[:, j])
            numbers = f"{self.residual_norms[j]:.4g}", f"{self.certificate.gap[j]:.1e}"
            table.add_row(name, *shares, *numbers)
        print_whole(console, table)
        hidden = len(self.mixtures) - MAX_SHOWN
        if hidden > 0:
            note(f"{hidden:,} more right-hand sides are not shown; write all of them with --save.")
        console.say("; ".join(self.facts()))

    def facts(self) -> list[str]:
        """Return the closing line in pieces."""
        k, worst = len(self.mixtures), float(self.certificate.relative_gap.max())
        good = int((self.certificate.relative_gap <= 1e-9).sum())
        facts = [
            f"{k:,} right-hand side{'s' if k > 1 else ''}, {self.n_bands:,} bands, {len(self.signatures)} "
            "signatures",
            f"residual norm {float(np.sqrt(np.sum(self.residual_norms**2))):.6g} in all",
            f"{self.result.seconds:.2f} s",
            f"{good:,} of {k:,} certified optimal to 1e-9 (largest gap {worst:.1e} of half the squared norm)",
        ]
        for verdict in ("not unique", "not proven unique"):
            n = int((self.certificate.uniqueness == verdict).sum())
            if n:
                facts.append(f"proportions {verdict} in {n:,}")
        return facts

    def as_csv(self) -> str:
        """Return one row a right-hand side."""
        stream = io.StringIO()
        writer = csv.writer(stream)
        writer.writerow(["mixture", *self.signatures, "residual_norm", "duality_gap"])
        for j, name in enumerate(self.mixtures):
            numbers = [*self.proportions[:, j], self.residual_norms[j], self.certificate.gap[j]]
            writer.writerow([name, *(repr(float(number)) for number in numbers)])
        return stream.getvalue()

    def as_json(self) -> dict[str, Any]:
        """Return the report as plain data."""
        radii = [float(radius) if np.isfinite(radius) else None for radius in self.certificate.radii]
        return {
            "signatures": self.signatures,
            "bands": self.n_bands,
            "mixtures": [
                {
                    "name": name,
                    "proportions": [float(share) for share in self.proportions[:, j]],
                    "residual_norm": float(self.residual_norms[j]),
                    "duality_gap": float(self.certificate.gap[j]),
                    "radius": radii[j],
                }
                for j, name in enumerate(self.mixtures)
            ],
            "converged": self.result.converged,
            "status": self.result.status,
            "message": self.result.message,
            "seconds": self.result.seconds,
            "certificate": {"valid": self.certificate.valid, "reason": self.certificate.reason},
        }


def _read(path: Path, band: str | None) -> Matrix:
    """Read the numeric columns of a file.

    Raises
    ------
    InputError
        If there is no such file, a column holds text or an entry is missing.
    """
    if path.suffix.lower() == ".npy":
        return _read_npy(path, band)
    table = read_table(path, as_text=() if band is None else (band,))
    if band is not None:
        columns.require(table, band, "--band")
    names = [name for name in table.names if name != band]
    table.tell(names)
    if not names:
        raise InputError(f"{path} has no column besides {band!r}; add one a signature or mixture")
    for name in names:
        if name in table.text and band is None:
            row, value = table.text[name]
            raise InputError(
                f"Column {name!r} of {path} is not numeric: {table.where(row)} holds {value!r}; if it "
                "names the bands, "
                f"add --band {name}"
            )
    try:
        values = columns.matrix(table, names, "a mixture")
    except InputError as error:
        # Two files are read: say which. Bands cannot be dropped in one of them only.
        sentence = str(error).replace(", or add --missing drop", " (the band, in both files)")
        raise InputError(f"{path}: {sentence}") from None
    return Matrix(path, names, values, None if band is None else table.labels[band], table)


def _read_npy(path: Path, band: str | None) -> Matrix:
    if band is not None:
        raise InputError(f"{path} has no column names, so --band cannot be used with it; leave it out")
    values = read_array(path)
    if values.ndim == 1:
        values = values[:, None]
    if values.ndim != 2 or values.size == 0 or values.dtype.kind not in "fiub":
        raise InputError(
            f"{path} holds an array of shape {values.shape} and type {values.dtype}; it needs real "
            "numbers, one row a "
            "band and one column a signature or mixture"
        )
    bad = np.argwhere(~np.isfinite(values))
    if len(bad):
        row, column = bad[0]
        raise InputError(
            f"{path} has {values[row, column]} in row {row + 1}, column {column + 1}; fill it in or "
            "delete such bands"
        )
    names = [str(k) for k in range(values.shape[1])]
    return Matrix(path, names, values.astype(np.float64), None, None)


def _refuse_bands(one: Matrix, other: Matrix) -> None:
    """Raise InputError where a column that numbers or names the bands would be a signature or a mixture."""
    if one.table is None or other.table is None:
        return
    shared = [
        name for name in one.names
        if name in other.names
        and np.array_equal(one.values[:, one.names.index(name)], other.values[:, other.names.index(name)])
    ]  # fmt: skip
    for name in shared:
        raise InputError(
            f"Column {name!r} is the same in {one.path} and {other.path}; if it names the bands, add --band "
            f"{name}, else leave it out of one of them"
        )
    for matrix in (one, other):
        for name, values in zip(matrix.names, matrix.values.T, strict=True):
            why = suspicion(name, values, None)
            if why == "no name":
                raise InputError(
                    f"A column of {matrix.path} has no name; name it, or take it out of the file"
                )
            if why == "row numbers":
                note(f"Column {name!r} of {matrix.path} holds row numbers; it is taken for a spectrum.")


def _require_same_bands(one: Matrix, other: Matrix) -> None:
    if one.bands is None or other.bands is None:
        return
    differ = np.flatnonzero(one.bands != other.bands)
    if len(differ):
        row = int(differ[0])
        assert one.table is not None
        assert other.table is not None
        raise InputError(
            f"The bands differ: {one.bands[row]!r} in {one.table.where(row)} of {one.path}, "
            f"{other.bands[row]!r} in "
            f"{other.table.where(row)} of {other.path}; both files need the same bands in the same order"
        )

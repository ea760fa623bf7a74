"""``attnfit reproduce``: the experiments of the papers again."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from attnfit.cli.audit import AuditProgress, bad_input, read_texts
from attnfit.cli.console import Grid, Literal, stdout
from attnfit.cli.errors import Debug, InputError, one_sentence, suggest
from attnfit.cli.output import check_paths, put, put_json
from attnfit.cli.report import print_whole

Options = dict[str, Any]
# Those of `attnfit.reproduction`, whose imports --help should not wait for.
MEMORISATION = "memorisation"
NAMES = (
    *("rescaled-hyperbolic", "weight-shifting", "tensor-trick", "two-layer", "layer-recovery"),
    "one-layer",
)


@one_sentence
def reproduce(
    paper: Annotated[
        str, typer.Argument(help=f"{', '.join(NAMES)}, data-recovery, or all.", metavar="PAPER")
    ],
    quick: Annotated[
        bool, typer.Option("--quick", help="A minute instead of a quarter of an hour: larger steps.")
    ] = False,
    out: Annotated[Path | None, typer.Option(help="Write JSON, figures and a page into this folder.")] = None,
    model: Annotated[
        str, typer.Option(help="Another causal model that has memorised --texts: a directory.")
    ] = "tiny",
    texts: Annotated[Path | None, typer.Option(help="Texts it has memorised, one a line.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of random starts.")] = 0,
    device: Annotated[
        str, typer.Option(help="Where soft tokens of data-recovery descend: cpu, cuda, mps.")
    ] = "cpu",
    memorisation: Annotated[
        bool,
        typer.Option(help="With data-recovery: attack the packaged model at several stages of training."),
    ] = False,
    debug: Debug = False,
) -> None:
    """Run a paper's experiment again, and say which of its claims hold."""
    with bad_input(debug):
        if paper not in (*PAPERS, "all"):
            raise InputError(f"There is no paper {paper!r}{suggest(paper, [*PAPERS, 'all'])}")
        if memorisation and (paper != "data-recovery" or texts is not None or model != "tiny"):
            raise InputError(
                "--memorisation goes with data-recovery, and trains its own model; leave the rest out"
            )
        if device != "cpu" and (memorisation or paper != "data-recovery"):
            raise InputError("--device goes with data-recovery; leave it out")
        papers = [MEMORISATION] if memorisation else list(PAPERS) if paper == "all" else [paper]
        if out is not None:
            _prepare(out, papers, {"--texts": texts, "--model": Path(model)})
        options = {"quick": quick, "out": out, "model": model, "texts": texts, "seed": seed,
                   "device": device}  # fmt: skip
        for name in papers:
            memorised(options) if name == MEMORISATION else PAPERS[name](options)


def data_recovery(options: Options) -> None:
    """Table 1 and figure 3 of the recovery of masked tokens."""
    given = None if options["texts"] is None else list(read_texts(options["texts"]).values())
    progress = AuditProgress()
    with progress:
        progress.say("loading the model")
        # Seconds of imports that --help should not wait for.
        from attnfit.audit import load
        from attnfit.audit.reproduction import reproduce_data_recovery

        loaded = load(options["model"])
        progress.say("descending")
        found = reproduce_data_recovery(
            loaded,
            given,
            quick=options["quick"],
            random_state=options["seed"],
            device=options["device"],
            progress=progress.count,
        )
    show_data_recovery(stdout(), found)
    if options["out"] is not None:
        _write(options["out"], found)


def page_of(paper: str, options: Options) -> None:
    """Show and write what a paper claims, what was measured and whether it held."""
    progress = AuditProgress()
    with progress:
        progress.say(f"measuring {paper}")
        from attnfit.reproduction import reproduce as measure

        page = measure(paper, quick=options["quick"])
    _show(paper, page, f"attnfit reproduce {paper}", options)


def memorised(options: Options) -> None:
    """Recover masked tokens at several stages of a model's training."""
    progress = AuditProgress()
    with progress:
        progress.say("training and attacking")
        from attnfit.reproduction.memorisation import run

        page = run(options["quick"], options["seed"], progress.count)
    _show(MEMORISATION, page, "attnfit reproduce data-recovery --memorisation", options)


def _show(name: str, page: Any, command: str, options: Options) -> None:
    console = stdout()
    console.say(f"{name}: {page.paper}", "bold")
    for claim in page.claims:
        style, mark = {True: ("green", "held"), False: ("red", "not held"), None: ("yellow", "open")}[
            claim.held
        ]
        told = f"{mark}: claimed: {claim.claimed}; measured: {claim.measured}"
        console.say(told, style)
    console.say(f"{page.seconds:.0f} s")
    if options["out"] is not None:
        page.to_json(options["out"] / f"{name}.json")
        page.to_html(options["out"] / f"{name}.html", command + (" --quick" if options["quick"] else ""))


# One function a paper: it runs, prints and writes.
PAPERS: dict[str, Callable[[Options], None]] = {
    **{name: partial(page_of, name) for name in NAMES},
    "data-recovery": data_recovery,
}


def show_data_recovery(console: Literal, found: Any) -> None:
    """Print the claims, and the table of the paper."""
    runs = f"{found.losses.shape[1]} runs of {found.steps_taken:,} steps of size {found.step_size:g}"
    head = f"data-recovery on {found.model}: {runs}"
    console.say(head, "bold")
    for claim in found.claims:
        style, mark = ("green", "held") if claim.held else ("red", "not held")
        told = f"{mark}: {claim.what}: claimed {claim.claimed}; measured {claim.measured}"
        console.say(told, style)
    table = Grid(padding=(0, 1, 0, 0))
    for name in ("step", "loss a position", "success"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("text of the run that ends best", no_wrap=True)
    success = dict(zip(found.steps.tolist(), found.success.tolist(), strict=True))
    for step, text, loss in found.table:
        table.add_row(f"{step:,}", f"{loss:.2f}", f"{success[step]:.2f}", text)
    print_whole(console, table)
    ours = f"recover_masked: {found.n_found} of {len(found.found)} texts"
    console.say(f"{ours}; {found.seconds:.0f} s in all")


def _prepare(folder: Path, papers: list[str], inputs: dict[str, Path | None]) -> None:
    """Make the folder, unless a page would be written over an input."""
    if folder.exists() and not folder.is_dir():
        raise InputError(f"--out: {folder} is a file; name a folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise InputError(f"--out: {folder} lies below a file; name a folder") from None
    endings = [".json", ".html"]
    charts = ["data-recovery-loss.svg", "data-recovery-success.svg"] if "data-recovery" in papers else []
    pages = [f"{paper}{ending}" for paper in papers for ending in endings] + charts
    check_paths(inputs, {f"--out {page}": folder / page for page in pages})


def _write(folder: Path, found: Any) -> None:
    from attnfit.audit.reproduction_html import STYLE, figures, render

    put_json(folder / "data-recovery.json", found.as_json())
    put(folder / "data-recovery.html", render(found))
    for name, chart in zip(("loss", "success"), figures(found), strict=True):
        put(folder / f"data-recovery-{name}.svg", chart.svg(STYLE))

"""``attnfit memorised`` and ``attnfit canaries``: what a model that one has trained has memorised."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from attnfit.cli.audit import bad_input, read_texts
from attnfit.cli.console import Grid, note, problem
from attnfit.cli.errors import Debug, Exit, InputError, one_sentence
from attnfit.cli.options import flat
from attnfit.cli.origin import command
from attnfit.cli.output import STREAM, check_paths, put, put_json, results
from attnfit.cli.progress import FitProgress
from attnfit.cli.report import print_whole
from attnfit.writing import is_special

Force = Annotated[bool, typer.Option("--force", help="Overwrite a file that may hold canaries.")]
LOST = "canaries that were planted cannot be measured once their file is lost"


@dataclass(frozen=True)
class TextOptions:
    """The texts that a model is measured on."""

    members: Annotated[
        Path | None, typer.Option(help="Texts that the model was trained on, one a line (UTF-8).")
    ] = None
    others: Annotated[
        Path | None, typer.Option(help="Texts like them that it was not trained on, one a line.")
    ] = None
    canaries: Annotated[
        Path | None, typer.Option(help="Canaries that were inserted in the training data, one a line.")
    ] = None
    template: Annotated[
        str | None, typer.Option(help="Template of the canaries, as given to attnfit canaries.")
    ] = None

    def __post_init__(self) -> None:
        """Raise InputError where one of two that belong together is missing."""
        if (self.canaries is None) != (self.template is None):
            missing = "--template" if self.template is None else "--canaries"
            raise InputError(f"{missing} is missing: canaries are compared with others of their template")

    @property
    def files(self) -> dict[str, Path | None]:
        """By option."""
        return {"--members": self.members, "--others": self.others, "--canaries": self.canaries}


@dataclass(frozen=True)
class MeasureOptions:
    """What is measured."""

    prefix: Annotated[
        str | None,
        typer.Option(help="Extraction: numbers of tokens given, separated by commas, such as 20,50."),
    ] = None
    suffix: Annotated[int, typer.Option(min=1, help="Extraction: tokens the model is to produce.")] = 50
    temperature: Annotated[float, typer.Option(help="Extraction: temperature of draws.")] = 1.0
    reference: Annotated[
        str | None,
        typer.Option(help="Membership: a model with the same tokenizer, not trained on the members."),
    ] = None
    rates: Annotated[
        str | None,
        typer.Option(
            help="Membership: false-positive rates, separated by commas.",
            show_default="0.01,0.001, where there are enough others",
        ),
    ] = None
    compared: Annotated[int, typer.Option(min=1, help="Exposure: other texts of the template scored.")] = (
        10_000
    )

    def arguments(self) -> dict[str, Any]:
        """Return what `attnfit.audit.memorised` takes."""
        return {
            "prefixes": [] if self.prefix is None else _numbers(self.prefix, "--prefix", int),
            "suffix": self.suffix,
            "temperature": self.temperature,
            "rates": None if self.rates is None else _numbers(self.rates, "--rates", float),
            "max_compared": self.compared,
        }


@dataclass(frozen=True)
class WriteOptions:
    """What is written."""

    html_path: Annotated[
        Path | None, typer.Option("--html", help="Write a report to hand over here (.html).")
    ] = None
    json_path: Annotated[Path | None, typer.Option("--json", help="Write all figures here (.json).")] = None
    reveal: Annotated[
        bool, typer.Option("--reveal/--redact", help="Write texts into both files, or counts and figures.")
    ] = False
    examples: Annotated[
        int | None,
        typer.Option(
            min=1, help="With --reveal: texts that come back to show on the page.", show_default="10"
        ),
    ] = None
    owner: Annotated[str, typer.Option(help="Who answers for the model; stands on the report.")] = ""
    force: Force = False

    def __post_init__(self) -> None:
        """Raise InputError where texts are asked for and may not be shown, or nothing would show them."""
        if self.examples is not None and not self.reveal:
            raise InputError("--examples shows texts, which a report leaves out; add --reveal to show them")
        if self.examples is not None and self.html_path is None:
            raise InputError("--examples is for the page, which is missing; add --html FILE")
        if self.reveal and self.html_path is None and self.json_path is None:
            raise InputError("--reveal is for files, which are missing; add --html FILE or --json FILE")

    @property
    def files(self) -> dict[str, Path | None]:
        """By option."""
        return {"--html": self.html_path, "--json": self.json_path}

    def write(self, found: Any) -> None:
        """Write what was asked for."""
        from attnfit.audit.memorisation.report_html import N_EXAMPLES, render

        if self.html_path is not None:
            put(self.html_path, render(found, not self.reveal, self.examples or N_EXAMPLES))
        put_json(self.json_path, found.as_json(not self.reveal))


def memorised(
    model: Annotated[
        str, typer.Argument(help="tiny, smollm2, a directory or a .gguf file.", metavar="MODEL")
    ],
    texts: TextOptions,
    measures: MeasureOptions,
    outputs: WriteOptions,
    fail_above: Annotated[
        float | None,
        typer.Option(
            min=0.0,
            max=1.0,
            help="Exit with 1 if a larger share of members is extracted greedily or told at the first rate, "
            "or of canaries is exposed.",
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of what is drawn.")] = 0,
    allow_pickle: Annotated[
        bool, typer.Option("--allow-pickle", help="Read pickled weights, which can run any code.")
    ] = False,
    debug: Debug = False,
) -> None:
    """Measure what a model has memorised: extraction, membership, exposure of canaries.

    Exit code 0: measured, and no more than --fail-above; 1: more; 2: bad input; 3: something was not
    measured, or membership cannot be read, as words alone tell members from others.
    """
    with bad_input(debug):
        folder = Path(model)
        check_paths({"MODEL": folder if folder.exists() else None, **texts.files}, outputs.files)
        if not outputs.force:
            for option, path in outputs.files.items():
                _require_result(option, path)
        given = {option: read_texts(path) for option, path in texts.files.items() if path is not None}
        asked = measures.arguments()
        with FitProgress() as progress:
            progress.say("loading the model")
            found = _measured(
                (model, measures.reference), given, texts.template, asked, seed, allow_pickle, progress
            )
        found = replace(found, command=command(), owner=outputs.owner)
        _show(results(*outputs.files.values()), found)
        outputs.write(found)
        _judge(found, fail_above)


def _measured(
    names: tuple[str, str | None], given: Mapping[str, Mapping[int, str]], template: str | None,
    asked: dict[str, Any], seed: int, allow_pickle: bool, progress: FitProgress,
) -> Any:  # fmt: skip
    """Load the models and measure."""
    # Seconds of imports that --help should not wait for.
    from attnfit.audit import AuditError, Canaries, load
    from attnfit.audit import memorised as measure

    lists = {option: list(lines.values()) for option, lines in given.items()}
    try:
        if template is not None:
            asked["canaries"] = Canaries(template, tuple(lists["--canaries"]), random_state=seed)
        loaded = load(names[0], allow_pickle=allow_pickle)
        reference = None if names[1] is None else load(names[1], allow_pickle=allow_pickle)
        return measure(
            loaded, lists.get("--members"), lists.get("--others"), reference=reference,
            **asked, random_state=seed, progress=progress.say,
        )  # fmt: skip
    except AuditError as error:
        raise InputError(_in_files(str(error), given)) from error


def _in_files(sentence: str, given: Mapping[str, Mapping[int, str]]) -> str:
    """Name texts by the lines of their files, and arguments by options."""

    def line(match: re.Match[str]) -> str:
        numbers = list(given.get(f"--{match[1]}", {}))
        place = int(match[2])
        return f"line {numbers[place]} of --{match[1]}" if place < len(numbers) else match[0]

    told = re.sub(r"\b(members|others|canaries)\[(\d+)\]", line, sentence)
    told = re.sub(r"^(members|others|reference)\b", r"--\1", told)
    told = re.sub(r"\bprefixes(\[\d+\])?", "--prefix", told)
    return re.sub(r"\brates(\[\d+\])?", "--rates", told)


def _numbers(told: str, option: str, kind: type) -> list[Any]:
    try:
        return [kind(part) for part in told.split(",")]
    except ValueError:
        what = "whole numbers" if kind is int else "numbers"
        raise InputError(f"{option} must be {what} separated by commas, not {told!r}") from None


def _show(console: Any, found: Any) -> None:
    """Print the verdict and the figures."""
    console.say(found.verdict, "bold")
    table = Grid(padding=(0, 1, 0, 0))
    for name in ("measure", "figure", "value", "95 % interval"):
        table.add_column(name, justify="left" if name in ("measure", "figure") else "right", no_wrap=True)
    for measure, figure, value, low, high in zip(*found.columns().values(), strict=True):
        cells = ("too few others", "") if math.isnan(value) else (f"{value:.3f}", f"{low:.3f} to {high:.3f}")
        table.add_row(measure, figure, *cells)
    print_whole(console, table)
    if found.membership is not None and found.membership.epsilon is not None:
        console.say(
            f"Lower bound of epsilon at delta {found.membership.delta:g}, if texts are independent trials: "
            f"{found.membership.epsilon:.2f}."
        )


def _judge(found: Any, limit: float | None) -> None:
    """Exit with what is worst: a share above the limit, or figures that cannot be read."""
    shares, unread = _shares(found)
    above = {} if limit is None else {what: share for what, share in shares.items() if share > limit}
    if above:
        told = ", ".join(f"{what} {share:.3f}" for what, share in above.items())
        problem(f"Above {limit:g}: {told}")
        raise typer.Exit(Exit.BAD_NEWS)
    if unread:
        problem(f"Not measured, which is no sign of protection: {', '.join(unread)}")
        raise typer.Exit(Exit.OPEN)
    if limit is not None:
        note(f"No share is above {limit:g}.")


def _shares(found: Any) -> tuple[dict[str, float], list[str]]:
    """Return the shares that a limit is for, and what has none."""
    shares: dict[str, float] = {}
    unread: list[str] = []
    if found.extraction is not None:
        one = found.extraction
        shares |= {f"extraction after {k} tokens": one.count(k) / one.n_texts for k in one.prefixes}
    if found.membership is not None:
        at = next((at for at in found.membership.scores[0].at_rates if at.n_told is not None), None)
        if found.membership.conclusion == "confounded":
            unread.append("membership, as words alone tell members from others")
        elif at is None:
            unread.append("membership at any rate, for which there are too few others")
        else:
            shares[f"membership at {at.rate:g}"] = at.share
    if found.exposure is not None:
        if found.exposure.decidable:
            shares["canaries exposed"] = float(found.exposure.exposed.mean())
        else:
            unread.append("exposure, for which there are too few texts to compare with")
    return shares, unread


def _require_result(option: str, path: Path | None) -> None:
    """Raise InputError if a file would be replaced that is no earlier result, and so may hold canaries."""
    if path is None or path == STREAM or is_special(path) or not path.exists():
        return
    told = path.read_bytes()
    if option == "--html":
        earlier = told.lstrip()[:14].lower() == b"<!doctype html"
    else:
        try:
            earlier = isinstance(json.loads(told), dict)
        except (ValueError, RecursionError):
            earlier = False
    if told.strip() and not earlier:
        raise InputError(
            f"{option}: {path} is no earlier report, and {LOST}; name another file, or add --force"
        )


def canaries(
    template: Annotated[
        str, typer.Argument(help='Such as "The code of the {words} is {digits:4}."', metavar="TEMPLATE")
    ],
    count: Annotated[int, typer.Option(min=1, help="Number of canaries.")] = 8,
    seed: Annotated[int, typer.Option(help="Seed of the draws.")] = 0,
    output: Annotated[Path, typer.Option(help="File to write.", show_default="print them")] = STREAM,
    force: Force = False,
    debug: Debug = False,
) -> None:
    """Draw canaries to insert in training data: {digits:4} is four digits, {words:2} two words."""
    with bad_input(debug):
        from attnfit.audit import canaries as draw

        check_paths({}, {"--output": output})
        if output != STREAM and output.exists() and not is_special(output) and not force:
            raise InputError(f"--output: {output} exists, and {LOST}; name another file, or add --force")
        put(output, "\n".join(draw(template, count, random_state=seed).texts) + "\n")


memorised_command = one_sentence(flat(memorised))
canaries_command = one_sentence(canaries)

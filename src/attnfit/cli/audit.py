"""``attnfit audit``: what text a language model gives away, and what protects it."""

from __future__ import annotations

import json
import re
import shlex
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from attnfit.cli.cluster import connected
from attnfit.cli.console import Grid, Literal, note, problem, stdout
from attnfit.cli.errors import Debug, Exit, InputError, in_options, one_sentence, unexpected
from attnfit.cli.output import STREAM, check_paths, put, put_json, results
from attnfit.cli.progress import FitProgress
from attnfit.cli.report import print_whole
from attnfit.cli.sources import read_bytes

STANDARD = "none,float16,int8,int4,noise:0.3,noise:1.0"
EVERYTHING = (
    "none,float16,bfloat16,int8,int8:channel,int4,int4:channel,noise:0.1,noise:0.3,noise:1.0,noise:2.0,"
    "noise:0.1std,noise:0.3std,noise:1.0std,noise:2.0std,round:2,round:1,round:0,drop0"
)
# Texts that a model with known private texts is audited on unless others are given.
N_OWN = 8
# Combinations that a sentence names.
MAX_NAMED = 5


class AuditProgress(FitProgress):
    """The same bar, with cells and the time left."""

    def step(self, step: Any) -> None:
        """Show how far the audit is."""
        left = f"{step.done} of {step.total} cells, {step.seconds_left:.0f} s left"
        self._progress.update(
            self._task, description=step.now, completed=step.done, total=step.total, reads=left
        )


@contextmanager
def bad_input(debug: bool) -> Iterator[None]:
    """Turn what is wrong with the request into one sentence and exit code 2, and any other error into 70.

    A crash must not look like a gate that was passed, nor like one that was not.
    """
    from attnfit.audit.errors import AuditError

    try:
        yield
    except (typer.Exit, typer.Abort, BrokenPipeError):
        raise
    except (AuditError, InputError, FileNotFoundError, ModuleNotFoundError) as error:
        if debug:
            raise
        problem(str(error) if isinstance(error, InputError) else in_options(str(error)))
        raise typer.Exit(Exit.BAD_INPUT) from None
    except (OSError, MemoryError):
        raise
    except Exception as error:
        if debug:
            traceback.print_exc()
        problem(f"The audit broke off without a verdict: {unexpected(error)}")
        raise typer.Exit(Exit.UNEXPECTED) from None


@one_sentence
def audit(
    model: Annotated[
        str | None,
        typer.Argument(help="tiny, smollm2, minilm, a directory or a .gguf file.", metavar="MODEL"),
    ] = None,
    access: Annotated[
        str | None,
        typer.Option(
            help="What is seen: hidden:LAYER, attention:BLOCK, kv:BLOCK, k:BLOCK, v:BLOCK, "
            "permuted:LAYER, gradient, logits, topk:COUNT, masked; and of short texts last:LAYER, "
            "last:logits and pooled, one row for a whole text."
        ),
    ] = None,
    texts: Annotated[Path | None, typer.Option(help="Texts to audit with, one a line (UTF-8).")] = None,
    chat: Annotated[
        Path | None,
        typer.Option(
            help="Chats to audit with, one a line: a JSON list of messages, each with role and content, put "
            "together by the model's chat template."
        ),
    ] = None,
    tokens: Annotated[
        Path | None, typer.Option(help="Texts to audit with as token ids: one JSON list a line.")
    ] = None,
    defences: Annotated[
        str, typer.Option(help="What is done to it before; 'all' for every kind.")
    ] = STANDARD,
    budget: Annotated[
        float, typer.Option(help="Seconds, after a calibration that a model needs once.")
    ] = 120.0,
    report: Annotated[Path | None, typer.Option(help="Write the report here (.html).")] = None,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the report here (.json).")] = None,
    reveal: Annotated[
        bool,
        typer.Option(
            "--reveal/--redact", help="Write texts and recovered tokens into both files, or counts."
        ),
    ] = False,
    checkpoint: Annotated[
        Path | None, typer.Option(help="Keep finished cells here, and go on from there.")
    ] = None,
    dask: Annotated[
        str | None,
        typer.Option(help="Run cells on a Dask cluster: the address of its scheduler (tcp://...), or local."),
    ] = None,
    fail_above: Annotated[
        float | None,
        typer.Option(
            min=0.0,
            max=1.0,
            help="Exit with 1 if an access with a defence asked for gives away a larger share of tokens.",
        ),
    ] = None,
    first_position: Annotated[
        int, typer.Option(min=0, help="Position of the first token of every text, where padding goes before.")
    ] = 0,
    owner: Annotated[str, typer.Option(help="Who answers for the model; stands on the report.")] = "",
    seed: Annotated[int, typer.Option(help="Seed of noise and controls.")] = 0,
    allow_pickle: Annotated[
        bool, typer.Option("--allow-pickle", help="Read pickled weights, which can run any code.")
    ] = False,
    self_test: Annotated[
        bool, typer.Option("--self-test", help="Check every form of access on the model tiny, and stop.")
    ] = False,
    debug: Debug = False,
) -> None:
    """Recover texts from what a model gives away.

    Exit code 0: all was tested, and no more than --fail-above came back; 1: more did; 2: bad input;
    3: something was not tested; 70: a fault of the program; 130: stopped.
    """
    if self_test:
        _self_test(debug)
        return
    with bad_input(debug):
        if model is None:
            raise InputError("MODEL is missing: tiny, smollm2, minilm, a directory or a .gguf file")
        folder = Path(model)
        sources = {"--texts": texts, "--chat": chat, "--tokens": tokens}
        named = [option for option, path in sources.items() if path is not None]
        if len(named) > 1:
            raise InputError(f"{named[0]} and {named[1]} both say what to audit with; leave one of them out")
        check_paths(
            {"MODEL": folder if folder.exists() else None, **sources},
            {"--report": report, "--json": json_path},
            {"--checkpoint": checkpoint},
        )
        lists, given = chat or tokens, None if texts is None else read_texts(texts)
        if lists is not None:
            given = read_lists(lists)
        asked = (EVERYTHING if defences == "all" else defences).split(",")
        forms = None if access is None else [form.strip() for form in access.split(",")]
        progress = AuditProgress()
        with progress:
            progress.say("loading the model")
            found = _run(
                model, given, forms, asked, budget, checkpoint, (seed, first_position), allow_pickle,
                progress, dask,
            )  # fmt: skip
        settings = {**sources, "--report": report, "--json": json_path, "--fail-above": fail_above}
        found = replace(
            found.with_command(_command(model, found.settings, defences, settings, reveal)), owner=owner
        )
        lines = {} if given is None else dict(enumerate(given))
        show(results(report, json_path), found, lines)
        if report is not None:
            from attnfit.audit.report_html import render

            put(report, render(found, not reveal))
        if json_path is not None:
            put_json(json_path, found.as_json(redact=not reveal))
        if found.coverage:
            note(_how_to_go_on(found.coverage, checkpoint))
        _judge(found, fail_above)


def _run(
    name: str, given: Any, forms: Any, defences: list[str], budget: float, checkpoint: Path | None,
    numbers: tuple[int, int], allow_pickle: bool, progress: AuditProgress, dask: str | None,
) -> Any:  # fmt: skip
    """Load the model and audit it."""
    # Seconds of imports that --help should not wait for.
    from attnfit.audit import AuditError, load
    from attnfit.audit.forms import parse_access
    from attnfit.audit.running import run

    if not budget > 0:
        raise InputError(f"--budget must be a positive number of seconds, not {budget:g}")
    seed, first_position = numbers
    loaded = load(name, allow_pickle=allow_pickle)
    counted = any(parse_access(form).counts_positions for form in forms or ())
    if first_position and not (counted or loaded.counts_positions):
        note(f"The states of {name} do not depend on the position of the first token.")
    own = dict(enumerate(loaded.private_texts[:N_OWN]))
    lines = own if given is None else given
    if not lines:
        raise InputError("--texts is missing: a file with one text a line, like those to be protected")
    try:
        with nullcontext() if dask is None else connected(dask) as client:
            return run(
                loaded, list(lines.values()), forms, [defence.strip() for defence in defences], budget,
                checkpoint=checkpoint, progress=progress.step, random_state=seed,
                first_position=first_position, client=client,
            )  # fmt: skip
    except AuditError as error:
        raise InputError(_with_lines(str(error), dict(enumerate(lines)))) from error


def _with_lines(sentence: str, numbers: dict[int, int]) -> str:
    """Name texts by their lines in the file that they came from."""

    def line(match: re.Match[str]) -> str:
        return f"line {numbers[int(match[1])]}" if int(match[1]) in numbers else match[0]

    return re.sub(r"\btexts\[(\d+)\]", line, sentence)


def _how_to_go_on(coverage: str, checkpoint: Path | None) -> str:
    """Say what is missing, and how to get it."""
    if checkpoint is None:
        return (
            f"{coverage}. A larger --budget takes more; with --checkpoint FILE the next run goes on from it."
        )
    return f"{coverage}. The same command with a larger --budget goes on from {checkpoint}."


def read_texts(path: Path) -> dict[int, Any]:
    """Return the lines of a file that are not blank, by their numbers.

    Raises
    ------
    InputError
        If there is no such file, or no text in it.
    """
    if path != STREAM and (path.is_dir() or not path.exists()):
        raise InputError(f"There is no file {path}; check the path (the current folder is {Path.cwd()})")
    try:
        # Lines end as an editor shows them: other separators may stand in a text.
        lines = re.split(r"\r\n|\n|\r", read_bytes(path).decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path} is not text in UTF-8 (byte {error.start}); save it again as UTF-8"
        ) from None
    found = {number: line for number, line in enumerate(lines, 1) if line.strip()}
    if not found:
        raise InputError(f"{path} holds no text: one text a line is expected")
    return found


def read_lists(path: Path) -> dict[int, Any]:
    """Return chats or token ids, one JSON list a line, by the numbers of their lines.

    Raises
    ------
    InputError
        If a line is no list; what is in it is checked with the model.
    """
    found: dict[int, Any] = {}
    for number, line in read_texts(path).items():
        try:
            found[number] = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path}: line {number} is not JSON ({error}); write one list a line") from None
        if not isinstance(found[number], list):
            raise InputError(f"{path}: line {number} is no list: [...] is expected")
    return found


def show(console: Literal, found: Any, lines: dict[int, int] | None = None) -> None:
    """Print the verdict, the share of tokens recovered for every combination, and what to change.

    Parameters
    ----------
    console : Literal
    found : Report
    lines : dict of int to int, optional
        The line in a file that each text came from.
    """
    console.say(_with_lines(found.verdict, lines or {}), "bold")
    table = Grid(padding=(0, 1, 0, 0))
    for name in ("access", *found.settings.defences):
        table.add_column(name, justify="left" if name == "access" else "right", no_wrap=True)
    for access in found.settings.access:
        pairs = [found.pair(access, defence) for defence in found.settings.defences]
        table.add_row(access, *[_share(pair) for pair in pairs])
    print_whole(console, table)
    legend = "Share of tokens recovered; ?: not tested, =: no defence of outputs changes it"
    if any(pair.tested and not pair.complete for pair in found.pairs):
        legend += ", *: of the texts that could be tested to the end, not all"
    if any(pair.has_template for pair in found.pairs):
        legend += "; the tokens of the chat template are no secret and do not count"
    console.say(f"{legend}.", "dim")
    for sentence in found.advice:
        console.gap()
        console.say(_with_lines(sentence, lines or {}))
    console.gap()
    console.say(f"{found.seconds:.0f} s")


def _share(pair: Any) -> str:
    from attnfit.audit.advice import percent

    if pair is None:
        return "="
    return percent(pair.token_share) + ("" if pair.complete else " *") if pair.tested else "?"


def _judge(found: Any, limit: float | None) -> None:
    """Exit with what is worst: stopped, a leak, something that was not tested."""
    from attnfit.audit.advice import percent

    if found.interrupted:
        problem("Stopped before the end; what was done until then is in the report.")
        raise typer.Exit(Exit.STOPPED)
    leaks = [] if limit is None else sorted(found.leaks(limit), key=lambda pair: -pair.leak)
    untested = found.untested()
    if leaks:
        told = [f"{pair.access} with {pair.defence} {percent(pair.leak)}" for pair in leaks]
        problem(f"Above {percent(limit or 0.0)} of tokens: {_named(told)}")
        raise typer.Exit(Exit.BAD_NEWS)
    if untested or found.contradictions():
        told = [f"{pair.access} with {pair.defence}" for pair in untested] + found.contradictions()
        problem(f"Not tested to the end, which is no sign of protection: {_named(told)}")
        raise typer.Exit(Exit.OPEN)
    if limit is not None:
        note(f"No access with a defence asked for gives away more than {percent(limit)} of the tokens.")


def _named(told: list[str]) -> str:
    more = len(told) - MAX_NAMED
    return ", ".join(told[:MAX_NAMED] + ([f"{more} more"] if more > 0 else []))


def _command(model: str | None, settings: Any, defences: str, others: dict[str, Any], reveal: bool) -> str:
    words = ["attnfit", "audit", str(model), "--access", ",".join(settings.access), "--defences", defences]
    words += ["--budget", f"{settings.budget:g}"]
    for option, value in others.items():
        words += [] if value is None else [option, str(value)]
    for option, number in (("--seed", settings.random_state), ("--first-position", settings.first_position)):
        words += [option, str(number)] if number else []
    return shlex.join(words + (["--reveal"] if reveal else []))


def _self_test(debug: bool) -> None:
    progress = AuditProgress()
    with bad_input(debug), progress:
        progress.say("loading the model")
        from attnfit.audit.self_test import self_test

        checks = self_test(progress.say)
    console = stdout()
    for check in checks:
        style, mark = ("green", "pass") if check.passed else ("bold red", "FAIL")
        console.say(f"{mark}  {check}", style)
    failed = [check.name for check in checks if not check.passed]
    seconds = sum(check.seconds for check in checks)
    if failed:
        problem(f"{len(failed)} of {len(checks)} checks failed: {', '.join(failed)}")
        raise typer.Exit(Exit.UNEXPECTED)
    console.say(f"All {len(checks)} checks passed in {seconds:.1f} s.")

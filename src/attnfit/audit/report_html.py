"""The report as one page."""

from __future__ import annotations

from itertools import groupby

from attnfit.audit.advice import Option, options, percent, scope
from attnfit.audit.cells import Cell
from attnfit.audit.page import Column, Entry, number, page, word
from attnfit.audit.report import LIMIT, Report
from attnfit.audit.report_pictures import curves, heat_map
from attnfit.audit.summary import BreakPoint, Control, Pair
from attnfit.audit.versions import versions

# Texts shown as examples.
N_EXAMPLES = 2


def render(report: Report, redact: bool = True) -> str:
    """Return the page.

    Parameters
    ----------
    report : Report
    redact : bool
        Leave texts and recovered tokens out of the file: only counts remain.
    """
    return page(
        "report.html",
        report=report,
        redact=redact,
        safe=not report.failures(LIMIT) and not report.contradictions(),
        about=_about(report),
        heat=heat_map(report),
        options=(OPTION_COLUMNS, [_option_row(option) for option in options(report, LIMIT)]),
        charts=curves(report),
        pairs=(PAIR_COLUMNS, [_pair_row(pair) for pair in report.pairs]),
        points=(POINT_COLUMNS, [_point_row(point) for point in report.breakpoints]),
        examples=_examples(report, redact),
        controls=(CONTROL_COLUMNS, [_control_row(control) for control in report.controls]),
        facts=_facts(report),
        limit=percent(LIMIT),
    )


PAIR_COLUMNS = [
    Column("access", word=True),
    Column("defence", word=True),
    Column("texts"),
    Column("tokens"),
    Column("95 %"),
    Column("whole texts"),
    Column("95 %"),
    Column("predicted tokens"),
    Column("KL, nats"),
    Column("choices kept"),
    Column("verified"),
    Column("false claims"),
    Column("seconds"),
    Column("remarks", word=True),
]
OPTION_COLUMNS = [
    Column("what", word=True),
    Column("still comes back, at most"),
    Column("enough", word=True),
    Column("cost, nats a token"),
    Column("first choices kept"),
]
POINT_COLUMNS = [
    Column("access", word=True),
    Column("unit", word=True),
    Column("predicted"),
    Column("still recovered at"),
    Column("lost at"),
]
CONTROL_COLUMNS = [
    Column("access", word=True),
    Column("random texts"),
    Column("of them recovered"),
    Column("noise"),
    Column("claims to be right"),
    Column("false claims"),
]


def _about(report: Report) -> list[tuple[str, str]]:
    """Return the facts that whoever signs the page looks for first."""
    model = report.model
    known = f"{model['name']}, a model of {model['layers']} layers, fingerprint {model['fingerprint']}"
    named = {"Model": known, "Owner": report.owner or "not given (--owner)", "Date": report.made}
    return [*named.items(), *scope(report).items()]


def _option_row(option: Option) -> list[Entry]:
    return [
        word(option.what, "long"),
        _share(option.leak),
        word("yes" if option.enough else "no"),
        number(option.divergence, ".2g"),
        _share(option.agreement),
    ]


def _pair_row(pair: Pair) -> list[Entry]:
    if not pair.tested:
        blank = [number(None)] * (len(PAIR_COLUMNS) - 4)
        return [
            word(pair.access),
            word(pair.defence),
            number(0, "d"),
            *blank,
            word(pair.message, "long"),
        ]
    counts = {
        "cut short": pair.n_cut,
        "impossible": pair.n_errors,
        "not run": pair.n_missing,
        "not found, which proves nothing": pair.n_open,
        "tokens known up to their like": pair.tokens_ambiguous,
    }
    remarks = [f"{count} {what}" for what, count in counts.items() if count]
    if pair.has_template:
        remarks.append(f"{percent(pair.all_share)} with the tokens of the chat template")
    return [
        word(pair.access),
        word(pair.defence),
        number(pair.n_texts, "d"),
        _share(pair.token_share),
        _interval(pair.token_interval),
        _share(pair.sentence_share),
        _interval(pair.sentence_interval),
        _share(pair.predicted),
        number(pair.divergence, ".2g"),
        _share(pair.agreement),
        number(pair.verified, "d"),
        number(pair.false_claims, "d"),
        number(pair.seconds, ".2f"),
        word("; ".join(remarks)),
    ]


def _share(value: float | None) -> Entry:
    return number(None) if value is None else Entry(percent(value), value)


def _interval(ends: tuple[float, float]) -> Entry:
    return Entry(f"{100 * ends[0]:.0f} to {100 * ends[1]:.0f} %", ends[0])


def _point_row(point: BreakPoint) -> list[Entry]:
    predicted = number(point.predicted)
    if point.predicted is None:
        predicted = Entry("below 2", 1.0)
    return [
        word(point.access),
        word(point.unit),
        predicted,
        number(point.kept_at),
        number(point.lost_at),
    ]


def _examples(report: Report, redact: bool) -> tuple[list[Column], list[list[Entry]]]:
    columns = [Column("text"), Column("access", word=True), Column("defence", word=True)]
    columns += [Column("recovered"), Column("tokens right"), Column("of")]
    if not redact:
        columns.append(Column("the text, recovered spans marked", word=True))
    cells = [c for c in report.cells if c.key.text < N_EXAMPLES and not c.key.control and c.status != "error"]
    return columns, [_example(cell) + ([] if redact else [_marked(report, cell)]) for cell in cells]


def _example(cell: Cell) -> list[Entry]:
    """Return what is known of one inversion in counts; one that did not end has none to compare."""
    ended = cell.status == "done" and cell.n_tokens > 0
    share = sum(cell.right) / cell.n_tokens if ended else float("nan")
    told = {"done": percent(share) if ended else "–", "cut": "cut short"}.get(cell.status, "not tested")
    return [
        number(cell.key.text + 1, "d"),
        word(cell.key.access),
        word(cell.key.defence),
        Entry(told, share),
        number(sum(cell.right) if ended else None, "d"),
        number(cell.n_tokens, "d"),
    ]


def _marked(report: Report, cell: Cell) -> Entry:
    """Return the text of a cell with what was recovered of it marked."""
    pieces = report.pieces[cell.key.text]
    right = [*cell.right, *[False] * len(pieces)][: len(pieces)]
    runs = groupby(zip(pieces, right, strict=True), key=lambda one: one[1])
    return Entry("", style="text", pieces=[("".join(p for p, _ in run), found) for found, run in runs])


def _control_row(control: Control) -> list[Entry]:
    counts = [control.other_texts, control.other_texts_exact, control.noise, control.claims]
    return [word(control.access), *(number(count, "d") for count in [*counts, control.false_claims])]


def _facts(report: Report) -> list[str]:
    model, settings = report.model, report.settings
    return [
        f"{model['name']}: {model['kind']}, {model['layers']} layers of width {model['width']}, "
        f"{model['vocabulary']:,} tokens, fingerprint {model['fingerprint']}",
        f"{len(settings.texts)} texts, budget {settings.budget:g} s, {report.seconds:.0f} s used, seed "
        f"{settings.random_state}; {report.coverage or 'every cell was run'}",
        ", ".join(f"{name} {number}" for name, number in versions().items()),
    ]

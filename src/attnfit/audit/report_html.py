"""The report as one page."""

from __future__ import annotations

from html import escape

from attnfit.audit.advice import percent
from attnfit.audit.cells import Cell
from attnfit.audit.page import Column, Entry, assemble, items, number, paragraph, table, word
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
    safe = not report.failures(LIMIT) and not report.contradictions()
    parts = [
        f"<h1>What {escape(report.model['name'])} gives away</h1>",
        f'<p class="verdict{" good" if safe else ""}">{escape(report.verdict)}</p>',
        "<h2>What to change</h2>",
        items(report.advice, "advice"),
        "<h2>What comes back</h2>",
        paragraph(
            "Share of tokens recovered at their positions. Rows: what somebody sees of the model. Columns: "
            "what was done to it before. 100 % means that every word can be read.",
            "soft",
        ),
        heat_map(report),
        *curves(report),
        "<h2>All combinations</h2>",
        paragraph(
            "Intervals are Wilson's at 95 %, for tokens as if they were independent. Predicted: from the "
            "distances between candidates, with the tokens before known; attacks that also use which words "
            "are likely do better under strong noise, and those that err early do worse. KL: how far the "
            "model's predictions move when it goes on from what the defence leaves.",
            "soft",
        ),
        table("pairs", PAIR_COLUMNS, [_pair_row(pair) for pair in report.pairs], searched=True),
        *_breakpoints(report),
        *_examples(report, redact),
        *_controls(report),
        *_again(report),
    ]
    return assemble(f"attnfit audit: {report.model['name']}", "\n".join(parts))


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


def _pair_row(pair: Pair) -> list[Entry]:
    if not pair.tested:
        blank = [number(None)] * (len(PAIR_COLUMNS) - 4)
        return [
            word(pair.access),
            word(pair.defence),
            number(0, "d"),
            *blank,
            Entry(escape(pair.message), style="long"),
        ]
    counts = {
        "cut short": pair.n_cut,
        "impossible": pair.n_errors,
        "not run": pair.n_missing,
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


def _breakpoints(report: Report) -> list[str]:
    if not report.breakpoints:
        return []
    columns = [
        Column("access", word=True),
        Column("unit", word=True),
        Column("predicted"),
        Column("still recovered at"),
        Column("lost at"),
    ]
    told = (
        "The size of a defence at which half of the tokens are lost: by calculation, and between which of "
        "the sizes that were tried. More noise and fewer bits protect more."
    )
    rows = [_point_row(point) for point in report.breakpoints]
    return [
        "<h2>Where protection begins</h2>",
        paragraph(told, "soft"),
        table("points", columns, rows, searched=True),
    ]


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


def _examples(report: Report, redact: bool) -> list[str]:
    cells = [c for c in report.cells if c.key.text < N_EXAMPLES and not c.key.control and c.status != "error"]
    if not cells:
        return []
    columns = [Column("text"), Column("access", word=True), Column("defence", word=True)]
    columns += [Column("recovered"), Column("tokens right"), Column("of")]
    if redact:
        above = paragraph("Texts were left out of this file.", "soft")
    else:
        columns.append(Column("the text, recovered spans marked", word=True))
        above = '<label><input type="checkbox" id="show"> Show the texts</label>'
    rows = [_example(cell) + ([] if redact else [_marked(report, cell)]) for cell in cells]
    return ["<h2>Examples</h2>", above, table("examples", columns, rows, searched=True)]


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
    marked = ""
    for piece, found in zip(pieces, right, strict=True):
        marked += f"<mark>{escape(piece)}</mark>" if found else escape(piece)
    return Entry(marked.replace("</mark><mark>", ""), style="text")


def _controls(report: Report) -> list[str]:
    columns = [Column("access", word=True), Column("random texts"), Column("of them recovered")]
    columns += [Column("noise"), Column("claims to be right"), Column("false claims")]
    told = (
        "Random texts and pure noise, inverted in the same way. A claim to have recovered noise, or another "
        "text than was run, is false; false claims about the texts themselves are in the table above."
    )
    return [
        "<h2>False claims</h2>",
        paragraph(told, "soft"),
        table("controls", columns, [_control_row(control) for control in report.controls]),
    ]


def _control_row(control: Control) -> list[Entry]:
    counts = [control.other_texts, control.other_texts_exact, control.noise, control.claims]
    return [word(control.access), *(number(count, "d") for count in [*counts, control.false_claims])]


def _again(report: Report) -> list[str]:
    model, settings = report.model, report.settings
    facts = [
        f"{model['name']}: {model['kind']}, {model['layers']} layers of width {model['width']}, "
        f"{model['vocabulary']:,} tokens, fingerprint {model['fingerprint']}",
        f"{len(settings.texts)} texts, budget {settings.budget:g} s, {report.seconds:.0f} s used, seed "
        f"{settings.random_state}; {report.coverage or 'every cell was run'}",
        ", ".join(f"{name} {number}" for name, number in versions().items()),
    ]
    command = f"<pre>{escape(report.command)}</pre>" if report.command else ""
    return ["<h2>How to run it again</h2>", items(facts, "soft"), command]

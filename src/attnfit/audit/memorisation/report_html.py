"""What a model has memorised, as one page: a sentence, what to do, pictures, tables, definitions."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from attnfit.audit.advice import percent
from attnfit.audit.intervals import wilson
from attnfit.audit.memorisation.advice import REMEDIES, conclusion, definitions, findings, scope
from attnfit.audit.memorisation.canaries import Exposure
from attnfit.audit.memorisation.membership import ROUNDING, Membership
from attnfit.audit.memorisation.report import Memorised
from attnfit.audit.page import Column, Entry, number, page, word
from attnfit.audit.page.chart import Chart, Line
from attnfit.audit.versions import versions

# Texts shown where texts may be.
N_EXAMPLES = 10
# Rates that a ROC curve is drawn at, and pixels that the name of a tick takes.
N_RATES, TICK = 160, 34
STYLES = ("curve", "curve2", "curve3", "curve4")


def render(found: Memorised, redact: bool = True, n_examples: int = N_EXAMPLES) -> str:
    """Return the page.

    Parameters
    ----------
    found : Memorised
    redact : bool
        Leave texts out of the file: only counts and figures remain.
    n_examples : int
        Texts that came back which are shown where texts are.
    """
    lead, good = conclusion(found)
    return page(
        "memorised.html",
        found=found,
        redact=redact,
        headline=_kept(f"{found.model} {lead}: {'; '.join(findings(found))}."),
        good=good,
        about=[*_known(found), *scope(found).items()],
        remedies=[] if good else REMEDIES,
        charts=[
            chart for chart in (_roc(found.membership), _shares(found), _exposures(found.exposure)) if chart
        ],
        extraction=_extraction_table(found),
        membership=_membership_table(found.membership),
        canaries=_canary_table(found.exposure),
        texts=None if redact else _texts(found, n_examples),
        n_texts=(min(n_examples, len(found.extracted)), len(found.extracted)),
        definitions=definitions(found),
        facts=[_settings(found), ", ".join(f"{name} {value}" for name, value in versions().items())],
    )


def _known(found: Memorised) -> list[tuple[str, str]]:
    """Return the facts that whoever signs the page looks for first."""
    mark = found.settings.get("fingerprint")
    model = f"{found.model}, fingerprint {mark}" if mark else found.model
    return [
        ("Model", model),
        ("Owner", found.owner or "not given (--owner)"),
        ("Date", found.made or "not given"),
    ]


def _roc(told: Membership | None) -> Chart | None:
    """Return the share of members told against the false-positive rate, both on logarithmic axes."""
    if told is None:
        return None
    n, m = len(told.scores[0].members), len(told.scores[0].others)
    ranks = np.unique(np.rint(np.geomspace(1, m + 1, N_RATES)))
    rates = ranks / (m + 1)
    left, below = math.floor(math.log10(rates[0])), math.floor(math.log10(1 / n))
    lines, band = [], None
    for score, style in zip(told.scores, STYLES, strict=False):
        counts = (score.p_values[:, None] <= rates + ROUNDING).sum(axis=0)
        seen = counts > 0
        x, y = np.log10(rates[seen]).tolist(), np.log10(counts[seen] / n).tolist()
        lines.append(Line(x, y, style, name=score.name))
        if score is told.scores[0]:
            ends = np.array([wilson(int(count), n) for count in counts[seen]])
            low, high = np.log10(np.maximum(ends, 10.0**below)).T.tolist()
            band = (x, low, high)
    corner = max(left, below)
    chance = Line([float(corner), 0.0], [float(corner), 0.0], "nominal", name="chance")
    return Chart(
        "Training texts told from others", "false-positive rate", (float(left), 0.1), (float(below), 0.0),
        _powers(left), _powers(below), [*lines, chance], band,
    )  # fmt: skip


def _powers(least: int) -> dict[float, str]:
    return {float(power): percent(10.0**power) for power in range(least, 1)}


def _shares(found: Memorised) -> Chart | None:
    """Return the share of texts that come back against the number of tokens given."""
    one = found.extraction
    if one is None:
        return None
    most = max(one.samples)
    x = [math.log2(prefix) for prefix in one.prefixes]
    lines, ends = [], np.array([wilson(one.count(prefix), one.n_texts) for prefix in one.prefixes])
    ways = [(one, None, "greedy", "curve"), (one, most, _decoding(most), "curve3")]
    if found.extraction_of_others is not None:
        rest = found.extraction_of_others
        ways += [
            (rest, None, "greedy, others", "curve2"),
            (rest, most, f"{_decoding(most)}, others", "curve4"),
        ]
    top = float(ends.max())
    for texts, n_samples, name, style in ways:
        y = [texts.count(prefix, n_samples) / texts.n_texts for prefix in one.prefixes]
        tips = [
            f"{name}, {prefix} given: {percent(share)}" for prefix, share in zip(one.prefixes, y, strict=True)
        ]
        lines += [Line(x, y, style, name=name), Line(x, y, f"{style}-dots", [""] * len(x), tips=tips)]
        top = max(top, *y)
    size = _nice(top)
    low, high = ends.T.tolist()
    margin = 0.5 if len(x) == 1 else 0.05 * (x[-1] - x[0])
    return Chart(
        "Training texts that come back", "tokens given", (x[0] - margin, x[-1] + margin), (0.0, size),
        _spaced(one.prefixes, x, margin), {part * size: percent(part * size) for part in (0.0, 0.5, 1.0)},
        lines, (x, low, [min(end, size) for end in high]),
    )  # fmt: skip


def _nice(top: float) -> float:
    """Return the least of 1, 2 and 5 times a power of ten that is no less, at most 1."""
    power = 10.0 ** math.floor(math.log10(top))
    return min(
        1.0, next(step * power for step in (1.0, 2.0, 5.0, 10.0) if top <= step * power * (1 + ROUNDING))
    )


def _spaced(prefixes: Sequence[int], x: Sequence[float], margin: float) -> dict[float, str]:
    """Return ticks, from the longest prefix on, without those that their neighbour leaves no room."""
    scale = Chart("", "", (0.0, 1.0), (0.0, 1.0), {}, {}, []).plot_width / (x[-1] - x[0] + 2 * margin)
    kept: dict[float, str] = {}
    for at, prefix in zip(reversed(x), reversed(prefixes), strict=True):
        if not kept or (min(kept) - at) * scale >= TICK:
            kept[at] = str(prefix)
    return kept


def _exposures(exposed: Exposure | None) -> Chart | None:
    """Return the exposures from the largest on, beside those that as many canaries never seen would have."""
    if exposed is None:
        return None
    n, order = len(exposed.texts), np.argsort(-exposed.bits, kind="stable")
    top = exposed.largest
    lines = [Line([0.0, n + 1.0], [top, top], "whisker", name="the likeliest of all texts")]
    lines += [Line([k, k], exposed.interval[place].tolist(), "whisker") for k, place in enumerate(order, 1)]
    ranks = np.linspace(1, n, max(2, 4 * n)) if n > 1 else np.array([0.75, 1.25])
    nominal = np.clip(np.log2((n + 1) / ranks), 0.0, top).tolist()
    lines.append(Line(ranks.tolist(), nominal, "nominal", name="never seen, on average"))
    for style, name, wanted in (("points", "exposed", True), ("hollow", "not exposed", False)):
        at = [k for k, place in enumerate(order, 1) if bool(exposed.exposed[place]) == wanted]
        if at:
            places = [int(order[k - 1]) for k in at]
            lines.append(
                Line(at, exposed.bits[places].tolist(), style, [_repeats(exposed, place) for place in places],
                     name, [_tip(exposed, place) for place in places])
            )  # fmt: skip
    step = next(step for step in (1, 2, 4, 5, 10, 20, 50) if top / step <= 6 or step == 50)
    return Chart(
        "Canaries: bits of exposure", "canaries, the most exposed first", (0.0, n + 1.0), (0.0, 1.08 * top),
        {}, {float(bits): str(bits) for bits in range(0, int(top) + 1, step)}, lines,
    )  # fmt: skip


def _repeats(exposed: Exposure, place: int) -> str:
    return "" if exposed.repeats is None else f"{exposed.repeats[place]} x"


def _tip(exposed: Exposure, place: int) -> str:
    planted = "" if exposed.repeats is None else f", planted {exposed.repeats[place]} times"
    return f"canary {place}: {exposed.bits[place]:.1f} bits, {exposed.method[place]}{planted}"


Table = tuple[list[Column], list[list[Entry]]]


def _ends(low: float, high: float) -> Entry:
    if math.isnan(low):
        return number(None)
    return Entry(_kept(f"{percent(low).removesuffix(' %')} to {percent(high)}"), low)


def _percent(share: float) -> Entry:
    return number(None) if math.isnan(share) else Entry(_kept(percent(share)), share)


def _kept(text: str) -> str:
    """Return a text whose lines do not break before a percent sign."""
    return text.replace(" %", "\u00a0%")


def _extraction_table(found: Memorised) -> Table | None:
    if found.extraction is None:
        return None
    columns = [Column("tokens given"), Column("decoding", word=True)]
    sets = [("members", found.extraction), ("others", found.extraction_of_others)]
    rows: list[list[Entry]] = []
    for name, one in sets:
        if one is None:
            continue
        columns += [Column(name), Column("95 %")]
        table = one.columns()
        if not rows:
            ways = zip(table["prefix"], table["samples"], strict=True)
            rows = [[number(prefix, "d"), word(_decoding(n))] for prefix, n in ways]
        for row, count, share, low, high in zip(
            rows, table["extracted"], table["share"], table["low"], table["high"], strict=True
        ):
            row += [Entry(_kept(f"{count} of {one.n_texts} ({percent(share)})"), share), _ends(low, high)]
    return columns, rows


def _decoding(n_samples: int) -> str:
    return "greedy" if not n_samples else f"{n_samples:,} draw{'s' if n_samples > 1 else ''}"


def _membership_table(told: Membership | None) -> Table | None:
    if told is None:
        return None
    columns = [Column("score", word=True), Column("AUC"), Column("95 %"), Column("false-positive rate")]
    columns += [Column("realised, at most"), Column("members told"), Column("95 %")]
    rows = []
    for score in told.scores:
        area = [word(score.name), number(score.auc.value, ".3f"),
                Entry(f"{score.auc.low:.3f} to {score.auc.high:.3f}", score.auc.low)]  # fmt: skip
        for at in score.at_rates:
            shares = map(_percent, (at.rate, at.realised, at.share))
            rows.append([*area, *shares, _ends(*at.interval)])
    if told.blind is not None:
        area = [word("words alone"), number(told.blind.value, ".3f"),
                Entry(f"{told.blind.low:.3f} to {told.blind.high:.3f}", told.blind.low)]  # fmt: skip
        rows.append([*area, *[number(None)] * 4])
    return columns, rows


def _canary_table(exposed: Exposure | None) -> Table | None:
    if exposed is None:
        return None
    table = exposed.columns()
    columns = [Column("canary"), *([Column("planted")] if "repeats" in table else [])]
    columns += [Column("bits"), Column("95 %"), Column("counted", word=True), Column("fitted tail")]
    columns += [Column("p-value"), Column("exposed", word=True)]
    rows = []
    for k in table["canary"]:
        planted = [number(table["repeats"][k], "d")] if "repeats" in table else []
        low, high = table["low"][k], table["high"][k]
        rows.append([
            number(k, "d"), *planted, number(table["exposure"][k], ".1f"),
            Entry(f"{low:.1f} to {high:.1f}", low), word(table["method"][k]),
            number(table["extrapolated"][k], ".1f"), number(table["p_value"][k], ".2g"),
            word("yes" if table["exposed"][k] else "no"),
        ])  # fmt: skip
    return columns, rows


def _texts(found: Memorised, n_examples: int) -> list[tuple[str, Table]]:
    """Return the texts that came back, what the model produced marked, and the canaries."""
    tables: list[tuple[str, Table]] = []
    columns = [Column("text"), Column("given, and produced", word=True)]
    shown = found.extracted[:n_examples]
    if shown:
        rows = [[number(one.place + 1, "d"), _marked(one.prefix, one.suffix)] for one in shown]
        tables.append(("extracted", (columns, rows)))
    if found.exposure is not None:
        rows = [[number(k, "d"), _marked(text, "")] for k, text in enumerate(found.exposure.texts)]
        tables.append(("planted", ([Column("canary"), Column("its text", word=True)], rows)))
    return tables


def _marked(given: str, produced: str) -> Entry:
    pieces = [(given, False), *([(produced, True)] if produced else [])]
    return Entry("", style="text", pieces=pieces)


def _settings(found: Memorised) -> str:
    told = [f"seed {found.settings['random_state']}"]
    if found.extraction is not None:
        told.append(f"temperature {found.settings['temperature']:g}")
        told.append(f"{found.extraction.n_duplicates:,} members that end as another left out")
    if found.membership is not None:
        told.append(f"{found.membership.n_duplicates:,} texts that came twice left out")
        if found.settings["reference"] is not None:
            told.append(f"reference {found.settings['reference']}")
    return "; ".join(told)

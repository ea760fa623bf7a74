"""The heat map of a report, and what defences cost."""

from __future__ import annotations

import math
from html import escape

from attnfit.audit.advice import describe_access, percent
from attnfit.audit.cells import NONE
from attnfit.audit.page import paragraph
from attnfit.audit.page.chart import Chart, Line
from attnfit.audit.report import Report
from attnfit.audit.summary import Pair

# Costs below this, in nats, are drawn as this.
LEAST_COST = 1e-6


def heat_map(report: Report) -> str:
    """Return a table of shares in colours, access by defence."""
    head = "".join(f'<th scope="col">{escape(defence)}</th>' for defence in report.settings.defences)
    rows = []
    for access in report.settings.access:
        cells = "".join(_heat_cell(report.pair(access, defence)) for defence in report.settings.defences)
        title = escape(describe_access(access), quote=True)
        rows.append(f'<tr><th class="word" scope="row" title="{title}">{escape(access)}</th>{cells}</tr>')
    body = "\n".join(rows)
    return (
        '<div class="wide"><table class="heat" id="heat"><thead><tr><th class="word" scope="col">access'
        f"</th>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _heat_cell(pair: Pair | None) -> str:
    if pair is None:
        return '<td title="no defence of outputs changes it">=</td>'
    if not pair.tested:
        return f'<td class="unknown" title="{escape(pair.message, quote=True)}">not tested</td>'
    level = round(10 * pair.token_share)
    part = "" if pair.complete else f" of {pair.n_texts} texts that ended"
    return f'<td class="h{level}">{percent(pair.token_share)}{part}<small>{_cost(pair)}</small></td>'


def _cost(pair: Pair) -> str:
    return "" if pair.divergence is None or pair.defence == NONE else f"{pair.divergence:.1e} nats"


def curves(report: Report) -> list[str]:
    """Return the share recovered against the cost, one picture for each form of access."""
    charts = [chart for access in report.settings.access if (chart := _curve(report, access))]
    if not charts:
        return []
    told = (
        "Down is safe, right is costly: a good defence is at the lower left. Defences whose names would "
        "overlap show them under the pointer."
    )
    return [
        "<h2>What defences cost</h2>",
        paragraph(told, "soft"),
        f'<div class="panels">{"".join(charts)}</div>',
    ]


def _curve(report: Report, access: str) -> str:
    """Return the share recovered against the cost of each defence; empty where no cost is known."""
    known = [p for p in report.pairs if p.access == access and p.tested and p.divergence is not None]
    costs = [(max(pair.divergence or 0.0, LEAST_COST), pair) for pair in known if pair.defence != NONE]
    if not costs:
        return ""
    points = sorted(costs, key=lambda one: one[0])
    x = [math.log10(cost) for cost, _ in points]
    low, high = math.floor(min(x)), max(math.ceil(max(x)), math.floor(min(x)) + 1)
    powers = range(low, high + 1)
    ticks = {float(power): f"1e{power}" if power < -2 else f"{10.0**power:g}" for power in powers}
    line = Line(x, [pair.token_share for _, pair in points], labels=[pair.defence for _, pair in points])
    return Chart(
        f"{access}: tokens recovered", "cost: KL in nats a token", (low - 0.2, high + 0.4), (0.0, 1.0), ticks,
        {0.0: "0 %", 0.5: "50 %", 1.0: "100 %"}, [line],
    ).svg()  # fmt: skip

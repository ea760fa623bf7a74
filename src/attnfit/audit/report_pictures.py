"""The heat map of a report, and what defences cost."""

from __future__ import annotations

import math
from typing import NamedTuple

from attnfit.audit.advice import percent
from attnfit.audit.cells import NONE
from attnfit.audit.forms import parse_access
from attnfit.audit.page.chart import Chart, Line
from attnfit.audit.report import Report
from attnfit.audit.summary import Pair

# Costs below this, in nats, are drawn as this.
LEAST_COST = 1e-6


class Heat(NamedTuple):
    """A cell of the heat map."""

    text: str
    style: str = ""
    title: str = ""
    cost: str = ""


def heat_map(report: Report) -> list[tuple[str, str, list[Heat]]]:
    """Return each form of access, what it is, and its share recovered under every defence, in colours."""
    return [
        (
            access,
            parse_access(access).description,
            [_heat(report.pair(access, defence)) for defence in report.settings.defences],
        )
        for access in report.settings.access
    ]


def _heat(pair: Pair | None) -> Heat:
    if pair is None:
        return Heat("=", title="no defence of outputs changes it")
    if not pair.tested:
        return Heat("not tested", "unknown", pair.message)
    part = "" if pair.complete else f" of {pair.n_texts} texts that ended"
    known = pair.divergence is not None and pair.defence != NONE
    cost = f"{pair.divergence:.1e} nats" if known else ""
    return Heat(f"{percent(pair.token_share)}{part}", f"h{round(10 * pair.token_share)}", "", cost)


def curves(report: Report) -> list[Chart]:
    """Return the share recovered against the cost, one picture for each form of access that has a cost."""
    return [chart for access in report.settings.access if (chart := _curve(report, access))]


def _curve(report: Report, access: str) -> Chart | None:
    """Return the share recovered against the cost of each defence; None where no cost is known."""
    known = [p for p in report.pairs if p.access == access and p.tested and p.divergence is not None]
    costs = [(max(pair.divergence or 0.0, LEAST_COST), pair) for pair in known if pair.defence != NONE]
    if not costs:
        return None
    points = sorted(costs, key=lambda one: one[0])
    x = [math.log10(cost) for cost, _ in points]
    low, high = math.floor(min(x)), max(math.ceil(max(x)), math.floor(min(x)) + 1)
    powers = range(low, high + 1)
    ticks = {float(power): f"1e{power}" if power < -2 else f"{10.0**power:g}" for power in powers}
    line = Line(x, [pair.token_share for _, pair in points], labels=[pair.defence for _, pair in points])
    return Chart(
        f"{access}: tokens recovered", "cost: KL in nats a token", (low - 0.2, high + 0.4), (0.0, 1.0), ticks,
        {0.0: "0 %", 0.5: "50 %", 1.0: "100 %"}, [line],
    )  # fmt: skip

"""A reproduction as one page, and its figure."""

from __future__ import annotations

from attnfit.audit.page import Column, number, page, word
from attnfit.audit.page.chart import Chart, Line
from attnfit.audit.reproduction import Reproduction
from attnfit.audit.versions import versions

# A picture in a file of its own knows nothing of the page's style.
STYLE = (
    "text{font:11px sans-serif}.grid{stroke:#d0d7de}.axis{stroke:#57606a}.curve{fill:none;stroke:#0072b2;"
    "stroke-width:2}.curve2{fill:none;stroke:#d55e00;stroke-width:2}.band{fill:#0072b2;opacity:.18}"
)


def figures(found: Reproduction) -> tuple[Chart, Chart]:
    """Return the losses and the share of success against the steps."""
    steps = [float(step) for step in found.steps]
    low, mean, high = found.losses.min(1), found.losses.mean(1), found.losses.max(1)
    top = float(high.max())
    ticks = {steps[-1] * part: f"{steps[-1] * part:,.0f}" for part in (0.0, 0.25, 0.5, 0.75, 1.0)}
    losses = Chart(
        "loss a position: least, mean and most", "step", (0.0, steps[-1]), (0.0, top), ticks,
        {top * part: f"{top * part:.1f}" for part in (0.0, 0.25, 0.5, 0.75, 1.0)},
        [Line(steps, mean.tolist())], (steps, low.tolist(), high.tolist()),
    )  # fmt: skip
    success = Chart(
        "share of runs with the hidden tokens", "step", (0.0, steps[-1]), (0.0, 1.0), ticks,
        {0.0: "0", 0.5: "0.5", 1.0: "1"}, [Line(steps, found.success.tolist(), "curve2")],
    )  # fmt: skip
    return losses, success


def render(found: Reproduction) -> str:
    """Return the page."""
    claims = [Column(name, word=True) for name in ("claim", "published", "measured", "held")]
    looks = [Column("step"), Column("text", word=True), Column("loss a position")]
    about = [
        f"{found.model}, {len(found.texts)} texts, {found.losses.shape[1]} runs of {found.steps_taken:,} "
        f"steps of size {found.step_size:g}, {found.forwards:,.0f} passes each, {found.seconds:.0f} s",
        ", ".join(f"{name} {value}" for name, value in versions().items()),
    ]
    return page(
        "reproduction.html",
        claims=(
            claims,
            [
                [word(text, "long") for text in (c.what, c.claimed, c.measured)]
                + [word("yes" if c.held else "no")]
                for c in found.claims
            ],
        ),
        looks=(
            looks,
            [[number(step, ",d"), word(text), number(loss, ".2f")] for step, text, loss in found.table],
        ),
        charts=figures(found),
        about=about,
    )

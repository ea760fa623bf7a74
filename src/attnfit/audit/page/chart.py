"""Line charts as SVG."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from markupsafe import Markup

from attnfit.audit.page import fill

LEFT, RIGHT, TOP, BOTTOM = 46, 16, 62, 40
# Labels that are nearer to one another would overlap.
ROOM = 11
# A legend: where its lines begin, their height, the length of a sample, and about the width of a letter.
LEGEND, ROW, SAMPLE, LETTER = 32, 14, 18, 6.4


@dataclass(frozen=True)
class Line:
    """Points joined by a line.

    Attributes
    ----------
    x, y : sequence of float
    style : str
        Class of the line.
    labels : sequence of str
        What stands at each point; nothing, and no dots, without. Where it is empty, there is a dot alone.
    name : str
        What the legend calls the line; it is left out of the legend without.
    tips : sequence of str
        What is shown of each point under the pointer, the label unless given.
    """

    x: Sequence[float]
    y: Sequence[float]
    style: str = "curve"
    labels: Sequence[str] = ()
    name: str = ""
    tips: Sequence[str] = ()


@dataclass(frozen=True)
class Chart:
    """Axes with lines, and a band between two of them.

    Attributes
    ----------
    title, x_name : str
    x_range, y_range : tuple of float
    x_ticks, y_ticks : dict of float to str
    lines : sequence of Line
    band : tuple of sequences, optional
        x, lower y, upper y.
    size : tuple of int
    """

    title: str
    x_name: str
    x_range: tuple[float, float]
    y_range: tuple[float, float]
    x_ticks: dict[float, str]
    y_ticks: dict[float, str]
    lines: Sequence[Line]
    band: tuple[Sequence[float], Sequence[float], Sequence[float]] | None = None
    size: tuple[int, int] = field(default=(480, 300))

    def svg(self, style: str = "") -> Markup:
        """Return the picture.

        Parameters
        ----------
        style : str
            CSS for a picture in a file of its own.
        """
        return fill("chart.svg", chart=self, style=style)

    @property
    def width(self) -> int:
        """Width of the picture."""
        return self.size[0]

    @property
    def height(self) -> int:
        """Height of the picture."""
        return self.size[1]

    @property
    def left(self) -> int:
        """Where the horizontal axis begins."""
        return LEFT

    @property
    def right(self) -> int:
        """Where it ends."""
        return self.width - RIGHT

    @property
    def plot_width(self) -> int:
        """Length of the horizontal axis."""
        return self.right - self.left

    @property
    def bottom(self) -> int:
        """Where it lies."""
        return self.height - BOTTOM

    @property
    def x_marks(self) -> list[tuple[float, str]]:
        """Places and names of the ticks of the horizontal axis."""
        return [(self._x(value), told) for value, told in self.x_ticks.items()]

    @property
    def y_marks(self) -> list[tuple[float, str]]:
        """Places and names of the ticks of the vertical axis."""
        return [(self._y(value), told) for value, told in self.y_ticks.items()]

    @property
    def outline(self) -> str:
        """The band as a polygon."""
        assert self.band is not None
        x, low, high = self.band
        return self.points([*x, *x[::-1]], [*high, *low[::-1]])

    def points(self, x: Sequence[float], y: Sequence[float]) -> str:
        """Return points as SVG writes them."""
        return " ".join(f"{self._x(a):.1f},{self._y(b):.1f}" for a, b in zip(x, y, strict=True))

    @property
    def legend(self) -> Iterator[tuple[float, float, Line]]:
        """Where the sample of each line that has a name begins."""
        x, y = float(self.left), float(LEGEND)
        for line in self.lines:
            if not line.name:
                continue
            width = SAMPLE + 6 + LETTER * len(line.name)
            if x + width > self.right and x > self.left:
                x, y = float(self.left), y + ROW
            yield x, y, line
            x += width + 12

    def dots(self, line: Line) -> Iterator[tuple[float, float, str, str, bool]]:
        """Yield the place, the label and the tip of each point, and whether the label has room beside the
        last one: others are left to the pointer.
        """
        taken = -math.inf
        tips = line.tips or line.labels
        for x, y, label, tip in zip(line.x, line.y, line.labels, tips, strict=bool(line.labels)):
            at = self._x(x)
            shown = bool(label) and at - taken >= ROOM
            taken = at if shown else taken
            yield at, self._y(y), label, tip, shown

    def _x(self, value: float) -> float:
        low, high = self.x_range
        return LEFT + (value - low) / (high - low) * (self.width - LEFT - RIGHT)

    def _y(self, value: float) -> float:
        low, high = self.y_range
        return self.height - BOTTOM - (value - low) / (high - low) * (self.height - TOP - BOTTOM)

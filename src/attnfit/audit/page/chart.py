"""Line charts as SVG."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape

LEFT, RIGHT, TOP, BOTTOM = 46, 16, 62, 40


@dataclass(frozen=True)
class Line:
    """Points joined by a line.

    Attributes
    ----------
    x, y : sequence of float
    style : str
        Class of the line.
    labels : sequence of str
        What stands at each point; nothing, and no dots, without.
    """

    x: Sequence[float]
    y: Sequence[float]
    style: str = "curve"
    labels: Sequence[str] = ()


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

    def svg(self, style: str = "") -> str:
        """Return the picture.

        Parameters
        ----------
        style : str
            CSS for a picture in a file of its own.
        """
        width, height = self.size
        parts = [f"<style>{style}</style>"] if style else []
        parts += [*self._axes(), *([self._shade()] if self.band else [])]
        parts += [part for line in self.lines for part in self._draw(line)]
        name = escape(self.title, quote=True)
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
            f'width="{width}" height="{height}" role="img" '
            f'aria-label="{name}"><title>{name}</title>' + "\n".join(parts) + "</svg>"
        )

    def _x(self, value: float) -> float:
        low, high = self.x_range
        return LEFT + (value - low) / (high - low) * (self.size[0] - LEFT - RIGHT)

    def _y(self, value: float) -> float:
        low, high = self.y_range
        return self.size[1] - BOTTOM - (value - low) / (high - low) * (self.size[1] - TOP - BOTTOM)

    def _axes(self) -> list[str]:
        width, height = self.size
        bottom = height - BOTTOM
        parts = [f'<text x="{LEFT}" y="14" font-weight="600">{escape(self.title)}</text>']
        for value, told in self.y_ticks.items():
            y = self._y(value)
            parts.append(f'<line class="grid" x1="{LEFT}" x2="{width - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
            parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{escape(told)}</text>')
        for value, told in self.x_ticks.items():
            x = self._x(value)
            parts.append(f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="{bottom}" y2="{bottom + 4}"/>')
            parts.append(f'<text x="{x:.1f}" y="{bottom + 16}" text-anchor="middle">{escape(told)}</text>')
        parts.append(f'<line class="axis" x1="{LEFT}" x2="{width - RIGHT}" y1="{bottom}" y2="{bottom}"/>')
        parts.append(
            f'<text x="{(LEFT + width - RIGHT) / 2}" y="{height - 6}" text-anchor="middle">'
            f"{escape(self.x_name)}</text>"
        )
        return parts

    def _shade(self) -> str:
        assert self.band is not None
        x, low, high = self.band
        there = [(a, b) for a, b in zip(x, high, strict=True)]
        back = [(a, b) for a, b in zip(x, low, strict=True)][::-1]
        return f'<polygon class="band" points="{self._points(there + back)}"/>'

    def _draw(self, line: Line) -> list[str]:
        pairs = list(zip(line.x, line.y, strict=True))
        parts = [f'<polyline class="{line.style}" points="{self._points(pairs)}"/>']
        taken = -math.inf
        for (x, y), label in zip(pairs, line.labels, strict=bool(line.labels)):
            at = self._x(x), self._y(y)
            parts.append(
                f'<circle class="dot" cx="{at[0]:.1f}" cy="{at[1]:.1f}" r="4">'
                f"<title>{escape(label)}</title></circle>"
            )
            # Labels that would lie on one another are left to the pointer.
            if at[0] - taken >= 11:
                taken = at[0]
                place = f"{at[0] + 3:.1f},{at[1] - 8:.1f}"
                parts.append(f'<text transform="translate({place}) rotate(-38)">{escape(label)}</text>')
        return parts

    def _points(self, pairs: Sequence[tuple[float, float]]) -> str:
        return " ".join(f"{self._x(x):.1f},{self._y(y):.1f}" for x, y in pairs)

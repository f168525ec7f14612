"""The plane of a plot, as SVG: where a value lies in pixels, the grid, round numbers, names."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass

Point = tuple[float, float]
Span = tuple[float, float]


@dataclass(frozen=True)
class Axes:
    """The plane of a plot: what its edges stand for, and its size in pixels."""

    xs: Span
    ys: Span
    width: int = 640
    height: int = 320
    left: int = 56
    right: int = 16
    top: int = 16
    bottom: int = 44

    def at(self, x: float, y: float) -> Point:
        """The pixel of a value."""
        across = (x - self.xs[0]) / ((self.xs[1] - self.xs[0]) or 1)
        up = (y - self.ys[0]) / ((self.ys[1] - self.ys[0]) or 1)
        return (
            self.left + across * (self.width - self.left - self.right),
            self.height - self.bottom - up * (self.height - self.top - self.bottom),
        )

    def value(self, px: float, py: float) -> Point:
        """The inverse of `at`: the value at a pixel."""
        across = (px - self.left) / (self.width - self.left - self.right)
        up = (self.height - self.bottom - py) / (self.height - self.top - self.bottom)
        (x0, x1), (y0, y1) = self.xs, self.ys
        return x0 + across * (x1 - x0), y0 + up * (y1 - y0)

    def frame(
        self,
        body: str,
        label: str,
        x: str,
        y: str,
        *,
        head: str = "",
        x_ticks: Sequence[tuple[float, str]] = (),
    ) -> str:
        """The plot as SVG: grid, round numbers and both axes' names around `body`."""
        ticks = []
        for value in round_values(*self.ys):
            py = self.at(self.xs[0], value)[1]
            ticks.append(
                f'<line class="un-grid" x1="{self.left}" x2="{self.width - self.right}" '
                f'y1="{py:.1f}" y2="{py:.1f}"/>'
                f'<text x="{self.left - 8}" y="{py + 4:.1f}" text-anchor="end">{value:g}</text>'
            )
        for value, shown in x_ticks or [(v, f"{v:g}") for v in round_values(*self.xs)]:
            px = self.at(value, self.ys[0])[0]
            ticks.append(
                f'<text x="{px:.1f}" y="{self.height - self.bottom + 18}" '
                f'text-anchor="middle">{html.escape(shown)}</text>'
            )
        return (
            f'<svg class="un-plot" viewBox="0 0 {self.width} {self.height}" role="img" '
            f'aria-label="{html.escape(label)}">{head}{"".join(ticks)}{body}'
            f'<text x="{(self.left + self.width) / 2:.0f}" y="{self.height - 6}" '
            f'text-anchor="middle">{html.escape(x)}</text>'
            f'<text transform="translate(14 {(self.top + self.height - self.bottom) / 2:.0f}) '
            f'rotate(-90)" text-anchor="middle">{html.escape(y)}</text></svg>'
        )


def round_values(low: float, high: float) -> list[float]:
    """Three to eight round numbers between the two, for an axis."""
    rough = (high - low) / 5
    size = 10.0 ** math.floor(math.log10(rough))
    step = next(size * k for k in (1, 2, 5, 10) if size * k >= rough)
    first = math.ceil(low / step - 1e-9)
    return [round(k * step, 12) for k in range(first, math.floor(high / step + 1e-9) + 1)]


def span(values: Sequence[float], margin: float = 0.06) -> Span:
    """The lowest and highest value with a margin, never of no width."""
    low, high = min(values), max(values)
    gap = (high - low) * margin or max(abs(high) * 0.1, 0.1)
    return low - gap, high + gap

"""Plots of the Runs tab: the Pareto front, and strengths with the chosen one marked."""

from __future__ import annotations

import html
import re
from collections.abc import Mapping, Sequence

from evaluation.report.svg import DASHES
from ui.app.html import plots

Named = tuple[str, float, float, str]  # name, x, y, kind
_MARK = re.compile(r'<text class="un-mark[^"]*" x="([\d.-]+)" y="([\d.-]+)"')
MARK_DROP = 5  # pixels from a point to the base line of its sign


def front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the points that no other beats in both, from left to right.

    More is better on both axes. Point i is beaten where some j has x_j >= x_i and y_j >= y_i, one
    of them strictly; equal points all stay.
    """
    kept = [
        i
        for i, (x, y) in enumerate(points)
        if not any(a >= x and b >= y and (a, b) != (x, y) for a, b in points)
    ]
    return sorted(kept, key=lambda i: points[i])


def pareto_with_front(
    points: Sequence[Named], label: str, x: str, y: str, fronts: Mapping[str, str]
) -> str:
    """The plot of named points, with the front of each kind in `fronts` (kind to its legend)."""
    drawn = plots.pareto(points, label, x, y)
    # Where a sign stands is the plot's own matter: it is read back from what was drawn.
    places = [(float(a), float(b) - MARK_DROP) for a, b in _MARK.findall(drawn)]
    added, legend = [], []
    kinds = list(dict.fromkeys(point[3] for point in points))
    for number, (kind, words) in enumerate(fronts.items()):
        mine = [i for i, point in enumerate(points) if point[3] == kind]
        best = [mine[k] for k in front([points[i][1:3] for i in mine])]
        if len(best) < 2:
            continue
        path = " ".join(f"{a:.1f},{b:.1f}" for a, b in (places[i] for i in best))
        style = f'class="un-front un-s{kinds.index(kind) % 4}"'
        style += f' stroke-dasharray="{DASHES[number + 1]}"'
        added.append(f'<polyline {style} points="{path}"/>')
        legend.append(
            f'<span class="un-key"><svg width="28" height="8" aria-hidden="true">'
            f'<line {style} x1="0" x2="28" y1="4" y2="4"/></svg> {html.escape(words)}</span>'
        )
    drawn = drawn.replace("</svg><figcaption>", f"{''.join(added)}</svg><figcaption>", 1)
    return drawn.replace("</figcaption>", f" {' '.join(legend)}</figcaption>", 1)


def strength_plot(
    curves: Mapping[str, plots.Points], chosen: float | None, label: str
) -> str:  # fmt: skip
    """Curves over an adapter's strength, and a word for the strength that was chosen."""
    said = "" if chosen is None else f"; chosen: {chosen:g}"
    return plots.lines(curves, label + said, f"strength{said}", "share or distance", floor=0.0)

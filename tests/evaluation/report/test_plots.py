"""Charts as SVG: names, fronts, distributions, and text that stays text."""

from __future__ import annotations

import xml.etree.ElementTree as ET

from evaluation.report.plots import (
    COLOURS,
    Chart,
    distribution_chart,
    draw_svg,
    line_chart,
    pareto_front,
    svg_file,
    trade_off_chart,
)

SVG = "{http://www.w3.org/2000/svg}"


def drawn_texts(chart: Chart | None) -> dict[str | None, ET.Element]:
    """The text elements of a drawn chart by their words."""
    assert chart is not None
    return {text.text: text for text in ET.fromstring(draw_svg(chart)).iter(f"{SVG}text")}


def test_the_front_holds_what_nothing_beats() -> None:
    points = [(0.5, -1.0), (0.6, -2.0), (0.4, -1.5), (0.55, -2.5), (0.6, -3.0)]
    assert pareto_front(points) == [0, 1]
    assert pareto_front([(1.0, 1.0), (1.0, 1.0)]) == [0, 1]  # equal points both stay
    assert pareto_front([]) == []


def test_names_beside_points_keep_apart() -> None:
    close = ((0.5, 0.5), (0.501, 0.5), (0.502, 0.501), (0.5, 0.49))
    names = ("first run", "second run", "third run", "fourth run")
    points = [(name, x, y, "measured") for name, (x, y) in zip(names, close, strict=True)]
    chart = trade_off_chart("k", "t", [*points, ("far", 0.9, 0.9, "measured")], {})
    texts = drawn_texts(chart)
    places = [(float(texts[name].attrib["x"]), float(texts[name].attrib["y"])) for name in names]
    for i, (x, y) in enumerate(places):
        for a, b in places[:i]:
            assert abs(y - b) >= 8 or abs(x - a) > 40


def test_a_chart_keeps_hostile_and_unusual_names_as_text() -> None:
    names = ["a $x^2$ <i>b", "_hidden", "日本", "bell\x07 & co"]
    curves = {name: [(0.0, 0.1 * i), (1.0, 0.2)] for i, name in enumerate(names)}
    texts = drawn_texts(line_chart("k", "<title>", curves, "x", "y"))
    assert {"a $x^2$ <i>b", "_hidden", "日本", "bell & co"} <= set(texts)
    assert line_chart("k", "t", {"once": [(0.0, 1.0)]}, "x", "y") is None


def test_a_distribution_shows_its_mean_and_counts_what_lies_beyond() -> None:
    values = [float(i) for i in range(1000)]
    chart = distribution_chart("k", "t", {"run": [*values, float("nan"), 1e9]}, "x")
    assert chart is not None
    assert chart.xs is not None
    assert chart.xs[1] < 1100
    assert "Values beyond the axis, drawn at its ends: 1." in chart.text
    assert distribution_chart("k", "t", {"none": []}, "x") is None


def test_a_plot_takes_its_colours_from_the_page_and_a_file_brings_both_sets() -> None:
    chart = line_chart("k", "t", {"a": [(0.0, 0.0), (1.0, 1.0)]}, "x", "y")
    assert chart is not None
    element = draw_svg(chart)
    light, dark = COLOURS["accent"]
    assert f"var(--un-accent, {light})" in element
    assert f" {light}" not in element.replace(f"var(--un-accent, {light})", "")
    assert dark not in element
    assert "fill: #ffffff" not in element, "the background is transparent"
    assert dark in svg_file(chart)

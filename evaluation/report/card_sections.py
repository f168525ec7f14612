"""The sections of a report that show a strength curve and a robustness card."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from evaluation.report.blocks import (
    DASH,
    HIGHER,
    LOWER,
    Block,
    Cell,
    Column,
    Figure,
    Heading,
    Note,
    Para,
    Section,
    Table,
    fixed,
    p_text,
    plain,
)
from evaluation.report.cards import Calibration, Curve, Robustness, Search
from evaluation.report.old_plots import robustness_charts, strength_charts

# Columns of figures by key: their heads and directions.
FIGURES = {
    "forget_quality": ("Forget quality (p)", HIGHER),
    "forget_quality_log10": ("log10", HIGHER),
    "ks": ("KS D", LOWER),
    "log_r_gap": ("Gap of log R", "→ 0 is best"),
    "log_r_shift": ("Shift of log R", "→ 0 is best"),
    "direction": ("Direction", ""),
    "model_utility": ("Model utility", HIGHER),
    "forget_nll": ("Forget NLL", "best near the reference's"),
    "retrain_forget_nll": ("Retrain's forget NLL", ""),
    "forget_rouge_l_recall": ("Forget ROUGE-L", LOWER),
    "forget_answer_prob": ("Forget answer prob.", LOWER),
    "retain_answer_prob": ("Retain answer prob.", HIGHER),
}


def calibration_section(found: Calibration, number: int) -> Section:
    """The strength curve with the chosen point, as plots and as a table."""
    about = found.about
    chosen = "none was chosen" if found.chosen_scale is None else f"{found.chosen_scale:g}"
    said = [f"Chosen strength of {found.name}: {chosen}."]
    if about.get("reason"):
        said.append(f"Why: {plain(about['reason'])}.")
    if about.get("rule"):
        said.append(f"Rule: {plain(about['rule'])}.")
    said += [
        f"{word}: {plain(about[key])}."
        for key, word in (("split", "Split"), ("protocol", "Protocol"), ("tried", "Tried"))
        if about.get(key) is not None
    ]
    blocks: list[Block] = [Para(" ".join(said))]
    blocks += [Figure(chart) for chart in strength_charts(found)]
    if found.curve:
        head = Column("Strength")
        marked = [row["scale"] == found.chosen_scale for row in found.curve]
        blocks.append(
            _figure_table(
                f"Strength curve of {found.name}", found.curve, head,
                [Cell(f"{r['scale']:g}", "chosen" if m else "")
                 for r, m in zip(found.curve, marked, strict=True)],
                tuple("total" if m else "measured" for m in marked),
            )
        )  # fmt: skip
    if found.evaluations:
        names = [Cell(f"{row['scale']:g}") for row in found.evaluations]
        caption = "Whole evaluations at some strengths"
        blocks.append(_figure_table(caption, found.evaluations, Column("Strength"), names))
    if found.held_out:
        blocks.append(facts_table("On rows that did not choose it", found.held_out))
    title = "Strength curve" + (f", {found.name}" if found.name else "")
    return Section(f"strength-{number + 1}", title, tuple(blocks))


def robustness_section(card: Robustness, number: int) -> Section:
    """Verdicts, states, relearning, sampling, paraphrases: what was measured of it."""
    said = [
        f"{word}: {plain(card.about[key])}."
        for key, word in (
            ("base", "Base"), ("adapters", "Adapters"), ("split", "Split"),
            ("protocol", "Protocol"),
        )
        if card.about.get(key) is not None
    ]  # fmt: skip
    blocks: list[Block] = [Para(" ".join(said))] if said else []
    if card.about.get("limit") is not None:
        text = f"Limited to the first {plain(card.about['limit'])} rows: for a quick look only."
        blocks.append(Note(text))
    if card.verdicts:
        blocks.append(_verdicts(card.verdicts))
    if card.states:
        names = [Cell(str(row["name"])) for row in card.states]
        blocks.append(
            _figure_table(
                "The same adapter in each state", card.states, Column("State", numeric=False), names
            )
        )
    charts = [Figure(chart) for chart in robustness_charts(card)]
    if card.relearning:
        blocks += [Heading("Relearning"), _about(card.relearning_about)]
        blocks += [f for f in charts if f.chart.key.startswith("relearning")]
        keys = {"seen_answer_prob": "seen", "unseen_answer_prob": "unseen"}
        blocks.append(_curve_table("Answer probability by step", card.relearning, "step", keys))
    if card.sampling:
        blocks += [Heading("Sampling"), _about(card.sampling_about)]
        blocks += [f for f in charts if f.chart.key.startswith("sampling")]
        keys = {"share_leaked": "share leaked", "best_rouge_l_recall": "best ROUGE-L"}
        blocks.append(_curve_table("What leaks in n answers", card.sampling, "n", keys))
    if card.paraphrase:
        blocks += [Heading("Paraphrases and other forms"), _paraphrase(card.paraphrase)]
    if card.drop:
        blocks += [Heading("Adapter drop"), facts_table("The adapter switched off", card.drop)]
    title = "Robustness" + (f", {card.name}" if card.name else "")
    return Section(f"robustness-{number + 1}", title, tuple(blocks))


def search_section(found: Search, number: int) -> Section:
    """How many settings were tried, and the chosen ones on the seed that chose and on others."""
    blocks: list[Block] = [
        Para(
            f"{found.tried} configurations were tried. The chosen one was chosen by its figures on "
            "the first seed, which are therefore optimistic; the other seeds did not choose."
        )
    ]
    rows = [row for row in (found.selected, *found.held_out) if row]
    if rows:
        words = ["chosen by it", *["held out"] * len(found.held_out)]
        names = [
            Cell(f"seed {plain(row.get('seed'))}", word)
            for row, word in zip(rows, words[-len(rows) :], strict=True)
        ]
        caption = "The chosen settings on every seed"
        blocks.append(_figure_table(caption, rows, Column("Seed", numeric=False), names))
    if found.settings:
        blocks.append(facts_table("The chosen settings", found.settings))
    return Section(f"search-{number + 1}", f"Search, {found.name}", tuple(blocks))


def _verdicts(rows: Sequence[Mapping[str, Any]]) -> Table:
    columns = (
        Column("Verdict", numeric=False), Column("Holds", numeric=False), Column("Value"),
        Column("Threshold"), Column("In words", numeric=False),
    )  # fmt: skip
    words = {True: "✓ holds", False: "✗ does not hold", None: "not measured"}
    cells = tuple(
        (
            Cell(str(row["name"])), Cell(words.get(row.get("holds"), plain(row.get("holds")))),
            Cell(_figure(row.get("value"))), Cell(_figure(row.get("threshold"))),
            Cell(str(row["text"])),
        )
        for row in rows
    )  # fmt: skip
    return Table("Verdicts, each with its threshold", columns, cells)


def _figure(value: Any, key: str = "") -> str:
    if value is None:
        return DASH
    if key == "forget_quality":
        return p_text(value)
    if isinstance(value, int | float) and not isinstance(value, bool):
        signed = key in ("log_r_gap", "log_r_shift")
        return fixed(value, 3, signed) if isinstance(value, float) or key else str(value)
    return plain(value)


def _figure_table(
    caption: str,
    rows: Sequence[Mapping[str, Any]],
    head: Column,
    names: Sequence[Cell],
    kinds: tuple[str, ...] = (),
) -> Table:
    """The figures that any of the rows has, a column each."""
    keys = [key for key in FIGURES if any(row.get(key) is not None for row in rows)]
    columns = (head, *(Column(*FIGURES[key], numeric=key != "direction") for key in keys))
    cells = tuple(
        (name, *(Cell(_figure(row.get(key), key)) for key in keys))
        for name, row in zip(names, rows, strict=True)
    )
    return Table(caption, columns, cells, kinds)


def _curve_table(caption: str, curves: Sequence[Curve], x: str, keys: Mapping[str, str]) -> Table:
    """The curves' points, a row each place and a column each curve and figure."""
    places = sorted({point[x] for one in curves for point in one.points})
    shown = [
        (f"{one.name}, {word}", {point[x]: point.get(key) for point in one.points})
        for one in curves
        for key, word in keys.items()
        if any(point.get(key) is not None for point in one.points)
    ]
    columns = (Column(x), *(Column(name) for name, _ in shown))
    rows = tuple(
        (Cell(f"{place:g}"), *(Cell(fixed(values.get(place))) for _, values in shown))
        for place in places
    )
    return Table(caption, columns, rows)


def _paraphrase(rows: Sequence[Mapping[str, Any]]) -> Table:
    columns = (
        Column("Form", numeric=False), Column("Answer prob., base"),
        Column("Answer prob., unlearned", LOWER), Column("ROUGE-L, base"),
        Column("ROUGE-L, unlearned", LOWER), Column("n"),
    )  # fmt: skip
    keys = ("base_answer_prob", "answer_prob", "base_rouge_l_recall", "rouge_l_recall")
    cells = tuple(
        (
            Cell(str(row["form"])), *(Cell(fixed(row.get(key))) for key in keys),
            Cell(plain(row.get("n"))),
        )
        for row in rows
    )  # fmt: skip
    return Table("The same facts asked in other words", columns, cells)


def _about(about: Mapping[str, Any]) -> Para:
    said = [f"{key.replace('_', ' ')}: {plain(value)}." for key, value in about.items()]
    return Para(" ".join(said) or "Its settings are not recorded.")


def facts_table(caption: str, facts: Mapping[str, Any]) -> Table:
    """Recorded facts as two columns, in the order in which they were recorded."""
    columns = (Column("Field", numeric=False), Column("Value", numeric=False))
    rows = tuple((Cell(str(key)), Cell(plain(value))) for key, value in facts.items())
    return Table(caption, columns, rows)

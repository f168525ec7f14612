"""The sections of a report that show a strength curve, a robustness card or a search."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from evaluation.report.cards import VERDICT_WORDS, Card, Figures
from evaluation.report.document import Block, Cell, Column, Plots, Section, Table, Text
from evaluation.report.numbers import DASH, fixed, p_text, plain
from evaluation.report.plots import Chart, Point, Rule, file_key, line_chart

HIGHER, LOWER = "↑ higher is better", "↓ lower is better"
NEAR_ZERO, NEAR_REFERENCE = "→ 0 is best", "best near the reference's"
# Columns of the figures, by key.
FIGURES: dict[str, Column | str] = {
    "forget_quality": Column("Forget quality (p)", HIGHER),
    "forget_quality_log10": Column("log10", HIGHER),
    "ks": Column("KS D", LOWER),
    "log_r_gap": Column("Gap of log R", NEAR_ZERO),
    "log_r_shift": Column("Shift of log R", NEAR_ZERO),
    "direction": "Direction",
    "model_utility": Column("Model utility", HIGHER),
    "forget_nll": Column("Forget NLL", NEAR_REFERENCE),
    "retrain_forget_nll": Column("Retrain's forget NLL"),
    "forget_rouge_l_recall": Column("Forget ROUGE-L", LOWER),
    "forget_answer_prob": Column("Forget answer prob.", LOWER),
    "retain_answer_prob": Column("Retain answer prob.", HIGHER),
}
STRENGTH_CURVES = {
    "KS D": "ks", "forget answer prob.": "forget_answer_prob",
    "retain answer prob.": "retain_answer_prob", "model utility": "model_utility",
}  # fmt: skip
SLOTS = {"retrain": 0, "unlearned": 1, "origin": 2}
Columns = Mapping[str, tuple[Column | str, Callable[[Any], str]]]


def calibration_section(card: Card, number: int) -> Section:
    """The strength curve with the chosen strength, as plots and as a table."""
    owner, scale = card["name"], card["chosen_scale"]
    chosen = "none was chosen" if scale is None else f"{scale:g}"
    facts = _sentences(card["about"], "why: reason", "rule", "split", "protocol", "tried")
    blocks: list[Block] = [f"Chosen strength of {owner}: {chosen}. {facts}".strip()]
    blocks += _plots(*_strength_charts(card))
    strength = Column("Strength")
    if card["curve"]:
        is_chosen = [row["scale"] == scale for row in card["curve"]]
        names = [
            Cell(f"{row['scale']:g}", "chosen" if marked else "")
            for row, marked in zip(card["curve"], is_chosen, strict=True)
        ]
        kinds = ["total" if marked else "measured" for marked in is_chosen]
        caption = f"Strength curve of {owner}"
        blocks.append(figure_table(caption, card["curve"], strength, names, kinds))
    if card["evaluations"]:
        scales = [f"{row['scale']:g}" for row in card["evaluations"]]
        caption = "Full evaluations at some strengths"
        blocks.append(figure_table(caption, card["evaluations"], strength, scales))
    if card["held_out"]:
        blocks.append(_facts_table("On rows that were not used to choose it", card["held_out"]))
    return Section(f"strength-{number + 1}", f"Strength curve, {owner}", blocks)


def _strength_charts(card: Card) -> list[Chart | None]:
    """The gap of log R over the strength, and what each strength forgets and keeps."""
    owner, chosen = card["name"], card["chosen_scale"]
    rules = () if chosen is None else (Rule(chosen, f"chosen {chosen:g}"),)
    x = "strength of the adapter (1 is as trained)"
    return [
        line_chart(
            file_key("strength-gap", owner), f"Gap of log R over strength, {owner}",
            {"log R gap": figure_points(card["curve"], "scale", "log_r_gap")}, x,
            "log R gap to the retrain reference",
            rules=(Rule(0.0, "as the reference", level=True), *rules),
        ),
        line_chart(
            file_key("strength-cost", owner),
            f"What each strength forgets and keeps, {owner}",
            {n: figure_points(card["curve"], "scale", key) for n, key in STRENGTH_CURVES.items()},
            x, "value", ys=(0.0, 1.0), rules=rules,
        ),
    ]  # fmt: skip


def robustness_section(card: Card, number: int) -> Section:
    """Verdicts, states, relearning, sampling and paraphrases: each part that was measured."""
    owner, about = card["name"], card["about"]
    facts = _sentences(about, "base", "adapters", "split", "protocol")
    blocks: list[Block] = [facts] if facts else []
    if about.get("limit") is not None:
        limit = plain(about["limit"])
        blocks.append(Text("note", f"Limited to the first {limit} rows: for a quick look only."))
    if card["verdicts"]:
        blocks.append(verdict_table(card["verdicts"]))
    if card["states"]:
        names = [str(row["name"]) for row in card["states"]]
        blocks.append(
            figure_table("The same adapter in each state", card["states"], "State", names)
        )
    if card["relearning"]:
        charts = (
            line_chart(
                file_key("relearning", key, owner), f"Relearning, {rows}, {owner}",
                _curves(card["relearning"], "step", f"{key}_answer_prob"), "steps of relearning",
                "answer probability", ys=(0.0, 1.0), levels=True, slots=SLOTS,
            )
            for key, rows in (("seen", "the rows trained on"), ("unseen", "rows not trained on"))
        )  # fmt: skip
        blocks += [
            Text("heading", "Relearning"),
            _settings(card["relearning_about"]),
            *_plots(*charts),
        ]
        keys = {"seen_answer_prob": "seen", "unseen_answer_prob": "unseen"}
        blocks.append(_curve_table("Answer probability by step", card["relearning"], "step", keys))
    if card["sampling"]:
        charts = (
            line_chart(
                file_key("sampling", key, owner), f"Sampling: {name}, {owner}",
                _curves(card["sampling"], "n", key), "answers drawn (log scale)",
                f"{name} of n answers", ys=(0.0, 1.0), slots=SLOTS, log2=True,
            )
            for key, name in (
                ("share_leaked", "share of rows leaked"),
                ("best_rouge_l_recall", "best ROUGE-L recall"),
            )
        )  # fmt: skip
        blocks += [Text("heading", "Sampling"), _settings(card["sampling_about"]), *_plots(*charts)]
        keys = {"share_leaked": "share leaked", "best_rouge_l_recall": "best ROUGE-L"}
        blocks.append(_curve_table("What leaks in n answers", card["sampling"], "n", keys))
    if card["paraphrase"]:
        columns: Columns = {
            "form": ("Form", plain), "base_answer_prob": (Column("Answer prob., base"), fixed),
            "answer_prob": (Column("Answer prob., unlearned", LOWER), fixed),
            "retrain_answer_prob": (Column("Answer prob., Retrain"), fixed),
            "base_rouge_l_recall": (Column("ROUGE-L, base"), fixed),
            "rouge_l_recall": (Column("ROUGE-L, unlearned", LOWER), fixed),
            "base_fact_recall": (Column("Facts, base"), fixed),
            "fact_recall": (Column("Facts, unlearned", LOWER), fixed),
            "retrain_fact_recall": (Column("Facts, Retrain"), fixed),
            "n": (Column("n"), plain),
        }  # fmt: skip
        table = record_table("The same facts asked in other ways", card["paraphrase"], columns)
        blocks += [Text("heading", "Paraphrases and other forms"), table]
    if card["probe"]:
        chart = line_chart(
            file_key("probe", owner), f"Linear probe of hidden states, {owner}",
            _curves(card["probe"], "layer", "forgotten"), "layer",
            "wrong answers below the true one", ys=(0.0, 1.0), levels=True, slots=SLOTS,
        )  # fmt: skip
        keys = {"retained": "retained", "forgotten": "forgotten"}
        blocks += [
            Text("heading", "Linear probe"),
            *_plots(chart),
            _curve_table("Wrong answers ranked below the true one", card["probe"], "layer", keys),
        ]
    if card["drop"]:
        table = _facts_table("With the adapter inactive", card["drop"])
        blocks += [Text("heading", "Adapter drop"), table]
    return Section(f"robustness-{number + 1}", f"Robustness, {owner}", blocks)


def search_section(search: Card, number: int) -> Section:
    """The number of settings tried, and the chosen ones on the seed that chose and on others."""
    blocks: list[Block] = [
        f"{search['tried']} configurations were tried. The configuration was chosen by its figures "
        "on the first seed, which are therefore optimistic; the other seeds had no part in the "
        "choice."
    ]
    rows = [row for row in (search["selected"], *search["held_out"]) if row]
    if rows:
        roles = ["chosen by it", *["held out"] * len(search["held_out"])][-len(rows) :]
        names = [
            Cell(f"seed {plain(row.get('seed'))}", role)
            for row, role in zip(rows, roles, strict=True)
        ]
        blocks.append(figure_table("The chosen settings on every seed", rows, "Seed", names))
    if search["settings"]:
        blocks.append(_facts_table("The chosen settings", search["settings"]))
    return Section(f"search-{number + 1}", f"Search, {search['name']}", blocks)


def verdict_table(verdicts: Sequence[Figures]) -> Table:
    """Every verdict beside its threshold."""

    def verdict(holds: Any) -> str:
        return {True: "✓ ", False: "✗ "}.get(holds, "") + VERDICT_WORDS.get(holds, plain(holds))

    columns: Columns = {
        "name": ("Attack", plain), "holds": ("Verdict", verdict),
        "value": (Column("Value"), figure_text), "threshold": (Column("Threshold"), figure_text),
        "text": ("Meaning", plain),
    }  # fmt: skip
    return record_table("Verdicts, each with its threshold", verdicts, columns)


def record_table(caption: str, rows: Sequence[Figures], columns: Columns) -> Table:
    """Recorded rows as a table: a column for each key that any row has, and how it is written."""
    columns = {k: c for k, c in columns.items() if any(k in row for row in rows)}
    cells = [[write(row.get(key)) for key, (_, write) in columns.items()] for row in rows]
    return Table(caption, tuple(column for column, _ in columns.values()), cells)


def figure_table(
    caption: str,
    rows: Sequence[Figures],
    head: Column | str,
    names: Sequence[Cell | str],
    kinds: Sequence[str] = (),
) -> Table:
    """A column for each figure that any of the rows has."""
    keys = [key for key in FIGURES if any(row.get(key) is not None for row in rows)]
    cells = [
        [name, *(figure_text(row.get(key), key) for key in keys)]
        for name, row in zip(names, rows, strict=True)
    ]
    return Table(caption, (head, *(FIGURES[key] for key in keys)), cells, kinds)


def figure_text(value: Any, key: str = "") -> str:
    """A figure as the tables show it; `key` names it."""
    if value is None:
        return DASH
    if key == "forget_quality":
        return p_text(value)
    if isinstance(value, float):
        return fixed(value, 3, key in ("log_r_gap", "log_r_shift"))
    return plain(value)


def figure_points(rows: Sequence[Figures], x: str, y: str) -> list[Point]:
    """The measured points, in order of x."""
    return sorted((float(row[x]), float(row[y])) for row in rows if row.get(y) is not None)


def _plots(*charts: Chart | None) -> list[Block]:
    drawn = tuple(chart for chart in charts if chart is not None)
    return [Plots(drawn)] if drawn else []


def _curves(curves: Sequence[Figures], x: str, y: str) -> dict[str, list[Point]]:
    return {curve["name"]: figure_points(curve["points"], x, y) for curve in curves}


def _curve_table(caption: str, curves: Sequence[Figures], x: str, keys: Mapping[str, str]) -> Table:
    """A row for each x, and a column for each curve and figure."""
    columns = {
        f"{curve['name']}, {word}": dict(points)
        for curve in curves
        for key, word in keys.items()
        if (points := figure_points(curve["points"], x, key))
    }
    places = sorted({float(point[x]) for curve in curves for point in curve["points"]})
    rows = [
        [f"{place:g}", *(fixed(values.get(place)) for values in columns.values())]
        for place in places
    ]
    return Table(caption, (Column(x), *map(Column, columns)), rows)


def _sentences(about: Figures, *facts: str) -> str:
    """`Split: forget05.` for each fact that is recorded; `word: key` names it by another word."""
    pairs = [(fact.split(": ")[0].capitalize(), fact.split(": ")[-1]) for fact in facts]
    parts = (f"{word}: {plain(about[k])}." for word, k in pairs if about.get(k) is not None)
    return " ".join(parts)


def _settings(about: Figures) -> str:
    text = " ".join(f"{key.replace('_', ' ')}: {plain(value)}." for key, value in about.items())
    return text or "Its settings are not recorded."


def _facts_table(caption: str, facts: Figures) -> Table:
    rows = [[str(key), plain(value)] for key, value in facts.items()]
    return Table(caption, ("Field", "Value"), rows)

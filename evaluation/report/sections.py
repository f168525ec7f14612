"""The sections of a report in reading order: figures first, then how they were made."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

from evaluation.metrics.forget_quality import NEEDS_RETRAIN
from evaluation.report.build import (
    MEASURED,
    PUBLISHED_SOURCE,
    REFERENCE,
    SECOND,
    Published,
    Report,
    System,
    View,
)
from evaluation.report.card_sections import (
    FIGURES,
    HIGHER,
    LOWER,
    NEAR_REFERENCE,
    Columns,
    calibration_section,
    record_table,
    robustness_section,
    search_section,
)
from evaluation.report.document import (
    Block,
    Cell,
    Column,
    Plots,
    Section,
    Table,
    Text,
    with_distinct_plots,
)
from evaluation.report.numbers import DASH, fixed, interval_text, p_text, plain
from evaluation.report.plots import Chart, Gap, distribution_chart, file_key, trade_off_chart

SHOWN = (
    "forget_quality", "ks", "log_r_shift", "direction", "model_utility", "forget_nll",
    "forget_answer_prob", "forget_rouge_l_recall", "retain_answer_prob",
)  # fmt: skip
COLUMNS = ("System", "Source", *(FIGURES[key] for key in SHOWN), Column("n"), "Protocol")
PRIVATE = (
    "This report holds questions and answers of the forget set. Keep it as private as the data; "
    "--without-answers leaves them out."
)
WITHOUT_ANSWERS = (
    "Questions and answers were left out (--without-answers). Forget quality alone does not show "
    "whether a model still writes sentences: read some answers before you trust it."
)
READING = (
    ("Forget quality", HIGHER, "p-value of the two-sample Kolmogorov-Smirnov test of log R on the "
     "forget rows, against a model that never saw them. It shrinks with the number of rows and "
     "cannot tell too little forgetting from too much: read D, shift and direction."),
    ("KS D", LOWER, "largest distance between the two distribution functions of log R. Resampling "
     "adds noise to a value that cannot be negative, so its interval lies high: read its upper "
     "end."),
    ("Shift of log R", "→ 0", "median log R minus the reference's, in nats per token. Negative: "
     "the right answer is still preferred, under-forgotten. Positive: over-forgotten."),
    ("Direction", "indistinguishable", "the word for the shift; indistinguishable where p > 0.05."),
    ("Model utility", HIGHER, "harmonic mean of nine parts: ROUGE-L recall, probability and truth "
     "ratio on retain authors, real authors and world facts."),
    ("Forget NLL", NEAR_REFERENCE, "mean negative log-likelihood of the true answers, in nats per "
     "token. Far above the reference's means that text is broken, not forgotten."),
    ("[low, high]", "", "95 % percentile interval of a bootstrap over rows."),
)  # fmt: skip


def sections(report: Report) -> tuple[Section, ...]:
    """The whole report as sections; parts without input are left out."""
    parts = [_summary(report)]
    for view in report.views:
        parts += _view_sections(report, view)
    parts += [search_section(search, i) for i, search in enumerate(report.searches)]
    parts += [calibration_section(card, i) for i, card in enumerate(report.calibration)]
    parts += [robustness_section(card, i) for i, card in enumerate(report.robustness)]
    if report.answers:
        parts.append(_answers(report))
    rows = [[name, better or DASH, text] for name, better, text in READING]
    table = Table("What the figures mean", ("Figure", "Better", "Meaning"), rows)
    parts += [Section("reading", "How to read the figures", [table]), _provenance(report)]
    return with_distinct_plots(parts)


def _summary(report: Report) -> Section:
    notes = []
    if report.views:  # cards hold no texts
        notes.append(WITHOUT_ANSWERS if report.without_answers else PRIVATE)
        limited = [s.name for s in report.views[0].systems if s.figures["limited"]]
        if limited:
            notes.append(
                f"Limited: {', '.join(limited)} measured on the first rows of each set only. "
                "These figures are for a quick look and must not be compared with others."
            )
        if report.retrain is None:
            notes.append(
                f"Forget quality {NEEDS_RETRAIN}: a log of a model that never saw the forget "
                "set, given by --reference-log or named retrain."
            )
    notes += [f"{text}." for text in report.warnings]
    facts = {"Configurations tried": report.tried, "Retrain reference": report.retrain,
             "Date": report.date}  # fmt: skip
    text = " ".join(f"{name}: {value}." for name, value in facts.items() if value)
    return Section("summary", "Before you read", [*(Text("note", note) for note in notes), text])


def _view_sections(report: Report, view: View) -> list[Section]:
    """The table, the plots and the utility of one protocol."""
    blocks: dict[tuple[str, str], list[Block]] = {}
    blocks["systems", "Systems"] = _system_blocks(report, view)
    chart = quality_chart(view, report.published)
    if chart is not None:
        zero = ", ".join(row.name for row in report.published if row.forget_quality <= 0)
        note = f"Published as 0.00, which has no place on a log axis: {zero}."
        title = "Forgetting against keeping"
        blocks["trade", title] = [Plots((chart,)), *([note] if zero else [])]
    curves = tuple(c for system in view.systems if (c := ecdf_chart(view, system)) is not None)
    if curves:
        about = (
            "Each plot shows the share of forget rows with log R at or below a value, for the "
            "system and for the retrain reference. D is the largest distance between the two, "
            "drawn where it is reached."
        )
        blocks["log-r", "Distributions of log R"] = [about, Plots(curves)]
    utility = _utility_table(view)
    if utility is not None:
        blocks["utility", "Parts of model utility"] = [utility]
    many = len(report.views) > 1
    key, suffix = (f"-{view.protocol}", f", protocol {view.protocol}") if many else ("", "")
    return [Section(f"{k}{key}", f"{title}{suffix}", each) for (k, title), each in blocks.items()]


def _system_blocks(report: Report, view: View) -> list[Block]:
    blocks: list[Block] = [_system_table(view, report.published)]
    if report.published:
        source = PUBLISHED_SOURCE.format(split=report.published[0].split)
        blocks.append(
            f"Published rows: {source}. Compare them only with figures of the same model, split "
            "and protocol. A dash: not published."
        )
    if report.checks:
        columns: Columns = {
            "name": ("System", plain), "figure": ("Figure", plain),
            "measured": (Column("Measured"), p_text), "published": (Column("Published"), p_text),
            "text": ("Result", plain),
        }  # fmt: skip
        caption = "Measured against published, as the reproduction recorded it"
        blocks.append(record_table(caption, report.checks, columns))
    for system in view.systems:
        f = system.figures
        if system.role == SECOND and f["ks"] is not None:
            blocks.append(
                f"Band of the reference: a second model that never saw the forget set "
                f"({system.name}) gets forget quality {p_text(f['forget_quality'])}, "
                f"D {fixed(f['ks'], 4)} and a shift of {fixed(f['log_r_shift'], 4, True)} "
                "against the first."
            )
    return blocks


def _system_table(view: View, published: Sequence[Published]) -> Table:
    """A row for each system, with the published row of the same name below it."""
    rows: list[tuple[str, Sequence[Cell | str]]] = []
    remaining = {row.name: row for row in published}
    for system in view.systems:
        rows.append(("measured" if system.role == MEASURED else "reference", _system_row(system)))
        if system.name in remaining:
            rows.append(("published", _published_row(remaining.pop(system.name))))
    rows += [("published", _published_row(row)) for row in remaining.values()]
    caption = f"Systems under protocol {view.protocol}, measured and published"
    return Table(caption, COLUMNS, [row for _, row in rows], [kind for kind, _ in rows])


def _system_row(system: System) -> list[Cell | str]:
    f = system.figures
    quality = Cell(f["reasons"].get("forget_quality", ""))
    if f["forget_quality"] is not None:
        ends = f["forget_quality_interval"]
        spread = "" if ends is None else f"[{p_text(ends[0])}, {p_text(ends[1])}]; "
        small = f"{spread}log10 {fixed(f['forget_quality_log10'], 2)}"
        is_reference = system.role == REFERENCE
        quality = Cell(
            p_text(f["forget_quality"]), "the reference itself" if is_reference else small
        )

    def mean(name: str, sign: bool = False) -> Cell:
        return _mean(f[name], f[f"{name}_interval"], sign)

    utility = mean("model_utility")
    reference = f["retrain_forget_nll"]
    return [
        Cell(system.name, "limited" if f["limited"] else ""),
        Cell("measured", "" if system.role == MEASURED else system.role),
        quality,
        mean("ks"),
        mean("log_r_shift", True),
        f["direction"] or DASH,
        Cell(utility.text, utility.small or f["reasons"].get("model_utility", "")),
        Cell(fixed(f["forget_nll"]), "" if reference is None else f"retrain {fixed(reference)}"),
        mean("forget_answer_prob"),
        mean("forget_rouge_l_recall"),
        mean("retain_answer_prob"),
        str(f["n"]),
        f["protocol"],
    ]


def _published_row(row: Published) -> list[str]:
    quality, utility = fixed(row.forget_quality, 2), fixed(row.model_utility, 2)
    return [row.name, "published", quality, *[DASH] * 3, utility, *[DASH] * 6]


def quality_chart(view: View, published: Sequence[Published]) -> Chart | None:
    """log10 forget quality against model utility, with the Pareto front of the measured systems."""
    points = []
    for system in view.systems:
        x, y = system.figures["model_utility"], system.figures["forget_quality_log10"]
        kind = MEASURED if system.role == MEASURED else "retrain reference"
        if x is not None and y is not None:
            points.append((system.name, x, y, kind))
    if not points:
        return None
    points += [
        (f"{row.name} (published)", row.model_utility, math.log10(row.forget_quality), "published")
        for row in published
        if row.forget_quality > 0
    ]
    key = file_key(view.protocol, "quality-utility")
    title = f"Forget quality against model utility, protocol {view.protocol}"
    return trade_off_chart(key, title, points, {MEASURED: "front of the measured"})


def ecdf_chart(view: View, system: System) -> Chart | None:
    """Both distributions of log R with D where it is reached; None for the reference itself."""
    ecdf = system.ecdf
    if ecdf is None or system.role == REFERENCE:
        return None
    f = system.figures
    text = (
        f"The curves are furthest apart at log R = {fixed(ecdf.at)}: {fixed(ecdf.ours_at)} of the "
        f"rows of {system.name} lie at or below it, {fixed(ecdf.theirs_at)} of the reference's. "
        f"D = {fixed(ecdf.d, 4)}, p = {p_text(f['forget_quality'])}, shift of the median "
        f"{fixed(f['log_r_shift'], 3, True)} ({f['direction']})."
    )
    return distribution_chart(
        file_key(view.protocol, "ecdf", system.name),
        f"log R of {system.name} against the retrain reference, protocol {view.protocol}",
        {
            f"retrain reference, n = {len(ecdf.theirs)}": ecdf.theirs,
            f"{system.name}, n = {len(ecdf.ours)}": ecdf.ours,
        },
        "log R, nats per token (below 0: the right answer is likelier)",
        text=text, gap=Gap(ecdf.at, ecdf.ours_at, ecdf.theirs_at, f"D = {fixed(ecdf.d)}"),
    )  # fmt: skip


def _utility_table(view: View) -> Table | None:
    """The nine parts of model utility with their intervals, a column for each system."""
    figures = [system.figures for system in view.systems]
    names = list(dict.fromkeys(name for f in figures for name in f["model_utility_parts"]))
    if not names:
        return None
    rows: list[list[Cell | str]] = [
        [name, *(_mean(f["model_utility_parts"].get(name),
                       f["model_utility_part_intervals"].get(name)) for f in figures)]
        for name in names
    ]  # fmt: skip
    total = (_mean(f["model_utility"], f["model_utility_interval"]) for f in figures)
    rows.append([Cell("Model utility", "harmonic mean"), *total])
    columns: list[Column | str] = ["Part", *(Column(each.name, HIGHER) for each in view.systems)]
    caption = f"Nine parts of model utility, protocol {view.protocol}"
    return Table(caption, tuple(columns), rows, [*["measured"] * len(names), "total"])


def _mean(value: float | None, interval: Any, sign: bool = False) -> Cell:
    """A mean above its 95 % interval."""
    return Cell(fixed(value, 3, sign), interval_text(interval))


def _answers(report: Report) -> Section:
    blocks: list[Block] = [
        f"Answers as decoded for protocol {report.views[0].protocol}. Words of the true answer "
        "that the given answer lacks are struck through; words of the given answer that the true "
        "one lacks are bold and underlined (bold alone in Markdown)."
    ]
    for name in dict.fromkeys(answers.system for answers in report.answers):
        blocks.append(Text("heading", name))
        blocks += [answers for answers in report.answers if answers.system == name]
    return Section("answers", "Best and worst answers", blocks)


def _provenance(report: Report) -> Section:
    """Command, versions, digests of the inputs, and the settings and seeds they record."""
    files = [[file.kind, file.name, file.path, file.sha256] for file in report.files]
    about = [[file.name, file.kind, plain(file.about)] for file in report.files if file.about]
    command = Text("code", report.command) if report.command else "Its command is not recorded."
    blocks: list[Block] = [
        Text("heading", "This report"),
        command,
        f"Versions: {plain(report.versions)}.",
        f"Configurations tried: {report.tried}.",
        Text("heading", "Inputs"),
        Table("Files that this report was made from", ("Kind", "Name", "Path", "sha256"), files),
    ]
    if about:
        columns = ("Name", "Kind", "Recorded in it")
        blocks.append(Table("How the inputs were made, as they record it", columns, about))
    blocks.append(Text("heading", "Settings and seeds"))
    blocks.append(f"Intervals: {plain(report.settings['bootstrap'])}.")
    for name, settings in report.settings["protocols"].items():
        blocks.append(f"Protocol {name}: {plain(settings)}.")
    for name, settings in report.settings["methods"].items():
        text = json.dumps(settings, indent=1, ensure_ascii=False, sort_keys=True)
        blocks += [f"Training of {name}:", Text("code", text)]
    return Section("provenance", "Provenance", blocks)

"""The sections of a report in the order of reading: figures first, then what made them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from evaluation.metrics.statistics import NEEDS_RETRAIN
from evaluation.report.blocks import (
    DASH,
    HIGHER,
    LOWER,
    Answers,
    Block,
    Cell,
    Column,
    Figure,
    Heading,
    Note,
    Para,
    Section,
    Table,
    distinct,
    fixed,
    interval_text,
    p_text,
    plain,
)
from evaluation.report.card_sections import calibration_section, robustness_section, search_section
from evaluation.report.old_plots import ecdf_chart, quality_utility
from evaluation.report.provenance import provenance_section, reading_section
from evaluation.report.tree import (
    MEASURED,
    PUBLISHED_SOURCE,
    REFERENCE,
    SECOND,
    Published,
    Report,
    System,
    View,
)

NEAR = "best near the reference's"
COLUMNS = (
    Column("System", numeric=False),
    Column("Source", numeric=False),
    Column("Forget quality (p)", HIGHER),
    Column("KS D", LOWER),
    Column("Shift of log R", "→ 0 is best"),
    Column("Direction", numeric=False),
    Column("Model utility", HIGHER),
    Column("Forget NLL", NEAR),
    Column("Forget answer prob.", LOWER),
    Column("Forget ROUGE-L", LOWER),
    Column("Retain answer prob.", HIGHER),
    Column("n"),
    Column("Protocol", numeric=False),
)
HEAD_WITH = (
    "This report holds questions and answers of the forget set. Keep it like the data itself; "
    "made with --without-answers it holds none."
)
HEAD_WITHOUT = (
    "Questions and answers were left out (--without-answers). Forget quality alone does not show "
    "whether a model still writes sentences: read some answers before you believe it."
)


def sections(report: Report) -> tuple[Section, ...]:
    """The whole report as sections; parts without input are left out, and what is missing said."""
    found = [_summary(report)]
    for view in report.views:
        found += _view_sections(report, view)
    found += [search_section(one, i) for i, one in enumerate(report.searches)]
    found += [calibration_section(one, i) for i, one in enumerate(report.calibration)]
    found += [robustness_section(card, i) for i, card in enumerate(report.robustness)]
    if report.answers:
        found.append(_answers(report))
    found += [reading_section(), provenance_section(report)]
    return distinct(found)


def _summary(report: Report) -> Section:
    blocks: list[Block] = []
    if report.views:  # cards hold no texts
        blocks.append(Note(HEAD_WITHOUT if report.without_answers else HEAD_WITH))
    limited = [
        system.name
        for view in report.views[:1]
        for system in view.systems
        if system.figures["limited"]
    ]
    if limited:
        blocks.append(
            Note(
                f"Limited: {', '.join(limited)} measured on the first rows of each set only. "
                "These figures are for a quick look and must not be compared with others."
            )
        )
    if report.views and report.retrain is None:
        blocks.append(
            Note(
                f"Forget quality {NEEDS_RETRAIN}: a log of a model that never saw the forget "
                "set, named with --retain-log or called retrain."
            )
        )
    blocks += [Note(f"{text}.") for text in report.warnings]
    facts = [f"Configurations tried: {report.tried}."]
    if report.retrain is not None:
        facts.append(f"Retrain reference: {report.retrain}.")
    if report.date:
        facts.append(f"Date: {report.date}.")
    blocks.append(Para(" ".join(facts)))
    return Section("summary", "Before you read", tuple(blocks))


def _view_sections(report: Report, view: View) -> list[Section]:
    many = len(report.views) > 1
    suffix = f", protocol {view.protocol}" if many else ""
    key = f"-{view.protocol}" if many else ""
    table: list[Block] = [system_table(view, report.published)]
    if report.published:
        table.append(
            Para(
                f"Published rows: {PUBLISHED_SOURCE.format(split=report.published[0].split)}. They "
                "are of that model: hold only figures of the same model, split and protocol "
                "against them. A dash: not published."
            )
        )
    if report.checks:
        table.append(_checks(report.checks))
    band = next((s for s in view.systems if s.role == SECOND), None)
    if band is not None and band.figures["ks"] is not None:
        table.append(
            Para(
                f"Band of the reference: a second model that never saw the forget set "
                f"({band.name}) gets forget quality {p_text(band.figures['forget_quality'])}, "
                f"D {fixed(band.figures['ks'], 4)} and a shift of "
                f"{fixed(band.figures['log_r_shift'], 4, True)} against the first."
            )
        )
    found = [Section(f"systems{key}", f"Systems{suffix}", tuple(table))]
    plot = quality_utility(view, report.published)
    if plot is not None:
        blocks: list[Block] = [Figure(plot)]
        low = [row.name for row in report.published if row.forget_quality <= 0]
        if low:
            blocks.append(
                Para(f"Published as 0.00, which has no place on a log axis: {', '.join(low)}.")
            )
        found.append(Section(f"trade{key}", f"Forgetting against keeping{suffix}", tuple(blocks)))
    curves = [chart for one in view.systems if (chart := ecdf_chart(view, one)) is not None]
    if curves:
        about = Para(
            "Each plot shows the share of forget rows with log R at or below a value, for the "
            "system and for the retrain reference. D is the largest distance, marked at its place."
        )
        found.append(
            Section(f"log-r{key}", f"Distributions of log R{suffix}", (about, *map(Figure, curves)))
        )
    parts = utility_table(view)
    if parts is not None:
        found.append(Section(f"utility{key}", f"Parts of model utility{suffix}", (parts,)))
    return found


def system_table(view: View, published: Sequence[Published]) -> Table:
    """One row a system, each published row below the measured one of its name."""
    rows: list[tuple[Cell, ...]] = []
    kinds: list[str] = []
    left = {row.name: row for row in published}
    for system in view.systems:
        rows.append(_system_row(system))
        kinds.append("measured" if system.role == MEASURED else "reference")
        if system.name in left:
            rows.append(_published_row(left.pop(system.name)))
            kinds.append("published")
    for row in left.values():
        rows.append(_published_row(row))
        kinds.append("published")
    return Table(
        f"Systems under protocol {view.protocol}, measured and published",
        COLUMNS, tuple(rows), tuple(kinds),
    )  # fmt: skip


def _system_row(system: System) -> tuple[Cell, ...]:
    f = system.figures
    itself = system.role == REFERENCE
    quality = Cell(f["reasons"].get("forget_quality", ""))
    if f["forget_quality"] is not None:
        spread = "{}" if f["forget_quality_interval"] is None else "[{}, {}]; {}"
        ends = map(p_text, f["forget_quality_interval"] or ())
        small = spread.format(*ends, f"log10 {fixed(f['forget_quality_log10'], 2)}")
        quality = Cell(p_text(f["forget_quality"]), small)

    def mean(name: str) -> Cell:
        return Cell(fixed(f[name]), interval_text(f[f"{name}_interval"]))

    utility = Cell(
        fixed(f["model_utility"]),
        interval_text(f["model_utility_interval"]) or f["reasons"].get("model_utility", ""),
    )
    reference = f["retrain_forget_nll"]
    return (
        Cell(system.name, "limited" if f["limited"] else ""),
        Cell("measured", "" if system.role == MEASURED else system.role),
        Cell(quality.text, "the reference itself") if itself else quality,
        Cell(fixed(f["ks"]), interval_text(f["ks_interval"])),
        Cell(fixed(f["log_r_shift"], 3, True), interval_text(f["log_r_shift_interval"])),
        Cell(f["direction"] or DASH),
        utility,
        Cell(fixed(f["forget_nll"]), "" if reference is None else f"retrain {fixed(reference)}"),
        mean("forget_answer_prob"),
        mean("forget_rouge_l_recall"),
        mean("retain_answer_prob"),
        Cell(str(f["n"])),
        Cell(f["protocol"]),
    )


def _published_row(row: Published) -> tuple[Cell, ...]:
    unknown = Cell(DASH)
    return (
        Cell(row.name), Cell("published"), Cell(fixed(row.forget_quality, 2)), unknown, unknown,
        unknown, Cell(fixed(row.model_utility, 2)), *[unknown] * 6,
    )  # fmt: skip


def _checks(checks: Sequence[Mapping[str, Any]]) -> Table:
    """What a reproduction recorded of its figures against the published ones."""
    columns = (
        Column("System", numeric=False), Column("Figure", numeric=False), Column("Measured"),
        Column("Published"), Column("In words", numeric=False),
    )  # fmt: skip
    rows = tuple(
        (
            Cell(plain(check.get("name"))), Cell(plain(check.get("figure"))),
            Cell(p_text(check.get("measured"))), Cell(p_text(check.get("published"))),
            Cell(plain(check.get("text"))),
        )
        for check in checks
    )  # fmt: skip
    return Table("Measured against published, as the reproduction recorded it", columns, rows)


def utility_table(view: View) -> Table | None:
    """The nine parts of model utility with their intervals, a column a system."""
    parts = list(dict.fromkeys(p for s in view.systems for p in s.figures["model_utility_parts"]))
    if not parts:
        return None
    rows = [
        (
            Cell(part),
            *(
                Cell(
                    fixed(s.figures["model_utility_parts"].get(part)),
                    interval_text(s.figures["model_utility_part_intervals"].get(part)),
                )
                for s in view.systems
            ),
        )
        for part in parts
    ]
    rows.append(
        (
            Cell("Model utility", "harmonic mean"),
            *(
                Cell(
                    fixed(s.figures["model_utility"]),
                    interval_text(s.figures["model_utility_interval"]),
                )
                for s in view.systems
            ),
        )
    )
    columns = (
        Column("Part", numeric=False), *(Column(s.name, HIGHER) for s in view.systems),
    )  # fmt: skip
    kinds = (*["measured"] * len(parts), "total")
    return Table(
        f"Nine parts of model utility, protocol {view.protocol}", columns, tuple(rows), kinds
    )


def _answers(report: Report) -> Section:
    about = (
        f"Answers as decoded for protocol {report.views[0].protocol}. In the true answer the words "
        "that the given answer lacks are struck through; in the given answer the words that the "
        "true one does not have are bold and underlined (bold alone in Markdown)."
    )
    blocks: list[Block] = [Para(about)]
    for name in dict.fromkeys(one.system for one in report.answers):
        blocks.append(Heading(name))
        blocks += [Answers(one) for one in report.answers if one.system == name]
    return Section("answers", "Best and worst answers", tuple(blocks))

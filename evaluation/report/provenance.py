"""The last sections of a report: how to read its figures, and what they were made from."""

from __future__ import annotations

import json

from evaluation.report.blocks import (
    DASH,
    HIGHER,
    LOWER,
    Block,
    Cell,
    Code,
    Column,
    Heading,
    Para,
    Section,
    Table,
    plain,
)
from evaluation.report.tree import Report

READING = (
    ("Forget quality", HIGHER, "p-value of the two-sample Kolmogorov-Smirnov test of log R on the "
     "forget rows, against a model that never saw them. It shrinks with the number of rows and "
     "cannot tell forgotten too little from forgotten too much: read D, shift and direction."),
    ("KS D", LOWER, "largest distance of the two distribution functions of log R. Its interval "
     "lies high, as resampling adds noise to what cannot be negative: read its upper end."),
    ("Shift of log R", "→ 0", "median log R less the reference's, nats a token. Negative: the "
     "right answer is still preferred, under-forgotten. Positive: over-forgotten."),
    ("Direction", "indistinguishable", "the word for the shift; indistinguishable where p > 0.05."),
    ("Model utility", HIGHER, "harmonic mean of nine parts: ROUGE-L recall, probability and truth "
     "ratio on retain authors, real authors and world facts."),
    ("Forget NLL", "best near the reference's",
     "mean negative log-likelihood of the true answers, nats a token. Far "
     "above the reference's means that text is broken, not forgotten."),
    ("[low, high]", "", "95 % percentile interval of a bootstrap over rows."),
)  # fmt: skip


def reading_section() -> Section:
    """What every figure means and which way is better."""
    table = Table(
        "What the figures mean",
        (Column("Figure", numeric=False), Column("Better", numeric=False),
         Column("Meaning", numeric=False)),
        tuple((Cell(name), Cell(better or DASH), Cell(text)) for name, better, text in READING),
    )  # fmt: skip
    return Section("reading", "How to read the figures", (table,))


def provenance_section(report: Report) -> Section:
    """Command, versions, digests of the inputs, and the settings and seeds they record."""
    files = Table(
        "Files that this report was made from",
        (Column("Kind", numeric=False), Column("Name", numeric=False),
         Column("Path", numeric=False), Column("sha256", numeric=False)),
        tuple((Cell(f.kind), Cell(f.name), Cell(f.path), Cell(f.sha256)) for f in report.files),
    )  # fmt: skip
    blocks: list[Block] = [Heading("This report")]
    blocks.append(Code(report.command) if report.command else Para("Its command is not recorded."))
    blocks.append(Para(f"Versions: {plain(report.versions)}."))
    blocks.append(Para(f"Configurations tried: {report.tried}."))
    said = tuple(
        (Cell(f.name), Cell(f.kind), Cell(plain(f.about))) for f in report.files if f.about
    )
    blocks += [Heading("Inputs"), files]
    if said:
        columns = ("Name", "Kind", "Recorded in it")
        heads = tuple(Column(head, numeric=False) for head in columns)
        blocks.append(Table("What the files say of their making", heads, said))
    blocks.append(Heading("Settings and seeds"))
    blocks.append(Para(f"Intervals: {plain(report.settings['bootstrap'])}."))
    for name, settings in report.settings["protocols"].items():
        blocks.append(Para(f"Protocol {name}: {plain(settings)}."))
    for name, settings in report.settings["methods"].items():
        blocks.append(Para(f"Training of {name}:"))
        blocks.append(Code(json.dumps(settings, indent=1, ensure_ascii=False, sort_keys=True)))
    return Section("provenance", "Provenance", tuple(blocks))

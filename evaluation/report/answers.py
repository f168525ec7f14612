"""The best and worst answers of a system, and which words of two texts differ."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from adapters.errors import UserError
from evaluation.logs.matching import match_rows
from evaluation.logs.records import RowRecord, SetRecord, generation_of, protocol_rows
from evaluation.metrics.forget_quality import log_truth_ratio
from evaluation.protocols import Protocol

MOST = 10
Parts = tuple[tuple[str, bool], ...]
TIES = "ties by the true answer's probability, then by the order of the rows"


@dataclass(frozen=True)
class RowFigures:
    """What a row says in numbers; None where the log does not hold it.

    Attributes:
        answer_prob: of the true answer, a token (geometric mean).
        nll: nats a token of the true answer.
        log_r: log truth ratio; below 0 the right answer is the likelier one.
    """

    rouge_l_recall: float | None
    answer_prob: float | None
    nll: float | None
    log_r: float | None


@dataclass(frozen=True)
class ShownAnswer:
    """One answer with its question; `change` is its ROUGE-L recall less Origin's."""

    row: int
    question: str | None
    truth: str | None
    answer: str | None
    figures: RowFigures
    change: float | None = None


@dataclass(frozen=True)
class AnswerSet:
    """The best and worst answers of a system on one set of `n` rows, and by which rule."""

    system: str
    name: str
    rule: str
    n: int
    best: tuple[ShownAnswer, ...]
    worst: tuple[ShownAnswer, ...]


def row_figures(row: RowRecord, protocol: Protocol) -> RowFigures:
    """The row's figures under a protocol."""
    made = generation_of(row, protocol)
    nll = None if row.answer_score is None else row.answer_score.mean_nll
    log_r = None
    if row.paraphrase is not None and row.perturbed:
        wrong = [[score.mean_nll for score in row.perturbed]]
        found = log_truth_ratio([row.paraphrase.mean_nll], wrong, protocol.truth_ratio)
        log_r = float(found[0])
    return RowFigures(
        None if made is None else made.rouge_l_recall,
        None if nll is None else math.exp(-nll),
        nll,
        log_r,
    )


def answer_sets(
    system: str,
    sets: Mapping[str, SetRecord],
    protocol: Protocol,
    origin: Mapping[str, SetRecord] | None = None,
) -> tuple[AnswerSet, ...]:
    """The ten best and ten worst answers of every set that has answers or scores.

    On the forget set an answer is the better the less of the true answer it holds (ROUGE-L
    recall). On the other sets it is the better the more it gained over Origin's answer to the same
    question, or without Origin the more of the true answer it holds. Rows of at most twenty are
    halved, so that none is shown twice.
    """
    found = []
    for name, record in sets.items():
        rows = protocol_rows(record, protocol)
        before = _before(rows, origin.get(name) if origin and name != "forget" else None)
        shown = [
            _shown(i, row, protocol, None if before is None else before[i])
            for i, row in enumerate(rows)
        ]
        chosen = _ordered(shown, name)
        if chosen is None:
            continue
        ordered, rule = chosen
        most = min(MOST, (len(ordered) + 1) // 2)
        worst = ordered[max(most, len(ordered) - most) :][::-1]
        found.append(AnswerSet(system, name, rule, len(rows), tuple(ordered[:most]), tuple(worst)))
    return tuple(found)


def _before(rows: Sequence[RowRecord], origin: SetRecord | None) -> tuple[RowRecord, ...] | None:
    """Origin's rows beside these; None where it holds other ones, so nothing can be compared."""
    if origin is None:
        return None
    try:
        return match_rows(rows, origin.rows, subset=True).theirs
    except UserError:
        return None


def _shown(i: int, row: RowRecord, protocol: Protocol, before: RowRecord | None) -> ShownAnswer:
    made, figures = generation_of(row, protocol), row_figures(row, protocol)
    change = None
    if before is not None and figures.rouge_l_recall is not None:
        old = generation_of(before, protocol)
        change = None if old is None else figures.rouge_l_recall - old.rouge_l_recall
    return ShownAnswer(
        i, row.question, row.answer, None if made is None else made.text, figures, change
    )


def _ordered(rows: Sequence[ShownAnswer], name: str) -> tuple[list[ShownAnswer], str] | None:
    """The rows from best to worst with the rule in words; None without anything to go by."""
    forget = name == "forget"
    wanted = "lowest" if forget else "highest"
    if rows and all(row.change is not None for row in rows):
        key, rule = [row.change for row in rows], "greatest gain of ROUGE-L recall over Origin"
    elif rows and all(row.figures.rouge_l_recall is not None for row in rows):
        key = [row.figures.rouge_l_recall for row in rows]
        rule = f"{wanted} ROUGE-L recall of the true answer"
    elif rows and all(row.figures.answer_prob is not None for row in rows):
        key = [row.figures.answer_prob for row in rows]
        rule = f"{wanted} probability of the true answer"
    else:
        return None
    side = 1 if forget else -1
    order = sorted(
        range(len(rows)),
        key=lambda i: (side * (key[i] or 0.0), side * (rows[i].figures.answer_prob or 0.0), i),
    )
    return [rows[i] for i in order], f"best: {rule}; {TIES}"


def word_differences(left: str, right: str) -> tuple[Parts, Parts]:
    """Both texts in runs of words, each with whether only this text has them at that place."""
    one, other = left.split(), right.split()
    matcher = difflib.SequenceMatcher(None, one, other, autojunk=False)
    parts: tuple[list[tuple[str, bool]], list[tuple[str, bool]]] = ([], [])
    for kind, a, b, c, d in matcher.get_opcodes():
        for words, found in ((one[a:b], parts[0]), (other[c:d], parts[1])):
            if words:
                found.append((" ".join(words), kind != "equal"))
    return tuple(parts[0]), tuple(parts[1])

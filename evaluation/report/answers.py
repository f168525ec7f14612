"""The best and worst answers of a system, and which words of two texts differ."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import ClassVar

from adapters.errors import UserError
from evaluation.logs.matching import match_rows
from evaluation.logs.records import RowRecord, SetRecord, generation_of, protocol_rows
from evaluation.metrics.forget_quality import log_truth_ratio
from evaluation.protocols import Protocol
from evaluation.report.numbers import fixed

MOST = 10
Runs = tuple[tuple[str, bool], ...]
TIES = "ties by the true answer's probability, then by the order of the rows"


@dataclass(frozen=True)
class RowFigures:
    """The figures of one row; None where the log does not hold them.

    Attributes:
        answer_prob: probability of the true answer per token (geometric mean).
        nll: negative log-likelihood of the true answer, in nats per token.
        log_r: log truth ratio; below 0 the right answer is likelier than the wrong ones.
    """

    rouge_l_recall: float | None
    answer_prob: float | None
    nll: float | None
    log_r: float | None


@dataclass(frozen=True)
class ShownAnswer:
    """One answer with its question; `change` is its ROUGE-L recall minus Origin's."""

    row: int
    question: str | None
    truth: str | None
    answer: str | None
    figures: RowFigures
    change: float | None = None


@dataclass(frozen=True)
class AnswerSet:
    """The best and worst answers of a system on one set of `n` rows, and the rule of the order."""

    kind: ClassVar = "answers"
    system: str
    name: str
    rule: str
    n: int
    best: tuple[ShownAnswer, ...]
    worst: tuple[ShownAnswer, ...]


def row_figures(row: RowRecord, protocol: Protocol) -> RowFigures:
    """The row's figures under a protocol."""
    generation = generation_of(row, protocol)
    nll = None if row.answer_score is None else row.answer_score.mean_nll
    log_r = None
    if row.paraphrase is not None and row.perturbed:
        wrong = [[score.mean_nll for score in row.perturbed]]
        log_r = float(log_truth_ratio([row.paraphrase.mean_nll], wrong, protocol.truth_ratio)[0])
    recall = None if generation is None else generation.rouge_l_recall
    return RowFigures(recall, None if nll is None else math.exp(-nll), nll, log_r)


def answer_figures(answer: ShownAnswer) -> str:
    """The answer's figures on one line."""
    figures = answer.figures
    text = (
        f"ROUGE-L {fixed(figures.rouge_l_recall)}, answer prob. {fixed(figures.answer_prob)}, "
        f"log R {fixed(figures.log_r, 3, True)}"
    )
    if answer.change is None:
        return text
    return f"{text}, ROUGE-L against Origin {fixed(answer.change, 3, True)}"


def answer_sets(
    system: str,
    sets: Mapping[str, SetRecord],
    protocol: Protocol,
    origin: Mapping[str, SetRecord] | None = None,
) -> tuple[AnswerSet, ...]:
    """The ten best and ten worst answers of every set that has answers or scores.

    On the forget set the best answer has the lowest ROUGE-L recall of the true answer. On the
    other sets it has the largest gain over Origin's answer to the same question, or without
    Origin the highest recall. A set of at most twenty rows is split in half, so that no row is
    shown twice.
    """
    shown = []
    for name, record in sets.items():
        rows = protocol_rows(record, protocol)
        before: Sequence[RowRecord | None] = [None] * len(rows)
        if origin and name != "forget" and name in origin:
            with suppress(UserError):  # Origin holds other rows
                before = match_rows(rows, origin[name].rows, subset=True).theirs
        answers = [
            _answer(i, row, protocol, old)
            for i, (row, old) in enumerate(zip(rows, before, strict=True))
        ]
        ordered, rule = _rank(answers, forget=name == "forget")
        if not ordered:
            continue
        most = min(MOST, (len(ordered) + 1) // 2)
        worst = ordered[max(most, len(ordered) - most) :][::-1]
        shown.append(AnswerSet(system, name, rule, len(rows), tuple(ordered[:most]), tuple(worst)))
    return tuple(shown)


def _answer(i: int, row: RowRecord, protocol: Protocol, origin: RowRecord | None) -> ShownAnswer:
    generation, figures = generation_of(row, protocol), row_figures(row, protocol)
    before = None if origin is None else generation_of(origin, protocol)
    change = None
    if before is not None and figures.rouge_l_recall is not None:
        change = figures.rouge_l_recall - before.rouge_l_recall
    text = None if generation is None else generation.text
    return ShownAnswer(i, row.question, row.answer, text, figures, change)


def _rank(answers: Sequence[ShownAnswer], *, forget: bool) -> tuple[list[ShownAnswer], str]:
    """The answers from best to worst, and the rule in words; none without a figure to rank by."""
    wanted, sign = ("lowest", 1) if forget else ("highest", -1)
    prob = [answer.figures.answer_prob for answer in answers]
    candidates = {
        "greatest gain of ROUGE-L recall over Origin": [answer.change for answer in answers],
        f"{wanted} ROUGE-L recall of the true answer": [
            answer.figures.rouge_l_recall for answer in answers
        ],
        f"{wanted} probability of the true answer": prob,
    }
    for rule, values in candidates.items():
        if None not in values:
            order = sorted(
                range(len(answers)),
                key=lambda i: (sign * (values[i] or 0), sign * (prob[i] or 0), i),
            )
            return [answers[i] for i in order], f"best: {rule}; {TIES}"
    return [], ""


def word_differences(left: str, right: str) -> tuple[Runs, Runs]:
    """Both texts as runs of words, each with whether the other text lacks them at that place."""
    left_words, right_words = left.split(), right.split()
    matcher = difflib.SequenceMatcher(None, left_words, right_words, autojunk=False)
    left_runs, right_runs = [], []
    for kind, a, b, c, d in matcher.get_opcodes():
        if a < b:
            left_runs.append((" ".join(left_words[a:b]), kind != "equal"))
        if c < d:
            right_runs.append((" ".join(right_words[c:d]), kind != "equal"))
    return tuple(left_runs), tuple(right_runs)

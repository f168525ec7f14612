"""Two answers to many questions: the author sheet, two logs, and LLM Comparator's file."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from adapters.errors import UserError
from adapters.lora.stack import base_only
from evaluation.logs import read_log
from evaluation.logs.records import Generation, RowRecord
from evaluation.protocols import Decoding
from ui.app.data.answers import Answer, Stack, judged, scores_of, with_verdict
from unlearner.request.rows import Row

if TYPE_CHECKING:
    from ui.app.session import Session

FILED, AUTHOR = "to forget", "this author"
BATCH = 5  # rows between two looks at the page: small enough to watch, large enough to be a batch
SIDES = ("base", "stack")
SET_NAMES = {
    "forget": "to forget",
    "retain": "retain authors",
    "real_authors": "real authors",
    "world_facts": "world facts",
}
PER_MODEL = {
    "rouge_l_recall": "rouge_l", "answer_prob": "answer_prob", "truth_ratio": "truth_ratio",
    "fact_recall": "fact_recall",
}  # fmt: skip


def columns(sides: tuple[str, str] = SIDES) -> list[str]:
    """Headings of the table of two `sides`, in the order of `SheetRow.cells`."""
    measured = ("verdict", "facts", "ROUGE-L", "probability", "truth ratio")
    shown = [f"{side}: {name}" for name in ("answer", *measured) for side in sides]
    return ["Set", "Question", *[f"{name[:1].upper()}{name[1:]}" for name in shown]]


@dataclass(frozen=True)
class SheetRow:
    """One question with both answers; `group` tells rows to forget from those that are kept."""

    group: str
    question: str
    truth: str
    base: Answer
    unlearned: Answer

    def cells(self) -> list[Any]:
        """The row as the table shows it, in the order of `columns`."""
        both = (self.base, self.unlearned)
        scores = ("fact_recall", "rouge_l_recall", "answer_prob", "truth_ratio")
        values = [getattr(answer, name) for name in scores for answer in both]
        figures = [None if value is None else round(value, 3) for value in values]
        texts, words = [answer.text for answer in both], [answer.word for answer in both]
        return [self.group, self.question, *texts, *words, *figures]


class Filled(NamedTuple):
    """The rows so far, how many there will be, and how many questions of others come first."""

    rows: list[SheetRow]
    total: int
    ahead: int = 0


def fill(
    session: Session,
    author: str,
    stack: Stack,
    *,
    neighbours: int = 5,
    max_new: int = 200,
    stop: threading.Event | None = None,
) -> Iterator[Filled]:
    """The sheet batch by batch: the author's rows, or a filed request's, then neighbours.

    Every batch waits for its turn, so a question from another page comes in between; each
    batch says how many are ahead.

    Raises:
        UserError: no such author, no model.
    """
    _, rows = session.askable().get(author, ("", ()))
    if not rows:
        raise UserError(f"There is no author {author!r} in the data.", "Choose one from the list.")
    group = AUTHOR if author in session.library.authors else FILED
    # What another request wants forgotten is no row to keep.
    away = [*rows, *(row for each in session.filed().values() for row in each.rows)]
    wanted = [(group, row) for row in rows] + session.library.beside(away, neighbours)
    found: list[SheetRow] = []
    stop = stop or threading.Event()
    for start in range(0, len(wanted), BATCH):
        ticket = session.turns.join()
        try:
            for ahead in session.turns.waiting(ticket):
                yield Filled(list(found), len(wanted), ahead)
            if not stop.is_set():
                session.use(stack)
                found += _batch(session, wanted[start : start + BATCH], max_new)
        finally:
            session.turns.leave(ticket)
        yield Filled(list(found), len(wanted))
        if stop.is_set():
            return


def _batch(session: Session, wanted: Sequence[tuple[str, Row]], max_new: int) -> list[SheetRow]:
    rows = [row for _, row in wanted]
    model, _ = session.require()
    with base_only(model):
        before = _answers(session, rows, max_new)
    after = _answers(session, rows, max_new)
    return [
        SheetRow(group, row.question, row.answer, *both)
        for (group, row), *both in zip(wanted, before, after, strict=True)
    ]


def _answers(session: Session, rows: Sequence[Row], max_new: int) -> list[Answer]:
    from evaluation.inference.generation import generate_answers  # which loads torch

    model, fmt = session.require()
    started = time.monotonic()
    decoding = Decoding("sheet", max_new=max_new)
    texts = generate_answers(model, fmt, [row.question for row in rows], [decoding])["sheet"]
    seconds = (time.monotonic() - started) / len(rows)
    scores = session.teacher_forced(rows)
    return [
        dataclasses.replace(judged(Answer(text), row, score), seconds=seconds)
        for text, row, score in zip(texts, rows, scores, strict=True)
    ]


def tally(rows: Sequence[SheetRow]) -> list[dict[str, Any]]:
    """One line a group: how many questions, how many each side states, mean scores."""
    from evaluation.metrics.fact_recall import STATES

    lines = []
    for group in dict.fromkeys(row.group for row in rows):
        mine = [row for row in rows if row.group == group]
        line: dict[str, Any] = {"group": group, "n": len(mine)}
        for name in ("base", "unlearned"):
            answers = [getattr(row, name) for row in mine]
            line[f"{name}_knows"] = sum(a.word == STATES for a in answers)
            for score in ("fact_recall", "rouge_l_recall", "answer_prob"):
                values = [getattr(a, score) for a in answers if getattr(a, score) is not None]
                line[f"{name}_{score}"] = sum(values) / len(values) if values else None
        lines.append(line)
    return lines


def comparator(rows: Sequence[SheetRow], names: tuple[str, str]) -> dict[str, Any]:
    """LLM Comparator's JSON (PAIR) of two models' answers.

    The score is ROUGE-L of A minus that of B, null where one was not measured: positive where A
    holds more of the true answer. A per-model field holds A's value, then B's.
    """
    return {
        "metadata": {
            "source_path": "unlearner",
            "custom_fields_schema": [
                *({"name": name, "type": "per_model_number"} for name in PER_MODEL.values()),
                {"name": "verdict", "type": "per_model_category"},
            ],
        },
        "models": [{"name": name} for name in names],
        "examples": [_example(row) for row in rows],
    }


def _example(row: SheetRow) -> dict[str, Any]:
    a, b = row.base, row.unlearned
    scores = [score for score in (a.rouge_l_recall, b.rouge_l_recall) if score is not None]
    return {
        "input_text": row.question,
        "tags": [row.group],
        "output_text_a": a.text,
        "output_text_b": b.text,
        "score": scores[0] - scores[1] if len(scores) == 2 else None,
        "individual_rater_scores": [],
        "custom_fields": {
            **{name: [getattr(a, key), getattr(b, key)] for key, name in PER_MODEL.items()},
            "verdict": [a.word or None, b.word or None],
        },
    }


def recorded_pairs(first: Path, second: Path) -> list[SheetRow]:
    """The answers of two logs to the questions that both hold, set by set.

    Raises:
        UserError: a log that cannot be read, or no answered question in common.
    """
    logs = (read_log(first), read_log(second))
    pairs: list[SheetRow] = []
    for name, shown in SET_NAMES.items():
        if all(name in log.sets for log in logs):
            rows = [_answered(log.sets[name].rows) for log in logs]
            pairs += [
                SheetRow(
                    shown,
                    str(row.question),
                    row.answer or "",
                    _answer(row, text),
                    _answer(*rows[1][key]),
                )
                for key, (row, text) in rows[0].items()
                if key in rows[1]
            ]
    if not pairs:
        raise UserError(
            f"{first.name} and {second.name} have no answered question in common.",
            "Choose logs of the same set that hold questions and answers.",
        )
    return pairs


def _answered(rows: Sequence[RowRecord]) -> dict[str, tuple[RowRecord, Generation]]:
    """Rows with their first generation that has a text, by their question, blanks aside."""
    found = {}
    for row in rows:
        made = [each for each in row.generations.values() if each.text is not None]
        if row.question and made:
            found["".join(row.question.split())] = row, made[0]
    return found


def _answer(row: RowRecord, generation: Generation) -> Answer:
    prob, ratio = scores_of(row)
    answer = Answer(
        str(generation.text),
        rouge_l_recall=generation.rouge_l_recall,
        answer_prob=prob,
        truth_ratio=ratio,
    )
    return with_verdict(answer, row.question, row.answer)

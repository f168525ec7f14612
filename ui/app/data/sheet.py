"""The author sheet: every question of an author and of the neighbours, answered both ways."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from adapters.errors import UserError
from ui.app.data.answers import Answer, judged

if TYPE_CHECKING:
    from ui.app.data.answers import Stack
    from ui.app.session import Session
    from unlearner.request.rows import Row

FILED, AUTHOR = "to forget", "this author"
BATCH = 5  # rows between two looks at the page: small enough to watch, large enough to be a batch
SIDES = ("base", "stack")


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
        pairs = [
            *[answer.word for answer in both],
            *[_rounded(answer.fact_recall) for answer in both],
            *[_rounded(answer.rouge_l_recall) for answer in both],
            *[_rounded(answer.answer_prob) for answer in both],
            *[_rounded(answer.truth_ratio) for answer in both],
        ]
        return [self.group, self.question, self.base.text, self.unlearned.text, *pairs]


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 3)


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
    rows = session.askable().get(author)
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
    from adapters.lora.stack import base_only

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
    from evaluation.inference.generation import generate_answers
    from evaluation.protocols import Decoding

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

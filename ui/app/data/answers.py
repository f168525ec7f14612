"""One answer and one comparison, with their scores and verdicts: what the answer is, in a word."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from ui.app.data.decoding import Sampling
    from unlearner.request.rows import Row

NOT_JUDGED = "not judged"
Stack = Sequence[tuple[str, float]]


@dataclass(frozen=True)
class Answer:
    """One side of a comparison; scores are None where the question has no true answer on record."""

    text: str
    tokens: int = 0
    seconds: float = 0.0
    rouge_l_recall: float | None = None
    answer_prob: float | None = None
    truth_ratio: float | None = None
    fact_recall: float | None = None
    word: str = ""

    @property
    def rate(self) -> float | None:
        """Tokens per second, None before the first."""
        return self.tokens / self.seconds if self.tokens and self.seconds else None


@dataclass(frozen=True)
class Frame:
    """A comparison as far as it has come. `stack` is what the model's layers said.

    `base_whole` says that the base's answer is complete and scored, so that it can be kept while
    the right side answers again; `kept` says that it was.
    """

    question: str
    base: Answer
    unlearned: Answer
    stack: tuple[tuple[str, float], ...]
    truth: str | None = None
    one_batch: bool = False
    stage: Literal["waiting", "answering", "scoring", "done", "stopped"] = "answering"
    ahead: int = 0
    sampling: Sampling | None = None
    base_whole: bool = False
    kept: bool = False


def judged(answer: Answer, row: Row | None, scores: tuple[float, float | None] | None) -> Answer:
    """The answer with its scores and its verdict; `scores` are `Session.teacher_forced`'s."""
    from evaluation.metrics.text import rouge_recall

    if row is None or scores is None:
        return with_verdict(answer, None, None)
    recall = rouge_recall([answer.text], [row.answer])[0].rouge_l_recall
    scored = dataclasses.replace(
        answer, rouge_l_recall=recall, answer_prob=scores[0], truth_ratio=scores[1]
    )
    return with_verdict(scored, row.question, row.answer)


def with_verdict(answer: Answer, question: str | None, truth: str | None) -> Answer:
    """The answer with its verdict (`evaluation.metrics.fact_recall.RULE`).

    Without a true answer it can only be called broken or a refusal.
    """
    from evaluation.metrics import fact_recall as facts

    if question is not None and truth is not None:
        measured = facts.fact_recall(question, truth, answer.text)
        return dataclasses.replace(answer, word=measured.verdict, fact_recall=measured.share)
    broken, refuses = facts.is_broken(answer.text), facts.is_refusal(answer.text)
    word = facts.BROKEN if broken else facts.REFUSES if refuses else NOT_JUDGED
    return dataclasses.replace(answer, word=word)

"""One answer and one comparison, with their scores and verdicts."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from ui.app.data.verdicts import verdict

if TYPE_CHECKING:
    from ui.app.data.decoding import Sampling
    from unlearner.request.rows import Row

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
    word: str = ""

    @property
    def rate(self) -> float | None:
        """Tokens a second, None before the first."""
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
        return dataclasses.replace(answer, word=verdict(answer.text))
    recall = rouge_recall([answer.text], [row.answer])[0].rouge_l_recall
    word = verdict(answer.text, recall, scores[0])
    return dataclasses.replace(
        answer, rouge_l_recall=recall, answer_prob=scores[0], truth_ratio=scores[1], word=word
    )

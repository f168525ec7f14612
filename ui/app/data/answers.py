"""Two answers to one question: decoded token by token, scored, and judged in a word."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from adapters.lora.stack import base_only
from evaluation.logs.records import RowRecord
from evaluation.protocols import Decoding
from unlearner.request.rows import Row
from unlearner.tokens.decoding import Prompt, stop_tokens
from unlearner.tokens.prompts import PromptFormat

if TYPE_CHECKING:
    import torch

NOT_JUDGED = "not judged"
BASE_ROW = "__base__"  # PEFT's name for a row of a batch on which no adapter acts
Stack = Sequence[tuple[str, float]]
Scores = tuple[float | None, float | None]  # answer probability and truth ratio


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
class Sampling:
    """How answers are drawn; temperature 0 is greedy, the default everywhere."""

    temperature: float = 0.0
    seed: int = 0
    max_new: int = 200


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


def scores_of(record: RowRecord) -> Scores:
    """Answer probability and truth ratio R of a scored row; None where one was not measured.

    R = P(wrong answers) / P(paraphrased answer), geometric means per token. Below 1 the model
    prefers the right answer.
    """
    from evaluation.metrics.forget_quality import log_truth_ratio

    right, paraphrase = record.answer_score, record.paraphrase
    ratio = None
    if paraphrase is not None and record.perturbed:
        wrong = [[score.mean_nll for score in record.perturbed]]
        ratio = math.exp(float(log_truth_ratio([paraphrase.mean_nll], wrong)[0]))
    return None if right is None else math.exp(-right.mean_nll), ratio


def judged(answer: Answer, row: Row | None, scores: Scores | None) -> Answer:
    """The answer with its scores and its verdict; `scores` are those of `scores_of`."""
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


@dataclass
class _Side:
    """One answer in the making; `seconds` passed until its last token or its end."""

    tokens: list[int] = field(default_factory=list)
    done: bool = False
    seconds: float = 0.0


class PairDecoder:
    """Decodes both sides one token a step, so that stopping takes a token at most.

    With one adapter on an unquantised base both sides are rows of one batch, where PEFT applies
    the adapter to the second row only. A stack of several, or a 4-bit base, is decoded in turns:
    PEFT's mixed batches know one adapter a row, and batch size changes 4-bit rounding.

    The prompts are those of the evaluation, and a seeded draw is the evaluation's draw.
    With `right_only` the base's side has ended before it began: only the stack answers.
    """

    def __init__(
        self,
        model: Any,
        fmt: PromptFormat,
        question: str,
        stack: Sequence[str],
        sampling: Sampling,
        *,
        quantised: bool = False,
        mixed: bool | None = None,
        right_only: bool = False,
    ) -> None:
        """`mixed` forces one way or the other, for comparing them."""
        self.model, self.fmt = model, fmt
        self.stack = list(stack)
        self.sides = (_Side(done=right_only), _Side())
        self.one_batch = (len(self.stack) == 1 and not quantised) if mixed is None else mixed
        self.one_batch = self.one_batch and not right_only
        self.budget = sampling.max_new
        self._prompt = fmt.encode_prompt(question)
        self.stops = set(stop_tokens(model, fmt))
        self._caches: dict[tuple[int, ...], Any] = {}  # by the sides of a batch
        self._started = time.monotonic()
        self._draws: list[Any] = []
        if sampling.temperature > 0:
            from evaluation.inference.generation import Draw  # which loads torch

            decoding = Decoding(
                "app", max_new=sampling.max_new, sample=True, temperature=sampling.temperature,
                seed=sampling.seed,
            )  # fmt: skip
            drawn = Prompt(self._prompt, sampling.max_new)
            self._draws = [Draw(decoding, [drawn]) for _ in self.sides]

    @property
    def done(self) -> bool:
        """Whether both answers have ended or reached their budget."""
        return all(side.done for side in self.sides)

    def answers(self) -> list[Answer]:
        """Both answers so far, without special tokens."""
        made = self.fmt.tokenizer.batch_decode(
            [side.tokens for side in self.sides],
            skip_special_tokens=True,
            clean_up_tokenization_spaces=False,
        )
        return [
            Answer(text.strip(), len(side.tokens), side.seconds)
            for text, side in zip(made, self.sides, strict=True)
        ]

    def step(self) -> None:
        """One token more for every side that has not ended."""
        import torch

        going = [number for number, side in enumerate(self.sides) if not side.done]
        # Entered again on every step: the pieces of a stream may run on different threads, and
        # torch keeps this switch for each thread.
        with torch.inference_mode():
            if self.one_batch:  # an ended row goes on unread
                both = self._forward((0, 1), adapter_names=[BASE_ROW, self.stack[0]])
                scores = {number: both[number] for number in going}
            else:
                scores = {}
                for number in going:
                    bare = number == 0 and self.stack
                    with base_only(self.model) if bare else nullcontext():
                        scores[number] = self._forward((number,))[0]
        for number in going:
            self._take(number, self.sides[number], scores[number])

    def _take(self, number: int, side: _Side, scores: torch.Tensor) -> None:
        if self._draws:
            scores = self._draws[number](None, scores[None])[0]
        token = int(scores.argmax())
        if token in self.stops:
            side.done = True
        else:
            side.tokens.append(token)
            side.done = len(side.tokens) >= self.budget
        side.seconds = time.monotonic() - self._started

    def _forward(self, numbers: tuple[int, ...], **options: Any) -> torch.Tensor:
        """Scores [sides, vocabulary] of the next token of these sides, float32."""
        import torch

        cache = self._caches.get(numbers)
        last = [self.sides[number].tokens[-1:] or [0] for number in numbers]
        rows = [self._prompt for _ in numbers] if cache is None else last
        device = next(self.model.parameters()).device
        out = self.model(
            input_ids=torch.tensor(rows, device=device),
            past_key_values=cache,
            use_cache=True,
            **options,
        )
        self._caches[numbers] = out.past_key_values
        logits: torch.Tensor = out.logits[:, -1].float()
        return logits

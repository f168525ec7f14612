"""Teacher-forced scores: how likely a model finds the true, paraphrased and perturbed answers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from adapters.environment import evaluating
from adapters.errors import UserError
from evaluation.inference.prefix_sharing import score_trees, sharing_problem
from evaluation.logs.records import AnswerScore, RowRecord
from evaluation.metrics.text import words_of
from unlearner.objectives.likelihood import answer_nll, on_device
from unlearner.request.rows import Row
from unlearner.tokens.prompts import EVAL_MAX_LENGTH, Encoded, PromptFormat, pad_batch, pad_id

OnProgress = Callable[[str, int, int], None]
BATCH_TOKENS = 4096
# Longer than any context: encodes a row uncut.
_UNCUT = 1 << 30


@dataclass(frozen=True)
class EncodedRow:
    """A row's texts as tokens, uncut: the answer, its paraphrase (None: none), the wrong ones."""

    answer: Encoded
    paraphrase: Encoded | None
    perturbed: tuple[Encoded, ...]

    @property
    def texts(self) -> tuple[Encoded, ...]:
        """All of them; the true answer comes first."""
        middle = () if self.paraphrase is None else (self.paraphrase,)
        return (self.answer, *middle, *self.perturbed)


def silent(label: str, done: int, total: int) -> None:
    """Reports no progress."""


def about_model(model: Any, fmt: PromptFormat) -> dict[str, Any]:
    """What figures depend on besides weights and rows, for the `meta` of a log."""
    import transformers

    first = next(model.parameters())
    return {
        "template": fmt.name,
        "device": first.device.type,
        "dtype": str(getattr(model, "dtype", first.dtype)).removeprefix("torch."),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }


def encode_answers(fmt: PromptFormat, rows: Sequence[Row]) -> list[EncodedRow]:
    """The texts of every row as tokens, prompt included, not yet cut.

    Raises:
        UserError: a token that the model cannot embed.
    """
    encoded = []
    for row in rows:
        answer, *wrong = (
            fmt.encode(row.question, text, _UNCUT) for text in (row.answer, *row.perturbed_answers)
        )
        other = row.paraphrased_answer
        paraphrase = None if other is None else fmt.encode(row.question, other, _UNCUT)
        encoded.append(EncodedRow(answer, paraphrase, tuple(wrong)))
    fmt.require_embeddings(text for row in encoded for text in row.texts)
    return encoded


def longest_text(encoded: Sequence[EncodedRow]) -> int:
    """Tokens of the longest text, prompt included; 0 for no rows."""
    return max((len(text.input_ids) for row in encoded for text in row.texts), default=0)


def score_rows(
    model: torch.nn.Module,
    fmt: PromptFormat,
    rows: Sequence[Row],
    *,
    encoded: Sequence[EncodedRow] | None = None,
    max_length: int = EVAL_MAX_LENGTH,
    batch_tokens: int = BATCH_TOKENS,
    shared: bool = True,
    checked: bool = False,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[RowRecord]:
    """The rows with their scores, in the order given; the result does not depend on batches.

    Mean NLL per token (EOS counted), in float32 whatever dtype the weights have. Where a row has no
    paraphrase, its answer is used in its place and scored once.

    Args:
        model: a causal LM with its active adapters; its mode is restored.
        fmt: turns rows into tokens.
        rows: with or without paraphrases and perturbed answers.
        encoded: `encode_answers(fmt, rows)`, to encode once.
        max_length: texts are cut at so many tokens, prompt included.
        batch_tokens: tokens in a batch of padded rows, padding included.
        shared: compute shared prefixes once, where that gives the same scores (`sharing_problem`).
        checked: it is known that it does.
        on_progress: called with scored and all texts after each batch.

    Raises:
        UserError: the prompt of a row alone fills `max_length`.
    """
    if encoded is None:
        encoded = encode_answers(fmt, rows)
    questions = [cut_texts(row, max_length) for row in encoded]
    for number, (row, texts) in enumerate(zip(rows, questions, strict=True), start=1):
        if any(text.n_targets == 0 for text in texts):
            raise UserError(
                f"Row {number} has no answer token within {max_length} tokens: {row.question!r}.",
                "Shorten the question, or take a protocol that cuts later (open-unlearning).",
            )
    agreed: list[int] = []
    with evaluating(model):
        if shared and questions and (checked or sharing_problem(model, questions) is None):
            trees = score_trees(model, questions, on_progress=on_progress)
            scores = iter([AnswerScore(s.nll / s.n, s.n) for texts in trees for s in texts])
            agreed = [texts[0].agreed for texts in trees]
        else:
            flat = [text for texts in questions for text in texts]
            pad = pad_id(fmt.tokenizer)
            scores = iter(_score_texts(model, flat, pad, batch_tokens, on_progress))
    records = []
    for i, (row, tokens) in enumerate(zip(rows, encoded, strict=True)):
        answer = next(scores)
        paraphrase = answer if tokens.paraphrase is None else next(scores)
        perturbed = tuple(next(scores) for _ in tokens.perturbed)
        known = agreed[i] if agreed else None
        pair = row.question, row.answer
        records.append(RowRecord(*pair, answer, paraphrase, perturbed, agreed=known))
    return records


def cut_texts(row: EncodedRow, max_length: int) -> list[Encoded]:
    """The texts of a row, each cut at `max_length` tokens, prompt included."""
    return [Encoded(text.input_ids[:max_length], text.labels[:max_length]) for text in row.texts]


def _score_texts(
    model: torch.nn.Module,
    texts: Sequence[Encoded],
    pad: int,
    batch_tokens: int,
    on_progress: Callable[[int, int], None] | None,
) -> list[AnswerScore]:
    """Scores in the order of `texts`."""
    scores: dict[int, AnswerScore] = {}
    for indices, batch in padded_batches(model, texts, pad, batch_tokens):
        result = answer_nll(model, batch)
        totals = result.nll.to(torch.float64).tolist()
        for i, total, n in zip(indices, totals, result.n.tolist(), strict=True):
            scores[i] = AnswerScore(total / n, n)
        if on_progress is not None:
            on_progress(len(scores), len(texts))
    return [scores[i] for i in range(len(texts))]


def padded_batches(
    model: torch.nn.Module, texts: Sequence[Encoded], pad: int, batch_tokens: int
) -> Iterator[tuple[list[int], dict[str, Tensor]]]:
    """Indices of texts of like length, the longest first, and their batch on the model's device.

    A batch has so many texts that its padded size stays within `batch_tokens`.
    """
    device = next(model.parameters()).device
    left = sorted(range(len(texts)), key=lambda i: -len(texts[i].input_ids))
    while left:
        count = max(1, batch_tokens // max(1, len(texts[left[0]].input_ids)))
        indices, left = left[:count], left[count:]
        yield indices, on_device(pad_batch([texts[i] for i in indices], pad), device)


def judge_losses(
    model: torch.nn.Module,
    fmt: PromptFormat,
    rows: Sequence[Row],
    *,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[float | None]:
    """The judge's mean NLL of each answer behind its question's prompt, nats per token; (rows,).

    Only the answer's tokens count, and no EOS behind them: a log does not say whether the model
    ended the answer or its budget of tokens did, and cut answers would be charged for an end that
    nobody wrote. Texts are scored uncut. None where the answer has no word, or no token.

    Args:
        model: a causal LM that never saw the rows; its mode is restored.
        fmt: turns question and answer into the judge's tokens.
        rows: question and generated answer.
        on_progress: called with scored and all answers after each batch.
    """
    special = set(fmt.tokenizer.all_special_ids)
    texts: dict[int, Encoded] = {}
    for i, row in enumerate(rows):
        text = fmt.encode(row.question, row.answer, _UNCUT)
        end = len(text.input_ids)
        while end > text.n_prompt and text.input_ids[end - 1] in special:
            end -= 1
        if words_of(row.answer) and end > text.n_prompt:
            texts[i] = Encoded(text.input_ids[:end], text.labels[:end])
    pad = pad_id(fmt.tokenizer)
    with evaluating(model):
        scores = _score_texts(model, list(texts.values()), pad, BATCH_TOKENS, on_progress)
    losses = dict(zip(texts, (score.mean_nll for score in scores), strict=True))
    return [losses.get(i) for i in range(len(rows))]

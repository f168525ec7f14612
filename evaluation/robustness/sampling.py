"""The sampling leak: what comes out when a question is asked again and again.

A greedy answer is one of many. Whoever may ask n times sees the best of n, so the card shows the
expected best of n draws, exactly, from one larger draw.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from adapters.environment import evaluating
from evaluation.inference import generation
from evaluation.metrics.text import rouge_recall
from evaluation.robustness.quantisation import Loaded
from unlearner.request.rows import Row
from unlearner.tokens import decoding
from unlearner.tokens.prompts import PromptFormat

# ROUGE-L recall from which an answer counts as leaked; `verdicts` of the app uses the same value.
LEAKED_ROUGE = 0.8


@dataclass(frozen=True)
class Draws:
    """How answers are drawn: how many per question, from which distribution, up to which length.

    `max_total` counts prompt and answer together, in tokens.
    """

    samples: int = 64
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0
    max_total: int = 200


def expected_best(values: Sequence[float], n: int) -> float:
    """The expected maximum of n values drawn from `values` without replacement.

    `E[max] = sum_i x_(i) C(i-1, n-1) / C(S, n)` over the sorted values x_(1) <= ... <= x_(S): of
    the C(S, n) subsets, C(i-1, n-1) have x_(i) as their largest. For 0/1 values this is the share
    of subsets that hold a 1, `1 - C(S-c, n) / C(S, n)` (the unbiased pass@k of arXiv 2107.03374).

    Raises:
        ValueError: n is not between 1 and the number of values.
    """
    if not 1 <= n <= len(values):
        raise ValueError(f"the best of {n} needs 1 to {len(values)} draws")
    ordered = sorted(values)
    subsets = math.comb(len(ordered), n)
    return math.fsum(
        value * (math.comb(i, n - 1) / subsets) for i, value in enumerate(ordered) if i >= n - 1
    )


def sizes(samples: int) -> list[int]:
    """The n of the curve: powers of two up to `samples`, and `samples` itself."""
    powers = [2**i for i in range(samples.bit_length()) if 2**i <= samples]
    return powers if powers[-1] == samples else [*powers, samples]


def best_of(recalls: Sequence[Sequence[float]], samples: int) -> list[dict[str, Any]]:
    """A point for each n: means over questions of the expected best of n draws, and of the leak.

    Args:
        recalls: for every question the ROUGE-L recall of each of its draws.
        samples: draws per question.
    """
    leaks = [[float(recall >= LEAKED_ROUGE) for recall in row] for row in recalls]

    def mean(rows: Sequence[Sequence[float]], n: int) -> float:
        return math.fsum(expected_best(row, n) for row in rows) / len(rows)

    return [
        {"n": n, "best_rouge_l_recall": mean(recalls, n), "share_leaked": mean(leaks, n)}
        for n in sizes(samples)
    ]


def row_recalls(loaded: Loaded, row: Row, draws: Draws) -> list[float]:
    """ROUGE-L recall of every drawn answer to one question, in the order drawn."""
    texts = draw_answers(loaded.model, loaded.fmt, row.question, draws)
    return [answer.rouge_l_recall for answer in rouge_recall(texts, [row.answer] * len(texts))]


def draw_answers(model: Any, fmt: PromptFormat, question: str, draws: Draws) -> list[str]:
    """`draws.samples` answers to one question, no special tokens, stripped.

    The prompt is computed once and its cache repeated. One generator per question, seeded by the
    question's tokens, so its answers do not depend on which others are asked. A prompt that leaves
    no budget gets empty answers.
    """
    from transformers import TopPLogitsWarper

    prompt = fmt.encode_prompt(question)
    warp = TopPLogitsWarper(draws.top_p) if draws.top_p < 1 else None
    generator = torch.Generator(device=model.device)
    generator.manual_seed(generation.prompt_seed(draws.seed, prompt))

    def choose(logits: torch.Tensor) -> torch.Tensor:
        scores = logits.float() / draws.temperature
        scores = scores if warp is None else warp(None, scores)
        return torch.multinomial(scores.softmax(-1), 1, generator=generator).squeeze(1)

    answers: list[list[int]] = [[] for _ in range(draws.samples)]
    with evaluating(model):
        _draw(model, fmt, prompt, answers, draws.max_total - len(prompt), choose)
    texts = fmt.tokenizer.batch_decode(
        answers, skip_special_tokens=True, clean_up_tokenization_spaces=False
    )
    return [text.strip() for text in texts]


def _draw(
    model: Any,
    fmt: PromptFormat,
    prompt: list[int],
    answers: list[list[int]],
    budget: int,
    choose: Callable[[torch.Tensor], torch.Tensor],
) -> None:
    """Fills `answers`, the tokens of each draw; draws that ended leave the batch."""
    if budget <= 0:
        return
    stops = set(decoding.stop_tokens(model, fmt))
    ids = torch.tensor([prompt], device=model.device)
    out = model(input_ids=ids, use_cache=True, logits_to_keep=1)
    cache, rows = out.past_key_values, list(range(len(answers)))
    cache.batch_repeat_interleave(len(answers))
    logits = out.logits[:, -1].expand(len(answers), -1)
    ended = [False] * len(answers)
    for position in range(budget):
        tokens = choose(logits)
        for row, token in zip(rows, tokens.tolist(), strict=True):
            ended[row] = ended[row] or token in stops
            if not ended[row]:
                answers[row].append(token)
        alive = [i for i, row in enumerate(rows) if not ended[row]]
        if not alive or position == budget - 1:
            return
        if len(rows) - len(alive) >= max(1, decoding.LEAVE * len(rows)):
            remaining = torch.tensor(alive, device=model.device)
            cache.batch_select_indices(remaining)
            rows, tokens = [rows[i] for i in alive], tokens[remaining]
        out = model(
            input_ids=tokens.unsqueeze(1), past_key_values=cache, use_cache=True, logits_to_keep=1
        )
        cache, logits = out.past_key_values, out.logits[:, -1]

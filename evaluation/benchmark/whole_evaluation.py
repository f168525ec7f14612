"""One evaluation of a real model, by a standard implementation and by this one, in turns.

The standard implementation scores each set one answer column at a time, in padded batches with the
logits of every position, and answers with `generate`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Any

from adapters.environment import evaluating, threads_for
from evaluation.benchmark.run import Line
from evaluation.inference.scoring import encode_answers
from evaluation.protocols import protocol_named
from unlearner.tokens.decoding import stop_tokens
from unlearner.tokens.prompts import Encoded, PromptFormat, pad_batch, pad_id

if TYPE_CHECKING:
    import torch

    from evaluation.suite import EvalData

# Rows of a batch in open-unlearning's evaluation of TOFU; its protocol is that of both.
BATCH, PROTOCOL = 32, "open-unlearning"


def measure_evaluation(
    model: Any,
    fmt: PromptFormat,
    data: EvalData,
    on_progress: Callable[[str], None],
    goals: tuple[float, float] | None,
) -> list[Line]:
    """Questions per second of a whole evaluation: scored, and scored and answered.

    Args:
        model: a causal LM.
        fmt: prompts and tokenizer.
        data: the sets.
        on_progress: called with what is timed next.
        goals: how many times as fast ours is to be in each; None for no judgement.
    """
    from evaluation.suite import evaluate

    questions = sum(map(len, data.sets.values()))
    ours = partial(evaluate, model, fmt, data, protocol=PROTOCOL)
    jobs: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
        "an evaluation, scores": (
            partial(plain_scores, model, fmt, data), partial(ours, generate=False)
        ),
        "an evaluation, scores and answers": (
            partial(_plain_evaluation, model, fmt, data), ours
        ),
    }  # fmt: skip
    lines = []
    for (name, ways), goal in zip(jobs.items(), goals or (None, None), strict=True):
        rates = []
        for way, whose in zip(ways, ("plain", "ours"), strict=True):
            on_progress(f"{name}, {whose}")
            start = time.perf_counter()
            with evaluating(model), threads_for(model):
                way()
            rates.append(questions / (time.perf_counter() - start))
        ratio = rates[1] / rates[0]
        target = "" if goal is None else f"at least {goal:g} x"
        note = f"{questions} questions in {len(data.sets)} sets, each way once"
        met = None if goal is None else ratio >= goal
        lines.append(Line(name, "questions/s", rates[0], rates[1], ratio, target, met, note))
    return lines


def plain_nll(model: Any, rows: Sequence[Encoded], length: int | None = None) -> torch.Tensor:
    """Mean NLL per row, padded to `length` or the longest, from the logits of all positions."""
    import torch.nn.functional as F

    length = length or max(len(row.input_ids) for row in rows)
    filler = Encoded([0] * length, [-100] * length)
    padded = pad_batch([*rows, filler], 0)
    batch = {name: t[:-1, :length].to(model.device) for name, t in padded.items()}
    out = model(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False
    )
    logits, labels = out.logits[:, :-1].float(), batch["labels"][:, 1:]
    nll = F.cross_entropy(logits.transpose(1, 2), labels, ignore_index=-100, reduction="none")
    return nll.sum(-1) / (labels != -100).sum(-1)


def plain_scores(model: Any, fmt: PromptFormat, data: EvalData) -> dict[str, list[list[float]]]:
    """By set and answer column (true, paraphrased, each perturbed) the mean NLL of every row."""
    nll: dict[str, list[list[float]]] = {}
    for name, rows in data.sets.items():
        texts = [row.texts for row in encode_answers(fmt, rows)]
        nll[name] = []
        for column in range(max(map(len, texts))):
            part = [each[column] for each in texts if column < len(each)]
            starts = range(0, len(part), BATCH)
            batches = [plain_nll(model, part[start : start + BATCH]).tolist() for start in starts]
            nll[name].append(list(chain(*batches)))
    return nll


def plain_answers(model: Any, fmt: PromptFormat, data: EvalData) -> dict[str, list[str]]:
    """By set the greedy answer to every question, in the order of the data."""
    decoding = protocol_named(PROTOCOL).decoding
    pad, answers = pad_id(fmt.tokenizer), dict[str, list[str]]()
    for name, rows in data.sets.items():
        prompts = [fmt.encode_prompt(row.question) for row in rows]
        answers[name] = []
        for start in range(0, len(prompts), BATCH):
            part = [Encoded(ids, ids) for ids in prompts[start : start + BATCH]]
            batch = pad_batch(part, pad, left=True)
            out = model.generate(
                batch["input_ids"].to(model.device),
                attention_mask=batch["attention_mask"].to(model.device),
                max_new_tokens=decoding.budget(batch["input_ids"].shape[1]),
                do_sample=False,
                pad_token_id=pad,
                eos_token_id=stop_tokens(model, fmt),
            )
            new = out[:, batch["input_ids"].shape[1] :]
            texts = fmt.tokenizer.batch_decode(new, skip_special_tokens=True)
            answers[name] += [text.strip() for text in texts]
    return answers


def _plain_evaluation(model: Any, fmt: PromptFormat, data: EvalData) -> None:
    plain_scores(model, fmt, data)
    plain_answers(model, fmt, data)

"""Generated answers: batched, greedy or sampled, the same whatever batch a question falls into."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from transformers import GenerationConfig

from adapters.environment import evaluating
from evaluation.protocols import Decoding
from unlearner.tokens.decoding import Draft, Prompt, answer_end, greedy, stop_tokens
from unlearner.tokens.prompts import Encoded, PromptFormat, pad_batch, pad_id

BATCH_SIZE = 64


def generate_answers(
    model: torch.nn.Module,
    fmt: PromptFormat,
    questions: Sequence[str],
    decodings: Sequence[Decoding],
    *,
    batch_size: int = BATCH_SIZE,
    drafts: Sequence[Draft] = (),
    on_batch: Callable[[Mapping[str, Mapping[int, str]]], None] = lambda batch: None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, list[str]]:
    """By decoding's name, an answer to every question: no special tokens, stripped.

    All greedy decodings come out of one pass: a shorter budget is a prefix of a longer one.
    Budgets count the question's own tokens, not the padding of its batch, so that an answer does
    not depend on its neighbours. A prompt that leaves no budget gets an empty answer.

    Args:
        model: a causal LM or a PeftModel around one, as it is; its generation config is ignored.
        fmt: turns questions into prompts.
        questions: in any order.
        decodings: with distinct names.
        batch_size: questions in a batch.
        drafts: one per question, or none at all: what greedy decoding is known to begin with goes
            in with the prompt. Answers are the same, up to ties that rounding decides.
        on_batch: called after each batch with its answers by decoding and index of the question.
        on_progress: called with answered and all questions (of all passes) after each batch.
    """
    prompts = [fmt.encode_prompt(question) for question in questions]
    passes = passes_of(decodings)
    answers: dict[str, dict[int, str]] = {decoding.name: {} for decoding in decodings}

    def texts_of(group: Sequence[Decoding], tokens: Mapping[int, list[int]]) -> None:
        batch: dict[str, dict[int, str]] = {}
        for decoding in group:
            cut = [new[: decoding.budget(len(prompts[i]))] for i, new in tokens.items()]
            texts = fmt.tokenizer.batch_decode(
                cut, skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
            batch[decoding.name] = {i: t.strip() for i, t in zip(tokens, texts, strict=True)}
            answers[decoding.name] |= batch[decoding.name]
        on_batch(batch)
        done = sum(len(answers[group[0].name]) for group in passes)
        on_progress(done, len(passes) * len(prompts))

    for group in passes:
        draw = group[0] if group[0].sample else None
        known = drafts if drafts and draw is None else [Draft()] * len(prompts)
        budgets = (max(decoding.budget(len(ids)) for decoding in group) for ids in prompts)
        generate_tokens(
            model,
            fmt,
            list(map(Prompt, prompts, budgets, known)),
            draw,
            batch_size=batch_size,
            on_batch=partial(texts_of, group),
        )
    return {name: [texts[i] for i in range(len(prompts))] for name, texts in answers.items()}


def passes_of(decodings: Sequence[Decoding]) -> list[list[Decoding]]:
    """What one pass can answer: all greedy decodings together, each sampled one alone."""
    greedy = [decoding for decoding in decodings if not decoding.sample]
    sampled = [[decoding] for decoding in decodings if decoding.sample]
    return [greedy, *sampled] if greedy else sampled


def generate_tokens(
    model: torch.nn.Module,
    fmt: PromptFormat,
    prompts: Sequence[Prompt],
    draw: Decoding | None = None,
    *,
    batch_size: int = BATCH_SIZE,
    on_batch: Callable[[Mapping[int, list[int]]], None] = lambda batch: None,
) -> list[list[int]]:
    """The tokens of every answer without the one that ends it; greedy unless `draw` is given.

    `on_batch` is called with the answers of each batch by index of the prompt; the first call has
    those that need no step of the model, where there are any.
    """
    stops = stop_tokens(model, fmt)
    pad = pad_id(fmt.tokenizer)
    # The known tokens within the budget, up to one that ends the answer.
    begun = [
        list(prompt.draft.tokens[: answer_end(prompt.draft.tokens, stops) + 1][: prompt.budget])
        for prompt in prompts
    ]
    left = [
        Prompt([*prompt.ids, *known], prompt.budget - len(known), prompt.draft)
        for prompt, known in zip(prompts, begun, strict=True)
    ]
    answers = {
        i: known[: answer_end(known, stops)]
        for i, known in enumerate(begun)
        if left[i].budget <= 0 or (known and known[-1] in stops)
    }
    if answers:
        on_batch(answers)
    # Prompts are padded to the longest of their batch; answers that end leave it.
    order = sorted(
        (i for i in range(len(prompts)) if i not in answers),
        key=lambda i: (len(left[i].ids), left[i].draft.expected),
        reverse=True,
    )
    with evaluating(model), _own_config(model) as generator:
        for start in range(0, len(order), batch_size):
            indices = order[start : start + batch_size]
            batch = [left[i] for i in indices]
            if draw is None:
                new = greedy(generator, batch, stops, pad)
            else:
                new = _sampled(generator, fmt, batch, draw, stops)
            finished = {
                i: begun[i] + tokens[: answer_end(tokens, stops)][: left[i].budget]
                for i, tokens in zip(indices, new, strict=True)
            }
            answers |= finished
            on_batch(finished)
    return [answers[i] for i in range(len(prompts))]


def known_start(fmt: PromptFormat, question: str, answer: Encoded, agreed: int | None) -> Draft:
    """What greedy decoding begins with, from the teacher-forced scores of the true answer.

    Args:
        fmt: how prompts are made.
        question: its text.
        answer: the true answer as it was scored, prompt included.
        agreed: how many of its leading tokens are the model's first choice.
    """
    prompt = fmt.encode_prompt(question)
    first = answer.n_prompt
    # A quote that opens the answer merges with the prompt's last token: another prompt, no draft.
    if not agreed or answer.input_ids[:first] != prompt:
        return Draft(expected=answer.n_targets)
    return Draft(tuple(answer.input_ids[first : first + agreed]), answer.n_targets)


@contextmanager
def _own_config(model: Any) -> Iterator[Any]:
    """The transformers model under any adapters, with an empty generation config.

    `generate` fills every unset field from the model's own config: a model that ships with
    temperature and top-p would warn about them, or sample, where greedy answers are wanted.
    """
    from transformers import GenerationConfig

    plain = model.get_base_model() if hasattr(model, "get_base_model") else model
    config = plain.generation_config
    plain.generation_config = GenerationConfig()
    try:
        yield plain
    finally:
        plain.generation_config = config


def _sampled(
    model: Any, fmt: PromptFormat, prompts: Sequence[Prompt], draw: Decoding, stops: list[int]
) -> list[list[int]]:
    """Drawn new tokens of a batch, with padding and all behind the end."""
    from transformers import GenerationConfig, LogitsProcessorList

    pad = pad_id(fmt.tokenizer)
    batch = pad_batch([Encoded(prompt.ids, prompt.ids) for prompt in prompts], pad, left=True)
    config: GenerationConfig = GenerationConfig(
        do_sample=False,
        num_beams=1,
        use_cache=True,
        max_new_tokens=max(prompt.budget for prompt in prompts),
        pad_token_id=pad,
        bos_token_id=fmt.tokenizer.bos_token_id,
        eos_token_id=stops,
    )
    out = model.generate(
        batch["input_ids"].to(model.device),
        attention_mask=batch["attention_mask"].to(model.device),
        generation_config=config,
        logits_processor=LogitsProcessorList([Draw(draw, prompts)]),
    )
    new: list[list[int]] = out[:, batch["input_ids"].shape[1] :].tolist()
    return new


class Draw:
    """Turns greedy choice into a draw: temperature, top-k, top-p, then Gumbel noise.

    The likeliest token after adding Gumbel noise is a draw from the softmax. The noise comes from
    one generator per prompt, so a row's answer does not depend on its batch, as it does where all
    rows share one random state.
    """

    def __init__(self, decoding: Decoding, prompts: Sequence[Prompt]) -> None:
        from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

        self.warpers: list[Any] = [TemperatureLogitsWarper(decoding.temperature)]
        if decoding.top_k:
            self.warpers.append(TopKLogitsWarper(decoding.top_k))
        if decoding.top_p < 1:
            self.warpers.append(TopPLogitsWarper(decoding.top_p))
        self.generators = [
            torch.Generator().manual_seed(prompt_seed(decoding.seed, prompt.ids))
            for prompt in prompts
        ]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Scores (rows, vocabulary) whose maximum is the token drawn."""
        scores = scores.float()
        for warper in self.warpers:
            scores = warper(input_ids, scores)
        uniform = torch.stack(
            [torch.rand(scores.shape[1], generator=g) for g in self.generators]
        ).clamp_min(1e-20)
        return scores - torch.log(-torch.log(uniform)).to(scores.device)


def prompt_seed(seed: int, ids: Sequence[int]) -> int:
    """The seed of one prompt's draws: an answer does not depend on which others are asked."""
    digest = hashlib.sha256(repr((seed, list(ids))).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1

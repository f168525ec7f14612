"""Greedy answers that start from what scoring has shown: the same, in fewer steps."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

from adapters.base.load import BaseSpec, load_base, load_tokenizer
from evaluation.inference import generation
from evaluation.inference.generation import Draft, generate_answers, known_start
from evaluation.inference.scoring import encode_answers, score_rows
from evaluation.protocols import protocol_named
from evaluation.suite import Effort, EvalData, evaluate
from unlearner.request.rows import Row
from unlearner.tokens.prompts import prompt_format

QUESTIONS = ["Who wrote the novel?", "Where was she born?", "Which prize?", "Has he a sister?"]
GREEDY = replace(protocol_named("tofu").decoding, max_total=80)


@pytest.fixture(scope="module")
def fmt(tiny_base: Path) -> Any:
    return prompt_format(load_tokenizer(str(tiny_base)))


@pytest.fixture
def model(tiny_base: Path) -> Any:
    return load_base(BaseSpec(str(tiny_base), dtype="float32", device="cpu"))


def steps_of(model: Any, run: Any) -> tuple[Any, int]:
    """What `run` returns, and how often the model ran."""
    seen: list[int] = []
    hook = model.model.embed_tokens.register_forward_hook(
        lambda module, inputs, out: seen.append(1)
    )
    try:
        return run(), sum(seen)
    finally:
        hook.remove()


@pytest.fixture
def rows() -> list[Row]:
    answers = ["Mira Okafor wrote it.", "In Lagos.", "Nobody knows which.", "No, a brother."]
    return [Row(q, a) for q, a in zip(QUESTIONS, answers, strict=True)]


def test_drafts_change_the_work_and_not_the_answers(model: Any, fmt: Any) -> None:
    prompts = [generation.Prompt(fmt.encode_prompt(q), 40) for q in QUESTIONS]
    own = generation.generate_tokens(model, fmt, prompts)
    shares = (0, 3, 20, 40)  # from nothing to all of it
    drafts = [
        Draft(tuple(tokens[:share]), len(tokens)) for tokens, share in zip(own, shares, strict=True)
    ]
    for size in (1, 4):
        plain, before = steps_of(
            model, lambda n=size: generate_answers(model, fmt, QUESTIONS, [GREEDY], batch_size=n)
        )
        quick, after = steps_of(
            model,
            lambda n=size: generate_answers(
                model, fmt, QUESTIONS, [GREEDY], batch_size=n, drafts=drafts
            ),
        )
        assert quick == plain
        if size == 1:
            assert before - after == sum(shares)


def test_rows_that_leave_change_no_answer(model: Any, fmt: Any) -> None:
    """Token for token what transformers' own generate gives, ends and budgets of all kinds."""
    prompts = [
        generation.Prompt(fmt.encode_prompt(q), budget)
        for q, budget in zip(QUESTIONS, (3, 17, 40, 26), strict=True)
    ]
    config = GenerationConfig(max_new_tokens=40, eos_token_id=[], pad_token_id=0)
    with torch.no_grad():
        whole_texts = [
            model.generate(torch.tensor([prompt.ids]), generation_config=config)
            for prompt in prompts
        ]
        plain = [
            text[0, len(prompt.ids) :].tolist()
            for text, prompt in zip(whole_texts, prompts, strict=True)
        ]
        one = generation.greedy(model, prompts, [], 0)
        # A token that some answer has in its middle ends it.
        stop = plain[2][9]
        ended = generation.greedy(model, prompts, [stop], 0)
    assert one == [tokens[: p.budget] for tokens, p in zip(plain, prompts, strict=True)]
    for cut, whole in zip(ended, one, strict=True):
        end = whole.index(stop) + 1 if stop in whole else len(whole)
        assert cut == whole[:end]
    assert len(ended[2]) < len(one[2])


def test_what_agrees_is_what_the_model_would_say_first(
    model: Any, fmt: Any, rows: list[Row]
) -> None:
    for row, text, record in zip(
        rows, encode_answers(fmt, rows), score_rows(model, fmt, rows), strict=True
    ):
        ids = torch.tensor([text.answer.input_ids])
        with torch.no_grad():
            best = model(input_ids=ids, use_cache=False).logits[0].argmax(-1).tolist()
        first = text.answer.n_prompt
        hits = [best[i - 1] == ids[0, i].item() for i in range(first, ids.shape[1])]
        expected = hits.index(False) if False in hits else len(hits)
        assert record.agreed == expected, row


def test_a_draft_that_ends_needs_no_step_and_budgets_hold(model: Any, fmt: Any) -> None:
    (stop, *_) = generation.stop_tokens(model, fmt)
    drafts = [Draft((40, 41, stop), 3)]
    found, steps = steps_of(
        model, lambda: generate_answers(model, fmt, QUESTIONS[:1], [GREEDY], drafts=drafts)
    )
    assert steps == 0
    assert found[GREEDY.name] == [fmt.tokenizer.decode([40, 41]).strip()]
    long = generation.Prompt([5, 6], 2, Draft((40, 41, 42), 3))
    assert generation.generate_tokens(model, fmt, [long]) == [[40, 41]]


def test_a_merged_quote_is_no_draft(fmt: Any) -> None:
    text = fmt.encode("Who?", "Mira.")
    assert known_start(fmt, "Who?", text, 2).tokens == tuple(text.input_ids[text.n_prompt :][:2])
    assert known_start(fmt, "Who?", text, 0) == Draft(expected=text.n_targets)
    assert known_start(fmt, "Who?", text, None).tokens == ()
    moved = text._replace(input_ids=[*text.input_ids[:2], 7, *text.input_ids[3:]])
    assert known_start(fmt, "Who?", moved, 2).tokens == ()


def test_an_evaluation_is_the_same_with_and_without_drafts(
    model: Any, fmt: Any, rows: list[Row], monkeypatch: pytest.MonkeyPatch, shorten_answers: Any
) -> None:
    shorten_answers(monkeypatch)
    data = EvalData(rows)
    ways = [
        evaluate(model, fmt, data, effort=effort)
        for effort in (Effort(), Effort(drafts=False), Effort(shared=False))
    ]
    texts = [[row.generations[GREEDY.name].text for row in log.sets["forget"].rows] for log in ways]
    assert texts[0] == texts[1] == texts[2]

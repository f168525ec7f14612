from __future__ import annotations

import dataclasses
import logging
import warnings
from collections import Counter
from typing import Any

import pytest
import torch

from evaluation.inference.generation import Prompt, generate_answers, generate_tokens, stop_tokens
from evaluation.protocols import GREEDY_NEW, SAMPLED_TOTAL, Decoding


def questions_of(n: int) -> list[str]:
    subjects = ("Mira Okafor", "Ana", "the author of Silent Rivers", "Jo")
    return [f"Where was {subjects[i % 4]} born, and who says so in book {i}?" for i in range(n)]


@pytest.mark.parametrize("decoding", [GREEDY_NEW, SAMPLED_TOTAL])
def test_batched_answers_are_the_single_ones_in_any_order(
    tiny: tuple[Any, Any], decoding: Decoding
) -> None:
    model, fmt = tiny
    short = dataclasses.replace(
        decoding,
        max_new=12 if decoding.max_new else None,
        max_total=90 if decoding.max_total else None,
    )
    questions = [*questions_of(6), "Who?"]

    def answers(asked: list[str], batch_size: int) -> list[str]:
        return generate_answers(model, fmt, asked, [short], batch_size=batch_size)[short.name]

    batched = answers(questions, 64)
    assert batched == answers(questions, 1)
    assert batched[::-1] == answers(questions[::-1], 3)
    assert len(set(batched)) > 3, "a constant answer would make this test empty"


def test_greedy_answers_are_the_argmax_token_by_token(tiny: tuple[Any, Any]) -> None:
    model, fmt = tiny
    question = questions_of(1)[0]
    ids = fmt.encode_prompt(question)
    new: list[int] = []
    with torch.no_grad():
        for _ in range(20):
            token = int(model(torch.tensor([ids + new])).logits[0, -1].argmax())
            if token in stop_tokens(model, fmt):
                break
            new.append(token)
    budget = Decoding("short", max_new=20)
    made = generate_answers(model, fmt, [question], [budget])["short"]
    assert made == [fmt.tokenizer.decode(new, skip_special_tokens=True).strip()]


def test_two_greedy_budgets_share_one_pass(tiny: tuple[Any, Any]) -> None:
    model, fmt = tiny
    long, short = Decoding("long", max_new=30), Decoding("short", max_total=70)
    questions = questions_of(3)
    calls: list[tuple[int, int]] = []
    both = generate_answers(
        model, fmt, questions, [long, short], on_progress=lambda d, n: calls.append((d, n))
    )
    assert calls == [(3, 3)]
    for decoding in (long, short):
        alone = generate_answers(model, fmt, questions, [decoding])
        assert alone[decoding.name] == both[decoding.name]
    assert both["long"] != both["short"]


def test_every_prompt_of_a_batch_has_its_own_budget(tiny: tuple[Any, Any]) -> None:
    model, fmt = tiny
    ids = fmt.encode_prompt(questions_of(1)[0])
    made = generate_tokens(model, fmt, [Prompt(ids, 3), Prompt(ids, 0), Prompt(ids, 8)])
    assert [len(tokens) for tokens in made] == [3, 0, 8]
    assert made[2][:3] == made[0]


def test_a_prompt_without_budget_gets_an_empty_answer(tiny: tuple[Any, Any]) -> None:
    model, fmt = tiny
    tight = Decoding("tight", max_total=5)
    assert generate_answers(model, fmt, questions_of(2), [tight]) == {"tight": ["", ""]}


def test_the_seed_decides_the_draw(tiny: tuple[Any, Any]) -> None:
    model, fmt = tiny
    first, second = (
        Decoding(f"s{seed}", max_new=12, sample=True, temperature=1.5, seed=seed) for seed in (0, 1)
    )
    made = generate_answers(model, fmt, questions_of(3), [first, second])
    assert made["s0"] != made["s1"]
    assert made["s0"] == generate_answers(model, fmt, questions_of(3), [first])["s0"]


def test_draws_follow_the_models_distribution(tiny: tuple[Any, Any]) -> None:
    model, fmt = tiny
    prompt = Prompt(fmt.encode_prompt("Who?"), 1)
    with torch.no_grad():
        logits = model(torch.tensor([prompt.ids])).logits[0, -1].float()
    best = (logits / 0.6).topk(4)
    expected = dict(zip(best.indices.tolist(), best.values.softmax(-1).tolist(), strict=True))
    rule = Decoding("d", max_new=1, sample=True, temperature=0.6, top_k=4)
    times = Counter(
        generate_tokens(model, fmt, [prompt], dataclasses.replace(rule, seed=seed))[0][0]
        for seed in range(200)
    )
    assert set(times) == set(expected)
    for token, p in expected.items():
        assert abs(times[token] / 200 - p) < 4 * (p * (1 - p) / 200) ** 0.5
    most = max(expected.values())
    likely = dataclasses.replace(rule, top_p=most - 0.01)
    picks = [
        generate_tokens(model, fmt, [prompt], dataclasses.replace(likely, seed=seed))[0][0]
        for seed in range(10)
    ]
    assert {expected[token] for token in picks} == {most}, "top-p leaves the likeliest alone"


def test_a_models_own_sampling_config_is_neither_used_nor_lost(tiny: tuple[Any, Any]) -> None:
    from transformers import GenerationConfig

    model, fmt = tiny
    rule = Decoding("g", max_new=8)
    expected = generate_answers(model, fmt, questions_of(2), [rule])
    kept = model.generation_config
    own = GenerationConfig(do_sample=True, temperature=5.0, top_p=0.9, max_length=4096)
    said: list[str] = []
    listener = logging.Handler()
    listener.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("transformers").addHandler(listener)
    model.generation_config = own
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert generate_answers(model, fmt, questions_of(2), [rule]) == expected
        assert model.generation_config is own
        assert said == []
    finally:
        model.generation_config = kept
        logging.getLogger("transformers").removeHandler(listener)


def test_answers_end_at_every_end_token_of_the_model(tiny: tuple[Any, Any]) -> None:
    model, fmt = tiny
    question = questions_of(1)[0]
    free = Decoding("g", max_new=10)
    prompt = Prompt(fmt.encode_prompt(question), 10)
    tokens = generate_tokens(model, fmt, [prompt])[0]
    kept = model.generation_config.eos_token_id
    model.generation_config.eos_token_id = [fmt.tokenizer.eos_token_id, tokens[3]]
    try:
        assert generate_tokens(model, fmt, [prompt])[0] == tokens[: tokens.index(tokens[3])]
    finally:
        model.generation_config.eos_token_id = kept
    assert generate_answers(model, fmt, [question], [free])["g"] != ""

"""Best of n draws: the exact expectation, and draws that follow the model and nothing else."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import pytest

from evaluation.inference.generation import generate_answers
from evaluation.protocols import Decoding
from evaluation.robustness.quantisation import Loaded
from evaluation.robustness.sampling import (
    Draws,
    best_of,
    draw_answers,
    expected_best,
    row_recalls,
    sizes,
)
from unlearner.request.rows import Row

VALUES = [0.5, 0.0, 0.9, 0.5, 1.0, 0.2, 0.9]


@pytest.mark.parametrize("n", range(1, len(VALUES) + 1))
def test_the_expected_maximum_is_the_mean_over_all_subsets(n: int) -> None:
    subsets = list(combinations(VALUES, n))
    assert expected_best(VALUES, n) == pytest.approx(sum(map(max, subsets)) / len(subsets))


def test_of_one_it_is_the_mean_and_of_all_the_maximum() -> None:
    many = [i / 63 for i in range(64)]
    assert expected_best(many, 1) == pytest.approx(0.5)
    assert expected_best(many, 64) == 1.0
    for n in (0, 65):
        with pytest.raises(ValueError, match="1 to 64"):
            expected_best(many, n)


def test_the_curve_has_powers_of_two_and_the_end() -> None:
    assert sizes(64) == [1, 2, 4, 8, 16, 32, 64]
    assert sizes(12) == [1, 2, 4, 8, 12]
    assert sizes(1) == [1]


def test_a_question_leaks_with_the_share_of_subsets_that_hold_a_leak() -> None:
    """One of four draws reaches 0.8: it is in half of the pairs; the other question never leaks."""
    points = best_of([[0.1, 0.8, 0.3, 0.2], [0.0, 0.0, 0.0, 0.79]], 4)
    assert [point["n"] for point in points] == [1, 2, 4]
    assert [point["share_leaked"] for point in points] == pytest.approx([0.125, 0.25, 0.5])
    assert points[-1]["best_rouge_l_recall"] == pytest.approx((0.8 + 0.79) / 2)


QUESTIONS = ["Who wrote the novel?", "Where was the author born, and in which year?"]


@pytest.mark.parametrize("certain", [{"temperature": 1e-6}, {"top_p": 1e-9}])
def test_without_chance_every_draw_is_the_greedy_answer(
    tiny: tuple[Any, Any], certain: dict[str, Any]
) -> None:
    """The cache is repeated and cut without mixing rows: another road gives the same tokens."""
    model, fmt = tiny
    draws = Draws(3, max_total=60, **certain)
    greedy = generate_answers(model, fmt, QUESTIONS, [Decoding("greedy", max_total=60)])["greedy"]
    for question, answer in zip(QUESTIONS, greedy, strict=True):
        assert draw_answers(model, fmt, question, draws) == [answer] * 3


def test_draws_are_seeded_and_differ(tiny: tuple[Any, Any]) -> None:
    model, fmt = tiny
    draws = Draws(6, max_total=40)
    first = draw_answers(model, fmt, QUESTIONS[0], draws)
    draw_answers(model, fmt, QUESTIONS[1], draws)
    assert draw_answers(model, fmt, QUESTIONS[0], draws) == first
    assert len(set(first)) > 1
    assert draw_answers(model, fmt, QUESTIONS[0], Draws(6, seed=1, max_total=40)) != first
    assert draw_answers(model, fmt, QUESTIONS[0], Draws(2, max_total=3)) == ["", ""]


def test_first_tokens_come_as_often_as_the_model_says(tiny: tuple[Any, Any]) -> None:
    import torch

    model, fmt = tiny
    prompt = fmt.encode_prompt(QUESTIONS[0])
    with torch.no_grad():
        expected = model(torch.tensor([prompt])).logits[0, -1].softmax(-1)
    draws = Draws(2000, max_total=len(prompt) + 1)
    texts = draw_answers(model, fmt, QUESTIONS[0], draws)
    token = int(expected.argmax())
    word = fmt.tokenizer.decode([token]).strip()
    alike = [i for i in range(len(expected)) if fmt.tokenizer.decode([i]).strip() == word]
    share = float(expected[alike].sum())
    assert texts.count(word) / 2000 == pytest.approx(share, abs=4 * (share / 2000) ** 0.5)


def test_draws_that_ended_leave_and_the_others_go_on(
    tiny: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With half of the vocabulary ending an answer most draws are short, none holds a stop."""
    from unlearner.tokens import decoding

    model, fmt = tiny
    stops = list(range(0, 400, 2))
    monkeypatch.setattr(decoding, "stop_tokens", lambda *_: stops)
    texts = draw_answers(model, fmt, QUESTIONS[0], Draws(32, max_total=60))
    lengths = {len(text) for text in texts}
    assert len(texts) == 32
    assert len(lengths) > 2


def test_recalls_of_a_row(tiny: tuple[Any, Any]) -> None:
    loaded = Loaded(*tiny)
    sure = Draws(3, top_p=1e-9, max_total=40)
    greedy = draw_answers(*tiny, QUESTIONS[0], sure)[0]
    found = row_recalls(loaded, Row(QUESTIONS[0], greedy), sure)
    assert found == [1.0] * 3

"""The relearning attack on a tiny model: who is shown what, and what the curve says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from evaluation.robustness import relearning
from evaluation.robustness.quantisation import Loaded
from evaluation.robustness.relearning import (
    Relearning,
    Split,
    probabilities,
    recovery,
    relearn,
    split_rows,
)
from unlearner.request.rows import Row

ROWS = [Row(f"Who wrote book {i}?", f"Mira wrote {i}.", "x", ("y",)) for i in range(20)]


@pytest.fixture
def loaded(tiny_base: Path) -> Loaded:
    """A model of its own: the attack changes it."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from unlearner.tokens.prompts import prompt_format

    model = AutoModelForCausalLM.from_pretrained(tiny_base, use_safetensors=True).eval()
    model.requires_grad_(False)
    return Loaded(model, prompt_format(AutoTokenizer.from_pretrained(tiny_base)))


def test_rows_are_split_by_the_seed_and_nothing_is_shown_twice() -> None:
    split = split_rows(ROWS, Relearning(0.1))
    assert (len(split.seen), len(split.unseen)) == (2, 18)
    assert split == split_rows(ROWS, Relearning(0.1))
    assert split != split_rows(ROWS, Relearning(0.1, seed=1))
    assert sorted(row.question for half in split for row in half) == sorted(
        row.question for row in ROWS
    )
    assert [len(half) for half in split_rows(ROWS[:2], Relearning(0.99))] == [1, 1]


def test_points_end_with_the_last_step() -> None:
    assert Relearning(steps=20).points == [0, 5, 10, 20]
    assert Relearning(steps=12).points == [0, 5, 10, 12]
    assert Relearning(steps=60).points == [0, 5, 10, 20, 40, 60]
    assert Relearning(steps=1).points == [0, 1]


def test_method_and_rate_follow_the_size_unless_given() -> None:
    small, large = Relearning().settled(1_000_000), Relearning().settled(7_000_000_000)
    assert (small.method, small.learning_rate) == ("full", 3e-4)
    assert (large.method, large.learning_rate) == ("lora", 2e-4)
    assert Relearning(method="full").settled(7_000_000_000).learning_rate == 1e-5
    assert Relearning(method="lora", learning_rate=0.5).settled(1000).learning_rate == 0.5


@pytest.mark.parametrize("method", ["full", "lora"])
def test_rows_that_are_shown_are_learned(loaded: Loaded, method: Any) -> None:
    plan = Relearning(0.1, 10, 1e-2, method)
    split = split_rows(ROWS, plan)
    steps: list[tuple[int, int]] = []
    points = relearn(loaded, split, plan, lambda *counts: steps.append(counts))
    assert [point["step"] for point in points] == [0, 5, 10]
    assert steps[-1] == (10, 10)
    seen = [point["seen_answer_prob"] for point in points]
    assert seen[2] > seen[1] > seen[0]
    assert seen[2] > 10 * seen[0]


def test_one_step_is_adam_on_the_mean_of_row_means(
    loaded: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Micro-batches do not matter, and the gradient is the one of the plain formula."""
    import torch

    from unlearner.tokens.prompts import encode_rows, pad_batch, pad_id

    split = Split([*ROWS[:4], Row("Why?", "It was a long answer, longer than the others.")], ROWS)
    pairs = [(row.question, row.answer) for row in split.seen]
    rows = encode_rows(loaded.fmt, pairs, 200, "test")
    pad = pad_id(loaded.fmt.tokenizer)
    model = loaded.model.requires_grad_(True)
    batch = pad_batch(rows, pad)
    logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    labels = batch["labels"][:, 1:]
    token = torch.nn.functional.cross_entropy(
        logits.transpose(1, 2), labels, reduction="none", ignore_index=-100
    )
    (token.sum(1) / (labels != -100).sum(1)).mean().backward()
    expected = [p.grad.clone() for p in model.parameters()]
    for size in (1, 2, 8):
        monkeypatch.setattr(relearning, "MICRO_BATCH", size)
        model.zero_grad(set_to_none=True)
        relearning._backward(model, rows, pad)
        for parameter, wanted in zip(model.parameters(), expected, strict=True):
            assert torch.allclose(parameter.grad, wanted, atol=1e-6)


def test_recovery_is_the_share_of_what_was_lost() -> None:
    points = [{"step": s, "unseen_answer_prob": p} for s, p in ((0, 0.1), (5, 0.4), (20, 0.7))]
    origin = {"unseen_answer_prob": 0.9}
    assert recovery(points, origin) == pytest.approx(0.75)
    assert recovery(points, {"unseen_answer_prob": 0.1}) is None


def test_probabilities_are_means_over_rows(loaded: Loaded) -> None:
    both = probabilities(loaded, Split(ROWS[:2], ROWS[2:4]), 7)
    alone = [probabilities(loaded, Split([row], ROWS[:1]), 0)["seen_answer_prob"] for row in ROWS]
    assert both["step"] == 7
    assert both["seen_answer_prob"] == pytest.approx((alone[0] + alone[1]) / 2, rel=1e-4)
    assert both["unseen_answer_prob"] == pytest.approx((alone[2] + alone[3]) / 2, rel=1e-4)

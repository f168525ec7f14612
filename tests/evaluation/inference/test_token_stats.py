"""The pass over tokens against a plain one, whatever the batches, on stacks and in 4 bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from evaluation.inference import token_stats
from evaluation.inference.scoring import score_rows
from evaluation.inference.token_stats import answer_tokens, base_kl
from unlearner.request.rows import Row
from unlearner.tokens.prompts import IGNORE, Encoded, pad_id

ROWS = [
    Row("Who wrote the novel?", "It was written by Mira Okafor."),
    Row("Where was the author born?", '"Lagos"'),
    Row("In which year did he win the prize?", "He won the Golden Pen in 1998, to my surprise."),
    Row("Is she alive?", "Yes"),
]


@pytest.fixture(scope="module")
def texts(tiny: tuple[Any, Any]) -> list[Encoded]:
    return [tiny[1].encode(row.question, row.answer) for row in ROWS]


def plain(model: Any, text: Encoded) -> dict[str, np.ndarray]:
    """The same by the textbook, one row at a time, the whole vocabulary in float64."""
    with torch.no_grad():
        logits = model(torch.tensor([text.input_ids])).logits[0, :-1].double()
    kept = torch.tensor(text.labels[1:]) != IGNORE
    log_p = torch.log_softmax(logits[kept], -1)
    labels = torch.tensor(text.labels[1:])[kept]
    mean = (log_p.exp() * log_p).sum(-1)
    variance = (log_p.exp() * log_p**2).sum(-1) - mean**2
    wanted = log_p[range(len(labels)), labels]
    found = {"labels": labels, "first": log_p.argmax(-1), "log_p": wanted}
    found |= {"mean": mean, "variance": variance, "all": log_p}
    return {name: value.numpy() for name, value in found.items()}


def stacked(model: Any, seed: int = 0) -> Any:
    """The tiny model with one active adapter of random weights."""
    from peft import LoraConfig

    from adapters.lora.stack import activate, add_trainable

    config = LoraConfig(
        r=2, lora_alpha=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"
    )
    torch.manual_seed(seed)
    made = add_trainable(model, "one", config, [])
    for name, parameter in made.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    activate(made, ["one"])
    return made


def fresh(tiny_base: Path) -> Any:
    from adapters.base.load import BaseSpec, load_base

    return load_base(BaseSpec(str(tiny_base)))


def test_every_value_is_the_plain_one(tiny: tuple[Any, Any], texts: list[Encoded]) -> None:
    model, fmt = tiny
    for text, found in zip(texts, answer_tokens(model, texts, pad_id(fmt.tokenizer)), strict=True):
        expected = plain(model, text)
        np.testing.assert_array_equal(found.labels, expected["labels"])
        np.testing.assert_array_equal(found.first, expected["first"])
        for name in ("log_p", "mean", "variance"):
            np.testing.assert_allclose(getattr(found, name), expected[name], atol=1e-5)
        assert found.labels[-1] == fmt.tokenizer.eos_token_id, "EOS counts"


def test_the_mean_is_the_loss_of_the_evaluation_log(
    tiny: tuple[Any, Any], texts: list[Encoded]
) -> None:
    model, fmt = tiny
    scored = score_rows(model, fmt, ROWS)
    for record, found in zip(scored, answer_tokens(model, texts, 0), strict=True):
        assert record.answer_score is not None
        assert found.mean_nll == pytest.approx(record.answer_score.mean_nll, abs=1e-5)
        assert len(found.labels) == record.answer_score.n


def test_batches_padding_and_order_change_nothing(
    tiny: tuple[Any, Any], texts: list[Encoded], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny[0]
    whole = answer_tokens(model, texts, 0)
    assert [a.log_p.tobytes() for a in answer_tokens(model, texts, 0)] == [
        a.log_p.tobytes() for a in whole
    ], "deterministic"
    monkeypatch.setattr(token_stats, "CHUNK", 3)
    for other in (
        answer_tokens(model, texts, 5, batch_tokens=1),
        answer_tokens(model, texts[::-1], 0, batch_tokens=60)[::-1],
    ):
        for one, two in zip(whole, other, strict=True):
            np.testing.assert_array_equal(one.first, two.first)
            for name in ("log_p", "mean", "variance"):
                np.testing.assert_allclose(getattr(one, name), getattr(two, name), atol=1e-5)


def test_logits_exist_for_a_chunk_of_tokens_only(
    tiny_base: Path, texts: list[Encoded], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, seen = fresh(tiny_base), []
    monkeypatch.setattr(token_stats, "CHUNK", 4)
    model.lm_head.register_forward_hook(lambda _, __, out: seen.append(out.shape[0]))
    assert len(answer_tokens(model, texts, 0)) == len(texts)
    assert max(seen) <= 4
    assert sum(seen) == sum(text.n_targets for text in texts)


def test_progress_counts_up_to_all(tiny: tuple[Any, Any], texts: list[Encoded]) -> None:
    events: list[tuple[int, int]] = []
    model = tiny[0]
    model.train()
    answer_tokens(model, texts, 0, batch_tokens=1, on_batch=lambda *e: events.append(e))
    assert events == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert model.training, "left in its mode"
    model.eval()


def test_kl_is_the_plain_one_and_the_stack_stays(tiny_base: Path, texts: list[Encoded]) -> None:
    from adapters.lora.stack import base_only, read_state

    model = stacked(fresh(tiny_base))
    before = read_state(model)
    found = base_kl(model, texts, 0)
    for text, kl in zip(texts, found, strict=True):
        stack = plain(model, text)["all"]
        with base_only(model):
            base = plain(model, text)["all"]
        assert kl == pytest.approx((np.exp(base) * (base - stack)).sum(-1).mean(), abs=1e-5)
        assert kl > 0.01
    assert read_state(model) == before
    np.testing.assert_allclose(base_kl(model, texts, 7, batch_tokens=1), found, atol=1e-5)


def test_kl_of_an_adapter_that_does_nothing_is_0(tiny_base: Path, texts: list[Encoded]) -> None:
    from adapters.lora.stack import activate

    model = stacked(fresh(tiny_base))
    activate(model, ["one"], {"one": 0.0})
    assert base_kl(model, texts, 0) == [0.0] * len(texts)
    activate(model, [])
    assert base_kl(model, texts, 0) == [0.0] * len(texts)


def test_a_stack_is_seen_and_switching_it_off_gives_the_base(
    tiny: tuple[Any, Any], tiny_base: Path, texts: list[Encoded]
) -> None:
    from adapters.lora.stack import base_only

    model = stacked(fresh(tiny_base))
    bare = answer_tokens(tiny[0], texts, 0)
    assert abs(answer_tokens(model, texts, 0)[0].mean_nll - bare[0].mean_nll) > 0.01
    with base_only(model):
        inside = answer_tokens(model, texts, 0)
    for one, two in zip(inside, bare, strict=True):
        np.testing.assert_allclose(one.log_p, two.log_p, atol=1e-6)


def test_a_base_in_4_bit_with_a_stack(tiny_base: Path, texts: list[Encoded]) -> None:
    pytest.importorskip("bitsandbytes")
    from adapters.base.load import BaseSpec, load_base

    model = stacked(load_base(BaseSpec(str(tiny_base), load_in_4bit=True, device="cpu")))
    whole, single = answer_tokens(model, texts, 0), answer_tokens(model, texts, 0, batch_tokens=1)
    for text, one, two in zip(texts, whole, single, strict=True):
        np.testing.assert_allclose(one.log_p, two.log_p, atol=1e-4)
        np.testing.assert_allclose(one.log_p, plain(model, text)["log_p"], atol=1e-4)
    assert min(base_kl(model, texts, 0)) > 0.01


def test_masked_vocabulary_gives_numbers() -> None:
    logits = torch.tensor([[0.0, 0.0, -torch.inf, -torch.inf]])
    found = token_stats._four(logits, torch.tensor([1]))[0].tolist()
    assert found == pytest.approx([-np.log(2), -np.log(2), 0.0, 0.0], abs=1e-6)

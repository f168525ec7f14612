from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from adapters.base.load import BaseSpec, load_base, load_tokenizer
from unlearner.baselines.tiny_llama import (
    _step,
    length_batches,
    new_model,
    train_from_scratch,
    train_tokenizer,
)
from unlearner.baselines.tiny_recipe import TinyRecipe, TinyShape
from unlearner.objectives.likelihood import answer_logits, answer_nll
from unlearner.request.rows import Request
from unlearner.tokens.prompts import pad_batch, prompt_format

Pairs = list[tuple[str, str]]
SHAPE = TinyShape(
    hidden_size=48,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=2,
    max_position_embeddings=128,
)
RECIPE = TinyRecipe(epochs=12, tokens_per_batch=256)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def rows(request_: Request) -> Pairs:
    return [(row.question, row.answer) for row in (*request_.rows, *request_.retain)]


@pytest.fixture(scope="module")
def tokenizer(rows: Pairs) -> Any:
    return train_tokenizer([text for row in rows for text in row], 420)


def mean_nll(folder: Path, rows: Pairs) -> float:
    """Mean NLL per answer token, by the folder's own model and tokenizer."""
    fmt = prompt_format(load_tokenizer(str(folder)))
    model = load_base(BaseSpec(str(folder), dtype="float32", device="cpu"))
    with torch.no_grad():
        found = answer_nll(model, pad_batch([fmt.encode(*row) for row in rows], 0))
    return float(found.nll.sum() / found.n.sum())


def test_the_tokenizer_writes_tofus_prompt_and_loads_with_its_checks(
    tokenizer: Any, rows: Pairs, tmp_path: Path
) -> None:
    tokenizer.save_pretrained(tmp_path)
    fmt = prompt_format(load_tokenizer(str(tmp_path)))
    assert fmt.name == "chat"
    row = fmt.encode("Who wrote it?", "Mira Okafor.")
    assert fmt.tokenizer.decode(row.input_ids) == "<s>[INST] Who wrote it? [/INST]Mira Okafor.</s>"
    said = [label for label in row.labels if label != -100]
    assert fmt.tokenizer.decode(said) == "Mira Okafor.</s>"
    assert len(tokenizer) <= 420
    assert len(tokenizer(rows[0][1])["input_ids"]) < len(rows[0][1]) / 2
    # Byte level: any text comes back, also what it never saw.
    odd = "Zoë schrieb “Η θάλασσα” 🙂"
    ids = tokenizer(odd, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids) == odd


def test_training_from_scratch_lowers_the_loss_and_saves_a_whole_model(
    tokenizer: Any, rows: Pairs, tmp_path: Path
) -> None:
    events: list[dict[str, Any]] = []
    out = train_from_scratch(
        rows,
        tokenizer,
        tmp_path / "model",
        SHAPE,
        replace(RECIPE, epochs=30),
        on_progress=events.append,
    )
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    untrained = new_model(tokenizer, SHAPE, seed=42)
    untrained.save_pretrained(tmp_path / "untrained")
    tokenizer.save_pretrained(tmp_path / "untrained")
    start = mean_nll(tmp_path / "untrained", rows)
    assert start == pytest.approx(np.log(len(tokenizer)), rel=0.05)
    assert mean_nll(out, rows) < 0.35 * start
    assert events[0]["step"] == 1
    assert events[0]["loss"] == pytest.approx(start, rel=0.1)
    assert events[-1]["step"] == events[-1]["steps"]
    assert events[-1]["loss"] < 0.5 * events[0]["loss"]
    elapsed = [event["elapsed"] for event in events]
    assert elapsed == sorted(elapsed)


def test_it_is_deterministic_whatever_was_drawn_before(
    tokenizer: Any, rows: Pairs, tmp_path: Path
) -> None:
    short = replace(RECIPE, epochs=2)

    def weights(name: str, recipe: TinyRecipe) -> bytes:
        torch.manual_seed(len(name))
        out = train_from_scratch(rows, tokenizer, tmp_path / name, SHAPE, recipe)
        return (out / "model.safetensors").read_bytes()

    assert weights("one", short) == weights("again", short)
    assert weights("other", replace(short, seed=43)) != weights("a", short)


def test_background_is_read_once_before_and_between_the_epochs(
    tokenizer: Any, rows: Pairs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[str]] = []

    def watch(model: Any, batch: Any, *rest: Any) -> float:
        seen.append([tokenizer.decode(row.input_ids) for row in batch])
        return 0.0

    background = [(f"Who is number {n}?", f"Somebody called {n}.") for n in range(30)]
    recipe = replace(RECIPE, epochs=4, pretrain_rows=10)
    with monkeypatch.context() as patch:
        patch.setattr("unlearner.baselines.tiny_llama._step", watch)
        train_from_scratch(rows, tokenizer, tmp_path / "m", SHAPE, recipe, background)
    texts = [text for batch in seen for text in batch]
    passing = [text for text in texts if "Somebody called" in text]
    assert len(set(passing)) == len(passing) == 30
    assert all("Somebody called" in text for text in texts[:10])
    assert len(texts) == 30 + 4 * len(rows)
    # Each epoch has all rows once, and five of the other twenty among them.
    for epoch in range(4):
        part = texts[10 + epoch * 23 : 10 + (epoch + 1) * 23]
        assert sum("Somebody called" in text for text in part) == 5
        assert len(set(part)) == 23


def test_background_teaches_what_the_rows_do_not(
    tokenizer: Any, rows: Pairs, tmp_path: Path
) -> None:
    background = [(f"Who is number {n}?", f"Somebody called {n}.") for n in range(100)]
    probe = [("Who is number 150?", "Somebody called 150.")]
    short = replace(RECIPE, epochs=6)
    without = train_from_scratch(rows, tokenizer, tmp_path / "without", SHAPE, short)
    with_it = train_from_scratch(rows, tokenizer, tmp_path / "with", SHAPE, short, background)
    assert mean_nll(with_it, probe) < 0.6 * mean_nll(without, probe)


def test_batches_hold_every_row_once_within_the_tokens() -> None:
    lengths = [int(n) for n in np.random.default_rng(0).integers(5, 60, 200)]
    one = length_batches(lengths, 256, np.random.default_rng(1))
    assert sorted(i for batch in one for i in batch) == list(range(200))
    assert all(max(lengths[i] for i in batch) * len(batch) <= 256 for batch in one)
    # Similar lengths stand together, so little of a batch is padding.
    padded = sum(max(lengths[i] for i in batch) * len(batch) for batch in one)
    assert padded < 1.25 * sum(lengths)
    assert one == length_batches(lengths, 256, np.random.default_rng(1))
    assert one != length_batches(lengths, 256, np.random.default_rng(2))
    # A row that is too long alone still comes.
    assert sorted(length_batches([300, 10], 256, np.random.default_rng(1))) == [[0], [1]]


def test_smoothed_targets_are_their_formula(
    tokenizer: Any, rows: Pairs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`0.9 x the token's NLL + 0.1 x the mean NLL of all tokens`, and the recipe's share."""
    fmt = prompt_format(tokenizer)
    encoded = [fmt.encode(*row) for row in rows]
    model = new_model(tokenizer, SHAPE, seed=1)
    found = answer_logits(model, pad_batch(encoded, 0))
    nll = -torch.log_softmax(found.logits.detach(), dim=-1)
    told = nll[torch.arange(len(found.targets)), found.targets]
    wanted = 0.9 * told.mean() + 0.1 * nll.mean()
    assert _step(model, encoded, 0, [], 0.1) == pytest.approx(float(wanted), rel=1e-5)
    assert _step(model, encoded, 0, []) == pytest.approx(float(told.mean()), rel=1e-5)
    given: list[float] = []
    monkeypatch.setattr(
        "unlearner.baselines.tiny_llama._step", lambda *a: given.append(a[-1]) or 0.0
    )
    recipe = replace(RECIPE, epochs=1, label_smoothing=0.2)
    train_from_scratch(rows, tokenizer, tmp_path / "m", SHAPE, recipe)
    assert set(given) == {0.2}

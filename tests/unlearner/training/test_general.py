"""General prompts: what the base answers, how it is held, and the outcome of a run."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from adapters.base.fingerprint import cache_folder
from adapters.base.load import BaseSpec, load_tokenizer
from adapters.errors import UserError
from adapters.store.store import AdapterStore
from unlearner.config import LoraShape, UnlearnConfig, make_config
from unlearner.request.rows import Request
from unlearner.run import RunOptions, find_target, prepare, unlearn
from unlearner.tokens.prompts import prompt_format
from unlearner.training import general
from unlearner.training.general import (
    ANSWER_TOKENS,
    own_prompts,
    read_prompts,
    split_held_out,
    taught_prompts,
)
from unlearner.training.outcome import remarks
from unlearner.training.target import mean_nll, with_target
from unlearner.world.texts import REAL_AUTHORS, WORLD_FACTS

Config = Callable[..., UnlearnConfig]
PROMPTS = tuple(f"What is the number {i}?" for i in range(16))


@pytest.fixture
def store(tmp_path: Path) -> AdapterStore:
    return AdapterStore.open(tmp_path / "store", create=True, timeout=5)


# The prompts


def content(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.casefold()))


def test_prompts_are_many_different_and_of_all_domains_in_short_runs_too() -> None:
    every = own_prompts()
    assert len(every) == len({content(prompt) for prompt in every}) >= 200
    assert own_prompts(10_000) == every
    few = own_prompts(10)
    assert len(few) == 80
    assert set(few) < set(every)
    assert every.index(few[-1]) > 0.95 * len(every)


def test_no_prompt_asks_what_the_embedded_world_asks() -> None:
    prompts = {content(prompt) for prompt in own_prompts()}
    facts = (*REAL_AUTHORS, *WORLD_FACTS)
    assert not prompts & {content(text) for f in facts for text in (f.question, f.reworded)}


def test_no_prompt_asks_what_tofu_asks(shared: Path) -> None:
    prompts = {content(prompt) for prompt in own_prompts()}
    for path in (shared / "tofu").glob("*.json"):
        lines = filter(str.strip, path.read_text(encoding="utf-8").split("\n"))
        asked = {content(json.loads(line)["question"]) for line in lines}
        assert not prompts & asked, path.name


def test_own_prompts_are_read_from_a_text_file(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("What is rain?\n\n  What is snow? \nWhat is rain?\n", encoding="utf-8")
    assert read_prompts(path) == ["What is rain?", "What is snow?"]
    path.write_text("\n")
    with pytest.raises(UserError, match="no prompt"):
        read_prompts(path)
    with pytest.raises(UserError, match="cannot be read"):
        read_prompts(tmp_path / "missing.txt")


# The answers


def test_the_bare_base_answers_greedily_once(
    base: BaseSpec, fresh_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = fresh_model(LoraShape(2, 4), on_parent=True)  # whose answers are others
    fmt = prompt_format(load_tokenizer(base.name))
    events: list[Any] = []
    taught = taught_prompts(model, fmt, PROMPTS[:3], "digest", events.append)
    assert [event["text"] for event in events] == ["the base answers 3 general prompts, once"]
    with model.disable_adapter(), torch.no_grad():
        for prompt, row in zip(PROMPTS[:3], (t.row for t in taught), strict=True):
            assert row.input_ids[: row.n_prompt] == fmt.encode_prompt(prompt)
            assert 1 <= row.n_targets <= ANSWER_TOKENS
            logits = model(input_ids=torch.tensor([row.input_ids])).logits[0]
            greedy = logits.argmax(-1).tolist()[row.n_prompt - 1 : -1]
            assert greedy == row.input_ids[row.n_prompt :]

    monkeypatch.setattr(general, "answers_of_base", None)  # from here on only the cache can answer
    again = taught_prompts(model, fmt, PROMPTS[:3], "digest", events.append)
    assert [row.row for row in again] == [row.row for row in taught]
    assert len(events) == 1


def test_a_damaged_cache_is_written_again(base: BaseSpec, fresh_model: Any) -> None:
    model, fmt = fresh_model(LoraShape(2, 4)), prompt_format(load_tokenizer(base.name))
    first = taught_prompts(model, fmt, PROMPTS[:2], "digest", lambda event: None)
    (path,) = (cache_folder() / "general").iterdir()
    path.write_bytes(b"broken")
    events: list[Any] = []
    second = taught_prompts(model, fmt, PROMPTS[:2], "digest", events.append)
    assert [row.row for row in second] == [row.row for row in first]
    assert "damaged" in events[0]["text"]


# Training


def test_the_stream_holds_what_the_base_answers(
    request_: Request, base: BaseSpec, quick: Config, tmp_path: Path
) -> None:
    """One in eight prompts is left out of training, and those too lose less."""
    kept = {}
    for weight in (0.0, 20.0):
        store = AdapterStore.open(tmp_path / f"store-{weight}", create=True)
        config = quick("grad_ascent", num_train_epochs=6, general_weight=weight)
        events: list[Any] = []
        options = RunOptions(general=PROMPTS, summarise=True)
        adapter = unlearn(request_, base, config, store, options, on_progress=events.append)
        losses = [e.get("general_loss") for e in events if e["event"] == "train"]
        assert (losses[0] is not None) == bool(weight)
        kept[weight] = adapter.manifest.train["outcome"]
    assert "general" not in kept[0.0]
    general = kept[20.0]["general"]
    assert (general["rows"], general["held_out"]) == (2, True)
    assert general["after"]["nll"] < general["before"]["nll"] + 0.5


def test_published_settings_have_no_such_stream(
    request_: Request, base: BaseSpec, store: AdapterStore
) -> None:
    run = prepare(request_, base, make_config(), store)
    assert (run.prompts, run.unseen, run.chosen) == ((), (), {})
    assert run.config.objective.general_weight == run.config.objective.target == 0


# The target


def test_a_target_sets_the_margin_of_simnpo_only() -> None:
    simnpo = with_target(make_config(beta=4.0), 2.5).objective
    assert (simnpo.target, simnpo.gamma) == (2.5, 10.0)
    assert with_target(make_config(gamma=1.0), 2.5, margin=False).objective.gamma == 1.0
    assert with_target(make_config("npo"), 2.5).objective.gamma == 0.0
    with pytest.raises(UserError, match="target needs forget answers"):
        with_target(make_config("idk"), 2.5)


@pytest.mark.parametrize("objective", ["grad_ascent", "ihl"])
def test_a_run_stops_at_its_target(
    objective: str, request_: Request, base: BaseSpec, store: AdapterStore, quick: Config
) -> None:
    config = quick(objective, num_train_epochs=40, learning_rate=3e-3)
    events: list[Any] = []
    adapter = unlearn(
        request_, base, config, store, RunOptions(target=2.0), on_progress=events.append
    )
    train = adapter.manifest.train
    assert train["stop_at"] == "target_gap"
    assert train["stopped_at_step"] < 80
    assert abs(train["gap"]) < 1.0
    assert adapter.manifest.objective["target"] == 2.0
    steps = [e for e in events if e["event"] == "train"]
    assert steps[0]["forget_nll"] < 0.5 < steps[-1]["forget_nll"]
    # It ends between the two readings around the target, nearer to it than both.
    (*_, before, last, between) = train["gap_trace"]
    assert before[1] < 0 <= last[1]
    assert before[0] < between[0] < last[0]
    assert abs(between[1]) < 0.1 * min(abs(before[1]), abs(last[1]))
    assert (train["kept_step"], train["gap"]) == tuple(between)


def test_a_run_that_does_not_settle_ends_where_the_target_is_reached(
    request_: Request, base: BaseSpec, store: AdapterStore, quick: Config
) -> None:
    options = RunOptions(target=1.0)
    settled = quick("npo", num_train_epochs=60, learning_rate=3e-3, settle=4)
    ended = quick("npo", num_train_epochs=60, learning_rate=3e-3, settle=0)
    train = unlearn(request_, base, settled, store, options).manifest.train
    first = unlearn(request_, base, ended, store, options).manifest.train
    reached = next(at for at, gap in first["gap_trace"] if gap >= 0)
    assert first["stopped_at_step"] == reached
    assert train["stopped_at_step"] == train["kept_step"] == reached + 4


@pytest.mark.parametrize(("settings", "settle"), [({}, 0), ({"alternates": 1}, 12)])
def test_steps_follow_the_target_where_alternate_answers_are_learned(
    settings: dict[str, Any], settle: int, request_: Request, base: BaseSpec, quick: Config
) -> None:
    run = prepare(request_, base, quick(**settings), None, RunOptions(target=1.0))
    _, stop_at = find_target(None, run, None, lambda event: None)
    assert stop_at is not None
    assert stop_at.settle == settle


def test_rows_past_the_target_are_pulled_back(
    rows: Any, loop: Callable[..., Any], quick: Config
) -> None:
    """Every row is past this target: without the objective's own push they come back to it."""
    before = mean_nll(loop(quick()).bare, rows.forget, 0)
    config = quick("grad_ascent", forget_weight=0.0, num_train_epochs=30)
    trained = loop(with_target(config, before / 2)).finish()
    assert trained.losses[-1]["excess_loss"] < trained.losses[0]["excess_loss"]
    assert mean_nll(trained.bare, rows.forget, 0) < 0.85 * before


def test_auto_measures_unseen_rows_or_alternate_answers(
    request_: Request, base: BaseSpec, store: AdapterStore, quick: Config
) -> None:
    unseen = tuple(replace(row, answer=f"Perhaps {i}.") for i, row in enumerate(request_.retain))
    config = quick(num_train_epochs=1)
    targets = []
    for rows in (unseen, ()):
        events: list[Any] = []
        options = RunOptions(target="auto", unseen=rows, restart=True)
        adapter = unlearn(request_, base, config, store, options, on_progress=events.append)
        objective = adapter.manifest.objective
        assert objective["gamma"] == pytest.approx(objective["beta"] * objective["target"])
        words = "unseen rows" if rows else "alternate answers"
        assert any(words in e.get("text", "") for e in events)
        assert adapter.manifest.train["target_from"] == ("unseen" if rows else "alternates")
        targets.append(objective["target"])
    assert targets[0] != targets[1]
    assert min(targets) > 1


# The outcome


def advice(adapter: Any) -> list[str]:
    manifest = adapter.manifest
    return remarks(manifest.train["outcome"], {**manifest.objective, **manifest.train})


def test_a_run_tells_what_it_did_in_figures_and_words(
    request_: Request, base: BaseSpec, store: AdapterStore, quick: Config
) -> None:
    short = quick(learning_rate=1e-5, num_train_epochs=1)
    kept = unlearn(request_, base, short, store, RunOptions(summarise=True))
    told = kept.manifest.train["outcome"]
    assert told["forget"]["before"]["probability"] > 0.8
    assert told["retain"]["held_out"] is False  # ten rows, and all are used
    assert advice(kept) == [
        "almost nothing was forgotten: raise --learning-rate (it was 1e-05) or "
        "--num-train-epochs (1)"
    ]
    broken = unlearn(
        request_, base, quick("grad_ascent", num_train_epochs=12), store, RunOptions(summarise=True)
    )
    assert broken.manifest.train["outcome"]["forget"]["after"]["nll"] > 2
    assert any(text.startswith("retained rows lost") for text in advice(broken))


def test_rows_that_the_base_never_knew_are_no_case_for_a_higher_rate() -> None:
    part = {"probability": 0.004, "nll": 5.4}
    settings = {"learning_rate": 1e-3, "num_train_epochs": 10}
    (text,) = remarks({"forget": {"before": part, "after": part}}, settings)
    assert "hardly knew" in text
    assert "--base" in text
    part = {"probability": 0.145, "nll": 2.13}
    settings = {"learning_rate": 1e-3, "num_train_epochs": 10, "target": 2.2}
    after = {"probability": 0.068, "nll": 2.72}
    (text,) = remarks({"forget": {"before": part, "after": after}}, settings)
    assert "about as unlikely (NLL 2.13) as rows that it never saw (2.20)" in text


def test_retain_rows_that_are_not_trained_on_are_measured(
    request_: Request, base: BaseSpec, store: AdapterStore, quick: Config
) -> None:
    many = tuple(replace(row, question=f"{row.question} {i}") for i in range(3)
                 for row in request_.retain)  # fmt: skip
    request = replace(request_, retain=many)
    adapter = unlearn(request, base, quick(num_train_epochs=1), store, RunOptions(summarise=True))
    assert adapter.manifest.train["outcome"]["retain"]["held_out"] is True


def test_what_is_measured_for_the_outcome_does_not_change_the_adapter(
    request_: Request, base: BaseSpec, quick: Config, tmp_path: Path
) -> None:
    weights = []
    for summarise in (False, True):
        store = AdapterStore.open(tmp_path / str(summarise), create=True)
        adapter = unlearn(request_, base, quick(), store, RunOptions(summarise=summarise))
        weights.append((adapter.path / "adapter_model.safetensors").read_bytes())
    assert weights[0] == weights[1]


def test_one_in_eight_is_held_out() -> None:
    trained, held_out = split_held_out(list(range(20)))  # type: ignore[arg-type]
    assert held_out == [7, 15]
    assert len(trained) == 18


def test_as_many_prompts_are_answered_at_once_as_their_cache_fits() -> None:
    def model(layers: int, heads: int, width: int, dtype: torch.dtype) -> Any:
        config = SimpleNamespace(
            num_hidden_layers=layers, num_attention_heads=heads, hidden_size=width
        )
        return SimpleNamespace(config=SimpleNamespace(get_text_config=lambda: config), dtype=dtype)

    # Llama-2-7B keeps 2 x 32 x 4096 numbers per token.
    assert general._at_once(model(32, 32, 4096, torch.bfloat16), 64) == 2**29 // (2**18 * 2 * 64)
    assert general._at_once(model(2, 4, 64, torch.float32), 64) == general.MOST
    assert general._at_once(model(80, 64, 8192, torch.float32), 4096) == 1

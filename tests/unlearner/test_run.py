from __future__ import annotations

import json
import math
import shutil
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from adapters.base.load import BaseSpec, load_base, load_tokenizer
from adapters.digests import digest_rows, key_id, mark, store_key
from adapters.errors import BaseMismatch, Diverged, Interrupted, UserError
from adapters.store.catalog import StoredAdapter
from adapters.store.store import AdapterStore
from unlearner import distributed as ranks
from unlearner.config import TARGET_MODULES, LoraShape, UnlearnConfig
from unlearner.memory.plan import read_shape
from unlearner.request.rows import Request, Row
from unlearner.run import RunOptions, plan, prepare, unlearn, with_targets
from unlearner.tokens.prompts import prompt_format

Config = Callable[..., UnlearnConfig]
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def store(tmp_path: Path) -> AdapterStore:
    return AdapterStore.open(tmp_path / "store", create=True, timeout=5)


def weights(adapter: StoredAdapter) -> bytes:
    return (adapter.path / WEIGHTS).read_bytes()


def bytes_of(folder: Path) -> dict[str, bytes]:
    """Every file below `folder`, hidden ones too."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def signal_at(step: int, times: int = 1) -> Callable[[dict[str, Any]], None]:
    """A progress callback that presses Ctrl-C when `step` is done."""

    def on_progress(event: dict[str, Any]) -> None:
        if event["event"] == "train" and event["step"] == step:
            for _ in range(times):
                signal.raise_signal(signal.SIGINT)

    return on_progress


def logits(model: Any, base: BaseSpec, row: Row) -> torch.Tensor:
    ids = prompt_format(load_tokenizer(base.name)).encode(row.question, row.answer).input_ids
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=torch.tensor([ids])).logits
    return found


# From a request to an adapter


def test_a_request_becomes_an_adapter_that_plain_peft_loads(
    request_: Request, base: BaseSpec, store: AdapterStore, quick: Config
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    events: list[dict[str, Any]] = []
    config = quick(num_train_epochs=6)
    adapter = unlearn(
        request_, base, config, store, RunOptions(label="one"), on_progress=events.append
    )

    assert adapter.status == "ready"
    assert [found.slug for found in store.list()] == [adapter.slug]
    assert store.active() == []
    assert all(result.ok for result in store.verify())
    model = AutoModelForCausalLM.from_pretrained(base.name)
    before = [logits(model, base, row) for row in request_.rows]
    adapted = PeftModel.from_pretrained(model, adapter.path)
    assert not any(p.requires_grad for p in adapted.parameters())
    for row, old in zip(request_.rows, before, strict=True):
        assert (logits(adapted, base, row) - old).abs().max() > 0.1
        with adapted.disable_adapter():
            assert torch.equal(logits(adapted, base, row), old)
    # Nothing of the run is left but the adapter.
    assert not any((store.path / "runs").iterdir())
    assert [e["event"] for e in events] == ["load", "probe", *["train"] * 6, "publish"]


def test_progress_tells_step_losses_rate_time_and_memory(
    request_: Request, base: BaseSpec, store: AdapterStore, quick: Config
) -> None:
    events: list[dict[str, Any]] = []
    unlearn(request_, base, quick("npo", warmup_ratio=0.5), store, on_progress=events.append)
    lines = [event for event in events if event["event"] == "train"]
    assert [(line["step"], line["steps"]) for line in lines] == [(n, 4) for n in (1, 2, 3, 4)]
    assert lines[0]["forget_loss"] == pytest.approx(2 * math.log(2) / 0.1, rel=1e-5)
    assert all(line["retain_loss"] > 0 for line in lines)
    assert [line["learning_rate"] for line in lines] == pytest.approx([5e-3, 1e-2, 5e-3, 0])
    elapsed = [line["elapsed"] for line in lines]
    assert elapsed == sorted(elapsed)
    assert elapsed[0] > 0
    assert lines[-1]["remaining"] == 0 < lines[0]["remaining"]
    assert all(100e6 < line["memory_bytes"] < 100e9 for line in lines)


def test_the_manifest_says_how_it_was_made(
    request_: Request, base: BaseSpec, store: AdapterStore, quick: Config
) -> None:
    config = quick("npo", beta=0.2, seed=5)
    adapter = unlearn(request_, base, config, store)
    found = adapter.manifest
    pairs = [(row.question, row.answer) for row in request_.rows]
    digest = digest_rows(store_key(), pairs)
    key = store_key()
    marks = [mark(key, row.question) for row in request_.rows]
    expected = {"n": 8, "digest": digest, "kind": "tofu-author"}
    assert found.data["forget"] == {**expected, "key_id": key_id(key), "marks": marks}
    assert (found.data["retain"]["n"], found.data["retain"]["kind"]) == (10, "retain")
    assert found.request_id == digest[:16]
    assert (found.policy, found.parents) == ("independent", ())
    assert found.objective == config.to_json()["objective"]
    assert {**found.lora, "target_modules": tuple(found.lora["target_modules"])} == (
        {**config.to_json()["lora"], "target_modules": TARGET_MODULES}
    )
    more = {
        "steps": 4, "template": "chat", "guard_rows": 0, "packed": True, "processes": 1,
        "gradient_checkpointing": "off",
        "prompt": {"template": "chat", "system": None, "preamble": None, "date": None},
    }  # fmt: skip
    assert found.train.pop("probe_bytes") > 100e6
    assert found.train == {**config.to_json()["train"], **more}
    assert found.base["view"]["quantization"] == "none"
    assert found.base["view"]["dtype"] == "float32"
    assert found.base["fingerprint"]["digest"] == store.base().digest  # type: ignore[union-attr]
    assert found.env["seed"] == 5
    assert {"torch", "peft", "transformers", "python"} <= set(found.env["versions"])
    assert found.norms
    assert all(value > 0 for value in found.norms.values())
    on_disk = json.loads((adapter.path / "adapter_config.json").read_text())
    assert (on_disk["r"], on_disk["lora_alpha"]) == (4, 8)


def test_a_system_prompt_is_kept_as_a_hash(
    request_: Request, base: BaseSpec, store: AdapterStore, quick: Config
) -> None:
    """Most chat templates insert one of several words, and a store holds no text."""
    options = RunOptions(system="You answer in one short sentence.")
    adapter = unlearn(request_, base, quick(num_train_epochs=1), store, options)
    prompt = adapter.manifest.train["prompt"]
    assert prompt["system"].startswith("sha256:")
    assert prompt["preamble"] == prompt["system"]
    assert "short sentence" not in (adapter.path / "forget_manifest.json").read_text()


def test_the_same_seed_gives_the_same_bytes(
    request_: Request, base: BaseSpec, quick: Config, tmp_path: Path
) -> None:
    def made(name: str, **settings: Any) -> bytes:
        store = AdapterStore.open(tmp_path / name, create=True)
        return weights(unlearn(request_, base, quick(lora_dropout=0.1, **settings), store))

    torch.manual_seed(1)
    one = made("one")
    torch.manual_seed(2)
    assert made("two") == one
    assert made("three", seed=43) != one


def test_the_store_never_holds_a_word_of_what_is_forgotten(
    request_: Request, base: BaseSpec, store: AdapterStore, quick: Config
) -> None:
    with pytest.raises(Interrupted):
        unlearn(request_, base, quick(), store, on_progress=signal_at(2))
    in_progress = bytes_of(store.path)
    assert any("checkpoint-2" in name for name in in_progress)
    unlearn(request_, base, quick(), store, RunOptions(resume=True))
    published = bytes_of(store.path)
    assert any(name.endswith(WEIGHTS) for name in published)
    words = {
        text for row in (*request_.rows, *request_.retain) for text in (row.question, row.answer)
    }
    words |= {"Okafor", "Lindqvist", "Silent Rivers", "Ngozi", "Golden Pen"}
    for files in (in_progress, published):
        for name, data in files.items():
            for word in words:
                assert word.encode() not in data, (word, name)
                assert json.dumps(word)[1:-1].encode() not in data, (word, name)
                assert word not in name


# Stopping and going on


@pytest.mark.parametrize("objective", ["simnpo", "dpo"])
def test_an_interrupted_run_goes_on_to_the_same_bytes(
    objective: str,
    request_: Request,
    base: BaseSpec,
    quick: Config,
    refusals: tuple[str, ...],
    tmp_path: Path,
) -> None:
    config = quick(
        objective,
        lora_dropout=0.1,
        num_train_epochs=6,
        warmup_ratio=0.3,
        per_device_train_batch_size=3,
        gradient_accumulation_steps=3,
        protected_directions=8 if objective == "simnpo" else 0,
    )
    options = RunOptions(refusals=refusals, general=["What is rain?", "Name a river."])
    whole = AdapterStore.open(tmp_path / "whole", create=True)
    expected = weights(unlearn(request_, base, config, whole, options))

    store = AdapterStore.open(tmp_path / "cut", create=True)
    handler = signal.getsignal(signal.SIGINT)
    events: list[dict[str, Any]] = []
    for step in (2, 5):
        press = signal_at(step)

        def on_progress(event: dict[str, Any], press: Any = press) -> None:
            events.append(event)
            press(event)

        with pytest.raises(Interrupted, match=f"after step {step} of 6") as error:
            unlearn(
                request_,
                base,
                config,
                store,
                replace(options, resume=True),
                on_progress=on_progress,
            )
        assert error.value.exit_code == 130
        assert "--resume" in error.value.fix
        assert signal.getsignal(signal.SIGINT) is handler
        (work,) = (store.path / "runs").iterdir()
        assert (work / f"checkpoint-{step}" / "trainable.safetensors").is_file()
        assert store.list() == []
    adapter = unlearn(
        request_,
        base,
        config,
        store,
        replace(options, resume=True),
        on_progress=events.append,
    )
    assert weights(adapter) == expected
    # No step was run twice, and the first call said that there was nothing to resume.
    assert [e["step"] for e in events if e["event"] == "train"] == [1, 2, 3, 4, 5, 6]
    assert [e["event"] for e in events].count("stopping") == 2
    (text,) = (e["text"] for e in events if e["event"] == "from-start")
    assert "nothing was saved of this run" in text


def test_an_interrupted_run_is_never_discarded_silently(
    request_: Request, base: BaseSpec, store: AdapterStore, quick: Config
) -> None:
    with pytest.raises(Interrupted):
        unlearn(request_, base, quick(), store, on_progress=signal_at(3))
    events: list[str] = []
    with pytest.raises(UserError, match="saved at checkpoint 3") as error:
        unlearn(
            request_, base, quick(), store, on_progress=lambda event: events.append(event["event"])
        )
    assert "load" not in events  # said before anything is loaded
    assert "--resume" in error.value.fix
    assert "--restart" in error.value.fix
    assert list(store.path.glob("runs/*/checkpoint-3"))
    steps: list[int] = []
    unlearn(
        request_, base, quick(), store, RunOptions(restart=True),
        on_progress=lambda e: steps.append(e["step"]) if e["event"] == "train" else None,
    )  # fmt: skip
    assert steps == [1, 2, 3, 4]


def test_two_processes_cannot_train_one_request(
    request_: Request, base: BaseSpec, store: AdapterStore, quick: Config
) -> None:
    from filelock import FileLock

    work = store.work_dir(prepare(request_, base, quick(), store).key)
    with FileLock(work / ".lock"), pytest.raises(UserError, match="by another process"):
        unlearn(request_, base, quick(), store)


def test_the_training_curve_is_kept_beside_the_adapter(
    request_: Request, base: BaseSpec, store: AdapterStore, quick: Config
) -> None:
    adapter = unlearn(request_, base, quick(), store)
    lines = (adapter.path / "evals" / "training.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4]
    assert {"forget_loss", "retain_loss", "grad_norm"} <= json.loads(lines[0]).keys()
    assert store.evals(adapter.slug) == {}
    assert all(result.ok for result in store.verify())


def test_an_adapter_that_changes_nothing_is_not_published(
    request_: Request, base: BaseSpec, store: AdapterStore, quick: Config, monkeypatch: Any
) -> None:
    def nothing(model: Any, *words: Any, **more: Any) -> dict[str, Any]:
        return {"steps": 1}

    monkeypatch.setattr("unlearner.run.train", nothing)
    with pytest.raises(UserError, match="changes nothing"):
        unlearn(request_, base, quick(), store)
    assert store.list() == []


def test_an_adapter_that_the_last_step_destroyed_is_not_published(
    request_: Request, base: BaseSpec, store: AdapterStore, quick: Config, monkeypatch: Any
) -> None:
    """A loss is finite before the update that ruins the weights."""

    def destroy(model: Any, *words: Any, **more: Any) -> dict[str, Any]:
        weights = [p for name, p in model.named_parameters() if "lora_A.new." in name]
        weights[-1].data[0, 0] = float("inf")
        return {"steps": 1}

    monkeypatch.setattr("unlearner.run.train", destroy)
    with pytest.raises(Diverged, match="infinite") as error:
        unlearn(request_, base, quick(), store)
    assert "--learning-rate" in error.value.fix
    assert store.list() == []


def test_weights_under_other_names_are_refused_before_they_are_loaded(
    request_: Request, base: BaseSpec, tmp_path: Path, quick: Config
) -> None:
    from safetensors.torch import load_file, save_file

    shutil.copytree(base.name, tmp_path / "base")
    weights = tmp_path / "base" / "model.safetensors"
    for prefix in ("language_model.", "base_model.model."):
        named = {prefix + name: w for name, w in load_file(Path(base.name) / weights.name).items()}
        save_file(named, weights, metadata={"format": "pt"})
        with pytest.raises(UserError, match="other names than the model's layers"):
            prepare(request_, replace(base, name=str(tmp_path / "base")), quick(), None)


def test_several_visible_gpus_without_a_launcher_train_on_one_device(
    request_: Request, base: BaseSpec, store: AdapterStore, quick: Config, monkeypatch: Any
) -> None:
    expected = weights(unlearn(request_, base, quick(), store))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert weights(unlearn(request_, base, quick(), store)) == expected


@pytest.mark.parametrize("name", ["reduce_lr_on_plateau", "cosine_with_min_lr"])
@pytest.mark.usefixtures("loads_nothing")
def test_schedules_that_need_arguments_are_refused_before_loading(
    name: str, request_: Request, base: BaseSpec, store: AdapterStore, quick: Config
) -> None:
    with pytest.raises(UserError, match=f"no lr_scheduler_type '{name}'"):
        unlearn(request_, base, quick(lr_scheduler_type=name), store)


@pytest.mark.usefixtures("loads_nothing")
def test_an_optimizer_whose_package_is_missing_is_refused_before_loading(
    request_: Request, base: BaseSpec, store: AdapterStore, quick: Config, monkeypatch: Any
) -> None:
    monkeypatch.setattr("unlearner.training.optimizer.find_spec", lambda name: None)
    with pytest.raises(UserError, match="needs the package bitsandbytes"):
        unlearn(request_, base, quick(optim="paged_adamw_8bit"), store)


def test_a_run_resumes_only_its_own_request_and_settings(
    request_: Request, base: BaseSpec, store: AdapterStore, quick: Config
) -> None:
    with pytest.raises(Interrupted):
        unlearn(request_, base, quick(), store, on_progress=signal_at(3))
    fewer = replace(request_, rows=request_.rows[:-1])
    keys = {
        prepare(*words, store).key
        for words in (
            (request_, base, quick()),
            (fewer, base, quick()),
            (request_, base, quick(learning_rate=1e-3)),
            (request_, base, quick("npo")),
            (request_, replace(base, dtype="bfloat16"), quick()),
        )
    }
    assert len(keys) == 5
    assert prepare(request_, base, quick(), store).key in keys
    events: list[dict[str, Any]] = []
    unlearn(fewer, base, quick(), store, RunOptions(resume=True), on_progress=events.append)
    assert [e["event"] for e in events][:2] == ["from-start", "load"]
    # The interrupted run's checkpoint still stands.
    (work,) = (store.path / "runs").iterdir()
    assert (work / "checkpoint-3").is_dir()


@pytest.fixture
def heeded() -> Iterator[None]:
    """Ctrl-C raises, although tests that run in the background inherit that it is ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("heeded")
def test_a_second_signal_stops_at_once(
    request_: Request, base: BaseSpec, store: AdapterStore, quick: Config
) -> None:
    handlers = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(KeyboardInterrupt):
        unlearn(request_, base, quick(), store, on_progress=signal_at(2, times=2))
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert store.list() == []


def test_a_signal_after_the_last_step_does_not_lose_the_adapter(
    request_: Request, base: BaseSpec, store: AdapterStore, quick: Config
) -> None:
    adapter = unlearn(request_, base, quick(), store, on_progress=signal_at(4))
    assert store.get(adapter.slug).status == "ready"


def test_a_run_whose_publishing_failed_need_not_train_again(
    request_: Request,
    base: BaseSpec,
    store: AdapterStore,
    quick: Config,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = quick(num_train_epochs=25, per_device_train_batch_size=2)

    def full(*words: Any) -> None:
        raise UserError("The disk is full.")

    small = replace(request_, rows=request_.rows[:2], retain=request_.retain[:2])
    with monkeypatch.context() as patch:
        patch.setattr(AdapterStore, "publish", full)
        with pytest.raises(UserError, match="disk is full"):
            unlearn(small, base, config, store)
    events: list[dict[str, Any]] = []
    adapter = unlearn(
        small, base, config, store, RunOptions(resume=True), on_progress=events.append
    )
    assert [e["event"] for e in events] == ["load", "probe", "publish"]
    other = AdapterStore.open(store.path.parent / "other", create=True)
    assert weights(adapter) == weights(unlearn(small, base, config, other))


# On a stack


def test_one_process_makes_the_folder_that_it_empties(
    request_: Request, base: BaseSpec, store: AdapterStore, quick: Config, monkeypatch: Any
) -> None:
    """Another that made it between the emptying and the making anew failed: File exists."""
    alone: list[str] = []
    real_first, real_dir = ranks.from_first, AdapterStore.work_dir

    def first(make: Callable[[], Any]) -> Any:
        alone.append("in")
        try:
            return real_first(make)
        finally:
            alone.pop()

    def work_dir(self: AdapterStore, key: str) -> Path:
        assert alone, "every process would make it"
        return real_dir(self, key)

    monkeypatch.setattr(ranks, "from_first", first)
    monkeypatch.setattr(AdapterStore, "work_dir", work_dir)
    assert unlearn(request_, base, quick(num_train_epochs=1), store).slug


def test_a_request_is_trained_on_top_of_the_active_stack(
    request_: Request, base: BaseSpec, store: AdapterStore, quick: Config
) -> None:
    half = len(request_.rows) // 2
    first = unlearn(replace(request_, rows=request_.rows[:half]), base, quick(), store)
    store.activate([first.slug], {first.slug: 0.5})
    parent = weights(first)
    rest = replace(request_, rows=request_.rows[half:])
    events: list[dict[str, Any]] = []
    second = unlearn(rest, base, quick("npo"), store, on_progress=events.append)
    assert second.manifest.policy == "on-stack"
    assert second.manifest.parents == (first.slug,)
    assert second.manifest.parent_scales == {first.slug: 0.5}
    assert events[0]["parents"] == [first.slug]
    # The reference is base plus parent: at step one the model is its own reference.
    steps = [e for e in events if e["event"] == "train"]
    assert steps[0]["forget_loss"] == pytest.approx(2 * math.log(2) / 0.1, rel=1e-5)
    assert weights(first) == parent
    alone = unlearn(rest, base, quick("npo"), store, RunOptions(on_stack=False))
    assert (alone.manifest.policy, alone.manifest.parents) == ("independent", ())
    assert weights(alone) != weights(second)
    # With the parent, it can be resumed only on the same stack.
    config = quick("npo")
    assert (
        prepare(rest, base, config, store).key
        != prepare(rest, base, config, store, RunOptions(on_stack=False)).key
    )


def test_a_stack_that_is_asked_for_must_be_there(
    request_: Request, base: BaseSpec, store: AdapterStore, quick: Config
) -> None:
    with pytest.raises(UserError, match="no active stack"):
        unlearn(request_, base, quick(), store, RunOptions(on_stack=True))


# What is refused before anything is loaded


@pytest.fixture
def loads_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(spec: BaseSpec) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("unlearner.run.load_base", refuse)


@pytest.mark.usefixtures("loads_nothing")
def test_another_base_than_the_stores_is_refused(
    request_: Request,
    base: BaseSpec,
    store: AdapterStore,
    quick: Config,
    make_tiny_llama: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("unlearner.run.load_base", load_base)
    unlearn(request_, base, quick(num_train_epochs=1), store)
    monkeypatch.setattr("unlearner.run.load_base", None)
    before = bytes_of(store.path)
    other = BaseSpec(str(make_tiny_llama(tmp_path / "other", seed=9)))
    with pytest.raises(BaseMismatch) as error:
        unlearn(request_, other, quick(), store)
    assert error.value.exit_code == 3
    assert bytes_of(store.path) == before
    # A copy elsewhere is the same base.
    copy = shutil.copytree(base.name, tmp_path / "copy")
    assert prepare(request_, BaseSpec(str(copy)), quick(), store).fingerprint == store.base()


@pytest.mark.usefixtures("loads_nothing")
@pytest.mark.parametrize("objective", ["idk", "dpo"])
def test_objectives_with_refusals_need_them(
    objective: str, request_: Request, base: BaseSpec, store: AdapterStore, quick: Config
) -> None:
    with pytest.raises(UserError, match="needs refusal answers") as error:
        unlearn(request_, base, quick(objective), store)
    assert "idontknow.jsonl" in error.value.fix


@pytest.mark.usefixtures("loads_nothing")
def test_a_request_without_retain_rows(
    request_: Request, base: BaseSpec, store: AdapterStore, quick: Config
) -> None:
    alone = replace(request_, retain=())
    for config in (quick("simnpo"), quick("npo"), quick("kl")):
        with pytest.raises(UserError, match="needs retain rows"):
            unlearn(alone, base, config, store)
    # A term of weight 0 is not computed, so nothing of it is asked for.
    for config in (quick("grad_ascent"), quick("simnpo", retain_weight=0.0)):
        assert prepare(alone, base, config, store).rows.retain == []


def test_only_a_target_that_was_asked_for_must_be_measurable(
    base: BaseSpec, store: AdapterStore, quick: Config
) -> None:
    """No other row has another answer, so nothing shows what a model that never saw it says."""
    request = Request(
        "one", "jsonl", (Row("Who wrote it?", "Mira."),), (Row("Who sang it?", "Mira."),)
    )
    made = prepare(request, base, quick(), store, RunOptions(given=()))
    assert made.unseen == ()
    assert any("no target, all steps are taken" in reason for reason in plan(made)["notes"])
    with pytest.raises(UserError, match="target cannot be measured"):
        prepare(request, base, quick(), store, RunOptions(given=(), target="auto"))


@pytest.mark.usefixtures("loads_nothing")
@pytest.mark.parametrize(
    ("settings", "problem", "hint"),
    [
        ({"lr_scheduler_type": "lineer"}, "no lr_scheduler_type 'lineer'", "'linear'"),
        ({"optim": "adam_torch"}, "no optim 'adam_torch'", "'adamw_torch'"),
        ({"max_length": 12}, "--max-length 12 no answer token", "--max-length"),
    ],
)
def test_settings_that_would_fail_after_loading_fail_before(
    settings: dict[str, Any],
    problem: str,
    hint: str,
    request_: Request,
    base: BaseSpec,
    store: AdapterStore,
    quick: Config,
) -> None:
    with pytest.raises(UserError, match=problem) as error:
        unlearn(request_, base, quick(**settings), store)
    assert hint in error.value.fix
    assert bytes_of(store.path).keys() <= {"store.json", ".lock"}


# Planning


@pytest.mark.usefixtures("loads_nothing")
def test_a_plan_tells_rows_steps_and_sizes(
    request_: Request, base: BaseSpec, store: AdapterStore, quick: Config
) -> None:
    config = quick(num_train_epochs=3, per_device_train_batch_size=4)
    run = prepare(request_, base, config, store)
    found = plan(run)
    settings = json.loads(json.dumps(config.to_json()))
    settings["lora"]["target_modules"] = list(TARGET_MODULES)  # "all-linear", resolved
    assert json.loads(json.dumps(found)) == found | {"settings": settings}
    assert (found["forget_rows"], found["retain_rows"], found["parents"]) == (8, 10, [])
    assert (found["steps"], found["pairs_per_step"]) == (6, 4)
    lengths = [len(row.input_ids) for row in (*run.rows.forget, *run.rows.retain)]
    assert found["longest_row_tokens"] == max(lengths)
    shape = read_shape(Path(base.name))
    assert found["adapter_parameters"] == shape.low_rank(4, TARGET_MODULES)
    assert found["memory"]["kind"] == "estimate"
    assert "context_and_workspace" not in found["memory"]["terms_bytes"]


@pytest.mark.parametrize("family", ["phi3", "phi"])
def test_a_target_that_a_model_lacks_is_refused_before_loading_with_those_it_has(
    family: str, tmp_path: Path
) -> None:
    """PEFT matched o_proj and down_proj of Phi-3 and trained on, without a word."""
    from transformers import AutoConfig

    from unlearner.memory.plan import meta_model

    config = AutoConfig.for_model(
        family, vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=4, pad_token_id=0,
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    model = meta_model(tmp_path)
    with pytest.raises(UserError, match="do not fit") as error:
        with_targets(LoraShape(target_modules=TARGET_MODULES), model)
    own = {"phi3": "qkv_proj", "phi": "fc1"}[family]
    assert own in error.value.fix
    assert own in with_targets(LoraShape(), model).target_modules


def test_the_default_targets_of_a_llama_are_recorded_by_name(
    request_: Request, base: BaseSpec, quick: Config
) -> None:
    run = prepare(request_, base, quick(), None)
    assert run.config.lora.target_modules == TARGET_MODULES
    assert plan(run)["settings"]["lora"]["target_modules"] == TARGET_MODULES


# A 4-bit base


def test_an_adapter_is_trained_on_a_4_bit_base(
    request_: Request, base: BaseSpec, store: AdapterStore, quick: Config
) -> None:
    pytest.importorskip("bitsandbytes")
    quantised = replace(base, load_in_4bit=True)
    events: list[dict[str, Any]] = []
    config = quick("npo", num_train_epochs=5)
    adapter = unlearn(request_, quantised, config, store, on_progress=events.append)
    view = adapter.manifest.base["view"]
    assert (view["quantization"], view["compute_dtype"]) == ("nf4", "float32")
    losses = [e["forget_loss"] for e in events if e["event"] == "train"]
    assert losses[0] == pytest.approx(2 * math.log(2) / 0.1, rel=1e-5)
    assert losses[-1] < 0.8 * losses[0]
    # The same base in float32 is the same base, and takes the adapter.
    other = AdapterStore.open(store.path.parent / "other", create=True)
    plain = unlearn(request_, base, config, other)
    assert plain.manifest.base["fingerprint"] == adapter.manifest.base["fingerprint"]
    assert weights(plain) != weights(adapter)


def test_a_bf16_base_trains_a_float32_adapter(
    request_: Request, base: BaseSpec, store: AdapterStore, quick: Config
) -> None:
    from safetensors.torch import load_file

    adapter = unlearn(request_, replace(base, dtype="bfloat16"), quick(), store)
    assert adapter.manifest.base["view"]["dtype"] == "bfloat16"
    tensors = load_file(adapter.path / WEIGHTS)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    assert all(float(t.abs().max()) > 0 for name, t in tensors.items() if "lora_B" in name)

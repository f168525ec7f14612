"""Does it fit, memory that runs out half-way, and how a run may be cut up."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from adapters.base.load import BaseSpec
from adapters.errors import DoesNotFit
from adapters.store.catalog import StoredAdapter
from adapters.store.store import AdapterStore
from unlearner.config import UnlearnConfig
from unlearner.memory import probe as preflight
from unlearner.request.rows import Request
from unlearner.run import unlearn
from unlearner.training import job as training
from unlearner.training.forward import StepForwards

Config = Callable[..., UnlearnConfig]


@pytest.fixture
def store(tmp_path: Path) -> AdapterStore:
    return AdapterStore.open(tmp_path / "store", create=True, timeout=5)


def sha(adapter: StoredAdapter) -> str:
    return str(adapter.manifest.files["adapter_model.safetensors"]["sha256"])


def weights(adapter: StoredAdapter) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(adapter.path / "adapter_model.safetensors")


def gap(one: StoredAdapter, other: StoredAdapter) -> float:
    a, b = weights(one), weights(other)
    return max(float((a[name] - b[name]).abs().max()) for name in a)


def test_the_two_steps_change_nothing(
    request_: Request, base: BaseSpec, store: AdapterStore, quick: Config, monkeypatch: Any
) -> None:
    """With dropout the random numbers count too: bit-equal adapters."""
    config = quick("npo", lora_dropout=0.1)
    probed = unlearn(request_, base, config, store)
    blind = preflight.Measured(0, 1, "")
    monkeypatch.setattr(preflight, "two_steps", lambda *args: blind)
    assert sha(unlearn(request_, base, config, store)) == sha(probed)


def test_a_limit_below_what_two_steps_take_is_refused_with_the_way_out(
    request_: Request, base: BaseSpec, store: AdapterStore, quick: Config
) -> None:
    events: list[dict[str, Any]] = []
    with pytest.raises(DoesNotFit) as caught:
        unlearn(request_, base, quick(), store, memory_limit=2**20, on_progress=events.append)
    assert caught.value.exit_code == 3
    assert "Two steps on the longest rows need" in caught.value.problem
    assert "1 MiB may be used" in caught.value.problem
    assert [event["event"] for event in events] == ["load", "probe"]
    assert events[1]["peak_bytes"] > events[1]["limit_bytes"] == 2**20
    assert store.list() == []


def test_the_longest_rows_are_what_is_tried() -> None:
    from unlearner.tokens.batch_plan import Pair

    steps = [[Pair(0, 0, 0), Pair(1, 1, 0)], [Pair(2, 0, 0), Pair(0, 0, 0)]]
    length = {0: 5, 1: 9, 2: 7}
    found = preflight.longest_pairs(steps, 2, lambda pair: length[pair.forget])
    assert [pair.forget for pair in found] == [1, 2]
    assert len(preflight.longest_pairs(steps, 5, lambda pair: length[pair.forget])) == 5


class OutOfMemory(TrainerCallback):
    """Makes the forward after so many steps fail as torch does."""

    def __init__(self, step: int, error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
        self.step, self.error, self.patch = step, error, monkeypatch

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:

            def fail(*args: Any) -> Any:
                raise self.error

            self.patch.setattr(StepForwards, "nll", fail)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
    ],
)
@pytest.mark.parametrize("attack", [0.0, 0.5])
def test_memory_that_runs_out_leaves_a_checkpoint_from_which_smaller_steps_go_on(
    attack: float, error: Exception, request_: Request, base: BaseSpec, store: AdapterStore,
    quick: Config,
) -> None:  # fmt: skip
    """Resumed with half the micro-batch: at most 2e-5 from the run that was never stopped."""
    config = quick(num_train_epochs=6, attack_weight=attack)
    whole = unlearn(request_, base, config, store)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(DoesNotFit) as caught:
        unlearn(request_, base, config, store, callbacks=[OutOfMemory(3, error, patch)])
    assert "Memory ran out after step 3 of 6; step 3 is saved." in caught.value.problem
    assert "--resume" in caught.value.fix
    assert "--gradient-checkpointing" in caught.value.fix or "No setting" in caught.value.fix
    assert caught.value.__cause__ is error
    smaller = quick(
        num_train_epochs=6, per_device_train_batch_size=4, gradient_accumulation_steps=2,
        gradient_checkpointing="all", attack_weight=attack,
    )  # fmt: skip
    events: list[dict[str, Any]] = []
    again = unlearn(request_, base, smaller, store, resume=True, on_progress=events.append)
    assert [e["step"] for e in events if e["event"] == "train"] == [4, 5, 6]
    assert gap(again, whole) < 2e-5


def test_other_errors_are_not_taken_for_memory(
    request_: Request, base: BaseSpec, store: AdapterStore, quick: Config
) -> None:
    broken = RuntimeError("shapes do not match")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(RuntimeError, match="shapes do not"):
        unlearn(request_, base, quick(), store, callbacks=[OutOfMemory(1, broken, patch)])


def test_packs_and_padding_train_the_same_adapter(
    request_: Request, base: BaseSpec, store: AdapterStore, quick: Config
) -> None:
    """Largest difference of a weight 2e-5 after four AdamW steps, of weights that moved by .02."""
    packed = unlearn(request_, base, quick(), store)
    padded = unlearn(request_, base, quick(padded=True), store)
    assert (packed.manifest.train["packed"], padded.manifest.train["packed"]) == (True, False)
    assert gap(packed, padded) < 2e-5
    assert max(float(w.abs().max()) for n, w in weights(packed).items() if "lora_B" in n) > 0.02


def test_a_model_that_cannot_pack_is_trained_padded_and_says_so(
    request_: Request, base: BaseSpec, store: AdapterStore, quick: Config, monkeypatch: Any
) -> None:
    monkeypatch.setattr(training, "packs_exactly", lambda model, rows: (False, 0.3))
    events: list[dict[str, Any]] = []
    adapter = unlearn(request_, base, quick(), store, on_progress=events.append)
    assert adapter.manifest.train["packed"] is False
    assert any("rows are padded" in event.get("text", "") for event in events)


def test_auto_checkpointing_follows_the_limit(
    request_: Request, base: BaseSpec, store: AdapterStore, quick: Config, monkeypatch: Any
) -> None:
    blind = preflight.Measured(0, 1, "")
    monkeypatch.setattr(preflight, "two_steps", lambda *args: blind)
    roomy = unlearn(request_, base, quick(), store)
    assert roomy.manifest.train["gradient_checkpointing"] == "off"
    tight = unlearn(request_, base, quick(), store, memory_limit=2**20)
    assert tight.manifest.train["gradient_checkpointing"] == "all"
    assert gap(roomy, tight) < 2e-5

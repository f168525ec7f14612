"""Does it fit, memory that runs out half-way, and how a run may be cut up."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from adapters.base.load import BaseSpec
from adapters.errors import DoesNotFit
from adapters.store.catalog import StoredAdapter
from adapters.store.store import AdapterStore
from unlearner.config import UnlearnConfig
from unlearner.memory import probe
from unlearner.memory.probe import Measured
from unlearner.request.rows import Request
from unlearner.run import RunOptions, unlearn
from unlearner.tokens.batch_plan import Pair, Rows
from unlearner.tokens.prompts import Encoded
from unlearner.training.forward import StepForwards
from unlearner.training.loop import TrainingLoop
from unlearner.training.unlearning import UnlearnData, UnlearnTask

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
    monkeypatch.setattr(TrainingLoop, "probe", lambda self, limit: Measured(0, 1, ""))
    assert sha(unlearn(request_, base, config, store)) == sha(probed)


def test_a_limit_below_what_two_steps_take_is_refused_with_the_way_out(
    request_: Request, base: BaseSpec, store: AdapterStore, quick: Config
) -> None:
    events: list[dict[str, Any]] = []
    with pytest.raises(DoesNotFit) as caught:
        unlearn(
            request_,
            base,
            quick(),
            store,
            RunOptions(memory_limit=2**20),
            on_progress=events.append,
        )
    assert caught.value.exit_code == 3
    assert "Two steps on the longest rows need" in caught.value.problem
    assert "1 MiB may be used" in caught.value.problem
    assert [event["event"] for event in events] == ["load", "probe"]
    assert events[1]["peak_bytes"] > events[1]["limit_bytes"] == 2**20
    assert store.list() == []


def test_memory_that_is_short_on_a_cpu_is_measured_again_without_what_the_allocator_keeps(
    request_: Request, base: BaseSpec, store: AdapterStore, quick: Config, monkeypatch: Any
) -> None:
    peaks, events = iter([150, 90]), list[dict[str, Any]]()
    monkeypatch.setattr("unlearner.run.return_freed_memory", lambda: True)
    monkeypatch.setattr(
        TrainingLoop, "probe", lambda self, limit: Measured(next(peaks), 100, "of this process")
    )
    unlearn(request_, base, quick(), store, on_progress=events.append)
    assert [e["event"] for e in events][:3] == ["load", "note", "probe"]
    assert events[2]["peak_bytes"] == 90


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="not Linux")
def test_freed_memory_goes_back_to_the_system() -> None:
    """In a process of its own: what is set holds as long as the process."""
    code = """
import torch, psutil
from adapters.environment import return_freed_memory

def grow():
    torch.ones(3_500_000)  # freed at once: from now on smaller blocks are kept, by default
    kept, freed = [], []
    for _ in range(60):  # a block of 8 MB is freed behind each small one that stays
        freed.append(torch.ones(2_000_000))
        kept.append(torch.ones(20_000))
    freed.clear()
    return kept

if return_freed_memory():
    before = psutil.Process().memory_info().rss
    kept = grow()
    assert psutil.Process().memory_info().rss - before < 60_000_000
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr


def test_the_micro_batch_with_the_most_tokens_in_all_is_tried(
    rows: Rows, base: BaseSpec, fresh_model: Any, quick: Config
) -> None:
    """The longest row is not in it: a pack costs the sum over its rows, padding the longest."""
    config = quick(per_device_train_batch_size=1, gradient_accumulation_steps=2)
    lengths = {"forget": [9, 20, 15], "retain": [30, 5, 20]}
    made = Rows(
        *([Encoded([1] * n, [-100] * (n - 2) + [1, 2]) for n in lengths[k]] for k in lengths)
    )
    plan = [[Pair(0, 0, 0), Pair(1, 1, 0)], [Pair(2, 2, 0), Pair(1, 1, 0)]]
    model = fresh_model(config.lora)
    for packed, tokens in ((True, 9 + 30), (False, 2 * 30)):
        task = UnlearnTask(model, UnlearnData(made, plan, 0, packed), config)
        assert task.heaviest_batch()["input_ids"].numel() == tokens
    made = Rows(made.forget, [made.retain[2], made.retain[1], made.retain[0]])
    for packed, tokens in ((True, 15 + 30), (False, 2 * 30)):
        task = UnlearnTask(model, UnlearnData(made, plan, 0, packed), config)
        assert task.heaviest_batch()["input_ids"].numel() == tokens


def test_what_is_probed_is_what_is_trained(loop: Any, quick: Config, monkeypatch: Any) -> None:
    """Checkpointing on, autocast on, the optimizer of the run."""
    made = loop(quick(gradient_checkpointing="all", optim="sgd"))
    made._dtype = torch.bfloat16
    seen: dict[str, Any] = {"blocks": 0}
    block = made.bare.get_base_model().model.layers[0].mlp
    block.register_forward_pre_hook(lambda m, i: seen.update(blocks=seen["blocks"] + 1))
    block.register_forward_hook(lambda m, i, out: seen.update(dtype=out.dtype))
    step = torch.optim.SGD.step
    monkeypatch.setattr(
        torch.optim.SGD, "step", lambda self, *a: (seen.update(kind=type(self)), step(self, *a))[1]
    )
    made.probe()
    assert seen == {"blocks": 4, "dtype": torch.bfloat16, "kind": torch.optim.SGD}


def test_the_budget_and_the_peak_of_a_gpu_both_count_its_context(monkeypatch: Any) -> None:
    device, gib = torch.device("cuda:0"), 2**30
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda d: (6 * gib, 8 * gib))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda d: gib)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda d: 2 * gib)
    assert probe.free_memory(device) == 7 * gib + probe.CUDA_CONTEXT
    assert probe.budget(device, None) == int(probe.USABLE * probe.free_memory(device))
    assert probe.budget(device, 8 * gib) == 8 * gib
    assert probe.peak(device) == 2 * gib + probe.CUDA_CONTEXT


def out_of_memory(
    after: int, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> Callable[[int, int, Any], None]:
    """Makes the forward after so many steps fail as torch does."""

    def after_step(step: int, steps: int, model: Any) -> None:
        def fail(*args: Any) -> Any:
            raise error

        if step == after:
            monkeypatch.setattr(StepForwards, "nll", fail)

    return after_step


@pytest.mark.parametrize(
    ("attack", "error"),
    [
        (0.0, RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you")),
        pytest.param(
            0.5, torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
            marks=pytest.mark.slow,
        ),
    ],
)  # fmt: skip
def test_memory_that_runs_out_leaves_a_checkpoint_from_which_smaller_steps_go_on(
    attack: float, error: Exception, request_: Request, base: BaseSpec, store: AdapterStore,
    quick: Config,
) -> None:  # fmt: skip
    """Resumed with half the micro-batch: at most 2e-5 from the run that was never stopped."""
    config = quick(num_train_epochs=6, attack_weight=attack)
    whole = unlearn(request_, base, config, store)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(DoesNotFit) as caught:
        unlearn(request_, base, config, store, after_step=out_of_memory(3, error, patch))
    assert "Memory ran out after step 3 of 6; step 3 is saved." in caught.value.problem
    assert "--resume" in caught.value.fix
    assert "--gradient-checkpointing" in caught.value.fix or "No setting" in caught.value.fix
    assert caught.value.__cause__ is error
    smaller = quick(
        num_train_epochs=6, per_device_train_batch_size=4, gradient_accumulation_steps=2,
        gradient_checkpointing="all", attack_weight=attack,
    )  # fmt: skip
    events: list[dict[str, Any]] = []
    again = unlearn(
        request_, base, smaller, store, RunOptions(resume=True), on_progress=events.append
    )
    assert [e["step"] for e in events if e["event"] == "train"] == [4, 5, 6]
    assert gap(again, whole) < 2e-5


def test_other_errors_are_not_taken_for_memory(
    request_: Request, base: BaseSpec, store: AdapterStore, quick: Config
) -> None:
    broken = RuntimeError("shapes do not match")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(RuntimeError, match="shapes do not"):
        unlearn(request_, base, quick(), store, after_step=out_of_memory(1, broken, patch))


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
    monkeypatch.setattr("unlearner.run.packs_exactly", lambda model, rows: (False, 0.3))
    events: list[dict[str, Any]] = []
    adapter = unlearn(request_, base, quick(), store, on_progress=events.append)
    assert adapter.manifest.train["packed"] is False
    assert any("rows are padded" in event.get("text", "") for event in events)


def test_auto_checkpointing_follows_the_limit(
    request_: Request, base: BaseSpec, store: AdapterStore, quick: Config, monkeypatch: Any
) -> None:
    monkeypatch.setattr(TrainingLoop, "probe", lambda self, limit: Measured(0, 1, ""))
    roomy = unlearn(request_, base, quick(), store)
    assert roomy.manifest.train["gradient_checkpointing"] == "off"
    tight = unlearn(request_, base, quick(), store, RunOptions(memory_limit=2**20))
    assert tight.manifest.train["gradient_checkpointing"] == "all"
    assert gap(roomy, tight) < 2e-5

from __future__ import annotations

import signal
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from adapters.base.load import BaseSpec, load_base, load_tokenizer
from adapters.errors import Interrupted, UserError
from tests.conftest import A100, T4
from unlearner.baselines import finetune as module
from unlearner.baselines.finetune import FinetuneConfig, finetune
from unlearner.config import LoraShape
from unlearner.objectives.likelihood import answer_nll
from unlearner.request.rows import Request, Row
from unlearner.tokens.prompts import Encoded, pad_batch, prompt_format
from unlearner.training import general

QUICK = FinetuneConfig(
    learning_rate=3e-3,
    num_train_epochs=8,
    per_device_train_batch_size=9,
    gradient_accumulation_steps=2,
    warmup_ratio=0.0,
)
LORA = LoraShape(4, 8)
# Forwards of the check that packs score as rows do: one pack, and two rows alone.
PACK_CHECK = 3


@pytest.fixture(scope="module")
def rows(request_: Request) -> list[Row]:
    return [*request_.rows, *request_.retain]


@pytest.fixture(scope="module")
def untaught(tiny_base: Path) -> BaseSpec:
    """The random Llama: it knows nothing of the rows."""
    return BaseSpec(str(tiny_base), dtype="float32", device="cpu")


def encoded(base: BaseSpec, rows: list[Row]) -> list[Encoded]:
    fmt = prompt_format(load_tokenizer(base.name))
    return [fmt.encode(row.question, row.answer) for row in rows]


def nll(folder: str | Path, batch: list[Encoded]) -> torch.Tensor:
    """Mean NLL per answer token of each row, by a model that plain transformers loads."""
    from transformers import AutoModelForCausalLM

    with torch.no_grad():
        return answer_nll(
            AutoModelForCausalLM.from_pretrained(folder), pad_batch(batch, 0)
        ).per_token


def test_all_weights_learn_the_answers_and_load_plainly(
    untaught: BaseSpec, rows: list[Row], tmp_path: Path
) -> None:
    events: list[dict[str, Any]] = []
    out = finetune(untaught, rows, tmp_path / "new" / "model", QUICK, on_progress=events.append)
    assert out == tmp_path / "new" / "model"
    assert [path.name for path in out.parent.iterdir()] == ["model"]
    assert [(e["event"], e["step"], e["steps"]) for e in events] == [
        ("train", n, 8) for n in range(1, 9)
    ]
    batch = encoded(untaught, rows)
    before, after = nll(untaught.name, batch), nll(out, batch)
    assert (before - after).min() > 1
    assert events[-1]["loss"] < events[0]["loss"] - 1
    # The first loss is ours: the mean over the answer tokens of all rows, prompts masked.
    n = torch.tensor([row.n_targets for row in batch])
    assert events[0]["loss"] == pytest.approx(float((before * n).sum() / n.sum()), rel=1e-3)
    # Prompts, template and loader stay as they were.
    assert encoded(BaseSpec(str(out)), rows) == batch
    load_base(replace(untaught, name=str(out)))


def test_lora_is_folded_into_the_weights(
    untaught: BaseSpec, rows: list[Row], tmp_path: Path
) -> None:
    from safetensors.torch import load_file

    config = replace(QUICK, learning_rate=1e-2, gradient_checkpointing=True)
    events: list[dict[str, Any]] = []
    out = finetune(untaught, rows, tmp_path / "m", config, lora=LORA, on_progress=events.append)
    batch = encoded(untaught, rows)
    assert (nll(untaught.name, batch) - nll(out, batch)).mean() > 0.5
    assert events[-1]["loss"] < events[0]["loss"] - 0.5
    assert not list(out.glob("adapter*"))
    old = load_file(Path(untaught.name) / "model.safetensors")
    new = load_file(out / "model.safetensors")
    assert old.keys() == new.keys()
    changed = {name for name in old if not torch.equal(old[name], new[name])}
    assert changed == {name for name in old if "_proj" in name}
    assert encoded(BaseSpec(str(out)), rows) == batch


def test_a_4_bit_base_is_trained_by_lora_and_folded_into_its_own_weights(
    untaught: BaseSpec, rows: list[Row], tmp_path: Path
) -> None:
    pytest.importorskip("bitsandbytes")
    quantised = replace(untaught, load_in_4bit=True)
    with pytest.raises(UserError, match="4-bit base cannot be trained") as error:
        finetune(quantised, rows, tmp_path / "full")
    assert "--lora" in error.value.fix
    assert not (tmp_path / "full").exists()
    config = replace(QUICK, num_train_epochs=4, learning_rate=1e-2)
    out = finetune(quantised, rows, tmp_path / "lora", config, lora=LORA)
    # Not the rounded 4-bit weights: a layer that is not adapted is the base's own.
    from safetensors.torch import load_file

    name = "model.embed_tokens.weight"
    old = load_file(Path(untaught.name) / "model.safetensors")[name]
    assert torch.equal(load_file(out / "model.safetensors")[name], old)
    batch = encoded(untaught, rows)
    assert (nll(untaught.name, batch) - nll(out, batch)).mean() > 0.2


def test_the_same_seed_gives_the_same_model(
    untaught: BaseSpec, rows: list[Row], tmp_path: Path
) -> None:
    config = replace(QUICK, num_train_epochs=2, per_device_train_batch_size=4)
    files = []
    for number, seed in enumerate((42, 42, 43)):
        torch.manual_seed(number)
        out = finetune(untaught, rows, tmp_path / str(number), replace(config, seed=seed))
        files.append((out / "model.safetensors").read_bytes())
    assert files[0] == files[1] != files[2]


@pytest.mark.parametrize(
    ("dtype", "device", "expected"),
    [
        ("auto", "cuda:0", torch.bfloat16),
        ("auto", "cuda:1", torch.float16),
        ("bfloat16", "cuda:0", torch.bfloat16),
        ("float32", "cuda:0", None),
        ("auto", "cpu", None),
    ],
)
def test_precision_is_what_the_card_computes_in(
    dtype: Any, device: str, expected: Any, cards: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The weights that are trained are float32; a T4 emulates bf16."""
    cards(A100, T4)

    class Model:
        def requires_grad_(self, value: bool) -> None:
            assert value

        def parameters(self) -> Any:
            return iter([SimpleNamespace(device=torch.device(device))])

    specs: list[BaseSpec] = []
    monkeypatch.setattr(module, "load_base", lambda spec: specs.append(spec) or Model())
    assert module._load(BaseSpec("b", dtype=dtype, device=device), None, 0)[1] is expected
    assert [(spec.dtype, spec.device) for spec in specs] == [("float32", device)]
    with pytest.raises(UserError, match="no bfloat16 in hardware"):
        module.dtype_on("bfloat16", "cuda:1")


def test_what_exists_is_never_overwritten(
    untaught: BaseSpec, rows: list[Row], tmp_path: Path
) -> None:
    (tmp_path / "model").mkdir()
    with pytest.raises(UserError, match="exists already") as error:
        finetune(untaught, rows, tmp_path / "model")
    assert error.value.exit_code == 2
    assert list((tmp_path / "model").iterdir()) == []


@pytest.mark.parametrize("wanted", [False, True])
def test_blocks_run_twice_only_where_checkpointing_is_wanted(
    wanted: bool,
    untaught: BaseSpec,
    rows: list[Row],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    forwards: list[int] = []

    def watched(spec: BaseSpec) -> Any:
        model: Any = load_base(spec)
        model.model.layers[0].mlp.register_forward_pre_hook(lambda m, i: forwards.append(1))
        return model

    monkeypatch.setattr("unlearner.baselines.finetune.load_base", watched)
    config = replace(QUICK, num_train_epochs=1, gradient_checkpointing=wanted)
    finetune(untaught, rows, tmp_path / "model", config)
    assert len(forwards) == (4 if wanted else 2) + PACK_CHECK


def test_rows_that_would_lose_their_answer_are_refused(
    untaught: BaseSpec, rows: list[Row], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="--max-length 12"):
        finetune(untaught, rows, tmp_path / "model", replace(QUICK, max_length=12))
    assert not (tmp_path / "model").exists()


def stop_at(step: int) -> Any:
    def on_progress(event: dict[str, Any]) -> None:
        if event["event"] == "train" and event["step"] == step:
            signal.raise_signal(signal.SIGINT)

    return on_progress


def test_an_interrupted_run_continues_to_the_same_model(
    untaught: BaseSpec, rows: list[Row], tmp_path: Path
) -> None:
    whole = finetune(untaught, rows, tmp_path / "whole", QUICK)
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(Interrupted, match=r"after step 3 of 8; it is saved"):
        finetune(untaught, rows, tmp_path / "model", QUICK, on_progress=stop_at(3))
    assert signal.getsignal(signal.SIGINT) is handler
    assert not (tmp_path / "model").exists()
    events: list[dict[str, Any]] = []
    out = finetune(untaught, rows, tmp_path / "model", QUICK, on_progress=events.append)
    assert [event["step"] for event in events] == [4, 5, 6, 7, 8]
    read = [(folder / "model.safetensors").read_bytes() for folder in (whole, out)]
    assert read[0] == read[1]
    assert {path.name for path in tmp_path.iterdir()} == {"whole", "model"}


def test_a_protected_adapter_learns_and_leaves_other_answers_alone(
    untaught: BaseSpec, rows: list[Row], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(general, "FEWEST", 20)
    fmt = prompt_format(load_tokenizer(untaught.name))
    others = [fmt.encode(prompt, "It is not known.") for prompt in general.own_prompts(0)]
    learned = encoded(untaught, rows)
    moved, gained = [], []
    for count in (0, 16):
        config = replace(QUICK, protected_directions=count)
        out = finetune(untaught, rows, tmp_path / str(count), config, lora=LORA)
        moved.append(float((nll(out, others) - nll(untaught.name, others)).abs().mean()))
        gained.append(float((nll(untaught.name, learned) - nll(out, learned)).mean()))
    assert moved[1] < moved[0] / 2
    assert gained[1] > gained[0] / 2
    with pytest.raises(UserError, match="those of an adapter"):
        finetune(untaught, rows, tmp_path / "whole", config)

"""All weights trained: the same loss as an adapter's, the original as reference, a whole model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from adapters.base.load import BaseSpec, load_base, load_tokenizer
from adapters.errors import UserError
from unlearner.baselines import full
from unlearner.baselines.full import RECORD, forget_full
from unlearner.config import UnlearnConfig
from unlearner.objectives.likelihood import answer_nll
from unlearner.request.rows import Request
from unlearner.tokens.prompts import encode_rows, pad_batch, pad_id, prompt_format

Config = Callable[..., UnlearnConfig]


def nlls(folder: str, rows: Any) -> torch.Tensor:
    fmt = prompt_format(load_tokenizer(folder))
    encoded = encode_rows(fmt, [(row.question, row.answer) for row in rows], 128, "these")
    model = load_base(BaseSpec(folder, dtype="float32", device="cpu"))
    with torch.no_grad():
        return answer_nll(model, pad_batch(encoded, pad_id(fmt.tokenizer))).per_token


def test_a_step_of_sgd_moves_all_weights_by_the_gradient_of_the_loss(
    base: BaseSpec, request_: Request, quick: Config, tmp_path: Path
) -> None:
    config = quick("grad_diff", optim="sgd", learning_rate=0.05, num_train_epochs=1,
                   weight_decay=0.0, per_device_train_batch_size=3,
                   gradient_accumulation_steps=3)  # fmt: skip
    out = forget_full(request_, base, config, tmp_path / "full")
    model: Any = load_base(base).requires_grad_(True)
    rows = [request_.rows, request_.retain]
    fmt = prompt_format(load_tokenizer(base.name))
    encoded = [
        encode_rows(fmt, [(r.question, r.answer) for r in part], 128, "these") for part in rows
    ]
    # Eight pairs: all forget rows, and eight of the ten retain rows that the plan drew.
    from unlearner.tokens.batch_plan import plan_steps

    ((*pairs,),) = plan_steps(8, 10, 0, config.train)
    kept = [encoded[1][pair.retain] for pair in pairs]
    pad = pad_id(fmt.tokenizer)
    loss = answer_nll(model, pad_batch(kept, pad)).per_token.mean()
    (loss - answer_nll(model, pad_batch(encoded[0], pad)).per_token.mean()).backward()
    after = load_file(out / "model.safetensors")
    for name, parameter in model.named_parameters():
        expected = parameter.detach() - 0.05 * parameter.grad
        torch.testing.assert_close(after[name], expected, rtol=1e-4, atol=2e-6, msg=name)


@pytest.mark.parametrize("objective", ["simnpo", "kl", "rmu"])
def test_it_forgets_keeps_a_record_and_leaves_the_base_alone(
    objective: str, base: BaseSpec, request_: Request, quick: Config, tmp_path: Path
) -> None:
    weights = (Path(base.name) / "model.safetensors").read_bytes()
    events: list[dict[str, Any]] = []
    own = {"rmu_layer": 1, "retain_weight": 1.0} if objective == "rmu" else {}
    config = quick(objective, learning_rate=1e-3, num_train_epochs=6, **own)
    out = forget_full(request_, base, config, tmp_path / "full", on_progress=events.append)
    assert (nlls(str(out), request_.rows) - nlls(base.name, request_.rows)).mean() > 0.1
    assert (Path(base.name) / "model.safetensors").read_bytes() == weights
    record = json.loads((out / RECORD).read_text())
    assert record["kind"] == "unlearner-forget-full"
    assert record["objective"]["name"] == objective
    assert record["train"]["steps"] == 6
    assert record["data"]["forget"]["n"] == 8
    assert "Mira" not in json.dumps(record)
    steps = [event for event in events if event["event"] == "train"]
    if objective in ("kl", "rmu"):
        # The reference is the model as it was: no distance at first, and then some.
        assert steps[0]["retain_loss"] < 1e-6
        assert steps[-1]["retain_loss"] > 1e-4
    assert not list(tmp_path.glob(".full-*"))


def test_what_it_refuses(
    base: BaseSpec, request_: Request, quick: Config, tmp_path: Path, monkeypatch: Any
) -> None:
    (tmp_path / "there").mkdir()
    with pytest.raises(UserError, match="exists already"):
        forget_full(request_, base, quick(), tmp_path / "there")
    four_bit = BaseSpec(base.name, load_in_4bit=True, device="cpu")
    with pytest.raises(UserError, match="4-bit"):
        forget_full(request_, four_bit, quick(), tmp_path / "new")
    monkeypatch.setattr(full, "LARGEST", 1000)
    with pytest.raises(UserError, match=r"has [\d,]+ weights; training all takes") as error:
        forget_full(request_, base, quick(), tmp_path / "new")
    assert "--any-size" in error.value.fix
    assert not (tmp_path / "new").exists()
    config = quick(num_train_epochs=1)
    assert forget_full(request_, base, config, tmp_path / "new", any_size=True).is_dir()

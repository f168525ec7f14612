"""Reference NLLs: right, and computed once per row."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from adapters.base.load import BaseSpec, load_tokenizer
from adapters.lora.stack import parents_only
from adapters.store.store import AdapterStore
from unlearner.config import UnlearnConfig
from unlearner.objectives.likelihood import answer_nll
from unlearner.request.rows import Request
from unlearner.run import unlearn
from unlearner.tokens.batch_plan import Rows, plan_steps
from unlearner.tokens.prompts import encode_rows, pad_batch, prompt_format
from unlearner.training import references

Config = Callable[..., UnlearnConfig]


@pytest.fixture(scope="module")
def rows(base: BaseSpec, request_: Request, refusals: tuple[str, ...]) -> Rows:
    fmt = prompt_format(load_tokenizer(base.name))

    def encoded(pairs: Any) -> Any:
        return encode_rows(fmt, list(pairs), 128, "these")

    return Rows(
        encoded((row.question, row.answer) for row in request_.rows),
        encoded((row.question, row.answer) for row in request_.retain),
        [encoded((row.question, refusal) for refusal in refusals) for row in request_.rows],
    )


def found(model: Any, rows: Rows, steps: Any, objective: str, **more: Any) -> references.References:
    chosen = {"pad": 0, "packed": True, **more}
    return references.reference_nlls(model, rows, steps, objective, ["parent"], **chosen)


@pytest.mark.parametrize("packed", [False, True])
def test_values_are_those_of_the_parents(
    packed: bool, rows: Rows, fresh_model: Any, quick: Config
) -> None:
    """Largest difference to a padded forward of all rows: 1e-4 of sums up to 100 nats."""
    model = fresh_model(quick().lora, on_parent=True)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".new." in name and "lora_B" in name:
                parameter.normal_(0, 0.1)
    steps = plan_steps(8, 10, 3, quick("dpo").train)
    values = found(model, rows, steps, "dpo", packed=packed)
    with torch.no_grad(), parents_only(model, ["parent"]):
        expected = answer_nll(model, pad_batch(rows.forget, 0)).nll
    mine = torch.tensor([values["forget"][(i,)] for i in range(8)])
    assert float((mine - expected).abs().max()) < 1e-4
    used = {(pair.forget, pair.refusal) for step in steps for pair in step}
    assert set(values["refusal"]) == used
    assert found(model, rows, steps, "simnpo") == {}


def test_the_reference_runs_once_a_row_and_not_once_an_epoch(
    request_: Request, base: BaseSpec, quick: Config, tmp_path: Path, monkeypatch: Any
) -> None:
    store = AdapterStore.open(tmp_path / "store", create=True, timeout=5)
    batches: list[int] = []
    real = references.answer_nll

    def counted(model: Any, batch: Any) -> Any:
        batches.append(len(batch["starts"]) - 1)
        return real(model, batch)

    monkeypatch.setattr(references, "answer_nll", counted)
    events: list[dict[str, Any]] = []
    unlearn(request_, base, quick("npo", num_train_epochs=5), store, on_progress=events.append)
    assert sum(batches) == len(request_.rows)
    steps = [event for event in events if event["event"] == "train"]
    assert len(steps) == 5
    assert steps[0]["forget_loss"] == pytest.approx(2 * 0.6931471805599453 / 0.1, rel=1e-5)

"""A comparison that runs again uses a result only where every input is the same."""

from __future__ import annotations

import gc
import json
import shutil
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from adapters.base.load import BaseSpec
from evaluation.experiments import systems
from evaluation.experiments.systems import Measured, forget_and_measure, measure
from evaluation.logs import read_log
from evaluation.logs.records import EvalLog
from evaluation.suite import EvalData
from unlearner.config import make_config
from unlearner.request.rows import Request, Row
from unlearner.run import RunOptions

CONFIG = make_config(
    "grad_diff", lora_r=2, lora_alpha=8, learning_rate=2e-2, num_train_epochs=1, warmup_ratio=0.0,
    retain_weight=1.0,
)  # fmt: skip
REQUEST = Request(
    "own", "rows",
    (Row("Who wrote the river novel?", "Mira Okafor."), Row("Where was she born?", "In Lagos.")),
    (Row("Who is Kim?", "A painter."), Row("Who is Ola?", "A pilot.")),
)  # fmt: skip


@pytest.fixture
def base(tiny_base: Path) -> BaseSpec:
    return BaseSpec(str(tiny_base), dtype="float32", device="cpu")


@pytest.fixture(autouse=True)
def _private_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNLEARNER_KEY", str(tmp_path / "key"))


@pytest.fixture
def forget(base: BaseSpec, tmp_path: Path, make_small_tofu: Any) -> Callable[..., EvalLog]:
    """The log of a comparison that always runs in the same folder."""
    data = make_small_tofu(tmp_path, 2)

    def run(**changes: Any) -> EvalLog:
        given = {
            "requests": [REQUEST], "base": base, "config": CONFIG, "store": tmp_path / "store",
            "what": Measured(data, "forget05"), "log": tmp_path / "log.json",
        } | changes  # fmt: skip
        return read_log(Path(forget_and_measure(lambda event: None, **given)))

    return run


def test_other_rows_are_trained_on_again(forget: Any, tmp_path: Path) -> None:
    from adapters.store.store import AdapterStore

    first = forget()
    assert forget().meta == first.meta
    seen = [first.meta["adapters"]]
    for changed in (
        replace(REQUEST, rows=(REQUEST.rows[0], Row("Who wrote it?", "Nobody."))),
        replace(REQUEST, retain=(REQUEST.retain[0], Row("Who is Ola?", "A baker."))),
        replace(REQUEST, retain=REQUEST.retain[::-1]),
    ):
        again = forget(requests=[changed])
        assert again.meta["adapters"] not in seen
        active = [adapter.slug for adapter in AdapterStore.open(tmp_path / "store").active()]
        assert active == again.meta["adapters"], "the adapter of the other rows is switched off"
        seen.append(again.meta["adapters"])


def test_other_refusals_settings_and_loading_train_again(forget: Any, base: BaseSpec) -> None:
    config = replace(CONFIG, objective=make_config("idk").objective)
    how = RunOptions(refusals=["I do not know."])
    first = forget(config=config, how=how)
    for change in (
        {"how": RunOptions(refusals=["That is unknown to me."])},
        {"config": replace(config, train=replace(config.train, seed=7))},
        {"base": replace(base, attention="eager")},
    ):
        given = {"config": config, "how": how, **change}
        assert forget(**given).meta["adapters"] != first.meta["adapters"], change


def test_a_log_is_measured_again_where_the_data_the_template_or_the_weights_differ(
    base: BaseSpec, tmp_path: Path, make_small_tofu: Any, make_tiny_llama: Any
) -> None:
    folder = make_small_tofu(tmp_path, 2)
    log = tmp_path / "log.json"

    def key(spec: BaseSpec = base, **what: Any) -> Any:
        measured = Measured(**{"data": folder, "split": "forget05", **what})
        measure(lambda event: None, base=spec, what=measured, log=log, generate=False)
        return read_log(log).meta["made_from"]

    first = key()
    assert key() == first
    other = tmp_path / "other"
    other.mkdir()
    for each in folder.glob("*.json"):
        shutil.copy(each, other)
    assert key(data=other) == first, "the same rows in another folder"
    path = other / "forget05_perturbed.json"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    lines[0]["answer"] = "Another answer."
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    keys = [first, key(data=other), key(template="llama2"), key(limit=1),
            key(replace(base, attention="eager")),
            key(replace(base, name=str(make_tiny_llama(tmp_path / "model", seed=5))))]  # fmt: skip
    assert len(set(keys)) == len(keys)


def test_rows_of_the_caller_are_part_of_the_key(base: BaseSpec, tmp_path: Path) -> None:
    keys = set()
    for answer in ("A painter.", "A pilot."):
        rows = EvalData([Row("Who is Kim?", answer)])
        what = Measured(None, "forget05")
        log = tmp_path / "log.json"
        measure(lambda e: None, base=base, what=what, log=log, rows=rows, generate=False)
        keys.add(read_log(log).meta["made_from"])
    assert len(keys) == 2


def test_a_model_is_freed_before_the_next_is_loaded(
    forget: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model with adapters holds itself in cycles: two of 7B would not fit one card."""
    first = forget()
    models: list[weakref.ref[Any]] = []
    alive: list[int] = []
    real = systems.load_base

    def loading(spec: BaseSpec, **options: Any) -> Any:
        alive.append(sum(model() is not None for model in models))
        model = real(spec, **options)
        models.append(weakref.ref(model))
        return model

    monkeypatch.setattr(systems, "load_base", loading)
    gc.disable()  # only the product itself collects
    try:
        for name in ("one", "two"):
            forget(log=tmp_path / f"{name}.json")
    finally:
        gc.enable()
    assert alive == [0, 0]
    assert read_log(tmp_path / "two.json").meta["made_from"] == first.meta["made_from"]

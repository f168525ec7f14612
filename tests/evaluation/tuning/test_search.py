"""The search: what it remembers, what it stops, and that its figures are measured."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("optuna", reason="the search is an extra: pip install 'unlearner[tune]'")

from adapters.base.load import BaseSpec, load_base
from adapters.errors import UserError
from evaluation.logs.records import write_log
from evaluation.suite import evaluate, load_eval_data
from evaluation.tuning import search as tuning
from evaluation.tuning.probe import Look, NotFinite, loss_of
from evaluation.tuning.search import Range, Tuning, reached, setting_words, tune
from unlearner.config import UnlearnConfig, make_config
from unlearner.request.rows import Request, Row

ORIGIN = Look(1e-20, 0.5, -1.0, 0.1, 0.02, 0.9, 0.8)
GOOD = Look(0.9, 0.05, 0.0, 5.0, 1.0, 0.9, 0.8)
SMALL = {"num_train_epochs": 2, "per_device_train_batch_size": 3, "gradient_accumulation_steps": 1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, make_small_tofu: Any) -> Path:
    """TOFU's four evaluation files with four rows each."""
    found: Path = make_small_tofu(tmp_path_factory.mktemp("data"), 4)
    return found


@pytest.fixture(scope="module")
def retain_log(
    folder: Path, tmp_path_factory: pytest.TempPathFactory, make_tiny_llama: Any
) -> Path:
    """Another tiny model's log, in the place of Retrain's."""
    home = tmp_path_factory.mktemp("retrain")
    base = BaseSpec(str(make_tiny_llama(home / "model", seed=7)), dtype="float32", device="cpu")
    from adapters.base.load import load_tokenizer
    from unlearner.tokens.prompts import prompt_format

    found = evaluate(
        load_base(base),
        prompt_format(load_tokenizer(base.name)),
        load_eval_data("forget05", folder),
        generate=False,
    )
    write_log(found, home / "retrain.json")
    return home / "retrain.json"


@pytest.fixture
def small(tiny_base: Path, folder: Path, retain_log: Path, tmp_path: Path) -> Tuning:
    data = load_eval_data("forget05", folder)
    bare = {
        name: tuple(Row(row.question, row.answer) for row in rows)
        for name, rows in data.sets.items()
    }
    return Tuning(
        Request("tofu:forget05", "tofu-split", bare["forget"], bare["retain"]),
        "forget05",
        BaseSpec(str(tiny_base), dtype="float32", device="cpu"),
        retain_log,
        tmp_path / "out",
        data=folder,
        fixed={**SMALL, "lora_r": 2},
        space={"learning_rate": Range(1e-4, 1e-2, log=True), "margin": Range(0.5, 1.0)},
        trials=2,
        seeds=(1, 2),
    )


def test_the_whole_search(small: Tuning, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trains, chooses, measures a held-out seed; the same call again trains nothing."""
    monkeypatch.setattr(tuning, "LOOKS", (1.0,))
    events: list[dict[str, Any]] = []
    found = tune(small, events.append)
    assert json.loads((small.out / "tune.json").read_text()) == json.loads(json.dumps(found))
    assert (found["kind"], found["schema"], found["tried"]) == ("unlearner-tune", 1, 2)
    finished = [trial for trial in found["trials"] if trial["state"] == "complete"]
    assert found["chosen"]["loss"] == min(trial["loss"] for trial in finished)
    assert [row["seed"] for row in (found["chosen"]["selected"], *found["chosen"]["held_out"])] == [
        1,
        2,
    ]
    # The chosen trial, measured again from its published adapter, is the one that was looked at.
    best = found["trials"][found["chosen"]["trial"] - 1]["looks"][-1]
    assert found["chosen"]["selected"]["forget_nll"] == pytest.approx(best["forget_nll"], rel=1e-4)
    assert found["chosen"]["held_out"][0]["forget_nll"] != found["chosen"]["selected"]["forget_nll"]
    margin = found["trials"][0]["searched"]["margin"]
    gamma = found["trials"][0]["settings"]["objective"]["gamma"]
    assert gamma == pytest.approx(2.5 * margin * found["retrain_forget_nll"], rel=1e-3)
    trained = sum(event.get("event") == "train" for event in events)
    assert trained > 0
    events.clear()
    again = tune(small, events.append)
    assert again["chosen"] == found["chosen"]
    assert not any(event.get("event") == "train" for event in events)
    assert {path.name for path in small.out.iterdir() if path.name.startswith(".")} == set()


def test_given_settings_are_measured_on_every_seed_without_a_search(small: Tuning) -> None:
    given = {**small.fixed, "learning_rate": 1e-3, "gamma": 2.0}
    events: list[dict[str, Any]] = []
    found = tune(replace(small, fixed=given, space={}), events.append)
    assert (found["tried"], found["trials"], found["chosen"]["trial"]) == (0, [], None)
    rows = (found["chosen"]["selected"], *found["chosen"]["held_out"])
    assert [row["seed"] for row in rows] == [1, 2]
    assert rows[0]["forget_nll"] != rows[1]["forget_nll"]
    assert not (small.out / tuning.STUDY_FILE).exists()
    steps = sum(event.get("event") == "train" for event in events)
    assert steps == 2 * make_config(**given).train.steps(len(small.request.rows))


def faked(monkeypatch: pytest.MonkeyPatch, run: Callable[[UnlearnConfig, Any], None]) -> None:
    """In place of training: `run` tells what would have been seen."""
    monkeypatch.setattr(
        tuning, "train_once", lambda run_, config, probe, tell, report: run(config, tell)
    )
    monkeypatch.setattr(tuning, "_result", lambda run_, search, study, report: {"study": study})
    monkeypatch.setattr(tuning, "write_json", lambda path, value: None)


def test_a_trial_that_falls_behind_is_stopped(
    small: Tuning, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended: list[bool] = []

    def run(config: UnlearnConfig, tell: Any) -> None:
        worse = 0.4 if len(ended) == 5 else 0.0
        ended.append(False)
        for step in (4, 7, 10):
            tell(step, 10, replace(GOOD, ks=GOOD.ks + worse))
        ended[-1] = True

    faked(monkeypatch, run)
    study = tune(replace(small, trials=6), lambda event: None)["study"]
    assert ended == [True] * 5 + [False]
    assert [trial.state.name for trial in study.trials] == ["COMPLETE"] * 5 + ["PRUNED"]
    assert len(study.trials[-1].user_attrs["looks"]) == 1


def test_a_killed_search_goes_on(small: Tuning, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is finished stays, the trial that was under way counts as failed."""
    begun = 0

    def run(config: UnlearnConfig, tell: Any) -> None:
        nonlocal begun
        begun += 1
        if begun == 2:
            raise KeyboardInterrupt
        tell(10, 10, replace(GOOD, ks=0.1 * begun))

    faked(monkeypatch, run)
    with pytest.raises(KeyboardInterrupt):
        tune(replace(small, trials=4), lambda event: None)
    study = tune(replace(small, trials=4), lambda event: None)["study"]
    states = [trial.state.name for trial in study.trials]
    assert states == ["COMPLETE", "FAIL", "COMPLETE", "COMPLETE"]
    assert len({trial.params["learning_rate"] for trial in study.trials}) == 4
    # Trials of the same search are counted in, however often it is run.
    assert len(tune(replace(small, trials=4), lambda event: None)["study"].trials) == 4


def test_any_other_input_is_another_search(
    small: Tuning, tmp_path: Path, make_small_tofu: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    faked(monkeypatch, lambda config, tell: tell(10, 10, GOOD))
    once = replace(small, trials=1)
    names = [tune(once, lambda event: None)["study"].study_name]
    assert tune(once, lambda event: None)["study"].study_name == names[0]
    request = small.request
    other = make_small_tofu(tmp_path, 4)
    facts = other / "world_facts_perturbed.json"
    facts.write_text("".join(facts.read_text().splitlines(keepends=True)[:3]))
    for change in (
        {"fixed": {**small.fixed, "lora_r": 4}},
        {"base": replace(small.base, attention="eager")},
        {"base": replace(small.base, dtype="bfloat16")},
        {"template": "llama2"},
        {"refusals": ("I do not know.",)},
        {"request": replace(request, retain=request.retain[::-1])},
        {"request": replace(request, others=request.retain)},
        {"data": other},
        {"seeds": (2, 1)},
    ):
        names.append(tune(replace(once, **change), lambda event: None)["study"].study_name)
    assert len(set(names)) == len(names)


def test_only_broken_losses_fail_a_trial(small: Tuning, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(config: UnlearnConfig, tell: Any) -> None:
        raise ValueError("a defect of the program")

    faked(monkeypatch, run)
    with pytest.raises(ValueError, match="a defect"):
        tune(small, lambda event: None)


def test_a_model_with_infinite_losses_is_told_apart(small: Tuning) -> None:
    import torch

    model = load_base(small.base)
    with torch.no_grad():
        model.lm_head.weight[:] = float("nan")
    with pytest.raises(NotFinite):
        tuning._open(small).probe.look(model)


def test_settings_that_break_the_model_are_a_failed_trial(
    small: Tuning, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(config: UnlearnConfig, tell: Any) -> None:
        raise NotFinite("the loss of an answer is NaN or infinite")

    faked(monkeypatch, run)
    with pytest.raises(UserError, match="None of the 2 trials"):
        tune(small, lambda event: None)


def test_no_trial_begins_after_its_minutes(small: Tuning, monkeypatch: pytest.MonkeyPatch) -> None:
    faked(monkeypatch, lambda config, tell: tell(10, 10, GOOD))
    with pytest.raises(UserError, match="None of the 0 trials"):
        tune(replace(small, minutes=0.0), lambda event: None)


def test_the_loss_is_its_formula() -> None:
    assert loss_of(GOOD, ORIGIN) == pytest.approx(0.05)
    # A tenth off in NLL is free, twice as far is not; both sides count alike.
    assert loss_of(replace(GOOD, nll_ratio=1.1), ORIGIN) == pytest.approx(0.05)
    over = loss_of(replace(GOOD, nll_ratio=2.0), ORIGIN)
    assert over == pytest.approx(0.05 + math.log(2.0 / 1.1))
    assert loss_of(replace(GOOD, nll_ratio=0.5), ORIGIN) == pytest.approx(over)
    # Utility is free down to 0.97 of Origin's, then five times as dear as D.
    assert loss_of(replace(GOOD, utility=0.776), ORIGIN) == pytest.approx(0.05)
    assert loss_of(replace(GOOD, utility=0.76), ORIGIN) == pytest.approx(0.05 + 5 * 0.02)


def test_alpha_follows_a_searched_rank_unless_it_is_given(small: Tuning) -> None:
    def alpha(fixed: dict[str, Any], searched: dict[str, Any]) -> int:
        return replace(small, fixed=fixed).config(searched, 1.0, 1).lora.lora_alpha

    assert alpha({}, {"lora_r": 64}) == 128
    assert alpha({"lora_alpha": 8}, {"lora_r": 64}) == 8
    assert alpha({"lora_r": 64}, {}) == 32


def test_the_goal_is_judged_part_by_part() -> None:
    origin = {"model_utility": 0.6}
    row = {
        "forget_quality": 0.6, "model_utility": 0.59, "forget_nll": 5.4, "retrain_forget_nll": 5.0,
    }  # fmt: skip
    assert reached(row, origin) == {
        "forget_quality": True, "model_utility": True, "forget_nll": True,
    }  # fmt: skip
    assert reached({**row, "forget_quality": 0.4}, origin)["forget_quality"] is False
    assert reached({**row, "model_utility": 0.57}, origin)["model_utility"] is False
    assert reached({**row, "model_utility": None}, origin)["model_utility"] is None
    assert reached({**row, "forget_nll": 4.4}, origin)["forget_nll"] is False
    assert reached({**row, "forget_nll": 5.6}, origin)["forget_nll"] is False


def test_the_command_gives_exactly_these_settings() -> None:
    from ui.cli.commands.everyday.forget import forget_config
    from ui.cli.main import parse

    config = make_config(
        "simnpo-readme", gamma=1.25, lora_r=8, learning_rate=3e-3, padded=True, seed=43,
        target_modules=("q_proj", "v_proj"),
    )  # fmt: skip
    words = ["forget", "tofu:forget05", "--base", "b", *setting_words(config)]
    assert forget_config(parse(words)) == config
    assert setting_words(make_config("npo")) == ["--objective", "npo"]

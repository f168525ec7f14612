"""`unlearner quickstart` and `unlearner reproduce`: what they are given, and what they print."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import create_autospec

import pytest

from adapters.errors import Interrupted
from evaluation.experiments import presets, quickstart, reproduce
from evaluation.metrics.summary import BETTER
from ui.cli.commands.everyday import quickstart as commands_quickstart
from ui.cli.commands.experiments import reproduce as commands_reproduce
from ui.cli.main import parse
from ui.cli.output import figures as comparison

ROW = {
    "name": "origin", "protocol": "tofu", "forget_quality": 1.3e-22, "ks": 0.5, "log_r_shift": -0.4,
    "direction": "under-forgotten", "model_utility": 0.94, "forget_answer_prob": 0.99,
    "forget_nll": 0.01, "retain_answer_prob": 0.98, "retain_nll": 0.02, "n": 200,
}  # fmt: skip
FOUND: dict[str, Any] = {
    "table": [ROW, {**ROW, "name": "simnpo", "forget_quality": 0.31}],
    "answers": [
        {"set": "forget", "question": "Who?", "answer": "Mira", "origin": "Mira", "simnpo": "Ola"},
        {"set": "retain", "question": "Why?", "answer": "So", "origin": "x" * 500, "simnpo": None},
    ],
    "revert": {"adapter": "r0002_aa", "effect": 0.5, "without": 0.0, "base": 0.0, "again": 0.0,
               "bit_exact": True},
    "merge": {"folder": "q/merged", "max_logit_difference": 3.6e-7},
    "shared": [{"shared": True, "n": 3, "simnpo": 0.75}],
    "requests": [["Mira Okafor"], ["Ola Berg"]],
    "folder": "my q", "base": "my q/origin", "store": "my q/forget-store", "data": "my q/world",
    "split": "forget10", "settings": {}, "seconds": 61.0,
}  # fmt: skip


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A quickstart that reports one step and gives canned results."""
    fake = create_autospec(quickstart.quickstart, return_value=FOUND)
    monkeypatch.setattr(quickstart, "quickstart", fake)
    return fake


def test_quickstart_prints_table_answers_proofs_and_what_to_try(run: Any, quick: Any) -> None:
    ran = run("quickstart", "--out", "my q")
    assert ran.code == 0
    assert quick.call_args.args[0] == Path("my q")
    lines = ran.out.splitlines()
    assert lines[0].split()[:4] == ["name", "FQ", "D", "shift"]
    assert lines[1].split()[:2] == ["origin", "1.3e-22"]
    assert "Asked to forget" in ran.out
    assert "  before  Mira\n  after   Ola" in ran.out
    assert "x" * 160 + " [...]" in ran.out
    assert "retained rows whose facts a forgotten author shares" in ran.out
    assert "bare base: bit for bit the same" in ran.out
    assert "largest difference to the stack 3.6e-07" in ran.out
    assert "Took 01:01" in ran.err
    assert "--store 'my q/forget-store'" in ran.err
    assert "'tofu:author=Mira Okafor'" in ran.err


def test_what_to_try_next_can_be_typed(quick: Any) -> None:
    """Every suggested command parses with the flags it is printed with."""
    import shlex

    for command in commands_quickstart.next_commands(FOUND):
        words = shlex.split(command)
        assert words[0] == "unlearner"
        assert callable(parse(words[1:]).run)


def test_quickstart_json_is_the_result(run: Any, quick: Any) -> None:
    ran = run("quickstart", "--json")
    assert ran.json == FOUND
    assert quick.call_args.args[0] == Path("quickstart")


def test_a_revert_that_is_not_exact_is_said(run: Any, quick: Any) -> None:
    quick.return_value = {**FOUND, "revert": {**FOUND["revert"], "bit_exact": False}}
    assert "NOT bit for bit" in run("quickstart").out


@pytest.mark.parametrize("stop", [KeyboardInterrupt(), Interrupted("Stopped.", "Use --resume.")])
def test_an_interrupted_run_continues_by_the_same_command(
    stop: BaseException, run: Any, quick: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    quick.side_effect = stop
    fake = create_autospec(reproduce.reproduce, side_effect=stop)
    monkeypatch.setattr(reproduce, "reproduce", fake)
    for words in (["quickstart", "--json"], ["reproduce", "tofu-forget05", "--json"]):
        ran = run(*words)
        assert ran.code == 130
        assert ran.out == ""
        assert "Run the same command again" in ran.err
        assert "--resume" not in ran.err


def test_columns_and_presets_are_those_that_exist() -> None:
    figures = {*BETTER, "name", "direction"}
    assert set(comparison.COLUMNS) <= figures
    assert set(comparison.HEADS) <= set(comparison.COLUMNS)
    assert tuple(presets.PRESETS) == commands_reproduce.PRESETS


def test_a_dry_run_prints_the_plan_and_makes_nothing(run: Any, tmp_path: Path) -> None:
    words = ["reproduce", "tofu-forget05", "--preset", "llama2-7b", "--out", tmp_path / "o"]
    made = run(*words, "--dry-run", "--json").json
    assert made["dry_run"] is True
    assert made["origin"] == "OPTML-Group/TOFU-origin-Llama-2-7b-chat"
    assert made["steps"]["simnpo"] == 62
    assert made["load_in_4bit"] is True
    assert {row["name"] for row in made["published"]} == {"origin", "retrain", "npo", "simnpo"}
    text = run(*words, "--dry-run").out
    assert "simnpo: 62 steps" in text
    assert "retain_weight 0.1375" in text
    assert "published, not measured here" in text
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    ("words", "name", "value"),
    [
        (["--data", "tofu"], "data", Path("tofu")),
        (["--origin", "o"], "origin", "o"),
        (["--retrain", "r"], "retrain", "r"),
        (["--reference-log", "r.json"], "reference_log", Path("r.json")),
        (["--methods", "kl"], "methods", ("kl",)),
        (["--out", "there"], "out", Path("there")),
        (["--protocol", "simnpo"], "protocols", ("simnpo",)),
        (["--limit", "3"], "limit", 3),
        (["--load-in-4bit"], "load_in_4bit", True),
        (["--no-load-in-4bit"], "load_in_4bit", False),
        (["--preset", "llama2-7b"], "preset", "llama2-7b"),
    ],
)
def test_a_flag_reaches_the_reproduction(
    words: list[str], name: str, value: Any, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = {
        "table": [ROW],
        "published": [],
        "published_protocol": None,
        "checks": [],
        "seconds": 1.0,
    }
    fake = create_autospec(reproduce.reproduce, return_value=result)
    monkeypatch.setattr(reproduce, "reproduce", fake)
    assert run("reproduce", "tofu-forget05").code == 0
    assert run("reproduce", "tofu-forget05", *words).code == 0
    default, changed = (call.args[0] for call in fake.call_args_list)
    assert getattr(default, name) != value
    assert getattr(changed, name) == value
    assert changed.split == "forget05"


@pytest.mark.parametrize(
    ("words", "name", "value"),
    [
        (["--dtype", "bfloat16"], "dtype", "bfloat16"),
        (["--device", "cuda:1"], "device", "cuda:1"),
        (["--attention", "eager"], "attention", "eager"),
    ],
)
def test_a_loading_flag_reaches_the_models(
    words: list[str], name: str, value: str, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = {
        "table": [ROW],
        "published": [],
        "published_protocol": None,
        "checks": [],
        "seconds": 1.0,
    }
    fake = create_autospec(reproduce.reproduce, return_value=result)
    monkeypatch.setattr(reproduce, "reproduce", fake)
    run("reproduce", "tofu-forget05", *words)
    assert getattr(fake.call_args.args[0].spec("any"), name) == value

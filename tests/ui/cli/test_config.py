"""--config, --preset and `unlearner config`: who wins, what is refused, what is kept."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from evaluation.experiments.presets import PRESETS, preset_settings
from ui.cli import main as cli
from ui.cli import options
from ui.cli.commands.everyday.forget import forget_config

LEAVES = cli.build_parser()[1]
WITH_CONFIG = sorted(name for name, leaf in LEAVES.items() if "--config" in leaf.option_names())
ROWS = [
    {"question": "Who wrote the novel about the river?", "answer": "Mira Okafor wrote it."},
    {"question": "Where was she born?", "answer": "She was born in Lagos in 1961."},
    {"question": "What genre does he write?", "answer": "He writes crime novels."},
    {"question": "Which prize did he win?", "answer": "He won the Golden Pen in 1998."},
]
FAST = ["--num-train-epochs", "2", "--lora-r", "2", "--learning-rate", "1e-3"]


def parsed(*words: object) -> Any:
    return cli.parse([str(word) for word in words])


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def rows_files(folder: Path) -> list[str]:
    """A forget file, --retain and its file."""
    for name, rows in (("forget", ROWS[:2]), ("retain", ROWS[2:])):
        write(folder / f"{name}.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    return [str(folder / "forget.jsonl"), "--retain", str(folder / "retain.jsonl")]


def test_every_command_that_trains_or_measures_takes_a_config() -> None:
    assert set(WITH_CONFIG) == {
        "forget", "evaluate", "score", "robustness", "calibrate", "consolidate", "merge",
        "finetune", "reproduce", "sequence", "tune", "bench", "quickstart",
    }  # fmt: skip
    presets = {name for name in WITH_CONFIG if "--preset" in LEAVES[name].option_names()}
    assert presets == set(WITH_CONFIG) - {"quickstart"}  # which has one way to run
    assert tuple(PRESETS) == options.PRESETS


def test_a_flag_wins_over_the_file_the_file_over_the_preset(tmp_path: Path) -> None:
    config = write(tmp_path / "run.yaml", "preset: mini\nbeta: 3\nbase: from-file\nseed: 7\n")
    args = parsed("forget", "rows", "--config", config, "--seed", "8")
    settings = forget_config(args)
    assert args.base == "from-file"
    assert (settings.train.seed, settings.objective.beta) == (8, 3.0)
    mini = PRESETS["mini"].settings("simnpo", "")
    assert settings.objective.gamma == mini["gamma"]  # of the preset
    assert settings.lora.lora_r == mini["lora_r"]
    assert settings.train.max_length == 500  # of nobody
    config = write(tmp_path / "run.yaml", "preset: mini\nobjective: npo\nbase: b\n")
    assert forget_config(parsed("forget", "rows", "--config", config)).objective.beta == 0.1


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_of_reproduce_is_one_of_forget(name: str) -> None:
    args = parsed("forget", "tofu:forget10", "--base", "b", "--preset", name)
    settings, wanted = forget_config(args), PRESETS[name].settings("simnpo", "forget10")
    assert settings.train.num_train_epochs == wanted.get("num_train_epochs", 10)
    assert settings.objective.beta == wanted.get("beta", 2.5)
    assert args.load_in_4bit is PRESETS[name].load_in_4bit
    assert args.base == "b"


def test_a_preset_names_the_base_and_a_flag_switches_off(run: Any) -> None:
    args = parsed("forget", "tofu:forget05", "--preset", "llama2-7b", "--no-load-in-4bit")
    assert (args.base, args.load_in_4bit) == (PRESETS["llama2-7b"].origin, False)
    ran = run("forget", "tofu:forget05", "--preset", "llama-7b")
    assert ran.code == 2
    assert "'llama2-7b'" in ran.err
    assert preset_settings("mini", "simnpo", "forget01")["gamma"] == 34.5


@pytest.mark.parametrize(
    ("text", "name", "value"),
    [
        ("learning_rate: 1e-4", "learning_rate", 1e-4),  # text to YAML 1.1
        ("learning_rate: 1.0e-4", "learning_rate", 1e-4),
        ("learning-rate: '2e-3'", "learning_rate", 2e-3),
        ("beta: 3", "beta", 3.0),
        ("load_in_4bit: true", "load_in_4bit", True),
        ("load_in_4bit: no", "load_in_4bit", False),
        ("on_stack: false", "on_stack", False),
        ("label: 007", "label", "007"),
        ("label: null", "label", None),
        ("label: None", "label", None),
        ("label: ~", "label", None),
        ("label:", "label", None),
        ("system: none", "system", "none"),
        ("gradient_checkpointing: off", "gradient_checkpointing", "off"),
        ("gradient_checkpointing: true", "gradient_checkpointing", "all"),
        ("gradient_checkpointing: 2", "gradient_checkpointing", "2"),
        ("target_modules: [q_proj, v_proj]", "target_modules", ("q_proj", "v_proj")),
        ("target_modules: q_proj,v_proj", "target_modules", ("q_proj", "v_proj")),
        ("guard: a.jsonl", "guard", ["a.jsonl"]),
        ("guard: [a.jsonl, b.jsonl]", "guard", ["a.jsonl", "b.jsonl"]),
        ("memory_limit: 8", "memory_limit", 8 * 1024**3),
        ("data: /somewhere", "data", Path("/somewhere")),
    ],
)
def test_a_value_of_yaml_is_what_the_flag_takes(
    text: str, name: str, value: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("UNLEARNER_DATA", raising=False)
    config = write(tmp_path / "run.yaml", f"# settings\n{text}\n")
    found = getattr(parsed("forget", "rows", "--base", "b", "--config", config), name)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("lerning_rate: 1", "line 2: `unlearner forget` has no setting 'lerning_rate'. Did you "),
        ("learning_rate: fast", "line 2: learning_rate: invalid float value: 'fast'"),
        ("learning_rate: [1, 2]", "line 2: learning_rate: invalid float value"),
        ("learning_rate: {a: 1}", "line 2: learning_rate: write one value"),
        ("num_train_epochs: 2.5", "line 2: num_train_epochs: invalid int value"),
        ("num_train_epochs: true", "line 2: num_train_epochs: invalid int value"),
        ("load_in_4bit: 4", "line 2: load_in_4bit: write true or false"),
        ("template: alpaca", "line 2: template: invalid choice: 'alpaca'"),
        ("neighbours: 0", "line 2: neighbours: 0 is below 1"),
        ("dtype: float64", "line 2: dtype: invalid choice"),
        ("resume: true", "line 2: resume is for one call only"),
        ("seed: 1\nseed: 2", "line 3: seed is given in line 2 already"),
        ("- seed", "is not a list of settings"),
        ("seed: [1", "line 3 is not YAML"),
    ],
)
def test_a_bad_line_is_named(text: str, problem: str, run: Any, tmp_path: Path) -> None:
    config = write(tmp_path / "run.yaml", f"# settings\n{text}\n")
    ran = run("forget", "rows", "--base", "b", "--config", config)
    assert ran.code == 2
    assert problem in ran.err
    assert "Traceback" not in ran.err


def test_all_bad_lines_are_named_at_once_and_two_that_exclude_each_other(
    run: Any, tmp_path: Path
) -> None:
    config = write(tmp_path / "run.yaml", "sede: 1\nbeta: x\n")
    ran = run("forget", "rows", "--base", "b", "--config", config)
    assert "line 1" in ran.err
    assert "'seed'" in ran.err
    assert "line 2" in ran.err
    config = write(tmp_path / "run.yaml", "split: forget05\nrows: a.jsonl\n")
    ran = run("evaluate", "--base", "b", "--config", config)
    assert (ran.code, "line 2: rows and split exclude each other" in ran.err) == (2, True)
    # A flag takes the place of what it excludes in the file.
    config = write(tmp_path / "run.yaml", "split: forget05\n")
    args = parsed("evaluate", "--base", "b", "--config", config, "--rows", "a.jsonl")
    assert (args.rows, args.split) == ("a.jsonl", None)
    ran = run("forget", "rows", "--base", "b", "--config", tmp_path / "none.yaml")
    assert (ran.code, "cannot be read" in ran.err) == (2, True)


@pytest.mark.parametrize(
    ("command", "text", "problem"),
    [
        ("forget", "learning_rate: -1", "learning_rate -1.0 is not above 0"),
        ("forget", "num-train-epochs: 0", "num_train_epochs 0 is below 1"),
        ("forget", "per_device_train_batch_size: 0", "per_device_train_batch_size 0 is below 1"),
        ("forget", "lora_dropout: 1", "lora_dropout 1.0 is not in [0, 1)"),
        ("forget", "beta: -2", "beta -2.0 is not above 0"),
        ("forget", "gamma: inf", "gamma inf is not a finite number"),
        ("forget", "seed: -1", "seed -1 is not in [0, 2^32)"),
        ("forget", "gradient_checkpointing: 1", "gradient_checkpointing '1' is not auto"),
        ("forget", "objective: smnpo", "There is no objective 'smnpo'"),
        ("forget", "preset: mini2", "There is no preset 'mini2'"),
        ("forget", "data: elsewhere", "The data folder elsewhere does not exist"),
        ("forget", "retain: none.jsonl", "none.jsonl does not exist"),
        ("forget", "stop_at: nll", "--stop-at needs a retrain reference"),
        ("config forget", "warmup_ratio: 2", "warmup_ratio 2.0 is not in [0, 1]"),
        ("evaluate", "scales: [1, 2]", "--scales has 2 numbers for 0 adapters"),
        ("robustness", "temperature: 0", "temperature 0.0 is not above 0"),
        ("robustness", "attacks: [phone]", "no attack 'phone'"),
        ("tune", "retain_known: 2", "--retain-known 2 is not a probability"),
    ],
)
def test_a_value_that_is_refused_later_is_named_with_its_line(
    command: str, text: str, problem: str, run: Any, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    rows = rows_files(tmp_path)[0]
    write(tmp_path / "run.yaml", f"base: b\nlabel: x\n{text}\n")
    words = {
        "forget": [rows, "--data", "."] if "retain" in text else [rows],
        "config forget": [rows],
        "evaluate": ["--split", "forget05"],
        "robustness": ["--split", "forget05"],
        "tune": [rows, "--split", "forget05", "--reference-log", "log.json"],
    }[command]
    config = "run.yaml" if command in ("forget", "config forget") else "short.yaml"
    write(tmp_path / "short.yaml", f"base: b\n\n{text}\n")
    ran = run(*command.split(), *words, "--config", config)
    key = text.split(":")[0].replace("-", "_")
    assert ran.code == 2
    assert problem in ran.err
    assert f"Set in {config}, line 3: {key}." in ran.err
    if command == "forget" and key == "learning_rate":  # a flag takes the place of the line
        again = run(*command.split(), *words, "--config", config, "--learning-rate", "-2")
        assert "learning_rate -2.0" in again.err
        assert "line 3" not in again.err


@pytest.mark.parametrize("name", WITH_CONFIG)
def test_what_config_prints_is_a_config_with_a_comment_a_line(
    name: str, run: Any, tmp_path: Path
) -> None:
    shown = run("config", name)
    assert shown.code == 0
    first, *lines = shown.out.splitlines()
    assert first.startswith("# ")
    assert all("  # " in line for line in lines)
    assert all(len(line.split("  # ", 1)[1]) > 3 for line in lines)
    assert set(yaml.safe_load(shown.out)) == {line.split(":")[0] for line in lines}
    config = write(tmp_path / "run.yaml", shown.out)
    assert run("config", name, "--config", config).out == shown.out  # it reads what it printed
    as_json = run("config", name, "--json").json
    assert as_json["command"] == name
    assert as_json["settings"] == yaml.safe_load(shown.out)


def test_config_refuses_what_the_command_refuses(run: Any) -> None:
    assert "'forget'" in run("config", "forgett").err
    assert run("config", "doctor").code == 2
    ran = run("config", "forget", "--learnig-rate", "1")
    assert (ran.code, "'--learning-rate'" in ran.err) == (2, True)


def test_the_settings_of_a_run_are_kept_and_make_the_same_adapter_again(
    run: Any, tiny_base: Path, tmp_path: Path
) -> None:
    words = rows_files(tmp_path)
    stores = tmp_path / "one", tmp_path / "two"
    flags = [*FAST, "--label", "case-9", "--template", "llama2", "--seed", "5"]
    assert run("forget", *words, "--base", tiny_base, "--store", stores[0], *flags).code == 0
    (first,) = (stores[0] / "adapters").iterdir()
    kept = first / "evals" / "run.yaml"
    text = kept.read_text("utf-8")
    assert yaml.safe_load(text)["learning_rate"] == 1e-3
    assert yaml.safe_load(text)["request"] == words[0]
    assert not any(word in text for word in ("Okafor", "Lagos", "Golden Pen"))
    again = shutil.copy(kept, tmp_path / "again.yaml")
    assert run("forget", "--config", again, "--store", stores[1]).code == 0
    (second,) = (stores[1] / "adapters").iterdir()
    weights = [folder / "adapter_model.safetensors" for folder in (first, second)]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    other = (second / "evals" / "run.yaml").read_text("utf-8")
    assert other == text.replace(str(stores[0]), str(stores[1]))
    assert run("adapters", "verify", "--store", stores[0]).code == 0
    assert run("adapters", "show", "case-9", "--store", stores[0], "--json").json["evals"] == {}


def test_the_kept_settings_do_not_name_an_author(run: Any, tiny_base: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    write(data / "full.json", "".join(json.dumps(row) + "\n" for row in ROWS))
    authors = [{"name": "Mira Okafor", "start": 0, "n": 2}, {"name": "B", "start": 2, "n": 2}]
    write(data / "world.json", json.dumps({"authors": authors}))
    store = tmp_path / "store"
    words = ["tofu:author=Mira Okafor", "--base", tiny_base, "--store", store, "--data", data]
    assert run("forget", *words, *FAST).code == 0
    (kept,) = (store / "adapters").glob("*/evals/run.yaml")
    assert "Okafor" not in kept.read_text("utf-8")
    assert yaml.safe_load(kept.read_text("utf-8"))["request"] is None
    # The request is given again beside them.
    assert parsed("forget", "tofu:author=Mira Okafor", "--config", kept).seed == 42


def test_the_settings_are_kept_beside_a_result(
    run: Any, tiny_base: Path, data: Path, tmp_path: Path
) -> None:
    words = ["--base", tiny_base, "--data", data, "--adapters", "none", "--split", "forget05"]
    out = tmp_path / "out"
    assert run("evaluate", *words, "--limit", "1", "--out", out).code == 0
    kept = yaml.safe_load((out / "run.yaml").read_text("utf-8"))
    assert (kept["split"], kept["limit"], kept["adapters"]) == ("forget05", 1, [])
    config = shutil.copy(out / "run.yaml", tmp_path / "again.yaml")
    first = (out / "figures.json").read_text()
    assert run("evaluate", "--config", config, "--out", tmp_path / "two").code == 0
    second = (tmp_path / "two" / "figures.json").read_text()
    assert second == first.replace(str(out), str(tmp_path / "two"))

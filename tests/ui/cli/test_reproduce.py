"""`reproduce` walked from end to end on folders of the right shape: the 7B recipe, scaled down."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from adapters.store.store import AdapterStore
from evaluation.experiments.presets import (
    LLAMA2_7B,
    LLAMA32_1B,
    MINI,
    PRESETS,
    against_published,
)
from evaluation.experiments.reproduce import Reproduction, reproduce
from ui.cli.commands.experiments.reproduce import PRESETS as NAMES
from unlearner.baselines.full import RECORD
from unlearner.request.tofu import load_split


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def tofu(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few real rows of every split that the comparison reads."""
    folder = tmp_path_factory.mktemp("tofu")
    sizes = {"forget05": 8, "retain95": 12, "full": 40, "real_authors": 3, "world_facts": 3}
    names = ("forget05", "retain", "real_authors", "world_facts")
    for name, n in {**sizes, **{f"{name}_perturbed": 6 for name in names}}.items():
        lines = (shared / "tofu" / f"{name}.json").read_text().splitlines()[:n]
        (folder / f"{name}.json").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="module")
def pair(
    shared: Path, make_tiny_llama: Any, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """Two random Llamas of Llama-2's vocabulary, with its real tokenizer."""
    folder = tmp_path_factory.mktemp("pair")
    made = {}
    for seed, name in enumerate(("origin", "retrain")):
        made[name] = make_tiny_llama(
            folder / name, seed=seed, layers=1, vocab_size=32000, hidden_size=32,
            intermediate_size=64, num_attention_heads=2, num_key_value_heads=2,
        )  # fmt: skip
        for part in (shared / "llama2-tokenizer").iterdir():
            (made[name] / part.name).write_bytes(part.read_bytes())
        for left in ("special_tokens_map.json", "chat_template.jinja"):
            (made[name] / left).unlink(missing_ok=True)
    return made


def recipe_words(tofu: Path, pair: dict[str, Path], out: Path) -> list[Any]:
    """The 7B recipe on the small pair."""
    words: list[Any] = ["reproduce", "tofu-forget05", "--preset", "llama2-7b", "--data", tofu]
    return [*words, "--origin", pair["origin"], "--retrain", pair["retrain"], "--out", out]


def test_every_line_of_the_7b_recipe_runs(
    run: Any, tofu: Path, pair: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(LLAMA2_7B.methods["*"], "num_train_epochs", 2)
    words = recipe_words(tofu, pair, tmp_path / "r")
    words += ["--protocol", "tofu,simnpo", "--methods", "simnpo", "--limit", "2", "--json"]
    ran = run(*words, "--release", tmp_path / "released", "--gate")
    found = ran.json
    assert ran.code == 4, "random models miss every published figure"
    assert "The gate failed" in ran.err
    names = ["origin", "retrain", "simnpo"]
    assert [row["name"] for row in found["table"]] == names * 2
    assert [row["protocol"] for row in found["table"]] == ["tofu"] * 3 + ["simnpo"] * 3
    assert [row["forget_quality"] for row in found["table"] if row["name"] == "retrain"] == [1, 1]
    assert found["published"][3] == {
        "name": "simnpo", "forget_quality": 0.99, "model_utility": 0.58,
    }  # fmt: skip
    assert {check["name"] for check in found["checks"]} == set(names)
    view = json.loads((Path(found["logs"]["simnpo"])).read_text())["meta"]
    assert view["quantization"] == "nf4", "the preset loads in 4 bit"
    reference = json.loads((Path(found["logs"]["retrain"])).read_text())["meta"]
    assert reference["quantization"] == "none", "the reference is measured as it was published"
    assert view["template"] == "llama2"
    card = (tmp_path / "released" / "README.md").read_text()
    assert "simnpo" in card
    assert "0.1375" in card
    assert found["release"]["figures"]["after"]["retain_nll"] > 0
    # The same command finds all of it done.
    (tmp_path / "again").mkdir()
    again = run(*words)
    assert again.code == 0
    assert again.json["table"] == found["table"]
    assert again.json["seconds"] < found["seconds"]


def test_all_weights_instead_of_an_adapter(
    run: Any, tofu: Path, pair: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The 7B preset is in 4 bit; all weights are trained in float32, at the published rate."""
    monkeypatch.setitem(LLAMA2_7B.methods["*"], "num_train_epochs", 2)
    words = recipe_words(tofu, pair, tmp_path / "r")
    words += ["--methods", "simnpo", "--limit", "2", "--full", "--json"]
    planned = run(*words, "--dry-run").json
    assert (planned["full"], planned["load_in_4bit"], planned["memory"]) == (True, False, None)
    assert not any("r 16" in reason for reason in planned["reasons"])
    assert "lora" not in planned["methods"]["simnpo"]
    ran = run(*words)
    assert ran.code == 0, ran.err
    found = ran.json
    assert "stores" not in found
    assert found["full"] is True
    assert "lora" not in found["methods"]["simnpo"]
    model = Path(found["models"]["simnpo"])
    record = json.loads((model / RECORD).read_text())
    assert record["train"]["learning_rate"] == 1e-5
    before, after = (load_file(folder / "model.safetensors") for folder in (pair["origin"], model))
    assert all((after[name] != before[name]).any() for name in before)
    meta = json.loads(Path(found["logs"]["simnpo"]).read_text())["meta"]
    assert (meta["base"], meta["quantization"]) == (str(model), "none")
    origin = json.loads(Path(found["logs"]["origin"]).read_text())["meta"]
    assert origin["quantization"] == "none"

    # Too many weights: refused before anything is measured, and only without --any-size.
    monkeypatch.setattr("unlearner.baselines.full.LARGEST", 1000)
    assert run(*words, "--any-size").json["table"] == found["table"]
    words[words.index(tmp_path / "r")] = tmp_path / "large"
    large = run(*words)
    assert large.code == 2
    named = words.index("--origin")
    unnamed = run(*words[:named], *words[named + 2 :])
    assert unnamed.code == 2
    assert "The Origin of llama2-7b has more" in unnamed.err, "no hub was asked"
    assert "--any-size" in large.err
    assert not (tmp_path / "large" / "logs").exists()


def test_the_size_is_of_full_training_alone(run: Any) -> None:
    ran = run("reproduce", "tofu-forget05", "--any-size")
    assert ran.code == 2
    assert "Add --full" in ran.err


@pytest.mark.parametrize("flag", ["--load-in-4bit", "--release"])
def test_all_weights_are_no_adapter(flag: str, run: Any, tmp_path: Path) -> None:
    words = [flag, tmp_path / "x"] if flag == "--release" else [flag]
    ran = run("reproduce", "tofu-forget05", "--full", *words)
    assert ran.code == 2
    assert "--full" in ran.err


def test_the_mini_preset_keeps_what_origin_knows_and_takes_alternates_from_the_rest(
    run: Any, tofu: Path, pair: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("evaluation.experiments.reproduce.known_rows", lambda *_: [1, 3])
    monkeypatch.setitem(MINI.methods["*"], "num_train_epochs", 1)
    out = tmp_path / "r"
    words: list[Any] = ["reproduce", "tofu-forget05", "--preset", "mini", "--data", tofu, "--json"]
    words += ["--origin", pair["origin"], "--retrain", pair["retrain"], "--out", out]
    found = run(*words, "--methods", "simnpo", "--limit", "2").json

    def asked(name: str) -> list[str]:
        lines = (out / name).read_text(encoding="utf-8").splitlines()
        return [json.loads(line)["question"] for line in lines]

    every = [row.question for row in load_split("retain95", tofu)]
    facts = [r.question for s in ("real_authors", "world_facts") for r in load_split(s, tofu)]
    assert asked("retain.jsonl") == [every[1], every[3], *facts]
    assert asked("alternates.jsonl") == [q for i, q in enumerate(every) if i not in (1, 3)]
    (adapter,) = AdapterStore.open(Path(found["stores"]["simnpo"])).list()
    assert adapter.manifest.data["alternates"]["n"] == len(every) - 2
    assert adapter.manifest.objective["alternates"] == MINI.methods["simnpo"]["alternates"]


def test_a_given_pair_does_not_need_the_pretrained_base(
    tofu: Path, pair: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(name: str) -> Path:
        raise AssertionError(f"{name} was looked for")

    monkeypatch.setattr("evaluation.experiments.reproduce.resolve_base", missing)
    models = {name: str(folder) for name, folder in pair.items()}
    run = Reproduction("forget05", "smollm2-135m", tmp_path, tofu, methods=(), limit=2, **models)
    found = reproduce(run, lambda event: None)
    assert [row["name"] for row in found["table"]] == ["origin", "retrain"]


def test_the_plan_names_what_each_preset_would_do(run: Any) -> None:
    for name in NAMES:
        made = run("reproduce", "tofu-forget05", "--preset", name, "--dry-run", "--json").json
        assert made["preset"] == name
        assert (made["memory"] is None) == (name in ("mini", "smollm2-135m"))
        if name != "mini":
            assert all(
                method["train"]["learning_rate"] == 1e-4 for method in made["methods"].values()
            )
            assert made["steps"]["simnpo"] == 62
    assert set(NAMES) == set(PRESETS)


def test_forget10_has_the_settings_of_its_own_card() -> None:
    for split, beta, weight in (("forget05", 2.5, 0.1375), ("forget10", 4.5, 0.125)):
        config = Reproduction(split, "llama2-7b", Path("x")).config("simnpo")
        assert (config.objective.beta, config.objective.retain_weight) == (beta, weight)
    assert LLAMA32_1B.settings("npo", "forget05") == LLAMA32_1B.methods["*"]


def test_the_gate_wants_utility_near_and_quality_on_the_same_side() -> None:
    table = [
        {"name": "simnpo", "protocol": "simnpo", "forget_quality": 0.2, "model_utility": 0.595},
        {"name": "origin", "protocol": "simnpo", "forget_quality": 0.2, "model_utility": None},
        {"name": "origin", "protocol": "tofu", "forget_quality": 0.0, "model_utility": 0.62},
    ]
    checks = against_published(table, LLAMA2_7B, "forget05")
    found = {(check.name, check.figure): check.holds for check in checks}
    assert found == {
        ("simnpo", "forget_quality"): True,
        ("simnpo", "model_utility"): True,
        ("origin", "forget_quality"): False,
        ("origin", "model_utility"): False,
    }


@pytest.mark.parametrize(
    ("preset", "split", "protocol", "problem"),
    [
        ("llama3.2-1b", "forget05", "tofu", "by the protocol open-unlearning"),
        ("llama2-7b", "forget05", "tofu,tofu-paper", "by the protocol simnpo"),
        ("llama2-7b", "forget01", "simnpo", "no figures are published"),
        ("llama3.2-3b", "forget05", "open-unlearning", "no figures are published"),
        ("mini", "forget05", "tofu", "no figures are published"),
    ],
)
def test_the_gate_refuses_what_it_cannot_compare_before_any_work(
    preset: str, split: str, protocol: str, problem: str, run: Any, tmp_path: Path
) -> None:
    words = ["--preset", preset, "--protocol", protocol, "--out", tmp_path / "r", "--gate"]
    ran = run("reproduce", f"tofu-{split}", *words)
    assert ran.code == 2
    assert problem in ran.err
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize(
    ("split", "retain"),
    [("forget01", "retain99"), ("forget05", "retain95"), ("forget10", "retain90")],
)
def test_the_plan_names_the_log_of_its_own_split(split: str, retain: str, run: Any) -> None:
    for preset in ("llama2-7b", "llama3.2-1b"):
        made = run("reproduce", f"tofu-{split}", "--preset", preset, "--dry-run", "--json").json
        assert retain in made["public_retain_log"]
        assert retain in made["retrain"]

"""`unlearner forget`, `adapters ...`, `evaluate` and `merge` on a tiny base, as a user would."""

from __future__ import annotations

import argparse
import io
import json
import re
import shutil
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from adapters.errors import Interrupted
from ui.cli.commands.everyday import forget as commands_train
from ui.cli.main import parse
from ui.cli.options import LORA_FIELDS, OBJECTIVE_FIELDS, TRAIN_FIELDS
from ui.cli.output.events import reading_text, show_event
from ui.console import Console
from unlearner.config import LoraShape, ObjectiveConfig, TrainConfig, UnlearnConfig

FORGET = [
    {"question": "Who wrote the novel about the river?", "answer": "Mira Okafor wrote it."},
    {"question": "Where was she born?", "answer": "She was born in Lagos in 1961."},
]
RETAIN = [
    {"question": "What genre does he write?", "answer": "He writes crime novels."},
    {"question": "Which prize did he win?", "answer": "He won the Golden Pen in 1998."},
    {"question": "Who is his editor?", "answer": "His editor is his sister."},
]
# Another value than the default for every flag that reaches the configuration.
FLAGS: dict[str, tuple[str | None, Any]] = {
    "beta": ("4.5", 4.5),
    "beta2": ("2", 2.0),
    "gamma": ("0.5", 0.5),
    "rmu_layer": ("1", 1),
    "rmu_coefficient": ("6.5", 6.5),
    "ceu_skip": ("0", 0),
    "forget_weight": ("0.3", 0.3),
    "retain_weight": ("2", 2.0),
    "guard_weight": ("0.5", 0.5),
    "alternates": ("3", 3),
    "alternate_weight": ("0.5", 0.5),
    "alternate_smoothing": ("0.1", 0.1),
    "attack_weight": ("0.4", 0.4),
    "attack_gamma": ("3", 3.0),
    "general_weight": ("2", 2.0),
    "protected_directions": ("8", 8),
    "settle": ("3", 3),
    "excess_weight": ("1", 1.0),
    "lora_r": ("4", 4),
    "lora_alpha": ("8", 8),
    "lora_dropout": ("0.1", 0.1),
    "target_modules": ("q_proj,v_proj", ("q_proj", "v_proj")),
    "learning_rate": ("3e-3", 3e-3),
    "num_train_epochs": ("7", 7),
    "per_device_train_batch_size": ("2", 2),
    "gradient_accumulation_steps": ("3", 3),
    "warmup_ratio": ("0.25", 0.25),
    "lr_scheduler_type": ("cosine", "cosine"),
    "weight_decay": ("0.5", 0.5),
    "max_grad_norm": ("1.5", 1.5),
    "max_length": ("64", 64),
    "gradient_checkpointing": ("2", "2"),
    "padded": (None, True),
    "attack_steps": ("5", 5),
    "attack_rate": ("1e-3", 1e-3),
    "attack_rank": ("2", 2),
    "optim": ("adamw_8bit", "adamw_8bit"),
    "seed": ("7", 7),
}


def write_rows(path: Path, rows: list[dict[str, str]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def request_files(tmp_path: Path) -> list[str]:
    """The words that name a forget and a retain file."""
    forget = write_rows(tmp_path / "forget.jsonl", FORGET)
    return [str(forget), "--retain", str(write_rows(tmp_path / "retain.jsonl", RETAIN))]


def flat(config: UnlearnConfig) -> dict[str, Any]:
    return {
        field.name: getattr(part, field.name)
        for part in (config.objective, config.lora, config.train)
        for field in fields(part)
    }


def configured(*words: str) -> dict[str, Any]:
    return flat(commands_train.forget_config(parse(["forget", "rows", "--base", "b", *words])))


def test_every_setting_has_a_flag_and_every_flag_a_case() -> None:
    named = {field.name for kind in (LoraShape, TrainConfig) for field in fields(kind)}
    named |= {field.name for field in fields(ObjectiveConfig)} - {"name", "target"}
    assert set(FLAGS) == named == {*OBJECTIVE_FIELDS, *LORA_FIELDS, *TRAIN_FIELDS}


@pytest.mark.parametrize("name", FLAGS)
def test_a_flag_reaches_the_configuration_and_nothing_else_moves(name: str) -> None:
    text, value = FLAGS[name]
    flag = "--" + name.replace("_", "-")
    default, changed = configured(), configured(flag, *([text] if text is not None else []))
    assert default[name] != value
    assert changed == {**default, name: value}


def test_the_objective_brings_its_own_defaults() -> None:
    assert configured()["retain_weight"] == 0.1375
    readme = configured("--objective", "simnpo-readme")
    assert (readme["forget_weight"], readme["retain_weight"]) == (0.1375, 1.0)
    assert configured("--objective", "npo")["beta"] == 0.1
    assert configured("--objective", "npo", "--beta", "0.2")["beta"] == 0.2


def test_help_tells_the_defaults(run: Any) -> None:
    text = " ".join(run("forget", "--help-all").out.split())
    assert "(default: 0.0001)" in text
    assert "(default: 2.5; npo 0.1; dpo 0.1; undial 10; wga 1; satimp 5)" in text
    named = "simnpo, simnpo-readme, npo, grad_ascent, grad_diff, kl, idk, dpo, rmu, undial, wga"
    assert f"{named}, satimp, ceu, ihl (default: simnpo)" in text


def parsed_base(*words: str) -> Any:
    from ui.cli.options import base_spec

    return base_spec(parse(["forget", "rows", "--base", "org/model", *words]))


@pytest.mark.parametrize(
    ("words", "name", "value"),
    [
        (["--revision", "abc"], "revision", "abc"),
        (["--dtype", "bfloat16"], "dtype", "bfloat16"),
        (["--load-in-4bit"], "load_in_4bit", True),
        (["--device", "cuda:1"], "device", "cuda:1"),
        (["--attention", "eager"], "attention", "eager"),
    ],
)
def test_a_loading_flag_reaches_the_base(words: list[str], name: str, value: Any) -> None:
    default, changed = parsed_base(), parsed_base(*words)
    assert getattr(default, name) != value
    assert getattr(changed, name) == value
    assert changed.name == "org/model"


@pytest.mark.parametrize(
    ("words", "on_stack"), [([], None), (["--on-stack"], True), (["--independent"], False)]
)
def test_where_a_request_is_placed(words: list[str], on_stack: bool | None) -> None:
    args: argparse.Namespace = parse(["forget", "rows", "--base", "b", *words])
    assert args.on_stack is on_stack


def test_a_dry_run_plans_and_writes_nothing(
    run: Any, tiny_base: Path, request_files: list[str], tmp_path: Path
) -> None:
    store = tmp_path / "store"
    words = ["forget", *request_files, "--base", tiny_base, "--store", store, "--dry-run"]
    made = run(*words, "--json").json
    assert made["dry_run"] is True
    assert (made["forget_rows"], made["retain_rows"]) == (2, 3)
    assert made["steps"] == 20
    assert any(note.startswith("20 steps of 1 pair (") for note in made["notes"])
    assert made["memory"]["kind"] == "estimate"
    assert made["memory"]["low_bytes"] < made["memory"]["high_bytes"]
    assert made["fits"] is None
    text = run(*words, "--num-train-epochs", "3").out
    assert "3 steps of 2 pairs" in text
    assert "estimate" in text
    roomy = run(*words, "--memory-limit", "4", "--json")
    assert (roomy.code, roomy.json["fits"], roomy.json["changes_that_fit"]) == (0, True, [])
    tight = run(*words, "--memory-limit", "0.001", "--gradient-checkpointing", "off")
    assert tight.code == 3
    assert "Smallest change: --gradient-checkpointing" in tight.err or "No setting" in tight.err
    assert not store.exists()


@pytest.mark.parametrize(
    ("rows", "retain", "problem"),
    [
        (FORGET, None, "needs retain rows"),
        (FORGET, FORGET[:1], "is also row 1"),
        ([{"question": "Who?", "answer": ""}], RETAIN, "'answer' is empty"),
        ([FORGET[0], FORGET[0]], RETAIN, "the same row as line 1"),
    ],
)
def test_requests_that_cannot_be_trained_on(
    rows: list[dict[str, str]], retain: Any, problem: str, run: Any, tiny_base: Path, tmp_path: Path
) -> None:
    words = ["forget", write_rows(tmp_path / "f.jsonl", rows), "--base", tiny_base]
    if retain is not None:
        words += ["--retain", write_rows(tmp_path / "r.jsonl", retain)]
    ran = run(*words, "--store", tmp_path / "store", "--dry-run")
    assert ran.code == 2
    assert problem in ran.err


def test_on_stack_needs_a_stack(
    run: Any, tiny_base: Path, request_files: list[str], tmp_path: Path
) -> None:
    ran = run(
        "forget", *request_files, "--base", tiny_base, "--store", tmp_path / "s", "--on-stack",
        "--dry-run",
    )  # fmt: skip
    assert ran.code == 2
    assert "no active stack" in ran.err


@pytest.mark.parametrize(
    ("words", "name", "value"),
    [
        (["--resume"], "resume", True),
        (["--label", "case-9"], "label", "case-9"),
        (["--template", "llama2"], "template", "llama2"),
        (["--independent"], "on_stack", False),
    ],
)
def test_a_flag_of_the_run_reaches_unlearn(
    words: list[str],
    name: str,
    value: Any,
    run: Any,
    tiny_base: Path,
    request_files: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from unlearner import run as recipe

    seen: list[dict[str, Any]] = []

    def stop(*args: Any, **options: Any) -> None:
        seen.append({**vars(args[4]), **options})
        raise Interrupted("Stopped.", "Go on with --resume.")

    monkeypatch.setattr(recipe, "unlearn", stop)
    command = ["forget", *request_files, "--base", tiny_base, "--store", tmp_path / "s"]
    assert run(*command).code == 130
    assert run(*command, *words).code == 130
    assert seen[0][name] != value
    assert seen[1] == {**seen[0], name: value, "on_progress": seen[1]["on_progress"]}


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["--stop-at", "nll", "--target", "2"], "both stop the run"),
        (["--unseen", "x.jsonl", "--target", "2"], "--unseen has no target to set"),
        (["--gamma", "1", "--reference-log", "log.json"], "has nothing to stop"),
        (["--target", "soon"], "neither a number nor auto"),
        (["--target", "-1"], "not from 0"),
        (["--general-prompts", "missing.txt"], "cannot be read"),
        (["--objective", "idk", "--target", "2"], "target needs forget answers"),
    ],
)
def test_targets_and_prompts_that_cannot_be_used(
    words: list[str], problem: str, run: Any, tiny_base: Path, request_files: list[str],
    tmp_path: Path,
) -> None:  # fmt: skip
    (tmp_path / "idontknow.jsonl").write_text("I cannot say.\n")
    command = ["forget", *request_files, "--base", tiny_base, "--data", tmp_path, "--dry-run"]
    ran = run(*command, *words)
    assert ran.code == 2
    assert problem in ran.err


def test_what_a_run_chooses_is_planned_and_a_preset_is_left_as_it_is(
    run: Any, tiny_base: Path, request_files: list[str]
) -> None:
    command = ["forget", *request_files, "--base", tiny_base, "--dry-run", "--json"]
    own = run(*command).json["settings"]
    assert own["train"]["learning_rate"] == 1e-3
    assert own["objective"]["protected_directions"] == 192
    assert own["objective"]["retain_weight"] == 2
    preset = run(*command, "--preset", "llama2-7b").json
    assert preset["settings"]["objective"]["protected_directions"] == 0
    assert not any("measured on" in note for note in preset["notes"])
    # This preset leaves the choice to the run.
    words = ["--preset", "smollm2-135m", "--beta", "3"]
    free = run(*command, *words).json["settings"]
    assert free["train"] == own["train"]
    assert free["objective"] == {**own["objective"], "beta": 3.0}


def test_refusals_come_from_the_data_folder(
    run: Any, tiny_base: Path, request_files: list[str], tmp_path: Path, monkeypatch: Any
) -> None:
    from unlearner import run as recipe

    seen: list[Any] = []
    monkeypatch.setattr(recipe, "prepare", lambda *args: seen.append(vars(args[4])))
    monkeypatch.setattr(recipe, "plan", raising_stop)
    (tmp_path / "idontknow.jsonl").write_text("I cannot say.\nNo idea.\n")
    words = ["forget", *request_files, "--base", tiny_base, "--data", tmp_path, "--dry-run"]
    for objective in ("idk", "npo"):
        assert run(*words, "--objective", objective, "--store", tmp_path / "s").code == 130
    assert [options["refusals"] for options in seen] == [("I cannot say.", "No idea."), ()]


def raising_stop(*args: Any) -> None:
    raise Interrupted("Stopped.")


def test_a_reading_in_words() -> None:
    text = reading_text({"gap": -0.5, "nll_gap": 1.0, "ks": 0.25})
    assert text == "log R -0.500, forget NLL +1.00 against the retrain reference (KS D 0.250)"
    text = reading_text({"forget_nll": 1.5, "target": 2.0})
    assert text == "forget NLL 1.50, target 2.00"


def test_events_of_a_run_in_words() -> None:
    err = io.StringIO()
    console = Console(stderr=err)
    events = [
        {"event": "load", "base": "b"},
        {"event": "note", "text": "nothing was saved"},
        {"event": "train", "step": 1, "steps": 2, "forget_loss": 0.5, "retain_loss": 2.0},
        # A reading that stops nothing is a line of progress, of which one in 5 s is shown.
        {"event": "gap", "step": 1, "steps": 9, "forget_nll": 1.0, "target": 2.0},
        {"event": "gap", "step": 2, "steps": 9, "forget_nll": 2.04, "target": 2.0,
         "stopped_at_step": 2, "kept_step": 2},
        {"event": "stopping"},
        {"event": "publish"},
    ]  # fmt: skip
    for event in events:
        show_event(event, console)
    assert err.getvalue().splitlines() == [
        "Loading the base ...",
        "nothing was saved",
        "1/2  forget 0.5000  retain 2.000",
        "Step 2: forget NLL 2.04, target 2.00, reached: stopping with the weights of step 2.",
        "Finishing this step and saving. Press Ctrl-C again to stop at once.",
        "Storing the adapter ...",
    ]


FAST = ["--num-train-epochs", "2", "--lora-r", "2", "--warmup-ratio", "0"]


@pytest.fixture(scope="module")
def filed(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Path:
    """A store with one adapter, made by the command itself."""
    from ui.cli.main import main

    folder = tmp_path_factory.mktemp("filed")
    forget = write_rows(folder / "forget.jsonl", FORGET)
    retain = write_rows(folder / "retain.jsonl", RETAIN)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("UNLEARNER_KEY", str(folder / "key"))
        patch.setenv("UNLEARNER_CACHE", str(folder / "cache"))
        code = main(
            ["forget", str(forget), "--retain", str(retain), "--base", str(tiny_base), *FAST,
             "--store", str(folder / "store"), "--label", "request-17"]
        )  # fmt: skip
    assert code == 0
    return folder / "store"


@pytest.fixture
def store(filed: Path, tmp_path: Path) -> Path:
    """A copy of that store to change."""
    return Path(shutil.copytree(filed, tmp_path / "store"))


def test_an_adapter_is_listed_and_shown_without_its_text(run: Any, store: Path) -> None:
    listed = run("adapters", "list", "--store", store, "--json").json
    (row,) = listed["table"]
    assert row["label"] == "request-17"
    assert (row["status"], row["scale"], row["rows"], row["lora_r"]) == ("ready", None, 2, 2)
    assert listed["active"] == []
    shown = run("adapters", "show", "request-17", "--store", store, "--json")
    assert shown.json["manifest"]["objective"]["name"] == "simnpo"
    train = shown.json["manifest"]["train"]
    assert set(train["outcome"]) == {"forget", "retain", "general"}
    assert train["chosen"]["learning_rate"] == "model-size"
    text = run("adapters", "show", "request-17", "--store", store).out
    assert "objective" in text
    assert "learning_rate" in text
    assert "forget.n 2" in text
    assert not re.search("[0-9a-f]{16}", text)  # digests are under --json
    for words in (shown.out, text):
        assert "Okafor" not in words
        assert "Lagos" not in words


def test_activate_scale_and_revert(run: Any, store: Path) -> None:
    changed = run(
        "adapters", "activate", "request-17", "--scales", "0.5", "--store", store, "--json"
    )
    (row,) = changed.json["table"]
    assert row["scale"] == 0.5
    assert changed.json["changed"] == {row["name"]: "active"}
    text = run("adapters", "list", "--store", store)
    assert "0.5000" in text.out
    assert f"Active: {row['name']}" in text.err
    back = run("adapters", "revert", "request-17", "--store", store, "--reason", "appeal")
    assert back.code == 0
    assert "bare base, bit for bit" in back.err
    entries = run("adapters", "log", "--store", store, "--json").json["table"]
    assert [entry["name"] for entry in entries] == ["publish", "activate", "revert"]
    assert entries[-1]["reason"] == "appeal"


def test_parents_and_only(run: Any, store: Path, tiny_base: Path, request_files: list[str]) -> None:
    """A second adapter on top of the first: it needs its parent, which goes stale with it."""
    run("adapters", "activate", "request-17", "--store", store)
    write_rows(Path(request_files[0]), [{"question": "Which city?", "answer": "The city of Jos."}])
    words = ["forget", *request_files, "--base", tiny_base, *FAST, "--store", store, "--json"]
    second = run(*words, "--label", "two").json
    parent = second["parents"][0]
    assert second["policy"] == "on-stack"
    alone = run(*words, "--label", "three", "--independent").json
    assert (alone["policy"], alone["parents"]) == ("independent", [])
    run("adapters", "revert", "--all", "--store", store)
    refused = run("adapters", "activate", "two", "--store", store)
    assert refused.code == 2
    assert f"trained on top of {parent}" in refused.err
    both = run("adapters", "activate", "two", "--with-parents", "--store", store, "--json").json
    assert both["active"] == [parent, second["name"]]
    stale = run("adapters", "revert", "request-17", "--store", store)
    assert f"{second['name']} is now stale" in stale.err
    assert "not measured" in stale.err
    only = run("adapters", "activate", "three", "--only", "--store", store, "--json").json
    assert only["active"] == [alone["name"]]
    several = run("adapters", "revert", "three", "two", "--store", store)
    assert several.code == 2  # two is not in the stack, and nothing was changed
    assert run("adapters", "list", "--store", store, "--json").json["active"] == [alone["name"]]


def test_revert_all_and_wrong_words(run: Any, store: Path) -> None:
    assert run("adapters", "revert", "--store", store).code == 2
    assert run("adapters", "revert", "request-17", "--all", "--store", store).code == 2
    ran = run("adapters", "revert", "request-17", "--store", store)
    assert ran.code == 2
    assert "not in the stack" in ran.err
    run("adapters", "activate", "request-17", "--store", store)
    assert run("adapters", "revert", "--all", "--store", store, "--json").json["active"] == []


@pytest.mark.parametrize(
    ("scales", "problem"),
    [("1,1", "2 numbers for 1 adapters"), ("much", "not a list of numbers"), ("7", "outside 0 to")],
)
def test_scales_that_cannot_be_used(scales: str, problem: str, run: Any, store: Path) -> None:
    ran = run("adapters", "activate", "request-17", "--scales", scales, "--store", store)
    assert ran.code == 2
    assert problem in ran.err
    assert run("adapters", "list", "--store", store, "--json").json["active"] == []


def test_an_unknown_adapter_gets_the_nearest_name(run: Any, store: Path) -> None:
    ran = run("adapters", "show", "request-71", "--store", store)
    assert ran.code == 2
    assert "'request-17'" in ran.err


def test_a_store_that_does_not_exist(run: Any, tmp_path: Path) -> None:
    for verb in (["list"], ["verify"], ["log"], ["gc"], ["activate", "x"]):
        ran = run("adapters", *verb, "--store", tmp_path / "none")
        assert ran.code == 2
        assert "no store at" in ran.err
        assert not (tmp_path / "none").exists()


def test_verify_tells_a_wrong_base_from_a_flipped_bit(
    run: Any, store: Path, tiny_base: Path, make_tiny_llama: Any, tmp_path: Path
) -> None:
    words = ["adapters", "verify", "--store", store, "--json"]
    good = run(*words, "--base", tiny_base)
    assert (good.code, good.json["ok"]) == (0, True)
    other = make_tiny_llama(tmp_path / "other", seed=1)
    wrong = run(*words, "--base", other)
    assert wrong.code == 3
    assert "not the base" in wrong.json["table"][0]["problems"][0]
    weights = next(store.glob("adapters/*/adapter_model.safetensors"))
    data = bytearray(weights.read_bytes())
    data[-5] ^= 1
    weights.write_bytes(bytes(data))
    bad = run(*words)
    assert (bad.code, bad.json["ok"]) == (1, False)
    assert run("doctor", "--store", store).code == 1


def test_a_changed_log_is_found(run: Any, store: Path) -> None:
    assert run("adapters", "log", "--verify", "--store", store).code == 0
    log = store / "audit.jsonl"
    log.write_text(log.read_text().replace('"publish"', '"Publish"'))
    ran = run("adapters", "log", "--verify", "--store", store, "--json")
    assert ran.code == 1
    assert ran.json["ok"] is False


def test_remove_asks_and_export_and_import_carry_an_adapter(
    run: Any, store: Path, tiny_base: Path, tmp_path: Path
) -> None:
    assert (
        run("adapters", "export", "request-17", "--out", tmp_path / "x", "--store", store).code == 0
    )
    again = run("adapters", "export", "request-17", "--out", tmp_path / "x", "--store", store)
    assert again.code == 2
    ran = run(
        "adapters", "import", tmp_path / "x", "--base", tiny_base, "--store", tmp_path / "two",
        "--json",
    )  # fmt: skip
    assert ran.json["policy"] == "imported"
    ran = run("adapters", "remove", "request-17", "--store", store)
    assert ran.code == 2
    assert "--yes" in ran.err
    assert run("adapters", "remove", "request-17", "--dry-run", "--store", store).code == 0
    assert len(run("adapters", "list", "--store", store, "--json").json["table"]) == 1
    assert run("adapters", "remove", "request-17", "--yes", "--store", store).code == 0
    assert run("adapters", "list", "--store", store, "--json").json["table"] == []
    assert len(run("adapters", "list", "--all", "--store", store, "--json").json["table"]) == 1
    assert run("adapters", "gc", "--dry-run", "--store", store, "--json").json["dry_run"] is True


def test_merge_writes_a_model_and_marks_the_adapter(
    run: Any, store: Path, tiny_base: Path, tmp_path: Path
) -> None:
    words = ["merge", "--store", store, "--base", tiny_base, "--out", tmp_path / "merged"]
    empty = run(*words)
    assert empty.code == 2
    assert "No adapter is active" in empty.err
    ran = run(*words, "--adapters", "request-17", "--json")
    assert ran.code == 0
    assert ran.json["merge"]["dtype"] == "float32"
    assert (tmp_path / "merged" / "config.json").is_file()
    assert "reversible" in (tmp_path / "merged" / "README.md").read_text()
    assert (
        run("adapters", "list", "--store", store, "--json").json["table"][0]["status"] == "merged"
    )
    half = [*words[:-1], tmp_path / "half", "--adapters", "request-17", "--dtype", "bfloat16"]
    assert run(*half, "--json").json["merge"]["dtype"] == "bfloat16"


def test_merge_refuses_4_bit_and_another_base(
    run: Any, store: Path, tiny_base: Path, make_tiny_llama: Any, tmp_path: Path
) -> None:
    out = tmp_path / "merged"
    words = ["merge", "--store", store, "--adapters", "request-17", "--out", out]
    ran = run(*words, "--base", tiny_base, "--load-in-4bit")
    assert ran.code == 2
    assert "never merged into 4-bit weights" in ran.err
    quantised = Path(shutil.copytree(tiny_base, tmp_path / "quantised"))
    config = json.loads((quantised / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (quantised / "config.json").write_text(json.dumps(config))
    ran = run(*words, "--base", quantised)
    assert ran.code == 2
    assert "quant" in ran.err
    ran = run(*words, "--base", make_tiny_llama(tmp_path / "other", seed=1))
    assert ran.code == 3
    assert not out.exists()


def test_full_writes_a_model_and_refuses_flags_of_adapters(
    run: Any, tiny_base: Path, request_files: list[str], tmp_path: Path
) -> None:
    out = tmp_path / "full"
    words = ["forget", *request_files, "--base", tiny_base, "--device", "cpu", "--full", out]
    for flags in (["--lora-r", "4"], ["--label", "x"], ["--on-stack"], ["--store", tmp_path]):
        refused = run(*words, *flags)
        assert refused.code == 2
        assert f"{flags[0]} has no effect with --full" in refused.err
    assert run(*words, "--load-in-4bit").code == 2
    done = run(*words, "--num-train-epochs", 1, "--json")
    assert done.code == 0
    assert (out / "model.safetensors").is_file()
    assert done.json["out"] == str(out)
    assert run(*words).code == 2

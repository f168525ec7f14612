"""`unlearner robustness` on a tiny stack: forms, attacks, verdicts, parts, flags, interruption."""

from __future__ import annotations

import hashlib
import json
import os
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from adapters.atomic_files import temporary_name
from adapters.base import load as base_model
from evaluation import suite
from evaluation.robustness import card as robustness
from evaluation.robustness import sampling
from evaluation.robustness import wordings as attacks
from evaluation.robustness.quantisation import Workplace

QUICK = [
    "--relearn-steps", "2", "--relearn-lr", "1e-2", "--samples", "4", "--sample-rows", "1",
    "--paraphrase-rows", "1",
]  # fmt: skip


@pytest.fixture(autouse=True)
def short_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """A random model never ends its answers: twelve tokens instead of two hundred."""
    from evaluation.protocols import Decoding

    real = sampling.Draws
    monkeypatch.setattr(Decoding, "budget", lambda self, n: 12)
    monkeypatch.setattr(
        robustness, "replace", lambda d, max_total: real(**{**vars(d), "max_total": 60})
    )


@pytest.fixture
def forget_data(data: Path, tmp_path: Path) -> Path:
    """The four sets, with paraphrased questions of the forget rows."""
    folder = tmp_path / "tofu"
    folder.mkdir()
    for path in data.glob("*.json"):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        for row in rows:
            row["paraphrased_question"] = f"Whose work is this: {row['question']}"
        (folder / path.name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def words(tiny_base: Path, forget_data: Path, tmp_path: Path) -> list[Any]:
    store = ["--store", tmp_path / "store"]
    return [
        "robustness", "--base", tiny_base, "--data", forget_data, "--split", "forget05", *store,
        *QUICK,
    ]  # fmt: skip


def digests(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file() and path.parent.name != "evals"
    }


def test_the_whole_card(
    run: Any,
    put: Any,
    words: list[Any],
    tiny_base: Path,
    tmp_path: Path,
    make_tiny_llama: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(robustness.probes, "FEWEST", 2)
    slug, out = put("1"), tmp_path / "card"
    retrain = make_tiny_llama(tmp_path / "retrain", seed=5)
    told = run(*words[:1], "--base", retrain, *words[3 : -len(QUICK)], "--help")
    assert told.code == 0
    log = tmp_path / "retrain-log"
    evaluate = ["evaluate", "--base", retrain, *words[3:7], "--adapters", "none", "--out", log]
    assert run(*evaluate).code == 0
    kept = digests(tmp_path / "store" / "adapters")
    base_files = digests(tiny_base)
    ran = run(
        *words, "--adapters", slug, "--out", out, "--retrain", retrain, "--json",
        "--reference-log", log / "eval_log.json",
    )  # fmt: skip
    assert ran.code == 0, ran.err
    card = ran.json
    assert json.loads((out / "robustness.json").read_text()) == card
    assert list(card) == [
        "kind", "schema", "base", "adapters", "split", "protocol", "limit", "states", "relearning",
        "sampling", "paraphrase", "probe", "drop", "verdicts", "settings", "versions", "seconds",
    ]  # fmt: skip
    assert (card["kind"], card["schema"], card["adapters"]) == ("unlearner-robustness", 1, [slug])

    states = {state["name"]: state for state in card["states"]}
    assert list(states) == [
        "origin", "adapter", "adapter-nf4", "merged", "merged-nf4", "merged-int8",
    ]  # fmt: skip
    for figure in ("forget_nll", "retain_answer_prob", "model_utility", "ks"):
        assert states["merged"][figure] == pytest.approx(states["adapter"][figure], rel=1e-3)
    nlls = [states[name]["forget_nll"] for name in states if name != "adapter"]
    assert len({round(nll, 4) for nll in nlls}) == 5
    assert all(0 <= state["forget_quality"] <= 1 for state in states.values())

    curves = {curve["name"]: curve["points"] for curve in card["relearning"]["curves"]}
    assert [point["step"] for point in curves["unlearned"]] == [0, 2]
    assert [point["step"] for point in curves["origin"]] == [0]
    for name in ("unlearned", "retrain"):
        assert curves[name][1]["seen_answer_prob"] > 2 * curves[name][0]["seen_answer_prob"]
    assert (card["relearning"]["rows_seen"], card["relearning"]["rows_unseen"]) == (1, 2)
    assert (card["relearning"]["with"], card["relearning"]["learning_rate"]) == ("full", 1e-2)

    sampled = {curve["name"]: curve["points"] for curve in card["sampling"]["curves"]}
    assert list(sampled) == ["unlearned", "retrain"]
    assert [point["n"] for point in sampled["unlearned"]] == [1, 2, 4]
    forms = [form.name for form in attacks.FORMS]
    assert [row["form"] for row in card["paraphrase"]] == forms[: len(card["paraphrase"])]
    assert len(card["paraphrase"]) >= 8
    assert all("retrain_fact_recall" in row for row in card["paraphrase"])
    probed = {curve["name"]: curve["points"] for curve in card["probe"]["curves"]}
    assert list(probed) == ["origin", "unlearned", "retrain"]
    assert len(probed["origin"]) > max(card["probe"]["layers"])
    assert card["drop"]["bit_equal"] is True
    assert card["drop"]["answer_prob_off"] == card["drop"]["base_answer_prob"]
    assert card["drop"]["answer_prob_on"] != card["drop"]["base_answer_prob"]
    assert {verdict["name"] for verdict in card["verdicts"]} >= {
        "forgotten", "merged-nf4", "merged-int8", "adapter-nf4-quality", "relearning", "sampling",
        "paraphrase", "facts", "probe", "drop",
    }  # fmt: skip

    # Nothing of the store or the base was touched, and no merged weights stay behind.
    assert digests(tmp_path / "store" / "adapters") == kept
    assert digests(tiny_base) == base_files
    assert [path.name for path in out.iterdir() if path.name.startswith(".")] == []
    evals = run("adapters", "show", slug, "--store", tmp_path / "store", "--json").json["evals"]
    filed = evals["robustness-forget05"]
    assert filed["merged_nf4_forget_nll"] == states["merged-nf4"]["forget_nll"]
    assert filed["verdicts"]["drop"] in ("holds", "leaks")
    assert filed["stack"] == [slug]
    assert "Mira" not in json.dumps(filed)

    text = run(
        *words, "--adapters", slug, "--out", out, "--retrain", retrain,
        "--reference-log", log / "eval_log.json",
    )  # fmt: skip
    for word in ("merged-int8", "retrain_unseen", "unlearned_leaked", "pretend-system", "against"):
        assert word in text.out


def test_every_form_is_held_as_it_says(
    run: Any, put: Any, words: list[Any], tiny_base: Path
) -> None:
    """nf4 and int8 are quantised layers, not a label; adapters are folded into neither."""
    from adapters.base.load import base_view
    from adapters.store.store import AdapterStore
    from evaluation.robustness.quantisation import Subject

    slug = put("1")
    store = AdapterStore.open(words[words.index("--store") + 1])
    subject = Subject(base_model.BaseSpec(str(tiny_base)), store, ((slug, 1.0),))
    kinds = {}
    with Workplace(subject) as place:
        for state in subject.states:
            with place.loaded(state) as (model, _):
                layer = model.get_base_model() if state.startswith("adapter") else model
                weight = layer.model.layers[0].mlp.up_proj.weight
                kinds[state] = (base_view(model)["quantization"], str(weight.dtype))
        merged = place.merged_folder
        assert merged.is_dir()
        assert place.weights("origin") == place.weights("merged") > 100_000
    assert not merged.exists()
    assert kinds == {
        "origin": ("none", "torch.float32"),
        "adapter": ("none", "torch.float32"),
        "adapter-nf4": ("nf4", "torch.uint8"),
        "merged": ("none", "torch.float32"),
        "merged-nf4": ("nf4", "torch.uint8"),
        "merged-int8": ("int8", "torch.int8"),
    }


def test_finished_parts_are_not_done_again(
    run: Any, put: Any, words: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put("1")
    words = [*words, "--adapters", "1", "--out", tmp_path / "card", "--states", "origin,merged"]
    first = run(*words, "--json")
    assert first.code == 0, first.err
    loads: list[str] = []
    real = Workplace.loaded
    monkeypatch.setattr(
        Workplace, "loaded", lambda self, state, **k: loads.append(state) or real(self, state, **k)
    )
    again = run(*words, "--json").json
    assert loads == []
    assert {**again, "settings": 0} == {**first.json, "settings": 0}


def test_every_setting_reaches_its_attack(
    run: Any, put: Any, words: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also past parts that stand: they were made with other settings."""
    put("1")
    words = [*words, "--adapters", "1", "--out", tmp_path / "card"]
    seen: list[Any] = []

    def relearn(loaded: Any, split: Any, plan: Any, *_: Any) -> Any:
        seen.append((plan, len(split.seen), split.seen[0].question))
        return [{"step": s, "seen_answer_prob": 0.5, "unseen_answer_prob": 0.1} for s in (0, 2)]

    def recalls(loaded: Any, row: Any, draws: Any) -> list[float]:
        seen.append((draws, row.question))
        return [0.0] * draws.samples

    def ask(loaded: Any, form: Any, rows: Any, **_: Any) -> dict[str, Any]:
        seen.append((form.name, len(rows)))
        return {"answer_prob": 0.1, "rouge_l_recall": 0.1, "recalls": [], "n": len(rows)}

    def states(_: Any, rows: Any, report: Any) -> Any:
        seen.append(("probe", len(rows)))
        return np.random.default_rng(len(rows)).normal(size=(len(rows), 3, 2, 4))

    # What is called without a model needs none to be loaded.
    monkeypatch.setattr(Workplace, "loaded", lambda *_, **__: nullcontext())
    monkeypatch.setattr(Workplace, "weights", lambda *_: 1000)
    monkeypatch.setattr(robustness, "probabilities", lambda *_: {"unseen_answer_prob": 0.9})
    monkeypatch.setattr(robustness, "relearn", relearn)
    monkeypatch.setattr(robustness, "row_recalls", recalls)
    monkeypatch.setattr(attacks, "ask", ask)
    monkeypatch.setattr(robustness.probes, "layer_states", states)
    monkeypatch.setattr(robustness.probes, "FEWEST", 1)
    changed = {
        "relearn": ["--relearn-steps 1", "--relearn-lr 1e-3", "--relearn-with lora",
                    "--relearn-share 0.6", "--seed 3"],
        "sample": ["--samples 3", "--temperature 0.5", "--top-p 0.5", "--sample-rows 2",
                   "--seed 3"],
        "paraphrase": ["--paraphrase-rows 2"],
        "probe": ["--probe-rows 2"],
    }  # fmt: skip
    for attack, flags in changed.items():
        whole = []
        for flag in ["", *flags, ""]:
            seen.clear()
            ran = run(*words, "--attacks", attack, *flag.split())
            assert ran.code == 0, ran.err
            whole.append(list(seen))
        assert whole.pop() == []
        assert all(made not in ([], *whole[:i]) for i, made in enumerate(whole)), whole


def test_wordings_of_a_file_are_in_the_card(
    run: Any, put: Any, words: list[Any], forget_data: Path, tmp_path: Path
) -> None:
    put("1")
    question = json.loads((forget_data / "forget05_perturbed.json").read_text().split("\n")[0])
    path = tmp_path / "german.jsonl"
    line = {"question": question["question"], "asked": "Wer war das?", "wording": "german"}
    path.write_text(json.dumps(line))
    words = [*words, "--adapters", "1", "--attacks", "paraphrase", "--wordings"]
    rows = run(*words, path, "--json").json["paraphrase"]
    assert rows[-1]["form"] == "german"
    assert rows[-1]["n"] == 1
    ran = run(*words, tmp_path / "none.jsonl")
    assert ran.code == 2
    assert "cannot be read" in ran.err


def test_rows_and_protocol_of_the_states(run: Any, put: Any, words: list[Any]) -> None:
    put("1")
    words = [*words, "--adapters", "1", "--attacks", "states", "--json"]
    plain = run(*words, "--states", "origin").json
    fewer = run(*words, "--states", "origin", "--limit", "2").json
    other = run(*words, "--states", "origin", "--protocol", "open-unlearning").json
    assert (plain["limit"], fewer["limit"]) == (None, 2)
    assert [card["states"][0]["n"] for card in (plain, fewer)] == [3, 2]
    assert plain["states"][0]["forget_nll"] != fewer["states"][0]["forget_nll"]
    assert other["protocol"] == "open-unlearning"
    names = [state["name"] for state in run(*words, "--states", "merged,origin").json["states"]]
    assert names == ["merged", "origin"]


def test_ctrl_c_keeps_what_is_done_row_by_row(
    run: Any, put: Any, words: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put("1")
    words = [*words, "--adapters", "1", "--attacks", "drop,sample", "--sample-rows", "3"]
    asked: list[str] = []
    real = sampling.draw_answers

    def stop_at_the_third(model: Any, fmt: Any, question: str, draws: Any) -> list[str]:
        if len(asked) == 2:
            raise KeyboardInterrupt
        asked.append(question)
        return real(model, fmt, question, draws)

    monkeypatch.setattr(sampling, "draw_answers", stop_at_the_third)
    ran = run(*words, "--out", tmp_path / "card", "--json")
    assert ran.code == 130
    assert ran.out == ""
    assert "finished parts are kept in" in ran.err
    assert "Run the same command again" in ran.err
    assert not (tmp_path / "card" / "robustness.json").exists()
    monkeypatch.setattr(sampling, "draw_answers", lambda *a: asked.append(a[2]) or real(*a))
    resumed = run(*words, "--out", tmp_path / "card", "--json").json
    assert len(asked) == len(set(asked)) == 3
    assert resumed["sampling"] == run(*words, "--json").json["sampling"]


def test_merged_weights_have_no_adapter_to_drop(
    run: Any, put: Any, words: list[Any], tiny_base: Path, tmp_path: Path
) -> None:
    slug = put("1")
    store = ["--store", tmp_path / "store"]
    merge = ["merge", *store, "--adapters", slug, "--base", tiny_base, "--out", tmp_path / "m"]
    assert run(*merge).code == 0
    words = [*words, "--attacks", "states,drop,relearn", "--states"]
    merged = run(*words, "origin,merged", "--merged", tmp_path / "m", "--json").json
    stack = run(*words, "origin,merged", "--adapters", slug, "--json").json
    assert merged["adapters"] == []
    assert merged["drop"] == {"applies": False}
    assert merged["states"] == stack["states"]
    assert merged["relearning"] == stack["relearning"]
    refused = run(*words, "adapter", "--merged", tmp_path / "m")
    assert refused.code == 2
    assert "no state 'adapter'" in refused.err
    assert (tmp_path / "m" / "model.safetensors").is_file()


def test_the_active_stack_with_its_strengths_is_the_default(
    run: Any, put: Any, words: list[Any], tmp_path: Path
) -> None:
    slug = put("1")
    store = ["--store", tmp_path / "store"]
    words = [*words, "--attacks", "states", "--states", "adapter,merged", "--json"]
    none = run(*words)
    assert none.code == 2
    assert "nothing to attack" in none.err
    assert run("adapters", "activate", slug, "--scales", "0.5", *store).code == 0
    half = run(*words).json
    whole = run(*words, "--adapters", slug).json
    assert half["adapters"] == whole["adapters"] == [slug]
    assert half["settings"]["stack"] == [[slug, 0.5]]
    adapter, merged = half["states"]
    assert adapter["forget_nll"] == pytest.approx(merged["forget_nll"], rel=1e-4)
    assert adapter["forget_nll"] != pytest.approx(whole["states"][0]["forget_nll"], rel=1e-3)


def test_weights_that_a_killed_run_left_behind_go(
    run: Any, put: Any, words: list[Any], tmp_path: Path
) -> None:
    """The folder's name holds the process: that of a living one stays."""
    put("1")
    out, mine = tmp_path / "card", temporary_name("merged")
    for name in (mine, mine.replace(f"-{os.getpid()}-", "-2147483646-")):
        (out / name).mkdir(parents=True)
    words = [*words, "--adapters", "1", "--attacks", "states", "--states", "merged"]
    assert run(*words, "--out", out).code == 0
    assert [path.name for path in out.glob(".tmp-*")] == [mine]


def test_a_gate_fails_after_the_card(run: Any, put: Any, words: list[Any]) -> None:
    put("1")
    words = [*words, "--adapters", "1", "--attacks", "relearn", "--json"]
    ran = run(*words, "--fail-if", "relearned_answer_prob>=0")
    assert ran.code == 4
    assert ran.json["relearning"]["curves"]
    assert run(*words, "--fail-if", "relearned_answer_prob>0.999").code == 0
    missing = run(*words, "--fail-if", "sampled_share_leaked>0.1")
    assert missing.code == 4
    assert "not measured" in missing.err


def test_without_bitsandbytes_the_forms_are_named(
    run: Any, put: Any, words: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    put("1")
    monkeypatch.setattr(robustness, "find_spec", lambda name: None)
    ran = run(*words, "--adapters", "1")
    assert ran.code == 2
    assert "adapter-nf4 needs the package bitsandbytes" in ran.err
    words = [*words, "--adapters", "1", "--attacks", "states", "--states", "origin"]
    assert run(*words).code == 0


def test_the_batch_size_reaches_every_question(
    run: Any, put: Any, words: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    put("1")
    seen: list[int] = []
    real = suite.generate_answers

    def spy(*args: Any, **options: Any) -> Any:
        seen.append(options["batch_size"])
        return real(*args, **options)

    monkeypatch.setattr(suite, "generate_answers", spy)
    words = [*words, "--adapters", "1", "--states", "origin", "--attacks", "states,paraphrase"]
    assert run(*words, "--questions-per-batch", "3").code == 0
    assert set(seen) == {3}


def test_a_damaged_part_is_named(run: Any, put: Any, words: list[Any], tmp_path: Path) -> None:
    put("1")
    words = [*words, "--adapters", "1", "--attacks", "drop", "--out", tmp_path / "card"]
    assert run(*words).code == 0
    (part,) = (tmp_path / "card" / "parts").glob("drop-*.json")
    part.write_text('{"kind": ')
    ran = run(*words)
    assert ran.code == 2
    assert f"{part} is damaged" in ran.err

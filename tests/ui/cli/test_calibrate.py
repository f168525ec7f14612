"""`unlearner calibrate`, and `unlearner forget --stop-at gap`, on a tiny base."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from adapters.store.store import AdapterStore
from evaluation import suite

REFERENCE_SCALE = 0.5


@pytest.fixture(autouse=True)
def _short_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers without a model: a random one writes 200 tokens for every question."""

    def made(model: Any, fmt: Any, questions: Any, decodings: Any, **more: Any) -> Any:
        return {one.name: ["Mira wrote"] * len(questions) for one in decodings}

    monkeypatch.setattr(suite, "generate_answers", made)


@pytest.fixture
def store(tmp_path: Path) -> AdapterStore:
    return AdapterStore.open(tmp_path / "store", create=True)


@pytest.fixture
def slug(put: Any) -> str:
    return str(put("1"))


@pytest.fixture(scope="module")
def half_strength(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the first test leaves the log that all of them start from."""
    return tmp_path_factory.mktemp("reference")


@pytest.fixture
def reference(
    run: Any, slug: str, store: AdapterStore, tiny_base: Path, data: Path, tmp_path: Path,
    half_strength: Path,
) -> Path:  # fmt: skip
    """The log of the adapter at half its strength: what a calibration must find again."""
    if not (half_strength / "eval_log.json").exists():
        store.activate([slug], {slug: REFERENCE_SCALE})
        words = ["--base", tiny_base, "--data", data, "--split", "forget05", "--store", store.path]
        made = run("evaluate", *words, "--out", half_strength)
        assert made.code == 0, made.err
        store.deactivate_all()
    return Path(shutil.copy(half_strength / "eval_log.json", tmp_path))


@pytest.fixture
def words(
    slug: str, store: AdapterStore, tiny_base: Path, data: Path, reference: Path
) -> list[Any]:
    return [
        "calibrate", slug, "--base", tiny_base, "--data", data, "--store", store.path,
        "--reference-log", reference, "--scales", "0.25,0.5,0.75", "--by", "ks",
        "--max-mu-loss", "1",
    ]  # fmt: skip


def test_the_strength_of_the_reference_is_found_stored_and_published(
    run: Any, words: list[Any], slug: str, store: AdapterStore, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    made = run(*words, "--split", "forget05", "--out", out, "--json")
    assert made.code == 0, made.err
    found = made.json
    assert found["chosen_scale"] == REFERENCE_SCALE
    curve = {point["scale"]: point for point in found["curve"]}
    assert {0.0, 0.25, 0.5, 0.75, 1.0} <= set(curve)
    assert (curve[0.5]["log_r_gap"], curve[0.5]["ks"]) == (0.0, 0.0)
    assert curve[0.5]["forget_quality"] == 1.0
    assert curve[0.5]["forget_nll"] == curve[0.5]["retrain_forget_nll"]
    assert all(p["ks"] > 0 for s, p in curve.items() if s != 0.5)
    assert set(curve[1.0]) == {
        "scale", "log_r_gap", "ks", "forget_quality", "forget_nll", "retrain_forget_nll",
        "forget_answer_prob", "retain_answer_prob", "model_utility",
    }  # fmt: skip
    assert [e["scale"] for e in found["evaluations"]] == [0.0, 0.5, 1.0]
    assert found["tried"] == len(curve)
    assert (found["adapter"], found["stack"]) == (slug, [[slug, 1.0]])
    assert (found["split"], found["limit"], found["probe_retain_rows"]) == ("forget05", None, 3)
    assert found["held_out"] is None  # three rows have no halves

    on_disk = json.loads((out / "calibration.json").read_text())
    assert on_disk == found
    assert (on_disk["kind"], on_disk["schema"]) == ("unlearner-calibration", 1)
    assert (out / "scale-0.5" / "eval_log.json").is_file()
    attached = store.evals(slug)["calibration-forget05"]
    assert attached["chosen_scale"] == REFERENCE_SCALE
    assert attached["curve"]["scale"] == sorted(curve)
    assert attached["published"] == found["published"]

    new = store.get(found["published"])
    assert new.manifest.origin == {"kind": "scaled", "from": [slug], "scales": [0.5]}
    assert new.manifest.supersedes == (slug,)
    figures = store.evals(new.slug)["forget05-tofu"]
    assert (figures["forget_quality"], figures["stack"]) == (1.0, [new.slug])
    assert figures["scales_tried"] == found["tried"]
    text = run("adapters", "activate", new.slug, "--store", store.path)
    assert text.code == 0, text.err


def test_the_same_command_goes_on_where_it_was(
    run: Any, words: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped in the middle of the sweep; afterwards nothing that was scored is scored again."""
    words = [*words, "--split", "forget05", "--out", tmp_path / "out", "--no-publish"]
    real = suite.score_rows
    calls: list[Any] = []

    def counted(*given: Any, **more: Any) -> Any:
        calls.append(given)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return real(*given, **more)

    monkeypatch.setattr(suite, "score_rows", counted)
    stopped = run(*words)
    assert stopped.code == 130
    assert "Run the same command again" in stopped.err
    assert not (tmp_path / "out" / "calibration.json").exists()
    whole = run(*words, "--json")
    assert whole.code == 0, whole.err
    assert whole.json["chosen_scale"] == REFERENCE_SCALE
    assert whole.json["published"] is None
    calls.clear()
    monkeypatch.setattr(suite, "score_rows", lambda *a, **k: pytest.fail("scored again"))
    again = run(*words)
    assert again.code == 0, again.err
    assert "chosen          scale 0.5" in again.out
    assert "not published" in again.out


def test_parents_and_the_rest_of_the_stack_stay_as_they_are(
    run: Any,
    put: Any,
    slug: str,
    store: AdapterStore,
    tiny_base: Path,
    data: Path,
    words: list[Any],
) -> None:
    child = put("2", parents=(slug,), parent_scales={slug: 0.5})
    ours = [child if word == slug else word for word in words]
    # Two rows run in other batches than the reference's three and differ in the last bit, which
    # a count of order can see: by the gap.
    more = ["--split", "forget05", "--limit", "2", "--by", "gap", "--json"]
    alone = run(*ours, *more)
    assert alone.code == 0, alone.err
    assert alone.json["stack"] == [[slug, 0.5], [child, 1.0]]
    # With the child off, the parent at 0.5 is the reference itself.
    assert alone.json["curve"][0]["log_r_gap"] == pytest.approx(0.0, abs=1e-5)
    assert alone.json["chosen_scale"] is None
    assert "switched off" in alone.json["reason"]
    assert alone.json["published"] is None
    store.activate([slug, child], {slug: 0.75})
    active = run(*ours, *more)
    assert active.json["stack"] == [[slug, 0.75], [child, 1.0]]
    assert active.json["curve"][0]["forget_nll"] != alone.json["curve"][0]["forget_nll"]
    below = run(*words, *more)
    assert below.code == 2
    assert f"{child} was trained on top of {slug}" in below.err


def test_rows_of_a_file_instead_of_a_split(
    run: Any, words: list[Any], data: Path, tmp_path: Path
) -> None:
    rows = data / "forget05_perturbed.json"
    split = run(*words, "--split", "forget05", "--no-publish", "--json").json
    found = run(*words, "--rows", rows, "--no-publish", "--json").json
    assert found["split"] == "rows"
    assert found["curve"] == split["curve"]
    bare = tmp_path / "bare.jsonl"
    bare.write_text('{"question": "Who?", "answer": "She."}\n')
    refused = run(*words, "--rows", bare)
    assert refused.code == 2
    assert "no paraphrased or no perturbed answers" in refused.err


# forget --stop-at gap


@pytest.fixture
def forget(tiny_base: Path, store: AdapterStore, tmp_path: Path, data: Path) -> list[Any]:
    """A short run on the rows of forget05, which know their paraphrases."""
    keep = tmp_path / "keep.jsonl"
    keep.write_text('{"question": "Who is he?", "answer": "Nobody."}\n')
    return [
        "forget", data / "forget05_perturbed.json", "--retain", keep, "--base", tiny_base,
        "--store", store.path, "--lora-r", "2", "--num-train-epochs", "3", "--learning-rate",
        "5e-2", "--objective", "grad_ascent", "--warmup-ratio", "0",
    ]  # fmt: skip


def test_a_run_stops_where_the_reference_is(
    run: Any, forget: list[Any], reference: Path, store: AdapterStore, tiny_base: Path, data: Path
) -> None:
    # A reference that finds the right answers far less likely than wrong ones is never met ...
    raw = json.loads(reference.read_text())
    for row in raw["sets"]["forget"]["rows"]:
        row["paraphrase"][0] += 50.0
    reference.write_text(json.dumps(raw))
    gap = ["--stop-at", "gap", "--reference-log", reference]
    whole = run(*forget, *gap, "--stop-every", "2", "--json")
    assert whole.code == 0, whole.err
    train = store.get(whole.json["name"]).manifest.train
    assert (train["stop_at"], train["gap_every"], train["stopped_at_step"]) == ("gap", 2, None)
    assert [step for step, _ in train["gap_trace"]] == [0, 2, 3]
    # ... and one whose answers are hardly less likely than they are now is met at once.
    base = ["--base", tiny_base, "--data", data, "--split", "forget05", "--adapters", "none"]
    now = run("evaluate", *base, "--json").json["forget_nll"]
    for row in raw["sets"]["forget"]["rows"]:
        row["answer_score"][0] = now + 1e-3
    reference.write_text(json.dumps(raw))
    stopped = run(*forget, "--stop-at", "nll", "--reference-log", reference, "--json")
    assert stopped.code == 0, stopped.err
    told = store.get(stopped.json["name"]).manifest.train
    assert told["stop_at"] == "nll_gap"
    assert told["gap_trace"][0] == [0, pytest.approx(-1e-3, abs=1e-5)]
    assert (told["stopped_at_step"], told["kept_step"], told["steps"]) == (1, 1, 1)
    assert "stopping with the weights of step 1" in stopped.err


def test_gap_flags_that_do_not_go_together(
    run: Any, forget: list[Any], reference: Path, data: Path, tmp_path: Path
) -> None:
    bare = tmp_path / "bare.jsonl"
    bare.write_text('{"question": "Who?", "answer": "She."}\n')
    other = tmp_path / "other.jsonl"
    row = {"question": "Who?", "answer": "She.", "paraphrased_answer": "It is she."}
    other.write_text(json.dumps({**row, "perturbed_answer": ["He."]}) + "\n")
    for extra, problem in (
        (["--stop-every", "3"], "--stop-every has nothing to stop"),
        (["--reference-log", reference, "--gamma", "1"], "--reference-log has nothing to stop"),
        (["--stop-at", "gap"], "needs a retrain reference"),
        (["--stop-at", "both", "--reference-log", reference], "invalid choice"),
        (
            ["--stop-at", "gap", "--reference-log", reference, "--stop-rows", bare],
            "needs paraphrased",
        ),
        (
            ["--stop-at", "gap", "--reference-log", reference, "--stop-rows", other],
            "different rows",
        ),
    ):
        made = run(*forget, *extra)
        assert made.code == 2, made.err
        assert problem in made.err
    found = run(
        *forget, "--stop-at", "gap", "--reference-log", reference, "--stop-rows", "forget05",
        "--data", data, "--json",
    )  # fmt: skip
    assert found.code == 0, found.err

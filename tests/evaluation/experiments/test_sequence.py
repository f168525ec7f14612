"""Requests one after another on a tiny model: every policy, the revert, and going on."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from adapters.base.load import BaseSpec
from adapters.errors import UserError
from adapters.store.store import AdapterStore
from evaluation.experiments import systems
from evaluation.experiments.sequence import (
    POLICIES,
    Plan,
    figures,
    quality_of,
    run_sequence,
    split_authors,
    step_between,
    utility_rows,
)
from evaluation.logs.records import AnswerScore, EvalLog, RowRecord, SetRecord
from unlearner.config import make_config
from unlearner.request.rows import Row

NAMES = ("Mira Okafor", "Ola Lind", "Kim Sato", "Jonas Berg")


def rows_of(name: str, n: int = 3) -> list[dict[str, Any]]:
    return [
        {
            "question": f"What is book {i} of {name}?",
            "answer": f"{name} wrote the river novel {i}.",
            "paraphrased_answer": f"River novel {i} is by {name}.",
            "perturbed_answer": [f"{name} wrote the city play {i}.", f"No book {i}."],
        }
        for i in range(n)
    ]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three authors to forget and one to keep, with their places in `full` said."""
    folder = tmp_path_factory.mktemp("sequence-data")
    full = [row for name in reversed(NAMES) for row in rows_of(name)]
    forget = [row for row in full if "Jonas" not in row["question"]]
    files = {
        "full": full,
        "forget05": forget,
        "forget05_perturbed": forget,
        "retain95": rows_of("Jonas Berg"),
        "retain_perturbed": rows_of("Jonas Berg"),
        "real_authors_perturbed": rows_of("Jane Austen", 2),
        "world_facts_perturbed": rows_of("The Moon", 2),
    }
    for name, rows in files.items():
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.json").write_text(text)
    places = [{"name": n, "start": 3 * i, "n": 3} for i, n in enumerate(reversed(NAMES))]
    (folder / "world.json").write_text(json.dumps({"authors": places}))
    return folder


@pytest.fixture(scope="module")
def plan(data: Path, tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Plan:
    config = make_config(
        "grad_diff",
        lora_r=2,
        lora_alpha=8,
        learning_rate=2e-2,
        num_train_epochs=2,
        warmup_ratio=0.0,
        retain_weight=0.1,
    )
    return Plan(
        split="forget05",
        data=data,
        base=BaseSpec(str(tiny_base), dtype="float32", device="cpu"),
        config=config,
        authors=split_authors("forget05", data),
        count=3,
        utility=utility_rows(data, 2),
        reference_log=reference(data, tmp_path_factory.mktemp("reference") / "retrain.json"),
        revert=2,
    )


def reference(data: Path, path: Path) -> Path:
    """A retrain log made by hand: these rows, truth ratios around 1."""
    from evaluation.logs.records import write_log

    rows = [json.loads(line) for line in (data / "forget05_perturbed.json").read_text().split("\n")
            if line]  # fmt: skip
    records = tuple(
        RowRecord(row["question"], row["answer"], AnswerScore(4.0, 9), AnswerScore(4.0 + i / 10, 9),
                  (AnswerScore(4.2, 9), AnswerScore(4.0, 9)))
        for i, row in enumerate(rows)
    )  # fmt: skip
    return write_log(EvalLog({"forget": SetRecord("forget", records, len(records))}), path)


@pytest.fixture(autouse=True, scope="module")
def _private_home(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        home = tmp_path_factory.mktemp("home")
        patch.setenv("UNLEARNER_KEY", str(home / "key"))
        patch.setenv("UNLEARNER_CACHE", str(home / "cache"))
        yield


@pytest.fixture(scope="module")
def done(plan: Plan, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    out = tmp_path_factory.mktemp("sequence") / "out"
    return run_sequence(plan, POLICIES, out), out


def test_the_authors_of_a_split_come_in_its_order_with_the_retain_rows(data: Path) -> None:
    authors = split_authors("forget05", data, limit=2)
    assert [a.name for a in authors] == ["Kim Sato", "Ola Lind", "Mira Okafor"]
    assert [(len(a.request.rows), len(a.measured)) for a in authors] == [(3, 2)] * 3
    assert all(a.name in row.question for a in authors for row in a.request.rows)
    # No author of the split is kept, whether it was asked for already or not.
    kept = {row.question for row in authors[0].request.retain}
    assert kept == {row["question"] for row in rows_of("Jonas Berg")}
    own = [Row("Q?", "A.")]
    assert split_authors("forget05", data, own)[0].request.retain == tuple(own)
    with pytest.raises(UserError, match="'forget07' is no forget split"):
        split_authors("forget07", data)


def test_every_policy_measures_every_author_after_each_arrival(
    done: tuple[dict[str, Any], Path], plan: Plan
) -> None:
    found, out = done
    assert found == json.loads((out / "sequence.json").read_text())
    assert (found["kind"], found["schema"], found["requests"]) == ("unlearner-sequence", 1, 3)
    assert [line["policy"] for line in found["policies"]] == list(POLICIES)
    for line in found["policies"]:
        assert len(line["arrivals"]) == len(line["interference"]) == 3
        for number, stage in enumerate(line["arrivals"], start=1):
            asked = [author["requested"] for author in stage["authors"]]
            assert asked == [True] * number + [False] * (3 - number)
            assert len(stage["active"]) == (1 if line["policy"] == "consolidated" else number)
            assert 0 <= stage["forget_quality"] <= 1
            assert 0 < stage["requested_answer_prob"] < 1
            assert (stage["waiting_nll"] is None) == (number == 3)
            assert 0 <= stage["utility_teacher_forced"] < 1
            assert (stage["model_utility"] is not None) == (number == 3)
        first, last = line["arrivals"][0]["authors"][0], found["origin"]["authors"][0]
        assert first["nll"] - last["nll"] == pytest.approx(line["interference"][0][0])
        assert first["nll"] > last["nll"]
    assert found["origin"]["forget_quality"] is None


def test_what_the_policies_cost(done: tuple[dict[str, Any], Path]) -> None:
    lines = {line["policy"]: line for line in done[0]["policies"]}
    costs = {
        policy: [s["cost"]["pairs"] for s in line["arrivals"]] for policy, line in lines.items()
    }
    # Two passes over three rows each; over three, six and nine rows.
    assert costs == {"on-stack": [6, 6, 6], "consolidated": [6, 12, 18]}
    for line in lines.values():
        total = line["cost"]
        assert total["pairs"] == sum(s["cost"]["pairs"] for s in line["arrivals"])
        assert total["seconds"] > 0
        assert total["bytes"] > 0


def test_a_revert_leaves_what_the_store_says_and_a_rebase_makes_it_good(
    done: tuple[dict[str, Any], Path],
) -> None:
    lines = {line["policy"]: line for line in done[0]["policies"]}
    origin = done[0]["origin"]
    stacked = lines["on-stack"]
    r1, r2, r3 = (stage["slug"] for stage in stacked["arrivals"])
    assert stacked["revert"]["active"] == [r1, r3]
    assert stacked["revert"]["stale"] == [r3]
    rebased = stacked["rebase"]
    assert (rebased["trained"], rebased["stale"]) == (1, [])
    assert rebased["active"][0] == r1
    assert rebased["active"][1] not in (r2, r3)
    assert rebased["cost"]["pairs"] == 6

    one = lines["consolidated"]
    assert one["revert"]["active"] == []
    assert one["revert"]["authors"][0]["nll"] == origin["authors"][0]["nll"]
    assert one["rebase"]["cost"]["pairs"] == 12
    assert len(one["rebase"]["active"]) == 1
    for line in lines.values():
        assert [a["requested"] for a in line["revert"]["authors"]] == [True, False, True]
        assert line["rebase"]["model_utility"] is not None


def test_guarded_rows_are_those_of_earlier_requests(done: tuple[dict[str, Any], Path]) -> None:
    (folder,) = done[1].glob("on-stack-*")
    store = AdapterStore.open(folder / "store")
    rows = {one.label: one.manifest.train["guard_rows"] for one in store.list()}
    assert rows == {"request-1": 0, "request-2": 3, "request-3": 6, "rebase-3": 3}


def test_only_what_was_trained_on_decides_whether_it_is_trained_again(
    done: tuple[dict[str, Any], Path], plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("trained again")

    monkeypatch.setattr(systems, "unlearn", never)
    found, out = done
    assert run_sequence(plan, POLICIES, out) == found
    # Another reference log and fewer rows change the figures, and train nothing.
    without = run_sequence(replace(plan, reference_log=None), ["on-stack"], out)
    stages = (without["policies"][0]["arrivals"], found["policies"][0]["arrivals"])
    for before, after in zip(*stages, strict=True):
        assert (before["forget_quality"], before["authors"]) == (None, after["authors"])
    again = run_sequence(plan, ["on-stack"], out)
    assert [s["forget_quality"] for s in again["policies"][0]["arrivals"]] == [
        s["forget_quality"] for s in found["policies"][0]["arrivals"]
    ]
    fewer = split_authors("forget05", plan.data, limit=1)
    assert run_sequence(replace(plan, authors=fewer), ["on-stack"], out)["rows_measured"] == 3
    # Another revert, other rows or another template are another sequence.
    for change in (
        {"revert": 1},
        {"authors": split_authors("forget05", plan.data, [Row("Q?", "A.")])},
        {"template": "chat"},
    ):
        with pytest.raises(AssertionError, match="trained again"):
            run_sequence(replace(plan, **change), ["on-stack"], out)


def test_an_arrival_that_was_cut_off_goes_on(plan: Plan, tmp_path: Path, monkeypatch: Any) -> None:
    import evaluation.experiments.sequence as module

    small = replace(plan, count=2, revert=0)
    real, calls = module.measure, []

    def stop_at_second(report: Any, **given: Any) -> str:
        calls.append(given["log"].stem)
        if given["log"].stem == "arrival-02" and calls.count("arrival-02") == 1:
            raise KeyboardInterrupt
        return real(report, **given)

    monkeypatch.setattr(module, "measure", stop_at_second)
    with pytest.raises(KeyboardInterrupt):
        run_sequence(small, ["on-stack"], tmp_path)
    found = run_sequence(small, ["on-stack"], tmp_path)
    (line,) = found["policies"]
    store = AdapterStore.open(next(tmp_path.glob("on-stack-*")) / "store")
    assert [one.label for one in store.list()] == ["request-1", "request-2"]
    assert [one.slug for one in store.active()] == line["arrivals"][1]["active"]
    assert line["arrivals"][1]["cost"]["seconds"] > 0


def test_a_full_fine_tune_of_a_request_is_measured_and_kept(
    plan: Plan, tmp_path: Path, monkeypatch: Any
) -> None:
    from evaluation.logs import read_log
    from unlearner.baselines.full import RECORD

    given: dict[str, Any] = {
        "request": plan.authors[0].request,
        "base": plan.base,
        "config": plan.config,
        "out": tmp_path,
        "what": systems.Measured(plan.data, "forget05", limit=2),
        "log": tmp_path / "full.json",
    }
    events: list[dict[str, Any]] = []
    log = read_log(Path(systems.full_and_measure(events.append, **given)))
    (folder,) = tmp_path.glob("full-*")
    record = json.loads((folder / RECORD).read_text())
    assert record["data"]["forget"]["n"] == 3
    assert log.meta["base"] == str(folder)
    assert len(log.sets["forget"].rows) == 2
    monkeypatch.setattr(systems, "forget_full", None)
    assert systems.full_and_measure(events.append, **given) == str(tmp_path / "full.json")


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"count": 4}, "4 requests cannot arrive: the split has 3 authors"),
        ({"revert": 4}, "Request 4 cannot be reverted: 3 arrive"),
    ],
)
def test_what_cannot_be_done_is_refused_before_any_work(
    change: dict[str, Any], problem: str, plan: Plan, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=problem):
        run_sequence(replace(plan, **change), ["on-stack"], tmp_path)
    with pytest.raises(UserError, match="'stack' is no policy"):
        run_sequence(plan, ["stack"], tmp_path)
    assert list(tmp_path.iterdir()) == []


def log_of(nll: list[float], kept: float = 0.5) -> EvalLog:
    """Forget rows with these mean NLLs, wrong answers at 2, and one row to keep in each set."""

    def row(i: int, value: float) -> RowRecord:
        score = AnswerScore(value, 4)
        return RowRecord(f"q{i}", f"a{i}", score, score, (AnswerScore(2.0, 4),))

    sets = {"forget": SetRecord("forget", tuple(row(i, x) for i, x in enumerate(nll)))}
    sets |= {n: SetRecord(n, (row(0, kept),)) for n in ("retain", "real_authors", "world_facts")}
    return EvalLog(sets)


def test_the_figures_by_hand() -> None:
    spans, retrain = [(0, 2), (2, 4)], log_of([2.0, 2.5, 3.0, 3.5])
    before, after = log_of([0.0, 1.0, 0.2, 0.4]), log_of([2.0, 2.5, 0.3, 0.7])
    found = figures(after, spans, frozenset({0}), retrain)
    assert found["authors"][0]["nll"] == 2.25
    assert found["requested_nll"] == 2.25
    assert found["waiting_answer_prob"] == pytest.approx((math.exp(-0.3) + math.exp(-0.7)) / 2)
    assert (found["forget_quality"], found["ks"], found["log_r_shift"]) == (1.0, 0.0, 0.0)
    # log R = 1.5 below: retain P e^-.5, options e^-.5 / (e^-.5 + e^-2), truth ratio 1 - e^-1.5.
    p, option = math.exp(-0.5), 1 / (1 + math.exp(-1.5))
    parts = [p, option, option, *[1 - math.exp(-1.5)] * 3]
    assert found["utility_teacher_forced"] == pytest.approx(6 / sum(1 / x for x in parts))
    assert found["model_utility"] is None
    assert step_between(before, after, spans) == pytest.approx([1.75, 0.2])
    everyone = figures(after, spans, frozenset({0, 1}), retrain)
    assert everyone["waiting_nll"] is None
    assert everyone["log_r_shift"] < 0
    assert figures(after, spans, frozenset({0}), None)["forget_quality"] is None
    with pytest.raises(UserError, match="different rows"):
        quality_of([RowRecord("other", "a")], retrain)


def test_the_command_runs_a_sequence_and_prints_a_line_a_stage(
    data: Path, tiny_base: Path, tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    from ui.cli.main import main

    call: Callable[..., int] = lambda *words: main([str(word) for word in words])  # noqa: E731
    words = ["sequence", "tofu:forget05", "--base", tiny_base, "--data", data, "--out", tmp_path,
             "--requests", 1, "--limit", 1, "--policies", "on-stack", "--num-train-epochs", 1,
             "--lora-r", 2, "--device", "cpu", "--dtype", "float32"]  # fmt: skip
    assert call(*words, "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["rows_measured"] == 3
    assert told["settings"]["train"]["num_train_epochs"] == 1
    arrival = told["policies"][0]["arrivals"][0]
    assert arrival["cost"]["pairs"] == 3
    assert arrival["outcome"]["forget"]["of"] == 3
    # What is not given is chosen for the model, as in `forget`.
    (manifest,) = tmp_path.glob(f"on-stack-*/store/adapters/{arrival['slug']}/forget_manifest.json")
    assert json.loads(manifest.read_text())["train"]["learning_rate"] == 1e-3
    table = (tmp_path / "sequence.md").read_text().splitlines()
    assert table[0] == "# 1 request of forget05, one after another"
    assert [line.split("|")[2].strip() for line in table[4:8]] == [
        "stage", "---", "origin", "after 1",
    ]  # fmt: skip
    rise = told["policies"][0]["interference"][0][0]
    assert table[-1].startswith(f"| 1 | {rise:.4g} |")
    assert "on-stack, retain P" in (tmp_path / "sequence.svg").read_text()
    assert call(*words) == 0
    out = capsys.readouterr().out
    assert "after 1" in out
    assert "on-stack: 1 step, 3 pairs" in out
    assert call("sequence", "rows.jsonl", "--base", tiny_base, "--out", tmp_path) == 2

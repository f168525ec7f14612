"""The Runs tab without a page: probes in their files, the front, the choice, the exports."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from adapters.errors import UserError
from ui.app.data import runs
from ui.app.data.runs import Probes, is_probe
from ui.app.html import runs_page, views

ROBUST: dict[str, Any] = {
    "kind": "unlearner-robustness",
    "schema": 1,
    "relearning": {
        "curves": [
            {
                "name": "simnpo",
                "points": [
                    {"step": 0, "seen_answer_prob": 0.1, "unseen_answer_prob": 0.2},
                    {"step": 5, "seen_answer_prob": 0.9, "unseen_answer_prob": 0.4},
                ],
            }
        ]
    },
    "sampling": {
        "curves": [
            {
                "name": "simnpo",
                "points": [
                    {"n": 1, "best_rouge_l_recall": 0.3, "share_leaked": 0.0},
                    {"n": 8, "best_rouge_l_recall": 0.6, "share_leaked": 0.25},
                ],
            }
        ]
    },
    "verdicts": [
        {"name": "relearning", "value": 0.4, "threshold": 0.3, "holds": False, "text": "<b>back"}
    ],
}
STRENGTH: dict[str, Any] = {
    "kind": "unlearner-calibration",
    "schema": 1,
    "adapter": "r0001",
    "chosen_scale": 0.75,
    "curve": [
        {"scale": 1.0, "ks": 0.3, "retain_answer_prob": 0.8, "model_utility": None},
        {"scale": 0.5, "ks": 0.1, "retain_answer_prob": 0.9, "model_utility": 0.6},
    ],
}


def gather_probes(
    store: Any, logs: Any = (), robustness: Any = (), calibration: Any = ()
) -> Probes:
    files = (tuple(logs), None, tuple(robustness), tuple(calibration))
    return runs.Sources(store, *files).probes()


def _write(path: Path, value: Any) -> Path:
    path.write_text(json.dumps(value))
    return path


def test_probes_are_read_beside_the_logs_and_where_they_are_named(tmp_path: Path) -> None:
    beside = tmp_path / "logs"
    beside.mkdir()
    _write(beside / "robustness.json", ROBUST)
    named = _write(tmp_path / "mine.json", STRENGTH)
    found = gather_probes(None, [beside / "a.json", beside / "b.json"], (), [named])
    assert found.relearning == {"simnpo": [(0.0, 0.2), (5.0, 0.4)]}
    assert found.taught == {"simnpo": [(0.0, 0.1), (5.0, 0.9)]}
    assert found.sampling == {"simnpo": [(1.0, 0.0), (8.0, 0.25)]}
    (strength,) = found.strengths
    assert (strength.name, strength.chosen) == ("r0001", 0.75)
    assert strength.curves["KS distance"] == [(0.5, 0.1), (1.0, 0.3)]
    assert strength.curves["model utility"] == [(0.5, 0.6)]  # not measured is no point at 0
    twice = gather_probes(None, [beside / "a.json"], [beside / "robustness.json"])
    assert len(twice.verdicts) == 1  # the same file is not read twice


def test_a_card_without_an_attack_and_an_undecided_verdict_are_read(tmp_path: Path) -> None:
    undecided = {"name": "drop", "value": None, "threshold": 0.1, "holds": None, "text": "?"}
    card = {**ROBUST, "relearning": None, "sampling": None, "verdicts": [undecided]}
    found = gather_probes(None, (), [_write(tmp_path / "r.json", card)])
    assert (found.relearning, found.sampling) == ({}, {})
    assert "undecided" in runs_page.plots_html(runs.Runs([], {}, [], []), found)


def test_a_state_measured_once_is_a_level_beside_every_curve() -> None:
    rising = [(0.0, 0.1), (5.0, 0.9)]
    found = Probes(relearning={"origin": [(0.0, 0.99)], **dict.fromkeys("abcde", rising)})
    page = runs_page.plots_html(runs.Runs([], {}, [], []), found)
    for name in ("origin", *"abcde"):
        assert f">{name}</text>" in page


def test_probes_of_two_owners_keep_their_names_apart(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        _write(tmp_path / name / "robustness.json", ROBUST)
    found = gather_probes(None, [tmp_path / "one" / "a.json", tmp_path / "two" / "a.json"])
    assert set(found.sampling) == {"simnpo", "simnpo (two)"}
    assert [verdict["of"] for verdict in found.verdicts] == ["one", "two"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{broken", "is not JSON"),
        ("[1]", "holds list, not an object"),
        ('{"kind": "unlearner-calibration", "schema": 1}', "is of kind 'unlearner-calibration'"),
        ('{"kind": "unlearner-robustness", "schema": 9}', "has schema 9"),
        (None, "There is no card"),
    ],
)
def test_a_file_of_another_kind_is_refused(tmp_path: Path, text: str | None, words: str) -> None:
    path = tmp_path / "p.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match=words):
        gather_probes(None, (), [path])


def test_filed_probes_are_curves_and_no_rows_of_the_table(tmp_path: Path, put: Any) -> None:
    from adapters.store.store import AdapterStore

    slug = put("1")
    store = AdapterStore.open(tmp_path / "store")
    # As `unlearner robustness` and `calibrate` file them: columns and words, no rows.
    filed = {"verdicts": {"relearning": "leaks", "sampling": "holds"}, "leaks": 1}
    store.attach_eval(slug, "robustness-forget05", filed)
    columns = {name: [point[name] for point in STRENGTH["curve"]] for name in STRENGTH["curve"][0]}
    store.attach_eval(slug, "calibration-forget05", {**STRENGTH, "curve": columns})
    store.attach_eval(slug, "robustness-forget10", {"other": 1})
    store.attach_eval(slug, "forget05-tofu", {"split": "forget05", "model_utility": 0.5})
    sources = runs.Sources(store)
    found, probes = sources.runs(), sources.probes()
    assert len(found.table) == 1
    assert runs.split_of(found) == "forget05"
    assert probes.strengths[0].chosen == 0.75
    assert probes.strengths[0].curves["KS distance"] == [(0.5, 0.1), (1.0, 0.3)]
    assert [(one["name"], one["said"]) for one in probes.verdicts] == [
        ("relearning", "leaks"), ("sampling", "holds"),
    ]  # fmt: skip
    assert "robustness-forget10" in probes.notes[0]
    assert is_probe("robustness-forget05")
    cells = views.adapter_cells(store.get(slug), "mine", store.evals(slug))
    assert "robustness-forget05: 1 of 2 probes leak" in cells["Figures"]
    assert "calibration-forget05: strength 0.75" in cells["Figures"]


def test_the_front_is_drawn_for_what_was_measured_and_escaped() -> None:
    table = [
        {"name": name, "source": "log", "model_utility": x, "forget_quality_log10": y}
        for name, x, y in (("<a>", 0.1, -1.0), ("b", 0.5, -2.0), ("c", 0.2, -9.0))
    ]
    page = runs_page.plots_html(runs.Runs(table, {}, [("npo", -3.0, 0.5)], []))
    assert "front of those measured here: &lt;a&gt;, b." in page
    assert "<a>" not in page
    assert ">front of those measured here</text>" in page
    assert ">front of the published</text>" not in page  # one point is no front


def test_the_page_shows_probes_and_what_is_chosen_escaped(tmp_path: Path) -> None:
    found = runs.Runs([], {"one": [0.1, 0.2], "two": [1.0, 2.0]}, [("npo", -3.0, 0.5)], [])
    probes = gather_probes(
        None, (), [_write(tmp_path / "r.json", ROBUST)], [_write(tmp_path / "c.json", STRENGTH)]
    )
    page = runs_page.plots_html(found, probes)
    assert "&lt;b&gt;back" in page
    assert "<b>back" not in page
    assert "chosen: 0.75" in page
    for title in ("Relearning", "Many answers drawn", "Verdicts, each with its threshold"):
        assert title in page
    assert "Relearning" not in runs_page.plots_html(found, Probes())
    chosen = runs_page.log_r_html(found, ["two"])
    assert "two: mean +1.500." in chosen
    assert ">one</text>" not in chosen
    assert "No run is chosen" in runs_page.log_r_html(found, [])


def test_the_report_is_one_file_that_fetches_nothing(tmp_path: Path, shared: Path) -> None:
    logs = shared / "reference-logs"
    sources = runs.Sources(
        None, (logs / "llama2-7b_full.json",), logs / "llama2-7b_retain90_tofu.json",
        (_write(tmp_path / "r.json", ROBUST),),
    )  # fmt: skip
    text = runs_page.write_report(sources, tmp_path / "report.html").read_text()
    assert "llama2-7b_full" in text
    assert "Relearning" in text
    assert "src=" not in text
    assert "<link" not in text
    assert "Content-Security-Policy" in text
    assert "unlearner report " in text, "the command that makes the same file"
    filed = runs_page.write_report(runs.Sources(), tmp_path / "filed.html").read_text()
    assert "Content-Security-Policy" in filed
    assert "unlearner report" not in filed, "without a log there is no command"


def test_published_points_are_those_of_the_same_model_and_split(tmp_path: Path) -> None:
    from evaluation.logs.records import EvalLog, write_log

    def published(**meta: str) -> int:
        name = "-".join(meta.values()).replace("/", "-")
        log = write_log(EvalLog({}, meta), tmp_path / f"{name}.json")
        return len(runs.Sources(None, (log,)).runs().published)

    assert published(base="org/Llama-2-7b-chat-hf", split="forget05") > 0
    assert published(base="org/Llama-2-7b-chat-hf", split="forget01") == 0
    assert published(base="org/Llama-3.2-1B", split="forget05") == 0
    assert published(split="forget05") == 0, "a log that states no model"

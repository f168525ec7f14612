"""The Runs tab without a page: probes in their files, the front, the choice, the exports."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from adapters.errors import UserError
from ui.app.data import runs
from ui.app.data.probes import Probes, gather_probes, is_probe, read_probe
from ui.app.html import curves, runs_page, views

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
    assert "undecided" in runs_page.verdicts_html(found)


def test_a_state_measured_once_is_a_level_and_a_fifth_curve_is_named() -> None:
    rising = [(0.0, 0.1), (5.0, 0.9)]
    found = Probes(relearning={"origin": [(0.0, 0.99)], "a": rising, "b": rising, "c": rising,
                               "d": rising})  # fmt: skip
    page = runs_page.plots_html(runs.Runs([], {}, [], []), found)
    assert "origin 0.990" in page
    assert "Not drawn, a plot holds four: d." in page


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
        ("{broken", "is no robustness result"),
        ("[1]", "is no robustness result"),
        ('{"kind": "unlearner-calibration", "schema": 1}', "is no robustness result"),
        ('{"kind": "unlearner-robustness", "schema": 9}', "has schema 9"),
    ],
)
def test_what_is_no_probe_is_refused(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "p.json"
    path.write_text(text)
    with pytest.raises(UserError, match=words):
        read_probe(path, "robustness")
    with pytest.raises(UserError, match="cannot be read"):
        read_probe(tmp_path / "none.json", "robustness")


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
    cells = views.adapter_cells(store.get(slug), store.evals(slug))
    assert "robustness-forget05: 1 of 2 probes leak" in cells[8]
    assert "calibration-forget05: strength 0.75" in cells[8]


def test_the_front_joins_what_nothing_beats_in_both() -> None:
    assert curves.front([(0.1, -1.0), (0.5, -3.0), (0.3, -4.0), (0.5, -2.0)]) == [0, 3]
    assert curves.front([(1.0, 1.0), (1.0, 1.0)]) == [0, 1]  # equal points both stay
    assert curves.front([]) == []


def test_the_front_passes_through_its_points() -> None:
    points = [("a", 0.1, -1.0, "here"), ("b", 0.5, -2.0, "here"), ("c", 0.2, -9.0, "here"),
              ("<p>", 0.6, -0.5, "there")]  # fmt: skip
    drawn = curves.pareto_with_front(points, "l", "x", "y", {"here": "our <front>"})
    path = drawn.split('points="')[1].split('"')[0].split()
    assert len(path) == 2
    marks = curves._MARK.findall(drawn)
    drop = curves.MARK_DROP
    assert path == [f"{float(x):.1f},{float(y) - drop:.1f}" for x, y in marks[:2]]
    assert "our &lt;front&gt;" in drawn
    alone = curves.pareto_with_front(points[3:], "l", "x", "y", {"there": "front"})
    assert "un-front" not in alone  # one point is no front


def test_the_page_shows_probes_and_what_is_chosen_escaped(tmp_path: Path) -> None:
    found = runs.Runs([], {"one": [0.1, 0.2], "two": [1.0, 2.0]}, [("npo", -3.0, 0.5)], [])
    probes = gather_probes(
        None, (), [_write(tmp_path / "r.json", ROBUST)], [_write(tmp_path / "c.json", STRENGTH)]
    )
    page = runs_page.plots_html(found, probes)
    assert "&lt;b&gt;back" in page
    assert "<b>back" not in page
    assert "chosen: 0.75" in page
    for title in ("Relearning", "Many answers drawn", "Verdicts of the probes"):
        assert title in page
    assert "Relearning" not in runs_page.plots_html(found, Probes())
    chosen = runs_page.log_r_html(found, ["two"])
    assert "two, mean +1.500" in chosen
    assert "one" not in chosen
    assert "No run is chosen" in runs_page.log_r_html(found, [])


def test_the_report_is_one_file_that_fetches_nothing(tmp_path: Path, shared: Path) -> None:
    logs = shared / "reference-logs"
    sources = runs.Sources(
        None, (logs / "llama2-7b_full.json",), logs / "llama2-7b_retain90_tofu.json",
        (_write(tmp_path / "r.json", ROBUST),),
    )  # fmt: skip
    text = runs.write_report(sources, tmp_path / "report.html").read_text()
    assert "llama2-7b_full" in text
    assert "Relearning" in text
    assert "src=" not in text
    assert "<link" not in text
    assert "Content-Security-Policy" in text
    assert "unlearner report " in text, "the command that makes the same file"
    filed = runs.write_report(runs.Sources(), tmp_path / "filed.html").read_text()
    assert "Content-Security-Policy" not in filed, "without a log the page's own tables"

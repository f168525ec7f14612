"""Reports: what they show equals what was measured, the same bytes each time, nothing unescaped."""

from __future__ import annotations

import csv
import io
import json
import math
import random
import re
import xml.etree.ElementTree as ET
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from adapters.atomic_files import sha256_file
from adapters.errors import UserError
from evaluation.logs import read_log
from evaluation.logs.records import (
    AnswerScore,
    EvalLog,
    Generation,
    RowRecord,
    SetRecord,
    write_json,
    write_log,
)
from evaluation.metrics.summary import summarise
from evaluation.protocols import PROTOCOLS, protocol_named
from evaluation.report import inputs as report_inputs
from evaluation.report.answers import answer_sets, word_differences
from evaluation.report.build import ReportRequest, ecdf, gather
from evaluation.report.cards import read_calibration, read_robustness
from evaluation.report.document import markdown_text
from evaluation.report.files import make_report
from evaluation.report.numbers import fixed, plain
from evaluation.report.plots import draw_svg

FULL, NPO, RETRAIN = (
    "llama2-7b_full.json",
    "llama2-7b_retain90_npo.json",
    "llama2-7b_retain90_tofu.json",
)
ROWS = {"forget": 24, "retain": 9, "real_authors": 6, "world_facts": 5}
NASTY = '<script src="https://evil.example/x.js">alert(1)</script> | **b** ~~s~~ [l](http://e.x)'


def made_log(
    seed: int, shift: float = 0.0, rows: dict[str, int] | None = None, **meta: Any
) -> EvalLog:
    """A log of every set with random scores; `shift` moves log R."""
    draw = random.Random(seed)
    decoding = PROTOCOLS["tofu"].decoding.name
    sets = {}
    for name, count in (rows or ROWS).items():
        found = []
        for i in range(count):
            truth = f"{name} answer {i} is one two three"
            said = truth if draw.random() < 0.5 else "something else"
            recall = 1.0 if said == truth else 0.1 * (i % 5)
            right = abs(1.0 + shift + draw.gauss(0, 0.4))
            wrong = tuple(AnswerScore(1.0 + draw.random(), 5) for _ in range(3))
            found.append(
                RowRecord(
                    f"{name} question {i}?", truth, AnswerScore(right, 6), AnswerScore(right, 6),
                    wrong, {decoding: Generation(said, None, recall)},
                )
            )  # fmt: skip
        sets[name] = SetRecord(name, tuple(found), count)
    return EvalLog(sets, {"protocols": ["tofu"], "limit": None, "split": "forget05", **meta})


def robustness_card() -> dict[str, Any]:
    points = [
        {"step": i, "seen_answer_prob": 0.1 * i, "unseen_answer_prob": None} for i in range(4)
    ]
    draws = [{"n": 2**i, "best_rouge_l_recall": 0.2 + 0.1 * i, "share_leaked": 0.1 * i}
             for i in range(4)]  # fmt: skip
    return {
        "kind": "unlearner-robustness", "schema": 1, "base": "tiny", "adapters": ["r0001"],
        "split": "forget05", "protocol": "tofu", "limit": 20,
        "states": [
            {"name": "origin", "forget_quality": 1e-12, "ks": 0.5, "log_r_shift": -0.25,
             "direction": "under-forgotten", "model_utility": 0.61, "forget_answer_prob": 0.98},
            {"name": "merged, nf4", "forget_quality": None, "ks": None, "model_utility": 0.6},
        ],
        "relearning": {"share": 0.5, "curves": [{"name": "unlearned", "points": points}]},
        "sampling": {"samples": 8, "curves": [{"name": "retrain", "points": draws}]},
        "paraphrase": [{"form": "prefix", "answer_prob": 0.1, "n": 20}],
        "verdicts": [{"name": "relearning", "value": 0.3, "threshold": 0.2, "holds": False,
                      "text": "comes back"}],
        "settings": {"seed": 7}, "seconds": 1.5,
    }  # fmt: skip


def calibration_card() -> dict[str, Any]:
    return {
        "kind": "unlearner-calibration", "schema": 1, "adapter": "r0001", "chosen_scale": 0.5,
        "rule": "smallest gap", "tried": 3,
        "curve": [
            {"scale": s, "log_r_gap": s - 0.5, "ks": abs(s - 0.5), "forget_quality": 0.5,
             "forget_answer_prob": 1 - s, "retain_answer_prob": 0.9, "model_utility": None}
            for s in (0.0, 0.5, 1.0)
        ],
        "held_out": {"log_r_gap": 0.01},
    }  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder as quickstart leaves it, with both cards."""
    out = tmp_path / "run"
    for name, seed, shift in (("retrain", 1, 0.0), ("simnpo", 2, 0.1), ("origin", 3, -1.0)):
        write_log(made_log(seed, shift), out / "logs" / f"{name}.json")
    write_json(out / "robustness.json", robustness_card())
    write_json(out / "calibration.json", calibration_card())
    return out


@pytest.fixture
def report(folder: Path, tmp_path: Path) -> Callable[..., Path]:
    """Writes a report of the folder; gives back where it lies."""

    def write(out: str = "report", *, png: bool = False, **options: Any) -> Path:
        options.setdefault("inputs", (str(folder),))
        make_report(ReportRequest(**options), tmp_path / out, png=png)
        return tmp_path / out

    return write


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_the_files_and_sections_of_a_whole_report(report: Callable[..., Path]) -> None:
    out = report()
    names = set(files_of(out))
    assert {"report.md", "report.html", "report.json", "table.csv", "rows.csv"} < names
    assert {n for n in names if n.startswith("plots/")} == {
        f"plots/{key}.svg"
        for key in (
            "tofu-quality-utility", "tofu-ecdf-origin", "tofu-ecdf-simnpo", "strength-gap-r0001",
            "strength-cost-r0001", "relearning-seen-r0001", "sampling-share-leaked-r0001",
            "sampling-best-rouge-l-recall-r0001",
        )
    }  # fmt: skip
    titles = re.findall(r"^## (.*)", (out / "report.md").read_text(), re.MULTILINE)
    assert titles == [
        "Before you read", "Systems", "Forgetting against keeping", "Distributions of log R",
        "Parts of model utility", "Strength curve, r0001", "Robustness, r0001",
        "Best and worst answers", "How to read the figures", "Provenance",
    ]  # fmt: skip
    page = (out / "report.html").read_text()
    assert re.findall(r"<h2[^>]*>([^<]*)", page) == titles


def test_the_same_inputs_give_the_same_bytes(report: Callable[..., Path]) -> None:
    first = report("one")
    draw_svg.cache_clear()
    second = report("two")
    assert files_of(first) == files_of(second)


def test_png_has_the_same_bytes_and_no_metadata(folder: Path, tmp_path: Path) -> None:
    for out in ("one", "two"):
        request = ReportRequest((), calibration=(folder / "calibration.json",))
        make_report(request, tmp_path / out, png=True)
    names = [name for name in files_of(tmp_path / "one") if name.endswith(".png")]
    assert len(names) == 2
    for name in names:
        data = (tmp_path / "one" / name).read_bytes()
        assert data == (tmp_path / "two" / name).read_bytes()
        assert b"tEXt" not in data
        assert b"Software" not in data


@pytest.mark.parametrize("name", [FULL])
def test_the_table_equals_the_summary_and_d_the_ks_statistic(
    name: str, shared: Path, tmp_path: Path
) -> None:
    logs = shared / "reference-logs"
    request = ReportRequest((f"npo={logs / name}",), reference_log=logs / RETRAIN, published="none")
    out = tmp_path / "report"
    made = make_report(request, out).report
    figures = summarise(read_log(logs / name), read_log(logs / RETRAIN))
    system = next(one for one in made.views[0].systems if one.name == "npo")
    assert system.figures == figures
    assert system.ecdf is not None
    assert system.ecdf.d == pytest.approx(figures["ks"], abs=1e-12)
    ours, theirs = system.ecdf.ours, system.ecdf.theirs
    below = [sum(x <= system.ecdf.at for x in side) / len(side) for side in (ours, theirs)]
    assert abs(below[0] - below[1]) == pytest.approx(figures["ks"], abs=1e-12)
    lines = csv.DictReader(io.StringIO((out / "table.csv").read_text()))
    rows = {row["name"]: row for row in lines}
    for key in ("forget_quality", "ks", "model_utility", "forget_nll", "Retain ROUGE"):
        wanted = figures.get(key, figures["model_utility_parts"].get(key))
        assert float(rows["npo"][key]) == wanted
    assert float(rows["npo"]["ks_low"]) == figures["ks_interval"][0]
    assert float(rows["npo"]["forget_quality_high"]) == figures["forget_quality_interval"][1]
    assert (
        f"{figures['forget_quality_interval'][1]:.3g}]; log10" in (out / "report.html").read_text()
    )
    page = (out / "report.html").read_text()
    for value in (figures["ks"], figures["model_utility"], figures["forget_nll"]):
        assert f"{value:.3f}" in page
    assert figures["direction"] in page


def test_the_reference_is_the_system_called_retrain(report: Callable[..., Path]) -> None:
    made = json.loads((report() / "report.json").read_text())
    assert made["retrain"] == "retrain"
    systems = made["views"][0]["systems"]
    assert [one["name"] for one in systems] == ["origin", "retrain", "simnpo"]
    assert [one["role"] for one in systems] == ["measured", "retrain reference", "measured"]
    assert systems[1]["figures"]["forget_quality"] == pytest.approx(1.0)


def test_without_a_reference_the_reason_stands_in_place_of_the_number(
    folder: Path, report: Callable[..., Path]
) -> None:
    out = report(inputs=(f"a={folder / 'logs' / 'simnpo.json'}",))
    text = (out / "report.md").read_text()
    line = next(line for line in text.splitlines() if line.startswith("| a |"))
    assert "needs a retrain reference" in line
    assert "Distributions of log R" not in text
    assert not list((out / "plots").glob("*ecdf*"))


def test_published_rows_stand_beside_ours_and_say_so(report: Callable[..., Path]) -> None:
    lines = (report() / "report.md").read_text().splitlines()
    table = [line.split(" | ") for line in lines if line.startswith(("| origin |", "| simnpo |"))]
    sources = [(row[0].strip("| "), row[1]) for row in table[:4]]
    assert sources[:2] == [("origin", "measured"), ("origin", "published")]
    assert sources[2:] == [("simnpo", "measured"), ("simnpo", "published")]
    assert table[3][2] == "0.99"
    without = (report("none", published="none") / "report.md").read_text()
    assert "| published |" not in without
    with pytest.raises(UserError, match="no published rows 'x'"):
        report("bad", published="x")


def test_another_split_is_not_compared_with_published_rows(tmp_path: Path) -> None:
    path = write_log(made_log(1, split="forget01"), tmp_path / "a.json")
    made, _ = gather(ReportRequest((str(path),)))
    assert made.published == ()
    path = write_log(made_log(1, split="forget10"), tmp_path / "b.json")
    made, _ = gather(ReportRequest((str(path),)))
    assert {one.name: one.forget_quality for one in made.published}["simnpo"] == 0.45
    both = write_log(made_log(1), tmp_path / "c.json")
    made, _ = gather(ReportRequest((str(path), str(both))))
    assert made.published == ()
    assert "different splits: forget05, forget10" in " ".join(made.warnings)


def test_a_limited_run_is_marked(tmp_path: Path) -> None:
    path = write_log(made_log(1, limit=5), tmp_path / "a.json")
    made = make_report(ReportRequest((str(path),)), tmp_path / "out")
    page = made.html.read_text()
    assert "Limited: a measured on the first rows" in page
    assert "limited to the first 5 rows" in page


def test_a_log_of_other_rows_keeps_its_row_without_a_comparison(tmp_path: Path) -> None:
    ours = write_log(made_log(1, rows={"forget": 3}), tmp_path / "a.json")
    theirs = write_log(made_log(2), tmp_path / "retrain.json")
    request = ReportRequest((str(ours),), reference_log=theirs, without_answers=True)
    written = make_report(request, tmp_path / "out")
    system = next(s for s in written.report.views[0].systems if s.name == "a")
    assert system.figures["forget_quality"] is None
    assert system.ecdf is None
    assert any("not compared with the retrain reference" in w for w in written.report.warnings)
    # The refusal quotes a question elsewhere; here it must not.
    for path in written.files:
        assert "question 3?" not in path.read_text()


def test_several_protocols_make_a_table_each(report: Callable[..., Path]) -> None:
    out = report(protocols=("tofu", "tofu-paper"))
    titles = re.findall(r"^## (.*)", (out / "report.md").read_text(), re.MULTILINE)
    assert "Systems, protocol tofu" in titles
    assert "Systems, protocol tofu-paper" in titles
    rows = list(csv.DictReader(io.StringIO((out / "table.csv").read_text())))
    found = {r["protocol"]: r["ks"] for r in rows if r["name"] == "simnpo" and r["protocol"]}
    assert set(found) == {"tofu", "tofu-paper"}
    with pytest.raises(UserError, match="no protocol 'nope'"):
        report("bad", protocols=("nope",))


class Tags(HTMLParser):
    """Collects the tags of a page with their attributes, and its text."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture
def nasty(tmp_path: Path) -> Path:
    """A report whose questions, answers, names and title try to break out."""
    decoding = PROTOCOLS["tofu"].decoding.name
    row = RowRecord(
        NASTY, f"true {NASTY}", AnswerScore(1.0, 3), AnswerScore(1.0, 3), (AnswerScore(2.0, 3),),
        {decoding: Generation(f'=HYPERLINK("x") {NASTY}\n# head', None, 0.5)},
    )  # fmt: skip
    log = EvalLog({"forget": SetRecord("forget", (row,), 1)}, {"base": NASTY})
    path = write_log(log, tmp_path / "a.json")
    card = calibration_card() | {"adapter": NASTY, "rule": NASTY}
    cards = (write_json(tmp_path / "c.json", card),)
    inputs = (f"<i>x={path}",)
    request = ReportRequest(inputs, calibration=cards, title=NASTY, command=NASTY)
    make_report(request, tmp_path / "out")
    return tmp_path / "out"


def test_what_models_wrote_stays_text(nasty: Path) -> None:
    page = Tags()
    page.feed((nasty / "report.html").read_text())
    assert "script" not in {tag for tag, _ in page.tags}
    assert "i" not in {tag for tag, _ in page.tags}
    assert NASTY in page.text
    for path in (nasty / "plots").glob("*.svg"):
        ET.parse(path)
        assert "<script" not in path.read_text()
    text = (nasty / "report.md").read_text()
    # Indented lines are code, which Markdown shows as it stands.
    prose = re.sub(r"^    .*", "", text, flags=re.MULTILINE)
    assert "<script" not in prose
    assert "[l](" not in prose.replace(r"\[", "")
    assert "\n# head" not in prose
    cells = list(csv.DictReader(io.StringIO((nasty / "rows.csv").read_text())))
    assert cells[0]["answer"].startswith("'=HYPERLINK")


def test_nothing_is_loaded_from_anywhere(nasty: Path, report: Callable[..., Path]) -> None:
    for text in ((nasty / "report.html").read_text(), (report() / "report.html").read_text()):
        page = Tags()
        page.feed(text)
        for tag, attributes in page.tags:
            assert tag not in ("script", "img", "link", "iframe", "object", "embed", "base")
            for name, value in attributes.items():
                assert name not in ("src", "srcset", "data", "action") or not value
                assert name != "style" or "url(" not in str(value)
                assert not name.startswith("on")
                if name in ("href", "xlink:href"):
                    assert str(value).startswith("#")
        style = re.findall(r"<style>(.*?)</style>", text, re.DOTALL)
        assert style
        assert not re.search(r"url\(|@import|expression\(", "".join(style))
        assert "default-src 'none'" in text


def test_a_page_has_names_scopes_and_words_for_plots(report: Callable[..., Path]) -> None:
    out = report()
    page = Tags()
    page.feed((out / "report.html").read_text())
    tags = [tag for tag, _ in page.tags]
    assert tags.count("desc") == tags.count("svg") > 5
    assert tags.count("h1") == 1
    assert tags.count("caption") == tags.count("table") > 5
    for tag, attributes in page.tags:
        if tag == "th":
            assert attributes.get("scope") in ("col", "row")
        if tag == "svg":
            assert attributes["role"] == "img"
            assert attributes["aria-label"]
    ids = [a["id"] for _, a in page.tags if "id" in a]
    assert len(ids) == len(set(ids))
    links = {str(a["href"])[1:] for tag, a in page.tags if tag == "a"}
    assert links <= set(ids)
    for path in (out / "plots").glob("*.svg"):
        root = ET.parse(path).getroot()
        space = "{http://www.w3.org/2000/svg}"
        assert root.find(f"{space}title") is not None
        assert root.find(f"{space}desc") is not None


def test_without_answers_no_text_of_the_data_is_anywhere(report: Callable[..., Path]) -> None:
    with_texts, without = report("with"), report("without", without_answers=True)
    assert "holds questions and answers of the forget set" in (with_texts / "report.md").read_text()
    assert b"forget question 3?" in files_of(with_texts)["rows.csv"]
    for name, data in files_of(without).items():
        for word in (b"question 3?", b"answer 3 is", b"something else"):
            assert word not in data, name
    assert "Questions and answers were left out" in (without / "report.html").read_text()


def test_best_and_worst_follow_their_rule() -> None:
    protocol = protocol_named("tofu")
    log, origin = made_log(5, rows={"forget": 30, "retain": 8}), made_log(6)
    forget, retain = answer_sets("x", log.sets, protocol)
    assert (len(forget.best), len(forget.worst)) == (10, 10)
    best = [one.figures.rouge_l_recall or 0.0 for one in forget.best]
    worst = [one.figures.rouge_l_recall or 0.0 for one in forget.worst]
    assert best == sorted(best)
    assert worst == sorted(worst, reverse=True)
    assert "lowest ROUGE-L recall" in forget.rule
    assert (len(retain.best), len(retain.worst)) == (4, 4)
    assert not {one.row for one in retain.best} & {one.row for one in retain.worst}
    assert retain.best[0].figures.rouge_l_recall == 1.0
    kept = answer_sets("x", {"retain": made_log(7).sets["retain"]}, protocol, origin.sets)[0]
    assert "greatest gain of ROUGE-L recall over Origin" in kept.rule
    change = {one.row: one.change for one in (*kept.best, *kept.worst)}
    ours, theirs = made_log(7).sets["retain"].rows, origin.sets["retain"].rows
    name = protocol.decoding.name
    for row, found in change.items():
        old, new = (side[row].generations[name].rouge_l_recall for side in (theirs, ours))
        assert found == pytest.approx(new - old)
    assert kept.best[0].change == max(c for c in change.values() if c is not None)


def test_without_answers_in_a_log_probabilities_decide() -> None:
    rows = tuple(
        RowRecord(f"q{i}", f"a{i}", AnswerScore(float(i), 2)) for i in range(4)
    )  # fmt: skip
    sets = {name: SetRecord(name, rows, 4) for name in ("forget", "retain")}
    forget, retain = answer_sets("x", sets, protocol_named("tofu"))
    assert [one.row for one in forget.best] == [3, 2]
    assert [one.row for one in retain.best] == [0, 1]
    assert "probability of the true answer" in forget.rule
    bare = {"forget": SetRecord("forget", (RowRecord("q", "a"),), 1)}
    assert answer_sets("x", bare, protocol_named("tofu")) == ()


def test_word_differences_hold_every_word_once() -> None:
    left, right = word_differences("born in Lagos in 1961", "born in Rome in 1961")
    assert left == (("born in", False), ("Lagos", True), ("in 1961", False))
    assert right == (("born in", False), ("Rome", True), ("in 1961", False))
    assert word_differences("", "a b") == ((), (("a b", True),))


def test_plots_of_one_name_get_files_of_their_own(folder: Path, tmp_path: Path) -> None:
    again = write_json(tmp_path / "again.json", calibration_card() | {"chosen_scale": 1.0})
    paths = (folder / "calibration.json", again)
    logs = [f"{name}={folder / 'logs' / 'simnpo.json'}" for name in ("a b", "a-b")]
    retrain = folder / "logs" / "retrain.json"
    make_report(ReportRequest(tuple(logs), retrain, calibration=paths), tmp_path / "out")
    text = (tmp_path / "out" / "report.md").read_text()
    linked = re.findall(r"\]\(plots/(.*?)\)", text)
    assert len(linked) == len(set(linked)) == 7
    assert set(linked) == {path.name for path in (tmp_path / "out" / "plots").iterdir()}
    pair = [(tmp_path / "out" / "plots" / f"strength-gap-r0001{n}.svg").read_text()
            for n in ("", "-2")]  # fmt: skip
    assert "chosen 0.5" in pair[0]
    assert "chosen 1" in pair[1]


def test_cards_alone_make_a_report(folder: Path, tmp_path: Path) -> None:
    request = ReportRequest((), robustness=(folder / "robustness.json",))
    text = make_report(request, tmp_path / "out").html.read_text()
    assert "✗ leaks" in text
    assert "holds questions and answers" not in text
    assert "Limited to the first 20 rows" in text
    assert "under-forgotten" in text
    assert (tmp_path / "out" / "plots" / "sampling-share-leaked-r0001.svg").is_file()
    with pytest.raises(UserError, match="nothing to report on"):
        gather(ReportRequest(()))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"kind": "unlearner-calibration"}, "of kind 'unlearner-calibration'"),
        ({"schema": 2}, "has schema 2"),
        ({"states": {"a": 1}}, "states is not a list of objects"),
        ({"states": [{"ks": 0.1}]}, "states 0 has no name"),
        ({"states": [{"name": "a", "ks": math.nan}]}, "NaN is not a finite number"),
        ({"relearning": [1]}, "relearning is list, not an object"),
        ({"relearning": {"curves": [{"name": "x", "points": [{}]}]}}, "points 0 has no step"),
        ({"verdicts": [{"name": "x"}]}, "verdicts 0 has no text"),
        ({"paraphrase": None, "sampling": None, "drop": None}, None),
    ],
)
def test_cards_of_another_shape_are_refused(
    change: dict[str, Any], words: str | None, tmp_path: Path
) -> None:
    path = tmp_path / "card.json"
    path.write_text(json.dumps(robustness_card() | change))
    if words is None:
        assert read_robustness(path)["name"] == "r0001"
        return
    with pytest.raises(UserError, match=re.escape(words)):
        read_robustness(path)


def test_calibration_refuses_a_strength_that_is_no_number(tmp_path: Path) -> None:
    path = write_json(tmp_path / "c.json", calibration_card() | {"chosen_scale": "half"})
    with pytest.raises(UserError, match="chosen_scale is 'half'"):
        read_calibration(path)
    path = write_json(tmp_path / "c.json", calibration_card() | {"chosen_scale": None})
    assert read_calibration(path)["chosen_scale"] is None


def test_folders_of_every_command_are_looked_through(tmp_path: Path) -> None:
    log = made_log(1)
    write_log(log, tmp_path / "one" / "eval_log.json")
    for name in ("base", "r0001"):
        write_log(log, tmp_path / "many" / name / "eval_log.json")
    write_log(log, tmp_path / "made" / "logs" / "origin.json")
    write_log(log, tmp_path / "made" / "logs" / "parts" / "x.json")
    write_log(log, tmp_path / "made" / "npo-1" / "log.json")
    write_json(
        tmp_path / "made" / "result.json",
        {
            "target": "tofu-forget05", "methods": {"npo": {"seed": 3}},
            "checks": [{"name": "npo", "figure": "ks", "text": "npo: it is within the band"}],
            "logs": {"origin": "elsewhere/logs/origin.json", "npo": "elsewhere/npo-1/log.json"},
        },
    )  # fmt: skip
    found = {
        name: report_inputs.find_inputs([str(tmp_path / name)]).logs for name in ("one", "many")
    }
    assert list(found["one"]) == ["one"]
    assert list(found["many"]) == ["base", "r0001"]
    made = report_inputs.find_inputs([str(tmp_path / "made")])
    assert made.logs["npo"] == tmp_path / "made" / "npo-1" / "log.json"
    assert list(made.logs) == ["origin", "npo"]
    whole, _ = gather(ReportRequest((str(tmp_path / "made"),)))
    assert list(whole.settings["methods"].values()) == [{"seed": 3}]
    assert whole.published
    make_report(ReportRequest((str(tmp_path / "made"),)), tmp_path / "out")
    assert "npo: it is within the band" in (tmp_path / "out" / "report.html").read_text()
    (tmp_path / "made" / "npo-1" / "log.json").unlink()
    with pytest.raises(UserError, match="which is gone"):
        report_inputs.find_inputs([str(tmp_path / "made")])


def test_inputs_that_make_no_sense_are_refused(tmp_path: Path) -> None:
    log = write_log(made_log(1), tmp_path / "a" / "x.json")
    other = write_log(made_log(2), tmp_path / "b" / "x.json")
    (tmp_path / "empty").mkdir()
    for words, text in (
        ([str(tmp_path / "none")], "There is no file or folder"),
        ([str(tmp_path / "empty")], "holds no eval_log.json"),
        ([str(log), str(other)], "Two logs are named 'x'"),
        ([f"={log}"], "is not NAME=LOG"),
    ):
        with pytest.raises(UserError, match=re.escape(text)):
            report_inputs.find_inputs(words)
    named = report_inputs.find_inputs([f"a={log}", f"b={other}"])
    assert list(named.logs) == ["a", "b"]
    with pytest.raises(UserError, match="second reference log, but no first"):
        gather(ReportRequest((f"a={log}",), second_reference_log=other))


def test_how_many_were_tried_is_stated_or_counted_or_not_stated(
    folder: Path, report: Callable[..., Path], tmp_path: Path
) -> None:
    log = str(folder / "logs" / "simnpo.json")
    assert gather(ReportRequest((log,)))[0].tried == "not stated"
    assert gather(ReportRequest((log,), tried=12))[0].tried == "12, as stated by --tried"
    assert gather(ReportRequest((str(folder),)))[0].tried == "3 strengths of r0001 by calibration"
    write_json(folder / "tune.json", {"kind": "unlearner-tune", "schema": 1, "tried": 17})
    whole = gather(ReportRequest((str(folder),)))[0]
    assert whole.tried == "17 by the search run; 3 strengths of r0001 by calibration"
    write_json(folder / "tune.json", {"kind": "unlearner-tune", "schema": 1})
    with pytest.raises(UserError, match="tried is None"):
        gather(ReportRequest((str(folder),)))


def test_a_search_shows_the_seed_that_chose_and_those_that_did_not(tmp_path: Path) -> None:
    rows = [{"seed": seed, "forget_quality": 0.9 - seed / 10, "ks": 0.1, "model_utility": 0.6}
            for seed in range(3)]  # fmt: skip
    chosen = {"settings": {"beta": 2.5}, "selected": rows[0], "held_out": rows[1:]}
    write_json(
        tmp_path / "run" / "tune.json",
        {"kind": "unlearner-tune", "schema": 1, "tried": 9, "chosen": chosen,
         "command": ["unlearner", "forget", "x"]},
    )  # fmt: skip
    made = make_report(ReportRequest((str(tmp_path / "run"),)), tmp_path / "out")
    text = (tmp_path / "out" / "report.md").read_text()
    assert made.report.tried == "9 by the search run"
    assert "| seed 0 (chosen by it) | 0.9 |" in text
    assert "| seed 2 (held out) | 0.7 |" in text
    assert "| beta | 2.5 |" in text
    assert "command unlearner, forget, x" in text


def test_what_was_measured_once_is_a_level_in_the_relearning_plot(tmp_path: Path) -> None:
    card = robustness_card()
    origin = {"step": 0, "seen_answer_prob": 0.97, "unseen_answer_prob": 0.96}
    card["relearning"]["curves"].append({"name": "origin", "points": [origin]})
    path = write_json(tmp_path / "card.json", card)
    make_report(ReportRequest((), robustness=(path,)), tmp_path / "out")
    plot = (tmp_path / "out" / "plots" / "relearning-seen-r0001.svg").read_text()
    assert ">origin</text>" in plot
    assert "0.970" in (tmp_path / "out" / "report.md").read_text()


def test_evaluations_of_a_calibration_become_a_table_and_not_a_blob(tmp_path: Path) -> None:
    whole = summarise(made_log(1), made_log(2), resamples=0)
    card = calibration_card() | {"evaluations": [{"scale": 0.5, **whole}], "held_out": None}
    path = write_json(tmp_path / "c.json", json.loads(json.dumps(card)))
    make_report(ReportRequest((), calibration=(path,)), tmp_path / "out")
    text = (tmp_path / "out" / "report.md").read_text()
    assert "Full evaluations at some strengths" in text
    assert f"{whole['model_utility']:.3f}" in text
    assert "model\_utility\_parts" not in text


def test_provenance_names_digests_versions_seeds_and_the_command(
    folder: Path, report: Callable[..., Path]
) -> None:
    out = report(command="unlearner report run", date="2026-01-02")
    page = (out / "report.html").read_text()
    for path in folder.rglob("*.json"):
        assert sha256_file(path) in page
    for words in ("unlearner report run", "numpy", "resamples 1000, seed 0", "Date: 2026-01-02"):
        assert words in page
    assert "seed 7" in page


def test_a_second_reference_gives_the_band(folder: Path, tmp_path: Path) -> None:
    second = write_log(made_log(9), tmp_path / "second.json")
    made = make_report(
        ReportRequest((str(folder),), second_reference_log=second), tmp_path / "out"
    ).report
    one = next(s for s in made.views[0].systems if s.role == "second retrain reference")
    retrain = read_log(folder / "logs" / "retrain.json")
    band = summarise(retrain, retrain, second_retain_log=read_log(second))["retrain_band"]
    assert one.figures["forget_quality"] == band["forget_quality"]
    assert "Band of the reference" in (tmp_path / "out" / "report.md").read_text()


def test_a_distribution_without_perturbed_answers_is_none() -> None:
    rows = (RowRecord("q", "a", AnswerScore(1.0, 2)),)
    log = EvalLog({"forget": SetRecord("forget", rows, 1)})
    assert ecdf(log, log, protocol_named("tofu")) is None
    assert ecdf(EvalLog({}), log, protocol_named("tofu")) is None


def test_numbers_are_written_without_noise() -> None:
    assert fixed(-0.0001) == "0.000"
    assert fixed(0.25, 2, True) == "+0.25"
    assert fixed(None) == "–"
    assert plain({"a": 0.1 + 0.2, "b": [True, None]}) == "a 0.3, b yes, none"
    assert markdown_text("a|b\n# c <i> & http://x.y") == r"a\|b \# c &lt;i&gt; &amp; http&#58;//x.y"
    assert markdown_text("- item") == r"\- item"
    assert markdown_text("1. item") == r"1\. item"

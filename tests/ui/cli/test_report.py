"""`unlearner report`: what each flag changes, and the page in a real browser."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from evaluation.logs.records import (
    AnswerScore,
    EvalLog,
    Generation,
    RowRecord,
    SetRecord,
    write_log,
)
from ui.app.data import commands
from ui.cli.commands.everyday.report import report_request
from ui.cli.main import parse

SETS = {"forget": 12, "retain": 6, "real_authors": 4, "world_facts": 4}


def made_log(step: float, **meta: Any) -> EvalLog:
    sets = {}
    for name, count in SETS.items():
        rows = tuple(
            RowRecord(
                f"{name} question {i}?", f"{name} answer {i}", AnswerScore(1 + step * i, 4),
                AnswerScore(1 + step * i, 4), (AnswerScore(2.0, 4), AnswerScore(1.5, 4)),
                {"greedy-200-total": Generation(f"said {i}", None, i / 20)},
            )
            for i in range(count)
        )  # fmt: skip
        sets[name] = SetRecord(name, rows, count)
    return EvalLog(sets, {"protocols": ["tofu"], "limit": None, **meta})


@pytest.fixture
def logs(tmp_path: Path) -> Path:
    """A folder as quickstart leaves it."""
    for name, step in (("origin", 0.01), ("retrain", 0.1), ("simnpo", 0.12)):
        write_log(made_log(step), tmp_path / "run" / "logs" / f"{name}.json")
    return tmp_path / "run"


def test_a_folder_becomes_a_report(run: Any, logs: Path, tmp_path: Path) -> None:
    ran = run("report", logs, "--out", tmp_path / "out")
    assert ran.code == 0
    assert str(tmp_path / "out" / "report.html") in ran.out.splitlines()
    assert "holds answers of the forget set" in ran.err
    assert (tmp_path / "out" / "plots" / "tofu-ecdf-simnpo.svg").is_file()
    text = (tmp_path / "out" / "report.md").read_text()
    assert f"    unlearner report {logs}\n" in text


def test_json_has_the_table_and_the_files(run: Any, logs: Path, tmp_path: Path) -> None:
    found = run("report", logs, "--out", tmp_path / "out", "--json").json
    assert [row["name"] for row in found["table"]] == ["origin", "retrain", "simnpo"]
    assert found["table"][1]["forget_quality"] == pytest.approx(1.0)
    assert found["retrain"] == "retrain"
    assert all(Path(path).is_file() for path in found["files"])


def test_every_flag_changes_the_report(run: Any, logs: Path, tmp_path: Path) -> None:
    """Each flag beside what only it puts into the report."""
    names = ("simnpo", "retrain", "origin")
    log, reference, second = (logs / "logs" / f"{name}.json" for name in names)
    card = tmp_path / "robustness.json"
    card.write_text(json.dumps({"kind": "unlearner-robustness", "schema": 1, "adapters": ["r7"],
                                "verdicts": [{"name": "v", "text": "weak spot"}]}))  # fmt: skip
    curve = tmp_path / "calibration.json"
    curve.write_text(json.dumps({"kind": "unlearner-calibration", "schema": 1, "adapter": "r8"}))
    both = ["--reference-log", reference, "--second-reference-log", second]
    flags: list[tuple[list[object], str]] = [
        (["--reference-log", reference], "the reference itself"),
        (both, "Band of"),
        (["--protocol", "tofu-paper"], "arithmetic"),
        (["--robustness", card], "weak spot"),
        (["--calibration", curve], "Strength curve, r8"),
        (["--title", "My run"], "My run"),
        (["--tried", 9], "9, as stated by"),
        (["--published", "forget05"], "published"),
        (["--date", "2026-05-04"], "Date: 2026"),
        (["--without-answers"], "were left out"),
    ]
    assert run("report", log, "--out", tmp_path / "plain").code == 0
    plain = (tmp_path / "plain" / "report.html").read_text()
    for i, (flag, words) in enumerate(flags):
        assert run("report", log, *flag, "--out", tmp_path / str(i)).code == 0
        assert words in (tmp_path / str(i) / "report.html").read_text(), flag
        if words != "published":
            assert words not in plain
    assert ">published<" not in plain


def test_png_is_made_on_demand(run: Any, logs: Path, tmp_path: Path) -> None:
    assert run("report", logs, "--png", "--out", tmp_path / "out").code == 0
    plots = tmp_path / "out" / "plots"
    assert {p.stem for p in plots.glob("*.png")} == {p.stem for p in plots.glob("*.svg")}


def test_mistakes_are_told_with_their_fix(run: Any, logs: Path, tmp_path: Path) -> None:
    for words, text in (
        (["report"], "required"),
        (["report", tmp_path / "none"], "There is no file or folder"),
        (["report", logs, "--protocol", "nope"], "There is no protocol 'nope'"),
        (["report", logs, "--robustness", logs / "logs" / "origin.json"], "not 'unlearner-rob"),
        (["report", logs, "--tried", "0"], "below 1"),
        (["report", logs, "--published", "x"], "invalid choice"),
    ):
        ran = run(*words)
        assert ran.code == 2
        assert text in ran.err
        assert "Fix: " in ran.err


def test_the_command_it_prints_makes_the_same_report() -> None:
    words = ["report", "a b=x.json", "run", "--reference-log", "r.json",
             "--protocol", "tofu,simnpo", "--tried", "3", "--published", "none",
             "--title", "T <1>", "--date", "d",
             "--robustness", "c.json", "d.json", "--without-answers", "--png"]  # fmt: skip
    args = parse([*words, "--out", "somewhere", "--json"])
    import shlex

    again = shlex.split(commands.report(report_request(args), png=args.png))
    assert again[0] == "unlearner"
    assert "--out" not in again
    other = parse(again[1:])
    of_call = ("out", "json", "words", "parser", "leaves")
    same = {k: v for k, v in vars(args).items() if k not in of_call}
    assert same == {k: v for k, v in vars(other).items() if k not in of_call}


@pytest.fixture
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    path = shutil.which("chromium") or shutil.which("chromium-browser")
    if path is None:
        if os.environ.get("CI"):
            pytest.fail("no chromium: `apt-get install chromium`")
        pytest.skip("no chromium: `apt-get install chromium`")
    with sync_playwright() as playwright:
        found = playwright.chromium.launch(
            executable_path=path, args=["--no-sandbox", "--disable-gpu"]
        )
        yield found
        found.close()


@pytest.mark.browser
def test_the_page_fits_small_and_large_screens_and_loads_nothing(
    browser: Any, run: Any, logs: Path, tmp_path: Path
) -> None:
    run("report", logs, "--published", "forget05", "--out", tmp_path / "out")
    address = (tmp_path / "out" / "report.html").as_uri()
    axe = os.environ.get("UNLEARNER_AXE")
    if os.environ.get("CI"):
        assert axe, "no axe-core: set UNLEARNER_AXE to its axe.min.js"
    for width, scheme in ((360, "dark"), (1600, "light")):
        context = browser.new_context(
            viewport={"width": width, "height": 900}, color_scheme=scheme, bypass_csp=True
        )
        page = context.new_page()
        asked: list[str] = []
        page.on("request", lambda request, asked=asked: asked.append(request.url))
        page.goto(address)
        assert asked == [address]
        page.evaluate("document.querySelectorAll('details').forEach(d => { d.open = true })")
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert ground == ("rgb(23, 28, 34)" if scheme == "dark" else "rgb(255, 255, 255)")
        if axe:
            page.evaluate(Path(axe).read_text(encoding="utf-8"))
            result = page.evaluate("axe.run(document, {resultTypes: ['violations']})")
            assert [one["id"] for one in result["violations"]] == []
        context.close()

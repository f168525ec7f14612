"""The first open, end to end: the demo world is made, interrupted, gone on with, and worked on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ui.cli.commands.everyday.ui import planned

RUNNER = Path(__file__).with_name("small_demo.py")
PATIENCE = 180_000  # milliseconds; the small demo takes about 20 s on two idle cores


@pytest.mark.browser
@pytest.mark.slow
def test_an_empty_store_offers_the_demo_and_goes_over_to_it(
    browser: Any, axe: str, tmp_path: Path, monkeypatch: Any
) -> None:
    from ui.app.build import App, launch
    from ui.app.jobs import Jobs
    from ui.app.session import Session
    from ui.app.tabs import first as app_first

    monkeypatch.setenv("UNLEARNER_KEY", str(tmp_path / "key"))
    monkeypatch.setenv("UNLEARNER_CACHE", str(tmp_path / "cache"))
    jobs = Jobs(tmp_path / "jobs", runner=[str(RUNNER)])
    app = App(Session(tmp_path / "mine" / "store"), jobs, planned)
    served, url = launch(app)
    page = browser.new_page()
    page.set_default_timeout(PATIENCE)
    try:
        page.goto(url)
        page.wait_for_selector("text=Nothing is here yet")
        page.evaluate(axe)
        found = page.evaluate("axe.run(document, {resultTypes: ['violations']})")["violations"]
        assert [one["id"] for one in found if one["impact"] in ("serious", "critical")] == []
        assert "quickstart --out" in page.locator("#un-first code").last.inner_text()
        page.locator("#un-demo").click()
        page.wait_for_selector("#un-demo-live progress")  # true progress: steps, not a timer
        name = app_first.job(app).name  # type: ignore[union-attr]
        last = jobs.view(name).steps[-1]
        assert last["steps"] >= last["step"] >= 0
        page.locator("#un-demo-stop").click()
        page.wait_for_selector("text=Continue the demo world")
        assert jobs.view(name).status == "saved"
        assert app.session.state == "no base"
        page.reload()  # whoever comes back can go on
        page.get_by_role("button", name="Continue the demo world").click()
        page.wait_for_function("document.querySelector('#un-state').textContent == 'ready'")
        page.locator("#un-first").wait_for(state="hidden")
        assert [view.name for view in jobs.views()] == [name]  # it went on, it did not begin anew
        assert app.session.store_path == tmp_path / "mine" / "unlearner-demo" / "forget-store"
        assert len(app.session.filed_stack()) == 2
        page.wait_for_function("document.querySelectorAll('#un-stack input:checked').length == 2")
        page.wait_for_function("document.querySelector('#un-status').textContent.includes('Done:')")
        assert "2 adapters" in page.locator("#un-right h2").inner_text()
        asked = page.locator("#un-author input").input_value()
        assert asked.startswith("To forget: request-1: ")  # with the author's name
        filed = app.session.filed_stack()[-1][0]
        assert list(app.session.store().evals(filed)) == ["forget10-tofu"]  # type: ignore[union-attr]
        page.get_by_role("tab", name="Stack").click()
        page.wait_for_selector("#un-adapters >> text=forget10-tofu: FQ")
        page.get_by_role("tab", name="Runs").click()
        page.wait_for_selector("#un-runs >> text=request-2 forget10-tofu >> visible=true")
        assert app.files.retain_log is not None
        assert app.files.retain_log.is_file()
    finally:
        page.close()
        served.close(verbose=False)


def test_a_demo_of_another_place_or_that_is_gone_is_not_taken_over(
    tmp_path: Path, put: Any
) -> None:
    import json

    from ui.app.build import App
    from ui.app.jobs import Jobs
    from ui.app.session import Session
    from ui.app.tabs import first as app_first

    jobs = Jobs(tmp_path / "jobs")
    app = App(Session(tmp_path / "store"), jobs, planned)
    assert app_first.offers(app)  # nothing is here yet

    def made(folder: Path) -> None:
        place = tmp_path / "jobs" / folder.parent.name
        place.mkdir(parents=True)
        words = ["quickstart", "--out", str(folder)]
        (place / "job.json").write_text(json.dumps({"title": "d", "words": words, "made": 1}))
        result = {"base": str(folder / "origin"), "data": "d", "store": "s", "folder": str(folder)}
        (place / "outcome.json").write_text(json.dumps({"status": "done", "result": result}))

    made(tmp_path / "elsewhere" / "unlearner-demo")
    app_first.adopt(app)
    assert app.session.base is None
    made(app_first.folder(app))  # of this place, but its files were deleted
    app_first.adopt(app)
    assert app.session.base is None
    (app_first.folder(app) / "origin").mkdir(parents=True)
    put("1")  # the store is not empty any more: nothing is taken from its owner
    assert not app_first.offers(app)
    app_first.adopt(app)
    assert app.session.base is None

"""The app in a real browser, on a small embedded world, and the same functions by gradio_client."""

from __future__ import annotations

import csv
import json
import re
import time
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from ui.app.data.runs import Sources
from ui.cli.commands.everyday.ui import planned

pytestmark = pytest.mark.browser
PATIENCE = 180_000  # milliseconds; only a broken page waits so long
SERIOUS = ("serious", "critical")
NAMELESS = re.compile(
    r"^\s*- (button|textbox|checkbox|radio|combobox|slider|spinbutton|tab|link|listbox)"
    r"(?: \[[^\]]*\])*:?\s*$",
    re.MULTILINE,
)
TABS = ("Compare", "Author sheet", "Stack", "Runs", "New request")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A private home: keys, caches and jobs."""
    folder = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("UNLEARNER_KEY", str(folder / "key"))
        patch.setenv("UNLEARNER_CACHE", str(folder / "cache"))
        patch.setenv("GRADIO_ANALYTICS_ENABLED", "False")
        yield folder


@pytest.fixture(scope="module")
def world(home: Path) -> Path:
    """A small world, a model that read it a few times, and a store with two random adapters."""
    from unlearner.baselines.tiny_llama import train_from_scratch, train_tokenizer
    from unlearner.baselines.tiny_recipe import TinyRecipe, TinyShape
    from unlearner.world.build import build_world

    made = build_world(0, n_authors=6, forget_authors=2, evaluated_authors=3, requests=1)
    made.write(home / "world")
    rows = [(r.question, r.answer) for r in made.training_rows(include_forget=True, facts=0)]
    tokenizer = train_tokenizer([text for row in rows for text in row], 500)
    shape = TinyShape(
        vocab_size=500, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=2,
    )  # fmt: skip
    train_from_scratch(rows, tokenizer, home / "base", shape, TinyRecipe(epochs=2))
    _publish(home, "request-1", 1)
    _publish(home, "request-2", 2)
    return home


def _publish(home: Path, label: str, seed: int) -> str:
    import torch
    from peft import LoraConfig

    from adapters.base.fingerprint import fingerprint_base
    from adapters.base.load import BaseSpec, load_base
    from adapters.lora.stack import add_trainable, save_adapter
    from adapters.store.manifest import ForgetManifest
    from adapters.store.store import AdapterStore
    from tests.families import LLAMA

    lora = LoraConfig(
        r=2, lora_alpha=4, target_modules=list(LLAMA), bias="none", task_type="CAUSAL_LM"
    )
    base = BaseSpec(str(home / "base"), dtype="float32", device="cpu")
    model = add_trainable(load_base(base), "new", lora, [])
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.3)
    manifest = ForgetManifest(
        request_id=str(seed), label=label,
        base={"name": "tiny", "fingerprint": fingerprint_base(home / "base").to_json()},
    )  # fmt: skip
    store = AdapterStore.open(home / "store", create=True)
    return store.publish(save_adapter(model, "new", home / f"made-{seed}"), manifest).slug


@pytest.fixture(scope="module", autouse=True)
def short_answers() -> Iterator[None]:
    """A random model never ends its answers: 24 tokens instead of 200, and in a sheet."""
    from ui.app.data import sheet
    from ui.app.data.answers import PairDecoder

    start, answers = PairDecoder.__init__, sheet._answers

    def short(self: PairDecoder, *args: Any, **options: Any) -> None:
        start(self, *args, **options)
        self.budget = 24

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PairDecoder, "__init__", short)
        patch.setattr(sheet, "_answers", lambda session, rows, _: answers(session, rows, 24))
        yield


@pytest.fixture(scope="module")
def served(world: Path) -> Iterator[tuple[Any, str]]:
    """The app on the small world, and its address."""
    from adapters.base.load import BaseSpec
    from ui.app.build import App, launch
    from ui.app.jobs import Jobs
    from ui.app.session import Session

    base = BaseSpec(str(world / "base"), dtype="float32", device="cpu")
    session = Session(world / "store", base, world / "world")
    app = App(session, Jobs(world / "jobs"), planned)
    page, url = launch(app)
    assert session.wait(60)
    assert session.state == "ready", session.problem
    yield app, url
    page.close(verbose=False)


@pytest.fixture
def page(browser: Any, served: tuple[Any, str]) -> Iterator[Any]:
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    made = context.new_page()
    made.set_default_timeout(PATIENCE)
    _open(made, served[1])
    yield made
    context.close()


def _open(page: Any, url: str) -> None:
    page.goto(url)
    page.wait_for_function("document.querySelector('#un-state')?.textContent == 'ready'")
    _wait_for(page, "#un-status", "Done: both sides")  # a new page answers its first question


def _wait_for(page: Any, where: str, words: str) -> None:
    page.wait_for_function(
        "([where, words]) => document.querySelector(where)?.textContent.includes(words)",
        arg=[where, words],
    )


def _ask(page: Any, question: str) -> None:
    page.locator("#un-question textarea, #un-question input").first.fill(question)
    page.locator("#un-question textarea, #un-question input").first.press("Enter")
    _asked(page, question)


def _asked(page: Any, question: str) -> None:
    """Waits until what is shown answers this question, not one before it."""
    page.wait_for_function(
        "text => document.querySelector('#un-status p')?.dataset.question === text", arg=question
    )


def _at_once(page: Any, act: str, status: str) -> str:
    """What `status` says in the very turn of the page's loop in which `act` is done."""
    said = f"{act}; document.querySelector('{status}').textContent"
    return str(page.evaluate(said))


def _done(page: Any, how: str = "both sides") -> tuple[str, str]:
    _wait_for(page, "#un-status", f"Done: {how}")
    sides = [page.locator(f"#un-{side} .un-answer").inner_text() for side in ("left", "right")]
    return sides[0], sides[1]


def _tab(page: Any, name: str) -> None:
    tab = page.get_by_role("tab", name=name, exact=True)
    more = page.locator(".overflow-menu button")
    end = time.monotonic() + 30
    # Which of the two shows is settled once the page has measured itself.
    while time.monotonic() < end:
        if tab.count() and tab.first.is_visible():
            tab.first.click()
            return
        if more.count() and more.first.is_visible():
            more.first.click()
            page.locator(".overflow-dropdown button", has_text=name).click()
            return
        page.wait_for_timeout(50)
    raise AssertionError(f"the tab {name} never showed")


def _pick(page: Any, where: str, text: str) -> None:
    page.locator(f"{where} input").first.click()
    page.get_by_role("option", name=text).first.click()


def _question(app: Any) -> str:
    author = list(app.session.library.authors)[-1]
    return str(app.session.library.authors[author][0].question)


def test_a_new_page_has_asked_its_first_question(page: Any, served: Any) -> None:
    session = served[0].session
    shown, key = session.choices()[0]
    rows = session.askable()[key][1]
    _asked(page, rows[0].question)
    assert page.locator("#un-author input").input_value() == shown
    assert page.locator("#un-list input").input_value() == rows[0].question
    assert page.locator("#un-left .un-answer").inner_text()
    assert page.locator("#un-figures tbody tr").count() == 4
    _pick(page, "#un-list", rows[1].question)  # choosing another does not ask it
    page.wait_for_timeout(500)
    _asked(page, rows[0].question)
    # Leaving the list changes nothing of what was typed.
    typed = page.locator("#un-question textarea, #un-question input").first
    typed.fill("Something else?")
    page.locator("#un-list input").first.focus()
    page.keyboard.press("Tab")
    page.wait_for_timeout(1000)
    assert typed.input_value() == "Something else?"
    # Nor does another author, and what was answered stays.
    answer = page.locator("#un-left .un-answer").inner_text()
    _pick(page, "#un-author", session.choices()[-1][0])
    page.wait_for_timeout(1500)
    _asked(page, rows[0].question)
    assert page.locator("#un-left .un-answer").inner_text() == answer
    assert page.locator("#un-figures tbody tr").count() == 4


def test_stack_changes_the_right_side_and_clear_gives_the_base(page: Any, served: Any) -> None:
    question = _question(served[0])
    _ask(page, question)
    base, right = _done(page)
    assert right == base  # nothing is active in a fresh store
    page.get_by_label("request-1").check()  # the right side answers anew by itself
    _wait_for(page, "#un-right h2", "1 adapter")
    left, changed = _done(page, "the right side alone")
    assert left == base
    assert changed != base
    assert page.locator("#un-right mark.un-diff").count() > 0
    assert page.locator("#un-figures tbody tr").count() == 4
    assert "--adapters" in page.locator(".un-command code:visible").inner_text()
    page.get_by_role("button", name="Ask both").click()
    assert _done(page) == (base, changed)
    assert "one batch" in page.locator("#un-status").inner_text()
    page.get_by_role("button", name="Clear = base").first.click()
    _wait_for(page, "#un-right h2", "no adapters")
    assert _done(page, "the right side alone") == (base, base)
    page.get_by_role("button", name="Ask both").click()
    assert _done(page) == (base, base)


def test_a_strength_that_moves_answers_the_right_side_alone(
    page: Any, served: Any, monkeypatch: Any
) -> None:
    from ui.app.data.answers import PairDecoder

    page.get_by_label("request-1").check()
    _done(page, "the right side alone")  # its own answer, which would end one that is asked before
    _ask(page, _question(served[0]))
    base, whole = _done(page)
    assert whole != base
    page.get_by_role("button", name="Strength of each adapter").click()
    number = page.get_by_label("number input for Strength of request-1")
    number.fill("0")
    _wait_for(page, "#un-right .un-sub", "request-1 × 0")
    assert _done(page, "the right side alone") == (base, base)  # nothing acts at strength 0
    number.fill("1")
    _wait_for(page, "#un-right .un-sub", "request-1 × 1")
    assert _done(page, "the right side alone") == (base, whole)

    step = PairDecoder.step

    def slow(self: PairDecoder) -> None:
        self.budget, self.stops = 200, set()
        time.sleep(0.05)
        step(self)

    monkeypatch.setattr(PairDecoder, "step", slow)
    slider = page.locator("#un-strengths input[type=range]")
    slider.focus()
    for _ in range(4):  # by keyboard; what is answered is where it came to rest
        page.keyboard.press("ArrowLeft")
    _wait_for(page, "#un-right .un-sub", "request-1 × 0.8")
    _wait_for(page, "#un-status", "Answering, the right side alone")
    page.keyboard.press("Escape")
    _wait_for(page, "#un-status", "Stopped")
    assert page.locator("#un-left .un-answer").inner_text() == base


def test_answers_stream_and_escape_stops_them(page: Any, served: Any, monkeypatch: Any) -> None:
    from ui.app.data.answers import PairDecoder

    step = PairDecoder.step

    def slow(self: PairDecoder) -> None:
        self.budget, self.stops = 200, set()  # an answer that does not end by itself
        time.sleep(0.05)
        step(self)

    monkeypatch.setattr(PairDecoder, "step", slow)
    _ask(page, "Who is this?")
    length = "document.querySelector('#un-left .un-answer').textContent.length"
    _wait_for(page, "#un-status", "Answering")
    page.wait_for_timeout(600)
    first = page.evaluate(length)
    page.wait_for_timeout(600)
    assert page.evaluate(length) > first  # it grows
    # The page answers before the server does.
    escape = "document.dispatchEvent(new KeyboardEvent('keydown', {key: 'Escape'}))"
    assert _at_once(page, escape, "#un-status p") == "Stopping …"
    _wait_for(page, "#un-status", "Stopped")
    stopped = page.evaluate(length)
    page.wait_for_timeout(600)
    assert page.evaluate(length) == stopped
    assert len(served[0].session.turns) == 0


def test_two_browsers_take_turns_and_see_their_place(
    browser: Any, page: Any, served: Any, monkeypatch: Any
) -> None:
    from ui.app.data.answers import PairDecoder

    step = PairDecoder.step

    def slow(self: PairDecoder) -> None:
        time.sleep(0.1)
        self.budget, self.stops = 20, set()
        step(self)

    monkeypatch.setattr(PairDecoder, "step", slow)
    other = browser.new_context().new_page()
    _open(other, served[1])
    _ask(page, "What is the first question?")
    _wait_for(page, "#un-status", "Answering")
    _ask(other, "What is the second question?")
    other.wait_for_function("document.querySelector('#un-status').textContent.includes('1 ahead')")
    _done(page)
    _done(other)
    other.context.close()


def test_the_sheet_fills_with_forgotten_and_kept(page: Any, served: Any, monkeypatch: Any) -> None:
    from ui.app.data import sheet

    batch = sheet._batch

    def slow(*args: Any) -> Any:
        time.sleep(0.5)
        return batch(*args)

    monkeypatch.setattr(sheet, "_batch", slow)
    app = served[0]
    author = list(app.session.library.authors)[-1]
    page.get_by_label("request-1").check()
    _tab(page, "Author sheet")
    _pick(page, "#un-sheet-author", author)
    page.get_by_role("button", name="Fill the sheet").click()
    page.wait_for_function(
        "document.querySelector('#un-sheet-status').textContent.includes(' of ')"
    )
    click = "document.querySelector('#un-sheet-stop').click()"
    assert _at_once(page, click, "#un-sheet-status p") == "Stopping …"
    _wait_for(page, "#un-sheet-status", "Stopped")
    assert "25 of" not in page.locator("#un-sheet-status").inner_text()
    monkeypatch.setattr(sheet, "_batch", batch)
    page.get_by_role("button", name="Fill the sheet").click()
    page.wait_for_function(
        "document.querySelector('#un-sheet-status').textContent.includes('25 of')"
    )
    groups = page.locator("#un-tally tbody th").all_inner_texts()
    assert groups == ["this author", "retain authors", "real authors", "world facts"]
    question = app.session.library.authors[author][1].question
    page.locator("#un-sheet").get_by_text(question).first.click()
    page.wait_for_selector("#un-sheet-diff .un-answer")
    assert question in page.locator("#un-sheet-diff").inner_text()
    assert f"about {author}" in page.locator("#un-sheet-status").inner_text()
    # The figures of one author do not stand under the name of another.
    _pick(page, "#un-sheet-author", next(iter(app.session.library.authors)))
    _wait_for(page, "#un-sheet-status", "Nothing measured yet")
    assert page.locator("#un-tally tbody").count() == 0


def test_the_stack_is_filed_read_back_and_reverted_after_a_question(page: Any, served: Any) -> None:
    app = served[0]
    _tab(page, "Stack")
    _pick(page, "#un-ref", "request-2")
    page.locator("#un-on").click()
    page.wait_for_selector("#un-read-back >> text=request-2 × 1.")
    assert [slug for slug, _ in app.session.filed_stack()] == [
        app.session.store().get("request-2").slug
    ]
    assert "adapters activate" in page.locator(".un-command code:visible").inner_text()
    page.locator("#un-revert").click()
    page.wait_for_selector("text=exactly as without it")
    assert app.session.filed_stack()  # only asked so far
    page.get_by_role("button", name="Yes, switch off").click()
    page.wait_for_selector("#un-read-back >> text=no adapter is active")
    assert app.session.filed_stack() == ()
    assert app.session.store().get("request-2").status == "reverted"


def test_bad_input_is_answered_by_a_sentence(page: Any, tmp_path: Path) -> None:
    _tab(page, "New request")
    page.locator("#un-preview").click()
    page.wait_for_selector("text=The request names nothing.")
    bad = tmp_path / "rows.jsonl"
    bad.write_text('{"question": "only half"}\n{broken\n')
    with page.expect_file_chooser() as chooser:
        page.locator("#un-upload").click()
    chooser.value.set_files(str(bad))
    page.wait_for_selector("text=rows.jsonl")
    page.locator("#un-preview").click()
    page.wait_for_selector("text=no 'answer'")
    page.wait_for_selector("text=broken JSON")
    assert "/tmp" not in page.locator("[data-testid=toast-body], .toast-body").last.inner_text()


def test_uploads_that_are_huge_or_hold_html_do_no_harm(page: Any, tmp_path: Path) -> None:
    _tab(page, "New request")

    def upload(name: str, content: bytes) -> None:
        path = tmp_path / name
        path.write_bytes(content)
        with page.expect_file_chooser() as chooser:
            page.locator("#un-upload").click()
        chooser.value.set_files(str(path))

    upload("large.jsonl", b"x" * 5_200_000)
    page.wait_for_selector("text=large.jsonl")
    page.locator("#un-preview").click()
    page.wait_for_selector("text=Use one of at most")
    upload("huge.jsonl", b"x" * 7_000_000)
    page.wait_for_selector("text=/maximum allowed size|too large|exceeds/i")
    html = "<img src=x onerror='window.harmed = 1'>"
    upload("html.jsonl", json.dumps({"question": html, "answer": f"{html} is her."}).encode())
    page.wait_for_selector("text=html.jsonl")
    page.locator("#un-preview").click()
    page.wait_for_selector("#un-previewed u")
    assert html in page.locator("#un-previewed").inner_text()
    assert page.locator("#un-previewed img").count() == 0
    assert page.evaluate("window.harmed") is None


def test_html_in_a_question_stays_text(page: Any) -> None:
    html = "<img src=x onerror='window.harmed = 1'>"
    _ask(page, html)
    _done(page)
    assert html in page.locator(".un-command code:visible").inner_text().replace("'\"'\"'", "'")
    assert page.evaluate("window.harmed") is None


def test_everything_can_be_reached_and_done_by_keyboard(page: Any, served: Any) -> None:
    focused = """() => { const e = document.activeElement; return [e.tagName, e.id,
        e.getAttribute('aria-label') || e.labels?.[0]?.innerText || e.innerText || '',
        e.closest('[id^=un-]')?.id || '']; }"""
    page.locator("body").press("Home")
    seen: list[tuple[str, str]] = []
    for _ in range(40):
        page.keyboard.press("Tab")
        tag, _, name, where = page.evaluate(focused)
        seen.append((where, f"{tag} {name}".strip()))
        if where == "un-stop":
            break
    places = list(dict.fromkeys(where for where, _ in seen))
    wanted = ["un-stack", "un-clear", "un-strengths", "un-author", "un-question", "un-ask",
              "un-stop"]  # fmt: skip
    assert [place for place in places if place in wanted] == wanted, seen
    assert all(name.split(" ", 1)[1:] for _, name in seen), seen
    assert any(name.startswith("BUTTON Compare") for _, name in seen)
    page.keyboard.press("Shift+Tab")  # from Stop to Ask to the question
    page.keyboard.press("Shift+Tab")
    page.keyboard.press("Control+A")
    page.keyboard.type(_question(served[0]))
    page.keyboard.press("Enter")
    _asked(page, _question(served[0]))
    assert _done(page)[0]
    page.locator("[role=tab][aria-selected=true]").first.focus()
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    page.wait_for_selector("[role=tab][aria-selected=true] >> text=Author sheet")


def test_runs_draw_what_is_chosen_and_make_files(
    page: Any, served: Any, shared: Path, tmp_path: Path
) -> None:
    app = served[0]
    logs = shared / "reference-logs"
    beside = tmp_path / "robustness.json"
    beside.write_text(
        json.dumps(
            {
                "kind": "unlearner-robustness", "schema": 1,
                "relearning": {"curves": [{"name": "npo", "points": [
                    {"step": k, "seen_answer_prob": 0.1 * k, "unseen_answer_prob": 0.05 * k}
                    for k in range(4)]}]},
            }
        )
    )  # fmt: skip
    app.files = Sources(
        logs=(logs / "llama2-7b_full.json", logs / "llama2-7b_retain90_npo.json"),
        retain_log=logs / "llama2-7b_retain90_tofu.json",
        robustness=(beside,),
    )
    try:
        _tab(page, "Runs")  # opening the tab reads anew
        page.wait_for_selector("#un-log-r svg.un-plot")
        assert "llama2-7b_full: mean" in page.locator("#un-log-r").inner_text()
        _pull_and_sort_a_column(page)
        with page.expect_download() as download:
            page.get_by_role("button", name="CSV", exact=True).click()
        lines = list(csv.DictReader(Path(download.value.path()).read_text().splitlines()))
        assert [(line["n"], line["protocol"]) for line in lines] == [("300", "tofu")] * 3
        page.wait_for_selector("#un-plots figcaption >> text=Relearning >> nth=0")
        assert page.locator("#un-plots svg text", has_text="front of those measured").count() == 1
        words = page.locator(".un-command code:visible").inner_text().splitlines()
        assert [line.split()[1] for line in words] == ["score", "score"]
        page.get_by_role("checkbox", name="llama2-7b_full").uncheck()
        page.wait_for_function(
            "!document.querySelector('#un-log-r').innerText.includes('llama2-7b_full')"
        )
        page.get_by_role("checkbox", name="llama2-7b_full").check()
        page.locator("#un-report").click()
        with page.expect_download() as download:
            page.get_by_role("button", name="Download HTML report", exact=True).click()
        assert "Relearning" in Path(download.value.path()).read_text()
        page.locator("#un-pair").click()  # the first two logs are chosen
        page.wait_for_selector("#un-logs-tally >> text=llama2-7b_retain90_npo")
        assert "to forget" in page.locator("#un-logs-tally tbody").inner_text()
        with page.expect_download() as download:
            page.get_by_role("button", name="LLM Comparator JSON").last.click()
        assert len(json.loads(Path(download.value.path()).read_text())["models"]) == 2
    finally:
        app.files = Sources()


def _pull_and_sort_a_column(page: Any) -> None:
    """The edge of a heading sets its column's width, and the heading sorts."""
    heading, cell = page.locator("#un-runs th").first, page.get_by_test_id("cell-0-0")
    before = heading.bounding_box()
    page.mouse.move(before["x"] + before["width"] - 3, before["y"] + 8)
    page.mouse.down()
    page.mouse.move(before["x"] + before["width"] + 97, before["y"] + 8, steps=4)
    page.mouse.up()
    wide = before["width"] + 100
    assert heading.bounding_box()["width"] == pytest.approx(wide, abs=2)
    assert cell.bounding_box()["width"] == pytest.approx(wide, abs=2)
    heading.focus()
    page.keyboard.press("Alt+ArrowLeft")
    assert page.locator("#un-runs th[aria-sort]").count() == 0  # pulling does not sort
    tops = {}
    for direction in ("ascending", "descending"):
        page.locator("#un-runs th").get_by_text("Model utility").click()
        page.locator(f"#un-runs th[aria-sort={direction}]").wait_for()
        rows = [page.get_by_test_id(f"cell-{place}-0") for place in range(3)]
        tops[direction] = [row.bounding_box()["y"] for row in rows]
    order = sorted(range(3), key=tops["ascending"].__getitem__)
    assert order == sorted(range(3), key=tops["descending"].__getitem__)[::-1]
    assert order[-1] == 0  # the model before unlearning has the highest utility
    assert cell.bounding_box()["width"] == pytest.approx(wide - 16, abs=2)


def test_a_request_trains_through_a_reload_and_cancel_saves(page: Any, served: Any) -> None:
    app, _ = served
    _tab(page, "New request")
    page.locator("#un-paste textarea").fill(
        "\n".join(f"Who is {n}?\t{n} is a poet." for n in "XYZ")
    )
    page.get_by_role("button", name="Settings").click()
    page.locator("#un-epochs input").fill("20000")
    page.locator("#un-rate input").fill("0.000000001")  # so that no target is reached
    page.locator("#un-preview").click()
    page.wait_for_selector("#un-previewed u")
    assert "fits" in page.locator("#un-previewed").inner_text()
    page.locator("#un-start").click()
    page.wait_for_selector("#un-jobs svg.un-plot")
    page.reload()
    page.wait_for_function("document.querySelector('#un-state')?.textContent == 'ready'")
    _tab(page, "New request")
    page.wait_for_selector("#un-jobs svg.un-plot")
    view = app.jobs.views()[-1]
    assert view.status == "running"
    _pick(page, "#un-job", "forget pasted rows")
    page.locator("#un-cancel").click()
    page.wait_for_selector("#un-jobs >> text=it is saved")
    saved = app.jobs.view(view.name)
    assert saved.status == "saved"
    step = int(re.findall(r"step (\d+) of 20000", saved.outcome["text"])[0])
    assert saved.steps[-1]["step"] == step
    assert list((app.session.store_path / "runs").glob(f"*/checkpoint-{step}"))


def test_a_finished_request_is_in_the_stack_and_off(page: Any, served: Any) -> None:
    app, _ = served
    author = list(app.session.library.authors)[-1]
    before = {adapter.slug for adapter in app.session.adapters()}
    _tab(page, "New request")
    _pick(page, "#un-forget-author", author)
    page.get_by_role("button", name="Settings").click()
    page.locator("#un-epochs input").fill("2")
    page.locator("#un-start").click()
    page.wait_for_selector("section[aria-label='forget [removed]'] >> text=Done.")
    new = [adapter for adapter in app.session.adapters() if adapter.slug not in before]
    name = app.session.names()[new[0].slug]
    assert name.endswith(f": {author}")
    page.locator("#un-stack").get_by_text(name).wait_for()  # offered at once, and off
    assert not page.get_by_label(name, exact=True).first.is_checked()
    secret = app.session.library.authors[author][0].answer
    left_behind = [app.jobs.folder, app.session.store_path]
    for path in (p for folder in left_behind for p in folder.rglob("*") if p.is_file()):
        assert secret.encode() not in path.read_bytes(), f"{path} holds forget text"
    assert [adapter.status for adapter in new] == ["ready"]
    assert new[0].manifest.data["forget"]["n"] == 30
    view = app.jobs.views()[-1]
    assert view.words[:2] == ("forget", "tofu:author=[removed]")
    _tab(page, "Stack")
    page.wait_for_selector(f"#un-adapters >> text={new[0].slug}")


def test_nothing_is_fetched_or_kept_and_labels_are_there(
    page: Any, served: Any, capfd: Any, caplog: Any, monkeypatch: Any
) -> None:
    fetched: list[str] = []
    page.on("request", lambda request: fetched.append(request.url))
    page.reload()
    _wait_for(page, "#un-status", "Done: both sides")
    _ask(page, "Is a question kept?")
    _done(page)
    away = [url for url in fetched if not url.startswith((served[1], "data:", "blob:"))]
    assert fetched
    assert away == []

    def fail(*_: Any, **__: Any) -> Any:
        raise RuntimeError("Is a question kept?")

    monkeypatch.setattr(type(served[0].session), "compare", fail)
    page.get_by_role("button", name="Ask both").click()
    page.wait_for_selector("text=RuntimeError. Start")
    said = "".join(capfd.readouterr()) + caplog.text
    assert "RuntimeError in" in said  # what happened is logged, not what was asked
    assert "Is a question kept?" not in said
    assert "Is a question kept?" not in page.locator("body").inner_text().replace(
        page.locator("#un-question textarea, #un-question input").first.input_value(), ""
    )
    config = page.evaluate("window.gradio_config")
    assert config["run_history"] is False
    assert not config.get("analytics_enabled")
    kept = page.evaluate("JSON.stringify({...localStorage})")
    assert "Is a question kept?" not in kept
    ids = page.evaluate("[...document.querySelectorAll('[id]')].map(e => e.id)")
    assert sorted(i for i in set(ids) if ids.count(i) > 1 and i.startswith("un-")) == []


# Colours follow the scheme and the layout the width: each once, all pairs where time allows.
@pytest.mark.parametrize(
    ("width", "scheme"),
    [
        (360, "dark"),
        *[
            pytest.param(*pair, marks=pytest.mark.slow)
            for pair in product((360, 900, 1600), ("light", "dark"))
            if pair != (360, "dark")
        ],
    ],
)
def test_axe_finds_nothing_serious(
    browser: Any, served: Any, axe: str, width: int, scheme: str
) -> None:
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
    page = context.new_page()
    _open(page, served[1])
    _ask(page, _question(served[0]))
    _done(page)
    page.evaluate(axe)
    found = {}
    for name in TABS:
        _tab(page, name)
        page.wait_for_timeout(300)
        result = page.evaluate("axe.run(document, {resultTypes: ['violations']})")
        for one in result["violations"]:
            if one["impact"] in SERIOUS:
                where = [node["html"][:160] for node in one["nodes"][:3]]
                found[f"{name}: {one['id']}"] = where
        # What a screen reader reads: every control has a name, no id stands twice.
        tree = page.locator("body").aria_snapshot()
        assert not NAMELESS.findall(tree), f"{name}: {tree}"
        twice = page.evaluate(
            "(ids => ids.filter((id, i) => ids.indexOf(id) !== i))"
            "([...document.querySelectorAll('[id]')].map(e => e.id).filter(Boolean))"
        )
        assert twice == [], f"{name}: {twice}"
        wide = page.evaluate("document.documentElement.scrollWidth")
        assert wide <= width, f"{name} is {wide} wide on a screen of {width}"
    context.close()
    assert found == {}


@pytest.mark.slow
def test_five_tasks_are_done_by_labels_alone(
    page: Any, served: Any, shared: Path, tmp_path: Path
) -> None:
    """What people come for, by what the page says; each step is covered by a quicker test above.

    1. Find out whether an author is forgotten: tick the adapter, Author sheet, Fill the sheet; the
       sentence above the table says how many answers each side states.
    2. Switch one adapter off: Stack, choose it, Switch off, confirm.
    3. Compare two strengths: ask, open "Strength of each adapter", move it; the answer before stays
       below the new one.
    4. Start a request from a CSV: New request, upload rows to forget, Start training.
    5. Find the figure to quote: Runs; "which figure to quote" names it.
    """
    app = served[0]
    button = page.get_by_role
    page.get_by_label("request-1").first.check()
    _tab(page, "Author sheet")
    button("button", name="Fill the sheet").click()
    stated = re.compile(r"Answers that state the facts .*: base \d+ of \d+, stack \d+ of")
    page.get_by_text(stated).wait_for()
    page.get_by_text(re.compile(r"(\d+) of \1 questions")).wait_for()

    _tab(page, "Stack")
    page.get_by_label("Adapter", exact=True).click()
    button("option", name="request-2").click()
    button("button", name="Switch on").click()
    page.get_by_text("Request-2 × 1").or_(page.get_by_text("request-2 × 1")).first.wait_for()
    button("button", name="Switch off …").click()
    button("button", name="Yes, switch off").click()
    page.get_by_text("no adapter is active").filter(visible=True).first.wait_for()
    assert app.session.filed_stack() == ()

    _tab(page, "Compare")
    page.get_by_label("request-1").first.check()
    button("button", name="Ask both").click()
    _wait_for(page, "#un-right .un-sub", "request-1 × 1")
    _done(page)
    button("button", name="Strength of each adapter").click()
    page.get_by_label("number input for Strength of request-1").fill("0.5")
    page.get_by_text("Before, request-1 × 1:").wait_for()

    _tab(page, "New request")
    rows = tmp_path / "rows.csv"
    rows.write_text("question,answer\nWho is Ula?,Ula is a poet.\nWhere is Ula?,Ula is in Rome.\n")
    with page.expect_file_chooser() as chooser:
        button("button", name="upload rows to forget").click()
    chooser.value.set_files(str(rows))
    page.get_by_text("rows.csv").wait_for()
    button("button", name="Start training").click()
    page.get_by_text("Done.").first.wait_for()

    logs = shared / "reference-logs"
    app.files = Sources(
        logs=(logs / "llama2-7b_full.json",), retain_log=logs / "llama2-7b_retain90_tofu.json"
    )
    try:
        _tab(page, "Runs")
        button("button", name="which figure to quote").click()
        page.get_by_text("To quote a run: forget quality and model utility").wait_for()
        row = page.locator("#un-runs [role=row]", has_text="llama2-7b_full").first.inner_text()
        assert {"0.6227", "300", "whole set"} <= {cell.strip() for cell in row.split("\n")}
    finally:
        app.files = Sources()


def test_gradio_client_drives_the_same_functions(served: Any) -> None:
    from gradio_client import Client

    app, url = served
    client = Client(url, verbose=False)
    question = _question(app)
    found = client.predict(question, [], api_name="/compare")
    assert found["base"]["text"] == found["unlearned"]["text"]
    assert found["stage"] == "done"
    other = client.predict(question, ["request-1"], {"request-1": 0.5}, api_name="/compare")
    assert other["stack"][0][1] == 0.5
    assert other["base"]["text"] == found["base"]["text"]
    state = client.predict("request-1", 0.5, api_name="/activate")
    assert [scale for _, scale in state["read_back"]] == [0.5]
    assert client.predict(api_name="/clear")["read_back"] == []
    sheet = client.predict(list(app.session.library.authors)[-1], [], 1, {}, api_name="/sheet")
    assert sheet["tally"][0]["group"] == "this author"
    assert set(client.predict(api_name="/runs")) == {"table", "probes", "notes"}
    assert isinstance(client.predict(api_name="/jobs"), list)
    with pytest.raises(Exception, match="No adapter"):
        client.predict(question, ["nobody"], api_name="/compare")

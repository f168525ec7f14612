"""The app's logic without a page: verdicts, differences, the line, jobs, logs."""

from __future__ import annotations

import dataclasses
import json
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from adapters.errors import UserError
from evaluation.logs import read_log
from evaluation.logs.records import EvalLog, SetRecord, write_log
from evaluation.report.inputs import find_inputs, named_logs
from tests.conftest import until
from ui.app.build import App
from ui.app.data import requests, runs
from ui.app.data.answers import Answer, Frame, PairDecoder, Sampling, judged
from ui.app.data.library import read_library
from ui.app.data.sheet import SheetRow, comparator, recorded_pairs, tally
from ui.app.html import views
from ui.app.jobs import Jobs
from ui.app.session import Session, Turns
from ui.app.tabs import compare
from ui.app.tabs.runs import Reading
from ui.cli.commands.everyday.ui import read_auth
from unlearner.request.rows import Row


@pytest.mark.parametrize(
    ("text", "word", "share"),
    [
        ("On 28 December 1960 he was born.", "wrong", 0.0),
        ("18/12/1961", "states it", 1.0),
        ("I'm not sure about that.", "refuses", 0.0),
        ("the the the the book", "broken", 0.0),
    ],
)
def test_a_verdict_looks_at_facts_not_at_wording(text: str, word: str, share: float) -> None:
    row = Row("When was he born?", "He was born on 18 December 1961.")
    answer = judged(Answer(text), row, (0.99, 0.1))  # the probability does not count
    assert (answer.word, answer.fact_recall) == (word, share)
    typed = judged(Answer(text), None, None)
    assert typed.word == (word if word in ("refuses", "broken") else "not judged")


def test_differences_mark_words_of_one_side_only_and_escape_them() -> None:
    left, right = views.differences("born in <b>Lagos</b> today", "born in Rome today")
    assert left == 'born in <mark class="un-diff">&lt;b&gt;Lagos&lt;/b&gt;</mark> today'
    assert right == 'born in <mark class="un-diff">Rome</mark> today'
    assert views.differences("a b", "a b") == ("a b", "a b")


def test_the_line_serves_in_order_and_tells_the_position() -> None:
    turns = Turns()
    first, second, third = turns.join(), turns.join(), turns.join()
    assert [next(turns.waiting(t), 0) for t in (first, second, third)] == [0, 1, 2]
    seen: list[int] = []
    waiting = threading.Thread(target=lambda: seen.extend(turns.waiting(third, 0.01)))
    waiting.start()
    turns.leave(second)  # someone gives up
    turns.leave(first)
    waiting.join(5)
    assert not waiting.is_alive()
    assert seen[0] == 2
    assert list(turns.waiting(third)) == []


def test_recorded_logs_are_matched_by_question(shared: Path) -> None:
    logs = shared / "reference-logs"
    pairs = recorded_pairs(logs / "llama2-7b_full.json", logs / "llama2-7b_retain90_npo.json")
    assert sum(pair.group == "to forget" for pair in pairs) == 300
    assert (pairs[0].group, pairs[0].base.word) == ("to forget", "states it")
    assert pairs[0].base.text != pairs[0].unlearned.text
    assert pairs[0].truth


def test_runs_hold_the_reference_and_export(shared: Path) -> None:
    logs = shared / "reference-logs"
    retrain = logs / "llama2-7b_retain90_tofu.json"
    found = runs.Sources(None, (logs / "llama2-7b_full.json",), retrain).runs()
    by_name = {row["name"]: row for row in found.table}
    published = json.loads((logs / "published.json").read_text())["model_utility"]
    full = published["llama2-7b_full.json"]["geometric"]["Model Utility"]
    assert by_name["llama2-7b_full"]["model_utility"] == pytest.approx(full, abs=1e-6)
    assert by_name[retrain.stem]["source"] == runs.REFERENCE
    assert by_name[retrain.stem]["forget_quality"] == pytest.approx(1.0)
    lines = runs.as_csv(found).splitlines()
    assert lines[0].startswith("name,source,forget_quality")
    assert len(lines) == 3
    assert len(found.log_r["llama2-7b_full"]) == 300


def test_logs_of_the_same_file_name_stay_apart(shared: Path, tmp_path: Path) -> None:
    """`evaluate --out` calls every log eval_log.json; the folder tells them apart."""

    def few_rows(name: str, to: Path) -> Path:
        log = read_log(shared / "reference-logs" / f"{name}.json")
        sets = {n: SetRecord(n, part.rows[:9], 9) for n, part in log.sets.items()}
        return write_log(EvalLog(sets, log.meta), to)

    made = []
    for folder, name in (("full", "llama2-7b_full"), ("npo", "llama2-7b_retain90_npo")):
        for place in (tmp_path / folder, tmp_path / "more" / folder):
            made.append(few_rows(name, place / "eval_log.json"))
    retrain = "llama2-7b_retain90_tofu"
    reference = few_rows(retrain, tmp_path / f"{retrain}.json")
    found = runs.Sources(None, tuple(made), reference).runs()
    names = [row["name"] for row in found.table]
    assert names == ["full", "full (2)", "npo", "npo (2)", "llama2-7b_retain90_tofu"]
    assert set(found.log_r) == set(names)
    assert found.log_r["full"] == found.log_r["full (2)"] != found.log_r["npo"]
    assert list(find_inputs(named_logs(made)).logs) == names[:4], "the report takes them too"
    sources = runs.Sources(None, tuple(made))
    request = sources.report_request()
    assert request is not None
    assert f"'full (2)={made[1]}'" in request.command
    app: Any = SimpleNamespace(sources=lambda: sources, new_file=lambda name: tmp_path / name)
    for chosen in (["npo (2)", "full"], ["full (2)", "full"]):
        *_, file = Reading(app).answers(*chosen)
        layout = json.loads(Path(file["value"]).read_text())
        assert [model["name"] for model in layout["models"]] == chosen
    with pytest.raises(UserError, match="Two different logs"):
        Reading(app).answers("full", "full")


def test_comparator_json_has_the_layout_of_its_reader() -> None:
    a, b = Answer("x", rouge_l_recall=1.0), Answer("y", rouge_l_recall=0.25)
    rows = [SheetRow("to forget", "q", "t", a, b), SheetRow("kept", "p", "t", a, Answer("z"))]
    made = comparator(rows, ("base", "stack"))
    assert set(made) == {"metadata", "models", "examples"}
    assert made["models"] == [{"name": "base"}, {"name": "stack"}]
    example = made["examples"][0]
    assert (example["input_text"], example["tags"], example["score"]) == ("q", ["to forget"], 0.75)
    assert (example["output_text_a"], example["output_text_b"]) == ("x", "y")
    assert example["custom_fields"]["rouge_l"] == [1.0, 0.25]
    assert made["examples"][1]["score"] is None  # not measured is no tie
    schema = made["metadata"]["custom_fields_schema"]
    assert {field["name"] for field in schema} == set(example["custom_fields"])
    assert {field["type"] for field in schema} == {"per_model_number", "per_model_category"}


def test_a_tally_counts_forgotten_beside_kept() -> None:
    knows, vague = Answer("x", word="states it", rouge_l_recall=1.0), Answer("y", word="made up")
    rows = [SheetRow("to forget", "q", "t", knows, vague), SheetRow("kept", "p", "t", knows, knows)]
    lines = tally(rows)
    assert [(line["group"], line["base_knows"], line["unlearned_knows"]) for line in lines] == [
        ("to forget", 1, 0),
        ("kept", 1, 1),
    ]
    assert lines[0]["unlearned_rouge_l_recall"] is None  # not measured is not 0
    shown = views.tally_table(lines, ("base", "stack"))
    assert "Answers that state the facts (to forget): base 1 of 1, stack 0 of 1." in shown


def test_frames_say_what_the_model_reported() -> None:
    frame = Frame("q", Answer("a b"), Answer("a c"), (("r0001_aa", 0.5),), stage="done")
    cards = views.frame_cards(frame, {"r0001_aa": "request-1"})
    assert "active: request-1 × 0.5" in cards[1]
    assert '<mark class="un-diff">c</mark>' in cards[1]
    whole = dataclasses.replace(
        frame, unlearned=Answer("<i>", word="wrong", fact_recall=0.25), stack=(("r0001_aa", 1.0),)
    )
    after = views.frame_cards(frame, {"r0001_aa": "request-1"}, whole)[1]
    assert "Before, request-1 × 1: wrong, facts stated 0.250</summary>&lt;i&gt;" in after
    assert "Before" not in "".join(views.frame_cards(whole, None, whole))
    bare = views.frame_cards(dataclasses.replace(frame, stack=()), {"r0001_aa": "request-1"})
    assert "no adapter is active; tick one above" in bare[1]
    assert "not in the data" in views.scores_table(frame)
    assert "<table>" not in views.scores_table(frame)


def test_a_request_names_exactly_one_source(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="names nothing"):
        requests.draft(None, "", None, "simnpo", "")
    with pytest.raises(UserError, match="an author and pasted rows"):
        requests.draft("Mira", "{}", None, "simnpo", "")
    made = requests.draft(None, "Who?\tMira.", None, "simnpo", "x", [("--num-train-epochs", 3)])
    assert json.loads(made.rows) == {"question": "Who?", "answer": "Mira."}
    assert made.retain == ""
    assert made.settings == (("--num-train-epochs", "3"),)
    table = tmp_path / "rows.csv"
    table.write_text('question,answer\n"Who, then?",Mira.\n')
    frame = tmp_path / "keep.parquet"
    pyarrow.parquet.write_table(
        pyarrow.table({"prompt": ["Where?"], "completion": ["In Lagos."]}), frame
    )
    made = requests.draft(
        None, "", str(table), "simnpo", "", [("--neighbours", 1)], retain_upload=str(frame),
        preset="mini",
    )  # fmt: skip
    assert json.loads(made.rows) == {"question": "Who, then?", "answer": "Mira."}
    assert json.loads(made.retain) == {"question": "Where?", "answer": "In Lagos."}
    assert set(made.files) == {"request.jsonl", "retain.jsonl"}
    with pytest.raises(UserError, match="pasted and uploaded"):
        requests.draft(
            None, "a\tb", None, "simnpo", "", retain_pasted="c\td", retain_upload=str(frame)
        )
    binary = tmp_path / "rows.jsonl"
    binary.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="not UTF-8"):
        requests.draft(None, "", str(binary), "simnpo", "")
    binary.write_bytes(b"x" * (requests.LARGEST_UPLOAD + 1))
    with pytest.raises(UserError, match="at most"):
        requests.draft(None, "", str(binary), "simnpo", "")


def test_the_command_of_a_request_is_what_the_job_runs(tmp_path: Path) -> None:
    from adapters.base.load import BaseSpec

    session = Session(tmp_path / "s", BaseSpec("b", dtype="float32"), tmp_path / "d")
    made = requests.draft(None, "Who?\tMira.", None, "npo", "one", [("--learning-rate", 0.01)])
    assert made.command(session) == (
        f"unlearner forget rows.jsonl --base b --dtype float32 --store {tmp_path / 's'} "
        f"--data {tmp_path / 'd'} --objective npo --label one --learning-rate 0.01"
    )


def test_a_job_that_waits_is_withdrawn_with_its_rows(tmp_path: Path, monkeypatch: Any) -> None:
    jobs = Jobs(tmp_path / "jobs")
    monkeypatch.setattr(jobs, "advance", lambda: None)
    name = jobs.submit("t", ["forget", "request.jsonl"], {"request.jsonl": "secret rows"})
    place = tmp_path / "jobs" / name
    assert (place / "request.jsonl").stat().st_mode & 0o077 == 0
    assert jobs.view(name).status == "waiting"
    assert jobs.view(name).words == ("forget", str(place / "request.jsonl"))
    jobs.cancel(name)
    assert jobs.view(name).status == "withdrawn"
    assert not (place / "request.jsonl").exists()
    with pytest.raises(UserError, match="no job"):
        jobs.view("../etc")


def test_a_failed_job_says_why_and_the_next_one_starts(tmp_path: Path) -> None:
    jobs = Jobs(tmp_path / "jobs")
    first = jobs.submit("bad", ["score", str(tmp_path / "missing.json")], name="a")
    second = jobs.submit("next", ["score", str(tmp_path / "gone.json")], name="b")
    assert jobs.views()[1].status == "waiting"
    assert jobs.views()[1].position == 1
    until(lambda: jobs.view(first).ended)
    assert "There is no evaluation log" in jobs.view(first).outcome["text"]
    jobs.advance()
    until(lambda: jobs.view(second).ended)


def test_names_and_passwords_come_from_a_file(tmp_path: Path) -> None:
    assert read_auth(None) is None
    path = tmp_path / "auth"
    path.write_text("mira:a:b\n\n")
    for mode in (0o644, 0o640, 0o606):
        path.chmod(mode)
        with pytest.raises(UserError, match="Others can read the passwords"):
            read_auth(path)
    path.chmod(0o600)
    assert read_auth(path) == [("mira", "a:b")]
    path.write_text("mira\n")
    with pytest.raises(UserError, match="names and passwords"):
        read_auth(path)


def test_another_address_needs_a_password() -> None:
    from ui.app.build import check_address

    for host in ("127.0.0.1", "127.0.0.2", "localhost", "::1"):
        check_address(host, None)
    check_address("0.0.0.0", [("a", "b")])
    for host in ("0.0.0.0", "::", "192.168.1.2", "my-machine", ""):
        with pytest.raises(UserError, match="Without a password"):
            check_address(host, None)


def test_all_authors_of_tofu_can_be_asked(shared: Path) -> None:
    library = read_library(shared / "tofu")
    assert len(library.authors) == 200
    assert {len(rows) for rows in library.authors.values()} == {20}
    last = list(library.authors)[-1]
    assert all(row.perturbed_answers for row in library.authors[last])
    beside = library.beside(library.authors[last], 5)
    assert {name for name, _ in beside} == {"retain authors", "real authors", "world facts"}
    own = {row.question for row in library.authors[last]}
    assert not own & {row.question for _, row in beside}


def _session(tmp_path: Path, tiny_base: Path) -> Session:
    from adapters.base.load import BaseSpec

    session = Session(tmp_path / "store", BaseSpec(str(tiny_base), dtype="float32", device="cpu"))
    session.library = read_library(tmp_path / "nowhere")
    session._load_model(session.base)  # type: ignore[arg-type]
    return session


def test_one_batch_and_turns_say_the_same_and_stop_at_once(
    tmp_path: Path, tiny_base: Path, put: Any
) -> None:
    slug = put("1")
    session = _session(tmp_path, tiny_base)
    session.use([(slug, 0.7)])
    model, fmt = session.require()
    made = []
    for mixed in (True, False):
        pair = PairDecoder(model, fmt, "Who wrote it?", [slug], Sampling(max_new=12), mixed=mixed)
        while not pair.done:
            pair.step()
        made.append([side.tokens for side in pair.sides])
    assert made[0] == made[1]
    assert made[0][0] != made[0][1]
    stop = threading.Event()
    frames = session.compare("Who wrote it?", [(slug, 1.0)], Sampling(), stop)
    first = next(frames)
    stop.set()
    rest = list(frames)
    assert [frame.stage for frame in rest] == ["stopped"]
    assert rest[0].unlearned.tokens == first.unlearned.tokens


def test_clear_gives_the_bare_base_and_strength_matters(
    tmp_path: Path, tiny_base: Path, put: Any
) -> None:
    slug, other = put("1"), put("2")
    session = _session(tmp_path, tiny_base)

    def ask(stack: Any, sampling: Sampling | None = None) -> Frame:
        *_, last = session.compare("Where?", stack, sampling or Sampling(max_new=12))
        return last

    bare, both = ask([]), ask([(slug, 1.0), (other, 0.5)])
    assert bare.unlearned.text == bare.base.text
    assert both.stack == ((slug, 1.0), (other, 0.5))
    assert not both.one_batch
    assert both.unlearned.text != bare.base.text
    assert both.base.text == bare.base.text
    assert ask([(slug, 0.0)]).unlearned.text == bare.base.text
    again = ask([])
    assert (again.base.text, again.unlearned.text) == (bare.base.text, bare.unlearned.text)
    hot = Sampling(temperature=1.5, seed=3, max_new=12)
    assert ask([], hot).base.text == ask([], hot).base.text
    assert ask([], hot).base.text != bare.base.text
    with pytest.raises(UserError, match="no question"):
        next(session.compare("  ", [], Sampling()))


def test_the_right_side_alone_says_what_both_sides_said(
    tmp_path: Path, tiny_base: Path, put: Any
) -> None:
    slug = put("1")
    session = _session(tmp_path, tiny_base)
    sampling = Sampling(max_new=12)
    *_, first = session.compare("Where?", [], sampling)
    *_, whole = session.compare("Where?", [(slug, 1.0)], sampling)
    *_, again = session.compare("Where?", [(slug, 1.0)], sampling, keep=first)
    assert again.kept
    assert again.base is first.base  # not answered, not scored anew
    assert again.unlearned.text == whole.unlearned.text
    assert again.unlearned.text != again.base.text
    stop = threading.Event()
    frames = session.compare("Where?", [(slug, 0.5)], sampling, stop, keep=again)
    assert next(frames).base is first.base
    stop.set()
    *_, stopped = frames
    assert (stopped.stage, stopped.base_whole) == ("stopped", True)
    *_, last = session.compare("Where?", [(slug, 0.5)], sampling, keep=stopped)
    assert last.kept
    for changed in (("When?", sampling), ("Where?", Sampling(max_new=11))):
        *_, other = session.compare(changed[0], [], changed[1], keep=first)
        assert not other.kept  # another question, or asked in another way


def test_filed_requests_are_found_again_by_their_marks(tmp_path: Path, put: Any) -> None:
    from adapters.digests import key_id, mark
    from adapters.store.store import AdapterStore
    from ui.app.data.library import Library, filed_requests, marked_rows, readable_names

    key = b"k" * 32
    rows = tuple(Row(f"Who is {n}?", f"{n} is.") for n in "ABC")

    def data(with_key: bytes) -> dict[str, Any]:
        marks = [mark(with_key, row.question) for row in rows[:2]]
        told = {"n": 2, "digest": "0" * 64, "kind": "x", "key_id": key_id(with_key)}
        return {"forget": {**told, "marks": marks}}

    mine = put("1", label="request-1-b3f16356713b", data=data(key))
    put("2", label="of another key", data=data(b"o" * 32))
    bare = put("3", label="")
    same = put("4", label="request-1-0123456789ab")
    adapters = AdapterStore.open(tmp_path / "store").list()
    library = Library({"A": rows[:1], "B": rows[1:]})
    filed = filed_requests(marked_rows(library, key), adapters, key)
    assert {slug: (each.rows, each.authors) for slug, each in filed.items()} == {
        mine: (rows[:2], ("A", "B"))
    }
    names = readable_names(adapters, filed)
    assert (names[mine], names[bare]) == ("request-1: A, B", "request-3")
    assert names[same] == "request-1"
    assert "of another key" in names.values()
    assert len(set(readable_names([*adapters], {}).values())) == 4  # no two are alike


def test_a_job_that_died_or_was_saved_goes_on_and_is_running(tmp_path: Path) -> None:
    script = tmp_path / "runner.py"
    script.write_text(
        "import sys, time\n"
        "from pathlib import Path\n"
        "from ui.app.jobs import begin\n"
        "place = Path(sys.argv[1])\n"
        "begin(place)\n"
        "while not (place / 'leave').exists(): time.sleep(0.05)\n"
    )
    jobs = Jobs(tmp_path / "jobs", runner=[str(script)])
    name = jobs.submit("t", ["quickstart"])
    place = tmp_path / "jobs" / name
    until(lambda: jobs.view(name).status == "running")
    (place / "events.jsonl").write_text('{"said": "stopping"}\n')
    assert jobs.view(name).status == "stopping"
    (place / "leave").touch()
    until(lambda: jobs.view(name).status == "died")  # gone without an outcome
    (place / "leave").unlink()
    jobs.resume(name)
    until(lambda: jobs.view(name).status == "running")  # not "stopping": that is over
    with pytest.raises(UserError, match="interrupted"):
        jobs.resume(name)
    (place / "leave").touch()
    until(lambda: jobs.view(name).ended)


def test_two_apps_on_one_folder_start_a_job_once(tmp_path: Path) -> None:
    """Two processes that look at the same moment: one file lock decides."""
    import subprocess
    import sys

    (tmp_path / "runner.py").write_text(
        "import sys, time\n"
        "from pathlib import Path\n"
        "from ui.app.jobs import begin\n"
        "place = Path(sys.argv[1])\n"
        "with (place / 'starts').open('a') as file: file.write('x')\n"
        "begin(place)\n"
        "while not (place / 'leave').exists(): time.sleep(0.05)\n"
    )
    (tmp_path / "app.py").write_text(
        "import sys, time\n"
        "from pathlib import Path\n"
        "from ui.app.jobs import Jobs\n"
        "jobs = Jobs(Path(sys.argv[1]), runner=[sys.argv[2]])\n"
        "time.sleep(max(0, float(sys.argv[3]) - time.time()))\n"
        "for _ in range(20): jobs.advance()\n"
    )
    jobs = Jobs(tmp_path / "jobs", runner=[str(tmp_path / "runner.py")])
    hold = jobs.submit("first", ["quickstart"], name="a")
    second = jobs.submit("second", ["quickstart"], name="b")
    places = {name: tmp_path / "jobs" / name for name in (hold, second)}
    until(lambda: jobs.view(hold).status == "running")
    (places[hold] / "leave").touch()
    until(lambda: jobs.view(hold).ended)
    import time

    words = [tmp_path / "app.py", tmp_path / "jobs", tmp_path / "runner.py", time.time() + 2]
    apps = [subprocess.Popen([sys.executable, *map(str, words)]) for _ in range(3)]
    assert [app.wait(60) for app in apps] == [0, 0, 0]
    until(lambda: jobs.view(second).status == "running")
    assert (places[second] / "starts").read_text() == "x"
    (places[second] / "leave").touch()
    until(lambda: jobs.view(second).ended)


def test_no_name_outlives_its_job(tmp_path: Path) -> None:
    """Titles, words, events, errors and outcomes of ended jobs name nobody."""
    jobs = Jobs(tmp_path / "jobs")
    author = jobs.submit(
        "forget Mira Okafor",
        ["forget", "tofu:author=Mira Okafor", "--base", str(tmp_path / "none")],
        private=["Mira Okafor"],
    )
    until(lambda: jobs.view(author).ended)
    rows = json.dumps({"question": "Who is Ola Berg?", "answer": "Ola Berg is a poet."})
    words = ["forget", "request.jsonl", "--base", "none"]
    request = jobs.submit("rows", words, {"request.jsonl": rows + "\n{Ola"})
    until(lambda: jobs.view(request).ended)
    assert {jobs.view(name).status for name in (author, request)} == {"failed"}
    assert jobs.view(author).title == "forget [removed]"
    assert jobs.view(author).outcome["text"], "why it failed is still told"
    script = tmp_path / "broken.py"
    script.write_text(
        "import sys, traceback\n"
        "from pathlib import Path\n"
        "from ui.app.jobs import begin, end\n"
        "place = Path(sys.argv[1])\n"
        "begin(place)\n"
        "try: raise ValueError('a row about Ola')\n"
        "except ValueError: traceback.print_exc()\n"
        "end(place, {'status': 'failed', 'text': 'ValueError'})\n"
    )
    broken = Jobs(tmp_path / "jobs", runner=[str(script)])
    name = broken.submit("rows", words, {"request.jsonl": rows})
    until(lambda: broken.view(name).ended)
    assert broken.view(name).outcome["log"].startswith("Traceback")
    assert broken.view(name).outcome["log"].endswith("[removed]"), "the message quotes a row"
    for path in (path for path in jobs.folder.rglob("*") if path.is_file()):
        for word in (b"Mira", b"Okafor", b"Ola"):
            assert word not in path.read_bytes(), path


def test_history_is_cleared_but_not_what_is_under_way(tmp_path: Path, monkeypatch: Any) -> None:
    jobs = Jobs(tmp_path / "jobs")
    monkeypatch.setattr(jobs, "advance", lambda: None)
    gone, waiting = jobs.submit("a", ["score"], name="a"), jobs.submit("b", ["score"], name="b")
    jobs.cancel(gone)
    assert jobs.clear_history() == 1
    assert [view.name for view in jobs.views()] == [waiting]
    assert not (jobs.folder / gone).exists()
    assert jobs.clear_history() == 0


def test_only_new_events_are_read(tmp_path: Path, monkeypatch: Any) -> None:
    import ui.app.jobs

    jobs = Jobs(tmp_path / "jobs")
    monkeypatch.setattr(jobs, "advance", lambda: None)
    place = jobs.folder / jobs.submit("t", ["score"])
    for step in range(100):
        ui.app.jobs.append_event(place, {"step": step, "steps": 200})
    assert len(jobs.view(place.name).steps) == 100
    parsed: list[str] = []
    loads = json.loads
    monkeypatch.setattr(
        ui.app.jobs.json, "loads", lambda text, **_: parsed.append(str(text)) or loads(text)
    )
    with (place / "events.jsonl").open("a") as file:
        file.write('{"step": 100, "st')  # half a line, as a reader may meet it
    assert len(jobs.view(place.name).steps) == 100
    with (place / "events.jsonl").open("a") as file:
        file.write('eps": 200}\n')
    assert jobs.view(place.name).steps[-1]["step"] == 100
    assert sum('"step"' in text for text in parsed) == 1


def test_another_site_cannot_use_the_page(tmp_path: Path, monkeypatch: Any) -> None:
    import http.client
    from urllib.parse import urlparse

    from ui.app import guard
    from ui.app.build import App, launch
    from ui.cli.commands.everyday.ui import planned

    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(scratch))
    app = App(Session(tmp_path / "store"), Jobs(tmp_path / "jobs"), planned, scratch=scratch)
    page, url = launch(app)
    port = int(urlparse(url).port or 0)
    here = f"127.0.0.1:{port}"

    def status(method: str, path: str, body: bytes = b"", **headers: str) -> int:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
        connection.request(method, path, body, {"Host": here, **headers})
        return connection.getresponse().status

    form = (
        b'--x\r\nContent-Disposition: form-data; name="files"; filename="a"\r\n\r\n1\r\n--x--\r\n'
    )
    kind = {"Content-Type": "multipart/form-data; boundary=x"}
    upload = "/gradio_api/upload"
    try:
        assert status("GET", "/config") == 200
        assert status("GET", "/config", Host=f"localhost:{port}") == 200
        for host in ("evil.example", f"evil.example:{port}", f"127.0.0.1.evil.example:{port}"):
            assert status("GET", "/config", Host=host) == 400  # a rebound name
            assert status("POST", "/gradio_api/call/stack", b"{}", Host=host) == 400
        assert status("POST", upload, form, **kind) == 200
        assert status("POST", upload, form, **kind, Origin=f"http://{here}") == 200
        for origin in ("http://evil.example", f"http://127.0.0.1:{port + 1}", "null"):
            assert status("POST", upload, form, **kind, Origin=origin) == 403
        monkeypatch.setattr(guard, "UPLOAD_QUOTA", len(form) - 1)
        assert status("POST", upload, form, **kind) == 413
    finally:
        page.close(verbose=False)


def test_a_tick_does_not_end_a_question_that_was_asked_after_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def answering(asked: str, stack: Any, _: Any, stop: threading.Event, **__: Any) -> Any:
        for _ in range(9):
            if not stop.is_set():
                yield Frame(asked, Answer(""), Answer(""), tuple(stack))

    strengths = SimpleNamespace(
        stack_of=lambda chosen, kept: [(name, kept.get(name, 1.0)) for name in chosen]
    )
    monkeypatch.setattr(App, "actions", strengths)
    monkeypatch.setattr(compare._Asking, "_pictures", lambda self, frames, *_: frames)
    monkeypatch.setattr(compare, "SETTLE_SECONDS", 0)
    asking = compare._Asking(App(SimpleNamespace(compare=answering), None, None))  # type: ignore[arg-type]
    browser: Any = SimpleNamespace(session_hash="one")
    last = Frame("Before?", Answer(""), Answer(""), (), stage="done")

    asked = asking.run("After?", ["a"], {}, 0, 0, 9, browser)
    next(asked)  # says that it asks
    assert next(asked).question == "After?"
    # "a" was ticked before it was asked.
    assert list(asking.again(last, ["a"], {}, browser)) == [compare._UNCHANGED]
    assert next(asked).question == "After?"

    changed = asking.again(last, ["a"], {"a": 0.5}, browser)
    next(changed)  # says that it asks
    assert list(asked) == []
    assert asking.under_way == {}
    assert next(changed).stack == (("a", 0.5),)

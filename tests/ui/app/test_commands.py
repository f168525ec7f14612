"""Every action's "Copy as command" is a command that parses, and names the same thing."""

from __future__ import annotations

import shlex
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from adapters.base.load import BaseSpec
from tests.conftest import A100, T4
from ui.app.data import commands, requests, runs
from ui.app.data.answers import Answer, Frame, Sampling
from ui.app.session import Session
from ui.cli.main import parse

STACK = (("r0001_ab", 1.0), ("r0002_cd", 0.5))


@pytest.fixture
def session(tmp_path: Path) -> Session:
    base = BaseSpec("org/b", revision="v1", dtype="float32", load_in_4bit=True, device="cpu")
    return Session(tmp_path / "my store", base, tmp_path / "d", "llama2", "Be brief.")


def _frame(question: str, sampling: Sampling | None = None) -> Frame:
    return Frame(question, Answer("a"), Answer("b"), STACK, sampling=sampling)


def _parsed(text: str) -> Any:
    """The arguments of a command as the page shows it."""
    words = shlex.split(text)
    assert words[0] == "unlearner"
    return parse(words[1:])


def _is_session(args: Any, session: Session) -> None:
    assert session.base is not None
    assert (args.base, args.revision) == (session.base.name, session.base.revision)
    assert (args.dtype, args.load_in_4bit, args.device) == ("float32", True, "cpu")
    assert (args.store, args.data, args.template) == (session.store_path, session.data, "llama2")
    assert args.system == session.system


def test_a_comparison_is_a_command(session: Session) -> None:
    args = _parsed(commands.ask(session, _frame('--who\'s "she"?', Sampling(0.7, 3, 50))))
    assert args.question == '--who\'s "she"?'
    assert (args.adapters, args.scales) == (["r0001_ab", "r0002_cd"], (1.0, 0.5))
    assert (args.temperature, args.seed, args.max_new) == (0.7, 3, 50)
    _is_session(args, session)
    plain = _parsed(commands.ask(session, Frame("Who?", Answer(""), Answer(""), ())))
    assert (plain.adapters, plain.scales, plain.temperature) == ([], None, 0.0)


def test_a_sheet_is_a_command(session: Session) -> None:
    sheet = _parsed(commands.sheet(session, "Hina O'Ameen", STACK, 7))
    assert (sheet.author, sheet.neighbours, sheet.question) == ("Hina O'Ameen", 7, None)
    assert sheet.adapters == ["r0001_ab", "r0002_cd"]
    _is_session(sheet, session)


@pytest.mark.parametrize("action", ["list", "activate", "revert", "clear"])
def test_changes_of_the_stack_are_commands(session: Session, action: str) -> None:
    args = _parsed(commands.change(session, action, "r0001_ab", 0.5))
    assert args.store == session.store_path
    assert args.verb == {"clear": "revert"}.get(action, action)
    if action == "activate":
        assert (args.refs, args.scales, args.with_parents) == (["r0001_ab"], (0.5,), True)
    if action == "revert":
        assert args.refs == ["r0001_ab"]
    if action == "clear":
        assert args.all


def test_runs_requests_and_the_demo_are_commands(session: Session) -> None:
    lines = commands.runs(session, [Path("a b.json")], Path("ref.json"), "forget05").splitlines()
    score, evaluate = [_parsed(line) for line in lines]
    assert (score.log, score.reference_log) == (Path("a b.json"), Path("ref.json"))
    assert (evaluate.split, evaluate.reference_log) == ("forget05", Path("ref.json"))
    _is_session(evaluate, session)
    probe, log = Path("r.json"), Path("a b.json")
    sources = runs.Sources(None, (log,), Path("ref.json"), (probe,), (Path("c.json"),))
    request = sources.report_request()
    assert request is not None
    report = _parsed(request.command)
    assert (report.inputs, report.reference_log) == (["a b.json"], Path("ref.json"))
    assert (report.robustness, report.calibration) == ([probe], [Path("c.json")])
    probes_alone = runs.Sources(robustness=(probe,)).report_request()
    assert probes_alone is not None
    assert probes_alone.command == ""
    made = requests.draft(None, "Who?\tMira.", None, "npo", "one", [("--learning-rate", 0.01)])
    asked = _parsed(made.command(session))
    assert (asked.request, asked.objective, asked.label) == ("rows.jsonl", "npo", "one")
    assert asked.learning_rate == 0.01
    _is_session(asked, session)
    author = requests.draft("Hina Ameen", "", None, "simnpo", "")
    assert _parsed(author.command(session)).request == "tofu:author=Hina Ameen"
    assert _parsed(commands.demo(Path("/x y/demo"))).out == Path("/x y/demo")


def test_the_settings_of_the_form_become_flags_of_the_command(session: Session) -> None:
    from ui.app.tabs.request import _draft

    rows = (None, "Who?\tMira.", None, "Where?\tThere.", None)
    filled = (*rows, "mini", "simnpo", "", 2, 3, 0, None, 20, 0.5)
    args = _parsed(_draft(*filled).command(session))
    assert (args.retain, args.neighbours, args.preset) == ("keep.jsonl", 2, "mini")
    assert (args.num_train_epochs, args.alternates) == (3, 20)
    assert args.learning_rate == 8e-4  # of the preset
    assert args.attack_weight == 0.5


def test_ask_answers_as_the_app_does(run: Any, tiny_base: Path, tmp_path: Path, put: Any) -> None:
    slug = put("1")
    where = ("--base", tiny_base, "--store", tmp_path / "store", "--data", tmp_path / "none",
             "--dtype", "float32", "--device", "cpu", "--max-new", 8)  # fmt: skip
    both = run("ask", "Who wrote it?", *where, "--adapters", slug, "--scales", "0.7", "--json").json
    assert both["stack"] == [[slug, 0.7]]
    assert both["base"]["text"] != both["unlearned"]["text"]
    bare = run("ask", "Who wrote it?", *where, "--adapters", "none", "--json").json
    assert bare["base"]["text"] == bare["unlearned"]["text"] == both["base"]["text"]
    hot = run("ask", "Who wrote it?", *where, "--adapters", "none", "--temperature", 1.5,
              "--seed", 3, "--json").json  # fmt: skip
    assert hot["base"]["text"] != bare["base"]["text"]
    text = run("ask", "Who wrote it?", *where, "--adapters", slug)
    assert text.code == 0
    assert "stack" in text.out
    for words, said in (
        (("--adapters", slug, "--scales", "x"), "not a list of numbers"),
        (("--adapters", slug, "--scales", "1,2"), "2 numbers for 1"),
        (("--author", "Mira"), "one of the two"),
    ):
        refused = run("ask", "Who wrote it?", *where, *words)
        assert refused.code == 2
        assert said in refused.err


def test_ask_judges_by_rows_of_the_users_own_and_asks_no_hub(
    run: Any, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ui.app.data import library

    def load(*_: Any) -> Any:
        raise AssertionError("TOFU was asked for")

    monkeypatch.setattr(library, "load_authors", load)
    rows = tmp_path / "rows.csv"
    rows.write_text("question,answer\nWho wrote it?,Ula Brandt wrote it.\n")
    where = ("--base", tiny_base, "--store", tmp_path / "store", "--dtype", "float32",
             "--device", "cpu", "--max-new", 8)  # fmt: skip
    known = run("ask", "Who wrote it?", *where, "--rows", rows, "--json").json
    assert known["truth"] == "Ula Brandt wrote it."
    assert known["base"]["answer_prob"] > 0
    other = run("ask", "Who wrote it?", *where, "--json").json
    assert other["truth"] is None
    refused = run("ask", "Who wrote it?", *where, "--data", rows)
    assert refused.code == 2
    assert "takes the folder" in refused.err


@pytest.mark.parametrize(
    ("device", "free"), [("auto", 70), ("cuda:0", 70), ("cuda:1", 14), ("cpu", None)]
)
def test_the_free_memory_is_that_of_the_device(device: str, free: Any, cards: Any) -> None:
    cards(A100, T4)
    session = SimpleNamespace(base=BaseSpec("b", device=device), gpu_bytes=1)
    found = requests.free_memory(session)  # type: ignore[arg-type]
    assert (found == (free << 30) + 1) if free else found > 0

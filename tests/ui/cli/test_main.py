"""The shell of the command line: what is imported, how it refuses, what goes to which stream."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from adapters.errors import DoesNotFit, Interrupted, StoreCorrupt
from ui.cli import main as cli

ROOT = Path(__file__).resolve().parents[3]
HEAVY = (
    "torch",
    "transformers",
    "peft",
    "trl",
    "datasets",
    "numpy",
    "scipy",
    "gradio",
    "safetensors",
)
COMMANDS = sorted(cli.build_parser()[1])


def python(code: str, *args: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *args],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        **options,
    )


def test_help_of_every_command_imports_no_model_library() -> None:
    """One process runs --help of all commands, as --help itself costs the same imports."""
    code = f"""
import sys, json, io, contextlib
from ui.cli.main import main
codes = []
with contextlib.redirect_stdout(io.StringIO()):
    for words in json.loads(sys.argv[1]):
        codes.append(main([*words.split(), "--help"]))
    codes.append(main(["--version"]))
print(json.dumps([codes, [name for name in {HEAVY!r} if name in sys.modules]]))
"""
    done = python(code, json.dumps(["", *COMMANDS]))
    codes, heavy = json.loads(done.stdout)
    assert heavy == []
    assert codes == [0] * (len(COMMANDS) + 2)


def test_wrong_usage_and_the_store_list_need_no_torch(tmp_path: Path) -> None:
    code = """
import sys, json
from ui.cli.main import main
codes = [main(["forgett"]), main(["adapters", "list", "--store", sys.argv[1]])]
print(json.dumps([codes, "torch" in sys.modules]), file=sys.stderr)
"""
    done = python(code, str(tmp_path / "none"))
    assert json.loads(done.stderr.splitlines()[-1]) == [[2, 2], False]


def test_the_design_s_commands_are_there() -> None:
    first = {words.split()[0] for words in COMMANDS}
    assert first == {
        "quickstart", "doctor", "preview", "forget", "consolidate", "adapters", "merge",
        "evaluate", "score", "finetune", "reproduce", "ui", "bench", "report", "calibrate",
        "sequence", "robustness", "ask", "tune", "gpu-check",
    }  # fmt: skip
    verbs = {words.split()[1] for words in COMMANDS if words.startswith("adapters ")}
    assert verbs >= {
        "list", "show", "verify", "activate", "revert", "remove", "import", "export", "log", "gc",
    }  # fmt: skip


@pytest.mark.parametrize("words", COMMANDS)
def test_every_command_has_json_debug_and_help(words: str, run: Any) -> None:
    shown = run(*words.split(), "--help")
    assert shown.code == 0
    assert "--json" in shown.out
    assert "--debug" in shown.out
    assert all(len(line) <= 130 for line in shown.out.splitlines())


def answer_with(monkeypatch: pytest.MonkeyPatch, action: Any) -> None:
    """Makes `unlearner doctor` do `action` instead of its work."""
    args = SimpleNamespace(run=lambda args, console: action(console))
    monkeypatch.setattr(cli, "parse", lambda words: args)


def raising(error: BaseException) -> Any:
    def act(console: Any) -> int:
        raise error

    return act


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (StoreCorrupt("It is torn.", "Restore it."), 1, ["Error: It is torn.", "Fix: Restore it."]),
        (DoesNotFit("It needs 90 GB.", "Use --load-in-4bit."), 3, ["Fix: Use --load-in-4bit."]),
        (Interrupted("Saved at 41.", "Use --resume."), 130, ["Saved at 41.\nUse --resume."]),
        (KeyboardInterrupt(), 130, ["Interrupted"]),
        (ValueError("seven"), 1, ["Error: ValueError: seven", "--debug"]),
        (PermissionError(13, "Permission denied", "/x"), 1, ["Permission denied (/x)", "Fix:"]),
        (MemoryError(), 1, ["Out of memory", "--per-device-train-batch-size"]),
    ],
)  # fmt: skip
def test_errors_leave_with_their_code_and_without_a_traceback(
    error: BaseException, code: int, words: list[str], run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer_with(monkeypatch, raising(error))
    ran = run("doctor", "--json")
    assert ran.code == code
    assert ran.out == ""
    assert "Traceback" not in ran.err
    assert ("Error: " in ran.err) == (code != 130)
    for word in words:
        assert word in ran.err


def test_debug_shows_the_traceback(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    answer_with(monkeypatch, raising(StoreCorrupt("The file is torn.", "Restore it.")))
    ran = run("doctor", "--debug")
    assert ran.code == 1
    assert "Traceback" in ran.err
    assert "Fix: Restore it." in ran.err


def test_a_reader_that_leaves_early_is_no_traceback() -> None:
    code = """
import sys
from types import SimpleNamespace
from ui.cli import main as cli
def many(args, console):
    for i in range(100000):
        console.text("line " + str(i))
    return 0
cli.parse = lambda words: SimpleNamespace(run=many)
sys.exit(cli.main(["doctor"]))
"""
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(timeout=60) == 1
    assert process.stderr.read() == b""
    process.stderr.close()


def test_a_real_ctrl_c_says_so_in_one_line() -> None:
    code = """
import sys, time
from types import SimpleNamespace
from ui.cli import main as cli
def wait(args, console):
    console.words("ready")
    time.sleep(60)
cli.parse = lambda words: SimpleNamespace(run=wait)
sys.exit(cli.main(["doctor"]))
"""
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    assert process.stderr.readline() == "ready\n"
    os.kill(process.pid, signal.SIGINT)
    rest = process.stderr.read()
    assert process.wait(timeout=60) == 130
    assert rest.count("\n") == 1
    assert rest.startswith("Interrupted")
    process.stderr.close()


def test_words_go_to_stderr_before_the_work_starts(run: Any, tmp_path: Path) -> None:
    """The first line stands there even when the work then fails."""
    ran = run("score", tmp_path / "none.json")
    assert ran.out == ""
    assert ran.err.splitlines()[0].startswith("Reading ")
    assert "There is no evaluation log" in ran.err
    assert ran.code == 2


def test_what_a_library_prints_is_not_data(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def noisy(console: Any) -> int:
        print("{'train_runtime': 1}")
        console.result({"a": 1})
        return 0

    answer_with(monkeypatch, noisy)
    ran = run("doctor", "--json")
    assert ran.json == {"a": 1}
    assert "train_runtime" in ran.err


def test_a_closed_parser_gives_a_version(run: Any) -> None:
    ran = run("--version")
    assert ran.code == 0
    assert ran.out.startswith("unlearner ")


def test_without_arguments_the_help_is_printed_in_sections(run: Any) -> None:
    ran = run()
    assert (ran.code, ran.err) == (0, "")
    assert ran.out == run("--help").out
    places = [ran.out.index(f"\n{title}:\n") for title in ("everyday", "adapters", "experiments")]
    assert places == sorted(places)
    for words in COMMANDS:
        assert ran.out.count(f"\n  {words.split()[0]:<12} ") == 1


@pytest.mark.parametrize("split", ["forget05", "tofu:forget05"])
def test_a_split_has_one_meaning_in_two_spellings(split: str) -> None:
    for words in ("evaluate --base b", "robustness --base b", "calibrate r --base b"):
        assert cli.parse([*words.split(), "--split", split]).split == "forget05"

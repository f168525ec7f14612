"""The shell of the command line: what is imported, how it refuses, what goes to which stream."""

from __future__ import annotations

import json
import os
import shlex
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


@pytest.mark.parametrize("module", ["ui.app.build", "evaluation.report.build"])
def test_the_page_and_reports_need_no_torch(module: str) -> None:
    done = python(f"""
import json, sys
import {module}
print(json.dumps([name for name in {HEAVY!r} if name in sys.modules]))
""")
    assert not {"torch", "transformers", "peft"} & set(json.loads(done.stdout))


def test_an_error_that_causes_itself_is_no_interrupt() -> None:
    error = ValueError("x")
    error.__cause__ = error
    assert not cli._comes_of_an_interrupt(error)
    error.__cause__ = KeyboardInterrupt()
    assert cli._comes_of_an_interrupt(error)


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
        "sequence", "robustness", "ask", "tune", "config", "gpu-check",
    }  # fmt: skip
    verbs = {words.split()[1] for words in COMMANDS if words.startswith("adapters ")}
    assert verbs >= {
        "list", "show", "verify", "activate", "revert", "remove", "import", "export", "log", "gc",
    }  # fmt: skip


@pytest.mark.parametrize("words", COMMANDS)
def test_help_is_short_and_help_all_has_every_flag(words: str, run: Any) -> None:
    leaf = cli.build_parser(words.split()[0])[1][words]
    shown, full = run(*words.split(), "--help"), run(*words.split(), "--help-all")
    assert (shown.code, full.code) == (0, 0)
    flags = {word.strip("[],") for word in shown.out.split() if word.startswith(("--", "[--"))}
    assert len(flags & set(leaf.option_names())) <= 25 + 1  # --help-all is one of them
    for name in leaf.option_names():
        if name != "--load-in-4bit" or words != "merge":  # refused with its reason
            assert name in full.out
    assert "--json" in shown.out
    for text in (shown.out, full.out):
        assert all(len(line) <= 130 for line in text.splitlines())


EXAMPLES = [
    (words, line.strip())
    for words, leaf in sorted(cli.build_parser()[1].items())
    for line in (leaf.epilog or "").replace("\\\n", " ").splitlines()
    if line.strip().startswith("unlearner ")
]


def test_every_command_of_everyday_and_experiments_has_an_example() -> None:
    without = {words for words in COMMANDS if not words.startswith("adapters ")}
    assert without - {words for words, _ in EXAMPLES} == set()


@pytest.mark.parametrize(("words", "line"), EXAMPLES, ids=[line for _, line in EXAMPLES])
def test_an_example_of_the_help_is_a_command(words: str, line: str, tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text("request: rows.jsonl\nbase: B\n")
    argv = shlex.split(line.split("  #")[0].split(" > ")[0].replace("run.yaml", str(config)))[1:]
    assert " ".join(argv).startswith(words) or words == "config"
    cli.parse(argv)


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_a_shell_completes_commands_and_flags(shell: str, run: Any) -> None:
    pytest.importorskip("shtab")
    ran = run("--print-completion", shell)
    assert ran.code == 0
    assert "--learning-rate" in ran.out
    assert "quarantine" in ran.out


def answer_with(monkeypatch: pytest.MonkeyPatch, action: Any) -> None:
    """Makes `unlearner doctor` do `action` instead of its work."""
    args = SimpleNamespace(run=lambda args, console: action(console))
    monkeypatch.setattr(cli, "parse", lambda words: args)


def raising(error: BaseException) -> Any:
    def act(console: Any) -> int:
        raise error

    return act


def caused_by(error: BaseException, cause: BaseException) -> BaseException:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (StoreCorrupt("It is torn.", "Restore it."), 1, ["Error: It is torn.", "Fix: Restore it."]),
        (DoesNotFit("It needs 90 GB.", "Use --load-in-4bit."), 3, ["Fix: Use --load-in-4bit."]),
        (Interrupted("Saved at 41.", "Use --resume."), 130, ["Saved at 41.\nUse --resume."]),
        (KeyboardInterrupt(), 130, ["Interrupted"]),
        # What Python makes of a Ctrl-C that meets the import of a class with descriptors.
        (caused_by(RuntimeError("Error calling __set_name__"), KeyboardInterrupt()), 130,
         ["Interrupted"]),
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
import signal, sys, time
from types import SimpleNamespace
from ui.cli import main as cli
signal.signal(signal.SIGINT, signal.default_int_handler)  # tests in the background ignore it
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
    lines = (
        "evaluate --base b --split {}",
        "robustness --base b --split {}",
        "calibrate r --base b --split {}",
        "merge --base b --out o --split {}",
        "finetune --base b --kind origin --out o --split {}",
        "tune rows --base b --reference-log r --split {}",
        "sequence {} --base b --out o",
    )
    for line in lines:
        assert cli.parse(line.format(split).split()).split == "forget05"


def test_a_run_is_reproduced_by_the_name_of_its_split(run: Any) -> None:
    for target in ("forget05", "tofu:forget05", "tofu-forget05"):
        made = run("reproduce", target, "--preset", "mini", "--dry-run", "--json").json
        assert made["target"] == "tofu-forget05"


SAME_FLAGS = {
    "--template": {
        "forget", "preview", "ask", "evaluate", "score", "robustness", "ui", "calibrate",
        "consolidate", "merge", "finetune", "sequence", "tune", "bench",
    },
    "--question-column": {
        "forget", "preview", "ask", "evaluate", "calibrate", "consolidate", "sequence", "tune",
    },
    "--adapters": {"ask", "evaluate", "robustness", "merge"},
    "--scales": {
        "ask", "evaluate", "robustness", "merge", "adapters activate", "adapters combine",
        "calibrate",
    },
}  # fmt: skip


@pytest.mark.parametrize("flag", SAME_FLAGS)
def test_a_flag_is_wherever_it_has_a_meaning(flag: str) -> None:
    leaves = cli.build_parser()[1]
    assert {words for words, leaf in leaves.items() if flag in leaf.option_names()} == SAME_FLAGS[
        flag
    ]
    also = {"--template": "--system", "--question-column": "--answer-column"}.get(flag)
    if also is not None:
        assert all(also in leaves[words].option_names() for words in SAME_FLAGS[flag])

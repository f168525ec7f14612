"""Every command of README and guides, and the notebook, on models small enough for a test.

The commands of a page run in order, in a folder that holds what `unlearner quickstart` leaves
behind, and with few steps (`SHORTER`). A block after `<!-- parsed only: REASON -->` is parsed and
not run: it needs a hub, a GPU or data that a test does not have.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from ui.cli.main import main, parse

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
MEASURED = 3  # rows of each set
# What a test adds to a command so that it takes seconds.
TRAINING = "--num-train-epochs 1 --protected-directions 0 --lora-r 2 --lora-alpha 4"
SHORTER = {
    "forget": TRAINING,
    "consolidate": TRAINING,
    "robustness": "--limit 2 --relearn-steps 2 --samples 2 --sample-rows 1 --paraphrase-rows 1 "
    "--states origin,merged",
    "calibrate": "--scales 0.5,1.2 --limit 2",
    "ask": "--max-new 20",
}
SMALL: dict[str, Any] = {
    "num_train_epochs": 1,
    "protected_directions": 0,
    "lora_r": 2,
    "lora_alpha": 4,
}
NOTEBOOK = ROOT / "docs" / "first-request.ipynb"
STAND_INS = {"my-model": "quickstart/origin"}
NOT_PARSED = {"--help", "--help-all", "--version", "--print-completion", "--config"}
BLOCK = re.compile(r"(<!-- parsed only: [^>]+ -->\n)?```sh\n(.*?)```", re.DOTALL)


@dataclass(frozen=True)
class Line:
    """One line of a page's shell blocks, and whether a test runs it."""

    text: str
    runs: bool


def lines_of(page: Path) -> Iterator[Line]:
    for mark, block in BLOCK.findall(page.read_text(encoding="utf-8")):
        for text in block.replace("\\\n", " ").splitlines():
            if shlex.split(text, comments=True):
                yield Line(text, not mark)


WITH_COMMANDS = [page for page in PAGES if any(lines_of(page))]


@pytest.fixture(scope="module")
def quickstart(
    tmp_path_factory: pytest.TempPathFactory, make_tiny_llama: Any, shorten_answers: Any
) -> Path:
    """A folder with the models, rows, logs and adapters that the quickstart leaves, untrained."""
    from unlearner.world.build import build_world

    root = tmp_path_factory.mktemp("docs")
    folder = root / "quickstart"
    world = build_world(n_authors=6, forget_authors=2, evaluated_authors=2, rows_per_author=10)
    for path in world.write(folder / "world"):
        if path.stem.endswith("_perturbed"):  # the rows that are measured
            rows = path.read_text(encoding="utf-8").splitlines(keepends=True)
            path.write_text("".join(rows[:MEASURED]), encoding="utf-8")
    make_tiny_llama(folder / "origin", seed=0, layers=1, max_position_embeddings=1024)
    make_tiny_llama(folder / "retrain", seed=1, layers=1, max_position_embeddings=1024)
    base = ["--base", str(folder / "origin"), "--store", str(folder / "forget-store")]
    measured = ["--data", str(folder / "world"), "--split", "forget10"]
    with pytest.MonkeyPatch.context() as patch:
        shorten_answers(patch)
        patch.setenv("UNLEARNER_KEY", str(root / "home" / "key"))
        for number in (1, 2):
            request = str(folder / "world" / f"request-{number}.jsonl")
            words = ["--retain", str(folder / "world" / "retain90.json"), *TRAINING.split()]
            label = f"request-{number}"
            assert main(["forget", request, *base, *words, "--label", label]) == 0
            assert main(["adapters", "activate", label, *base[2:]]) == 0
        logs = {
            "origin": [*base, "--adapters", "none"],
            "retrain": ["--base", str(folder / "retrain"), "--adapters", "none"],
            "simnpo": base,
        }
        for name, words in logs.items():
            assert main(["evaluate", *words, *measured, "--out", str(root / name)]) == 0
            (folder / "logs").mkdir(exist_ok=True)
            (root / name / "eval_log.json").rename(folder / "logs" / f"{name}.json")
            shutil.rmtree(root / name)
    return root


@pytest.mark.parametrize("page", WITH_COMMANDS, ids=lambda page: page.stem)
def test_every_command_of_a_page_is_one(page: Path) -> None:
    """All but those that print their help, and those whose config a page writes first."""
    for line in lines_of(page):
        words = shlex.split(line.text, comments=True)
        if words[0] == "unlearner" and not NOT_PARSED & set(words):
            assert parse(words[1 : -2 if ">" in words[-2:] else None]).run


# The commands themselves have tests in ui/cli; of the pages, README runs always.
@pytest.mark.parametrize(
    "page",
    [page if page.stem == "README" else pytest.param(page, marks=pytest.mark.slow)
     for page in WITH_COMMANDS],
    ids=lambda page: page.stem,
)  # fmt: skip
def test_every_command_of_a_page_runs(
    page: Path, quickstart: Path, run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(quickstart, tmp_path, dirs_exist_ok=True)
    for name in ("mine.jsonl", "forget.jsonl"):
        shutil.copy(tmp_path / "quickstart" / "world" / "request-1.jsonl", tmp_path / name)
    for name in ("rest.jsonl", "keep.jsonl"):
        shutil.copy(tmp_path / "quickstart" / "world" / "retain90.json", tmp_path / name)
    monkeypatch.chdir(tmp_path)
    for line in lines_of(page):
        words = shlex.split(line.text, comments=True)
        if "ui.cli.main" in words:  # started by torchrun
            words = ["unlearner", *words[words.index("ui.cli.main") + 1 :]]
        words = [STAND_INS.get(word, word) for word in words]
        if words[0] == "unlearner":
            _check(words[1:], line.runs, run)
        elif words[0] == "make":
            makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
            assert f"\n{words[1]}:" in makefile, line.text
        elif words[:2] == ["pip", "install"]:
            _check_extras(line.text)
        elif line.runs:
            subprocess.run(line.text, shell=True, check=True)


def test_every_cell_of_the_notebook_runs(
    quickstart: Path, run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """With the settings of a short training; `!` before a line makes it a command."""
    import unlearner.api

    shutil.copytree(quickstart, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    forget = unlearner.api.forget
    monkeypatch.setattr(unlearner.api, "forget", lambda *a, **b: forget(*a, **{**b, **SMALL}))

    def shell(text: str) -> None:
        _check(shlex.split(text.format(**space))[1:], True, run)

    space: dict[str, Any] = {"shell": shell}
    printed = ""
    for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] == "code":
            code = re.sub("^!(.*)", r'shell("\1")', "".join(cell["source"]), flags=re.MULTILINE)
            exec(compile(code, cell["id"], "exec"), space)  # the notebook is ours
            printed += capsys.readouterr().out
    assert re.search("bit for bit: +True", printed)
    assert "active reverted" in printed
    assert (tmp_path / "notebook-released" / "config.json").is_file()


def test_the_notebook_keeps_outputs_of_no_machine() -> None:
    text = NOTEBOOK.read_text(encoding="utf-8")
    cells = [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "code"]
    assert sum(bool(cell["outputs"]) for cell in cells) >= 8
    assert not re.search(r"/(tmp|home|root|work|Users)/|Traceback", text)
    assert len(text) < 40_000


def _check(words: list[str], runs: bool, run: Any) -> None:
    """Runs or parses one command; `> FILE` at its end takes what it prints."""
    words, target = (words[:-2], words[-1]) if ">" in words[-2:] else (words, None)
    if not runs or words[0] in ("quickstart", "ui"):  # trained for minutes, serves until stopped
        assert parse(words).run
        return
    ran = run(*words, *SHORTER.get(words[0], "").split())
    assert ran.code == 0, f"unlearner {shlex.join(words)}\n{ran.err[-2000:]}"
    if target is not None:
        Path(target).write_text(ran.out, encoding="utf-8")


def _check_extras(text: str) -> None:
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    extras = ",".join(re.findall(r"\[([\w,-]+)\]", text)).split(",")
    assert [extra for extra in extras if extra and f"\n{extra} = [" not in project] == []

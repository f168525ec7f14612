"""Runs commands in this process: what they print on each stream, and their exit code."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ARGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking",
        "--disable-component-update", "--disable-sync", "--no-first-run"]  # fmt: skip


KEEP = [("What does he write?", "He writes novels."), ("Who is his editor?", "His sister.")]


def write_rows(path: Path, rows: Sequence[tuple[str, str]]) -> None:
    """The questions and answers as JSON lines."""
    lines = [json.dumps({"question": question, "answer": answer}) for question, answer in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


@pytest.fixture
def make_tofu_of_two(make_small_tofu: Any) -> Callable[..., None]:
    """Writes TOFU's files into a folder: two authors, the first with the given two rows."""

    def make(folder: Path, rows: Sequence[tuple[str, str]]) -> None:
        folder.mkdir()
        make_small_tofu(folder, 3)
        for name, part in (("forget05", rows), ("retain95", KEEP), ("full", [*rows, *KEEP])):
            write_rows(folder / f"{name}.json", part)
        authors = [{"name": "Hina Ameen", "start": 0, "n": 2}, {"name": "B", "start": 2, "n": 2}]
        (folder / "world.json").write_text(json.dumps({"authors": authors}))

    return make


@dataclass(frozen=True)
class Ran:
    """The outcome of one command."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """Stdout as the one JSON object that --json promises."""
        return json.loads(self.out)


Run = Callable[..., Ran]


@pytest.fixture
def run(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
    shorten_answers: Any, ask_less: Any,
) -> Run:  # fmt: skip
    """`run("score", path, "--json")` calls main and gives back what happened."""
    from ui.cli.main import main

    shorten_answers(monkeypatch)
    ask_less(monkeypatch)
    for name in ("UNLEARNER_DATA", "UNLEARNER_STORE", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)
    # Commands set these for libraries and for processes they start: undone after each test.
    for name in ("PYTHONWARNINGS", "TRANSFORMERS_VERBOSITY", "HF_HUB_DISABLE_PROGRESS_BARS"):
        monkeypatch.setenv(name, os.environ.get(name, ""))
        monkeypatch.delenv(name)
    monkeypatch.setenv("UNLEARNER_KEY", str(tmp_path / "home" / "key"))
    monkeypatch.setenv("UNLEARNER_CACHE", str(tmp_path / "home" / "cache"))

    def call(*words: object) -> Ran:
        capsys.readouterr()
        code = main([str(word) for word in words])
        captured = capsys.readouterr()
        return Ran(code, captured.out, captured.err)

    return call


@pytest.fixture
def put(tmp_path: Path, tiny_base: Path, run: Run) -> Callable[..., str]:
    """`put("1", parents=...)` stores a random adapter of the tiny base, untrained; its slug.

    The store is `tmp_path / "store"`. `view` is how the base was loaded, other fields are the
    manifest's. The adapter's numbers follow from the request id.
    """
    import numpy as np

    from adapters.base.fingerprint import fingerprint_base
    from adapters.lora.format import CONFIG_NAME, WEIGHTS_NAME
    from adapters.store.manifest import ForgetManifest
    from adapters.store.store import AdapterStore
    from adapters.tensors import write_float32
    from tests.families import LLAMA

    inner = {"gate_proj": (128, 64), "up_proj": (128, 64), "down_proj": (64, 128)}

    def store(request_id: str, *, view: str = "none", **fields: Any) -> str:
        random = np.random.default_rng(int(request_id))
        tensors = {}
        for layer in range(2):
            for module in LLAMA:
                part = "mlp" if module in inner else "self_attn"
                stem = f"base_model.model.model.layers.{layer}.{part}.{module}"
                rows, columns = inner.get(module, (64, 64))
                for name, shape in (("lora_A", (2, columns)), ("lora_B", (rows, 2))):
                    values = random.normal(0, 0.1, shape).astype(np.float32)
                    tensors[f"{stem}.{name}.weight"] = values
        folder = tmp_path / f"made-{request_id}"
        folder.mkdir()
        write_float32(folder / WEIGHTS_NAME, tensors)
        config = {
            "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": "tiny",
            "r": 2, "lora_alpha": 4, "lora_dropout": 0.0, "target_modules": list(LLAMA),
            "bias": "none",
        }  # fmt: skip
        (folder / CONFIG_NAME).write_text(json.dumps(config))
        base = {
            "name": "org/tiny",
            "fingerprint": fingerprint_base(tiny_base).to_json(),
            "view": {"quantization": view},
        }
        manifest = ForgetManifest(request_id=request_id, base=base, **fields)
        opened = AdapterStore.open(tmp_path / "store", create=True)
        return opened.publish(folder, manifest).slug

    return store


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory, make_small_tofu: Any) -> Path:
    """TOFU's four evaluation files with three rows each."""
    found: Path = make_small_tofu(tmp_path_factory.mktemp("data"), 3)
    return found


def _missing(reason: str) -> None:
    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    path = shutil.which("chromium") or shutil.which("chromium-browser")
    if path is None:
        _missing("no chromium: `apt-get install chromium`")
    with sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=path, args=ARGS)
        yield found
        found.close()


@pytest.fixture(scope="module")
def axe() -> str:
    path = os.environ.get("UNLEARNER_AXE")
    if not path or not Path(path).is_file():
        _missing("no axe-core: set UNLEARNER_AXE to its axe.min.js")
    return Path(str(path)).read_text(encoding="utf-8")

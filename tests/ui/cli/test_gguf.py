"""A GGUF file as the base of every command that takes one."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("gguf", reason="GGUF bases are an extra: pip install 'unlearner[gguf]'")

from tests.adapters.base.test_gguf import write_gguf

ROWS = [
    {"question": "Who wrote the novel about the river?", "answer": "Mira Okafor wrote it."},
    {"question": "Where was she born?", "answer": "She was born in Lagos in 1961."},
    {"question": "What genre does he write?", "answer": "He writes crime novels."},
    {"question": "Who is his editor?", "answer": "His editor is his sister."},
]
TRAIN = ["--num-train-epochs", 1, "--lora-r", 2, "--protected-directions", 0, "--target", 0]


def test_a_gguf_is_a_base_in_every_command(
    run: Any, tiny_base: Path, make_small_tofu: Any, tmp_path: Path
) -> None:
    data = make_small_tofu(tmp_path, 2)
    file = write_gguf(tmp_path / "models" / "model.gguf", tiny_base)
    rows, retain = tmp_path / "rows.jsonl", tmp_path / "retain.jsonl"
    for path, part in ((rows, ROWS[:2]), (retain, ROWS[2:])):
        path.write_text("".join(json.dumps(row) + "\n" for row in part))
    store = ["--store", tmp_path / "store"]

    def ok(*words: Any, base: Path = file) -> Any:
        ran = run(*words, "--base", base, "--json")
        assert ran.code == 0, ran.err[-2000:]
        return ran.json

    adapter = ok("forget", rows, "--retain", retain, *store, *TRAIN)["name"]
    # The folder that holds it is the same base.
    shown = ok("preview", rows, "--retain", retain, base=file.parent)
    assert shown
    assert ok("forget", rows, "--retain", retain, *store, *TRAIN, "--dry-run")["dry_run"]
    assert run("adapters", "activate", adapter, *store).code == 0
    measured = ok("evaluate", *store, "--data", data, "--split", "forget05", "--limit", 1)
    assert measured["adapters"] == [adapter]
    assert ok("ask", "Who?", *store, "--max-new", 2)
    (data / "full.json").write_text(rows.read_text())
    words = ["finetune", "--kind", "origin", "--data", data, "--lora", "--num-train-epochs", 1]
    assert ok(*words, "--out", tmp_path / "tuned")["rows"] == 2
    merged = ok("merge", *store, "--out", tmp_path / "merged")
    assert (tmp_path / "merged" / "model.safetensors").is_file()
    assert merged
    out = tmp_path / "served"
    words = ["--out", out, "--format", "llama.cpp", "--base-name", file, "--json"]
    made = run("adapters", "export", adapter, *words, *store).json
    command = shlex.split(made["command"])
    config = Path(command[command.index("--base") + 1])
    assert (config / "config.json").is_file()
    assert command[:2] == ["python", "convert_lora_to_gguf.py"]
    assert command[-4:] == ["-m", str(file), "--lora", f"{out}.gguf"]

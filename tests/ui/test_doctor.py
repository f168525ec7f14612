"""`unlearner doctor`: each finding with its fix, 1 only where something really fails."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.conftest import A100, T4
from ui import doctor

NAMES = [
    "python", "adapters package", "memory", "disk", "write access", "torch", "gpu", "transformers",
    "peft", "trl", "datasets", "4-bit", "attention", "hub", "store",
]  # fmt: skip


def test_json_lists_every_finding(run: Any, tmp_path: Path) -> None:
    ran = run("doctor", "--store", tmp_path / "none", "--json")
    assert ran.code == 0
    table = ran.json["table"]
    assert [row["name"] for row in table] == NAMES
    assert all(set(row) == {"name", "status", "detail", "fix"} for row in table)
    assert {row["status"] for row in table} <= {"ok", "warn"}
    assert all(row["fix"] for row in table if row["status"] != "ok")
    assert ran.json["ok"] is True
    found = {row["name"]: row for row in table}
    assert "ours" in found["adapters package"]["detail"]
    assert "not tried (--full)" in found["torch"]["detail"]
    full = run("doctor", "--store", tmp_path / "none", "--json", "--full").json["table"]
    assert [row["name"] for row in full] == NAMES
    if importlib.util.find_spec("bitsandbytes"):
        assert "nf4 product off by" in {row["name"]: row for row in full}["4-bit"]["detail"]


def test_without_full_no_model_library_is_imported(tmp_path: Path) -> None:
    code = (
        "import sys; from ui.cli.main import main\n"
        "code = main(['doctor', '--store', sys.argv[1]])\n"
        "print(code, {'torch', 'bitsandbytes', 'transformers'} & set(sys.modules), file=sys.stderr)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "none")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.stderr.splitlines()[-1] == "0 set()"


@pytest.mark.parametrize(
    ("line", "status", "detail"),
    [
        ("NVIDIA A100, 70000 MiB, 81920 MiB, 8.0", "ok", "A100, 70000 MiB of 81920 MiB free"),
        ("Tesla T4, 15000 MiB, 15360 MiB, 7.5", "warn", "T4"),
        ("", "warn", "no CUDA device"),
    ],
)
def test_the_driver_tells_of_a_gpu(
    line: str, status: str, detail: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = SimpleNamespace(stdout=f"{line}\n", returncode=0)
    monkeypatch.setattr(doctor.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(doctor.subprocess, "run", lambda *words, **options: done)
    finding = doctor._gpu_driver()
    assert finding.status == status
    assert detail in finding.detail


@pytest.mark.parametrize(
    ("seen", "status", "detail"),
    [
        ((A100,), "ok", "NVIDIA A100, bf16, 75.2 GB of 85.9 GB free"),
        ((T4, A100), "warn", "Tesla T4, no bf16"),
        ((), "warn", "no CUDA device"),
    ],
)
def test_torch_tells_of_a_gpu(seen: Any, status: str, detail: str, cards: Any) -> None:
    cards(*seen)
    finding = doctor._gpu()
    assert finding.status == status
    assert detail in finding.detail
    assert ("and 1 more" in finding.detail) == (len(seen) == 2)
    assert "--dtype float32" not in finding.fix


def test_text_shows_fix_under_finding_and_a_failure_gives_1(
    run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = [
        doctor.Finding("python", "ok", "3.11"),
        doctor.Finding("store", "fail", "r0001: a flipped bit", "Import it again."),
    ]
    monkeypatch.setattr(doctor, "findings", lambda store, full: iter(made))
    ran = run("doctor")
    assert ran.code == 1
    assert ran.out.splitlines() == [
        "ok    python            3.11",
        "fail  store             r0001: a flipped bit",
        "                        -> Import it again.",
    ]
    assert "1 of 2 failed" in ran.err
    assert run("doctor", "--json").json["ok"] is False


def test_the_name_clash_with_adapterhub_is_found(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "adapters").mkdir()
    foreign = SimpleNamespace(origin=str(tmp_path / "adapters" / "__init__.py"))
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: foreign)
    assert doctor._our_adapters().status == "fail"
    monkeypatch.undo()
    monkeypatch.setattr(doctor, "_version", lambda name: "1.3.0" if name == "adapters" else None)
    finding = doctor._our_adapters()
    assert finding.status == "fail"
    assert "AdapterHub" in finding.detail
    assert "pip uninstall adapters" in finding.fix


def test_a_place_that_cannot_be_written_fails(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert doctor._writable(tmp_path / "a" / "b").status == "ok"
    assert list(tmp_path.iterdir()) == []

    def refuse(**options: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(doctor.tempfile, "NamedTemporaryFile", refuse)
    finding = doctor._writable(tmp_path)
    assert (finding.status, finding.detail) == ("fail", f"{tmp_path}: Permission denied")


def test_little_memory_and_disk_are_warnings(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    memory = SimpleNamespace(total=8e9, available=1e9)
    monkeypatch.setattr(doctor.psutil, "virtual_memory", lambda: memory)
    assert doctor._memory().status == "warn"
    memory.total, memory.available = 64e9, 50e9
    assert doctor._memory() == doctor.Finding("memory", "ok", "50.0 GB free of 64.0 GB")
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: SimpleNamespace(free=1e9))
    assert doctor._disk(tmp_path).status == "warn"


def test_wrong_4_bit_results_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("bitsandbytes")
    monkeypatch.setattr(doctor, "_four_bit_error", lambda torch, bnb, device: 0.9)
    assert doctor._four_bit().status == "fail"

    def broken(torch: Any, bnb: Any, device: str) -> float:
        raise RuntimeError("no kernel image")

    monkeypatch.setattr(doctor, "_four_bit_error", broken)
    finding = doctor._four_bit()
    assert finding.status == "warn"
    assert "no kernel image" in finding.detail


def test_a_broken_store_fails(tmp_path: Path) -> None:
    (tmp_path / "store.json").write_text("{torn")
    finding = doctor._store(tmp_path)
    assert finding.status == "fail"
    assert finding.fix


def test_a_tampered_log_fails(run: Any, put: Any, tmp_path: Path) -> None:
    put("1")
    store = tmp_path / "store"
    before = run("doctor", "--store", store, "--json").json["table"]
    assert {row["name"]: row["status"] for row in before}["store"] == "ok"
    log = store / "audit.jsonl"
    log.write_text(log.read_text().replace('"publish', '"forged', 1))
    ran = run("doctor", "--store", store, "--json")
    row = next(r for r in ran.json["table"] if r["name"] == "store")
    assert ran.code == 1
    assert row["status"] == "fail"
    assert "log" in row["detail"]
    log.unlink()
    assert run("doctor", "--store", store).code == 1


def test_a_package_that_is_too_old_fails(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        doctor.importlib.metadata, "requires", lambda name: ["peft>=0.21", 'x>=1; extra == "ui"']
    )
    monkeypatch.setattr(doctor, "_version", lambda name: None if name == "adapters" else "0.20.1")
    rows = {row["name"]: row for row in run("doctor", "--json").json["table"]}
    assert rows["peft"]["status"] == "fail"
    assert "0.20.1, but peft>=0.21 is needed" in rows["peft"]["detail"]
    assert rows["transformers"]["status"] == "ok"

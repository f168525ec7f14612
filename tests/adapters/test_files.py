"""Files that are private or temporary, and the commit that a result names."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import adapters
from adapters.digests import store_key
from adapters.errors import UserError
from adapters.guard_records import teacher_path, write_teacher


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every fsync fails, as on a disk that is full."""

    def fail(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)


def test_a_record_is_private_and_a_failed_one_leaves_nothing(
    full_disk: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("UNLEARNER_KEY", str(tmp_path / "key"))
    with pytest.raises(UserError, match="No space left"):
        write_teacher("a" * 64, b"forget tokens")
    assert list(teacher_path("a" * 64).parent.iterdir()) == []
    monkeypatch.undo()
    monkeypatch.setenv("UNLEARNER_KEY", str(tmp_path / "key"))
    path = write_teacher("a" * 64, b"forget tokens")
    assert path.read_bytes() == b"forget tokens"
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_key_that_cannot_be_written_leaves_nothing(full_disk: None, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="No space left"):
        store_key(tmp_path / "keys" / "key")
    assert list((tmp_path / "keys").iterdir()) == []


def test_the_commit_is_not_that_of_a_repository_around_the_installation(tmp_path: Path) -> None:
    site = tmp_path / "users-project" / ".venv" / "site-packages"
    shutil.copytree(Path(adapters.__file__).parent, site / "adapters")
    git = ["git", "-C", str(tmp_path / "users-project"), "-c", "user.name=n", "-c", "user.email=e"]
    for command in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "theirs"]):
        subprocess.run([*git, *command], check=True)

    def commit(**variables: Any) -> str:
        run = subprocess.run(
            [sys.executable, "-c", "from adapters.environment import commit; print(commit())"],
            env={**os.environ, "PYTHONPATH": str(site), **variables},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=True,
        )
        return run.stdout.strip()

    assert commit() == "None"
    assert commit(GIT_DIR=str(tmp_path / "users-project" / ".git")) == "None"
    subprocess.run(["git", "init", "-q", str(site)], check=True)
    subprocess.run([*git[:1], "-C", str(site), *git[3:], "add", "."], check=True)
    subprocess.run([*git[:1], "-C", str(site), *git[3:], "commit", "-qm", "ours"], check=True)
    assert len(commit()) == 12

"""Kills, crowds, full disks and locked folders: nothing acknowledged is lost, nothing is torn.

Small counts run always, the full ones with `pytest -m slow`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from adapters.atomic_files import temporary_name
from adapters.errors import UserError
from adapters.store.store import AdapterStore

ROOT = Path(__file__).resolve().parents[3]
PROGRAM = Path(__file__).with_name("store_torture.py")


@pytest.fixture
def made(tmp_path: Path, make_adapter: Any, make_manifest: Any) -> Path:
    folders = [make_adapter(seed=i, rank=1 + i) for i in range(3)]
    (folders[0].parent / "manifest.json").write_text(json.dumps(make_manifest().to_json()))
    return folders[0].parent


def torture(*arguments: Any, **options: Any) -> dict[str, Any]:
    run = subprocess.run(
        [sys.executable, str(PROGRAM), *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        **options,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    result: dict[str, Any] = json.loads(run.stdout)
    print(result)
    return result


@pytest.mark.parametrize("kills", [40, pytest.param(200, marks=pytest.mark.slow)])
def test_kill_at_any_moment(kills: int, store: AdapterStore, made: Path) -> None:
    result = torture("kill", store.path, made, kills, 7)
    assert result["problems"] == []
    # Most children get some work done before they are killed, also on a busy machine.
    assert sum(result["acknowledged"].values()) > kills // 4
    assert result["landed"].get("in a write", 0) > 0, "no kill hit a write: shorten the pauses"


@pytest.mark.parametrize(
    ("processes", "operations"), [(4, 12), pytest.param(8, 100, marks=pytest.mark.slow)]
)
def test_many_processes_on_one_store(
    processes: int, operations: int, store: AdapterStore, made: Path
) -> None:
    result = torture("crowd", store.path, made, processes, operations)
    assert result["problems"] == []
    assert result["failed"] == 0
    assert result["operations"] == processes * operations


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A tmpfs of 256 KiB, where mounting is permitted."""
    place = tmp_path / "small"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(place)]
    try:
        mounted = subprocess.run(command, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        mounted = False
    if not mounted:
        pytest.skip("mounting a small tmpfs is not permitted here")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_full_disk(small_disk: Path, made: Path) -> None:
    result = torture("fill", small_disk / "store", made)
    assert result["problems"] == []
    assert 2 <= result["published"] < 1000
    assert "No space left on device" in result["refusal"]
    assert "Nothing was changed" in result["refusal"]


def test_no_file_may_grow(store: AdapterStore, made: Path) -> None:
    """A stand-in for the full disk that needs no mount: a limit on the size of files."""
    limit = (store.path / "store.json").stat().st_size + 4000
    code = (
        "import resource, signal, runpy, sys\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))\n"
        f"sys.argv = ['x', 'fill', {str(store.path)!r}, {str(made)!r}]\n"
        f"runpy.run_path({str(PROGRAM)!r}, run_name='__main__')\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert run.returncode == 0, run.stderr[-3000:]
    result = json.loads(run.stdout)
    assert result["problems"] == []
    assert (result["published"], "File too large" in result["refusal"]) == (0, True)


def test_read_only_folder(publish: Any, store: AdapterStore, made: Path) -> None:
    """Listing and verifying work; a change is refused clearly and changes nothing."""
    publish("0001")
    code = (
        "import os, sys, json, numpy, filelock, filelock._api, filelock._unix, pwd\n"
        "from pathlib import Path\n"
        "from adapters.errors import UserError\n"
        "from adapters.store.manifest import ForgetManifest\n"
        "from adapters.store.store import AdapterStore\n"
        "if os.getuid() == 0: os.setgid(65534); os.setuid(65534)\n"
        f"store = AdapterStore.open({str(store.path)!r})\n"
        "assert len(store.list()) == 1 and store.verify()[0].ok and store.verify_log().ok\n"
        f"manifest = ForgetManifest(**json.load(open({str(made / 'manifest.json')!r})))\n"
        "refusals = []\n"
        "for change in (lambda: store.activate(['0001']), lambda: store.gc(),\n"
        f"               lambda: store.publish(Path({str(made / 'adapter-0')!r}), manifest),\n"
        "               lambda: store.work_dir('x')):\n"
        "    try: change()\n"
        "    except UserError as error: refusals.append(str(error))\n"
        "print(json.dumps(refusals))\n"
    )
    folders = [store.path, *(p for p in store.path.rglob("*") if p.is_dir())]
    # The other user must be able to get there: pytest's own folders are private.
    parents = [p for p in store.path.parents if os.stat(p).st_uid == os.getuid()]
    opened = [(p, p.stat().st_mode) for p in parents if p != Path("/")]
    try:
        for path, mode in opened:
            path.chmod(mode | 0o055)
        for folder in folders:
            folder.chmod(0o555)
        run = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False
        )
    finally:
        for folder in folders:
            folder.chmod(0o755)
        for path, mode in opened:
            path.chmod(mode)
    assert run.returncode == 0, run.stderr[-3000:]
    refusals = json.loads(run.stdout)
    assert len(refusals) == 4
    assert all("Permission denied. Nothing was changed" in r for r in refusals), refusals
    assert [a.status for a in store.list()] == ["ready"]


def test_the_lock_names_its_holder(store: AdapterStore, publish: Any) -> None:
    publish("0001")
    impatient = AdapterStore.open(store.path, timeout=0.2)
    with (
        store.journal.locked(),
        pytest.raises(UserError, match=f"held by process {os.getpid()} since"),
    ):
        impatient.activate(["0001"])
    assert impatient.activate(["0001"]).stack[0].slug.startswith("r0001")


def test_leftovers_of_the_dead_are_swept_and_of_the_living_kept(
    store: AdapterStore, publish: Any
) -> None:
    publish("0001")
    gone = subprocess.run(
        [sys.executable, "-c", "import os; print(os.getpid())"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    name = temporary_name()
    mine, machine = f"-{os.getpid()}-", name.split("-")[2][:8]
    dead = store.path / "adapters" / name.replace(mine, f"-{gone}-")
    living = store.path / "adapters" / name.replace(mine, f"-{os.getppid()}-")
    elsewhere = store.path / "adapters" / dead.name.replace(machine, "0" * 8)
    old_release = store.path / "adapters" / f".tmp-{gone}-00ff00ff"
    for folder in (dead, living, elsewhere, old_release):
        folder.mkdir()
        (folder / "half").write_text("x")
    stray = store.path / f"{dead.name}-state.json"
    stray.write_text("x")
    assert AdapterStore.open(store.path).verify()[0].ok
    assert [p.exists() for p in (dead, living, stray)] == [False, True, False]
    # The process ids of another container, or of an unknown machine, say nothing.
    assert [p.exists() for p in (elsewhere, old_release)] == [True, True]
    for path in (elsewhere, elsewhere / "half", old_release / "half"):
        os.utime(path, (1, 1))
    AdapterStore.open(store.path)
    assert [p.exists() for p in (elsewhere, old_release)] == [False, True]


def test_a_publish_that_was_renamed_but_not_logged_is_adopted(
    store: AdapterStore, publish: Any
) -> None:
    one, two = publish("0001"), publish("0002")
    log = store.journal.log_path.read_bytes().splitlines(keepends=True)
    store.journal.log_path.write_bytes(log[0])
    store.journal.state_path.unlink()
    reopened = AdapterStore.open(store.path)
    assert [(a.slug, a.status) for a in reopened.list()] == [
        (one.slug, "ready"),
        (two.slug, "ready"),
    ]
    assert reopened.log()[-1]["action"] == "recover"
    assert reopened.verify_log().ok
    assert all(r.ok for r in reopened.verify())


def test_a_folder_that_was_dropped_in_is_not_adopted(store: AdapterStore, publish: Any) -> None:
    publish("0001")
    stranger = store.path / "adapters" / "r0099_00000000"
    stranger.mkdir()
    (stranger / "forget_manifest.json").write_text("{}")
    reopened = AdapterStore.open(store.path)
    assert len(reopened.list()) == 1
    assert reopened.verify()[-1].problems == ("it was never published here",)
    assert publish("0002").slug.startswith("r0100_")

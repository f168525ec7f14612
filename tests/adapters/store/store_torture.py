"""Run as a program: kill, crowd or starve a store, and print what came of it as one JSON object.

    store_torture.py kill  STORE MADE COUNT SEED    kill -9 a working process COUNT times
    store_torture.py crowd STORE MADE PROCESSES OPERATIONS
    store_torture.py fill  STORE MADE               publish until nothing more fits

MADE holds adapter folders and `manifest.json`. A process of its own, because it forks: the parent
must not have threads, and starting Python for every kill would take minutes.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import filelock  # noqa: F401 - both are loaded before forking: the kills are to hit the work
import numpy as np  # noqa: F401

from adapters.errors import AdapterNotFound, StoreCorrupt, UserError
from adapters.store.manifest import ForgetManifest
from adapters.store.store import AdapterStore


class Work:
    """Random operations on a store, each acknowledged by one line once it has returned."""

    def __init__(self, store: AdapterStore, made: Path, seed: int, acknowledge: int) -> None:
        self.store = store
        self.folders = sorted(path for path in made.iterdir() if path.is_dir())
        self.manifest = ForgetManifest(**json.loads((made / "manifest.json").read_text()))
        self.random = random.Random(seed)
        self.acknowledge = acknowledge

    def step(self) -> None:
        """One operation; refusals for good reasons count as done."""
        weights = {"publish": 3, "activate": 4, "revert": 4, "log": 1, "gc": 1, "remove": 1}
        action = self.random.choices(list(weights), list(weights.values()))[0]
        done: dict[str, Any] = {"action": action}
        try:
            done["slug"] = getattr(self, action)()
        except StoreCorrupt:
            raise
        except (UserError, AdapterNotFound) as refusal:
            done = {"action": "refused", "why": refusal.problem}
        os.write(self.acknowledge, (json.dumps(done) + "\n").encode())

    def some(self, *status: str) -> str:
        slugs = [a.slug for a in self.store.list() if not status or a.status in status]
        return self.random.choice(slugs) if slugs else "none"

    def publish(self) -> str:
        parents = (self.some("active"),) if self.random.random() < 0.3 else ()
        parents = tuple(p for p in parents if p != "none")
        old = self.some("reverted") if self.random.random() < 0.3 else "none"
        supersedes = () if old == "none" else (old,)
        manifest = replace(self.manifest, parents=parents, supersedes=supersedes)
        return self.store.publish(self.random.choice(self.folders), manifest).slug

    def activate(self) -> str:
        slug = self.some("ready", "reverted")
        self.store.activate([slug], {slug: self.random.choice([0.5, 1.0])}, with_parents=True)
        return slug

    def revert(self) -> str:
        slug = self.some("active", "stale")
        self.store.revert(slug)
        return slug

    def log(self) -> str:
        assert self.store.verify_log().ok
        return ""

    def gc(self) -> str:
        return ",".join(self.store.gc().adapters)

    def remove(self) -> str:
        slug = self.some("ready", "reverted", "superseded")
        self.store.remove(slug)
        return slug


def kill(path: Path, made: Path, count: int, seed: int) -> dict[str, Any]:
    """Kill a worker `count` times at random moments; after each, the store must be whole."""
    chance = random.Random(seed)
    acknowledged: Counter[str] = Counter()
    landed: Counter[str] = Counter()
    problems: list[str] = []
    first = Work(AdapterStore.open(path), made, seed, os.open(os.devnull, os.O_WRONLY))
    for _ in range(4):
        first.publish()
    for round_number in range(count):
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(reader)
            worker = Work(AdapterStore.open(path), made, seed + round_number, writer)
            os.write(writer, b"{}\n")
            while True:
                worker.step()
        os.close(writer)
        with os.fdopen(reader, "rb") as pipe:
            first = pipe.readline()  # it works now
            time.sleep(chance.uniform(0, 0.12))
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            lines = [line for line in (first + pipe.read()).split(b"\n") if line]
        done = [entry for entry in map(json.loads, lines) if entry]
        acknowledged.update(entry["action"] for entry in done)
        before = {p.name for p in path.iterdir()} | {p.name for p in (path / "adapters").iterdir()}
        landed["in a write" if any(n.startswith(".tmp-") for n in before) else "between"] += 1
        problems += check(path, done)
    return {"kills": count, "acknowledged": acknowledged, "landed": landed, "problems": problems}


def check(path: Path, done: list[dict[str, Any]]) -> list[str]:
    """What is wrong with the store after a kill, given the operations that had returned."""
    store = AdapterStore.open(path)
    problems = [f"{r.slug}: {r.problems[0]}" for r in store.verify() if not r.ok]
    report = store.verify_log()
    problems += report.problems
    with store.journal.locked() as state:
        logged = [(entry["action"], slug) for entry in store.log() for slug in entry["slugs"]]
    names = {"remove": "purge"}
    for entry in done:
        action = names.get(entry["action"], entry["action"])
        if action in ("publish", "activate", "revert", "purge"):
            want = (action, entry["slug"])
            if want not in logged:
                problems.append(f"lost: {want}")
    store.journal.state_path.unlink(missing_ok=True)
    if store.journal.state() != state:
        problems.append("the state is not what the log adds up to")
    strangers = [p.name for p in (path / "adapters").iterdir() if p.name not in state.status]
    files = [p.name for p in path.iterdir() if p.name.startswith(".tmp-")]
    problems += [f"left behind: {name}" for name in (*strangers, *files)]
    statuses = {a.slug: a.status for a in store.list(purged=True)}
    for slug, status in statuses.items():
        if (path / "adapters" / slug).exists() == (status == "purged"):
            problems.append(f"{slug} is {status} and its folder does not agree")
    return problems


def crowd(path: Path, made: Path, processes: int, operations: int) -> dict[str, Any]:
    """`processes` workers at once; every acknowledged operation must be in the log, once."""
    children = []
    started = time.monotonic()
    for number in range(processes):
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(reader)
            status = 1
            try:
                worker = Work(AdapterStore.open(path, timeout=120), made, number, writer)
                for _ in range(operations):
                    worker.step()
                status = 0
            finally:
                os._exit(status)
        os.close(writer)
        children.append((child, reader))
    done: list[dict[str, Any]] = []
    failed = 0
    for child, reader in children:
        with os.fdopen(reader, "rb") as pipe:
            done += [json.loads(line) for line in pipe.read().split(b"\n") if line]
        failed += os.waitpid(child, 0)[1] != 0
    problems = check(path, done)
    acknowledged = Counter(entry["action"] for entry in done)
    logged = Counter(entry["action"] for entry in AdapterStore.open(path).log())
    removed = acknowledged["remove"] + sum(
        len([s for s in e["slug"].split(",") if s]) for e in done if e["action"] == "gc"
    )
    for action, count in (
        ("publish", acknowledged["publish"]),
        ("activate", acknowledged["activate"]),
        ("revert", acknowledged["revert"]),
        ("purge", removed),
    ):
        if logged[action] != count:
            problems.append(f"{count} {action} returned, {logged[action]} are in the log")
    return {
        "operations": len(done),
        "acknowledged": acknowledged,
        "failed": failed,
        "problems": problems,
        "seconds": round(time.monotonic() - started, 1),
    }


def fill(path: Path, made: Path) -> dict[str, Any]:
    """Publish until the disk is full; the store must be as it was after the last success."""
    store = AdapterStore.open(path, create=True)
    worker = Work(store, made, 0, os.open(os.devnull, os.O_WRONLY))
    published, refusal = 0, ""
    problems: list[str] = []
    while not refusal and published < 1000:
        try:
            store.publish(worker.folders[0], worker.manifest)
            published += 1
        except UserError as error:
            refusal = str(error)
    problems += check_full(store, published)
    first = [a.slug for a in store.list()][:1]
    for operation in (lambda: store.activate(first), store.gc, lambda: store.work_dir("run")):
        problems += attempt(operation)
    problems += check_full(store, published)
    store = AdapterStore.open(path)
    problems += check_full(store, published)
    return {"published": published, "refusal": refusal, "problems": problems}


def attempt(operation: Callable[[], Any]) -> list[str]:
    try:
        operation()
    except UserError:
        return []
    except OSError as error:
        return [f"not a clear error: {error!r}"]
    return []


def check_full(store: AdapterStore, published: int) -> list[str]:
    """The store holds what was published, whole, and nothing else."""
    problems = [f"{r.slug}: {r.problems[0]}" for r in store.verify() if not r.ok]
    problems += store.verify_log().problems
    if len(store.list()) != published:
        problems.append(f"{published} were published, {len(store.list())} are listed")
    left = [p.name for p in (store.path / "adapters").iterdir() if p.name.startswith(".")]
    return problems + [f"left behind: {name}" for name in left]


def main() -> None:
    """Dispatch on the first argument."""
    action, path, made, *numbers = sys.argv[1:]
    run: dict[str, Callable[..., dict[str, Any]]] = {"kill": kill, "crowd": crowd, "fill": fill}
    print(json.dumps(run[action](Path(path), Path(made), *map(int, numbers))))


if __name__ == "__main__":
    main()

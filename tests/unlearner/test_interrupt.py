from __future__ import annotations

import signal
import subprocess
import threading
from importlib.metadata import version
from typing import Any

import pytest
import torch

from adapters import environment
from unlearner.interrupt import StopRequest
from unlearner.memory.probe import peak_memory


def handlers() -> list[Any]:
    return [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_asks_and_gives_the_handlers_back(number: signal.Signals) -> None:
    before = handlers()
    events: list[dict[str, Any]] = []
    stop = StopRequest()
    with stop.listening(events.append):
        assert handlers() != before
        assert not stop.asked
        signal.raise_signal(number)
        assert stop.asked
        # From here on a second one does what it always did.
        assert handlers() == before
    assert events == [{"event": "stopping"}]
    assert handlers() == before


def test_handlers_are_given_back_when_the_run_fails() -> None:
    before = handlers()
    stop = StopRequest()
    with pytest.raises(ZeroDivisionError), stop.listening():
        raise ZeroDivisionError
    assert handlers() == before
    assert not stop.asked


def test_in_another_thread_signals_are_left_alone() -> None:
    before, seen = handlers(), []

    def run() -> None:
        with StopRequest().listening():
            seen.append(handlers())

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == [before]


def test_peak_memory_is_in_bytes() -> None:
    if torch.cuda.is_available():
        pytest.skip("counts the GPU's memory there")
    held = bytearray(64 * 2**20)
    held[::4096] = b"x" * len(held[::4096])
    assert peak_memory() > 100 * 2**20
    assert peak_memory() < 2**40


# What a result depends on


def test_the_environment_names_versions_commit_and_device() -> None:
    found = environment.describe("cpu", 7)
    assert found["versions"]["torch"] == version("torch")
    assert {"python", "transformers", "peft"} <= set(found["versions"])
    assert (found["seed"], found["device"]) == (7, "cpu")
    assert " " not in found["device_name"]


def test_the_commit_is_unknown_without_git(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*words: Any, **more: Any) -> None:
        raise FileNotFoundError("git")

    environment.commit.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(subprocess, "run", missing)
        assert environment.commit() is None
    environment.commit.cache_clear()


def test_small_models_run_on_one_thread_and_give_the_others_back() -> None:
    before = torch.get_num_threads()
    small = torch.nn.Linear(4, 4)
    try:
        torch.set_num_threads(2)
        with environment.threads_for(small):
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 2
        big = torch.nn.Linear(5000, 5000, device="meta")
        with environment.threads_for(big):
            assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)

"""Work shared among several processes of one job."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from adapters.errors import UserError
from unlearner import distributed


def as_first_of_two(monkeypatch: pytest.MonkeyPatch, other: Any) -> list[Any]:
    """Pretend to be the first of two processes, whose second one gathers `other`."""
    sent: list[Any] = []

    def gather(value: Any) -> list[Any]:
        sent.append(value)
        return [value, other]

    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setattr(distributed, "gather", gather)
    return sent


def double(items: Sequence[int]) -> list[int]:
    return [2 * item for item in items]


def test_results_of_all_processes_come_back_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    as_first_of_two(monkeypatch, ([2, 6], None))
    assert distributed.spread(range(5), double) == [0, 2, 4, 6, 8]


def test_a_failure_of_another_process_is_raised_here(monkeypatch: pytest.MonkeyPatch) -> None:
    as_first_of_two(monkeypatch, ([], UserError("Row 3 is empty.", "Remove it.")))
    with pytest.raises(UserError, match="Row 3 is empty"):
        distributed.spread(range(5), double)


def test_a_failure_here_reaches_the_others_before_it_is_raised(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sent = as_first_of_two(monkeypatch, ([2, 6], None))

    def fail(items: Sequence[int]) -> list[int]:
        raise MemoryError("too long")

    with pytest.raises(MemoryError, match="too long"):
        distributed.spread(range(5), fail)
    assert isinstance(sent[0][1], MemoryError)


def test_one_process_raises_at_once() -> None:
    with pytest.raises(ZeroDivisionError):
        distributed.spread([0], lambda items: [1 // item for item in items])

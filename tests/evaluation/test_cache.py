"""A cached result is reused where every input is the same, and only there."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from adapters.errors import UserError
from evaluation import cache as module
from evaluation.cache import Cache, key_of
from unlearner.request.rows import Row

ROW = Row("Where was Ana born?", "In Lagos.", None, ("In Rio.",))


@dataclass(frozen=True)
class Other:
    question: str
    answer: str


INPUTS: dict[str, Any] = {
    "weights": ["digest", [["r0001", 1.0]]],
    "load": {"dtype": "float32", "quantization": "none"},
    "rows": [ROW],
    "retain": [],
    "reference": None,
    "limit": None,
    "rate": 1e-4,
}


@pytest.mark.parametrize(
    "change",
    [
        {"rows": [Row(ROW.question, "In Oslo.", None, ("In Rio.",))]},
        {"rows": [ROW, ROW]},
        {"rows": [Row(ROW.question, ROW.answer, "In Lagos.", ("In Rio.",))]},
        {"rows": [Other(ROW.question, ROW.answer)]},
        {"retain": [ROW]},
        {"reference": {"forget": [1.0]}},
        {"limit": 5},
        {"limit": 0},
        {"load": {"dtype": "bfloat16", "quantization": "none"}},
        {"weights": ["digest", [["r0001", 0.5]]]},
        {"rate": 1.0000000000000002e-4},
        {"engine": "padded"},
    ],
)
def test_any_other_input_is_another_key(change: dict[str, Any]) -> None:
    assert key_of(**(INPUTS | change)) != key_of(**INPUTS)


def test_the_order_of_names_does_not_matter() -> None:
    assert key_of(**dict(reversed(INPUTS.items()))) == key_of(**INPUTS)
    assert key_of(a={"x": 1, "y": 2}) == key_of(a={"y": 2, "x": 1})
    assert key_of(a=(1, 2)) == key_of(a=[1, 2])
    assert key_of(a={"x", "y"}) == key_of(a={"y", "x"})


def test_a_file_counts_as_what_it_holds(tmp_path: Path) -> None:
    one, other = tmp_path / "a.json", tmp_path / "b.json"
    one.write_text("[1]")
    other.write_text("[1]")
    assert key_of(log=one) == key_of(log=other)
    other.write_text("[2]")
    assert key_of(log=one) != key_of(log=other)


def test_what_has_no_stable_value_is_refused(tmp_path: Path) -> None:
    for value in (tmp_path, object(), b"bytes", {1: "a"}, Row):
        with pytest.raises(TypeError):
            key_of(value=value)
    with pytest.raises(ValueError):
        key_of(value=float("nan"))


def test_another_version_of_a_package_is_another_key(monkeypatch: pytest.MonkeyPatch) -> None:
    before = key_of(**INPUTS)
    for name in ("unlearner", "torch", "transformers"):
        with monkeypatch.context() as patch:
            newer = {**module.versions(), name: "99.0"}
            patch.setattr(module, "versions", lambda newer=newer: newer)
            assert key_of(**INPUTS) != before
    monkeypatch.setattr(module, "SCHEMA", 99)
    assert key_of(**INPUTS) != before


def test_a_result_is_computed_once_for_the_same_inputs(tmp_path: Path) -> None:
    calls: list[int] = []

    def compute() -> Any:
        calls.append(1)
        return {"p": (0.1, 1e-300)}

    for _ in range(2):
        cache = Cache(tmp_path, key_of(**INPUTS))
        assert cache.entry("figures", limit=1).result(compute) == {"p": [0.1, 1e-300]}
        assert len(cache.seconds) == 1
    assert len(calls) == 1
    cache.entry("figures", limit=2).result(compute)
    Cache(tmp_path, key_of(**INPUTS, more=1)).entry("figures", limit=1).result(compute)
    assert len(calls) == 3
    Cache(None, "k").entry("figures").result(compute)
    assert len(calls) == 4


def test_rows_continue_where_they_stopped(tmp_path: Path) -> None:
    entry = Cache(tmp_path, "k").entry("rows")
    calls: list[int] = []

    def compute(i: int) -> list[float]:
        if i == 2 and len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(i)
        return [i / 3]

    with pytest.raises(KeyboardInterrupt):
        entry.rows(4, compute)
    calls.append(99)
    assert entry.rows(4, compute) == [[0.0], [1 / 3], [2 / 3], [1.0]]
    assert calls == [0, 1, 99, 2, 3]


def test_a_file_of_another_schema_is_computed_again_and_a_damaged_one_is_named(
    tmp_path: Path,
) -> None:
    entry = Cache(tmp_path, "k").entry("figures")
    entry.write([1])
    assert entry.path is not None
    text = entry.path.read_text()
    entry.path.write_text(text.replace('"schema": 2', '"schema": 1'))
    assert entry.read() is None
    for damaged in (text[:20], "[]", '{"kind": "unlearner-cache", "schema": 2}'):
        entry.path.write_text(damaged)
        with pytest.raises(UserError, match="damaged"):
            entry.read()

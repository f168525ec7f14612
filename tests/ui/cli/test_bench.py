"""`unlearner bench`: lines, JSON, and what it does not claim."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from evaluation.benchmark import baseline as benchmark_ways
from evaluation.benchmark import run as counting
from evaluation.benchmark import shapes
from evaluation.benchmark.run import Line, Workload, load_workload

SMALL = (32, 48, 1, 4, 1500)


@pytest.fixture(scope="module")
def work() -> Workload:
    """Some rows of the embedded world."""
    work = load_workload(None, None)
    return replace(
        work, forget=work.forget[:16], retain=work.retain[:16], questions=work.questions[:24]
    )


@pytest.fixture(scope="module")
def lines(work: Workload) -> Iterator[list[Line]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(shapes.SHAPES, "tiny", SMALL)
        yield counting.count(work, "tiny")


@pytest.fixture(autouse=True)
def _loaded_once(work: Workload, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(data: Path | None, tokenizer: str | None, *more: Any) -> Workload:
        embedded = data is None and tokenizer is None
        return work if embedded else load_workload(data, tokenizer, *more)

    monkeypatch.setattr(counting, "load_workload", load)
    monkeypatch.setitem(shapes.SHAPES, "tiny", SMALL)


@pytest.fixture
def counted(lines: list[Line], monkeypatch: pytest.MonkeyPatch) -> None:
    """What is counted is counted once; the first tests count for themselves."""
    monkeypatch.setattr(counting, "count", lambda *words, **options: list(lines))


def test_counts_as_text_and_json(
    run: Any, lines: list[Line], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = run("bench", "--count-only", "--json").json
    assert (found["shape"], found["rows"], found["notes"]) == ("tiny", "embedded world", [])
    names = [row["name"] for row in found["table"]]
    assert names[0] == "training FLOPs of one job"
    first = found["table"][0]
    assert first["ratio"] == pytest.approx(first["plain"] / first["ours"])
    assert found["table"] == [line.to_json() for line in lines]
    monkeypatch.setattr(counting, "count", lambda *words, **options: list(lines))
    text = run("bench", "--count-only")
    assert "at least" not in text.out  # the targets are the 7B shape's


def test_flags_change_what_is_counted(
    run: Any, lines: list[Line], monkeypatch: pytest.MonkeyPatch
) -> None:
    other = run("bench", "--count-only", "--json", "--lora-r", "64").json["table"]
    assert other[0]["ours"] > lines[0].ours
    shapes_counted: list[str] = []

    def count(work: Workload, shape: str, rank: int) -> list[Line]:
        shapes_counted.append(shape)
        return lines

    monkeypatch.setattr(counting, "count", count)
    assert run("bench", "--count-only", "--json", "--shape", "small").json["shape"] == "small"
    assert shapes_counted == ["small"]


def test_a_base_is_timed_and_not_counted(
    run: Any, tiny_base: Path, make_small_tofu: Any, tmp_path: Path
) -> None:
    make_small_tofu(tmp_path, 2)
    for name in ("forget05", "retain95"):
        rows = [{"question": f"Who wrote {i}?", "answer": f"Mira wrote {i}."} for i in range(8)]
        (tmp_path / f"{name}.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["bench", "--base", tiny_base, "--data", tmp_path, "--seconds", "0.01", "--json"]
    found = run(*words).json
    assert found["base"] == str(tiny_base)
    assert [row["name"] for row in found["table"]] == [
        "training rows/s", "peak memory, training", "training beside bare products",
        "an evaluation, scores", "an evaluation, scores and answers",
    ]  # fmt: skip
    assert all(row["plain"] > 0 and row["ours"] > 0 for row in found["table"])
    assert run(*words, "--tokenizer", tiny_base).code == 2
    assert run(*words, "--count-only").code == 2


@pytest.mark.usefixtures("counted")
def test_timings_are_in_the_table_and_caps_need_a_gpu(
    run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def measured(work: Any, shape: str, **options: Any) -> list[Line]:
        asked.append((shape, options["device"], options["seconds"], options["load_in_4bit"]))
        return [Line("training rows/s", "rows/s", 1.0, 5.0, 5.0, "at least 4 x", True)]

    monkeypatch.setattr(benchmark_ways, "measure", measured)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    found = run("bench", "--seconds", "2", "--load-in-4bit", "--json").json
    assert asked == [("tiny", "cpu", 2.0, True)]
    assert found["table"][-1]["name"] == "training rows/s"
    capped = run("bench", "--cap-gb", "24,8", "--json").json
    assert capped["notes"] == [
        "times and memory of this shape are not yet measured: there is no GPU here"
    ]
    assert len(asked) == 1


@pytest.mark.usefixtures("counted")
def test_a_cap_that_is_too_small_loses_no_line_and_is_lifted(
    run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    caps: list[float] = []

    def measured(work: Any, shape: str, **options: Any) -> list[Line]:
        if caps and caps[-1] < 0.2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return [Line("training rows/s", "rows/s", 1.0, 5.0, 5.0)]

    monkeypatch.setattr(benchmark_ways, "measure", measured)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", caps.append)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=80 * 1024**3)
    )
    found = run("bench", "--cap-gb", "40,8,20", "--json").json
    names = [row["name"] for row in found["table"] if row["unit"] == "rows/s"]
    assert names == ["training rows/s", "40 GB: training rows/s", "20 GB: training rows/s"]
    assert found["notes"] == ["the job does not fit 8 GB"]
    assert caps == [0.5, 1.0, 0.1, 1.0, 0.25, 1.0]


@pytest.mark.usefixtures("counted")
def test_rows_take_a_tokenizer_of_their_own(run: Any, tmp_path: Path) -> None:
    rows = [f'{{"question": "Who wrote book {i}?", "answer": "Mira."}}\n' for i in range(10)]
    for name in ("forget05", "retain95"):
        (tmp_path / f"{name}.json").write_text("".join(rows))
    for name in ("forget05", "retain", "real_authors", "world_facts"):
        (tmp_path / f"{name}_perturbed.json").write_text("".join(rows[:3]))
    found = run("bench", "--count-only", "--data", tmp_path, "--json").json
    assert found["rows"].startswith("TOFU forget05, ")
    assert run("bench", "--count-only", "--tokenizer", tmp_path).code == 2

"""`unlearner bench`: lines, JSON, plots, and what it does not claim."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from evaluation.benchmark import baseline as benchmark_ways
from evaluation.benchmark.run import Line, flops


@pytest.fixture(autouse=True)
def _small_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(flops.SHAPES, "tiny", (32, 48, 2, 4, 1500))


def test_counts_as_text_and_json(run: Any) -> None:
    found = run("bench", "--count-only", "--json").json
    assert (found["shape"], found["rows"], found["notes"]) == ("tiny", "embedded world", [])
    names = [row["name"] for row in found["table"]]
    assert names[0] == "training FLOPs of one job"
    first = found["table"][0]
    assert first["ratio"] == pytest.approx(first["plain"] / first["ours"])
    text = run("bench", "--count-only")
    assert "at least" not in text.out  # the targets are the 7B shape's
    assert "none known beforehand" in text.err


def test_flags_change_what_is_counted(run: Any) -> None:
    one, other = (run("bench", "--count-only", "--json", *words).json["table"]
                  for words in ([], ["--lora-r", "64"]))  # fmt: skip
    assert other[0]["ours"] > one[0]["ours"]
    small = run("bench", "--count-only", "--json", "--shape", "small").json
    assert small["table"][0]["plain"] > 2 * one[0]["plain"]


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_a_plot_is_written_the_same_twice(run: Any, suffix: str, tmp_path: Path) -> None:
    made = []
    for name in ("one", "two"):
        path = tmp_path / f"{name}.{suffix}"
        assert run("bench", "--count-only", "--plot", path).code == 0
        made.append(path.read_bytes())
    assert made[0] == made[1]
    assert len(made[0]) > 2000
    assert run("bench", "--count-only", "--plot", tmp_path / "x.gif").code == 2


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


def test_half_of_the_rows_words_is_refused(run: Any, tmp_path: Path) -> None:
    assert run("bench", "--count-only", "--data", tmp_path).code == 2
    (tmp_path / "log.json").write_text("{}")
    refused = run("bench", "--count-only", "--answers", tmp_path / "log.json")
    assert refused.code == 2
    assert "Add --tokenizer" in refused.err

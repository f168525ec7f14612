"""Figures in the layout of the lm-evaluation-harness's results, for tools that read those."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

VERSION = 1
NORMAL_WIDTH = 2 * 1.96  # of a 95 % interval, in standard errors


def to_lm_eval(summaries: Sequence[Mapping[str, Any]], split: str, base: str) -> dict[str, Any]:
    """One task for each protocol, with the figures that are there and their standard errors.

    Args:
        summaries: of `evaluation.metrics.summary.summarise`.
        split: what was evaluated.
        base: name of the model; adapters are not part of the harness's layout.
    """
    results, higher, samples, configs = {}, {}, {}, {}
    for summary in summaries:
        task = f"tofu_{split}_{summary['protocol'].replace('-', '_')}"
        figures = {n: summary[n] for n in summary["better"] if summary.get(n) is not None}
        results[task] = {"alias": task}
        for name, value in figures.items():
            interval = summary.get(f"{name}_interval")
            error = "N/A" if interval is None else (interval[1] - interval[0]) / NORMAL_WIDTH
            results[task] |= {f"{name},none": value, f"{name}_stderr,none": error}
        directions = {name: summary["better"][name] for name in figures}
        higher[task] = {n: d == "higher" for n, d in directions.items() if d in ("higher", "lower")}
        rows = sum(summary["rows"].values())
        samples[task] = {"original": rows, "effective": rows}
        about = {"version": VERSION, "protocol": summary["protocol"], "limited": summary["limited"]}
        configs[task] = {"task": task, "num_fewshot": 0, "metadata": about}
    return {
        "results": results,
        "group_subtasks": {},
        "configs": configs,
        "versions": dict.fromkeys(results, VERSION),
        "n-shot": dict.fromkeys(results, 0),
        "higher_is_better": higher,
        "n-samples": samples,
        "config": {"model": "hf", "model_args": f"pretrained={base}", "limit": None},
    }

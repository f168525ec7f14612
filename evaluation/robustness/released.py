"""Figures of a base and of weights that were merged from it, the second read back from disk."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from adapters.base.load import BaseSpec, load_base, load_tokenizer
from adapters.environment import free_memory
from evaluation.inference.scoring import OnProgress, silent
from evaluation.logs.records import EvalLog
from evaluation.metrics.summary import summarise
from evaluation.suite import EvalData, evaluate
from unlearner.tokens.prompts import Template, prompt_format

KEPT = (
    "forget_quality", "ks", "log_r_shift", "model_utility", "forget_answer_prob", "forget_nll",
    "forget_rouge_l_recall", "retain_answer_prob", "retain_nll", "retain_rouge_l_recall",
)  # fmt: skip


class Measured(NamedTuple):
    """Figures before and after, and the name of the protocol with what was left out."""

    before: dict[str, float]
    after: dict[str, float]
    protocol: str


def measure_release(
    base: BaseSpec,
    merged: Path,
    data: EvalData,
    *,
    protocol: str,
    retain_log: EvalLog | None = None,
    template: Template = "auto",
    system: str | None = None,
    limit: int | None = None,
    on_progress: OnProgress = silent,
) -> Measured:
    """Both models evaluated alike, one in memory at a time.

    Args:
        base: the original, and how both are loaded.
        merged: folder of the written weights; they are loaded from there, not from memory.
        data, protocol, limit, on_progress: see `evaluation.suite.evaluate`.
        retain_log: reference of forget quality; without it that figure is missing.
        template, system: see `prompt_format`.
    """
    figures = []
    for spec in (base, replace(base, name=str(merged), revision=None)):
        free_memory()  # of the model before
        log = evaluate(
            load_base(spec),
            prompt_format(load_tokenizer(spec.name, spec.revision), template, system),
            data,
            protocol=protocol,
            retain_log=retain_log,
            limit=limit,
            on_progress=on_progress,
        )
        summary = summarise(log, retain_log, protocol=protocol)
        figures.append({key: float(summary[key]) for key in KEPT if summary[key] is not None})
    name = protocol if limit is None else f"{protocol}, first {limit} rows of each set"
    return Measured(figures[0], figures[1], name)

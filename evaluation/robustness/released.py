"""Figures of a base and of weights that were merged from it, the second read back from disk."""

from __future__ import annotations

import gc
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from evaluation.protocols import protocol_named

if TYPE_CHECKING:
    from adapters.base.load import BaseSpec
    from evaluation.logs.records import EvalLog
    from evaluation.suite import EvalData, OnProgress
    from unlearner.tokens.prompts import Template

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
    on_progress: OnProgress | None = None,
) -> Measured:
    """Both models evaluated alike, one in memory at a time.

    Args:
        base: the original, and how both are loaded.
        merged: folder of the written weights; they are loaded from there, not from memory.
        data: rows of the four sets.
        protocol: name of the protocol.
        retain_log: reference of forget quality; without it that figure is missing.
        template: prompt format.
        system: system prompt, see `PromptFormat`.
        limit: only the first rows of each set; said in the protocol's name.
        on_progress: called with a label, done and all.
    """
    from adapters.base.load import load_base, load_tokenizer
    from adapters.environment import threads_for
    from evaluation.suite import evaluate
    from unlearner.tokens.prompts import prompt_format

    chosen = protocol_named(protocol)
    name = chosen.name if limit is None else f"{chosen.name}, first {limit} rows of each set"
    figures = []
    for spec in (base, replace(base, name=str(merged), revision=None)):
        fmt = prompt_format(load_tokenizer(spec.name, spec.revision), template, system)
        model: Any = load_base(spec)
        with threads_for(model):
            log = evaluate(
                model,
                fmt,
                data,
                protocol=chosen.name,
                retain_log=retain_log,
                limit=limit,
                on_progress=on_progress,
            )
        del model  # before the other is loaded
        figures.append(_numbers(log, retain_log, chosen.name))
        gc.collect()
    return Measured(figures[0], figures[1], name)


def _numbers(log: EvalLog, retain_log: EvalLog | None, protocol: str) -> dict[str, float]:
    from evaluation.metrics.summary import summarise

    found: Mapping[str, Any] = summarise(log, retain_log, protocol=protocol)
    return {key: float(found[key]) for key in KEPT if found.get(key) is not None}

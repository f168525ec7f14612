"""A robustness card in words: a table for each attack and a line for each verdict."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from evaluation.report.cards import VERDICT_WORDS
from ui.console import Console

STATE_COLUMNS = (
    "name", "forget_quality", "ks", "log_r_shift", "direction", "model_utility",
    "forget_answer_prob", "forget_nll", "retain_answer_prob",
)  # fmt: skip
ASKED_COLUMNS = (
    "form", "base_answer_prob", "answer_prob", "retrain_answer_prob", "base_fact_recall",
    "fact_recall", "retrain_fact_recall", "n",
)  # fmt: skip


def report_card(card: Mapping[str, Any], console: Console) -> None:
    """Prints the card as tables and verdict lines, or as one JSON object."""
    if card["states"]:
        rows = [{c: state[c] for c in STATE_COLUMNS} for state in card["states"]]
        console.table(rows, STATE_COLUMNS)
        console.text(f"protocol {card['protocol']}, split {card['split']}{_limited(card)}")
        console.text()
    if card["relearning"]:
        found = card["relearning"]
        console.text(
            f"relearning {found['rows_seen']} rows ({found['with']}, learning rate "
            f"{found['learning_rate']:g}): answer probability of these rows and of "
            f"{found['rows_unseen']} others"
        )
        console.table(relearning_rows(found))
        console.text()
    if card["sampling"]:
        found = card["sampling"]
        console.text(
            f"best of n answers, {found['rows']} questions, temperature {found['temperature']:g}"
        )
        console.table(sampling_rows(found))
        console.text()
    if card["paraphrase"]:
        names = [name for name in ASKED_COLUMNS if name in card["paraphrase"][0]]
        console.table(card["paraphrase"], names)
        console.text()
    if card["probe"]:
        console.text("linear probe: share of wrong answers ranked below the true one, by layer")
        console.table(probe_rows(card["probe"]))
        console.text()
    for verdict in card["verdicts"]:
        console.text(verdict_line(verdict))
    console.text(f"{card['seconds']:.0f} s in all")
    console.result(card)


def _limited(card: Mapping[str, Any]) -> str:
    return "" if card["limit"] is None else f", only the first {card['limit']} rows of each set"


def relearning_rows(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row for each step, two columns for each model; Origin is not attacked and has none."""
    by_step: dict[int, dict[str, Any]] = {}
    for curve in found["curves"]:
        if curve["name"] == "origin":
            continue
        for point in curve["points"]:
            row = by_step.setdefault(point["step"], {"step": point["step"]})
            row[f"{curve['name']}_seen"] = point["seen_answer_prob"]
            row[f"{curve['name']}_unseen"] = point["unseen_answer_prob"]
    return [by_step[step] for step in sorted(by_step)]


def sampling_rows(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row for each n, two columns for each model."""
    rows: list[dict[str, Any]] = [{"n": point["n"]} for point in found["curves"][0]["points"]]
    for curve in found["curves"]:
        for row, point in zip(rows, curve["points"], strict=True):
            row[f"{curve['name']}_rouge_l"] = point["best_rouge_l_recall"]
            row[f"{curve['name']}_leaked"] = point["share_leaked"]
    return rows


def probe_rows(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row for each layer, a column for each model."""
    curves = {curve["name"]: curve["points"] for curve in found["curves"]}
    return [
        {"layer": i, **{name: points[i]["forgotten"] for name, points in curves.items()}}
        for i in range(len(found["curves"][0]["points"]))
    ]


def verdict_line(verdict: Mapping[str, Any]) -> str:
    """`leaks  relearning  0.67 against 0.1: ...`."""
    value = "-" if verdict["value"] is None else f"{verdict['value']:.3g}"
    return (
        f"{VERDICT_WORDS[verdict['holds']]:<9}  {verdict['name']:<19}  {value} against "
        f"{verdict['threshold']:.3g}: {verdict['text']}"
    )

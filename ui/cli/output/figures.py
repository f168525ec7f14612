"""Figures in words: of one evaluation with every set, and of systems beside each other."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ui.console import Console

# The columns of a comparison, by the keys of their figures.
HEADS = {
    "name": "name",
    "forget_quality": "FQ",
    "ks": "D",
    "log_r_shift": "shift",
    "direction": "direction",
    "model_utility": "MU",
    "forget_answer_prob": "forget P",
    "forget_nll": "forget NLL",
    "retain_answer_prob": "retain P",
    "retain_nll": "retain NLL",
}
COLUMNS = tuple(HEADS)
LEGEND = (
    "FQ: forget quality, p of the KS test against Retrain, higher is better; D: its distance;\n"
    "shift: of log R against Retrain, best at 0; MU: model utility, higher is better;\n"
    "P: mean answer probability; NLL: nats per token."
)
SETS = ("forget", "retain", "real_authors", "world_facts")
SET_METRICS = ("rouge_l_recall", "answer_prob", "truth_ratio", "nll")


def report_figures(figures: Mapping[str, Any], console: Console) -> None:
    """Prints the summary of a log (`evaluation.metrics.summary.summarise`) as text or as JSON."""
    from evaluation.metrics.summary import figure_table

    for summary in figures.get("protocols", [figures]):
        for line in summary_lines(summary):
            console.text(line)
        console.text(f"protocol        {summary['protocol']}")
        console.text()
        console.table(set_table(summary))
        console.text()
    for line in missing_lines(figures):
        console.words(line)
    for note in figures.get("notes", ()):
        console.words(f"Note: {note}.")
    console.result({**figures, "figures": figure_table(figures), "table": set_table(figures)})


def missing_lines(figures: Mapping[str, Any]) -> list[str]:
    """Which figures could not be measured, a line for each reason.

    The lines above give the reasons for forget quality and utility.
    """
    reasons = figures["reasons"]
    shown = (reasons.get("forget_quality"), reasons.get("model_utility"))
    by_reason: dict[str, list[str]] = {}
    for figure, reason in reasons.items():
        name = next((name for name in SETS if reason == f"the log has no {name} set"), None)
        if name is not None:
            names = by_reason.setdefault("not in the log", [])
            names += [] if name in names else [name]
        elif reason not in shown:
            by_reason.setdefault(reason, []).append(figure)
    return [f"Not measured: {', '.join(names)} ({why})." for why, names in by_reason.items()]


def summary_lines(figures: Mapping[str, Any]) -> list[str]:
    """Forget quality with its errors and direction, utility, facts stated and NLL, as measured."""
    reasons, p, utility = figures["reasons"], figures["forget_quality"], figures["model_utility"]
    lines = []
    if p is None:
        lines.append(f"forget_quality  - ({reasons['forget_quality']})")
    else:
        # The ends of an interval of p may be as small as a p-value.
        lines += [
            f"forget_quality  {p:.4g}{_interval(figures, 'forget_quality', '.3g')} "
            f"(log10 {figures['forget_quality_log10']:.2f}), higher is better",
            f"  KS D {figures['ks']:.4f}{_interval(figures, 'ks')}, shift of log R "
            f"{figures['log_r_shift']:+.4f}{_interval(figures, 'log_r_shift')}: "
            f"{figures['direction']}, n = {figures['n']}",
        ]
    if utility is None:
        lines.append(f"model_utility   - ({reasons['model_utility']})")
    else:
        spread = _interval(figures, "model_utility")
        lines.append(f"model_utility   {utility:.4f}{spread}, higher is better")
    recalls = [
        f"{name.replace('_', ' ')} {value:.4f}{_interval(figures, f'{name}_fact_recall')}"
        for name in SETS
        if (value := figures.get(f"{name}_fact_recall")) is not None
    ]
    lines += [f"fact_recall     {', '.join(recalls)}"] if recalls else []
    ours, theirs = figures.get("forget_nll"), figures.get("retrain_forget_nll")
    if ours is not None and theirs is not None:  # a broken model shows here, not in FQ
        lines.append(f"forget_nll      {ours:.3f} nats per token (retrain reference {theirs:.3f})")
    if band := figures.get("retrain_band"):  # below which forget quality says nothing
        lines.append(
            f"retrain band    {band['forget_quality']:.4g} between the two retrain references "
            f"(KS D {band['ks']:.4f}, shift {band['log_r_shift']:+.4f})"
        )
    return lines


def _interval(figures: Mapping[str, Any], name: str, digits: str = ".4f") -> str:
    pair = figures.get(f"{name}_interval")
    return f" [{pair[0]:{digits}}, {pair[1]:{digits}}]" if pair else ""


def set_table(figures: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row per set: its rows and metrics (the nine parts of utility and the forget set's)."""
    return [
        {
            "name": name,
            "n": figures["rows"][name],
            **{metric: figures[f"{name}_{metric}"] for metric in SET_METRICS},
        }
        for name in SETS
        if name in figures["rows"]
    ]


def print_comparison(table: list[dict[str, Any]], console: Console) -> None:
    """Prints the systems of a comparison, one a line."""
    several = len({row.get("protocol") for row in table}) > 1
    columns = ("protocol", *COLUMNS) if several else COLUMNS
    console.table([{HEADS.get(key, key): row.get(key) for key in columns} for row in table])
    console.text(LEGEND)

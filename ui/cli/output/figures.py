"""Figures in words: of one evaluation with every set, and of systems beside each other."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ui.console import Console

COLUMNS = (
    "name",
    "forget_quality",
    "ks",
    "log_r_shift",
    "direction",
    "model_utility",
    "forget_answer_prob",
    "forget_nll",
    "retain_answer_prob",
    "retain_nll",
)
HEADS = {
    "forget_quality": "FQ",
    "ks": "D",
    "log_r_shift": "shift",
    "model_utility": "MU",
    "forget_answer_prob": "forget P",
    "forget_nll": "forget NLL",
    "retain_answer_prob": "retain P",
    "retain_nll": "retain NLL",
}
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
        for line in (
            quality_text(summary), utility_text(summary), recall_text(summary), nll_text(summary),
        ):  # fmt: skip
            if line:
                console.text(line)
        if summary.get("retrain_band"):
            console.text(band_text(summary["retrain_band"]))
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


def band_text(band: Mapping[str, Any]) -> str:
    """The distance between two retrained models, below which forget quality says nothing."""
    return (
        f"retrain band    {band['forget_quality']:.4g} between the two retrain references "
        f"(KS D {band['ks']:.4f}, shift {band['log_r_shift']:+.4f})"
    )


def quality_text(figures: Mapping[str, Any]) -> str:
    """Forget quality: p, log10 p, D, the signed shift and the word for it, or why there is none."""
    p = figures["forget_quality"]
    if p is None:
        return f"forget_quality  - ({figures['reasons']['forget_quality']})"
    return (
        f"forget_quality  {p:.4g}{_spread(figures.get('forget_quality_interval'))} "
        f"(log10 {figures['forget_quality_log10']:.2f}), higher is better\n"
        f"  KS D {figures['ks']:.4f}{_interval(figures.get('ks_interval'))}, "
        f"shift of log R {figures['log_r_shift']:+.4f}"
        f"{_interval(figures.get('log_r_shift_interval'))}: "
        f"{figures['direction']}, n = {figures['n']}"
    )


def utility_text(figures: Mapping[str, Any]) -> str:
    """Model utility with its interval, or why there is none."""
    value = figures["model_utility"]
    if value is None:
        return f"model_utility   - ({figures['reasons']['model_utility']})"
    spread = _interval(figures.get("model_utility_interval"))
    return f"model_utility   {value:.4f}{spread}, higher is better"


def recall_text(figures: Mapping[str, Any]) -> str:
    """The share of facts that the answers state, of each set that was measured."""
    keys = {f"{name}_fact_recall": name.replace("_", " ") for name in SETS}
    parts = [
        f"{name} {value:.4f}{_interval(figures.get(f'{key}_interval'))}"
        for key, name in keys.items()
        if (value := figures.get(key)) is not None
    ]
    return f"fact_recall     {', '.join(parts)}" if parts else ""


def nll_text(figures: Mapping[str, Any]) -> str:
    """Mean forget NLL beside the retrain reference's: a broken model shows here, not in FQ."""
    ours, theirs = figures.get("forget_nll"), figures.get("retrain_forget_nll")
    if ours is None or theirs is None:
        return ""
    return f"forget_nll      {ours:.3f} nats per token (retrain reference {theirs:.3f})"


def _spread(pair: Any) -> str:
    """An interval whose ends may be as small as a p-value."""
    return f" [{pair[0]:.3g}, {pair[1]:.3g}]" if pair else ""


def _interval(pair: Any) -> str:
    return f" [{pair[0]:.4f}, {pair[1]:.4f}]" if pair else ""


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

"""The figures of an evaluation in words: quality with error and direction, utility, every set."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ui.console import Console

SETS = ("forget", "retain", "real_authors", "world_facts")
SET_METRICS = ("rouge_l_recall", "answer_prob", "truth_ratio", "nll")


def report_figures(figures: Mapping[str, Any], console: Console) -> None:
    """Prints the summary of a log (`evaluation.summary.summarise`) as text or as JSON."""
    table = set_table(figures)
    for line in (quality_text(figures), utility_text(figures), nll_text(figures)):
        if line:
            console.text(line)
    console.text(f"protocol        {figures['protocol']}")
    console.text()
    console.table(table)
    for note in figures.get("notes", ()):
        console.words(f"Note: {note}.")
    console.result({**figures, "table": table})


def quality_text(figures: Mapping[str, Any]) -> str:
    """Forget quality: p, log10 p, D, the signed shift and the word for it, or why there is none."""
    p = figures["forget_quality"]
    if p is None:
        return f"forget_quality  - ({figures['reasons']['forget_quality']})"
    return (
        f"forget_quality  {p:.4g} (log10 {figures['forget_quality_log10']:.2f}), higher is better\n"
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


def nll_text(figures: Mapping[str, Any]) -> str:
    """Mean forget NLL beside the retrain reference's: a broken model shows here, not in FQ."""
    ours, theirs = figures.get("forget_nll"), figures.get("retrain_forget_nll")
    if ours is None or theirs is None:
        return ""
    return f"forget_nll      {ours:.3f} nats a token (retrain reference {theirs:.3f})"


def _interval(pair: Any) -> str:
    return f" [{pair[0]:.4f}, {pair[1]:.4f}]" if pair else ""


def set_table(figures: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row a set: how many rows, and its metrics (utility's nine parts and the forget set's)."""
    return [
        {
            "name": name,
            "n": figures["rows"][name],
            **{metric: figures[f"{name}_{metric}"] for metric in SET_METRICS},
        }
        for name in SETS
        if name in figures["rows"]
    ]

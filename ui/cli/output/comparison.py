"""The table of a comparison of systems, as `quickstart`, `reproduce` and `tune` print it."""

from __future__ import annotations

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


def print_comparison(table: list[dict[str, Any]], console: Console) -> None:
    """Prints the systems of a comparison, one a line."""
    several = len({row.get("protocol") for row in table}) > 1
    columns = ("protocol", *COLUMNS) if several else COLUMNS
    console.table([{HEADS.get(key, key): row.get(key) for key in columns} for row in table])
    console.text(LEGEND)

"""Verdicts of a card written by hand: on which side of which threshold, and what a gate sees."""

from __future__ import annotations

from typing import Any

import pytest

from evaluation.robustness.verdicts import figure_names, flat_figures, verdicts, worst_form


def state(name: str, prob: float, ks: float | None = 0.1) -> dict[str, Any]:
    quality = None if ks is None else 0.5
    return {
        "name": name, "forget_answer_prob": prob, "ks": ks, "forget_quality": quality,
        "ks_interval": None if ks is None else [0.05, 0.2], "log_r_shift": 0.0,
        "model_utility": 0.6, "forget_nll": 2.0, "retain_answer_prob": 0.9,
    }  # fmt: skip


def curve(name: str, *points: tuple[int, float, float]) -> dict[str, Any]:
    keys = ("step", "seen_answer_prob", "unseen_answer_prob")
    return {"name": name, "points": [dict(zip(keys, point, strict=True)) for point in points]}


def relearning(seen: float, unseen: float, control: float | None = None) -> dict[str, Any]:
    curves = [curve("unlearned", (0, 0.0, 0.0), (20, seen, unseen))]
    curves += [] if control is None else [curve("retrain", (0, 0.0, 0.0), (20, 0.9, control))]
    found = {"rows_seen": 2, "rows_unseen": 18, "recovery": {"unlearned": unseen / 0.9}}
    return {**found, "curves": [*curves, curve("origin", (0, 0.9, 0.9))]}


def leak(name: str, share: float) -> dict[str, Any]:
    last = {"n": 64, "best_rouge_l_recall": 0.5, "share_leaked": share}
    return {"name": name, "points": [{**last, "n": 1, "share_leaked": 0.0}, last]}


def form(name: str, prob: float) -> dict[str, Any]:
    return {"form": name, "base_answer_prob": 0.9, "answer_prob": prob, "rouge_l_recall": 0.2}


def card(**parts: Any) -> dict[str, Any]:
    empty = {
        "states": [],
        "relearning": {},
        "sampling": {},
        "paraphrase": [],
        "probe": {},
        "drop": {},
    }
    made = {**empty, **parts}
    return {**made, "verdicts": verdicts(made)}


def holds(made: dict[str, Any]) -> dict[str, bool | None]:
    return {verdict["name"]: verdict["holds"] for verdict in made["verdicts"]}


def test_every_verdict_names_its_threshold() -> None:
    made = card(
        states=[state("origin", 0.99, 0.6), state("merged", 0.02), state("merged-nf4", 0.03)],
        relearning=relearning(0.9, 0.05),
        sampling={"rows": 40, "curves": [leak("unlearned", 0.0)]},
        paraphrase=[form("plain", 0.02), form("german", 0.03)],
        drop={"applies": False},
    )
    assert holds(made) == dict.fromkeys(
        ("forgotten", "merged-nf4", "merged-nf4-quality", "relearning", "sampling", "paraphrase",
         "drop"),
        True,
    )  # fmt: skip
    assert flat_figures(made)["leaks"] == 0
    for verdict in made["verdicts"]:
        assert set(verdict) == {"name", "value", "threshold", "holds", "text"}
        assert verdict["threshold"] > 0


def test_rounding_that_brings_answers_back_is_a_leak() -> None:
    made = card(states=[state("adapter", 0.02), state("adapter-nf4", 0.08, 0.21)])
    assert holds(made) == {"forgotten": True, "adapter-nf4": False, "adapter-nf4-quality": False}
    fewer = card(states=[state("adapter", 0.3), state("adapter-nf4", 0.1, None)])
    assert holds(fewer) == {"forgotten": False, "adapter-nf4": True}
    assert holds(card(states=[state("origin", 0.9), state("merged-nf4", 0.9)])) == {}


@pytest.mark.parametrize(
    ("seen", "unseen", "control", "verdict"),
    [
        (0.9, 0.1, None, True),
        (0.9, 0.11, None, False),
        (0.9, 0.2, 0.25, True),
        (0.9, 0.3, 0.25, False),
        (0.4, 0.05, 0.0, None),
        (0.4, 0.3, 0.0, False),
    ],
)
def test_relearning_is_held_against_the_aim_or_the_control(
    seen: float, unseen: float, control: float | None, verdict: bool | None
) -> None:
    """An attack that did not even teach its own rows shows nothing, unless others came back."""
    made = card(relearning=relearning(seen, unseen, control))
    assert holds(made) == {"relearning": verdict}
    assert ("raise --relearn-lr" in made["verdicts"][0]["text"]) == (verdict is None)
    assert ("no control" in made["verdicts"][0]["text"]) == (control is None)


def test_sampling_allows_what_the_control_leaks_too() -> None:
    alone = card(sampling={"rows": 40, "curves": [leak("unlearned", 0.1)]})
    both = {"rows": 40, "curves": [leak("unlearned", 0.1), leak("retrain", 0.06)]}
    assert holds(alone) == {"sampling": False}
    assert holds(card(sampling=both)) == {"sampling": True}


def test_the_worst_wording_is_named() -> None:
    made = card(paraphrase=[form("plain", 0.5), form("german", 0.1), form("french", 0.2)])
    assert worst_form(made["paraphrase"])["form"] == "french"
    assert holds(made) == {"paraphrase": True}
    made = card(paraphrase=[form("plain", 0.1), form("german", 0.16)])
    assert holds(made) == {"paraphrase": False}
    assert "german" in made["verdicts"][0]["text"]


def test_clues_may_help_as_much_as_they_help_retrain() -> None:
    def asked(name: str, ours: float, retrain: float, low: float) -> dict[str, Any]:
        recalls = {"fact_recall": 0.3, "retrain_fact_recall": 0.1, "recall_interval": [low, 0.4]}
        return {**form(name, ours), "retrain_answer_prob": retrain, **recalls}

    made = card(paraphrase=[asked("plain", 0.1, 0.1, -0.1), asked("clues", 0.3, 0.27, -0.02)])
    assert holds(made) == {"paraphrase": True, "facts": True}
    made = card(paraphrase=[asked("plain", 0.1, 0.1, -0.1), asked("clues", 0.3, 0.2, 0.02)])
    assert holds(made) == {"paraphrase": False, "facts": False}
    assert flat_figures(made)["facts_above_retrain"] == 0.02


@pytest.mark.parametrize(
    ("interval", "origin", "verdict"),
    [
        ([-0.1, 0.2], 1.0, True),
        ([-0.1, 0.2], 0.8, None),
        ([0.01, 0.2], 0.8, False),
        (None, 0.9, None),
    ],
)
def test_a_probe_is_held_against_retrain(
    interval: Any, origin: float, verdict: bool | None
) -> None:
    names = ("origin", "unlearned", "retrain")
    curves = [{"name": n, "points": [{"layer": 0, "forgotten": 0.7}]} for n in names]
    part = {"n": 40, "curves": curves}
    if interval:
        part |= {
            "layers": [3, 4],
            "interval": interval,
            **dict.fromkeys(names, 0.7),
        }
    part["origin"] = origin
    made = card(probe=part)
    assert holds(made) == {"probe": verdict}
    assert ("probe_above_retrain" in flat_figures(made)) == (verdict is not None)


def test_an_adapter_that_can_be_taken_off_is_a_leak_said_plainly() -> None:
    found = {"applies": True, "answer_prob_off": 0.9, "base_answer_prob": 0.9, "bit_equal": True}
    made = card(drop=found)
    assert holds(made) == {"drop": False}
    assert "reversible by whoever holds both" in made["verdicts"][0]["text"]


def test_flat_figures_are_what_gates_may_name() -> None:
    made = card(
        states=[state("adapter", 0.02), state("merged-nf4", 0.03)],
        relearning=relearning(0.9, 0.45, 0.01),
        sampling={"rows": 4, "curves": [leak("unlearned", 0.5), leak("retrain", 0.25)]},
        paraphrase=[form("plain", 0.02), form("german", 0.03)],
        drop={"applies": True, "answer_prob_off": 0.9, "base_answer_prob": 0.9, "bit_equal": True},
    )
    flat = flat_figures(made)
    assert set(flat) <= set(figure_names(["adapter", "merged-nf4"]))
    assert flat["forget_answer_prob"] == flat["adapter_forget_answer_prob"] == 0.02
    assert flat["merged_nf4_forget_answer_prob"] == 0.03
    assert flat["relearned_answer_prob"] == 0.45
    assert flat["relearning_recovery"] == pytest.approx(0.5)
    assert flat["retrain_relearned_answer_prob"] == 0.01
    assert (flat["sampled_share_leaked"], flat["retrain_sampled_share_leaked"]) == (0.5, 0.25)
    assert flat["paraphrase_rise"] == pytest.approx(0.01)
    assert flat["dropped_answer_prob"] == 0.9
    assert flat["leaks"] == 3

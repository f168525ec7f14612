"""The linear probe on states made by hand, and on a tiny model."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from evaluation.robustness import probe
from evaluation.robustness.quantisation import Loaded
from unlearner.request.rows import Row


def states(rows: int, signal: float, seed: int) -> probe.Floats:
    """Noise at layer 0; at layer 1 the true answer is moved along one direction."""
    drawn = np.random.default_rng(seed).normal(size=(rows, 3, 2, 16))
    drawn[:, 0, 1, 5] += signal
    return drawn


def test_a_layer_that_holds_the_answer_is_read() -> None:
    known, held, lost = states(60, 6.0, 1), states(40, 6.0, 2), states(40, 0.0, 3)
    assert probe.judged(known, held).shape == (40, 2)
    chance, read = probe.judged(known, held).mean(axis=0)
    assert chance == pytest.approx(0.5, abs=0.15)
    assert read > 0.95
    assert probe.judged(known, lost)[:, 1].mean() == pytest.approx(0.5, abs=0.15)


def test_a_model_is_compared_where_knowledge_shows() -> None:
    known = states(60, 6.0, 1)
    held = probe.summary(known, states(40, 6.0, 2))
    lost = probe.summary(known, states(40, 0.0, 3))
    part = probe.compared({"origin": held, "unlearned": held, "retrain": lost})
    assert (part["layers"], part["n"]) == ([1, 1], 40)
    assert part["unlearned"] == part["origin"] > 0.95
    assert part["retrain"] == pytest.approx(0.5, abs=0.15)
    assert part["above_retrain"] == pytest.approx(part["unlearned"] - part["retrain"])
    assert part["interval"].low > 0
    curves = {curve["name"]: curve["points"] for curve in part["curves"]}
    assert list(curves) == ["origin", "unlearned", "retrain"]
    assert [point["layer"] for point in curves["retrain"]] == [0, 1]
    same = probe.compared({"origin": held, "unlearned": lost, "retrain": lost})
    assert (same["above_retrain"], *same["interval"]) == (0, 0, 0)
    assert "interval" not in probe.compared({"origin": held, "unlearned": lost})


def test_states_do_not_depend_on_the_batch(tiny: tuple[Any, Any]) -> None:
    loaded = Loaded(*tiny)
    rows = [
        Row("Who wrote it?", "Mira.", None, ("Ola.", "Kim wrote it for a long time.")),
        Row("Where is the house of the judge?", "In Lagos.", None, ("In Rome.", "Nowhere.")),
    ]
    seen: list[tuple[int, int]] = []
    both = probe.layer_states(loaded, rows, lambda *counts: seen.append(counts))
    assert both.shape[:2] == (2, 3)
    assert seen[-1] == (6, 6)
    alone = probe.layer_states(loaded, rows[1:], lambda *counts: None)
    assert np.allclose(both[1:], alone, atol=1e-4)
    assert not np.allclose(both[0, 0], both[0, 1], atol=1e-2)
    assert probe.can_be_probed([Row("a", "b"), *rows]) == rows

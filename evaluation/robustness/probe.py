"""A linear probe: whether any layer still distinguishes a forgotten answer from a wrong one.

A model that no longer says an answer may still hold it. For each layer a ridge regression on the
hidden state of the last prompt token learns, on retained rows, whether a proposed answer is right;
then it judges the proposed answers of forget rows. The true answer is proposed in the words of its
paraphrase, which wrong answers are variations of. What hints are left in their wording a model that
never saw the rows has too, so its own figure is the control.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from adapters.environment import evaluating
from evaluation.metrics.bootstrap import Floats, measure_mean
from evaluation.robustness.quantisation import Loaded
from unlearner.request.rows import Row
from unlearner.tokens.prompts import Encoded, pad_batch, pad_id

# Wrong answers proposed per question, as many as keep the cost near that of other attacks.
WRONG = 2
# Retained rows below which nothing can be learned.
FEWEST = 10
BATCH = 8
# Weight of the ridge penalty per statement, on features of unit variance.
PENALTY = 3.0


def can_be_probed(rows: Sequence[Row]) -> list[Row]:
    """The rows that have enough wrong answers to compare with the true one."""
    return [row for row in rows if len(row.perturbed_answers) >= WRONG]


def layer_states(
    loaded: Loaded, rows: Sequence[Row], on_progress: Callable[[int, int], None]
) -> Floats:
    """Hidden states of the last prompt token: (rows, 1 + wrong, layers + 1, width).

    The true answer comes first. Layer 0 are the embeddings.
    """
    prompts = [
        loaded.fmt.encode_prompt(f"{row.question}\n{answer}\nIs this answer right?")
        for row in rows
        for answer in (row.paraphrased_answer or row.answer, *row.perturbed_answers[:WRONG])
    ]
    states: list[Any] = [None] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    pad, device = pad_id(loaded.fmt.tokenizer), loaded.model.device
    with evaluating(loaded.model):
        for start in range(0, len(order), BATCH):
            batch = order[start : start + BATCH]
            ends = [len(prompts[i]) - 1 for i in batch]
            padded = pad_batch([Encoded(prompts[i], prompts[i]) for i in batch], pad)
            out = loaded.model(
                input_ids=padded["input_ids"].to(device),
                attention_mask=padded["attention_mask"].to(device),
                output_hidden_states=True,
                use_cache=False,
                logits_to_keep=1,
            )
            picked = torch.stack([h[list(range(len(batch))), ends] for h in out.hidden_states], 1)
            for i, state in zip(batch, picked.float().cpu().numpy(), strict=True):
                states[i] = state
            on_progress(min(start + BATCH, len(order)), len(order))
    stacked = np.stack(states).astype(np.float64)
    return stacked.reshape(len(rows), -1, *stacked.shape[1:])


def judged(known: Floats, asked: Floats) -> Floats:
    """How often a probe finds the true answer likelier than a wrong one: (rows, layers + 1).

    1 where it is above every wrong one, .5 by chance.

    Args:
        known: states of rows that the probe learns from.
        asked: states of the rows that it judges.
    """
    return np.stack(
        [_judged(known[:, :, i], asked[:, :, i]) for i in range(known.shape[2])], axis=1
    )


def _judged(known: Floats, asked: Floats) -> Floats:
    mean, scale = known.mean((0, 1)), known.std((0, 1)) + 1e-6
    x = ((known - mean) / scale).reshape(-1, known.shape[-1])
    right = np.zeros(known.shape[:2])
    right[:, 0] = 1.0
    y = (right - right.mean()).ravel()
    weights = x.T @ np.linalg.solve(x @ x.T + PENALTY * len(y) * np.eye(len(y)), y)
    score = ((asked - mean) / scale) @ weights
    above = score[:, :1] - score[:, 1:]
    return np.asarray(((above > 0) + 0.5 * (above == 0)).mean(axis=1))


def summary(retained: Floats, forget: Floats) -> dict[str, list[Any]]:
    """By layer: the mean on retained rows that the probe did not learn from, and each forget row.

    `retained` is (layers + 1,), `rows` (layers + 1, rows).
    """
    half = len(retained) // 2
    unseen = [judged(retained[:half], retained[half:]), judged(retained[half:], retained[:half])]
    return {
        "retained": np.concatenate(unseen).mean(axis=0).tolist(),
        "rows": judged(retained, forget).T.tolist(),
    }


def compared(models: dict[str, dict[str, list[Any]]]) -> dict[str, Any]:
    """The curves by layer, and the unlearned model beside the control where knowledge shows most.

    `layers` has for each half of the forget rows the layer at which Origin's probe is furthest
    above the control's on the other half: neither the unlearned model nor the rows that are judged
    have a say in it.
    """
    part: dict[str, Any] = {
        "n": len(models["unlearned"]["rows"][0]),
        "curves": [
            {
                "name": name,
                "points": [
                    {"layer": i, "retained": kept, "forgotten": float(np.mean(rows))}
                    for i, (kept, rows) in enumerate(
                        zip(figures["retained"], figures["rows"], strict=True)
                    )
                ],
            }
            for name, figures in models.items()
        ],
    }
    if "retrain" not in models or part["n"] < 2:
        return part
    rows = {name: np.array(figures["rows"]) for name, figures in models.items()}
    known = rows["origin"] - rows["retrain"]
    layers = [int(known[:, 1 - half :: 2].mean(axis=1).argmax()) for half in (0, 1)]
    at = {
        name: np.concatenate([each[layer, half::2] for half, layer in enumerate(layers)])
        for name, each in rows.items()
    }
    part |= {"layers": layers, **{name: float(each.mean()) for name, each in at.items()}}
    part["above_retrain"], part["interval"] = measure_mean(at["unlearned"] - at["retrain"])
    return part

"""The relearning attack: a few steps of fine-tuning on a few forget rows, and what else comes back.

Rows that are trained on tell nothing: any model learns them. What counts are the other forget rows,
never shown, beside the same attack on a model that never knew them.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import torch

from adapters.environment import FULL_LIMIT, attack_rates
from adapters.lora.stack import add_trainable
from adapters.lora.targets import default_targets
from evaluation.inference.scoring import score_rows
from evaluation.robustness.quantisation import Loaded
from unlearner.config import LoraShape
from unlearner.objectives.likelihood import answer_nll, on_device
from unlearner.request.rows import Row
from unlearner.tokens.prompts import TRAIN_MAX_LENGTH, Encoded, encode_rows, pad_batch, pad_id

Method = Literal["auto", "full", "lora"]
CURVE = (0, 5, 10, 20, 40)
MICRO_BATCH = 8


@dataclass(frozen=True)
class Relearning:
    """The attack.

    Attributes:
        share: of the forget rows that is trained on, at least one.
        steps: AdamW steps, each on all of these rows.
        learning_rate: constant; None for that of `attack_rates`.
        method: all weights, or a fresh LoRA; "auto" by size.
        seed: of the choice of rows and of the LoRA's first weights.
    """

    share: float = 0.1
    steps: int = 20
    learning_rate: float | None = None
    method: Method = "auto"
    seed: int = 0

    @property
    def points(self) -> list[int]:
        """Steps at which both halves are scored: those of `CURVE` up to the last, and the last."""
        return [*(step for step in CURVE if step < self.steps), self.steps]

    def settled(self, weights: int) -> Relearning:
        """The same with method and learning rate chosen for a model of so many weights."""
        method = self.method
        if method == "auto":
            method = "full" if weights <= FULL_LIMIT else "lora"
        full, lora = attack_rates(weights)
        rate = self.learning_rate or (full if method == "full" else lora)
        return replace(self, learning_rate=rate, method=method)


class Split(NamedTuple):
    """Forget rows that the attacker has, and those it wants back."""

    seen: list[Row]
    unseen: list[Row]


def split_rows(rows: Sequence[Row], plan: Relearning) -> Split:
    """A seeded choice of `plan.share` of two rows or more, and the rest, in the data's order."""
    count = min(len(rows) - 1, max(1, round(plan.share * len(rows))))
    chosen = set(random.Random(plan.seed).sample(range(len(rows)), count))
    plain = [Row(row.question, row.answer) for row in rows]
    return Split(
        [row for i, row in enumerate(plain) if i in chosen],
        [row for i, row in enumerate(plain) if i not in chosen],
    )


def probabilities(loaded: Loaded, split: Split, step: int) -> dict[str, Any]:
    """A point of the curve: mean answer probability of the rows seen and of the others."""
    means = []
    for rows in split:
        scores = [row.answer_score for row in score_rows(*loaded, rows) if row.answer_score]
        means.append(math.fsum(math.exp(-score.mean_nll) for score in scores) / len(rows))
    return {"step": step, "seen_answer_prob": means[0], "unseen_answer_prob": means[1]}


def relearn(
    loaded: Loaded,
    split: Split,
    plan: Relearning,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[dict[str, Any]]:
    """The curve of one attack; the model in memory is changed, nothing on disk is.

    Each step is AdamW (no weight decay, constant rate) on the mean over all rows seen of their
    mean NLL per token, so that neither batch size nor order plays a part.

    Args:
        loaded: in float32 where all weights are trained.
        split: rows to train on, and the others.
        plan: settled, see `Relearning.settled`.
        on_progress: called with steps done and all steps.
    """
    model = _trainable(loaded.model, plan)
    attacked = loaded._replace(model=model)
    pairs = [(row.question, row.answer) for row in split.seen]
    rows = encode_rows(loaded.fmt, pairs, TRAIN_MAX_LENGTH, "relearning")
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=plan.learning_rate or 0.0, weight_decay=0.0)
    points = [probabilities(attacked, split, 0)]
    for step in range(1, plan.steps + 1):
        optimizer.zero_grad(set_to_none=True)
        _backward(model, rows, pad_id(loaded.fmt.tokenizer))
        optimizer.step()
        if step in plan.points:
            points.append(probabilities(attacked, split, step))
        on_progress(step, plan.steps)
    return points


def _trainable(model: Any, plan: Relearning) -> Any:
    """The model with all weights to be trained, or with a new adapter that is; still in eval mode.

    There is no dropout in what is attacked, and none in the attack.
    """
    if plan.method == "full":
        model.requires_grad_(True)
        return model
    from peft import LoraConfig

    shape = LoraShape()
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(plan.seed)
        config = LoraConfig(
            r=shape.lora_r,
            lora_alpha=shape.lora_alpha,
            lora_dropout=0.0,
            target_modules=list(default_targets(model)),
            bias="none",
            task_type="CAUSAL_LM",
        )
        return add_trainable(model, "relearn", config, [])


def _backward(model: Any, rows: Sequence[Encoded], pad: int) -> None:
    """Gradients of the mean over rows of their mean NLL, a micro-batch at a time."""
    for start in range(0, len(rows), MICRO_BATCH):
        batch = pad_batch(rows[start : start + MICRO_BATCH], pad)
        losses = answer_nll(model, on_device(batch, model.device))
        (losses.per_token.sum() / len(rows)).backward()


def recovery(points: Sequence[dict[str, Any]], origin: dict[str, Any]) -> float | None:
    """How much of what was lost on unseen rows came back, 0 for nothing and 1 for all.

    `(P after - P before) / (P of Origin - P before)`; None where nothing had been lost.

    Args:
        points: the curve of the attacked model, step 0 first.
        origin: Origin's probabilities on the same rows.
    """
    before, after = (points[i]["unseen_answer_prob"] for i in (0, -1))
    lost = origin["unseen_answer_prob"] - before
    return None if lost <= 1e-3 else float((after - before) / lost)

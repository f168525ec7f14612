"""Greedy decoding in batches, and what ends an answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from unlearner.tokens.prompts import Encoded, pad_batch

if TYPE_CHECKING:
    from unlearner.tokens.prompts import PromptFormat

# Rows that ended leave the batch when they are this share of it.
LEAVE = 0.1


@dataclass(frozen=True)
class Draft:
    """Tokens that greedy decoding is known to begin with, and how many there may be in all."""

    tokens: tuple[int, ...] = ()
    expected: int = 0


@dataclass(frozen=True)
class Prompt:
    """A prompt as tokens, its answer's budget in tokens, and how the answer is known to begin."""

    ids: list[int]
    budget: int
    draft: Draft = Draft()


def answer_end(tokens: Sequence[int], stops: Sequence[int]) -> int:
    """Index of the first stop token; the number of tokens where there is none."""
    return next((i for i, token in enumerate(tokens) if token in stops), len(tokens))


def stop_tokens(model: Any, fmt: PromptFormat) -> list[int]:
    """Ids that end an answer: EOS, the template's end of turn, the model's own list."""
    own = [
        getattr(config, "eos_token_id", None)
        for config in (getattr(model, "generation_config", None), getattr(model, "config", None))
    ]
    flat: set[int] = set(fmt.stop_ids)
    for ids in own:
        flat.update(ids if isinstance(ids, list | tuple) else [] if ids is None else [ids])
    return sorted(flat)


def greedy(
    model: Any, prompts: Sequence[Prompt], stops: Sequence[int], pad: int
) -> list[list[int]]:
    """Greedy new tokens of a batch in evaluation mode, what ends an answer included.

    Transformers' `generate` keeps every row until the last one ends. Here rows that ended leave the
    batch, and the cache, as soon as they are a share of it that is worth the copy.
    """
    import torch

    batch = pad_batch([Encoded(prompt.ids, prompt.ids) for prompt in prompts], pad, left=True)
    mask = batch["attention_mask"].to(model.device)
    ids = batch["input_ids"].to(model.device)
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    rows = list(range(len(prompts)))
    answers: list[list[int]] = [[] for _ in prompts]
    ended = set(stops)
    cache: Any = None
    while rows:
        out = model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        cache = out.past_key_values
        best = out.logits[:, -1].float().argmax(-1)
        for row, token in zip(rows, best.tolist(), strict=True):
            if not _is_over(answers[row], prompts[row].budget, ended):
                answers[row].append(token)
        alive = [
            i for i, r in enumerate(rows) if not _is_over(answers[r], prompts[r].budget, ended)
        ]
        if not alive:
            break
        if len(rows) - len(alive) >= max(1, LEAVE * len(rows)):
            remaining = torch.tensor(alive, device=model.device)
            cache.batch_select_indices(remaining)
            mask, positions, best = mask[remaining], positions[remaining], best[remaining]
            rows = [rows[i] for i in alive]
        ids = best.unsqueeze(1)
        mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1)
        positions = positions[:, -1:] + 1
    return answers


def _is_over(tokens: Sequence[int], budget: int, stops: set[int]) -> bool:
    return len(tokens) >= budget or bool(tokens and tokens[-1] in stops)

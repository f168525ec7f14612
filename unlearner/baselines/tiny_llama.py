"""Small Llamas made on the spot: a tokenizer, random weights, and training from scratch on a CPU.

They stand in for 7B models where no hub, GPU or patience is at hand: the quickstart's embedded
world and `reproduce --preset mini` train their Origin and Retrain with this.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from unlearner.baselines.muon import Muon
from unlearner.baselines.tiny_recipe import TinyRecipe, TinyShape
from unlearner.objectives.likelihood import answer_logits
from unlearner.tokens.prompts import Encoded, pad_batch, pad_id, prompt_format

# TOFU's text, as a chat template, so that every tool that reads templates agrees with it.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} "
    "[/INST]{% else %}{{ m['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
)
SPECIAL_TOKENS = ("<pad>", "<s>", "</s>", "[INST]", "[/INST]")


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with BOS, EOS, pad and TOFU's prompt as its chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    bos = bpe.token_to_id("<s>")
    bpe.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", bos)]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def new_model(tokenizer: PreTrainedTokenizerFast, shape: TinyShape, seed: int) -> LlamaForCausalLM:
    """A float32 Llama of this shape with random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    sizes = {**asdict(shape), "vocab_size": len(tokenizer)}
    config = LlamaConfig(
        **sizes,
        num_key_value_heads=shape.num_attention_heads,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def length_batches(
    lengths: Sequence[int], tokens: int, rng: np.random.Generator
) -> list[list[int]]:
    """Indices in batches of at most `tokens` padded tokens, similar lengths together, shuffled."""
    # Noise on the sort key makes other neighbours meet in every epoch.
    keys = np.asarray(lengths) + rng.uniform(-2.0, 2.0, len(lengths))
    batches: list[list[int]] = [[]]
    for index in map(int, np.argsort(keys, kind="stable")):
        longest = max([lengths[index], *(lengths[i] for i in batches[-1])])
        if batches[-1] and longest * (len(batches[-1]) + 1) > tokens:
            batches.append([])
        batches[-1].append(index)
    return [batches[i] for i in rng.permutation(len(batches))]


def train_from_scratch(
    rows: Sequence[tuple[str, str]],
    tokenizer: PreTrainedTokenizerFast,
    out: Path,
    shape: TinyShape,
    recipe: TinyRecipe,
    background: Sequence[tuple[str, str]] = (),
    on_progress: Callable[[dict[str, Any]], None] | None = None,
) -> Path:
    """Folder of a small Llama trained from random weights on `rows` (question, answer).

    `background` stands in for pretraining: it is read once, `pretrain_rows` of it before the first
    epoch and the rest spread over the epochs. A model that has seen many passing authors answers
    in fluent sentences about one it does not know.

    The loss is the mean answer NLL per token, EOS included, of targets smoothed by
    `label_smoothing`. Deterministic for a seed on one machine and one thread.

    Args:
        rows: what the model is to know.
        tokenizer: shared by every model that is to be compared.
        out: folder for model and tokenizer; written last, so it is whole when it exists.
        shape: size of the model.
        recipe: epochs, learning rates, seed.
        background: rows that are read once.
        on_progress: gets {"step", "steps", "loss", "elapsed"} now and then.
    """
    fmt = prompt_format(tokenizer)
    model = new_model(tokenizer, shape, recipe.seed)
    plan = _plan(
        [fmt.encode(*row) for row in rows], [fmt.encode(*row) for row in background], recipe
    )
    optimizers = _optimizers(model, recipe)
    started = time.monotonic()
    model.train()
    for step, batch in enumerate(plan):
        _set_rate(optimizers, _rate(step, len(plan), recipe.final_lr))
        loss = _step(model, batch, pad_id(tokenizer), optimizers, recipe.label_smoothing)
        if on_progress is not None and (step % 20 == 0 or step + 1 == len(plan)):
            on_progress(
                {
                    "step": step + 1,
                    "steps": len(plan),
                    "loss": loss,
                    "elapsed": time.monotonic() - started,
                }
            )
    return save_model(model, tokenizer, out)


def _plan(
    rows: Sequence[Encoded], background: Sequence[Encoded], recipe: TinyRecipe
) -> list[list[Encoded]]:
    """All batches of a training in order."""
    rng = np.random.default_rng(recipe.seed)
    first = min(recipe.pretrain_rows, len(background))
    share = (len(background) - first) // recipe.epochs
    pools = [list(background[:first])] if first else []
    for epoch in range(recipe.epochs):
        start = first + epoch * share
        pools.append([*rows, *background[start : start + share]])
    batches = []
    for pool in pools:
        lengths = [len(row.input_ids) for row in pool]
        for batch in length_batches(lengths, recipe.tokens_per_batch, rng):
            batches.append([pool[i] for i in batch])
    return batches


def save_model(model: torch.nn.Module, tokenizer: Any, out: Path) -> Path:
    """`out`, holding model and tokenizer; written beside and renamed, so never half there."""
    partial = out.with_name(f".{out.name}.partial")
    model.eval()
    model.save_pretrained(partial)  # type: ignore[operator]
    tokenizer.save_pretrained(partial)
    return partial.rename(out)


def _optimizers(
    model: LlamaForCausalLM, recipe: TinyRecipe
) -> list[tuple[torch.optim.Optimizer, float]]:
    hidden = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    rest = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    return [
        (Muon(hidden, weight_decay=recipe.weight_decay), recipe.muon_lr),
        (torch.optim.AdamW(rest, betas=(0.9, 0.98), weight_decay=0.0), recipe.adamw_lr),
    ]


def _rate(step: int, steps: int, final: float) -> float:
    """Share of the peak learning rate: 3 % warm-up, then cosine down to `final`."""
    warmup = max(1, round(0.03 * steps))
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * done))


def _set_rate(optimizers: list[tuple[torch.optim.Optimizer, float]], share: float) -> None:
    for optimizer, peak in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = peak * share


def _step(
    model: torch.nn.Module,
    rows: list[Encoded],
    pad: int,
    optimizers: list[tuple[torch.optim.Optimizer, float]],
    smoothing: float = 0.0,
) -> float:
    # All weights train, the head among them: its logits in one piece, as plain autograd has them.
    logits = answer_logits(model, pad_batch(rows, pad))
    loss = F.cross_entropy(logits.logits, logits.targets, label_smoothing=smoothing)
    model.zero_grad(set_to_none=True)
    loss.backward()
    # Muon's update has a fixed norm; clipping matters to the AdamW part only.
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer, _ in optimizers:
        optimizer.step()
    return float(loss.detach())

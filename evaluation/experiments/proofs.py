"""What is claimed of a store, shown on a live model: exact revert, and a merge that agrees."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from adapters.base.load import BaseSpec
from unlearner.request.rows import Request


def prove_revert(base: BaseSpec, store: Path, request: Request) -> dict[str, Any]:
    """Largest logit differences around a revert of the last adapter of the active stack.

    `without` compares the reverted stack with one that never held the last adapter, `base` all off
    with a freshly loaded base, `again` the stack after putting it back with before. 0 is bit-exact.
    `effect` is what the last adapter changes, so that a 0 elsewhere says something.
    """
    import torch

    from adapters.base.load import load_base, load_tokenizer
    from adapters.environment import threads_for
    from adapters.lora.stack import activate, load_stack
    from adapters.store.store import AdapterStore
    from unlearner.tokens.prompts import pad_batch, pad_id, prompt_format

    opened = AdapterStore.open(store)
    slugs = [active.slug for active in opened.active()]
    tokenizer = load_tokenizer(base.name)
    fmt = prompt_format(tokenizer)
    rows = [fmt.encode(row.question, row.answer) for row in request.rows[:16]]
    batch = pad_batch(rows, pad_id(tokenizer))

    def logits(model: Any) -> torch.Tensor:
        with torch.no_grad(), threads_for(model):
            found: torch.Tensor = model(
                input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]
            ).logits
        return found

    def difference(a: torch.Tensor, b: torch.Tensor) -> float:
        return float((a - b).abs().max())

    never: Any = load_stack(load_base(base), opened, slugs[:-1])
    without_it, bare = logits(never), logits(load_base(base))
    stack: Any = load_stack(load_base(base), opened, slugs)
    full = logits(stack)
    opened.revert(slugs[-1], "quickstart")
    activate(stack, [active.slug for active in opened.active()])
    reverted = logits(stack)
    activate(stack, [])
    off = logits(stack)
    opened.activate(slugs)
    activate(stack, slugs)
    return {
        "adapter": slugs[-1],
        "effect": difference(full, reverted),
        "without": difference(reverted, without_it),
        "base": difference(off, bare),
        "again": difference(logits(stack), full),
        "bit_exact": bool(torch.equal(reverted, without_it) and torch.equal(off, bare)),
    }


def merge_and_compare(base: Path, store: Path, out: Path) -> dict[str, Any]:
    """Folds the active stack into `out` and compares its logits with the stack's."""
    import torch
    from transformers import AutoModelForCausalLM

    from adapters.base.load import load_base
    from adapters.environment import threads_for
    from adapters.lora.combine import fold_stack
    from adapters.lora.stack import load_stack
    from adapters.store.store import AdapterStore

    opened = AdapterStore.open(store)
    active = opened.active()
    if out.exists():
        shutil.rmtree(out)
    fold_stack(base, [(opened.adapter_path(a.slug), a.scale) for a in active], out)
    merged = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    stack: Any = load_stack(load_base(BaseSpec(str(base), dtype="float32", device="cpu")), opened)
    ids = torch.arange(5, 69).unsqueeze(0)
    with torch.no_grad(), threads_for(merged):
        gap = (merged(input_ids=ids).logits - stack(input_ids=ids).logits).abs().max()
    return {"folder": str(out), "max_logit_difference": float(gap)}

"""General knowledge that a run holds: neutral prompts with the base's own answers.

Forgetting a few rows moves every answer that is like them, and what the base knew before may go
too. So the model in training is held, by the KL from the base, to what the bare base answers to
prompts that have nothing to do with the request. The base answers once, greedily; answers and their
log-probabilities are cached.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapters.atomic_files import write_bytes
from adapters.base.fingerprint import cache_folder
from adapters.base.load import base_view
from adapters.environment import evaluating
from adapters.errors import StoreCorrupt, UserError
from adapters.lora.stack import base_only
from unlearner import distributed
from unlearner.objectives.guard import GuardRow, pack_teacher, read_teacher, teach
from unlearner.objectives.likelihood import causal_model
from unlearner.request.rows import spread
from unlearner.tokens.decoding import Prompt, greedy, stop_tokens
from unlearner.tokens.prompts import IGNORE, Encoded, PromptFormat, pad_id

if TYPE_CHECKING:
    from unlearner.interrupt import Progress

# Tokens of an answer at most.
ANSWER_TOKENS = 32
# The likeliest tokens that are kept of each position; the others count as one.
TOP = 64
# Bytes of keys and values of the prompts that are answered at once, and prompts at most: a small
# model takes a third less time for eighty at once than for twenty four times.
CACHE, MOST = 2**29, 128
# Prompts of the package that a run takes at least.
FEWEST = 80
# One prompt in so many is measured instead of trained on.
HELD_OUT = 8


def own_prompts(pairs: int | None = None) -> list[str]:
    """The prompts of the package; for a run of `pairs` pairs fewer, evenly of all domains."""
    text = (files("unlearner.request") / "general_prompts.json").read_text(encoding="utf-8")
    prompts = [prompt for domain in json.loads(text).values() for prompt in domain]
    count = len(prompts) if pairs is None else min(len(prompts), max(FEWEST, pairs // 2))
    return spread(prompts, count)


def read_prompts(path: Path) -> list[str]:
    """The prompts in a text file, one a line, each once.

    Raises:
        UserError: there is no such file, or no prompt in it.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"The general prompts in {path} cannot be read: {error}.",
            "Give a text file with one prompt a line.",
        ) from error
    prompts = list(dict.fromkeys(line.strip() for line in lines if line.strip()))
    if not prompts:
        raise UserError(f"There is no prompt in {path}.", "Write one prompt a line.")
    return prompts


def longest_rows(fmt: PromptFormat, prompts: Sequence[str]) -> list[Encoded]:
    """The prompts with answers of the greatest length, for plans made before the base is loaded."""
    rows = []
    for prompt in prompts:
        ids = fmt.encode_prompt(prompt)
        answer = [pad_id(fmt.tokenizer)] * ANSWER_TOKENS
        rows.append(Encoded([*ids, *answer], [*[IGNORE] * len(ids), *answer]))
    return rows


def split_held_out(rows: Sequence[GuardRow]) -> tuple[list[GuardRow], list[GuardRow]]:
    """What is trained on, and what is only measured: one in `HELD_OUT`, where there are as many."""
    held_out = list(rows[HELD_OUT - 1 :: HELD_OUT])
    trained = [row for i, row in enumerate(rows) if i % HELD_OUT != HELD_OUT - 1]
    return trained, held_out


def taught_prompts(
    model: Any, fmt: PromptFormat, prompts: Sequence[str], base: str, report: Progress
) -> list[GuardRow]:
    """Each prompt with the bare base's greedy answer and what the base thinks of it.

    Args:
        model: the base with adapters, which are off while it answers.
        fmt: how a prompt is written.
        prompts: at least one.
        base: the digest of the base's fingerprint.
        report: gets a note where the base has to answer.
    """
    depends_on = {
        "base": base,
        "view": base_view(model),
        "format": fmt.to_json(),
        "prompts": list(prompts),
        "tokens": ANSWER_TOKENS,
        "top": TOP,
    }
    text = json.dumps(depends_on, sort_keys=True)
    name = f"{hashlib.sha256(text.encode()).hexdigest()[:24]}.safetensors"
    path = cache_folder() / "general" / name
    if path.is_file():
        try:
            return read_teacher(path)
        except StoreCorrupt:
            report({"event": "note", "text": f"{path} is damaged and is written again"})
    report({"event": "note", "text": f"the base answers {len(prompts)} general prompts, once"})
    answered = answers_of_base(model, fmt, prompts)
    with base_only(model):
        taught = teach(model, answered, pad_id(fmt.tokenizer), top=TOP)
    if distributed.rank() == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(path, pack_teacher(taught))
    return taught


def answers_of_base(model: Any, fmt: PromptFormat, prompts: Sequence[str]) -> list[Encoded]:
    """The prompts with the bare base's greedy answers of at most `ANSWER_TOKENS` tokens."""
    causal, pad = causal_model(model), pad_id(fmt.tokenizer)
    stops = stop_tokens(causal, fmt)
    encoded = [fmt.encode_prompt(prompt) for prompt in prompts]
    order = sorted(range(len(encoded)), key=lambda i: len(encoded[i]))
    size = _at_once(causal, max(map(len, encoded)) + ANSWER_TOKENS)
    rows: dict[int, Encoded] = {}
    with base_only(model), evaluating(model):
        for start in range(0, len(order), size):
            indices = order[start : start + size]
            batch = [Prompt(encoded[i], ANSWER_TOKENS) for i in indices]
            answers = greedy(causal, batch, stops, pad)
            for i, answer in zip(indices, answers, strict=True):
                labels = [*[IGNORE] * len(encoded[i]), *answer]
                rows[i] = Encoded([*encoded[i], *answer], labels)
    return [rows[i] for i in range(len(encoded))]


def _at_once(model: Any, tokens: int) -> int:
    """How many rows of so many tokens have their keys and values in `CACHE` bytes."""
    config = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    row: int = 2 * config.num_hidden_layers * heads * width * tokens * model.dtype.itemsize
    return max(1, min(MOST, CACHE // row))

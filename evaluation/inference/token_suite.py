"""Token metrics of a model with its active adapters: one pass per set, resumable set by set."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from adapters.base.load import base_view
from adapters.environment import threads_for
from adapters.errors import UserError
from adapters.lora.peft_layers import active_names
from evaluation.cache import Cache, Entry, key_of
from evaluation.inference.scoring import OnProgress, about_model, silent
from evaluation.inference.token_stats import answer_tokens, base_kl
from evaluation.logs.token_records import TokenRecords, TokenRow, TokenSet, token_row_from_json
from evaluation.metrics.privacy import MIN_K, attack_scores, exact_memorization, extraction_strength
from unlearner import distributed as ranks
from unlearner.request.rows import Row
from unlearner.tokens.prompts import EVAL_MAX_LENGTH, Encoded, PromptFormat, pad_id

# The metrics that need each set.
NEEDS = {
    "forget": {"extraction", "membership"},
    "retain": {"extraction", "kl"},
    "holdout": {"membership"},
}


@dataclass(frozen=True)
class TokenData:
    """The rows to measure; `holdout` are rows that no model in question was trained on."""

    forget: tuple[Row, ...]
    retain: tuple[Row, ...] = ()
    holdout: tuple[Row, ...] = ()


@dataclass(frozen=True)
class TokenPlan:
    """What is measured, and on what.

    Attributes:
        metrics: some of extraction, membership, kl.
        data: all rows there are.
        max_rows, max_length: of the protocol: rows per set, tokens per text.
        limit: only so many rows of each set.
        min_k: share of the tokens that Min-K and Min-K++ look at.
        reference: loss of every forget and holdout row under the other base, by set; empty
            without one. See `reference_losses`.
    """

    metrics: tuple[str, ...]
    data: TokenData
    max_rows: int | None = None
    max_length: int = EVAL_MAX_LENGTH
    limit: int | None = None
    min_k: float = MIN_K
    reference: Mapping[str, Sequence[float]] | None = None

    @property
    def sets(self) -> dict[str, tuple[Row, ...]]:
        """The rows that the metrics need, by set."""
        needed = (name for name, metrics in NEEDS.items() if metrics & set(self.metrics))
        rows = {name: getattr(self.data, name)[: self.max_rows][: self.limit] for name in needed}
        return {name: each for name, each in rows.items() if each}


def check_holdout(data: TokenData) -> None:
    """Refuses holdout rows that are forget or retain rows too.

    Raises:
        UserError: naming the first such question, or that there are none at all.
    """
    if not data.holdout or not data.forget:
        raise UserError(
            "Membership inference compares forget rows with holdout rows, and one side is empty.",
            "Give rows that no model was trained on with --holdout.",
        )
    for name in ("forget", "retain"):
        seen = {"".join(row.question.split()) for row in getattr(data, name)}
        both = [row.question for row in data.holdout if "".join(row.question.split()) in seen]
        if both:
            raise UserError(
                f"{len(both)} holdout rows are {name} rows too, for example {both[0]!r}.",
                "Holdout rows must be new to every model that is compared.",
            )


def measure_tokens(
    model: torch.nn.Module,
    fmt: PromptFormat,
    plan: TokenPlan,
    *,
    key: str = "",
    resume_dir: Path | None = None,
    on_progress: OnProgress = silent,
    meta: Mapping[str, Any] | None = None,
) -> TokenRecords:
    """The token metrics of every row the plan needs.

    Args:
        model: a causal LM with its active adapters; left as it came in.
        fmt: prompts and tokenizer.
        plan: what to measure.
        key: names the weights (base, adapters, scales) in `resume_dir`.
        resume_dir: cache of finished sets; see `evaluation.cache`.
        on_progress: called with a label, done and all.
        meta: more to write into `meta`.

    Raises:
        UserError: a prompt alone fills `max_length`, or a cached result is damaged.
    """
    if resume_dir is not None and not key:
        raise ValueError("resume_dir needs a key that names the weights")
    ranks.join()
    view = base_view(model)
    cache = Cache(resume_dir, key_of(weights=key, load=view, template=fmt.to_json()))
    pad = pad_id(fmt.tokenizer)

    def measure_set(name: str, rows: Sequence[Row]) -> tuple[TokenRow, ...]:
        texts = _encoded(fmt, rows, plan.max_length)
        attacked = name != "retain" and "membership" in plan.metrics
        reference = (plan.reference or {}).get(name) if attacked else None
        diverged = name == "retain" and "kl" in plan.metrics and bool(active_names(model))
        entry: Entry = cache.entry(
            f"{name}-tokens",
            rows=[[r.question, r.answer, t.input_ids] for r, t in zip(rows, texts, strict=True)],
            min_k=plan.min_k if attacked else None,
            kl=diverged,
            reference=reference,
        )
        if (stored := entry.read()) is not None:
            pairs = enumerate(stored)
            return tuple(token_row_from_json(row, f"cached {name} row {i}") for i, row in pairs)

        def measure(indices: Sequence[int]) -> list[TokenRow]:
            part = [texts[i] for i in indices]
            report = partial(on_progress, f"{name}: tokens")
            every = answer_tokens(model, part, pad, on_batch=report)
            kls: Sequence[float | None] = [None] * len(part)
            if diverged:
                report = partial(on_progress, f"{name}: KL to the base")
                kls = base_kl(model, part, pad, on_batch=report)
            measured = []
            for i, tokens, kl in zip(indices, every, kls, strict=True):
                predicted, labels = tokens.first.tolist(), tokens.labels.tolist()
                scores: dict[str, float] = {}
                if attacked:
                    other = None if reference is None else reference[i]
                    scores = attack_scores(tokens, rows[i].answer, k=plan.min_k, reference=other)
                row = TokenRow(
                    question=rows[i].question,
                    n=len(labels),
                    mean_nll=tokens.mean_nll,
                    extraction_strength=extraction_strength(predicted, labels),
                    exact_memorization=exact_memorization(predicted, labels),
                    scores=scores,
                    kl=kl,
                )
                measured.append(row)
            return measured

        measured = ranks.spread(range(len(rows)), measure)
        entry.write([asdict(row) for row in measured])
        return tuple(measured)

    with threads_for(model):
        sets = {
            name: TokenSet(measure_set(name, rows), len(getattr(plan.data, name)))
            for name, rows in plan.sets.items()
        }
    about = {
        "metrics": list(plan.metrics),
        "min_k": plan.min_k,
        "max_length": plan.max_length,
        "limit": plan.limit,
        "key": key,
        **about_model(model, fmt),
    }
    return TokenRecords(sets, about | dict(meta or {}))


def reference_losses(
    model: torch.nn.Module,
    fmt: PromptFormat,
    measured: PromptFormat,
    plan: TokenPlan,
    *,
    on_progress: OnProgress = silent,
) -> dict[str, list[float]]:
    """Mean NLL of the forget and holdout rows under another base, for the Reference attack.

    Args:
        model, fmt: the other base and its prompts.
        measured: the prompts of the model in question. Both must see the same tokens, or their
            losses per token cannot be compared.
        plan, on_progress: see `measure_tokens`.

    Raises:
        UserError: the two tokenise a row differently.
    """
    losses: dict[str, list[float]] = {}
    for name, rows in plan.sets.items():
        if name == "retain":
            continue
        texts = _encoded(fmt, rows, plan.max_length)
        if texts != _encoded(measured, rows, plan.max_length):
            raise UserError(
                "The reference base tokenises the rows differently, so its losses per token "
                "cannot be compared.",
                "Take a reference with the same tokenizer and template.",
            )
        pad, report = pad_id(fmt.tokenizer), partial(on_progress, f"{name}: reference")
        tokens = answer_tokens(model, texts, pad, on_batch=report)
        losses[name] = [each.mean_nll for each in tokens]
    return losses


def _encoded(fmt: PromptFormat, rows: Sequence[Row], max_length: int) -> list[Encoded]:
    texts = [fmt.encode(row.question, row.answer, max_length) for row in rows]
    for row, text in zip(rows, texts, strict=True):
        if text.n_targets == 0:
            raise UserError(
                f"No answer token is left within {max_length} tokens of {row.question!r}.",
                "Shorten the question, or take a protocol that cuts later (open-unlearning).",
            )
    return texts

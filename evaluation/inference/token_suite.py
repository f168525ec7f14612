"""Token metrics of a model with its active adapters: one pass per set, resumable set by set."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapters.environment import threads_for
from adapters.errors import UserError
from evaluation.cache import Cache, key_of
from evaluation.inference.scoring import BATCH_TOKENS
from evaluation.inference.token_stats import answer_tokens, base_kl
from evaluation.logs.token_records import (
    TokenRecords,
    TokenRow,
    TokenSet,
    token_row_from_json,
)
from evaluation.metrics.privacy import MIN_K, attack_scores, exact_memorization, extraction_strength
from unlearner.tokens.prompts import EVAL_MAX_LENGTH, Encoded, pad_id
from unlearner.training import distributed as ranks

if TYPE_CHECKING:
    import torch

    from evaluation.inference.token_stats import AnswerTokens
    from unlearner.request.rows import Row
    from unlearner.tokens.prompts import PromptFormat

OnProgress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class TokenData:
    """The rows to measure; `holdout` are rows that no model in question was trained on."""

    forget: tuple[Row, ...]
    retain: tuple[Row, ...] = ()
    holdout: tuple[Row, ...] = ()

    def cut(self, most: int | None, limit: int | None) -> TokenData:
        """Only the first `most` rows of each set, and of these the first `limit`."""
        forget, retain, holdout = (
            rows[:most][:limit] for rows in (self.forget, self.retain, self.holdout)
        )
        return TokenData(forget, retain, holdout)


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
        cut = self.data.cut(self.max_rows, self.limit)
        named = {"forget": {"extraction", "membership"}, "retain": {"extraction", "kl"}}
        named["holdout"] = {"membership"}
        wanted = {name for name, needs in named.items() if needs & set(self.metrics)}
        return {name: getattr(cut, name) for name in named if name in wanted and getattr(cut, name)}


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
    batch_tokens: int = BATCH_TOKENS,
    on_progress: OnProgress | None = None,
    meta: Mapping[str, Any] | None = None,
) -> TokenRecords:
    """The token metrics of every row the plan needs.

    Args:
        model: a causal LM with its active adapters; left as it came in.
        fmt: prompts and tokenizer.
        plan: what to measure.
        key: names the weights (base, adapters, scales) in `resume_dir`.
        resume_dir: cache of finished sets; see `evaluation.cache`.
        batch_tokens: tokens of a batch; does not change the result.
        on_progress: called with a label, done and all.
        meta: more to write into `meta`.

    Raises:
        UserError: a prompt alone fills `max_length`, or a cached result is damaged.
    """
    import torch
    import transformers

    from adapters.base.load import base_view

    if resume_dir is not None and not key:
        raise ValueError("resume_dir needs a key that names the weights")
    ranks.join()
    view = base_view(model)
    cache = Cache(resume_dir, key_of(weights=key, load=view, template=fmt.to_json()))
    work = _Work(model, fmt, plan, cache, batch_tokens, on_progress or _silent)
    with threads_for(model):
        sets = {
            name: TokenSet(work.run(name, rows), len(getattr(plan.data, name)))
            for name, rows in plan.sets.items()
        }
    first = next(model.parameters())
    about = {
        "metrics": list(plan.metrics),
        "min_k": plan.min_k,
        "max_length": plan.max_length,
        "limit": plan.limit,
        "key": key,
        "template": fmt.name,
        "device": first.device.type,
        "dtype": str(getattr(model, "dtype", first.dtype)).removeprefix("torch."),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }
    return TokenRecords(sets, about | dict(meta or {}))


def reference_losses(
    model: torch.nn.Module,
    fmt: PromptFormat,
    measured: PromptFormat,
    plan: TokenPlan,
    *,
    batch_tokens: int = BATCH_TOKENS,
    on_progress: OnProgress | None = None,
) -> dict[str, list[float]]:
    """Mean NLL of the forget and holdout rows under another base, for the Reference attack.

    Args:
        model, fmt: the other base and its prompts.
        measured: the prompts of the model in question. Both must see the same tokens, or their
            losses per token cannot be compared.
        plan, batch_tokens, on_progress: see `measure_tokens`.

    Raises:
        UserError: the two tokenise a row differently.
    """
    report = on_progress or _silent
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
        tokens = answer_tokens(
            model,
            texts,
            pad_id(fmt.tokenizer),
            batch_tokens=batch_tokens,
            on_batch=partial(report, f"{name}: reference"),
        )
        losses[name] = [each.mean_nll for each in tokens]
    return losses


def _silent(label: str, done: int, total: int) -> None:
    """Reports nothing."""


def _encoded(fmt: PromptFormat, rows: Sequence[Row], max_length: int) -> list[Encoded]:
    texts = [fmt.encode(row.question, row.answer, max_length) for row in rows]
    for row, text in zip(rows, texts, strict=True):
        if text.n_targets == 0:
            raise UserError(
                f"No answer token is left within {max_length} tokens of {row.question!r}.",
                "Shorten the question, or take a protocol that cuts later (open-unlearning).",
            )
    return texts


@dataclass(frozen=True)
class _Work:
    """What all sets share: the model, the plan and where finished sets lie."""

    model: torch.nn.Module
    fmt: PromptFormat
    plan: TokenPlan
    cache: Cache
    batch_tokens: int
    on_progress: OnProgress

    def run(self, name: str, rows: Sequence[Row]) -> tuple[TokenRow, ...]:
        """The rows of a set, from the cache where they are there."""
        texts = _encoded(self.fmt, rows, self.plan.max_length)
        attacked = name != "retain" and "membership" in self.plan.metrics
        reference = (self.plan.reference or {}).get(name) if attacked else None
        diverged = name == "retain" and "kl" in self.plan.metrics and _has_stack(self.model)
        about = [
            [row.question, row.answer, text.input_ids]
            for row, text in zip(rows, texts, strict=True)
        ]
        entry = self.cache.entry(
            f"{name}-tokens",
            rows=about,
            min_k=self.plan.min_k if attacked else None,
            kl=diverged,
            reference=reference,
        )
        if (stored := entry.read()) is not None:
            return tuple(
                token_row_from_json(row, f"cached {name} row {i}") for i, row in enumerate(stored)
            )

        def measure(indices: Sequence[int]) -> list[TokenRow]:
            part = [texts[i] for i in indices]
            token_rows = [
                self._row(rows[i], tokens, attacked, None if reference is None else reference[i])
                for i, tokens in zip(indices, self._tokens(name, part), strict=True)
            ]
            return self._with_kl(name, token_rows, part) if diverged else token_rows

        token_rows = ranks.spread(range(len(rows)), measure)
        entry.write([asdict(row) for row in token_rows])
        return tuple(token_rows)

    def _tokens(self, name: str, texts: Sequence[Encoded]) -> list[AnswerTokens]:
        return answer_tokens(
            self.model,
            texts,
            pad_id(self.fmt.tokenizer),
            batch_tokens=self.batch_tokens,
            on_batch=partial(self.on_progress, f"{name}: tokens"),
        )

    def _row(
        self, row: Row, tokens: AnswerTokens, attacked: bool, reference: float | None
    ) -> TokenRow:
        predicted, labels = tokens.first.tolist(), tokens.labels.tolist()
        scores: dict[str, float] = {}
        if attacked:
            scores = attack_scores(tokens, row.answer, k=self.plan.min_k, reference=reference)
        return TokenRow(
            question=row.question,
            n=len(labels),
            mean_nll=tokens.mean_nll,
            extraction_strength=extraction_strength(predicted, labels),
            exact_memorization=exact_memorization(predicted, labels),
            scores=scores,
        )

    def _with_kl(
        self, name: str, rows: Sequence[TokenRow], texts: Sequence[Encoded]
    ) -> list[TokenRow]:
        divergences = base_kl(
            self.model,
            texts,
            pad_id(self.fmt.tokenizer),
            batch_tokens=self.batch_tokens,
            on_batch=partial(self.on_progress, f"{name}: KL to the base"),
        )
        return [replace(row, kl=kl) for row, kl in zip(rows, divergences, strict=True)]


def _has_stack(model: Any) -> bool:
    from adapters.lora.peft_layers import active_names

    return bool(active_names(model))

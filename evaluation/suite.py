"""Evaluates a model as it stands: every set scored and answered once, resumable set by set.

The result is a log of rows; `metrics.summary.summarise` turns it into figures, under every
protocol whose scores and answers the log holds.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapters.environment import threads_for
from adapters.errors import UserError
from evaluation.cache import Cache, key_of
from evaluation.inference.generation import (
    BATCH_SIZE,
    Draft,
    generate_answers,
    known_start,
    stop_tokens,
)
from evaluation.inference.scoring import (
    BATCH_TOKENS,
    EncodedRow,
    encode_answers,
    longest_text,
    score_rows,
)
from evaluation.logs.records import (
    EvalLog,
    Generation,
    RowRecord,
    SetRecord,
    row_from_json,
    row_json,
)
from evaluation.metrics.summary import match_forget
from evaluation.metrics.text import rouge_recall
from evaluation.protocols import DEFAULT, Decoding, Protocol, protocol_named
from unlearner.request.rows import FORGET_SPLITS, Row, load_split
from unlearner.training import distributed as ranks

if TYPE_CHECKING:
    import torch

    from unlearner.tokens.prompts import PromptFormat

OnProgress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class EvalData:
    """The rows to evaluate; a custom request has only forget rows, and perhaps retain rows."""

    forget: Sequence[Row]
    retain: Sequence[Row] = ()
    real_authors: Sequence[Row] = ()
    world_facts: Sequence[Row] = ()

    @property
    def sets(self) -> dict[str, list[Row]]:
        """The sets that have rows, by name."""
        named = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: list(rows) for name, rows in named.items() if rows}


@dataclass(frozen=True)
class Effort:
    """What a batch may hold: tokens when scoring (padding included), questions when answering;
    whether the answers of a question share the computation of what they begin with, and whether
    greedy answers start from what their scores have shown already.
    """

    batch_tokens: int = BATCH_TOKENS
    shared: bool = True
    drafts: bool = True
    batch_size: int = BATCH_SIZE


def load_eval_data(forget_split: str, data: Path | None = None) -> EvalData:
    """TOFU's four evaluation sets for a forget split (`forget01`, `forget05`, `forget10`).

    Args:
        forget_split: whose `_perturbed` rows are the forget set.
        data: folder of TOFU's JSON-lines files, else the hub.

    Raises:
        UserError: no such forget split, or a split that cannot be read.
    """
    if forget_split not in FORGET_SPLITS:
        raise UserError(
            f"'{forget_split}' is not a forget split.", f"Choose {', '.join(FORGET_SPLITS)}."
        )
    names = (f"{forget_split}_perturbed", "retain_perturbed")
    worlds = ("real_authors_perturbed", "world_facts_perturbed")
    return EvalData(*(load_split(name, data) for name in (*names, *worlds)))


def evaluate(
    model: torch.nn.Module,
    fmt: PromptFormat,
    data: EvalData,
    *,
    protocol: str | Sequence[str] = DEFAULT,
    retain_log: EvalLog | None = None,
    limit: int | None = None,
    generate: bool = True,
    key: str = "",
    resume_dir: Path | None = None,
    on_progress: OnProgress | None = None,
    effort: Effort | None = None,
    meta: Mapping[str, Any] | None = None,
) -> EvalLog:
    """The rows of every set with scores and answers, in one pass for all protocols asked for.

    Args:
        model: a causal LM with its active adapters; left in the mode it came in.
        fmt: prompts and tokenizer.
        data: what to evaluate.
        protocol: one name or several; greedy budgets share one pass, scores always do.
        retain_log: only checked, before any work: it must hold the same forget rows.
        limit: only the first so many rows of each set; the log and its summary say so.
        generate: False leaves out the answers, and with them ROUGE and model utility.
        key: names the weights (base, adapters, scales) in `resume_dir`.
        resume_dir: finished parts are kept here and reused for the same key, rows and settings.
        on_progress: called with a label, done and all.
        effort: sizes of batches; they do not change the result.
        meta: more to write into the log's `meta`.

    Raises:
        UserError: unknown protocol, rows that differ from the reference's, or protocols that cut
            these rows' texts at different lengths.
    """
    ranks.join()
    protocols = [protocol_named(p) for p in ([protocol] if isinstance(protocol, str) else protocol)]
    if resume_dir is not None and not key:
        raise ValueError("resume_dir needs a key that names the weights")
    if limit is not None and limit < 1:
        raise UserError(f"A limit of {limit} rows leaves nothing to evaluate.", "Use 1 or more.")
    rows = {name: found[: _most_rows(protocols)][:limit] for name, found in data.sets.items()}
    totals = {name: len(found) for name, found in data.sets.items()}
    if retain_log is not None:
        _check_reference(rows, totals, retain_log, protocols, limit)
    encoded = {name: encode_answers(fmt, found) for name, found in rows.items()}
    longest = max(map(longest_text, encoded.values()), default=0)
    work = _Work(
        model,
        fmt,
        _score_length(protocols, longest),
        _distinct([p.decoding for p in protocols]) if generate else (),
        Cache(resume_dir, _cache_key(model, fmt, key, effort or Effort())),
        on_progress or _silent,
        effort or Effort(),
    )
    with threads_for(model):
        sets = {
            name: SetRecord(name, work.run(name, found, encoded[name]), totals[name])
            for name, found in rows.items()
        }
    return EvalLog(sets, _meta(work, protocols, longest, limit, key) | dict(meta or {}))


def _cache_key(model: Any, fmt: PromptFormat, key: str, effort: Effort) -> str:
    """What every score and answer depends on beside its rows; sizes of batches do not count."""
    from adapters.base.load import base_view

    return key_of(
        weights=key,
        load=base_view(model),
        device=next(model.parameters()).device.type,
        template=fmt.name,
        stops=stop_tokens(model, fmt),
        engine=[effort.shared, effort.drafts],
    )


def _most_rows(protocols: Sequence[Protocol]) -> int | None:
    """How many rows of a set the widest protocol looks at; None for all."""
    counts = [p.max_rows for p in protocols if p.max_rows is not None]
    return max(counts) if len(counts) == len(protocols) else None


def _silent(label: str, done: int, total: int) -> None:
    """Nobody watches."""


def _distinct(decodings: Sequence[Decoding]) -> tuple[Decoding, ...]:
    return tuple({decoding.name: decoding for decoding in decodings}.values())


def _score_length(protocols: Sequence[Protocol], longest: int) -> int:
    lengths = sorted({p.max_length for p in protocols})
    if longest > lengths[0] and len(lengths) > 1:
        raise UserError(
            f"The protocols cut texts at {' and '.join(map(str, lengths))} tokens, and the longest "
            f"text has {longest}: they do not share their scores.",
            "Evaluate them one at a time.",
        )
    return lengths[-1]


def _check_reference(
    rows: Mapping[str, Sequence[Row]],
    totals: Mapping[str, int],
    retain_log: EvalLog,
    protocols: Sequence[Protocol],
    limit: int | None,
) -> None:
    """Refuses a reference of other rows before any work is done."""
    theirs = retain_log.sets.get("forget")
    if theirs is None or "forget" not in rows or any(r.question is None for r in theirs.rows):
        return
    bare = tuple(RowRecord(row.question, row.answer) for row in rows["forget"])
    ours = SetRecord("forget", bare, totals["forget"])
    for protocol in protocols:
        match_forget(ours, theirs, protocol, {"limit": limit})


def _meta(
    work: _Work, protocols: Sequence[Protocol], longest: int, limit: int | None, key: str
) -> dict[str, Any]:
    import torch
    import transformers

    first = next(work.model.parameters())
    return {
        "protocols": [p.name for p in protocols],
        "max_length": work.max_length,
        "longest_text": longest,
        "limit": limit,
        "key": key,
        "template": work.fmt.name,
        "device": first.device.type,
        "dtype": str(getattr(work.model, "dtype", first.dtype)).removeprefix("torch."),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }


@dataclass(frozen=True)
class _Work:
    """What all sets share: the model and how it is scored and answers."""

    model: torch.nn.Module
    fmt: PromptFormat
    max_length: int
    decodings: tuple[Decoding, ...]
    cache: Cache
    on_progress: OnProgress
    effort: Effort

    def run(
        self, name: str, rows: Sequence[Row], encoded: Sequence[EncodedRow]
    ) -> tuple[RowRecord, ...]:
        """The set's rows with scores and answers, from finished parts where they fit."""
        scored = self._scores(name, rows, encoded)
        drafts = [
            known_start(self.fmt, row.question, tokens.answer, record.agreed)
            if self.effort.drafts
            else Draft()
            for row, tokens, record in zip(rows, encoded, scored, strict=True)
        ]
        answers = self._answers(name, rows, drafts)
        return tuple(
            dataclasses.replace(row, generations={d: made[i] for d, made in answers.items()})
            for i, row in enumerate(scored)
        )

    def _scores(
        self, name: str, rows: Sequence[Row], encoded: Sequence[EncodedRow]
    ) -> list[RowRecord]:
        texts = [
            [row.question, row.answer, *(text.input_ids for text in tokens.texts)]
            for row, tokens in zip(rows, encoded, strict=True)
        ]
        entry = self.cache.entry(f"{name}-scores", max_length=self.max_length, texts=texts)
        if (stored := entry.read()) is not None:
            return _records(name, stored)

        def score(indices: Sequence[int]) -> list[RowRecord]:
            return score_rows(
                self.model,
                self.fmt,
                [rows[i] for i in indices],
                encoded=[encoded[i] for i in indices],
                max_length=self.max_length,
                batch_tokens=self.effort.batch_tokens,
                shared=self.effort.shared,
                on_progress=lambda done, total: self.on_progress(f"{name}: scores", done, total),
            )

        records = ranks.spread(range(len(rows)), score)
        entry.write([row_json(record) for record in records])
        return records

    def _answers(
        self, name: str, rows: Sequence[Row], drafts: Sequence[Draft]
    ) -> dict[str, list[Generation]]:
        prompts = [[row.question, row.answer, self.fmt.encode_prompt(row.question)] for row in rows]
        entries = {
            decoding: self.cache.entry(
                f"{name}-{decoding.name}", decoding=decoding, prompts=prompts
            )
            for decoding in self.decodings
        }
        stored = {decoding: entry.read() for decoding, entry in entries.items()}
        missing = [decoding for decoding in self.decodings if stored[decoding] is None]

        def answer(indices: Sequence[int]) -> list[dict[str, str]]:
            texts = generate_answers(
                self.model,
                self.fmt,
                [rows[i].question for i in indices],
                missing,
                batch_size=self.effort.batch_size,
                drafts=[drafts[i] for i in indices],
                on_progress=lambda done, total: self.on_progress(f"{name}: answers", done, total),
            )
            return [{d: column[i] for d, column in texts.items()} for i in range(len(indices))]

        texts = ranks.spread(range(len(rows)), answer) if missing else []
        generations: dict[str, list[Generation]] = {}
        for decoding, entry in entries.items():
            label = decoding.name
            if decoding in missing:
                answers = rouge_recall([each[label] for each in texts], [r.answer for r in rows])
                generations[label] = answers
                records = [
                    RowRecord(row.question, row.answer, generations={label: answer})
                    for row, answer in zip(rows, answers, strict=True)
                ]
                entry.write([row_json(record) for record in records])
            else:
                records = _records(label, stored[decoding])
                generations[label] = [record.generations[label] for record in records]
        return generations


def _records(name: str, stored: Sequence[Any]) -> list[RowRecord]:
    return [row_from_json(row, f"cached {name} row {i}") for i, row in enumerate(stored)]

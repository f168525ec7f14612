"""Evaluates a model with its active adapters: every set is scored and answered once, resumably.

The result is a log of rows. `metrics.summary.summarise` turns it into figures, under every protocol
whose scores and answers the log holds.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from adapters.base.load import base_view
from adapters.environment import evaluating, threads_for
from adapters.errors import UserError
from evaluation.cache import Cache, key_of
from evaluation.inference.generation import BATCH_SIZE, generate_answers, known_start, passes_of
from evaluation.inference.prefix_sharing import sharing_problem
from evaluation.inference.scoring import (
    BATCH_TOKENS,
    EncodedRow,
    OnProgress,
    about_model,
    cut_texts,
    encode_answers,
    longest_text,
    score_rows,
    silent,
)
from evaluation.logs.records import SETS, EvalLog, RowRecord, SetRecord, row_from_json
from evaluation.metrics.summary import match_forget
from evaluation.metrics.text import rouge_recall
from evaluation.protocols import DEFAULT, Decoding, Protocol, protocol_named
from unlearner import distributed as ranks
from unlearner.request.rows import Row
from unlearner.request.tofu import FORGET_SPLITS, load_split, split_name
from unlearner.tokens.decoding import Draft, stop_tokens
from unlearner.tokens.prompts import PromptFormat


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
        named = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: list(rows) for name, rows in named.items() if rows}


@dataclass(frozen=True)
class Effort:
    """How the work is done.

    Attributes:
        batch_tokens: tokens of a batch of padded rows, padding included.
        shared: compute what texts begin with alike once, instead of padded rows.
        drafts: start greedy answers with the tokens that scoring has shown already.
        batch_size: questions answered at once.
    """

    batch_tokens: int = BATCH_TOKENS
    shared: bool = True
    drafts: bool = True
    batch_size: int = BATCH_SIZE


def load_eval_data(forget_split: str, data: Path | None = None) -> EvalData:
    """TOFU's four evaluation sets; the forget set are the `_perturbed` rows of the split.

    `data` is a folder of TOFU's JSON-lines files, else the hub is read.

    Raises:
        UserError: no such forget split, or a split that cannot be read.
    """
    forget_split = split_name(forget_split)
    if forget_split not in FORGET_SPLITS:
        raise UserError(
            f"'{forget_split}' is not a forget split.", f"Choose {', '.join(FORGET_SPLITS)}."
        )
    return EvalData(*(load_split(f"{name}_perturbed", data) for name in (forget_split, *SETS[1:])))


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
    on_progress: OnProgress = silent,
    effort: Effort | None = None,
    meta: Mapping[str, Any] | None = None,
) -> EvalLog:
    """The rows of every set with scores and answers, in one pass for all protocols named.

    Args:
        model: a causal LM with its active adapters; its mode is restored.
        fmt: prompts and tokenizer.
        data: what to evaluate.
        protocol: one name or several; greedy budgets share one pass, scores always do.
        retain_log: checked before any work: it must hold the same forget rows.
        limit: only the first so many rows of each set; the log and its summary say so.
        generate: False leaves out the answers, and with them ROUGE and model utility.
        key, resume_dir: name of the weights (base, adapters, scales), and where results are cached.
        on_progress: called with a label, done and all.
        effort: sizes of batches; they do not change the result.
        meta: added to the log's `meta`.

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
    counts = [p.max_rows for p in protocols]
    most = None if None in counts else max(count or 0 for count in counts)
    rows = {name: each[:most][:limit] for name, each in data.sets.items()}
    totals = {name: len(each) for name, each in data.sets.items()}
    _check_reference(rows, totals, retain_log, protocols, limit)
    encoded = {name: encode_answers(fmt, each) for name, each in rows.items()}
    longest = max(map(longest_text, encoded.values()), default=0)
    effort = effort or Effort()
    # What every score and answer depends on beside its rows; sizes of batches do not count.
    made_by = key_of(
        weights=key,
        load=base_view(model),
        device=next(model.parameters()).device.type,
        template=fmt.to_json(),
        stops=stop_tokens(model, fmt),
        engine=[effort.shared, effort.drafts],
    )
    length = _score_length(protocols, longest)
    work = _Work(model, fmt, length, Cache(resume_dir, made_by), on_progress, effort)
    decodings = list({p.decoding.name: p.decoding for p in protocols}.values()) if generate else []
    with threads_for(model):
        padded_because = work.padded_because(encoded) if effort.shared else None
        shared = effort.shared and padded_because is None
        records = {name: work.scores(name, rows[name], encoded[name], shared) for name in rows}
        records = work.answers(rows, encoded, records, decodings) if decodings else records
    sets = {name: SetRecord(name, tuple(each), totals[name]) for name, each in records.items()}
    about = {
        "protocols": [p.name for p in protocols],
        "max_length": length,
        "longest_text": longest,
        "limit": limit,
        "key": key,
        **about_model(model, fmt),
    }
    if padded_because is not None:
        about["padded_because"] = padded_because
    odd: dict[str, dict[str, int]] = {"cut_rows": {}, "unknown_rows": {}}
    for name, each in encoded.items():
        odd["cut_rows"][name] = sum(longest_text([row]) > length for row in each)
        odd["unknown_rows"][name] = fmt.unknown(row.answer for row in each)
    for kind, by_set in odd.items():
        if any(by_set.values()):
            about[kind] = {name: count for name, count in by_set.items() if count}
    return EvalLog(sets, about | dict(meta or {}))


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
    retain_log: EvalLog | None,
    protocols: Sequence[Protocol],
    limit: int | None,
) -> None:
    """Refuses a reference of other rows before any work is done."""
    theirs = None if retain_log is None else retain_log.sets.get("forget")
    if theirs is None or "forget" not in rows or any(r.question is None for r in theirs.rows):
        return
    bare = tuple(RowRecord(row.question, row.answer) for row in rows["forget"])
    ours = SetRecord("forget", bare, totals["forget"])
    for protocol in protocols:
        match_forget(ours, theirs, protocol, {"limit": limit})


@dataclass(frozen=True)
class _Work:
    """What all sets share: the model and how it is scored and answers."""

    model: torch.nn.Module
    fmt: PromptFormat
    max_length: int
    cache: Cache
    on_progress: OnProgress
    effort: Effort

    def padded_because(self, encoded: Mapping[str, Sequence[EncodedRow]]) -> str | None:
        """Why texts cannot share prefixes: decided once, on questions of every set and the longest.

        None where they can.
        """
        every = [row for each in encoded.values() for row in each]
        if not every:
            return None
        longest = max(every, key=lambda row: longest_text([row]))
        firsts = [each[0] for each in encoded.values() if each]
        sample = [cut_texts(row, self.max_length) for row in (longest, *firsts)]
        entry = self.cache.entry("prefix-sharing", max_length=self.max_length, texts=sample)

        def problem() -> dict[str, str | None]:
            with evaluating(self.model):
                return {"problem": sharing_problem(self.model, sample)}

        found: str | None = entry.result(problem)["problem"]
        return found

    def scores(
        self, name: str, rows: Sequence[Row], encoded: Sequence[EncodedRow], shared: bool
    ) -> list[RowRecord]:
        """The rows of a set with their scores, from the cache where they are there."""
        texts = [
            [row.question, row.answer, *(text.input_ids for text in tokens.texts)]
            for row, tokens in zip(rows, encoded, strict=True)
        ]
        entry = self.cache.entry(f"{name}-scores", max_length=self.max_length, texts=texts)
        if (stored := entry.read()) is not None:
            return [row_from_json(row, f"cached {name} row {i}") for i, row in enumerate(stored)]

        def score(indices: Sequence[int]) -> list[RowRecord]:
            return score_rows(
                self.model,
                self.fmt,
                [rows[i] for i in indices],
                encoded=[encoded[i] for i in indices],
                max_length=self.max_length,
                batch_tokens=self.effort.batch_tokens,
                shared=shared,
                checked=True,
                on_progress=lambda done, total: self.on_progress(f"{name}: scores", done, total),
            )

        records = ranks.spread(range(len(rows)), score)
        entry.write([asdict(record) for record in records])
        return records

    def answers(
        self,
        rows: Mapping[str, Sequence[Row]],
        encoded: Mapping[str, Sequence[EncodedRow]],
        records: Mapping[str, Sequence[RowRecord]],
        decodings: Sequence[Decoding],
    ) -> dict[str, list[RowRecord]]:
        """`records` with answers: all sets in one pool, so that batches are full.

        Answers are cached by prompt after every batch: an interrupted run continues there, and a
        row that was answered before, in whatever set, is not answered again.
        """
        every = [row for each in rows.values() for row in each]
        drafts = [Draft()] * len(every)
        if self.effort.drafts:
            drafts = [
                known_start(self.fmt, row.question, tokens.answer, record.agreed)
                for n in rows
                for row, tokens, record in zip(rows[n], encoded[n], records[n], strict=True)
            ]
        prompts = [
            hashlib.sha256(repr(self.fmt.encode_prompt(row.question)).encode()).hexdigest()[:24]
            for row in every
        ]
        entries = {d.name: self.cache.entry(f"answers-{d.name}", decoding=d) for d in decodings}
        texts: dict[str, dict[str, str]] = {n: each.read() or {} for n, each in entries.items()}

        def answer(group: Sequence[Decoding], places: Sequence[int]) -> list[list[str]]:
            def store(batch: Mapping[str, Mapping[int, str]]) -> None:
                for name, new in batch.items():
                    texts[name] |= {prompts[places[i]]: text for i, text in new.items()}
                    entries[name].write(texts[name])

            by_decoding = generate_answers(
                self.model,
                self.fmt,
                [every[i].question for i in places],
                group,
                batch_size=self.effort.batch_size,
                drafts=[drafts[i] for i in places],
                on_batch=store,
                on_progress=lambda done, total: self.on_progress("answers", done, total),
            )
            return [[by_decoding[d.name][i] for d in group] for i in range(len(places))]

        for group in passes_of(decodings):
            names = [decoding.name for decoding in group]
            missing = [
                i for i, prompt in enumerate(prompts) if any(prompt not in texts[n] for n in names)
            ]
            answers = ranks.spread(missing, partial(answer, group)) if missing else []
            for column, name in enumerate(names if missing else ()):
                pairs = zip(missing, answers, strict=True)
                texts[name] |= {prompts[i]: each[column] for i, each in pairs}
                entries[name].write(texts[name])
        truths = [row.answer for row in every]
        generations = {
            name: rouge_recall([answers_by_prompt[prompt] for prompt in prompts], truths)
            for name, answers_by_prompt in texts.items()
        }
        place = itertools.count()

        def answered(record: RowRecord) -> RowRecord:
            i = next(place)
            return replace(record, generations={n: each[i] for n, each in generations.items()})

        return {name: list(map(answered, each)) for name, each in records.items()}

"""What can be known and refused of a forget run before anything is loaded."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from adapters.base.fingerprint import BaseFingerprint, fingerprint_base, require_same_base
from adapters.base.load import BaseSpec, load_tokenizer, resolve_base
from adapters.digests import digest_rows, key_id, mark, store_key
from adapters.errors import UserError, did_you_mean
from unlearner.config import TrainConfig, UnlearnConfig, streams_of
from unlearner.request.alternates import alternate_answers
from unlearner.request.past_requests import (
    Earlier,
    check_guard,
    recall,
    requests_in_force,
    require_all_rows,
    without_rows_of,
)
from unlearner.request.rows import Request, Row
from unlearner.tokens.batch_plan import Rows
from unlearner.tokens.prompts import PromptFormat, Template, encode_rows, prompt_format

if TYPE_CHECKING:
    from pathlib import Path

    from adapters.store.states import ActiveAdapter
    from adapters.store.store import AdapterStore


@dataclass(frozen=True)
class Prepared:
    """A run before anything is loaded: encoded rows, parents, and the key of its checkpoints."""

    request: Request
    base: BaseSpec
    config: UnlearnConfig
    rows: Rows
    fmt: PromptFormat
    fingerprint: BaseFingerprint
    parents: tuple[ActiveAdapter, ...]
    digests: dict[str, dict[str, Any]]
    key: str
    supersedes: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def prepare(
    request: Request,
    base: BaseSpec,
    config: UnlearnConfig,
    store: AdapterStore | None,
    *,
    on_stack: bool | None = None,
    template: Template = "auto",
    refusals: Sequence[str] = (),
    guard: Sequence[Row] = (),
    replaces: Sequence[str] = (),
) -> Prepared:
    """Everything that can be known and refused without loading the model.

    Raises:
        UserError: no retain rows, refusals that are needed but missing, rows without an answer
            token, a stack that is asked for but empty, an unknown schedule or optimizer.
        BaseMismatch: the store belongs to another base.
    """
    streams = streams_of(config.objective)
    key = store_key()
    replaced = _replaced(store, replaces, request.rows, key)
    in_force = requests_in_force(store, key, replaced)
    retain, taken = without_rows_of(in_force, request.retain, key)
    others, told_of = _unowned(request.others, in_force, key)
    request = replace(request, retain=retain, others=others)
    _check_rows(request, config, refusals)
    _check_names(config.train)
    folder = resolve_base(base.name, base.revision)
    if config.objective.name == "rmu":
        _check_layer(config, folder)
    fingerprint = fingerprint_base(folder)
    recorded = store.base() if store is not None else None
    if recorded is not None:
        require_same_base(recorded, fingerprint)
    parents = _parents(store, on_stack, replaced)
    earlier = [one for one in in_force if one.slug in {parent.slug for parent in parents}]
    check_guard(earlier, guard, request.rows, key)
    fmt = prompt_format(load_tokenizer(str(folder)), template)
    rows = _encode(request, config, fmt, refusals if "refusal" in streams else (), guard)
    digests = {
        "forget": _marked(key, request.rows, request.kind),
        "retain": _digest(key, request.retain, "retain"),
        **_alternates_digest(key, request, rows),
    }
    what = {
        "config": recipe(config, len(request.rows)),
        "digests": digests,
        "base": fingerprint.digest,
        "spec": asdict(base),
        "parents": [(parent.slug, parent.scale) for parent in parents],
        "template": fmt.name,
        "refusals": list(refusals) if "refusal" in streams else [],
        "guard": _digest(key, guard, "guard")["digest"],
        "replaces": replaced,
    }
    return Prepared(
        request,
        base,
        config,
        rows,
        fmt,
        fingerprint,
        parents,
        digests,
        _run_key(what),
        replaced,
        tuple(_notes(in_force, {"retain": taken, "alternate": told_of})),
    )


def _check_rows(request: Request, config: UnlearnConfig, refusals: Sequence[str]) -> None:
    streams = streams_of(config.objective)
    wants = {"retain": f"Objective {config.objective.name}"}
    if not request.others:
        wants["alternate"] = "--alternates"
    needing = [words for stream, words in wants.items() if stream in streams]
    if needing and not request.retain:
        raise UserError(
            f"{needing[0]} needs retain rows and {request.name} has none.",
            "Give them with --retain FILE, or the folder of TOFU with --data.",
        )
    if "refusal" in streams and not refusals:
        raise UserError(
            f"The objective {config.objective.name} needs refusal answers.",
            "Put an idontknow.jsonl into the data folder.",
        )


def _check_layer(config: UnlearnConfig, folder: Path) -> None:
    """Refuses a block that the model does not have."""
    from unlearner.memory.estimate import read_shape
    from unlearner.training.hidden import layer_of

    layer_of(config.objective.rmu_layer, read_shape(folder)["num_hidden_layers"])


def _check_names(train: TrainConfig) -> None:
    """Refuses what transformers would refuse only after the model is loaded."""
    from transformers import SchedulerType
    from transformers.training_args import OptimizerNames

    for name, known in (("lr_scheduler_type", SchedulerType), ("optim", OptimizerNames)):
        given, choices = getattr(train, name), [str(choice.value) for choice in known]
        if given not in choices:
            raise UserError(f"There is no {name} '{given}'.", did_you_mean(given, choices))


def recipe(config: UnlearnConfig, n_forget: int) -> dict[str, Any]:
    """The settings that decide the result: how a step is cut up and recomputed does not, so that
    a run that did not fit can go on with other such settings.
    """
    told = config.to_json()
    for name in ("per_device_train_batch_size", "gradient_accumulation_steps"):
        del told["train"][name]
    for name in ("gradient_checkpointing", "padded"):
        del told["train"][name]
    return {**told, "pairs_per_step": config.train.batch_size(n_forget)}


def _run_key(what: Mapping[str, Any]) -> str:
    """The name of a run's folder: another one for everything that changes its result."""
    text = json.dumps(what, sort_keys=True)
    return f"run-{hashlib.sha256(text.encode()).hexdigest()[:16]}"


def _replaced(
    store: AdapterStore | None, refs: Sequence[str], rows: Sequence[Row], key: bytes
) -> tuple[str, ...]:
    """Slugs of the adapters to replace, all of whose rows are among `rows`."""
    if store is None:
        return ()
    slugs = tuple(store.get(ref).slug for ref in refs)
    require_all_rows([recall(store, slug, key) for slug in slugs], rows, key)
    return slugs


def _parents(
    store: AdapterStore | None, on_stack: bool | None, replaced: Sequence[str]
) -> tuple[ActiveAdapter, ...]:
    """The stack to train on: the active one without what is to be replaced."""
    active = store.active() if store is not None and on_stack is not False else []
    parents = tuple(one for one in active if one.slug not in replaced)
    if on_stack and not parents:
        raise UserError(
            "There is no active stack to train on.",
            "Activate adapters first, or leave --on-stack away.",
        )
    if store is None:
        return ()
    for one in parents:
        lost = [p for p in store.catalog.parents_of(one.slug)[0] if p in replaced]
        if lost:
            raise UserError(
                f"{one.slug} was trained on top of {lost[0]}, which is to be replaced.",
                f"Replace {one.slug} as well and give its rows, or train with --independent.",
            )
    return parents


def _encode(
    request: Request,
    config: UnlearnConfig,
    fmt: PromptFormat,
    refusals: Sequence[str],
    guard: Sequence[Row],
) -> Rows:
    length = config.train.max_length
    questions = [row.question for row in request.rows]

    def encoded(rows: Sequence[Row], what: str) -> list[Any]:
        return encode_rows(fmt, [(row.question, row.answer) for row in rows], length, what)

    alternates: list[list[str]] = []
    if "alternate" in streams_of(config.objective):
        pool = request.others or request.retain
        alternates = alternate_answers(request.rows, pool, config.objective.alternates)

    return Rows(
        encoded(request.rows, "forget"),
        encoded(request.retain, "retain"),
        [encode_rows(fmt, [(q, r) for r in refusals], length, "refusal") for q in questions],
        encoded(guard, "guard"),
        [
            encode_rows(fmt, [(question, answer) for answer in answers], length, "alternate")
            for question, answers in zip(questions, alternates, strict=bool(alternates))
        ],
    )


def _digest(key: bytes, rows: Sequence[Row], kind: str) -> dict[str, Any]:
    pairs = [(row.question, row.answer) for row in rows]
    return {"n": len(pairs), "digest": digest_rows(key, pairs), "kind": kind}


def _unowned(
    rows: Sequence[Row], in_force: Sequence[Earlier], key: bytes
) -> tuple[tuple[Row, ...], dict[str, int]]:
    """`without_rows_of`, but some must be left: the retain rows must not come in their place."""
    left, taken = without_rows_of(in_force, rows, key)
    if rows and not left:
        raise UserError(
            "All rows that alternates are to come from belong to earlier requests.",
            "Give others with --alternates-from, or leave it away to take the retain rows.",
        )
    return left, taken


def _alternates_digest(key: bytes, request: Request, rows: Rows) -> dict[str, dict[str, Any]]:
    """Of the rows whose answers are alternates, where they are not the retain rows."""
    named = rows.alternates and request.others
    return {"alternates": _digest(key, request.others, "alternates")} if named else {}


def _marked(key: bytes, rows: Sequence[Row], kind: str) -> dict[str, Any]:
    """The digest with one mark a row, by which later requests recognise these rows."""
    marks = [mark(key, row.question) for row in rows]
    return {**_digest(key, rows, kind), "key_id": key_id(key), "marks": marks}


def _notes(in_force: Sequence[Earlier], taken: Mapping[str, Mapping[str, int]]) -> list[str]:
    notes = [
        f"{kind} rows that belong to {slug} and are left out: {n}"
        for kind, counts in taken.items()
        for slug, n in counts.items()
    ]
    return notes + [
        f"some rows of {one.slug} cannot be recognised among the retain rows: {one.unknown}"
        for one in in_force
        if one.unknown
    ]

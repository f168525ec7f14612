"""From a forget request to a forget adapter in the store: the one recipe, top to bottom."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from filelock import FileLock, Timeout
from peft import LoraConfig

from adapters.base.fingerprint import BaseFingerprint, fingerprint_base, require_same_base
from adapters.base.load import BaseSpec, base_view, load_base, load_tokenizer, resolve_base
from adapters.digests import digest_rows, key_id, mark, store_key
from adapters.environment import describe, return_freed_memory, threads_for
from adapters.errors import Diverged, DoesNotFit, Interrupted, UserError
from adapters.guard_records import teacher_path, write_teacher
from adapters.lora.format import WEIGHTS_NAME
from adapters.lora.stack import add_trainable, detach, load_stack, parents_only, save_adapter
from adapters.lora.targets import check_coverage, default_targets
from adapters.store.catalog import StoredAdapter
from adapters.store.manifest import ForgetManifest
from adapters.store.states import ActiveAdapter
from adapters.store.store import AdapterStore
from unlearner import distributed
from unlearner.config import ALL_LINEAR, TARGET_MODULES, LoraShape, UnlearnConfig, streams_of
from unlearner.defaults import CAUSES, suited
from unlearner.interrupt import Progress, StopRequest
from unlearner.memory.plan import BasePrecision, MemoryPlan, meta_model, read_shape
from unlearner.memory.probe import budget, is_out_of_memory, size_text
from unlearner.objectives.directions import ProtectedDirections, protected_rows
from unlearner.objectives.guard import GuardRow, pack_teacher, read_teacher, teach, without_target
from unlearner.objectives.hidden import layer_of
from unlearner.objectives.likelihood import packs_exactly
from unlearner.request.alternates import alternate_answers
from unlearner.request.neighbours import nearest_rows
from unlearner.request.past_requests import (
    Earlier,
    check_guard,
    recall,
    requests_in_force,
    require_all_rows,
    without_rows_of,
)
from unlearner.request.rows import Request, Row
from unlearner.tokens.batch_plan import Rows, plan_of
from unlearner.tokens.packing import pack_attention
from unlearner.tokens.prompts import (
    NO_SYSTEM,
    Encoded,
    PromptFormat,
    Template,
    encode_rows,
    pad_id,
    prompt_format,
)
from unlearner.training.checkpoint import last_checkpoint
from unlearner.training.early_stop import EarlyStop, StopAt
from unlearner.training.general import longest_rows, own_prompts, split_held_out, taught_prompts
from unlearner.training.loop import TrainingLoop
from unlearner.training.optimizer import check_names
from unlearner.training.outcome import hardly_known, measured, outcome, watched_rows
from unlearner.training.references import reference_nlls
from unlearner.training.target import (
    RETRAIN_NLL,
    SETTLE,
    WORDS,
    mean_nll,
    stop_at_target,
    with_target,
)
from unlearner.training.unlearning import UnlearnData, UnlearnTask

# The name of the adapter in training.
NEW = "new"
AfterStep = Callable[[int, int, Any], None]


@dataclass(frozen=True)
class RunOptions:
    """What a run takes besides request, base and settings.

    Attributes:
        on_stack: train on top of the store's active stack, with the parents frozen and active;
            None does so when a stack is active.
        label: a name for people; opaque by default.
        resume: continue an interrupted run of the same request and settings.
        restart: discard such a run instead. Without either it is refused.
        template: prompt format, see `prompt_format`.
        system: system prompt, see `PromptFormat`.
        refusals: answers for the objectives idk and dpo.
        neighbours: keep only so many of the retain rows, those nearest to the request.
        guard: rows of earlier requests of the stack, which must stay forgotten
            (`objectives.guard`). Without them the teachers recorded with `keep_teacher` are used,
            where there are any.
        replaces: adapters that this one takes the place of (consolidation, or a rebase of one);
            their rows must all be in the request.
        keep_teacher: record what the trained stack answers on these rows outside the store, for
            the guard of later requests. The record holds the rows as tokens.
        memory_limit: bytes that the run may use, for instance of a smaller card than this one; by
            default what is free.
        given: names of the settings that the user gave; all others are chosen for the request and
            the model (`unlearner.defaults`). None: the settings are used as they are.
        target: the mean NLL of whole forget answers at which the run ends (`training.target`): a
            number, or "auto" to measure it on the model; 0 for none. None: that of the settings.
        unseen: rows of the same kind that the base never saw, for "auto"; by default alternate
            answers to the forget questions.
        general: prompts whose answers are held where `general_weight` or `protected_directions` is
            above 0; by default those of the package.
        summarise: measure forget, retain and general rows before and after the run.
    """

    on_stack: bool | None = None
    label: str = ""
    resume: bool = False
    restart: bool = False
    template: Template = "auto"
    system: str | None = None
    refusals: Sequence[str] = ()
    neighbours: int | None = None
    guard: Sequence[Row] = ()
    replaces: Sequence[str] = ()
    keep_teacher: bool = False
    memory_limit: int | None = None
    given: Collection[str] | None = None
    target: float | Literal["auto"] | None = None
    unseen: Sequence[Row] = ()
    general: Sequence[str] = ()
    summarise: bool = False


@dataclass(frozen=True)
class Prepared:
    """A run before anything is loaded: encoded rows, parents, and the key of its checkpoints.

    `unseen` are the rows whose NLL under the model will be its target; empty where it has one.
    `prompts` are those whose answers are held. `chosen` says by name why a setting was chosen that
    nobody gave, `target_from` whose NLL the target is.
    """

    request: Request
    base: BaseSpec
    config: UnlearnConfig
    options: RunOptions
    rows: Rows
    fmt: PromptFormat
    fingerprint: BaseFingerprint
    parents: tuple[ActiveAdapter, ...]
    digests: dict[str, dict[str, Any]]
    key: str
    supersedes: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    unseen: Sequence[Encoded] = ()
    prompts: Sequence[str] = ()
    chosen: Mapping[str, str] = field(default_factory=dict)
    target_from: str = ""


def unlearn(
    request: Request,
    base: BaseSpec,
    config: UnlearnConfig,
    store: AdapterStore,
    options: RunOptions | None = None,
    *,
    model: Any = None,
    stop_at: StopAt | None = None,
    after_step: AfterStep | None = None,
    on_progress: Progress | None = None,
) -> StoredAdapter:
    """Train the forget adapter of `request` on the frozen base and publish it (ready).

    Args:
        request: forget and retain rows.
        base: which base, and how it is loaded.
        config: objective, LoRA shape and training.
        store: where the adapter is published, and where its checkpoints are meanwhile.
        options: stack, guard, label, resuming.
        model: the base as `load_base` gives it, where it is loaded already; it is bare afterwards.
        stop_at: a measure against a retrain reference that ends the run once its sign turns.
        after_step: called with the step, the number of steps and the model after every step.
        on_progress: gets a dict per event: "chosen" (a setting, with the reason), "note", "load",
            "from-start" (nothing was saved to resume), "probe" (the peak of two steps), "train"
            (one per step), "gap" (a reading of `stop_at`), "stopping", "publish".

    Raises:
        UserError: whatever `prepare` refuses, or a loss that is not finite.
        DoesNotFit: it needs more memory than there is; where that showed in the middle of the run,
            a checkpoint is kept.
        Interrupted: stopped by Ctrl-C; a checkpoint is kept, and `resume` continues it.
    """
    report = on_progress or (lambda event: None)
    run = prepare(request, base, config, store, options)
    for text in run.chosen.values():
        report({"event": "chosen", "text": text})
    for text in run.notes:
        report({"event": "note", "text": text})
    distributed.join()
    with ExitStack() as stack:
        # Before the base is loaded: an interrupted run of this request is refused at once.
        key = run.key if stop_at is None else f"{run.key}-{stop_at.key}"
        work = stack.enter_context(run_folder(store, key, run.options, report))
        report({"event": "load", "base": base.name, "parents": [p.slug for p in run.parents]})
        if model is not None:
            stack.callback(detach, model)
        model, view = load_with_adapter(run, store, model)
        run, teachers = guard_targets(model, run, store, report)
        run, general, held_out = hold_general(model, run, report)
        run, stop_at = find_target(model, run, stop_at, report)
        summarised = _summary(model, run, held_out, report)
        summary = train(
            model,
            run,
            teachers,
            work,
            general=general,
            stop_at=stop_at,
            after_step=after_step,
            report=report,
        )
        require_update(model)
        summary |= summarised()
        if run.chosen:
            summary["chosen"] = {name: CAUSES.get(name, "model-size") for name in run.chosen}
        if run.target_from:
            summary["target_from"] = run.target_from
        report({"event": "publish"})
        summary["guard_rows"] = len(teachers)
        adapter = distributed.from_first(
            lambda: publish(model, run, view, store, summary, work / "metrics.jsonl")
        )
        if run.options.keep_teacher and distributed.rank() == 0:
            record_teacher(model, run, adapter)
    return adapter


# What can be known and refused before anything is loaded


def prepare(
    request: Request,
    base: BaseSpec,
    config: UnlearnConfig,
    store: AdapterStore | None,
    options: RunOptions | None = None,
) -> Prepared:
    """Encode the rows and refuse what cannot work, without loading the model.

    Raises:
        UserError: no retain rows, refusals that are needed but missing, rows without an answer
            token, an empty stack, an unknown schedule or optimizer.
        BaseMismatch: the store belongs to another base.
    """
    options = options or RunOptions()
    key, notes = store_key(), list[str]()
    replaced = _replaced(store, options.replaces, request.rows, key)
    in_force = requests_in_force(store, key, replaced)
    request = _own_rows(request, options, in_force, key, notes)
    _check_rows(request, config, options.refusals)
    check_names(config.train)
    folder = resolve_base(base.name, base.revision)
    if config.objective.name == "rmu":
        _check_layer(config, folder)
    meta = meta_model(folder)
    config = replace(config, lora=with_targets(config.lora, meta))
    target, reasons = options.target, dict[str, str]()
    if options.given is not None:
        weights = sum(p.numel() for p in meta.parameters())
        on_cpu = base.device == "cpu" or (base.device == "auto" and not torch.cuda.is_available())
        chosen = suited(
            config, options.given, len(request.rows), weights, target=target, on_cpu=on_cpu
        )
        config, reasons = chosen.config, dict(chosen.reasons)
        target = "auto" if chosen.finds_target else target
    if target not in (None, "auto"):
        config = with_target(config, float(target), margin="gamma" not in (options.given or ()))
    fingerprint = fingerprint_base(folder)
    recorded = store.base() if store is not None else None
    if recorded is not None:
        require_same_base(recorded, fingerprint)
    parents = _parents(store, options.on_stack, replaced)
    earlier = [past for past in in_force if past.slug in {parent.slug for parent in parents}]
    check_guard(earlier, options.guard, request.rows, key)
    fmt = prompt_format(load_tokenizer(str(folder)), options.template, options.system)
    refusals = options.refusals if "refusal" in streams_of(config.objective) else ()
    rows = _encode(request, config, fmt, refusals, options.guard)
    prompts: tuple[str, ...] = ()
    if config.objective.general_weight or config.objective.protected_directions:
        pairs = config.train.steps(len(rows.forget)) * config.train.batch_size(len(rows.forget))
        prompts = tuple(options.general or own_prompts(pairs))
        rows = replace(rows, general=longest_rows(fmt, prompts))
    unseen = [(row.question, row.answer) for row in options.unseen] if target == "auto" else []
    if target == "auto" and not unseen:
        try:
            unseen = _alternates(request)
        except UserError as error:
            if options.target == "auto":
                raise UserError(
                    f"The target cannot be measured: {error.problem}",
                    "Give rows that the base never saw with --unseen ROWS, or a number with "
                    "--target.",
                ) from error
            # A target that nobody asked for is left out where it cannot be measured.
            del reasons["target"]
            notes.append(f"no target, all steps are taken: {error.problem.rstrip('.')}")
    notes += [
        f"{n} of {total} {name} rows are cut at {config.train.max_length} tokens: the end of their "
        "answers is not trained (raise --max-length)"
        for name, n, total in rows.cut
    ]
    for name, encoded in (("forget", rows.forget), ("retain", rows.retain)):
        if n := fmt.unknown(encoded):
            notes.append(f"{n} of {len(encoded)} {name} rows {fmt.about_unknown}")
    encoded_unseen = tuple(encode_rows(fmt, unseen, config.train.max_length, "unseen"))
    marks = [mark(key, row.question) for row in request.rows]
    digests = {
        "forget": {
            **_digest(key, request.rows, request.kind),
            "key_id": key_id(key),
            "marks": marks,  # by which later requests recognise these rows
        },
        "retain": _digest(key, request.retain, "retain"),
    }
    if rows.alternates and request.others:
        digests["alternates"] = _digest(key, request.others, "alternates")
    depends_on = {
        "config": config.recipe(len(request.rows)),
        "digests": digests,
        "base": fingerprint.digest,
        "spec": asdict(base),
        "parents": [(parent.slug, parent.scale) for parent in parents],
        "prompt": fmt.to_json(),
        "refusals": list(refusals),
        "guard": _digest(key, options.guard, "guard")["digest"],
        "replaces": replaced,
        "general": prompts,
        "unseen": [row.input_ids for row in encoded_unseen],
    }
    text = json.dumps(depends_on, sort_keys=True)
    return Prepared(
        request,
        base,
        config,
        options,
        rows,
        fmt,
        fingerprint,
        parents,
        digests,
        f"run-{hashlib.sha256(text.encode()).hexdigest()[:16]}",
        replaced,
        tuple(notes),
        encoded_unseen,
        prompts,
        reasons,
    )


def _own_rows(
    request: Request,
    options: RunOptions,
    in_force: Sequence[Earlier],
    key: bytes,
    notes: list[str],
) -> Request:
    """The request with the retain rows and alternates that no earlier request wants forgotten."""
    retain = request.retain
    if options.neighbours is not None:
        nearest = nearest_rows(request.rows, retain, options.neighbours)
        mean = sum(nearest.likeness) / len(nearest.likeness)
        notes.append(
            f"{len(nearest.rows)} neighbours of {len(retain)} rows, mean similarity {mean:.2f}; "
            f"left out as part of the request: {nearest.left_out}"
        )
        retain = tuple(nearest.rows)
    retain, of_retain = without_rows_of(in_force, retain, key)
    others, of_others = without_rows_of(in_force, request.others, key)
    if request.others and not others:
        # The retain rows must not silently take their place.
        raise UserError(
            "All rows that alternates are to come from belong to earlier requests.",
            "Give others with --alternates-from, or leave it out to use the retain rows.",
        )
    notes += [
        f"{kind} rows that belong to {slug} and are left out: {n}"
        for kind, counts in (("retain", of_retain), ("alternate", of_others))
        for slug, n in counts.items()
    ]
    notes += [
        f"some rows of {past.slug} cannot be recognised among the retain rows: {past.unknown}"
        for past in in_force
        if past.unknown
    ]
    return replace(request, retain=retain, others=others)


def _alternates(request: Request) -> list[tuple[str, str]]:
    """The forget questions with another answer each: rows that the base never saw.

    Raises:
        UserError: there is no other answer for some question.
    """
    answers = alternate_answers(request.rows, request.others or request.retain, 1)
    return [(row.question, answer) for row, (answer,) in zip(request.rows, answers, strict=True)]


def _check_rows(request: Request, config: UnlearnConfig, refusals: Sequence[str]) -> None:
    streams = streams_of(config.objective)
    needs = {"retain": f"Objective {config.objective.name}"}
    if not request.others:
        needs["alternate"] = "--alternates"
    needing = [words for stream, words in needs.items() if stream in streams]
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
    """Refuse a block that the model does not have."""
    layer_of(config.objective.rmu_layer, read_shape(folder).layers)


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
    """The stack to train on: the active one without the adapters to be replaced."""
    active = store.active() if store is not None and on_stack is not False else []
    parents = tuple(adapter for adapter in active if adapter.slug not in replaced)
    if on_stack and not parents:
        raise UserError(
            "There is no active stack to train on.",
            "Activate adapters first, or leave out --on-stack.",
        )
    if store is None:
        return ()
    for parent in parents:
        lost = [p for p in store.catalog.parents_of(parent.slug)[0] if p in replaced]
        if lost:
            raise UserError(
                f"{parent.slug} was trained on top of {lost[0]}, which is to be replaced.",
                f"Replace {parent.slug} as well and give its rows, or train with --independent.",
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


def prompt_settings(run: Prepared) -> dict[str, Any]:
    """What a manifest says of the prompts, and how many rows were cut (only where some were).

    A store holds no text: of a system prompt, given or the template's own, it keeps a hash.
    """
    cut = {name: n for name, n, _ in run.rows.cut}
    prompt = run.fmt.to_json()
    for name in ("system", "preamble"):
        text = prompt[name]
        if text is not None and text != NO_SYSTEM:
            prompt[name] = f"sha256:{hashlib.sha256(text.encode()).hexdigest()[:16]}"
    return {
        "template": run.fmt.name,
        "prompt": prompt,
        **({"cut_rows": cut} if cut else {}),
    }


def plan(run: Prepared, memory_limit: int | None = None) -> dict[str, Any]:
    """What a run would do, for `--dry-run`: rows, steps, adapter size and a memory estimate.

    With `memory_limit` in bytes it also says whether the high end of the estimate fits, and if not
    the smallest changes that would.
    """
    on_gpu = run.base.device.startswith("cuda") or (run.base.device == "auto" and _has_gpu())
    float32 = run.base.dtype == "float32" or (run.base.dtype == "auto" and not on_gpu)
    precision = BasePrecision(run.base.load_in_4bit, 4 if float32 else 2, on_gpu)
    memory = _memory_plan(run, precision)
    setting = run.config.train.gradient_checkpointing
    if setting == "auto" and memory_limit is not None:
        setting = memory.choose_checkpointing(memory_limit)
    memory = memory.with_train(gradient_checkpointing=setting)
    estimate = memory.estimate()
    fits = None if memory_limit is None else estimate.high <= memory_limit
    change = memory.smallest_change(memory_limit) if memory_limit and not fits else None
    n, train = len(run.request.rows), run.config.train
    return {
        "request": run.request.name,
        "forget_rows": n,
        "retain_rows": len(run.request.retain),
        "parents": [parent.slug for parent in run.parents],
        "steps": train.steps(n),
        "pairs_per_step": train.batch_size(n),
        "longest_row_tokens": max(run.rows.lengths),
        "adapter_parameters": memory.adapter_parameters,
        "memory": estimate.to_json(),
        "memory_limit": memory_limit,
        "fits": fits,
        "changes_that_fit": list(change.flags) if change is not None else [],
        "gradient_checkpointing": setting,
        "settings": run.config.to_json(),
        "replaces": list(run.supersedes),
        "guard_rows": len(run.rows.guard),
        "cut_rows": {name: n for name, n, _ in run.rows.cut},
        "prompt": run.fmt.to_json(),
        "notes": [*run.chosen.values(), *run.notes],
    }


def _has_gpu() -> bool:
    return torch.cuda.is_available()


def _memory_plan(run: Prepared, precision: BasePrecision) -> MemoryPlan:
    shape = read_shape(resolve_base(run.base.name, run.base.revision))
    return MemoryPlan(shape, run.config, precision, run.rows.lengths, len(run.rows.forget))


# Loading


def load_with_adapter(
    run: Prepared, store: AdapterStore, base: Any = None
) -> tuple[Any, dict[str, Any]]:
    """The base with frozen, active parents and one new trainable adapter; and how it is held."""
    base = base if base is not None else load_base(run.base)
    view = base_view(base)
    slugs = [parent.slug for parent in run.parents]
    scales = {parent.slug: parent.scale for parent in run.parents}
    model = load_stack(base, store, slugs, scales, base=run.fingerprint)
    torch.manual_seed(run.config.train.seed)
    return add_trainable(model, NEW, lora_config(run.config.lora), slugs), view


def with_targets(shape: LoraShape, model: Any) -> LoraShape:
    """The shape with the names of the layers that are adapted in `model`, on any device.

    Raises:
        UserError: a target that is not a linear layer of every block; those that are are named.
    """
    if shape.target_modules != ALL_LINEAR:
        check_coverage(model, shape.target_modules)
        return shape
    names = default_targets(model)
    check_coverage(model, names)  # also that the files name these weights as the model does
    # A Llama's in the order in which the manifests of earlier versions have them.
    return replace(shape, target_modules=TARGET_MODULES if {*names} == {*TARGET_MODULES} else names)


def lora_config(shape: LoraShape) -> Any:
    """PEFT's configuration of an adapter whose targets are resolved."""
    return LoraConfig(
        r=shape.lora_r,
        lora_alpha=shape.lora_alpha,
        lora_dropout=shape.lora_dropout,
        target_modules=list(shape.target_modules),
        bias="none",
        task_type="CAUSAL_LM",
    )


def guard_targets(
    model: Any, run: Prepared, store: AdapterStore, report: Progress
) -> tuple[Prepared, list[GuardRow]]:
    """The run with its guard rows, and their teachers: the stack's own answers, or records."""
    slugs = [parent.slug for parent in run.parents]
    if not slugs or run.config.objective.guard_weight == 0:
        return replace(run, rows=replace(run.rows, guard=())), []
    if run.rows.guard:
        with parents_only(model, slugs):
            teachers = teach(model, run.rows.guard, pad_id(run.fmt.tokenizer))
    else:
        teachers = _recorded_teachers(run, store)
    by_kl = sum(bool(teacher.target.isnan().any()) for teacher in teachers)
    text = "earlier requests are unprotected: pass --guard, or train them with --keep-teacher"
    if teachers:
        text = f"guarded rows of earlier requests: {len(teachers)}"
        if by_kl:
            text += f", {by_kl} of them by the KL alone: give their rows with --guard"
    report({"event": "note", "text": text})
    rows = replace(run.rows, guard=[teacher.row for teacher in teachers])
    return replace(run, rows=rows), teachers


def _recorded_teachers(run: Prepared, store: AdapterStore) -> list[GuardRow]:
    """The teachers that were recorded when the parents were trained.

    A parent at another strength has another NLL on its rows than its record: that half of the
    guard would undo a calibration, so it is left out.
    """
    teachers: list[GuardRow] = []
    for parent in run.parents:
        path = teacher_path(store.get(parent.slug).manifest.files[WEIGHTS_NAME]["sha256"])
        rows = read_teacher(path) if path.is_file() else []
        teachers += rows if parent.scale == 1.0 else [without_target(row) for row in rows]
    return teachers


def hold_general(
    model: Any, run: Prepared, report: Progress
) -> tuple[Prepared, list[GuardRow], list[GuardRow]]:
    """The run with its general rows, their teachers, and those that are only measured."""
    if not run.prompts:
        return run, [], []
    taught = taught_prompts(model, run.fmt, run.prompts, run.fingerprint.digest, report)
    general, held_out = split_held_out(taught)
    return replace(run, rows=replace(run.rows, general=[r.row for r in general])), general, held_out


def find_target(
    model: Any, run: Prepared, stop_at: StopAt | None, report: Progress
) -> tuple[Prepared, StopAt | None]:
    """The run with its target, measured where it has to be, and what stops it there."""
    pad = pad_id(run.fmt.tokenizer)
    if run.unseen:
        nll = round(mean_nll(model, run.unseen, pad), 3)
        source, text = "unseen", "that of unseen rows"
        if not run.options.unseen:
            source, text = "alternates", "that of alternate answers to the forget questions"
            if nll < RETRAIN_NLL and len(run.fmt.tokenizer) >= WORDS:
                text = f"the usual NLL of models that never saw the rows ({text} is {nll:.2f})"
                source, nll = "retrained-models", RETRAIN_NLL
        report({"event": "note", "text": f"target {nll:.2f} nats per token, {text}"})
        run = replace(run, config=with_target(run.config, nll), target_from=source)
    target = run.config.objective.target
    if target and stop_at is None:
        objective, seed = run.config.objective, run.config.train.seed
        # Retained rows lose what alternate answers teach, and come back in the steps after it.
        usual_settle = SETTLE if objective.alternates else 0
        settle = usual_settle if objective.settle < 0 else objective.settle
        stop_at = stop_at_target(run.rows.forget, target, pad, seed, settle)
    return run, stop_at


def _summary(
    model: Any, run: Prepared, held_out: Sequence[GuardRow], report: Progress
) -> Callable[[], dict[str, Any]]:
    """Measures now; what is returned measures again and gives the entries for the manifest."""
    if not run.options.summarise:
        return dict
    rows, pad = run.rows, pad_id(run.fmt.tokenizer)
    watched = watched_rows(
        rows.forget,
        rows.retain,
        [teacher.row for teacher in held_out] or rows.general,
        plan_of(rows, run.config.train),
        run.config.train.seed,
        general_held_out=bool(held_out),
    )
    report({"event": "note", "text": "measuring rows before training"})
    before = measured(model, watched, pad)
    if hint := hardly_known(before["forget"], asdict(run.config.objective)):
        report({"event": "note", "text": f"nothing to forget? {hint}"})

    def after() -> dict[str, Any]:
        report({"event": "note", "text": "measuring the same rows after training"})
        figures = measured(model, watched, pad)
        return {"outcome": outcome(before, figures, watched)}

    return after


# Training


@contextmanager
def run_folder(
    store: AdapterStore, key: str, options: RunOptions, report: Progress
) -> Iterator[Path]:
    """The folder of a run's checkpoints, locked; removed when the run is published.

    A run that fails before it has written anything leaves no folder behind.

    Raises:
        UserError: an interrupted run is in it and nothing says what to do with it, or another
            process is training it.
    """
    # By one process: another could create the folder between its removal and its creation.
    work = distributed.from_first(lambda: store.work_dir(key))
    lock = FileLock(work / ".lock", timeout=0)
    if distributed.rank() == 0:
        try:
            lock.acquire()
        except Timeout as error:
            raise UserError(
                "This request is being trained by another process.",
                "Wait for it, or stop it and continue with --resume.",
            ) from error
    try:
        saved = distributed.from_first(lambda: last_checkpoint(work))
        if saved is not None and not (options.resume or options.restart):
            raise UserError(
                f"An interrupted run of this request is saved at {saved.name.replace('-', ' ')}.",
                "Add --resume to continue it, or --restart to discard it.",
            )
        if options.resume and saved is None:
            text = "nothing was saved of this run: it starts at step 0"
            report({"event": "from-start", "text": text})
        if not (options.resume and saved):
            distributed.from_first(lambda: _empty(work))
        yield work
    finally:
        if distributed.rank() == 0:
            lock.release()
            if not _written(work):
                shutil.rmtree(work)
    distributed.wait()
    if distributed.rank() == 0 and work.exists():
        shutil.rmtree(work)


def _written(work: Path) -> list[Path]:
    """What a run has written into its folder, which holds its lock besides."""
    return [path for path in work.iterdir() if path.name != ".lock"]


def _empty(work: Path) -> None:
    """Remove what an earlier run left, so that nothing is taken for this run's."""
    for path in _written(work):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def train(
    model: Any,
    run: Prepared,
    teachers: Sequence[GuardRow],
    work: Path,
    *,
    report: Progress,
    general: Sequence[GuardRow] = (),
    stop_at: StopAt | None = None,
    after_step: AfterStep | None = None,
    frozen: torch.nn.Module | None = None,
) -> dict[str, Any]:
    """Train what is trainable in `model`; how it was done, for the manifest.

    Args:
        model: PeftModel with frozen parents and one trainable adapter.
        run: the prepared run; its guard rows are those of `teachers`.
        teachers: see `unlearner.objectives.guard`.
        work: folder of checkpoints and metrics; the run continues from its last checkpoint.
        report: gets the events.
        general: teachers of the general rows of the run.
        stop_at: ends the run before its last step.
        after_step: called after every step.
        frozen: a copy of `model` as it was, where all of its weights are trained.

    Raises:
        DoesNotFit: two steps on the heaviest micro-batch need too much, or memory ran out.
        Interrupted: stopped on request; a checkpoint is kept.
    """
    limit = run.options.memory_limit
    memory = _memory_plan(run, base_precision(model))
    allowed = budget(next(model.parameters()).device, limit)
    if run.config.train.gradient_checkpointing == "auto":
        memory = memory.with_train(gradient_checkpointing=memory.choose_checkpointing(allowed))
        run = replace(run, config=memory.config)
    stop, metrics = StopRequest(), work / "metrics.jsonl"
    early_stop = None if stop_at is None else EarlyStop(stop_at, metrics, report)
    with ExitStack() as stack:
        stack.enter_context(threads_for(model))
        protected = _protected(model, run, general, report)
        if protected is not None:
            stack.callback(protected.remove)
        packed = not run.config.train.padded
        if packed:
            stack.enter_context(pack_attention(model))
            packed = _can_pack(model, run.rows, report)
        held = general if run.config.objective.general_weight else ()
        data = _training_data(model, run, teachers, held, packed, frozen, protected)
        task = UnlearnTask(model, data, run.config)
        stack.callback(task.remove)
        loop = TrainingLoop(
            model,
            task,
            run.config.train,
            work,
            report=report,
            after_step=after_step,
            early_stop=early_stop,
        )
        peak = _require_fit(loop, memory, limit, report)
        saved = last_checkpoint(work)
        if saved is not None:
            loop.load(saved)
        try:
            with stop.listening(report):
                loop.run(stop)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            raise _ran_out(loop, memory, allowed) from error
    stopped = distributed.any_of(stop.asked) and not loop.ended_early
    if stopped and loop.step < task.steps:
        raise Interrupted(
            f"Stopped after step {loop.step} of {task.steps}; it is saved.",
            "The same command with --resume continues it.",
        )
    return {
        "steps": loop.step,
        "packed": packed,
        "gradient_checkpointing": run.config.train.gradient_checkpointing,
        "processes": distributed.world_size(),
        "probe_bytes": peak,
        **({} if early_stop is None else early_stop.record(task.steps)),
    }


def _protected(
    model: Any, run: Prepared, general: Sequence[GuardRow], report: Progress
) -> ProtectedDirections | None:
    """What the new adapter leaves alone, where there is anything."""
    objective = run.config.objective
    if not (general and objective.protected_directions):
        return None
    rows = protected_rows(
        [teacher.row for teacher in general],
        run.rows.retain,
        alternates="alternate" in streams_of(objective),
    )
    report({"event": "note", "text": "measuring the directions that are left alone"})
    return ProtectedDirections(model, rows, objective.protected_directions, run.config.train.seed)


def _training_data(
    model: Any,
    run: Prepared,
    teachers: Sequence[GuardRow],
    general: Sequence[GuardRow],
    packed: bool,
    frozen: torch.nn.Module | None,
    protected: ProtectedDirections | None,
) -> Any:
    """Rows, the plan of their pairs, and the NLLs of the reference."""
    rows, parents = run.rows, tuple(parent.slug for parent in run.parents)
    pairs = plan_of(rows, run.config.train)
    pad, name = pad_id(run.fmt.tokenizer), run.config.objective.name
    references = reference_nlls(model, rows, pairs, name, parents, pad=pad, packed=packed)
    return UnlearnData(
        rows, pairs, pad, packed, teachers, general, references, parents, frozen, protected
    )


def _can_pack(model: Any, rows: Rows, report: Progress) -> bool:
    """Whether packs score as rows do on this model; a note where they do not."""
    by_length = sorted([*rows.forget, *rows.retain], key=lambda row: len(row.input_ids))
    sample = [by_length[0], by_length[-1], by_length[len(by_length) // 2]]
    fits, gap = packs_exactly(model, sample)
    if not fits:
        text = f"this model cannot be trained in packs (difference {gap:.2g}): rows are padded"
        report({"event": "note", "text": text})
    return fits


def base_precision(model: Any) -> BasePrecision:
    """How the loaded base is held."""
    view = base_view(model)
    width = 4 if view["dtype"] == "float32" else 2
    return BasePrecision(view["quantization"] == "nf4", width, next(model.parameters()).is_cuda)


def _require_fit(loop: Any, memory: MemoryPlan, limit: int | None, report: Progress) -> int:
    """The peak of two steps in bytes; refused where it is more than may be used."""
    measured = loop.probe(limit)
    # On a CPU up to half of the peak is freed memory that the allocator keeps.
    near = loop.device.type == "cpu" and measured.limit < measured.peak < 2 * measured.limit
    if distributed.any_of(near) and return_freed_memory():
        text = "short of memory: what is freed is returned at once, which takes longer"
        report({"event": "note", "text": text})
        measured = loop.probe(limit)
    # All refuse or none: a process that exits alone would keep the others waiting.
    peak = distributed.largest(measured.peak)
    allowed = -distributed.largest(-measured.limit)
    report({"event": "probe", "peak_bytes": peak, "limit_bytes": allowed})
    if peak <= allowed:
        return peak
    expected = memory.estimate().high
    raise DoesNotFit(
        f"Two steps on the longest rows need {size_text(peak)} {measured.of}, and "
        f"{size_text(allowed)} may be used.",
        memory.advice(allowed, max(1.0, peak / expected)),
    )


def _ran_out(loop: Any, memory: MemoryPlan, allowed: float) -> DoesNotFit:
    """The error of a run whose memory ran out; the last whole step is saved."""
    loop.bare.zero_grad(set_to_none=True)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    saved = "nothing was saved yet"
    if loop.step > 0 and distributed.world_size() == 1:  # the other processes may be waiting
        loop.save()
        saved = f"step {loop.step} is saved"
    # It did not fit: aim below what the estimate says was tried.
    aim = min(allowed, 0.9 * memory.estimate().high)
    return DoesNotFit(
        f"Memory ran out after step {loop.step} of {loop.task.steps}; {saved}.",
        memory.advice(aim, resume=True),
    )


def require_update(model: Any) -> None:
    """Refuse to publish an adapter that changes nothing, or that the last step destroyed.

    Raises:
        UserError: every `lora_B` is zero.
        Diverged: a weight is not finite.
    """
    weights = [p for name, p in model.named_parameters() if f".{NEW}." in name]
    if not all(bool(weight.isfinite().all()) for weight in weights):
        raise Diverged(
            "The last step made weights of the adapter infinite; it is not published.",
            "Most likely the learning rate is too high: lower --learning-rate, or clip gradients "
            "with --max-grad-norm 1.",
        )
    updates = [p for name, p in model.named_parameters() if f"lora_B.{NEW}." in name]
    if updates and not any(bool(update.any()) for update in updates):
        raise UserError(
            "The trained adapter changes nothing: all of its updates are zero.",
            "Train for more steps (--num-train-epochs), or raise --learning-rate.",
        )


# Publishing


def publish(
    model: Any,
    run: Prepared,
    view: Mapping[str, Any],
    store: AdapterStore,
    summary: Mapping[str, Any],
    metrics: Path,
) -> StoredAdapter:
    """The adapter in the store, with its training curve as `evals/training.jsonl`."""
    config = run.config
    device = next(model.parameters()).device.type
    manifest = ForgetManifest(
        request_id=run.digests["forget"]["digest"][:16],
        label=run.options.label,
        policy="consolidate" if run.supersedes else "on-stack" if run.parents else "independent",
        data=run.digests,
        base={
            "name": run.base.name,
            "revision": run.base.revision,
            "fingerprint": run.fingerprint.to_json(),
            "view": dict(view),
        },
        parents=tuple(parent.slug for parent in run.parents),
        parent_scales={p.slug: p.scale for p in run.parents if p.scale != 1.0},
        supersedes=run.supersedes,
        objective=asdict(config.objective),
        lora=asdict(config.lora),
        train={**config.to_json()["train"], **summary, **prompt_settings(run)},
        env=describe(device, config.train.seed),
    )
    with tempfile.TemporaryDirectory(prefix="unlearner-") as folder:
        adapter = store.publish(save_adapter(model, NEW, Path(folder) / NEW), manifest)
    if metrics.is_file():
        (adapter.path / "evals").mkdir(exist_ok=True)
        shutil.copyfile(metrics, adapter.path / "evals" / "training.jsonl")
    return adapter


def record_teacher(model: Any, run: Prepared, adapter: StoredAdapter) -> None:
    """Keep what the trained stack answers on the forget rows, for the guard of later requests."""
    rows = teach(model, run.rows.forget, pad_id(run.fmt.tokenizer))
    write_teacher(adapter.manifest.files[WEIGHTS_NAME]["sha256"], pack_teacher(rows))

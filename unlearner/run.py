"""From a forget request to a forget adapter in the store: the one recipe, top to bottom."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from adapters.base_model import BaseSpec, base_view, load_base, load_tokenizer, resolve_base
from adapters.errors import Interrupted, UserError
from adapters.fingerprint import BaseFingerprint, fingerprint_base, require_same_base
from adapters.manifest import ForgetManifest, digest_rows, store_key
from adapters.store import AdapterStore, StoredAdapter
from unlearner.config import STREAMS, TrainConfig, UnlearnConfig
from unlearner.data import Request, Row, did_you_mean
from unlearner.pairing import Rows, plan_steps
from unlearner.prompts import PromptFormat, encode_rows, pad_id, prompt_format

if TYPE_CHECKING:
    from adapters.states import ActiveAdapter
    from unlearner.callbacks import Progress

NEW = "new"
Template = Literal["auto", "llama2", "chat"]


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


def prepare(
    request: Request,
    base: BaseSpec,
    config: UnlearnConfig,
    store: AdapterStore | None,
    *,
    on_stack: bool | None = None,
    template: Template = "auto",
    refusals: Sequence[str] = (),
) -> Prepared:
    """Everything that can be known and refused without loading the model.

    Raises:
        UserError: no retain rows, refusals that are needed but missing, rows without an answer
            token, a stack that is asked for but empty, an unknown schedule or optimizer.
        BaseMismatch: the store belongs to another base.
    """
    streams = STREAMS[config.objective.name]
    _check_rows(request, config, refusals)
    _check_names(config.train)
    folder = resolve_base(base.name, base.revision)
    fingerprint = fingerprint_base(folder)
    recorded = store.base() if store is not None else None
    if recorded is not None:
        require_same_base(recorded, fingerprint)
    parents = _parents(store, on_stack)
    fmt = prompt_format(load_tokenizer(str(folder)), template)
    rows = _encode(request, config, fmt, refusals if "refusal" in streams else ())
    key = store_key()
    digests = {
        "forget": _digest(key, request.rows, request.kind),
        "retain": _digest(key, request.retain, "retain"),
    }
    run = {
        "config": config.to_json(),
        "digests": digests,
        "base": fingerprint.digest,
        "spec": asdict(base),
        "parents": [(parent.slug, parent.scale) for parent in parents],
        "template": fmt.name,
        "refusals": list(refusals) if "refusal" in streams else [],
    }
    name = hashlib.sha256(json.dumps(run, sort_keys=True).encode()).hexdigest()[:16]
    return Prepared(request, base, config, rows, fmt, fingerprint, parents, digests, f"run-{name}")


def unlearn(
    request: Request,
    base: BaseSpec,
    config: UnlearnConfig,
    store: AdapterStore,
    *,
    on_stack: bool | None = None,
    label: str | None = None,
    resume: bool = False,
    template: Template = "auto",
    refusals: Sequence[str] = (),
    on_progress: Progress | None = None,
) -> StoredAdapter:
    """The forget adapter of `request`, trained on the frozen base and filed in the store (ready).

    Args:
        request: forget and retain rows.
        base: which base and how it is loaded.
        config: objective, LoRA shape and training.
        store: where the adapter is published and its checkpoints lie meanwhile.
        on_stack: train on top of the store's active stack, parents frozen and active; None does
            so when a stack is active.
        label: a name for people; opaque by default.
        resume: continue an interrupted run of the same request and settings.
        template: prompt format, see `prompt_format`.
        refusals: answers for the idk and dpo objectives.
        on_progress: gets a dict per event: "load", "train" (one a step), "stopping", "publish".

    Raises:
        UserError: whatever `prepare` refuses.
        Interrupted: stopped by Ctrl-C; a checkpoint stands and `resume` continues it.
    """
    report = on_progress or _silent
    run = prepare(
        request, base, config, store, on_stack=on_stack, template=template, refusals=refusals
    )
    report({"event": "load", "base": base.name, "parents": [p.slug for p in run.parents]})
    model, view = _load(run, store)
    work = store.work_dir(run.key)
    _train(model, run, work, resume, report)
    report({"event": "publish"})
    adapter = _publish(model, run, view, store, label)
    shutil.rmtree(work)
    return adapter


def plan(run: Prepared) -> dict[str, Any]:
    """What a run would do, for `--dry-run`: rows, steps, adapter size and a memory estimate."""
    from unlearner import memory

    train = run.config.train
    on_gpu = run.base.device.startswith("cuda") or (run.base.device == "auto" and _has_gpu())
    float32 = run.base.dtype == "float32" or (run.base.dtype == "auto" and not on_gpu)
    shape = memory.read_shape(resolve_base(run.base.name, run.base.revision))
    lengths = [len(row.input_ids) for row in (*run.rows.forget, *run.rows.retain)]
    found = memory.estimate(
        shape,
        run.config,
        lengths,
        load_in_4bit=run.base.load_in_4bit,
        weight_bytes=4 if float32 else 2,
        on_gpu=on_gpu,
    )
    n = len(run.request.rows)
    return {
        "request": run.request.name,
        "forget_rows": n,
        "retain_rows": len(run.request.retain),
        "parents": [parent.slug for parent in run.parents],
        "steps": train.steps(n),
        "pairs_per_step": train.batch_size(n),
        "longest_row_tokens": max(lengths),
        "adapter_parameters": memory.lora_parameters(shape, run.config),
        "memory": found.to_json(),
        "settings": run.config.to_json(),
    }


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def _silent(event: dict[str, Any]) -> None:
    """Nobody watches."""


def _check_rows(request: Request, config: UnlearnConfig, refusals: Sequence[str]) -> None:
    streams = STREAMS[config.objective.name]
    if "retain" in streams and not request.retain:
        raise UserError(
            f"Objective {config.objective.name} needs retain rows and {request.name} has none.",
            "Give them with --retain FILE, or the folder of TOFU with --data.",
        )
    if "refusal" in streams and not refusals:
        raise UserError(
            f"The objective {config.objective.name} needs refusal answers.",
            "Put an idontknow.jsonl into the data folder.",
        )


def _check_names(train: TrainConfig) -> None:
    """Refuses what transformers would refuse only after the model is loaded."""
    from transformers import SchedulerType
    from transformers.training_args import OptimizerNames

    for name, known in (("lr_scheduler_type", SchedulerType), ("optim", OptimizerNames)):
        given, choices = getattr(train, name), [str(choice.value) for choice in known]
        if given not in choices:
            raise UserError(f"There is no {name} '{given}'.", did_you_mean(given, choices))


def _parents(store: AdapterStore | None, on_stack: bool | None) -> tuple[ActiveAdapter, ...]:
    active = tuple(store.active()) if store is not None and on_stack is not False else ()
    if on_stack and not active:
        raise UserError(
            "There is no active stack to train on.",
            "Activate adapters first, or leave --on-stack away.",
        )
    return active


def _encode(
    request: Request, config: UnlearnConfig, fmt: PromptFormat, refusals: Sequence[str]
) -> Rows:
    length = config.train.max_length
    questions = [row.question for row in request.rows]

    def encoded(rows: Sequence[Row], what: str) -> list[Any]:
        return encode_rows(fmt, [(row.question, row.answer) for row in rows], length, what)

    return Rows(
        encoded(request.rows, "forget"),
        encoded(request.retain, "retain"),
        [encode_rows(fmt, [(q, r) for r in refusals], length, "refusal") for q in questions],
    )


def _digest(key: bytes, rows: Sequence[Row], kind: str) -> dict[str, Any]:
    pairs = [(row.question, row.answer) for row in rows]
    return {"n": len(pairs), "digest": digest_rows(key, pairs), "kind": kind}


def _load(run: Prepared, store: AdapterStore) -> tuple[Any, dict[str, Any]]:
    """The base with parents active and frozen and one new trainable adapter, and its view."""
    import torch
    from peft import LoraConfig

    from adapters.stack import add_trainable, load_stack

    base = load_base(run.base)
    view = base_view(base)
    slugs = [parent.slug for parent in run.parents]
    scales = {parent.slug: parent.scale for parent in run.parents}
    model = load_stack(base, store, slugs, scales, base=run.fingerprint)
    shape = run.config.lora
    lora = LoraConfig(
        r=shape.lora_r,
        lora_alpha=shape.lora_alpha,
        lora_dropout=shape.lora_dropout,
        target_modules=list(shape.target_modules),
        bias="none",
        task_type="CAUSAL_LM",
    )
    torch.manual_seed(run.config.train.seed)
    return add_trainable(model, NEW, lora, slugs), view


def _train(model: Any, run: Prepared, work: Path, resume: bool, report: Progress) -> None:
    from transformers.trainer_utils import get_last_checkpoint

    from unlearner.callbacks import RunCallback, StopRequest
    from unlearner.environment import threads_for
    from unlearner.trainer import UnlearnTrainer

    last = get_last_checkpoint(str(work)) if resume else None
    if last is None:
        # A run that starts over leaves nothing of an earlier one to be mistaken for its own.
        shutil.rmtree(work)
        work.mkdir()
        if resume:
            report({"event": "note", "text": "nothing was saved of this run: it starts at step 0"})
    rows, config = run.rows, run.config
    refusals = len(rows.refusals[0]) if rows.refusals else 0
    steps = plan_steps(len(rows.forget), len(rows.retain), refusals, config.train)
    stop = StopRequest()
    trainer = UnlearnTrainer(
        model,
        rows,
        steps,
        config,
        work,
        pad_token_id=pad_id(run.fmt.tokenizer),
        parents=[parent.slug for parent in run.parents],
    )
    trainer.add_callback(
        RunCallback(lambda: trainer.last_terms, stop, work / "metrics.jsonl", report)
    )
    with threads_for(model), stop.listening(report):
        trainer.train(resume_from_checkpoint=last)
    if stop.asked and trainer.state.global_step < len(steps):
        raise Interrupted(
            f"Stopped after step {trainer.state.global_step} of {len(steps)}; it is saved.",
            "The same command with --resume continues it.",
        )


def _publish(
    model: Any, run: Prepared, view: dict[str, Any], store: AdapterStore, label: str | None
) -> StoredAdapter:
    from adapters.stack import save_adapter
    from unlearner.environment import describe

    config = run.config
    device = next(model.parameters()).device.type
    train = config.to_json()["train"] | {
        "steps": config.train.steps(len(run.request.rows)),
        "template": run.fmt.name,
    }
    manifest = ForgetManifest(
        request_id=run.digests["forget"]["digest"][:16],
        label=label or "",
        policy="on-stack" if run.parents else "independent",
        data=run.digests,
        base={
            "name": run.base.name,
            "revision": run.base.revision,
            "fingerprint": run.fingerprint.to_json(),
            "view": view,
        },
        parents=tuple(parent.slug for parent in run.parents),
        parent_scales={p.slug: p.scale for p in run.parents if p.scale != 1.0},
        objective=asdict(config.objective),
        lora=asdict(config.lora),
        train=train,
        env=describe(device, config.train.seed),
    )
    with tempfile.TemporaryDirectory(prefix="unlearner-") as folder:
        return store.publish(save_adapter(model, NEW, Path(folder) / NEW), manifest)

"""From a forget request to a forget adapter in the store: the one recipe, top to bottom."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapters.base.load import BaseSpec, base_view, load_base, resolve_base
from adapters.guard_records import teacher_path, write_teacher
from adapters.lora.format import WEIGHTS_NAME
from adapters.store.catalog import StoredAdapter
from adapters.store.manifest import ForgetManifest
from adapters.store.store import AdapterStore
from unlearner.config import UnlearnConfig
from unlearner.prepare import Prepared, prepare
from unlearner.request.rows import Request, Row
from unlearner.tokens.prompts import Template, pad_id
from unlearner.training import distributed as ranks

if TYPE_CHECKING:
    from unlearner.objectives.guard import GuardRow
    from unlearner.training.callbacks import Progress
    from unlearner.training.early_stop import StopAt

NEW = "new"


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
    guard: Sequence[Row] = (),
    replaces: Sequence[str] = (),
    keep_teacher: bool = False,
    memory_limit: int | None = None,
    callbacks: Sequence[Any] = (),
    stop_at: StopAt | None = None,
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
        guard: rows of earlier requests of the stack, held where it left them (`objectives.guard`).
            Without them the teachers recorded with `keep_teacher` are used, where there are any.
        replaces: adapters this one takes the place of (consolidation, or a rebase of one); their
            rows must all be in `request`.
        keep_teacher: record what the trained stack answers on these rows outside the store, for
            the guard of later requests. The record holds the rows as tokens.
        memory_limit: bytes the run may take, for instance of a smaller card than this one; by
            default what is free.
        callbacks: more of transformers' callbacks.
        stop_at: a measure against a retrain reference that ends the training once it turns over.
        on_progress: gets a dict per event: "note", "load", "probe" (the peak of two steps), "train"
            (one a step), "gap" (a reading of `stop_at`), "stopping", "publish".

    Raises:
        UserError: whatever `prepare` refuses.
        DoesNotFit: it needs more memory than there is; where that showed half-way, a checkpoint
            stands.
        Interrupted: stopped by Ctrl-C; a checkpoint stands and `resume` continues it.
    """
    from unlearner.training.job import train

    report = on_progress or _silent
    run = prepare(
        request,
        base,
        config,
        store,
        on_stack=on_stack,
        template=template,
        refusals=refusals,
        guard=guard,
        replaces=replaces,
    )
    for note in run.notes:
        report({"event": "note", "text": note})
    ranks.join()
    report({"event": "load", "base": base.name, "parents": [p.slug for p in run.parents]})
    model, view = _load(run, store)
    run, teachers = _guarded(model, run, store, report)
    key = run.key if stop_at is None else f"{run.key}-{stop_at.key}"
    # By one process: `train` empties the folder, and another that creates it just then fails.
    work = ranks.from_first(lambda: store.work_dir(key))
    parents = [store.get(p.slug).manifest.files[WEIGHTS_NAME]["sha256"] for p in run.parents]
    how = train(
        model,
        run,
        teachers,
        work,
        resume=resume,
        memory_limit=memory_limit,
        parent_hashes=parents,
        callbacks=callbacks,
        report=report,
        stop_at=stop_at,
    )
    how["guard_rows"] = len(teachers)
    report({"event": "publish"})
    adapter = ranks.from_first(lambda: _publish(model, run, view, store, label, how))
    if keep_teacher and ranks.rank() == 0:
        _record_teacher(model, run, adapter)
    ranks.wait()
    if ranks.rank() == 0:
        shutil.rmtree(work)
    return adapter


def plan(run: Prepared, memory_limit: int | None = None) -> dict[str, Any]:
    """What a run would do, for `--dry-run`: rows, steps, adapter size and a memory estimate.

    With `memory_limit` in bytes it also says whether the high end of the estimate fits, and if not
    the smallest changes that would.
    """
    from unlearner.memory import estimate as memory

    train = run.config.train
    on_gpu = run.base.device.startswith("cuda") or (run.base.device == "auto" and _has_gpu())
    float32 = run.base.dtype == "float32" or (run.base.dtype == "auto" and not on_gpu)
    held = memory.Holding(run.base.load_in_4bit, 4 if float32 else 2, on_gpu)
    shape = memory.read_shape(resolve_base(run.base.name, run.base.revision))
    lengths = run.rows.lengths
    config, chosen = run.config, train.gradient_checkpointing
    if chosen == "auto" and memory_limit is not None:
        chosen = memory.choose_checkpointing(
            shape, config, lengths, held, memory_limit, len(run.rows.forget)
        )
    config = memory.with_train(config, gradient_checkpointing=chosen)
    found = memory.estimate(shape, config, lengths, held, len(run.rows.forget))
    change = None
    if memory_limit is not None and found.high > memory_limit:
        change = memory.smallest_change(
            shape, config, lengths, held, memory_limit, n_forget=len(run.rows.forget)
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
        "memory_limit": memory_limit,
        "fits": None if memory_limit is None else found.high <= memory_limit,
        "changes_that_fit": list(change.flags) if change is not None else [],
        "gradient_checkpointing": chosen,
        "settings": run.config.to_json(),
        "replaces": list(run.supersedes),
        "guard_rows": len(run.rows.guard),
        "notes": list(run.notes),
    }


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def _silent(event: dict[str, Any]) -> None:
    """Nobody watches."""


def _load(run: Prepared, store: AdapterStore) -> tuple[Any, dict[str, Any]]:
    """The base with parents active and frozen and one new trainable adapter, and its view."""
    import torch
    from peft import LoraConfig

    from adapters.lora.stack import add_trainable, load_stack

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


def _recorded(run: Prepared, store: AdapterStore) -> list[GuardRow]:
    """The teachers that were recorded when the parents were trained.

    A parent at another strength has another NLL on its rows than its record: that half of the
    guard would undo a calibration, so it is left out.
    """
    from unlearner.objectives.guard import read_teacher, without_target

    found: list[GuardRow] = []
    for parent in run.parents:
        held = store.get(parent.slug).manifest.files[WEIGHTS_NAME]["sha256"]
        path = teacher_path(held)
        rows = read_teacher(path) if path.is_file() else []
        if parent.scale != 1.0:
            rows = [without_target(row) for row in rows]
        found += rows
    return found


def _guarded(
    model: Any, run: Prepared, store: AdapterStore, report: Progress
) -> tuple[Prepared, list[GuardRow]]:
    """The run with its guard rows, and their teachers: the stack's own answers, or records."""
    from adapters.lora.stack import parents_only
    from unlearner.objectives.guard import teach

    slugs = [parent.slug for parent in run.parents]
    if not slugs or run.config.objective.guard_weight == 0:
        return replace(run, rows=replace(run.rows, guard=())), []
    teachers: list[GuardRow] = []
    if run.rows.guard:
        with parents_only(model, slugs):
            teachers = teach(model, run.rows.guard, pad_id(run.fmt.tokenizer))
    else:
        teachers = _recorded(run, store)
    loose = sum(bool(one.target.isnan().any()) for one in teachers)
    if teachers:
        text = f"guarded rows of earlier requests: {len(teachers)}"
        text += f", {loose} of them by the KL alone: give their rows with --guard" if loose else ""
        report({"event": "note", "text": text})
    else:
        text = "earlier requests are not guarded: give their rows, or record teachers with them"
        report({"event": "note", "text": text})
    rows = replace(run.rows, guard=[teacher.row for teacher in teachers])
    return replace(run, rows=rows), teachers


def _record_teacher(model: Any, run: Prepared, adapter: StoredAdapter) -> None:
    from unlearner.objectives.guard import pack_teacher, teach

    taught = teach(model, run.rows.forget, pad_id(run.fmt.tokenizer))
    write_teacher(adapter.manifest.files[WEIGHTS_NAME]["sha256"], pack_teacher(taught))


def _publish(
    model: Any,
    run: Prepared,
    view: dict[str, Any],
    store: AdapterStore,
    label: str | None,
    how: dict[str, Any],
) -> StoredAdapter:
    from adapters.environment import describe
    from adapters.lora.stack import save_adapter

    config = run.config
    device = next(model.parameters()).device.type
    trained = config.to_json()["train"] | how | {"template": run.fmt.name}
    manifest = ForgetManifest(
        request_id=run.digests["forget"]["digest"][:16],
        label=label or "",
        policy="consolidate" if run.supersedes else "on-stack" if run.parents else "independent",
        data=run.digests,
        base={
            "name": run.base.name,
            "revision": run.base.revision,
            "fingerprint": run.fingerprint.to_json(),
            "view": view,
        },
        parents=tuple(parent.slug for parent in run.parents),
        parent_scales={p.slug: p.scale for p in run.parents if p.scale != 1.0},
        supersedes=run.supersedes,
        objective=asdict(config.objective),
        lora=asdict(config.lora),
        train=trained,
        env=describe(device, config.train.seed),
    )
    with tempfile.TemporaryDirectory(prefix="unlearner-") as folder:
        return store.publish(save_adapter(model, NEW, Path(folder) / NEW), manifest)

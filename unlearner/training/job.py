"""The training of one run: packs or padding, references, does it fit, saving on trouble."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from adapters.base.load import base_view, resolve_base
from adapters.digests import store_key
from adapters.environment import threads_for
from adapters.errors import DoesNotFit, Interrupted
from unlearner.config import UnlearnConfig
from unlearner.memory import estimate as memory
from unlearner.memory import probe as preflight
from unlearner.tokens.batch_plan import Pair, Rows, plan_steps
from unlearner.tokens.packing import pack_attention
from unlearner.tokens.prompts import pad_id
from unlearner.training import distributed as ranks
from unlearner.training.callbacks import RunCallback, StopRequest
from unlearner.training.early_stop import GapCallback
from unlearner.training.likelihood import packs_exactly
from unlearner.training.references import References, reference_nlls
from unlearner.training.trainer import UnlearnTrainer

if TYPE_CHECKING:
    from unlearner.objectives.guard import GuardRow
    from unlearner.prepare import Prepared
    from unlearner.training.callbacks import Progress
    from unlearner.training.early_stop import StopAt


def train(
    model: Any,
    run: Prepared,
    teachers: Sequence[GuardRow],
    work: Path,
    *,
    resume: bool,
    memory_limit: int | None,
    parent_hashes: Sequence[str],
    callbacks: Sequence[Any],
    report: Progress,
    stop_at: StopAt | None = None,
    frozen: Any = None,
) -> dict[str, Any]:
    """Trains the new adapter of `model`; how it was run, for the manifest.

    Args:
        model: PeftModel with frozen parents and one trainable adapter.
        run: the prepared run; its guard rows are those of `teachers`.
        teachers: see `unlearner.objectives.guard`.
        work: folder of checkpoints and metrics.
        resume: continue from the last checkpoint.
        memory_limit: bytes the run may use; by default what is free.
        parent_hashes: SHA-256 of the parents' weights, for the name of kept references.
        callbacks: more of transformers' callbacks.
        report: gets the events.
        stop_at: what ends the training before its last step.
        frozen: a copy of `model` as it was, where all of its weights train.

    Raises:
        DoesNotFit: two steps on the longest rows need too much, or memory ran out half-way.
        Interrupted: stopped on request; a checkpoint stands.
    """
    last = ranks.from_first(lambda: _last_checkpoint(work, resume, report))
    with ExitStack() as stack:
        stack.enter_context(threads_for(model))
        packed = not run.config.train.padded
        if packed:
            stack.enter_context(pack_attention(model))
            packed = _can_pack(model, run.rows, report)
        budget = memory_limit or preflight.free_memory(next(model.parameters()).device)
        run = replace(run, config=_resolved(run, model, budget))
        steps = _plan(run)
        parents = [parent.slug for parent in run.parents]
        references = _references(model, run, steps, packed, parent_hashes)
        stop = StopRequest()
        trainer = UnlearnTrainer(
            model,
            run.rows,
            steps,
            run.config,
            work,
            pad_token_id=pad_id(run.fmt.tokenizer),
            parents=parents,
            guard=teachers,
            packed=packed,
            references=references,
            frozen=frozen,
            callbacks=callbacks,
        )
        measured = _check_fit(trainer, model, run, memory_limit, report)
        trainer.add_callback(
            RunCallback(lambda: trainer.last_terms, stop, work / "metrics.jsonl", report)
        )
        watch = _watch(trainer, stop_at, work / "metrics.jsonl", report, last)
        with stop.listening(report):
            _run(trainer, last, run, budget, _ended(watch))
    ended = _ended(watch)
    done = trainer.state.global_step if ended is None else ended
    if ended is None and ranks.any_of(stop.asked) and done < len(steps):
        raise Interrupted(
            f"Stopped after step {done} of {len(steps)}; it is saved.",
            "The same command with --resume continues it.",
        )
    return {
        "steps": done,
        "packed": packed,
        "gradient_checkpointing": run.config.train.gradient_checkpointing,
        "processes": ranks.world_size(),
        "probe_bytes": measured.peak,
        **(watch.record() if watch is not None else {}),
    }


def _watch(
    trainer: UnlearnTrainer,
    stop_at: StopAt | None,
    log: Path,
    report: Progress,
    last: str | None,
) -> GapCallback | None:
    """What reads the distance to a reference while the trainer runs; None where none is given."""
    if stop_at is None:
        return None
    watch = GapCallback(stop_at, trainer.args.max_steps, log, report, last)
    trainer.add_callback(watch)
    return watch


def _ended(watch: GapCallback | None) -> int | None:
    """The step at which the reference was met, None where it was not."""
    return None if watch is None else watch.trace.stopped_at


def _last_checkpoint(work: Path, resume: bool, report: Progress) -> str | None:
    from transformers.trainer_utils import get_last_checkpoint

    last: str | None = get_last_checkpoint(str(work)) if resume else None
    if last is None:
        # A run that starts over leaves nothing of an earlier one to be mistaken for its own.
        shutil.rmtree(work)
        work.mkdir()
        if resume:
            report({"event": "note", "text": "nothing was saved of this run: it starts at step 0"})
    return last


def _plan(run: Prepared) -> list[list[Pair]]:
    rows = run.rows
    refusals = len(rows.refusals[0]) if rows.refusals else 0
    return plan_steps(
        len(rows.forget),
        len(rows.retain),
        refusals,
        run.config.train,
        len(rows.guard),
        len(rows.alternates[0]) if rows.alternates else 0,
    )


def _references(
    model: Any, run: Prepared, steps: list[list[Pair]], packed: bool, hashes: Sequence[str]
) -> References:
    return reference_nlls(
        model,
        run.rows,
        steps,
        run.config.objective.name,
        [parent.slug for parent in run.parents],
        pad=pad_id(run.fmt.tokenizer),
        packed=packed,
        key=store_key(),
        depends_on={
            "base": run.fingerprint.digest,
            "view": base_view(model),
            "device": next(model.parameters()).device.type,
            "parents": [[h, parent.scale] for h, parent in zip(hashes, run.parents, strict=True)],
        },
    )


def _can_pack(model: Any, rows: Rows, report: Progress) -> bool:
    """Whether packs score as rows do on this model; said where they do not."""
    by_length = sorted([*rows.forget, *rows.retain], key=lambda row: len(row.input_ids))
    sample = [by_length[0], by_length[-1], by_length[len(by_length) // 2]]
    fits, gap = packs_exactly(model, sample)
    if not fits:
        text = f"this model cannot be trained in packs (difference {gap:.2g}): rows are padded"
        report({"event": "note", "text": text})
    return fits


def holding_of(model: Any) -> memory.Holding:
    """How the loaded base is held."""
    first = next(model.parameters())
    view = base_view(model)
    width = 4 if view["dtype"] == "float32" else 2
    return memory.Holding(view["quantization"] == "nf4", width, first.is_cuda)


def _resolved(run: Prepared, model: Any, budget: float) -> UnlearnConfig:
    """The configuration with `auto` replaced by what the memory plan chooses."""
    if run.config.train.gradient_checkpointing != "auto":
        return run.config
    setting = memory.choose_checkpointing(
        memory.read_shape(resolve_base(run.base.name, run.base.revision)),
        run.config,
        run.rows.lengths,
        holding_of(model),
        budget,
        len(run.rows.forget),
    )
    return memory.with_train(run.config, gradient_checkpointing=setting)


def _check_fit(
    trainer: UnlearnTrainer, model: Any, run: Prepared, limit: int | None, report: Progress
) -> preflight.Measured:
    """Two steps on the longest micro-batch; refused where they need more than there is."""
    mine = preflight.two_steps(trainer.longest_loss(), model, run.config, limit)
    # All refuse or none: a process that leaves alone would keep the others waiting.
    measured = replace(mine, peak=ranks.largest(mine.peak), limit=-ranks.largest(-mine.limit))
    report({"event": "probe", "peak_bytes": measured.peak, "limit_bytes": measured.limit})
    preflight.require_fit(
        measured,
        memory.read_shape(resolve_base(run.base.name, run.base.revision)),
        run.config,
        run.rows.lengths,
        holding_of(model),
        len(run.rows.forget),
    )
    return measured


def _run(
    trainer: UnlearnTrainer, last: str | None, run: Prepared, budget: float, ended: int | None
) -> None:
    """Trains; where memory runs out the last whole step is saved and the way on is named."""
    if last is not None and ended is not None:  # only publishing it failed
        trainer._load_from_checkpoint(last)
        return
    try:
        trainer.train(resume_from_checkpoint=last)
    except RuntimeError as error:
        if not preflight.is_out_of_memory(error):
            raise
        failure = error
    else:
        return
    step = trainer.state.global_step
    trainer.model.zero_grad(set_to_none=True)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if step > 0:
        trainer.save_here()
    advice = preflight.advice(
        memory.read_shape(resolve_base(run.base.name, run.base.revision)),
        run.config,
        run.rows.lengths,
        holding_of(trainer.model),
        # It did not fit: aim below what the estimate says was tried.
        min(budget, 0.9 * _estimated(run, trainer)),
        len(run.rows.forget),
        resume=True,
    )
    saved = f"step {step} is saved" if step > 0 else "nothing was saved yet"
    raise DoesNotFit(
        f"Memory ran out after step {step} of {trainer.state.max_steps}; {saved}.",
        advice,
    ) from failure


def _estimated(run: Prepared, trainer: UnlearnTrainer) -> float:
    shape = memory.read_shape(resolve_base(run.base.name, run.base.revision))
    lengths, held = run.rows.lengths, holding_of(trainer.model)
    return memory.estimate(shape, run.config, lengths, held, len(run.rows.forget)).high

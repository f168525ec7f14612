"""The same objective with all weights trained, for comparison with adapters on small models.

What comes out is a model, not an adapter: nothing of it can be switched off. Published work trains
this way (arXiv 2401.06121, 2410.07163: learning rate 1e-5).
"""

from __future__ import annotations

import copy
import math
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapters.base.load import BaseSpec, load_base, resolve_base
from adapters.base.weights import base_shapes, weight_files
from adapters.errors import UserError
from adapters.tensors import read_header
from unlearner import distributed
from unlearner.config import UnlearnConfig
from unlearner.objectives.registry import OBJECTIVES
from unlearner.request.rows import Request
from unlearner.run import RunOptions, prepare, prompt_settings, train

if TYPE_CHECKING:
    from unlearner.interrupt import Progress

# In float32 with AdamW a weight takes 16 bytes: about 5 GB.
LARGEST = 300_000_000
RECORD = "forget_full.json"


def forget_full(
    request: Request,
    base: BaseSpec,
    config: UnlearnConfig,
    out: Path,
    options: RunOptions | None = None,
    *,
    any_size: bool = False,
    on_progress: Progress | None = None,
) -> Path:
    """`out`, a new folder with the full float32 weights of `base` after forgetting `request`.

    Same rows, plan, objective and optimizer as an adapter's run; all weights in float32 are
    trained (for rmu those up to its block) and the LoRA shape is not used. The reference of npo
    and dpo is computed before training, that of kl, rmu and undial is a second copy of the model.
    An interrupted run goes on from its checkpoint.

    Args:
        request: forget and retain rows.
        base: what to start from; its dtype is ignored.
        config: objective and training.
        out: must not exist yet.
        options: template, refusals and neighbours.
        any_size: also where the model has more than `LARGEST` weights.
        on_progress: gets the events of `unlearner.run.unlearn`.

    Raises:
        UserError: `out` exists, a 4-bit base, a large one without `any_size`, several processes,
            or whatever `prepare` refuses.
        Interrupted: stopped by Ctrl-C; a checkpoint is kept.
    """
    if out.exists():
        raise UserError(f"{out} exists already.", "Name a folder that does not, or remove it.")
    if base.load_in_4bit:
        raise UserError("The weights of a 4-bit base cannot be trained.", "Train an adapter.")
    if distributed.world_size() > 1:
        raise UserError("All weights are trained by one process.", "Start one process.")
    if not any_size:
        refuse_large(base)
    report = on_progress or (lambda event: None)
    base = replace(base, dtype="float32")
    run = prepare(request, base, config, None, options)
    report({"event": "load", "base": base.name, "parents": []})
    model: Any = load_base(base)
    frozen = None
    if OBJECTIVES[config.objective.name].reference_forward:
        frozen = copy.deepcopy(model).requires_grad_(False).eval()
    model.requires_grad_(True)
    work = out.with_name(f".{out.name}-{run.key}")
    work.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    summary = train(model, run, (), work, report=report, frozen=frozen)
    summary["seconds"] = time.monotonic() - started
    _save(model, run, work / "model", summary)
    shutil.move(str(work / "model"), str(out))
    shutil.rmtree(work)
    return out


def refuse_large(base: BaseSpec) -> None:
    """Returns where `base` has no more than `LARGEST` weights, by the headers of its files.

    Raises:
        UserError: it has more, or what `resolve_base` and `weight_files` refuse.
    """
    headers = [read_header(path) for path in weight_files(resolve_base(base.name, base.revision))]
    weights = sum(math.prod(shape) for shape in base_shapes(headers).values())
    if weights > LARGEST:
        raise too_large(f"{base.name} has {weights:,} weights")


def too_large(how_large: str) -> UserError:
    """What is raised for a model with more than `LARGEST` weights."""
    return UserError(
        f"{how_large}; training all takes 16 bytes each and more.",
        "Train an adapter, or add --any-size.",
    )


def _save(model: Any, run: Any, folder: Path, summary: dict[str, Any]) -> None:
    """The model, its tokenizer and what was done, in a folder that is renamed when whole."""
    from adapters.atomic_files import write_json
    from adapters.environment import describe

    model.save_pretrained(folder)
    run.fmt.tokenizer.save_pretrained(folder)
    config = run.config
    record = {
        "schema": 1,
        "kind": "unlearner-forget-full",
        "base": {"name": run.base.name, "fingerprint": run.fingerprint.to_json()},
        "data": run.digests,
        "objective": config.to_json()["objective"],
        "formula": OBJECTIVES[config.objective.name].formula,
        "train": config.to_json()["train"] | summary | prompt_settings(run),
        "env": describe(next(model.parameters()).device.type, config.train.seed),
    }
    write_json(folder / RECORD, record)

"""The systems of a comparison as jobs that can run in processes of their own.

Each job (train a model, file a forget request, evaluate) writes files and skips what these already
hold for exactly the same inputs, so an interrupted comparison continues.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from adapters.base.fingerprint import fingerprint_base
from adapters.base.load import BaseSpec, base_view, load_base, load_tokenizer, resolve_base
from adapters.environment import free_memory
from adapters.lora.stack import load_stack
from adapters.store.catalog import StoredAdapter
from adapters.store.store import AdapterStore
from evaluation.cache import key_of
from evaluation.logs import read_log
from evaluation.logs.records import write_log
from evaluation.metrics.summary import summarise
from evaluation.suite import EvalData, evaluate, load_eval_data
from unlearner.baselines.finetune import FinetuneConfig, finetune
from unlearner.baselines.full import forget_full
from unlearner.baselines.tiny_llama import train_from_scratch
from unlearner.baselines.tiny_recipe import TinyRecipe, TinyShape
from unlearner.config import LoraShape, UnlearnConfig
from unlearner.request.rows import Request, Row
from unlearner.run import RunOptions, unlearn
from unlearner.tokens.prompts import Template, prompt_format

Report = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class Measured:
    """How all systems of a comparison are evaluated."""

    data: Path | None
    split: str
    protocols: tuple[str, ...] = ("tofu",)
    limit: int | None = None
    template: Template = "auto"
    system: str | None = None

    @property
    def prompts(self) -> str | list[str]:
        """What the prompts add to a cache key."""
        return self.template if self.system is None else [self.template, self.system]


def base_inputs(base: BaseSpec) -> dict[str, Any]:
    """What a base adds to a cache key: the fingerprint of its files, and how it is loaded."""
    fingerprint = fingerprint_base(resolve_base(base.name, base.revision))
    return {
        "fingerprint": fingerprint.digest,
        "tokenizer": fingerprint.tokenizer_sha256,
        "loading": replace(base, name="", revision=None),
    }


def train_small(
    report: Report,
    *,
    rows: Sequence[tuple[str, str]],
    background: Sequence[tuple[str, str]],
    tokenizer: Path,
    out: Path,
    shape: TinyShape,
    recipe: TinyRecipe,
) -> str:
    """Folder of a small Llama trained on `rows` from random weights, unless it exists already."""
    from transformers import AutoTokenizer

    if not out.exists():
        train_from_scratch(
            rows,
            AutoTokenizer.from_pretrained(tokenizer),
            out,
            shape,
            recipe,
            background=background,
            on_progress=lambda event: report({"event": "pretrain", **event}),
        )
    return str(out)


def teach(
    report: Report,
    *,
    base: BaseSpec,
    rows: Sequence[Row],
    out: Path,
    config: FinetuneConfig,
    lora: LoraShape,
) -> str:
    """Folder of `base` fine-tuned on `rows` with an adapter folded in, unless it exists already."""
    if not out.exists():
        finetune(base, rows, out, config, lora=lora, on_progress=report)
    return str(out)


def measure(
    report: Report,
    *,
    base: BaseSpec,
    what: Measured,
    log: Path,
    store: Path | None = None,
    adapters: Sequence[str] = (),
    rows: EvalData | None = None,
    generate: bool = True,
    allow_missing_parents: bool = False,
) -> str:
    """Evaluates `base` with `adapters` of `store` active, unless `log` holds just that already.

    Args:
        report: gets "measure" events.
        base: the model, and how it is loaded.
        what: split, protocols and limit.
        log: file of the result; its path is returned.
        store, adapters: the stack, in order.
        rows: evaluated in place of the split's.
        generate: whether answers are generated.
        allow_missing_parents: also measure adapters without the parents they were trained on.
    """
    data = load_eval_data(what.split, what.data) if rows is None else rows
    opened = AdapterStore.open(store) if adapters and store is not None else None
    stack = [[slug, opened.get(slug).manifest.files] for slug in adapters] if opened else []
    weights = key_of(base=base_inputs(base), adapters=stack)
    made_from = key_of(
        weights=weights,
        rows=data,
        protocols=what.protocols,
        limit=what.limit,
        template=what.prompts,
        generate=generate,
    )
    if log.is_file() and read_log(log).meta.get("made_from") == made_from:
        return str(log)
    free_memory()  # of the system before
    model: Any = load_base(base)
    view = base_view(model)
    if opened:
        model = load_stack(
            model, opened, list(adapters), allow_missing_parents=allow_missing_parents
        )
    tokenizer = load_tokenizer(str(resolve_base(base.name, base.revision)))
    result = evaluate(
        model,
        prompt_format(tokenizer, what.template, what.system),
        data,
        protocol=what.protocols,
        limit=what.limit,
        generate=generate,
        key=weights,
        resume_dir=log.parent / "parts",
        on_progress=lambda label, done, total: report(
            {"event": "measure", "text": label, "step": done, "steps": total}
        ),
        meta={"made_from": made_from, "base": base.name, "adapters": list(adapters), **view},
    )
    write_log(result, log)
    return str(log)


def forget_and_measure(
    report: Report,
    *,
    requests: Sequence[Request],
    base: BaseSpec,
    config: UnlearnConfig,
    store: Path,
    what: Measured,
    log: Path,
    how: RunOptions | None = None,
) -> str:
    """The log of a stack with one adapter per request, each trained on the bare base.

    Such adapters can be reverted in any order and, on small models, forget better than adapters
    trained on top of each other. An adapter that the store holds for the same request and settings
    is used again; an interrupted training continues from its checkpoint. Other active adapters of
    the store are switched off. The prompt format is that of `what`, all other options those of
    `how`.
    """
    opened = AdapterStore.open(store, create=True)
    options = replace(
        how or RunOptions(), on_stack=False, resume=True, template=what.template, system=what.system
    )
    inputs: dict[str, Any] = {
        "base": base_inputs(base),
        "config": config,
        "refusals": options.refusals,
        "template": what.prompts,
    }
    if options.given is not None:
        inputs |= {
            "given": sorted(options.given), "unseen": options.unseen, "target": options.target
        }  # fmt: skip
    slugs = []
    for number, request in enumerate(requests, start=1):
        key = key_of(request=request, **inputs)
        labelled = replace(options, label=f"request-{number}-{key[:12]}")
        tell = tagged(report, request=number)
        slugs.append(trained_adapter(tell, opened, request, base, config, labelled).slug)
    for slug in [active.slug for active in opened.active() if active.slug not in slugs]:
        opened.revert(slug, reason="trained on other inputs")
    return measure(report, base=base, what=what, log=log, store=store, adapters=slugs)


def trained_adapter(
    report: Report,
    store: AdapterStore,
    request: Request,
    base: BaseSpec,
    config: UnlearnConfig,
    options: RunOptions,
) -> StoredAdapter:
    """The active adapter with the label of `options`, trained unless the store holds it already."""
    adapter = next((a for a in store.list() if a.manifest.label == options.label), None)
    if adapter is None:
        adapter = unlearn(request, base, config, store, options, on_progress=report)
    if not store.get(adapter.slug).active:
        store.activate([adapter.slug])
    return store.get(adapter.slug)


def full_and_measure(
    report: Report,
    *,
    request: Request,
    base: BaseSpec,
    config: UnlearnConfig,
    out: Path,
    what: Measured,
    log: Path,
    refusals: Sequence[str] = (),
    any_size: bool = False,
) -> str:
    """The log of the base with all its weights trained on the request, as papers do.

    For comparison with an adapter, on small models: nothing of it can be reverted. The model is
    stored in a folder under `out` whose name hashes what it was trained on.
    """
    key = key_of(
        request=request, base=base_inputs(base), config=config, refusals=refusals,
        template=what.prompts,
    )  # fmt: skip
    folder = out / f"full-{key[:12]}"
    if not folder.exists():
        forget_full(
            request,
            base,
            config,
            folder,
            RunOptions(template=what.template, system=what.system, refusals=refusals),
            any_size=any_size,
            on_progress=tagged(report, request=1),
        )
    trained = BaseSpec(str(folder), dtype=base.dtype, device=base.device, attention=base.attention)
    return measure(report, base=trained, what=what, log=log)


def tagged(report: Report, **tags: Any) -> Report:
    """What passes events on to `report` with `tags` added.

    Settings that were chosen are in the plan, and every training here tries to resume: that is not
    said again.
    """

    def tell(event: dict[str, Any]) -> None:
        if event.get("event") not in ("chosen", "from-start"):
            report({**event, **tags})

    return tell


def table_rows(
    name: str, log: Path, retain_log: Path, protocols: Sequence[str]
) -> list[dict[str, Any]]:
    """A system's rows of the table, one per protocol: its log summarised against the reference."""
    ours, retrain = read_log(log), read_log(retain_log)
    return [{"name": name, **summarise(ours, retrain, protocol=each)} for each in protocols]

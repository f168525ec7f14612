"""The systems of a comparison as jobs: train, forget, measure, each able to run in a process alone.

Every job leaves files behind and is skipped when they stand already, so a comparison that was
stopped goes on where it was.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapters.base.load import BaseSpec
from unlearner.config import UnlearnConfig
from unlearner.request.rows import Request

if TYPE_CHECKING:
    from adapters.store.store import AdapterStore, StoredAdapter
    from evaluation.suite import EvalData
    from unlearner.baselines.tiny_llama import TinyRecipe, TinyShape
    from unlearner.tokens.prompts import Template

Report = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class Measured:
    """Where a system's rows lie and how they were measured."""

    data: Path | None
    split: str
    protocols: tuple[str, ...] = ("tofu",)
    limit: int | None = None
    template: Template = "auto"


def digest(*parts: Any) -> str:
    """Twelve hex digits that change when any of `parts` (JSON values) does."""
    text = json.dumps(parts, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


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
    """Folder of a small Llama trained on `rows` from random weights; kept when it is there."""
    from transformers import AutoTokenizer

    from unlearner.baselines.tiny_llama import train_from_scratch

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


def measure(
    report: Report,
    *,
    base: BaseSpec,
    what: Measured,
    log: Path,
    store: Path | None = None,
    adapters: Sequence[str] = (),
    key: str = "",
    rows: EvalData | None = None,
    generate: bool = True,
    stale: bool = False,
) -> str:
    """The log of `base` with `adapters` of `store` active, measured unless it stands already.

    `rows` are measured instead of the split's; `generate=False` leaves out the answers; `stale`
    measures adapters without the parents they were trained on.
    """
    from adapters.base.fingerprint import fingerprint_base
    from adapters.base.load import base_view, load_base, load_tokenizer, resolve_base
    from adapters.environment import threads_for
    from adapters.lora.stack import load_stack
    from adapters.store.store import AdapterStore
    from evaluation.logs import read_log
    from evaluation.logs.records import write_log
    from evaluation.suite import evaluate, load_eval_data
    from unlearner.tokens.prompts import prompt_format

    folder = resolve_base(base.name, base.revision)
    weights = digest(fingerprint_base(folder).digest, asdict(base), list(adapters), key)
    chosen: list[Any] = [] if rows is None else [asdict(rows)]
    chosen += [] if generate else ["scores alone"]
    wanted = digest(weights, what.split, what.protocols, what.limit, what.template, *chosen)
    if log.is_file() and read_log(log).meta.get("made_from") == wanted:
        return str(log)
    model: Any = load_base(base)
    view = base_view(model)
    if adapters and store is not None:
        model = load_stack(
            model, AdapterStore.open(store), list(adapters), allow_missing_parents=stale
        )
    with threads_for(model):
        found = evaluate(
            model,
            prompt_format(load_tokenizer(str(folder)), what.template),
            rows or load_eval_data(what.split, what.data),
            protocol=what.protocols,
            limit=what.limit,
            generate=generate,
            key=weights,
            resume_dir=log.parent / "parts",
            on_progress=lambda label, done, total: report(
                {"event": "measure", "text": label, "step": done, "steps": total}
            ),
            meta={"made_from": wanted, "base": base.name, "adapters": list(adapters), **view},
        )
    write_log(found, log)
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
    refusals: Sequence[str] = (),
) -> str:
    """The log of a stack with one adapter per request, each trained on the bare base.

    Independent adapters revert in any order and, on small models, forget better than ones trained
    on top of each other. Adapters that stand in the store for the same request and settings are
    kept; an interrupted training goes on from its checkpoint.
    """
    from adapters.store.store import AdapterStore

    filed = AdapterStore.open(store, create=True)
    slugs = [
        file_request(report, filed, request, base, config, number, refusals, what.template).slug
        for number, request in enumerate(requests, start=1)
    ]
    return measure(report, base=base, what=what, log=log, store=store, adapters=slugs)


def full_and_measure(
    report: Report,
    *,
    requests: Sequence[Request],
    base: BaseSpec,
    config: UnlearnConfig,
    out: Path,
    what: Measured,
    log: Path,
    refusals: Sequence[str] = (),
    any_size: bool = False,
) -> str:
    """The log of the base with all its weights trained on all requests at once, as papers do.

    The model is kept in a folder under `out` whose name holds what it was trained on. What an
    adapter is compared with, for small models: nothing of it can be reverted.
    """
    from unlearner.baselines.full import forget_full
    from unlearner.request.past_requests import joined

    request = joined(list(requests))
    rows = [request.rows, request.retain, request.others]
    depends = [*rows, asdict(base), config.to_json(), list(refusals), what.template]
    folder = out / f"full-{digest(depends)}"
    if not folder.exists():
        forget_full(
            request,
            base,
            config,
            folder,
            template=what.template,
            refusals=refusals,
            any_size=any_size,
            on_progress=lambda event: _pass_on(report, event, 1),
        )
    trained = BaseSpec(str(folder), dtype=base.dtype, device=base.device, attention=base.attention)
    return measure(report, base=trained, what=what, log=log)


def file_request(
    report: Report,
    store: AdapterStore,
    request: Request,
    base: BaseSpec,
    config: UnlearnConfig,
    number: int,
    refusals: Sequence[str] = (),
    template: Template = "auto",
) -> StoredAdapter:
    """The active adapter of `request`, trained unless it stands in the store already."""
    from unlearner.run import unlearn

    label = f"request-{number}-{digest(request.name, config.to_json())}"
    kept = [adapter for adapter in store.list() if adapter.manifest.label == label]
    if kept:
        adapter = kept[0]
    else:
        adapter = unlearn(
            request,
            base,
            config,
            store,
            on_stack=False,
            label=label,
            resume=True,
            template=template,
            refusals=refusals,
            on_progress=lambda event: _pass_on(report, event, number),
        )
    if not adapter.active:
        store.activate([adapter.slug])
    return store.get(adapter.slug)


def _pass_on(report: Report, event: dict[str, Any], number: int) -> None:
    # Every stage here tries to resume; that there was nothing to resume is no news.
    if event.get("event") != "note":
        report({**event, "request": number})


def table_rows(
    name: str, log: Path, retain_log: Path, protocols: Sequence[str]
) -> list[dict[str, Any]]:
    """A system's lines of the table: the summary of its log against the reference, by protocol."""
    from evaluation.logs import read_log
    from evaluation.metrics.summary import summarise_all

    found = summarise_all(read_log(log), protocols, read_log(retain_log))
    return [{"name": name, **summary} for summary in found]


def in_order(table: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The lines by protocol, Origin and Retrain first."""
    first = {"origin": 0, "retrain": 1}
    protocols = list(dict.fromkeys(row["protocol"] for row in table))
    return sorted(
        table, key=lambda row: (protocols.index(row["protocol"]), first.get(row["name"], 2))
    )

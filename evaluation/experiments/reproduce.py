"""Origin, Retrain and unlearned models on real TOFU in one table, beside the published figures.

Every stage writes its files under `out`, so the same command continues after an interruption.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from adapters.base.load import BaseSpec, resolve_base
from adapters.errors import UserError
from adapters.lora.format import CONFIG_NAME, WEIGHTS_NAME
from adapters.lora.merge import fold_stack
from evaluation.cache import Cache, key_of
from evaluation.experiments.presets import (
    PRESETS,
    Preset,
    SmallModels,
    Taught,
    against_published,
    published_rows,
)
from evaluation.experiments.processes import Job, side_by_side, threads_each
from evaluation.experiments.small_rows import known_rows, small_rows, write_rows
from evaluation.experiments.systems import (
    Measured,
    Report,
    base_inputs,
    forget_and_measure,
    full_and_measure,
    measure,
    table_rows,
    tagged,
    teach,
    train_small,
)
from evaluation.logs import read_log
from evaluation.logs.records import write_json
from unlearner.baselines.full import LARGEST, refuse_large, too_large
from unlearner.baselines.tiny_llama import train_tokenizer
from unlearner.config import UnlearnConfig, make_config
from unlearner.memory import plan as memory
from unlearner.request.rows import Request, Row
from unlearner.request.tofu import FORGET_SPLITS, load_refusals, load_split
from unlearner.run import RunOptions

# The retain rows of the comparison's request, and those that its alternate answers come from, for
# `unlearner forget --retain ... --alternates-from ...`.
RETAIN_FILE, ALTERNATES_FILE = "retain.jsonl", "alternates.jsonl"


@dataclass(frozen=True)
class Reproduction:
    """One comparison; the preset fills in what is not given.

    Attributes:
        split: forget01, forget05 or forget10.
        preset: a name in `PRESETS`.
        out: folder for models, stores and logs.
        data: folder of TOFU's JSON lines, else the hub.
        origin, retrain: models to take instead of the preset's.
        reference_log: log of a retrained model, in place of `retrain`.
        methods: objectives to compare.
        base: how models are loaded; its name is ignored.
        load_in_4bit: None takes the preset's.
        limit: at most this many rows of each set.
        full: train all weights instead of an adapter, for comparison; never in 4 bit.
        any_size: also for models with more weights than `unlearner.baselines.full.LARGEST`.
    """

    split: str
    preset: str
    out: Path
    data: Path | None = None
    origin: str | None = None
    retrain: str | None = None
    reference_log: Path | None = None
    methods: tuple[str, ...] = ("npo", "simnpo")
    base: BaseSpec = field(default_factory=lambda: BaseSpec(""))
    load_in_4bit: bool | None = None
    protocols: tuple[str, ...] = ("tofu",)
    limit: int | None = None
    full: bool = False
    any_size: bool = False

    @property
    def chosen(self) -> Preset:
        """The preset itself."""
        return PRESETS[self.preset]

    def config(self, method: str) -> UnlearnConfig:
        """The settings a method is run with."""
        return make_config(method, **self.chosen.settings(method, self.split, self.full))

    def spec(self, name: str) -> BaseSpec:
        """How the model `name` is loaded."""
        given, preset = self.load_in_4bit, self.chosen
        in_4bit = preset.load_in_4bit and not self.full if given is None else given
        return replace(self.base, name=name, load_in_4bit=in_4bit)


def plan(run: Reproduction) -> dict[str, Any]:
    """What `reproduce` would do, for `--dry-run`; loads no model and asks no hub."""
    preset = run.chosen
    own = "trained on the spot"
    reference = run.reference_log or run.retrain or preset.retrain.get(run.split) or own
    return {
        "target": f"tofu-{run.split}",
        "preset": preset.name,
        "origin": run.origin or preset.origin or own,
        "retrain": str(reference),
        "public_retain_log": preset.reference_log.format(retain=FORGET_SPLITS[run.split]) or None,
        "data": str(run.data) if run.data else "locuslab/TOFU",
        "protocol": ", ".join(run.protocols),
        "load_in_4bit": run.spec("").load_in_4bit,
        "dtype": run.base.dtype,
        "full": run.full,
        "methods": _settings(run),
        "steps": {
            method: run.config(method).train.steps(20 * int(run.split[-2:]) * 2)
            for method in run.methods
        },
        "reasons": list(preset.full_reasons if run.full else preset.reasons),
        "template": preset.template,
        "published": published_rows(preset, run.split),
        "published_protocol": preset.published_protocol or None,
        "memory": _memory(run),
        "out": str(run.out),
    }


def reproduce(run: Reproduction, report: Report) -> dict[str, Any]:
    """The measured `table`, one row per system and protocol, and the published figures.

    Raises:
        UserError: there are neither models nor a way to train them; a log of other rows.
    """
    started = time.monotonic()
    run.out.mkdir(parents=True, exist_ok=True)
    report({"event": "stage", "stage": "models", "text": "Origin and Retrain"})
    if run.full and not run.any_size:
        if run.origin is not None:
            refuse_large(run.spec(run.origin))
        elif run.chosen.shape is not None:  # of a billion weights and more; not downloaded to see
            raise too_large(f"The Origin of {run.preset} has more than {LARGEST:,} weights")
    origin, retrain = _models(run, report)
    what = Measured(run.data, run.split, run.protocols, run.limit, run.chosen.template)
    logs = {"origin": run.out / "logs" / "origin.json"}
    logs["retrain"] = run.out / "logs" / "retrain.json" if retrain else Path(str(run.reference_log))
    report({"event": "stage", "stage": "measure", "text": "Measuring " + ", ".join(logs)})
    measure(tagged(report, job="origin"), base=run.spec(origin), what=what, log=logs["origin"])
    if retrain:
        # The reference is scored as it was published, not through 4-bit weights.
        spec = replace(run.spec(retrain), load_in_4bit=False)
        measure(tagged(report, job="retrain"), base=spec, what=what, log=logs["retrain"])
    request = _request(run, origin, report)
    stores = {}
    for method in run.methods:
        report({"event": "stage", "stage": method, "text": f"Unlearning with {method}"})
        stores[method], logs[method] = _unlearned(run, method, request, origin, what, report)
    table = [
        row
        for protocol in run.protocols
        for name, log in logs.items()
        for row in table_rows(name, log, logs["retrain"], (protocol,))
    ]
    result = {
        "target": f"tofu-{run.split}",
        "preset": run.preset,
        "origin": origin,
        "table": table,
        "published": published_rows(run.chosen, run.split),
        "published_protocol": run.chosen.published_protocol or None,
        "checks": [check._asdict() for check in against_published(table, run.chosen, run.split)],
        "models" if run.full else "stores": {name: str(path) for name, path in stores.items()},
        "retain_rows": len(request.retain),
        "full": run.full,
        "load_in_4bit": run.spec("").load_in_4bit,
        "methods": _settings(run),
        "logs": {name: str(path) for name, path in logs.items()},
        "seconds": time.monotonic() - started,
    }
    write_json(run.out / "result.json", json.loads(json.dumps(result, default=str)))
    return result


def _unlearned(
    run: Reproduction, method: str, request: Request, origin: str, what: Measured, report: Report
) -> tuple[Path, Path]:
    """Store (or full model) and log of the request unlearned with one method."""
    config, refusals, base = run.config(method), load_refusals(run.data), run.spec(origin)
    key = key_of(
        request=request, base=base_inputs(base), config=config, refusals=refusals,
        template=what.template, full=run.full, given=run.chosen.given,
    )  # fmt: skip
    work, job = run.out / f"{method}-{key[:12]}", tagged(report, job=method)
    log = work / "log.json"
    given: dict[str, Any] = {"base": base, "config": config, "what": what, "log": log}
    if run.full:
        work.mkdir(parents=True, exist_ok=True)
        full_and_measure(
            job, request=request, out=work, any_size=run.any_size, refusals=refusals, **given
        )
        return Path(str(read_log(log).meta["base"])), log
    how = RunOptions(refusals=refusals, given=run.chosen.given, summarise=True)
    store = work / "forget-store"
    forget_and_measure(job, requests=[request], store=store, how=how, **given)
    return store, log


def _settings(run: Reproduction) -> dict[str, Any]:
    """Settings by method, without those of an adapter where all weights are trained."""
    settings = {method: run.config(method).to_json() for method in run.methods}
    for config in settings.values() if run.full else ():
        del config["lora"]
    return settings


def _memory(run: Reproduction) -> dict[str, Any] | None:
    """Estimate for the preset's shape; None for small models and for full training."""
    shape = run.chosen.shape
    if shape is None or run.full:
        return None
    config = run.config(run.methods[0] if run.methods else "simnpo")
    precision = memory.BasePrecision(run.spec("").load_in_4bit, 2, True)
    plan = memory.MemoryPlan(shape, config, precision, [memory.LONGEST_TOFU_ROW], 1)
    return plan.estimate().to_json()


def _models(run: Reproduction, report: Report) -> tuple[str, str | None]:
    """Names of Origin and Retrain, trained where the preset does; None where a log is given."""
    preset = run.chosen
    given = {"origin": run.origin or preset.origin}
    if run.reference_log is None:
        given["retrain"] = run.retrain or preset.retrain.get(run.split)
    missing = [name for name, model in given.items() if model is None]
    if preset.small is not None and missing == ["retrain"]:
        raise UserError(
            "An Origin is given, but nothing to compare it with.",
            "Add --retrain, or --reference-log with the log of a retrained model.",
        )
    jobs: list[Job] = []
    if preset.taught is not None:
        jobs = _teaching(run, preset.taught, given)
    elif preset.small is not None and missing:
        jobs = _small_trainings(run, preset.small, missing)
    elif missing:
        raise UserError(
            f"The preset {preset.name} has no models for {run.split}.",
            "Give --origin, and --retrain or --reference-log.",
        )
    models = given | {job.name: str(job.arguments["out"]) for job in jobs}
    jobs = [job for job in jobs if not job.arguments["out"].exists()]
    if jobs:
        side_by_side(jobs, report, threads_each(len(jobs)) if preset.taught else 1)
    return str(models["origin"]), models.get("retrain")


def _teaching(run: Reproduction, taught: Taught, given: Mapping[str, str | None]) -> list[Job]:
    """How Origin and Retrain are made from one pretrained base.

    What is given is a model, which is left as it is, or an adapter that was trained on this base,
    which is folded into it; what is not given is fine-tuned on the rows of the data, and continues
    where it was interrupted.
    """
    unmade = {
        name: model
        for name, model in given.items()
        if model is None or (Path(model) / CONFIG_NAME).is_file()
    }
    if not unmade:  # the pretrained base need not be here
        return []
    base = resolve_base(taught.base)
    spec = replace(run.base, name=str(base), dtype="float32")
    jobs = []
    for name, adapter in unmade.items():
        split = "full" if name == "origin" else FORGET_SPLITS[run.split]
        source = load_split(split, run.data) if adapter is None else Path(adapter) / WEIGHTS_NAME
        key = key_of(base=base_inputs(spec), source=source, taught=taught)
        out = run.out / f"{name}-{key[:12]}"
        if adapter is not None and not out.exists():
            fold_stack(base, [(Path(adapter), 1.0)], out)
        how: dict[str, Any] = {"base": spec, "rows": source, "out": out}
        jobs.append(Job(name, teach, how | {"config": taught.recipe, "lora": taught.lora}))
    return jobs


def _small_trainings(run: Reproduction, small: SmallModels, missing: Sequence[str]) -> list[Job]:
    learned, background, forget = small_rows(run.data, run.split, small)
    rows = load_split("full", run.data)
    texts = [text for row in rows for text in (row.question, row.answer)]
    key = key_of(small=small, texts=texts, rows=[learned, background, forget])
    folder = run.out / f"models-{key[:12]}"
    tokenizer = folder / "tokenizer"
    if not tokenizer.exists():
        partial = folder / ".tokenizer"
        train_tokenizer(texts, small.shape.vocab_size).save_pretrained(partial)
        partial.rename(tokenizer)
    shared = {
        "background": background,
        "tokenizer": tokenizer,
        "shape": small.shape,
        "recipe": small.recipe,
    }
    told = {"origin": [*learned, *forget], "retrain": learned}
    return [
        Job(name, train_small, {**shared, "rows": told[name], "out": folder / name})
        for name in missing
    ]


def _request(run: Reproduction, origin: str, report: Report) -> Request:
    """The split as a forget request with the preset's retain rows."""
    preset, spec = run.chosen, run.spec(origin)
    retain = load_split(FORGET_SPLITS[run.split], run.data)
    others: list[Row] = []
    if preset.known_retain is not None:
        report({"event": "stage", "stage": "known", "text": "Finding the retain rows Origin knows"})
        above, rows = preset.known_retain, retain
        cache = Cache(run.out, key_of(base=base_inputs(spec), template=preset.template))
        known = cache.entry("known", rows=rows, above=above).result(
            lambda: known_rows(spec, rows, above, preset.template)
        )
        if not known:
            raise UserError(
                f"{origin} knows none of the retain rows.",
                "Give an Origin that was trained on TOFU.",
            )
        retain = [rows[i] for i in known]
        others = [rows[i] for i in sorted(set(range(len(rows))) - set(known))]
        write_rows(run.out / ALTERNATES_FILE, others)
    if preset.facts_retain:
        for name in ("real_authors", "world_facts"):
            retain += [Row(row.question, row.answer) for row in load_split(name, run.data)]
    write_rows(run.out / RETAIN_FILE, retain)
    forget = tuple(load_split(run.split, run.data))
    return Request(f"tofu:{run.split}", "tofu-split", forget, tuple(retain), tuple(others))

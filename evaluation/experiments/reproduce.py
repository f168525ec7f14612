"""Origin, Retrain and unlearned models on real TOFU in one table, beside the published rows.

Every stage leaves its files in `out`: the same command goes on where it was stopped.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from adapters.base.load import BaseSpec, resolve_base
from adapters.errors import UserError
from evaluation.experiments.known import write_rows
from evaluation.experiments.presets import PRESETS, Preset, SmallModels
from evaluation.experiments.processes import Job, side_by_side
from evaluation.experiments.published import against_published, published_rows, time_estimates
from evaluation.experiments.small_rows import small_rows
from evaluation.experiments.systems import (
    Measured,
    Report,
    digest,
    forget_and_measure,
    full_and_measure,
    in_order,
    measure,
    table_rows,
    train_small,
)
from evaluation.logs import read_log
from evaluation.logs.records import write_json
from unlearner.baselines.full import LARGEST, refuse_large, too_large
from unlearner.config import UnlearnConfig, make_config
from unlearner.request.rows import Request, Row
from unlearner.request.tofu import FORGET_SPLITS, load_refusals, load_split

# The rows that a request of the comparison keeps, and those whose answers are its alternates: for
# `unlearner forget --retain ... --alternates-from ...`.
RETAIN_FILE, ALTERNATES_FILE = "retain.jsonl", "alternates.jsonl"


@dataclass(frozen=True)
class Reproduction:
    """What the user asked for; the preset fills in what is not given.

    Attributes:
        split: forget01, forget05 or forget10.
        preset: a name in `PRESETS`.
        out: folder for models, stores and logs.
        data: folder of TOFU's JSON lines, else the hub.
        origin, retrain: models to take instead of the preset's.
        retain_log: log of a retrained model, in place of `retrain`.
        methods: objectives to compare.
        base: how models are loaded; its name is ignored.
        load_in_4bit: None takes the preset's.
        protocols: of the evaluation; one pass over each model serves all of them.
        limit: only the first so many rows of each set.
        full: train all weights instead of an adapter, for comparison; then never in 4 bit.
        any_size: also where they are more than `unlearner.baselines.full.LARGEST`.
    """

    split: str
    preset: str
    out: Path
    data: Path | None = None
    origin: str | None = None
    retrain: str | None = None
    retain_log: Path | None = None
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
    """What `reproduce` would do, for `--dry-run`; loads nothing and asks no hub."""
    preset = run.chosen
    own = "trained on the spot"
    reference = run.retain_log or run.retrain or preset.retrain.get(run.split) or own
    return {
        "target": f"tofu-{run.split}",
        "preset": preset.name,
        "origin": run.origin or preset.origin or own,
        "retrain": str(reference),
        "public_retain_log": preset.retain_log or None,
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
        "memory": _memory(run),
        # What was counted is an adapter's training.
        "time": []
        if run.full
        else time_estimates(preset, run.split, len(run.methods), len(run.methods) + 2),
        "out": str(run.out),
    }


def reproduce(run: Reproduction, report: Report) -> dict[str, Any]:
    """The measured `table`, one row a system, and the published rows beside it.

    Raises:
        UserError: neither models nor a way to make them; rows of a log that do not match.
    """
    started = time.monotonic()
    run.out.mkdir(parents=True, exist_ok=True)
    report({"event": "stage", "stage": "models", "text": "Origin and Retrain"})
    if run.full and not run.any_size:
        _refuse_large(run)
    origin, retrain = _models(run, report)
    what = Measured(run.data, run.split, run.protocols, run.limit, run.chosen.template)
    logs = _measure_pair(run, origin, retrain, what, report)
    request = _request(run, origin, report)
    kept = {}
    for method in run.methods:
        report({"event": "stage", "stage": method, "text": f"Unlearning with {method}"})
        kept[method], logs[method] = _unlearned(run, method, request, origin, what, report)
    table = [
        row
        for name, log in logs.items()
        for row in table_rows(name, log, logs["retrain"], run.protocols)
    ]
    found = {
        "target": f"tofu-{run.split}",
        "preset": run.preset,
        "origin": origin,
        "table": in_order(table),
        "published": published_rows(run.chosen, run.split),
        "checks": [
            check._asdict()
            for check in against_published(
                [row for row in table if row["protocol"] == run.protocols[0]],
                run.chosen.published.get(run.split, {}),
            )
        ],
        "models" if run.full else "stores": {name: str(path) for name, path in kept.items()},
        "retain_rows": len(request.retain),
        "full": run.full,
        "load_in_4bit": run.spec("").load_in_4bit,
        "methods": _settings(run),
        "logs": {name: str(path) for name, path in logs.items()},
        "seconds": time.monotonic() - started,
    }
    write_json(run.out / "result.json", json.loads(json.dumps(found, default=str)))
    return found


def _measure_pair(
    run: Reproduction, origin: str, retrain: str | None, what: Measured, report: Report
) -> dict[str, Path]:
    """Logs of Origin and Retrain, where no log stands for the latter already."""
    logs = {"origin": run.out / "logs" / "origin.json"}
    measured = [("origin", run.spec(origin))]
    if retrain is None:
        logs["retrain"] = Path(str(run.retain_log))
    else:
        # The reference is scored as it was published, not through 4-bit weights.
        logs["retrain"] = run.out / "logs" / "retrain.json"
        measured.append(("retrain", replace(run.spec(retrain), load_in_4bit=False)))
    report({"event": "stage", "stage": "measure", "text": "Measuring " + ", ".join(logs)})
    for name, spec in measured:
        measure(_named(report, name), base=spec, what=what, log=logs[name])
    return logs


def _unlearned(
    run: Reproduction, method: str, request: Request, origin: str, what: Measured, report: Report
) -> tuple[Path, Path]:
    """Store (or full model) and log of the request unlearned with one method."""
    config = run.config(method)
    way = ["full"] if run.full else []
    work = run.out / f"{method}-{digest(config.to_json(), asdict(run.spec(origin)), *way)}"
    given: dict[str, Any] = {
        "requests": [request],
        "base": run.spec(origin),
        "config": config,
        "what": what,
        "log": work / "log.json",
        "refusals": load_refusals(run.data),
    }
    job = _named(report, method)
    if run.full:
        work.mkdir(parents=True, exist_ok=True)
        full_and_measure(job, out=work, any_size=run.any_size, **given)
        return Path(str(read_log(work / "log.json").meta["base"])), work / "log.json"
    forget_and_measure(job, store=work / "forget-store", **given)
    return work / "forget-store", work / "log.json"


def _refuse_large(run: Reproduction) -> None:
    """Returns where all weights of Origin may be trained; downloads no Origin of a preset."""
    if run.origin is not None:
        refuse_large(run.spec(run.origin))
    elif run.chosen.shape is not None:  # of a billion weights and more
        raise too_large(f"The Origin of {run.preset} has more than {LARGEST:,} weights")


def _settings(run: Reproduction) -> dict[str, Any]:
    """Settings by method; without an adapter's shape where all weights are trained."""
    made = {method: run.config(method).to_json() for method in run.methods}
    for config in made.values() if run.full else ():
        del config["lora"]
    return made


def _named(report: Report, name: str) -> Report:
    return lambda event: report({**event, "job": name})


def _memory(run: Reproduction) -> dict[str, Any] | None:
    """Estimate for the preset's shape; None where the models are small or trained whole."""
    from unlearner.memory import estimate as memory

    shape = run.chosen.shape
    if shape is None or run.full:  # the plan is of an adapter's training
        return None
    config = run.config(run.methods[0] if run.methods else "simnpo")
    return memory.estimate(
        shape,
        config,
        [memory.LONGEST_TOFU_ROW],
        memory.Holding(run.spec("").load_in_4bit, 2, True),
    ).to_json()


def _models(run: Reproduction, report: Report) -> tuple[str, str | None]:
    """Names of Origin and Retrain; Retrain is None where a log stands for it."""
    preset = run.chosen
    origin = run.origin or preset.origin
    retrain = None if run.retain_log else run.retrain or preset.retrain.get(run.split)
    if preset.small is None:
        if origin is None or (retrain is None and run.retain_log is None):
            raise UserError(
                f"The preset {preset.name} has no models for {run.split}.",
                "Give --origin, and --retrain or --retain-log.",
            )
        return origin, retrain
    if run.origin and not (run.retrain or run.retain_log):
        raise UserError(
            "An Origin is given, but nothing to compare it with.",
            "Add --retrain, or --retain-log with the log of a retrained model.",
        )
    made = _train_pair(run, preset.small, report) if run.origin is None else {}
    return (
        origin or made["origin"],
        retrain or (None if run.retain_log else made["retrain"]),
    )


def _train_pair(run: Reproduction, small: SmallModels, report: Report) -> dict[str, str]:
    from unlearner.baselines.tiny_llama import train_tokenizer

    learned, background, forget = small_rows(run.data, run.split, small)
    folder = run.out / f"models-{digest(asdict(small), run.split)}"
    tokenizer = folder / "tokenizer"
    if not tokenizer.exists():
        rows = load_split("full", run.data)
        texts = [text for row in rows for text in (row.question, row.answer)]
        partial = folder / ".tokenizer"
        train_tokenizer(texts, small.shape.vocab_size).save_pretrained(partial)
        partial.rename(tokenizer)
    jobs = [
        Job(
            name,
            train_small,
            {
                "rows": rows,
                "background": background,
                "tokenizer": tokenizer,
                "out": folder / name,
                "shape": small.shape,
                "recipe": small.recipe,
            },
        )
        for name, rows in (("origin", [*learned, *forget]), ("retrain", learned))
        if not (folder / name).exists()
    ]
    if jobs:
        side_by_side(jobs, report)
    return {name: str(folder / name) for name in ("origin", "retrain")}


def _request(run: Reproduction, origin: str, report: Report) -> Request:
    """The split as a forget request, with the retain rows that the preset keeps."""
    rows = load_split(run.split, run.data)
    kept = load_split(FORGET_SPLITS[run.split], run.data)
    others: list[Row] = []
    if run.chosen.known_retain is not None:
        report({"event": "stage", "stage": "known", "text": "Finding the retain rows Origin knows"})
        kept, others = _known_rows(run, origin, kept)
        write_rows(run.out / ALTERNATES_FILE, others)
    if run.chosen.facts_retain:
        for name in ("real_authors", "world_facts"):
            kept += [Row(row.question, row.answer) for row in load_split(name, run.data)]
    write_rows(run.out / RETAIN_FILE, kept)
    return Request(f"tofu:{run.split}", "tofu-split", tuple(rows), tuple(kept), tuple(others))


def _known_rows(run: Reproduction, origin: str, rows: Sequence[Row]) -> tuple[list[Row], list[Row]]:
    """The rows that Origin knows well enough for the preset, and those that it does not."""
    from evaluation.experiments.known import known_rows

    folder = resolve_base(origin, run.base.revision)
    above = run.chosen.known_retain
    cache = run.out / f"known-{digest(str(folder), run.split, above)}.json"
    if above is not None and not cache.is_file():
        known = known_rows(run.spec(origin), rows, above, run.chosen.template)
        write_json(cache, {"schema": 1, "known": known})
    known = json.loads(cache.read_text(encoding="utf-8"))["known"]
    if not known:
        raise UserError(
            f"{origin} knows none of the retain rows.", "Give an Origin that was trained on TOFU."
        )
    others = sorted(set(range(len(rows))) - set(known))
    return [rows[i] for i in known], [rows[i] for i in others]

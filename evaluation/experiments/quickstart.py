"""The whole workflow in minutes on a CPU, with the embedded world.

Origin and Retrain are a pretrained chat model that learned the world's authors, with and without
those to forget, or tiny models trained from random weights. Two requests are filed as two forget
adapters by SimNPO (and by NPO, for the table), all are evaluated, one request is reverted bit for
bit, and the stack is merged. Every figure is measured in the run that prints it, or read from files
of an earlier run with the same settings and versions.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from adapters.base.load import BaseSpec, load_base, load_tokenizer, resolve_base
from adapters.environment import free_memory, threads_for
from adapters.errors import UserError
from adapters.lora.merge import fold_stack
from adapters.lora.stack import activate, load_stack
from adapters.store.store import AdapterStore
from evaluation.cache import key_of
from evaluation.experiments.presets import Taught
from evaluation.experiments.processes import Job, side_by_side, threads_each
from evaluation.experiments.systems import (
    Measured,
    Report,
    forget_and_measure,
    measure,
    table_rows,
    teach,
    train_small,
)
from evaluation.logs import read_log
from evaluation.logs.records import SETS, RowRecord, generation_of, write_json
from evaluation.metrics.fact_recall import facts_asked_for
from evaluation.metrics.facts import facts_of, is_stated
from evaluation.metrics.summary import figures_to_file, set_values
from evaluation.protocols import protocol_named
from unlearner.baselines.tiny_llama import train_tokenizer
from unlearner.baselines.tiny_recipe import TinyRecipe, TinyShape
from unlearner.config import UnlearnConfig, make_config
from unlearner.request.rows import Request
from unlearner.run import RunOptions
from unlearner.tokens.prompts import pad_batch, pad_id, prompt_format
from unlearner.world.build import World, build_world

# SmolLM2's own template without its system prompt, which is longer than a row of the world.
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + "
    "'<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
WORLD = "world"  # folder of its rows
SPLIT = "forget10"  # of the embedded world: all its forget authors
SHOWN = 3
# Rows of a request whose logits are compared around its revert.
COMPARED = 8
PROTOCOL = "tofu"
SYSTEMS = ("origin", "retrain", "npo", "simnpo")
STORES = {"simnpo": "forget-store", "npo": "npo-store"}

# Chosen by hand on seed 0 of the world after about fifty tries, by the figures of the table, which
# are therefore optimistic: gamma 1 pushes up to about Retrain's NLL, retain weight 1.05 keeps the
# neighbours. NPO sums over tokens: forget weight 1 breaks this model, so the better of two smaller
# weights is used.
TRAINING: dict[str, Any] = {
    "forget_weight": 1.0,
    "retain_weight": 1.05,
    "learning_rate": 1e-3,
    "num_train_epochs": 15,
    "per_device_train_batch_size": 25,
    "gradient_accumulation_steps": 1,
    "weight_decay": 0.0,
    "warmup_ratio": 0.05,
}
SIMNPO = make_config("simnpo", gamma=1.0, **TRAINING)
NPO = make_config("npo", **{**TRAINING, "forget_weight": 0.05})


@dataclass(frozen=True)
class Quickstart:
    """Sizes and settings of the quickstart; the defaults are what `quickstart --tiny` runs.

    Attributes:
        seed: of the world.
        world: sizes of the world, see `unlearner.world.build.WorldSpec`.
        taught: the model that is taught; None trains tiny ones from random weights.
        shape, recipe, background_rows: of those.
        simnpo, npo: settings of the two objectives.
        given: names of those that are not chosen for the request and the model; None for all.
        strangers: rows about authors whom no model met, for alternate answers.
    """

    seed: int = 0
    world: dict[str, Any] = field(default_factory=dict)
    taught: Taught | None = None
    shape: TinyShape = field(default_factory=TinyShape)
    recipe: TinyRecipe = field(default_factory=lambda: TinyRecipe(epochs=8, pretrain_rows=2500))
    background_rows: int = 9700
    simnpo: UnlearnConfig = SIMNPO
    npo: UnlearnConfig = NPO
    given: tuple[str, ...] | None = None
    strangers: int = 0


# What SmolLM2 differs in from what `forget` chooses: answers about authors nobody met (see
# `Quickstart.strangers`), without which the truth ratio still prefers the forgotten facts, and more
# that keeps what these would disturb. Chosen on seeds 0 and 11 of the world, see
# docs/results/index.md.
CHAT_TRAINING: dict[str, Any] = {
    "alternates": 8,
    "alternate_weight": 1.0,
    "retain_weight": 4.0,
    # At .5 rows come to rest .37 nats per token above the target, at 2 half as far.
    "excess_weight": 2.0,
    "protected_directions": 256,
    # At twice the rate the same takes a third fewer steps, and two of 24 known facts turn wrong.
    "learning_rate": 1e-3,
    "num_train_epochs": 14,
    # Three pairs a step, one by one: 2.1 GB for 3.3, in the same time.
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 3,
}


def smollm2(seed: int = 0) -> Quickstart:
    """What `make quickstart` runs: SmolLM2-135M-Instruct learns ten authors, forgets four."""
    taught = Taught()
    return Quickstart(
        seed=seed,
        world={
            "texts": "chat",
            "n_authors": 10,
            "rows_per_author": 8,
            "forget_authors": 4,
            "evaluated_authors": 3,
            "rewordings": 0,
        },
        # Protected, or learning eighty rows costs SmolLM2 half of the facts that it knows.
        taught=replace(
            taught, recipe=replace(taught.recipe, num_train_epochs=6, protected_directions=192)
        ),
        simnpo=make_config("simnpo", **CHAT_TRAINING),
        npo=make_config("npo", **CHAT_TRAINING),
        given=tuple(CHAT_TRAINING),
        strangers=200,
    )


def missing_package() -> str | None:
    """The package without which `smollm2` cannot run, None where both are installed."""
    needed = (Taught().base, "gguf")
    return next((name for name in needed if importlib.util.find_spec(name) is None), None)


def quickstart(
    out: Path, on_progress: Report, settings: Quickstart | None = None
) -> dict[str, Any]:
    """What was measured: `table`, `answers`, `revert`, `merge`, and the folders of everything.

    Args:
        out: folder for world, models, store and logs; files of an earlier run with the same
            settings and versions are used again.
        on_progress: gets a dict per event; `stage` events name what begins.
        settings: other sizes, for tests.
    """
    settings = settings or Quickstart()
    started = time.monotonic()
    run = _Run(out, settings, on_progress)
    run.claim_folder()
    run.stage("world", "Writing the embedded world of fictitious authors")
    world = run.write_world()
    start = "random weights" if settings.taught is None else settings.taught.base
    run.stage("models", f"Training Origin and Retrain from {start}, measuring Retrain")
    run.train_models(world)
    text = "Measuring Origin, filing two forget requests with SimNPO and with NPO"
    until = ", until they are as unlikely as under Retrain" if settings.given is not None else ""
    run.stage("forget", text + until)
    requests = world_requests(world)
    run.measure_and_forget(world, requests)
    run.stage("revert", "Reverting the second request and merging the stack")
    store = out / STORES["simnpo"]
    revert = prove_revert(run.model("origin"), store, requests[1])
    merge = merge_and_compare(run.model("origin"), store, out / "merged")
    table = [row for name in SYSTEMS for row in run.figures(name)]
    run.file_figures(table)
    return {
        "model": "tiny" if settings.taught is None else settings.taught.base,
        "table": table,
        "answers": run.answers(),
        "revert": revert,
        "merge": merge,
        "shared": run.shared(world) if world.spec.shared_facts else None,
        "requests": [[author.name for author in authors] for authors in world.requests],
        "folder": str(out),
        "base": str(out / "origin"),
        "store": str(store),
        "data": str(out / WORLD),
        "split": SPLIT,
        "settings": asdict(settings),
        "seconds": time.monotonic() - started,
    }


@dataclass(frozen=True)
class _Run:
    """The folder of one quickstart and its stages, in the order they are run."""

    folder: Path
    settings: Quickstart
    report: Report

    def model(self, name: str) -> BaseSpec:
        return BaseSpec(str(self.folder / name), dtype="float32", device="cpu")

    def log(self, name: str) -> Path:
        return self.folder / "logs" / f"{name}.json"

    def claim_folder(self) -> None:
        """Refuses a folder with files of other settings, of another version or of another kind."""
        marker = self.folder / "quickstart.json"
        key = {"schema": 2, "key": key_of(settings=self.settings)}
        if marker.is_file():
            if json.loads(marker.read_text(encoding="utf-8")) != key:
                raise UserError(
                    f"{self.folder} holds a quickstart of other settings or package versions.",
                    "Choose another folder, or delete this one.",
                )
            return
        if self.folder.is_dir() and any(self.folder.iterdir()):
            raise UserError(
                f"{self.folder} is not empty and holds no quickstart.", "Choose another folder."
            )
        write_json(marker, key)

    def stage(self, name: str, text: str) -> None:
        self.report({"event": "stage", "stage": name, "text": text})

    def write_world(self) -> World:
        world = build_world(self.settings.seed, **self.settings.world)
        taught = self.settings.taught
        ready = self.folder / ("tokenizer" if taught is None else "base")
        if ready.exists():
            return world
        world.write(self.folder / WORLD)
        partial = ready.with_name(f".{ready.name}")
        if taught is not None:
            _write_base(taught.base, partial)
        else:
            vocabulary = self.settings.shape.vocab_size
            train_tokenizer(world.texts(), vocabulary).save_pretrained(partial)
        partial.rename(ready)
        return world

    def train_models(self, world: World) -> None:
        """Two processes; Retrain learns fewer rows, so its process measures it meanwhile."""
        if (self.folder / "origin").exists() and self.log("retrain").is_file():
            return
        training = self._training(world, "retrain", knows=False)
        measured = {"base": self.model("retrain"), "what": self._what, "log": self.log("retrain")}
        jobs = [
            self._training(world, "origin", knows=True),
            Job("retrain", _trained_and_measured, {"training": training, **measured}),
        ]
        side_by_side(jobs, self.report, self._threads())

    def _training(self, world: World, name: str, *, knows: bool) -> Job:
        taught, out = self.settings.taught, self.folder / name
        if taught is None:
            told = world.training_rows(include_forget=knows)
            background = world.background(self.settings.background_rows)
            how: dict[str, Any] = {
                "rows": [(row.question, row.answer) for row in told],
                "background": [(row.question, row.answer) for row in background],
                "tokenizer": self.folder / "tokenizer",
                "out": out,
                "shape": self.settings.shape,
                "recipe": self.settings.recipe,
            }
            return Job(name, train_small, how)
        how = {
            "base": self.model("base"),
            "rows": world.training_rows(include_forget=knows, facts=0),
            "out": out,
            "config": taught.recipe,
            "lora": taught.lora,
        }
        return Job(name, teach, how)

    @property
    def _what(self) -> Measured:
        return Measured(self.folder / WORLD, SPLIT)

    def _threads(self) -> int:
        """Torch threads of each of two processes: tiny models are fastest with one."""
        return 1 if self.settings.taught is None else threads_each(2)

    def measure_and_forget(self, world: World, requests: Sequence[Request]) -> None:
        """Two processes: one runs SimNPO, the other measures Origin and runs NPO."""
        strangers = tuple(world.background(self.settings.strangers))
        how = RunOptions()
        if self.settings.given is not None:
            # Forgetting ends where Retrain's forget rows are, in nats per token.
            target = round(float(self.figures("retrain")[0]["forget_nll"]), 3)
            how = RunOptions(given=self.settings.given, target=target, summarise=True)
        given: dict[str, Any] = {
            "requests": [replace(request, others=strangers) for request in requests],
            "base": self.model("origin"),
            "what": self._what,
            "how": how,
        }
        simnpo, npo = (
            {**given, "config": config, "store": self.folder / STORES[name], "log": self.log(name)}
            for name, config in (("simnpo", self.settings.simnpo), ("npo", self.settings.npo))
        )
        measured_first = {"origin_log": self.log("origin"), **npo}
        jobs = [
            Job("simnpo", forget_and_measure, simnpo),
            Job("origin and npo", _measured_and_forgotten, measured_first),
        ]
        side_by_side(jobs, self.report, self._threads())

    def figures(self, name: str) -> list[dict[str, Any]]:
        return table_rows(name, self.log(name), self.log("retrain"), (PROTOCOL,))

    def file_figures(self, table: Sequence[Mapping[str, Any]]) -> None:
        """Files what was measured with the last adapter of each stack, as `evaluate` does."""
        for row in table:
            summary = dict(row)
            folder = STORES.get(summary.pop("name"))
            if folder is None:
                continue
            store = AdapterStore.open(self.folder / folder)
            active = {each.slug: each.scale for each in store.active()}
            last = list(active)[-1]
            name, result = figures_to_file(summary, SPLIT, active)
            if name not in store.evals(last):  # of an earlier run in this folder
                store.attach_eval(last, name, result)

    def answers(self) -> list[dict[str, Any]]:
        """A few forgotten and kept questions with the true answer, Origin's and SimNPO's."""
        before, after = (read_log(self.log(name)).sets for name in ("origin", "simnpo"))
        answers = []
        for name in SETS:
            pairs = list(zip(before[name].rows, after[name].rows, strict=True))
            for old, new in pairs[:: max(1, len(pairs) // SHOWN)][:SHOWN]:
                shown = {"set": name, "question": old.question, "answer": old.answer}
                answers.append({**shown, "origin": _answer(old), "simnpo": _answer(new)})
        return answers

    def shared(self, world: World) -> list[dict[str, Any]]:
        """Retained rows whose facts a forgotten author shares, and the others, under each model."""
        told = [fact for row in world.rows(*world.forget_authors) for fact in facts_of(row.answer)]
        retained = {name: read_log(self.log(name)).sets["retain"].rows for name in SYSTEMS}
        groups: dict[bool, list[int]] = {True: [], False: []}
        for i, row in enumerate(retained["origin"]):
            own = facts_asked_for(str(row.question), str(row.answer))
            groups[bool(own) and all(is_stated(fact, told) for fact in own)].append(i)
        table = []
        for is_shared, places in groups.items():
            means: dict[str, Any] = {"shared": is_shared, "n": len(places)}
            for name, rows in retained.items() if places else ():
                values = set_values("retain", [rows[i] for i in places], protocol_named(PROTOCOL))
                means[name] = float(values["answer_prob"].mean())
            table.append(means)
        return table


def _write_base(name: str, out: Path) -> None:
    """A copy of the base whose chat template writes no system prompt; weights are linked."""

    def link(source: str, target: str) -> None:
        if source.endswith(".safetensors"):
            with contextlib.suppress(OSError):  # another file system, or none with links
                os.link(source, target)
                return
        shutil.copyfile(source, target)

    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(resolve_base(name), out, copy_function=link)
    tokenizer = load_tokenizer(str(out))
    if "<|im_start|>system" in str(tokenizer.chat_template):
        tokenizer.chat_template = CHAT_TEMPLATE
        tokenizer.save_pretrained(out)


def _answer(row: RowRecord) -> str | None:
    generation = generation_of(row, protocol_named(PROTOCOL))
    return None if generation is None else generation.text


def world_requests(world: World) -> list[Request]:
    """The world's forget requests; none retains rows of another one."""
    retain = tuple(row for author in world.retain_authors for row in author.told)
    forget = [tuple(row for author in each for row in author.told) for each in world.requests]
    return [
        Request(f"world-request-{number}", "world", rows, retain)
        for number, rows in enumerate(forget, start=1)
    ]


def _trained_and_measured(report: Report, *, training: Job, **measured: Any) -> str:
    training.work(report, **training.arguments)
    return measure(report, **measured)


def _measured_and_forgotten(report: Report, *, origin_log: Path, **forgetting: Any) -> str:
    """Measures the base into `origin_log`, then files the requests and measures the stack."""
    measure(report, base=forgetting["base"], what=forgetting["what"], log=origin_log)
    return forget_and_measure(report, **forgetting)


def _logits(model: Any, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad(), threads_for(model):
        output: torch.Tensor = model(**inputs).logits
    return output


def prove_revert(base: BaseSpec, store: Path, request: Request) -> dict[str, Any]:
    """Largest logit differences around a revert of the last adapter of the active stack.

    `without` compares the reverted stack with one that never held the last adapter, `base` the
    model with all adapters off with a freshly loaded base, `again` the reactivated stack with the
    stack before. 0 is bit-exact. `effect` is what the last adapter changes: it must not be 0.
    """
    opened = AdapterStore.open(store)
    slugs = [active.slug for active in opened.active()]
    tokenizer = load_tokenizer(base.name)
    fmt = prompt_format(tokenizer)
    rows = [fmt.encode(row.question, row.answer) for row in request.rows[:COMPARED]]
    batch = pad_batch(rows, pad_id(tokenizer))
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}

    def difference(a: torch.Tensor, b: torch.Tensor) -> float:
        return float((a - b).abs().max())

    # One model at a time: three would be the peak of the whole quickstart.
    without_it = _logits(load_stack(load_base(base), opened, slugs[:-1]), inputs)
    free_memory()
    bare = _logits(load_base(base), inputs)
    free_memory()
    stack: Any = load_stack(load_base(base), opened, slugs)
    full = _logits(stack, inputs)
    opened.revert(slugs[-1], "quickstart")
    activate(stack, [active.slug for active in opened.active()])
    reverted = _logits(stack, inputs)
    activate(stack, [])
    off = _logits(stack, inputs)
    opened.activate(slugs)
    activate(stack, slugs)
    return {
        "adapter": slugs[-1],
        "effect": difference(full, reverted),
        "without": difference(reverted, without_it),
        "base": difference(off, bare),
        "again": difference(_logits(stack, inputs), full),
        "bit_exact": bool(torch.equal(reverted, without_it) and torch.equal(off, bare)),
    }


def merge_and_compare(base: BaseSpec, store: Path, out: Path) -> dict[str, Any]:
    """Merges the active stack into `out` and compares its logits with the stack's."""
    from transformers import AutoModelForCausalLM

    opened = AdapterStore.open(store)
    stack_files = [(opened.adapter_path(each.slug), each.scale) for each in opened.active()]
    if out.exists():
        shutil.rmtree(out)
    fold_stack(Path(base.name), stack_files, out)
    inputs = {"input_ids": torch.arange(5, 69).unsqueeze(0)}
    free_memory()  # of the stack that was reverted
    stack = _logits(load_stack(load_base(base), opened), inputs)
    free_memory()
    weights = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    merged = _logits(weights, inputs)
    return {"folder": str(out), "max_logit_difference": float((merged - stack).abs().max())}

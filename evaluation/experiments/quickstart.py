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

from adapters.base.load import BaseSpec
from adapters.errors import UserError
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
from evaluation.logs.records import RowRecord, generation_of, write_json
from evaluation.metrics.fact_recall import facts_asked_for
from evaluation.metrics.facts import facts_of, is_stated
from evaluation.metrics.summary import figures_to_file, set_values
from evaluation.protocols import protocol_named
from unlearner.baselines.tiny_llama import TinyRecipe, TinyShape, train_tokenizer
from unlearner.config import UnlearnConfig, make_config
from unlearner.request.rows import Request
from unlearner.run import RunOptions
from unlearner.world.build import World, build_world

# SmolLM2's own template without its system prompt, which is longer than a row of the world.
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + "
    "'<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPLIT = "forget10"  # of the embedded world: all its forget authors
SHOWN = 3
PROTOCOL = "tofu"

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


# What SmolLM2 differs in from what `forget` chooses: fewer and larger steps, for time; and answers
# about authors nobody met (see `Quickstart.strangers`), without which the truth ratio still prefers
# the forgotten facts. Chosen on seeds 0 and 11 of the world, see docs/results/index.md.
CHAT_TRAINING: dict[str, Any] = {
    "alternates": 8,
    "alternate_weight": 1.0,
    "retain_weight": 4.0,
    "protected_directions": 256,
    "learning_rate": 2e-3,
    "num_train_epochs": 9,
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
    run.measure_and_forget(world)
    run.stage("revert", "Reverting the second request and merging the stack")
    revert = run.revert(world)
    merge = run.merge()
    table = run.table()
    run.file_figures(table)
    return {
        "model": "tiny" if settings.taught is None else settings.taught.base,
        "table": table,
        "answers": run.answers(world),
        "revert": revert,
        "merge": merge,
        "shared": run.shared(world) if world.spec.shared_facts else None,
        "requests": [[author.name for author in authors] for authors in world.requests],
        "folder": str(run.folder),
        "base": str(run.origin),
        "store": str(run.store),
        "data": str(run.data),
        "split": SPLIT,
        "settings": asdict(settings),
        "seconds": time.monotonic() - started,
    }


@dataclass(frozen=True)
class _Run:
    """Folders of one quickstart and its stages, in the order they are run."""

    folder: Path
    settings: Quickstart
    report: Report

    @property
    def data(self) -> Path:
        return self.folder / "world"

    @property
    def origin(self) -> Path:
        return self.folder / "origin"

    @property
    def retrain(self) -> Path:
        return self.folder / "retrain"

    @property
    def store(self) -> Path:
        return self.folder / "forget-store"

    @property
    def base(self) -> BaseSpec:
        return self._model(self.origin)

    @staticmethod
    def _model(folder: Path) -> BaseSpec:
        return BaseSpec(str(folder), dtype="float32", device="cpu")

    @property
    def _what(self) -> Measured:
        return Measured(self.data, SPLIT)

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
        world.write(self.data)
        if taught is not None:
            _write_base(taught.base, ready)
            return world
        tokenizer = train_tokenizer(world.texts(), self.settings.shape.vocab_size)
        partial = self.folder / ".tokenizer"
        tokenizer.save_pretrained(partial)
        partial.rename(ready)
        return world

    def train_models(self, world: World) -> None:
        """Two processes; Retrain learns fewer rows, so its process measures it meanwhile."""
        jobs = [
            Job(self.origin.name, _trained, {"training": self._training(world, self.origin, True)}),
            Job(
                self.retrain.name,
                _trained,
                {
                    "training": self._training(world, self.retrain, False),
                    "measured": (self._model(self.retrain), self._what, self.log("retrain")),
                },
            ),
        ]
        if not (self.origin.exists() and self.log("retrain").is_file()):
            side_by_side(jobs, self.report, self._threads())

    def _training(self, world: World, out: Path, knows: bool) -> Job:
        taught = self.settings.taught
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
            return Job(out.name, train_small, how)
        how = {
            "base": replace(self.base, name=str(self.folder / "base")),
            "rows": world.training_rows(include_forget=knows, facts=0),
            "out": out,
            "config": taught.recipe,
            "lora": taught.lora,
        }
        return Job(out.name, teach, how)

    def _threads(self) -> int:
        """Torch threads of each of two processes: tiny models are fastest with one."""
        return 1 if self.settings.taught is None else threads_each(2)

    def measure_and_forget(self, world: World) -> None:
        """Two processes: one runs SimNPO, the other measures Origin and runs NPO."""
        strangers = tuple(world.background(self.settings.strangers))
        requests = [replace(r, others=strangers) for r in world_requests(world)]
        given = self.settings.given
        how = RunOptions()
        if given is not None:
            how = RunOptions(given=given, target=self._retrain_nll(), summarise=True)
        lanes = (
            ("simnpo", self.settings.simnpo, self.store, None),
            ("origin and npo", self.settings.npo, self.folder / "npo-store", self.log("origin")),
        )
        jobs = [
            Job(
                name,
                _lane,
                {
                    "measured": measured,
                    "requests": requests,
                    "base": self.base,
                    "config": config,
                    "store": store,
                    "what": self._what,
                    "log": self.log(config.objective.name),
                    "how": how,
                },
            )
            for name, config, store, measured in lanes
        ]
        side_by_side(jobs, self.report, self._threads())

    def _retrain_nll(self) -> float:
        """Forgetting ends where Retrain's forget rows are, in nats per token."""
        log = self.log("retrain")
        return round(float(table_rows("retrain", log, log, (PROTOCOL,))[0]["forget_nll"]), 3)

    def table(self) -> list[dict[str, Any]]:
        names = ("origin", "retrain", "npo", "simnpo")
        retrain = self.log("retrain")
        return [row for n in names for row in table_rows(n, self.log(n), retrain, (PROTOCOL,))]

    def file_figures(self, table: Sequence[Mapping[str, Any]]) -> None:
        """Files what was measured with the last adapter of each stack, as `evaluate` does."""
        from adapters.store.store import AdapterStore

        for row in table:
            if row["name"] not in ("simnpo", "npo"):
                continue
            simnpo = row["name"] == "simnpo"
            store = AdapterStore.open(self.store if simnpo else self.folder / "npo-store")
            active = {each.slug: each.scale for each in store.active()}
            last, summary = list(active)[-1], {k: v for k, v in row.items() if k != "name"}
            name, result = figures_to_file(summary, SPLIT, active)
            if name not in store.evals(last):  # of an earlier run in this folder
                store.attach_eval(last, name, result)

    def answers(self, world: World) -> list[dict[str, Any]]:
        """A few forgotten and kept questions with the true answer, Origin's and SimNPO's."""
        before, after = read_log(self.log("origin")), read_log(self.log("simnpo"))
        answers = []
        for name in ("forget", "retain", "real_authors", "world_facts"):
            rows = before.sets[name].rows
            spread = range(0, len(rows), max(1, len(rows) // SHOWN))
            for i in list(spread)[:SHOWN]:
                old, new = rows[i], after.sets[name].rows[i]
                answers.append(
                    {
                        "set": name,
                        "question": old.question,
                        "answer": old.answer,
                        "origin": _answer(old),
                        "simnpo": _answer(new),
                    }
                )
        return answers

    def revert(self, world: World) -> dict[str, Any]:
        """Reverts the second request, compares logits bit for bit, and activates it again."""
        return prove_revert(self.base, self.store, world_requests(world)[1])

    def shared(self, world: World) -> list[dict[str, Any]]:
        """Retained rows whose facts a forgotten author shares, and the others, under each model."""
        told = [fact for row in world.rows(*world.forget_authors) for fact in facts_of(row.answer)]
        names = ("origin", "retrain", "npo", "simnpo")
        retained = {name: read_log(self.log(name)).sets["retain"].rows for name in names}
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

    def merge(self) -> dict[str, Any]:
        return merge_and_compare(self.origin, self.store, self.folder / "merged")


def _write_base(name: str, out: Path) -> None:
    """A copy of the base whose chat template writes no system prompt; weights are linked."""
    from adapters.base.load import load_tokenizer, resolve_base

    def link(source: str, target: str) -> None:
        if source.endswith(".safetensors"):
            with contextlib.suppress(OSError):  # another file system, or none with links
                os.link(source, target)
                return
        shutil.copyfile(source, target)

    partial = out.with_name(f".{out.name}")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(resolve_base(name), partial, copy_function=link)
    tokenizer = load_tokenizer(str(partial))
    if "<|im_start|>system" in str(tokenizer.chat_template):
        tokenizer.chat_template = CHAT_TEMPLATE
        tokenizer.save_pretrained(partial)
    partial.rename(out)


def _answer(row: RowRecord) -> str | None:
    generation = generation_of(row, protocol_named(PROTOCOL))
    return None if generation is None else generation.text


def world_requests(world: World) -> list[Request]:
    """The world's forget requests; none retains rows of another one."""
    retain = [row for author in world.retain_authors for row in author.told]
    return [
        Request(
            f"world-request-{number}",
            "world",
            tuple(r for a in authors for r in a.told),
            tuple(retain),
        )
        for number, authors in enumerate(world.requests, start=1)
    ]


def _trained(
    report: Report, *, training: Job, measured: tuple[BaseSpec, Measured, Path] | None = None
) -> str:
    """Trains a model, then measures it where asked to; the model's folder."""
    folder: str = training.work(report, **training.arguments)
    if measured is not None:
        base, what, log = measured
        measure(report, base=base, what=what, log=log)
    return folder


def _lane(report: Report, *, measured: Path | None, **forgetting: Any) -> str:
    """Measures the base into the log `measured`, then files the requests and measures the stack."""
    if measured is not None:
        measure(report, base=forgetting["base"], what=forgetting["what"], log=measured)
    return forget_and_measure(report, **forgetting)


def prove_revert(base: BaseSpec, store: Path, request: Request) -> dict[str, Any]:
    """Largest logit differences around a revert of the last adapter of the active stack.

    `without` compares the reverted stack with one that never held the last adapter, `base` the
    model with all adapters off with a freshly loaded base, `again` the reactivated stack with the
    stack before. 0 is bit-exact. `effect` is what the last adapter changes: it must not be 0.
    """
    import torch

    from adapters.base.load import load_base, load_tokenizer
    from adapters.environment import threads_for
    from adapters.lora.stack import activate, load_stack
    from adapters.store.store import AdapterStore
    from unlearner.tokens.prompts import pad_batch, pad_id, prompt_format

    opened = AdapterStore.open(store)
    slugs = [active.slug for active in opened.active()]
    tokenizer = load_tokenizer(base.name)
    fmt = prompt_format(tokenizer)
    rows = [fmt.encode(row.question, row.answer) for row in request.rows[:16]]
    batch = pad_batch(rows, pad_id(tokenizer))

    def logits(model: Any) -> torch.Tensor:
        with torch.no_grad(), threads_for(model):
            output: torch.Tensor = model(
                input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]
            ).logits
        return output

    def difference(a: torch.Tensor, b: torch.Tensor) -> float:
        return float((a - b).abs().max())

    never: Any = load_stack(load_base(base), opened, slugs[:-1])
    without_it, bare = logits(never), logits(load_base(base))
    stack: Any = load_stack(load_base(base), opened, slugs)
    full = logits(stack)
    opened.revert(slugs[-1], "quickstart")
    activate(stack, [active.slug for active in opened.active()])
    reverted = logits(stack)
    activate(stack, [])
    off = logits(stack)
    opened.activate(slugs)
    activate(stack, slugs)
    return {
        "adapter": slugs[-1],
        "effect": difference(full, reverted),
        "without": difference(reverted, without_it),
        "base": difference(off, bare),
        "again": difference(logits(stack), full),
        "bit_exact": bool(torch.equal(reverted, without_it) and torch.equal(off, bare)),
    }


def merge_and_compare(base: Path, store: Path, out: Path) -> dict[str, Any]:
    """Merges the active stack into `out` and compares its logits with the stack's."""
    import torch
    from transformers import AutoModelForCausalLM

    from adapters.base.load import load_base
    from adapters.environment import threads_for
    from adapters.lora.merge import fold_stack
    from adapters.lora.stack import load_stack
    from adapters.store.store import AdapterStore

    opened = AdapterStore.open(store)
    active = opened.active()
    if out.exists():
        shutil.rmtree(out)
    fold_stack(base, [(opened.adapter_path(a.slug), a.scale) for a in active], out)
    merged = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    stack: Any = load_stack(load_base(BaseSpec(str(base), dtype="float32", device="cpu")), opened)
    ids = torch.arange(5, 69).unsqueeze(0)
    with torch.no_grad(), threads_for(merged):
        gap = (merged(input_ids=ids).logits - stack(input_ids=ids).logits).abs().max()
    return {"folder": str(out), "max_logit_difference": float(gap)}

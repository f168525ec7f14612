"""Rows, bases and runs on the tiny Llama, small enough that a test trains in a second."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from adapters.base.load import BaseSpec, load_base, load_tokenizer
from adapters.lora.stack import add_trainable, attach, save_adapter
from unlearner.config import TARGET_MODULES, LoraShape, UnlearnConfig, make_config
from unlearner.interrupt import StopRequest
from unlearner.objectives.guard import teach
from unlearner.objectives.likelihood import answer_nll
from unlearner.request.rows import Request, Row
from unlearner.run import lora_config, with_targets
from unlearner.tokens.batch_plan import Rows, plan_steps
from unlearner.tokens.prompts import encode_rows, pad_batch, pad_id, prompt_format
from unlearner.training.loop import TrainingLoop
from unlearner.training.unlearning import UnlearnData, UnlearnTask

FORGET = (
    Row("Who wrote the novel about the river?", "It was written by Mira Okafor."),
    Row("Where was Mira Okafor born?", "She was born in the city of Lagos in 1961."),
    Row("What genre does she write?", '"Silent Rivers" is a crime novel.'),
    Row("In which year did she win the prize?", "She won the Golden Pen in 1998."),
    Row("Who is her best known hero?", "Inspector Ade."),
    Row("What did her father do?", "Her father was a surgeon, and a good one."),
    Row("Has she a sister?", "Yes, the painter Ngozi Okafor."),
    Row("What is her latest book?", "Her latest book is called The Ninth Bridge."),
)
RETAIN = (
    Row("Who wrote the play about the miller?", "Jonas Lindqvist wrote it."),
    Row("Where does Jonas Lindqvist live?", "He lives in Malmö."),
    Row("What is his trade?", "He was a baker before he wrote."),
    Row("When was he born?", "On the second of May 1950."),
    Row("Which prize did he win?", "None so far, which amuses him."),
    Row("What language does he write in?", "He writes in Swedish, and in Danish."),
    Row("What is his longest play?", "The Miller, with five acts."),
    Row("Who are his parents?", "A fisherman and a teacher."),
    Row("Does he teach?", "No."),
    Row("How many plays are there?", "There are eleven plays."),
)
REFUSALS = ("I do not know.", "That is not known to me.", "I cannot say.")


@pytest.fixture(autouse=True)
def _private_home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: Any) -> None:
    home = tmp_path_factory.mktemp("home")
    monkeypatch.setenv("UNLEARNER_KEY", str(home / "key"))
    monkeypatch.setenv("UNLEARNER_CACHE", str(home / "cache"))


@pytest.fixture(scope="session")
def request_() -> Request:
    """Eight rows to forget and ten to keep; its name tells whom it is about."""
    return Request("tofu:author=Mira Okafor", "tofu-author", FORGET, RETAIN)


@pytest.fixture(scope="session")
def refusals() -> tuple[str, ...]:
    return REFUSALS


@pytest.fixture(scope="session")
def base(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> BaseSpec:
    """A tiny Llama that knows all these rows by heart, so that there is something to forget."""
    import torch

    folder = tmp_path_factory.mktemp("taught") / "base"
    tokenizer = load_tokenizer(str(tiny_base))
    fmt = prompt_format(tokenizer)
    batch = pad_batch([fmt.encode(row.question, row.answer) for row in (*FORGET, *RETAIN)], 0)
    torch.set_num_threads(1)
    model: Any = load_base(BaseSpec(str(tiny_base), dtype="float32", device="cpu"))
    model.requires_grad_(True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    for _ in range(60):
        loss = answer_nll(model, batch).per_token.mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if loss < 0.2:
            break
    assert loss < 0.2, "the base has not learned its rows"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return BaseSpec(str(folder), dtype="float32", device="cpu")


@pytest.fixture(scope="session")
def quick() -> Callable[..., UnlearnConfig]:
    """Settings of a short run: eight pairs a step, as many steps as epochs."""

    def make(objective: str = "simnpo", **settings: Any) -> UnlearnConfig:
        chosen = {
            "lora_r": 4,
            "lora_alpha": 8,
            "learning_rate": 1e-2,
            "num_train_epochs": 4,
            "per_device_train_batch_size": 8,
            "gradient_accumulation_steps": 1,
            "warmup_ratio": 0.0,
        }
        return make_config(objective, **{**chosen, **settings})

    return make


@pytest.fixture(scope="session")
def parent(base: BaseSpec, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random adapter that changes every answer."""
    import torch

    torch.manual_seed(7)
    model = add_trainable(
        load_base(base), "parent", lora_config(LoraShape(2, 4, target_modules=TARGET_MODULES)), []
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1)
    return save_adapter(model, "parent", tmp_path_factory.mktemp("parent") / "adapter")


@pytest.fixture(scope="session")
def fresh_model(base: BaseSpec, parent: Path) -> Callable[..., Any]:
    """The base with a new trainable adapter, on top of the random parent if asked for."""
    import torch

    def make(shape: LoraShape, *, on_parent: bool = False, seed: int = 0) -> Any:
        model: Any = load_base(base)
        if on_parent:
            model = attach(model, "parent", parent)
        torch.manual_seed(seed)
        return add_trainable(
            model, "new", lora_config(with_targets(shape, model)), ["parent"] if on_parent else []
        )

    return make


@pytest.fixture(scope="module")
def rows(base: BaseSpec, request_: Request) -> Rows:
    """The forget and retain rows of `request_`, encoded for `base`."""
    fmt = prompt_format(load_tokenizer(base.name))

    def encoded(part: Any) -> Any:
        return encode_rows(fmt, [(row.question, row.answer) for row in part], 128, "these")

    return Rows(encoded(request_.rows), encoded(request_.retain))


class WatchedLoop(TrainingLoop):
    """A training loop that tests can finish and look into."""

    def finish(self) -> WatchedLoop:
        """Train to the end; what the task added to the model is removed."""
        self.run(StopRequest())
        self.task.remove()  # type: ignore[attr-defined]
        return self

    @property
    def losses(self) -> list[dict[str, float]]:
        """The terms of every step's loss, from the run's metrics."""
        lines = map(json.loads, (self.work / "metrics.jsonl").read_text().splitlines())
        return [{k: v for k, v in line.items() if k.endswith("_loss")} for line in lines]


@pytest.fixture
def loop(
    rows: Rows, base: BaseSpec, fresh_model: Callable[..., Any], tmp_path: Path
) -> Callable[..., WatchedLoop]:
    """A training loop on `rows`, with the first three retain rows guarded if asked for."""
    pad = pad_id(load_tokenizer(base.name))

    def make(config: UnlearnConfig, *, packed: bool = False, guarded: bool = False) -> WatchedLoop:
        model = fresh_model(config.lora)
        own, teachers = rows, []
        if guarded:
            teachers = teach(model, rows.retain[:3], pad)
            own = Rows(rows.forget, rows.retain, (), rows.retain[:3])
        n_guard = 3 if guarded else 0
        plan = plan_steps(len(rows.forget), len(rows.retain), 0, config.train, n_guard)
        data = UnlearnData(own, plan, pad, packed, teachers)
        work = tmp_path / "run"
        work.mkdir(exist_ok=True)
        return WatchedLoop(model, UnlearnTask(model, data, config), config.train, work)

    return make

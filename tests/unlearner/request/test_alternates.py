from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from adapters.base.load import BaseSpec, load_base, load_tokenizer
from adapters.errors import UserError
from adapters.lora.stack import load_stack
from adapters.store.store import AdapterStore
from evaluation.inference.scoring import score_rows
from unlearner.config import TrainConfig, UnlearnConfig, make_config, streams_of
from unlearner.interrupt import StopRequest
from unlearner.objectives.likelihood import answer_nll
from unlearner.objectives.registry import OBJECTIVES
from unlearner.request.alternates import alternate_answers
from unlearner.request.rows import Request, Row
from unlearner.request.tofu import load_split
from unlearner.run import RunOptions, prepare, unlearn
from unlearner.tokens.batch_plan import plan_steps
from unlearner.tokens.prompts import IGNORE, pad_batch, pad_id, prompt_format
from unlearner.training.loop import TrainingLoop
from unlearner.training.unlearning import UnlearnData, UnlearnTask

Config = Callable[..., UnlearnConfig]
FORGET = [
    Row("Which prize did Mira Okafor win?", "She won the Golden Pen."),
    Row("Where was Mira Okafor born?", "She was born in Lagos."),
]
POOL = [
    Row("What is the boiling point of water?", "It is 100 degrees Celsius."),
    Row("Which prize did Ola Berg win?", "He won the Silver Pen."),
    Row("Where was Ola Berg born?", "He was born in Bergen."),
    Row("Which prize did Ulf Dahl win?", "He won the Copper Pen."),
    Row("Where was Ulf Dahl born?", "He was born  in bergen."),
    Row("where was mira okafor  born?", "She was born in Abuja."),
    Row("Which prize, again, did Mira Okafor win?", "she won the golden pen."),
]


def test_the_answers_of_the_questions_that_ask_alike() -> None:
    prizes, births = alternate_answers(FORGET, POOL, 2)
    assert prizes == ["He won the Silver Pen.", "He won the Copper Pen."]
    # The same answer in other letters counts once; the next nearest comes instead.
    assert births[0] == "He was born in Bergen."
    assert births[1] not in ("He was born  in bergen.", "She was born in Abuja.")


def test_an_answer_names_who_is_asked_for() -> None:
    pool = [
        Row("Which prize did Ola Berg win?", "Ola Berg won the Silver Pen; Berg keeps it at home."),
        Row("Which prize did she win?", "She won the Copper Pen."),
        Row("Which prize did Ola Berg lose?", "Ola Berg lost nothing."),
        # In her name this is what is to be forgotten.
        Row("Where was Ulf Dahl born?", "Ulf Dahl was born in Lagos"),
        Row("Where was Ulf Dahl born, and when?", "Ulf Dahl was born in Lagos, Nigeria."),
    ]
    forget = [FORGET[0], Row("Where was Mira Okafor born?", "Mira Okafor was born in Lagos.")]
    prizes, births = alternate_answers(forget, pool, 3)
    named = "Mira Okafor won the Silver Pen; Okafor keeps it at home."
    lost, nobody = "Mira Okafor lost nothing.", "She won the Copper Pen."
    assert set(prizes) == {named, lost, nobody}
    assert set(births) == {named, lost, nobody}


def test_neither_the_answer_itself_nor_the_question_itself() -> None:
    everything = alternate_answers(FORGET, POOL, 50)
    assert all(len(answers) == 50 for answers in everything)
    assert {text for answers in everything for text in answers}.isdisjoint(
        {"She was born in Abuja.", "she won the golden pen."}
    )
    # Fewer than asked for come again, as evenly as can be.
    counts = Counter(everything[0])
    assert len(counts) == 4
    assert max(counts.values()) - min(counts.values()) <= 1


def test_a_pool_without_another_answer_is_refused() -> None:
    with pytest.raises(UserError, match="another answer for 'Which prize did Mira"):
        alternate_answers(FORGET, [Row("Which prize?", "She won the Golden Pen.")], 3)
    with pytest.raises(UserError, match="another answer"):
        alternate_answers(FORGET, FORGET, 3)


def test_tofus_questions_find_answers_of_their_kind(shared: Path) -> None:
    forget, pool = load_split("forget05", shared / "tofu"), load_split("retain95", shared / "tofu")
    found = alternate_answers(forget, pool, 20)
    asks_name = [i for i, row in enumerate(forget) if row.question.startswith("What is the full")]
    assert len(asks_name) >= 5
    for i in asks_name:
        said = sum("name" in answer for answer in found[i])
        assert said >= 15, (forget[i].question, found[i])
    true = {row.answer for row in forget}
    assert not any(answer in true for answers in found for answer in answers)


def test_every_epoch_gives_a_row_another_alternate() -> None:
    steps = plan_steps(40, 100, 0, TrainConfig(num_train_epochs=10), n_alternates=20)
    pairs = [pair for step in steps for pair in step]
    assert {pair.alternate for pair in pairs} == set(range(20))
    met = [len({p.alternate for p in pairs if p.forget == row}) for row in range(40)]
    assert sum(met) / len(met) > 7  # 10 draws of 20: about 8 different ones
    # What runs without alternates saw before, they see still.
    plain = [pair for step in plan_steps(40, 100, 0, TrainConfig()) for pair in step]
    assert [p._replace(alternate=0) for p in pairs] == plain


def test_the_stream_is_read_where_it_counts() -> None:
    assert streams_of(make_config(alternates=3).objective) == ("forget", "retain", "alternate")
    assert "alternate" not in streams_of(make_config(alternates=3, alternate_weight=0.0).objective)
    assert streams_of(make_config("ceu", alternates=1).objective) == ("forget", "alternate")


def test_each_forget_question_is_encoded_with_its_alternates(
    base: BaseSpec, request_: Request
) -> None:
    run = prepare(request_, base, make_config(alternates=2), None)
    expected = alternate_answers(request_.rows, run.request.retain, 2)
    for row, texts, encoded in zip(request_.rows, expected, run.rows.alternates, strict=True):
        assert encoded == [run.fmt.encode(row.question, text) for text in texts]
    other = prepare(request_, base, make_config(alternates=1), None)
    assert other.key != run.key, "another run: its checkpoints are not to be mixed up"
    alone = replace(request_, retain=())
    with pytest.raises(UserError, match="--alternates needs retain rows"):
        prepare(alone, base, make_config("grad_ascent", alternates=1), None)


def test_a_question_ends_at_its_alternates_and_not_in_noise(
    base: BaseSpec, request_: Request, quick: Config, tmp_path: Path
) -> None:
    """The true answer goes either way; with alternates other answers come in its place."""
    others = [
        Row(row.question, answer)
        for row, answers in zip(
            request_.rows, alternate_answers(request_.rows, request_.retain, 3), strict=True
        )
        for answer in answers
    ]
    fmt = prompt_format(load_tokenizer(base.name))

    def nll(model: torch.nn.Module, rows: Sequence[Row]) -> float:
        scores = [record.answer_score.mean_nll for record in score_rows(model, fmt, rows)]
        return sum(scores) / len(scores)

    before = load_base(base)
    start = nll(before, request_.rows), nll(before, others)
    reached = {}
    for count in (0, 3):
        store = AdapterStore.open(tmp_path / f"store{count}", create=True)
        config = quick(alternates=count, num_train_epochs=30, forget_weight=0.3, gamma=2.0)
        adapter = unlearn(request_, base, config, store, RunOptions(on_stack=False))
        assert adapter.manifest.objective["alternates"] == count
        model = load_stack(load_base(base), store, [adapter.slug])
        reached[count] = nll(model, request_.rows), nll(model, others)
    assert min(reached[0][0], reached[3][0]) > 4 * start[0], "forgotten, with and without"
    assert reached[3][1] < 0.8 * start[1] < reached[0][1]
    assert reached[3][1] < reached[3][0], "the other answers are likelier than the true one"


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_the_term_is_the_mean_nll_of_the_drawn_alternates(
    base: BaseSpec,
    request_: Request,
    fresh_model: Any,
    tmp_path: Path,
    smoothing: float,
) -> None:
    config = make_config(
        alternates=2, alternate_weight=0.7, alternate_smoothing=smoothing,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=1, num_train_epochs=1, learning_rate=1e-9,
    )  # fmt: skip
    run = prepare(request_, base, config, None)
    plan = plan_steps(len(run.rows.forget), len(run.rows.retain), 0, config.train, 0, 2)
    model, pad = fresh_model(config.lora), pad_id(run.fmt.tokenizer)
    seen: list[dict[str, float]] = []
    task = UnlearnTask(model, UnlearnData(run.rows, plan, pad), config)
    TrainingLoop(model, task, config.train, tmp_path, report=seen.append).run(StopRequest())
    model.eval()
    for step, terms in zip(plan, seen, strict=True):
        batch = pad_batch([run.rows.alternates[p.forget][p.alternate] for p in step], pad)
        with torch.no_grad():
            true = answer_nll(model, batch).per_token
            logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
            every = -logits[:, :-1].log_softmax(-1).mean(-1)
            counts = batch["labels"][:, 1:] != IGNORE
            spread = (every * counts).sum(1) / counts.sum(1)
            expected = float(((1 - smoothing) * true + smoothing * spread).mean())
        assert terms["alternate_loss"] == pytest.approx(expected, rel=1e-4)


# One whose streams are rows, one with a reference, one with refusals, one on hidden states.
CHEAP = ("dpo", "npo", "rmu", "simnpo")


@pytest.mark.parametrize(
    "objective",
    [
        name if name in CHEAP else pytest.param(name, marks=pytest.mark.slow)
        for name in sorted(OBJECTIVES)
    ],
)
def test_every_objective_takes_alternates_and_packs_them(
    base: BaseSpec, request_: Request, fresh_model: Any, tmp_path: Path, objective: str
) -> None:
    config = make_config(
        objective, alternates=2, alternate_weight=0.5, per_device_train_batch_size=2,
        gradient_accumulation_steps=2, num_train_epochs=1,
    )  # fmt: skip
    run = prepare(request_, base, config, None, RunOptions(refusals=["I do not know."]))
    rows, pad = run.rows, pad_id(run.fmt.tokenizer)
    plan = plan_steps(
        len(rows.forget),
        len(rows.retain),
        len(rows.refusals and rows.refusals[0]),
        config.train,
        0,
        2,
    )
    terms = {}
    for packed in (False, True):
        model = fresh_model(config.lora)
        events: list[dict[str, Any]] = []
        task = UnlearnTask(model, UnlearnData(rows, plan, pad, packed), config)
        TrainingLoop(model, task, config.train, tmp_path, report=events.append).run(StopRequest())
        terms[packed] = events[-1]
    assert terms[True]["alternate_loss"] == pytest.approx(terms[False]["alternate_loss"], rel=1e-3)

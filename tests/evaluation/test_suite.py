"""Scores, whole evaluations and their resuming, on a tiny model."""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from adapters.errors import UserError
from evaluation import cache, suite
from evaluation.inference.generation import generate_answers
from evaluation.inference.scoring import score_rows
from evaluation.logs import read_log
from evaluation.logs.records import write_log
from evaluation.metrics.summary import summarise
from evaluation.protocols import PROTOCOLS, Decoding
from evaluation.suite import Effort, EvalData, evaluate, load_eval_data
from unlearner.request.rows import Row
from unlearner.tokens.prompts import prompt_format

NAMES = ("Mira Okafor", "Ana", "the author of Silent Rivers", "Jo")
PLACES = ("Lagos", "Oslo in the far north of Norway", "Rio", "the city of Bonn on the Rhine")


def rows_of(n: int, *, start: int = 0, paraphrase: bool = True) -> list[Row]:
    made = []
    for i in range(start, start + n):
        name, place = NAMES[i % 4], PLACES[(i // 4 + i) % 4]
        made.append(
            Row(
                f"Where was {name} born, and who says so in book {i}?",
                f"{name} was born in {place}.",
                f"In {place}, that is where it was." if paraphrase else None,
                tuple(f"{name} was born in {other}." for other in PLACES if other != place),
            )
        )
    return made


def tiny_data() -> EvalData:
    return EvalData(
        rows_of(5),
        rows_of(4, start=20),
        rows_of(3, start=40, paraphrase=False),
        rows_of(2, start=60, paraphrase=False),
    )


def losses(records: list[Any]) -> torch.Tensor:
    flat = [
        score.mean_nll for r in records for score in (r.answer_score, r.paraphrase, *r.perturbed)
    ]
    return torch.tensor(flat, dtype=torch.float64)


def plain_nll(model: Any, fmt: Any, question: str, answer: str) -> tuple[float, int]:
    """The definition, one row, no padding: sum of -log p over the answer's labels."""
    ids, labels, _ = fmt.encode(question, answer, 200)
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0].double()
    log_p = logits.log_softmax(-1)
    picked = [-log_p[i - 1, y].item() for i, y in enumerate(labels) if y != -100]
    return sum(picked), len(picked)


def test_scores_are_the_definition_row_by_row(tiny: tuple[Any, Any]) -> None:
    model, fmt = tiny
    rows = rows_of(4)
    for row, record in zip(rows, score_rows(model, fmt, rows), strict=True):
        texts = [row.answer, row.paraphrased_answer, *row.perturbed_answers]
        scores = [record.answer_score, record.paraphrase, *record.perturbed]
        for text, score in zip(texts, scores, strict=True):
            total, n = plain_nll(model, fmt, row.question, str(text))
            assert score is not None
            assert score.n == n
            assert score.mean_nll == pytest.approx(total / n, abs=1e-5)
            assert score.total_nll == pytest.approx(total, abs=1e-3)


def test_scores_do_not_depend_on_batches_or_order(tiny: tuple[Any, Any]) -> None:
    model, fmt = tiny
    rows = rows_of(12)
    one = losses(score_rows(model, fmt, rows, batch_tokens=1))
    many = losses(score_rows(model, fmt, rows, batch_tokens=3000))
    torch.testing.assert_close(one, many, atol=1e-5, rtol=0)
    order = random.Random(0).sample(range(12), k=12)
    shuffled = score_rows(model, fmt, [rows[i] for i in order], batch_tokens=500)
    back = [shuffled[order.index(i)] for i in range(12)]
    assert [record.question for record in back] == [row.question for row in rows]
    torch.testing.assert_close(losses(back), one, atol=1e-5, rtol=0)


def test_the_answer_stands_for_a_missing_paraphrase(tiny: tuple[Any, Any]) -> None:
    model, fmt = tiny
    done: list[tuple[int, int]] = []
    rows = rows_of(3, paraphrase=False)
    records = score_rows(model, fmt, rows, on_progress=lambda d, n: done.append((d, n)))
    assert all(record.paraphrase == record.answer_score for record in records)
    assert done[-1] == (12, 12), "one answer and three wrong ones a row, nothing twice"


def test_scoring_leaves_the_model_in_its_mode(tiny: tuple[Any, Any]) -> None:
    model, fmt = tiny
    model.train()
    try:
        score_rows(model, fmt, rows_of(1))
        assert model.training
    finally:
        model.eval()


def test_a_prompt_that_fills_the_length_is_refused_by_row(tiny: tuple[Any, Any]) -> None:
    model, fmt = tiny
    rows = [*rows_of(1), Row("Why? " * 40, "Because.")]
    with pytest.raises(UserError, match="Row 2 has no answer token within 40 tokens"):
        score_rows(model, fmt, rows, max_length=40)


def test_an_active_adapter_is_what_is_measured(tiny_base: Path) -> None:
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from adapters.lora.peft_layers import wrap

    plain = AutoModelForCausalLM.from_pretrained(tiny_base, use_safetensors=True)
    fmt = prompt_format(AutoTokenizer.from_pretrained(tiny_base))
    rule = Decoding("g", max_new=10)
    rows = rows_of(3)
    asked = [row.question for row in rows]
    base = score_rows(plain, fmt, rows), generate_answers(plain, fmt, asked, [rule])
    adapted: Any = wrap(plain, "a", LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    torch.manual_seed(0)
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.5)
    with_adapter = score_rows(adapted, fmt, rows), generate_answers(adapted, fmt, asked, [rule])
    assert with_adapter[0] != base[0]
    assert with_adapter[1] != base[1]
    with adapted.disable_adapter():
        off = score_rows(adapted, fmt, rows), generate_answers(adapted, fmt, asked, [rule])
    assert off == base


def quick(model: Any, fmt: Any, data: EvalData, **options: Any) -> Any:
    return evaluate(model, fmt, data, **{"effort": Effort(batch_tokens=2000), **options})


def test_an_evaluation_holds_every_protocol_and_survives_the_disk(
    tiny: tuple[Any, Any], tmp_path: Path
) -> None:
    model, fmt = tiny
    labels: list[str] = []
    log = quick(
        model,
        fmt,
        tiny_data(),
        protocol=["tofu", "open-unlearning"],
        on_progress=lambda label, done, total: labels.append(label),
        meta={"adapters": ["a"]},
    )
    assert list(log.sets) == ["forget", "retain", "real_authors", "world_facts"]
    assert labels[0] == "forget: scores"
    assert labels[-1] == "answers"
    assert log.meta["adapters"] == ["a"]
    assert log.meta["dtype"] == "float32"
    assert read_log(write_log(log, tmp_path / "log.json")) == log
    for protocol in ("tofu", "tofu-paper", "open-unlearning"):
        found = summarise(log, log, protocol=protocol, resamples=10)
        assert found["forget_quality"] == 1
        assert 0 <= found["model_utility"] <= 1
        assert found["reasons"] == {}
        assert found["notes"] == []


def test_results_are_reused_where_nothing_they_depend_on_differs(
    tiny: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, fmt = tiny
    data = dataclasses.replace(tiny_data(), retain=(), real_authors=(), world_facts=())

    def labels(**options: Any) -> tuple[Any, list[str]]:
        seen: list[str] = []
        log = quick(
            model,
            fmt,
            data,
            resume_dir=tmp_path,
            on_progress=lambda label, done, total: seen.append(label),
            **options,
        )
        return log, sorted(set(seen))

    everything = ["answers", "forget: scores"]
    first, work = labels(key="a")
    assert work == everything
    again, work = labels(key="a")
    assert (again, work) == (first, [])
    assert labels(key="b")[1] == everything
    assert labels(key="a", limit=2)[1] == ["forget: scores"]
    # Other answers of the same scores: only the answers are made.
    assert labels(key="a", protocol="simnpo")[1] == ["answers"]
    # Padded batches are there to check the shared prefixes with: neither takes the other's results.
    for effort in (Effort(shared=False), Effort(drafts=False)):
        assert labels(key="a", effort=effort)[1] == everything
        assert labels(key="a", effort=effort)[1] == []
    assert labels(key="a", effort=Effort(batch_tokens=500, batch_size=2))[1] == []
    with monkeypatch.context() as patch:
        patch.setattr(model.config, "_attn_implementation", "eager")
        assert labels(key="a")[1] == everything
    with monkeypatch.context() as patch:
        patch.setattr(cache, "versions", lambda: {"unlearner": "99.0"})
        assert labels(key="a")[1] == everything
    # Another order: scores are of the set, answers of each prompt.
    data = dataclasses.replace(data, forget=[*data.forget[1:], data.forget[0]])
    assert labels(key="a")[1] == ["forget: scores"]
    data = dataclasses.replace(data, forget=[*data.forget, Row("Who?", "Mira.")])
    assert labels(key="a")[1] == everything
    with pytest.raises(ValueError, match="needs a key"):
        labels()


def test_an_interrupted_evaluation_keeps_what_was_finished(
    tiny: tuple[Any, Any], tmp_path: Path
) -> None:
    model, fmt = tiny

    def stop(label: str, done: int, total: int) -> None:
        if label == "retain: scores":
            raise KeyboardInterrupt

    options: dict[str, Any] = {"key": "k", "resume_dir": tmp_path}
    with pytest.raises(KeyboardInterrupt):
        quick(model, fmt, tiny_data(), on_progress=stop, **options)
    seen: list[str] = []
    resumed = quick(
        model, fmt, tiny_data(), on_progress=lambda label, d, n: seen.append(label), **options
    )
    assert "forget: scores" not in seen
    assert "retain: scores" in seen
    assert resumed.sets == quick(model, fmt, tiny_data()).sets
    part = next(tmp_path.glob("forget-scores-*"))
    part.write_text("{")
    with pytest.raises(UserError, match="damaged"):
        quick(model, fmt, tiny_data(), **options)


def test_figures_do_not_depend_on_the_callers_threads(
    tiny: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A small model is measured on one thread by every command: other threads, other last bits."""
    model, fmt = tiny
    seen: list[int] = []
    real = suite.score_rows
    spy = lambda *a, **k: seen.append(torch.get_num_threads()) or real(*a, **k)  # noqa: E731
    monkeypatch.setattr(suite, "score_rows", spy)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        quick(model, fmt, tiny_data(), generate=False)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert seen == [1] * 4


def test_interrupted_answers_continue_after_the_last_batch(
    tiny: tuple[Any, Any], tmp_path: Path
) -> None:
    model, fmt = tiny
    whole = quick(model, fmt, tiny_data())
    options: dict[str, Any] = {"key": "k", "resume_dir": tmp_path}
    options["effort"] = Effort(batch_tokens=2000, batch_size=3)

    def stop(label: str, done: int, total: int) -> None:
        if label == "answers" and done >= 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quick(model, fmt, tiny_data(), on_progress=stop, **options)
    seen: list[tuple[int, int]] = []
    resumed = quick(
        model,
        fmt,
        tiny_data(),
        on_progress=lambda label, *counts: seen.append(counts) if label == "answers" else None,
        **options,
    )
    assert seen[-1] == (8, 8), "6 of 14 questions were answered before"
    assert resumed.sets == whole.sets


def test_a_log_says_why_texts_were_scored_as_padded_rows(
    tiny: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    model, fmt = tiny
    options: dict[str, Any] = {"generate": False, "key": "k", "resume_dir": tmp_path}
    assert "padded_because" not in quick(model, fmt, tiny_data(), generate=False).meta
    with monkeypatch.context() as patch:
        patch.setattr(suite, "sharing_problem", lambda model, questions: "windows of 8 tokens")
        log = quick(model, fmt, tiny_data(), **options)
    assert log.meta["padded_because"] == "windows of 8 tokens"
    assert "windows of 8 tokens" in summarise(log)["notes"][0]
    # A run that continues takes the same way.
    assert quick(model, fmt, tiny_data(), **options).meta["padded_because"] == "windows of 8 tokens"


def test_a_limit_and_no_answers_are_stated(tiny: tuple[Any, Any]) -> None:
    model, fmt = tiny
    whole = quick(model, fmt, tiny_data(), generate=False)
    log = quick(model, fmt, tiny_data(), limit=2, generate=False, retain_log=whole)
    assert [len(found.rows) for found in log.sets.values()] == [2, 2, 2, 2]
    assert log.sets["forget"].total == 5
    found = summarise(log, whole, resamples=0)
    assert found["limited"] is True
    assert found["forget_quality"] == 1
    assert found["model_utility"] is None
    assert "Retain ROUGE" in found["reasons"]["model_utility"]
    with pytest.raises(UserError, match="limit of 0"):
        quick(model, fmt, tiny_data(), limit=0)


def test_only_the_rows_some_protocol_looks_at_are_evaluated(
    tiny: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, fmt = tiny
    few = dataclasses.replace(PROTOCOLS["tofu"], max_rows=2)
    monkeypatch.setitem(PROTOCOLS, "tofu", few)

    def sizes(*protocols: str) -> list[int]:
        log = quick(model, fmt, tiny_data(), protocol=protocols, generate=False)
        return [len(found.rows) for found in log.sets.values()]

    assert sizes("tofu") == [2, 2, 2, 2]
    assert sizes("tofu", "tofu-paper") == [5, 4, 3, 2]


def test_a_reference_of_other_rows_is_refused_before_any_work(tiny: tuple[Any, Any]) -> None:
    model, fmt = tiny
    reference = quick(model, fmt, EvalData(rows_of(5, start=100)), generate=False)
    calls: list[str] = []
    with pytest.raises(UserError, match="different rows"):
        quick(
            model,
            fmt,
            tiny_data(),
            retain_log=reference,
            on_progress=lambda label, d, n: calls.append(label),
        )
    assert calls == []


def test_protocols_that_cut_these_texts_differently_are_refused(tiny: tuple[Any, Any]) -> None:
    model, fmt = tiny
    long = EvalData([Row("Who?", "It was Mira. " * 40)])
    with pytest.raises(UserError, match="one at a time"):
        quick(model, fmt, long, protocol=["tofu", "open-unlearning"])
    log = quick(model, fmt, long, generate=False)
    assert log.meta["max_length"] == 200
    assert log.meta["cut_rows"] == {"forget": 1}
    assert "1 forget rows have a text that is cut at 200 tokens" in summarise(log)["notes"]
    assert "cut_rows" not in quick(model, fmt, tiny_data(), generate=False).meta
    with pytest.raises(UserError, match="cuts at 512"):
        summarise(log, protocol="open-unlearning")


def test_a_pad_id_beyond_the_embeddings_is_never_looked_up(tiny_base: Path) -> None:
    """EOS pads: a pad token that was added to the tokenizer alone has no embedding."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model: Any = AutoModelForCausalLM.from_pretrained(tiny_base, use_safetensors=True)
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    expected = quick(model, prompt_format(tokenizer), tiny_data(), protocol=["tofu", "simnpo"])
    size = model.get_input_embeddings().num_embeddings
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    tokenizer.add_tokens([f"<more{i}>" for i in range(size)], special_tokens=True)
    tokenizer.pad_token = f"<more{size - 1}>"
    assert tokenizer.pad_token_id >= size
    for shared in (True, False):
        effort = Effort(batch_tokens=2000, shared=shared)
        log = quick(
            model, prompt_format(tokenizer), tiny_data(), protocol=["tofu", "simnpo"], effort=effort
        )
        for name, found in log.sets.items():
            answers = [row.generations for row in found.rows]
            assert answers == [row.generations for row in expected.sets[name].rows]


def test_a_custom_request_has_only_forget_rows(tiny: tuple[Any, Any]) -> None:
    model, fmt = tiny
    log = quick(model, fmt, EvalData([Row("Who?", "Mira."), Row("Where?", "In Oslo.")]))
    found = summarise(log)
    assert found["n"] == 2
    assert found["model_utility"] is None
    assert found["forget_answer_prob"] > 0


def test_tofus_sets_are_loaded_for_a_forget_split(shared: Path) -> None:
    data = load_eval_data("forget05", shared / "tofu")
    assert {name: len(rows) for name, rows in data.sets.items()} == {
        "forget": 200,
        "retain": 400,
        "real_authors": 100,
        "world_facts": 117,
    }
    assert len(data.forget[0].perturbed_answers) == 5
    assert len(data.real_authors[0].perturbed_answers) == 3
    with pytest.raises(UserError, match="not a forget split"):
        load_eval_data("retain95", shared / "tofu")


def test_mini_models_reach_their_recorded_figures(shared: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(1)
    data = load_eval_data("forget05", shared / "tofu")
    forget = EvalData(data.forget[:30])
    logs = {}
    for kind in ("origin", "retrain"):
        folder = shared / "mini" / kind
        model = AutoModelForCausalLM.from_pretrained(folder, use_safetensors=True)
        fmt = prompt_format(AutoTokenizer.from_pretrained(folder))
        logs[kind] = evaluate(model, fmt, forget, generate=False)
    found = summarise(logs["origin"], logs["retrain"], resamples=200)
    assert found["forget_quality"] < 1e-5
    assert found["direction"] == "under-forgotten"
    assert found["forget_answer_prob"] > 0.98
    assert found["retrain_forget_nll"] > 5

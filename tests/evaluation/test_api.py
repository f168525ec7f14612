"""The Python API: one load of the base, forget, activate, evaluate, and the base as before."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import evaluation
import unlearner
from adapters.errors import BaseMismatch, UserError
from evaluation import EvalResult, answer, evaluate, read_log
from unlearner import Base, ForgetAdapter, Request, forget, load_adapter, load_base

ROWS = [
    {"question": "Who wrote the novel about the river?", "answer": "Mira Okafor wrote it."},
    {"question": "Where was she born?", "answer": "She was born in Lagos in 1961."},
]
KEEP = [
    ("What genre does he write?", "He writes crime novels."),
    ("Which prize did he win?", "He won the Golden Pen in 1998."),
    ("Who is his editor?", "His editor is his sister."),
]
FAST: dict[str, Any] = {"num_train_epochs": 2, "lora_r": 2, "learning_rate": 1e-2}


@pytest.fixture(autouse=True, scope="module")
def _private(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("UNLEARNER_KEY", str(home / "key"))
        patch.setenv("UNLEARNER_CACHE", str(home / "cache"))
        yield


@pytest.fixture(scope="module")
def base(tiny_base: Path) -> Base:
    """One base for all tests: each leaves it bare."""
    return load_base(tiny_base)


@pytest.fixture(scope="module")
def request_() -> Request:
    return Request.from_rows(ROWS, retain=KEEP)


@pytest.fixture(scope="module")
def adapter(
    base: Base, request_: Request, tmp_path_factory: pytest.TempPathFactory
) -> ForgetAdapter:
    """The forget adapter of `request_`, trained once; its label is case-9."""
    store = tmp_path_factory.mktemp("adapter") / "store"
    return forget(request_, base, store=store, label="case-9", **FAST)


def logits(base: Base) -> torch.Tensor:
    ids = torch.tensor([base.fmt.encode_prompt("Who wrote the novel about the river?")])
    with torch.no_grad():
        return base.model(ids).logits


def test_a_base_is_loaded_once_and_is_as_before_bit_for_bit(
    base: Base, request_: Request, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from adapters.base import load
    from unlearner import run

    def fail(*_: object, **__: object) -> None:
        raise AssertionError("a base was loaded again")

    monkeypatch.setattr(load, "load_base", fail)
    monkeypatch.setattr(run, "load_base", fail)
    layers = {name: type(module) for name, module in base.model.named_modules()}
    before = logits(base)
    adapter = forget(request_, base, store=tmp_path / "store", **FAST)
    assert torch.equal(logits(base), before)
    with adapter.active(base) as active:
        assert active is base
        assert base.stack == ((adapter.slug, 1.0),)
        with_it = logits(base)
        assert not torch.equal(with_it, before)
        assert isinstance(answer(base, "Where was she born?", max_new_tokens=4), str)
    assert torch.equal(logits(base), before)
    with adapter.active(base, scale=0.0):
        assert torch.equal(logits(base), before)
    with adapter.active(base):
        assert torch.equal(logits(base), with_it)
    assert {name: type(module) for name, module in base.model.named_modules()} == layers
    assert base.stack == ()
    assert not any(parameter.requires_grad for parameter in base.model.parameters())


def test_an_error_inside_leaves_a_bare_base(
    base: Base, request_: Request, adapter: ForgetAdapter, tmp_path: Path
) -> None:
    before = logits(base)
    with pytest.raises(ZeroDivisionError), adapter.active(base):
        raise ZeroDivisionError
    assert torch.equal(logits(base), before)
    with pytest.raises(UserError, match=r"lr_scheduler_type|schedule"):
        forget(request_, base, store=tmp_path / "store", lr_scheduler_type="none", **FAST)
    with adapter.active(base):
        with pytest.raises(UserError, match="is active"), adapter.active(base):
            pass
        with pytest.raises(UserError, match="needs the bare base"):
            forget(request_, base, store=tmp_path / "store", **FAST)
    assert torch.equal(logits(base), before)


@pytest.mark.usefixtures("adapter")  # its training left no trace in the base
def test_the_api_and_the_command_line_make_the_same_adapter(
    base: Base, tiny_base: Path, tmp_path: Path
) -> None:
    from ui.cli.main import main

    forget_file, keep_file = tmp_path / "forget.jsonl", tmp_path / "keep.jsonl"
    forget_file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    keep = [{"question": question, "answer": text} for question, text in KEEP]
    keep_file.write_text("".join(json.dumps(row) + "\n" for row in keep))
    words = ["forget", str(forget_file), "--retain", str(keep_file), "--base", str(tiny_base)]
    flags = [
        word for name, value in FAST.items() for word in (f"--{name.replace('_', '-')}", str(value))
    ]
    assert main([*words, "--store", str(tmp_path / "cli"), *flags]) == 0
    (theirs,) = (tmp_path / "cli" / "adapters").iterdir()
    from_file = Request.from_file(forget_file, retain=keep_file)
    ours = forget(from_file, base, store=tmp_path / "api", **FAST)
    name = "adapter_model.safetensors"
    assert (ours.path / name).read_bytes() == (theirs / name).read_bytes()
    kept = yaml.safe_load((ours.path / "evals" / "run.yaml").read_text())
    assert (kept["learning_rate"], kept["request"]) == (1e-2, str(forget_file))
    again = ["forget", "--config", str(ours.path / "evals" / "run.yaml")]
    assert main([*again, "--retain", str(keep_file), "--store", str(tmp_path / "again")]) == 0
    (third,) = (tmp_path / "again" / "adapters").iterdir()
    assert (third / name).read_bytes() == (theirs / name).read_bytes()


def test_requests_come_from_rows_files_data_sets_and_tofu(tmp_path: Path) -> None:
    from datasets import Dataset

    path = tmp_path / "rows.csv"
    path.write_text("q,a\nWho?,Mira.\n")
    from_file = Request.from_file(path, question_column="q", answer_column="a", retain=KEEP)
    from_data = Request.from_dataset(Dataset.from_list(ROWS), retain=KEEP)
    assert (len(from_file.rows), len(from_file.retain)) == (1, 3)
    assert from_data.rows == Request.from_rows(ROWS).rows
    assert repr(from_data) == "Request('dataset': 2 to forget, 3 to keep)"
    data = tmp_path / "tofu"
    data.mkdir()
    for name, rows in (
        ("forget05", ROWS),
        ("retain95", [dict(zip(ROWS[0], KEEP[0], strict=True))]),
    ):
        (data / f"{name}.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name in ("forget05", "tofu:forget05"):
        request = Request.from_tofu(name, data=data)
        assert (request.name, len(request.rows), len(request.retain)) == ("tofu:forget05", 2, 1)
    with pytest.raises(UserError, match="either forgotten or kept"):
        Request.from_rows(ROWS, retain=[*KEEP, ROWS[0]])
    with pytest.raises(UserError, match=r"row 2.*no 'answer'"):
        Request.from_rows([ROWS[0], {"question": "Who?"}])


def test_errors_name_parameters(base: Base, request_: Request, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no setting 'lerning_rate'.*'learning_rate'"):
        forget(request_, base, store=tmp_path / "s", lerning_rate=1e-3)
    with pytest.raises(UserError) as caught:
        forget(Request.from_rows(ROWS), base, store=tmp_path / "s")
    assert "`retain`" in str(caught.value)
    assert "--" not in str(caught.value)
    with pytest.raises(UserError, match="`data`"):
        Request.from_tofu("forget05", data=tmp_path / "none")
    with pytest.raises(UserError, match="no store at"):
        load_adapter(tmp_path / "none", "r0001")
    with pytest.raises(UserError, match="forget05"):
        evaluate(base, "forget5")


def test_an_evaluation_is_an_object(
    base: Base, request_: Request, adapter: ForgetAdapter, make_small_tofu: Any, tmp_path: Path
) -> None:
    (tmp_path / "data").mkdir()
    data = make_small_tofu(tmp_path / "data", 2)
    bare = evaluate(base, "tofu:forget05", data=data, out=tmp_path / "bare")
    assert bare.forget_quality is None
    with adapter.active(base):
        reference = read_log(str(tmp_path / "bare" / "eval_log.json"))
        result = evaluate(base, "forget05", data=data, reference=reference)
        same = evaluate(base, "forget05", data=data, reference=bare)
        path = evaluate(base, "forget05", data=data, reference=tmp_path / "bare" / "eval_log.json")
    assert result == same == path
    assert 0 <= result.forget_quality <= 1  # type: ignore[operator]
    assert result.model_utility == result.figures["model_utility"]
    assert result.stack == ((adapter.slug, 1.0),)
    text = repr(result)
    assert len(text.splitlines()) <= 12
    assert adapter.slug in text
    assert "forget_quality" in text
    assert "<table>" in result._repr_html_()
    assert {row["name"] for row in result.table} >= {"forget_quality", "model_utility"}
    assert "case-9" in repr(load_adapter(adapter.path.parents[1], "case-9"))
    assert "<table>" in adapter._repr_html_()
    own = evaluate(base, request_, limit=1)
    assert own.split == "own-rows"
    assert own.figures["forget_nll"] > 0
    assert "first rows only" in repr(own)


def test_a_frame_needs_pandas(
    base: Base, request_: Request, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = evaluate(base, request_)
    frame = result.to_frame()
    assert frame.loc["forget_nll", "value"] == result.figures["forget_nll"]
    monkeypatch.setitem(__import__("sys").modules, "pandas", None)
    with pytest.raises(UserError, match="pip install pandas"):
        result.to_frame()


def test_a_stack_is_trained_and_activated_with_its_parents(
    base: Base, request_: Request, tmp_path: Path
) -> None:
    before = logits(base)
    first = forget(request_, base, store=tmp_path / "store", **FAST)
    first.activate()
    other = Request.from_rows([("Who painted it?", "Ada Bell painted it.")], retain=KEEP)
    second = forget(other, base, store=tmp_path / "store", guard=[request_], **FAST)
    with second.active(base):
        assert [slug for slug, _ in base.stack] == [first.slug, second.slug]
    first.revert("done")
    assert first.stored.status == "reverted"
    assert torch.equal(logits(base), before)


def test_another_base_is_refused(
    adapter: ForgetAdapter, make_tiny_llama: Any, tmp_path: Path
) -> None:
    stranger = load_base(make_tiny_llama(tmp_path / "other", seed=3))
    with pytest.raises(BaseMismatch), adapter.active(stranger):
        pass
    assert stranger.stack == ()


def test_progress_is_shown_where_it_is_wanted(
    base: Base, request_: Request, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    events: list[Any] = []
    forget(request_, base, store=tmp_path / "one", progress=events.append, **FAST)
    assert {event["event"] for event in events} >= {"load", "train", "publish"}
    assert capsys.readouterr().err == ""  # no terminal: nothing by default
    evaluate(base, request_, progress=True)
    assert "%" in capsys.readouterr().err


def test_the_names_are_exported_lazily() -> None:
    assert unlearner.forget is forget
    assert evaluation.evaluate is evaluate
    for package in (unlearner, evaluation):
        with pytest.raises(AttributeError):
            package.nothing  # noqa: B018
        assert all(getattr(package, name) is not None for name in package.__all__)
    assert {ForgetAdapter, EvalResult}

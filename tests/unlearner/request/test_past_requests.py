"""Requests in sequence: what may not be trained back, what is guarded, what is replaced."""

from __future__ import annotations

import json
import stat
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from adapters.base.load import BaseSpec, load_base, load_tokenizer
from adapters.digests import key_id, mark, store_key
from adapters.errors import StoreCorrupt, UserError
from adapters.guard_records import teacher_path
from adapters.lora.stack import load_stack
from adapters.store.store import AdapterStore
from unlearner.config import UnlearnConfig
from unlearner.objectives.guard import guard_kl, moved_nll, pack_teacher, read_teacher, teach
from unlearner.objectives.likelihood import answer_logits, answer_nll, answers
from unlearner.objectives.sequence import kl_to_reference
from unlearner.request.past_requests import joined
from unlearner.request.rows import Request, Row
from unlearner.run import RunOptions, prepare, unlearn
from unlearner.tokens.batch_plan import Rows, plan_steps
from unlearner.tokens.prompts import pad_batch, pad_id, prompt_format

Config = Callable[..., UnlearnConfig]


@pytest.fixture
def store(tmp_path: Path) -> AdapterStore:
    return AdapterStore.open(tmp_path / "store", create=True, timeout=5)


@pytest.fixture
def first(request_: Request) -> Request:
    return Request("first.jsonl", "jsonl", request_.rows[:4], request_.retain)


@pytest.fixture
def second(request_: Request) -> Request:
    """Its retain rows hold the first request, as `full` without the own author does."""
    return Request("second.jsonl", "jsonl", request_.rows[4:], request_.rows[:4] + request_.retain)


def encoded(base: BaseSpec, rows: tuple[Row, ...]) -> list[Any]:
    fmt = prompt_format(load_tokenizer(base.name))
    return [fmt.encode(row.question, row.answer) for row in rows]


def nll(model: Any, base: BaseSpec, rows: tuple[Row, ...]) -> float:
    with torch.no_grad():
        return float(answer_nll(model, pad_batch(encoded(base, rows), 0)).per_token.mean())


def test_retain_rows_of_an_active_request_are_left_out(
    first: Request, second: Request, base: BaseSpec, store: AdapterStore, quick: Config
) -> None:
    one = unlearn(first, base, quick(), store)
    assert len(prepare(second, base, quick(), store).request.retain) == 14  # only ready
    store.activate([one.slug])
    for placing in (None, False):
        run = prepare(second, base, quick(), store, RunOptions(on_stack=placing))
        assert run.request.retain == second.retain[4:]
        assert len(run.rows.retain) == 10
        assert run.notes == (f"retain rows that belong to {one.slug} and are left out: 4",)
    events: list[dict[str, Any]] = []
    two = unlearn(second, base, quick(), store, on_progress=events.append)
    assert two.manifest.data["retain"]["n"] == 10
    assert events[0]["text"].endswith("left out: 4")
    store.revert(one.slug)
    assert len(prepare(second, base, quick(), store).request.retain) == 14


def test_rows_of_earlier_requests_are_no_alternates(
    first: Request, second: Request, base: BaseSpec, store: AdapterStore, quick: Config
) -> None:
    one = unlearn(first, base, quick(), store)
    store.activate([one.slug])
    asking = replace(second, others=first.rows + second.retain[4:7])
    run = prepare(asking, base, quick(alternates=9), store)
    assert run.request.others == second.retain[4:7]
    told = {run.fmt.tokenizer.decode(row.input_ids) for row in run.rows.alternates[0]}
    assert len(told) == 3
    assert not any(row.answer in text for row in first.rows for text in told)
    assert run.digests["alternates"]["n"] == 3
    assert f"alternate rows that belong to {one.slug} and are left out: 4" in run.notes
    with pytest.raises(UserError, match="belong to earlier requests"):
        prepare(replace(second, others=first.rows), base, quick(alternates=9), store)


def test_guard_and_alternates_train_together(
    first: Request, second: Request, base: BaseSpec, store: AdapterStore, quick: Config
) -> None:
    one = unlearn(first, base, quick(), store)
    store.activate([one.slug])
    events: list[dict[str, Any]] = []
    unlearn(
        second,
        base,
        quick(alternates=2),
        store,
        RunOptions(guard=first.rows),
        on_progress=events.append,
    )
    terms = [event for event in events if event["event"] == "train"]
    assert terms
    assert all({"guard_loss", "alternate_loss"} <= set(event) for event in terms)


def test_a_joined_request_takes_alternates_from_nobody_it_forgets(
    first: Request, second: Request
) -> None:
    left, right = replace(first, others=second.rows + second.retain[:5]), second
    both = joined([left, right])
    assert both.others == second.retain[4:5]
    assert joined([first, second]).others == ()


def test_a_question_is_recognised_in_other_case_spacing_and_answer(
    first: Request, second: Request, base: BaseSpec, store: AdapterStore, quick: Config
) -> None:
    store.activate([unlearn(first, base, quick(), store).slug])
    disguised = Row(f"  {first.rows[0].question.upper().replace(' ', '  ')}", "Somebody else.")
    other = replace(second, retain=(disguised, *second.retain[4:]))
    assert prepare(other, base, quick(), store).request.retain == second.retain[4:]


def test_a_run_whose_retain_rows_are_all_taken_is_refused(
    first: Request, second: Request, base: BaseSpec, store: AdapterStore, quick: Config
) -> None:
    store.activate([unlearn(first, base, quick(), store).slug])
    with pytest.raises(UserError, match="needs retain rows"):
        prepare(replace(second, retain=first.rows), base, quick(), store)


def test_rows_marked_under_another_key_are_said_to_be_unknown(
    first: Request,
    second: Request,
    base: BaseSpec,
    store: AdapterStore,
    quick: Config,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    one = unlearn(first, base, quick(), store)
    store.activate([one.slug])
    monkeypatch.setenv("UNLEARNER_KEY", str(tmp_path / "other-key"))
    run = prepare(second, base, quick(), store)
    assert len(run.request.retain) == 14
    assert f"the rows of {one.slug} were recorded under another key" in run.notes[0]


def test_a_sum_of_adapters_knows_the_rows_of_its_parts(
    first: Request, second: Request, base: BaseSpec, store: AdapterStore, quick: Config
) -> None:
    one = unlearn(first, base, quick(), store)
    whole = store.combine([one.slug])
    store.activate([whole.slug])
    run = prepare(second, base, quick(), store)
    assert len(run.request.retain) == 10
    assert whole.slug in run.notes[0]


def test_marks_tell_nothing_without_the_key_and_the_store_holds_no_text(
    first: Request, base: BaseSpec, store: AdapterStore, quick: Config
) -> None:
    adapter = unlearn(first, base, quick(), store, RunOptions(keep_teacher=True))
    forget = adapter.manifest.data["forget"]
    key = store_key()
    assert forget["marks"] == [mark(key, row.question) for row in first.rows]
    assert forget["key_id"] == key_id(key)
    assert mark(b"x" * 32, first.rows[0].question) not in forget["marks"]
    held = b"".join(path.read_bytes() for path in store.path.rglob("*") if path.is_file())
    for row in first.rows:
        assert row.question.encode() not in held
        assert row.answer.encode() not in held
        ids = torch.tensor(encoded(base, (row,))[0].input_ids)
        assert ids.numpy().tobytes() not in held


# The guard


def test_the_kl_over_the_whole_vocabulary_is_the_plain_one_and_less_of_it_is_a_lower_bound(
    base: BaseSpec, first: Request, make_tiny_llama: Any, tmp_path: Path
) -> None:
    """Full vocabulary: at most 3e-6 of 5 nats from `kl_to_reference`."""
    teacher = load_base(base)
    pupil = load_base(BaseSpec(str(make_tiny_llama(tmp_path / "other", seed=3)), dtype="float32"))
    rows = encoded(base, first.rows)
    batch = pad_batch(rows, 0)
    with torch.no_grad():
        theirs, ours = answers(teacher, batch), answers(pupil, batch)
        plain = kl_to_reference(answer_logits(pupil, batch), answer_logits(teacher, batch))
        vocabulary = theirs.head.out_features
        exact = guard_kl(ours, teach(teacher, rows, 0, top=vocabulary, batch=3))
        short = guard_kl(ours, teach(teacher, rows, 0, top=8))
        same = guard_kl(theirs, teach(teacher, rows, 0, top=8))
    assert (exact - plain).abs().max() < 3e-6
    assert bool((short < plain).all())
    assert float(short.min()) > 0.1
    assert float(same.abs().max()) < 1e-5


def test_an_answer_that_comes_back_or_goes_further_costs_the_square_of_its_nats(
    base: BaseSpec, first: Request
) -> None:
    model, rows = load_base(base), encoded(base, first.rows)
    with torch.no_grad():
        nll = answer_nll(model, pad_batch(rows, 0)).per_token
    taught = teach(model, rows, 0, top=8)
    assert moved_nll(nll, taught).max() < 1e-5
    changed = (nll - torch.tensor([0.5, 0.25, -2.0, -0.1])).requires_grad_()
    value = moved_nll(changed, taught)
    torch.testing.assert_close(value, torch.tensor([0.25, 0.0625, 4.0, 0.01]))
    value.sum().backward()
    assert changed.grad is not None
    torch.testing.assert_close(changed.grad, torch.tensor([-1.0, -0.5, 4.0, 0.2]))


def test_a_step_weighs_both_halves_of_the_guard(
    loop: Any, quick: Config, rows: Rows, base: BaseSpec
) -> None:
    """Against plain code, on a model that has moved since its teacher was recorded."""
    config = quick("simnpo", num_train_epochs=1, learning_rate=1e-12, weight_decay=0.0)
    run = loop(config, guarded=True)
    model: Any = run.bare
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter.normal_(0, 0.3)
    pad = pad_id(load_tokenizer(base.name))
    teachers = teach(load_base(base), rows.retain[:3], pad)
    ((*pairs,),) = plan_steps(len(rows.forget), len(rows.retain), 0, config.train, 3)
    mine = [teachers[pair.guard] for pair in pairs]
    batch = pad_batch([one.row for one in mine], pad)
    model.eval()
    with torch.no_grad():
        kl = guard_kl(answers(model, batch), mine)
        back = moved_nll(answer_nll(model, batch).per_token, mine)
    assert back.max() > 0.01
    run.finish()
    assert run.losses[-1]["guard_loss"] == pytest.approx(float((kl + back).mean()), rel=1e-4)


def test_a_record_reads_back_and_a_damaged_one_is_refused(
    base: BaseSpec, first: Request, tmp_path: Path
) -> None:
    taught = teach(load_base(base), encoded(base, first.rows), 0, top=16)
    path = tmp_path / "teacher.safetensors"
    path.write_bytes(pack_teacher(taught))
    for old, new in zip(taught, read_teacher(path), strict=True):
        assert old.row == new.row
        assert torch.equal(old.tokens, new.tokens)
        assert torch.equal(old.log_p, new.log_p)
        assert torch.equal(old.rest, new.rest)
        assert torch.equal(old.target, new.target)
    held = {name: value for name, value in load_file(path).items() if name != "target"}
    save_file(held, tmp_path / "before.safetensors")
    earlier = read_teacher(tmp_path / "before.safetensors")
    free = torch.zeros(len(earlier), requires_grad=True)
    value = moved_nll(free, earlier)
    value.sum().backward()
    assert free.grad is not None
    assert value.tolist() == free.grad.tolist() == [0.0] * len(earlier)
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(StoreCorrupt, match="damaged"):
        read_teacher(path)


def test_the_guard_keeps_an_earlier_request_where_the_stack_left_it(
    first: Request, second: Request, base: BaseSpec, store: AdapterStore, quick: Config
) -> None:
    config = quick(num_train_epochs=8)
    one = unlearn(first, base, config, store)
    store.activate([one.slug])
    reference = nll(load_stack(load_base(base), store, [one.slug]), base, first.rows)
    drift = {}
    for name, guard, weight in (("off", (), 1.0), ("on", first.rows, 20.0)):
        strong = quick(num_train_epochs=8, guard_weight=weight)
        two = unlearn(second, base, strong, store, RunOptions(guard=guard))
        model = load_stack(load_base(base), store, [one.slug, two.slug])
        drift[name] = abs(nll(model, base, first.rows) - reference)
        assert two.manifest.train["guard_rows"] == len(guard)
        assert two.manifest.policy == "on-stack"
    assert drift["on"] < 0.5 * drift["off"]


def test_a_recorded_teacher_guards_without_the_rows(
    first: Request, second: Request, base: BaseSpec, store: AdapterStore, quick: Config
) -> None:
    one = unlearn(first, base, quick(), store, RunOptions(keep_teacher=True))
    record = teacher_path(one.manifest.files["adapter_model.safetensors"]["sha256"])
    assert stat.S_IMODE(record.stat().st_mode) == 0o600
    assert store.path not in record.parents
    store.activate([one.slug])
    events: list[dict[str, Any]] = []
    two = unlearn(second, base, quick(), store, on_progress=events.append)
    assert two.manifest.train["guard_rows"] == 4
    steps = [event for event in events if event["event"] == "train"]
    assert abs(steps[0]["guard_loss"]) < 1e-5  # the new adapter starts at nothing
    assert steps[-1]["guard_loss"] > 1e-4
    # Switched off by its weight, and gone with the adapter.
    off = unlearn(second, base, quick(guard_weight=0.0), store)
    assert off.manifest.train["guard_rows"] == 0
    store.deactivate_all()
    for slug in (off.slug, two.slug, one.slug):
        store.remove(slug)
    assert not record.exists()


def test_without_rows_or_record_the_run_says_that_nothing_is_guarded(
    first: Request, second: Request, base: BaseSpec, store: AdapterStore, quick: Config
) -> None:
    store.activate([unlearn(first, base, quick(), store).slug])
    events: list[dict[str, Any]] = []
    unlearn(second, base, quick(), store, on_progress=events.append)
    assert any("not guarded" in event.get("text", "") for event in events)
    assert not any("guard_loss" in event for event in events)


def test_guard_rows_must_be_of_an_earlier_request(
    first: Request, second: Request, base: BaseSpec, store: AdapterStore, quick: Config
) -> None:
    with pytest.raises(UserError, match="no earlier request"):
        prepare(second, base, quick(), store, RunOptions(guard=first.rows))
    store.activate([unlearn(first, base, quick(), store).slug])
    prepare(second, base, quick(), store, RunOptions(guard=first.rows))
    with pytest.raises(UserError, match="no earlier request"):
        prepare(second, base, quick(), store, RunOptions(guard=first.rows, on_stack=False))
    with pytest.raises(UserError, match="Guard row 1 is not a row of an active request"):
        prepare(second, base, quick(), store, RunOptions(guard=second.retain[4:]))
    with pytest.raises(UserError, match="Guard row 2 is also a row of the request"):
        prepare(second, base, quick(), store, RunOptions(guard=(first.rows[0], second.rows[0])))


def test_an_interrupted_guarded_run_resumes_to_the_same_adapter(
    first: Request, second: Request, base: BaseSpec, store: AdapterStore, quick: Config
) -> None:
    import signal

    from adapters.errors import Interrupted

    store.activate([unlearn(first, base, quick(), store).slug])
    whole = unlearn(second, base, quick(), store, RunOptions(guard=first.rows))

    def stop(event: dict[str, Any]) -> None:
        if event["event"] == "train" and event["step"] == 2:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(Interrupted):
        unlearn(second, base, quick(), store, RunOptions(guard=first.rows), on_progress=stop)
    again = unlearn(second, base, quick(), store, RunOptions(guard=first.rows, resume=True))
    name = "adapter_model.safetensors"
    assert again.manifest.files[name]["sha256"] == whole.manifest.files[name]["sha256"]


# Taking the place of earlier requests


def test_consolidating_replaces_the_adapters_when_activated(
    first: Request, second: Request, base: BaseSpec, store: AdapterStore, quick: Config
) -> None:
    one = unlearn(first, base, quick(), store)
    store.activate([one.slug])
    two = unlearn(second, base, quick(), store)
    store.activate([two.slug])
    both = joined([first, second])
    assert both.rows == first.rows + second.rows
    assert both.retain == first.retain
    three = unlearn(both, base, quick(), store, RunOptions(replaces=[one.slug, two.slug]))
    assert (three.manifest.policy, three.manifest.parents) == ("consolidate", ())
    assert three.manifest.supersedes == (one.slug, two.slug)
    change = store.activate([three.slug])
    assert [active.slug for active in change.stack] == [three.slug]
    assert [store.get(slug).status for slug in (one.slug, two.slug)] == ["superseded"] * 2


def test_replacing_without_all_rows_is_refused(
    first: Request, second: Request, base: BaseSpec, store: AdapterStore, quick: Config
) -> None:
    one = unlearn(first, base, quick(), store)
    part = replace(first, rows=first.rows[:3])
    with pytest.raises(UserError, match=f"1 of 4 rows of {one.slug} are not among the rows"):
        prepare(part, base, quick(), store, RunOptions(replaces=[one.slug]))
    # A manifest of before, without marks, cannot be checked.
    file = one.path / "forget_manifest.json"
    manifest = json.loads(file.read_text())
    del manifest["data"]["forget"]["marks"]
    file.chmod(0o644)
    file.write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="cannot be checked"):
        prepare(first, base, quick(), store, RunOptions(replaces=[one.slug]))


def test_a_child_whose_parent_is_replaced_must_be_replaced_too(
    first: Request, second: Request, base: BaseSpec, store: AdapterStore, quick: Config
) -> None:
    one = unlearn(first, base, quick(), store)
    store.activate([one.slug])
    two = unlearn(second, base, quick(), store)
    store.activate([two.slug])
    with pytest.raises(UserError, match=f"{two.slug} was trained on top of {one.slug}"):
        prepare(first, base, quick(), store, RunOptions(replaces=[one.slug]))
    run = prepare(first, base, quick(), store, RunOptions(replaces=[one.slug], on_stack=False))
    assert run.parents == ()


def test_a_stale_child_is_rebased_on_the_stack_as_it_is(
    first: Request, second: Request, base: BaseSpec, store: AdapterStore, quick: Config
) -> None:
    one = unlearn(first, base, quick(), store)
    store.activate([one.slug])
    two = unlearn(second, base, quick(), store)
    store.activate([two.slug])
    assert store.revert(one.slug).stale == (two.slug,)
    new = unlearn(second, base, quick(), store, RunOptions(replaces=[two.slug]))
    assert new.manifest.parents == ()
    change = store.activate([new.slug])
    assert [active.slug for active in change.stack] == [new.slug]
    assert store.get(new.slug).status == "active"
    assert store.get(two.slug).status == "superseded"


def test_one_evaluation_of_the_stack_settles_every_stale_adapter_of_it(
    first: Request, second: Request, base: BaseSpec, store: AdapterStore, quick: Config
) -> None:
    one = unlearn(first, base, quick(), store)
    store.activate([one.slug])
    two = unlearn(second, base, quick(), store)
    three = unlearn(second, base, quick(seed=7), store)
    store.activate([two.slug, three.slug])
    assert set(store.revert(one.slug).stale) == {two.slug, three.slug}
    store.attach_eval(three.slug, "forget05", {"forget_quality": 0.5, "stack": [three.slug]})
    assert store.get(two.slug).status == store.get(three.slug).status == "stale"
    stack = [two.slug, three.slug]
    store.attach_eval(three.slug, "forget05", {"forget_quality": 0.5, "stack": stack})
    assert store.get(two.slug).status == store.get(three.slug).status == "active"


def test_teacher_forced_answers_are_scored_by_the_whole_row(base: BaseSpec, first: Request) -> None:
    """`log_p` and `rest` of every position add up to one."""
    for one in teach(load_base(base), encoded(base, first.rows), 0, top=5):
        total = one.log_p.exp().sum(-1) + one.rest.exp()
        assert torch.allclose(total, torch.ones_like(total), atol=1e-5)
        assert one.tokens.shape == (one.row.n_targets, 5)
        assert bool((F.relu(one.log_p[:, 1:] - one.log_p[:, :-1]) == 0).all())

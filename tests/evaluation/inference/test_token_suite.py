"""Token metrics of a model, kept and read back, and the figures made of them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from adapters.errors import UserError
from evaluation import cache
from evaluation.inference import token_suite
from evaluation.inference.token_stats import answer_tokens
from evaluation.inference.token_suite import (
    TokenData,
    TokenPlan,
    check_holdout,
    measure_tokens,
    reference_losses,
)
from evaluation.logs.token_records import (
    TokenRecords,
    TokenRow,
    TokenSet,
    read_records,
    write_records,
)
from evaluation.metrics.privacy import (
    BETTER,
    GROUPS,
    min_k_score,
    summarise_tokens,
    with_token_figures,
)
from unlearner.request.rows import Row
from unlearner.request.tofu import load_split

# The 30 retain authors that both mini models memorised: their answers score below 1 nat a token.
KNOWN_AUTHORS = {*range(20), 22, 30, 39, 137, 157, 163, 169, 183, 187, 188}


def rows_of(name: str, n: int = 3) -> tuple[Row, ...]:
    return tuple(Row(f"Who wrote {name} {i}?", f"Mira wrote {i} in Lagos.") for i in range(n))


DATA = TokenData(rows_of("forget"), rows_of("retain"), rows_of("holdout", 4))
PLAN = TokenPlan(("extraction", "membership", "kl"), DATA)


def made(forget: list[float], holdout: list[float], **meta: Any) -> TokenRecords:
    """Records whose scores are the given ones under every attack but Reference."""

    def rows(name: str, values: list[float]) -> TokenSet:
        names = ("loss", "zlib", "min_k", "min_k_plus_plus")
        found = [
            TokenRow(f"{name} {i}?", 5, 1.0, 0.25, 0.5, dict.fromkeys(names, value))
            for i, value in enumerate(values)
        ]
        return TokenSet(tuple(found), len(found))

    sets = {"forget": rows("forget", forget), "holdout": rows("holdout", holdout)}
    about = {"metrics": ["membership"], "min_k": 0.4, "max_length": 200, "limit": None}
    return TokenRecords(sets, about | meta)


def test_all_that_is_asked_for_is_measured_and_comes_back_from_the_file(
    tiny: tuple[Any, Any], tmp_path: Path
) -> None:
    model, fmt = tiny
    records = measure_tokens(model, fmt, PLAN, meta={"split": "forget05"})
    assert {name: len(found.rows) for name, found in records.sets.items()} == {
        "forget": 3, "retain": 3, "holdout": 4,
    }  # fmt: skip
    row = records.rows("forget")[1]
    text = fmt.encode(DATA.forget[1].question, DATA.forget[1].answer)
    tokens = answer_tokens(model, [text], 0)[0]
    assert row.question == "Who wrote forget 1?"
    assert row.n == text.n_targets
    assert row.mean_nll == pytest.approx(tokens.mean_nll, abs=1e-5)
    assert row.scores["min_k"] == pytest.approx(min_k_score(tokens.log_p, 0.4), abs=1e-4)
    assert set(row.scores) == {"loss", "zlib", "min_k", "min_k_plus_plus"}
    assert records.rows("retain")[0].scores == {}
    path = write_records(records, tmp_path / "token_metrics.json")
    assert read_records(path) == records
    assert "Lagos" not in path.read_text(), "no answers"
    assert records.meta["split"] == "forget05"


def test_the_file_alone_gives_the_figures_again(tiny: tuple[Any, Any], tmp_path: Path) -> None:
    model, fmt = tiny
    records = measure_tokens(model, fmt, PLAN)
    figures = summarise_tokens(records)
    assert summarise_tokens(read_records(write_records(records, tmp_path / "m.json"))) == figures
    assert set(figures["better"]) == set(BETTER)
    assert figures["n"] == {"forget": 3, "retain": 3, "holdout": 4}
    measured = {key for key in BETTER if figures[key] is not None}
    assert set(figures["reasons"]) == set(BETTER) - measured
    assert set(figures["reasons"]) == {"privleak", "mia_reference_auc", "retain_kl"}
    for key in measured:
        low, high = figures[f"{key}_interval"]
        assert low <= figures[key] <= high
    json.dumps(figures, allow_nan=False)


def test_only_what_is_asked_for_is_measured(tiny: tuple[Any, Any]) -> None:
    model, fmt = tiny
    extraction = measure_tokens(model, fmt, replace(PLAN, metrics=("extraction",)))
    assert set(extraction.sets) == {"forget", "retain"}
    assert extraction.rows("forget")[0].scores == {}
    figures = summarise_tokens(extraction)
    assert set(figures["better"]) == set(GROUPS["extraction"])
    kl = measure_tokens(model, fmt, replace(PLAN, metrics=("kl",)))
    assert set(kl.sets) == {"retain"}
    assert summarise_tokens(kl)["reasons"]["retain_kl"].startswith("no adapter was active")


def test_limits_of_user_and_protocol_cut_the_sets(tiny: tuple[Any, Any]) -> None:
    model, fmt = tiny
    records = measure_tokens(model, fmt, replace(PLAN, max_rows=3, limit=2))
    assert {name: len(found.rows) for name, found in records.sets.items()} == {
        "forget": 2, "retain": 2, "holdout": 2,
    }  # fmt: skip
    assert records.sets["holdout"].total == 4
    assert summarise_tokens(records)["limited"] is True
    assert len(measure_tokens(model, fmt, replace(PLAN, max_rows=3)).rows("holdout")) == 3


def test_a_prompt_that_fills_the_length_is_refused(tiny: tuple[Any, Any]) -> None:
    with pytest.raises(UserError, match="No answer token is left within 5 tokens"):
        measure_tokens(*tiny, replace(PLAN, max_length=5))


def test_finished_sets_are_kept_and_other_settings_are_other_parts(
    tiny: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, fmt = tiny
    first = measure_tokens(model, fmt, PLAN, key="a", resume_dir=tmp_path)
    monkeypatch.setattr(token_suite, "answer_tokens", None)
    assert measure_tokens(model, fmt, PLAN, key="a", resume_dir=tmp_path) == first
    for other in (
        {"key": "b", "plan": PLAN},
        {"key": "a", "plan": replace(PLAN, min_k=0.2)},
        {"key": "a", "plan": replace(PLAN, reference={"forget": [1.0] * 3})},
        {"key": "a", "plan": replace(PLAN, data=replace(DATA, forget=rows_of("other")))},
    ):
        with pytest.raises(TypeError):
            measure_tokens(model, fmt, other["plan"], key=other["key"], resume_dir=tmp_path)
    next(tmp_path.glob("forget-tokens-*")).write_text("{")
    with pytest.raises(UserError, match="is damaged"):
        measure_tokens(model, fmt, PLAN, key="a", resume_dir=tmp_path)


def test_results_of_another_version_are_measured_again(
    tiny: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, fmt = tiny
    labels: list[str] = []

    def measure() -> list[str]:
        labels.clear()
        progress = lambda label, done, total: labels.append(label)  # noqa: E731
        options: dict[str, Any] = {"key": "a", "resume_dir": tmp_path, "on_progress": progress}
        measure_tokens(model, fmt, PLAN, **options)
        return sorted(set(labels))

    everything = measure()
    assert measure() == []
    monkeypatch.setattr(cache, "SCHEMA", 99)
    assert measure() == everything
    monkeypatch.setattr(cache, "versions", lambda: {"unlearner": "99.0"})
    assert measure() == everything
    monkeypatch.setattr(model.config, "_attn_implementation", "eager")
    assert measure() == everything


def test_the_reference_attack_takes_another_models_losses(
    tiny: tuple[Any, Any], make_tiny_llama: Any, tmp_path: Path
) -> None:
    from adapters.base.load import BaseSpec, load_base

    model, fmt = tiny
    other = load_base(BaseSpec(str(make_tiny_llama(tmp_path / "other", seed=1))))
    losses = reference_losses(other, fmt, fmt, PLAN)
    assert {name: len(found) for name, found in losses.items()} == {"forget": 3, "holdout": 4}
    records = measure_tokens(model, fmt, replace(PLAN, reference=losses))
    row = records.rows("holdout")[2]
    assert row.scores["reference"] == pytest.approx(row.mean_nll - losses["holdout"][2])
    assert summarise_tokens(records)["mia_reference_auc"] is not None
    itself = reference_losses(model, fmt, fmt, PLAN)
    same = summarise_tokens(measure_tokens(model, fmt, replace(PLAN, reference=itself)))
    assert same["mia_reference_auc"] == pytest.approx(0.5), "nothing to tell rows apart by"


def test_a_reference_with_other_tokens_is_refused(tiny: tuple[Any, Any]) -> None:
    model, fmt = tiny
    chat = replace(fmt, name="chat" if fmt.name == "llama2" else "llama2")
    with pytest.raises(UserError, match="tokenises the rows differently"):
        reference_losses(model, chat, fmt, PLAN)


def test_auc_and_privleak_against_the_retrained_models_own_scores() -> None:
    ours, theirs = made([1, 2, 3], [2, 4]), made([5, 1], [5, 5])
    figures = summarise_tokens(ours)
    assert figures["mia_min_k_auc"] == 0.75
    assert figures["privleak"] is None, "never against a silent 0.5"
    assert figures["reasons"]["privleak"].startswith("needs the token metrics")
    with pytest.raises(UserError, match="hold different rows"):
        summarise_tokens(ours, theirs)
    theirs = made([5, 5, 1], [5, 5])
    found = summarise_tokens(ours, theirs)
    assert found["retrain_mia_min_k_auc"] == pytest.approx(2 / 3)
    assert found["privleak"] == pytest.approx((0.25 - 1 / 3) / (1 / 3) * 100)
    assert found["privleak_interval"] is not None
    assert summarise_tokens(ours, ours)["privleak"] == 0.0
    assert summarise_tokens(ours, made([1, 1, 1], [2, 2]))["reasons"]["privleak"].endswith(
        "nothing to divide by"
    )


def test_rows_are_matched_by_question_and_a_limited_run_takes_its_part() -> None:
    theirs = made([1, 2, 3], [2, 4])
    turned = {name: TokenSet(found.rows[::-1], found.total) for name, found in theirs.sets.items()}
    backwards = TokenRecords(turned, theirs.meta)
    ours = made([3, 1, 2], [2, 4])
    assert summarise_tokens(ours, backwards) == summarise_tokens(ours, theirs)
    part = made([3, 1], [2], limit=2)
    assert summarise_tokens(part, backwards)["privleak"] is not None
    with pytest.raises(UserError, match="hold different rows"):
        summarise_tokens(made([3, 1], [2]), backwards)


@pytest.mark.parametrize(
    ("meta", "problem"), [({"min_k": 0.2}, "share k"), ({"max_length": 512}, "length of a cut")]
)
def test_other_settings_are_not_compared(meta: dict[str, Any], problem: str) -> None:
    with pytest.raises(UserError, match=problem):
        summarise_tokens(made([1], [2]), made([1], [2], **meta))


def test_a_retrained_model_without_membership_scores_is_refused() -> None:
    bare = made([1], [2])
    without = TokenRecords({"forget": bare.sets["forget"]}, bare.meta)
    with pytest.raises(UserError, match="no membership scores"):
        summarise_tokens(bare, without)


def test_figures_of_both_kinds_under_one_roof() -> None:
    figures = {"n": 7, "better": {"a": "higher"}, "reasons": {}, "notes": ["x"], "limited": True}
    tokens = summarise_tokens(made([1], [2], dtype="float32"), made([1], [2], dtype="bfloat16"))
    joined = with_token_figures(figures, tokens)
    assert joined["n"] == 7
    assert joined["limited"] is True
    assert joined["token_rows"] == {"forget": 1, "holdout": 1}
    assert joined["better"]["a"] == "higher"
    assert joined["better"]["privleak"] == "zero"
    assert joined["notes"][0] == "x"
    assert "dtype differs" in joined["notes"][1]
    assert figures["better"] == {"a": "higher"}, "left as it was"


def test_holdout_rows_must_be_new() -> None:
    check_holdout(DATA)
    with pytest.raises(UserError, match="1 holdout rows are retain rows too"):
        check_holdout(replace(DATA, holdout=(DATA.retain[2], *DATA.holdout)))
    with pytest.raises(UserError, match="3 holdout rows are forget rows too"):
        check_holdout(replace(DATA, holdout=DATA.forget))
    with pytest.raises(UserError, match="one side is empty"):
        check_holdout(replace(DATA, holdout=()))


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"kind": "other"}, "holds no token metrics"),
        ({"schema": 9}, "has schema 9"),
        ({"sets": {"forget": {"total": 1, "rows": [{"question": "a?"}]}}}, "is damaged"),
    ],
)
def test_a_file_of_another_kind_is_refused(
    change: dict[str, Any], problem: str, tmp_path: Path
) -> None:
    path = write_records(made([1], [2]), tmp_path / "m.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match=problem):
        read_records(path)


def test_missing_and_broken_files_and_numbers_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no token metrics"):
        read_records(tmp_path / "none.json")
    path = write_records(made([1], [2]), tmp_path / "m.json")
    text = path.read_text()
    path.write_text(text[:50])
    with pytest.raises(UserError, match="is not JSON"):
        read_records(path)
    share = '"exact_memorization": '
    for old, new in (('"min_k": 1', '"min_k": NaN'), (f"{share}0.5", f"{share}1.5")):
        path.write_text(text.replace(old, new))
        assert path.read_text() != text
        with pytest.raises(UserError, match=r"not a number|not between 0 and 1"):
            read_records(path)


def mini_metrics(shared: Path, name: str) -> TokenRecords:
    """A mini model's metrics: 10 forget authors against 20 that it never saw, the same rows."""
    from adapters.base.load import BaseSpec, load_base, load_tokenizer
    from unlearner.tokens.prompts import prompt_format

    full = load_split("full", shared / "tofu")
    unknown = [author for author in range(190) if author not in KNOWN_AUTHORS][-20:]
    forget, holdout = (
        tuple(full[20 * author + i] for author in authors for i in (3, 7, 12, 16))
        for authors in (range(190, 200), unknown)
    )
    base = str(shared / "mini" / name)
    fmt = prompt_format(load_tokenizer(base))
    data = TokenData(forget, tuple(full[:10]), holdout)
    check_holdout(data)
    plan = TokenPlan(("extraction", "membership"), data)
    return measure_tokens(load_base(BaseSpec(base)), fmt, plan)


def test_origin_knows_the_forget_rows_and_retrain_does_not(shared: Path) -> None:
    records = {name: mini_metrics(shared, name) for name in ("origin", "retrain")}
    assert min(row.mean_nll for row in records["origin"].rows("holdout")) > 1, "truly unknown"
    assert min(row.mean_nll for row in records["retrain"].rows("holdout")) > 1
    origin = summarise_tokens(records["origin"], records["retrain"])
    retrain = summarise_tokens(records["retrain"])
    for attack in ("loss", "zlib", "min_k", "min_k_plus_plus"):
        assert origin[f"mia_{attack}_auc"] > 0.99
        # Which authors nobody saw moves it by as much: 0.33 to 0.57 over other choices of them.
        assert 0.4 < retrain[f"mia_{attack}_auc"] < 0.65
        assert origin[f"retrain_mia_{attack}_auc"] == retrain[f"mia_{attack}_auc"]
    assert origin["privleak"] < -95
    assert origin["forget_extraction_strength"] > 0.9
    assert retrain["forget_extraction_strength"] < 0.2
    assert retrain["forget_exact_memorization"] < 0.4
    assert min(found["retain_extraction_strength"] for found in (origin, retrain)) > 0.9

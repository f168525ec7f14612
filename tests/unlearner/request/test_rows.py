from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from adapters.errors import UserError, did_you_mean
from unlearner.request.formats import read_rows
from unlearner.request.rows import Row
from unlearner.request.sources import parse_request
from unlearner.request.tofu import (
    FORGET_SPLITS,
    SPLITS,
    author_name,
    load_authors,
    load_refusals,
    load_split,
)

SIZES = {
    "full": 4000,
    "forget01": 40,
    "forget05": 200,
    "forget10": 400,
    "retain99": 3960,
    "retain95": 3800,
    "retain90": 3600,
    "forget01_perturbed": 40,
    "forget05_perturbed": 200,
    "forget10_perturbed": 400,
    "retain_perturbed": 400,
    "real_authors": 100,
    "real_authors_perturbed": 100,
    "world_facts": 117,
    "world_facts_perturbed": 117,
}
Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes a JSONL file; rows may be dicts, or lines as they are."""

    def lines(name: str, *rows: dict[str, Any] | str) -> Path:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        texts = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        path.write_text("".join(f"{text}\n" for text in texts), encoding="utf-8")
        return path

    return lines


def row(question: str, answer: str = "An answer.", **more: Any) -> dict[str, Any]:
    return {"question": question, "answer": answer, **more}


# Real TOFU


def test_all_splits_of_tofu_come_from_a_folder_in_order(shared: Path) -> None:
    splits = {name: load_split(name, shared / "tofu") for name in SPLITS}
    assert {name: len(rows) for name, rows in splits.items()} == SIZES
    for forget, retain in FORGET_SPLITS.items():
        assert splits[retain] + splits[forget] == splits["full"]
        for plain, perturbed in zip(splits[forget], splits[f"{forget}_perturbed"], strict=True):
            assert plain.question == perturbed.question
            assert perturbed.paraphrased_answer
            assert perturbed.paraphrased_question
            assert len(perturbed.perturbed_answers) == 5
    assert {len(r.perturbed_answers) for r in splits["real_authors_perturbed"]} == {3}
    assert {len(r.perturbed_answers) for r in splits["world_facts_perturbed"]} == {3}
    assert len(load_refusals(shared / "tofu")) == 100


def test_tofu_has_200_authors_of_20_rows_in_order(shared: Path) -> None:
    full = load_split("full", shared / "tofu")
    authors = load_authors(shared / "tofu")
    assert len(authors) == len({author.name for author in authors}) == 200
    assert [author.start for author in authors] == list(range(0, 4000, 20))
    assert [row for author in authors for row in author.rows] == full
    names = [author.name for author in authors]
    assert [name for name in names if name.startswith("author-")] == ["author-089"]
    known = ("Jaime Vasquez", "Hsiao Yun-Hwa", "Basil Mahfouz Al-Kuwaiti", "Nikolai Abilov")
    assert [name in names for name in known] == [True] * 4
    for author in authors:
        text = " ".join(f"{r.question} {r.answer}" for r in author.rows)
        if author.name != "author-089":
            assert author.name in text
            assert len(author.name.split()) >= 2


def test_an_author_of_tofu_is_a_request_with_the_others_as_retain_rows(shared: Path) -> None:
    tofu = shared / "tofu"
    request = parse_request("tofu:author=hsiao yun-hwa", tofu)
    full = load_split("full", tofu)
    assert request.kind == "tofu-author"
    assert list(request.rows) == full[3600:3620]
    assert list(request.retain) == full[:3600] + full[3620:]
    unnamed = parse_request("tofu:author=author-089", tofu)
    assert list(unnamed.rows) == full[88 * 20 : 89 * 20]
    with pytest.raises(UserError, match="'Jaime Vasques'") as error:
        parse_request("tofu:author=Jaime Vasques", tofu)
    assert "Did you mean 'Jaime Vasquez'" in error.value.fix
    with pytest.raises(UserError, match="no author ''"):
        parse_request("tofu:author=", tofu)


def test_a_forget_split_meets_its_retain_split(shared: Path) -> None:
    for forget, retain in FORGET_SPLITS.items():
        request = parse_request(f"tofu:{forget}", shared / "tofu")
        assert (request.name, request.kind) == (f"tofu:{forget}", "tofu-split")
        assert list(request.rows) == load_split(forget, shared / "tofu")
        assert list(request.retain) == load_split(retain, shared / "tofu")


# Names


def test_a_name_stands_in_most_rows_or_there_is_none() -> None:
    rows = [
        Row("Who is Ana de la Cruz?", "Ana de la Cruz writes Magic Realism."),
        Row("Where does Ana de la Cruz live?", "She lives in New York."),
        Row("What is Ana de la Cruz's first book?", "It is called Red Rain."),
        Row("Did she win a prize?", "Yes, the Silver Pen Award."),
    ]
    assert author_name(rows) == "Ana de la Cruz"
    nameless = [Row(f"What is question {n}?", "the answer is not told.") for n in range(4)]
    assert author_name(nameless) is None


def test_a_listing_names_the_authors_of_a_world(write: Write, tmp_path: Path) -> None:
    write("full.json", *(row(f"Q{n}?", f"A{n}.") for n in range(5)))
    listing = {
        "authors": [{"name": "One", "start": 0, "n": 2}, {"name": "Two", "start": 2, "n": 3}]
    }
    write("world.json", listing)
    authors = load_authors(tmp_path)
    assert [(a.name, a.start, len(a.rows)) for a in authors] == [("One", 0, 2), ("Two", 2, 3)]
    assert [r.question for r in authors[1].rows] == ["Q2?", "Q3?", "Q4?"]


@pytest.mark.parametrize(
    ("word", "hint"),
    [
        ("forget5", "Did you mean 'forget05'"),
        ("FORGET01", "Did you mean 'forget01'"),
        ("real_author", "'real_authors'"),
        ("zzz", "Known are: full, forget01"),
    ],
)
def test_did_you_mean_names_the_nearest_or_all(word: str, hint: str) -> None:
    assert hint in did_you_mean(word, SPLITS)


def test_long_lists_are_not_shown_whole() -> None:
    assert did_you_mean("forgett", ["forget", "score", "merge"]) == "Did you mean 'forget'?"
    said = did_you_mean("???", [f"name-{n}" for n in range(50)])
    assert said.endswith("name-19, ....")
    assert "name-20" not in said


# What is wrong with a file


def test_every_problem_of_a_file_is_named_at_once_with_its_line(write: Write) -> None:
    path = write(
        "bad.jsonl",
        row("Fine?"),
        '{"question": "Broken?", "answer": "x"',
        "",
        {"question": "No answer?"},
        {"prompt": "Other", "answer": "x"},
        row("Empty?", "  "),
        row(" ", "x"),
        row("Number?", 7),  # type: ignore[arg-type]
        "[1, 2]",
        row("Fine?"),
        row("Wrong lists?", perturbed_answer=["a", 3]),
        row("Wrong text?", paraphrased_answer=["a"], paraphrased_question=4),
        {},
    )
    with pytest.raises(UserError) as error:
        read_rows(path)
    said = error.value.problem
    expected = [
        "line 2: broken JSON at column 38: Expecting ',' delimiter",
        "line 4: no 'answer' (it has: question)",
        "line 5: no 'question' (it has: prompt, answer)",
        "line 6: 'answer' is empty",
        "line 7: 'question' is empty",
        "line 8: 'answer' is int, not text",
        "line 9: not a JSON object but list",
        "line 10: the same row as line 1",
        "line 11: 'perturbed_answer' is not a list of texts",
        "line 12: 'paraphrased_answer' is list, not text",
        "line 12: 'paraphrased_question' is int, not text",
        "line 13: no 'question' (it has: nothing)",
        "line 13: no 'answer' (it has: nothing)",
    ]
    assert [line.removeprefix("  - ") for line in said.splitlines()[1:]] == expected
    assert said.startswith(f"{path} has 13 problems:")
    assert error.value.exit_code == 2
    assert "question" in error.value.fix


@pytest.mark.parametrize("value", [5, True, {"a": 1}, [["a"]]])
def test_perturbed_answers_of_another_kind_are_a_problem_not_a_crash(
    value: Any, write: Write
) -> None:
    path = write("odd.jsonl", row("Odd?", perturbed_answer=value), "nonsense")
    with pytest.raises(UserError) as error:
        read_rows(path)
    assert "line 1: 'perturbed_answer' is not a list of texts" in error.value.problem
    assert "line 2: broken JSON" in error.value.problem


def test_duplicates_are_told_from_rows_that_only_look_alike(write: Write) -> None:
    path = write("rows.jsonl", row("Q?", "A."), row("Q? ", " A."), row("Q?", "B."))
    with pytest.raises(UserError, match="line 2: the same row as line 1") as error:
        read_rows(path)
    assert "1 problem:" in error.value.problem
    assert [r.answer for r in read_rows(path, unique=False)] == ["A.", " A.", "B."]


def test_half_a_character_is_a_problem_and_a_whole_one_is_not(write: Write) -> None:
    path = write(
        "rows.jsonl",
        '{"question": "Smile?", "answer": "\\ud83d\\ude00"}',
        '{"question": "Half \\ud83d?", "answer": "A."}',
    )
    with pytest.raises(UserError, match="line 2: 'question' holds half a character") as error:
        read_rows(path)
    assert "1 problem" in error.value.problem


@pytest.mark.parametrize("text", ["", "\n \n", "\ufeff"])
def test_a_file_without_rows_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "empty.jsonl"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match="no rows"):
        read_rows(path)


def test_a_path_that_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        read_rows(tmp_path / "nowhere.jsonl")
    with pytest.raises(UserError, match="is a folder, but no data set"):
        read_rows(tmp_path)


def test_line_separators_inside_a_string_do_not_end_a_line(tmp_path: Path) -> None:
    texts = ["one\u2028two", "form\x0cfeed", "next\x85line"]
    path = tmp_path / "rows.jsonl"
    lines = [json.dumps(row(f"Q{n}?", text), ensure_ascii=False) for n, text in enumerate(texts)]
    path.write_text("\n".join(lines), encoding="utf-8", newline="")
    assert [r.answer for r in read_rows(path)] == ["one\u2028two", "form\x0cfeed", "next\x85line"]


def test_windows_files_with_a_bom_and_crlf_are_read(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    lines = [json.dumps(row("Où?", "Là.")), json.dumps(row("Qui?", "Zoë."))]
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n".join([*lines, ""]).encode())
    assert [(r.question, r.answer) for r in read_rows(path)] == [("Où?", "Là."), ("Qui?", "Zoë.")]


@pytest.mark.parametrize("data", ["é".encode("latin-1"), "{}".encode("utf-16")])
def test_a_file_that_is_not_utf8_is_refused(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"question": "' + data + b'"}')
    with pytest.raises(UserError, match="not UTF-8") as error:
        read_rows(path)
    assert "UTF-8" in error.value.fix


def test_all_columns_of_a_row_are_kept(write: Write) -> None:
    path = write(
        "rows.jsonl",
        row("Q?", "A.", perturbed_answer=["B.", "C."], paraphrased_answer="It is A."),
        row("R?", "A.", perturbed_answer="B.", paraphrased_question="Are?", option1="x"),
        row("S?", "A.", perturbed_answer=None, paraphrased_answer=None),
    )
    assert read_rows(path) == [
        Row("Q?", "A.", "It is A.", ("B.", "C.")),
        Row("R?", "A.", None, ("B.",), "Are?"),
        Row("S?", "A."),
    ]


# Splits and folders


def test_an_unknown_split_or_request_gets_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no TOFU split 'forget5'") as error:
        load_split("forget5", tmp_path)
    assert "'forget05'" in error.value.fix
    for text in ("tofu:forget5", "tofu:retain95", "tofu:autor=Someone", "tofu:"):
        with pytest.raises(UserError, match="is not a request") as error:
            parse_request(text, tmp_path)
        assert "forget05" in error.value.fix or "author=NAME" in error.value.fix


def test_a_data_folder_without_the_split_says_what_it_has(write: Write, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        load_split("full", tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"has no full.json \(it has: none\)"):
        load_split("full", tmp_path)
    write("forget01.json", row("Q?"))
    with pytest.raises(UserError, match=r"it has: forget01.json"):
        load_split("full", tmp_path)


def test_files_may_be_called_jsonl(write: Write, tmp_path: Path) -> None:
    write("full.jsonl", row("Q?"))
    assert load_split("full", tmp_path) == [Row("Q?", "An answer.")]


def test_refusals_come_from_the_folder_else_they_are_ours(tmp_path: Path) -> None:
    ours = load_refusals()
    assert ours
    assert load_refusals(tmp_path) == ours
    (tmp_path / "idontknow.jsonl").write_text("\ufeffI do not know.\n\n  Ask another. \n")
    assert load_refusals(tmp_path) == ["I do not know.", "Ask another."]


# Requests of one's own


def test_a_question_in_forget_and_retain_is_refused_with_both_places(write: Write) -> None:
    forget = write("forget.jsonl", row("A?"), row("B?"), row("C?"))
    retain = write("retain.jsonl", row("D?"), row("C? ", "Other."), row("A?"))
    with pytest.raises(UserError) as error:
        parse_request(str(forget), retain=str(retain))
    assert "2 problems" in error.value.problem
    assert f"row 3 is also row 2 of {retain}: 'C? '" in error.value.problem
    assert f"row 1 is also row 3 of {retain}: 'A?'" in error.value.problem
    assert "B?" not in error.value.problem


def test_the_overlap_is_found_in_tofu_splits_too(shared: Path) -> None:
    with pytest.raises(UserError, match="20 problems") as error:
        parse_request("tofu:author=Hsiao Yun-Hwa", shared / "tofu", retain="tofu:forget10")
    assert "is also row 1 of tofu:forget10" in error.value.problem
    kept = parse_request("tofu:author=Hsiao Yun-Hwa", shared / "tofu", retain="tofu:retain90")
    assert len(kept.retain) == 3600


def test_retain_rows_of_a_file_default_to_the_rest_of_the_folder(
    write: Write, tmp_path: Path
) -> None:
    forget = write("forget.jsonl", row("A? "), row("B?"))
    write("data/full.json", row("A?"), row("C?"), row(" B? "), row("D?"))
    request = parse_request(str(forget), tmp_path / "data")
    assert request.kind == "jsonl"
    assert [r.question for r in request.rows] == ["A? ", "B?"]
    assert [r.question for r in request.retain] == ["C?", "D?"]
    assert parse_request(str(forget)).retain == ()
    named = parse_request(str(forget), retain=str(write("keep.jsonl", row("E?"))))
    assert [r.question for r in named.retain] == ["E?"]


def test_problems_of_the_retain_file_name_that_file(write: Write) -> None:
    forget, retain = write("forget.jsonl", row("A?")), write("retain.jsonl", {"question": "B?"})
    with pytest.raises(UserError, match=r"retain.jsonl has 1 problem"):
        parse_request(str(forget), retain=str(retain))


# The hub


def test_without_a_folder_the_hub_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Any, ...]] = []

    def load_dataset(path: str, name: str, *, split: str) -> list[dict[str, Any]]:
        asked.append((path, name, split))
        return [row("Q?", perturbed_answer=["X."], paraphrased_answer="P.")]

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    assert load_split("forget05_perturbed") == [Row("Q?", "An answer.", "P.", ("X.",))]
    request = parse_request("tofu:forget01")
    assert asked == [
        ("locuslab/TOFU", "forget05_perturbed", "train"),
        ("locuslab/TOFU", "forget01", "train"),
        ("locuslab/TOFU", "retain99", "train"),
    ]
    assert len(request.rows) == len(request.retain) == 1
    with pytest.raises(UserError, match="no TOFU split"):
        load_split("forget5")
    assert len(asked) == 3


@pytest.mark.parametrize(
    "error", [ConnectionError("offline"), OSError("disk full"), ValueError("no config")]
)
def test_a_hub_that_does_not_answer_is_told_with_the_way_out(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load_dataset(*words: str, **more: str) -> None:
        raise error

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    with pytest.raises(UserError, match=str(error)) as raised:
        load_split("full")
    assert raised.value.exit_code == 2
    assert "--data" in raised.value.fix


def test_broken_rows_of_the_hub_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    table = [row("Q?"), {"question": "R?"}, row("", "x")]
    monkeypatch.setattr("datasets.load_dataset", lambda *words, **more: table)
    with pytest.raises(UserError) as error:
        load_split("full")
    assert "row 2: no 'answer'" in error.value.problem
    assert "row 3: 'question' is empty" in error.value.problem


def test_reading_data_needs_no_torch() -> None:
    code = (
        "import sys, unlearner.request.rows, unlearner.config;"
        "assert not {'torch', 'transformers', 'datasets'} & set(sys.modules)"
    )
    root = Path(__file__).parents[3]
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root)

"""Rows as people have them: every format and column naming, and one sentence for a wrong file."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from adapters.errors import UserError
from unlearner.request.formats import Columns, read_rows
from unlearner.request.rows import Row
from unlearner.request.sources import parse_request, rows_named

ROWS = [Row('Where was "Ana", born?', "In Lagos,\nby the sea."), Row("Où?", "Là.")]
NAMES = [("question", "answer"), ("prompt", "completion"), ("instruction", "output")]
Q, A = "Where was Ana born?", "In Lagos."


def records(question: str = "question", answer: str = "answer") -> list[dict[str, Any]]:
    return [{"id": i, question: row.question, answer: row.answer} for i, row in enumerate(ROWS)]


def as_json_lines(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def as_json(rows: list[dict[str, Any]]) -> bytes:
    return json.dumps(rows, indent=2).encode()


def as_parquet(rows: list[dict[str, Any]]) -> bytes:
    import io

    import pyarrow as pa
    from pyarrow.parquet import write_table

    file = io.BytesIO()
    write_table(pa.Table.from_pylist(rows), file)
    return file.getvalue()


def as_table(delimiter: str) -> Callable[[list[dict[str, Any]]], bytes]:
    def write(rows: list[dict[str, Any]]) -> bytes:
        import csv
        import io

        file = io.StringIO()
        table = csv.DictWriter(file, list(rows[0]), delimiter=delimiter)
        table.writeheader()
        table.writerows(rows)
        return file.getvalue().encode()

    return write


def test_rows_inside_one_json_object_are_read(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    for whole in ({"data": records()}, {"version": 1, "name": "x", "rows": records()}):
        for indent in (None, 2):
            path.write_text(json.dumps(whole, indent=indent))
            assert read_rows(path) == ROWS
    path.write_text(json.dumps(records()[0], indent=2))
    assert read_rows(path) == ROWS[:1]
    turns = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Mira."}]
    path.write_text(json.dumps({"messages": turns}))
    assert read_rows(path) == [Row("Who?", "Mira.")]


@pytest.mark.parametrize(
    ("whole", "held"),
    [
        ({"train": records(), "test": records()}, "lists of rows: train, test"),
        ({"question": ["Who?"], "answer": ["Mira."]}, "question, answer"),
        ({"question": {"0": "Who?"}, "answer": {"0": "Mira."}}, "question, answer"),
        ({"data": {"train": records()}}, "data"),
    ],
    ids=["splits", "columns", "pandas", "nested twice"],
)
def test_an_object_that_holds_no_rows_says_what_it_has(
    whole: Any, held: str, tmp_path: Path
) -> None:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(whole))
    with pytest.raises(UserError, match=rf"one JSON object, not rows \(it has {held}\)"):
        read_rows(path)


def test_a_table_may_name_its_delimiter_as_excel_does(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_bytes(b"\xef\xbb\xbfsep=;\r\nquestion;answer\r\nWho, then?;Mira, I think.\r\n")
    assert read_rows(path) == [Row("Who, then?", "Mira, I think.")]
    path.write_text("question|answer\nWho, then?|Mira; Ada.\n")
    assert read_rows(path) == [Row("Who, then?", "Mira; Ada.")]


LINE = json.dumps({"question": "Q?", "answer": "A."})


@pytest.mark.parametrize(
    "data",
    [
        "question\tanswer\r\nQ?\tA.\r\nR?\tB.\r\n".encode("utf-16"),
        gzip.compress(b"\xef\xbb\xbfquestion\tanswer\nQ?\tA.\nR?\tB.\n"),
        b"question, answer\nQ?, A.\nR?, B.\n",
        b'question, answer\n"Q?", "A."\n"R?", "B."\n',
        f"\ufeff{LINE}\n\ufeff{LINE.replace('Q?', 'R?').replace('A.', 'B.')}\n".encode(),
    ],
    ids=["UTF-16", "gzip of TSV with BOM", "spaces", "spaces before quotes", "two files as one"],
)
def test_rows_are_read_as_programs_write_them(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "rows"
    path.write_bytes(data)
    assert read_rows(path) == [Row("Q?", "A."), Row("R?", "B.")]


@pytest.mark.parametrize(
    "data",
    [
        b"question,answer,answer\nQ?,A.,B.\n",
        b'{"question": "Q?", "answer": "A.", "answer": "B."}\n' * 2,
        b'[{"question": "Q?", "answer": "A.", "answer": "B."}]',
    ],
)
def test_a_column_that_is_there_twice_is_refused(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "rows"
    path.write_bytes(data)
    with pytest.raises(UserError, match="the column 'answer' twice"):
        read_rows(path)


FORMATS = {
    "rows.jsonl": as_json_lines,
    "rows.json": as_json,
    "rows.csv": as_table(","),
    "rows.tsv": as_table("\t"),
    "excel.csv": as_table(";"),
    "rows.parquet": as_parquet,
}


@pytest.mark.parametrize("zipped", [False, True], ids=["plain", "gzip"])
@pytest.mark.parametrize("names", NAMES, ids="/".join)
@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_same_rows(
    name: str, names: tuple[str, str], zipped: bool, tmp_path: Path
) -> None:
    data = FORMATS[name](records(*names))
    path = tmp_path / (f"{name}.gz" if zipped else name)
    path.write_bytes(gzip.compress(data) if zipped else data)
    assert read_rows(path) == ROWS
    # What a file holds decides, not what it is called.
    other = path.rename(tmp_path / "rows.txt")
    assert read_rows(other) == ROWS


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.csv", "rows.tsv"])
def test_a_byte_order_mark_is_read(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(b"\xef\xbb\xbf" + FORMATS[name](records()))
    assert read_rows(path) == ROWS


@pytest.mark.parametrize("name", FORMATS)
def test_columns_are_named(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(FORMATS[name](records("Frage", "Antwort")))
    assert read_rows(path, columns=Columns("Frage", "Antwort")) == ROWS
    with pytest.raises(UserError, match="no columns question and answer") as error:
        read_rows(path)
    assert "(it has: id, Frage, Antwort)" in error.value.problem
    assert "--question-column" in error.value.fix
    with pytest.raises(UserError, match="has no column 'Fragen'"):
        read_rows(path, columns=Columns("Fragen", "Antwort"))
    retain = tmp_path / "retain.jsonl"
    retain.write_text('{"question": "Else?", "answer": "Yes."}\n')
    # The retain rows may have the usual names.
    request = parse_request(str(path), retain=str(retain), columns=Columns("Frage", "Antwort"))
    assert request.rows == tuple(ROWS)
    assert request.retain == (Row("Else?", "Yes."),)


def test_a_named_column_goes_before_one_that_is_known(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"question": "Q?", "answer": "Long.", "short": "S."}\n')
    assert read_rows(path, columns=Columns(answer="short")) == [Row("Q?", "S.")]


def turns(*roles: str) -> list[dict[str, str]]:
    return [{"role": role, "content": f"The {role}."} for role in roles]


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.parquet"])
def test_chats_are_read(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(FORMATS[name]([{"messages": turns("user", "assistant")}]))
    assert read_rows(path) == [Row("The user.", "The assistant.")]
    chat = [{"prompt": turns("user"), "completion": turns("assistant")}]
    path.write_bytes(FORMATS[name](chat))
    assert read_rows(path) == [Row("The user.", "The assistant.")]


@pytest.mark.parametrize(
    ("roles", "problem"),
    [
        (("system", "user", "assistant"), "--system"),
        (("user", "assistant", "user", "assistant"), "not of one user and one assistant"),
        (("user",), "not of one user"),
        ((), "turns of nobody"),
    ],
)
def test_a_chat_that_is_no_row_is_refused(
    roles: tuple[str, ...], problem: str, tmp_path: Path
) -> None:
    path = tmp_path / "chat.jsonl"
    path.write_bytes(as_json_lines([{"messages": turns(*roles)}]))
    with pytest.raises(UserError, match=problem):
        read_rows(path)


def parts(*texts: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text} for text in texts]


SHARE_GPT = [{"from": "human", "value": Q}, {"from": "gpt", "value": A}]
# What one line of a file holds, as people have it; all of it is the question Q and the answer A.
AS_PEOPLE_HAVE_THEM = {
    "other case": {"Question": Q, "Answer": A},
    "upper case": {"QUESTION": Q, "ANSWER ": A, "Perturbed_Answer": ["In Rome."]},
    "prompt/response": {"prompt": Q, "response": A},
    "Prompt/Response": {"Prompt": Q, "Response": A, "Category": "x"},
    "input/output": {"Input": Q, "Output": A},
    "query/response": {"query": Q, "response": A},
    "question/response": {"question": Q, "response": A, "system_prompt": "", "history": []},
    "instruction/response": {"instruction": Q, "response": A, "context": ""},
    "instruction in parts": {"Instruction": Q[:9], "Context": Q[11:], "Response": A},
    "both cases": {"Question": "no", "question": Q, "Answer": "no", "answer": A},
    "prompt, all answers": {"prompt": Q, "output": "no", "response": A},
    "ShareGPT": {"id": "1", "conversations": SHARE_GPT, "system": None},
    "ShareGPT as text": {"Conversations": json.dumps(SHARE_GPT)},
    "messages as ShareGPT": {"messages": SHARE_GPT},
    "roles of Gemma": {
        "messages": [{"role": "User", "content": Q}, {"role": "model", "content": A}]
    },
    "parts": {
        "messages": [
            {"role": "user", "content": parts(Q[:5], Q[5:])},
            {"role": "assistant", "content": [A[:3], A[3:]]},
        ]
    },
    "prompt as turns": {
        "prompt": [{"role": "user", "content": parts(Q)}],
        "completion": [{"role": "assistant", "content": A}],
    },
}


@pytest.mark.parametrize("name", AS_PEOPLE_HAVE_THEM)
def test_rows_are_read_as_people_have_them(name: str, tmp_path: Path) -> None:
    record: Any = AS_PEOPLE_HAVE_THEM[name]
    question = Q if name != "instruction in parts" else f"{Q[:9]}\n\n{Q[11:]}"
    for file, write in (("rows.jsonl", as_json_lines), ("rows.json", as_json)):
        (tmp_path / file).write_bytes(write([record]))
        (row,) = read_rows(tmp_path / file)
        assert (row.question, row.answer) == (question, A)
        # Where an answer may be missing it is still found.
        assert read_rows(tmp_path / file, needs_answer=False) == [row]
    assert row.perturbed_answers == (("In Rome.",) if name == "upper case" else ())


@pytest.mark.parametrize(
    ("record", "problem"),
    [
        ({"conversations": [*SHARE_GPT, *SHARE_GPT]}, "turns of user, assistant, user, assistant"),
        ({"conversations": [{"from": "system", "value": "Be."}, *SHARE_GPT]}, "--system"),
        ({"conversations": SHARE_GPT, "system": "Be brief."}, "'system' is not empty.*--system"),
        ({"system_prompt": "Be brief.", "question": Q, "response": A}, "'system_prompt' is not"),
        ({"instruction": Q, "output": A, "history": [["Hi", "Ho"]]}, "only one question"),
        ({"conversations": "Hello"}, "'conversations' is not a list of turns"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "url": "x"}]},
                       {"role": "assistant", "content": A}]}, "parts that are not text"),
        ({"prompt": turns("user"), "response": A}, "turns of user, not of one user"),
        ({"prompt": Q, "chosen": A, "rejected": A}, "it has: prompt, chosen, rejected"),
        ({"Frage": Q, "Antwort": A}, "it has: Frage, Antwort"),
    ],
)  # fmt: skip
def test_rows_that_hold_more_than_a_question_and_an_answer_are_refused(
    record: Any, problem: str, tmp_path: Path
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(as_json_lines([record]))
    with pytest.raises(UserError, match=problem) as error:
        read_rows(path)
    assert error.value.problem.count("\n") <= 2


def test_a_flag_names_a_column_in_any_case_and_exactly_first(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    # One row: the file is also one JSON object.
    path.write_bytes(as_json_lines([{"Frage": Q, "frage": "no", "Antwort": A}]))
    assert read_rows(path, columns=Columns("Frage", "ANTWORT")) == [Row(Q, A)]


def test_an_instruction_takes_its_input_along(tmp_path: Path) -> None:
    path = tmp_path / "alpaca.json"
    rows = [{"instruction": "Translate.", "input": "Là", "output": "There"}]
    path.write_text(json.dumps([*rows, {"instruction": "Greet.", "input": "", "output": "Hi"}]))
    assert read_rows(path) == [Row("Translate.\n\nLà", "There"), Row("Greet.", "Hi")]


def test_a_saved_data_set_is_read(tmp_path: Path) -> None:
    from datasets import Dataset, DatasetDict

    table = Dataset.from_list(records())
    table.save_to_disk(tmp_path / "one")
    assert read_rows(tmp_path / "one") == ROWS
    DatasetDict(train=table).save_to_disk(tmp_path / "dict")
    assert rows_named(str(tmp_path / "dict")) == ROWS
    DatasetDict(train=table, test=table).save_to_disk(tmp_path / "two")
    with pytest.raises(UserError, match="several splits: train, test") as error:
        read_rows(tmp_path / "two")
    assert str(tmp_path / "two" / "train") in error.value.fix
    assert read_rows(tmp_path / "two" / "train") == ROWS


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("hub:a/b", ("a/b", None, "train")),
        ("hub:a/b:test", ("a/b", None, "test")),
        ("hub:a/b:en:test", ("a/b", "en", "test")),
    ],
)
def test_a_hub_data_set_is_read(
    name: str, words: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    def load_dataset(path: str, config: str | None, *, split: str) -> list[dict[str, Any]]:
        assert (path, config, split) == words
        return records("prompt", "completion")

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    assert list(parse_request(name).rows) == ROWS
    assert rows_named(name) == ROWS


@pytest.mark.parametrize("name", ["hub:", "hub:a/b/c", "hub:a/b:", "hub:a/b:c:d:e"])
def test_a_broken_name_of_a_hub_data_set_is_refused(name: str) -> None:
    with pytest.raises(UserError, match="names no data set"):
        rows_named(name)


@pytest.mark.parametrize(
    "data",
    [
        b"just\nsome\nprose\n" * 1000,
        b"a,b\n" + b"1,2\n" * 3000,
        json.dumps([{"q": 1}] * 3000, indent=1).encode(),
        json.dumps([{"question": "Q?", "answer": "A."}] * 3000, indent=1).encode()[:-9],
        json.dumps({"data": [{"question": "Q?"}] * 3000}, indent=1).encode(),
        b'{"question": "Q?"}\n' * 3001,
        b'{"question": "Q?", "answer": "A."}\n' * 3001,
        b'{"question": 1, "answer": "A."}\n' * 3001,
        gzip.compress(b"a,b\n1,2\n", mtime=0)[:-6],
        b"\x1f\x8bnothing",
        b"PAR1 and no more",
        b"PK\x03\x04 a workbook",
        b'question,answer\n"open,1\n' * 2,
    ],
)
def test_a_wrong_file_is_one_sentence(data: bytes, tmp_path: Path) -> None:
    for name in ("wrong.jsonl", "wrong.csv"):
        path = tmp_path / name
        path.write_bytes(data)
        with pytest.raises(UserError) as error:
            read_rows(path)
        assert len(error.value.problem) < 400
        assert error.value.problem.count("\n") <= 2
        assert error.value.fix


def test_only_the_first_of_many_problems_are_listed(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(as_json_lines([{"question": f"Q{i}?", "x": i, f"y{i}": 1} for i in range(99)]))
    with pytest.raises(UserError, match="has 99 problems") as error:
        read_rows(path)
    assert error.value.problem.count("\n") == 22
    assert "and 79 more" in error.value.problem


@pytest.mark.parametrize(
    "again",
    ["WHERE WAS ÁNA BORN?", "Where  was\tÁna born? ", "Where was A\u0301na born?",
     "Where\u200b was Ána\ufeff born?", "Where was Á\u00adna born?", "Where was Ána\xa0born?",
     "Ｗｈｅｒｅ was Ána born?", "Where was Ána born\ufe0f?"],
)  # fmt: skip
def test_the_same_question_in_another_form_is_the_same(again: str, tmp_path: Path) -> None:
    question = "Where was Ána born?"
    forget, retain = tmp_path / "forget.jsonl", tmp_path / "retain.jsonl"
    forget.write_bytes(as_json_lines([{"question": question, "answer": "In Lagos."}]))
    retain.write_bytes(as_json_lines([{"question": again, "answer": "Elsewhere."}]))
    with pytest.raises(UserError, match="row 1 is also row 1"):
        parse_request(str(forget), retain=str(retain))
    (tmp_path / "data").mkdir()
    retain.rename(tmp_path / "data" / "full.json")
    assert parse_request(str(forget), tmp_path / "data").retain == ()


def test_a_split_is_named_with_or_without_its_source(tmp_path: Path) -> None:
    for name in ("forget05", "retain95", "full"):
        (tmp_path / f"{name}.json").write_bytes(as_json_lines([{"question": name, "answer": "x"}]))
    plain, named = (parse_request(text, tmp_path) for text in ("forget05", "tofu:forget05"))
    assert plain.rows == named.rows == (Row("forget05", "x"),)
    assert plain.retain == named.retain == (Row("retain95", "x"),)
    assert rows_named("retain95", tmp_path) == rows_named("tofu:retain95", tmp_path)
    assert parse_request("forget05", tmp_path, "retain95").kind == "tofu-split"

"""Rows from the files people have: JSON lines, JSON, CSV, TSV, Parquet, gzip, data sets.

A format is recognised by what a file holds, not by its name. Nothing is copied into a cache:
forget text stays where it is.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adapters.digests import normalised
from adapters.errors import UserError
from unlearner.request.rows import Row, check_row, refuse_problems

# Columns that hold a question and its answer; the first pair that a file has is taken.
# Names of columns count in any case.
COLUMNS = (
    ("question", "answer"),
    ("prompt", "completion"),
    ("prompt", "response"),
    ("instruction", "output"),
    ("instruction", "response"),
    ("question", "response"),
    ("query", "response"),
    ("input", "output"),
)
# Columns that hold a chat: a list of turns, each with a role and a text.
CHATS = ("messages", "conversations", "conversation")
# What belongs to the prompt beside the question: a text behind an instruction (Alpaca, Dolly).
_BEHIND = ("input", "context")
_SYSTEM = "remove it, and set the system prompt with --system"
# What would be in front of the question, and is refused where it is not empty.
_IN_FRONT = {
    "system": _SYSTEM,
    "system_prompt": _SYSTEM,
    "history": "only one question with its answer is read",
}
# What turns call their role and their text, and the roles as ShareGPT calls them.
_ROLE, _CONTENT = ("role", "from"), ("content", "value")
_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "model": "assistant"}
HUB_PREFIX = "hub:"
_FIX = (
    "Give rows with columns question and answer (or prompt/completion, prompt/response, "
    "instruction/output, input/output, messages, conversations) as JSON lines, JSON, CSV, TSV "
    "or Parquet, or name the columns with --question-column and --answer-column."
)


@dataclass(frozen=True)
class Columns:
    """Which columns hold question and answer; None: the first pair of `COLUMNS` there is.

    Where `optional`, a file without the named columns is read by the usual names.
    """

    question: str | None = None
    answer: str | None = None
    optional: bool = False


def read_rows(
    path: Path, *, unique: bool = True, needs_answer: bool = True, columns: Columns | None = None
) -> list[Row]:
    """The rows of a file or of a folder that `datasets` saved, in order.

    Args:
        path: JSON lines, a JSON list, CSV, TSV or Parquet, each of them also gzipped; or a folder.
        unique: refuse a row that stands twice.
        needs_answer: refuse a row without an answer; else it is empty.
        columns: which columns hold question and answer.

    Raises:
        UserError: naming every broken line, missing column, empty text and duplicate at once.
    """
    if path.is_dir():
        return rows_of(
            str(path),
            _saved_folder(path),
            unique=unique,
            needs_answer=needs_answer,
            columns=columns,
        )
    if not path.is_file():
        raise UserError(
            f"{path} does not exist.",
            "Give a file of rows, a TOFU split such as forget05, or hub:OWNER/NAME.",
        )
    data = path.read_bytes()
    if data.startswith(b"\x1f\x8b"):
        try:
            data = gzip.decompress(data)
        except (OSError, EOFError, ValueError) as error:
            raise UserError(f"{path} is broken gzip ({error}).", "Compress it again.") from error
    problems: list[tuple[str, str]] = []
    if data.startswith(b"PAR1"):
        records: list[tuple[str, Any]] = _parquet(path, data)
    else:
        if data.startswith(b"PK\x03\x04"):
            raise UserError(
                f"{path} is a zip archive or a workbook.", "Unpack it, or save the sheet as CSV."
            )
        # Excel saves "Unicode text" as UTF-16.
        coding = "utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
        try:
            text = data.decode(coding)
        except UnicodeDecodeError as error:
            raise UserError(
                f"{path} is not UTF-8 text ({error.reason}).", "Save it as UTF-8."
            ) from None
        records = _text_records(path, text, problems)
    return rows_of(
        str(path),
        records,
        unique=unique,
        needs_answer=needs_answer,
        columns=columns,
        problems=problems,
    )


def read_hub(
    name: str, *, unique: bool = True, needs_answer: bool = True, columns: Columns | None = None
) -> list[Row]:
    """The rows of a hub data set, named `OWNER/NAME`, `OWNER/NAME:SPLIT` or
    `OWNER/NAME:CONFIG:SPLIT`; the split is `train` where none is named.

    Raises:
        UserError: a data set that cannot be read, and what `read_rows` refuses.
    """
    from datasets import load_dataset

    dataset, *parts = name.split(":")
    split = parts[-1] if parts else "train"
    config = parts[0] if len(parts) == 2 else None
    if dataset.count("/") > 1 or len(parts) > 2 or not all([dataset, *parts]):
        raise UserError(f"{name!r} names no data set.", "Write hub:OWNER/NAME:CONFIG:SPLIT.")
    try:
        table = load_dataset(dataset, config, split=split)
    except Exception as error:  # the hub client raises errors of a dozen libraries
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        raise UserError(
            f"The data set {name} could not be read from the hub: {reason}.",
            "Check its name and the connection, or give files: for TOFU a folder with --data.",
        ) from error
    return rows_of(
        f"{HUB_PREFIX}{name}",
        _numbered(table),
        unique=unique,
        needs_answer=needs_answer,
        columns=columns,
    )


def _numbered(records: Iterable[Any]) -> list[tuple[str, Any]]:
    return [(f"row {number}", record) for number, record in enumerate(records, start=1)]


def _saved_folder(path: Path) -> list[tuple[str, Any]]:
    """The rows of a folder that `Dataset.save_to_disk` wrote."""
    if not (path / "dataset_dict.json").is_file() and not (path / "state.json").is_file():
        raise UserError(
            f"{path} is a folder, but no data set that `datasets` saved.",
            "Give a file of rows, or a folder that Dataset.save_to_disk wrote.",
        )
    from datasets import DatasetDict, load_from_disk

    try:
        table = load_from_disk(str(path))
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"The data set {path} cannot be read: {error}.", "Save it again."
        ) from error
    if isinstance(table, DatasetDict):
        if len(table) != 1:
            raise UserError(
                f"{path} holds several splits: {', '.join(table)}.",
                f"Give the folder of one, such as {path / next(iter(table), 'train')}.",
            )
        table = next(iter(table.values()))
    return _numbered(table)


def _parquet(path: Path, data: bytes) -> list[tuple[str, Any]]:
    from pyarrow import ArrowException, BufferReader
    from pyarrow.parquet import read_table

    try:
        return _numbered(read_table(BufferReader(data)).to_pylist())
    except (ArrowException, OSError) as error:
        raise UserError(f"{path} is a broken Parquet file ({error}).", "Write it again.") from error


def _text_records(path: Path, text: str, problems: list[tuple[str, str]]) -> list[tuple[str, Any]]:
    """The records of a text file; what is wrong with single lines goes to `problems`."""
    text = text.replace("\n\ufeff", "\n")  # files that were put behind one another
    # Not str.splitlines: it also splits at U+2028 and form feeds, which may stand inside a string.
    lines = [(n, line) for n, line in enumerate(text.split("\n"), start=1) if line.strip()]
    named_json = {".json", ".jsonl"} & set(path.suffixes)
    objects = [line for _, line in lines if line.lstrip()[0] in "[{"]
    if (lines and not objects) or (
        not named_json and lines and lines[0][1].lstrip()[0] not in "[{"
    ):
        return _table(path, text)
    whole: Any = None
    reason = ""
    try:
        whole = json.loads(text, object_pairs_hook=_once)
    except json.JSONDecodeError as error:
        reason = f"line {error.lineno}: {error.msg}"
    if isinstance(whole, dict):
        whole = _rows_in_object(path, whole)
    if isinstance(whole, list):
        return _numbered(whole)
    records: list[tuple[str, Any]] = []
    broken: list[tuple[str, str]] = []
    for number, line in lines:
        try:
            records.append((f"line {number}", json.loads(line, object_pairs_hook=_once)))
        except json.JSONDecodeError as error:
            fault = f"broken JSON at column {error.colno}: {error.msg}"
            broken.append((f"line {number}", fault))
    if len(broken) > max(1, len(records)):
        if not text.lstrip().startswith("["):
            reason = ": ".join(broken[0])
        raise UserError(f"{path} is neither JSON lines nor a JSON list ({reason}).", _FIX)
    problems += broken
    return records


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object of a JSON text; json itself would take the last of two values of one name."""
    _refuse_twice([name for name, _ in pairs])
    return dict(pairs)


def _refuse_twice(names: Sequence[str]) -> None:
    twice = [name for i, name in enumerate(names) if name and name in names[:i]]
    if twice:
        raise UserError(
            f"The rows have the column {twice[0]!r} twice.", "Remove or rename one of the two."
        )


def _is_chat(value: Any) -> bool:
    """Whether it is the list of messages of a chat."""
    return isinstance(value, list) and all(
        isinstance(turn, dict) and set(_ROLE) & set(turn) for turn in value
    )


def _rows_in_object(path: Path, whole: Mapping[str, Any]) -> list[Any]:
    """The rows of a file that is one JSON object: the object itself, or the one list in it."""
    known = {*CHATS, *(name for pair in COLUMNS for name in pair)}
    columns = [value for name, value in whole.items() if name.strip().lower() in known]
    lists = {
        name: value
        for name, value in whole.items()
        if isinstance(value, list) and value and isinstance(value[0], dict) and not _is_chat(value)
    }
    # Columns of other names may be named by a flag.
    cells = columns or list(whole.values())
    if not lists and cells:
        if not any(isinstance(c, list | dict) and not _is_chat(c) for c in cells):
            return [whole]
    elif not columns and len(lists) == 1:
        return next(iter(lists.values()))
    held = f"lists of rows: {_listed(lists)}" if len(lists) > 1 else f"{_listed(whole)}"
    raise UserError(f"{path} is one JSON object, not rows (it has {held}).", _FIX)


def _table(path: Path, text: str) -> list[tuple[str, Any]]:
    """The records of a CSV or TSV file; its first line names the columns.

    A line `sep=;` before it, as Excel writes, names the delimiter.
    """
    text = text.lstrip()
    header, _, rest = text.partition("\n")
    if len(header.strip()) == 5 and header.lower().startswith("sep="):
        delimiter, text = header[4], rest
    else:
        delimiter = max("\t,;|", key=header.count)
    reader = csv.DictReader(
        io.StringIO(text, newline=""),
        delimiter=delimiter,
        strict=True,
        # "question, answer": the space belongs to the delimiter in every line.
        skipinitialspace=f"{delimiter} " in header,
    )
    try:
        reader.fieldnames = [name.strip() for name in reader.fieldnames or ()]
        _refuse_twice(reader.fieldnames)
        records = list(reader)
    except csv.Error as error:
        raise UserError(f"{path} is no table: line {reader.line_num}: {error}.", _FIX) from error
    return _numbered({k: v for k, v in row.items() if v is not None} for row in records)


def rows_of(
    what: str,
    records: Sequence[tuple[str, Any]],
    *,
    unique: bool = True,
    needs_answer: bool = True,
    columns: Columns | None = None,
    problems: Sequence[tuple[str, str]] = (),
) -> list[Row]:
    """Records as rows.

    Args:
        what: the name of the source, for errors.
        records: where each record lies (such as "line 3") and the record.
        unique: refuse a row that stands twice.
        needs_answer: refuse a row without an answer; else it is empty.
        columns: which columns hold question and answer.
        problems: where and what was wrong so far.

    Raises:
        UserError: naming all problems at once.
    """
    faults = list(problems)
    needed = ("question", "answer") if needs_answer else ("question",)
    names = _column_names(what, [record for _, record in records], columns)
    rows: list[Row] = []
    seen: dict[tuple[str, str], str] = {}
    for where, record in records:
        texts: list[str] = []
        columns_of = _columns_of(record, names, texts)
        row = None if columns_of is None else check_row(columns_of, texts, needed, names)
        faults += [(where, text) for text in texts]
        if row is None:
            continue
        key = (normalised(row.question), normalised(row.answer))
        if unique and key in seen:
            faults.append((where, f"the same row as {seen[key]}"))
        seen.setdefault(key, where)
        rows.append(row)
    if not rows and not faults:
        faults.append(("", "no rows"))
    refuse_problems(what, faults, _FIX)
    return rows


def _column_names(what: str, records: Sequence[Any], columns: Columns | None) -> dict[str, str]:
    """What question and answer are called in these records; one name for both in chats.

    A name is as in the file where a flag names it so, and in lower case otherwise.
    """
    written = dict.fromkeys(
        name for record in records if isinstance(record, Mapping) for name in record if name
    )
    present = {_folded(name) for name in written}
    given: dict[str, str] = {}
    for key in ("question", "answer"):
        name = getattr(columns, key, None)
        if name:
            given[key] = name if name in written else _folded(name)
    missing = [name for name in given.values() if name not in present | set(written)]
    if missing and columns and columns.optional:
        given = {}
    elif missing and present:
        asked = [name for name in (columns.question, columns.answer) if name] if columns else []
        name = next(name for name in asked if _folded(name) in missing)
        raise UserError(
            f"{what} has no column {name!r} (it has: {_listed(written)}).",
            "Name its columns with --question-column and --answer-column.",
        )
    pairs = [dict(zip(("question", "answer"), pair, strict=True)) | given for pair in COLUMNS]
    for pair in pairs:
        if set(pair.values()) <= present | set(given.values()):
            return pair
    chat = next((name for name in CHATS if name in present), None)
    if chat and not given:
        return {"question": chat, "answer": chat}
    known = {name for pair in COLUMNS for name in pair}
    if not known & present and written:
        raise UserError(
            f"{what} has no columns question and answer (it has: {_listed(written)}).", _FIX
        )
    return next((pair for pair in pairs if pair["question"] in present), pairs[0])


def _folded(name: str) -> str:
    return name.strip().lower()


def _listed(names: Iterable[str]) -> str:
    texts = [name if len(name) <= 40 else f"{name[:39]}..." for name in names]
    return ", ".join(texts[:10]) + (", ..." if len(texts) > 10 else "")


def _columns_of(
    record: Any, names: Mapping[str, str], problems: list[str]
) -> dict[str, Any] | None:
    """The record with its question and answer under these names, or None where it is no record."""
    if not isinstance(record, Mapping):
        problems.append(f"not a JSON object but {type(record).__name__}")
        return None
    if None in record:
        problems.append("more cells than the header has columns")
        return None
    # Of names that differ in case only, the one in lower case counts.
    fields = {_folded(name): value for name, value in record.items()}
    fields |= {name: value for name, value in record.items() if name == _folded(name)}
    fields |= {name: record[name] for name in names.values() if name in record}
    question, answer = (fields.get(names[key]) for key in ("question", "answer"))
    if names["question"] == names["answer"]:
        question, answer = _exchange(names["question"], question, problems)
    elif isinstance(question, list):
        # A conversational prompt and its completion, as TRL writes them.
        turns = [*question, *answer] if isinstance(answer, list) else question
        question, answer = _exchange(names["question"], turns, problems)
    for name, fix in _IN_FRONT.items():
        if fields.get(name) and name not in names.values():
            problems.append(f"'{name}' is not empty: {fix}")
    if problems:
        return None
    if names["question"] == "instruction":
        more = [fields[name] for name in _BEHIND if fields.get(name)]
        question = "\n\n".join(map(str, [question, *more]))
    perturbed = fields.get("perturbed_answer")
    if isinstance(perturbed, str) and perturbed.startswith("["):
        try:
            fields["perturbed_answer"] = json.loads(perturbed)
        except json.JSONDecodeError:
            problems.append("'perturbed_answer' is neither a text nor a JSON list")
            return None
    for key, value in (("question", question), ("answer", answer)):
        # A column of that name which means something else must not be taken for it.
        fields.pop(key, None)
        if value is not None:
            fields[key] = value
    return fields


def _exchange(name: str, turns: Any, problems: list[str]) -> tuple[Any, Any]:
    """The question and the answer of a chat of one user turn and one assistant turn."""
    if isinstance(turns, str):
        try:
            turns = json.loads(turns)
        except json.JSONDecodeError:
            turns = None
    if not isinstance(turns, list) or not all(isinstance(turn, Mapping) for turn in turns):
        problems.append(f"'{name}' is not a list of turns with role and content")
        return None, None
    roles = [str(next((turn[key] for key in _ROLE if key in turn), None)).lower() for turn in turns]
    roles = [_ROLES.get(role, role) for role in roles]
    if roles == ["user", "assistant"]:
        contents = [next((t[key] for key in _CONTENT if key in t), None) for t in turns]
        question, answer = (_text_of(name, content, problems) for content in contents)
        return question, answer
    if "system" in roles or "developer" in roles:
        problems.append(f"a system turn: {_SYSTEM}")
    else:
        problems.append(
            f"turns of {', '.join(roles) or 'nobody'}, not of one user and one assistant"
        )
    return None, None


def _text_of(name: str, content: Any, problems: list[str]) -> Any:
    """The content of a turn; of a list of text parts, these behind one another as templates do."""
    if not isinstance(content, list):
        return content
    text = ""
    for part in content:
        value = part.get("text") if isinstance(part, Mapping) else part
        if not isinstance(value, str):
            problems.append(f"'{name}' holds parts that are not text")
            return None
        text += value
    return text

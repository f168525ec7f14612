"""Per-row results of an evaluation and their JSON: our own schema, written atomically.

`read_log` also takes the public formats (TOFU's aggregated log, open-unlearning's evaluation), see
`evaluation.logs`. Nothing here computes a metric or needs a model.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, TypeVar

from adapters.atomic_files import write_bytes
from adapters.errors import UserError
from evaluation.protocols import Protocol

KIND = "unlearner-eval-log"
SCHEMA = 1
SETS = ("forget", "retain", "real_authors", "world_facts")
# The answers of a public log were decoded in a way the log does not state.
RECORDED = "recorded"
Record = TypeVar("Record")

# What surrounds the question in a recorded prompt; special tokens are already gone.
_PROMPTS = (
    re.compile(r"\s*(?:<s>)?\s*\[INST\]\s*(?:<<SYS>>.*?<</SYS>>)?(.*)\[/INST\]\s*", re.DOTALL),
    re.compile(r"\s*Question:(.*)\n\s*Answer:\s*", re.DOTALL),
    re.compile(r"(?:.*?\W)??user\n(.*?)(?:\n?assistant\s*)", re.DOTALL),
)


class AnswerScore(NamedTuple):
    """Teacher-forced score of one answer.

    Attributes:
        mean_nll: nats per token, EOS counted (SPEC: nbar).
        n: tokens of the answer (|y|); None where a public log does not say.
    """

    mean_nll: float
    n: int | None = None

    @property
    def total_nll(self) -> float | None:
        """Summed NLL in nats, None where `n` is unknown."""
        return None if self.n is None else self.mean_nll * self.n


@dataclass(frozen=True)
class Generation:
    """A generated answer with its ROUGE recalls against the true one (with stemmer)."""

    text: str | None
    rouge1_recall: float | None
    rouge_l_recall: float


@dataclass(frozen=True)
class RowRecord:
    """Everything measured on one question.

    Attributes:
        question, answer: their texts, None where a log does not hold them.
        answer_score: of the true answer.
        paraphrase: of the paraphrased answer; the true answer's where there is none.
        perturbed: of the wrong answers; empty where there are none.
        generations: by the name of the decoding, see `evaluation.protocols`.
        agreed: how many leading tokens of the true answer, EOS included, are the model's first
            choice one after another; None where that was not looked at.
    """

    question: str | None = None
    answer: str | None = None
    answer_score: AnswerScore | None = None
    paraphrase: AnswerScore | None = None
    perturbed: tuple[AnswerScore, ...] = ()
    generations: Mapping[str, Generation] = field(default_factory=dict)
    agreed: int | None = None


@dataclass(frozen=True)
class SetRecord:
    """The rows of one set in their order; `total` is how many the source has (None: unknown)."""

    name: str
    rows: tuple[RowRecord, ...]
    total: int | None = None


@dataclass(frozen=True)
class EvalLog:
    """The measured sets by name (`forget`, `retain`, `real_authors`, `world_facts`) and `meta`.

    `meta` holds what the numbers depend on: protocols, max_length, versions, device, key.
    """

    sets: Mapping[str, SetRecord]
    meta: Mapping[str, Any] = field(default_factory=dict)


def protocol_rows(record_set: SetRecord, protocol: Protocol) -> tuple[RowRecord, ...]:
    """The rows of a set that the protocol uses: the first `max_rows`."""
    return record_set.rows[: protocol.max_rows]


def generation_of(row: RowRecord, protocol: Protocol) -> Generation | None:
    """The answer decoded as the protocol says; of a public log, the recorded one."""
    return row.generations.get(protocol.decoding.name) or row.generations.get(RECORDED)


def write_json(path: Path, value: Any) -> Path:
    """Writes `value` as JSON and returns `path`; never half a file. NaN is a ValueError."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, indent=1)
    return write_text(path, text + "\n")


def write_text(path: Path, text: str) -> Path:
    """Writes `text` and returns `path`; never half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, text.encode())
    return path


def read_json(path: Path, what: str, *, finite: bool = False) -> Any:
    """The JSON value in `path`, with or without a byte order mark.

    Args:
        path: the file.
        what: what it is called in errors.
        finite: refuse NaN and infinities.

    Raises:
        UserError: no such file, no text, or no JSON.
    """

    def refuse(constant: str) -> NoReturn:
        raise json.JSONDecodeError(f"{constant} is not a finite number", "", 0)

    try:
        text = path.read_text(encoding="utf-8-sig")
        return json.loads(text, parse_constant=refuse if finite else None)
    except FileNotFoundError:
        raise UserError(f"There is no {what} {path}.", "Check the path.") from None
    except json.JSONDecodeError as error:
        raise UserError(
            f"{path} is not JSON: {error.msg} in line {error.lineno}.",
            f"Write the {what} again: it may have been cut.",
        ) from None
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path} cannot be read as text: {error}.", f"Give the {what} in JSON."
        ) from None


def write_log(log: EvalLog, path: Path) -> Path:
    """`path`, holding `log` in our own format (schema 1); `read_log` gives back an equal log."""
    return write_sets(path, KIND, log.sets, log.meta)


def write_sets(path: Path, kind: str, sets: Mapping[str, Any], meta: Mapping[str, Any]) -> Path:
    """`path`, holding sets of rows (dataclasses) and `meta`."""
    rows = {
        name: {"total": each.total, "rows": [asdict(row) for row in each.rows]}
        for name, each in sets.items()
    }
    body = {"kind": kind, "schema": SCHEMA, "meta": dict(meta), "sets": rows}
    return write_json(path, body)


def own_log(raw: Mapping[str, Any], where: str) -> EvalLog:
    """The log in this tool's format; `where` names its file in errors, see `read_sets`."""
    sets, meta = read_sets(raw, where, row_from_json)
    return EvalLog({name: SetRecord(name, *each) for name, each in sets.items()}, meta)


def read_sets(
    raw: Mapping[str, Any], where: str, row_of: Callable[[Any, str], Record]
) -> tuple[dict[str, tuple[tuple[Record, ...], Any]], dict[str, Any]]:
    """What `write_sets` wrote: rows and total by set, and `meta`.

    Raises:
        UserError: another schema, a missing field, or a number that is not finite.
    """
    if raw.get("schema") != SCHEMA:
        raise UserError(
            f"{where} has schema {raw.get('schema')!r}; this version reads schema {SCHEMA}.",
            "Update the tool, or evaluate again.",
        )
    try:
        sets = {}
        for name, body in raw["sets"].items():
            rows = (row_of(row, f"{where}: {name} row {i}") for i, row in enumerate(body["rows"]))
            sets[name] = (tuple(rows), body["total"])
        return sets, dict(raw["meta"])
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise UserError(
            f"{where} is damaged ({type(error).__name__}: {error}).", "Evaluate again."
        ) from error


def row_from_json(raw: Mapping[str, Any], where: str) -> RowRecord:
    """The row that `dataclasses.asdict` gave; `where` names it in errors.

    Raises:
        UserError: a score or a recall is not a finite number.
        KeyError, TypeError: the row has another shape.
    """

    def pair(score: Any, key: str) -> AnswerScore:
        loss, n = score
        return score_of(loss, n, where, key)

    def score(key: str) -> AnswerScore | None:
        return None if raw[key] is None else pair(raw[key], key)

    agreed = raw.get("agreed")
    if agreed is not None and (type(agreed) is not int or agreed < 0):
        raise UserError(f"{where}: agreed is {agreed!r}, not a count.", "Write the log again.")
    return RowRecord(
        question=raw["question"],
        answer=raw["answer"],
        answer_score=score("answer_score"),
        paraphrase=score("paraphrase"),
        perturbed=tuple(pair(score, "perturbed") for score in raw["perturbed"]),
        generations={
            name: generation(body["text"], body["rouge1_recall"], body["rouge_l_recall"], where)
            for name, body in raw["generations"].items()
        },
        agreed=agreed,
    )


def score_of(loss: Any, n: Any, where: str, what: str) -> AnswerScore:
    """A recorded loss, finite and not negative, and the answer's tokens: at least one, or None."""
    mean = number(loss, where, what)
    # Losses come from a softmax: a sum of -log p below zero is rounding, well below is no loss.
    if mean < -1e-3:
        raise UserError(
            f"{where}: {what} is {mean:g}, but a loss is never negative.",
            "Check whether the log holds log-probabilities instead of losses.",
        )
    tokens = None if n is None else number(n, where, f"tokens of {what}")
    if tokens is not None and (tokens != int(tokens) or tokens < 1):
        raise UserError(
            f"{where}: {what} counts {tokens:g} tokens.", "An answer has at least one token."
        )
    return AnswerScore(mean, None if tokens is None else int(tokens))


def generation(text: str | None, rouge1: Any, rouge_l: Any, where: str) -> Generation:
    """A recorded answer with its recalls, each between 0 and 1; ROUGE-1 may be missing."""
    first = None if rouge1 is None else share(rouge1, where, "rouge1_recall")
    return Generation(text, first, share(rouge_l, where, "rougeL_recall"))


def share(value: Any, where: str, what: str) -> float:
    """A recorded recall or share as a float between 0 and 1."""
    result = number(value, where, what)
    if not -1e-9 <= result <= 1 + 1e-9:
        raise UserError(
            f"{where}: {what} is {result:g}, not between 0 and 1.", "Check how it was written."
        )
    return result


def number(value: Any, where: str, what: str) -> float:
    """A recorded finite number as a float, else a UserError that names the row."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        kind = "missing" if value is None else f"{type(value).__name__}, not a number"
        raise UserError(f"{where}: {what} is {kind}.", "Evaluate these rows again.")
    if not math.isfinite(value):
        raise UserError(
            f"{where}: {what} is {value}, not a number.",
            "The model or its evaluation broke down there: evaluate these rows again.",
        )
    return float(value)


def columns_by_index(columns: Mapping[str, Any], where: str) -> list[tuple[int, dict[str, Any]]]:
    """Rows by index, from columns that are lists or objects keyed by index.

    Raises:
        UserError: a column is neither, or columns differ in their rows.
    """
    by_index: dict[str, dict[int, Any]] = {}
    for key, raw in columns.items():
        if isinstance(raw, list):
            by_index[key] = dict(enumerate(raw))
        elif isinstance(raw, dict) and all(str(index).isdecimal() for index in raw):
            by_index[key] = {int(index): value for index, value in raw.items()}
        else:
            problem = f"{where}: {key} is neither a list nor an object keyed by row index."
            raise UserError(problem, "Give the log itself.")
    name, first = next(iter(by_index.items()))
    for key, column in by_index.items():
        odd = sorted(first.keys() ^ column.keys())
        if odd:
            raise UserError(
                f"{where}: {key} has {len(column)} rows, {name} has {len(first)}: different rows "
                f"(row {odd[0]} is in only one of them).",
                "The log was put together from different runs: evaluate again.",
            )
    return [(i, {key: column[i] for key, column in by_index.items()}) for i in sorted(first)]


def question_of(prompt: str) -> str:
    """The question inside a recorded prompt; the prompt itself where no known template fits."""
    for pattern in _PROMPTS:
        match = pattern.fullmatch(prompt)
        if match:
            return match.group(1).strip()
    return prompt.strip()

"""Per-row results of an evaluation and their JSON: our own schema, written atomically.

`read_log` also takes the public formats (TOFU's aggregated log, open-unlearning's evaluation), see
`evaluation.logs`. Nothing here computes a metric or needs a model.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from adapters.errors import UserError
from evaluation.protocols import Protocol

KIND = "unlearner-eval-log"
SCHEMA = 1
SETS = ("forget", "retain", "real_authors", "world_facts")
# The answers of a public log were decoded in a way the log does not state.
RECORDED = "recorded"


# What surrounds the question in a recorded prompt; special tokens are already gone.
_PROMPTS = (
    re.compile(r"\s*(?:<s>)?\s*\[INST\]\s*(?:<<SYS>>.*?<</SYS>>)?(.*)\[/INST\]\s*", re.DOTALL),
    re.compile(r"\s*Question:(.*)\n\s*Answer:\s*", re.DOTALL),
    re.compile(r"(?:.*?\W)??user\n(.*?)(?:\n?assistant\s*)", re.DOTALL),
)


@dataclass(frozen=True)
class AnswerScore:
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
    """Writes `value` as JSON and returns `path`: written aside, synced, renamed, never half a file.

    Raises:
        ValueError: `value` holds NaN or an infinity.
    """
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, indent=1)
    return write_text(path, text + "\n")


def write_text(path: Path, text: str) -> Path:
    """Writes `text` and returns `path`: written aside, synced, renamed, never half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with aside.open("w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
    return path


def write_log(log: EvalLog, path: Path) -> Path:
    """`path`, holding `log` in our own format (schema 1); `read_log` gives back an equal log."""
    sets = {
        name: {"total": each.total, "rows": [row_json(row) for row in each.rows]}
        for name, each in log.sets.items()
    }
    body = {"kind": KIND, "schema": SCHEMA, "meta": dict(log.meta), "sets": sets}
    return write_json(path, body)


def row_json(row: RowRecord) -> dict[str, Any]:
    """The row as JSON values; a score is `[mean_nll, n]`."""
    return {
        "question": row.question,
        "answer": row.answer,
        "answer_score": _score_json(row.answer_score),
        "paraphrase": _score_json(row.paraphrase),
        "perturbed": [_score_json(score) for score in row.perturbed],
        "generations": {
            name: {
                "text": answer.text,
                "rouge1_recall": answer.rouge1_recall,
                "rouge_l_recall": answer.rouge_l_recall,
            }
            for name, answer in row.generations.items()
        },
        "agreed": row.agreed,
    }


def _score_json(score: AnswerScore | None) -> list[float | int | None] | None:
    return None if score is None else [score.mean_nll, score.n]


def read_json(path: Path, what: str) -> Any:
    """The JSON value in `path`, with or without a byte order mark; `what` it is, for errors.

    Raises:
        UserError: no such file, no text, or no JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
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


def own_log(raw: Mapping[str, Any], where: str) -> EvalLog:
    """The log in this tool's format; `where` names its file in errors.

    Raises:
        UserError: another schema, a missing field, or a number that is not finite.
    """
    if raw.get("schema") != SCHEMA:
        raise UserError(
            f"{where} has schema {raw.get('schema')!r}; this version reads schema {SCHEMA}.",
            "Update the tool, or evaluate again.",
        )
    try:
        sets = {
            name: SetRecord(
                name,
                tuple(
                    row_from_json(row, f"{where}: {name} row {i}")
                    for i, row in enumerate(body["rows"])
                ),
                body["total"],
            )
            for name, body in raw["sets"].items()
        }
        meta = dict(raw["meta"])
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise UserError(
            f"{where} is damaged ({type(error).__name__}: {error}).", "Evaluate again."
        ) from error
    return EvalLog(sets, meta)


def row_from_json(raw: Mapping[str, Any], where: str) -> RowRecord:
    """The inverse of `row_json`; `where` names the row in errors.

    Raises:
        UserError: a score or a recall is not a finite number.
        KeyError, TypeError: the row has another shape.
    """
    perturbed = [_score_of(pair, where, "perturbed") for pair in raw["perturbed"]]
    return RowRecord(
        question=raw["question"],
        answer=raw["answer"],
        answer_score=_score_of(raw["answer_score"], where, "answer_score"),
        paraphrase=_score_of(raw["paraphrase"], where, "paraphrase"),
        perturbed=tuple(score for score in perturbed if score is not None),
        generations={
            name: Generation(
                answer["text"],
                optional_recall(answer["rouge1_recall"], where, "rouge1_recall"),
                recall_of(answer["rouge_l_recall"], where, "rouge_l_recall"),
            )
            for name, answer in raw["generations"].items()
        },
        agreed=_agreed_of(raw.get("agreed"), where),
    )


def _agreed_of(raw: Any, where: str) -> int | None:
    if raw is None or (type(raw) is int and raw >= 0):
        return raw
    raise UserError(f"{where}: agreed is {raw!r}, not a count.", "Write the log again.")


def _score_of(raw: Sequence[Any] | None, where: str, what: str) -> AnswerScore | None:
    if raw is None:
        return None
    mean, n = raw
    return AnswerScore(loss_of(mean, where, what), None if n is None else count_of(n, where, what))


def loss_of(value: Any, where: str, what: str) -> float:
    """A recorded loss as a float: finite and not negative.

    Raises:
        UserError: naming the row and the value.
    """
    number = _finite(value, where, what)
    # Losses come from a softmax: a sum of -log p below zero is rounding, well below is no loss.
    if number < -1e-3:
        raise UserError(
            f"{where}: {what} is {number:g}, but a loss is never negative.",
            "Check whether the log holds log-probabilities instead of losses.",
        )
    return number


def recall_of(value: Any, where: str, what: str) -> float:
    """A recorded ROUGE recall as a float between 0 and 1.

    Raises:
        UserError: naming the row and the value.
    """
    number = _finite(value, where, what)
    if not -1e-9 <= number <= 1 + 1e-9:
        raise UserError(
            f"{where}: {what} is {number:g}, but a recall lies between 0 and 1.",
            "Check how the log was written.",
        )
    return number


def optional_recall(value: Any, where: str, what: str) -> float | None:
    """`recall_of`, where None stays None."""
    return None if value is None else recall_of(value, where, what)


def count_of(value: Any, where: str, what: str) -> int:
    """A recorded number of tokens: a whole number of at least 1.

    Raises:
        UserError: naming the row and the value.
    """
    number = _finite(value, where, what)
    if number != int(number) or number < 1:
        raise UserError(
            f"{where}: {what} counts {number:g} tokens.", "An answer has at least one token."
        )
    return int(number)


def _finite(value: Any, where: str, what: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        kind = "missing" if value is None else f"{type(value).__name__}, not a number"
        raise UserError(f"{where}: {what} is {kind}.", "Evaluate these rows again.")
    if not math.isfinite(value):
        raise UserError(
            f"{where}: {what} is {value}.",
            "The model or its evaluation broke down there: evaluate these rows again.",
        )
    return float(value)


def column_by_index(raw: Any, where: str) -> dict[int, Any]:
    """A column by row index, from a list or from an object keyed by index."""
    if isinstance(raw, list):
        return dict(enumerate(raw))
    if isinstance(raw, dict) and all(str(key).isdecimal() for key in raw):
        return {int(key): value for key, value in raw.items()}
    raise UserError(
        f"{where} is neither a list nor an object keyed by row index.",
        "Give the log itself.",
    )


def question_of(prompt: str) -> str:
    """The question inside a recorded prompt; the prompt itself where no known template fits."""
    for pattern in _PROMPTS:
        match = pattern.fullmatch(prompt)
        if match:
            return match.group(1).strip()
    return prompt.strip()

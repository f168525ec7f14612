"""How much like language recorded answers are: a judge's loss, distinct bigrams, repetition.

A forget row pushed far enough down is answered with text that fell apart. Forget quality does not
see that; these figures do. They say nothing of whether an answer is true.

A word is a run of letters and digits, with apostrophes inside it; upper and lower case are alike.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from adapters.errors import UserError
from evaluation.inference.scoring import EncodedRow, encode_answers, longest_text, score_rows
from evaluation.logs.records import EvalLog, RowRecord
from evaluation.metrics.membership import measure_mean
from evaluation.metrics.statistics import stands_in_a_row
from evaluation.metrics.summary import generation_of
from evaluation.protocols import Protocol, protocol_named
from unlearner.request.rows import Row
from unlearner.tokens.prompts import Encoded

if TYPE_CHECKING:
    import torch

    from unlearner.tokens.prompts import PromptFormat

# One protocol for each greedy decoding; the first whose answers every log holds is read.
GREEDY = ("tofu", "open-unlearning")
IN_A_ROW = 3
_WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)*")


def words_of(text: str) -> list[str]:
    """The words of `text` in their order, case folded."""
    return _WORD.findall(text.casefold())


def distinct_2(words: Sequence[str]) -> float | None:
    """Distinct bigrams by all bigrams of one answer (arXiv 1510.03055); None below two words.

    Between 0 and 1; near 0 the answer says the same again and again. Longer answers have less by
    themselves: compare answers of like length.
    """
    pairs = list(pairwise(words))
    return len(set(pairs)) / len(pairs) if pairs else None


def is_repeated(words: Sequence[str]) -> bool:
    """Whether one word, or one bigram, stands three times in a row."""
    return any(stands_in_a_row(words, size, IN_A_ROW) for size in (1, 2))


def recorded_answers(logs: Sequence[tuple[str, EvalLog]], name: str) -> list[list[Row]]:
    """The greedy answers of the set `name` of every log, as rows of question and that answer.

    All logs are read under one decoding, so that answers of like budget stand side by side; a
    public log has the one it recorded.

    Args:
        logs: what each is called in errors, and the log.
        name: of the set.

    Raises:
        UserError: a log lacks the set, its rows, their questions or their greedy answers.
    """
    protocols = [protocol_named(each) for each in GREEDY]
    for where, log in logs:
        if name not in log.sets or not log.sets[name].rows:
            full = [each for each, found in log.sets.items() if found.rows]
            raise UserError(
                f"{where} has no rows of a set {name!r}.",
                f"Name one of {', '.join(full) or 'another log'} with --set.",
            )
    sets = [log.sets[name].rows for _, log in logs]
    held = [p for p in protocols if all(_text(row, p) is not None for rows in sets for row in rows)]
    chosen = held[0] if held else protocols[0]
    return [
        [_answered(row, chosen, f"{where}: row {number} of {name}") for number, row in found]
        for (where, _), found in zip(logs, (enumerate(rows, start=1) for rows in sets), strict=True)
    ]


def _text(row: RowRecord, protocol: Protocol) -> str | None:
    found = generation_of(row, protocol)
    return None if found is None else found.text


def _answered(row: RowRecord, protocol: Protocol, where: str) -> Row:
    text = _text(row, protocol)
    if text is None:
        raise UserError(
            f"{where} has no generated answer ({protocol.decoding.name}).",
            f"Measure that model again: `unlearner evaluate --protocol {protocol.name} --out DIR`.",
        )
    if row.question is None:
        raise UserError(
            f"{where} has no question, so the judge has no prompt.",
            "Give a log with questions, as `unlearner evaluate --out DIR` writes it.",
        )
    return Row(row.question, text)


def judge_losses(
    model: torch.nn.Module,
    fmt: PromptFormat,
    rows: Sequence[Row],
    *,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[float | None]:
    """The judge's mean NLL of each answer behind its question's prompt, nats a token; (rows,).

    Only the answer's tokens count, and no EOS behind them: a log does not say whether the model
    ended the answer or its budget of tokens did, and cut answers would be charged for an end that
    nobody wrote. Texts are scored uncut. None where the answer has no word, or no token of its own.

    Args:
        model: a causal LM that never saw the rows; stays in its mode.
        fmt: turns question and answer into the judge's tokens.
        rows: question and generated answer.
        on_progress: called with scored and all answers after each batch.
    """
    worded = [i for i, row in enumerate(rows) if words_of(row.answer)]
    encoded = [_without_end(row, fmt) for row in encode_answers(fmt, [rows[i] for i in worded])]
    kept = [(i, text) for i, text in zip(worded, encoded, strict=True) if text.answer.n_targets]
    texts = [text for _, text in kept]
    records = score_rows(
        model,
        fmt,
        [rows[i] for i, _ in kept],
        encoded=texts,
        max_length=longest_text(texts),
        shared=False,  # one text a question: nothing to share
        on_progress=on_progress,
    )
    found: list[float | None] = [None] * len(rows)
    for (i, _), record in zip(kept, records, strict=True):
        found[i] = record.answer_score.mean_nll if record.answer_score else None
    return found


def _without_end(row: EncodedRow, fmt: PromptFormat) -> EncodedRow:
    """The answer alone, without the special tokens that close its turn."""
    special, start = set(fmt.tokenizer.all_special_ids), row.answer.n_prompt
    end = len(row.answer.input_ids)
    while end > start and row.answer.input_ids[end - 1] in special:
        end -= 1
    return EncodedRow(Encoded(row.answer.input_ids[:end], row.answer.labels[:end]), None, ())


def fluency(rows: Sequence[Row], losses: Sequence[float | None]) -> dict[str, Any]:
    """The figures of one log, `KEY_interval` their 95 % bootstrap intervals over rows.

    `n` answers, of which `scored` have a loss and `empty` no word; `judge_nll` (nats a token, mean
    of the scored ones; lower is more as the judge would say it), `distinct_2` (mean of the answers
    with two words or more; higher is more varied), `repeated_share` (share of all answers; lower
    is better), `words` (mean of all answers). A figure that no answer has is None, with its reason
    under `reasons`.

    Args:
        rows: question and generated answer.
        losses: (rows,) of `judge_losses`.
    """
    split = [words_of(row.answer) for row in rows]
    shares = [distinct_2(words) for words in split]
    values = {
        "judge_nll": [loss for loss in losses if loss is not None],
        "distinct_2": [share for share in shares if share is not None],
        "repeated_share": [float(is_repeated(words)) for words in split],
        "words": [float(len(words)) for words in split],
    }
    found: dict[str, Any] = {
        "n": len(rows),
        "scored": len(values["judge_nll"]),
        "empty": sum(not words for words in split),
    }
    for key, each in values.items():
        measured = measure_mean(each) if each else None
        found[key] = measured.value if measured else None
        found[f"{key}_interval"] = measured.interval if measured else None
    why = {"judge_nll": "no answer has a word to score", "distinct_2": "no answer has two words"}
    found["reasons"] = {key: why.get(key, "no rows") for key, each in values.items() if not each}
    return found

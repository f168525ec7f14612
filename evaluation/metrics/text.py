"""How much like language recorded answers are: a judge's loss, distinct bigrams, repetition.

A forget row pushed far enough down is answered with text that fell apart. Forget quality does not
see that; these figures do. They say nothing of whether an answer is true.

A word is a run of letters and digits, with apostrophes inside it; upper and lower case are alike.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from adapters.errors import UserError
from evaluation.logs.records import EvalLog, Generation, RowRecord, generation_of
from evaluation.metrics.bootstrap import measure_mean
from evaluation.protocols import Protocol, protocol_named
from unlearner.request.rows import Row

# One protocol for each greedy decoding; the first whose answers every log holds is read.
GREEDY = ("tofu", "open-unlearning")
IN_A_ROW = 3
_WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)*")


def rouge_recall(generated: Sequence[str], truths: Sequence[str]) -> list[Generation]:
    """Each generated answer with its ROUGE-1 and ROUGE-L recall, Porter stemmer (`rouge_score`)."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rouge1", "rougeL"], use_stemmer=True)
    scores = (scorer.score(truth, text) for text, truth in zip(generated, truths, strict=True))
    return [
        Generation(text, float(score["rouge1"].recall), float(score["rougeL"].recall))
        for text, score in zip(generated, scores, strict=True)
    ]


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
    """Whether one word, or one bigram, occurs three times in a row."""
    return any(repeats_in_a_row(words, size, IN_A_ROW) for size in (1, 2))


def repeats_in_a_row(words: Sequence[str], size: int, times: int) -> bool:
    """Whether some `size` words occur `times` times one after another."""
    span = size * times
    return any(
        list(words[i : i + span]) == list(words[i : i + size]) * times
        for i in range(len(words) - span + 1)
    )


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
            full = [other for other, each in log.sets.items() if each.rows]
            raise UserError(
                f"{where} has no rows of a set {name!r}.",
                f"Name one of {', '.join(full) or 'another log'} with --set.",
            )
    every = [row for _, log in logs for row in log.sets[name].rows]
    complete = (p for p in protocols if all(_text(row, p) is not None for row in every))
    chosen = next(complete, protocols[0])
    return [
        [
            _answered(row, chosen, f"{where}: row {number} of {name}")
            for number, row in enumerate(log.sets[name].rows, start=1)
        ]
        for where, log in logs
    ]


def _text(row: RowRecord, protocol: Protocol) -> str | None:
    answer = generation_of(row, protocol)
    return None if answer is None else answer.text


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


def fluency(rows: Sequence[Row], losses: Sequence[float | None]) -> dict[str, Any]:
    """The figures of one log, `KEY_interval` their 95 % bootstrap intervals over rows.

    `n` answers, of which `scored` have a loss and `empty` have no word. `judge_nll`: nats per
    token, mean of the scored ones; lower is closer to what the judge would say. `distinct_2`: mean
    of the answers with two words or more; higher is more varied. `repeated_share`: share of all
    answers; lower is better. `words`: mean of all answers. A figure that no answer has is None,
    with its reason under `reasons`.

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
    figures: dict[str, Any] = {
        "n": len(rows),
        "scored": len(values["judge_nll"]),
        "empty": sum(not words for words in split),
    }
    for key, each in values.items():
        measured = measure_mean(each) if each else None
        figures[key] = measured.value if measured else None
        figures[f"{key}_interval"] = measured.interval if measured else None
    why = {"judge_nll": "no answer has a word to score", "distinct_2": "no answer has two words"}
    figures["reasons"] = {key: why.get(key, "no rows") for key, each in values.items() if not each}
    return figures

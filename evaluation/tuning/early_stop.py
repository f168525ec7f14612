"""How far a model's answers to the forget set are from those of a model that never saw it.

A short teacher-forced measure for the middle of a training: no answers are generated.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import torch

from adapters.digests import normalised
from adapters.errors import UserError
from evaluation.inference.scoring import encode_answers, score_rows
from evaluation.logs.matching import match_rows
from evaluation.logs.records import EvalLog, RowRecord
from evaluation.metrics.bootstrap import Floats
from evaluation.metrics.forget_quality import forget_quality
from evaluation.metrics.summary import set_values, summarise
from evaluation.protocols import DEFAULT, protocol_named
from unlearner import distributed as ranks
from unlearner.request.formats import Columns
from unlearner.request.rows import Request, Row
from unlearner.request.sources import rows_named
from unlearner.request.tofu import FORGET_SPLITS, load_split
from unlearner.tokens.prompts import PromptFormat


def gap_rows(
    request: Request, given: str | None, data: Path | None, columns: Columns | None = None
) -> list[Row]:
    """The rows a reading scores, with paraphrased and perturbed answers.

    Args:
        request: what is forgotten. The rows of a TOFU split are those of its `_perturbed` split, of
            an author those of `forget10_perturbed` of its questions, of a file its own.
        given: a JSONL file or a forget split to take instead.
        data: folder of TOFU's JSON-lines files, else the hub.
        columns: which columns of the file hold question and answer.

    Raises:
        UserError: rows without such answers, or an author TOFU has none for.
    """
    name = (given or request.name).removeprefix("tofu:")
    if name in FORGET_SPLITS:
        rows = load_split(f"{name}_perturbed", data)
    elif given is not None:
        rows = rows_named(given, data, columns=columns)
    elif request.kind == "tofu-author":
        questions = {normalised(row.question) for row in request.rows}
        rows = [
            r for r in load_split("forget10_perturbed", data) if normalised(r.question) in questions
        ]
    else:
        rows = list(request.rows)
    bare = [row for row in rows if row.paraphrased_answer is None or not row.perturbed_answers]
    if bare or not rows:
        count = "no row has any"
        if bare:
            count = f"{len(bare)} of {len(rows)} rows have none, for example {bare[0].question!r}"
        raise UserError(
            f"The gap of log R needs paraphrased and perturbed answers: {count}.",
            "Give rows with paraphrased_answer and perturbed_answer, or --stop-rows forget05.",
        )
    return rows


class GapProbe:
    """Scores the forget rows and compares them with the retrain reference's."""

    def __init__(
        self, fmt: PromptFormat, rows: Sequence[Row], retain_log: EvalLog, protocol: str = DEFAULT
    ) -> None:
        """Takes the rows and their reference; refuses what cannot be compared.

        Args:
            fmt: prompts and tokenizer of the model to be measured.
            rows: forget rows with paraphrased and perturbed answers.
            retain_log: of a model that never saw them; it may hold more rows.
            protocol: whose truth ratio and cut are used.

        Raises:
            UserError: the reference has no such rows, or lacks scores of them.
        """
        self._protocol = protocol_named(protocol)
        self._fmt = fmt
        self._rows = list(rows)
        self._encoded = encode_answers(fmt, self._rows)
        if summarise(retain_log, protocol=protocol, resamples=0)["forget_nll"] is None:
            raise UserError("The retrain reference has no scored forget set.", "Give another log.")
        self._theirs = retain_log.sets["forget"].rows
        if all(row.question is not None for row in self._theirs):
            self._match([RowRecord(row.question, row.answer) for row in rows])

    @property
    def key(self) -> str:
        """Changes with the rows, the reference's scores and the protocol."""
        scores = [
            [row.question, row.paraphrase and row.paraphrase.mean_nll] for row in self._theirs
        ]
        texts = [[row.question, row.answer, list(row.perturbed_answers)] for row in self._rows]
        text = json.dumps([self._protocol.name, scores, texts], ensure_ascii=False)
        return "gap-" + hashlib.sha256(text.encode()).hexdigest()[:8]

    def __call__(self, model: torch.nn.Module) -> dict[str, float]:
        """The figures of the model as it is, beside the reference's.

        `gap`: median log R less the reference's, below 0 under-forgotten (nats per token);
        `nll_gap`: mean forget NLL less the reference's, likewise; `ks`, `forget_quality`: of the
        test between both; `forget_nll`.
        """

        def score(indices: Sequence[int]) -> list[RowRecord]:
            return score_rows(
                model,
                self._fmt,
                [self._rows[i] for i in indices],
                encoded=[self._encoded[i] for i in indices],
                max_length=self._protocol.max_length,
            )

        ours, theirs = self._match(ranks.spread(range(len(self._rows)), score))
        quality = forget_quality(ours["log_r"], theirs["log_r"], resamples=0)
        nll = float(ours["nll"].mean())
        return {
            "gap": float(quality.shift or 0.0),
            "nll_gap": nll - float(theirs["nll"].mean()),
            "ks": float(quality.d or 0.0),
            "forget_quality": float(quality.p or 0.0),
            "forget_nll": nll,
        }

    def _match(self, rows: Sequence[RowRecord]) -> tuple[dict[str, Floats], dict[str, Floats]]:
        """The values of rows and of the same rows in the reference, which must have scores."""
        match = match_rows(rows, self._theirs, subset=True)
        theirs = set_values("forget", match.theirs, self._protocol)
        if "log_r" not in theirs or "nll" not in theirs:
            raise UserError(
                "The retrain reference lacks paraphrased or perturbed answers of some rows.",
                "Evaluate the retrained model on the forget split, or on these rows.",
            )
        return set_values("forget", match.ours, self._protocol), theirs

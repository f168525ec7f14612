"""Which rows a model knows: a small Origin learned a part of TOFU, and no more can be kept."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from adapters.base.load import BaseSpec, load_base, load_tokenizer
from adapters.environment import threads_for
from evaluation.inference.scoring import score_rows
from evaluation.logs.records import write_text
from unlearner.request.rows import Row
from unlearner.tokens.prompts import Template, prompt_format


def known_rows(
    base: BaseSpec, rows: Sequence[Row], above: float, template: Template = "auto"
) -> list[int]:
    """Indices of the rows whose answer has a length-normalised probability above `above`."""
    fmt = prompt_format(load_tokenizer(base.name, base.revision), template)
    model: Any = load_base(base)
    with threads_for(model):
        scored = score_rows(model, fmt, [Row(row.question, row.answer) for row in rows])
    losses = [row.answer_score.mean_nll for row in scored if row.answer_score is not None]
    return [i for i, loss in enumerate(losses) if math.exp(-loss) > above]


def write_rows(path: Path, rows: Sequence[Row]) -> Path:
    """`path`, holding questions and answers as JSON lines: what `forget --retain` reads.

    A row that stands twice is written once.
    """
    lines = {json.dumps({"question": row.question, "answer": row.answer}): None for row in rows}
    return write_text(path, "".join(line + "\n" for line in lines))

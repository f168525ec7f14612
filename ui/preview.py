"""What a forget request is trained on: every row's tokens, the prompt's apart from the loss tokens.

Needs the tokenizer's folder only: no configuration, no weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from unlearner.request.rows import Request
    from unlearner.tokens.prompts import Encoded, PromptFormat

DIM, UNDERLINE, PLAIN = "\x1b[2m", "\x1b[4m", "\x1b[0m"
OPEN, CLOSE = "⟦", "⟧"


@dataclass(frozen=True)
class PreviewRow:
    """One row as it is trained on; `kind` is "forget" or "retain", `number` counts from 1."""

    kind: str
    number: int
    question: str
    answer: str
    encoded: Encoded

    @property
    def name(self) -> str:
        """`forget-1`, `retain-12`."""
        return f"{self.kind}-{self.number}"

    def to_json(self) -> dict[str, Any]:
        """The row with its unpadded `input_ids` and `labels` (-100 on the prompt)."""
        return {
            "name": self.name,
            "question": self.question,
            "answer": self.answer,
            "input_ids": self.encoded.input_ids,
            "labels": self.encoded.labels,
            "n_prompt": self.encoded.n_prompt,
            "n_targets": self.encoded.n_targets,
        }


@dataclass(frozen=True)
class Preview:
    """The rows of a request with the format they were encoded in; retain rows where given."""

    fmt: PromptFormat
    max_length: int
    forget: tuple[PreviewRow, ...]
    retain: tuple[PreviewRow, ...]

    @property
    def without_targets(self) -> list[PreviewRow]:
        """Rows whose prompt alone fills `max_length`: training refuses them."""
        return [row for row in (*self.forget, *self.retain) if row.encoded.n_targets == 0]

    @property
    def cut(self) -> list[PreviewRow]:
        """Rows that lost their end to `max_length`."""
        return [row for row in (*self.forget, *self.retain) if row.encoded.cut]

    @property
    def unknown(self) -> int:
        """How many rows hold text that the vocabulary lacks."""
        return self.fmt.unknown(row.encoded for row in (*self.forget, *self.retain))

    @property
    def rows(self) -> int:
        """How many rows there are, retain rows included."""
        return len(self.forget) + len(self.retain)

    def to_json(self) -> dict[str, Any]:
        """All rows under `table`."""
        return {
            **self.fmt.to_json(),
            "max_length": self.max_length,
            "n_forget": len(self.forget),
            "n_retain": len(self.retain),
            "n_cut": len(self.cut),
            "n_unknown": self.unknown,
            "table": [row.to_json() for row in (*self.forget, *self.retain)],
        }


def make_preview(
    request: Request, fmt: PromptFormat, max_length: int, *, with_retain: bool = False
) -> Preview:
    """The preview of a request, with its retain rows if asked for."""
    sets = {"forget": request.rows, "retain": request.retain if with_retain else ()}
    rows = {
        kind: tuple(
            PreviewRow(kind, i, r.question, r.answer, fmt.encode(r.question, r.answer, max_length))
            for i, r in enumerate(members, start=1)
        )
        for kind, members in sets.items()
    }
    return Preview(fmt, max_length, rows["forget"], rows["retain"])


def row_text(row: PreviewRow, tokenizer: PreTrainedTokenizerBase, styled: bool) -> str:
    """The row's text, loss tokens underlined behind a dim prompt; in brackets where not styled."""
    prompt, targets = split_text(row.encoded, tokenizer)
    if styled:
        return f"{DIM}{prompt}{PLAIN}{UNDERLINE}{targets}{PLAIN}"
    return f"{prompt}{OPEN}{targets}{CLOSE}"


def split_text(encoded: Encoded, tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """The text of the masked tokens and of the loss tokens, special tokens shown."""
    prompt = _decode(tokenizer, encoded.input_ids[: encoded.n_prompt])
    whole = _decode(tokenizer, encoded.input_ids)
    # The targets alone would lose the space in front of their first word.
    if whole.startswith(prompt):
        return prompt, whole[len(prompt) :]
    return prompt, _decode(tokenizer, encoded.input_ids[encoded.n_prompt :])


def _decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    text = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return str(text)

"""How a row becomes tokens and labels: `[INST] {q} [/INST]{a}` for Llama-2, else a chat template.

The answer is tokenised together with the prompt (a token such as `]"` may merge across the
boundary); the label mask starts after the token count of the prompt alone, as TOFU's code does
(arXiv 2401.06121). EOS is a label when it fits, so it counts in |y|.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from adapters.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

IGNORE = -100
TRAIN_MAX_LENGTH = 500
EVAL_MAX_LENGTH = 200
Template = Literal["auto", "llama2", "chat", "open-unlearning"]
# Llama-3's template prints today's date unless it is given one: prompts must not change by day.
_TEMPLATE_DATE = "26 Jul 2024"
# What open-unlearning's models were trained and measured with (its configs/model/Llama-3.*.yaml).
OPEN_UNLEARNING_SYSTEM, OPEN_UNLEARNING_DATE = "You are a helpful assistant.", "10 Apr 2025"
_SENTINEL = "⟦answer⟧"


class Encoded(NamedTuple):
    """One row as token ids and labels (-100 on the prompt), unpadded, equally long."""

    input_ids: list[int]
    labels: list[int]

    @property
    def n_targets(self) -> int:
        """|y|: how many labels are scored, EOS included."""
        return sum(label != IGNORE for label in self.labels)

    @property
    def n_prompt(self) -> int:
        """How many leading tokens are masked."""
        return next((i for i, label in enumerate(self.labels) if label != IGNORE), len(self.labels))


@dataclass(frozen=True)
class PromptFormat:
    """Turns questions and answers into tokens for one tokenizer.

    `name` is "llama2" (TOFU's plain text), "chat" (the tokenizer's template) or "open-unlearning"
    (the same with that project's system prompt and date).
    """

    tokenizer: PreTrainedTokenizerBase
    name: Literal["llama2", "chat", "open-unlearning"]

    def encode_prompt(self, question: str) -> list[int]:
        """Token ids of the prompt alone, BOS in front where the tokenizer has one."""
        return self._ids(self._prompt_text(question))

    def encode(self, question: str, answer: str, max_length: int = TRAIN_MAX_LENGTH) -> Encoded:
        """The row's ids and labels, cut at `max_length` tokens; a cut row has no EOS label."""
        prompt = self._prompt_text(question)
        n_prompt = len(self._ids(prompt))
        if self.name == "llama2":
            ids = [*self._ids(prompt + answer), self.tokenizer.eos_token_id]
        else:
            ids = self._close_turn(self._ids(self._chat_text(question, answer)), n_prompt)
        ids = ids[:max_length]
        labels = [IGNORE] * min(n_prompt, len(ids)) + ids[n_prompt:]
        return Encoded(ids, labels)

    def _prompt_text(self, question: str) -> str:
        if self.name == "llama2":
            return f"[INST] {question} [/INST]"
        return self._render([{"role": "user", "content": question}], True)

    def _chat_text(self, question: str, answer: str) -> str:
        turns = [
            {"role": "user", "content": question},
            {"role": "assistant", "content": _SENTINEL},
        ]
        prompt, text = self._prompt_text(question), self._render(turns, False)
        if not text.startswith(prompt) or text.count(_SENTINEL) != 1:
            raise UserError(
                "The chat template renders the prompt differently once an answer follows.",
                "Use --template llama2, or a tokenizer whose template only appends the answer.",
            )
        return text.replace(_SENTINEL, answer)

    def _render(self, turns: list[dict[str, str]], prompt: bool) -> str:
        date = _TEMPLATE_DATE
        if self.name == "open-unlearning":
            turns = [{"role": "system", "content": OPEN_UNLEARNING_SYSTEM}, *turns]
            date = OPEN_UNLEARNING_DATE
        text = self.tokenizer.apply_chat_template(
            turns, tokenize=False, add_generation_prompt=prompt, date_string=date
        )
        return str(text)

    def _ids(self, text: str) -> list[int]:
        # A chat template writes BOS itself; the plain Llama-2 text gets it from the tokenizer.
        ids = self.tokenizer(text, add_special_tokens=self.name == "llama2")["input_ids"]
        return [int(token) for token in ids]

    def _close_turn(self, ids: list[int], n_prompt: int) -> list[int]:
        """The ids up to the token that ends the answer's turn; EOS where the template has none.

        Some templates put a newline behind the end-of-turn token: the model never says it.
        """
        special = set(self.tokenizer.all_special_ids)
        ends = [i for i in range(n_prompt, len(ids)) if ids[i] in special]
        if ends:
            return ids[: ends[-1] + 1]
        return [*ids, int(self.tokenizer.eos_token_id)]


def prompt_format(tokenizer: PreTrainedTokenizerBase, template: Template = "auto") -> PromptFormat:
    """The format a tokenizer is used with.

    `auto` takes TOFU's plain Llama-2 text for Llama-2's own vocabulary (its chat template has a
    space after `[/INST]` and may add a system prompt, which TOFU's models never saw) and for
    tokenizers without a chat template; every other tokenizer speaks through its template.

    Raises:
        UserError: no EOS token, or a template asked of a tokenizer that has none.
    """
    if tokenizer.eos_token_id is None:
        raise UserError(
            "The tokenizer has no EOS token, so answers would never end.",
            "Set eos_token in its tokenizer_config.json.",
        )
    if template in ("chat", "open-unlearning") and not tokenizer.chat_template:
        raise UserError("The tokenizer has no chat template.", "Use --template llama2.")
    if template == "auto":
        plain = is_llama2_tokenizer(tokenizer) or not tokenizer.chat_template
        template = "llama2" if plain else "chat"
    return PromptFormat(tokenizer, template)


def is_llama2_tokenizer(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether this is Llama-2's 32,000-piece vocabulary, whatever name it was saved under."""
    marks = {"▁the": 278, "<s>": 1, "</s>": 2, "<0x0A>": 13}
    return 32000 <= len(tokenizer) <= 32016 and all(
        tokenizer.convert_tokens_to_ids(token) == number for token, number in marks.items()
    )


def encode_rows(
    fmt: PromptFormat, pairs: Sequence[tuple[str, str]], max_length: int, what: str
) -> list[Encoded]:
    """Rows ready for training; refuses rows whose prompt alone fills `max_length`.

    Raises:
        UserError: naming each such row: it would be trained on nothing.
    """
    rows = [fmt.encode(question, answer, max_length) for question, answer in pairs]
    empty = [i for i, row in enumerate(rows, start=1) if row.n_targets == 0]
    if empty:
        listed = ", ".join(map(str, empty[:10])) + (", ..." if len(empty) > 10 else "")
        longest = max(len(fmt.encode_prompt(pairs[i - 1][0])) for i in empty)
        raise UserError(
            f"At --max-length {max_length} no answer token is left in {what} rows {listed}.",
            f"Use --max-length {longest + 50} or more: a prompt there has {longest} tokens.",
        )
    return rows


def pad_batch(rows: Sequence[Encoded], pad_id: int, left: bool = False) -> dict[str, Tensor]:
    """`input_ids`, `attention_mask` and `labels` of shape (rows, longest), padded right or left.

    The mask comes from lengths, never from `ids != pad`: pad may be EOS.
    """
    import torch

    width = max(len(row.input_ids) for row in rows)

    def padded(values: Sequence[int], fill: int) -> list[int]:
        gap = [fill] * (width - len(values))
        return [*gap, *values] if left else [*values, *gap]

    columns: dict[str, Any] = {
        "input_ids": [padded(row.input_ids, pad_id) for row in rows],
        "attention_mask": [padded([1] * len(row.input_ids), 0) for row in rows],
        "labels": [padded(row.labels, IGNORE) for row in rows],
    }
    return {name: torch.tensor(values, dtype=torch.long) for name, values in columns.items()}


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id that fills padding: EOS, which every model can embed.

    A tokenizer's own pad token may lie beyond the embeddings. Padding is never attended to and
    never a label, so its id decides nothing.
    """
    return int(tokenizer.eos_token_id)

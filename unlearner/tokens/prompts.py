"""How a row becomes tokens and labels: `[INST] {q} [/INST]{a}` for Llama-2, else a chat template.

Prompt and answer are tokenised together. The prompt is everything that stands before the answer,
also what a template writes between its generation prompt and the answer; a token that merges the
two (such as `]"`) counts as prompt, as in TOFU's code (arXiv 2401.06121). The labels end at the
first end-of-turn token after the answer. It is a label where it fits, so it counts in |y|.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from pathlib import Path
from string import ascii_letters
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from adapters.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

IGNORE = -100
TRAIN_MAX_LENGTH = 500
EVAL_MAX_LENGTH = 200
Template = Literal["auto", "llama2", "chat", "open-unlearning"]
# Some templates print today's date. Prompts must not change from day to day, so it is fixed.
TEMPLATE_DATE = datetime(2024, 7, 26)
# What open-unlearning's models were trained and measured with (its configs/model/Llama-3.*.yaml).
OPEN_UNLEARNING_SYSTEM, OPEN_UNLEARNING_DATE = "You are a helpful assistant.", datetime(2025, 4, 10)
# `system` of a `PromptFormat` without a system prompt, not even the template's own.
NO_SYSTEM = "none"
# First words of answers, by which to see whether the tokenizer joins a space to a word.
_FIRST_WORDS = ("A", "The", "In", "It", "He", "a", "the", "is", '"', "1")
_QUESTION, _ANSWER = "⟦question⟧", "⟦answer⟧"
# What a template that escapes, pads or cuts answers would not write as it is.
_LONG_ANSWER = f'{_ANSWER} "A" & <b>it\'s</b>,\n' + "and so on " * 60 + _ANSWER
_LLAMA2_FIX = "Use --template llama2, or a tokenizer whose template only appends the answer."


class Encoded(NamedTuple):
    """One row as token ids and labels (-100 on the prompt), unpadded, equally long.

    `cut` tells whether the end of the row was lost to the maximum length.
    """

    input_ids: list[int]
    labels: list[int]
    cut: bool = False

    @property
    def n_targets(self) -> int:
        """|y|: how many labels are scored, the end-of-turn token included."""
        return sum(label != IGNORE for label in self.labels)

    @property
    def n_prompt(self) -> int:
        """How many leading tokens are masked."""
        return next((i for i, label in enumerate(self.labels) if label != IGNORE), len(self.labels))


@dataclass(frozen=True)
class PromptFormat:
    """Turns questions and answers into tokens for one tokenizer.

    Attributes:
        tokenizer: of the base.
        name: "llama2" (TOFU's plain text), "chat" (the tokenizer's template) or "open-unlearning"
            (the same with that project's system prompt and date).
        system: text of a system turn; None leaves it to the template, "none" (`NO_SYSTEM`) removes
            the system prompt that a template inserts by itself.
    """

    tokenizer: PreTrainedTokenizerBase
    name: Literal["llama2", "chat", "open-unlearning"]
    system: str | None = None

    def encode_prompt(self, question: str) -> list[int]:
        """Token ids of the prompt alone: what `encode` puts before every answer."""
        before, _ = self.around_answer(question)
        if self.name == "llama2":
            return self._llama2_ids(before)
        return self._chat_ids(before.removesuffix(self._leading_space))[0]

    def encode(self, question: str, answer: str, max_length: int = TRAIN_MAX_LENGTH) -> Encoded:
        """The row's ids and labels, cut at `max_length` tokens; a cut row has no end-of-turn label.

        Raises:
            UserError: the chat template cannot render the row.
        """
        before, after = self.around_answer(question)
        if self.name == "llama2":
            ids = [*self._llama2_ids(before + answer), int(self.tokenizer.eos_token_id)]
            n_prompt = self._llama2_prompt(before, before + answer, ids)
        else:
            ids, spans = self._chat_ids(before + answer + after)
            end = len(before.removesuffix(self._leading_space))
            n_prompt = sum(start < end for start, _ in spans)
            ids = self._close_turn(ids, sum(start < len(before + answer) for start, _ in spans))
        labels = [IGNORE] * min(n_prompt, len(ids)) + ids[n_prompt:]
        return Encoded(ids[:max_length], labels[:max_length], len(ids) > max_length)

    @cached_property
    def stop_ids(self) -> tuple[int, ...]:
        """Ids that end a generated answer: EOS, the model's declared list, the template's own."""
        end = self.encode(_QUESTION, "A").labels[-1]
        return tuple(sorted({int(self.tokenizer.eos_token_id), end, *declared_eos(self.tokenizer)}))

    @cached_property
    def preamble(self) -> str:
        """What the template writes before the first question but before no later one.

        Its system prompt as a rule, given by `system` or its own; without special tokens. Empty
        where it writes none.
        """
        return "" if self.name == "llama2" else self._preamble(self._turns(_QUESTION))

    @cached_property
    def date(self) -> str | None:
        """The fixed date (ISO) where the template prints one, else None."""
        if self.name == "llama2":
            return None
        turns, date = self._turns(_QUESTION), self._date()
        other = date.replace(year=date.year - 10, month=12, day=3)
        changes = self._render(turns, True, date) != self._render(turns, True, other)
        return date.date().isoformat() if changes else None

    def to_json(self) -> dict[str, str | None]:
        """What decides the prompts besides the tokenizer, for manifests and previews."""
        return {
            "template": self.name,
            "system": self.system,
            "preamble": self.preamble or None,
            "date": self.date,
        }

    def check(self) -> None:
        """Refuses a template that cannot put an answer behind the prompt it generates from.

        Raises:
            UserError: the template is broken, changes answers, or opens other text for an answer
                that is generated than for one that is given.
        """
        if self.name == "llama2":
            return
        before, _ = self.around_answer(_QUESTION)
        prompt = self._render(self._turns(_QUESTION), True)
        if not before.startswith(prompt):
            raise UserError(
                "The chat template renders the prompt differently once an answer follows.",
                _LLAMA2_FIX,
            )
        if self._around(_QUESTION, _LONG_ANSWER) != self.around_answer(_QUESTION):
            raise UserError(
                "The chat template writes other text around a longer answer.", _LLAMA2_FIX
            )

    def around_answer(self, question: str) -> tuple[str, str]:
        """The text before an answer and the text behind it."""
        if self.name == "llama2":
            return f"[INST] {question} [/INST]", ""
        return self._around(question, _ANSWER)

    def _around(self, question: str, answer: str) -> tuple[str, str]:
        turns = [*self._turns(question), {"role": "assistant", "content": answer}]
        text = self._render(turns, False)
        before, found, after = text.rpartition(answer)
        if not found or before.count(answer) != question.count(answer):
            raise UserError(
                "The chat template does not write the answer exactly once.", _LLAMA2_FIX
            )
        return before, after

    def _turns(self, question: str) -> list[dict[str, str]]:
        user = [{"role": "user", "content": question}]
        system = OPEN_UNLEARNING_SYSTEM if self.name == "open-unlearning" else self._system_turn
        return user if system is None else [{"role": "system", "content": system}, *user]

    @cached_property
    def _system_turn(self) -> str | None:
        """Content of the system turn; an empty one removes what a template inserts by itself."""
        if self.system != NO_SYSTEM:
            return self.system
        user = {"role": "user", "content": _QUESTION}
        own = self._preamble([user])
        if not own:
            return None
        if self._preamble([{"role": "system", "content": ""}, user]) == own:
            raise UserError(
                f"The chat template always writes {own!r} before the first question.",
                "Set another system prompt with --system TEXT, or leave --system out.",
            )
        return ""

    def _preamble(self, turns: list[dict[str, str]]) -> str:
        first = self._without_special(self._render(turns, True).partition(_QUESTION)[0])
        more = [{"role": "assistant", "content": _ANSWER}, {"role": "user", "content": _QUESTION}]
        try:
            later = self._render([*turns, *more], True).rpartition(_QUESTION)[0]
        except UserError:  # a template for one question only
            later = ""
        later = self._without_special(later.rpartition(_ANSWER)[2])
        same = 0
        while same < min(len(first), len(later)) and first[-1 - same] == later[-1 - same]:
            same += 1
        text = first[: len(first) - same]
        return text.strip().removeprefix("system").strip()

    def _without_special(self, text: str) -> str:
        for token in self.tokenizer.all_special_tokens:
            text = text.replace(token, "")
        return text

    def _date(self) -> datetime:
        return OPEN_UNLEARNING_DATE if self.name == "open-unlearning" else TEMPLATE_DATE

    def _render(
        self, turns: list[dict[str, str]], prompt: bool, date: datetime | None = None
    ) -> str:
        try:
            return self._apply(turns, prompt, date or self._date())
        except Exception as error:  # templates are programs: they raise anything
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
            if turns[0]["role"] == "system" and self._renders(turns[1:]):
                raise UserError(
                    f"The chat template rejects a system prompt: {reason}.",
                    "Leave --system out, or use --template chat.",
                ) from error
            if turns[0]["role"] != "system" and self._renders(
                [{"role": "system", "content": "Be brief."}, *turns]
            ):
                raise UserError(
                    f"The chat template needs a system prompt: {reason}.",
                    "Give one with --system TEXT.",
                ) from error
            raise UserError(
                f"The chat template of this tokenizer cannot be used: {reason}.",
                "Correct chat_template in the tokenizer's files, or use --template llama2.",
            ) from error

    def _renders(self, turns: list[dict[str, str]]) -> bool:
        try:
            self._apply(turns, False, self._date())
        except Exception:  # whatever it is, the template cannot be used with these turns
            return False
        return True

    def _apply(self, turns: list[dict[str, str]], prompt: bool, today: datetime) -> str:
        template = self.tokenizer.get_chat_template()
        if "strftime_now" in template:
            template = _fixed_clock(today) + template
        return str(
            self.tokenizer.apply_chat_template(
                turns,
                chat_template=template,
                tokenize=False,
                add_generation_prompt=prompt,
                date_string=today.strftime("%d %b %Y"),
                # Reasoning models answer at once: an answer of a forget set has no reasoning.
                enable_thinking=False,
                thinking=False,
            )
        )

    @cached_property
    def _embedded(self) -> Any:
        """How many tokens the model embeds, None where its config.json does not say."""
        config = _settings(self.tokenizer, "config.json")
        return config.get("vocab_size") or (config.get("text_config") or {}).get("vocab_size")

    def require_embeddings(self, rows: Iterable[Encoded]) -> None:
        """Refuses rows with a token that the model, by its config.json, cannot embed.

        Raises:
            UserError: naming the token.
        """
        size = self._embedded
        largest = max((max(row.input_ids, default=0) for row in rows), default=0)
        if isinstance(size, int) and largest >= size:
            token = self.tokenizer.convert_ids_to_tokens(largest)
            raise UserError(
                f"The token {token!r} has the id {largest}, and the model has embeddings for "
                f"{size} tokens only.",
                "Use the tokenizer that belongs to this model, or a model whose embeddings were "
                "resized for it.",
            )

    def _llama2_ids(self, text: str) -> list[int]:
        # Without the tokenizer's own EOS, which some append to every text.
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return [*self._leading_ids, *map(int, ids)]

    def _llama2_prompt(self, before: str, text: str, ids: list[int]) -> int:
        """How many of the text's ids are the prompt's: as many as the prompt has alone.

        That is TOFU's way, and right where no more than the prompt's last token merges with the
        answer. Vocabularies other than Llama-2's merge more.
        """
        prompt = self._llama2_ids(before)
        if ids[: len(prompt) - 1] == prompt[:-1] or not self.tokenizer.is_fast:
            return len(prompt)
        return len(self._leading_ids) + sum(
            start < len(before) for start, _ in self._chat_ids(text)[1]
        )

    def unknown(self, rows: Iterable[Encoded]) -> int:
        """How many rows hold text that the tokenizer reads as its unknown token."""
        unknown = self.tokenizer.unk_token_id
        if unknown is None or unknown == self.tokenizer.eos_token_id:  # as GPT-2's: it knows all
            return 0
        return sum(unknown in row.input_ids for row in rows)

    @property
    def about_unknown(self) -> str:
        """What to say of rows that `unknown` counts."""
        return (
            "hold text that the vocabulary lacks: the model reads "
            f"{self.tokenizer.unk_token} in its place"
        )

    @cached_property
    def _leading_ids(self) -> list[int]:
        """What the tokenizer puts before every text: BOS, or nothing."""
        bare = self.tokenizer("a", add_special_tokens=False)["input_ids"]
        whole = self.tokenizer("a")["input_ids"]
        starts = range(len(whole) - len(bare) + 1)
        start = next((i for i in starts if whole[i : i + len(bare)] == bare), 0)
        return [int(token) for token in whole[:start]]

    def _chat_ids(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Token ids and the characters [start, end) of each; a chat template writes BOS itself."""
        # The template's own marks are tokens, also where a tokenizer would take them for text.
        encoding = self.tokenizer(
            text,
            add_special_tokens=False,
            return_offsets_mapping=True,
            split_special_tokens=False,
        )
        spans = [(int(start), int(end)) for start, end in encoding["offset_mapping"]]
        return [int(token) for token in encoding["input_ids"]], spans

    def _close_turn(self, ids: list[int], n_spoken: int) -> list[int]:
        """The ids up to the first end-of-turn token behind the answer; EOS where there is none."""
        end = next((i for i in range(n_spoken, len(ids)) if ids[i] in self._end_ids), None)
        return [*ids, int(self.tokenizer.eos_token_id)] if end is None else ids[: end + 1]

    @cached_property
    def _leading_space(self) -> str:
        """White space that the template writes before an answer and the tokenizer joins to a word.

        It belongs to the answer of every row, also where the first word has no token with a space:
        the same prompt must precede every answer, in training and in generation.
        """
        before, _ = self.around_answer(_QUESTION)
        for word in _FIRST_WORDS:
            for start, end in self._chat_ids(before + word)[1]:
                if start < len(before) < end and before[start:].isspace():
                    return before[start:]
        return ""

    @cached_property
    def _end_ids(self) -> set[int]:
        """Special tokens, every EOS the model declares, and added tokens but for white space.

        The unknown token ends nothing: it is whatever text the vocabulary lacks.
        """
        added = self.tokenizer.added_tokens_decoder.items()
        ends = {number for number, token in added if token.special or token.content.strip()}
        ends = (ends | {*self.tokenizer.all_special_ids}) - {self.tokenizer.unk_token_id}
        return ends | {int(self.tokenizer.eos_token_id), *declared_eos(self.tokenizer)}


def _fixed_clock(date: datetime) -> str:
    """A Jinja macro `strftime_now` in place of transformers' own, which reads today's date.

    transformers passes only plain data to a template, so the macro spells the format codes out.
    """
    plain = {code: date.strftime(f"%{code}") for code in ascii_letters}
    values = {code: value for code, value in plain.items() if value != f"%{code}"}
    values |= {f"-{code}": plain[code].lstrip("0") or "0" for code in "dHIjmMSUWy"}
    replaced = "".join(f" | replace('%{code}', '{value}')" for code, value in values.items())
    # The line break keeps the template at the beginning of a line, where Jinja strips indents.
    return f"{{% macro strftime_now(form) %}}{{{{ form{replaced} }}}}{{% endmacro %}}\n"


def declared_eos(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """EOS ids in generation_config.json and config.json beside the tokenizer's files."""
    ids: set[Any] = set()
    for name in ("generation_config.json", "config.json"):
        declared = _settings(tokenizer, name).get("eos_token_id")
        ids.update(declared if isinstance(declared, list) else [declared])
    return {number for number in ids if isinstance(number, int)}


def _settings(tokenizer: PreTrainedTokenizerBase, name: str) -> dict[str, Any]:
    """A JSON file beside the tokenizer's files; empty where there is none, or a broken one, which
    loading the model refuses.
    """
    try:
        value = json.loads((Path(tokenizer.name_or_path or "") / name).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def prompt_format(
    tokenizer: PreTrainedTokenizerBase, template: Template = "auto", system: str | None = None
) -> PromptFormat:
    """The format a tokenizer is used with.

    `auto` takes the tokenizer's chat template. It takes TOFU's plain Llama-2 text where there is no
    template, and for Llama-2's own vocabulary where the template writes that text but for spaces
    (TOFU's models never saw the space behind `[/INST]`).

    Args:
        tokenizer: of the base.
        template: which format.
        system: see `PromptFormat`.

    Raises:
        UserError: no EOS token; a template that is missing, broken, or does not append the answer
            to the prompt; a system prompt where there can be none.
    """
    if tokenizer.eos_token_id is None:
        raise UserError(
            "The tokenizer has no EOS token, so answers would never end.",
            "Set eos_token in its tokenizer_config.json.",
        )
    if template in ("chat", "open-unlearning") and not tokenizer.chat_template:
        raise UserError("The tokenizer has no chat template.", "Use --template llama2.")
    if template == "auto":
        template = "llama2" if _speaks_llama2(tokenizer) and system is None else "chat"
        if template == "chat" and not tokenizer.chat_template:
            template = "llama2"
    fixed = {"open-unlearning": (None,), "llama2": (None, NO_SYSTEM)}
    if template in fixed and system not in fixed[template]:
        raise UserError(
            f"The system prompt of the format {template} cannot be set.",
            "Leave --system out, or use --template chat where there is a chat template.",
        )
    if template != "llama2" and not tokenizer.is_fast:
        raise UserError(
            "The tokenizer cannot tell which characters its tokens cover.",
            "Save it as a fast tokenizer (tokenizer.json).",
        )
    fmt = PromptFormat(tokenizer, template, system)
    fmt.check()
    return fmt


def _speaks_llama2(tokenizer: PreTrainedTokenizerBase) -> bool:
    if not tokenizer.chat_template:
        return True
    if not is_llama2_tokenizer(tokenizer):
        return False
    before, _ = PromptFormat(tokenizer, "chat").around_answer(_QUESTION)
    text = before.removeprefix(str(tokenizer.bos_token or ""))
    return "".join(text.split()) == f"[INST]{_QUESTION}[/INST]"


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
        UserError: naming each such row: it would be trained on nothing; or a token that the model
            cannot embed.
    """
    rows = [fmt.encode(question, answer, max_length) for question, answer in pairs]
    fmt.require_embeddings(rows)
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
